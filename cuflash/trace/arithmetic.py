"""What the operations of `expr.OPS` do to numbers, with NumPy: ints are int32 and wrap, floats have one dtype."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np


def _floordiv(a: Any, b: Any) -> Any:
    if np.asarray(a).dtype.kind == "f":
        return np.floor(a / b)
    return np.where(b == 0, np.int32(0), np.floor_divide(a, np.where(b == 0, np.int32(1), b)))


def _mod(a: Any, b: Any) -> Any:
    if np.asarray(a).dtype.kind == "f":
        return a - np.floor(a / b) * b
    return np.where(b == 0, np.int32(0), np.mod(a, np.where(b == 0, np.int32(1), b)))


def _shl(a: Any, n: Any) -> Any:
    return np.where((n >= 0) & (n < 32), np.left_shift(a, n & 31), np.int32(0))


def _shr(a: Any, n: Any) -> Any:
    return np.right_shift(a, np.where((n >= 0) & (n < 32), n, 31))


def _not(a: Any) -> Any:
    return ~np.asarray(a)


def _int(a: Any) -> Any:
    """Towards 0; what an int32 cannot hold becomes its nearest end, NaN 0, as the hardware's conversion does."""
    a = np.asarray(a)
    if a.dtype.kind != "f":
        return a.astype(np.int32)
    wide = np.trunc(np.nan_to_num(a.astype(np.float64), nan=0.0))
    return np.clip(wide, -(2.0**31), 2.0**31 - 1).astype(np.int32)


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


_erf_of_numbers = np.vectorize(math.erf, otypes=[np.float64])


def _erf(x: Any) -> Any:
    x = np.asarray(x)
    return _erf_of_numbers(x).astype(x.dtype) if x.size else x


def _float16(x: Any) -> Any:
    x = np.asarray(x)
    return x.astype(np.float16).astype(x.dtype)


def _bfloat16(x: Any) -> Any:
    x = np.asarray(x)
    bits = x.astype(np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + (bits >> 16 & 1))) & np.uint32(0xFFFF0000)  # ties to even
    return np.where(np.isnan(x), x, rounded.view(np.float32).astype(x.dtype))


# The functions of `expr.OPS`, on arrays of one kind.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "floordiv": _floordiv, "mod": _mod,
    "pow": np.power, "neg": np.negative, "abs": np.abs, "min": np.minimum, "max": np.maximum, "lt": np.less,
    "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": _not, "shl": _shl, "shr": _shr,
    "where": np.where, "exp": np.exp, "exp2": np.exp2, "log": np.log, "log2": np.log2, "tanh": np.tanh,
    "tanh_approx": np.tanh, "sigmoid": _sigmoid, "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x), "sin": np.sin,
    "cos": np.cos, "erf": _erf, "expm1": np.expm1, "log1p": np.log1p, "atan": np.arctan, "atan2": np.arctan2,
    "signbit": np.signbit, "float16": _float16, "bfloat16": _bfloat16, "floor": np.floor,
    "ceil": np.ceil, "int": _int, "bool": lambda x: np.asarray(x) != 0,
}  # fmt: skip


def apply(op: str, kind: str, *values: Any) -> Any:
    """One operation on Python numbers of one kind, as a NumPy scalar.

    >>> int(apply("mod", "int", -7, 3)), float(apply("div", "float", 1.0, 4.0))
    (2, 0.25)
    """
    with np.errstate(all="ignore"):
        return FUNCTIONS[op](*[made(v, kind_of(v)) for v in values])


def kind_of(value: Any) -> str:
    return "bool" if isinstance(value, bool) else "int" if isinstance(value, int) else "float"


def made(x: Any, kind: str, real: Any = np.float64) -> Any:
    """A value as an array of its kind, floats as `real`."""
    return np.asarray(x, {"bool": np.bool_, "int": np.int32, "float": real}[kind])
