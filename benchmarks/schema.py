"""The file of results, `benchmarks/results/<gpu>-<date>-<commit>.json`: what is in it, and how it is written and read.

A file holds

    schema     1
    commit     of the code measured; clean: whether its tree was, null where nothing tells
    date       of the run, UTC
    gpu        its name; "none (harness test)" where the harness was tried on a CPU, "none (offline)" for what is
               measured without a GPU, "none (machine code)" for models: none is ever shown beside a GPU's speed
    capability, driver, versions, clocks
    ceilings   what this GPU reached in the same run: matmul_tflops, copy_gbps, launch_us
    peers      name: version of those measured;  skipped: name: why it was not
    notes      lines a reader needs, such as what was left out for lack of time
    rows       op, case, impl, ms, spread, tflops or gbps, error

In a row `impl` is "cuflash" for the default path of this library; its variants are told apart in `case`. ms is a median
and spread the width of the middle half of what was measured, in milliseconds. tflops counts the products of the pairs
that the mask lets see one another, and no others; gbps the bytes of inputs and outputs, each once. A row with an
`error` has no time. What some rows have beside that is under `more`: first_ms, how long the first call of this case
took, compiling included where something compiles; tokens_per_s; mask_ms, what a block mask took to build.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cuflash.cli import machine

SCHEMA = 1
OURS = "cuflash"
HARNESS_TEST, OFFLINE = "none (harness test)", "none (offline)"  # in place of a GPU's name
STAND_IN = "none (driver stand-in)"  # what the driver of tests/fake_cuda calls its devices
STATIC = "none (machine code)"  # machine_code.py
HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent
RESULTS = (HERE if (CHECKOUT / "tests").is_dir() else Path("benchmarks")) / "results"
STAMP = CHECKOUT / "COMMIT"


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement, or why there is none.

    >>> Row("forward", "1 x 512", "cuflash", ms=0.5, spread=0.01, tflops=600.0).as_json()
    {'op': 'forward', 'case': '1 x 512', 'impl': 'cuflash', 'ms': 0.5, 'spread': 0.01, 'tflops': 600.0, 'error': None}
    """

    op: str
    case: str
    impl: str
    ms: float | None = None
    spread: float | None = None
    tflops: float | None = None
    gbps: float | None = None
    error: str | None = None
    more: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.error is not None and self.ms is not None:
            raise ValueError(f"a row with error={self.error!r} must have no time, not ms={self.ms}")

    def as_json(self) -> dict[str, Any]:
        row = dataclasses.asdict(self)
        for name in ("tflops", "gbps", "more"):
            if not row[name]:
                del row[name]
        return {name: float(f"{x:.6g}") if isinstance(x, float) else x for name, x in row.items()}


@dataclasses.dataclass
class Results:
    """What a file holds. `more` are further members of its top level, such as the stages of device-check."""

    gpu: str
    commit: str
    clean: bool | None
    date: str
    capability: list[int] | None = None
    driver: str | None = None
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    clocks: dict[str, float] = dataclasses.field(default_factory=dict)
    ceilings: dict[str, float] = dataclasses.field(default_factory=dict)
    peers: dict[str, str] = dataclasses.field(default_factory=dict)
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    rows: list[Row] = dataclasses.field(default_factory=list)
    more: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        return not self.gpu.startswith("none (")

    @property
    def failed(self) -> list[Row]:
        """The rows in which cuflash itself raised or answered wrongly."""
        return [row for row in self.rows if row.impl == OURS and row.error is not None]

    @property
    def file_name(self) -> str:
        """
        >>> Results("NVIDIA H200", "0123456789ab", True, "2026-01-02T03:04:05+00:00").file_name
        'h200-2026-01-02T030405-0123456789ab.json'
        """
        words = re.sub(r"[^a-z0-9]+", "-", self.gpu.lower().removeprefix("nvidia ")).strip("-")
        dirty = "-dirty" if self.clean is False else ""
        return f"{words}-{self.date.replace(':', '').split('+')[0]}-{self.commit}{dirty}.json"

    def as_json(self) -> dict[str, Any]:
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("rows", "more")}
        return {"schema": SCHEMA, **own, **self.more, "rows": [row.as_json() for row in self.rows]}


def write(results: Results, out: Path | None = None) -> Path:
    """Write `results` to `out`: a file if it ends in .json, else a folder, where the file is named by what it holds."""
    out = RESULTS if out is None else out
    path = out if out.suffix == ".json" else out / results.file_name
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = results.as_json()
    rows = ",\n".join("  " + json.dumps(row) for row in whole.pop("rows"))  # a row a line: a difference can be read
    head = json.dumps(whole, indent=1).removesuffix("\n}")
    text = f'{head},\n "rows": [\n{rows}\n ]\n}}\n'
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
    return path


def read(path: Path) -> Results:
    """The results in a file. Raises ValueError, with the path, for what is not such a file."""
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        if whole.get("schema") != SCHEMA:
            raise ValueError(f"schema={whole.get('schema')!r} must be {SCHEMA}")
        names = {f.name for f in dataclasses.fields(Results)} - {"rows", "more"}
        more = {name: value for name, value in whole.items() if name not in names | {"rows", "schema"}}
        rows = [Row(**row) for row in whole["rows"]]
        return Results(**{n: whole[n] for n in names if n in whole}, rows=rows, more=more)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is no file of results: {error}") from error


def read_all(folder: Path) -> list[tuple[Path, Results]]:
    """Every file of a folder, the oldest first."""
    return sorted(((path, read(path)) for path in folder.glob("*.json")), key=lambda pair: (pair[1].date, pair[0].name))


# --- what was measured, and on what -----------------------------------------------------------------------------------


def describe(gpu: str | None = None, commit: str | None = None) -> Results:
    """Results without rows: this machine, and the commit. `gpu` takes the place of the first GPU's name."""
    name, clean = commit_measured(commit)
    results = Results(gpu or "none", name, clean, now(), versions=versions())
    if gpu is None:
        first = machine.gpus()[0]
        results.gpu, results.capability = first.name, list(first.capability)
        results.driver, results.clocks = driver_version(), clocks()
    return results


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def commit_measured(named: str | None = None, checkout: Path = CHECKOUT) -> tuple[str, bool | None]:
    """(commit, whether the tree was clean): as named, else by git, else by the stamp.

    The stamp is for copies without a .git: a file COMMIT in the checkout, whose words are the commit and, if it holds
    more than that commit, `dirty`; `git rev-parse HEAD > COMMIT` writes one. A name may end in -dirty likewise.
    """
    if named is not None:
        return named.removesuffix("-dirty"), False if named.endswith("-dirty") else None
    if (checkout / ".git").exists():
        ask = ["git", "-C", str(checkout)]
        try:
            head = subprocess.run([*ask, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
            status = subprocess.run([*ask, "status", "--porcelain", "-uall"], capture_output=True, text=True)
        except OSError:  # no git here
            head = None
        if head is not None and head.returncode == 0 and status.returncode == 0:
            left = [line for line in status.stdout.splitlines() if not _made_by_measuring(line[3:])]
            return head.stdout.strip(), not left
    stamp = checkout / STAMP.name
    words = stamp.read_text(encoding="utf-8").split() if stamp.is_file() else []
    return (words[0][:12], "dirty" not in words) if words else ("unknown", None)


def _made_by_measuring(path: str) -> bool:
    """Whether a path is a stamp or a result: what a run leaves, which does not change what the next one measures."""
    return path == STAMP.name or path.startswith("benchmarks/results/")


def versions() -> dict[str, str]:
    """Of Python, of the compiler of kernels, and of every package that computes or is measured."""
    names = ("numpy", "cuda-bindings", "torch", "triton", "jax", "jaxlib", "flash-attn", "flash-attn-3", "flash-attn-4")
    names += ("flashinfer-python", "xformers", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
    found = {name: version for name in names if (version := machine.installed(name)) is not None}
    return {
        "cuflash": _own_version(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **machine.cupy_wheels(),
        **found,
        **({"nvrtc": compiler} if (compiler := _nvrtc()) else {}),
    }


def _own_version() -> str:
    import cuflash

    return cuflash.__version__


def _nvrtc() -> str | None:
    from cuflash.errors import CuflashError
    from cuflash.jit import nvrtc

    try:
        return ".".join(map(str, nvrtc.version()))
    except (CuflashError, ImportError):
        return None


def driver_version() -> str | None:
    """As nvidia-smi names it, such as "580.82.07"; without it, the newest CUDA that the driver runs."""
    if answer := _nvidia_smi(["driver_version"]):
        return answer[0]
    found = machine.driver()
    return f"CUDA {'.'.join(map(str, found.cuda))}" if found else None


CLOCKS = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "sm_max_mhz": "clocks.max.sm",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}


def clocks() -> dict[str, float]:
    """Clocks, power and temperature of the first GPU at this moment; {} without nvidia-smi."""
    found = {}
    for name, text in zip(CLOCKS, _nvidia_smi(CLOCKS.values()), strict=False):
        try:
            found[name] = float(text)
        except ValueError:  # "[N/A]"
            continue
    return found


def _nvidia_smi(fields: Iterable[str]) -> list[str]:
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [word.strip() for word in done.stdout.split(",")] if done.returncode == 0 else []
