"""What callers give to ready-made mods: ints, arrays of any framework, lists of ints; each checked."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import ArgumentError, require


def is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype") and not isinstance(x, (type, np.generic))


MOST = 2**31 - 1  # tokens, and elements of an axis: kernels count in 32 bits


def require_int(name: str, x: Any, least: int) -> int:
    require(
        isinstance(x, (int, np.integer)) and not isinstance(x, bool) and least <= int(x) <= MOST,
        f"{name}={x!r} must be an int of at least {least}, and at most {MOST}",
    )
    return int(x)


def require_ndim(name: str, x: Any, ndims: tuple[int, ...], shape: str) -> None:
    if not is_array(x):
        raise ArgumentError(f"{name} is a {type(x).__qualname__}: pass an array, {shape}")
    require(len(x.shape) in ndims, f"{name}.shape={tuple(x.shape)} must be {shape}: reshape it")
    require(
        all(n <= MOST for n in x.shape),
        f"{name}.shape={tuple(x.shape)}: no dimension may exceed {MOST}; pass a smaller array",
    )


def require_integers(name: str, x: Any, ndims: tuple[int, ...], shape: str, only: tuple[str, ...] = ()) -> None:
    require_ndim(name, x, ndims, shape)
    dtype = str(x.dtype).rpartition(".")[2]
    require(
        dtype in only if only else "int" in dtype,
        f"{name}.dtype={x.dtype} must be {' or '.join(only) or 'an integer'}: cast it",
    )


def integers(name: str, x: Any, ndims: tuple[int, ...], shape: str, only: tuple[str, ...] = ()) -> Any:
    """A checked integer array; of a list or tuple a NumPy array."""
    x = from_list(name, x, shape)
    require_integers(name, x, ndims, shape, only)
    return x


def from_list(name: str, x: Any, shape: str) -> Any:
    """Of a list or tuple an int32 array; anything else as it is."""
    if not isinstance(x, (list, tuple)):
        return x
    try:
        array = np.asarray(x)
    except ValueError:  # rows of several lengths
        array = np.asarray(None)
    if array.dtype.kind not in "iu" and array.size:
        raise ArgumentError(f"{name}={x!r} must be ints, {shape}")
    require(
        not array.size or bool(-(2**31) <= array.min() and array.max() < 2**31), f"{name}={x!r} must fit int32: {shape}"
    )
    return array.astype(np.int32)


def pair(name: str, x: Any) -> tuple[int, int]:
    pair = x if isinstance(x, (tuple, list)) else (x, x)
    require(len(pair) == 2, f"{name}={x!r} must be an int, or two of them: (high, wide)")
    first, second = (require_int(f"{name}[{i}]", n, 1) for i, n in enumerate(pair))
    return first, second
