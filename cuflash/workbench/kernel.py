"""`load` and `kernel`: a kernel with all that a run of it needs, and the questions one may ask of it."""

from __future__ import annotations

import dataclasses
import functools
import os.path
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from .. import arch as arches
from .. import dtypes, emulator, frameworks
from ..array import TensorView
from ..call import number_checks
from ..errors import ArgumentError, CompileError, EmulatorError, UnsupportedError
from ..jit import layout, module, schedule, source
from . import jobs, report, text, worker
from .given import SECONDS, Array, grid_of, is_array, like_result, own_kernel, require_mapping, require_text, to_host

# What a pointer may lead to, where its type says so; void*, u8* and structs of the text take anything.
_POINTED_AT = {
    f"{name}*": tuple(map(np.dtype, dtypes_of.split()))
    for name, dtypes_of in {
        "float": "float32", "double": "float64", "i32": "int32", "int": "int32", "u32": "uint32 int32", "i64": "int64",
        "u64": "uint64 int64", "i16": "int16", "i8": "int8", "bool": "bool",
    }.items()
}  # fmt: skip


def kernel(
    text: str,
    arguments: Mapping[str, Any],
    *,
    grid: int | Sequence[int] = 1,
    threads: int | None = None,
    smem_bytes: int = 0,
    reference: Callable[..., Any] | None = None,
    tolerance: float | None = None,
    arch: str = "sm_80",
    label: str | None = None,
    first_line: int = 1,
) -> Kernel:
    """A kernel of your own: its text, and what it is launched with.

    text        CUDA C with one `HW_KERNEL(threads) name(HW_GRID_CONSTANT Params params)` and its `struct Params`, one
                field a line. base.cuh and hw/ (device, math, warp, matrix, async_copy) are included already; other
                files of kernels_cu may be. Memory is touched through `hw::` alone
    arguments   a value for each field of Params: an array for a pointer, a number. What a pointer to const leads to is
                read; the others are written, and are what `run` returns
    grid        blocks, (x, y, z) or fewer
    threads     of a block; None: what HW_KERNEL says
    smem_bytes  dynamic shared memory of a block
    reference   f(**arguments) -> the right result, or a dict of them: NumPy arrays in, NumPy arrays out
    tolerance   the largest error allowed, as a share of the largest element expected; None: 16 units in the last place
    label       how messages call the text, whose lines they count from `first_line`; None: the file's name, which is
                the kernel's with ".cu"

    >>> double = kernel('''
    ... struct Params {
    ...   const float* x;
    ...   float* y;
    ... };
    ... HW_KERNEL(32) twice(HW_GRID_CONSTANT Params p) {
    ...   const i32 i = hw::thread_idx();
    ...   hw::store_global(p.y + i, 2.0f * hw::load_global(p.x + i));
    ... }
    ... ''', {"x": np.arange(32, dtype=np.float32), "y": np.zeros(32, np.float32)}, reference=lambda x, y: 2 * x)
    >>> bool(double.check()), double.run()[:3]
    (True, array([0., 2., 4.], dtype=float32))
    """
    require_mapping(arguments)
    arrays = {n: x for n, x in arguments.items() if is_array(x)}
    if not arrays:
        raise ArgumentError("arguments has no array: a kernel without one has nothing to write to")
    first = next(iter(arrays.values()))
    framework = frameworks.of(first, next(iter(arrays)))
    like = framework.view(first)
    values = {n: to_host(x, n) if n in arrays else x for n, x in arguments.items()}
    if reference is not None and not callable(reference):
        raise ArgumentError(f"reference={reference!r} must be a function f(**arguments) -> array, or None")
    tolerance = None if tolerance is None else number_checks.number("tolerance", tolerance)
    smem_bytes = number_checks.count("smem_bytes", smem_bytes, least=0)
    first_line = number_checks.count("first_line", first_line)
    name, spec, whole = own_kernel(text, threads, module.KernelSpec("", "", "", None, 0, smem_bytes), label, first_line)
    backend = "cuda" if like.device[0] == "cuda" else "emulator"
    problem = jobs.OwnProblem(spec, values, grid_of(grid), arches.named(arch).name, backend)
    labels = frozenset({spec.source, spec.source if label is None else label})
    made = Kernel(name, problem, (spec,), {spec.source: whole}, like, framework, reference, tolerance, labels)
    made._check_arguments()
    return made


@dataclass(frozen=True, repr=False, eq=False)
class Kernel:
    """A kernel, its text as changed so far, and the problem it runs on; from `load` and `kernel`. Immutable: `replace`,
    `replace_function`, `edit`, `bind` and `on` return another one.

    All that compiles or runs does so in a child process with a time limit, `seconds`: what hangs or crashes raises
    `Stopped`, and a fault that the emulator sees `EmulatorError`, with the lines of your text that it names. What
    `cuflash.config` and `emulator.schedule` say holds there too.
    """

    name: str
    problem: jobs.Problem
    specs: tuple[module.KernelSpec, ...]
    changed: Mapping[str, str] = field(default_factory=dict)
    like: TensorView | None = None
    framework: Any = None
    reference: Callable[..., Any] | None = None
    tolerance: float | None = None
    labels: frozenset[str] = frozenset()
    _counted: dict[Any, report.Counts] = field(default_factory=dict, init=False)

    # --- Text

    @property
    def files(self) -> tuple[str, ...]:
        """The files that the kernel is made of, in the order they are included in; hw/ is the hardware's side."""
        names = dict.fromkeys([self.specs[0].source, *(file for file, _, _ in source.numbered(self.source))])
        return tuple(name for name in names if name not in self.labels or name in self.changed)

    @property
    def source(self) -> str:
        """The whole text as NVRTC gets it: one string that includes nothing."""
        return self._spec.text("cuda")

    def text(self, file: str) -> str:
        """One file's text as it is now."""
        require_text("file", file)
        if file in self.changed:
            return self.changed[file]
        if file in jobs.GENERATED or os.path.isfile(source.folder() / file):
            lines = [line for name, _, line in source.numbered(self._plain.text("cuda")) if name == file]
            if file not in jobs.GENERATED and lines:
                return source.read(source.folder() / file)
            if lines:
                return "\n".join(lines) + "\n"
        near = [x for x in self.files if x.endswith(f"/{file}")]
        meant = f"; take {near[0]!r}" if near else ""
        raise ArgumentError(f"{file!r} is none of this kernel's files: {', '.join(self.files)}{meant}")

    def function(self, name: str) -> str:
        """The text of one function, "update" or "OnlineSoftmax::update": what to start from."""
        file, found = self._find(name)
        whole = self.text(file)
        return whole[whole.rfind("\n", 0, found.begin) + 1 : found.end]

    def replace(self, file: str, text: str, *, label: str | None = None, first_line: int = 1) -> Kernel:
        """Another version, in which `file`, such as "tile/softmax.cuh" or the kernel's own "forward_sm80.cu", has this
        text. Messages call its lines those of `label`, counted from `first_line`; None: of the file."""
        self.text(file)  # refuses what is no file of the kernel
        require_text("text", text)
        first_line = number_checks.count("first_line", first_line)
        if label is not None:
            text = f'#line {first_line} "{_label(label)}"\n{text}'
        return self._with(file, text, label)

    def replace_function(self, name: str, text: str, *, label: str | None = None, first_line: int = 1) -> Kernel:
        """Another version, in which one function, "OnlineSoftmax::update" or "Mods::score", has this definition: all of
        it, from its return type (or `template`) to its closing brace; lines before it, such as comments or functions
        that it calls, may stand in front.

        >>> from cuflash.workbench import load
        >>> x = np.ones((1, 40, 1, 32), np.float16)
        >>> kernel = load("forward_sm80", x, x, x)
        >>> wrong = kernel.replace_function("quad_sum", "HW_DEVICE float quad_sum(float value) { return value; }")
        >>> wrong.check().results[0].got  # the sum of every row is a quarter of what it should be
        4.0
        """
        require_text("text", text)
        first_line = number_checks.count("first_line", first_line)
        file, found = self._find(name)
        last = name.split("::")[-1]
        if not _functions(text, last):
            raise ArgumentError(
                f"the text defines no function {last!r}: write all of it, from its return type to its closing brace. "
                f"It is now, in {file}:\n{self.function(name)}"
            )
        label = _label(label) if label is not None else f"{last} of yours"
        return self._with(file, _replaced(self.text(file), found, text, file, label, first_line), label)

    def edit(self, file: str, old: str, new: str) -> Kernel:
        """Another version, in which `old`, which must occur once in `file`, is `new`."""
        before = self.text(file)
        require_text("old", old)
        require_text("new", new)
        count = before.count(old)
        if not old or count != 1:
            raise ArgumentError(f"old={old!r} occurs {count} times in {file}, and must once: take more around it")
        return self._with(file, before.replace(old, new), None)

    # --- Problem

    def bind(
        self,
        arguments: Mapping[str, Any] | None = None,
        *,
        grid: int | Sequence[int] | None = None,
        threads: int | None = None,
        smem_bytes: int | None = None,
    ) -> Kernel:
        """Another version of a kernel of your own, with other arguments, of which those not named stay, or another
        launch."""
        problem = self.problem
        if not isinstance(problem, jobs.OwnProblem):
            raise ArgumentError(f"bind is for kernels of your own: load {self.name} again, with other arguments")
        arguments = {} if arguments is None else arguments
        require_mapping(arguments)
        values = {n: to_host(x, n) if is_array(x) else x for n, x in arguments.items()}
        spec = problem.spec
        if threads is not None:
            spec = dataclasses.replace(spec, threads=number_checks.count("threads", threads))
        if smem_bytes is not None:
            spec = dataclasses.replace(spec, smem_bytes=number_checks.count("smem_bytes", smem_bytes, least=0))
        problem = dataclasses.replace(
            problem,
            spec=spec,
            arguments={**problem.arguments, **values},
            grid=problem.grid if grid is None else grid_of(grid),
        )
        made = dataclasses.replace(self, problem=problem, specs=(spec,))
        made._check_arguments()
        return made

    def on(self, backend: str) -> Kernel:
        """The same to be run on "emulator" or "cuda"."""
        if not isinstance(backend, str) or backend not in module.BACKENDS:
            raise ArgumentError(f"backend={backend!r} must be one of {', '.join(module.BACKENDS)}")
        return dataclasses.replace(self, problem=dataclasses.replace(self.problem, backend=backend))

    # --- Questions

    def compile(self, arch: str = "emulator", *, seconds: float = SECONDS) -> Kernel:
        """Compiles it for the emulator or an architecture, and returns it. Raises `CompileError` with the compiler's
        messages and the code around each line that they name, or `Stopped`."""
        self._call(jobs.compile_for, arch, seconds=seconds)
        return self

    def run(self, *, seconds: float = SECONDS) -> Any:
        """Runs it: what `attention` or `attention_backward` would return; of a kernel of your own the array it wrote,
        or a dict of them by name. In the framework and on the device of the arrays given."""
        results = self._call(jobs.run, False, False, seconds=seconds).results
        wrapped = {name: self._wrap(x) for name, x in results.items()}
        if isinstance(self.problem, jobs.OwnProblem):
            return next(iter(wrapped.values())) if len(wrapped) == 1 else wrapped
        from .. import api

        if self.problem.backward:
            captured = tuple(wrapped.pop(n) for n in list(wrapped) if n.startswith("dcaptured"))
            return api.AttentionGrads(**wrapped, dcaptured=captured)
        return api.AttentionOutput(**wrapped) if len(wrapped) > 1 else wrapped["out"]

    def check(self, *, seconds: float = SECONDS) -> report.Check:
        """Runs it, and compares with the reference: true where every element is right. Ours are compared with
        `attention` in float64 (of gradients dq, dk and dv), by the roundings that a kernel cannot avoid; your own with
        `reference`.

        Raises `EmulatorError` with the report of a fault, `CompileError`, `Stopped`.
        """
        return self._check(self._call(jobs.run, False, True, seconds=seconds))

    def counters(self, *, seconds: float = SECONDS) -> report.Counts:
        """Runs it on the emulator, and counts: bytes of global and shared memory, matrix instructions, barriers; of
        each access, by its line, bank conflicts and sectors that are not coalesced."""
        if schedule.current() not in self._counted:
            here = self.on("emulator")
            self._counts(here._call(jobs.run, True, False, seconds=seconds))
        return self._counted[schedule.current()]

    def measure(self, *, seconds: float = SECONDS) -> tuple[report.Check | None, report.Counts]:
        """`check` and `counters` of one run on the emulator; no check where there is no reference."""
        here = self.on("emulator")
        outcome = here._call(jobs.run, True, True, seconds=seconds)
        can_check = self.reference is not None or isinstance(self.problem, jobs.OurProblem)
        return here._check(outcome) if can_check else None, self._counts(outcome)

    def trace(self, *, seconds: float = SECONDS) -> emulator.Trace:
        """Runs it on the emulator, and keeps what its warps did: `workbench.plot_timeline` draws it."""
        return self.on("emulator")._call(jobs.trace, seconds=seconds)

    def resources(self, arch: str | None = None, *, seconds: float = SECONDS) -> report.Resources:
        """What it uses on an architecture (None: the one it was made for): registers, spills, shared memory, occupancy,
        time to compile. NVRTC compiles for any, on any machine."""
        arch = arch or self.problem.arch
        ((spec, compiled),) = self._call(jobs.compile_for, arch, seconds=seconds)
        used, target = compiled.resources, arches.named(arch)
        shared = spec.smem_bytes + used.static_smem_bytes
        blocks, reason, share = report.occupancy(target, spec.threads, used.registers, shared)
        try:
            opcodes = self.sass(arch, seconds=seconds).function.counts
        except UnsupportedError:
            opcodes = {}  # no nvdisasm
        return report.Resources(
            self.name, arch, spec.threads, used.registers, used.spill_stores + used.spill_loads, used.stack_bytes,
            shared, blocks, reason, share, compiled.cubin.compile_ms, compiled.cubin.warnings, opcodes,
        )  # fmt: skip

    def sass(self, arch: str | None = None, *, seconds: float = SECONDS) -> report.MachineCode:
        """Its machine code for an architecture (None: the one it was made for). Raises `UnsupportedError` without
        nvdisasm, saying how to get it."""
        arch = arch or self.problem.arch
        return report.MachineCode(self.name, arch, *self._call(jobs.machine_code, arch, seconds=seconds))

    def bench(self, *, repeats: int = 50, seconds: float = SECONDS) -> report.Timing:
        """Its time on the GPU, in microseconds. Raises `UnsupportedError` where there is none."""
        device, times = self.on("cuda")._call(jobs.bench, repeats, seconds=seconds)
        return report.Timing(self.name, device, tuple(times))

    def diff(
        self,
        other: Kernel,
        *,
        counters: bool = True,
        arch: str | None = None,
        bench: bool = False,
        seconds: float = SECONDS,
    ) -> report.Diff:
        """What changes from `other` to this one: text; counters; resources on `arch`, where one is named; with `bench`,
        time on the GPU."""
        files = {*self.changed, *other.changed}
        before, after = ({f: x.text(f) for f in files if f in x.files} for x in (other, self))
        found: dict[str, Any] = {}
        if counters:
            found["counters"] = report.pairs(*(x.counters(seconds=seconds).totals for x in (other, self)))
        if arch is not None:
            found["resources"] = report.pairs(*(x.resources(arch, seconds=seconds).rows() for x in (other, self)))
        if bench:
            found["timing"] = tuple(x.bench(seconds=seconds).median for x in (other, self))
        return report.Diff(report.text_diff(before, after), **found)

    def __repr__(self) -> str:
        of = ", ".join(self.changed) or "nothing"
        x = self.problem
        return f"Kernel({self.name!r} on the {x.backend}, {x.arch}; changed: {of})"

    # --- Within

    @property
    def _edits(self) -> tuple[source.Edit, ...]:
        return tuple(source.Edit(file, "", text) for file, text in self.changed.items())

    @property
    def _plain(self) -> module.KernelSpec:
        """As it is shipped; of a kernel of your own as it was first written."""
        mine = self._edits if isinstance(self.problem, jobs.OwnProblem) else ()
        return dataclasses.replace(self.specs[0], edits=(*self.specs[0].edits, *mine))

    @property
    def _spec(self) -> module.KernelSpec:
        return dataclasses.replace(self.specs[0], edits=(*self.specs[0].edits, *self._edits))

    def _with(self, file: str, text: str, label: str | None) -> Kernel:
        changes: dict[str, Any] = {}
        if isinstance(self.problem, jobs.OwnProblem) and file == self.problem.spec.source:
            name, spec, text = own_kernel(text, None, self.problem.spec)
            changes = {"name": name, "problem": dataclasses.replace(self.problem, spec=spec), "specs": (spec,)}
        labels = self.labels | {file} | ({label} if label is not None else set())
        return dataclasses.replace(self, changed={**self.changed, file: text}, labels=frozenset(labels), **changes)

    def _find(self, name: str) -> tuple[str, text.Function]:
        """(file, place) of the one function of that name."""
        require_text("name", name)
        searched = [file for file in self.files if not file.startswith("hw_")]
        found = [(file, x) for file in searched for x in _functions(self.text(file), name)]
        if len(found) == 1:
            return found[0]
        if not found:
            last = name.split("::")[-1]
            others = [f"{x.name} ({file})" for file in searched for x in _functions(self.text(file), last)]
            there = f"; there is {', '.join(others)}" if others and last != name else ""
            raise ArgumentError(f"no function {name!r} in {', '.join(searched)}{there}")
        places = ", ".join(f"{x.name} ({file})" for file, x in found)
        raise ArgumentError(
            f"{name!r} names {len(found)} functions: {places}; say which by its struct, or use replace() or edit()"
        )

    def _check_arguments(self) -> None:
        problem = self.problem
        assert isinstance(problem, jobs.OwnProblem)
        fields = {f.name: f for f in layout.parse(self.source, problem.spec.params).fields}
        missing, unknown = fields.keys() - problem.arguments.keys(), problem.arguments.keys() - fields.keys()
        if missing or unknown:
            parts = ("no value for", missing), ("no field", unknown)
            what = [f"{said} {', '.join(sorted(map(str, names)))}" for said, names in parts if names]
            raise ArgumentError(f"arguments must name the fields of {problem.spec.params}: {'; '.join(what)}")
        for name, value in problem.arguments.items():
            if fields[name].is_pointer != isinstance(value, np.ndarray):
                needed = "an array" if fields[name].is_pointer else "a number"
                raise ArgumentError(f"{name} is a {type(value).__name__}: {fields[name].ctype} takes {needed}")
            expected = _POINTED_AT.get(fields[name].ctype)
            if isinstance(value, np.ndarray) and expected is not None and value.dtype not in expected:
                names = " or ".join(map(str, expected))
                raise ArgumentError(
                    f"{name} has dtype={value.dtype}, and its field is a {fields[name].ctype}: pass {names}, or let "
                    "the field be a u8*, which takes any"
                )

    def _call(self, job: Callable[..., Any], *args: Any, seconds: float) -> Any:
        __tracebackhide__ = True  # what users see ends at their question
        try:
            return worker.call(job, self.problem, self._edits, *args, seconds=seconds)
        except EmulatorError as error:
            self._explain(error)
        except CompileError as error:
            raise text.with_remedies(error) from None

    def _explain(self, error: EmulatorError) -> NoReturn:
        """Raises it again, with the code of the user's own that it names, or that leads to what it names."""
        __tracebackhide__ = True
        said = str(error)
        lines: dict[tuple[str, int], str] = {(f, n): x for f, n, x in source.numbered(self._spec.text("emu"))}
        raise EmulatorError(text.with_code(said, lines, self.labels)) from None

    def _check(self, outcome: jobs.Outcome) -> report.Check:
        if isinstance(self.problem, jobs.OwnProblem):
            if self.reference is None:
                raise ArgumentError("check needs what is right: pass reference= to kernel(), f(**arguments) -> array")
            copies = {n: x.copy() if isinstance(x, np.ndarray) else x for n, x in self.problem.arguments.items()}
            right: Any = self.reference(**copies)
            expected: dict[str, Any] = right if isinstance(right, dict) else {next(iter(outcome.results)): right}
            if unknown := expected.keys() - outcome.results.keys():
                written = ", ".join(outcome.results)
                raise ArgumentError(f"reference gave {', '.join(unknown)}; the kernel writes {written}")
            expected = {n: like_result(n, x, outcome.results[n]) for n, x in expected.items()}
            allowed = {n: self._allowed(outcome.results[n].dtype, x) for n, x in expected.items()}
        else:
            expected, allowed = outcome.expected, outcome.allowed
        found = [
            report.compare(n, outcome.results[n], x, allowed[n], functools.partial(self._where, n))
            for n, x in expected.items()
            if n in outcome.results
        ]
        return report.Check(tuple(found))

    def _allowed(self, dtype: Any, expected: np.ndarray) -> np.ndarray:
        import ml_dtypes

        share = self.tolerance
        if share is None:
            share = 0.0 if np.dtype(dtype).kind in "iub" else 16 * float(ml_dtypes.finfo(dtype).eps)
        finite = np.abs(expected[np.isfinite(expected)], dtype=np.float64) if expected.size else np.zeros(1)
        return np.full(expected.shape, share * finite.max(initial=0))

    def _where(self, name: str, index: tuple[int, ...]) -> str:
        """What an element of our results is, in words."""
        if isinstance(self.problem, jobs.OwnProblem):
            return ""
        arrays = self.problem.arrays
        side = "k" if name in ("dk", "dv") else "q"
        starts = arrays.get(f"cu_seqlens_{side}", self.problem.keywords.get(f"cu_seqlens_{side}"))
        if name in ("lse", "max_logit"):
            *first, head, row = index
            column = ""
        else:
            *first, row, head, last = index
            column = f", column {last}"
        if starts is None:
            sequence = first[0]
        else:
            begins = np.asarray(starts)
            sequence = int(np.searchsorted(begins, row, side="right")) - 1
            row -= int(begins[sequence])
        return f"sequence {sequence}, row {row}, head {head}{column}"

    def _counts(self, outcome: jobs.Outcome) -> report.Counts:
        assert outcome.counters is not None
        sites = {*outcome.counters.shared_passes, *outcome.counters.sectors}
        code: dict[str, str] = {}
        for spec in self.specs:
            changed = jobs.edited(spec, self._edits, self.specs[0].source)
            code |= {f"{f}:{n}": line for f, n, line in source.numbered(changed.text("emu")) if f"{f}:{n}" in sites}
        self._counted[schedule.current()] = report.Counts(**vars(outcome.counters), code=code)
        return self._counted[schedule.current()]

    def _wrap(self, x: np.ndarray) -> Array:
        """A result as an array of the caller's framework and device."""
        like, framework = self.like, self.framework
        assert like is not None
        made = framework.empty(x.shape, dtypes.BY_NUMPY[x.dtype], like.device)
        if like.device[0] == "cpu":
            made.as_numpy()[...] = x
        else:
            import cupy

            values = np.ascontiguousarray(x)
            with cupy.cuda.Device(like.device[1]):
                cupy.cuda.runtime.memcpy(
                    made.ptr, values.ctypes.data, values.nbytes, cupy.cuda.runtime.memcpyHostToDevice
                )
        return framework.wrap(made)


_functions, _replaced, _label = text.functions, text.replaced, text.check_label


__all__ = ["CompileError", "Kernel", "kernel"]
