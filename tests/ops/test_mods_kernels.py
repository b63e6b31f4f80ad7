"""What mods cost the kernels and what they leave alone: tiles skipped, bits, planted bugs, machine code, compiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from backends import using
from machine_code import checked
from needs import needs_nvrtc
from recorded import recording

import cuflash
from cuflash import arch, dtypes
from cuflash.errors import EmulatorError
from cuflash.jit import module, nvrtc, sass
from cuflash.jit.source import Edit
from cuflash.ops import backward, forward
from cuflash.trace import tracer
from cuflash.trace.expr import Mods

LENGTH, D = 512, 64
STARTS = np.array([0, 70, 260, 261, 400, LENGTH])
IDS = np.repeat(np.arange(len(STARTS) - 1), np.diff(STARTS)).astype(np.int32)
PREFIX = 300
WINDOW = 90

# name -> (mask_mod, what it keeps of queries (rows) and keys)
i, j = np.arange(LENGTH)[:, None], np.arange(LENGTH)
MASKS: dict[str, tuple[Callable[..., Any], np.ndarray]] = {
    "causal": (lambda b, h, q, k: q >= k, i >= j),
    "window": (lambda b, h, q, k: (q >= k) & (q - k <= WINDOW), (i >= j) & (i - j <= WINDOW)),
    "prefix": (lambda b, h, q, k: (k < PREFIX) | (q >= k), (j < PREFIX) | (i >= j)),
    "document": (lambda b, h, q, k: IDS[q] == IDS[k], IDS[:, None] == IDS),
    "document, causal": (lambda b, h, q, k: (IDS[q] == IDS[k]) & (q >= k), (IDS[:, None] == IDS) & (i >= j)),
    "chunks": (lambda b, h, q, k: q // 96 == k // 96, i // 96 == j // 96),
}


def arrays(dtype: str = "float16", heads: int = 1, heads_kv: int = 1, length: int = LENGTH, d: int = D):
    rng = np.random.default_rng(0)
    make = lambda h: rng.standard_normal((1, length, h, d)).astype(dtypes.BY_NAME[dtype].numpy)  # noqa: E731
    return make(heads), make(heads_kv), make(heads_kv)


def blocks_kept(keep: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """[row blocks, column blocks]: whether anything of a block is kept."""
    return keep.reshape(LENGTH // rows, rows, LENGTH // columns, columns).any(axis=(1, 3))


@pytest.mark.parametrize("name", MASKS)
def test_tiles_without_a_score_cost_the_forward_nothing(name):
    """No matrix instruction, and not a byte of K and V: counted."""
    mask_mod, keep = MASKS[name]
    with using("emulator", "sm_80"), cuflash.emulator.counting() as counters:
        cuflash.attention(*arrays(), mask_mod=mask_mod)
    tile = forward.TILES[2, D][0]
    visited = int(blocks_kept(keep, tile.block_q, tile.block_k).sum())
    assert 0 < visited < (LENGTH // tile.block_q) * (LENGTH // tile.block_k)
    products = 2 * (tile.block_q // 16) * (tile.block_k // 8) * (D // 16)
    assert counters.total_matrix_instructions == visited * products
    assert counters.global_bytes_read["k"] == counters.global_bytes_read["v"] == visited * tile.block_k * D * 2


@pytest.mark.parametrize(
    "name, deterministic",
    [
        *((name, False) for name in MASKS),
        *(pytest.param(name, True, marks=pytest.mark.slow if i % 2 else ()) for i, name in enumerate(MASKS)),
    ],
)
def test_tiles_without_a_score_cost_the_backward_nothing(name, deterministic):
    mask_mod, keep = MASKS[name]
    q, k, v = arrays(heads=2)
    with using("emulator", "sm_80"):
        out, lse, *_ = cuflash.attention(q, k, v, mask_mod=mask_mod, aux=("lse",))
        with cuflash.emulator.counting() as counters:
            keywords = {"mask_mod": mask_mod, "deterministic": deterministic}
            cuflash.attention_backward(np.ones_like(out), q, k, v, out, lse, **keywords)
    element = dtypes.float16
    mods = tracer.bind(None, mask_mod).mods
    tile = backward.choose_variants(element, D, D, 16, deterministic=deterministic, mods=mods)[0].tile
    heads = 2
    by_key = heads * int(blocks_kept(keep.T, tile.held, tile.moved).sum())
    by_query = heads * int(blocks_kept(keep, tile.held, tile.moved).sum())
    product = (tile.held // 16) * (tile.moved // 8) * (D // 16)
    expected = (4 * by_key + 3 * by_query) * product if deterministic else 5 * by_key * product
    assert counters.total_matrix_instructions == expected


def test_ids_that_change_in_place_are_read_anew():
    ids = IDS.copy()
    mask_mod = lambda b, h, q, k: ids[q] == ids[k]  # noqa: E731
    q, k, v = arrays("float32", length=200)
    for _ in range(2):
        with using("emulator"):
            found = cuflash.attention(q, k, v, mask_mod=mask_mod)
        now = ids.copy()
        expected = cuflash.attention(q, k, v, mask_mod=lambda b, h, q, k, now=now: now[q] == now[k])
        np.testing.assert_allclose(found, expected, atol=1e-5)
        ids[:] = ids[::-1].copy()


def test_quotients_of_floats_are_those_of_numpy():
    """floor(q / 41) of whole numbers: a quotient a little too small would be of the row before."""
    q, k, v = arrays("float32")
    mask_mod = lambda b, h, q, k: np.floor(q / 41) == np.floor(k / WINDOW)  # noqa: E731
    with using("emulator"):
        found = cuflash.attention(q, k, v, mask_mod=mask_mod)
    np.testing.assert_allclose(found, cuflash.attention(q, k, v, mask_mod=mask_mod), atol=1e-5)


def everything(rng: np.random.Generator) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """Keywords with a learned bias by distance, one by head and a temperature, beside documents and much else; q, k, v
    packed, two query heads for a key head."""
    table = rng.standard_normal((4, 399)).astype(np.float32)
    by_head = rng.standard_normal(4).astype(np.float16)
    temperature = np.array(1.3, np.float32)
    ids = np.sort(rng.integers(0, 4, 200)).astype(np.int64)

    def score_mod(score, b, h, q_idx, kv_idx):
        return score * temperature + table[h, q_idx - kv_idx + 199] * by_head[h]

    def mask_mod(b, h, q_idx, kv_idx):
        return (ids[q_idx] == ids[kv_idx]) & ((kv_idx % 5 != 3) | (h < 2))

    starts = np.array([0, 150, 150, 215], np.int32)
    q, k, v = (rng.standard_normal((215, h, 40)).astype(np.float32) for h in (4, 2, 2))
    keywords = {
        "score_mod": score_mod, "mask_mod": mask_mod, "cu_seqlens_q": starts, "cu_seqlens_k": starts,
        "window_size": (100, 20), "softcap": 20.0, "sink": rng.standard_normal(4).astype(np.float32),
        "alibi_slopes": rng.uniform(0, 0.2, 4).astype(np.float32), "dropout_p": 0.25, "seed": 3,
    }  # fmt: skip
    return keywords, (q, k, v)


def gradients(arguments: tuple[Any, ...], keywords: dict[str, Any], deterministic: bool = True) -> list[np.ndarray]:
    out, lse, *_ = cuflash.attention(*arguments, **keywords, aux=("lse",))
    dout = np.random.default_rng(1).standard_normal(out.shape).astype(out.dtype)
    grads = cuflash.attention_backward(
        dout, *arguments, out, lse, deterministic=deterministic, captured_grads=True, **keywords
    )
    return [out, grads.dq, grads.dk, grads.dv, grads.dsink, *(x for x in grads.dcaptured if x is not None)]


def test_everything_at_once_against_the_reference(rng):
    keywords, arguments = everything(rng)
    expected = gradients(arguments, keywords)
    for deterministic in (True, False):
        with using("emulator"):
            found = gradients(arguments, keywords, deterministic)
        assert len(found) == len(expected) == 9
        for x, y in zip(found, expected, strict=True):
            tolerance = 4e-3 if x.dtype == np.float16 else 2e-5
            np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * max(1.0, np.abs(y).max()))


def test_the_same_bits_under_any_schedule(rng, seed):
    """With deterministic=True, gradients of captured arrays included; without it they do differ."""
    keywords, arguments = everything(rng)
    bits: dict[bool, set[bytes]] = {True: set(), False: set()}
    for deterministic, found in bits.items():
        for n in range(6):
            landing = "early" if n % 3 == 2 else "late"
            with using("emulator"), cuflash.emulator.schedule(seed=seed + n, landing=landing, os_threads=1):
                found.add(b"".join(x.tobytes() for x in gradients(arguments, keywords, deterministic)))
    assert len(bits[True]) == 1 < len(bits[False])


def test_a_nan_that_a_sum_meets_is_not_hidden(rng):
    bias = rng.standard_normal(64).astype(np.float32)
    q, k, v = arrays("float32", length=64)
    q[0, 7, 0, 0] = np.nan
    score_mod = lambda s, b, h, q, k: s + bias[k]  # noqa: E731
    for deterministic in (True, False):
        with using("emulator"):
            *_, dbias = gradients((q, k, v), {"score_mod": score_mod}, deterministic)
        assert np.isnan(dbias).all()


# Planted bugs -----------------------------------------------------------------------------------------------------

MODS_FILE, KERNEL = "tile/mods.cuh", "backward_sm80.cu"
BUGS: dict[str, Edit] = {
    "a tile too far is skipped": Edit(MODS_FILE, "return n + hw::lowest_bit(rest) * kStep;",
                                      "return n + (hw::lowest_bit(rest) + 1) * kStep;"),
    "mixed tiles are taken for full ones": Edit(MODS_FILE, "full = hw::ballot(kind == kTileFull);",
                                                "full = hw::ballot(kind != kTileEmpty);"),
    "coordinates are not brought inside": Edit(MODS_FILE, "return max_of(min_of(index, length - 1), 0);",
                                               "return index;"),
    "the columns' terms of another column": Edit(
        MODS_FILE, "M::k_terms(p, t, inside(first + i, t.kv_len))", "M::k_terms(p, t, inside(first + i + 1, t.kv_len))"
    ),
    "bounds one off": Edit(MODS_FILE, "length), bounds.end)}", "length), bounds.end + 1)}"),
    "bounds read before all are written": Edit(
        MODS_FILE, "    hw::sync_threads();\n  }\n  Interval any", "  }\n  Interval any"
    ),
    "a masked tile taken for full": Edit(MODS_FILE, "hw::reduce_min(all.end)", "t.kv_len"),
    "a tile too few": Edit(MODS_FILE, "max_of(any.end, end)};", "max_of(any.end, end - 64)};"),
    "gradients of one lane of four": Edit(MODS_FILE, "const float sum = quad_sum(sums[i]);",
                                          "const float sum = sums[i];"),
    "what a fixed sum leaves is lost": Edit("tile/fixed_sum.cuh", "if (low != 0) hw::atomic_add",
                                            "if (low == 1) hw::atomic_add"),
    "the slope of the score forgotten": Edit(KERNEL, "d = d == 0.0f ? 0.0f : d * M::slope(p, t, q, k, x);", ";"),
    "keys past the end add to gradients": Edit(KERNEL, "S::row_of(row) < used ? x : -kInfinity", "x"),
    "heads of a group share the first one's mask": Edit(
        KERNEL, "M::tile(p, sequence, head, seq.q_len, seq.k_len);\n        n = walk",
        "M::tile(p, sequence, first_head, seq.q_len, seq.k_len);\n        n = walk"),
}  # fmt: skip


# Those that show in the forward; the others are planted in the backward alone: a kernel takes a second to compile.
FORWARD = {
    "coordinates are not brought inside", "the columns' terms of another column", "bounds one off",
    "bounds read before all are written", "a masked tile taken for full", "a tile too few",
}  # fmt: skip


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_caught(edited, name):
    rng = np.random.default_rng(5)
    keywords, arguments = everything(rng)
    rows = rng.standard_normal(150).astype(np.float32) * 1e-5  # as many as the longest sequence has keys
    weights = rng.standard_normal(150).astype(np.float32)
    inner = keywords["score_mod"]
    # One more array, whose gradients are sums over queries and whose values are small; heads with masks of their own.
    keywords["score_mod"] = lambda s, b, h, q_idx, kv_idx: (
        inner(s, b, h, q_idx, kv_idx) + rows[kv_idx] * 1e-5 + weights[kv_idx]
    )
    keywords["mask_mod"] = lambda b, h, q_idx, kv_idx: (kv_idx >= 64 * (h % 2)) & (q_idx >= kv_idx)
    expected = gradients(arguments, keywords)
    edited(BUGS[name], where=lambda spec: spec.source == ("forward_sm80.cu" if name in FORWARD else KERNEL))
    try:
        with using("emulator"):
            found = gradients(arguments, keywords)
    except EmulatorError:
        return
    close = [
        np.allclose(x, y, rtol=5e-3 if x.dtype == np.float16 else 3e-5, atol=3e-5 * max(np.abs(y).max(), 1e-12))
        for x, y in zip(found, expected, strict=True)
    ]
    assert not all(close)


# Machine code -----------------------------------------------------------------------------------------------------

TABLE = np.zeros((4, 64), np.float32)
DENSE = np.zeros((4, 64, 64), np.float32)
CODES: dict[str, tuple[Callable[..., Any] | None, Callable[..., Any] | None]] = {
    "causal and window": (None, lambda b, h, q, k: (q >= k) & (q - k <= WINDOW)),
    "documents": (None, lambda b, h, q, k: (IDS[q] == IDS[k]) & (q >= k)),
    "natten": (None, lambda b, h, q, k: (abs(q // 64 - k // 64) <= 3) & (abs(q % 64 - k % 64) <= 3)),
    "bias by distance": (lambda s, b, h, q, k: s + TABLE[h, q - k + 31], None),
    "dense bias": (lambda s, b, h, q, k: s + DENSE[h, q, k], lambda b, h, q, k: q >= k),
    "soft cap": (lambda s, b, h, q, k: 20.0 * np.tanh(s / 20.0), None),
}
# (architecture, dtype, head dims, mods)
USUAL = (
    ("sm_80", "bfloat16", (64,), tuple(CODES)),
    ("sm_90a", "bfloat16", (128,), ("natten", "bias by distance")),
    ("sm_120a", "float16", (128,), ("documents", "dense bias")),
)
DEEPER = (
    ("sm_80", "bfloat16", (128, 256), tuple(CODES)),
    ("sm_90a", "bfloat16", (64, 128, 256), tuple(CODES)),
    ("sm_100a", "bfloat16", (64, 128), tuple(CODES)),
    ("sm_120a", "float16", (128,), tuple(CODES)),
)


def specs(name: str, dtype: str, d: int, mods: Mods) -> list[module.KernelSpec]:
    target, element = arch.named(name), dtypes.BY_NAME[dtype]
    found = [forward.kernel_spec(forward.choose_variant(element, d, d, 16, target, mods=mods))]
    wanted = () if mods.score is None else tuple(i for i, a in enumerate(mods.arrays) if a.kind == "float")
    for deterministic in (False, True):
        variants = backward.choose_variants(
            element, d, d, 16, deterministic=deterministic, mods=mods, dcaptured=wanted,
            fixed_sums=deterministic and bool(wanted),
        )  # fmt: skip
        found += [backward.kernel_spec(v) for v in variants]
    return list(dict.fromkeys(found))


def spread(targets, *marks) -> list[Any]:
    return [
        pytest.param(name, dtype, d, what, marks=marks)
        for name, dtype, dims, codes in targets
        for d in dims
        for what in codes
    ]


@needs_nvrtc
@pytest.mark.parametrize("name, dtype, d, what", [*spread(USUAL), *spread(DEEPER, pytest.mark.slow)])
def test_machine_code(name, dtype, d, what):
    """No spill, no stack; a block fits its chip."""
    for spec in specs(name, dtype, d, tracer.bind(*CODES[what]).mods):
        checked(spec, name)


def test_bounds_are_all_that_half_lines_cost():
    """Such masks leave nothing to ask of an element, whichever side has the rows."""
    for mask_mod in (CODES["causal and window"][1], MASKS["prefix"][0], MASKS["chunks"][0]):
        text = forward.choose_variant(
            dtypes.float16, 64, 64, 16, arch.named("sm_80"), mods=tracer.bind(None, mask_mod).mods
        ).mods
        assert "kKeepQ = false" in text and "kKeepK = false" in text


@needs_nvrtc
@pytest.mark.parametrize("name", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("d", [64, 128])
def test_bounds_cost_what_causal_and_window_do(name, d):
    """Instructions of the KV loop beside those of the kernel without mods, where causal and window stand by hand:
    none more in a full tile, at most 3 in a masked one."""
    target = arch.named(name)

    def loop(mask_mod: Callable[..., Any] | None) -> sass.Loop:
        mods = mask_mod and tracer.bind(None, mask_mod).mods
        spec = forward.kernel_spec(forward.choose_variant(dtypes.bfloat16, d, d, 16, target, mods=mods))
        (found,) = sass.functions(sass.disassemble(module.compile(spec, target).path))[spec.entry].loops
        return found

    by_hand = loop(None)
    for mask_mod in (CODES["causal and window"][1], MASKS["prefix"][0], MASKS["chunks"][0]):
        found = loop(mask_mod)
        assert 0 < found.selecting < found.length / 4
        assert found.length - found.selecting <= by_hand.length - by_hand.selecting
        assert found.length <= by_hand.length + 3


@needs_nvrtc
def test_values_never_recompile(monkeypatch, tmp_path, seed):
    """Captured numbers, arrays' contents and shapes, lengths and batches change 1,000 times: one compile a structure,
    counted at the compiler. A bool that changes: one more."""
    compiled = []
    original = nvrtc.compile
    monkeypatch.setattr(nvrtc, "compile", lambda *a, **k: compiled.append(a[0]) or original(*a, **k))
    monkeypatch.setattr(cuflash.config, "cache_dir", tmp_path)
    module.clear()
    rng = np.random.default_rng(seed)
    with recording("sm_80") as recorder:
        stand_in = recorder.arrays["cupy stand-in"]

        def call(flag: bool) -> None:
            length, batch, number = int(rng.integers(1, 3000)), int(rng.integers(1, 4)), int(rng.integers(99))
            bias = stand_in(np.empty((4, int(rng.integers(1, 500))), np.float32))
            factor = float(rng.normal())
            x = stand_in(np.empty((batch, length, 4, 64), np.float16))
            cuflash.attention(
                x, x, x,
                score_mod=lambda s, b, h, q, k: s * factor + (bias[h, q - k] if flag else 0.0),
                mask_mod=lambda b, h, q, k: q - k <= number,
            )  # fmt: skip

        for _ in range(1000):
            call(True)
        assert len(compiled) == 1
        call(False)
        assert len(compiled) == 2
    module.clear()
