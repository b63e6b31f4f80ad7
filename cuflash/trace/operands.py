"""What a traced mod computes with, as data: numbers with an expression, captured arrays, their products.

`functions` says what is done with them; `symbols` gives them Python's operators and the frameworks' protocols.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from ..dtypes import DType
from ..errors import TraceError
from .expr import Expr, const


class Tracing(Protocol):
    """What symbols ask of the trace they belong to."""

    torch: bool

    @property
    def names(self) -> dict[tuple[str, int], str]:
        """Of captured values, for messages."""
        ...

    def concrete(self, x: Expr) -> Any:
        """The value of an expression of captured numbers alone, which become constants of this trace."""
        ...

    def extent(self, array: Captured, axis: int) -> Any:
        """A captured array's length along an axis, a number like any captured one."""
        ...

    def same_extent(self, a: Captured, b: Captured) -> None:
        """That the last axes of both are as long as each other, now and in later calls."""
        ...


class Captured:
    """A captured array: `array` is there while the trace lasts, and is asked for nothing but its shape and dtype."""

    __slots__ = ("array", "dtype", "name", "ndim", "slot", "variable")

    def __init__(self, array: Any, dtype: DType, slot: int, name: str, variable: str) -> None:
        self.array, self.dtype, self.ndim = array, dtype, len(array.shape)
        self.slot, self.name, self.variable = slot, name, variable

    @property
    def kind(self) -> str:
        return "bool" if self.dtype.name == "bool" else "float" if self.dtype.is_float else "int"


class Operand:
    """Something traced: `trace` is what it belongs to."""

    __slots__ = ("trace",)
    trace: Tracing
    shape: Any
    dtype: Any

    def __getitem__(self, index: Any) -> Any:
        raise NotImplementedError


class Number(Operand):
    """A number that has no value yet, but an expression."""

    __slots__ = ("expr",)
    expr: Expr


class Array(Operand):
    """A captured array, its first axes indexed: what is left has at least one."""

    __slots__ = ("captured", "dtype_name", "indices")
    captured: Captured
    indices: tuple[Expr, ...]
    dtype_name: str

    @property
    def ndim(self) -> int:
        return self.captured.ndim - len(self.indices)

    def __iter__(self) -> Iterator[Any]:
        raise NotImplementedError

    def converted(self, dtype_name: str) -> Any:
        """The array with elements of another dtype."""
        raise NotImplementedError

    def times(self, other: Array) -> Any:
        """Two rows, element by element."""
        raise NotImplementedError


class ArrayProduct:
    """Two rows, element by element: `.sum(-1)` makes their dot product."""

    __slots__ = ("a", "b")
    a: Array
    b: Array


def lift(x: Any) -> Expr:
    """The expression of a traced value, or of a number that stands in the mod."""
    kind = type(x)
    if issubclass(kind, Number):
        return x.expr
    if kind in (bool, int, float):
        return const(x)
    if issubclass(kind, Array):
        raise TraceError(
            f"{x!r} still has {x.ndim} axes, and a mod computes with single numbers: index all of them first, as in "
            f"{x.captured.name}[{', '.join('bhij'[: x.captured.ndim])}]"
            + (", or take the dot product of two rows, a[i] @ b[j]" if x.ndim == 1 else "")
        )
    if issubclass(kind, ArrayProduct):
        raise TraceError(f"{x!r} is a product of rows: sum it, (a[i] * b[j]).sum(-1)")
    value: Any = x.item() if isinstance(x, np.generic) else x
    if isinstance(value, bool | int | float):
        return const(int(value) if isinstance(value, int) and not isinstance(value, bool) else value)
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        if len(x.shape) == 0 and "racer" not in type(x).__name__:
            return lift(x.item())  # torch.tensor(-inf) and the like, made by the mod itself
        raise TraceError(
            f"an array of shape {tuple(x.shape)} is used that the mod made itself, or reached in a way that cannot be "
            "followed: make it outside of the mod and capture it by name"
        )
    raise TraceError(
        f"{x!r} (a {x.__class__.__qualname__}) is used as a number: a mod computes with numbers and arrays"
    )
