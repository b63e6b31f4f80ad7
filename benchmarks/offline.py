"""What can be measured without a GPU, labelled as what it is: nothing here is a speed of a kernel.

    host       a warm call on device arrays whose launch goes nowhere: what cuflash itself costs the host. The results'
               memory, the current stream and the launch are CuPy's, PyTorch's and the driver's, and left out; the
               tensors of PyTorch are stand-ins, which are slower to look into than real ones
    import     `import cuflash` in a new process
    compile    NVRTC with nothing cached, kernel by kernel
    emulator   how fast kernels run on the emulator: matrix instructions a second on one core
    counters   what a call's kernel does, counted on the emulator, over what it has to do at least: the products of the
               pairs that see one another, and each input read once. A tile is computed whole, and K and V are read once
               for every tile of queries, so neither ratio can be 1 where there are many
    reference  the NumPy backend of host arrays beside attention written in NumPy at first (on_numpy.py)
    code       what machine code says of every kernel: instructions a tile, shared memory over products, blocks an
               SM, what binds (machine_code.py)
    model      how busy the tensor cores of a Hopper GPU can be at most in each kernel's main loop, predicted from its
               machine code (cuflash/jit/sm_model.py)

Rows as in schema.py; a row's own numbers are under `more`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from cuflash import api, arch, dtypes, emulator, frameworks
from cuflash.cli import compile as compile_command
from cuflash.errors import ArgumentError, CuflashError
from cuflash.jit import module, sass
from cuflash.ops import backward_sm90, forward
from cuflash.settings import config

from . import machine_code, nowhere, on_numpy, schema
from .schema import OURS, Row

ARCH = "sm_90a"


def host(names: Sequence[str] = ("sm_80", ARCH), rounds: int = 25, calls: int = 200) -> Iterator[Row]:
    """Milliseconds of a warm call: of its thread, so that what else this machine does counts little."""
    rng = np.random.default_rng(0)
    rows = [rng.standard_normal((2, 128, 4, 64)).astype(np.float16) for _ in range(3)]
    bounds = np.array([0, 128, 256], np.int32)
    memory: dict[Any, Any] = {}
    makers: dict[str, Callable[[int, np.ndarray], Any]] = {"a stand-in for CuPy": nowhere.CupyArray}
    if importlib.util.find_spec("cupy"):
        makers = {"CuPy": nowhere.cupy_array}
    if importlib.util.find_spec("torch"):
        makers["PyTorch"] = nowhere.torch_tensor

    def empty(adapter: Any, shape: tuple[int, ...], dtype: dtypes.DType) -> Any:
        """The same memory each time: how long another library takes to give some is not asked here."""
        if (adapter, shape) not in memory:
            make = nowhere.torch_tensor if adapter is frameworks.torch else nowhere.CupyArray
            view = frameworks.torch.view if adapter is frameworks.torch else frameworks.cupy.view
            memory[adapter, shape] = view(make(1 << 40, np.empty(shape, dtype.numpy)))
        return memory[adapter, shape]

    def upload(adapter: Any, values: np.ndarray) -> Any:
        return empty(adapter, values.shape, dtypes.BY_NUMPY[values.dtype])

    for kind, make in makers.items():
        for name in names:
            with nowhere.no_gpu(name, launch=lambda *_: None, empty=empty, upload=upload), _no_gradient():
                q, k, v = (make((1 << 41) + (i << 30), x) for i, x in enumerate(rows))
                packed = [make((1 << 42) + (i << 30), x.reshape(256, 4, 64)) for i, x in enumerate(rows)]
                starts = make(1 << 43, bounds)
                bounded = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": 128}
                cases: dict[str, Callable[[int], Any]] = {
                    "dense": lambda i: api.attention(q, k, v, causal=True),  # noqa: B023 - called before the next round
                    "packed": lambda i: api.attention(packed[0], packed[1], packed[2], **bounded),  # noqa: B023
                    "mask_mod made anew": lambda i: api.attention(q, k, v, mask_mod=_window(i)),  # noqa: B023
                }
                milliseconds: dict[str, list[float]] = {case: [] for case in cases}
                for n in range(rounds + 1):  # the first, in which kernels are compiled, is not counted
                    for case, call in cases.items():
                        began = time.thread_time()
                        for i in range(calls):
                            call(i)
                        milliseconds[case] += [(time.thread_time() - began) / calls * 1e3] if n else []
                for case, found in milliseconds.items():
                    yield _timed("host", f"{kind}, {case}, {name}", found)


def _window(width: int) -> Callable[..., Any]:
    def mask_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (q_idx >= kv_idx) & (q_idx - kv_idx < width)

    return mask_mod


@contextlib.contextmanager
def _no_gradient() -> Iterator[None]:
    if importlib.util.find_spec("torch") is None:
        yield
        return
    import torch

    with torch.no_grad():
        yield


def importing(times: int = 5) -> Iterator[Row]:
    """Milliseconds of `import cuflash`."""
    script = "import time; t = time.perf_counter(); import cuflash; print(time.perf_counter() - t)"
    where = schema.CHECKOUT if (schema.CHECKOUT / "cuflash" / "__init__.py").is_file() else None

    def once() -> float:
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=where)
        return float(done.stdout)

    yield _timed("import", "cuflash", [once() * 1e3 for _ in range(times)])


def compiling(names: Sequence[str] = ("sm_80", ARCH)) -> Iterator[Row]:
    """Milliseconds of NVRTC, with nothing cached: of each kernel the Variant for head dim 128."""
    before = config.cache_dir
    with tempfile.TemporaryDirectory() as folder:
        config.cache_dir = folder
        try:
            for name in names:
                target = arch.named(name)
                for spec in _one_of_each(compile_command.specs(target)):
                    compiled = module.compile(spec, target)
                    yield Row("compile", f"{spec.name}, {name}", OURS, ms=round(compiled.cubin.compile_ms, 1))
        finally:
            config.cache_dir = before


def _one_of_each(specs: list[module.KernelSpec]) -> list[module.KernelSpec]:
    found: dict[str, module.KernelSpec] = {}
    for spec in specs:
        if spec.name not in found or _head_dim(spec) == 128 != _head_dim(found[spec.name]):
            found[spec.name] = spec
    return list(found.values())


def _head_dim(spec: module.KernelSpec) -> int:
    return getattr(spec.variant, "head_dim", 0)


def emulating() -> Iterator[Row]:
    """Matrix instructions a second; `cuflash doctor` shows the same."""
    yield Row("emulator", "mma.m16n8k16 on one core", OURS, more={"per_second": round(emulator.speed())})


def counting(length: int = 512, dims: Sequence[int] = (64, 128)) -> Iterator[Row]:
    """Matrix products and bytes of whole calls, over what these need at least."""
    for name in ("sm_80", ARCH):
        for d in dims:
            for causal in (False, True):
                pairs = length * (length + 1) // 2 if causal else length**2
                x = np.random.default_rng(0).standard_normal((4, 1, length, 2, d)).astype(np.float16)
                case = f"1 x {length}, heads 2 x {d}{', causal' if causal else ''}, {name}"
                q, k, v, dout = x
                with _emulated(name):
                    with emulator.counting() as counters:
                        result = api.attention(q, k, v, causal=causal, aux=("lse",))
                    yield _counted("forward", case, counters, 2 * 4 * d * pairs, x[:3].nbytes)
                    if name == "sm_80" and d == 64:
                        with emulator.counting() as counters:
                            api.attention_backward(dout, q, k, v, result.out, result.lse, causal=causal)
                        yield _counted("backward", case, counters, 2 * 10 * d * pairs, x.nbytes)


@contextlib.contextmanager
def _emulated(name: str) -> Iterator[None]:
    before = config.backend, config.arch
    config.backend, config.arch = "emulator", name
    try:
        yield
    finally:
        config.backend, config.arch = before


def _counted(what: str, case: str, counters: emulator.Counters, flop: int, read: int) -> Row:
    done = sum(count * flop_of(name) for name, count in counters.matrix_instructions.items())
    bytes_read = sum(counters.global_bytes_read.values())
    more = {
        "flop_over_least": round(done / flop, 3),
        "read_over_least": round(bytes_read / read, 3),
        "matrix_instructions": counters.total_matrix_instructions,
        "bytes_read": bytes_read,
        "bytes_written": sum(counters.global_bytes_written.values()),
        "bank_conflicts": sum(counters.bank_conflicts.values()),
    }
    return Row("counters", f"{what}, {case}", OURS, more=more)


def flop_of(instruction: str) -> int:
    """
    >>> flop_of("mma_m16n8k16_f16"), flop_of("wgmma_m64n128k16_bf16")
    (4096, 262144)
    """
    m, n, k = map(int, re.findall(r"(?<=[mnk])\d+", instruction)[:3])
    return 2 * m * n * k


def predicting() -> Iterator[Row]:
    """The share of the time that a Hopper GPU's tensor cores can be busy, for every Variant of its kernels."""
    target = arch.named(ARCH)
    for spec in (*forward.representative_sm90(target), *backward_sm90.representative(target)):
        compiled = module.compile(spec, target)
        loop = sass.functions(sass.disassemble(compiled.path))[spec.entry].loops[0]
        v = spec.variant
        if isinstance(v, backward_sm90.BackwardSm90Variant):
            tile, features = backward_sm90.predicted(v, loop), (("dropout", v.dropout), ("rich", v.rich))
        else:
            assert isinstance(v, forward.ForwardSm90Variant)
            tile, features = forward.predicted(v, loop), (("dropout", v.dropout), ("pages", v.paged))
        dims = f"{v.head_dim}" if v.head_dim == v.head_dim_v else f"{v.head_dim} and {v.head_dim_v}"
        extras = "".join(f", {name}" for name, on in features if on)
        case = f"{spec.name}, d {dims}, tile {v.tile.block_q} x {v.tile.block_k}{extras}"
        more = {
            "tensor_use": round(tile.tensor_use, 3),
            "issue_use": round(tile.issue_use, 3),
            "clocks": {name: round(getattr(tile, name)) for name in ("clocks", "tensor", "mufu", "shared", "issue")},
        }
        yield Row("model", case, OURS, more=more)


STAGES: dict[str, Callable[[], Iterator[Row]]] = {
    "host": host,
    "import": importing,
    "compile": compiling,
    "emulator": emulating,
    "counters": counting,
    "reference": on_numpy.rows,
    "code": machine_code.rows,
    "model": predicting,
}


def run(
    only: tuple[str, ...] = (), commit: str | None = None, on_row: Callable[[Row], None] = lambda row: None
) -> schema.Results:
    """Every stage, or those named. What cannot be measured here is in `skipped` with the reason."""
    unknown = set(only) - set(STAGES)
    if unknown:
        raise ArgumentError(f"{', '.join(sorted(unknown))} must be one of {', '.join(STAGES)}, without a GPU")
    results = schema.describe(schema.OFFLINE, commit)
    results.notes.append("measured without a GPU: no row is the speed of a kernel; see benchmarks/offline.py")
    for name, stage in STAGES.items():
        if only and name not in only:
            continue
        try:
            for row in stage():
                results.rows.append(row)
                on_row(row)
        except (CuflashError, subprocess.SubprocessError) as error:
            results.skipped[name] = str(error).splitlines()[0]
    return results


def tables(results: schema.Results) -> Iterator[Any]:
    """The rows as `rich` tables, a stage each."""
    from rich.table import Table

    titles = {
        "host": "what cuflash itself costs the host, in us (no launch, no allocation)",
        "import": "import, in ms",
        "compile": "NVRTC with nothing cached, in ms",
        "emulator": "the emulator",
        "counters": "work of a call on the emulator, over the least it takes",
        "reference": "the NumPy reference, in ms by the clock",
        "code": "machine code: models, with no GPU asked",
        "model": "Hopper: how busy the tensor cores can be at most (predicted, not measured)",
    }
    for op in STAGES:
        rows = [row for row in results.rows if row.op == op]
        if not rows:
            continue
        table = Table(title=titles[op], title_justify="left", min_width=len(titles[op]))
        table.add_column("case")
        for heading, _ in (columns := _columns(op)):
            table.add_column(heading, justify="right")
        for row in rows:
            table.add_row(row.case, *(show(row) for _, show in columns))
        yield table


def _columns(op: str) -> list[tuple[str, Callable[[Row], str]]]:
    def more(name: str, form: str) -> tuple[str, Callable[[Row], str]]:
        return name.replace("_", " "), lambda row: form.format(row.more[name])

    if op == "host":
        return [
            ("median", lambda r: f"{1e3 * (r.ms or 0):.1f}"),
            ("spread", lambda r: f"{1e3 * (r.spread or 0):.1f}"),
            ("best", lambda r: f"{1e3 * r.more.get('best_ms', r.ms):.1f}"),
        ]
    if op == "emulator":
        return [more("per_second", "{:,}")]
    if op == "counters":
        return [more("flop_over_least", "{:.2f}"), more("read_over_least", "{:.2f}"), more("bank_conflicts", "{}")]
    if op == "model":
        clocks = ("clocks", "tensor", "mufu", "shared", "issue")
        return [
            more("tensor_use", "{:.0%}"),
            *((name, lambda r, name=name: str(r.more["clocks"][name])) for name in clocks),
        ]
    if op == "code":
        return machine_code.COLUMNS
    if op == "reference":
        return [("", lambda r: r.impl), ("ms", lambda r: f"{r.ms:.1f}"), more("of_naive", "{:.2f}")]
    times = [("ms", lambda r: f"{r.ms:.0f}")]
    return [*times, ("best", lambda r: f"{r.more.get('best_ms', r.ms):.0f}")] if op == "import" else times


def _timed(op: str, case: str, ms: list[float]) -> Row:
    low, middle, high = statistics.quantiles(ms, n=4, method="inclusive")
    return Row(op, case, OURS, ms=round(middle, 6), spread=round(high - low, 6), more={"best_ms": round(min(ms), 6)})
