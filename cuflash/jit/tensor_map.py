"""Tensor maps: what a tensor copy of compute capability 9.0 (kernels_cu/hw_cuda/tma.cuh) knows of a tensor, 128 bytes.

    k_map = tensor_map.encode(
        "cuda", k.ptr, "bfloat16", (128, heads, tokens), (head_stride, token_stride), (64, 1, 128), swizzle=128
    )
    params = layout.load("...Params").pack(k_map=k_map, ...)    # a field `TensorMap k_map;`

Axes are counted as the instruction counts coordinates: innermost first. The driver writes the map for a GPU; for the
emulator it is written here, in a form of our own (NVIDIA documents none), under the same rules. Nothing is copied and
nothing waits for the GPU.
"""

from __future__ import annotations

import ctypes
import functools
import struct

from ..errors import ArgumentError
from . import driver

BYTES = 128
MAX_AXIS, MAX_STRIDE, MAX_BOX = 2**32, 2**40, 256

# dtype -> bytes of an element, and CUtensorMapDataType; swizzle in bytes -> CUtensorMapSwizzle.
_DTYPES = {"float16": (2, 6), "bfloat16": (2, 9), "float32": (4, 7)}
_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
_L2_PROMOTION_256B = 3

_EMULATED = struct.Struct("<I4B Q 5I 5H H 4Q 48x")  # MapBytes in kernels_cu/hw_emu/sm90.cpp
_MAGIC = 0x50414D54
assert _EMULATED.size == BYTES


@functools.lru_cache(maxsize=1024)  # allocators give the same addresses again and again
def encode(
    backend: str,
    address: int,
    dtype: str,
    dims: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    swizzle: int = 0,
    device: int | None = None,
) -> bytes:
    """The 128 bytes of a map.

    backend  "cuda" or "emulator"       address  of the tensor's first element
    dtype    "float16", "bfloat16" or "float32"
    dims     elements of each axis, innermost first; the elements of the innermost lie side by side
    strides  bytes from one index to the next, of each axis but the innermost
    box      elements a copy moves along each axis
    swizzle  32, 64 or 128: a box's rows have so many bytes, and their 16-byte units are exchanged so that eight rows
             of one column lie in different banks; 0: they are not
    device   index of the GPU whose memory it is, for threads that have not used one yet; None: the first

    Raises ArgumentError where the driver would refuse, UnsupportedError where no driver is, DeviceError where it fails.

    >>> len(encode("emulator", 4096, "bfloat16", (128, 1000), (256,), (64, 16), swizzle=128))
    128
    >>> encode("emulator", 4096, "bfloat16", (100, 1000), (200,), (64, 16))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    cuflash.errors.ArgumentError: strides=(200,) must be multiples of 16 below 2^40: ...
    """
    _check(address, dtype, dims, strides, box, swizzle)
    if backend == "emulator":
        return _emulated(address, dtype, dims, strides, box, swizzle)
    return _driver(address, dtype, dims, strides, box, swizzle, device)


def _check(
    address: int, dtype: str, dims: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], swizzle: int
) -> None:
    copy = "copy the tensor, or use another kernel"
    if dtype not in _DTYPES:
        raise ArgumentError(f"dtype={dtype!r} must be one of {', '.join(_DTYPES)}")
    size = _DTYPES[dtype][0]
    if not 2 <= len(dims) <= 5 or len(strides) != len(dims) - 1 or len(box) != len(dims):
        raise ArgumentError(f"dims={dims}, strides={strides}, box={box} must be 2 to 5 axes, one stride fewer, as many")
    if address % 16:
        raise ArgumentError(f"address={address:#x} must be a multiple of 16: {copy}")
    if not all(1 <= n <= MAX_AXIS for n in dims):
        raise ArgumentError(f"dims={dims} must be from 1 to 2^32: launch nothing for an empty tensor")
    if not all(n % 16 == 0 and 0 <= n < MAX_STRIDE for n in strides):
        raise ArgumentError(f"strides={strides} must be multiples of 16 below 2^40: {copy}")
    if not all(1 <= n <= MAX_BOX for n in box):
        raise ArgumentError(f"box={box} must be from 1 to {MAX_BOX} along each axis: copy in several boxes")
    if swizzle not in _SWIZZLES:
        raise ArgumentError(f"swizzle={swizzle} must be one of {', '.join(map(str, _SWIZZLES))}")
    row = box[0] * size
    if row % 16:
        raise ArgumentError(f"box={box}: a row of {row} bytes must be a multiple of 16: widen it, zeros fill the rest")
    if swizzle and row != swizzle:
        # The driver allows less; where such rows lie is not documented.
        raise ArgumentError(f"box={box}: a row of {row} bytes must be swizzle={swizzle}: split or widen the box")


def _emulated(
    address: int, dtype: str, dims: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], swizzle: int
) -> bytes:
    def filled(values: tuple[int, ...], count: int) -> tuple[int, ...]:
        return (*values, *[0] * (count - len(values)))

    return _EMULATED.pack(
        _MAGIC,
        *(len(dims), _DTYPES[dtype][0], _SWIZZLES[swizzle], 0),
        address,
        *filled(tuple(n - 1 for n in dims), 5),
        *filled(box, 5),
        0,
        *filled(strides, 4),
    )


def _driver(
    address: int,
    dtype: str,
    dims: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    swizzle: int,
    device: int | None,
) -> bytes:
    # The driver wants its output at a multiple of 64 bytes, which the objects of cuda.bindings are not.
    memory = ctypes.create_string_buffer(BYTES + 127)
    start = -ctypes.addressof(memory) % 128
    rank = len(dims)
    arguments = (
        ctypes.c_void_p(ctypes.addressof(memory) + start),
        ctypes.c_int(_DTYPES[dtype][1]),
        ctypes.c_uint32(rank),
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * rank)(*dims),
        (ctypes.c_uint64 * (rank - 1))(*strides),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*[1] * rank),  # strides in elements
        ctypes.c_int(0),  # not interleaved
        ctypes.c_int(_SWIZZLES[swizzle]),
        ctypes.c_int(_L2_PROMOTION_256B),
        ctypes.c_int(0),  # zeros outside of the tensor
    )
    with driver.context(device):
        status = driver.function("cuTensorMapEncodeTiled")(*arguments)
    if status == driver.INVALID_VALUE:
        raise ArgumentError(
            f"cuTensorMapEncodeTiled: error {status} for address={address:#x}, dtype={dtype}, dims={dims}, "
            f"strides={strides}, box={box}, swizzle={swizzle}: copy the tensor, or use another kernel"
        )
    if status != 0:
        raise driver.failed("cuTensorMapEncodeTiled", status)
    return memory.raw[start : start + BYTES]
