"""What files of results say: tables, plots, the budgets, and the difference of two files.

`cuflash bench-report` writes README.md and benchmarks/README.md anew, between their marks, and the plots. Everything
there comes from files in benchmarks/results; what was tried without a GPU is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from . import machine_code
from .cases import GROUPS, Case, cases
from .peers import peers
from .schema import CHECKOUT, HARNESS_TEST, OFFLINE, OURS, RESULTS, STAND_IN, STATIC, Results, Row, read_all

MARK = "speed"
NOTHING = "Not yet measured."
README, LONG_README, PLOTS = CHECKOUT / "README.md", CHECKOUT / "benchmarks" / "README.md", CHECKOUT / "benchmarks"

# --- tables -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Quantity:
    """What a row is told by: a unit, how it is read and written, and whether more is better."""

    unit: str
    of: Callable[[Row], float | None]
    digits: int = 0  # behind the point, from 10 on
    more_is_better: bool = True

    def text(self, value: float) -> str:
        """
        >>> quantity("latency").text(12.345), quantity("latency").text(43210.0), quantity("forward").text(654.3)
        ('12.3', '43 ms', '654')
        """
        if self.unit == "us" and value >= 10_000:
            return f"{value / 1e3:,.0f} ms"
        return f"{value:,.{self.digits}f}" if abs(value) >= 10 else f"{value:.3g}"


def _ms(row: Row) -> float | None:
    return row.ms


def _more(name: str, scale: float = 1.0) -> Callable[[Row], float | None]:
    return lambda row: None if row.more.get(name) is None else row.more[name] / scale


def _relative_error(row: Row) -> float | None:
    """The root mean square of out's errors, in thousandths of out's own."""
    out = row.more.get("out")
    return None if out is None else 1e3 * out["rms"] / out["size"]


QUANTITIES = {
    "forward": Quantity("TFLOP/s", lambda row: row.tflops),
    "decode": Quantity("GB/s", lambda row: row.gbps),
    "latency": Quantity("us", lambda row: None if row.ms is None else row.ms * 1e3, 1, False),
    "memory": Quantity("MiB", _more("bytes", 2**20), 0, False),
    "accuracy": Quantity("thousandths", _relative_error, 3, False),
}
TOKENS = Quantity("million tokens/s", _more("tokens_per_s", 1e6), 1)  # of packed batches
OPS = {
    "forward": "Forward",
    "backward": "Backward",
    "both": "Forward and backward",
    "varlen": "Packed batches, forward",
    "varlen both": "Packed batches, forward and backward",
    "masks": "Masks and scores, forward",
    "masks both": "Masks and scores, forward and backward",
    "decode": "Decoding",
    "latency": "Host time",
    "memory": "Memory of a forward, beside its inputs",
    "memory both": "Memory of a forward and backward, beside inputs",
    "accuracy": "Error of the result against float64",
}


def quantity(op: str) -> Quantity:
    """
    >>> quantity("varlen both").unit, quantity("decode").unit
    ('TFLOP/s', 'GB/s')
    """
    return QUANTITIES.get(op.split()[0], QUANTITIES["forward"])


@dataclasses.dataclass(frozen=True)
class Table:
    """Cases by implementations, in one quantity: {case: {impl: row}}."""

    op: str
    quantity: Quantity
    impls: tuple[str, ...]
    rows: dict[str, dict[str, Row]]

    @property
    def title(self) -> str:
        return f"{OPS.get(self.op, self.op)}, {self.quantity.unit}"

    @property
    def plottable(self) -> bool:
        return self.quantity is quantity(self.op) and self.op.split()[0] in (*GROUPS[:6], "accuracy")

    def value(self, case: str, impl: str) -> float | None:
        row = self.rows[case].get(impl)
        return None if row is None else self.quantity.of(row)

    def best_peer(self, case: str) -> str | None:
        there = {i: v for i in self.impls if i != OURS and (v := self.value(case, i)) is not None}
        choose = max if self.quantity.more_is_better else min
        return choose(there, key=lambda impl: there[impl]) if there else None

    def against_best(self, case: str) -> float | None:
        """How many times as good as the best peer cuflash is; below 1 it loses."""
        ours, best = self.value(case, OURS), self.best_peer(case)
        if ours is None or best is None:
            return None
        theirs = self.value(case, best)
        assert theirs is not None
        ratio = ours / theirs if theirs else float("inf")
        return ratio if self.quantity.more_is_better else 1 / ratio

    def cell(self, case: str, impl: str) -> str:
        """The value; half the spread beside it, where that is a hundredth of it or more."""
        value, row = self.value(case, impl), self.rows[case].get(impl)
        if value is None or row is None:
            return "failed" if row is not None and impl == OURS else "-"
        percent = 50 * (row.spread or 0.0) / row.ms if row.ms else 0.0
        return self.quantity.text(value) + (f" ±{percent:.0f} %" if percent >= 1 else "")

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """(head, lines) as text."""
        compared = any(self.against_best(case) is not None for case in self.rows)
        head = ["", *self.impls, *(["of the best peer"] if compared else [])]
        lines = []
        for case in self.rows:
            line = [case, *(self.cell(case, impl) for impl in self.impls)]
            if compared:
                ratio = self.against_best(case)
                line.append("" if ratio is None else f"{ratio:.2f} x {self.best_peer(case)}")
            lines.append(line)
        return head, lines


def tables(rows: Iterable[Row]) -> list[Table]:
    """A table for each op and quantity that has a value, in the order of OPS, then others."""
    by_op: dict[str, dict[str, dict[str, Row]]] = {}
    for row in rows:
        by_op.setdefault(row.op, {}).setdefault(row.case, {})[row.impl] = row
    made = []
    for op in [*(op for op in OPS if op in by_op), *(op for op in by_op if op not in OPS)]:
        for q in (quantity(op), *([TOKENS] if op.split()[0] == "varlen" else [])):
            impls = dict.fromkeys(r.impl for by in by_op[op].values() for r in by.values() if q.of(r) is not None)
            if impls:
                made.append(Table(op, q, (OURS, *(impl for impl in impls if impl != OURS)), by_op[op]))
    return made


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """
    >>> print(markdown(["", "a"], [["x", "1"]]))
    | | a |
    |---|--:|
    | x | 1 |
    """
    rows = [head, *lines]
    text = ["|" + "|".join(f" {cell.replace('|', '/')} " if cell else " " for cell in row) + "|" for row in rows]
    return "\n".join([text[0], "|---|" + "--:|" * (len(head) - 1), *text[1:]])


# --- budgets ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Budget:
    """A target of the design and what was measured. met None: nothing measured says."""

    what: str
    target: str
    measured: str
    met: bool | None

    @property
    def verdict(self) -> str:
        return {None: "not measured", True: "met", False: "**not met**"}[self.met]


FAST_PEERS = ("torch cudnn", "flash-attn 2", "flash-attn 3", "flash-attn 4", "flex")


Ratios = list[tuple[float, str]]  # what a budget limits, and where it was seen


class _Figures:
    """A file's rows by what they are of: the cases are known by their names."""

    def __init__(self, results: Results) -> None:
        self.matmul, self.copy = results.ceilings.get("matmul_tflops"), results.ceilings.get("copy_gbps")
        self.rows = {(row.op, row.case, row.impl): row for row in results.rows if row.error is None}
        self.known = [case for case in cases() if (case.op, case.name, OURS) in self.rows]

    def ours(self, group: str, want: Callable[[Case], bool]) -> list[tuple[Case, Row]]:
        """Our rows of a group's cases that are wanted."""
        return [(c, self.rows[c.op, c.name, OURS]) for c in self.known if c.group == group and want(c)]

    def fastest(self, case: Case, peers: Sequence[str]) -> Row | None:
        found = (self.rows.get((case.op, case.name, peer)) for peer in peers)
        return min((row for row in found if row is not None and row.ms), key=lambda row: row.ms or 0.0, default=None)

    def long(self, group: str, *dims: int) -> list[tuple[Case, Row]]:
        """Our rows of the lengths that budgets are about, 8k and 16k, in bfloat16."""

        def want(case: Case) -> bool:
            p = case.problem
            return not case.variant and p.dtype == "bfloat16" and p.head_dim in dims and p.q_lens[0] in (8192, 16384)

        return self.ours(group, want)

    def of_peers(self, found: list[tuple[Case, Row]], peers: Sequence[str] = FAST_PEERS) -> Ratios:
        best = [(case, row, self.fastest(dataclasses.replace(case, variant=""), peers)) for case, row in found]
        return [(b.ms / row.ms, f"{b.impl}: {case.name}") for case, row, b in best if b and b.ms and row.ms]

    def of_matmul(self, found: list[tuple[Case, Row]]) -> Ratios:
        return [(row.tflops / self.matmul, case.name) for case, row in found if row.tflops and self.matmul]

    def of_copy(self, least: float, most: float) -> Ratios:
        found = self.ours("decode", lambda case: not case.variant and least <= case.problem.kv_bytes < most)
        return [(row.gbps / self.copy, case.name) for case, row in found if row.gbps and self.copy]

    def beside(self, found: list[tuple[Case, Row]], other: str, same: Callable[[Case, Case], bool]) -> Ratios:
        """Our times of cases over our times of the ones they stand beside."""
        bases = self.ours(other, lambda case: not case.variant)
        pairs = [(case, row, base) for case, row in found for known, base in bases if same(case, known)]
        return [(row.ms / base.ms, case.name) for case, row, base in pairs if row.ms and base.ms]

    def latency(self, case: str) -> float | None:
        row = self.rows.get(("latency", case, OURS))
        return None if row is None else row.ms

    def warm(self, variant: str, kind: str) -> float | None:
        """Milliseconds of the host, of the dense call with such a mask."""
        wanted = [c for c in cases(["latency"]) if c.variant == variant and c.problem.mask.kind == kind]
        names = [case.name for case in wanted if case.problem.layout == "dense" and case.direction == "forward"]
        return self.latency(f"warm call: {names[0]}")

    def mask(self, want: Callable[[Case], bool]) -> tuple[int, int] | None:
        """(bytes, launches) that a forward with such a mask takes beside one with the built-in causal."""
        plain = self.ours("memory", lambda c: c.op == "memory" and not c.variant and c.problem.mask.kind == "causal")
        for case, row in self.ours("memory", want):
            for known, base in plain:
                if known.problem.q_lens == case.problem.q_lens and "launches" in row.more and "launches" in base.more:
                    return tuple(row.more[name] - base.more[name] for name in ("bytes", "launches"))  # type: ignore
        return None

    def memory_growth(self) -> Ratios:
        found = self.ours("memory", lambda case: case.direction == "both")
        held = {case.problem.q_lens[0]: row.more["bytes"] for case, row in found}
        return [(held[16384] / held[4096], "")] if {4096, 16384} <= set(held) else []


def at_least(what: str, least: float, ratios: Ratios) -> Budget:
    """Met if the worst case meets it.

    >>> at_least("speed", 0.9, [(1.2, "a"), (0.8, "b")])
    Budget(what='speed', target='>= 0.90', measured='0.80, b', met=False)
    """
    worst = min(ratios, default=None)
    return Budget(what, f">= {least:.2f}", _seen(worst), None if worst is None else worst[0] >= least)


def at_most(what: str, most: float, ratios: Ratios) -> Budget:
    worst = max(ratios, default=None)
    return Budget(what, f"<= {most:.2f}", _seen(worst), None if worst is None else worst[0] <= most)


def within(what: str, most: float, unit: str, ms: float | None) -> Budget:
    """
    >>> within("a call", 15, "us", 0.0125)
    Budget(what='a call', target='<= 15 us', measured='12.5 us', met=True)
    """
    scaled = None if ms is None else ms * {"us": 1e3, "ms": 1.0, "s": 1e-3}[unit]
    measured = "-" if scaled is None else f"{scaled:.3g} {unit}"
    return Budget(what, f"<= {most:g} {unit}", measured, None if scaled is None else scaled <= most)


def of_a_mask(what: str, bytes_: int | None, launches: int, found: tuple[int, int] | None) -> Budget:
    """
    >>> of_a_mask("a mask", 0, 0, (0, 1))
    Budget(what='a mask', target='0 bytes, <= 0 launches', measured='0 bytes, 1 launches', met=False)
    """
    target = f"{'O(length)' if bytes_ is None else bytes_} bytes, <= {launches} launches"
    if found is None:
        return Budget(what, target, "-", None)
    met = found[1] <= launches and (bytes_ is None or found[0] <= bytes_)
    return Budget(what, target, f"{found[0]} bytes, {found[1]} launches", met)


# What no row can tell: a tile's time by itself is in none, and differences of whole calls are too rough for it.
UNCOMPUTED = Budget("masks without bounds: time beside a mixed tile's", "<= 1.50", "not computed", None)


def _seen(worst: tuple[float, str] | None) -> str:
    return "-" if worst is None else f"{worst[0]:.2f}{', ' * bool(worst[1])}{worst[1]}"


def budgets(results: Results) -> list[Budget]:
    """The targets of the design, each with the worst case of this file and against the ceilings of the same run."""
    f = _Figures(results)
    large, small = 256 << 20, 64 << 20
    equal = f.ours("varlen", lambda case: case.label == "equal" and case.op == "varlen" and not case.variant)
    mods = f.ours("masks", lambda case: case.variant == "mask_mod")
    sm80 = f.ours("forward", lambda case: case.variant == "sm_80 kernel")
    cupy, torch, traced = f.warm("", "causal"), f.warm("PyTorch", "causal"), f.warm("", "prefix")
    added = None if cupy is None or traced is None else traced - cupy
    return [
        at_least("forward, d 64 and 128, 8k to 16k: of the best peer", 1.0, f.of_peers(f.long("forward", 64, 128))),
        at_least("forward, d 128, 8k to 16k: of the matmul rate", 0.85, f.of_matmul(f.long("forward", 128))),
        at_least("forward, d 256, 8k to 16k: of the best peer", 0.97, f.of_peers(f.long("forward", 256))),
        at_least("forward, d 256, 8k to 16k: of the matmul rate", 0.92, f.of_matmul(f.long("forward", 256))),
        at_least("backward, d 64 and 128, 8k to 16k: of the best peer", 1.0, f.of_peers(f.long("backward", 64, 128))),
        at_least("backward, d 128, 8k to 16k: of the matmul rate", 0.70, f.of_matmul(f.long("backward", 128))),
        at_most(
            "packed, sequences of 1k: time beside the dense kernel's", 1.05, f.beside(equal, "forward", _same_work)
        ),
        at_most("causal as a Python function: time beside the built-in", 1.10, f.beside(mods, "masks", _same_problem)),
        at_least("decode, from 256 MiB: of the copy bandwidth", 0.90, f.of_copy(large, float("inf"))),
        at_least("decode, 64 to 256 MiB: of the copy bandwidth", 0.75, f.of_copy(small, large)),
        at_least("kernel of all GPUs, forward: of flash-attn 2", 1.0, f.of_peers(sm80, ["flash-attn 2"])),
        within("first call, nothing cached", 1.5, "s", f.latency("first call, nothing cached")),
        within("first call, cubin on disk", 50, "ms", f.latency("first call, cubin on disk")),
        within("import cuflash", 0.3, "s", f.latency("import cuflash")),
        within("host time of a warm call, CuPy", 15, "us", cupy),
        within("host time of a warm call, PyTorch", 25, "us", torch),
        within("what a traced mod adds to it", 10, "us", added),
        at_most("memory of forward and backward, 16k tokens beside 4k", 4.4, f.memory_growth()),
        of_a_mask("building a mask that captures nothing", 0, 0, f.mask(lambda case: case.variant == "mask_mod")),
        of_a_mask("building a mask of an array", None, 1, f.mask(lambda case: case.problem.mask.kind == "document")),
        UNCOMPUTED,
    ]


def _same_work(case: Case, known: Case) -> bool:
    """Whether a dense case has the sequences of a packed one."""
    return dataclasses.replace(case.problem, layout="dense") == known.problem


def _same_problem(case: Case, known: Case) -> bool:
    return case.problem == known.problem and case.direction == known.direction


# --- pages ------------------------------------------------------------------------------------------------------------


def newest(files: Sequence[tuple[Path, Results]]) -> dict[str, dict[str, tuple[Path, Results]]]:
    """{gpu: {op: the newest file that has such rows}}. Raises ValueError for a file made in trying the harness."""
    chosen: dict[str, dict[str, tuple[Path, Results]]] = {}
    for path, results in files:
        if results.gpu in (HARNESS_TEST, STAND_IN):
            raise ValueError(f"{path} was made in trying the harness on a CPU, and tells of no GPU: remove it")
        if results.gpu in (OFFLINE, STATIC):
            continue
        for op in {row.op for row in results.rows}:
            chosen.setdefault(results.gpu, {})[op] = path, results
    return chosen


def _said(path: Path, results: Results) -> str:
    tree = {True: "", False: " with changes", None: ""}[results.clean]
    versions = [f"{name} {v}" for name, v in results.peers.items()]
    units = {
        "matmul_tflops": "matmul {:,.0f} TFLOP/s",
        "copy_gbps": "copy {:,.0f} GB/s",
        "launch_us": "launch {:.1f} us",
    }
    reached = ", ".join(text.format(results.ceilings[n]) for n, text in units.items() if n in results.ceilings)
    lines = [f"Commit {results.commit}{tree}, {results.date[:10]}, driver {results.driver}; `{path.name}`."]
    lines += [f"Ceilings of the same run: {reached}."] if reached else []
    lines += [f"Peers: {', '.join(versions)}."] if versions else []
    lines += [f"Not here: {', '.join(results.skipped)}."] if results.skipped else []
    return " ".join(lines)


def long_page(files: Sequence[tuple[Path, Results]]) -> str:
    """Every table of the newest results of every GPU, the budgets, and the plots."""
    parts = []
    for gpu, by_op in newest(files).items():
        parts.append(f"## {gpu}")
        for path, results in _distinct(by_op):
            ops = {op for op, (of, _) in by_op.items() if of == path}
            parts.append(_said(path, results))
            parts += [f"Note: {note}." for note in results.notes]
            for table in tables(row for row in results.rows if row.op in ops):
                parts += [f"### {table.title}", markdown(*table.cells())]
                if table.plottable:
                    parts.append(f"![{table.title}]({plot_name(gpu, table.op)})")
                failed = [r for by in table.rows.values() for r in by.values() if r.error and r.impl == OURS]
                parts += [f"{row.case}: {row.error}" for row in failed]
            lines = [
                [b.what, b.target, b.measured, b.verdict]
                for b in budgets(results)
                if b.met is not None or b is UNCOMPUTED
            ]
            if len(lines) > 1:
                parts += ["### Budgets", markdown(["", "target", "worst case", ""], lines)]
    return "\n\n".join(parts) if parts else NOTHING


def short_page(files: Sequence[tuple[Path, Results]]) -> str:
    """For README.md: where cuflash stands against the best peer, case by case, wins and losses alike."""
    parts = []
    for gpu, by_op in newest(files).items():
        lines = []
        for op in [op for op in OPS if op in by_op]:
            path, results = by_op[op]
            for table in tables(row for row in results.rows if row.op == op):
                ranked = {case.name: case for case in cases() if case.op == op and case.rank == 0 and not case.variant}
                for case in (case for case in table.rows if case.removeprefix("warm call: ") in ranked):
                    ours, ratio = table.value(case, OURS), table.against_best(case)
                    unit = quantity(op).unit
                    cell = "failed" if ours is None else f"{quantity(op).text(ours)} {unit}"
                    if op in ("memory", "memory both", "accuracy") or ratio is None or table.quantity is TOKENS:
                        continue
                    lines.append([f"{OPS[op]}: {case}", cell, f"{ratio:.2f} x {table.best_peer(case)}"])
        if lines:
            path, results = next(reversed(_distinct(by_op)))
            parts += [f"**{gpu}.** {_said(path, results)}", markdown(["", "cuflash", "of the best peer"], lines)]
            parts += [f"![forward on {gpu}](benchmarks/{plot_name(gpu, 'forward')})"] if "forward" in by_op else []
    return "\n\n".join(parts) if parts else NOTHING


def _distinct(by_op: dict[str, tuple[Path, Results]]) -> list[tuple[Path, Results]]:
    found = dict(by_op.values())
    return sorted(found.items(), key=lambda pair: (pair[1].date, pair[0].name))


def refreshed(text: str, content: str, mark: str = MARK) -> str:
    """`text` with `content` between the marks. Raises ValueError where there are none.

    >>> refreshed("a\\n<!-- speed: begin -->\\nold\\n<!-- speed: end -->\\nb", "new")
    'a\\n<!-- speed: begin -->\\nnew\\n<!-- speed: end -->\\nb'
    """
    begin, end = f"<!-- {mark}: begin -->\n", f"<!-- {mark}: end -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the page must hold {begin.strip()!r} and behind it {end!r}")
    return f"{before}{begin}{content}\n{end}{after}"


def pages(results: Path = RESULTS) -> dict[Path, str]:
    """{page: what it says when written anew}."""
    files = read_all(results)
    made = {README: short_page(files), LONG_README: long_page(files)}
    found = {page: refreshed(page.read_text(encoding="utf-8"), content) for page, content in made.items()}
    static = [results for _, results in files if results.gpu == STATIC]
    said = machine_code.page(static[-1]) if static else NOTHING
    found[LONG_README] = refreshed(found[LONG_README], said, "machine code")
    return found


# --- plots ------------------------------------------------------------------------------------------------------------


def plot_name(gpu: str, op: str) -> str:
    """
    >>> plot_name("NVIDIA H200", "varlen both")
    'h200-varlen-both.svg'
    """
    return f"{gpu.lower().removeprefix('nvidia ').replace(' ', '-')}-{op.replace(' ', '-')}.svg"


def plots(results: Path = RESULTS) -> dict[str, Table]:
    """{file name: the table it shows} of every plot that the pages show."""
    made = {}
    for gpu, by_op in newest(read_all(results)).items():
        for op, (_, found) in by_op.items():
            for table in tables(row for row in found.rows if row.op == op):
                if table.plottable:
                    made[plot_name(gpu, op)] = table
    return made


def digest(table: Table) -> str:
    """Names what a plot shows: it stands in the file, so that one left behind by newer results is found."""
    values = [(case, impl, table.value(case, impl)) for case in table.rows for impl in table.impls]
    return hashlib.sha256(repr((table.title, values)).encode()).hexdigest()[:16]


def draw(table: Table, path: Path) -> None:
    """A plot of a table: lines over the length where cases differ by it, histograms of errors, else bars."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "cuflash", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    kinds = {"forward": _lines, "backward": _lines, "both": _lines, "accuracy": _histograms}
    figure = kinds.get(table.op, _bars)(pyplot, table)
    figure.suptitle(table.title if table.op != "accuracy" else OPS[table.op])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Description": digest(table)})
    pyplot.close(figure)


def _style(impl: str) -> dict[str, Any]:
    """Black for us; every peer has a color of its own, the same in all plots."""
    from matplotlib import colormaps

    if impl == OURS:
        return {"color": "black", "linewidth": 2.2, "zorder": 3}
    names = [peer.name for peer in peers()]
    return {"color": colormaps["tab20"](names.index(impl) if impl in names else 19), "linewidth": 1.2}


def _lines(pyplot: Any, table: Table) -> Any:
    plain = (case for case in cases([table.op]) if not case.variant and case.problem.dtype == "bfloat16")
    known = {case.name: case for case in plain}
    panels: dict[tuple[int, str], list[Case]] = {}
    for name in table.rows:
        if name in known and known[name].problem.heads == known[name].problem.heads_kv:
            panels.setdefault((known[name].problem.head_dim, str(known[name].problem.mask)), []).append(known[name])
    panels = {key: panels[key] for key in sorted(panels) if len(panels[key]) > 1}
    if not panels:
        return _bars(pyplot, table)
    columns = 2
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(9, 2.8 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, ((d, mask), of) in zip(axes.flat, panels.items(), strict=False):
        of = sorted(of, key=lambda case: case.problem.q_lens[0])
        for impl in table.impls:
            points = [(c.problem.q_lens[0], v) for c in of if (v := table.value(c.name, impl)) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), marker=".", label=impl, **_style(impl))
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda n, _: f"{n / 1024:.0f}k" if n >= 1024 else f"{n:.0f}")
        axis.set_ylim(bottom=0)
        axis.set_title(f"head dim {d}{', ' + mask if mask else ''}")
        axis.set_ylabel(table.quantity.unit)
    axes.flat[0].legend(fontsize=7)
    return figure


def _bars(pyplot: Any, table: Table) -> Any:
    names = list(table.rows)
    figure, axis = pyplot.subplots(figsize=(9, 0.6 + 0.13 * len(names) * (len(table.impls) + 2)), layout="constrained")
    height = 0.85 / len(table.impls)
    for n, impl in enumerate(table.impls):
        there = [(i, v) for i, name in enumerate(names) if (v := table.value(name, impl)) is not None]
        style = {"color": _style(impl)["color"]}
        axis.barh([i + n * height for i, _ in there], [v for _, v in there], height, label=impl, **style)
    axis.set_yticks([i + 0.4 for i in range(len(names))], names)
    axis.set_ylim(len(names), -0.3)
    axis.set_xlabel(table.quantity.unit)
    axis.legend(fontsize=7)
    return figure


def _histograms(pyplot: Any, table: Table) -> Any:
    """How many of out's elements are wrong by how much, in powers of two."""
    rows = -(-len(table.rows) // 2)
    figure, axes = pyplot.subplots(rows, 2, figsize=(9, 2.8 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(table.rows) :]:
        axis.axis("off")
    for axis, (case, by_impl) in zip(axes.flat, table.rows.items(), strict=False):
        for impl in (impl for impl in table.impls if impl in by_impl and "out" in by_impl[impl].more):
            found = by_impl[impl].more["out"]["histogram"]
            share = [count / max(1, sum(found["counts"])) for count in found["counts"]]
            exponents = range(found["first_exponent"], found["first_exponent"] + len(share))
            axis.step(list(exponents), share, where="post", label=impl, **_style(impl))
        axis.set_title(case)
        axis.set_xlabel("error, power of two")
        axis.set_ylabel("share")
    axes.flat[0].legend(fontsize=7)
    return figure


def write(results: Path = RESULTS) -> list[Path]:
    """Write the pages and the plots anew, and remove plots that no result makes any more; returns what was written."""
    written = []
    for page, text in pages(results).items():
        page.write_text(text, encoding="utf-8")
        written.append(page)
    wanted = plots(results)
    for old in PLOTS.glob("*.svg"):
        if old.name not in wanted:
            old.unlink()
    for name, table in wanted.items():
        draw(table, PLOTS / name)
        written.append(PLOTS / name)
    return written


# --- two files --------------------------------------------------------------------------------------------------------


def compare(before: Results, after: Results, impl: str = OURS) -> tuple[list[str], list[list[str]]]:
    """(head, lines): the time of every case that both files have, and how many times as fast the later one is. What
    lies within the spread of both is marked so."""
    rows = {(row.op, row.case): row for row in before.rows if row.impl == impl}
    lines = []
    for new in after.rows:
        old = rows.get((new.op, new.case))
        if new.impl != impl or old is None:
            continue
        name = f"{new.op}: {new.case}"
        if old.ms is None or new.ms is None:
            if old.error or new.error:
                lines.append([name, old.error or "done", new.error or "done", ""])
            continue
        noise = abs(new.ms - old.ms) <= (old.spread or 0.0) + (new.spread or 0.0)
        speed = f"{old.ms / new.ms:.3f} x{' (within the spread)' if noise else ''}"
        lines.append([name, f"{old.ms:.4g}", f"{new.ms:.4g}", speed])
    return ["", f"{before.commit} ms", f"{after.commit} ms", "speed"], lines
