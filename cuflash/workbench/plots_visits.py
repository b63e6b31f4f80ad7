"""The tiles of keys that blocks visit, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import api, emulator
from ..errors import require
from .figures import Array, on_emulator, subplots

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Visit:
    """A block that reads a tile of queries of one head, and then tiles of keys.

    block    (x, y, z) of the grid         sequence, head   of the queries
    queries  their rows [begin, end)       keys             the rows [begin, end) of each tile, in the order of reading
    Rows count from the beginning of the sequence's array, or of the packed one (sequence is then 0).
    """

    block: tuple[int, int, int]
    sequence: int
    head: int
    queries: tuple[int, int]
    keys: tuple[tuple[int, int], ...]


def visits(q: Array, k: Array, v: Array, *, arch: str = "sm_80", **keywords: Any) -> list[Visit]:
    """Which tiles of keys the forward kernel reads for which queries, and in which order: as the emulator records it.

    q, k, v   NumPy, contiguous: [batch, len, heads, d], or packed [rows, heads, d] with cu_seqlens among the keywords
    arch      "sm_80" or "sm_90a": whose kernel
    keywords  of `attention`

    >>> x = np.zeros((1, 200, 1, 64), np.float16)
    >>> [(visit.queries, visit.keys) for visit in visits(x, x, x, causal=True)]
    [((128, 200), ((192, 200), (128, 192), (64, 128), (0, 64))), ((0, 128), ((64, 128), (0, 64)))]
    """
    for name, x in {"q": q, "k": k, "v": v}.items():
        require(
            isinstance(x, np.ndarray), f"{name} is a {type(x).__name__}, must be a NumPy array: it runs on the emulator"
        )
    q, k, v = (np.array(x, order="C") for x in (q, k, v))  # apart, so that an address tells which of them it is of
    with on_emulator(arch), emulator.tracing() as trace:
        api.attention(q, k, v, **keywords)
    return _visits(trace.events, q, k)


def _visits(events: Sequence[emulator.Event], q: np.ndarray, k: np.ndarray) -> list[Visit]:
    # What one instruction of the kernel's text fetches together: copies of a group, or those counted by one phase.
    loads: dict[tuple[Any, ...], list[int]] = {}
    for e in events:
        if e.buffer in ("q", "k") and e.what in ("cp_async_16", "cp_async_4", "tma_load"):
            extent = loads.setdefault((e.block, e.buffer, e.object, e.phase), [e.begin, e.end])
            extent[:] = min(extent[0], e.begin), max(extent[1], e.end)
    # Groups of threads' own copies are numbered in their order, the queries' and the first keys' being one; a warp may
    # have none of the queries. Tensor copies are all of one warp.
    threads = [key for key in loads if key[2] < 0]
    order = sorted(threads, key=lambda key: (key[0], key[3], key[1] != "q")) or list(loads)
    found: list[Visit] = []
    for block, buffer, *which in order:
        begin, end = loads[block, buffer, *which]
        array = q if buffer == "q" else k
        first, last = (np.unravel_index(at // array.itemsize, array.shape) for at in (begin, end - 1))
        sequence = int(first[0]) if array.ndim == 4 else 0
        rows = int(first[-3]), int(last[-3]) + 1
        if buffer == "q":
            found.append(Visit(block, sequence, int(first[-2]), rows, ()))
        else:
            at = max(i for i, visit in enumerate(found) if visit.block == block)
            visit = found[at]
            found[at] = Visit(block, visit.sequence, visit.head, visit.queries, (*visit.keys, rows))
    return found


def plot_visits(
    q: Array, k: Array, v: Array, *, arch: str = "sm_80", sequence: int = 0, head: int = 0, **keywords: Any
) -> Figure:
    """Draws `visits` of one sequence and head: in each tile of keys its turn, for each tile of queries.

    In a packed batch all sequences are drawn. White is what no block reads.

    >>> x = np.zeros((1, 200, 1, 64), np.float16)
    >>> [text.get_text() for text in plot_visits(x, x, x, causal=True).axes[0].texts]
    ['1', '2', '3', '4', '1', '2']
    """
    found = visits(q, k, v, arch=arch, **keywords)
    shown = [x for x in found if (x.sequence, x.head) == (sequence, head)]
    there = sorted({(x.sequence, x.head) for x in found})
    require(bool(shown), f"sequence={sequence}, head={head} is not among those that blocks visit: {there}")
    plt, figure, axes = subplots(5, 5 * min(2.0, max(0.5, q.shape[-3] / k.shape[-3])))
    most = max((len(x.keys) for x in shown), default=1)
    # So that two digits fit into a tile, whose width is its share of four inches.
    widest = max((end - begin for x in shown for begin, end in x.keys), default=1)
    size = min(8.0, 0.75 * 4 * 72 * widest / k.shape[-3])
    for visit in shown:
        top, bottom = visit.queries
        for turn, (left, right) in enumerate(visit.keys):
            color = plt.get_cmap("YlGnBu")(0.15 + 0.55 * turn / most)
            axes.add_patch(plt.Rectangle((left, top), right - left, bottom - top, facecolor=color, edgecolor="white"))
            axes.text((left + right) / 2, (top + bottom) / 2, str(turn + 1), ha="center", va="center", fontsize=size)
    tiles = sum(len(x.keys) for x in shown)
    axes.set(xlim=(0, k.shape[-3]), ylim=(q.shape[-3], 0), xlabel="key", ylabel="query", aspect="equal")
    axes.set_title(f"{arch}: {tiles} tiles of keys, each block's in its order", fontsize="medium")
    return figure
