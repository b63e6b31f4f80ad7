"""What attention kernels do, as data and drawn from it by matplotlib: masks and their tiles, the order in which blocks
visit them, who waits for whom, and the bytes that move. All of it is recorded or counted on the emulator.

A picture is a `matplotlib.figure.Figure`: shown as the value of a notebook's cell, kept by `figure.savefig("a.png")`.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import api, arch, emulator, mods
from ..block_kinds import Seen, mask_of
from ..block_parts import mask_at
from ..errors import ArgumentError, require
from ..jit import layout, module
from ..settings import config

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = Any

EMPTY, MIXED, FULL = 0, 1, 2
_KIND_COLORS = ("#f4f4f4", "#f2b880", "#7fb3d5")
_SHADE = 0.35  # over what is seen


def _subplots(width: float, height: float) -> tuple[Any, Any, Any]:
    """pyplot, and a figure and axes of so many inches, which pyplot lets go of: a notebook would show them twice."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ArgumentError("pictures are drawn by matplotlib: pip install matplotlib") from error
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    plt.close(figure)
    return plt, figure, axes


@contextlib.contextmanager
def _on_emulator(target: str) -> Iterator[None]:
    before = config.backend, config.arch
    config.backend, config.arch = "emulator", target
    try:
        yield
    finally:
        config.backend, config.arch = before


# --- A mask and its tiles -----------------------------------------------------------------------------------------


def _mask_of(mask_mod: Any, causal: bool, window_size: tuple[int | None, int | None]) -> Any:
    """One mask_mod for all of them."""
    left, right = (None if side in (None, -1) else side for side in window_size)
    if causal:
        right = 0
    found = [] if mask_mod is None else [mask_mod]
    if left is not None or right is not None:
        found.append(mods.sliding_window(left, right))
    return mods.and_masks(*found) if found else mods.noop_mask


def _kinds(seen: np.ndarray, tile: tuple[int, int]) -> np.ndarray:
    """What each tile of `seen` [queries, keys] is. As in the kernels, one whose keys end inside needs a mask."""
    rows, columns = np.arange(0, seen.shape[0], tile[0]), np.arange(0, seen.shape[1], tile[1])
    count = np.add.reduceat(np.add.reduceat(seen, rows, 0, np.int64), columns, 1)
    whole = np.diff([*rows, seen.shape[0]])[:, None] * tile[1]
    return np.where(count == 0, EMPTY, np.where(count == whole, FULL, MIXED))


def plot_mask(
    q_len: int | Sequence[int],
    k_len: int | Sequence[int] | None = None,
    *,
    mask_mod: Any = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    tile: tuple[int, int] = (128, 64),
    h: int = 0,
) -> Figure:
    """Which keys each query sees, and what that makes of the tiles: empty ones are skipped, full ones need no mask.

    q_len, k_len  a length, or one of each sequence of a packed batch; k_len None: as q_len
    mask_mod, causal, window_size  as for `attention`; b is the sequence, and indices count within it
    tile          queries and keys of one; pairs are counted, where a kernel may find too little to tell a tile full or
                  empty, and take it for mixed
    h             the query head to look at

    The axes hold, for each sequence, an image of its tiles (0 empty, 1 mixed, 2 full) and one of the pairs seen.

    >>> figure = plot_mask([100, 300], causal=True, tile=(64, 64))
    >>> figure.axes[0].get_title()
    '11 full, 7 mixed and 11 empty tiles of 64 x 64'
    """
    q_lens = [q_len] if isinstance(q_len, (int, np.integer)) else list(q_len)
    k_lens = q_lens if k_len is None else [k_len] if isinstance(k_len, (int, np.integer)) else list(k_len)
    require(
        len(q_lens) == len(k_lens) and min([*q_lens, *k_lens], default=0) > 0,
        f"q_len={q_len!r}, k_len={k_len!r} must be as many lengths, each at least 1",
    )
    require(
        max(sum(q_lens), sum(k_lens)) <= 4096,
        f"q_len={q_len!r}, k_len={k_len!r} must come to at most 4096 queries and keys: pairs are drawn one by one",
    )
    require(min(tile) > 0, f"tile={tile!r} must be queries and keys of one, each at least 1")
    mask = _mask_of(mask_mod, causal, window_size)
    shape = sum(q_lens) / sum(k_lens)
    plt, figure, axes = _subplots(5, 5 * min(2.0, max(0.5, shape)))
    from matplotlib.colors import ListedColormap, to_rgb
    from matplotlib.patches import Patch

    count: Counter[int] = Counter()
    q_begin = k_begin = 0
    for b, (q, k) in enumerate(zip(q_lens, k_lens, strict=True)):
        seen = mask_of(Seen(mask_at(mask, b, h), (q, k)), (1, 1, q, k))[0, 0]
        kinds = _kinds(seen, tile)
        count.update(kinds.ravel().tolist())
        rows, columns = kinds.shape
        right, bottom = k_begin + columns * tile[1], q_begin + rows * tile[0]
        colors = ListedColormap(_KIND_COLORS)
        whole = axes.imshow(kinds, cmap=colors, vmin=0, vmax=2, extent=(k_begin, right, bottom, q_begin), zorder=1)
        clip = plt.Rectangle((k_begin, q_begin), k, q, transform=axes.transData, fill=False, color="gray", zorder=3)
        axes.add_patch(clip)
        whole.set_clip_path(clip)
        shade = np.zeros((q, k, 4))
        shade[..., 3] = _SHADE * seen
        axes.imshow(shade, extent=(k_begin, k_begin + k, q_begin + q, q_begin), interpolation="none", zorder=2)
        lines = {"colors": "white", "linewidth": 0.6, "zorder": 3}
        axes.vlines(k_begin + np.arange(tile[1], k, tile[1]), q_begin, q_begin + q, **lines)
        axes.hlines(q_begin + np.arange(tile[0], q, tile[0]), k_begin, k_begin + k, **lines)
        q_begin, k_begin = q_begin + q, k_begin + k
    axes.set(xlim=(0, k_begin), ylim=(q_begin, 0), xlabel="key", ylabel="query")
    axes.set_aspect("equal" if 0.25 <= shape <= 4 else "auto")
    title = f"{count[FULL]} full, {count[MIXED]} mixed and {count[EMPTY]} empty tiles of {tile[0]} x {tile[1]}"
    axes.set_title(title)
    dark = [tuple((1 - _SHADE) * x for x in to_rgb(color)) for color in _KIND_COLORS]
    shown = (
        (_KIND_COLORS[0], "empty"),
        (_KIND_COLORS[1], "mixed: not seen"),
        (dark[1], "mixed: seen"),
        (dark[2], "full"),
    )
    handles = [Patch(facecolor=color, edgecolor="gray", label=name) for color, name in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    return figure


# --- The tiles a block visits -------------------------------------------------------------------------------------


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
    with _on_emulator(arch), emulator.tracing() as trace:
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
    plt, figure, axes = _subplots(5, 5 * min(2.0, max(0.5, q.shape[-3] / k.shape[-3])))
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


# --- Who waits for whom -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """A stretch of a row of a timeline.

    row          "warp 0", "warp 4", "products of warp 4", or the name of an mbarrier that copies arrive at
    begin, end   in ticks
    kind         "wait", "copy", "product", "issue", "shuffle" or "signal"
    label        the barrier waited for or signalled, the array copied ("zeros": rows behind its end), the function that
                 issues a product
    after        of a wait: the warp that it ends by, None where a copy or a product ends it
    """

    row: str
    begin: int
    end: int
    kind: str
    label: str
    after: int | None = None


@dataclass(repr=False)
class Timeline:
    """What the warps of one block do, each at its own pace, and when others let them go on. Made by `timeline`."""

    kernel: str
    block: tuple[int, int, int]
    bars: list[Bar] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"Timeline({self.kernel!r}, block {self.block}, {len(self.bars)} bars in {len(self.rows)} rows)"

    @property
    def rows(self) -> list[str]:
        """Of all bars, in the order to draw them."""
        return list(dict.fromkeys(bar.row for bar in self.bars))

    def of(self, row: str, kind: str | None = None) -> list[Bar]:
        """The bars of a row, or those of one kind among them."""
        return [bar for bar in self.bars if bar.row == row and kind in (None, bar.kind)]

    def waited(self, row: str) -> dict[str, int]:
        """What a row waits for, and how long."""
        found: Counter[str] = Counter()
        for bar in self.of(row, "wait"):
            found[bar.label] += bar.end - bar.begin
        return dict(found)


def timeline(
    trace: emulator.Trace,
    *,
    block: tuple[int, int, int] | None = None,
    launch: int | None = None,
    copy_ticks: int = 24,
    product_ticks: int = 3,
    shuffle_ticks: int = 6,
) -> Timeline:
    """When each warp of a block could have done what it did. The emulator runs one warp after the other, so time is
    made up here from who waited for whom: the order is the kernel's, lengths are a drawing's, and nothing was timed.

    Each warp goes at its own pace; an instruction takes a tick. A wait ends when all that it needs is there. Copies
    land `copy_ticks` after they are issued, all at once. Each wgmma keeps a warp's matrix unit busy for
    `product_ticks`; a warp of each warpgroup shares that unit. Arithmetic leaves no event: a softmax shows by its
    shuffles between lanes, each of which takes `shuffle_ticks`.

    block   which one; None: the first in the trace
    launch  which launch of the trace, from 0; None: the one with the most events

    Whatever the schedule of the emulator was, the timeline is the same.

    >>> x = np.zeros((1, 300, 1, 64), np.float16)
    >>> with emulator.tracing() as trace:
    ...     _ = visits(x, x, x, arch="sm_90a")
    >>> found = timeline(trace)
    >>> found.rows[:4], sorted(found.waited("warp 0"))
    (['warp 0', 'warp 4', 'products of warp 4', 'warp 8'], ['k_empty[0]', 'v_empty[0]'])
    """
    if launch is None and trace.events:
        launch = Counter(e.launch for e in trace.events).most_common(1)[0][0]
    events = [e for e in trace.events if e.launch == launch and (block is None or e.block == block)]
    require(
        bool(events),
        f"launch={launch}, block={block} is not in the trace of {trace.launches} launches: run the kernel inside "
        "`with cuflash.emulator.tracing() as trace`",
    )
    require(
        trace.dropped == 0, f"{trace.dropped} events of the trace were dropped: trace fewer blocks, or raise its limit"
    )
    events = [e for e in events if e.block == events[0].block]
    made = Timeline(events[0].kernel, events[0].block)
    bars = _Replay(events, {"copy": copy_ticks, "product": product_ticks, "shuffle": shuffle_ticks}).run()
    made.bars = _joined(sorted(bars, key=lambda bar: (_place(bar.row), bar.begin, bar.end)))
    return made


def _place(row: str) -> tuple[int, int, str]:
    """Warps by number, each with its products behind it, then mbarriers."""
    number = re.search(r"warp (\d+)$", row)
    return (0, int(number[1]), row[::-1]) if number else (1, 0, row)


def _joined(bars: list[Bar]) -> list[Bar]:
    """Neighbours of one kind and label as one, and copies that are in flight together."""
    out: list[Bar] = []
    for bar in bars:
        before = out[-1] if out else None
        same = before is not None and (before.row, before.kind, before.label) == (bar.row, bar.kind, bar.label)
        if before is not None and same and before.end >= bar.begin:
            out[-1] = replace(before, end=max(before.end, bar.end))
        elif bar.end > bar.begin:
            out.append(bar)
    return out


class _Replay:
    """The warps of a block, each going through its events as soon as it can."""

    def __init__(self, events: Sequence[emulator.Event], ticks: dict[str, int]) -> None:
        self.ticks = ticks
        self.names = _names(events)
        self.warps: dict[int, list[emulator.Event]] = defaultdict(list)
        # Of each phase of a barrier, how many arrivals and copies it needs; when and by whom the last one came.
        self.missing: Counter[tuple[str, int, int]] = Counter()
        for e in events:
            self.warps[e.warp].append(e)
            if key := self._arrival(e):
                self.missing[key] += 1
        self.latest: dict[tuple[str, int, int], tuple[int, int | None]] = {}
        self.complete: dict[tuple[str, int, int], tuple[int, int | None]] = {}
        self.now = dict.fromkeys(self.warps, 0)
        self.next = dict.fromkeys(self.warps, 0)
        self.unit_free: Counter[int] = Counter()
        self.groups: dict[int, dict[int, int]] = defaultdict(dict)  # of a warp: when each group is done
        self.bars: list[Bar] = []
        self.shown = self._shown()

    def run(self) -> list[Bar]:
        while (warp := self._ready()) is not None:
            self._do(warp, self.warps[warp][self.next[warp]])
            self.next[warp] += 1
        return self.bars

    def _shown(self) -> set[int]:
        """One warp of each warpgroup where those compute together, else all; but only those that do anything."""
        idle = {"sync_threads", "register_dealloc", "register_alloc", "exit", "mbarrier_init", "shfl"}
        busy = [w for w, events in sorted(self.warps.items()) if {e.what for e in events} - idle]
        if not any(e.what == "wgmma" for events in self.warps.values() for e in events):
            return set(busy)
        return {min(w for w in busy if w // 4 == group) for group in {w // 4 for w in busy}}

    def _ready(self) -> int | None:
        """The warp that can go on first."""
        found = []
        for warp, events in self.warps.items():
            if self.next[warp] == len(events):
                continue
            e = events[self.next[warp]]
            if not e.passed or e.phase < 0:
                found.append((self.now[warp], warp))
            elif (key := self._barrier(e)) in self.complete:
                found.append((max(self.now[warp], self.complete[key][0]), warp))
        return min(found)[1] if found else None

    @staticmethod
    def _barrier(e: emulator.Event) -> tuple[str, int, int]:
        kind = "block" if e.what == "sync_threads" else "named" if e.what.startswith("named") else "mbarrier"
        return kind, e.object, e.phase

    def _arrival(self, e: emulator.Event) -> tuple[str, int, int] | None:
        if e.passed or e.object < 0 or e.what in ("mbarrier_init", "mbarrier_wait"):
            return None
        return self._barrier(e)

    def _arrive(self, key: tuple[str, int, int], when: int, by: int | None) -> None:
        self.missing[key] -= 1
        self.latest[key] = max(self.latest.get(key, (0, None)), (when, by), key=lambda x: x[0])
        if self.missing[key] == 0:
            self.complete[key] = self.latest[key]

    def _do(self, warp: int, e: emulator.Event) -> None:
        row, begin = f"warp {warp}", self.now[warp]
        bar = functools.partial(self._add, warp, row)
        name = self.names.get((self._barrier(e)[0], e.object), "") if e.object >= 0 else ""
        if e.passed:
            when, by = self.complete[self._barrier(e)] if e.phase >= 0 else (begin, None)
            self.now[warp] = max(begin, when)
            bar(begin, self.now[warp], "wait", name, by)
            return
        if e.what in ("sync_threads", "named_sync", "mbarrier_wait", "mbarrier_init", "exit"):
            pass  # takes no time of its own
        elif e.what.startswith("shfl"):
            self.now[warp] += self.ticks["shuffle"]
            bar(begin, self.now[warp], "shuffle", _function(e))
        elif e.what in ("wgmma_wait", "cp_async_wait"):
            done = [when for group, when in self.groups[warp].items() if group <= e.phase]
            self.now[warp] = max([begin, *done])
            bar(begin, self.now[warp], "wait", "products" if e.what == "wgmma_wait" else "copies")
        else:
            self.now[warp] += 1
            self._hand_over(warp, e, name)
        if key := self._arrival(e):
            late = e.what == "tma_load"
            self._arrive(key, self.now[warp] + (self.ticks["copy"] if late else 0), None if late else warp)

    def _hand_over(self, warp: int, e: emulator.Event, name: str) -> None:
        """What an instruction starts elsewhere."""
        row, now = f"warp {warp}", self.now[warp]
        if e.what == "wgmma":
            begin = max(now, self.unit_free[warp % 4])
            end = self.unit_free[warp % 4] = begin + self.ticks["product"]
            self.groups[warp][e.phase] = max(end, self.groups[warp].get(e.phase, 0))
            self._add(warp, row, now - 1, now, "issue", _function(e))
            self._add(warp, f"products of {row}", begin, end, "product", _function(e))
        elif e.what == "tma_load" or (e.what.startswith("cp_async_") and e.what != "cp_async_commit"):
            end = now + self.ticks["copy"]
            if e.what != "tma_load":
                self.groups[warp][e.phase] = max(end, self.groups[warp].get(e.phase, 0))
            self._add(warp, row, now - 1, now, "issue", f"copy of {e.buffer or 'zeros'}")
            self._add(warp, name or f"copies of {row}", now, end, "copy", e.buffer or "zeros")
        elif e.what in ("mbarrier_arrive", "mbarrier_arrive_expect_tx", "named_arrive"):
            self._add(warp, row, now - 1, now, "signal", name)
        elif e.what.startswith("mma"):
            self._add(warp, row, now - 1, now, "product", _function(e))

    def _add(self, warp: int, row: str, begin: int, end: int, kind: str, label: str, after: int | None = None) -> None:
        if warp in self.shown:
            self.bars.append(Bar(row, begin, end, kind, label, after))


def _function(e: emulator.Event) -> str:
    return e.function or f"{e.file}:{e.line}"


def _names(events: Sequence[emulator.Event]) -> dict[tuple[str, int], str]:
    """What the kernel's text calls its barriers: where it makes an mbarrier, what stands before the parentheses."""
    made: dict[str, list[int]] = defaultdict(list)
    for e in events:
        if e.what == "mbarrier_init" and (found := re.search(r"mbarrier_init\((\w+)", e.code)):
            made[found[1]].append(e.object)
    names: dict[tuple[str, int], str] = {("block", 0): "sync_threads"}
    for e in events:
        if e.what.startswith("named"):
            names["named", e.object] = f"barrier {e.object}"
        elif e.what == "mbarrier_init":
            names["mbarrier", e.object] = f"mbarrier at {e.object}"
    for name, places in made.items():
        for i, place in enumerate(sorted(places)):
            names["mbarrier", place] = f"{name}[{i}]" if len(places) > 1 else name
    return names


_BAR_COLORS = {"wait": "#e3e3e3", "copy": "#9ecae1", "issue": "#636363", "shuffle": "#a1d99b", "signal": "#d62728"}
_PRODUCT_COLORS = ("#fdae6b", "#9e9ac8", "#fdd0a2", "#bcbddc")


def _with_roles(found: Timeline) -> dict[str, str]:
    """Rows, and with their names what a warp is where each issues copies alone, or products alone."""
    does: dict[str, set[str]] = defaultdict(set)
    for bar in found.bars:
        if bar.row.startswith("warp"):
            copies = bar.kind == "issue" and bar.label.startswith("copy of")
            does[bar.row] |= {"producer"} if copies else {"consumer"} if bar.kind in ("issue", "product") else set()
    apart = all(len(roles) < 2 for roles in does.values())
    return {row: ", ".join([row, *(does[row] if apart else ())]) for row in found.rows}


def plot_timeline(
    trace: emulator.Trace | Timeline,
    *,
    ticks: tuple[int, int] | None = None,
    rows: Sequence[str] | None = None,
    **scale: Any,
) -> Figure:
    """Draws a `timeline`: what each warp does and waits for, its products while they are computed, copies in flight.

    trace   of `emulator.tracing()`, or what `timeline` made of it
    ticks   (begin, end): a part                rows   some of its rows
    scale   as for `timeline`

    An arrow goes from a signal to the wait that it ends.

    >>> x = np.zeros((1, 300, 1, 64), np.float16)
    >>> with emulator.tracing() as trace:
    ...     _ = visits(x, x, x, arch="sm_90a")
    >>> plot_timeline(trace).axes[0].get_title()
    'forward_sm90, block (0, 0, 0): the order is its own, lengths are those of the drawing'
    """
    found = timeline(trace, **scale) if isinstance(trace, emulator.Trace) else trace
    shown = list(found.rows if rows is None else rows)
    unknown = [row for row in shown if row not in found.rows]
    require(not unknown, f"rows={unknown} are not in the timeline, whose rows are {', '.join(found.rows)}")
    place = {row: i for i, row in enumerate(shown)}
    require(ticks is None or ticks[0] < ticks[1], f"ticks={ticks!r} must be the begin and the end of a part")
    first, last = ticks or (0, max((bar.end for bar in found.bars), default=1))
    bars = [bar for bar in found.bars if bar.row in place and bar.end > first and bar.begin < last]
    products = list(dict.fromkeys(bar.label for bar in found.bars if bar.kind == "product"))
    colors = {name: _PRODUCT_COLORS[i % len(_PRODUCT_COLORS)] for i, name in enumerate(products)}
    _, figure, axes = _subplots(11, 0.8 + 0.42 * len(shown))
    from matplotlib.patches import Patch

    labelled = dict.fromkeys(shown, float(first))  # up to where: copies in flight together lie over one another
    for bar in bars:
        color = colors[bar.label] if bar.kind == "product" else _BAR_COLORS[bar.kind]
        y, height = place[bar.row], 0.8 if bar.kind != "signal" else 0.5
        edge = "gray" if bar.kind == "wait" else "white"
        axes.barh(y, bar.end - bar.begin, left=bar.begin, height=height, color=color, edgecolor=edge, linewidth=0.4)
        begin, end = max(bar.begin, first), min(bar.end, last)
        half = (last - first) * len(bar.label) / 280
        if bar.kind in ("wait", "copy") and end - begin > 2 * half and (begin + end) / 2 - half >= labelled[bar.row]:
            axes.text((begin + end) / 2, y, bar.label, ha="center", va="center", fontsize=6)
            labelled[bar.row] = (begin + end) / 2 + half
        if bar.kind == "wait" and (signal := f"warp {bar.after}") in place and signal != bar.row:
            style = {"arrowstyle": "-|>", "color": _BAR_COLORS["signal"], "linewidth": 0.7, "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", (bar.end, y), (bar.end, place[signal]), arrowprops=style)
    roles = _with_roles(found)
    names = [roles[row] for row in shown]
    axes.set(yticks=range(len(shown)), yticklabels=names, ylim=(len(shown) - 0.4, -0.6), xlim=(first, last))
    axes.set_xlabel("ticks")
    where = f"{found.kernel}, block {found.block}"
    axes.set_title(f"{where}: the order is its own, lengths are those of the drawing", fontsize="medium")
    kinds = [kind for kind in _BAR_COLORS if any(bar.kind == kind for bar in bars)]
    longer = {"shuffle": "shuffles between lanes", "issue": "issue of copies and products"}
    handles = [Patch(color=_BAR_COLORS[kind], label=longer.get(kind, kind)) for kind in kinds]
    handles += [Patch(color=color, label=f"product: {name}") for name, color in colors.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=8, fontsize="small", frameon=False)
    return figure


# --- Bytes moved --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """Bytes that a way to compute attention asks of global memory, by array.

    way       "three kernels", "keys outside" or "queries outside"
    length    queries, and keys
    read, written   array -> bytes
    error     the largest difference of its result from the reference's
    """

    way: str
    length: int
    read: dict[str, int]
    written: dict[str, int]
    error: float

    @property
    def total(self) -> int:
        return sum(self.read.values()) + sum(self.written.values())

    @property
    def arrays(self) -> dict[str, int]:
        """Array -> bytes read and written."""
        return dict(Counter(self.read) + Counter(self.written))


WAYS = ("three kernels", "keys outside", "queries outside")


def bytes_moved(lengths: Sequence[int] = (128, 256, 512), ways: Sequence[str] = WAYS) -> list[Traffic]:
    """What one head of attention moves, head dim 64, float16: each way is run on the emulator, which counts.

    three kernels    S = Q K^T, P = softmax(S), O = P V: S and P are written and read back (workbench/naive.cu)
    keys outside     the loops of the first FlashAttention paper: O, l and m are written and read back for each tile of
                     keys (workbench/keys_outside.cu)
    queries outside  the loops of FlashAttention-2, and cuflash's own kernel: a row's O, l and m stay in registers

    All take 128 queries at a time; keys 64 at a time, with keys outside 128, for there a larger tile is read and
    written less often. lengths: multiples of 128, at most 2048.

    >>> [(moved.way, moved.total) for moved in bytes_moved([128])]
    [('three kernels', 196608), ('keys outside', 116736), ('queries outside', 65536)]
    """
    for length in lengths:
        require(
            0 < length <= 2048 and length % 128 == 0, f"lengths has {length}, must be multiples of 128, at most 2048"
        )
    for way in ways:
        require(way in WAYS, f"ways has {way!r}, must be among {', '.join(WAYS)}")
    return [_moved(way, length) for length in lengths for way in ways]


def _moved(way: str, length: int) -> Traffic:
    rng = np.random.default_rng(length)
    q, k, v = (rng.standard_normal((length, 64)).astype(np.float16) for _ in range(3))
    given = {"q": q, "k": k, "v": v}
    numbers = {"len": length, "scale": 0.125}
    with emulator.counting() as counters:
        if way == "three kernels":
            s, p = np.zeros((2, length, length), np.float16)
            arrays = {**given, "s": s, "p": p, "out": np.zeros_like(q)}
            blocks = length // 128
            for name, grid, smem in (
                ("scores", blocks, 24576),
                ("weights", length // 8, 16 * length),
                ("output", blocks, 8192),
            ):
                _run("naive.cu", f"cuflash_naive_{name}", "NaiveParams", grid, smem, arrays, numbers)
            out = arrays["out"]
        elif way == "keys outside":
            rows = {"out": np.zeros((length, 64), np.float32), "l": np.zeros(length, np.float32)}
            arrays = {**given, **rows, "m": np.full(length, -np.inf, np.float32)}
            _run("keys_outside.cu", "cuflash_keys_outside", "KeysOutsideParams", 1, 3 * 16384, arrays, numbers)
            out = arrays["out"]
        else:
            with _on_emulator("sm_80"):
                out = api.attention(*(x[None, :, None] for x in given.values()))[0, :, 0]
    right = api.attention(*(x[None, :, None].astype(np.float64) for x in given.values()))[0, :, 0]
    read, written = dict(counters.global_bytes_read), dict(counters.global_bytes_written)
    return Traffic(way, length, read, written, float(np.abs(out - right).max()))


def _run(
    file: str,
    entry: str,
    params: str,
    grid: int,
    smem_bytes: int,
    arrays: dict[str, np.ndarray],
    numbers: dict[str, Any],
) -> None:
    spec = module.KernelSpec(str(Path(__file__).parent / file), entry, params, None, 256, smem_bytes)
    kernel = module.load(spec, arch.named("sm_80"), "emulator")
    pointers = {name: x.ctypes.data for name, x in arrays.items()}
    buffers = [module.Buffer(name, x.ctypes.data, x.nbytes, name not in "qkv") for name, x in arrays.items()]
    packed = layout.parse(kernel.text, params).pack(**pointers, **numbers)
    kernel.launch((grid, 1, 1), packed, buffers=buffers)


_ARRAY_COLORS = {
    "q": "#c6dbef", "k": "#9ecae1", "v": "#6baed6", "s": "#fc9272", "p": "#de2d26", "l": "#74c476", "m": "#31a354",
    "out": "#fdd0a2",
}  # fmt: skip


def plot_bytes(moved: Sequence[Traffic] | None = None) -> Figure:
    """Draws `bytes_moved`: a stack of arrays for each way and length.

    >>> figure = plot_bytes(bytes_moved([128, 256]))
    >>> [text.get_text() for text in figure.axes[0].get_xticklabels()]
    ['128', '256']
    """
    moved = bytes_moved() if moved is None else moved
    require(bool(moved), "moved is empty: pass what bytes_moved returns")
    ways, lengths = (list(dict.fromkeys(getattr(x, name) for x in moved)) for name in ("way", "length"))
    _, figure, axes = _subplots(1.5 + 1.2 * len(lengths) * len(ways) ** 0.5, 4)
    width = 0.8 / len(ways)
    for x in moved:
        place, bottom = lengths.index(x.length) + width * (ways.index(x.way) - (len(ways) - 1) / 2), 0.0
        for name, color in _ARRAY_COLORS.items():
            if size := x.arrays.get(name, 0) / 1024:
                axes.bar(place, size, 0.9 * width, bottom, color=color, edgecolor="white", linewidth=0.3, label=name)
                bottom += size
        axes.text(place, bottom, x.way.replace(" ", "\n"), ha="center", va="bottom", fontsize=6)
    axes.margins(y=0.14)  # for the labels of the highest
    handles, labels = axes.get_legend_handles_labels()
    known = dict(zip(labels, handles, strict=True))
    names = [name for name in _ARRAY_COLORS if name in known]
    axes.legend([known[name] for name in names], names, fontsize="small", loc="upper left")
    axes.set(xticks=range(len(lengths)), xticklabels=lengths, xlabel="queries and keys", ylabel="KB of global memory")
    axes.set_title("bytes read and written, one head of dim 64, counted")
    return figure
