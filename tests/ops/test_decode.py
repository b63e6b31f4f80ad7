"""Decoding in parts of the keys: against the definition, and what its bits must not depend on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from cases import Case
from compare import check_forward
from needs import needs_nvrtc
from test_forward_paged import Launch, attend, in_pages, launched

import cuflash
from cuflash import arch, array, dtypes
from cuflash.array import of_numpy
from cuflash.errors import ArgumentError, EmulatorError, UnsupportedError
from cuflash.jit import module
from cuflash.jit.source import Edit
from cuflash.ops import decode


def decoded(given: Launch, split_size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """(out, lse) of a forward launch's problem, by parts of `split_size` keys."""
    problem = dataclasses.replace(given.plan.problem, max_logit=False)
    plan = decode.DecodePlan(problem, given.plan.arch, split_size)
    arrays = {name: x for name, x in given.arrays.items() if name != "max_logit"}
    for name, (shape, dtype) in plan.workspace.items():
        arrays[name] = array.empty_host(shape, dtype)
    for name in ("out", "lse", *plan.workspace):
        old = arrays[name]
        arrays[name] = array.empty_host(old.shape, dtypes.BY_NUMPY[old.dtype])
        arrays[name].reshape(-1).view(np.uint8)[...] = 0xFF
    plan.launch({name: of_numpy(x) for name, x in arrays.items()}, backend="emulator")
    return arrays["out"], arrays["lse"]


def check(case: Case, rng: np.random.Generator, page_size: int = 0, split_size: int = 64, **how: Any) -> None:
    inputs = case.inputs()
    given = launched(attend(inputs))
    if page_size:
        given = in_pages(given, page_size, rng, **how)
    out, lse = decoded(given, split_size)
    check_forward(inputs.q, inputs.k, inputs.v, out, lse, **inputs.keywords)


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
    inputs = case.inputs()
    given = in_pages(launched(attend(inputs, max_seqlen_q=hint)), 24, rng)
    check_forward(inputs.q, inputs.k, inputs.v, *decoded(given, 128), **inputs.keywords)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("d", [30, 96, 128, 192, 256])
def test_head_dims(dtype, d, rng):
    case = Case(dtype, (2, 2), (150, 150), 4, 1, d, d, packed=False, causal=True, seqused_k=(150, 33))
    check(case, rng, page_size=16)


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
            out, lse = decoded(given)
            assert out[0].tobytes() == together[0][b].tobytes()
            assert lse[0].tobytes() == together[1][b].tobytes()


def test_same_bits_under_any_schedule(rng):
    inputs = Case("float16", (3, 3), (200, 200), 4, 1, 64, 64, packed=False, causal=True).inputs()
    given = in_pages(launched(attend(inputs)), 16, rng)
    found = set()
    for i in range(8):
        with cuflash.emulator.schedule(seed=i, landing="early" if i % 3 == 2 else "late"):
            found.add(b"".join(x.tobytes() for x in decoded(given)))
    assert len(found) == 1


@pytest.mark.parametrize("page_size", [0, 16])
def test_keys_and_values_are_read_once(page_size, rng):
    """A step of generation, 8 query heads to a key head, at 4k: for all heads of a group together."""
    inputs = Case("float16", (1,), (4096,), 8, 1, 128, 128, packed=False).inputs()
    given = launched(attend(inputs))
    if page_size:
        given = in_pages(given, page_size, rng)
    with cuflash.emulator.counting() as counters:
        decoded(given, 512)
    for name in "kv":
        assert counters.global_bytes_read[name] == 4096 * 128 * 2


def test_launch_bytes_do_not_depend_on_lengths(rng):
    inputs = Case("float16", (1,), (256,), 2, 1, 64, 64, packed=False, seqused_k=(200,)).inputs()
    given = launched(attend(inputs))
    plan = decode.DecodePlan(dataclasses.replace(given.plan.problem, max_logit=False), given.plan.arch, 64)
    views = {name: of_numpy(x) for name, x in given.arrays.items()}
    before = plan.params(views), plan.grid
    given.arrays["seqused_k"][...] = 3
    assert (plan.params(views), plan.grid) == before


def test_what_is_refused():
    inputs = Case("float16", (1,), (64,), 2, 1, 64, 64, packed=False).inputs()
    problem = dataclasses.replace(launched(attend(inputs)).plan.problem, max_logit=False)
    target = arch.named("sm_80")
    for size in (0, -64, 63):
        with pytest.raises(ArgumentError, match="split_size"):
            decode.DecodePlan(problem, target, size)
    with pytest.raises(UnsupportedError, match="dropout"):
        decode.DecodePlan(dataclasses.replace(problem, dropout_p=0.5), target)


@pytest.mark.parametrize("name", ["sm_80", "sm_90a", "sm_100a"])
@needs_nvrtc
def test_machine_code(name):
    target = arch.named(name)
    for spec in decode.representative(target):
        resources = module.compile(spec, target).resources
        assert (resources.spill_stores, resources.spill_loads, resources.stack_bytes) == (0, 0, 0)
        assert spec.smem_bytes <= target.smem_bytes


# Planted bugs --------------------------------------------------------------------------------------------------------

KERNEL, COMBINE = "decode_sm80.cu", "combine.cu"
BUGS = {
    "wait for K missing": (Edit(KERNEL, "first time, Q\n    hw::cp_async_wait<0>();", "first time, Q\n"),),
    "wait for V missing": (Edit(KERNEL, "own copies of V\n    hw::cp_async_wait<0>();", "own copies of V\n"),),
    "barrier of K missing": (Edit(KERNEL, "previous V any more\n    hw::sync_threads();", "previous V any more\n"),),
    "barrier of V missing": (Edit(KERNEL, "reads K any more\n    hw::sync_threads();", "reads K any more\n"),),
    "a group's heads all alike": (Edit(KERNEL, "p.head_group + row_of(i) % p.head_group;", "p.head_group;"),),
    "a row's query forgotten": (Edit(KERNEL, "seq.diagonal() + row_of(i) / p.head_group;", "seq.diagonal();"),),
    "a part too many keys": (Edit(KERNEL, "(part + 1) * p.split_size);", "(part + 1) * p.split_size + 64);"),),
    "parts not weighed": (Edit(COMBINE, "hw::fma(hw::exp2_approx(lse - safe), part, x)", "part + x"),),
    "a part that saw nothing is added": (Edit(COMBINE, "if (lse == -kInfinity) continue;", ""),),
    "sink forgotten": (Edit(COMBINE, "sum += hw::exp2_approx(sink - safe);", ""),),
}  # fmt: skip


@pytest.fixture
def edited(monkeypatch) -> Iterator[Callable[[tuple[Edit, ...]], None]]:
    """A function that makes every decoding kernel that is built from now on contain some edits."""
    originals = {"kernel_spec": decode.kernel_spec, "combine_spec": decode.combine_spec}

    def apply(edits: tuple[Edit, ...]) -> None:
        for name, original in originals.items():
            source = original.__wrapped__(None).source if name == "combine_spec" else KERNEL
            own = tuple(e for e in edits if e.file == source)
            changed = lambda v, original=original, own=own: dataclasses.replace(original(v), edits=own)  # noqa: E731
            monkeypatch.setattr(decode, name, changed)

    yield apply


@pytest.mark.parametrize("name", [None, *BUGS])
def test_planted_bug_is_caught(edited, name, rng):
    case = Case(
        "float16", (40, 40), (300, 300), 4, 2, 64, 64, packed=True, causal=True, window_size=(100, 0), sink="float32",
        alibi="head", max_seqlen_q=1,
    )  # fmt: skip
    inputs = case.inputs()
    given = in_pages(launched(attend(inputs, max_seqlen_q=1)), 16, rng)
    edited(BUGS.get(name, ()))

    def run() -> None:
        check_forward(inputs.q, inputs.k, inputs.v, *decoded(given, 128), **inputs.keywords)

    if name is None:
        run()
    else:
        with pytest.raises((EmulatorError, AssertionError)):
            run()
