"""What is compiled and run in the child process, and the plain data that goes there and back.

A *problem* is a kernel with all that a run of it needs: `OurProblem`, a call of `attention` or `attention_backward`
whose kernels may be edited; `OwnProblem`, a text of the user's own and the arguments of one launch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from .. import arch as arches
from .. import emulator
from ..errors import ArgumentError, UnsupportedError
from ..jit import layout, module, sass, source
from ..settings import config

Arrays = dict[str, np.ndarray]
Edits = tuple[source.Edit, ...]
GENERATED = (source.MODS_FILE, source.VARIANT_FILE)  # a call's kernels have different ones


@dataclass(frozen=True)
class OurProblem:
    """A call of `attention` (or, with `dout`, of `attention_backward`) on host arrays.

    kernel    the one to look at, of those that the call runs: its file without ".cu"
    arrays    q, k, v and others by their keywords
    keywords  numbers and flags
    bound     a `tracer.Bound` with NumPy arrays: the call's mods, or None
    """

    kernel: str
    arrays: Arrays
    keywords: dict[str, Any]
    bound: Any
    arch: str
    backend: str

    @property
    def backward(self) -> bool:
        return "dout" in self.arrays


@dataclass(frozen=True)
class OwnProblem:
    """A launch of a kernel that the user wrote.

    spec       its root is a file that only `edits` have
    arguments  a value for each field of the params struct: arrays for pointers, numbers, bytes for structs inside
    """

    spec: module.KernelSpec
    arguments: dict[str, Any]
    grid: tuple[int, int, int]
    arch: str
    backend: str


Problem = OurProblem | OwnProblem


@dataclass(frozen=True)
class Outcome:
    """What a run gave. `expected` and `allowed` have an array for each result that is checked."""

    results: Arrays
    expected: Arrays = field(default_factory=dict)
    allowed: Arrays = field(default_factory=dict)
    counters: emulator.Counters | None = None


def specs(problem: Problem) -> list[module.KernelSpec]:
    """The kernels of a problem as they are shipped, the one to look at first."""
    if isinstance(problem, OwnProblem):
        return [problem.spec]
    with _configured(dataclasses.replace(problem, backend="emulator")):  # a GPU has the same plan
        found = list(_planned(problem).prepared.plan.specs)
    mine = [spec for spec in found if spec.source == f"{problem.kernel}.cu"]
    if not mine:
        names = ", ".join(dict.fromkeys(spec.source.removesuffix(".cu") for spec in found))
        raise ArgumentError(f"this call does not run {problem.kernel!r} on {problem.arch}; it runs {names}")
    return [mine[0], *(spec for spec in found if spec is not mine[0])]


def edited(spec: module.KernelSpec, edits: Edits, looked_at: str) -> module.KernelSpec:
    """A spec with those of the edits that concern it: all, for the kernel that is looked at; for others of the call
    those of files that they share."""
    mine = edits
    if spec.source != looked_at:
        files = {file for file, _, _ in source.numbered(spec.text("cuda"))}
        mine = tuple(e for e in edits if e.file in files and e.file not in GENERATED)
    return dataclasses.replace(spec, edits=(*spec.edits, *mine)) if mine else spec


def forward_of(problem: OurProblem, arrays: Arrays) -> Arrays:
    """out and lse of the call that a backward belongs to, by the kernels as shipped."""
    keywords = {n: x for n, x in problem.keywords.items() if n not in ("captured_grads", "deterministic")}
    forward = dataclasses.replace(problem, arrays=arrays, keywords={**keywords, "aux": ("lse",)})
    with _configured(forward):
        return _run_ours(forward)


def run(problem: Problem, edits: Edits, counting: bool, checking: bool) -> Outcome:
    """Runs it once, on the problem's backend."""
    if problem.backend == "cuda":
        why_not = why_no_gpu()
        if why_not:
            raise UnsupportedError(f"backend='cuda': {why_not}; backend='emulator' runs the same text")
    counters: Any = emulator.counting() if counting else contextlib.nullcontext()
    with counters as counted:
        if isinstance(problem, OwnProblem):
            return Outcome(_run_own(problem, edits), counters=counted)
        with _configured(problem), _editing(problem, edits):
            results = _run_ours(problem)
    expected, allowed = _oracle(problem) if checking else ({}, {})
    return Outcome(results, expected, allowed, counted)


def trace(problem: Problem, edits: Edits) -> emulator.Trace:
    """What the warps of one run do."""
    with emulator.tracing() as found:
        run(problem, edits, False, False)
    return found


def compile_for(problem: Problem, edits: Edits, arch: str) -> list[tuple[module.KernelSpec, module.Compiled | None]]:
    """Compiles every kernel of the problem for an architecture, or for "emulator"."""
    shipped = specs(problem)
    changed = [edited(spec, edits, shipped[0].source) for spec in shipped]
    if arch == "emulator":
        for spec in changed:
            module.compile_emulated(spec)
        return [(spec, None) for spec in changed]
    return [(changed[0], module.compile(changed[0], arches.named(arch)))]


def machine_code(problem: Problem, edits: Edits, arch: str) -> tuple[str, sass.Function]:
    """What nvdisasm prints of the kernel that is looked at, and its instructions."""
    ((spec, compiled),) = compile_for(problem, edits, arch)
    assert compiled is not None
    text = sass.disassemble(compiled.path)
    return text, sass.functions(text)[spec.entry]


def bench(problem: Problem, edits: Edits, repeats: int) -> tuple[str, list[float]]:
    """(the GPU's name, microseconds of each of `repeats` calls by events of its stream)."""
    why_not = why_no_gpu()
    if why_not:
        raise UnsupportedError(f"bench: {why_not}; counters() and resources() tell what a kernel costs on any machine")
    import cupy

    def timed(call: Callable[[], Any]) -> tuple[str, list[float]]:
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        for _ in range(5):
            call()
        found = []
        for _ in range(repeats):
            start.record()
            call()
            end.record()
            end.synchronize()
            found.append(1e3 * float(cupy.cuda.get_elapsed_time(start, end)))
        return cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode(), found

    if isinstance(problem, OwnProblem):
        launch, _ = _prepared_own(problem, edits)
        return timed(launch)
    with _configured(problem), _editing(problem, edits):
        problem = dataclasses.replace(problem, arrays=_on_gpu(problem.arrays), bound=_bound_on_gpu(problem.bound))
        call = _planned(problem)
        return timed(call.gradients if problem.backward else call.run)


def why_no_gpu() -> str:
    """What is missing to run on a GPU here; "" if nothing is."""
    try:
        import cupy

        return "" if cupy.cuda.runtime.getDeviceCount() > 0 else "there is no CUDA device"
    except ImportError:
        return "CuPy, which launches kernels on a GPU, is not installed"
    except Exception as error:  # CUDARuntimeError: no driver
        return f"there is no GPU ({error})"


# --- Our kernels --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _configured(problem: OurProblem) -> Iterator[None]:
    before = config.backend, config.arch
    config.backend, config.arch = problem.backend, problem.arch
    try:
        yield
    finally:
        config.backend, config.arch = before


@contextlib.contextmanager
def _editing(problem: OurProblem, edits: Edits) -> Iterator[None]:
    if not edits:
        yield
        return
    with module.editing(functools.partial(edited, edits=edits, looked_at=f"{problem.kernel}.cu")):
        yield


def _planned(problem: OurProblem) -> Any:
    """The call, bound and planned, and not yet run: a `Call`."""
    from ..call.arguments import Arguments, Backward
    from ..call.bind import bind

    arrays = {name: _aligned(x) if isinstance(x, np.ndarray) else x for name, x in problem.arrays.items()}
    given = {name: arrays.pop(name) for name in ("dout", "out", "lse", "dlse") if name in arrays}
    keywords = dict(problem.keywords)
    deterministic, captured = (bool(keywords.pop(n, False)) for n in ("deterministic", "captured_grads"))
    backward = Backward(given, {}, deterministic, captured) if problem.backward else None
    q, k, v = (arrays.pop(name) for name in "qkv")
    return bind(q, k, v, Arguments(**arrays, **keywords), problem.bound, backward)


def _run_ours(problem: OurProblem) -> Arrays:
    if problem.backend == "cuda":
        problem = dataclasses.replace(problem, arrays=_on_gpu(problem.arrays), bound=_bound_on_gpu(problem.bound))
    from ..call.results import AttentionOutput

    call = _planned(problem)
    if problem.backward:
        grads = call.gradients()
        found = {f"dcaptured{i}": x for i, x in enumerate(grads.dcaptured)}
        named = {**grads._asdict(), **found}
        del named["dcaptured"]
    else:
        out = call.run()
        named = dict(zip(out._fields, out, strict=True)) if isinstance(out, AttentionOutput) else {"out": out}
    return {name: _on_host(x) for name, x in named.items() if x is not None}


def _oracle(problem: OurProblem) -> tuple[Arrays, Arrays]:
    """What the reference computes in float64, and how far from it each element may be.

    Forward: one unit in the last place of the dtype for rounding the weights and one for the result, times the sum of
    the magnitudes added up (softmax weights times |v|), and the float32 error of the scores, some units of the largest.
    Backward: sixteen units of the element and of the root mean square of its head's, a bound found by looking; in
    float32, where it is the score's error that shows, times the largest score.
    """
    floats = ("q", "k", "v", "dout", "out", "sink")
    dtype = problem.arrays["q"].dtype
    unit = float(ml_dtypes.finfo(dtype).eps)
    exact = {n: x.astype(np.float64) if n in floats and x.dtype == dtype else x for n, x in problem.arrays.items()}
    keywords = {n: x for n, x in problem.keywords.items() if n not in ("kernel_options", "aux", "split_size")}
    host = dataclasses.replace(problem, backend="reference")
    forward = {n: x for n, x in exact.items() if n not in ("dout", "out", "lse", "dlse")}
    keywords.pop("captured_grads", None)
    with _configured(host):
        both = dataclasses.replace(host, arrays=forward, keywords={**keywords, "aux": ("lse", "max_logit")})
        oracle = _planned(both).run()
        largest = 1 + np.abs(np.where(np.isfinite(oracle.max_logit), oracle.max_logit, 0)).max(initial=0)
        if not problem.backward:
            magnitude = _planned(dataclasses.replace(both, arrays={**forward, "v": np.abs(forward["v"])})).run().out
            of_scores = 16 * 2.0**-24 * largest
            allowed = {"out": (2 * unit + of_scores) * magnitude + 2.0**-120}
            for name in ("lse", "max_logit"):
                allowed[name] = np.full(oracle.lse.shape, of_scores)
            return {"out": oracle.out, "lse": oracle.lse, "max_logit": oracle.max_logit}, allowed
        given = {**exact, "out": oracle.out, "lse": oracle.lse}
        grads = _planned(dataclasses.replace(host, arrays=given, keywords=keywords)).gradients()
    expected = {n: x for n, x in grads._asdict().items() if n in ("dq", "dk", "dv") and x is not None}
    allowed = {}
    for name, x in expected.items():
        size = np.sqrt(np.mean(np.square(x), axis=(-3, -1), keepdims=True)) + np.abs(x)
        allowed[name] = 16 * unit * (largest if dtype.itemsize >= 4 else 1) * size + 2.0**-120
    return expected, allowed


# --- The user's own -----------------------------------------------------------------------------------------------


def _run_own(problem: OwnProblem, edits: Edits) -> Arrays:
    launch, arrays = _prepared_own(problem, edits)
    launch()
    return {name: _on_host(x) for name, x in arrays.items()}


def _prepared_own(problem: OwnProblem, edits: Edits) -> tuple[Callable[[], None], dict[str, Any]]:
    """What launches it, and the arrays that it writes."""
    spec = dataclasses.replace(problem.spec, edits=(*problem.spec.edits, *edits))
    on_gpu = problem.backend == "cuda"
    arrays = {n: x for n, x in problem.arguments.items() if isinstance(x, np.ndarray)}
    there: dict[str, Any] = _on_gpu(arrays) if on_gpu else {n: _aligned(x) for n, x in arrays.items()}
    addresses = {n: x.data.ptr if on_gpu else x.ctypes.data for n, x in there.items()}
    if on_gpu:
        import cupy

        from ..frameworks import cupy as adapter

        device = cupy.cuda.Device().id
        kernel = module.load(spec, adapter.arch_of(device), "cuda", device)
    else:
        kernel = module.load(spec, arches.named(problem.arch), "emulator")
    fields = layout.parse(kernel.text, spec.params)
    written = {f.name for f in fields.fields if f.is_pointer and not f.const}
    params = fields.pack(**{**problem.arguments, **addresses})
    buffers = [module.Buffer(n, addresses[n], x.nbytes, n in written) for n, x in there.items()]

    def launch(there: Any = there) -> None:  # which it keeps alive: the params hold bare addresses
        kernel.launch(problem.grid, params, stream=0 if on_gpu else None, buffers=() if on_gpu else buffers)

    return launch, {n: x for n, x in there.items() if n in written}


# --- Arrays -------------------------------------------------------------------------------------------------------


def _aligned(x: np.ndarray, alignment: int = 256) -> np.ndarray:
    """A copy whose memory begins where a GPU's allocations do."""
    memory = np.empty(x.nbytes + alignment, np.uint8)
    start = -memory.ctypes.data % alignment
    out = memory[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    out[...] = x
    return out


def _on_gpu(arrays: Mapping[str, Any]) -> dict[str, Any]:
    import cupy

    return {n: cupy.asarray(x) if isinstance(x, np.ndarray) else x for n, x in arrays.items()}


def _bound_on_gpu(bound: Any) -> Any:
    if bound is None:
        return None
    return bound._replace(arrays=tuple(_on_gpu(dict(enumerate(bound.arrays))).values()))  # type: ignore[arg-type]


def _on_host(x: Any) -> np.ndarray:
    return x if isinstance(x, np.ndarray) else x.get()
