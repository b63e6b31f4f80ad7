"""The machine that computes: the rules of `intervals` with NumPy, over many tiles at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .arithmetic import FUNCTIONS
from .machine import INT_MAX, INT_MIN, SPAN, Bool, Machine, Num, range_of_dtype


class Numbers(Machine):
    """Raw values are NumPy arrays that broadcast with each other, int64 and float32: one element a tile."""

    def __init__(self, arrays: Sequence[np.ndarray], scalars: Sequence[int | float], span: int = SPAN) -> None:
        super().__init__(span)
        self.arrays = arrays
        self.scalars = scalars

    def _int(self, name: str, a: Num, b: Num, low: int, high: int) -> Any:
        x, y = np.asarray(a.raw, np.int64), np.asarray(b.raw, np.int64)
        if name == "div":
            return x // y
        if name in ("shl", "shr", "floordiv", "floormod"):
            f = FUNCTIONS["mod" if name == "floormod" else name]
            return np.asarray(f(x.astype(np.int32), y.astype(np.int32)), np.int64)
        return FUNCTIONS[name](x, y)

    def _select(self, condition: Bool, a: Any, b: Any, low: int, high: int) -> Any:
        return np.where(condition, a, b)

    def _narrow(self, fits: Bool, a: Num, otherwise: int) -> Any:
        return np.where(fits, a.raw, otherwise)

    def _wrapped(self, a: Num) -> Any:
        return np.asarray(a.raw, np.int64).astype(np.int32).astype(np.int64)

    def _less(self, a: Num, b: Num) -> Bool:
        return np.less_equal(a.raw, b.raw)

    def _logic(self, name: str, *args: Bool) -> Bool:
        return {"and": np.logical_and, "or": np.logical_or, "not": np.logical_not}[name](*args)

    def _real(self, name: str, *args: Any) -> Any:
        with np.errstate(all="ignore"):
            return np.asarray(FUNCTIONS[name](*args), np.float32)

    def _real_less(self, a: Any, b: Any) -> Bool:
        return np.less(a, b)

    def _finite(self, a: Any) -> Bool:
        return np.isfinite(a)

    def _to_real(self, a: Any) -> Any:
        return np.asarray(a, np.float32)

    def _to_int(self, fits: Bool, a: Any) -> Any:
        return np.trunc(np.where(fits, a, np.float32(0))).astype(np.int64)

    def real_number(self, value: float) -> Any:
        with np.errstate(all="ignore"):
            return np.float32(value)

    def scalar(self, slot: int, kind: str) -> Any:
        value = self.scalars[slot]
        if kind == "float":
            return self._once(lambda *_: self.real_number(value), "scalar", str(slot))
        return self._once(lambda *_: Num(np.asarray(value, np.int64), INT_MIN, INT_MAX), "scalar", str(slot))

    def extent(self, slot: int, axis: int) -> Num:
        n = self.arrays[slot].shape[axis]
        return self._once(lambda *_: Num(np.asarray(n, np.int64), 0, INT_MAX), "extent", str(slot), str(axis))

    def element_range(self, slot: int) -> tuple[int, int]:
        return range_of_dtype(self.arrays[slot].dtype)

    def element(self, slot: int, known: Bool, indices: Sequence[Num], kind: str) -> Any:
        return self._read(slot, [i.raw for i in indices], kind)

    def _read(self, slot: int, indices: Sequence[Any], kind: str) -> Any:
        array = self.arrays[slot]
        if array.size == 0:
            return np.zeros((), np.float32 if kind == "float" else np.int64)
        at = tuple(np.clip(i, 0, n - 1) for i, n in zip(indices, array.shape, strict=True))
        values = np.asarray(array[at])
        return values.astype(np.float32) if kind == "float" else values.astype(np.int32).astype(np.int64)

    def extremes(self, slot: int, known: Bool, indices: Sequence[Num], last: Num, kind: str) -> tuple[Any, Any]:
        *leading, first = (i.raw for i in indices)
        width = np.where(known, np.asarray(last.raw) - first, 0)
        if self.span > SPAN:
            lo, hi = self._of_ranges(slot, leading, first, width, kind)
        else:
            lo = hi = self._read(slot, (*leading, first), kind)
            for step in range(1, 1 + int(width.max(initial=0))):
                x = self._read(slot, (*leading, first + np.minimum(step, width)), kind)
                lo, hi = np.minimum(lo, x), np.maximum(hi, x)
        if kind == "float":
            return lo, hi
        low, high = self.element_range(slot)
        return np.where(known, lo, low), np.where(known, hi, high)

    def _of_ranges(self, slot: int, leading: Sequence[Any], first: Any, width: Any, kind: str) -> tuple[Any, Any]:
        """Least and greatest from `first` on, `width` more: each distinct range once, all in one pass."""
        array = self.arrays[slot]
        if array.size == 0:
            return (self._read(slot, (*leading, first), kind),) * 2
        columns = array.shape[-1]
        at = [np.clip(i, 0, n - 1) for i, n in zip((*leading, first), array.shape, strict=True)]
        row = np.ravel_multi_index(tuple(np.broadcast_arrays(*at)), array.shape)
        begin, width = np.broadcast_arrays(row, np.minimum(width, columns - 1 - at[-1]))
        ranges, where = np.unique(np.stack([begin.reshape(-1), width.reshape(-1)]), axis=1, return_inverse=True)
        values = array.reshape(-1)
        values = values.astype(np.float32) if kind == "float" else values.astype(np.int32).astype(np.int64)
        values = np.append(values, values[:1])  # so that the end of the last range is an index
        ends = np.stack([ranges[0], ranges[0] + ranges[1] + 1], axis=1).reshape(-1)
        lo, hi = (f.reduceat(values, ends)[::2][where.reshape(-1)] for f in (np.minimum, np.maximum))
        return lo.reshape(begin.shape), hi.reshape(begin.shape)
