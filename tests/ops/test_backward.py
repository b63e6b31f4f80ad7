"""Attention backward on every backend: generated cases, the edges, bits, counters, planted bugs."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from backends import BACKENDS, Emulator, using
from cases import Case, draw
from compare import check_backward

import cuflash
from cuflash import dtypes
from cuflash.errors import EmulatorError
from cuflash.jit import source
from cuflash.jit.source import Edit
from cuflash.ops import backward

CASES = 304
CHUNK = 8
COST = 3_500_000  # matrix instructions of the forwards; a backward takes three and a half times as many


EMULATOR = Emulator()


def run(case: Case, backend=EMULATOR, **hints):
    """(inputs, gradients given, gradients computed) of a case."""
    inputs, given = case.inputs(), case.gradients()
    if case.max_seqlen_q is not None:
        hints.setdefault("max_seqlen_q", case.max_seqlen_q)
    backend.run(inputs, **hints)
    return inputs, given, backend.run_backward(inputs, given, **hints)


def check(case: Case, backend=EMULATOR, **hints) -> None:
    """Run a case and hold it to the rule."""
    try:
        inputs, given, grads = run(case, backend, **hints)
        check_backward(
            given.dout, inputs.q, inputs.k, inputs.v, *grads[:4], *grads.dcaptured, dlse=given.dlse, **inputs.keywords
        )
    except Exception as error:
        error.add_note(f"case: {case!r}")
        raise


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", range(CASES // CHUNK))
def test_generated_case(backend, chunk, seed):
    for case in draw(CASES, seed + 1, cost=COST)[chunk * CHUNK : (chunk + 1) * CHUNK]:
        check(case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "case",
    [
        Case("float16", (), (), 2, 1, 32, 32),
        Case("float16", (0,), (0,), 2, 1, 32, 32, sink="float32", alibi="batch"),
        Case("float16", (0, 0, 0), (0, 7, 0), 2, 1, 32, 32),
        Case("float16", (5,), (0,), 2, 1, 32, 32, sink="float32", seed=1),
        Case("float16", (5, 5), (0, 0), 2, 1, 32, 32, packed=False),
        Case("float16", (0, 0), (9, 9), 2, 1, 32, 32, packed=False, sink="element"),
        Case("float16", (), (), 2, 1, 32, 32, packed=False),
        Case("float16", (1,), (1,), 1, 1, 1, 1),
        Case("float16", (40,), (3,), 2, 2, 32, 32, causal=True),  # most rows see nothing
        Case("float16", (40, 9), (3, 9), 2, 2, 32, 32, causal=True, sink="element", seed=1),
        Case("float16", (9, 9), (9, 9), 2, 2, 32, 32, seqused_q=(0, 4), seqused_k=(9, 0)),
        Case("float16", (3,), (40,), 2, 2, 32, 32, window_size=(5, 0)),  # most keys are seen by nobody
    ],
    ids=repr,
)
def test_edge(backend, case):
    check(case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hint", [None, 1, 150, 1500])
def test_hints_lose_no_row(backend, hint):
    case = Case("float16", (150, 0, 3, 129), (150, 0, 3, 200), 2, 1, 32, 32, causal=True, max_seqlen_q=hint)
    check(case, backend, **({} if hint is None else {"max_seqlen_k": hint}))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype, d", [("float16", 64), ("bfloat16", 256), ("float32", 32)])
def test_same_bits_under_any_schedule(dtype, d, deterministic, seed):
    """Twenty orders of blocks, warps and lanes; copies landing late and early: one result, and no report."""
    case = Case(
        dtype, (70, 0, 131), (90, 3, 131), 2, 1, d, d, causal=True, softcap=20.0, alibi="batch", sink="float32", seed=5
    )
    results = set()
    for i in range(20):
        with cuflash.emulator.schedule(seed=seed + i, landing="early" if i % 4 == 3 else "late"):
            _, _, grads = run(case, deterministic=deterministic)
        results.add(b"".join(x.tobytes() for x in (*grads[:4], *grads.dcaptured)))
    assert len(results) == 1


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_same_bits_alone_and_packed(dtype, seed):
    """A sequence's gradients do not depend on what else is in the batch."""
    rng = np.random.default_rng(seed)
    element = dtypes.BY_NAME[dtype].numpy
    lengths = (70, 1, 129)
    make = lambda heads: [rng.standard_normal((n, heads, 64)).astype(element) for n in lengths]  # noqa: E731
    q, k, v, dout = make(2), make(1), make(1), make(2)
    starts = np.cumsum([0, *lengths], dtype=np.int32)

    def gradients(q, k, v, dout, **keywords):
        out, lse, *_ = cuflash.attention(q, k, v, causal=True, aux=("lse",), **keywords)
        return cuflash.attention_backward(dout, q, k, v, out, lse, causal=True, **keywords)

    with using("emulator"):
        packed = gradients(*map(np.concatenate, (q, k, v, dout)), cu_seqlens_q=starts, cu_seqlens_k=starts)
        for b in range(len(lengths)):
            alone = gradients(q[b][None], k[b][None], v[b][None], dout[b][None])
            for whole, one in zip(packed[:3], alone[:3], strict=True):
                assert whole[starts[b] : starts[b + 1]].tobytes() == one[0].tobytes()


def count(length: int, heads: int, heads_kv: int, d: int, dtype: str = "float16", **keywords):
    """The counters of one dense backward, and its tile."""
    rng = np.random.default_rng(0)
    element = dtypes.BY_NAME[dtype]
    make = lambda h: rng.standard_normal((1, length, h, d)).astype(element.numpy)  # noqa: E731
    q, k, v, dout = make(heads), make(heads_kv), make(heads_kv), make(heads)
    out, lse, *_ = cuflash.attention(q, k, v, aux=("lse",), **keywords)
    with using("emulator"), cuflash.emulator.counting() as counters:
        cuflash.attention_backward(dout, q, k, v, out, lse, **keywords)
    return counters, backward.choose_variants(element, d, d, 16)[0].tile


@pytest.mark.parametrize("heads_kv", [1, 2])
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("length", [128, 256, 512])
def test_global_bytes_follow_the_tiled_formula(length, d, heads_kv):
    """Nothing grows with the length's square but the tiles: Q and dO once, and once for each tile of keys; K and V once
    for each key head, and once for each tile of every query head."""
    heads = 2
    counters, tile = count(length, heads, heads_kv, d)
    row, tiles = d * 2, math.ceil(length / tile.held)
    # delta reads out and dout; dq: q, dout once, k, v per tile; dk, dv: k, v once, q, dout per tile.
    expected = {
        "q": heads * length * row * (1 + tiles),
        "dout": heads * length * row * (2 + tiles),
        "out": heads * length * row,
        "k": length * row * (heads * tiles + heads_kv),
        "v": length * row * (heads * tiles + heads_kv),
    }
    for name, count_of in expected.items():
        assert counters.global_bytes_read[name] == pytest.approx(count_of, rel=0.05), name
    assert set(counters.global_bytes_read) <= {*expected, "lse", "lse_base2", "delta"}
    written = {"dq": heads, "dk": heads_kv, "dv": heads_kv}
    for name, heads_of in written.items():
        assert counters.global_bytes_written[name] == heads_of * length * row, name
    assert set(counters.global_bytes_written) <= {*written, "lse_base2", "delta"}


@pytest.mark.parametrize("dtype, d", [("float16", 64), ("bfloat16", 128), ("float32", 32)])
@pytest.mark.parametrize("causal", [False, True])
def test_matrix_instructions_equal_the_formula(dtype, d, causal):
    """Seven products of the size of Q K^T, in the tiles that hold a kept score."""
    length = 256
    counters, tile = count(length, 1, 1, d, dtype, causal=causal)
    depth, passes = (16, 1) if dtype != "float32" else (8, 3)
    product = passes * (tile.held // 16) * (tile.moved // 8) * (d // depth)
    pairs = 0
    for held in range(0, length, tile.held):
        queries_held = math.ceil(min(held + tile.held, length) / tile.moved) if causal else length // tile.moved
        keys_held = (length - held // tile.moved * tile.moved) // tile.moved if causal else length // tile.moved
        pairs += 3 * queries_held + 4 * keys_held
    assert counters.total_matrix_instructions == pairs * product


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("d", [32, 64, 96, 128, 192, 256])
def test_no_bank_conflict_in_the_main_loop(dtype, d):
    counters, _ = count(70, 1, 1, d, dtype, causal=True)
    outside = ("tile/store.cuh", "backward_sm80.cu")  # gathering results; reads of lse and delta
    loop = {site: n for site, n in counters.bank_conflicts.items() if n and not any(x in site for x in outside)}
    assert not loop, f"extra passes over shared memory: {loop}"


def test_workspace_is_linear_and_as_planned():
    for packed in (False, True):
        strides = (0 if packed else 64 * 2 * 64, 128, 64)
        problem = backward.BackwardProblem(
            dtypes.float16, 3, packed, 64, 64, None, None, 2, 2, 64, 64, *[strides] * 8, load_bytes=16, scale=0.1
        )
        plan = backward.plan(problem, cuflash.arch.named("sm_80"))
        assert plan.workspace_bytes == 2 * 4 * 2 * 64 * (1 if packed else 3)


KERNEL = "backward_sm80.cu"
UNORDERED = "race|uninitialised"
# Two held and several moved tiles in one block (the hint is 1), a head dim short of its class, rows that see nothing.
CASE = Case(
    "float16",
    (150, 40),
    (170, 10),
    4,
    2,
    56,
    40,
    window_size=(120, 0),
    softcap=20.0,
    alibi="head",
    max_seqlen_q=1,
    seed=3,
)

# name -> (edits, what the emulator's report says; None: the numbers, the guards or a report give it away)
BUGS: dict[str, tuple[tuple[Edit, ...], str | None]] = {
    "wait for the moved tile missing": ((Edit(KERNEL, "    hw::cp_async_wait<0>();\n", ""),), UNORDERED),
    "wait for the moved v tile missing": ((Edit(KERNEL, "    hw::cp_async_wait<1>();\n", ""),), UNORDERED),
    "barrier before S missing": (
        (Edit(KERNEL, "nobody reads the previous one any more\n    hw::sync_threads();", "\n"),),
        UNORDERED,
    ),
    "barrier before dP missing": ((Edit(KERNEL, "it is whole\n    hw::sync_threads();", "\n"),), UNORDERED),
    "barrier between held tiles missing": (
        (Edit(KERNEL, "if (i > range.first) hw::sync_threads();", ""),),
        UNORDERED,
    ),
    "moved tiles share a stage": ((Edit(KERNEL, "next_group, 1 - stage)", "next_group, stage)"),), None),
    "query head of the group forgotten": (
        (Edit(KERNEL, "kKeysHeld ? group * p.q_stride_head : 0", "0"),),
        None,
    ),
    "sides of the window not exchanged": (
        (Edit(KERNEL, "kKeysHeld ? p.window_right : p.window_left;", "p.window_left;"),),
        None,
    ),
    "delta of the wrong row": ((Edit(KERNEL, "V::kMoved + 8 * c + i % 2", "V::kMoved + 8 * c"),), None),
    "cap's derivative left out": (
        (Edit(KERNEL, "return weight == 0.0f ? 0.0f : hw::fma(-t, t, 1.0f);", "return 1.0f;"),),
        None,
    ),
    "rows that keep nothing left in": ((Edit("backward_delta.cu", "lse == -kInfinity ? kInfinity : ", ""),), None),
    "gradient stored past the end": ((Edit("tile/store.cuh", "if (row < owned) {", "if (row <= owned) {"),), None),
    "partial sums of one warp only": (
        (Edit(KERNEL, "* (V::kThreads / 32) + hw::warp_idx()", "* (V::kThreads / 32)"),),
        None,
    ),
}


@pytest.fixture
def edited(monkeypatch):
    """A function that makes every backward kernel that is built from now on contain some edits."""
    original = backward.kernel_spec

    def apply(edits: tuple[Edit, ...]) -> None:
        def spec(variant):
            found = original(variant)
            text = source.flatten(found.source, "emu", variant="struct Variant {};")
            mine = tuple(e for e in edits if e.file == found.source or f'"{e.file}"' in text)
            return dataclasses.replace(found, edits=mine)

        monkeypatch.setattr(backward, "kernel_spec", spec)
        backward.plan.cache_clear()

    yield apply
    monkeypatch.undo()
    backward.plan.cache_clear()


def test_without_a_bug_nothing_is_reported(edited):
    edited(())
    check(CASE)


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_caught(edited, name):
    edits, report = BUGS[name]
    edited(edits)
    if report is None:
        with pytest.raises((EmulatorError, AssertionError)):
            check(CASE)
    else:
        with pytest.raises(EmulatorError, match=report):
            check(CASE)


def test_every_barrier_and_wait_is_removed_in_turn():
    text = source.read(source.folder() / KERNEL)
    taken = "".join(edit.old for name, (edits, _) in BUGS.items() if "missing" in name for edit in edits)
    for call in ("hw::sync_threads()", "hw::cp_async_wait<0>()", "hw::cp_async_wait<1>()"):
        assert taken.count(call) == text.count(call), call
