"""Hopper's backward, backward_sm90.cu, on the emulator; its planted bugs; its machine code.

tests/ops/test_backward.py has the generated cases for every kernel; those here are some of them, on this one.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
from backends import Emulator, using
from cases import Case, draw
from compare import check_backward
from needs import needs_nvrtc

import cuflash
from cuflash import arch, dtypes, mods
from cuflash.errors import EmulatorError
from cuflash.jit import module, sass, source
from cuflash.jit.source import Edit
from cuflash.ops import backward_sm90
from cuflash.trace import tracer

TARGET = arch.named("sm_90a")
KERNEL = "backward_sm90.cu"


def check(case: Case, **hints) -> Any:
    """Run a case, forward and backward, and hold its gradients to the rule."""
    inputs, given = case.inputs(), case.gradients()
    if case.max_seqlen_q is not None:
        hints.setdefault("max_seqlen_q", case.max_seqlen_q)
    try:
        Emulator().run(inputs, arch="sm_90a", **hints)
        grads = Emulator().run_backward(
            inputs, given, arch="sm_90a", captured_grads=False, deterministic=False, **hints
        )
        check_backward(given.dout, inputs.q, inputs.k, inputs.v, *grads[:4], dlse=given.dlse, **inputs.keywords)
    except Exception as error:
        error.add_note(f"case: {case!r}")
        raise
    return grads


def cases(seed: int, count: int, classes: tuple[int, ...]) -> list[Case]:
    """Such as the kernel serves."""
    found = [c for c in draw(40 * count, seed, cost=2_500_000) if c.dtype != "float32"]
    found = [c for c in found if c.head_dim % 8 == c.head_dim_v % 8 == 0 and c.entry.load_bytes == 16]
    return [c for c in found if max(c.entry.dim_class, c.entry.dim_v_class) in classes][:count]


@pytest.mark.parametrize(
    "classes, count",
    [((64,), 8), ((128,), 8), ((32, 96), 4), pytest.param((32, 64, 96, 128), 300, marks=pytest.mark.slow)],
)
def test_generated_cases(classes, count, seed):
    found = cases(seed, count, classes)
    assert len(found) == count
    for n, case in enumerate(found):
        with cuflash.emulator.schedule(seed=seed + n, landing="early" if n % 2 else "late"):
            check(case)


# Two key tiles and several tiles of queries, a head dim short of its class, tails in q and in k, rows that see nothing,
# two heads that share keys; of plain rows, and of rich ones.
CASE = Case("float16", (300, 40), (170, 10), 4, 2, 56, 40, window_size=(120, 0), sink="float32", seed=3, max_seqlen_q=1)
RICH = dataclasses.replace(CASE, softcap=20.0, alibi="head")
WIDE = dataclasses.replace(CASE, lengths_q=(200, 40), head_dim=128, head_dim_v=104)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(CASE, id="plain"),
        *(pytest.param(x, id=n, marks=pytest.mark.slow) for x, n in ((RICH, "rich"), (WIDE, "wide"))),
    ],
)
def test_under_any_schedule(case, seed):
    """Twenty of them, no report, and one dk and dv."""
    found = set()
    for n in range(20):
        with cuflash.emulator.schedule(seed=seed + n, landing="early" if n % 3 == 2 else "late"):
            grads = check(case)
        found.add(grads.dk.tobytes() + grads.dv.tobytes())
    assert len(found) == 1


def gradients(keywords: dict[str, Any], d: int = 64, n: int = 330, **given: Any) -> tuple[list[np.ndarray], Any]:
    """Those of the reference, and those of the kernel beside its counters."""
    rng = np.random.default_rng(7)
    q, dout = (rng.standard_normal((1, n, 2, d)).astype(np.float16) for _ in "qd")
    k, v = (rng.standard_normal((1, n, 1, d)).astype(np.float16) for _ in "kv")
    out, lse, *_ = cuflash.attention(q, k, v, aux=("lse",), **keywords)
    found = []
    for backend in ("reference", "emulator"):
        with using(backend, "sm_90a"), cuflash.emulator.counting() as counters:
            grads = cuflash.attention_backward(dout, q, k, v, out, lse, **given, **keywords)
        found.append([x.astype(float) for x in (grads.dq, grads.dk, grads.dv, *grads.dcaptured)])
    assert {name.partition("_")[0] for name in counters.matrix_instructions} == {"wgmma"}
    for want, got in zip(*found, strict=True):
        np.testing.assert_allclose(got, want, atol=4e-3 * np.abs(want).max())
    return found[1], counters


def test_with_mods():
    """Of bounds alone; of tiles that are looked through, with terms of queries that are staged; of scores, and the
    gradient of what they captured."""
    ids = np.repeat(np.arange(4), 83)[:330].astype(np.int32)
    bias = np.random.default_rng(0).standard_normal((2, 660)).astype(np.float32)
    documents = cuflash.and_masks(mods.document(ids), mods.causal())
    _, few = gradients({"mask_mod": documents})
    _, more = gradients({"mask_mod": mods.causal()})
    assert few.total_matrix_instructions < more.total_matrix_instructions
    keywords = {"mask_mod": documents, "score_mod": lambda s, b, h, i, j: s + bias[h, i - j + 330]}
    grads, _ = gradients(keywords, captured_grads=True)
    assert len(grads) == 4
    gradients({"score_mod": lambda s, b, h, i, j: s * s * 0.1})
    gradients(
        {"mask_mod": lambda b, h, i, j: (h == 1) & (i >= j) & (i // 64 != 2)}, d=128, n=200
    )  # a head sees nothing


@pytest.mark.parametrize("d", [64, 96])
def test_dropout(d):
    """The weights that the forward drops."""
    gradients({"dropout_p": 0.3, "seed": 5, "causal": True}, d=d, n=200)


@pytest.mark.parametrize("sink", [None, "float32"])
@pytest.mark.parametrize("landing", ["early", "late"])
@pytest.mark.parametrize("d", [32, 128])
def test_rows_that_keep_nothing_and_large_scores(landing, sink, d):
    """A row that keeps nothing ignores dout and dlse of any value; a weight is at most 1 however lse is rounded."""
    rng = np.random.default_rng(0)
    rows, keys, nothing = 140, 60, 80
    q, dout = (rng.standard_normal((1, rows, 2, d)).astype(np.float16) for _ in "qd")
    k, v = (rng.standard_normal((1, keys, 1, d)).astype(np.float16) for _ in "kv")
    dlse = rng.standard_normal((1, 2, rows)).astype(np.float32)
    sinks = None if sink is None else rng.standard_normal(2).astype(sink)
    keywords: dict[str, Any] = {"causal": True, "sink": sinks}
    out, lse, *_ = cuflash.attention(q, k, v, aux=("lse",), **keywords)
    with using("emulator", "sm_90a"), cuflash.emulator.schedule(landing=landing):
        found = []
        for value in (0, np.nan, np.inf):
            dout[:, :nothing] = value
            given = dlse.copy()
            if sink is None:
                given[..., :nothing] = value
            grads = cuflash.attention_backward(dout, q, k, v, out, lse, dlse=given, **keywords)
            found.append([grads.dq, grads.dk, grads.dv, *([] if sink is None else [grads.dsink])])
        for other in found[1:]:
            for want, got in zip(found[0], other, strict=True):
                np.testing.assert_array_equal(got, want)
        dout[:, :nothing] = 0
        for scale in (1e5, 1e20, -1e8):
            large = cuflash.attention(q, k, v, aux=("lse",), scale=scale, **keywords)
            grads = cuflash.attention_backward(dout, q, k, v, large.out, large.lse, scale=scale, **keywords)
            assert np.isfinite(grads.dv).all() and np.abs(grads.dv.astype(float)).max() < 1e4


def test_which_calls_it_takes():
    """And what explain says of the others."""
    rng = np.random.default_rng(0)

    def make(d: int, dtype: Any = np.float16) -> np.ndarray:
        return rng.standard_normal((1, 64, 2, d)).astype(dtype)

    q, slopes = make(64), np.ones(2, np.float32)
    with using("emulator", "sm_90a"):
        for taken in (
            {}, {"causal": True}, {"softcap": 3.0}, {"alibi_slopes": slopes}, {"dropout_p": 0.5, "seed": 0},
            {"mask_mod": mods.causal()}, {"score_mod": lambda s, b, h, i, j: s + h}, {"sink": slopes}, {"scale": -1.0},
        ):  # fmt: skip
            assert cuflash.explain(q, q, q, backward=True, **taken).kernel == "backward_sm90", taken
        assert cuflash.explain(make(8), make(8), make(128), backward=True).kernel == "backward_sm90"
        calls: tuple[tuple[np.ndarray, dict[str, Any], str], ...] = (
            (make(64, np.float32), {}, "float32"),
            (make(63), {}, "rows that are multiples of 16 bytes"),
            (np.broadcast_to(q[:, :1], q.shape), {}, "not positive"),
            (make(136), {}, "head dims above 128"),
            (make(104), {"dropout_p": 0.5, "seed": 0}, "dropout"),
            (make(72), {"score_mod": lambda s, b, h, i, j: s + h}, "score_mod"),
            (q, {"deterministic": True}, "deterministic"),
            (q, {"alibi_slopes": slopes, "captured_grads": True}, "gradient of alibi_slopes"),
        )
        for x, keywords, reason in calls:
            explained = cuflash.explain(x, x, x, backward=True, **keywords)
            assert explained.kernel == "backward_sm80"
            assert any(reason in line and "not backward_sm90" in line for line in explained.why), reason
    with using("emulator", "sm_100a"):
        explained = cuflash.explain(q, q, q, backward=True)
        assert explained.kernel == "backward_sm80" and "backward_sm90" not in str(explained)


# Planted bugs -----------------------------------------------------------------------------------------------------

DEADLOCK = "deadlock"
UNORDERED = "race|uninitialised|before"
# Rows that keep nothing, with NaN in dout.
NOTHING = dataclasses.replace(
    CASE, lengths_q=(140,), lengths_k=(60,), window_size=(-1, 0), sink=None, max_seqlen_q=None
)
# name -> (edit, what the emulator's report says; None: the numbers or a report give it away)
BUGS: dict[str, tuple[Edit, str | None]] = {
    "wait for K and V missing": (Edit(KERNEL, "hw::mbarrier_wait(barriers.k_full(), 0);", ""), UNORDERED),
    "wait for Q missing": (Edit(KERNEL, "      hw::mbarrier_wait(barriers.q_full(stage), parity);\n", ""), UNORDERED),
    "wrong phase of Q": (Edit(KERNEL, "mbarrier_wait(barriers.q_full(stage), parity);",
                              "mbarrier_wait(barriers.q_full(stage), parity ^ 1);"), None),
    "wait for dO of a tail missing": (
        Edit(KERNEL, "        hw::mbarrier_wait(barriers.do_full(stage), parity);\n", ""), UNORDERED),
    "wait for dO missing": (
        Edit(KERNEL, "\n      hw::mbarrier_wait(barriers.do_full(stage), parity);\n", "\n"), UNORDERED),
    "wait for dS missing": (Edit(KERNEL, "hw::mbarrier_wait(barriers.ds_full(stage), parity);", ""), None),
    "Q and dO refilled early": (
        Edit(KERNEL, "hw::mbarrier_wait(barriers.empty(stage), barriers.parity(tile) ^ 1);\n    if (leader)",
             "if (leader)"), None),
    "rows written early": (
        Edit(KERNEL, "hw::mbarrier_wait(barriers.empty(stage), barriers.parity(tile) ^ 1);\n    const u32 rows",
             "const u32 rows"), None),
    "stages not given back": (Edit(KERNEL, "arrive(barriers.empty(stage));", ""), DEADLOCK),
    "dS not announced": (Edit(KERNEL, "arrive(barriers.ds_full(stage));", ""), DEADLOCK),
    "rows not announced": (
        Edit(KERNEL, "if (hw::lane_idx() == 0) hw::mbarrier_arrive(barriers.q_full(stage));", ""), DEADLOCK),
    "rows announced before all lanes have written theirs": (
        Edit(KERNEL, "    hw::sync_warp();\n    // arrive   q full", "    // arrive   q full"), UNORDERED),
    "one arrival of dS fewer awaited": (
        Edit(KERNEL, "mbarrier_init(ds_full(i), Plan::kConsumerWarps)",
             "mbarrier_init(ds_full(i), Plan::kConsumerWarps - 1)"), None),
    "Q's copies alone awaited": (Edit(KERNEL, "mbarrier_init(q_full(i), 2)", "mbarrier_init(q_full(i), 1)"), None),
    "stages given back before dv and dk are there": (
        Edit(KERNEL, "hw::wgmma_wait<1>();\n      // arrive   empty", "// arrive   empty"), None),
    "S used before it is there": (
        Edit(KERNEL, "hw::wgmma_wait<1>();\n      hw::wgmma_pin(accumulators(s));", ""), None),
    "dP used before it is there": (
        Edit(KERNEL, "hw::wgmma_wait<0>();\n      hw::wgmma_pin(accumulators(ds));", ""), None),
    "dq used before it is there": (
        Edit(KERNEL, "hw::wgmma_wait<0>();\n      hw::wgmma_pin(accumulators(dq));", ""), None),
    "fence of S missing": (Edit(KERNEL, "S s, ds;\n      hw::wgmma_fence();", "S s, ds;"), None),
    "fence of dv missing": (Edit(KERNEL, "hw::wgmma_fence();\n      issue_pv", "issue_pv"), None),
    "dS not fenced": (
        Edit(KERNEL, "      hw::fence_proxy_async();\n\n      // dv, dk", "\n      // dv, dk"), "proxy"),
    "one stage of dS": (
        Edit(KERNEL, "const u32 ds_tile = smem + Plan::kDs + stage * Plan::kDsBytes;",
             "const u32 ds_tile = smem + Plan::kDs;"), UNORDERED),
    "dS of 64 queries for 128": (Edit(KERNEL, "consumer * V::kBlockK * DsChunk::kBytes : 0;", "0 : 0;"), None),
    "dq of the first columns alone": (
        Edit(KERNEL, "k + static_cast<u32>(column * V::kBlockK * Plan::kBytes)", "k + 0 * column"), None),
    "dq added to the first columns alone": (Edit(KERNEL, "+ column / 8 * 128 + lane;", "+ lane;"), None),
    "dq added to the first rows alone": (
        Edit(KERNEL, "16 * warp + (Plan::kSplitsRows ? 64 * consumer : 0);", "16 * warp;"), None),
    "dq of another sequence": (
        Edit(KERNEL, "(head * p.dq_blocks + dq_begin + first / 16)", "(head * p.dq_blocks + first / 16)"), None),
    "dq of the first head alone": (Edit(KERNEL, "(head * p.dq_blocks + dq_begin", "(dq_begin"), None),
    "transposed dq of the first 8 queries of 16": (Edit(KERNEL, "kRowsOf16 + c % 2 * 128,", "kRowsOf16,"), None),
    "transposed dq of the first columns": (Edit(KERNEL, "(4 * consumer + warp) * 256", "warp * 256"), None),
    "transposed dq as if it were not": (
        Edit("backward_cast.cu", "if constexpr (V::kDqOrder == kTransposed)", "if constexpr (false)"), None),
    "another width of chunks": (
        Edit(KERNEL, "using QkChunk = Chunk<kDqColumns % 64 == 0 ? 128 : kDqColumns",
             "using QkChunk = Chunk<kDqColumns % 16 == 0 ? 128 : kDqColumns"), None),
    "another swizzle": (Edit("tile/descriptor.cuh", "kBytes == 128 ? 1u", "kBytes == 128 ? 2u"), None),
    "tails not cleared": (
        Edit("tile/tensor_rows.cuh", "if (is_wanted(row)) {", "if (false) {"), None),
    "K's tail not cleared": (
        Edit(KERNEL, "clear_rows<QkChunk, V::kHeadDim, V::kBlockK, Plan::kConsumerThreads>"
             "(smem, t.last_row + 1, thread);", ""), None),
    "V's tail not cleared": (
        Edit(KERNEL, "clear_rows<VChunk, V::kHeadDimV, V::kBlockK, Plan::kConsumerThreads>"
             "(smem + Plan::kV, t.last_row + 1, thread);", ""), None),
    "Q's tail not cleared": (
        Edit(KERNEL, "clear_rows<QkChunk, V::kHeadDim, V::kBlockQ, Plan::kConsumerThreads>"
             "(q, used, thread);", ""), None),
    "tails not said": (Edit(KERNEL, "(t.is_tail(tiles.n) ? kTailNext : 0u)", "0u"), None),
    "dO's tail not cleared": (
        Edit(KERNEL, "clear_rows<VChunk, V::kHeadDimV, V::kBlockQ, Plan::kConsumerThreads>"
             "(dout, used, thread);", ""), None),
    "K's tail not fenced": (
        Edit(KERNEL, "hw::fence_proxy_async();\n      // sync   k and v cleared", "// sync   k and v cleared"),
        "proxy"),
    "K's tail used before all have cleared it": (
        Edit(KERNEL, "// sync   k and v cleared <-> all consumers\n      meet();", ""), UNORDERED),
    "Q's tail not fenced": (
        Edit(KERNEL, "        hw::fence_proxy_async();\n        // sync   q and dout", "        // sync   q and dout"),
        "proxy"),
    "Q's tail used before all have cleared it": (
        Edit(KERNEL, "// sync   q and dout cleared <-> all consumers\n        meet();", ""), UNORDERED),
    "dout cleared while it is read": (
        Edit(KERNEL, "// sync   dP there <-> all consumers: nobody reads dout\n        meet();", ""), UNORDERED),
    "rows of dout not fenced": (
        Edit(KERNEL, "hw::fence_proxy_async();\n        // sync   dout cleared", "// sync   dout cleared"),
        "proxy"),
    "rows of dout used before all are cleared": (
        Edit(KERNEL, "// sync   dout cleared <-> all consumers\n        meet();", ""), UNORDERED),
    "rows of dout not cleared": (Edit(KERNEL, "* row)) == kInfinity;", "* row)) == -kInfinity;"), None),
    "dS of rows that keep nothing left in": (
        Edit(KERNEL, "x = lse_base2_of(column) == kInfinity ? 0.0f : x;", ""), None),
    "dk gathered while k is read": (Edit(KERNEL, "gathered there\n  meet();", "gathered there\n"), UNORDERED),
    "barriers used before they are made": (
        Edit(KERNEL, "// sync   barriers made <-> all warps\n  hw::sync_threads();", ""), None),
    "too few bytes announced": (
        Edit(KERNEL, "mbarrier_arrive_expect_tx(barriers.do_full(stage), Plan::kDoutBytes)",
             "mbarrier_arrive_expect_tx(barriers.do_full(stage), Plan::kDoutBytes - 16)"), None),
    "sides of the window not exchanged": (
        Edit(KERNEL, "mask_scores(s, center, p.window_right, p.window_left", "mask_scores(s, center, p.window_left, "
             "p.window_right"), None),
    "keys past the end left in": (
        Edit(KERNEL, "x = warp_row + S::row_of(row) <= t.last_row ? x : -kInfinity;", ""), None),
    "delta of the wrong row": (
        Edit(KERNEL, "x = weight * (x - delta.x[i % 2]);", "x = weight * (x - delta.x[0]);"), None),
}  # fmt: skip
LOW = Case("float16", (40,), (3,), 2, 1, 56, 40, scale=8.0, seed=3)
# No tile of queries has a tail, whose fence and barrier would do for that of keys.
KEYS = Case("float16", (128,), (40,), 1, 1, 56, 40, seed=3)
BUG_CASES = {
    "transposed dq of the first 8 queries of 16": WIDE,
    "transposed dq of the first columns": WIDE,
    "transposed dq as if it were not": WIDE,
    "K's tail not fenced": KEYS,
    "K's tail used before all have cleared it": KEYS,
    "keys past the end left in": LOW,
    "another width of chunks": RICH,
    "dq of the first columns alone": RICH,
    "dq added to the first columns alone": RICH,
    "dout cleared while it is read": NOTHING,
    "rows of dout not fenced": NOTHING,
    "rows of dout used before all are cleared": NOTHING,
    "rows of dout not cleared": NOTHING,
    "dS of rows that keep nothing left in": NOTHING,
}


def check_nothing(case: Case) -> None:
    """Rows that keep nothing have NaN in dout: the gradients are numbers all the same, and those of zeros."""
    rng = np.random.default_rng(0)
    q, dout = (rng.standard_normal((1, *case.lengths_q, 2, 64)).astype(np.float16) for _ in "qd")
    k, v = (rng.standard_normal((1, *case.lengths_k, 1, 64)).astype(np.float16) for _ in "kv")
    out, lse, *_ = cuflash.attention(q, k, v, causal=True, aux=("lse",))
    found = []
    for value in (0, np.nan):
        dout[:, : case.lengths_q[0] - case.lengths_k[0]] = value
        with using("emulator", "sm_90a"):
            grads = cuflash.attention_backward(dout, q, k, v, out, lse, causal=True)
        found.append((grads.dq, grads.dk, grads.dv))
    for want, got in zip(*found, strict=True):
        np.testing.assert_array_equal(got, want)


# Of each kind one, in a usual run.
USUAL = (
    "wait for Q missing", "wait for dO missing", "wait for dS missing", "rows written early", "stages not given back",
    "stages given back before dv and dk are there", "fence of dv missing", "dS not fenced", "one stage of dS",
    "dq added to the first columns alone", "transposed dq of the first columns", "Q's tail not cleared",
    "K's tail not fenced", "rows of dout not cleared",
    "dk gathered while k is read",
)  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(x, marks=() if x in USUAL else pytest.mark.slow) for x in BUGS])
def test_planted_bug_is_caught(edited, name):
    edit, report = BUGS[name]
    edited(edit)
    case = BUG_CASES.get(name, CASE)
    with pytest.raises((EmulatorError, AssertionError)) as caught:
        for n in range(8):
            with cuflash.emulator.schedule(seed=n, landing="early" if n % 2 else "late"):
                check_nothing(case) if case is NOTHING else check(case)
    if report is not None:
        assert re.search(report, str(caught.value))


def test_every_wait_and_fence_is_removed_in_turn():
    """All that the kernel's text has, but two fences of products before which no thread touches their registers, which
    are there as the instruction's manual has them; and where lanes meet before their dS is announced, which the issue
    of a product in between does as well on the emulator."""
    text = (source.folder() / KERNEL).read_text(encoding="utf-8")
    for call, left in (
        ("mbarrier_wait(", 0), ("fence_proxy_async()", 0), ("meet();", 0), ("sync_threads()", 0), ("sync_warp()", 1),
        ("wgmma_wait<0>()", 0), ("wgmma_wait<1>()", 0), ("wgmma_fence()", 2),
    ):  # fmt: skip
        removed = [edit.old for edit, _ in BUGS.values() if edit.old.count(call) > edit.new.count(call)]
        count = sum(edit.count(call) for edit in set(removed))
        assert count >= text.count(call) - left > 0, call


# Machine code -----------------------------------------------------------------------------------------------------

# Head dim -> instructions that a plain tile may take but for dq's additions, some more than it does; the share of its
# time, in percent, that the tensor cores can be busy.
GATES = {32: (690, 66), 64: (710, 76), 96: (440, 90), 128: (590, 93)}


def function_of(variant: backward_sm90.BackwardSm90Variant, reloads: int = 0) -> sass.Function:
    """Its machine code. Nothing makes products wait for each other (C75xx), and consumers touch no local memory, but to
    read `reloads` addresses in a plain tile."""
    spec = backward_sm90.kernel_spec(variant)
    compiled = module.compile(spec, TARGET)
    assert "(C75" not in compiled.cubin.log
    assert spec.smem_bytes + compiled.resources.static_smem_bytes <= TARGET.smem_bytes
    found = sass.functions(sass.disassemble(compiled.path))[spec.entry]
    assert reloads or found.local_by_role[0] == 0
    assert sum("LDL" in x or "STL" in x for x in found.loops[0].path) <= reloads
    assert found.counts["HMMA"] == 0 < found.counts["UTMALDG"]
    assert sum("UTMACCTL.PF" in x for x in found.instructions) == 4
    return found


def waits_of(path: tuple[str, ...]) -> list[int]:
    return [i for i, x in enumerate(path) if "WARPGROUP.DEPBAR" in x]


def check_loop(variant: backward_sm90.BackwardSm90Variant) -> sass.Loop:
    """The loop over tiles of queries of a plain tile: as many products as the shapes say, all exponentials under dP,
    and between the announcement of dS and the wait for the other warpgroup's, dv and dk."""
    (loop,) = function_of(variant).loops
    path, tile = loop.path, variant.tile
    d, d_v, rows = variant.head_dim, variant.head_dim_v, tile.block_q
    of = lambda name: [i for i, x in enumerate(path) if name in x]  # noqa: E731
    s, dp, last, dq = waits_of(path)
    products = of("HGMMA")
    assert [sum(a < i < b for i in products) for a, b in ((-1, s), (s, dp), (dp, last), (last, dq))] == [
        (d + d_v) // 16, 0, 2 * rows // 16 + tile.block_k // 16, 0,
    ]  # fmt: skip
    exponentials = of("MUFU.EX2")
    assert len(exponentials) == rows // 2 and all(s < i < dp for i in exponentials)
    assert len(of("STSM")) == rows // 16
    assert loop.counts["REDG"] == rows * d // 1024 and loop.counts["RED"] == 0
    assert not of("BAR.SYNC"), "warps meet at barriers of memory alone"
    tests = of("SYNCS.PHASECHK")
    assert len(tests) == 3 and len(of("SYNCS.ARRIVE")) == 2
    written = of("FENCE.VIEW.ASYNC")[-1]
    assert sum(written < i < tests[-1] for i in products) == 2 * rows // 16
    return loop


@needs_nvrtc
@pytest.mark.parametrize("d", [64, 128, *(pytest.param(d, marks=pytest.mark.slow) for d in (32, 96))])
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_machine_code(d, dtype):
    length, use = GATES[d]
    variant = backward_sm90.choose_variant(dtypes.BY_NAME[dtype], d, d)
    loop = check_loop(variant)
    assert loop.shortest <= length
    assert backward_sm90.predicted(variant, loop).tensor_use >= use / 100


@needs_nvrtc
@pytest.mark.parametrize(
    "d, what",
    [(128, "rich")]
    + [
        pytest.param(d, what, marks=pytest.mark.slow)
        for d in (32, 64, 96, 128)
        for what in ("rich", "causal", "documents", "dropout", "soft cap")
        if (d, what) not in ((128, "rich"), (128, "dropout"), (96, "soft cap"), (128, "soft cap"))
    ],
)
def test_machine_code_of_rich_rows(d, what):
    ids = np.zeros(64, np.int32)
    bound = {
        "causal": tracer.bind(None, mods.causal()),
        "documents": tracer.bind(None, cuflash.and_masks(mods.document(ids), mods.causal())),
        "soft cap": tracer.bind(mods.softcap(30.0), mods.causal()),
    }.get(what)
    variant = backward_sm90.choose_variant(
        dtypes.bfloat16, d, d, rich=True, dropout=what == "dropout", mods=bound and bound.mods
    )
    (loop,) = function_of(variant, reloads=(d, what) == (128, "documents")).loops
    assert loop.counts["REDG"] == 64 * d // 1024
    if what in ("rich", "causal", "documents"):
        assert loop.shortest <= 475
        assert backward_sm90.predicted(variant, loop).tensor_use >= {32: 55, 64: 76, 96: 90, 128: 93}[d] / 100


def test_every_tile_fits():
    for d in backward_sm90.PLAIN:
        for d_v in backward_sm90.PLAIN:
            for bound in (None, *(tracer.bind(None, m) for m in (mods.causal(), mods.natten_2d(32, 32, 7)))):
                variant = backward_sm90.choose_variant(dtypes.float16, d, d_v, mods=bound and bound.mods)
                assert variant.smem_bytes <= TARGET.smem_bytes, variant
                producer, consumer = variant.registers
                assert producer + 2 * consumer <= 3 * (65536 // 384 // 8 * 8)
