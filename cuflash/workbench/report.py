"""What a kernel's questions answer with: plain data that shows as a table, in a notebook, a terminal or a log."""

from __future__ import annotations

import difflib
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arch import Arch
from ..emulator import Counters
from ..errors import UnsupportedError

if TYPE_CHECKING:
    from ..jit import sass

_WIDTH = 120  # of tables as text
_HTML = '<pre style="white-space:pre;overflow-x:auto;line-height:normal;font-family:monospace">{code}</pre>'


class Report:
    """Shows itself: as text (`str`), in colour where rich prints, as HTML in notebooks."""

    def __rich__(self) -> Any:
        raise NotImplementedError

    def __str__(self) -> str:
        return _render(self.__rich__())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from rich.console import Console

        console = Console(record=True, width=_WIDTH, file=io.StringIO(), force_jupyter=False)
        console.print(self.__rich__())
        return console.export_html(code_format=_HTML, inline_styles=True)


def _render(renderable: Any) -> str:
    from rich.console import Console

    console = Console(width=_WIDTH, file=io.StringIO(), force_terminal=False, force_jupyter=False, color_system=None)
    console.print(renderable)
    return "\n".join(line.rstrip() for line in console.file.getvalue().rstrip().splitlines())  # type: ignore[attr-defined]


def _table(title: str, *columns: str, rows: Iterable[Sequence[Any]], right: Sequence[int] = (), note: str = "") -> Any:
    """A table under its title; only what an element is, in words, may take several lines."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(highlight=False)
    for at, column in enumerate(columns):
        table.add_column(column, justify="right" if at in right else "left", no_wrap=column != "which is")
    for row in rows:
        table.add_row(*[x if isinstance(x, Text) else Text(_shown(x)) for x in row])
    return Group(Text(title, "bold"), *([table] if table.row_count else []), *([Text(note, "italic")] if note else []))


def _shown(x: Any) -> str:
    if isinstance(x, int) and not isinstance(x, bool):
        return f"{x:,}"
    return f"{x:.4g}" if isinstance(x, float) else str(x)


# --- Right or wrong -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compared:
    """One result against what it should be; the worst element is that of the largest error over its allowance.

    wrong, count     elements off by more than they may be, of all
    index            of the worst element
    where            the same in words: "sequence 0, row 5, head 1, column 3"
    got, expected, allowed   there; allowed is the largest error that it may have
    """

    name: str
    wrong: int
    count: int
    index: tuple[int, ...]
    where: str
    got: float
    expected: float
    allowed: float

    @property
    def error(self) -> float:
        """How far the worst element is off; NaN where one of the two is no number."""
        return abs(self.got - self.expected)


@dataclass(frozen=True, repr=False)
class Check(Report):
    """Whether a kernel's results are right: true or false, and one `Compared` for each of them."""

    results: tuple[Compared, ...]

    def __bool__(self) -> bool:
        return not any(x.wrong for x in self.results)

    @property
    def worst(self) -> Compared:
        """The result that is worst off."""
        return max(self.results, key=lambda x: (x.wrong > 0, x.error / x.allowed if x.allowed else x.error))

    def __rich__(self) -> Any:
        from rich.text import Text

        rows = []
        named = any(x.where for x in self.results)
        for x in self.results:
            verdict = Text("right", "green") if not x.wrong else Text(f"WRONG: {x.wrong:,} of {x.count:,}", "bold red")
            at = f"{x.name}[{', '.join(map(str, x.index))}]" if x.count else "empty"
            place = (at, x.where) if named else (at,)
            rows.append((x.name, verdict, *place, x.got, x.expected, x.error, x.allowed))
        places = ("worst element", "which is") if named else ("worst element",)
        columns = ("result", "verdict", *places, "got", "expected", "off by", "allowed")
        return _table("check against the reference", *columns, rows=rows, right=range(len(columns))[-4:])


def compare(
    name: str, got: np.ndarray, expected: np.ndarray, allowed: np.ndarray, where: Callable[[tuple[int, ...]], str]
) -> Compared:
    """Compares element by element; infinities and NaN must stand where they should."""
    actual, right = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    allowed = np.broadcast_to(np.asarray(allowed, np.float64), right.shape)
    if actual.size == 0:
        return Compared(name, 0, 0, (), "", 0.0, 0.0, 0.0)
    with np.errstate(all="ignore"):
        same = (actual == right) | (np.isnan(actual) & np.isnan(right))
        ratio = np.where(same, 0, np.abs(actual - right) / np.maximum(allowed, 1e-300))
        ratio = np.where(np.isnan(ratio), np.inf, ratio)
    at = tuple(int(i) for i in np.unravel_index(ratio.argmax(), ratio.shape))
    wrong = int((ratio > 1).sum())
    return Compared(name, wrong, ratio.size, at, where(at), float(actual[at]), float(right[at]), float(allowed[at]))


# --- What it costs, counted ---------------------------------------------------------------------------------------


@dataclass(repr=False)
class Counts(Report, Counters):
    """What the emulator counted in a run: `cuflash.emulator.Counters`, sums, and passes and sectors of each access by
    its line, "file:line"; and `code`, the text of those lines.
    """

    code: Mapping[str, str] = field(default_factory=dict)

    @property
    def totals(self) -> dict[str, int]:
        """The sums by name, as the table has them."""
        return {
            "launches": self.launches,
            **self.matrix_instructions,
            **self.matrix_moves,
            **self.exchanges,
            "barriers": self.barriers,
            "global bytes read": sum(self.global_bytes_read.values()),
            "global bytes written": sum(self.global_bytes_written.values()),
            "global sectors of 32 bytes": self.global_sectors,
            "sectors beyond need": sum(self.uncoalesced.values()),
            "shared bytes": self.shared_bytes,
            "shared passes": sum(self.shared_passes.values()),
            "bank conflicts": sum(self.bank_conflicts.values()),
        }

    @property
    def accesses(self) -> list[tuple[str, str, int, int]]:
        """(site, "shared" or "global", passes or sectors it took, those beyond need), the most wasteful first."""
        found = [(site, "shared", n, self.bank_conflicts[site]) for site, n in self.shared_passes.items()]
        found += [(site, "global", n, self.uncoalesced[site]) for site, n in self.sectors.items()]
        return sorted(found, key=lambda x: (-x[3], -x[2], x[0]))

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        totals = [(name, n) for name, n in self.totals.items() if n]
        arrays = {**self.global_bytes_read, **self.global_bytes_written}
        moved = [(n, self.global_bytes_read[n], self.global_bytes_written[n]) for n in arrays]
        lines = []
        room = max(30, _WIDTH - 56 - max(map(len, self.code), default=0))  # what other columns leave
        for site, memory, taken, beyond in self.accesses:
            waste = Text(f"{beyond:,}", "bold red" if beyond else "green")
            what = "passes" if memory == "shared" else "sectors"
            code = self.code.get(site, "").strip()
            code = code if len(code) <= room else code[: room - 1] + "…"
            lines.append((site, memory, f"{taken:,} {what}", waste, code))
        return Group(
            _table("counted by the emulator", "what", "how many", rows=totals, right=(1,)),
            _table("global memory by array, bytes", "array", "read", "written", rows=moved, right=(1, 2)),
            _table(
                "accesses by line", "line", "memory", "took", "beyond need", "code", rows=lines, right=(2, 3),
                note="beyond need: bank conflicts (shared), sectors that coalesced lanes would save (global)",
            ),
        )  # fmt: skip

    def plot(self) -> Any:
        """A matplotlib figure: bytes of each array, and what each line's accesses took and needed."""
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise UnsupportedError("figures are drawn by matplotlib: pip install matplotlib") from error

        figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.2), width_ratios=(1, 2), layout="constrained")
        arrays = list(dict.fromkeys([*self.global_bytes_read, *self.global_bytes_written]))[::-1]
        read = [self.global_bytes_read[a] / 1024 for a in arrays]
        left.barh(arrays, read, label="read")
        left.barh(arrays, [self.global_bytes_written[a] / 1024 for a in arrays], left=read, label="written")
        left.set(title="global memory", xlabel="KB")
        left.legend()
        shown = self.accesses[:10][::-1]
        names = [f"{site} ({memory})" for site, memory, *_ in shown]
        right.barh(names, [taken - beyond for *_, taken, beyond in shown], label="needed")
        starts = [taken - beyond for *_, taken, beyond in shown]
        right.barh(names, [beyond for *_, beyond in shown], left=starts, color="tab:red", label="beyond need")
        right.set(title="accesses by line", xlabel="passes (shared), sectors (global)")
        right.legend()
        for axes in (left, right):
            axes.use_sticky_edges = False  # a bar that ends at the frame looks cut
            axes.margins(x=0.05)
            axes.set_xlim(left=0)
        pyplot.close(figure)  # whoever shows it shows it once
        return figure


# --- What it uses -------------------------------------------------------------------------------------------------


# Compute capability -> threads and blocks that one multiprocessor holds at most (CUDA C Programming Guide, "Technical
# Specifications per Compute Capability").
_HELD = {
    (8, 0): (2048, 32), (8, 6): (1536, 16), (8, 7): (1536, 16), (8, 9): (1536, 24), (9, 0): (2048, 32),
    (10, 0): (2048, 32), (10, 3): (2048, 32), (12, 0): (1536, 24),
}  # fmt: skip
_REGISTERS = 65536  # of a multiprocessor, of every architecture here; given out in units of 256 a warp


@dataclass(frozen=True, repr=False)
class Resources(Report):
    """What a kernel uses on one architecture, as its compiler reports it.

    registers        of a thread                  spilled_bytes   of a thread, stored and loaded
    stack_bytes      of a thread                  shared_bytes    of a block
    blocks           that a multiprocessor holds at a time, which `limited_by` limits
    occupancy        its warps then, as a share of those that it could hold
    compile_ms       what NVRTC took when it compiled this text
    opcodes          machine instructions by class (`cuflash.jit.sass.CLASSES`); empty without nvdisasm
    """

    kernel: str
    arch: str
    threads: int
    registers: int
    spilled_bytes: int
    stack_bytes: int
    shared_bytes: int
    blocks: int
    limited_by: str
    occupancy: float
    compile_ms: float
    warnings: tuple[str, ...] = ()
    opcodes: Mapping[str, int] = field(default_factory=dict)

    def rows(self) -> dict[str, Any]:
        """What the table has, by name."""
        return {
            "registers a thread": self.registers,
            "spilled bytes a thread": self.spilled_bytes,
            "stack bytes a thread": self.stack_bytes,
            "shared bytes a block": self.shared_bytes,
            "threads a block": self.threads,
            "blocks a multiprocessor": f"{self.blocks}, limited by {self.limited_by}",
            "occupancy": f"{self.occupancy:.0%}",
            **{f"instructions: {name}": n for name, n in self.opcodes.items() if n},
        }

    def __rich__(self) -> Any:
        rows = [(n, x) for n, x in self.rows().items() if not n.startswith("instructions")]
        rows += [("compiled in", f"{self.compile_ms:.0f} ms"), *(("warning", line) for line in self.warnings)]
        counts = ", ".join(f"{name} {n:,}" for name, n in self.opcodes.items() if n)
        note = f"instructions: {counts}" if counts else "instructions are not counted: pip install nvidia-cuda-nvdisasm"
        return _table(f"{self.kernel} on {self.arch}", "what", "how much", rows=rows, right=(1,), note=note)


def occupancy(arch: Arch, threads: int, registers: int, shared_bytes: int) -> tuple[int, str, float]:
    """(blocks that a multiprocessor holds, what limits them, share of the warps it could hold).

    >>> from cuflash.arch import named
    >>> occupancy(named("sm_80"), 128, 128, 48 * 1024)
    (3, 'shared memory', 0.1875)
    """
    most_threads, most_blocks = _HELD.get(arch.capability, (1536, 16))
    warps = -(-threads // 32)
    of_warp = -(-max(registers, 1) * 32 // 256) * 256
    limits = {
        "registers": _REGISTERS // of_warp // warps,
        "shared memory": (arch.smem_bytes + 1024) // (shared_bytes + 1024),  # the system takes 1 KB of each block
        "threads": most_threads // (32 * warps),
        "blocks": most_blocks,
    }
    reason = min(limits, key=limits.__getitem__)
    return limits[reason], reason, limits[reason] * warps * 32 / most_threads


@dataclass(frozen=True, repr=False)
class MachineCode(Report):
    """A kernel's SASS.

    text      as nvdisasm prints it
    function  `cuflash.jit.sass.Function`: instructions, counts by class, loops with matrix instructions
    """

    kernel: str
    arch: str
    text: str
    function: sass.Function

    def __rich__(self) -> Any:
        loops = self.function.loops
        counts = {name: n for name, n in self.function.counts.items() if n}
        rows = [(name, n, *(loop.counts[name] for loop in loops)) for name, n in counts.items()]
        columns = ("opcode", "kernel", *(f"loop {i}" for i in range(len(loops))))
        note = "loop: an innermost loop with matrix instructions. print(x.text) shows the code"
        return _table(
            f"{self.kernel} on {self.arch}", *columns, rows=rows, right=range(1, 9)[: 1 + len(loops)], note=note
        )


@dataclass(frozen=True, repr=False)
class Timing(Report):
    """Microseconds of each of a kernel's calls on a GPU, by CUDA events."""

    kernel: str
    device: str
    microseconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Of all calls, in microseconds."""
        return float(np.median(self.microseconds))

    def __rich__(self) -> Any:
        low, high = np.quantile(self.microseconds, (0.2, 0.8))
        row = (self.kernel, f"{self.median:.1f}", f"{low:.1f} to {high:.1f}", len(self.microseconds))
        return _table(f"on {self.device}", "kernel", "median us", "20 to 80 %", "calls", rows=[row], right=(1, 2, 3))


# --- Two versions -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Diff(Report):
    """Two versions of a kernel: their text, and of what was asked for what changed.

    text       a unified diff of the files that differ
    counters   name -> (before, after) of `Counts.totals`
    resources  name -> (before, after) of `Resources.rows`
    timing     (before, after) in microseconds, or None
    """

    text: str
    counters: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    resources: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    timing: tuple[float, float] | None = None

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.syntax import Syntax

        parts: list[Any] = [Syntax(self.text, "diff", background_color="default")] if self.text else []
        for title, found in (("counted", self.counters), ("resources", self.resources)):
            if found:
                rows = [(name, a, b, _change(a, b)) for name, (a, b) in found.items() if a != b]
                note = "" if rows else "nothing changed"
                parts.append(_table(title, "what", "before", "after", "change", rows=rows, right=(1, 2, 3), note=note))
        if self.timing is not None:
            a, b = self.timing
            row = ("median us", f"{a:.1f}", f"{b:.1f}", f"{b / a - 1:+.1%}")
            parts.append(_table("time", "what", "before", "after", "change", rows=[row], right=(1, 2, 3)))
        return Group(*parts) if parts else "nothing differs"


def _change(before: Any, after: Any) -> Any:
    from rich.text import Text

    if not isinstance(before, int) or not isinstance(after, int):
        return ""
    share = f" ({after / before - 1:+.0%})" if before else ""
    return Text(f"{after - before:+,}{share}", "green" if after < before else "red")


def pairs(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """name -> (before, after), 0 where one has it and the other has not."""
    return {name: (before.get(name, 0), after.get(name, 0)) for name in {**before, **after}}


def text_diff(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """A unified diff of files by name. What a line is indented by, and directives that say where it comes from, are no
    difference.

    >>> print(text_diff({"a.cu": "int x;\\nint y;"}, {"a.cu": "  int x;\\nint z;"}))
    --- a.cu
      int x;
    -int y;
    +int z;
    """
    parts: list[str] = []
    for name in sorted({*before, *after}):
        a, b = (
            [line for line in files.get(name, "").splitlines() if not line.startswith("#line ")]
            for files in (before, after)
        )
        matcher = difflib.SequenceMatcher(None, [x.strip() for x in a], [x.strip() for x in b], autojunk=False)
        for at, group in enumerate(matcher.get_grouped_opcodes(2)):
            parts.append("@@" if at else f"--- {name}")
            for what, i, i_end, j, j_end in group:
                if what == "equal":
                    parts += [f" {line}" for line in b[j:j_end]]
                else:
                    parts += [f"-{line}" for line in a[i:i_end]] + [f"+{line}" for line in b[j:j_end]]
    return "\n".join(parts)
