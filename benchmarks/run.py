"""From cases to rows: prepare, check against float64, time in turns; and the groups that measure something else."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import statistics as stats
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import cuflash
from cuflash.jit import module

from . import oracle, timing
from .cases import GROUPS, Case
from .inputs import Inputs
from .peers import Missing, NotTaken, Ours, Peer
from .schema import OURS, Results, Row, clocks
from .timing import Clock, Prepared, Timing, message

_FIXED_SECONDS = {"latency": 6.0, "memory": 1.0, "accuracy": 1.0}  # of a case, beside the peers' own
_NEEDED = 6  # times a case's bytes: two copies of its inputs, results and workspaces of all who take turns
_WARM_UP_SECONDS = 0.1  # of every contestant, inputs and comparison included


@dataclasses.dataclass
class Run:
    """What one run of benchmarks needs to know. `seconds`: of timing, for each implementation and case."""

    clock: Clock
    peers: Sequence[Peer]
    seconds: float = 0.4
    ours: Peer = dataclasses.field(default_factory=Ours)

    def contestants(self, case: Case) -> list[Peer]:
        """cuflash, and its peers, unless the case is about a variant of cuflash."""
        if case.variant:
            return [self.ours]
        peers = [peer for peer in self.peers if peer.measured_in(case.group)]
        return [self.ours, *(peer for peer in peers if case.everyone or not peer.slow)]

    def expected(self, case: Case) -> float:
        """Seconds a case takes, about."""
        each = self.seconds + _WARM_UP_SECONDS if case.group not in _FIXED_SECONDS else _FIXED_SECONDS[case.group] / 3
        return 0.3 + sum(peer.setup_seconds + each for peer in self.contestants(case))


def seconds_each(quick: bool) -> float:
    """Of timing, for each implementation and case."""
    return 0.15 if quick else 0.4


def expected_seconds(cases: Sequence[Case], run: Run) -> dict[str, float]:
    """{group: about how long its cases take}."""
    return {g: sum(run.expected(c) for c in cases if c.group == g) for g in GROUPS if any(c.group == g for c in cases)}


def bench(cases: Sequence[Case], run: Run, results: Results, minutes: float | None = None, **watched: Any) -> None:
    """Ceilings, then `cases`, into `results`; the keywords of `measure` watch it."""
    began = time.monotonic()
    try:
        results.ceilings = timing.ceilings(run.clock, 2 * run.seconds)
    except Exception as error:
        results.notes.append(f"ceilings are not measured: {message(error)}")
    if minutes is not None:
        minutes = max(0.0, minutes - (time.monotonic() - began) / 60)
    measure(cases, run, results, minutes, **watched)
    if run.clock.gpu:
        results.clocks |= {f"{name}_after": value for name, value in clocks().items()}


def measure(
    cases: Sequence[Case], run: Run, results: Results, minutes: float | None = None,
    progress: Callable[[Case, int, int], None] = lambda case, done, of: None,
) -> None:  # fmt: skip
    """Measure `cases`, in their order, into `results.rows`; what is left off for lack of time is told in its notes.

    A case that comes again takes the place of its earlier rows: numbers beside one another are of the same turns.
    """
    began = time.monotonic()
    dropped: list[Case] = []
    slower = 1.0  # than expected, so far
    planned = 0.0
    found: dict[tuple[str, str], list[Row]] = {}
    for n, case in enumerate(cases):
        elapsed = time.monotonic() - began
        if minutes is not None and elapsed + slower * run.expected(case) > minutes * 60:
            dropped = list(cases[n:])
            break
        progress(case, n, len(cases))
        rows = rows_of(case, run)
        found |= {key: [row for row in rows if (row.op, row.case) == key] for key in {(r.op, r.case): 0 for r in rows}}
        results.rows = [row for of_case in found.values() for row in of_case]
        try:
            run.clock.wait()
        except Exception as error:  # a kernel went astray: this process can use the GPU no more
            results.notes.append(f"the run ends at {case.op}: {case.name}: {message(error)}")
            break
        planned += run.expected(case)
        slower = (time.monotonic() - began) / planned
    if dropped:
        counts = {group: sum(case.group == group for case in dropped) for group in GROUPS}
        told = ", ".join(f"{count} of {group}" for group, count in counts.items() if count)
        results.notes.append(f"left off for lack of time ({minutes:g} minutes): {told}; --minutes gives it more")
    order = {group: i for i, group in enumerate(GROUPS)}
    results.rows.sort(key=lambda row: order.get(row.op.split()[0], len(order)))  # stable


def possible(cases: Sequence[Case], run: Run, results: Results) -> list[Case]:
    """`cases` without those of cuflash in PyTorch, where PyTorch is not here, those this GPU is too small for, and
    those that are measured again with slow peers, where there are none."""
    if not any(peer.slow for peer in run.peers):
        once = {(case.op, case.name) for case in cases if not case.everyone}
        cases = [case for case in cases if not case.everyone or (case.op, case.name) not in once]
    chosen = list(cases)
    if any(case.variant.startswith("PyTorch") for case in cases) and not _torch_serves(run.clock):
        chosen = [case for case in cases if not case.variant.startswith("PyTorch")]
        results.notes.append("cuflash in PyTorch is not measured: PyTorch is not here, or sees no GPU")
    room = run.clock.memory()
    small = [case for case in chosen if room is None or _NEEDED * case.bytes <= room]
    if len(small) < len(chosen):
        names = ", ".join(f"{case.op}: {case.name}" for case in chosen if case not in small)
        results.notes.append(f"not measured for want of memory: {names}")
    return small


def _torch_serves(clock: Clock) -> bool:
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return False
    return not clock.gpu or torch.cuda.is_available()


def rows_of(case: Case, run: Run) -> list[Row]:
    """The rows of one case. Nothing that an implementation raises comes out of it, only a row that says so."""
    special = {"latency": _latency, "memory": _memory, "accuracy": _accuracy}.get(case.group, _timed)
    try:
        inputs = Inputs(case.problem, run.clock, gradients=case.direction != "forward")
    except Exception as error:  # out of memory, for one: nobody can be measured
        return [Row(case.op, case.name, peer.name, error=message(error)) for peer in run.contestants(case)]
    try:
        return special(case, run, inputs)
    finally:
        del inputs
        _release(run.clock)


def _release(clock: Clock) -> None:
    """Give the memory of what was prepared to whoever comes next."""
    with contextlib.suppress(Exception):  # of a GPU that answers no more, which the next wait tells
        clock.release()


def _timed(case: Case, run: Run, inputs: Inputs) -> list[Row]:
    prepared, rows = _prepare(case, run, inputs)
    times = timing.take_turns(prepared, run.clock, run.seconds)
    rows |= {name: _row(case, name, times[name], prepared[name]) for name in times}
    return [rows[peer.name] for peer in run.contestants(case)]


def _row(case: Case, name: str, found: Timing | str, prepared: Prepared) -> Row:
    if isinstance(found, str):
        return Row(case.op, case.name, name, error=found)
    more = dict(prepared.more)
    if case.group == "varlen":
        more["tokens_per_s"] = round(sum(case.problem.q_lens) / found.ms * 1e3)
    if not case.by_bytes:
        return Row(case.op, case.name, name, found.ms, found.spread, tflops=case.flops / found.ms / 1e9, more=more)
    more["kv_mib"] = case.problem.kv_bytes / 2**20
    return Row(case.op, case.name, name, found.ms, found.spread, gbps=case.bytes / found.ms / 1e6, more=more)


def _prepare(case: Case, run: Run, inputs: Inputs) -> tuple[dict[str, Prepared], dict[str, Row]]:
    """({name: who gives the right result}, {name: a row with what went wrong with the others})."""
    checker = Checker(case, inputs)
    prepared, rows = {}, {}
    for peer in run.contestants(case):
        try:
            one = peer.prepare(case, inputs)
            wrong = checker.wrong(one)
            if wrong is None:
                prepared[peer.name] = one
                continue
        except NotTaken as refused:
            wrong = f"does not take this: {refused}"
        except Missing as missing:
            wrong = str(missing)
        except Exception as error:
            wrong = message(error)
        rows[peer.name] = Row(case.op, case.name, peer.name, error=wrong)
        _release(run.clock)
    return prepared, rows


class Checker:
    """Results of a case, on the first copy of its inputs, against attention in float64: the longest sequence and the
    last that is not a mere handful, for the last key head. The right answer is worked out once."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self.case, self.inputs, self.xp = case, inputs, inputs.clock.xp
        p = case.problem
        self.group = p.heads // p.heads_kv
        longest = max(range(p.batch), key=lambda b: p.k_lens[b])
        last = [b for b in range(p.batch) if p.k_lens[b] >= 16]
        self.sequences = sorted({longest, *last[-1:]})
        self._right: dict[int, dict[str, Any]] = {}

    def right(self, b: int) -> dict[str, Any]:
        if b not in self._right:
            arrays = self.inputs.copies[0] | self.inputs.shared
            gradients = self.case.direction != "forward"
            head = self.case.problem.heads_kv - 1
            self._right[b] = oracle.solve(self.case.problem, arrays, b, head, self.xp, gradients)
        return self._right[b]

    def pairs(self, prepared: Prepared) -> Iterable[tuple[str, Any, Any]]:
        """(name, what was computed, what is right) of every array that can be compared."""
        p = self.case.problem
        began = time.perf_counter()
        result = prepared.calls[0]()
        self.inputs.clock.wait()
        prepared.more["first_ms"] = (time.perf_counter() - began) * 1e3
        arrays = prepared.arrays(result)
        self.inputs.clock.wait()
        for b in self.sequences:
            for name, x in arrays.items():
                rows = oracle.slice_of(p, x, "k" if name in ("dk", "dv") else "q", b)
                wide = name in ("out", "dq")
                yield name, rows[:, -self.group :] if wide else rows[:, -1], self.right(b)[name]

    def wrong(self, prepared: Prepared) -> str | None:
        """What is wrong with the results, or None."""
        for name, got, right in self.pairs(prepared):
            if (found := oracle.difference(self.case.problem, name, got, right, self.xp)) is not None:
                return f"wrong result: {found}"
        return None


# --- accuracy and memory ----------------------------------------------------------------------------------------------


def _accuracy(case: Case, run: Run, inputs: Inputs) -> list[Row]:
    """The errors of every implementation against float64, out's and (direction both) those of the gradients."""
    rows = []
    directions = ["forward"] if case.direction == "forward" else ["forward", "both"]
    for peer in run.contestants(case):
        more: dict[str, Any] = {}
        try:
            for direction in directions:
                one = dataclasses.replace(case, direction=direction)
                checker = Checker(case, inputs)
                for name, got, right in checker.pairs(peer.prepare(one, inputs)):
                    if name not in more:  # of the longest sequence
                        more[name] = oracle.statistics(got, right, checker.xp)
            rows.append(Row(case.op, case.name, peer.name, more=more))
        except NotTaken as refused:
            rows.append(Row(case.op, case.name, peer.name, error=f"does not take this: {refused}"))
        except Exception as error:
            rows.append(Row(case.op, case.name, peer.name, error=message(error)))
    return rows


def _memory(case: Case, run: Run, inputs: Inputs) -> list[Row]:
    """Bytes that a call holds at most, beside its inputs, what it returns among them; of cuflash also its launches."""
    prepared, rows = _prepare(case, run, inputs)
    for name, one in prepared.items():
        try:
            one.calls[0]()
            with _launches() as launched:
                peak = run.clock.bytes_at_peak(one.calls[0], one.framework)
        except Exception as error:
            rows[name] = Row(case.op, case.name, name, error=message(error))
            continue
        if peak is None:
            rows[name] = Row(case.op, case.name, name, error=f"nothing counts the bytes of {one.framework} here")
        else:
            launches = {"launches": len(launched)} if name == OURS else {}
            rows[name] = Row(case.op, case.name, name, more={"bytes": peak, **launches})
    return [rows[peer.name] for peer in run.contestants(case)]


@contextlib.contextmanager
def _launches() -> Iterator[list[str]]:
    """The kernels of cuflash that are launched while this lasts."""
    launched: list[str] = []
    launch = module.launch_cuda

    def noting(kernel: Any, *rest: Any) -> None:
        launched.append(kernel.spec.name)
        launch(kernel, *rest)

    with mock.patch.object(module, "launch_cuda", noting):
        yield launched


# --- latency ----------------------------------------------------------------------------------------------------------


def _latency(case: Case, run: Run, inputs: Inputs) -> list[Row]:
    """What a warm call costs the host; of the first case also what a first call costs, in a process of its own."""
    prepared, rows = _prepare(case, run, inputs)
    rows = {name: dataclasses.replace(row, case=f"warm call: {case.name}") for name, row in rows.items()}
    for name, one in prepared.items():
        try:
            found: Timing | str = timing.host_time(one.calls[0], run.clock)
        except Exception as error:
            found = message(error)
        label = f"warm call: {case.name}"
        if isinstance(found, str):
            rows[name] = Row(case.op, label, name, error=found)
        else:
            rows[name] = Row(case.op, label, name, found.ms, found.spread, more={"first_ms": one.more["first_ms"]})
    found_rows = [rows[peer.name] for peer in run.contestants(case)]
    if not case.variant and case.problem.layout == "dense" and case.problem.mask.kind == "causal":
        found_rows += [*first_calls(run.clock, 3 if run.seconds > 0.2 else 1), _new_lengths(run.clock)]
    return found_rows


def _new_lengths(clock: Clock) -> Row:
    """The host's time for a call with a length that was not there before: nothing is compiled for it."""
    case, xp = "call with a length not seen before", clock.xp
    try:
        inputs = [xp.zeros((1, n, 4, 64), xp.float16) for n in range(65, 86)]
        clock.wait()
        samples = []
        for x in inputs:
            began = time.perf_counter()
            cuflash.attention(x, x, x, causal=True)
            samples.append((time.perf_counter() - began) * 1e3)
            clock.wait()
    except Exception as error:
        return Row("latency", case, OURS, error=message(error))
    found = Timing.of(samples)
    return Row("latency", case, OURS, found.ms, found.spread)


_FIRST_CALL = """
import time
began = time.perf_counter()
import cuflash
imported = time.perf_counter() - began
import {xp} as xp
x = xp.zeros((1, 64, 4, 64), xp.float16)
{wait}
began = time.perf_counter()
cuflash.attention(x, x, x, causal=True)
{wait}
print(imported, time.perf_counter() - began)
"""


def first_calls(clock: Clock, repeats: int = 3) -> list[Row]:
    """Importing cuflash, and a process's first call: with an empty cache of kernels, then with the cache kept."""
    xp = "cupy" if clock.gpu else "numpy"
    script = _FIRST_CALL.format(xp=xp, wait="xp.cuda.get_current_stream().synchronize()" if clock.gpu else "")
    imported: list[float] = []
    cold: list[float] = []
    warm: list[float] = []
    try:
        for _ in range(repeats if clock.gpu else 1):
            with tempfile.TemporaryDirectory() as cache:
                for samples in (cold, warm):
                    seconds = _fresh(script, cache)
                    imported.append(seconds[0] * 1e3)
                    samples.append(seconds[1] * 1e3)
    except (OSError, ValueError, RuntimeError, subprocess.TimeoutExpired) as error:
        return [Row("latency", "first call", OURS, error=message(error))]
    named = {"import cuflash": imported, "first call, nothing cached": cold, "first call, cubin on disk": warm}
    return [
        Row("latency", case, OURS, stats.median(samples), max(samples) - min(samples))
        for case, samples in named.items()
    ]


def _fresh(script: str, cache: str) -> list[float]:
    package = str(Path(cuflash.__file__).parents[1])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": path, "CUFLASH_CACHE_DIR": cache}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["it ended without a word"])[-1])
    return [float(word) for word in done.stdout.split()]
