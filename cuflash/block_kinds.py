"""Looking at a mask on the host: which keys are seen, and which blocks are empty, partly seen or full.

Blocks are decided by intervals, large rectangles of them at once; a rectangle that stays undecided is split in 8 x 8,
and a block that stays undecided is computed key by key. So the cost follows the outline of a mask and not its area.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from .block_tables import EMPTY, FULL, PARTIAL, on_host
from .errors import ArgumentError
from .trace.emit_numpy import evaluate
from .trace.expr import leaves
from .trace.intervals import classify
from .trace.tracer import bind, takes_score

_STRIP = 1 << 20  # pairs of a query and a key, or rectangles, looked at together
_SPLIT = 8
_MOST = 1 << 26  # blocks that are looked at one by one
_MOST_KEYS = 1 << 32  # elements of a mask


class Seen:
    """A mod, traced, to be computed on the host with what it captures now, for one q_len and kv_len."""

    def __init__(self, f: Any, lengths: tuple[int, int]) -> None:
        self.lengths = lengths
        self.is_score = takes_score(f)
        bound = bind(f) if self.is_score else bind(None, f)
        found = bound.mods.score if self.is_score else bound.mods.mask
        assert found is not None
        self.expr, self.depends = found, leaves(found)
        self.captured = bound.arrays
        self.arrays, self.scalars = [on_host(x) for x in bound.arrays], bound.scalars

    def places(self, shape: Sequence[int]) -> list[tuple[int, int]]:
        """The (b, h) that differ."""
        batch, heads = (n if name in self.depends else min(n, 1) for name, n in zip("bh", shape[:2], strict=True))
        return [(b, h) for b in range(batch) for h in range(heads)]

    def place(self, b: int, h: int) -> tuple[int, int]:
        """The one among `places` that is like (b, h)."""
        return b if "b" in self.depends else 0, h if "h" in self.depends else 0

    def spread(self, x: np.ndarray) -> np.ndarray:
        """What was computed for `places` copied to all of [B, H, ...], in place."""
        for axis, name in enumerate("bh"):
            if name not in self.depends and x.shape[axis]:
                x[(slice(None),) * axis + (slice(1, None),)] = x[(slice(None),) * axis + (slice(1),)]
        return x

    def seen(self, b: Any, h: Any, q_idx: np.ndarray, kv_idx: np.ndarray) -> np.ndarray:
        """bool, of the shape to which everything broadcasts."""
        q_len, kv_len = self.lengths
        given = {"b": b, "h": h, "q_idx": q_idx, "kv_idx": kv_idx, "q_len": q_len, "kv_len": kv_len, "score": 0.0}
        try:
            (result,) = evaluate([self.expr], given, self.arrays, self.scalars)
        except IndexError as error:
            raise ArgumentError(
                f"the mod reads a captured array where it has no element, with q_len={q_len}, kv_len={kv_len}: {error}"
            ) from error
        seen = result != -np.inf if self.is_score else result
        return np.broadcast_to(seen, np.broadcast_shapes(np.shape(b), np.shape(h), q_idx.shape, kv_idx.shape))


def mask_of(mod: Seen, shape: tuple[int, int, int, int]) -> np.ndarray:
    """Which keys are seen, bool [B, H, q_len, kv_len]."""
    if math.prod(shape) > _MOST_KEYS:
        raise ArgumentError(
            f"a mask of shape {shape} has {math.prod(shape)} elements, and {_MOST_KEYS} is the most: look at blocks, "
            "create_block_mask(...).to_string(), or at one batch and head; attention needs no mask"
        )
    mask = np.empty(shape, bool)
    if not mask.size:
        return mask
    keys, together = np.arange(shape[3]), max(1, _STRIP // max(shape[3], 1))
    for b, h in mod.places(shape):
        for begin in range(0, shape[2], together):
            rows = np.arange(begin, min(begin + together, shape[2]))
            mask[b, h, rows] = mod.seen(b, h, rows[:, None], keys)
    return mod.spread(mask)


class Grid(NamedTuple):
    """The blocks of a mask: (q, kv) lengths, sizes of a block, and numbers of blocks."""

    lengths: tuple[int, int]
    size: tuple[int, int]

    @property
    def blocks(self) -> tuple[int, int]:
        (q_len, kv_len), (q, k) = self.lengths, self.size
        return -(-q_len // q), -(-kv_len // k)


class Rectangles(NamedTuple):
    """Rectangles of blocks, an array element each: rows from top to bottom, columns from left to right, ends excluded.

    cell   which of the rectangles that were asked about it is a part of
    """

    cell: np.ndarray
    top: np.ndarray
    bottom: np.ndarray
    left: np.ndarray
    right: np.ndarray

    @property
    def area(self) -> np.ndarray:
        return (self.bottom - self.top) * (self.right - self.left)

    def some(self, which: Any) -> Rectangles:
        return Rectangles(*(x[which] for x in self))


def kinds_of(mod: Seen, shape: tuple[int, int, int, int], grid: Grid) -> np.ndarray:
    """What each block is, uint8 [B, H, q blocks, kv blocks]. One that the sequence's end cuts off is never full."""
    rows, columns = grid.blocks
    if shape[0] * shape[1] * rows * columns > _MOST << 5:
        raise ArgumentError(_too_many(shape[0] * shape[1] * rows * columns))
    kinds = np.zeros((*shape[:2], rows, columns), np.uint8)
    if not kinds.size:
        return kinds
    for b, h in mod.places(shape):
        for found, kind in _decided(mod, b, h, grid, _whole(grid)):
            single = found.area == 1
            kinds[b, h, found.top[single], found.left[single]] = kind[single]
            for which in np.flatnonzero(~single & (kind != EMPTY)):
                _, top, bottom, left, right = (int(x[which]) for x in found)
                kinds[b, h, top:bottom, left:right] = kind[which]
    for axis, (n, size) in enumerate(zip(grid.lengths, grid.size, strict=True)):
        if n % size:
            last = kinds[:, :, -1] if axis == 0 else kinds[..., -1]
            np.minimum(last, PARTIAL, out=last)
    return mod.spread(kinds)


def sparsity_of(mod: Seen, shape: tuple[int, int, int, int], grid: Grid) -> float:
    """The percentage of blocks that are empty."""
    rows, columns = grid.blocks
    places = mod.places(shape)
    if not (rows and columns and places):
        return 0.0
    empty = 0
    for b, h in places:
        for found, kind in _decided(mod, b, h, grid, _whole(grid)):
            empty += int(found.area[kind == EMPTY].sum())
    return 100.0 * empty / (rows * columns * len(places))


def rows_of(mod: Seen, b: int, h: int, grid: Grid, columns: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """How many blocks of each row of blocks are not empty, int64 [rows], among its columns columns[0] to columns[1],
    ends excluded."""
    begin, end = columns
    rows = np.arange(grid.blocks[0])
    count = np.zeros(len(rows), np.int64)
    if not grid.blocks[1]:
        return count
    cells = Rectangles(rows, rows, rows + 1, begin, end).some(begin < end)
    for found, kind in _decided(mod, b, h, grid, cells):
        np.add.at(count, found.cell, np.where(kind != EMPTY, found.area, 0))
    return count


def cells_of(mod: Seen, b: int, h: int, grid: Grid, steps: tuple[int, int]) -> np.ndarray:
    """The part of the blocks that are not empty in each cell of steps[0] x steps[1] blocks: float [rows, columns]."""
    rows, columns = grid.blocks
    top, left = np.arange(0, rows, steps[0]), np.arange(0, columns, steps[1])
    n = len(top), len(left)
    i, j = (x.reshape(-1) for x in np.broadcast_arrays(top[:, None], left))
    cells = Rectangles(np.arange(len(i)), i, np.minimum(i + steps[0], rows), j, np.minimum(j + steps[1], columns))
    count = np.zeros(len(i), np.int64)
    for found, kind in _decided(mod, b, h, grid, cells):
        np.add.at(count, found.cell, np.where(kind != EMPTY, found.area, 0))
    return (count / np.maximum(cells.area, 1)).reshape(n)


def _whole(grid: Grid) -> Rectangles:
    rows, columns = grid.blocks
    return Rectangles(*(np.array([x]) for x in (0, 0, rows, 0, columns)))


def _decided(mod: Seen, b: int, h: int, grid: Grid, cells: Rectangles) -> Iterator[tuple[Rectangles, np.ndarray]]:
    """Rectangles of one kind, which fill the cells, with their kinds; those that are partly seen are single blocks."""
    values = {"b": b, "h": h, "q_len": grid.lengths[0], "kv_len": grid.lengths[1]}
    values = {name: value for name, value in values.items() if name in mod.depends}
    pending, looked_at = [cells], 0
    while pending:
        found = pending.pop()
        if len(found.cell) > _STRIP:
            pending += [found.some(slice(i, i + _STRIP)) for i in range(0, len(found.cell), _STRIP)]
            continue
        q, k = (
            (first * size, np.minimum(last * size, n) - 1)
            for first, last, size, n in zip(found[1::2], found[2::2], grid.size, grid.lengths, strict=True)
        )
        kind = classify(mod.expr, q, k, values, mod.arrays, mod.scalars, span=max(grid.lengths))
        single = found.area == 1
        looked_at += int(single.sum())
        if looked_at > _MOST:
            raise ArgumentError(_too_many(looked_at))
        kind = np.where(single & (kind == PARTIAL), _by_keys(mod, b, h, grid, found, single & (kind == PARTIAL)), kind)
        done = single | (kind != PARTIAL)
        yield found.some(done), kind[done]
        if not done.all():
            pending.append(_split(found.some(~done)))


def _too_many(blocks: int) -> str:
    return (
        f"{blocks} blocks of the mask have to be looked at one by one, and {_MOST} is the most: make the mask with a "
        "larger BLOCK_SIZE to look at it; attention needs no blocks"
    )


def _split(found: Rectangles) -> Rectangles:
    """Each in up to 8 x 8 parts."""
    sides = []
    for first, last in ((found.top, found.bottom), (found.left, found.right)):
        part = -(-(last - first) // _SPLIT)
        begin = first[:, None] + part[:, None] * np.arange(_SPLIT)
        sides.append((begin, np.minimum(begin + part[:, None], last[:, None])))
    (top, bottom), (left, right) = sides
    cell, top, bottom, left, right = (
        np.broadcast_to(x, (len(found.cell), _SPLIT, _SPLIT)).reshape(-1)
        for x in (found.cell[:, None, None], top[:, :, None], bottom[:, :, None], left[:, None], right[:, None])
    )
    return Rectangles(cell, top, bottom, left, right).some((top < bottom) & (left < right))


def _by_keys(mod: Seen, b: int, h: int, grid: Grid, found: Rectangles, which: np.ndarray) -> np.ndarray:
    """Kinds of blocks (others: 1), key by key: of nine keys first, as most blocks show both then."""
    kinds = np.full(len(which), PARTIAL, np.uint8)
    pending = np.flatnonzero(which)
    few = [np.unique([0, size // 2, size - 1]) for size in grid.size]
    all_keys = [np.arange(size) for size in grid.size]
    for rows, keys in (few, all_keys):
        together = max(1, _STRIP // (len(rows) * len(keys)))
        left = []
        for begin in range(0, len(pending), together):
            part = pending[begin : begin + together]
            q_idx = (found.top[part] * grid.size[0])[:, None, None] + rows[:, None]
            kv_idx = (found.left[part] * grid.size[1])[:, None, None] + keys
            (q_len, kv_len) = grid.lengths
            inside = (q_idx < q_len) & (kv_idx < kv_len)
            seen = mod.seen(b, h, np.minimum(q_idx, q_len - 1), np.minimum(kv_idx, kv_len - 1))
            some, every = (seen & inside).any((1, 2)), (seen | ~inside).all((1, 2))
            kinds[part] = np.where(every, FULL, np.where(some, PARTIAL, EMPTY))
            left.append(part[every | ~some])
        pending = np.concatenate(left) if left else pending[:0]
    return kinds
