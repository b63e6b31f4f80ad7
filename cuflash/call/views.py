"""Views of the arrays of a call: where they lie, and how they are shaped, whatever framework they are of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import frameworks
from ..array import TensorView, of_numpy
from ..errors import ArgumentError, CuflashError, require
from ..frameworks import Framework


def views_of(framework: Framework, arrays: dict[str, Any], first: str = "q") -> dict[str, TensorView]:
    """Views of arrays that must all be of one framework, that of the array named `first`."""
    views: dict[str, TensorView] = {}
    known: type | None = None
    for name, x in arrays.items():
        if type(x) is not known:
            other = frameworks.of(x, name)
            if other is not framework:
                raise ArgumentError(
                    f"{name} is a {other.NAME} array and {first} a {framework.NAME} array: all arrays must be of "
                    "one framework; convert with from_dlpack, which copies nothing"
                )
            known = type(x)
        try:
            views[name] = framework.view(x)
        except CuflashError as error:
            raise type(error)(f"{name}: {error}") from error
    return views


def lengths_view(framework: Framework, x: Any, name: str) -> TensorView:
    """View of cu_seqlens, seqused or page_table: of the framework of q, or plain host values."""
    if isinstance(x, (list, tuple)):
        require(name != "page_table", f"page_table is a {type(x).__name__}: pass an int32 array [batch, max_pages]")
        return of_numpy(host_lengths(name, x))
    if isinstance(x, np.ndarray):
        own = frameworks.of(x)
        # Beside arrays of another framework it may have to be copied to a device, as it lies.
        x, framework = x if own is framework else np.ascontiguousarray(x), own
    return views_of(framework, {name: x})[name]


def host_lengths(name: str, x: Sequence[Any]) -> np.ndarray:
    """cu_seqlens or seqused given as a list or tuple, int32."""
    for i, value in enumerate(x):
        if not isinstance(value, (int, np.integer)) or not -(2**31) <= value < 2**31:
            raise ArgumentError(f"{name}[{i}]={value!r} must be an int of 32 bits")
    return np.array(x, np.int32)
