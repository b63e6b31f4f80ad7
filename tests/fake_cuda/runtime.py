"""CuPy's runtime module, whose functions are replaced by those of driver/runtime.cpp before CuPy is imported."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_size_t, c_uint, py_object
from typing import Any

_pointer = ctypes.c_ssize_t  # CuPy's intptr_t: an address, or a handle

# Name -> result, arguments. CuPy's C functions have a flag more behind them, which these ignore.
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "getDevice": (c_int, []),
    "setDevice": (py_object, [c_int]),
    "getDeviceCount": (c_int, []),
    "driverGetVersion": (c_int, []),
    "deviceGetAttribute": (c_int, [c_int, c_int]),
    "deviceSynchronize": (py_object, []),
    "deviceCanAccessPeer": (c_int, [c_int, c_int]),
    "memGetInfo": (py_object, []),
    "malloc": (_pointer, [c_size_t]),
    "free": (py_object, [_pointer]),
    "hostAlloc": (_pointer, [c_size_t, c_uint]),
    "freeHost": (py_object, [_pointer]),
    "memcpy": (py_object, [_pointer, _pointer, c_size_t, c_int]),
    "memcpyAsync": (py_object, [_pointer, _pointer, c_size_t, c_int, _pointer]),
    "memset": (py_object, [_pointer, c_int, c_size_t]),
    "memsetAsync": (py_object, [_pointer, c_int, c_size_t, _pointer]),
    "pointerGetMemoryType": (c_int, [_pointer]),
    "streamCreate": (_pointer, []),
    "streamCreateWithFlags": (_pointer, [c_uint]),
    "streamCreateWithPriority": (_pointer, [c_uint, c_int]),
    "streamDestroy": (py_object, [_pointer]),
    "streamSynchronize": (py_object, [_pointer]),
    "streamQuery": (py_object, [_pointer]),
    "streamGetFlags": (c_uint, [_pointer]),
    "streamGetPriority": (c_int, [_pointer]),
    "streamIsCapturing": (c_int, [_pointer]),
    "streamBeginCapture": (py_object, [_pointer, c_int]),
    "streamEndCapture": (_pointer, [_pointer]),
    "streamWaitEvent": (py_object, [_pointer, _pointer]),
    "graphInstantiate": (_pointer, [_pointer]),
    "graphLaunch": (py_object, [_pointer, _pointer]),
    "graphUpload": (py_object, [_pointer, _pointer]),
    "graphDestroy": (py_object, [_pointer]),
    "graphExecDestroy": (py_object, [_pointer]),
    "eventCreate": (_pointer, []),
    "eventCreateWithFlags": (_pointer, [c_uint]),
    "eventDestroy": (py_object, [_pointer]),
    "eventRecord": (py_object, [_pointer, _pointer]),
    "eventQuery": (py_object, [_pointer]),
    "eventSynchronize": (py_object, [_pointer]),
    "eventElapsedTime": (c_float, [_pointer, _pointer]),
}
_ABSENT = ("mallocAsync", "mallocManaged", "memcpyPeer", "memcpyPeerAsync", "launchHostFunc", "streamAddCallback")


def replace(library: Any) -> None:
    """Puts the stand-in's functions into the table and the module. A function whose C signature CuPy has changed does
    not fit its capsule's name any more, and importing CuPy fails with a TypeError that names it."""
    import cupy_backends.cuda.api.runtime as runtime

    library.rt_error_class.argtypes, library.rt_error_class.restype = [py_object], None
    library.rt_error_class(runtime.CUDARuntimeError)
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, "rt_" + name)
        function.restype, function.argtypes = result, arguments
        _put(runtime, name, function)
        setattr(runtime, name, function)
    _put(runtime, "_ensure_context", library.rt_ensure_context)
    _put(runtime, "streamBeginCapture", library.rt_streamBeginCapture_c)
    runtime.streamBeginCapture = lambda stream, mode=2: library.rt_streamBeginCapture(stream, mode)
    runtime.streamWaitEvent = lambda stream, event, flags=0: library.rt_streamWaitEvent(stream, event)
    library.rt_getDevice_function.restype = py_object
    runtime.getDevice = library.rt_getDevice_function()  # asked for at every launch
    runtime.getDeviceProperties = lambda device: _properties(library, device)
    runtime.pointerGetAttributes = lambda address: _attributes(runtime, library, address)
    runtime.profilerStart = runtime.profilerStop = lambda: None
    for name in _ABSENT:
        setattr(runtime, name, _absent(name))


_names: list[bytes] = []  # of capsules, which keep the address alone


def _put(runtime: Any, name: str, function: Any) -> None:
    api, table = ctypes.pythonapi, runtime.__pyx_capi__
    api.PyCapsule_GetName.restype, api.PyCapsule_GetName.argtypes = ctypes.c_char_p, [py_object]
    api.PyCapsule_New.restype = py_object
    api.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    _names.append(api.PyCapsule_GetName(table[name]))
    table[name] = api.PyCapsule_New(ctypes.cast(function, ctypes.c_void_p), _names[-1], None)


def _absent(name: str) -> Any:
    def refuse(*arguments: Any) -> None:
        raise NotImplementedError(f"the driver stand-in has no {name}")

    return refuse


def _properties(library: Any, device: int) -> dict[str, Any]:
    ask = library.rt_deviceGetAttribute
    return {
        "name": b"none (driver stand-in)",
        "major": ask(75, device),
        "minor": ask(76, device),
        "multiProcessorCount": ask(16, device),
        "sharedMemPerBlock": ask(8, device),
        "sharedMemPerBlockOptin": ask(97, device),
        "sharedMemPerMultiprocessor": ask(81, device),
        "regsPerBlock": ask(12, device),
        "warpSize": ask(10, device),
        "maxThreadsPerBlock": ask(1, device),
        "l2CacheSize": ask(38, device),
        "clockRate": ask(13, device),
        "memoryClockRate": ask(36, device),
        "memoryBusWidth": ask(37, device),
        "totalGlobalMem": 80 << 30,
    }


def _attributes(runtime: Any, library: Any, address: int) -> Any:
    device, kind = library.rt_pointerGetDevice(_pointer(address)), library.rt_pointerGetMemoryType(address)
    return runtime.PointerAttributes(device, address if kind == 2 else 0, address if kind == 1 else 0, kind)
