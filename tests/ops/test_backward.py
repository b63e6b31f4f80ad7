"""Attention backward on every backend: generated cases, the edges, bits, counters, planted bugs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from backends import BACKENDS, Emulator, using
from cases import PALETTE, Case, chunks, draw
from compare import check_backward, check_forward

import cuflash
from cuflash import dtypes
from cuflash.errors import EmulatorError
from cuflash.jit import source
from cuflash.jit.source import Edit
from cuflash.ops import backward

CASES = 304
CHUNK = 8
COST = 2_500_000  # matrix instructions of the forwards; a backward takes three and a half times as many


EMULATOR = Emulator()


# Two paths: dq computed apart, or accumulated by atomics, where the gradient of the slopes is not asked for.
PATHS = pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "atomic"])


def run(case: Case, backend=EMULATOR, *, deterministic: bool, **hints):
    """(inputs, gradients given, gradients computed) of a case."""
    inputs, given = case.inputs(), case.gradients()
    if case.max_seqlen_q is not None:
        hints.setdefault("max_seqlen_q", case.max_seqlen_q)
    backend.run(inputs, **hints)
    path = {"deterministic": deterministic, "captured_grads": deterministic}
    return inputs, given, backend.run_backward(inputs, given, **path, **hints)


def check(case: Case, backend=EMULATOR, *, deterministic: bool, **hints) -> None:
    """Run a case and hold it to the rule."""
    try:
        inputs, given, grads = run(case, backend, deterministic=deterministic, **hints)
        check_backward(
            given.dout, inputs.q, inputs.k, inputs.v, *grads[:4], *grads.dcaptured, dlse=given.dlse, **inputs.keywords
        )
    except Exception as error:
        error.add_note(f"deterministic={deterministic}, case: {case!r}")
        raise


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", chunks(CASES, CHUNK))
@pytest.mark.parametrize("other", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "other path"])
def test_generated_case(backend, chunk, other, seed):
    """What is compiled for a case takes one of the paths, head dims by turns; -m slow the other."""
    for case in draw(CASES, seed + 1, cost=COST)[chunk * CHUNK : (chunk + 1) * CHUNK]:
        turn = PALETTE.index(case.entry)
        check(case, backend, deterministic=((turn + turn // 6) % 2 == 0) != other)


@PATHS
def test_head_dims_of_latent_attention_while_it_reads_its_prompts(deterministic):
    """Multi-head latent attention (DeepSeek-V2): keys of 128 + 64 dims, values of 128, as many key heads as heads."""
    case = Case("bfloat16", (70, 33), (70, 90), 2, 2, 192, 128, causal=True, scale=0.1)
    inputs, given, grads = run(case, EMULATOR, deterministic=deterministic)
    check_forward(inputs.q, inputs.k, inputs.v, inputs.out, **inputs.keywords)
    check_backward(given.dout, inputs.q, inputs.k, inputs.v, *grads[:3], dlse=given.dlse, **inputs.keywords)


@PATHS
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
        Case("float16", (90, 40), (3, 9), 2, 2, 32, 32, scale=8.0),  # 2^-lse alone is beyond float32
    ],
    ids=repr,
)
def test_edge(backend, case, deterministic):
    check(case, backend, deterministic=deterministic)


@PATHS
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hint", [None, 1, 150, 1500])
def test_hints_lose_no_row(backend, hint, deterministic):
    case = Case("float16", (150, 0, 3, 129), (150, 0, 3, 200), 2, 1, 32, 32, causal=True, max_seqlen_q=hint)
    check(case, backend, deterministic=deterministic, **({} if hint is None else {"max_seqlen_k": hint}))


@PATHS
@pytest.mark.parametrize("dtype, d", [("float16", 64), ("bfloat16", 256), ("float32", 32)])
def test_bits_under_any_schedule(dtype, d, deterministic, seed):
    """Twenty orders of blocks, warps and lanes; copies landing late and early: no report, and one result. Of a dq that
    is accumulated there are several; rounding to 16 bits hides most of that."""
    lengths = ((20, 0, 131), (300, 3, 90)) if d < 256 else ((20, 0, 67), (130, 3, 40))
    case = Case(dtype, *lengths, 2, 1, d, d, causal=True, softcap=20.0, alibi="batch", sink="float32", seed=5)
    found: list[set[bytes]] = [set(), set()]
    for i in range(20):
        landing = "early" if i % 4 == 3 else "late"
        with cuflash.emulator.schedule(seed=seed + i, landing=landing, os_threads=1):
            _, _, grads = run(case, deterministic=deterministic)
        found[0].add(grads.dq.tobytes())
        found[1].add(b"".join(x.tobytes() for x in (*grads[1:4], *grads.dcaptured) if x is not None))
    assert len(found[1]) == 1
    if deterministic or dtype == "float32":
        assert (len(found[0]) == 1) == deterministic


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
        return cuflash.attention_backward(dout, q, k, v, out, lse, causal=True, deterministic=True, **keywords)

    with using("emulator"):
        packed = gradients(*map(np.concatenate, (q, k, v, dout)), cu_seqlens_q=starts, cu_seqlens_k=starts)
        for b in range(len(lengths)):
            alone = gradients(q[b][None], k[b][None], v[b][None], dout[b][None])
            for whole, one in zip(packed[:3], alone[:3], strict=True):
                assert whole[starts[b] : starts[b + 1]].tobytes() == one[0].tobytes()


def count(
    length: int, heads: int, heads_kv: int, d: int, dtype: str = "float16", *, deterministic: bool, **keywords: Any
):
    """The counters of one dense backward by the kernel of every GPU, and its tile."""
    rng = np.random.default_rng(0)
    element = dtypes.BY_NAME[dtype]
    make = lambda h: rng.standard_normal((1, length, h, d)).astype(element.numpy)  # noqa: E731
    q, k, v, dout = make(heads), make(heads_kv), make(heads_kv), make(heads)
    out, lse, *_ = cuflash.attention(q, k, v, aux=("lse",), **keywords)
    with using("emulator", "sm_80"), cuflash.emulator.counting() as counters:
        cuflash.attention_backward(dout, q, k, v, out, lse, deterministic=deterministic, **keywords)
    return counters, backward.choose_variants(element, d, d, 16, deterministic=deterministic)[0].tile


@PATHS
@pytest.mark.parametrize("heads_kv", [1, 2])
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("length", [128, 256, 512])
def test_global_bytes_follow_the_tiled_formula(length, d, heads_kv, deterministic):
    """Nothing grows with the length's square but the tiles: Q and dO once, and once for each tile of keys; K and V once
    for each key head, and once for each tile of every query head."""
    heads = 2
    counters, tile = count(length, heads, heads_kv, d, deterministic=deterministic)
    row, tiles = d * 2, math.ceil(length / tile.held)
    # delta reads out and dout; dk, dv: k, v once, q, dout per tile.
    expected = {
        "q": heads * length * row * tiles,
        "dout": heads * length * row * (1 + tiles),
        "out": heads * length * row,
        "k": length * row * heads_kv,
        "v": length * row * heads_kv,
    }
    if deterministic:  # dq: q, dout once, k, v per tile
        for name in "q", "dout":
            expected[name] += heads * length * row
        for name in "k", "v":
            expected[name] += heads * length * row * tiles
    else:
        expected["dq_accum"] = heads * length * d * 4
    for name, count_of in expected.items():
        assert counters.global_bytes_read[name] == pytest.approx(count_of, rel=0.05), name
    assert set(counters.global_bytes_read) <= {*expected, "lse", "lse_base2", "delta"}
    written = {"dq": heads * length * row, "dk": heads_kv * length * row, "dv": heads_kv * length * row}
    if not deterministic:
        written["dq_accum"] = heads * length * d * 4 * (1 + tiles)  # cleared once, added to by every tile of keys
    for name, count_of in written.items():
        assert counters.global_bytes_written[name] == count_of, name
    assert set(counters.global_bytes_written) <= {*written, "lse_base2", "delta"}


def test_additions_are_coalesced():
    """32 lanes add to 128 bytes in a row: as many sectors as bytes need."""
    counters, _ = count(256, 1, 1, 64, deterministic=False)
    assert not [site for site in counters.uncoalesced if "backward_sm80.cu" in site or "backward_cast.cu" in site]


@pytest.mark.parametrize("dtype, d", [("float16", 64), ("bfloat16", 128), ("float32", 32)])
@pytest.mark.parametrize("causal", [False, True])
@PATHS
def test_matrix_instructions_equal_the_formula(dtype, d, causal, deterministic):
    """Products of the size of Q K^T, in the tiles that hold a kept score: seven, or five where dq is accumulated."""
    length = 256
    counters, tile = count(length, 1, 1, d, dtype, deterministic=deterministic, causal=causal)
    depth, passes = (16, 1) if dtype != "float32" else (8, 3)
    product = passes * (tile.held // 16) * (tile.moved // 8) * (d // depth)
    pairs = 0
    for held in range(0, length, tile.held):
        queries_held = math.ceil(min(held + tile.held, length) / tile.moved) if causal else length // tile.moved
        keys_held = (length - held // tile.moved * tile.moved) // tile.moved if causal else length // tile.moved
        pairs += 3 * queries_held + 4 * keys_held if deterministic else 5 * keys_held
    assert counters.total_matrix_instructions == pairs * product


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("d", [32, 64, *(pytest.param(d, marks=pytest.mark.slow) for d in (96, 192)), 128, 256])
@PATHS
def test_no_bank_conflict_in_the_main_loop(dtype, d, deterministic):
    counters, _ = count(70, 1, 1, d, dtype, deterministic=deterministic, causal=True)
    outside = ("tile/store.cuh", "backward_sm80.cu")  # results on their way out; reads of lse and delta
    loop = {site: n for site, n in counters.bank_conflicts.items() if n and not any(x in site for x in outside)}
    assert not loop, f"extra passes over shared memory: {loop}"


@PATHS
@pytest.mark.parametrize("packed", [False, True])
def test_workspace_is_linear_and_as_planned(packed, deterministic):
    """Two numbers of each query row; where dq is accumulated, a row of float32 besides, sequences beginning at
    multiples of 16 rows."""
    strides = (0 if packed else 64 * 2 * 64, 128, 64)
    problem = backward.BackwardProblem(
        dtypes.float16, 3, packed, 64, 64, None, None, 2, 2, 64, 64, *[strides] * 8, load_bytes=16, scale=0.1,
        deterministic=deterministic,
    )  # fmt: skip
    plan = backward.plan(problem, cuflash.arch.named("sm_80"))
    rows = 64 if packed else 3 * 64
    padded = 0 if deterministic else rows + 16 * (3 + 1 if packed else 0)
    assert plan.workspace_bytes == 2 * 4 * 2 * rows + 2 * 64 * 4 * padded


@pytest.mark.parametrize(
    "call, kernels",
    [
        ({}, 1),
        ({"deterministic": True}, 2),
        ({"dslopes": True, "alibi": "head"}, 2),
        ({"dsink": True, "sink": "float32"}, 1),
        ({"dtype": dtypes.float32}, 2),
        ({"dtype": dtypes.float32, "head_dim": 96, "head_dim_v": 96}, 1),
    ],
    ids=repr,
)
def test_which_calls_accumulate_dq(call, kernels):
    fields = {"dtype": dtypes.float16, "head_dim": 128, "head_dim_v": 128} | call
    strides = {f"{name}_strides": (0, 128, 128) for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv")}
    plan = backward.plan(
        backward.BackwardProblem(
            batch=1, packed=True, q_rows=64, k_rows=64, max_seqlen_q=None, max_seqlen_k=None, heads_q=1, heads_kv=1,
            load_bytes=16, scale=0.1, **strides, **fields,
        ),
        cuflash.arch.named("sm_80"),
    )  # fmt: skip
    names = [spec.source for spec in plan.specs]
    assert names.count("backward_sm80.cu") == kernels
    assert names.count("backward_cast.cu") == 2 - kernels == ("dq_accum" in plan.workspace)
    reason = plan.described()[2][-1]
    assert ("five matrix products" if kernels == 1 else "dq is computed apart") in reason


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
        (Edit(KERNEL, "[] { hw::sync_threads(); }", "[] {}"),),
        UNORDERED,
    ),
    "moved tiles share a stage": ((Edit(KERNEL, "next_head, 1 - stage)", "next_head, stage)"),), None),
    "query head of the group forgotten": (
        (Edit(KERNEL, "kKeysHeld ? head * p.q_stride_head : 0", "0"),),
        None,
    ),
    "sides of the window not exchanged": (
        (Edit(KERNEL, "kKeysHeld ? p.window_right : p.window_left;", "p.window_left;"),),
        None,
    ),
    "delta of the wrong row": ((Edit(KERNEL, "V::kMoved + 8 * c + i % 2", "V::kMoved + 8 * c"),), None),
    "cap's derivative left out": (
        (Edit("tile/weight.cuh", "weight == 0.0f ? 0.0f : hw::max(hw::fma(-t, t, 1.0f), 0.0f);", "1.0f;"),),
        None,
    ),
    "rows that keep nothing left in": (
        (Edit("backward_delta.cu", "nothing = lse == -kInfinity;", "nothing = false;"),),
        None,
    ),
    "gradient stored past the end": (
        (Edit("tile/store.cuh", "if (row < owned) write(", "if (row <= owned) write("),),
        None,
    ),
    "partial sums of one warp only": (
        (Edit(KERNEL, "* (V::kThreads / 32) + hw::warp_idx()", "* (V::kThreads / 32)"),),
        None,
    ),
}


# The same where dq is accumulated.
ATOMIC_CASE = dataclasses.replace(CASE, softcap=0.0, sink="float32")
# Scores of few keys so far below 0 that 2^-lse is beyond float32.
LOW_CASE = Case("float16", (40,), (3,), 2, 1, 56, 40, scale=8.0, seed=3)
ATOMIC_BUGS: dict[str, tuple[tuple[Edit, ...], str | None]] = {
    "barrier before dq missing": (
        (Edit(KERNEL, "it is whole\n        hw::sync_threads();", "\n"),),
        UNORDERED,
    ),
    "barrier before gathering missing": (
        (Edit(KERNEL, "gathered there\n    hw::sync_threads();", "\n"),),
        UNORDERED,
    ),
    "dq stored instead of added": ((Edit(KERNEL, "hw::atomic_add(to +", "hw::store_global(to +"),), None),
    "dq added to the wrong columns": ((Edit(KERNEL, "(column + part_column) / 8", "column / 8"),), None),
    "dq of the wrong rows": ((Edit(KERNEL, "% Plan::kDqRowTiles * 16;", "% Plan::kDqRowTiles * 0;"),), None),
    "dq of the first head alone": ((Edit(KERNEL, "line = head * p.dq_blocks", "line = p.dq_blocks"),), None),
    "dq of another sequence": (
        (Edit(KERNEL, "slot_begin(p.cu_seqlens_q, p.q_len, sequence, 16) + (first", "(first"),),
        None,
    ),
    "one warp's part of dq left out": ((Edit(KERNEL, "part = hw::warp_idx();", "part = hw::warp_idx() + 1;"),), None),
    "dq not scaled": ((Edit("backward_cast.cu", "x *= p.scale;", ""),), None),
    "dsink of one warp only": ((Edit("backward_cast.cu", "(V::kThreads / 32) + warp", "(V::kThreads / 32)"),), None),
}
LOW_BUGS: dict[str, tuple[tuple[Edit, ...], str | None]] = {
    "keys past the end left in": ((Edit(KERNEL, "from_end == 0 || p.seqused_k != nullptr", "false"),), None),
}
# name -> (edits, report, the case that shows it, deterministic)
PLANTED = {
    name: (*bug, case, case is CASE)
    for bugs, case in ((BUGS, CASE), (ATOMIC_BUGS, ATOMIC_CASE), (LOW_BUGS, LOW_CASE))
    for name, bug in bugs.items()
}


@pytest.mark.parametrize("case, deterministic", [(CASE, True), (ATOMIC_CASE, False), (LOW_CASE, False)])
def test_without_a_bug_nothing_is_reported(case, deterministic):
    check(case, deterministic=deterministic)


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bug_is_caught(edited, name):
    edits, report, case, deterministic = PLANTED[name]
    edited(*edits)
    if report is None:
        with pytest.raises((EmulatorError, AssertionError)):
            check(case, deterministic=deterministic)
    else:
        with pytest.raises(EmulatorError, match=report):
            check(case, deterministic=deterministic)


def test_every_barrier_and_wait_is_removed_in_turn():
    text = source.read(source.folder() / KERNEL)
    taken = "".join(edit.old for name, (edits, *_) in PLANTED.items() if "missing" in name for edit in edits)
    for call in ("hw::sync_threads()", "hw::cp_async_wait<0>()", "hw::cp_async_wait<1>()"):
        assert taken.count(call) == text.count(call), call
