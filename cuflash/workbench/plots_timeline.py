"""Who waits for whom."""

from __future__ import annotations

import functools
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from .. import emulator
from ..call import number_checks
from ..errors import require
from .figures import subplots

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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


_MOST_TICKS = 2**20


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

    >>> import numpy as np
    >>> from cuflash.workbench import visits
    >>> x = np.zeros((1, 300, 1, 64), np.float16)
    >>> with emulator.tracing() as trace:
    ...     _ = visits(x, x, x, arch="sm_90a")
    >>> found = timeline(trace)
    >>> found.rows[:4], sorted(found.waited("warp 0"))
    (['warp 0', 'warp 4', 'products of warp 4', 'warp 8'], ['k_empty[0]', 'v_empty[0]'])
    """
    ticks = {"copy": copy_ticks, "product": product_ticks, "shuffle": shuffle_ticks}
    ticks = {name: number_checks.count(f"{name}_ticks", n, least=0, most=_MOST_TICKS) for name, n in ticks.items()}
    launch = None if launch is None else number_checks.count("launch", launch, least=0)
    if block is not None:
        require(isinstance(block, (tuple, list)) and len(block) == 3, f"block={block!r} must be (x, y, z), or None")
        x, y, z = (number_checks.count(f"block[{i}]", n, least=0) for i, n in enumerate(block))
        block = x, y, z
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
    bars = _Replay(events, ticks).run()
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

    >>> import numpy as np
    >>> from cuflash.workbench import visits
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
    _, figure, axes = subplots(11, 0.8 + 0.42 * len(shown))
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
