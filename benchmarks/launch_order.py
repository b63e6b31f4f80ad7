"""In which order the blocks of a grid start, and what that costs: arithmetic from the plans that are launched.

    python -m benchmarks.launch_order [sm_90a]

Nothing is timed. A multiprocessor that is done takes the next block of the grid (list scheduling). A block takes as
long as the tiles it moves over, and OVERHEAD of one for its beginning and end. Printed are the time over the ideal
one, in which all multiprocessors have the same to do, and over that of the same blocks sorted by length; of tiles
that are alike, how many times the multiprocessors are filled.
"""

from __future__ import annotations

import heapq
import math
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cuflash import arch, dtypes
from cuflash.arch import Arch
from cuflash.ops import backward, forward, order

OVERHEAD = 1.5
HEAD_DIM = 128


@dataclass(frozen=True)
class Shape:
    """A call: lengths of its sequences, all of one where it is dense; heads; window (left, right), -1: no limit."""

    lengths: tuple[int, ...]
    heads: int
    heads_kv: int
    window: tuple[int, int] = (-1, -1)
    packed: bool = False
    head_dim: int = HEAD_DIM

    def problem(self, kind: type, **keywords: Any) -> Any:
        """The problem of a forward or backward call with keys as long as queries."""
        rows = sum(self.lengths) if self.packed else self.lengths[0]
        strides: dict[str, Any] = {}
        for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv"):
            if f"{name}_strides" in kind.__dataclass_fields__:
                heads = self.heads_kv if name in ("k", "v", "dk", "dv") else self.heads
                step = heads * self.head_dim
                strides[f"{name}_strides"] = (0 if self.packed else rows * step, step, self.head_dim)
        if kind is backward.BackwardProblem:
            strides["max_seqlen_k"] = None
        return kind(
            dtype=dtypes.bfloat16, batch=len(self.lengths), packed=self.packed, q_rows=rows, k_rows=rows,
            max_seqlen_q=None, heads_q=self.heads, heads_kv=self.heads_kv, head_dim=self.head_dim,
            head_dim_v=self.head_dim, load_bytes=16, scale=1.0, window=self.window, **strides, **keywords,
        )  # fmt: skip


@dataclass(frozen=True)
class Blocks:
    """The blocks of one launch: how long each takes, in the order in which they start, and how many run at a time."""

    name: str
    lengths: list[float]
    places: int
    told: str

    @property
    def over_ideal(self) -> float:
        return span(self.lengths, self.places) / (sum(self.lengths) / self.places)

    @property
    def over_sorted(self) -> float:
        return span(self.lengths, self.places) / span(sorted(self.lengths, reverse=True), self.places)

    @property
    def waves(self) -> float:
        return len(self.lengths) / self.places


def span(lengths: Iterable[float], places: int) -> float:
    """When the last of these is done, each begun in turn at the place that is free first.

    >>> span([3, 2, 2, 1], 2)
    4
    """
    ends: list[float] = [0] * places
    for length in lengths:
        heapq.heapreplace(ends, ends[0] + length)
    return max(ends)


def tiles_met(tile: int, block: int, moved_block: int, rows: int, window: tuple[int, int]) -> float:
    """Tiles of the other side that a tile of `block` rows meets, of `rows` rows on both sides."""
    first, last = tile * block, min((tile + 1) * block, rows) - 1
    begin = 0 if window[0] < 0 else max(0, first - window[0])
    end = rows if window[1] < 0 else min(rows, last + window[1] + 1)
    return math.ceil(end / moved_block) - begin // moved_block + OVERHEAD if last >= first and begin < end else OVERHEAD


def of_grid(
    name: str, shape: Shape, grid: order.Grid, chosen: order.Order, target: Arch, *,
    slots: bool, block: int, moved: int, threads: int, window: tuple[int, int],
) -> Blocks:  # fmt: skip
    """The blocks of a grid, as kernels_cu/tile/schedule.cuh finds what each of them computes."""
    counts = [math.ceil(n / block) for n in shape.lengths]
    begins, rows = [], 0
    for i, n in enumerate(shape.lengths):
        begins.append(rows // block + i if shape.packed else i * counts[i])
        rows += n
    lengths = []
    for x, _, z in chosen.places(grid):
        sequence = sum(begin <= x for begin in begins) - 1 if slots else z
        number = x - begins[sequence] if slots else x
        if sequence >= len(counts) or number >= counts[sequence]:
            lengths.append(OVERHEAD)
            continue
        tile = number if chosen.from_begin else counts[sequence] - 1 - number
        lengths.append(tiles_met(tile, block, moved, shape.lengths[sequence], window))
    return Blocks(name, lengths, order.places(target, threads), str(chosen))


def of_forward(shape: Shape, target: Arch, **options: Any) -> Blocks:
    """The blocks of the forward call of a shape."""
    chosen = forward.Options(persistent=False, pack_heads=False, **options)
    plan = forward.plan(shape.problem(forward.ForwardProblem, options=chosen), target)
    tile = plan.variant.tile
    return of_grid(
        plan.spec.source.removesuffix(".cu"), shape, plan.grid, plan.order, target, slots="(slot" in plan.why,
        block=tile.block_q, moved=tile.block_k, threads=plan.spec.threads, window=shape.window,
    )  # fmt: skip


def of_backward(shape: Shape, target: Arch, deterministic: bool = True) -> list[Blocks]:
    """The blocks of the main kernels of the backward call of a shape."""
    found = []
    for step in backward.plan(shape.problem(backward.BackwardProblem, deterministic=deterministic), target).steps:
        variant = step.spec.variant
        if isinstance(variant, backward.BackwardVariant):
            name = f"{step.spec.source.removesuffix('.cu')} {'keys' if variant.keys_held else 'queries'} held"
            left, right = shape.window
            window = (right, left) if variant.keys_held else shape.window
            blocks = of_grid(
                name, shape, step.grid, step.order, target, slots="(slot" in step.why, block=variant.tile.held,
                moved=variant.tile.moved, threads=step.spec.threads, window=window,
            )  # fmt: skip
            found.append(blocks)
    return found


def draws(n: int, sequences: int, seed: int = 1) -> list[tuple[int, ...]]:
    """Lengths of packed sequences, log-normal."""
    rng = random.Random(seed)
    return [tuple(min(int(rng.lognormvariate(6.8, 0.9)) + 1, 16384) for _ in range(sequences)) for _ in range(n)]


CAUSAL = (-1, 0)
SHAPES = [
    Shape((4096,), 16, 16, CAUSAL), Shape((4096,) * 4, 16, 4, CAUSAL), Shape((4096,) * 16, 1, 1, CAUSAL),
    Shape((8192,) * 2, 32, 8, CAUSAL), Shape((16384,), 64, 8, CAUSAL), Shape((2048,) * 8, 16, 16, CAUSAL),
    Shape((1024,) * 32, 16, 16, CAUSAL), Shape((4096,) * 4, 16, 16, (512, 0)), Shape((8192,) * 2, 16, 16, (1024, 0)),
    Shape((4096,) * 4, 16, 16, (256, 256)), Shape((4096,) * 4, 16, 16, (512, -1)),
]  # fmt: skip
ALIKE = [Shape((4096,), 16, 16), Shape((1024,) * 8, 17, 17), Shape((8192,), 32, 8)]


def main(arguments: Sequence[str], say: Callable[[str], None] = print) -> None:
    target = arch.named(arguments[0] if arguments else "sm_90a")
    say(f"{target}, {target.multiprocessors} multiprocessors, bfloat16, head dim {HEAD_DIM}")
    say(f"{'':58}{'blocks a place':>15}{'over ideal':>12}{'over sorted':>12}")
    for shape in SHAPES:
        for blocks in (of_forward(shape, target), *of_backward(shape, target)):
            say(_line(shape, blocks) + f"  {blocks.told}")
    for shape in ALIKE:
        blocks = of_forward(shape, target)
        say(f"{_name(shape, blocks.name):58}{blocks.waves:15.2f}  filled {math.ceil(blocks.waves)} times")
    for heads in (8, 16, 32):
        for sequences in (8, 16, 64):
            found = [of_forward(Shape(n, heads, heads, CAUSAL, True), target) for n in draws(6, sequences)]
            mean = [
                sum(getattr(x, name) for x in found) / len(found) for name in ("waves", "over_ideal", "over_sorted")
            ]
            name = f"{found[0].name}: {sequences} packed, mean of {len(found)} draws, x {heads} heads"
            say(f"{name:58}{mean[0]:15.2f}{mean[1]:12.3f}{mean[2]:12.3f}")


def _name(shape: Shape, kernel: str) -> str:
    what = "causal" if shape.window == CAUSAL else "" if shape.window == (-1, -1) else f"window {shape.window}"
    return f"{kernel}: {len(shape.lengths)} x {shape.lengths[0]}, {shape.heads}/{shape.heads_kv} heads {what}"


def _line(shape: Shape, blocks: Blocks) -> str:
    return f"{_name(shape, blocks.name):58}{blocks.waves:15.2f}{blocks.over_ideal:12.3f}{blocks.over_sorted:12.3f}"


if __name__ == "__main__":
    main(sys.argv[1:])
