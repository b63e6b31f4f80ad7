"""XLA's foreign function interface by ctypes alone: how a compiled JAX program calls back into Python.

XLA calls one C function, the *handler*, with a *call frame*: buffers to read, buffers to write, attributes, and on a
GPU its stream. Ours is a Python function behind ctypes, the same one for every call: the frame's only attribute is the
*description* of the call, a text that names the operation, its keywords, and name, shape and dtype of every buffer. So
a compiled program means the same in any process, and nothing in it points into the one that traced it. XLA owns all
memory; on a GPU the handler launches on XLA's stream and returns without waiting, the same launches every time, so XLA
may record them into a CUDA graph and replay it.

The layout of the C structs is that of xla/ffi/api/c_api.h (https://github.com/openxla/xla), which only grows at ends.
"""

from __future__ import annotations

import ctypes
import json
import traceback
from collections.abc import Callable, Sequence
from ctypes import POINTER, Structure, c_char_p, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from functools import lru_cache
from typing import Any, NamedTuple

from ..array import HOST, Device, TensorView, contiguous_strides
from ..dtypes import BY_NAME, DType
from ..errors import ArgumentError, CuflashError, UnsupportedError

TARGET = "cuflash_attention"


class Spec(NamedTuple):
    """A buffer without its address: contiguous, row-major."""

    name: str
    shape: tuple[int, ...]
    dtype: DType

    def at(self, ptr: int, device: Device, readonly: bool) -> TensorView:
        return TensorView(ptr, self.shape, contiguous_strides(self.shape), self.dtype, device, readonly, None)


class Description(NamedTuple):
    """All that is known of a call when it is compiled."""

    operation: str  # a key of `operations`
    keywords: dict[str, Any]  # of it: whatever JSON can hold, tuples becoming lists
    inputs: tuple[Spec, ...]
    results: tuple[Spec, ...]

    def dumps(self) -> str:
        specs = [[(s.name, s.shape, s.dtype.name) for s in part] for part in (self.inputs, self.results)]
        return json.dumps([self.operation, self.keywords, *specs], sort_keys=True)

    @classmethod
    def loads(cls, text: str) -> Description:
        """
        >>> from cuflash import dtypes
        >>> d = Description("attention", {"scale": 0.1}, (Spec("q", (2, 3), dtypes.bfloat16),), ())
        >>> Description.loads(d.dumps()) == d
        True
        """
        operation, keywords, *specs = json.loads(text)
        inputs, results = (tuple(Spec(n, tuple(shape), BY_NAME[t]) for n, shape, t in part) for part in specs)
        return cls(operation, keywords, inputs, results)


# An operation makes, from a description and a device, the function that runs it on views of that device's memory, by
# name, on a stream (0 on the host). It is asked once a description and device.
Run = Callable[[dict[str, TensorView], int], None]
operations: dict[str, Callable[[Description, Device], Run]] = {}


def call(description: Description, arrays: Sequence[Any]) -> Sequence[Any]:
    """Call an operation on JAX arrays, or on what stands for them under tracing -> its results.

    JAX caches what it compiles by the description's text: an equal description never compiles again. A result named
    "new_<input>" is that input written over: where nobody needs the input any more in its own memory, else in a copy.
    """
    jax = _jax()
    _register()
    results = [jax.ShapeDtypeStruct(s.shape, s.dtype.numpy) for s in description.results]
    inputs = {f"new_{spec.name}": i for i, spec in enumerate(description.inputs)}
    aliases = {inputs[s.name]: i for i, s in enumerate(description.results) if s.name in inputs}
    return jax.ffi.ffi_call(TARGET, results, input_output_aliases=aliases)(*arrays, call=description.dumps())


def _jax() -> Any:
    import jax  # at the first call, never earlier

    return jax


@lru_cache(maxsize=1)
def _register() -> None:
    jax = _jax()
    for platform, handler in _HANDLERS.items():
        jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(ctypes.cast(handler, c_void_p).value), platform=platform)


# The C structs ----------------------------------------------------------------------------------------------------


class _Extension(Structure):
    _fields_ = (("struct_size", c_size_t), ("type", c_int32), ("next", c_void_p))


class _ApiVersion(Structure):
    _fields_ = (("struct_size", c_size_t), ("extension", c_void_p), ("major", c_int32), ("minor", c_int32))


class _Metadata(Structure):
    _fields_ = (("struct_size", c_size_t), ("api_version", _ApiVersion), ("traits", c_uint32))


class _MetadataExtension(Structure):
    _fields_ = (("base", _Extension), ("metadata", POINTER(_Metadata)))


class _Api(Structure):
    """What a handler may ask of XLA: the head of its table of functions."""

    _fields_ = (
        ("struct_size", c_size_t),
        ("extension", c_void_p),
        ("version", _ApiVersion),
        ("internal", c_void_p),
        ("error_create", c_void_p),
        ("error_message", c_void_p),
        ("error_destroy", c_void_p),
        ("handler_register", c_void_p),
        ("stream_get", c_void_p),
    )


class _Span(Structure):
    _fields_ = (("ptr", c_void_p), ("size", c_size_t))


class _Buffer(Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        ("extension", c_void_p),
        ("dtype", c_int32),
        ("data", c_void_p),
        ("rank", c_int64),
        ("dims", POINTER(c_int64)),
    )


class _Buffers(Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        ("extension", c_void_p),
        ("size", c_int64),
        ("types", c_void_p),
        ("buffers", POINTER(POINTER(_Buffer))),
    )


class _Attributes(Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        ("extension", c_void_p),
        ("size", c_int64),
        ("types", POINTER(c_int32)),
        ("names", POINTER(POINTER(_Span))),
        ("values", POINTER(POINTER(_Span))),  # for an attribute that is a string
    )


class _Frame(Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        ("extension", POINTER(_Extension)),
        ("api", POINTER(_Api)),
        ("context", c_void_p),
        ("stage", c_int32),
        ("args", _Buffers),
        ("results", _Buffers),
        ("attributes", _Attributes),
    )


class _ErrorArgs(Structure):
    _fields_ = (("struct_size", c_size_t), ("extension", c_void_p), ("message", c_char_p), ("code", c_int32))


class _StreamArgs(Structure):
    _fields_ = (("struct_size", c_size_t), ("extension", c_void_p), ("context", c_void_p), ("stream", c_void_p))


_METADATA = 1  # type of the extension by which XLA asks what a handler is
_REPLAYABLE = 1  # trait "command buffer compatible"
_EXECUTE = 3  # stage
_INVALID_ARGUMENT, _UNIMPLEMENTED, _INTERNAL = 3, 12, 13  # error codes
_function = ctypes.CFUNCTYPE(c_void_p, c_void_p)  # of the table: takes a struct, gives an error or null


# The handler ------------------------------------------------------------------------------------------------------


def _handler(kind: str) -> Any:
    def handle(frame_pointer: Any) -> int | None:
        frame = frame_pointer.contents
        try:
            if frame.extension and frame.extension.contents.type == _METADATA:
                _answer(frame)
            elif frame.stage == _EXECUTE:
                _execute(frame, kind)
        except BaseException as error:  # nothing may pass into C
            return _error(frame, error)
        return None

    # CFUNCTYPE, unlike PYFUNCTYPE, takes the interpreter's lock: XLA calls from threads of its own, without it.
    return ctypes.CFUNCTYPE(c_void_p, POINTER(_Frame))(handle)


_HANDLERS = {"cpu": _handler("cpu"), "CUDA": _handler("cuda")}  # never freed: XLA keeps their addresses


def _answer(frame: _Frame) -> None:
    """Say which version of the interface is spoken (XLA's own, of which little is used), and that replay is safe."""
    extension = ctypes.cast(frame.extension, POINTER(_MetadataExtension)).contents
    metadata, version = extension.metadata.contents, frame.api.contents.version
    metadata.api_version.major, metadata.api_version.minor = version.major, version.minor
    metadata.traits = _REPLAYABLE


def _execute(frame: _Frame, kind: str) -> None:
    text = frame.attributes.values[0].contents
    device, stream = HOST, 0
    if kind == "cuda":
        from ..frameworks import cupy

        stream = _stream(frame)
        device = ("cuda", cupy.current_device())  # XLA makes its device current before it calls
    description, run = _prepared(ctypes.string_at(text.ptr, text.size), device)
    views = {}
    for specs, given, readonly in (
        (description.inputs, frame.args, True),
        (description.results, frame.results, False),
    ):
        for i, spec in enumerate(specs):
            views[spec.name] = spec.at(given.buffers[i].contents.data or 0, device, readonly)
    if kind == "cuda":
        run(views, stream)
    else:
        with _PythonsFloats():
            run(views, stream)


@lru_cache(maxsize=4096)
def _prepared(text: bytes, device: Device) -> tuple[Description, Run]:
    description = Description.loads(text.decode())
    return description, operations[description.operation](description, device)


class _PythonsFloats:
    """XLA's threads on the host flush subnormal floats to zero; the result should have the bits it has elsewhere.

    C's fegetenv and fesetenv keep the mode, where the machine has them: this thread's becomes what it was in the thread
    that imported this module, then again what it was.
    """

    def __enter__(self) -> None:
        self._before = _float_mode()
        _set_float_mode(_python_mode)

    def __exit__(self, *_: Any) -> None:
        _set_float_mode(self._before)


def _float_mode() -> Any:
    mode = ctypes.create_string_buffer(256)  # an fenv_t, which takes 32 bytes on x86-64 and fewer elsewhere
    if _libm is not None:
        _libm.fegetenv(mode)
    return mode


def _set_float_mode(mode: Any) -> None:
    if _libm is not None:
        _libm.fesetenv(mode)


try:
    _libm: Any = ctypes.CDLL(None)
    _libm = _libm if hasattr(_libm, "fegetenv") else None
except (OSError, TypeError):  # not there under this name
    _libm = None
_python_mode = _float_mode()


def _stream(frame: _Frame) -> int:
    args = _StreamArgs(struct_size=ctypes.sizeof(_StreamArgs), context=frame.context)
    if _function(frame.api.contents.stream_get)(ctypes.addressof(args)):
        raise UnsupportedError("XLA gave no stream to a call on a GPU")
    return args.stream or 0


def _error(frame: _Frame, error: BaseException) -> int | None:
    """XLA's own error with our text; JAX raises it as JaxRuntimeError where the result is waited for."""
    message = f"cuflash: {type(error).__name__}: {error}"
    if not isinstance(error, CuflashError):
        message += "\n" + "".join(traceback.format_exception(error))
    code = _INTERNAL
    if isinstance(error, ArgumentError):
        code = _INVALID_ARGUMENT
    elif isinstance(error, UnsupportedError):
        code = _UNIMPLEMENTED
    args = _ErrorArgs(struct_size=ctypes.sizeof(_ErrorArgs), message=message.encode(), code=code)
    return _function(frame.api.contents.error_create)(ctypes.addressof(args))
