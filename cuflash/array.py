"""A borrowed array: pointer, shape, strides, dtype and device, whatever framework owns the memory.

Everything below the frameworks works on `TensorView`. The adapters in `cuflash/frameworks` make one from a
framework's own attributes; any other producer is read here through the DLPack protocol
(https://dmlc.github.io/dlpack/latest/), never copied.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

from . import dtypes
from .dtypes import DType
from .errors import ArgumentError, UnsupportedError

Device = tuple[str, int]  # ("cpu" | "cuda", index)
HOST: Device = ("cpu", 0)


class TensorView:
    """An array somebody else owns. Never copies, never frees.

    ptr       address of the first element
    shape     extents
    strides   steps in elements, one a dimension. Dimensions of extent 1 never step: theirs is 0 (1 for the last),
              so that equal layouts compare equal. An empty array has the strides of a contiguous one
    dtype     `cuflash.dtypes.DType`
    device    ("cpu" | "cuda", index)
    readonly  True where writing is not allowed
    owner     keeps the memory alive

    Raises `ArgumentError` for memory not aligned to the dtype, which no kernel reads.

    >>> import numpy as np
    >>> view = of_numpy(np.zeros((1, 4, 8), np.float16)[:, ::2])
    >>> view.shape, view.strides, view.dtype.name, view.device
    ((1, 2, 8), (0, 16, 1), 'float16', ('cpu', 0))
    """

    __slots__ = ("device", "dtype", "owner", "ptr", "readonly", "shape", "strides")

    def __init__(
        self,
        ptr: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        dtype: DType,
        device: Device,
        readonly: bool,
        owner: Any,
    ) -> None:
        if 1 in shape or 0 in shape:
            strides = canonical_strides(shape, strides)
        if ptr % dtype.itemsize:
            raise ArgumentError(f"address {ptr:#x} is no multiple of the item size, {dtype.itemsize}: pass a copy")
        self.ptr = ptr
        self.shape = shape
        self.strides = strides
        self.dtype = dtype
        self.device = device
        self.readonly = readonly
        self.owner = owner

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def extent(self) -> tuple[int, int]:
        """Bytes before the first element and bytes from it to the end of the last: all the memory it reaches."""
        if 0 in self.shape:
            return 0, 0
        steps = [(n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)]
        before = -sum(s for s in steps if s < 0)
        after = sum(s for s in steps if s > 0) + 1
        return before * self.dtype.itemsize, after * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes from `ptr` to the end of the last element, gaps of a strided view included."""
        return self.extent[1]

    @property
    def is_contiguous(self) -> bool:
        """Row-major without gaps."""
        return self.strides == canonical_strides(self.shape, contiguous_strides(self.shape))

    def as_numpy(self) -> np.ndarray:
        """The same memory as a NumPy array, host arrays only.

        >>> import numpy as np
        >>> x = np.arange(6, dtype=np.int32).reshape(2, 3)
        >>> np.shares_memory(of_numpy(x).as_numpy(), x)
        True
        """
        if self.device[0] != "cpu":
            raise ArgumentError(f"an array on {device_name(self.device)} cannot be read by NumPy: copy it to the host")
        if isinstance(self.owner, np.ndarray) and self.owner.shape == self.shape:
            return self.owner
        return self._numpy_alias()

    def overlaps(self, other: TensorView) -> bool:
        """True where some element of the two lies at the same address. Reads no memory."""
        if self.device != other.device or 0 in self.shape or 0 in other.shape:
            return False
        (before_a, after_a), (before_b, after_b) = self.extent, other.extent
        if self.ptr + after_a <= other.ptr - before_b or other.ptr + after_b <= self.ptr - before_a:
            return False
        # Interleaved views (q and v of one packed projection) reach over the same range without meeting.
        return bool(np.shares_memory(self._numpy_alias(), other._numpy_alias()))

    def _numpy_alias(self) -> np.ndarray:
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype.numpy)
        return np.asarray(_ArrayInterface(self)).view(self.dtype.numpy)

    def __repr__(self) -> str:
        return f"TensorView({self.dtype}{list(self.shape)}, strides={self.strides}, {device_name(self.device)})"


class _ArrayInterface:
    """Hands a view's memory to NumPy, as raw bytes of the item size, which bfloat16 needs."""

    def __init__(self, view: TensorView) -> None:
        size = view.dtype.itemsize
        self.view = view  # NumPy keeps this object as the array's base, and it keeps the owner
        self.__array_interface__ = {
            "version": 3,
            "data": (view.ptr, view.readonly),
            "shape": view.shape,
            "strides": tuple(s * size for s in view.strides),
            "typestr": f"|V{size}",
        }


@lru_cache(maxsize=4096)
def canonical_strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Strides without the arbitrary ones frameworks give to dimensions that never step.

    >>> canonical_strides((1, 5, 1), (77, 3, 99))
    (0, 3, 1)
    """
    if 0 in shape:
        return contiguous_strides(shape)
    last = len(shape) - 1
    return tuple(s if n != 1 else int(i == last) for i, (n, s) in enumerate(zip(shape, strides, strict=True)))


@lru_cache(maxsize=4096)
def strides_in_elements(strides: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Strides given in bytes, as NumPy and CuPy have them.

    >>> strides_in_elements((48, 8, 2), 2)
    (24, 4, 1)
    """
    if any(s % itemsize for s in strides):
        raise ArgumentError(
            f"strides of {strides} bytes are not multiples of the item size, {itemsize}: pass a contiguous copy"
        )
    return tuple(s // itemsize for s in strides)


@lru_cache(maxsize=4096)
def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides in elements.

    >>> contiguous_strides((2, 3, 4))
    (12, 4, 1)
    """
    steps = [1]
    for n in reversed(shape[1:]):
        steps.append(steps[-1] * max(n, 1))
    return tuple(reversed(steps))[: len(shape)]


def device_name(device: Device) -> str:
    """'cuda:0', or 'cpu': the host is one device."""
    return "cpu" if device[0] == "cpu" else f"{device[0]}:{device[1]}"


def of_numpy(x: np.ndarray) -> TensorView:
    """View of a NumPy array (bfloat16 being `ml_dtypes.bfloat16`)."""
    dtype = dtypes.BY_NUMPY.get(x.dtype)
    if dtype is None:
        raise ArgumentError(dtypes.unknown(x.dtype))
    strides = strides_in_elements(x.strides, dtype.itemsize)
    return TensorView(x.ctypes.data, x.shape, strides, dtype, HOST, not x.flags.writeable, x)


_LINE = 64  # bytes of a cache line: what JAX wants to adopt memory without copying, and more than any kernel wants


def empty_host(shape: tuple[int, ...], dtype: DType) -> np.ndarray:
    """An uninitialised contiguous NumPy array that begins on a 64-byte boundary.

    >>> empty_host((3, 5), dtypes.bfloat16).ctypes.data % 64
    0
    """
    nbytes = prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + _LINE, np.uint8)
    start = -raw.ctypes.data % _LINE
    return raw[start : start + nbytes].view(dtype.numpy).reshape(shape)


# DLPack, https://github.com/dmlc/dlpack/blob/main/include/dlpack/dlpack.h ------------------------------------------


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype_code", ctypes.c_uint8),
        ("dtype_bits", ctypes.c_uint8),
        ("dtype_lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _DLManagedTensorVersioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _DLTensor),
    )


# Device types by number. Pinned host memory (3) is read like any host memory, managed memory (13) like a device's.
_DEVICE_KINDS = {1: "cpu", 2: "cuda", 3: "cpu", 13: "cuda"}
_READ_ONLY, _IS_COPY = 1, 2  # flags
_UNVERSIONED, _VERSIONED = b"dltensor", b"dltensor_versioned"

_capsule_is_valid = ctypes.pythonapi.PyCapsule_IsValid
_capsule_is_valid.restype = ctypes.c_int
_capsule_is_valid.argtypes = (ctypes.py_object, ctypes.c_char_p)
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)


def dlpack_device(producer: Any) -> Device:
    """Where a producer's memory lies, by its `__dlpack_device__`."""
    kind, index = producer.__dlpack_device__()
    name = _DEVICE_KINDS.get(int(kind))
    if name is None:
        raise UnsupportedError(
            f"{type(producer).__qualname__} lies on a device of DLPack type {int(kind)}: cuflash reads host memory and "
            "NVIDIA GPUs; copy the array to one of them"
        )
    return (name, int(index) if name == "cuda" else 0)


def from_dlpack(producer: Any, *, stream: int | None = None) -> TensorView:
    """Borrow the memory of any object with `__dlpack__` and `__dlpack_device__`.

    `stream` is the CUDA stream that will read it (an address, 1 for the legacy default stream): the producer makes it
    wait for its own work. None for host memory. The capsule is kept as the view's owner and never consumed: when the
    last view dies, the capsule's destructor gives the memory back to its producer.

    >>> import numpy as np
    >>> x = np.arange(6.0).reshape(2, 3)
    >>> from_dlpack(x).ptr == x.ctypes.data
    True
    """
    wanted = {} if stream is None else {"stream": stream}
    try:
        capsule = producer.__dlpack__(max_version=(1, 0), **wanted)
    except TypeError:  # a producer of the protocol's first edition knows no max_version
        capsule = producer.__dlpack__(**wanted)
    return from_capsule(capsule)


def from_capsule(capsule: Any) -> TensorView:
    """View of the tensor inside a DLPack capsule, which stays unconsumed and becomes the view's owner."""
    if _capsule_is_valid(capsule, _VERSIONED):
        managed = _DLManagedTensorVersioned.from_address(_capsule_pointer(capsule, _VERSIONED))
        if managed.major != 1:
            raise UnsupportedError(f"DLPack version {managed.major}.{managed.minor}: version 1 was asked for")
        tensor, flags = managed.tensor, managed.flags
    elif _capsule_is_valid(capsule, _UNVERSIONED):
        tensor, flags = _DLTensor.from_address(_capsule_pointer(capsule, _UNVERSIONED)), 0
    else:
        raise ArgumentError("__dlpack__ did not return an unused DLPack capsule: each capsule serves one consumer")
    dtype = dtypes.BY_DLPACK.get((tensor.dtype_code, tensor.dtype_bits))
    if dtype is None or tensor.dtype_lanes != 1:
        raise ArgumentError(
            f"DLPack dtype (code {tensor.dtype_code}, {tensor.dtype_bits} bits, {tensor.dtype_lanes} lanes) is not one "
            f"cuflash knows: use one of {', '.join(dtypes.BY_NAME)}"
        )
    shape = tuple(tensor.shape[: tensor.ndim])
    strides = tuple(tensor.strides[: tensor.ndim]) if tensor.strides else contiguous_strides(shape)
    kind = _DEVICE_KINDS.get(tensor.device_type, "")
    device = (kind, tensor.device_id) if kind == "cuda" else HOST
    # A copy may be read like the original; what is written to it would be lost.
    readonly = bool(flags & (_READ_ONLY | _IS_COPY))
    return TensorView((tensor.data or 0) + tensor.byte_offset, shape, strides, dtype, device, readonly, capsule)
