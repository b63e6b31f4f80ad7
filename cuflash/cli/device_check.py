"""`cuflash device-check`: everything that only a GPU can show, in one command, written to one JSON file.

    primitives   each wrapper of an instruction against its NumPy meaning        tests/hw, the tests marked gpu
    tests        every other test marked gpu
    first call   seconds of a process's first attention: nothing cached, then with the cubin on disk
    forward      CUDA-event medians beside PyTorch's own attentions, where PyTorch can be imported

Runs from a bare checkout, `PYTHONPATH=. python3 -m cuflash device-check`, with CuPy, NumPy, cuda-bindings, ml_dtypes,
hypothesis, typer, rich and pytest. Without a GPU it says so and ends with status 2; a failed test or check gives 1.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from ..dtypes import bfloat16
from . import machine

CHECKOUT = Path(__file__).resolve().parents[2]
RESULTS = (CHECKOUT if (CHECKOUT / "tests").is_dir() else Path()) / "benchmarks" / "results"
_ROTATED_BYTES = 512 << 20  # inputs are rotated over this much memory, several times any L2, so none is found cached
_REPEATS, _WARMUPS = 30, 5


@dataclasses.dataclass(frozen=True)
class Case:
    """One timed shape: `batch` sequences of `length`, or packed ones of `lengths`; self-attention in bfloat16."""

    lengths: tuple[int, ...]
    heads: int
    heads_kv: int
    head_dim: int
    causal: bool
    packed: bool = False

    @property
    def flops(self) -> int:
        """Of both matrix products over the pairs a query may see: padding and masked tiles count nothing."""
        pairs = sum(n * (n + 1) // 2 if self.causal else n * n for n in self.lengths)
        return 4 * self.heads * self.head_dim * pairs

    @property
    def bytes(self) -> int:
        """Of q, k, v and out."""
        return 2 * sum(self.lengths) * self.head_dim * 2 * (self.heads + self.heads_kv)

    @property
    def name(self) -> str:
        n, b = self.lengths[0], len(self.lengths)
        lengths = f"packed {b} of {min(self.lengths)} to {max(self.lengths)}" if self.packed else f"{b} x {n}"
        groups = "" if self.heads == self.heads_kv else f"/{self.heads_kv}"
        return f"{lengths}, heads {self.heads}{groups} x {self.head_dim}{', causal' if self.causal else ''}"


def cases() -> list[Case]:
    """The shapes: 16,384 tokens each, dense from short to long, one grouped, one packed."""
    dense = [
        Case((n,) * (16384 // n), 2048 // d, 2048 // d, d, causal)
        for d in (64, 128)
        for n in (1024, 4096, 16384)
        for causal in (False, True)
    ]
    ragged = np.random.default_rng(0).integers(64, 2048, size=64)
    lengths = tuple(int(n) for n in ragged[np.cumsum(ragged) <= 16384])
    return [
        *dense, Case((4096,) * 4, 16, 2, 128, True), Case(lengths, 16, 16, 128, False, True),
        Case(lengths, 16, 16, 128, True, True),
    ]  # fmt: skip


def device_check(
    out: Annotated[Path, typer.Option(help="Folder of the result file.")] = RESULTS,
    tests: Annotated[bool, typer.Option(help="Run the tests.")] = True,
    speed: Annotated[bool, typer.Option(help="Measure.")] = True,
    commit: Annotated[str | None, typer.Option(help="Name of the state measured, if git cannot tell.")] = None,
) -> None:
    """Run the GPU tests and a short benchmark; write one JSON file."""
    from rich.console import Console

    console = Console()
    missing = _missing()
    if missing:
        console.print(f"device-check: {missing}", soft_wrap=True, highlight=False)
        raise typer.Exit(2)

    result: dict[str, Any] = {"machine": describe(commit)}
    failed = False
    if tests:
        for stage, arguments, seconds in (
            ("primitives", ["tests/hw"], 120),
            ("tests", ["tests", "--ignore=tests/hw"], 240),
        ):
            with console.status(f"{stage}: pytest -m gpu {' '.join(arguments)}"):
                result[stage] = run_pytest(arguments, seconds)
            failed |= not result[stage]["ok"]
            console.print(f"{stage:12} {summary(result[stage])}", highlight=False)
    if speed:
        with console.status("first call"):
            result["first_call"] = first_call_seconds()
        console.print(f"{'first call':12} {result['first_call']}", highlight=False)
        with console.status("forward") as status:
            result["host_us"] = host_microseconds()
            result["forward"] = measure_forward(lambda case: status.update(f"forward: {case.name}"))
        _print_forward(console, result)

    path = write(result, out)
    console.print(f"written to {path}", highlight=False)
    raise typer.Exit(int(failed))


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


def describe(commit: str | None = None) -> dict[str, Any]:
    """What was measured, on what, with what."""
    from ..jit import nvrtc

    gpu, driver = machine.gpus()[0], machine.driver()
    if commit is None:
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=CHECKOUT, capture_output=True, text=True
        )
        commit = git.stdout.strip() or "unknown"
    names = ("cupy", "numpy", "torch", "cuda-bindings")
    versions = {name: version for name in names if (version := machine.installed(name))} | machine.cupy_wheels()
    return {
        "gpu": gpu.name,
        "capability": list(gpu.capability),
        "driver_cuda": ".".join(map(str, driver.cuda)) if driver else None,
        "nvrtc": ".".join(map(str, nvrtc.version())),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "commit": commit,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _python(arguments: Sequence[str], seconds: float, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this Python, in the checkout and on its cuflash."""
    path = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": path} | environment
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=CHECKOUT, env=env, capture_output=True, text=True, timeout=seconds)


# --- tests ------------------------------------------------------------------------------------------------------------


def run_pytest(arguments: Sequence[str], seconds: float) -> dict[str, Any]:
    """Run the tests marked gpu among `arguments`; {ok, passed, failed, skipped, seconds, failures} or {ok, error}.

    The options of pyproject.toml are left out: they ask for plugins that a bare checkout does not have.
    """
    if not (CHECKOUT / "tests").is_dir():
        return {"ok": False, "error": f"{CHECKOUT} is no checkout, so there are no tests to run"}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = ["-m", "pytest", "-o", "addopts=", "-q", "-m", "gpu", f"--junitxml={report}", *arguments]
        try:
            done = _python(command, seconds)
        except subprocess.TimeoutExpired:
            return {"ok": False, "error": f"not done after {seconds:.0f} s"}
        if not report.is_file():
            return {"ok": False, "error": (done.stdout + done.stderr)[-2000:]}
        return read_junit(report.read_text())


def read_junit(text: str) -> dict[str, Any]:
    """The counts and the failures of pytest's XML report.

    >>> read_junit('<testsuites><testsuite time="1.5"><testcase classname="a" name="b"/></testsuite></testsuites>')
    {'ok': True, 'passed': 1, 'failed': 0, 'skipped': 0, 'seconds': 1.5, 'failures': []}
    """
    suite = ET.fromstring(text).find("testsuite")
    assert suite is not None
    tests = list(suite.iter("testcase"))
    skipped = sum(test.find("skipped") is not None for test in tests)
    failures = [
        {"test": f"{test.get('classname')}::{test.get('name')}", "message": (bad.get("message") or "")[:500]}
        for test in tests
        for bad in (*test.findall("failure"), *test.findall("error"))
    ]
    failed = len({f["test"] for f in failures})
    passed = len(tests) - skipped - failed
    return {
        "ok": failed == 0 and passed > 0,
        "passed": passed,
        "failed": failed,
        "skipped": skipped,
        "seconds": float(suite.get("time", 0)),
        "failures": failures,
    }


def summary(stage: dict[str, Any]) -> str:
    """One line on a stage of tests.

    >>> summary({"ok": False, "error": "no tests"})
    'no tests'
    """
    if "error" in stage:
        return stage["error"]
    counts = "{passed} passed, {failed} failed, {skipped} skipped in {seconds:.0f} s".format(**stage)
    return "\n".join([counts, *(f"    {f['test']}: {f['message'].splitlines()[0]}" for f in stage["failures"][:10])])


# --- speed ------------------------------------------------------------------------------------------------------------

_FIRST_CALL = """
import time, cupy, cuflash
x = cupy.zeros((64, 4, 64), cupy.float16)
cupy.cuda.get_current_stream().synchronize()
began = time.perf_counter()
cuflash.attention(x, x, x, cu_seqlens_q=[0, 64], cu_seqlens_k=[0, 64])
cupy.cuda.get_current_stream().synchronize()
print(time.perf_counter() - began)
"""


def first_call_seconds() -> dict[str, float | str]:
    """Seconds of a process's first attention with an empty cache folder, then in a new process with the folder kept."""
    seconds: dict[str, float | str] = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold", "on_disk"):
            done = _python(["-c", _FIRST_CALL], 120, CUFLASH_CACHE_DIR=cache)
            seconds[name] = float(done.stdout) if done.returncode == 0 else done.stderr[-500:]
    return seconds


def host_microseconds(calls: int = 500) -> float:
    """What a warm call costs the host: the time in which many small ones are issued, a call."""
    import cupy

    from ..api import attention

    x = cupy.zeros((1, 64, 4, 64), cupy.float16)
    for _ in range(20):
        attention(x, x, x)
    stream = cupy.cuda.get_current_stream()
    stream.synchronize()
    rounds = []
    for _ in range(5):  # short rounds, so that the launch queue never fills
        began = time.perf_counter()
        for _ in range(calls // 5):
            attention(x, x, x)
        rounds.append((time.perf_counter() - began) / (calls // 5))
        stream.synchronize()
    return statistics.median(rounds) * 1e6


def measure_forward(on_case: Callable[[Case], None]) -> list[dict[str, Any]]:
    """Median milliseconds and TFLOP/s of every case, ours and PyTorch's."""
    import cupy

    from ..api import attention

    rows = []
    for case in cases():
        on_case(case)
        copies = min(16, max(2, _ROTATED_BYTES // case.bytes))
        inputs = [_random_inputs(case, seed) for seed in range(copies)]
        keywords: dict[str, Any] = {"causal": case.causal}
        if case.packed:
            bounds = cupy.asarray(np.cumsum([0, *case.lengths]).astype(np.int32))
            keywords |= {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds}
            keywords |= {"max_seqlen_q": max(case.lengths), "max_seqlen_k": max(case.lengths)}
        ours = _timed(lambda q, k, v: attention(q, k, v, **keywords), inputs, case)  # noqa: B023
        row: dict[str, Any] = {"case": dataclasses.asdict(case), "name": case.name, "cuflash": ours}
        if not case.packed:
            row |= _measure_torch(case, inputs, attention(*inputs[0], **keywords))
        rows.append(row)
        del inputs
        cupy.get_default_memory_pool().free_all_blocks()
    return rows


def _random_inputs(case: Case, seed: int) -> tuple[Any, Any, Any]:
    """q, k, v of normal draws in bfloat16, as CuPy arrays; rounded to nearest by their bits."""
    import cupy

    random = cupy.random.default_rng(seed)
    total, batch = sum(case.lengths), len(case.lengths)

    def draw(heads: int) -> Any:
        rows = (total,) if case.packed else (batch, total // batch)
        bits = random.standard_normal((*rows, heads, case.head_dim), dtype=cupy.float32).view(cupy.uint32)
        return ((bits + 0x8000) >> 16).astype(cupy.uint16).view(bfloat16.numpy)

    return draw(case.heads), draw(case.heads_kv), draw(case.heads_kv)


def _timed(call: Callable[..., Any], inputs: Sequence[tuple[Any, ...]], case: Case) -> dict[str, float]:
    """{ms, tflops}: the median of CUDA-event times of single calls that take the inputs in turn."""
    import cupy

    events = [(cupy.cuda.Event(), cupy.cuda.Event()) for _ in range(_REPEATS)]
    for i in range(_WARMUPS):
        call(*inputs[i % len(inputs)])
    cupy.cuda.get_current_stream().synchronize()
    for i, (start, end) in enumerate(events):
        start.record()
        call(*inputs[i % len(inputs)])
        end.record()
    cupy.cuda.get_current_stream().synchronize()
    ms = statistics.median(cupy.cuda.get_elapsed_time(start, end) for start, end in events)
    return {"ms": ms, "tflops": case.flops / ms / 1e9}


def _measure_torch(case: Case, inputs: Sequence[tuple[Any, ...]], ours: Any) -> dict[str, Any]:
    """Each of PyTorch's scaled_dot_product_attention kernels on the same memory, on the stream CuPy uses: the default.

    {name: {ms, tflops, max_difference} or {error}}; empty where PyTorch cannot be imported or sees no GPU.
    """
    try:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:
        return {}
    if not torch.cuda.is_available():
        return {}
    there = [tuple(torch.from_dlpack(x).transpose(1, 2) for x in qkv) for qkv in inputs]
    mine = torch.from_dlpack(ours).float()

    def attend(q: Any, k: Any, v: Any) -> Any:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=case.causal, enable_gqa=case.heads != case.heads_kv
        )

    results: dict[str, Any] = {}
    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
        key = f"torch {name.removesuffix('_ATTENTION').lower()}"
        try:
            with torch.no_grad(), sdpa_kernel(getattr(SDPBackend, name)):
                difference = (attend(*there[0]).transpose(1, 2).float() - mine).abs().max().item()
                results[key] = _timed(attend, there, case) | {"max_difference": difference}
        except RuntimeError as error:  # this kernel does not take the case, or is not built in
            results[key] = {"error": str(error).splitlines()[0][:200]}
    return results


def _print_forward(console: Any, result: dict[str, Any]) -> None:
    from rich.table import Table

    rows = result["forward"]
    names = list(dict.fromkeys(n for row in rows for n, v in row.items() if isinstance(v, dict) and n != "case"))
    table = Table("TFLOP/s, bfloat16 forward", *names, title=f"host cost of a call {result['host_us']:.1f} us")
    for row in rows:
        cells = [f"{row[n]['tflops']:.0f}" if "tflops" in row.get(n, {}) else "-" for n in names]
        table.add_row(row["name"], *cells)
    console.print(table)


# --- the file ---------------------------------------------------------------------------------------------------------


def write(result: dict[str, Any], folder: Path) -> Path:
    """Write `result` to <gpu>-<date>-<commit>.json in `folder`."""
    facts = result["machine"]
    day = facts["date"].replace(":", "").split("+")[0]
    gpu = re.sub(r"[^a-z0-9]+", "-", facts["gpu"].lower().removeprefix("nvidia ")).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{gpu}-{day}-{facts['commit']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path
