"""`cuflash bench`, `bench-report` and `bench-compare`: cuflash beside every other attention that is installed here.

The benchmarks themselves lie in `benchmarks/`, beside the package in a checkout and inside it in a wheel.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ArgumentError, UnsupportedError
from . import machine, terminal

PACKAGE = Path(__file__).resolve().parents[1]


def benchmarks(name: str) -> Any:
    """A module of the benchmarks.

    >>> benchmarks("schema").OURS
    'cuflash'
    """
    if (PACKAGE / "_benchmarks").is_dir():
        return importlib.import_module(f"cuflash._benchmarks.{name}")
    if str(PACKAGE.parent) not in sys.path:
        sys.path.insert(0, str(PACKAGE.parent))
    return importlib.import_module(f"benchmarks.{name}")


_GROUPS = "forward, backward, both, varlen, masks, decode, latency, memory, accuracy; none: all. Without a GPU: "
_GROUPS += "host, import, compile, emulator, counters, reference, code, model."
_PEERS = "Beginnings of names, with commas between: torch,flash-attn; '' for none. Default: all here. On a GPU."


def bench(
    groups: Annotated[list[str] | None, typer.Argument(help=_GROUPS, show_default=False)] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Only what matters most, timed more briefly. On a GPU.")
    ] = False,
    minutes: Annotated[
        float | None, typer.Option(help="Leave off what matters least, so as to end by then. On a GPU.")
    ] = None,
    peers: Annotated[str | None, typer.Option(help=_PEERS)] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The file (.json) of results, or its folder. Default: benchmarks/results of the checkout."),
    ] = None,
    commit: Annotated[str | None, typer.Option(help="Name of the state measured, where git cannot tell it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the file, and no tables.")] = False,
    harness_test: Annotated[bool, typer.Option("--harness-test", hidden=True)] = False,
) -> None:
    """Measure cuflash beside its peers on this GPU; without one, what can be measured without: no speeds of kernels.

    Medians of CUDA-event times of single calls, cuflash and peers in turn in one process, on inputs that are rotated
    past the cache; every result is checked against float64 before it is timed. Exit status 1 if cuflash failed a case.
    """
    cases, schema, timing = benchmarks("cases"), benchmarks("schema"), benchmarks("timing")
    stages = tuple(benchmarks("offline").STAGES)
    for group in groups or ():
        if group not in cases.GROUPS + stages:
            of_gpu, without = ", ".join(cases.GROUPS), ", ".join(stages)
            raise ArgumentError(f"{group!r} must be one of {of_gpu}; or, without a GPU, one of {without}")
    if out is None and not schema.RESULTS.is_absolute():
        raise ArgumentError("--out is missing: there is no checkout here that keeps results; pass --out FOLDER")
    gpu = any(gpu.supported for gpu in machine.gpus())
    if (groups and set(groups) <= set(stages)) or (not groups and not gpu and not harness_test):
        given = {"--quick": quick, "--minutes": minutes is not None, "--peers": peers is not None}
        _offline(tuple(groups or ()), out, commit, as_json, [name for name, is_given in given.items() if is_given])
        return
    wanted = [group for group in groups or cases.GROUPS if group in cases.GROUPS]
    if harness_test:
        chosen = [case for case in cases.tiny() if case.group in wanted]
        results = schema.describe(schema.HARNESS_TEST, commit)
        _measure(results, timing.HostClock(), chosen, peers, quick, minutes, out, as_json, seconds=0.01)
        return
    if gpu and not machine.cupy_wheels():
        extra = f"cuda{machine.wanted_cuda_major()}"
        raise UnsupportedError(f"CuPy, which launches the kernels, is not here: {machine.pip_install_extra(extra)}")
    if not gpu:
        without = ", ".join(stages)
        raise ArgumentError(f"{wanted[0]} needs a GPU that cuflash serves, and there is none: measure {without} here")
    results = schema.describe(commit=commit)
    _measure(results, timing.CudaClock(), cases.cases(wanted, quick), peers, quick, minutes, out, as_json)


def _measure(
    results: Any, clock: Any, chosen: Sequence[Any], peers: str | None, quick: bool, minutes: float | None,
    out: Path | None, as_json: bool, seconds: float | None = None,
) -> None:  # fmt: skip
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    everyone, run, schema = benchmarks("peers"), benchmarks("run"), benchmarks("schema")
    began = time.monotonic()
    console = terminal.console(stderr=as_json)
    words = None if peers is None else [word for word in peers.split(",") if word]
    candidates = everyone.peers() + ([everyone.FlexEager()] if not clock.gpu else [])
    try:
        found, results.peers, results.skipped = everyone.present(words, candidates)
    except ValueError as error:
        raise ArgumentError(str(error)) from None
    said = ", ".join(f"{name} {version}" for name, version in results.peers.items())
    console.print(f"peers: {said or 'none'}", highlight=False)
    for name, why in results.skipped.items():
        console.print(f"  not {name}: {why}", highlight=False, markup=False)
    this = run.Run(clock, found, seconds or run.seconds_each(quick))
    chosen = run.possible(chosen, this, results)
    expected = run.expected_seconds(chosen, this)
    plan = ", ".join(f"{group} {s:.0f}" for group, s in expected.items())
    console.print(f"expected seconds: {plan}; together {sum(expected.values()):.0f}", highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    path: Path | None = None
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("ceilings", total=len(chosen))

            def on_case(case: Any, done: int, of: int) -> None:
                nonlocal path
                if results.rows:
                    path = schema.write(results, out)  # what is measured is kept, whatever comes
                progress.update(task, completed=done, total=of, description=f"{case.op}: {case.name}")
                if not console.is_terminal:
                    console.print(f"{done + 1} of {of}, {case.op}: {case.name}", highlight=False, markup=False)

            if minutes is not None:  # looking for peers took its part
                minutes = max(0.0, minutes - (time.monotonic() - began) / 60)
            run.bench(chosen, this, results, minutes, progress=on_case)
    finally:
        path = schema.write(results, out)
    if as_json:
        print(json.dumps(results.as_json(), indent=1))
    else:
        show(console, results)
    console.print(f"written to {path}", highlight=False, soft_wrap=True)
    for row in results.failed:
        console.print(f"cuflash failed: {row.op}: {row.case}: {row.error}", highlight=False, markup=False)
    raise typer.Exit(int(bool(results.failed)))


def _offline(
    stages: tuple[str, ...], out: Path | None, commit: str | None, as_json: bool, without_effect: Sequence[str]
) -> None:
    offline, schema = benchmarks("offline"), benchmarks("schema")
    console = terminal.console(stderr=as_json)
    for name in without_effect:
        console.print(f"{name} has no effect: it is for measurements on a GPU, and none is made", highlight=False)
    with console.status("without a GPU") as status:

        def on_row(row: Any) -> None:
            status.update(f"{row.op}: {row.case}")

        results = offline.run(stages, commit, on_row)
    path = schema.write(results, out)
    if as_json:
        print(json.dumps(results.as_json(), indent=1))
    else:
        for table in offline.tables(results):
            console.print(table)
    for name, why in results.skipped.items():
        console.print(f"not {name}: {why}", highlight=False, markup=False)
    console.print(*results.notes, f"written to {path}", sep="\n", highlight=False, soft_wrap=True)


def show(console: Any, results: Any) -> None:
    """Tables, ceilings and budgets in a terminal."""
    from rich import box
    from rich.table import Table

    report = benchmarks("report")
    for table in report.tables(results.rows):
        head, lines = table.cells()
        console.print(_rich(Table(title=table.title, title_justify="left", box=box.SIMPLE), head, lines))
    ceilings = ", ".join(f"{name} {value:,.1f}" for name, value in results.ceilings.items())
    console.print(f"ceilings: {ceilings}", highlight=False)
    if results.on_gpu:
        lines = [[b.what, b.target, b.measured, b.verdict.strip("*")] for b in report.budgets(results)]
        console.print(
            _rich(Table(title="budgets", title_justify="left", box=box.SIMPLE), ["", "target", "worst case", ""], lines)
        )
    for note in results.notes:
        console.print(f"note: {note}", highlight=False)


def _rich(table: Any, head: Sequence[str], lines: Sequence[Sequence[str]]) -> Any:
    from rich.text import Text

    for n, name in enumerate(head):
        table.add_column(name, justify="right" if n else "left", overflow="fold")
    for line in lines:
        table.add_row(*(Text(cell) for cell in line))
    return table


def bench_report(
    results: Annotated[Path | None, typer.Option(help="Folder of the files of results.")] = None,
) -> None:
    """Write the speeds in README.md and benchmarks/README.md anew, and the plots, from the files of results."""
    report, schema = benchmarks("report"), benchmarks("schema")
    if not report.LONG_README.is_file():
        raise ArgumentError("there is no checkout here, whose README could be written: run this in one")
    try:
        for path in report.write(results or schema.RESULTS):
            print(path)
    except ValueError as error:
        raise ArgumentError(str(error)) from None
    except ImportError as error:
        raise UnsupportedError(f"plots need matplotlib ({error}): {machine.pip_install_extra('bench')}") from None


def bench_compare(
    before: Annotated[Path, typer.Argument(help="A file of results.")],
    after: Annotated[Path, typer.Argument(help="A later one.")],
    impl: Annotated[str, typer.Option(help="Whose times.")] = "cuflash",
) -> None:
    """What changed between two files of results: the time of every case that both have."""
    from rich.table import Table

    report, schema = benchmarks("report"), benchmarks("schema")
    for path in (before, after):
        if not path.is_file():
            raise ArgumentError(f"{path} is not a file: pass two files of results that `cuflash bench` wrote")
    try:
        old, new = schema.read(before), schema.read(after)
    except (OSError, ValueError) as error:
        raise ArgumentError(str(error)) from None
    if old.gpu != new.gpu:
        raise ArgumentError(f"{before} is of {old.gpu} and {after} of {new.gpu}: compare results of one GPU")
    console = terminal.console()
    console.print(_rich(Table(title=f"{impl} on {new.gpu}", title_justify="left"), *report.compare(old, new, impl)))
