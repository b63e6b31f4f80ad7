"""Plans: every row once, work dealt out evenly, arguments that are refused. No rank is started."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import cuflash
from cuflash.distributed import plan
from cuflash.distributed.sharding import TILE
from cuflash.errors import ArgumentError, UnsupportedError

BALANCES = ("area", "contiguous", "zigzag")


def lengths_of(rng: np.random.Generator, total: int, ranks: int) -> list[int]:
    """Documents of a long-tailed distribution, `total` rows in all."""
    lengths: list[int] = []
    while sum(lengths) < total:
        lengths.append(int(min(total // 4, max(16, rng.lognormal(6.5, 1.4)))))
    lengths[-1] -= sum(lengths) - total
    return lengths


def starts_of(lengths) -> list[int]:
    return [0, *np.cumsum(lengths).tolist()]


def causal_tiles(rows: np.ndarray) -> int:
    """Tiles of 128 rows that a rank has of one document, by the keys up to the furthest of them."""
    return sum(int(rows[i : i + TILE].max()) // TILE + 1 for i in range(0, len(rows), TILE))


def counted(found) -> list[int]:
    """Each rank's causal tiles, counted from its rows and not by the plan."""
    result = []
    for rank in range(found.ranks):
        own = found.of(rank)
        parts = (own.positions[a:b] for a, b in itertools.pairwise(own.cu_seqlens))
        result.append(sum(causal_tiles(part) for part in parts))
    return result


@pytest.mark.parametrize("balance", BALANCES)
def test_every_row_is_held_once(balance, rng):
    for _ in range(40):
        lengths = rng.choice([0, 1, 5, 37, 128, 300, 1000], size=rng.integers(1, 9)).tolist()
        ranks = int(rng.integers(1, 9))
        found = plan(starts_of(lengths), ranks, causal=True, balance=balance, chunk=int(rng.choice([32, 100, 256])))
        held = [found.of(rank) for rank in range(ranks)]
        assert sorted(np.concatenate([own.index for own in held]).tolist()) == list(range(sum(lengths)))
        for own in held:
            assert (np.diff(own.index) > 0).all(), "documents and positions ascend: classification stays sharp"
            assert own.cu_seqlens[-1] == len(own.index) and len(own.cu_seqlens) == len(lengths) + 1
            assert (own.index == np.array(starts_of(lengths))[own.sequence] + own.positions).all()


@pytest.mark.parametrize("total, ranks, most", [(65536, 8, 1.12), (262144, 16, 1.05)])
def test_work_is_even(total, ranks, most):
    """The slowest rank's tiles times ranks, over one process's."""
    rng = np.random.default_rng(1)
    sets = [lengths_of(rng, size, n) for size, n in ((65536, 8), (262144, 16))]
    lengths = sets[0] if total == 65536 else sets[1]
    assert len(lengths) == {65536: 50, 262144: 173}[total]
    alone = sum(causal_tiles(np.arange(n)) for n in lengths)
    found = {b: plan(starts_of(lengths), ranks, causal=True, balance=b) for b in BALANCES}
    share = {b: max(counted(x)) * ranks / alone for b, x in found.items()}
    assert share["area"] <= most < share["zigzag"] < share["contiguous"]
    assert max(found["area"].rows) <= 1.05 * total / ranks, "memory stays even too"


def test_rows_out_of_order_would_cost_tiles():
    """What the count is good for: the same rows, shuffled, have to look at more keys."""
    found = plan([0, 8192], 4, causal=True, balance="zigzag").of(0)
    rows = found.positions
    assert causal_tiles(np.random.default_rng(0).permutation(rows)) > 1.3 * causal_tiles(rows)


def test_the_count_is_that_of_the_mask(rng):
    """A mask_mod with causal's or a window's meaning counts what the arguments count; others by their own tiles."""
    starts = starts_of([300, 0, 1, 513])

    def band(b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) & (kv_idx >= q_idx - 100)

    by_argument = plan(starts, 3, window_size=(100, 0))
    assert plan(starts, 3, mask_mod=band).tiles == plan(starts, 3, causal=True, mask_mod=band).tiles
    assert by_argument.tiles == plan(starts, 3, mask_mod=band).tiles
    ids = np.sort(rng.integers(0, 5, 900)).astype(np.int32)
    seen = ids[:, None] == ids
    blocks = [seen[i : i + TILE, j : j + TILE].any() for i in range(0, 900, TILE) for j in range(0, 900, TILE)]
    assert sum(plan([0, 900], 2, mask_mod=lambda b, h, q, k: ids[q] == ids[k]).tiles) == sum(blocks)


def test_a_plan_is_the_same_wherever_it_is_made():
    lengths = [37, 900, 0, 5, 1700]
    a, b = (plan(starts_of(lengths), 4, causal=True) for _ in range(2))
    assert a.chunks == b.chunks and a.digest == b.digest
    others = [plan(starts_of([37, 901, 0, 5, 1700]), 4, causal=True), plan(starts_of(lengths), 3, causal=True)]
    assert len({a.digest, *(x.digest for x in others)}) == 3


def test_what_is_explained(rng):
    found = plan(starts_of([900, 37]), 2, causal=True, window_size=(500, 0)).explain()
    assert found.rows == found.plan.rows and found.imbalance >= 1
    text = str(found)
    assert "causal, window (500, 0)" in text and "2 documents, 937 rows on 2 ranks by area" in text
    assert found.bytes_received(2, 64) == max(found.received) * 2 * 128 * 2


BAD = [
    (([0, 5, 3], 2), {}, "must begin with 0 and never fall"),
    (([1, 5], 2), {}, "must begin with 0"),
    (([], 2), {}, "must begin with 0"),
    (([0, 2.5], 2), {}, "must be integers"),
    ((None, 2), {}, "must be integers"),
    (([0, 5], 0), {}, "at least 1 rank"),
    (([0, 5], "cp"), {}, "pass ranks="),
    (([0, 5], 2), {"ranks": 2}, "a group knows its size"),
    (([0, 5], 2), {"balance": "best"}, "must be one of area"),
    (([0, 5], 2), {"chunk": 0}, "chunk=0 must be at least 1"),
    (([0, 5], 2), {"chunk": 1.5}, "chunk=1.5 must be an integer"),
    (([0, 5], 2), {"window_size": (-2, 0)}, "-1 is unlimited"),
    (([0, 5], "cp"), {"ranks": 2, "pad_rows": 0}, "pad_rows=0 must be at least 1"),
]


@pytest.mark.parametrize("arguments, keywords, message", BAD)
def test_bad_arguments(arguments, keywords, message):
    with pytest.raises(ArgumentError, match=message):
        plan(*arguments, **keywords)


def test_what_is_not_there_is_refused(rng):
    with pytest.raises(UnsupportedError, match="kv='ring' is not available: pass kv='gather'"):
        plan([0, 5], 2, kv="ring")
    looked_at = plan([0, 5], 2)
    x = rng.standard_normal((5, 2, 16)).astype(np.float32)
    for call in (lambda: looked_at.shard(x), lambda: cuflash.distributed.attention(x, x, x, looked_at)):
        with pytest.raises(ArgumentError, match="has no group"):
            call()
    with pytest.raises(ArgumentError, match=r"pass the rank you mean, plan.of\(rank\)"):
        looked_at.positions  # noqa: B018
    with pytest.raises(ArgumentError, match="rank=2 must be from 0 to 1"):
        looked_at.of(2)
    with pytest.raises(UnsupportedError, match="dropout_p is not available over ranks"):
        cuflash.distributed.attention(x, x, x, looked_at, dropout_p=0.1, seed=0)
    with pytest.raises(ArgumentError, match="page_table is no keyword here"):
        cuflash.distributed.attention(x, x, x, looked_at, page_table=x)
    with pytest.raises(ArgumentError, match=r"must be what cuflash\.distributed\.plan returned"):
        cuflash.distributed.attention(x, x, x, [0, 5])
