"""Which rank holds which rows of a packed batch: cut into chunks, and dealt out by the tiles that each chunk costs.

A chunk is a run of rows of one document. What a rank computes for it is counted in tiles of 128 queries by 128 keys
that are not empty under the mask: kernels skip the others. Everything here is a pure function of lengths on the host,
so every rank finds the same answer and nobody has to ask.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..block_kinds import Grid, Seen, rows_of
from ..errors import ArgumentError

TILE = 128  # rows and keys of a tile that is counted
_MORE_ROWS = 1.02  # of an even share that a rank may hold, and a chunk besides


class Chunk(NamedTuple):
    """The rows begin to end of a document."""

    document: int
    begin: int
    end: int

    @property
    def rows(self) -> int:
        return self.end - self.begin


def cut(lengths: Sequence[int], size: int) -> list[Chunk]:
    """Documents in chunks of about `size` rows that begin at tiles; a document shorter than a chunk and a half is one.

    >>> cut([100, 700], 256)
    [Chunk(document=0, begin=0, end=100), Chunk(document=1, begin=0, end=256), Chunk(document=1, begin=256, end=512), \
Chunk(document=1, begin=512, end=700)]
    """
    chunks = []
    for document, length in enumerate(lengths):
        parts = max(1, round(length / size))
        edges = [min(length, -(-round(length * i / parts) // TILE) * TILE) for i in range(parts)] + [length]
        chunks += [Chunk(document, a, b) for a, b in itertools.pairwise(edges) if a < b]
    return chunks


def tiles_of_documents(
    lengths: Sequence[int], mask_mod: Callable[..., Any] | None, causal: bool, window_size: tuple[int, int]
) -> list[np.ndarray]:
    """For each document how many key tiles each of its tiles of queries sees, int64 [ceil(length / 128)].

    A mask_mod counts for head 0.
    """
    counted: dict[int, np.ndarray] = {}
    found = []
    for document, length in enumerate(lengths):
        if mask_mod is None:
            if length not in counted:
                counted[length] = _of_a_band(length, causal, window_size)
            found.append(counted[length])
        else:
            seen, grid = Seen(mask_mod, (length, length)), Grid((length, length), (TILE, TILE))
            band = _band(length, causal, window_size)
            found.append(rows_of(seen, document, 0, grid, band) if length else np.zeros(0, np.int64))
    return found


def _band(length: int, causal: bool, window_size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """For each tile of queries the first key tile that causal and window leave it, and the one behind the last."""
    first = np.arange(0, length, TILE)
    last = np.minimum(first + TILE, length) - 1
    left, right = (length if side < 0 else side for side in window_size)
    right = 0 if causal else right
    return np.maximum(first - left, 0) // TILE, np.minimum(last + right, length - 1) // TILE + 1


def _of_a_band(length: int, causal: bool, window_size: tuple[int, int]) -> np.ndarray:
    begin, end = _band(length, causal, window_size)
    return (end - begin).astype(np.int64)


def tiles_of(chunk: Chunk, tiles: Sequence[np.ndarray]) -> int:
    """What a chunk costs: the tiles of all tiles of queries that it has rows of."""
    return int(tiles[chunk.document][chunk.begin // TILE : -(-chunk.end // TILE)].sum())


def by_area(chunks: Sequence[Chunk], tiles: Sequence[np.ndarray], ranks: int) -> list[list[Chunk]]:
    """The dearest chunk first, each to the rank with least work that has room; ties by index."""
    costs = {chunk: tiles_of(chunk, tiles) for chunk in chunks}
    total, longest = sum(c.rows for c in chunks), max((c.rows for c in chunks), default=0)
    most = _MORE_ROWS * total / ranks + longest
    held: list[list[Chunk]] = [[] for _ in range(ranks)]
    rows, heap = [0] * ranks, [(0, rank) for rank in range(ranks)]
    for chunk in sorted(chunks, key=lambda c: (-costs[c], c)):
        full = []
        while True:
            load, rank = heapq.heappop(heap)
            if rows[rank] + chunk.rows <= most:
                break
            full.append((load, rank))
        held[rank].append(chunk)
        rows[rank] += chunk.rows
        for entry in (*full, (load + costs[chunk], rank)):
            heapq.heappush(heap, entry)
    return [sorted(part) for part in held]


def contiguous(lengths: Sequence[int], ranks: int) -> list[list[Chunk]]:
    """Equal runs of rows, as they lie in the batch.

    >>> contiguous([3, 5], 2)
    [[Chunk(document=0, begin=0, end=3), Chunk(document=1, begin=0, end=1)], [Chunk(document=1, begin=1, end=5)]]
    """
    total, starts = sum(lengths), np.concatenate([[0], np.cumsum(lengths)]).tolist()
    held = []
    for rank in range(ranks):
        begin, end = total * rank // ranks, total * (rank + 1) // ranks
        parts = [
            Chunk(document, max(begin, start) - start, min(end, start + length) - start)
            for document, (start, length) in enumerate(zip(starts, lengths, strict=False))
        ]
        held.append([part for part in parts if part.rows > 0])
    return held


def zigzag(lengths: Sequence[int], ranks: int) -> list[list[Chunk]]:
    """Each document in twice as many parts as ranks: rank r holds part r and the r-th from the end.

    >>> zigzag([8], 2)
    [[Chunk(document=0, begin=0, end=2), Chunk(document=0, begin=6, end=8)], [Chunk(document=0, begin=2, end=6)]]
    """
    held: list[list[Chunk]] = [[] for _ in range(ranks)]
    for document, length in enumerate(lengths):
        edges = [round(length * i / (2 * ranks)) for i in range(2 * ranks + 1)]
        for rank in range(ranks):
            for part in (rank, 2 * ranks - 1 - rank):
                held[rank].append(Chunk(document, edges[part], edges[part + 1]))
    return [_joined(sorted(chunk for chunk in part if chunk.rows)) for part in held]


def _joined(chunks: Sequence[Chunk]) -> list[Chunk]:
    joined: list[Chunk] = []
    for chunk in chunks:
        if joined and (joined[-1].document, joined[-1].end) == (chunk.document, chunk.begin):
            chunk = Chunk(chunk.document, joined.pop().begin, chunk.end)
        joined.append(chunk)
    return joined


WAYS = ("area", "contiguous", "zigzag")


def dealt(
    balance: str, lengths: Sequence[int], tiles: Sequence[np.ndarray], ranks: int, size: int
) -> list[list[Chunk]]:
    """The chunks of each rank, in the order of documents and positions."""
    if balance == "area":
        return [_joined(part) for part in by_area(cut(lengths, size), tiles, ranks)]
    if balance == "contiguous":
        return contiguous(lengths, ranks)
    if balance == "zigzag":
        return zigzag(lengths, ranks)
    raise ArgumentError(f"balance={balance!r} must be one of {', '.join(WAYS)}")
