"""What cuflash asks of the CUDA driver itself, beside what CuPy asks for it: contexts, capture, tensor maps.

    with driver.context(device):      # whatever thread this is, a context is current
    with driver.unwatched():          # and what follows may be done while streams are captured

Nothing here is touched before the first kernel that needs it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections.abc import Iterator
from typing import Any

from ..errors import DeviceError, UnsupportedError

INVALID_VALUE = 1  # CUDA_ERROR_INVALID_VALUE
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


@functools.cache
def _library() -> Any:
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise UnsupportedError(
            f"{name}, the NVIDIA driver, is not here ({error}): a driver of CUDA 12 or later is needed; without a GPU, "
            "use backend 'emulator'"
        ) from error


@functools.cache
def function(name: str) -> Any:
    """A function of the driver's, which returns a status. Raises UnsupportedError where there is none."""
    try:
        found = getattr(_library(), name)
    except AttributeError as error:
        raise UnsupportedError(
            f"the NVIDIA driver has no {name}: a driver of CUDA 12 or later is needed; without a GPU, use backend "
            "'emulator'"
        ) from error
    found.restype = ctypes.c_int
    return found


def call(name: str, *arguments: Any) -> None:
    """Calls a function of the driver's. Raises DeviceError where that fails."""
    status = function(name)(*arguments)
    if status != 0:
        raise failed(name, status)


def failed(name: str, status: int) -> DeviceError:
    """What to raise where a call of the driver's gave a status that no argument of the caller's explains."""
    text = ctypes.c_char_p()
    function("cuGetErrorName")(status, ctypes.byref(text))
    return DeviceError(
        f"{name}: {(text.value or b'an unknown error').decode()} ({status}). No argument of this call is the cause: an "
        "earlier kernel of this process failed, or its GPU is not usable; run the program with CUDA_LAUNCH_BLOCKING=1, "
        "or under compute-sanitizer, to see where"
    )


@contextlib.contextmanager
def context(device: int | None = None) -> Iterator[None]:
    """While this lasts, some context is current in this thread: the one that is, or a GPU's primary one.

    A thread that has not used CUDA has none, and calls of the driver's fail there, whatever the process did before.
    device: the GPU's index; None: the first.
    """
    current = ctypes.c_void_p()
    call("cuInit", 0)
    call("cuCtxGetCurrent", ctypes.byref(current))
    if current.value is not None:
        yield
        return
    call("cuDevicePrimaryCtxRetain", ctypes.byref(current), device or 0)  # CuPy holds it for good, too
    call("cuCtxPushCurrent_v2", current)
    try:
        yield
    finally:
        call("cuCtxPopCurrent_v2", ctypes.byref(current))


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """While this lasts, this thread may do what capture forbids elsewhere: load modules, ask events of other streams.

    A driver refuses such calls while this thread's stream, or in CUDA's default mode any other one's, is recorded into
    a graph, and that recording is lost. Nothing here enters a graph.
    """
    mode = ctypes.c_int(_RELAXED)
    call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
    try:
        yield
    finally:
        call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
