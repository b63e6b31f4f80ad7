"""From a KernelSpec to something that can be launched, on a GPU or on the emulator.

    spec = KernelSpec("forward_sm80.cu", "cuflash_forward_sm80", "ForwardParams", variant, 128, smem_bytes=49152)
    kernel = load(spec, arch.named("sm_90a"), "cuda", device=0)
    kernel.launch((8, 16, 4), layout.load("ForwardParams").pack(...), stream=stream_pointer)

`load` compiles at most once a machine (see `cache`) and afterwards is one dictionary look-up.
"""

from __future__ import annotations

import abc
import contextlib
import ctypes
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..arch import GRID_LIMITS, Arch
from ..errors import ArgumentError, CompileError, DeviceError, UnsupportedError
from ..settings import config
from . import cache, driver, emulated, hostcxx, layout, nvrtc, progress, sass, source, variant

BACKENDS = ("cuda", "emulator")
DEFAULT_SMEM_BYTES = 48 * 1024  # more must be asked for, once a kernel and device


@dataclass(frozen=True)
class KernelSpec:
    """Everything a kernel's machine code depends on, but the architecture; and how a block of it is launched.

    source      file under kernels_cu (or an absolute path)
    entry       name of the kernel in it
    params      name of its launch struct
    variant     see `variant.Variant`
    threads     of a block
    smem_bytes  dynamic shared memory of a block
    edits       changes to the text, see `source.Edit`
    registers   a thread of each warpgroup takes for itself (setmaxnreg), one number for each; () where none does
    """

    source: str
    entry: str
    params: str
    variant: variant.Variant | None
    threads: int
    smem_bytes: int
    edits: tuple[source.Edit, ...] = ()
    registers: tuple[int, ...] = ()

    @functools.cached_property
    def _hash(self) -> int:
        parts = (self.source, self.entry, self.params, self.variant, self.threads, self.smem_bytes, self.edits)
        return hash((*parts, self.registers))

    def __hash__(self) -> int:
        return self._hash  # asked for at every launch, and slow to find

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_hash"}  # it holds in one process only

    @property
    def name(self) -> str:
        """The kernel's name in reports, e.g. "forward_sm80"."""
        return self.entry.removeprefix("cuflash_")

    def text(self, target: str) -> str:
        """The flattened text for "cuda" or "emu"."""
        chosen = variant.emit(self.variant) if self.variant is not None else ""
        mods = getattr(self.variant, "mods", "")
        text = source.flatten(self.source, target, variant=chosen, mods=mods, edits=self.edits)
        return layout.asserted(text, self.params)


@dataclass(frozen=True)
class Buffer:
    """An array the params point into: the emulator checks accesses against it, and names it in reports."""

    name: str
    ptr: int
    nbytes: int
    writable: bool


@dataclass(frozen=True)
class CompileEvent:
    """What `config.on_compile` is told when a kernel has been made ready.

    kernel   name                arch     e.g. "sm_90a"; "emulator" for the emulator's
    variant  in one line         seconds  spent
    cached   True: it was on disk, nothing was compiled
    """

    kernel: str
    arch: str
    variant: str
    seconds: float
    cached: bool


@dataclass(frozen=True)
class Compiled:
    """A kernel as a file: the cubin's path, the compiler's report, the text it was made from."""

    spec: KernelSpec
    arch: Arch
    path: Path
    cubin: nvrtc.Cubin
    text: str = field(repr=False)
    cached: bool

    @property
    def resources(self) -> nvrtc.Resources:
        return self.cubin.resources[self.spec.entry]


# --- Compiling ----------------------------------------------------------------------------------------------------


def compile(spec: KernelSpec, arch: Arch) -> Compiled:
    """The cubin of a spec, from the cache or compiled. Needs NVRTC, but neither a GPU nor a driver.

    Raises CompileError if the text does not compile, or asks a block for more shared memory than `arch` has, or begins
    with fewer registers than its warps share out among them.
    """
    start = time.perf_counter()
    text = spec.text("cuda")
    key = cache.key_of(text, *nvrtc.key_parts(arch))

    def make() -> tuple[bytes, dict[str, Any]]:
        with _announced(spec, arch.name):
            cubin = nvrtc.compile(text, arch, spec.source)
        return cubin.data, cubin.note()

    entry = cache.fetch("cubin", key, ".cubin", make)
    cubin = nvrtc.Cubin.from_note(entry.path.read_bytes(), entry.note)
    if spec.entry not in cubin.resources:
        raise CompileError(f"{spec.source} has no kernel {spec.entry}, only {', '.join(cubin.resources) or 'none'}")
    compiled = Compiled(spec, arch, entry.path, cubin, text, cached=not entry.built)
    asked = spec.smem_bytes + compiled.resources.static_smem_bytes
    if asked > arch.smem_bytes:
        raise CompileError(
            f"{spec.name} asks for {asked} bytes of shared memory a block, {arch} has {arch.smem_bytes}: "
            "smaller tiles or fewer stages"
        )
    _require_registers(spec, compiled.resources.registers)
    _dump(spec, arch.name, key, text, cubin.data)
    _tell(spec, arch.name, start, cached=not entry.built)
    return compiled


def _require_registers(spec: KernelSpec, used: int) -> None:
    """A block has as many registers as it begins with, `used` a thread: warps that take more than others have given up
    wait for ever. What a warpgroup begins with is less than it takes, or more than it keeps."""
    if not spec.registers:
        return
    begins = -(-used // 8) * 8  # they come eight a thread
    has, takes = begins * len(spec.registers), sum(spec.registers)
    if has < takes or not min(spec.registers) <= begins <= max(spec.registers):
        raise CompileError(
            f"{spec.name} begins with {begins} registers a thread, {has} for its {len(spec.registers)} warpgroups, "
            f"which take {' + '.join(map(str, spec.registers))} = {takes}: it would hang. That is this NVRTC's doing: "
            "install another (pip install -U nvidia-cuda-nvrtc), or pass kernel_options={'kernel': 'sm_80'}"
        )


def compile_emulated(spec: KernelSpec) -> tuple[Path, str]:
    """The shared object of a spec, from the cache or compiled, and the text it was made from."""
    start = time.perf_counter()
    text = spec.text("emu")
    built = False

    @contextlib.contextmanager
    def announced() -> Iterator[None]:
        nonlocal built
        built = True
        with _announced(spec, "emulator"):
            yield

    with cache.around_builds(announced):
        path = hostcxx.compile(text)
    _dump(spec, "emulator", cache.key_of(text), text, None)
    _tell(spec, "emulator", start, cached=not built)
    return path, text


@contextlib.contextmanager
def _announced(spec: KernelSpec, target: str) -> Iterator[None]:
    """Around a compile: refuses it, shows it, or neither, as `config.on_compile` says."""
    if config.on_compile == "error":
        described = variant.describe(spec.variant) if spec.variant is not None else ""
        raise CompileError(
            f"{spec.name} for {target} ({described}) would have to be compiled, and config.on_compile is 'error': "
            "call cuflash.warmup with the same arguments first, or allow compiling"
        )
    if config.on_compile != "progress":
        yield
        return
    with progress.compiling(f"{spec.name} for {target}"):
        yield


def _tell(spec: KernelSpec, target: str, start: float, *, cached: bool) -> None:
    if callable(config.on_compile):
        described = variant.describe(spec.variant) if spec.variant is not None else ""
        config.on_compile(CompileEvent(spec.name, target, described, time.perf_counter() - start, cached))


def _dump(spec: KernelSpec, target: str, key: str, text: str, cubin: bytes | None) -> None:
    if config.dump is None:
        return
    config.dump.mkdir(parents=True, exist_ok=True)
    stem = config.dump / f"{spec.name}.{target}.{key[:10]}"
    stem.with_name(stem.name + ".cu").write_text(text, encoding="utf-8")
    if cubin is not None:
        path = stem.with_name(stem.name + ".cubin")
        path.write_bytes(cubin)
        try:
            stem.with_name(stem.name + ".sass").write_text(sass.disassemble(path), encoding="utf-8")
        except UnsupportedError:
            pass  # no nvdisasm: the cubin is there for whoever has one


# --- Launching ----------------------------------------------------------------------------------------------------


class Kernel(abc.ABC):
    """A kernel ready to launch. `text` is what was compiled, `path` the compiled file."""

    def __init__(self, spec: KernelSpec, arch: Arch, path: Path, text: str) -> None:
        self.spec = spec
        self.arch = arch
        self.path = path
        self.text = text
        self.block = (spec.threads, 1, 1)
        self._params_size = layout.parse(text, spec.params).size

    def prepare(self) -> None:  # noqa: B027  the emulator has nothing to prepare
        """Does now what the first launch would: afterwards a launch loads and allocates nothing."""

    def launch(
        self,
        grid: tuple[int, int, int],
        params: bytes,
        *,
        stream: int | None = None,
        buffers: Sequence[Buffer] = (),
    ) -> None:
        """Starts `grid` blocks on `stream` (a pointer; None: CuPy's current one). A grid with a 0 starts nothing.

        params   the launch struct's bytes
        buffers  every array they point into
        """
        x, y, z = grid
        if not (0 < x <= GRID_LIMITS[0] and 0 < y <= GRID_LIMITS[1] and 0 < z <= GRID_LIMITS[2]):
            if 0 in grid:
                return
            raise ArgumentError(f"grid={grid} must be at most {GRID_LIMITS} blocks, and none negative")
        if len(params) != self._params_size:
            raise ArgumentError(f"{self.spec.params} has {self._params_size} bytes, got {len(params)}")
        self._launch(grid, params, stream, buffers)

    @abc.abstractmethod
    def _launch(
        self, grid: tuple[int, int, int], params: bytes, stream: int | None, buffers: Sequence[Buffer]
    ) -> None: ...


class CudaKernel(Kernel):
    """Runs a cubin on one device. Nothing touches the driver before `prepare` or the first launch."""

    def __init__(self, compiled: Compiled, device: int) -> None:
        super().__init__(compiled.spec, compiled.arch, compiled.path, compiled.text)
        self.compiled = compiled
        self.device = device

    @functools.cached_property
    def function(self) -> Any:
        """CuPy's RawKernel, loaded on this kernel's device, its shared memory allowed."""
        return self._loaded[0]

    @functools.cached_property
    def _loaded(self) -> tuple[Any, Any, Any, Any]:
        """(RawKernel, and what a launch needs of CuPy: getDevice, Device, CPointer)."""
        try:
            import cupy
            from cupy.cuda import function as cupy_function
            from cupy.cuda import runtime
        except ImportError as error:
            raise UnsupportedError(
                'device arrays need CuPy: pip install "cuflash[cuda13]" ("cuflash[cuda12]" for a driver older than 580)'
            ) from error
        with cupy.cuda.Device(self.device), driver.unwatched():
            try:
                kernel = cupy.RawModule(path=str(self._file())).get_function(self.spec.entry)
                kernel.compile()
                if self.spec.smem_bytes > DEFAULT_SMEM_BYTES:
                    kernel.max_dynamic_shared_size_bytes = self.spec.smem_bytes
            except RuntimeError as error:  # CuPy's, of the driver or the runtime
                raise DeviceError(
                    f"{self.spec.name} for {self.arch.name} could not be loaded on GPU {self.device}: {error}; free "
                    "memory of that GPU and call again, or look into its driver with: python -m cuflash doctor"
                ) from error
        return kernel, runtime.getDevice, cupy.cuda.Device, cupy_function.CPointer

    def _file(self) -> Path:
        """The cubin, compiled anew where somebody has cleared the cache since."""
        return self.path if self.path.exists() else compile(self.spec, self.arch).path

    def prepare(self) -> None:
        _ = self._loaded

    def _launch(self, grid: tuple[int, int, int], params: bytes, stream: int | None, buffers: Sequence[Buffer]) -> None:
        launch_cuda(self, grid, self.block, params, self.spec.smem_bytes, stream)


def launch_cuda(
    kernel: CudaKernel,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    params: bytes,
    smem_bytes: int,
    stream: int | None,
) -> None:
    """The one place where a kernel meets the GPU. The driver copies `params` before this returns."""
    function, current_device, device, pointer = kernel._loaded
    value = ctypes.create_string_buffer(params, len(params))
    # CuPy passes a CPointer's address as the address of the argument: the struct goes by value, at a quarter of the
    # cost of a structured NumPy scalar.
    args = (pointer(ctypes.addressof(value)),)
    where = None if stream is None else _Stream(stream)
    try:
        if current_device() == kernel.device:
            function(grid, block, args, shared_mem=smem_bytes, stream=where)
        else:
            with device(kernel.device):
                function(grid, block, args, shared_mem=smem_bytes, stream=where)
    except RuntimeError as error:  # CuPy's, of the driver or the runtime
        raise DeviceError(
            f"{kernel.spec.name} could not be launched on GPU {kernel.device} with grid={grid}, block={block}, "
            f"{smem_bytes} bytes of shared memory: {error}; what this call was to write is undefined. If an earlier "
            "kernel failed, run the program with CUDA_LAUNCH_BLOCKING=1, or under compute-sanitizer, to see which"
        ) from error


class _Stream:
    """All that CuPy reads of a stream."""

    __slots__ = ("ptr",)

    def __init__(self, ptr: int) -> None:
        self.ptr = ptr


class EmulatedKernel(Kernel):
    """Runs the same text on the emulator, on host memory."""

    def __init__(self, spec: KernelSpec, arch: Arch, path: Path, text: str) -> None:
        super().__init__(spec, arch, path, text)
        emulated.open_kernel(path, spec.entry)  # now: somebody may clear the cache before the first launch

    def _launch(self, grid: tuple[int, int, int], params: bytes, stream: int | None, buffers: Sequence[Buffer]) -> None:
        shape = grid, self.spec.threads, self.spec.smem_bytes
        emulated.launch(self.path, self.spec.entry, *shape, params, buffers, text=self.text)


# --- Loading ------------------------------------------------------------------------------------------------------

_kernels: dict[tuple[Any, ...], Kernel] = {}
_locks: dict[tuple[Any, ...], threading.Lock] = {}
_state = threading.Lock()
_editing: list[Callable[[KernelSpec], KernelSpec]] = []


@contextlib.contextmanager
def editing(change: Callable[[KernelSpec], KernelSpec]) -> Iterator[None]:
    """While this lasts, in any thread, `load` loads `change(spec)` where it is asked for `spec`."""
    _editing.append(change)
    try:
        yield
    finally:
        _editing.remove(change)


def load(spec: KernelSpec, arch: Arch, backend: str = "cuda", device: int | None = None) -> Kernel:
    """The kernel of a spec, compiled if need be. The same object for the same arguments until a source file changes.

    backend  "cuda" or "emulator"
    device   the CUDA device's index; None for the emulator
    """
    if _editing:
        spec = _editing[-1](spec)
    key = (spec, arch.name, backend, device, config.dump, source.generation())
    kernel = _kernels.get(key)
    if kernel is not None:
        return kernel
    if backend not in BACKENDS:
        raise ArgumentError(f"backend={backend!r} must be one of {', '.join(BACKENDS)}")
    with _state:
        lock = _locks.setdefault(key, threading.Lock())
    with lock:
        kernel = _kernels.get(key)
        if kernel is None:
            kernel = _load(spec, arch, backend, device)
            with _state:
                for stale in [k for k in _kernels if k[-1] != key[-1]]:
                    del _kernels[stale]
                _kernels[key] = kernel
                _locks.pop(key, None)
    return kernel


def _load(spec: KernelSpec, arch: Arch, backend: str, device: int | None) -> Kernel:
    if backend == "emulator":
        try:
            return EmulatedKernel(spec, arch, *compile_emulated(spec))
        except OSError:  # the cache was cleared since it was looked into
            return EmulatedKernel(spec, arch, *compile_emulated(spec))
    if device is None:
        raise ArgumentError("backend='cuda' needs the index of a device")
    return CudaKernel(compile(spec, arch), device)


def clear() -> None:
    """Forgets every loaded kernel (the files stay): the next `load` reads the disk again."""
    with _state:
        _kernels.clear()


def _after_fork() -> None:
    global _state
    # Threads that held these do not exist in the child.
    _state = threading.Lock()
    _locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

__all__ = [
    "Buffer", "CompileEvent", "Compiled", "CudaKernel", "EmulatedKernel", "Kernel", "KernelSpec",
    "clear", "compile", "compile_emulated", "launch_cuda", "load",
]  # fmt: skip
