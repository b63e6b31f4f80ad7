"""The Hopper kernel, forward_sm90.cu: everything the forward does, on the emulator; its planted bugs; its machine code.

tests/ops/test_forward.py has the generated cases for every kernel; those here are some of them, on this one.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Any

import numpy as np
import pytest
from backends import Emulator, using
from cases import Case, draw
from compare import check_forward
from machine_code import misplaced, ptx
from needs import needs_nvrtc

import cuflash
from cuflash import arch, dtypes, mods
from cuflash.errors import CompileError, EmulatorError
from cuflash.jit import module, sass, source
from cuflash.jit.source import Edit
from cuflash.ops import forward
from cuflash.trace import tracer

TARGET = arch.named("sm_90a")
KERNEL = "forward_sm90.cu"


def check(case: Case, **hints) -> tuple[np.ndarray, ...]:
    inputs = case.inputs()
    if case.max_seqlen_q is not None:
        hints.setdefault("max_seqlen_q", case.max_seqlen_q)
    try:
        results = Emulator().run(inputs, arch="sm_90a", **hints)
        check_forward(inputs.q, inputs.k, inputs.v, *results, **inputs.keywords)
    except Exception as error:
        error.add_note(f"case: {case!r}")
        raise
    return results


def cases(seed: int, count: int, classes: tuple[int, ...]) -> list[Case]:
    drawn = draw(320, seed, cost=8_000_000)
    found = [c for c in drawn if c.dtype != "float32" and c.head_dim % 8 == c.head_dim_v % 8 == 0]
    return [c for c in found if c.entry.dim_class in classes][:count]


@pytest.mark.parametrize("classes", [(64,), (128,), (192,), pytest.param((32, 96, 192, 256), marks=pytest.mark.slow)])
def test_generated_cases(classes, seed):
    found = cases(seed, 400 if len(classes) > 1 else 12, classes)
    assert len(found) >= 10
    for n, case in enumerate(found):
        with cuflash.emulator.schedule(seed=seed + n, landing="early" if n % 2 else "late"):
            check(case)


# Three key tiles and two query tiles in one block (the hint is 1), a head dim short of its class, a tail in q and in k.
CASE = Case(
    "float16", (260, 40), (380, 40), 2, 1, 56, 40, window_size=(300, 140), max_seqlen_q=1, sink="float32", seed=3
)

# More query tiles in a block than Q has stages.
LONG = dataclasses.replace(CASE, lengths_q=(580,), lengths_k=(140,), heads_q=1)

# Heads that share a key head in one tile: of 64 rows 63 are of any.
HEADS = Case("float16", (50,), (70,), 3, 1, 64, 64, causal=True)


def test_the_same_bits_under_any_schedule(seed):
    """Twenty of them, and not a report."""
    found = set()
    for n in range(20):
        with cuflash.emulator.schedule(seed=seed + n, landing="early" if n % 3 == 2 else "late"):
            found.add(b"".join(x.tobytes() for x in check(CASE)))
    assert len(found) == 1


def test_with_mods():
    """Of bounds alone; of tiles that are looked through, with terms of keys that are staged; of scores."""
    rng = np.random.default_rng(7)
    n = 330
    q, k, v = (rng.standard_normal((1, n, h, 64)).astype(np.float16) for h in (2, 1, 1))
    ids = np.repeat(np.arange(4), 83)[:n].astype(np.int32)
    bias = rng.standard_normal((2, 2 * n)).astype(np.float32)
    calls: tuple[dict[str, Any], ...] = (
        {"mask_mod": mods.sliding_window(100)},
        {
            "mask_mod": cuflash.and_masks(mods.document(ids), mods.causal()),
            "score_mod": lambda s, b, h, i, j: s + bias[h, i - j + n],
        },
    )
    for keywords in calls:
        expected = cuflash.attention(q, k, v, aux=("lse",), **keywords)
        with using("emulator", "sm_90a"), cuflash.emulator.counting() as counters:
            found = cuflash.attention(q, k, v, aux=("lse",), **keywords)
        np.testing.assert_allclose(found.out.astype(float), expected.out.astype(float), atol=4e-3)
        np.testing.assert_allclose(found.lse, expected.lse, atol=1e-5)
        assert counters.total_matrix_instructions > 0


def test_which_calls_it_does_not_take():
    """And what explain says of each."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, 64, 2, 64)).astype(np.float16)
    odd = rng.standard_normal((1, 64, 2, 63)).astype(np.float16)
    wide = q.astype(np.float32)
    table = np.zeros((1, 4), np.int32)
    used = np.array([64], np.int32)
    with using("emulator", "sm_90a"):
        assert cuflash.explain(q, q, q).kernel == "forward_sm90"
        calls: tuple[tuple[np.ndarray, dict[str, Any], str], ...] = (
            (wide, {}, "float32"),
            (odd, {}, "rows that are multiples of 16 bytes"),
            (np.broadcast_to(q[:, :1], q.shape), {}, "not positive"),
            (q, {"kernel_options": {"kernel": "sm_80"}}, "kernel_options"),
        )
        for x, keywords, reason in calls:
            explained = cuflash.explain(x, x, x, **keywords)
            assert explained.kernel == "forward_sm80" and reason in str(explained)
        one = np.broadcast_to(rng.standard_normal((1, 16, 2, 64)).astype(np.float16), (4, 16, 2, 64))
        for page_size, how in (
            (16, "tensor copies of 16 rows"),
            (24, "tensor copies of 8 rows"),
            (20, "row by row"),
            (0, "stride"),
        ):
            pages = rng.standard_normal((4, page_size, 2, 64)).astype(np.float16) if page_size else one
            explained = cuflash.explain(q, pages, pages, page_table=table, seqused_k=used)
            assert explained.kernel == "forward_sm90" and how in str(explained)
    with using("emulator", "sm_100a"):
        assert cuflash.explain(q, q, q).kernel == "forward_sm80"


@pytest.fixture
def three_processors(monkeypatch):
    monkeypatch.setitem(arch.ARCHES, "sm_90a", dataclasses.replace(TARGET, multiprocessors=3))


@pytest.mark.parametrize("causal", [False, True])
def test_a_block_for_each_multiprocessor(three_processors, seed, causal):
    """Twelve query tiles of two sequences and two heads, four a block: the bits of a block for each."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((2, n, h, 64)).astype(np.float16) for n, h in ((500, 2), (300, 1), (300, 1)))
    found = set()
    for persistent, landing in ((False, "late"), (True, "late"), (True, "early")):
        options = {"persistent": persistent}
        with using("emulator", "sm_90a"), cuflash.emulator.schedule(seed=seed, landing=landing):
            told = cuflash.explain(q, k, v, causal=causal, kernel_options=options)
            result = cuflash.attention(q, k, v, causal=causal, kernel_options=options, aux=("lse",))
        assert told.grid == ((3, 1, 1) if persistent else (3, 2, 2))
        found.add(result.out.tobytes() + result.lse.tobytes())
    expected = cuflash.attention(q, k, v, causal=causal)
    np.testing.assert_allclose(result.out.astype(float), expected.astype(float), atol=4e-3)
    assert len(found) == 1


def test_when_there_is_a_block_for_each_multiprocessor(three_processors):
    """Where tiles are alike and more than multiprocessors; or where it is asked for."""
    q = np.zeros((2, 500, 1, 64), np.float16)
    used = np.array([1, 2], np.int32)
    with using("emulator", "sm_90a"):
        for keywords, expected in (
            ({}, True),
            ({"score_mod": mods.softcap(3.0)}, True),
            ({"kernel_options": {"persistent": False}}, False),
            ({"causal": True}, False),
            ({"causal": True, "kernel_options": {"persistent": True}}, True),
            ({"window_size": (9, -1)}, False),
            ({"mask_mod": mods.causal()}, False),
            ({"seqused_k": used}, False),
        ):
            told = cuflash.explain(q, q, q, **keywords)
            assert (told.grid == (3, 1, 1) and "persistent" in str(told)) == expected, keywords
        assert cuflash.explain(q[:1], q[:1], q[:1]).grid == (3, 1, 1) and "persistent" not in str(
            cuflash.explain(q[:1], q[:1], q[:1])
        )
        starts = np.array([0, 100, 500], np.int32)
        with pytest.raises(cuflash.errors.UnsupportedError, match="dense"):
            cuflash.attention(
                *[q[0]] * 3, cu_seqlens_q=starts, cu_seqlens_k=starts, kernel_options={"persistent": True}
            )


# Query rows, keys, query heads, key heads, head dim, options.
CLUSTERED = {
    "even tiles": (768, 300, 2, 1, 64, {"persistent": False}),
    "persistent": (768, 200, 3, 3, 64, {"persistent": True}),
    "packed heads": (41, 140, 8, 1, 64, {"pack_heads": True}),
    "no keys": (384, 0, 1, 1, 64, {}),
    # Chunks of V one behind the other, whose distance is in the descriptor.
    "two chunks": (256, 200, 1, 1, 128, {}),
    "four chunks": (256, 200, 1, 1, 256, {}),
}


@pytest.mark.parametrize("name", CLUSTERED)
def test_two_blocks_share_their_keys(three_processors, seed, name):
    """The bits are those of blocks by themselves, and each key comes from memory once for two query tiles."""
    length, keys, heads, heads_kv, d, options = CLUSTERED[name]
    rng = np.random.default_rng(seed)
    q, k, v = (
        rng.standard_normal((2, n, h, d)).astype(np.float16)
        for n, h in ((length, heads), (keys, heads_kv), (keys, heads_kv))
    )
    found, read = [], []
    for cluster, landing in ((1, "late"), (2, "late"), (2, "early")):
        with (
            using("emulator", "sm_90a"),
            cuflash.emulator.schedule(seed=seed, landing=landing),
            cuflash.emulator.counting() as counters,
        ):
            result = cuflash.attention(q, k, v, aux=("lse",), kernel_options=options | {"cluster": cluster})
        found.append(result.out.tobytes() + result.lse.tobytes())
        read.append(counters.global_bytes_read.get("k", 0))
    with using("emulator", "sm_90a"):
        assert "in pairs" in str(cuflash.explain(q, k, v, kernel_options=options | {"cluster": 2}))
    assert found[0] == found[1] == found[2]
    assert read[1] == read[2] == read[0] / 2
    np.testing.assert_allclose(result.out.astype(float), cuflash.attention(q, k, v).astype(float), atol=2e-3)


def test_clusters_are_refused_where_keys_differ():
    q = np.zeros((1, 384, 1, 64), np.float16)
    starts = np.array([0, 384], np.int32)
    with using("emulator", "sm_90a"):
        for keywords in (
            {"causal": True},
            {"mask_mod": mods.causal()},
            {"seqused_k": np.array([3], np.int32)},
            {"window_size": (3, 3)},
        ):
            with pytest.raises(cuflash.errors.UnsupportedError, match="cluster=2 is for dense"):
                cuflash.attention(q, q, q, kernel_options={"cluster": 2}, **keywords)
        with pytest.raises(cuflash.errors.UnsupportedError, match="not 1"):
            cuflash.attention(q[:, :100], q, q, kernel_options={"cluster": 2})
        with pytest.raises(cuflash.errors.UnsupportedError, match="dense"):
            cuflash.attention(*[q[0]] * 3, cu_seqlens_q=starts, cu_seqlens_k=starts, kernel_options={"cluster": 2})


CLUSTER_BUGS = {
    "stages not given back to the other block": (
        Edit(KERNEL, "hw::mbarrier_arrive_at(mbarrier, lane);",
             "hw::mbarrier_arrive_at(mbarrier, hw::cluster_rank());")),
    "half of the arrivals awaited": (
        Edit(KERNEL, "hw::mbarrier_init(k_empty(i), V::kCluster * Plan::kConsumerWarps);",
             "hw::mbarrier_init(k_empty(i), Plan::kConsumerWarps);")),
    "a block ends before the other": Edit(KERNEL, "if constexpr (V::kCluster > 1) hw::cluster_sync();", ""),
    "barriers used before both have made them": (
        Edit(KERNEL, "  } else {\n    hw::cluster_sync();\n  }", "  } else {\n    hw::sync_threads();\n  }")),
    "both bring the same half": Edit(KERNEL, "const i32 part = hw::cluster_rank() * kRows;", "const i32 part = 0;"),
    "a block's place in V's descriptors": (
        Edit("tile/descriptor.cuh", "return start(address) + (static_cast", "return (address >> 4) | (static_cast")),
}  # fmt: skip


@pytest.mark.parametrize("name", CLUSTER_BUGS)
def test_planted_bug_of_clusters_is_caught(edited, name):
    rng = np.random.default_rng(0)
    d = 128 if "descriptors" in name else 64
    q, k, v = (rng.standard_normal((6, n, 1, d)).astype(np.float16) for n in (384 if d == 64 else 256, 300, 300))
    expected = cuflash.attention(q, k, v)
    edited(CLUSTER_BUGS[name])
    with pytest.raises((EmulatorError, AssertionError)):
        for n in range(8):
            with using("emulator", "sm_90a"), cuflash.emulator.schedule(seed=n, landing="early" if n % 2 else "late"):
                result = cuflash.attention(q, k, v, kernel_options={"cluster": 2})
            np.testing.assert_allclose(result.astype(float), expected.astype(float), atol=4e-3)


@pytest.mark.parametrize("group", [2, 3, 7, 8])
def test_heads_that_share_keys_in_one_tile(seed, group):
    """The bits are those of each head by itself; 3 and 7 heads leave rows of a warpgroup over."""
    rng = np.random.default_rng(seed)
    lengths_q, lengths_k = (5, 0, 40), (130, 9, 40)
    starts_q, starts_k = (np.cumsum((0, *n)).astype(np.int32) for n in (lengths_q, lengths_k))
    q = rng.standard_normal((45, 2 * group, 64)).astype(np.float16)
    k, v = (rng.standard_normal((179, 2, 64)).astype(np.float16) for _ in "kv")
    keywords: dict[str, Any] = dict(
        cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, seqused_q=np.array([4, 0, 40], np.int32), causal=True,
        sink=rng.standard_normal(2 * group).astype(np.float32),
        alibi_slopes=rng.random(2 * group).astype(np.float32), aux=("lse", "max_logit"),
    )  # fmt: skip
    found = []
    for options, landing in (({"pack_heads": False}, "late"), ({"pack_heads": True}, "late"), (None, "early")):
        with using("emulator", "sm_90a"), cuflash.emulator.schedule(seed=seed, landing=landing):
            found.append(cuflash.attention(q, k, v, **keywords, kernel_options=options))
    for result in found[1:]:
        for one, other in zip(found[0][:3], result[:3], strict=True):
            np.testing.assert_array_equal(one, other)
    expected = cuflash.attention(q, k, v, **keywords)
    np.testing.assert_allclose(found[1].out.astype(float), expected.out.astype(float), atol=2e-3)
    np.testing.assert_allclose(found[1].lse, expected.lse, atol=1e-5)


def test_when_heads_share_a_tile():
    """Where their queries fill fewer tiles so, and nothing tells one head from another."""
    with using("emulator", "sm_90a"):
        for length, heads, keywords, expected in (
            (1, 8, {}, True),
            (64, 8, {"causal": True}, True),
            (1, 1, {}, False),
            (1, 65, {}, False),
            (960, 8, {}, False),
            (960, 8, {"kernel_options": {"pack_heads": True}}, True),
            (1, 8, {"kernel_options": {"pack_heads": False}}, False),
            (1, 8, {"alibi_slopes": np.ones(8, np.float32)}, True),
            (1, 8, {"score_mod": mods.softcap(2.0)}, False),
            (1, 8, {"dropout_p": 0.5, "seed": 1}, False),
        ):
            q, k = np.zeros((2, length, heads, 64), np.float16), np.zeros((2, length, 1, 64), np.float16)
            told = cuflash.explain(q, k, k, **keywords)
            assert ("share tiles" in str(told)) == expected and (told.grid[1] == 1) == (expected or heads == 1), (
                keywords
            )
        with pytest.raises(cuflash.errors.UnsupportedError, match="up to 64 query heads"):
            cuflash.attention(k, k, k, mask_mod=mods.causal(), kernel_options={"pack_heads": True})


def test_kernel_options_ask_for_the_other_kernel():
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, 70, 1, 64)).astype(np.float16)
    used = []
    for options in (None, {"kernel": "sm_80"}):
        with using("emulator", "sm_90a"), cuflash.emulator.counting() as counters:
            found = cuflash.attention(q, q, q, kernel_options=options)
        used.append(sorted(counters.matrix_instructions)[0].partition("_")[0])
        np.testing.assert_allclose(found.astype(float), cuflash.attention(q, q, q).astype(float), atol=2e-3)
    assert used == ["wgmma", "mma"]


# Planted bugs -----------------------------------------------------------------------------------------------------

DEADLOCK = "deadlock"
UNORDERED = "race|uninitialised|before"
BUGS: dict[str, tuple[Edit, str | None]] = {
    "wait for Q missing": (Edit(KERNEL, "hw::mbarrier_wait(barriers.q_full(q_stage), "
                                "barriers.q_parity(progress.q_tiles++));", "++progress.q_tiles;"), None),
    "wrong phase of Q": (Edit(KERNEL, "barriers.q_parity(progress.q_tiles++));",
                              "barriers.q_parity(progress.q_tiles++) ^ 1);"), None),
    "wait for the first K missing": (
        Edit(KERNEL, "u32 tile = progress.k_tiles;\n    // wait   k full <- the producer: K and the tile's word\n"
             "    hw::mbarrier_wait(barriers.k_full(barriers.stage(tile)), barriers.parity(tile));",
             "u32 tile = progress.k_tiles;"), None),
    "wait for K missing": (
        Edit(KERNEL, "      // wait   k full <- the producer: K and the tile's word\n"
             "      hw::mbarrier_wait(barriers.k_full(barriers.stage(tile)), barriers.parity(tile));", ""), None),
    "wait for V missing": (
        Edit(KERNEL, "hw::mbarrier_wait(barriers.v_full(barriers.stage(before)), barriers.parity(before));", ""), None),
    "wait for the last V missing": (
        Edit(KERNEL, "hw::mbarrier_wait(barriers.v_full(barriers.stage(tile)), barriers.parity(tile));\n"
             "    hw::wgmma_pin", "hw::wgmma_pin"), None),
    "K refilled early": (
        Edit(KERNEL, "hw::mbarrier_wait(barriers.k_empty(stage), barriers.parity(progress.k_tiles) ^ 1);", ""),
        "protocol"),
    "V refilled early": (
        Edit(KERNEL, "is there\n    hw::mbarrier_wait(barriers.v_empty(stage), barriers.parity(tile) ^ 1);", ""),
        UNORDERED),
    "Q refilled early": (
        Edit(KERNEL, "hw::mbarrier_wait(barriers.q_empty(q_stage), barriers.q_parity(progress.q_tiles++) ^ 1);",
             "++progress.q_tiles;"), UNORDERED),
    "the end said early": (
        Edit(KERNEL, "hw::mbarrier_wait(barriers.q_empty(q_stage), barriers.q_parity(progress.q_tiles) ^ 1);", ""),
        None),
    "the end not said": (Edit(KERNEL, "hw::mbarrier_arrive(barriers.q_full(q_stage));", ""), DEADLOCK),
    "K not given back": (
        Edit(KERNEL, "if constexpr (M::kStagedK == 0) give_back(barriers.k_empty(barriers.stage(tile)));", ""),
        DEADLOCK),
    "V not given back": (Edit(KERNEL, "give_back(barriers.v_empty(barriers.stage(before)));", ""), DEADLOCK),
    "Q not given back": (Edit(KERNEL, "arrive(barriers.q_empty(q_stage));", ""), DEADLOCK),
    "K given back before it is read": (
        Edit(KERNEL, "      hw::wgmma_wait<1>();\n", "      give_back(barriers.k_empty(barriers.stage(tile)));\n"
             "      hw::wgmma_wait<1>();\n"), None),
    "scores used before they are there": (Edit(KERNEL, "      hw::wgmma_wait<1>();\n", ""), None),
    "O used before it is there": (
        Edit(KERNEL, "hw::wgmma_wait<0>();\n        hw::wgmma_pin(accumulators(o));\n        // arrive",
             "hw::wgmma_pin(accumulators(o));\n        // arrive"), None),
    "V given back before it is read": (
        Edit(KERNEL, "hw::wgmma_wait<0>();\n        hw::wgmma_pin(accumulators(o));\n        // arrive",
             "give_back(barriers.v_empty(barriers.stage(before)));\n        hw::wgmma_wait<0>();\n"
             "        hw::wgmma_pin(accumulators(o));\n        // arrive"), None),
    "fence of scores missing": (
        Edit(KERNEL, "S s;\n      hw::wgmma_fence();\n      issue_scores(s, tile);\n      if",
             "S s;\n      issue_scores(s, tile);\n      if"), None),
    "too few bytes announced": (
        Edit(KERNEL, "hw::mbarrier_arrive_expect_tx(k_full, Plan::kKBytes);",
             "hw::mbarrier_arrive_expect_tx(k_full, Plan::kKBytes - 16);"), None),
    "another swizzle": (Edit("tile/descriptor.cuh", "kBytes == 128 ? 1u", "kBytes == 128 ? 2u"), None),
    "V tail not cleared": (
        Edit(KERNEL, "clear_rows<V>(smem + Plan::kV + barriers.stage(tile) * Plan::kVBytes, used);", ""), None),
    "V tail cleared one row short": (Edit(KERNEL, "barriers.stage(tile) * Plan::kVBytes, used);",
                                          "barriers.stage(tile) * Plan::kVBytes, used + 1);"), None),
    "V tail not fenced": (
        Edit(KERNEL, "hw::fence_proxy_async();\n      // sync   V cleared", "// sync   V cleared"), "proxy"),
    "V tail used before all have cleared it": (
        Edit(KERNEL, "hw::named_sync(1, 128 * Plan::kConsumers);", ""), UNORDERED),
    "out gathered while Q is read": (Edit(KERNEL, "hw::named_sync(5 + consumer, 128);", ""), UNORDERED),
    "out not fenced": (Edit(KERNEL, "  hw::fence_proxy_async();\n  hw::sync_warp();", "  hw::sync_warp();"), "proxy"),
    "a warp's lanes do not meet before Q is given back": (
        Edit(KERNEL, "  hw::fence_proxy_async();\n  hw::sync_warp();", "  hw::fence_proxy_async();"), "proxy"),
    "barriers used before they are made": (
        Edit(KERNEL, "(V::kCluster == 1) {\n    hw::sync_threads();\n", "(V::kCluster == 1) {\n"), None),
    "rows of no query not cleared": (
        Edit(KERNEL, "if constexpr (Plan::kSharesTiles) clear_rows_of_none<V>(p, smem);", ""), "uninitialised"),
    "rows of no query not fenced": (
        Edit(KERNEL, "    }\n  }\n  hw::fence_proxy_async();\n}", "    }\n  }\n}"), "proxy"),
    "rows of no query stored": (Edit(KERNEL, "exists = in_group < p.group_queries;", "exists = true;"), None),
    "packed heads: another row's query": (
        Edit(KERNEL, "query = row / 64 * p.group_queries + in_group;", "query = row / 64 * 64 + in_group;"), None),
    "O not rescaled": (Edit(KERNEL, "{ x *= rescale[row]; }", "{ x *= 1.0f; }"), None),
    "a wide O not rescaled before the last tile": (
        Edit(KERNEL, "if constexpr (kRescaleUnderS) rescale_out(rescale);\n    // wait", "// wait"), None),
    "the next stage's K": (Edit(KERNEL, "smem + Plan::kK + barriers.stage(tile) * Plan::kKBytes);",
                                "smem + Plan::kK + barriers.stage(tile + 1) * Plan::kKBytes);"), None),
}  # fmt: skip

BUG_CASES = {
    # Rows of several chunks: those of other warps then lie in between.
    "out gathered while Q is read": dataclasses.replace(CASE, head_dim=128, head_dim_v=128),
    "a wide O not rescaled before the last tile": dataclasses.replace(CASE, head_dim=192, head_dim_v=192),
    "rows of no query not cleared": HEADS,
    "rows of no query not fenced": HEADS,
    "rows of no query stored": HEADS,
    "packed heads: another row's query": HEADS,
    "Q refilled early": LONG,
    "out not fenced": LONG,
    # Of one stage, which the producer fills at once.
    "a warp's lanes do not meet before Q is given back": dataclasses.replace(LONG, head_dim=192, head_dim_v=192),
    "the end said early": LONG,
}


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_caught(edited, name):
    edit, report = BUGS[name]
    edited(edit)
    with pytest.raises((EmulatorError, AssertionError)) as caught:
        for n in range(8):
            with cuflash.emulator.schedule(seed=n, landing="early" if n % 2 else "late"):
                check(BUG_CASES.get(name, CASE))
    if report is not None:
        assert re.search(report, str(caught.value))


def test_every_wait_and_fence_is_removed_in_turn():
    """All that the kernel's text has, but V's wait before its tail is cleared, which `V tail` bugs go with, the two
    that say whose turn it is to issue products, which cost time alone, and one of each of those who load pages
    (test_forward_paged.py)."""
    text = (source.folder() / KERNEL).read_text(encoding="utf-8")
    for call, left in (("mbarrier_wait(", 2), ("fence_proxy_async()", 1), ("named_sync(", 2), ("wgmma_wait<1>()", 0)):
        removed = [edit.old for edit, _ in BUGS.values() if edit.old.count(call) > edit.new.count(call)]
        assert len(set(removed)) >= text.count(call) - left > 0, call


# Machine code -----------------------------------------------------------------------------------------------------

# (d, d_v) -> wgmma instructions of a key tile (d / 16 + block_k / 16); how many instructions a tile may take that
# nothing is masked of and no score changed in: 1.1 x those of a kernel of that alone; the percentage of its time that
# the tensor cores can be busy by the model (sm_model.py).
GATES = {
    (64, 64): (12, 476, 84.1),
    (96, 96): (16, 594, 97.6),
    (128, 128): (16, 534, 99.9),
    (192, 192): (18, 504, 99.5),
    (192, 128): (20, 557, 99.9),
    (256, 256): (21, 514, 99.5),
}


def loop_of(variant: forward.ForwardSm90Variant) -> sass.Loop:
    """The KV loop's machine code. Neither consumers nor the producer touch local memory, and nothing makes products
    wait for each other (C75xx)."""
    spec = forward.kernel_spec(variant)
    compiled = module.compile(spec, TARGET)
    assert "(C75" not in compiled.cubin.log and not compiled.cubin.warnings
    assert spec.smem_bytes + compiled.resources.static_smem_bytes <= TARGET.smem_bytes
    found = sass.functions(sass.disassemble(compiled.path))[spec.entry]
    assert found.counts["HMMA"] == 0 < found.counts["UTMALDG"]
    assert found.local_by_role == (0, 0)
    # Maps are fetched ahead; to hand over a stage of keys no warp waits for memory, in clusters neither.
    assert sum("UTMACCTL.PF" in x for x in found.instructions) == 3
    loop = found.loops[0]
    assert not [x for x in loop.instructions if "MEMBAR" in x]
    return loop


def check_window(variant: forward.ForwardSm90Variant, loop: sass.Loop) -> None:
    """What stands between the wait for S and that for O: all rows' maxima, and, where O is not awaited before them, all
    exponentials."""
    maxima, exponentials = loop.in_window("FMNMX"), loop.in_window("MUFU.EX2")
    assert maxima[0] == maxima[1] >= variant.tile.block_k / 2
    assert exponentials[1] >= variant.tile.block_k / 2 + 2
    if variant.dropout or variant.head_dim_v > 128 or variant.tile.block_k < 128:
        assert exponentials[0] == exponentials[1]
    else:
        assert exponentials[0] < exponentials[1]


@needs_nvrtc
@pytest.mark.parametrize("d, d_v", GATES)
def test_machine_code(d, d_v):
    """The maxima of a tile, and a wide head's exponentials, run under the products of the tile before, and what waits
    leaves these room."""
    products, length, tensor_use = GATES[d, d_v]
    variant = forward.choose_sm90_variant(dtypes.bfloat16, d, d_v)
    loop = loop_of(variant)
    assert loop.counts["HGMMA"] == products
    check_window(variant, loop)
    assert loop.shortest <= length
    assert forward.predicted(variant, loop).tensor_use >= tensor_use / 100


# Without them the compiler moves the rescaling of a wide O behind the fence.
PINS = (
    Edit("hw_cuda/wgmma.cuh", 'asm volatile("" : "+f"(registers[i])::"memory");', ";"),
    Edit("hw_cuda/wgmma.cuh", 'asm volatile("" : "+r"(registers[i / kCount][i % kCount])::"memory");', ";"),
)


@needs_nvrtc
@pytest.mark.parametrize("d", [256, *(pytest.param(d, marks=pytest.mark.slow) for d in (64, 96, 128, 192))])
def test_nothing_moves_across_the_fences_of_products(d):
    """Neither what is done to a product's registers before, nor what is done with its sums."""
    spec = forward.kernel_spec(forward.choose_sm90_variant(dtypes.bfloat16, d, d))
    text = ptx(spec, "sm_90a")
    assert text.count("wgmma.fence") == 4 and misplaced(text) == []
    if d > 128:
        assert misplaced(ptx(dataclasses.replace(spec, edits=PINS), "sm_90a")), "the pins hold something"


@needs_nvrtc
@pytest.mark.parametrize("d", [64, 128, *(pytest.param(d, marks=pytest.mark.slow) for d in (96, 192, 256))])
def test_machine_code_of_pages(d):
    """Consumers of keys in pages are those of keys in one piece."""
    products, length, _ = GATES[d, d]
    variant = forward.choose_sm90_variant(dtypes.bfloat16, d, d, paged=True)
    loop = loop_of(variant)
    if d <= 128:
        natten = tracer.bind(None, mods.natten_2d(32, 32, 7))
        loop_of(forward.choose_sm90_variant(dtypes.bfloat16, d, d, paged=True, mods=natten.mods))
    assert loop.counts["HGMMA"] == products
    check_window(variant, loop)
    assert loop.shortest <= length
    plain = forward.choose_sm90_variant(dtypes.bfloat16, d, d)
    assert variant.tile.block_k == plain.tile.block_k, "sums are taken in the same order"


@needs_nvrtc
@pytest.mark.parametrize("d", [128, *(pytest.param(d, marks=pytest.mark.slow) for d in (64, 96, 192, 256))])
def test_machine_code_of_clusters(d):
    """Within the table, too."""
    products, length, _ = GATES[d, d]
    variant = dataclasses.replace(forward.choose_sm90_variant(dtypes.bfloat16, d, d), cluster=2)
    loop = loop_of(variant)
    check_window(variant, loop)
    assert loop.counts["HGMMA"] == products and loop.shortest <= length


@needs_nvrtc
@pytest.mark.parametrize(
    "d, what",
    [(128, "causal"), (128, "documents"), (64, "soft cap"), (128, "dropout"), (64, "natten")]
    + [
        pytest.param(d, what, marks=pytest.mark.slow)
        for d in (64, 96, 128, 192, 256)
        for what in ("causal", "documents", "dilated", "natten", "soft cap", "dropout")
    ],
)
def test_machine_code_with_mods(d, what):
    """In a full tile a mask of bounds costs nothing more, one of more than that stays within the table; a score is in
    the window too."""
    ids = np.zeros(64, np.int32)
    bound = {
        "causal": tracer.bind(None, mods.causal()),
        "documents": tracer.bind(None, cuflash.and_masks(mods.document(ids), mods.causal())),
        "dilated": tracer.bind(None, mods.dilated_window(60, 3)),
        "natten": tracer.bind(None, mods.natten_2d(32, 32, 7)),
        "soft cap": tracer.bind(mods.softcap(30.0), mods.causal()),
    }.get(what)
    variant = forward.choose_sm90_variant(dtypes.bfloat16, d, d, mods=bound and bound.mods, dropout=what == "dropout")
    loop = loop_of(variant)
    check_window(variant, loop)
    if what == "causal":
        assert loop.shortest <= loop_of(forward.choose_sm90_variant(dtypes.bfloat16, d, d)).shortest + 3
    if what == "documents" and 64 < d < 256:  # where the tile is the same
        assert loop.shortest <= GATES[d, d][1]
    if what in ("causal", "documents"):
        least = {(64, "causal"): 83.8, (64, "documents"): 73.0}.get((d, what), GATES[d, d][2])
        assert forward.predicted(variant, loop).tensor_use >= least / 100


@needs_nvrtc
def test_a_kernel_that_begins_with_other_registers_is_refused():
    """Where it is loaded: fewer than its warps share out, and the first block would wait for ever."""
    spec = forward.kernel_spec(forward.choose_sm90_variant(dtypes.bfloat16, 64, 64))
    assert spec.registers == (32, 160, 160, 160)
    bounds = "HW_KERNEL(Variant::kThreads) cuflash_forward_sm90("
    fewer = dataclasses.replace(spec, edits=(Edit(KERNEL, bounds, bounds.replace("Variant::kThreads", "640")),))
    with pytest.raises(CompileError, match=r"begins with \d+ registers.* 32 \+ 160 \+ 160 \+ 160 = 512: it would hang"):
        module.load(fewer, TARGET, "cuda", 0)
    for registers in ((32, 168, 168, 168), (136, 136), (96, 120)):
        with pytest.raises(CompileError, match="begins with 128"):
            module.load(dataclasses.replace(spec, registers=registers), TARGET, "cuda", 0)


def test_every_tile_fits():
    for d in forward.HEAD_DIM_CLASSES:
        for d_v in forward.HEAD_DIM_CLASSES:
            for bound in (None, *(tracer.bind(None, m) for m in (mods.causal(), mods.document(np.zeros(9, np.int32))))):
                paged = (d + d_v) % 64 == 0
                variant = forward.choose_sm90_variant(dtypes.float16, d, d_v, mods=bound and bound.mods, paged=paged)
                assert variant.smem_bytes <= TARGET.smem_bytes, variant
                producer, consumer = variant.registers
                warpgroups = variant.tile.warps // 4
                # What ptxas gives every thread at first is what the block has; in blocks of 8.
                assert producer + (warpgroups - 1) * consumer <= warpgroups * (65536 // (128 * warpgroups) // 8 * 8)
                assert forward.kernel_spec(variant).registers == (producer, *[consumer] * (warpgroups - 1))


def test_alone_packed_or_dense_the_same_bits():
    rng = np.random.default_rng(2)
    lengths = (70, 200)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    q, k, v = (rng.standard_normal((starts[-1], h, 64)).astype(np.float16) for h in (2, 1, 1))
    with using("emulator", "sm_90a"):
        together = cuflash.attention(q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, causal=True)
        for begin, end in itertools.pairwise(starts):
            alone = cuflash.attention(*(x[None, begin:end] for x in (q, k, v)), causal=True)
            np.testing.assert_array_equal(alone[0], together[begin:end])
