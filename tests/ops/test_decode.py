"""Decoding by pieces of the keys: against the definition, and what its bits must not depend on."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from cases import Case
from compare import check_forward
from machine_code import checked, sampled
from needs import needs_nvrtc
from test_forward_paged import AUX, Launch, attend, in_pages, launched

import cuflash
from cuflash import arch, array, dtypes
from cuflash.array import of_numpy
from cuflash.errors import ArgumentError, EmulatorError, UnsupportedError
from cuflash.jit import layout, module
from cuflash.jit.source import Edit
from cuflash.ops import decode, forward
from cuflash.trace import tracer


def prepared(given: Launch, split_size: int | None, multiprocessors: int = 108) -> tuple[Any, dict[str, np.ndarray]]:
    """The plan for a forward launch's problem, and its arrays; results and workspace are full of NaN."""
    target = dataclasses.replace(given.plan.arch, multiprocessors=multiprocessors)
    plan = decode.DecodePlan(given.plan.problem, target, split_size)
    arrays = dict(given.arrays)
    for name, (shape, dtype) in plan.workspace.items():
        arrays[name] = array.empty_host(shape, dtype)
    for name in RESULTS + tuple(plan.workspace):
        old = arrays[name]
        arrays[name] = array.empty_host(old.shape, dtypes.BY_NUMPY[old.dtype])
        arrays[name].reshape(-1).view(np.uint8)[...] = 0xFF
    return plan, arrays


RESULTS = ("out", "lse", "max_logit")


def decoded(given: Launch, split_size: int | None = 64, multiprocessors: int = 108) -> tuple[np.ndarray, ...]:
    """(out, lse, max_logit) of a forward launch's problem, by pieces of `split_size` keys or in even shares."""
    plan, arrays = prepared(given, split_size, multiprocessors)
    plan.launch({name: of_numpy(x) for name, x in arrays.items()}, **given.numbers)
    return tuple(arrays[name] for name in RESULTS)


def check(case: Case, rng: np.random.Generator, page_size: int = 0, split_size: int = 64, **how: Any) -> None:
    """Both ways to cut against the definition: pieces of one size, even shares of some number of blocks."""
    inputs = case.inputs()
    hints = {} if case.max_seqlen_q is None else {"max_seqlen_q": case.max_seqlen_q}
    mods = how.pop("mods", {})
    given = launched(attend(inputs, **hints, **mods))
    if page_size:
        given = in_pages(given, page_size, rng, **how)
    for size, multiprocessors in ((split_size, 108), (None, int(rng.integers(1, 9))), (None, 108)):
        results = decoded(given, size, multiprocessors)
        try:
            check_forward(inputs.q, inputs.k, inputs.v, *results, **inputs.keywords, **mods)
        except AssertionError as error:
            error.add_note(f"split_size={size}, multiprocessors={multiprocessors}, page size {page_size}: {case!r}")
            raise


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (70, 0)},
    "all": {"causal": True, "window_size": (150, 0), "softcap": 10.0, "alibi": "batch", "sink": "float32"},
    "scale": {"scale": -0.3, "alibi": "head", "sink": "element"},
}


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("page_size", [0, 16])
@pytest.mark.parametrize("q_len, heads", [(1, (8, 1)), (5, (4, 2)), (16, (2, 2)), (13, (16, 2))])
def test_dense_queries(features, page_size, q_len, heads, rng):
    heads_q, heads_kv = heads
    case = Case(
        "float16", (q_len,) * 4, (300,) * 4, heads_q, heads_kv, 64, 64, packed=False, seqused_k=(300, 0, 5, 129),
        **FEATURES[features],
    )  # fmt: skip
    check(case, rng, page_size)


def test_padding_before_the_first_key(rng):
    case = Case("float16", (3,) * 3, (300,) * 3, 4, 2, 64, 64, packed=False, causal=True, seqused_k=(300, 0, 70))
    check(case, rng, 16, leftpad=np.array([3, 5, 130]))


@pytest.mark.parametrize("hint", [None, 1, 40])
def test_packed_queries_over_pages(hint, rng):
    """Chunks of prompts beside single steps, an empty sequence, rows behind the last."""
    lengths = (300, 7, 256, 64)
    case = Case("bfloat16", (1, 0, 40, 3), lengths, 4, 2, 96, 64, causal=True, sink="float32")
    case = dataclasses.replace(case, max_seqlen_q=hint)
    check(case, rng, 24, 128)


@pytest.mark.parametrize(
    "dtype, d",
    [("float16", 30), ("bfloat16", 96), ("bfloat16", 192), ("float16", 256), ("float32", 128), ("float32", 192),
     ("float32", 256)],
)  # fmt: skip
def test_head_dims(dtype, d, rng):
    case = Case(dtype, (2, 2), (150, 150), 4, 1, d, d, packed=False, causal=True, seqused_k=(150, 33))
    check(case, rng, page_size=16)


TABLE = np.random.default_rng(0).standard_normal((8, 400)).astype(np.float32)
DOCUMENTS = np.sort(np.random.default_rng(1).integers(0, 5, 400)).astype(np.int32)
REACHES = np.array([20, 90, 150, 400, 5, 33, 64, 65], np.int32)


def near(b, h, q_idx, kv_idx, q_len, kv_len):
    """A window of its own for every head."""
    behind = q_idx + kv_len - q_len - kv_idx
    return (behind >= 0) & (behind < REACHES[h])


# Terms of the key alone, shared by all heads; of head and key; of nothing but the query; bounds, and conditions beside.
MODS: dict[str, dict[str, Any]] = {
    "a bias of the key, documents": {
        "score_mod": lambda s, b, h, q_idx, kv_idx: s + TABLE[0, kv_idx],
        "mask_mod": lambda b, h, q_idx, kv_idx: (DOCUMENTS[q_idx] == DOCUMENTS[kv_idx]) | (kv_idx < 7),
    },
    "a bias of head and key, a window of each head": {
        "score_mod": lambda s, b, h, q_idx, kv_idx: s * 0.5 + TABLE[h, kv_idx] * TABLE[h, q_idx + 3],
        "mask_mod": near,
    },
    "from the 20th key on": {"mask_mod": lambda b, h, q_idx, kv_idx: kv_idx >= 20},
    "every third key of odd heads": {"mask_mod": lambda b, h, q_idx, kv_idx: (h % 2 == 0) | (kv_idx % 3 == 1)},
}


@pytest.mark.parametrize("mods", MODS)
@pytest.mark.parametrize("page_size, q_len, heads", [(0, 3, (6, 2)), (16, 1, (8, 8)), (16, 20, (8, 1))])
def test_mods(mods, page_size, q_len, heads, rng):
    """A row's head is its own: softcap, ALiBi, sink and a window beside."""
    features: dict[str, Any] = {"window_size": (99, 3)}
    if "bias" in mods:
        features = {"softcap": 9.0, "alibi": "head", "sink": "float32"}
    case = Case(
        "float16", (q_len,) * 3, (300,) * 3, heads[0], heads[1], 64, 64, packed=False, seqused_k=(300, 2, 129),
        **features,
    )  # fmt: skip
    check(case, rng, page_size, mods=MODS[mods])


@pytest.mark.parametrize("split_size", [128, None])
@pytest.mark.parametrize(
    "mask_mod, reach",
    [(lambda b, h, q, k, q_len, kv_len: q + kv_len - q_len - k <= 90, 91), (near, 400)],
    ids=["window", "a window of each head"],
)
def test_tiles_without_a_score_are_not_read(mask_mod, reach, split_size):
    """Neither what a mask leaves nothing of, nor what it leaves nothing of for any head of the group."""
    inputs = Case("float16", (1,), (1024,), 8, 1, 64, 64, packed=False).inputs()
    given = launched(attend(inputs, mask_mod=mask_mod))
    with cuflash.emulator.counting() as counters:
        results = decoded(given, split_size, 1)
    tiles = 1024 // 64 - (1024 - reach) // 64
    assert counters.global_bytes_read["k"] == counters.global_bytes_read["v"] == tiles * 64 * 64 * 2
    check_forward(inputs.q, inputs.k, inputs.v, *results, **inputs.keywords, mask_mod=mask_mod)


@pytest.mark.parametrize("mods", [{}, {"mask_mod": near}], ids=["", "mask"])
@pytest.mark.parametrize(
    "name, d, stages", [("sm_86", 192, 1), ("sm_80", 128, 2), ("sm_90a", 128, 3), ("sm_80", 32, 4)]
)
def test_as_many_stages_as_a_chip_has_room_for(name, d, stages, mods, rng):
    """Pieces of more tiles than stages, and of fewer."""
    inputs = Case("bfloat16", (2, 2), (600, 600), 8, 2, d, d, packed=False, seqused_k=(600, 90)).inputs()
    given = in_pages(launched(attend(inputs, **mods), name), 16, rng)
    for size, multiprocessors in ((128, 1), (640, 1), (None, 1)):
        assert prepared(given, size)[0].variant.stages == stages
        results = decoded(given, size, multiprocessors)
        check_forward(inputs.q, inputs.k, inputs.v, *results, **inputs.keywords, **mods)


@pytest.mark.parametrize("page_size", [0, 16])
def test_used_queries(page_size, rng):
    case = Case(
        "float16", (9,) * 4, (200,) * 4, 4, 2, 64, 64, packed=False, causal=True, sink="element",
        seqused_q=(9, 0, 3, 1), seqused_k=(200, 100, 0, 7),
    )  # fmt: skip
    check(case, rng, page_size)


# Few variants: head dims within their classes, rows aligned or not, are all that changes in them.
DRAWN = (("float16", 64, 64), ("bfloat16", 128, 128), ("float32", 96, 32))
CASES_EACH = 6


def draw(dtype: str, d: int, d_v: int, rng: np.random.Generator) -> Case:
    """Up to 16 queries (or chunks of a prompt) over short and long caches, any sharing of heads, any features."""
    pick = lambda *options: options[rng.integers(len(options))]  # noqa: E731
    packed, heads_kv, group = bool(rng.random() < 0.3), pick(1, 2, 3), pick(1, 1, 2, 8)
    batch, length = int(rng.integers(1, 6)), pick(1, 7, 64, 65, 200, 500)
    q_len = int(rng.integers(1, 17))
    lengths_q = tuple(pick(0, 1, q_len, 50) if packed else q_len for _ in range(batch))
    used = tuple(pick(0, 1, length, length, int(rng.integers(0, length + 1))) for _ in range(batch))
    fields: dict[str, Any] = {}
    if rng.random() < 0.5:
        fields["causal"] = True
    if rng.random() < 0.3:
        fields["window_size"] = pick((0, 0), (63, 0), (64, -1), (100, 20), (-1, 16))
    if rng.random() < 0.3:
        fields["softcap"] = pick(1.0, 30.0)
    if rng.random() < 0.3:
        fields["alibi"] = pick("head", "batch")
    if rng.random() < 0.3:
        fields["sink"] = pick("float32", "element")
    if rng.random() < 0.2:
        fields["scale"] = pick(0.0, -0.2, 0.5)
    if not packed and rng.random() < 0.3:
        fields["seqused_q"] = tuple(int(rng.integers(0, q_len + 1)) for _ in range(batch))
    if packed and rng.random() < 0.5:
        fields["max_seqlen_q"] = pick(1, max(*lengths_q, 1))
    return Case(
        dtype, lengths_q, used if packed else (length,) * batch, group * heads_kv, heads_kv, d, d_v, packed=packed,
        seqused_k=None if packed else used, seed=int(rng.integers(2**31)), **fields,
    )  # fmt: skip


@pytest.mark.parametrize("dtype, d, d_v", DRAWN)
def test_generated_cases(dtype, d, d_v, seed):
    rng = np.random.default_rng([seed, d])
    for _ in range(CASES_EACH):
        case = draw(dtype, d, d_v, rng)
        page_size = int(rng.choice([1, 3, 16, 100])) if case.packed or rng.random() < 0.5 else 0
        if max(case.lengths_q):
            check(case, rng, page_size, int(rng.choice([64, 128, 512])))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(30))
def test_many_generated_cases(number, seed):
    rng = np.random.default_rng([seed, number])
    for _ in range(10):
        case = draw(*DRAWN[rng.integers(len(DRAWN))], rng)
        page_size = int(rng.choice([1, 2, 16, 48, 256])) if case.packed or rng.random() < 0.5 else 0
        if max(case.lengths_q):
            check(case, rng, page_size, int(rng.choice([64, 128, 512])))


@pytest.mark.parametrize(
    "lengths_q, lengths_k, packed",
    [((), (), True), ((0, 0), (9, 9), True), ((3, 0), (0, 0), True), ((2, 2), (0, 0), False), ((1, 1), (1, 1), False)],
)
def test_nothing_or_next_to_it(lengths_q, lengths_k, packed, rng):
    case = Case("float16", lengths_q, lengths_k, 4, 2, 64, 64, packed=packed, causal=True, sink="float32")
    check(case, rng, 16)


@pytest.mark.parametrize("split_size", [64, None])
def test_a_nan_that_a_sequence_owns_is_not_hidden(split_size):
    inputs = Case("float16", (1,) * 3, (300,) * 3, 2, 1, 64, 64, packed=False).inputs()
    inputs.k[1, 7, 0, 3] = np.nan
    out, lse, _ = decoded(launched(attend(inputs)), split_size, 2)
    for x in (out, lse):
        assert np.isnan(x[1]).all() and np.isfinite(x[[0, 2]]).all()


# What bits, bytes and compiles depend on -----------------------------------------------------------------------------


def test_same_bits_in_any_batch(rng):
    """With split_size fixed: alone and among others, in pages and in one piece, whatever the room for keys."""
    case = Case("float16", (2, 2, 2), (400,) * 3, 8, 2, 64, 64, packed=False, causal=True, seqused_k=(400, 3, 130))
    inputs = case.inputs()
    together = decoded(launched(attend(inputs)))
    for b in range(3):
        n = inputs.keywords["seqused_k"][b]
        call = lambda: cuflash.attention(  # noqa: E731
            inputs.q[b : b + 1], inputs.k[b : b + 1, :n], inputs.v[b : b + 1, :n], causal=True,  # noqa: B023
            aux=("lse", "max_logit"),
        )  # fmt: skip
        alone = launched(call)
        for given in (alone, in_pages(alone, 16, rng)):
            for x, y in zip(decoded(given), together, strict=True):
                assert x[0].tobytes() == y[b].tobytes()


@pytest.mark.parametrize("split_size", [64, None])
def test_same_bits_under_any_schedule(split_size, rng):
    inputs = Case("float16", (3, 3), (200, 200), 4, 1, 64, 64, packed=False, causal=True).inputs()
    given = in_pages(launched(attend(inputs)), 16, rng)
    found = set()
    for i in range(8):
        with cuflash.emulator.schedule(seed=i, landing="early" if i % 3 == 2 else "late"):
            found.add(b"".join(x.tobytes() for x in decoded(given, split_size, 2)))
    assert len(found) == 1


@pytest.mark.parametrize("split_size", [512, None])
@pytest.mark.parametrize("page_size", [0, 16])
def test_keys_and_values_are_read_once(page_size, split_size, rng):
    """A step of generation, 8 query heads to a key head, at 4k: for all heads of a group together."""
    inputs = Case("float16", (1,), (4096,), 8, 1, 64, 64, packed=False).inputs()
    given = launched(attend(inputs))
    if page_size:
        given = in_pages(given, page_size, rng)
    with cuflash.emulator.counting() as counters:
        decoded(given, split_size)
    for name in "kv":
        assert counters.global_bytes_read[name] == 4096 * 64 * 2


@pytest.mark.parametrize("split_size", [64, None])
def test_launch_bytes_do_not_depend_on_lengths(split_size):
    """What a replayed CUDA graph rests on."""
    inputs = Case("float16", (1,), (256,), 2, 1, 64, 64, packed=False, seqused_k=(200,)).inputs()
    plan, arrays = prepared(launched(attend(inputs)), split_size)
    views = {name: of_numpy(x) for name, x in arrays.items()}
    before = plan.params(views), plan._launches
    arrays["seqused_k"][...] = 3
    plan.launch(views, backend="emulator")
    assert (plan.params(views), plan._launches) == before


def test_numbers_do_not_compile(rng):
    """Lengths, batch, heads, pages, sizes and numbers of pieces: one set of kernels, and one more for even shares."""
    specs = set()
    for batch, length, page_size, split_size, group in ((1, 40, 16, 64, 1), (3, 100, 1, 128, 2), (2, 33, 64, 640, 4)):
        q, k = (np.ones((batch, n, h, 64), np.float16) for n, h in ((3, 2 * group), (length, 2)))
        given = in_pages(launched(lambda: cuflash.attention(q, k, k, aux=AUX)), page_size, rng)  # noqa: B023
        specs |= {prepared(given, split_size)[0].specs, prepared(given, None, batch)[0].specs[1:]}
    assert len(specs) == 1


def test_what_is_refused():
    inputs = Case("float16", (1,), (64,), 2, 1, 64, 64, packed=False).inputs()
    problem = launched(attend(inputs)).plan.problem
    target = arch.named("sm_80")
    for size, instead in ((0, 64), (-64, 64), (63, 64), (100, 128), (2**30 + 64, 2**30)):
        with pytest.raises(ArgumentError, match=f"split_size={size} must be a multiple of 64.*pass {instead}$"):
            decode.DecodePlan(problem, target, size)
    with pytest.raises(UnsupportedError, match="dropout"):
        decode.DecodePlan(dataclasses.replace(problem, dropout_p=0.5), target)
    with pytest.raises(UnsupportedError, match="cu_seqlens_k"):
        decode.DecodePlan(dataclasses.replace(problem, packed=True), target, 64)
    with pytest.raises(UnsupportedError, match="batch=65535"):
        decode.DecodePlan(dataclasses.replace(problem, batch=65535), target, 64)


# Even shares ---------------------------------------------------------------------------------------------------------


def units_of(case: Case, block_k: int) -> list[int]:
    """Units that each sequence counts (kernels_cu/tile/pieces.cuh), for sequences of one row tile a key head."""
    found = []
    left, right = (10**9 if w < 0 else w for w in case.window_size)
    right = 0 if case.causal else right
    for m, n in zip(case.seqused_q or case.lengths_q, case.seqused_k or case.lengths_k, strict=True):
        assert m * case.heads_q // case.heads_kv <= 64
        begin = min(max(n - m - left, 0), n)
        end = max(min(n + right, n), begin)
        found.append((-(-end // block_k) - begin // block_k) * case.heads_kv if m and begin < end else 0)
    return found


@pytest.mark.parametrize(
    "features", [{}, {"causal": True, "window_size": (300, 0)}, {"packed": True}], ids=["dense", "window", "packed"]
)
def test_shares_are_even(features, rng):
    """A skewed batch: one long cache among short ones, and empty ones. Each block's bytes of keys are counted by
    running it alone; the busiest has at most 1.1 times the mean, and all have every key once."""
    lengths = (0, 3000, 70, 64, 0, 1, 500, 130, 900, 0)
    fields = {"packed": False, "seqused_k": lengths} | features
    rows = lengths if fields["packed"] else (3000,) * 10
    if fields["packed"]:
        fields |= {"seqused_k": None}
    case = Case("float16", (2,) * 10, rows, 4, 2, 64, 64, **fields)
    given = in_pages(launched(attend(case.inputs())), 16, rng)
    plan, arrays = prepared(given, None, 3)
    views = {name: of_numpy(x) for name, x in arrays.items()}
    plan.launch(views, backend="emulator")
    units = units_of(case, 64)
    np.testing.assert_array_equal(arrays["unit_begin"], np.cumsum([0, *units]))

    # The kernel, but that all blocks but one leave: which one, a field says that even shares do not use.
    alone = dataclasses.replace(
        plan.spec, edits=(Edit(PIECES, "if (hw::block_idx_x() >= shares.count)", "if (hw::block_idx_x() != p.splits)"),)
    )
    struct, tiles = layout.load("DecodeParams"), []
    buffers = forward.buffers_of(views, ("out", "lse", "max_logit", *plan.workspace))
    for block in range(plan.grid[0]):
        params = struct.pack(**struct.unpack(plan.params(views)) | {"splits": block})
        with cuflash.emulator.counting() as counters:
            module.load(alone, plan.arch, "emulator", None).launch(plan.grid, params, buffers=buffers)
        assert counters.total_matrix_instructions % MMA_A_TILE == 0
        tiles.append(counters.total_matrix_instructions // MMA_A_TILE)
    assert sum(tiles) == sum(units)
    assert max(tiles) <= 1.1 * sum(units) / len(tiles)


MMA_A_TILE = 2 * (64 // 8) * (64 // 16)  # of a key tile, for one warp that has rows


def test_many_sequences_are_counted():
    """More sequences than the planner has threads, with more than 2**31 units in all."""
    batch, heads = 3000, 60_000
    q = np.zeros((1, 1, 1, 64), np.float16)
    given = launched(lambda: cuflash.attention(q, q, q, seqused_k=np.ones(1, np.int32), aux=AUX))
    problem = dataclasses.replace(given.plan.problem, batch=batch, heads_q=heads, heads_kv=heads, k_rows=2**20)
    plan = decode.DecodePlan(problem, given.plan.arch)
    used = np.random.default_rng(0).integers(0, 2**20, batch).astype(np.int32)
    unit_begin = np.full(batch + 1, -1, np.int64)
    views = {name: of_numpy(x) for name, x in (given.arrays | {"seqused_k": used, "unit_begin": unit_begin}).items()}
    buffers = forward.buffers_of(views, ("unit_begin",))
    module.load(decode.PLAN, plan.arch, "emulator", None).launch((1, 1, 1), plan.params(views), buffers=buffers)
    np.testing.assert_array_equal(unit_begin, np.cumsum([0, *(-(-used.astype(np.int64) // 64) * heads)]))
    assert unit_begin[-1] > 2**31


def test_a_share_finds_its_sequence_among_many(rng):
    lengths = tuple(int(n) for n in rng.integers(0, 3, 1200))
    case = Case("float16", (1,) * 1200, (2,) * 1200, 1, 1, 64, 64, packed=False, seqused_k=lengths)
    given = launched(attend(case.inputs()))
    for name, x in zip(RESULTS, decoded(given, None, 4), strict=True):
        np.testing.assert_allclose(x.astype(np.float32), given.arrays[name].astype(np.float32), atol=2e-3)


# Machine code --------------------------------------------------------------------------------------------------------


def specs_of(target: arch.Arch) -> list[module.KernelSpec]:
    """The representative kernels, and those with the most that mods may ask for."""
    bound = tracer.bind(*(MODS["a bias of head and key, a window of each head"][n] for n in ("score_mod", "mask_mod")))
    wide = ((dtypes.bfloat16, 128), (dtypes.bfloat16, 256), (dtypes.float32, 256))
    variants = [decode.choose_variant(t, d, d, 16, target, mods=bound.mods, paged=True) for t, d in wide]
    return [*decode.representative(target), *map(decode.kernel_spec, variants)]


@pytest.mark.parametrize(
    "name, index",
    sampled(specs_of, {"sm_80": slice(8), "sm_90a": slice(1), "sm_100a": slice(0), "sm_120a": slice(0)}),
)
@needs_nvrtc
def test_machine_code(name, index):
    checked(specs_of(arch.named(name))[index], name)


# Planted bugs --------------------------------------------------------------------------------------------------------

KERNEL, COMBINE, PIECES, PLAN = "decode_sm80.cu", "combine.cu", "tile/pieces.cuh", "decode_plan.cu"
# name -> (kernel, edit)
BUGS = {
    "wait for K missing": (KERNEL, Edit(KERNEL, "first time, Q\n    hw::cp_async_wait<2 * kStages - 2>();", "\n")),
    "wait for V missing": (KERNEL, Edit(KERNEL, "copies of V\n    hw::cp_async_wait<2 * kStages - 2>();", "\n")),
    "barrier of K missing": (KERNEL, Edit(KERNEL, "previous V any more\n    hw::sync_threads();", "previous V any\n")),
    "barrier of V missing": (KERNEL, Edit(KERNEL, "reads K any more\n    hw::sync_threads();", "reads K any more\n")),
    "a wait for a group too few": (KERNEL, Edit(KERNEL, "Q\n    hw::cp_async_wait<2", "\n    hw::cp_async_wait<1 + 2")),
    "a V copied to where one is read": (KERNEL, Edit(KERNEL, "kStageBytes : stage) - kStageBytes", "0 : stage)")),
    "barrier of pieces missing": (KERNEL, Edit(KERNEL, "replace this one's\n    hw::sync_threads();", "replace\n")),
    "a group's heads all alike": (KERNEL, Edit(KERNEL, "p.head_group + row_of(i) % p.head_group;", "p.head_group;")),
    "a row's query forgotten": (KERNEL, Edit(KERNEL, "seq.diagonal() + row_of(i) / p.head_group;", "seq.diagonal();")),
    "a piece too many keys": (KERNEL, Edit(PIECES, "+ p.split_size / p.block_k;", "+ p.split_size / p.block_k + 1;")),
    "a share too few keys": (KERNEL, Edit(PIECES, "block_idx_x() + 1) - unit;", "block_idx_x() + 1) - unit - 1;")),
    "a share's first piece is kept elsewhere": (KERNEL, Edit(PIECES, "by_row = skip == 0;", "by_row = true;")),
    "pieces not weighed": (COMBINE, Edit(COMBINE, "hw::fma(weight, part, x[c])", "part + x[c]")),
    "a piece that saw nothing is added": (COMBINE, Edit(COMBINE, "if (own == -kInfinity) continue;", "")),
    "sink forgotten": (COMBINE, Edit(COMBINE, "p.softmax_scale, sink);", "p.softmax_scale, -kInfinity);")),
    "the last piece missed": (COMBINE, Edit(PIECES, "- share + 1;", "- share;")),
    "a piece's row forgotten": (COMBINE, Edit(PIECES, "+ row % kTileRows;", ";")),
    "the first piece's largest score": (
        COMBINE, Edit(COMBINE, "maximum, hw::load_global(p.partial_max + line_of(s)",
                      "maximum, hw::load_global(p.partial_max + line_of(0)"),
    ),
    "a count of one sequence too few": (PLAN, Edit(PLAN, "sum += before;", "sum += before - own;")),
    "barrier of the sums missing": (PLAN, Edit(PLAN, "they are there\n    hw::sync_threads();", "they are there\n")),
}  # fmt: skip


@pytest.mark.parametrize("name", [None, *BUGS])
def test_planted_bug_is_caught(edited, name, rng):
    # Some pieces have twice as many tiles as there are stages, some rows see nothing of some pieces.
    case = Case(
        "float16", (40, 40), (750, 300), 4, 2, 64, 64, packed=True, causal=True, window_size=(600, 0), sink="float32",
        alibi="head", max_seqlen_q=1,
    )  # fmt: skip
    if name is None:
        check(case, rng, 16, 640)
        return
    kernel, edit = BUGS[name]
    edited(edit, where=lambda spec: spec.source == kernel)
    with pytest.raises((EmulatorError, AssertionError)):
        check(case, rng, 16, 640)


MODS_FILE = "tile/mods.cuh"
# name -> (mods, edit of the kernel that reads keys)
BUGS_OF_MODS = {
    "terms of the first row's head": (
        "a bias of head and key, a window of each head",
        Edit(MODS_FILE, "M::k_terms(p, t[row], key)", "M::k_terms(p, t[0], key)"),
    ),
    "empty for one head, empty for all": (
        "a bias of head and key, a window of each head",
        Edit(MODS_FILE, "kind_of(i) == kind ? kind : kTileMixed", "min_of(kind_of(i), kind)"),
    ),
    "the next tile's fullness": (
        "from the 20th key on",
        Edit(KERNEL, "(full & 1u) == 0", "(full & 2u) == 0"),
    ),
    "terms of another stage": (
        "a bias of the key, documents",
        Edit(KERNEL, "terms_smem + stage, tile * V::kBlockK", "terms_smem, tile * V::kBlockK"),
    ),
}


@pytest.mark.parametrize("name", [None, *BUGS_OF_MODS])
def test_planted_bug_of_mods_is_caught(edited, name, rng):
    mods, edit = BUGS_OF_MODS.get(name, ("a bias of the key, documents", None))
    case = Case("float16", (3,), (390,), 6, 1, 64, 64, packed=False)  # a thread's two rows are of different heads
    if edit is None:
        check(case, rng, 16, 384, mods=MODS[mods])
        return
    edited(edit, where=lambda spec: spec.source == KERNEL)
    with pytest.raises((EmulatorError, AssertionError)):
        check(case, rng, 16, 384, mods=MODS[mods])
