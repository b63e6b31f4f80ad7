"""`cuflash device-check`: everything that only a GPU can show, in one command.

    hopper       Hopper's forward against the kernel that runs everywhere: the same calls, result and time of both
    primitives   each wrapper of an instruction against its twin's meaning: tests/hw, the tests marked gpu
    tests        every other test marked gpu
    sanitizer    a call of every kernel under compute-sanitizer: memcheck, racecheck, synccheck, initcheck
    benchmark    `cuflash bench`
    tune         the tiles that a kernel could have, each timed; only where asked for: --only tune

Each stage runs in processes of its own and has its share of the time: a kernel that hangs ends its stage, not the run.
The folder gets three files: the results (benchmarks/schema.py) with what every stage found, a log, and an archive of
all that the stages wrote.

Runs from a bare checkout, `PYTHONPATH=. python3 -m cuflash device-check`, with CuPy, NumPy, cuda-bindings, ml_dtypes,
hypothesis, typer, rich and pytest. Without a GPU it says so and ends with status 2; if anything failed, with 1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ArgumentError
from ..settings import config
from . import machine
from .bench import benchmarks

CHECKOUT = Path(__file__).resolve().parents[2]
MINUTES = (2, 5, 9)
RESERVE = 20.0  # seconds of the whole for starting, stopping and writing
GRACE = 10.0  # seconds in which a process asked to stop may do so
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
LONGEST_KEPT = 20 << 20  # bytes of a file that goes into the archive
MOST_SHOWN = 8  # failures of a stage on the terminal; the files have all
MARKED = "gpu and not slow"
TOGETHER = 12  # tests of a file in one process: kernels compile in several
SILENCE = 75.0  # seconds without a word of pytest, compiling included, after which a test hangs

OK, FAILED, UNFINISHED, SKIPPED = "ok", "failed", "unfinished", "skipped"


@dataclasses.dataclass
class Stage:
    """What a stage found. Unfinished: its time was over, and nothing had failed until then."""

    state: str
    found: str
    failures: list[dict[str, str]] = dataclasses.field(default_factory=list)  # each a name and a message
    details: Any = None
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Share:
    """Where a stage writes, and how long it has."""

    folder: Path
    seconds: float


def device_check(
    out: Annotated[Path | None, typer.Option(help="Folder of the files; benchmarks/results if not given.")] = None,
    minutes: Annotated[int, typer.Option(help="2, 5 or 9: how long it takes at most.")] = 9,
    only: Annotated[list[str] | None, typer.Option(help="Only this stage; may be repeated. One is `tune`.")] = None,
    commit: Annotated[str | None, typer.Option(help="Name of the state checked, if git cannot tell.")] = None,
) -> None:
    """Check everything on this GPU: kernels, tests, sanitizers, speed. Three files and a short table."""
    from rich.console import Console

    if minutes not in MINUTES:
        raise ArgumentError(f"minutes={minutes} must be one of {', '.join(map(str, MINUTES))}")
    wanted = only or [name for name in STAGES if name != "tune"]
    if unknown := [name for name in wanted if name not in STAGES]:
        raise ArgumentError(f"{unknown[0]!r} must be one of the stages: {', '.join(STAGES)}")
    console = Console()
    if missing := _missing():
        console.print(f"device-check: {missing}", soft_wrap=True, highlight=False)
        raise typer.Exit(2)
    # A shell has what it runs in the background ignore Ctrl-C. Stages are asked to stop by it, and would inherit that.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    schema = benchmarks("schema")
    stages = [name for name in STAGES if name in wanted]
    ended_well = check(schema.describe(commit=commit), stages, 60.0 * minutes - RESERVE, out or schema.RESULTS, console)
    raise typer.Exit(int(not ended_well))


def _missing() -> str | None:
    """Why this machine cannot be checked, and what to do; None if it can."""
    gpus = machine.gpus()
    if not gpus:
        return "no GPU here (`cuflash doctor` tells more); the tests run on the emulator with: python -m pytest"
    if not any(gpu.supported for gpu in gpus):
        return f"{gpus[0].name} is older than compute capability 8.0, with which the kernels begin"
    if not machine.cupy_wheels():
        install = machine.pip_install_extra(f"cuda{machine.wanted_cuda_major()}")
        return f"{gpus[0].name} is here, but CuPy is not; install it with: {install}"
    return None


def check(results: Any, wanted: Sequence[str], seconds: float, out: Path, console: Any) -> bool:
    """Run the stages, each with its share of what is left of `seconds`; write the files; whether nothing failed."""
    deadline = time.monotonic() + seconds
    stem = Path(results.file_name).stem
    found: dict[str, Stage] = {}
    with tempfile.TemporaryDirectory(prefix="cuflash-check-", ignore_cleanup_errors=True) as work:
        log = Log(out / f"{stem}.log", console)
        log(f"device-check of {results.commit} on {results.gpu}, {datetime.datetime.now():%Y-%m-%d %H:%M}")
        for n, name in enumerate(wanted):
            left = deadline - time.monotonic()
            share, run = STAGES[name]
            together = sum(STAGES[later][0] for later in wanted[n:])
            folder = Path(work) / name
            folder.mkdir()
            began = time.monotonic()
            with console.status(name):
                try:
                    stage = run(Share(folder, max(1.0, left * share / together)))
                except Exception as error:  # whatever it is, the other stages go on
                    stage = Stage(FAILED, f"{type(error).__name__}: {error}")
                finally:  # Ctrl-C among them: nothing is left behind
                    _kill_all()
            stage.seconds = round(time.monotonic() - began, 1)
            found[name] = stage
            log(f"{name}: {stage.state}, {stage.found} ({stage.seconds:.0f} s)")
            for n_failure, failure in enumerate(stage.failures):
                log(f"    {failure['name']}: {failure['message']}", shown=n_failure < MOST_SHOWN)
            if (more := len(stage.failures) - MOST_SHOWN) > 0:
                console.print(f"    and {more} more, in the log", highlight=False)
            results = _with(results, name, stage, folder)
            with log.trying("the results"):
                benchmarks("schema").write(results, out / f"{stem}.json")
        with log.trying("the archive"):
            _archive(Path(work), out / f"{stem}.tar.gz")
    console.print(table(found))
    bad = [name for name, stage in found.items() if stage.state == FAILED]
    if bad:
        first = next((f for f in found[bad[0]].failures), {"name": bad[0], "message": found[bad[0]].found})
        log(f"begin with {bad[0]}: {first['name']}: {first['message']}")
    log(f"written to {out}/{stem}.json, .log and .tar.gz" if not log.lost else f"not written: {'; '.join(log.lost)}")
    return not bad and not log.lost


class Log:
    """Says things on the terminal and in a file, if that can be written; what could not be is in `lost`."""

    def __init__(self, path: Path, console: Any) -> None:
        self.path, self.console = path, console
        self.lost: list[str] = []
        with self.trying("the log"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("", encoding="utf-8")

    def __call__(self, line: str, shown: bool = True) -> None:
        if shown:
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)
        with self.trying("the log"), self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    @contextlib.contextmanager
    def trying(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not any(lost.startswith(what) for lost in self.lost):
                self.lost.append(f"{what}: {error}")


def _with(results: Any, name: str, stage: Stage, folder: Path) -> Any:
    """`results` and what a stage found; the benchmark's own file becomes part of it."""
    more = results.more | {"device_check": results.more.get("device_check", {}) | {name: dataclasses.asdict(stage)}}
    file = folder / BENCH_FILE
    if not file.is_file():
        return dataclasses.replace(results, more=more)
    measured = benchmarks("schema").read(file)
    return dataclasses.replace(measured, commit=results.commit, clean=results.clean, date=results.date, more=more)


def _archive(folder: Path, path: Path) -> None:
    """All files of `folder` that are not too long, in one."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with tarfile.open(part, "w:gz") as archive:
            for file in sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size <= LONGEST_KEPT):
                archive.add(file, file.relative_to(folder).as_posix())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def table(found: dict[str, Stage]) -> Any:
    from rich.table import Table
    from rich.text import Text

    colors = {OK: "green", FAILED: "red", UNFINISHED: "yellow", SKIPPED: "dim"}
    made = Table("stage", "", "s", "")
    for name, stage in found.items():
        made.add_row(name, Text(stage.state, colors[stage.state]), f"{stage.seconds:.0f}", Text(stage.found))
    return made


# --- processes --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended: by itself with a status; asked to; or, deaf to that, killed."""

    how: str
    status: int | None = None


_started: list[subprocess.Popen[bytes]] = []
_KILL = getattr(signal, "SIGKILL", signal.SIGTERM)


def python(*arguments: str) -> list[str]:
    """A command of this Python."""
    return [sys.executable, *arguments]


def start(command: Sequence[str], output: Path) -> subprocess.Popen[bytes]:
    """Run a command in the checkout and on its cuflash, in a group of its own; all it says goes to `output`."""
    path = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
    env = os.environ | {
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # whatever else is installed
        "CUFLASH_CACHE_DIR": str(config.cache_dir),  # what a stage compiles the next one finds
    }
    # Processes run side by side: JAX must not take three quarters of the GPU's memory in each.
    env.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    with output.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=CHECKOUT, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    _started.append(process)
    return process


def _kill_all() -> None:
    for process in _started:
        if process.poll() is None:
            _signal(process, _KILL)
    _started.clear()


def finish(process: subprocess.Popen[bytes], seconds: float, ask: bool = True) -> Ended:
    """Wait for it; when its time is over, ask it to stop, as Ctrl-C does, and kill what does not."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return Ended("ended", process.wait(max(0.0, seconds)))
    if ask:
        _signal(process, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return Ended("asked", process.wait(GRACE))
    _signal(process, _KILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # one that waits in the driver may outlive even that
        process.wait(GRACE)
    return Ended("killed")


def _wait(process: subprocess.Popen[bytes], output: Path, deadline: float, each: float) -> str:
    """Until the process has "ended", or "hangs", silent for longer than `each`, or its "time" is over."""
    size, since = 0, time.monotonic()
    while process.poll() is None:
        now = time.monotonic()
        if (grown := output.stat().st_size) != size:
            size, since = grown, now
        if now > deadline or now - since > each:
            return "time" if now > deadline else "hangs"
        time.sleep(min(0.1, each / 10))
    return "ended"


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)


def tail(output: Path, lines: int = 5) -> str:
    """The last words of a process."""
    return " | ".join(output.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-lines:])


# --- tests ------------------------------------------------------------------------------------------------------------


def primitives(share: Share) -> Stage:
    return tests_of(gpu_files(CHECKOUT / "tests" / "hw"), share)


def other_tests(share: Share) -> Stage:
    hw = CHECKOUT / "tests" / "hw"
    files = [file for file in gpu_files(CHECKOUT / "tests") if hw not in file.parents]
    return tests_of(sorted(files, key=lambda file: file.parent.name != "ops"), share)  # kernels first


def gpu_files(folder: Path) -> list[Path]:
    """The files of tests that may have some for a GPU."""
    files = sorted(folder.rglob("test_*.py"))
    return [file for file in files if re.search(r"mark\.gpu|BACKENDS", file.read_text(encoding="utf-8"))]


def tests_of(files: Sequence[Path], share: Share) -> Stage:
    """A dozen tests of a file in a process of its own, some side by side: a kernel that ruins its process ruins those
    alone."""
    if not files:
        return Stage(SKIPPED, f"{CHECKOUT} has no tests: this is no checkout")
    deadline = time.monotonic() + share.seconds - min(GRACE, share.seconds / 4)

    groups = groups_of(files, share)

    def one(n: int) -> dict[str, Any] | None:
        left = deadline - time.monotonic()
        return run_pytest(*groups[n], left, share.folder, n) if left > 1.0 else None

    with ThreadPoolExecutor(max(1, min(6, (os.cpu_count() or 1) // 2))) as pool:
        reports = list(pool.map(one, range(len(groups))))
    ran = [report for report in reports if report is not None]
    failures = [failure for report in ran for failure in report["failures"]]
    counts = {what: sum(report[what] for report in ran) for what in ("passed", "failed", "skipped")}
    cut = (file for (file, _), report in zip(groups, reports, strict=True) if report is None or report["stopped"])
    stopped = list(dict.fromkeys(file.name for file in cut))
    text = "{passed} passed, {failed} failed, {skipped} skipped".format(**counts)
    if stopped:
        text += f"; no time for all of {', '.join(stopped)}"
    nothing = not counts["passed"] and (counts["skipped"] or not stopped)  # which is not what was asked for
    state = FAILED if failures or nothing else UNFINISHED if stopped else OK
    return Stage(state, text, failures, counts)


def pytest_of(*arguments: str) -> list[str]:
    """A command of pytest, for tests marked gpu.

    The options of pyproject.toml are left out: they ask for plugins that a bare checkout does not have.
    """
    return python("-m", "pytest", "-o", "addopts=", "-m", MARKED, *arguments)


def groups_of(files: Sequence[Path], share: Share) -> list[tuple[Path, list[str]]]:
    """(file, some of its tests), until all are in one; a file that shows none is one by itself, and says why."""
    output = share.folder / "collected.txt"
    finish(start(pytest_of("--collect-only", "-q", *map(str, files)), output), share.seconds / 3, ask=False)
    lines = output.read_text(encoding="utf-8", errors="replace").splitlines()
    found: list[tuple[Path, list[str]]] = []
    for file in files:
        split = (line.partition("::") for line in lines)
        tests = [f"{file}::{name}" for path, _, name in split if name and file.as_posix().endswith(f"/{path}")]
        found += [(file, tests[i : i + TOGETHER]) for i in range(0, len(tests), TOGETHER)] or [(file, [str(file)])]
    return found


def run_pytest(file: Path, tests: Sequence[str], seconds: float, folder: Path, n: int) -> dict[str, Any]:
    """Run some of a file's tests; {passed, failed, skipped, failures, stopped}."""
    name = "-".join((*file.relative_to(CHECKOUT).with_suffix("").parts, str(n)))
    output, report = folder / f"{name}.txt", folder / f"{name}.xml"
    process = start(pytest_of("-v", "--tb=short", f"--junitxml={report}", *tests), output)
    over = _wait(process, output, time.monotonic() + seconds, SILENCE)
    ended = finish(process, 0, ask=over == "time")
    found = {"passed": 0, "failed": 0, "skipped": 0, "failures": [], "stopped": ended.how == "asked"}
    said = output.read_text(encoding="utf-8", errors="replace")
    if report.is_file():
        found |= read_junit(report.read_text(encoding="utf-8"))
    else:
        found |= read_verbose(said)
    if ended.how == "killed":
        at = said.rstrip("\n ").rpartition("\n")[2]
        message = (
            f"hangs: nothing for {SILENCE:.0f} s" if over == "hangs" else "hangs: deaf to Ctrl-C when its time was up"
        )
    elif not report.is_file() or (ended.how == "ended" and ended.status not in (0, 1, 5) and not found["failures"]):
        at, message = file.name, f"pytest ended with status {ended.status}: {tail(output)}"
    else:
        return found
    failure = {"name": at[:200], "message": message}
    return found | {"failed": found["failed"] + 1, "failures": [*found["failures"], failure]}


def read_junit(text: str) -> dict[str, Any]:
    """The counts and the failures of pytest's XML report.

    >>> read_junit('<testsuites><testsuite><testcase classname="a" name="b"/></testsuite></testsuites>')
    {'passed': 1, 'failed': 0, 'skipped': 0, 'failures': []}
    """
    tests = list(ET.fromstring(text).iter("testcase"))
    skipped = sum(test.find("skipped") is not None for test in tests)
    failures = [
        {"name": f"{test.get('classname')}::{test.get('name')}", "message": _first_line(bad.get("message"))}
        for test in tests
        for bad in (*test.findall("failure"), *test.findall("error"))
    ]
    failed = len({failure["name"] for failure in failures})
    passed = len(tests) - skipped - failed
    return {"passed": passed, "failed": failed, "skipped": skipped, "failures": failures}


def read_verbose(text: str) -> dict[str, Any]:
    """The same of what `pytest -v` had said when it was killed, without the messages.

    >>> read_verbose("a.py::b PASSED [ 1%]\\na.py::c[x] FAILED [ 2%]\\na.py::d ")
    {'passed': 1, 'failed': 1, 'skipped': 0, 'failures': [{'name': 'a.py::c[x]', 'message': 'failed; its file hangs'}]}
    """
    ends = re.findall(r"^(\S+::.*) (PASSED|FAILED|ERROR|SKIPPED)\b", text, re.MULTILINE)
    failed = [name for name, how in ends if how in ("FAILED", "ERROR")]
    counts = {how: sum(found == how for _, found in ends) for how in ("PASSED", "SKIPPED")}
    failures = [{"name": name, "message": "failed; its file hangs"} for name in failed]
    return {"passed": counts["PASSED"], "failed": len(failed), "skipped": counts["SKIPPED"], "failures": failures}


def _first_line(message: str | None) -> str:
    return (message or "").strip().partition("\n")[0][:500]


# --- workers, item by item --------------------------------------------------------------------------------------------

MOST_RUINED = 6  # processes that items of a stage may ruin before it ends


def items_of(what: str, share: Share, each: float = 40.0) -> tuple[list[dict[str, Any]], str]:
    """What a worker (on_device.py) says of its items, and why there are no more of them; "" at the end. An item that
    hangs for `each` seconds or kills its process is one that fails; a new process goes on behind it."""
    deadline = time.monotonic() + share.seconds
    found: list[dict[str, Any]] = []
    for attempt in range(MOST_RUINED):
        output = share.folder / f"{what}-{attempt}.txt"
        process = start(python("-m", "cuflash.cli.on_device", what, "--skip", str(len(found))), output)
        over = _wait(process, output, deadline, each)
        finish(process, 0, ask=False)
        said = _said(output)
        found += [line for line in said if "ok" in line]
        if over == "time":
            return found, "no time for the others"
        if over == "ended" and process.returncode == 0:
            return found, ""
        begun = said[-1] if said and "ok" not in said[-1] else {"item": len(found), "name": what}
        if not said or "ok" not in said[-1]:  # else the item itself has said what ruined the process
            ended = f"its process ended, status {process.returncode}: {tail(output, 2)}"
            why = ended if over == "ended" else f"hangs: nothing for {each:.0f} s"
            found.append(begun | {"ok": False, "message": why})
        if not said:
            return found, "it does not begin"
    return found, f"the others were left after {MOST_RUINED} ruined processes"


def _said(output: Path) -> list[dict[str, Any]]:
    """The whole lines of JSON in what a worker said."""
    lines = []
    for line in output.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        with contextlib.suppress(json.JSONDecodeError):
            if isinstance(said := json.loads(line), dict) and "item" in said:
                lines.append(said)
    return lines


def hopper(share: Share) -> Stage:
    if not any(gpu.capability == (9, 0) for gpu in machine.gpus()[:1]):
        return Stage(SKIPPED, "this GPU is no Hopper: it has no kernel of its own")
    items, left = items_of("hopper", share)
    ratios = [f"{item['name'].removeprefix('time, ')} {item['ratio']:.2f} x" for item in items if "ratio" in item]
    return _stage_of(items, left, f"as fast as forward_sm80: {', '.join(ratios)}" if ratios else "")


def tune(share: Share) -> Stage:
    items, left = items_of("tune", share)
    lines = ranking(items)
    (share.folder / "ranking.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return _stage_of(items, left, "\n".join(lines))


def _stage_of(items: list[dict[str, Any]], left: str, more: str) -> Stage:
    failures = [{"name": item["name"], "message": item["message"]} for item in items if not item["ok"]]
    text = "; ".join(filter(None, [f"{len(items) - len(failures)} of {len(items)} right", left, more]))
    return Stage(FAILED if failures else UNFINISHED if left else OK, text, failures, items)


def ranking(items: Sequence[dict[str, Any]]) -> list[str]:
    """Tiles by their speed, the fastest first, for each head dim and mask; "now" is the one in use.

    >>> tile = {"ok": True, "d": 64, "causal": False}
    >>> for line in ranking([tile | {"name": "d 64: a", "tflops": 400.0, "now": True},
    ...                      tile | {"name": "d 64: b", "tflops": 500.0, "now": False}]): print(line)
    d 64: 1. b 500 TFLOP/s, 2. a 400 TFLOP/s (now)
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for item in items:
        if item["ok"] and "tflops" in item:
            groups.setdefault(item["name"].partition(": ")[0], []).append(item)
    lines = []
    for group, members in groups.items():
        ordered = sorted(members, key=lambda item: -item["tflops"])
        told = [
            f"{n}. {item['name'].partition(': ')[2]} {item['tflops']:.0f} TFLOP/s{' (now)' if item['now'] else ''}"
            for n, item in enumerate(ordered, 1)
        ]
        lines.append(f"{group}: {', '.join(told)}")
    return lines


# --- sanitizer --------------------------------------------------------------------------------------------------------


def compute_sanitizer() -> str | None:
    """The tool: on PATH, or in a CUDA toolkit; None where there is none."""
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    for folder in filter(None, folders):
        for place in ("bin", "compute-sanitizer"):
            path = Path(folder) / place / "compute-sanitizer"
            if path.is_file():
                return str(path)
    return shutil.which("compute-sanitizer")


def sanitizer(share: Share) -> Stage:
    tool = compute_sanitizer()
    if tool is None:
        return Stage(SKIPPED, "compute-sanitizer, which comes with a CUDA toolkit, is not here")
    deadline = time.monotonic() + share.seconds
    said: dict[str, str] = {}
    failures = []
    worker = python("-m", "cuflash.cli.on_device", "small")
    plain = ["no tool", *TOOLS]  # without a tool first: what compiles, compiles then, many kernels at once
    for n, name in enumerate(plain):
        left = (deadline - time.monotonic()) / (len(plain) - n) * (2 if n == 0 else 1)
        output = share.folder / f"{name.replace(' ', '-')}.txt"
        command = [tool, "--tool", name, "--error-exitcode", "99", "--print-limit", "20"]
        if name == "memcheck":  # CUDA's own libraries ask the driver for what it may not have; our calls raise errors
            command += ["--report-api-errors", "no"]
        process = start([*worker, "--ahead"] if n == 0 else [*command, *worker], output)
        ended = finish(process, left, ask=False)
        text = output.read_text(encoding="utf-8", errors="replace")
        if ended.how != "ended":
            said[name] = f"not done after {left:.0f} s"
        elif ended.status == 0:
            said[name] = OK
        elif n > 0 and "device not supported" in text.lower():
            return Stage(FAILED if failures else SKIPPED, f"{tool} does not serve this machine", failures, said)
        else:
            reports = [line.strip("= ") for line in text.splitlines() if line.startswith("=========")]
            what = next((r for r in reports if "ERROR SUMMARY" in r or "error" in r.lower()), tail(output, 2))
            said[name] = FAILED
            failures.append({"name": name, "message": f"status {ended.status}: {what}"})
    state = FAILED if failures else OK if set(said.values()) == {OK} else UNFINISHED
    return Stage(state, ", ".join(f"{name} {what}" for name, what in said.items()), failures, said)


# --- benchmark --------------------------------------------------------------------------------------------------------

BENCH_FILE = "bench.json"


def benchmark(share: Share) -> Stage:
    output, file = share.folder / "bench.txt", share.folder / BENCH_FILE
    minutes = max(0.2, (share.seconds - 1.5 * GRACE) / 60)  # it may overrun by the case it is at
    arguments = ["-m", "cuflash", "bench", "--quick", "--minutes", f"{minutes:.2f}", "--out", str(file)]
    ended = finish(start(python(*arguments), output), share.seconds - GRACE)
    if not file.is_file():
        return Stage(FAILED, f"no results; status {ended.status}: {tail(output)}")
    results = benchmarks("schema").read(file)
    failures = [{"name": f"{row.op}: {row.case}", "message": row.error} for row in results.failed]
    if ended.how == "ended" and ended.status and not failures:
        failures = [{"name": "cuflash bench", "message": f"status {ended.status}: {tail(output)}"}]
    if not results.on_gpu:
        failures.append({"name": "cuflash bench", "message": f"it saw no GPU: {tail(output)}"})
    if ended.how == "killed":
        failures.append({"name": "cuflash bench", "message": f"hangs: {share.seconds:.0f} s, and deaf to Ctrl-C"})
    state = FAILED if failures else OK if ended.how == "ended" else UNFINISHED
    return Stage(state, f"{len(results.rows)} rows, {len(failures)} failed", failures)


# Stage -> its share of the time, and what it does.
STAGES: dict[str, tuple[float, Callable[[Share], Stage]]] = {
    "hopper": (2.0, hopper),
    "primitives": (1.5, primitives),
    "tests": (3.5, other_tests),
    "sanitizer": (1.5, sanitizer),
    "benchmark": (3.0, benchmark),
    "tune": (3.0, tune),
}
