"""One table of element types: NumPy, DLPack and CUDA C names side by side.

bfloat16 in NumPy is `ml_dtypes.bfloat16`. Everything else in cuflash asks this table; nothing else
spells a dtype.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np


@dataclass(frozen=True)
class DType:
    """An element type.

    `name` is NumPy's; `dlpack` is the (type code, bits) pair of the DLPack standard; `element` is the
    name kernels use for it in CUDA C, "" where no kernel takes it.
    """

    name: str
    itemsize: int
    dlpack: tuple[int, int]
    element: str = ""
    numpy: np.dtype = field(compare=False, repr=False, default=np.dtype("V1"))

    def __str__(self) -> str:
        return self.name

    @cached_property
    def is_float(self) -> bool:
        return self.dlpack[0] in (2, 4)

    def __reduce__(self) -> tuple[Any, ...]:
        return _named, (self.name,)  # in another process too there is one of each


def _named(name: str) -> DType:
    return BY_NAME[name]


def _dtype(name: str, code: int, element: str = "", numpy: object = None) -> DType:
    np_dtype = np.dtype(numpy if numpy is not None else name)  # type: ignore[call-overload]
    return DType(name, np_dtype.itemsize, (code, np_dtype.itemsize * 8), element, np_dtype)


float16 = _dtype("float16", 2, "hw::Half")
bfloat16 = _dtype("bfloat16", 4, "hw::Bfloat16", ml_dtypes.bfloat16)
float32 = _dtype("float32", 2, "float")
float64 = _dtype("float64", 2)
int8 = _dtype("int8", 0)
int16 = _dtype("int16", 0)
int32 = _dtype("int32", 0)
int64 = _dtype("int64", 0)
uint8 = _dtype("uint8", 1)
uint16 = _dtype("uint16", 1)
uint32 = _dtype("uint32", 1)
uint64 = _dtype("uint64", 1)
bool_ = _dtype("bool", 6)

ALL = (
    float16, bfloat16, float32, float64,
    int8, int16, int32, int64, uint8, uint16, uint32, uint64, bool_,
)  # fmt: skip
KERNEL = (float16, bfloat16, float32)


def unknown(name: object) -> str:
    """What to say of a dtype that is not in the table."""
    said = str(name)
    if "complex" in said:
        return f"dtype {said}: attention is of real numbers; pass arrays of float16, bfloat16 or float32"
    if said in ("object", "O") or "<U" in said or "|S" in said or "str" in said:
        return f"dtype {said}: elements must be numbers; pass an array of float16, bfloat16 or float32"
    return f"dtype {said} is not one cuflash knows: use one of {', '.join(BY_NAME)}"


BY_NAME = {t.name: t for t in ALL}
BY_NUMPY = {t.numpy: t for t in ALL}
BY_DLPACK = {t.dlpack: t for t in ALL}
