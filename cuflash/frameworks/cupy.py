"""CuPy arrays, and what CuPy knows of the machine: it launches every kernel, whoever owns the arrays."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from threading import Lock
from typing import Any, NoReturn

import numpy as np

from .. import arch as arch_table
from ..arch import Arch
from ..array import Device, TensorView, strides_in_elements
from ..dtypes import BY_NUMPY, DType, unknown
from ..errors import ArgumentError, DeviceError, DeviceMemoryError, UnsupportedError
from ..jit import driver

NAME: str = "CuPy"

_NO_MEMORY = 2  # cudaErrorMemoryAllocation
_CAPTURED = 900  # cudaErrorStreamCaptureUnsupported


def _cupy() -> Any:
    import cupy  # at the first array, never earlier

    return cupy


def view(x: Any) -> TensorView:
    dtype = BY_NUMPY.get(x.dtype)
    if dtype is None:
        raise ArgumentError(unknown(x.dtype))
    memory = x.data
    strides = strides_in_elements(x.strides, dtype.itemsize)
    return TensorView(memory.ptr, x.shape, strides, dtype, ("cuda", memory.device_id), False, x)


def looks_on(*arrays: Any) -> bool:
    """CuPy never does."""
    return False


def refuse_transformed(arrays: dict[str, Any]) -> None:
    """CuPy arrays are never traced."""


def empty(shape: tuple[int, ...], dtype: DType, device: Device) -> TensorView:
    cupy = _cupy()
    index = device[1]
    try:
        if cupy.cuda.runtime.getDevice() == index:
            return view(cupy.empty(shape, dtype.numpy))
        with cupy.cuda.Device(index):
            return view(cupy.empty(shape, dtype.numpy))
    except (MemoryError, RuntimeError) as error:
        # A pool's error is a MemoryError; without one (cupy.cuda.set_allocator(None)) it is the runtime's.
        status = _NO_MEMORY if isinstance(error, MemoryError) else getattr(error, "status", None)
        if status == _CAPTURED:
            raise DeviceError(
                f"no memory for an array of {shape}, {dtype.name}, may be allocated on GPU {index} while a stream is "
                f"captured in a mode other than relaxed, and that capture is lost: {error}; make the call once before "
                "the capture, so that CuPy's pool has the memory, pass out=, or capture in relaxed mode, CuPy's default"
            ) from error
        if status != _NO_MEMORY:
            raise
        raise DeviceMemoryError(
            f"no room for an array of {shape}, {dtype.name}, on GPU {index}: {error}; make the batch smaller, or free "
            "memory, also of other libraries: cupy.get_default_memory_pool().free_all_blocks()"
        ) from error


def known(x: Any) -> None:
    """CuPy arrays lie on devices."""


def wrap(view: TensorView) -> Any:
    return view.owner


def written(x: Any) -> None:
    """Nothing records what was written."""


def stream(device: int) -> int:
    cupy = _cupy()
    return cupy.cuda.get_current_stream(device).ptr


def capturing(device: int) -> bool:
    cupy = _cupy()
    return cupy.cuda.get_current_stream(device).is_capturing()


def draw_seed(device: Device) -> NoReturn:
    raise ArgumentError(
        "seed is None, and dropout needs one: pass an int, or cupy.random.randint(0, 2**31, 1, cupy.int64)"
    )


def seed(x: Any) -> Any:
    return x


def upload(values: np.ndarray, device: Device) -> TensorView:
    cupy = _cupy()
    result = empty(values.shape, BY_NUMPY[values.dtype], device)
    with cupy.cuda.Device(device[1]):
        # The driver takes a pageable source into its own staging memory before it returns, so nothing need outlive it.
        result.owner.data.copy_from_host_async(values.ctypes.data, values.nbytes, cupy.cuda.get_current_stream())
    return result


def download(view: TensorView, stream: int) -> np.ndarray:
    """Copy a device array to the host after the work on `stream`. Waits for it."""
    cupy = _cupy()
    itemsize = view.dtype.itemsize
    before, after = view.extent
    held = np.empty((before + after) // itemsize, view.dtype.numpy)  # gaps of a strided array included
    if held.nbytes:
        with cupy.cuda.Device(view.device[1]):
            cupy.cuda.runtime.memcpyAsync(
                held.ctypes.data, view.ptr - before, held.nbytes, cupy.cuda.runtime.memcpyDeviceToHost, stream
            )
            cupy.cuda.runtime.streamSynchronize(stream)
    first, strides = held[before // itemsize :], [s * itemsize for s in view.strides]
    return np.lib.stride_tricks.as_strided(first, view.shape, strides, writeable=False)


def retain(views: Iterable[TensorView], device: int) -> None:
    """CuPy's memory pool reuses memory in stream order."""


_recorded: list[TensorView] = []


def keep_recorded(views: Iterable[TensorView], device: int) -> None:
    """CuPy's memory pool knows nothing of capture, and would give the memory to the next who asks."""
    if capturing(device):
        _recorded.extend(views)


_in_flight: deque[tuple[Any, list[TensorView]]] = deque()
_in_flight_lock = Lock()


def retain_until_done(views: Iterable[TensorView], device: int) -> None:
    """Hold views that another stream's allocator may reuse once they die, until CuPy's current stream gets here.

    Not where that stream records a graph: whoever replays it keeps the arrays, and nobody may ask for its events.
    """
    if capturing(device):
        return
    cupy = _cupy()
    with driver.unwatched():  # another thread's stream may record one
        with cupy.cuda.Device(device):
            event = cupy.cuda.Event(disable_timing=True)
            event.record(cupy.cuda.get_current_stream())
        with _in_flight_lock:  # between a look at the first event and its removal, no other thread may remove it
            _in_flight.append((event, list(views)))
            while _in_flight and _in_flight[0][0].done:
                _in_flight.popleft()


def cuda_version() -> None:
    return None


def advise(what: str, name: str) -> str:
    if what == "contiguous":
        return f"cupy.ascontiguousarray({name})"
    if what == "device":
        return f"cupy.asarray({name})"
    return f"{name}.astype({'ml_dtypes.bfloat16' if what == 'bfloat16' else f'cupy.{what}'})"


# The machine -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What decides whether a kernel can be compiled and launched on one GPU. CUDA versions are (major, minor)."""

    capability: tuple[int, int]
    driver: tuple[int, int]
    cupy: tuple[int, int]
    nvrtc: tuple[int, int]
    multiprocessors: int | None = None
    l2_bytes: int | None = None


def current_device() -> int:
    """Index of CuPy's current device. Raises `UnsupportedError` if there is no CuPy, driver or GPU."""
    runtime = _installed().cuda.runtime
    try:
        return runtime.getDevice()
    except runtime.CUDARuntimeError as error:
        raise UnsupportedError(
            f"no GPU can be used ({error}): name arch= to compile without one, or set config.backend='emulator'"
        ) from error


@lru_cache(maxsize=64)
def arch_of(device: int, cuda_version: str | None = None) -> Arch:
    """The architecture of a CUDA device, once the machine is known to be able to run kernels on it.

    `cuda_version` is that of the framework whose arrays are used. Raises `UnsupportedError` naming what to install.
    """
    return check(machine(device), cuda_version)


def machine(device: int) -> Machine:
    """Ask CuPy, the driver and NVRTC. Raises `UnsupportedError` if CuPy is not installed."""
    from ..jit import nvrtc

    runtime = _installed().cuda.runtime
    major = runtime.deviceGetAttribute(75, device)  # cudaDevAttrComputeCapabilityMajor
    minor = runtime.deviceGetAttribute(76, device)
    return Machine(
        capability=(major, minor),
        driver=_cuda_version(runtime.driverGetVersion()),
        cupy=_cuda_version(runtime.runtimeGetVersion()),
        nvrtc=nvrtc.version(),
        multiprocessors=runtime.deviceGetAttribute(16, device),  # cudaDevAttrMultiProcessorCount
        l2_bytes=runtime.deviceGetAttribute(38, device),  # cudaDevAttrL2CacheSize
    )


def device_name(device: int) -> str:
    """What the driver calls a device."""
    return _cupy().cuda.runtime.getDeviceProperties(device)["name"].decode(errors="replace")


def check(machine: Machine, cuda_version: str | None = None) -> Arch:
    """The architecture to compile for, or `UnsupportedError` with what does not fit and the remedy.

    >>> check(Machine(capability=(9, 0), driver=(13, 0), cupy=(13, 0), nvrtc=(13, 0))).name
    'sm_90a'
    """
    arch = arch_table.of_capability(*machine.capability)
    if machine.driver[0] < machine.nvrtc[0]:
        raise UnsupportedError(
            f"the NVIDIA driver serves CUDA {_dotted(machine.driver)}, older than NVRTC's CUDA "
            f"{_dotted(machine.nvrtc)}, whose kernels it cannot load: update the driver, or "
            f"{install(machine.driver[0])}"
        )
    if cuda_version is not None and int(cuda_version.partition(".")[0]) != machine.cupy[0]:
        major = int(cuda_version.partition(".")[0])
        raise UnsupportedError(
            f"PyTorch is built for CUDA {cuda_version} and CuPy for CUDA {_dotted(machine.cupy)}: two CUDA runtimes of "
            f"different major versions in one process do not share a GPU safely; "
            f"pip uninstall cupy-cuda{machine.cupy[0]}x && {install(major)}"
        )
    asked = {name: getattr(machine, name) for name in ("multiprocessors", "l2_bytes")}
    return replace(arch, **{name: value for name, value in asked.items() if value is not None})


def install(cuda_major: int | None = None) -> str:
    """The command that installs CuPy, NVRTC and the CUDA runtime for a CUDA major version.

    Without one, PyTorch's decides if it is loaded.

    >>> install(12)
    "pip install 'cuflash[cuda12]'"
    """
    if cuda_major is None:
        version = getattr(getattr(sys.modules.get("torch"), "version", None), "cuda", None)
        cuda_major = int(version.partition(".")[0]) if version else 13
    return f"pip install 'cuflash[cuda{12 if cuda_major <= 12 else 13}]'"


def _installed() -> Any:
    try:
        return _cupy()
    except ImportError as error:
        raise UnsupportedError(
            f"work on a GPU needs CuPy, which launches the kernels and cannot be imported here ({error}): {install()}"
        ) from error


def _cuda_version(number: int) -> tuple[int, int]:
    return number // 1000, number % 1000 // 10


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
