"""In which order blocks compute tiles: what kernels do is what the host says, and long tiles are done in time."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
from backends import using

import cuflash
from cuflash import arch, dtypes, mods
from cuflash.ops import backward, forward, order

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import launch_order
from benchmarks.launch_order import CAUSAL, Shape


def test_division_by_a_multiplier(seed):
    rng = np.random.default_rng(seed)
    for n in (1, 2, 3, 48, 2**31 - 1, *map(int, rng.integers(1, 2**31, 50))):
        multiplier, shift = order.divisor(n)
        assert multiplier < 2**32
        for x in (0, n - 1, n, 2**31 - 1, 2**31 - 2, *map(int, rng.integers(0, 2**31, 50))):
            if x < 2**31:
                assert 2 * x * multiplier >> 32 >> shift == x // n, (x, n)


def test_every_block_has_a_place_of_its_own(seed):
    """Of the order as kernels compute it from a block's rank."""
    rng = np.random.default_rng(seed)
    for _ in range(50):
        grid = tuple(map(int, rng.integers(1, 9, 3)))
        together = int(rng.choice([n for n in range(1, 9) if grid[1] % n == 0]))
        small = dataclasses.replace(arch.named("sm_80"), multiprocessors=int(rng.integers(1, 9)))
        chosen = order.choose(
            grid, small, wanted="long", alike=False, masked=False, window=CAUSAL, heads_together=together,
            bytes_together=int(rng.integers(1, 2**24)), threads=128,
        )  # fmt: skip
        places = list(chosen.places(grid))
        assert len({*places}) == len(places) == np.prod(grid)
        assert all(x < grid[0] and y < grid[1] and z < grid[2] for x, y, z in places)
        for size in (chosen.pairs, chosen.rest):
            assert size % together == 0, "heads that read the same keys are of one group"


@pytest.fixture
def few_places(monkeypatch):
    """Chips whose caches and multiprocessors are so few that there are several groups, of two sizes."""
    for name in ("sm_80", "sm_90a"):
        monkeypatch.setitem(
            arch.ARCHES, name, dataclasses.replace(arch.ARCHES[name], multiprocessors=1, l2_bytes=2**10)
        )


@pytest.fixture
def launched(monkeypatch):
    """(grid, order) of each launch of a main kernel."""
    found = []

    def forward_launch(self, *arguments, **keywords):
        found.append((self.grid, self.order))
        return original(self, *arguments, **keywords)

    def backward_launch(self, *arguments, **keywords):
        found.extend((s.grid, s.order) for s in self.steps if isinstance(s.spec.variant, backward.BackwardVariant))
        return original_backward(self, *arguments, **keywords)

    original, original_backward = forward.ForwardPlan.launch, backward.BackwardPlan.launch
    monkeypatch.setattr(forward.ForwardPlan, "launch", forward_launch)
    monkeypatch.setattr(backward.BackwardPlan, "launch", backward_launch)
    return found


def computed(trace, buffer: str, rows: int, heads: int, kernel: str = "") -> dict[tuple[int, int, int], list]:
    """(tile, head, sequence) of the tiles of 128 rows that each block loads first of an array [.., rows, heads, 64]."""
    found: dict[tuple[int, int, int], list] = {}
    for event in trace.events:
        if event.buffer == buffer and event.end > event.begin and kernel in event.kernel:
            row, head = divmod(event.begin // 128, heads)
            tile = (row % rows // 128, head, row // rows)
            if tile not in found.setdefault(event.block, []):
                found[event.block].append(tile)
    return found


def expected(grid, chosen, rows: int) -> dict[tuple[int, int, int], list]:
    tiles = -(-rows // 128)
    blocks = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
    return {
        block: [(x if chosen.from_begin else tiles - 1 - x, y, z)]
        for block, (x, y, z) in zip(blocks, chosen.places(grid), strict=True)
    }


@pytest.mark.parametrize("chip", ["sm_80", "sm_90a"])
def test_the_forward_kernels_take_the_places_that_the_plan_says(few_places, launched, chip):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 300, h, 64)).astype(np.float16) for h in (5, 5, 5))
    results = []
    for chosen in (None, "position"):
        with using("emulator", chip), cuflash.emulator.tracing() as trace:
            results.append(
                cuflash.attention(
                    q, k, v, causal=True, kernel_options={"order": chosen, "pack_heads": False, "persistent": False}
                )
            )
        (grid, said) = launched.pop()
        block_q = 192 if chip == "sm_90a" else 128
        found = computed(trace, "q", 300, 5)
        if block_q == 128:
            assert found == expected(grid, said, 300)
        assert (said.pairs > 0) == (chosen is None)
        firsts = {block: (tiles[0][0] > 0, *tiles[0][1:]) for block, tiles in found.items()}
        assert len({*firsts.values()}) >= 2 * 5, "each sequence and head"
    assert results[0].tobytes() == results[1].tobytes()


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_backward_kernels_take_the_places_that_the_plan_says(few_places, launched, deterministic):
    """With the keys held the first tile goes first, which all queries see."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((3, 300, h, 64)).astype(np.float16) for h in (2, 1, 1))
    result = cuflash.attention(q, k, v, causal=True, aux=("lse",))
    with using("emulator", "sm_80"), cuflash.emulator.tracing() as trace:
        cuflash.attention_backward(q, q, k, v, result.out, result.lse, causal=True, deterministic=deterministic)
    (grid, keys), *queries = launched
    assert keys.from_begin and keys.pairs > 0
    first = min(e.launch for e in trace.events if "backward_sm80" in e.kernel)
    trace.events = [e for e in trace.events if e.launch == first]
    held = {block: tiles[:1] for block, tiles in computed(trace, "k", 300, 1, "backward_sm80").items()}
    assert held == expected(grid, keys, 300)
    for _, chosen in queries:
        assert not chosen.from_begin and chosen.pairs > 0


def test_persistent_blocks_take_the_same_order(few_places):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 500, h, 64)).astype(np.float16) for h in (2, 1, 1))
    found = set()
    with using("emulator", "sm_90a"):
        for persistent in (True, False):
            for chosen in ("long", "position"):
                options = {"persistent": persistent, "order": chosen}
                found.add(cuflash.attention(q, k, v, causal=True, kernel_options=options).tobytes())
    assert len(found) == 1


@pytest.mark.parametrize("chip", ["sm_80", "sm_86", "sm_90a"])
def test_long_tiles_are_done_in_time(chip):
    """At most 1.02 of what sorted blocks take; of the ideal, at 4 blocks a place and more, at most 1.07."""
    target = arch.named(chip)
    for shape in launch_order.SHAPES[:3] + launch_order.SHAPES[5:]:
        for blocks in (launch_order.of_forward(shape, target), *launch_order.of_backward(shape, target)):
            assert blocks.over_sorted <= 1.02, (shape, blocks.name, blocks.told, blocks.over_sorted)
            assert blocks.waves < 4 or blocks.over_ideal <= 1.07, (shape, blocks.name, blocks.told, blocks.over_ideal)


def test_where_tiles_stay_where_the_grid_counts_them():
    """Tiles that are alike; under a mask_mod, whose tiles nobody knows beforehand; of clusters; of too many blocks."""
    target = arch.named("sm_90a")
    causal = Shape((4096,), 16, 16, CAUSAL)

    def order_of(shape: Shape, target: arch.Arch = target, **keywords) -> order.Order:
        return forward.plan(shape.problem(forward.ForwardProblem, **keywords), target).order

    assert order_of(causal).pairs > 0
    assert order_of(dataclasses.replace(causal, window=(-1, -1))).pairs == 0
    assert order_of(causal, options=forward.Options(order="position")).pairs == 0
    assert order_of(Shape((2**28,), 2048, 2048, CAUSAL)).pairs == 0
    with pytest.raises(cuflash.errors.UnsupportedError, match="2147483647 blocks"):
        order_of(Shape((2**28,), 2048, 2048, CAUSAL), options=forward.Options(order="long"))
    q = np.zeros((1, 768, 1, 64), np.float16)
    with using("emulator", "sm_90a"):
        assert "order" not in str(cuflash.explain(q, q, q, mask_mod=mods.causal()))
        assert "order: long tiles first" in str(cuflash.explain(q, q, q, causal=True))
        with pytest.raises(cuflash.errors.UnsupportedError, match="clusters of 2"):
            cuflash.explain(q, q, q, kernel_options={"cluster": 2, "order": "long"})


def test_the_table_is_printed():
    lines: list[str] = []
    launch_order.main(["sm_80"], lines.append)
    assert any("packed" in line for line in lines) and any("filled" in line for line in lines)
    assert dtypes.bfloat16.name in lines[0]
