"""What carries out the rules of `intervals`; `machine_numpy` computes, over many tiles at once, `machine_c` writes C.

A machine has ints (`Num`), floats and conditions of its own. Each distinct operation is carried out once, so that equal
values are one object: `a is b` is how the rules see that the two ends of an interval are one value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

INT_MIN, INT_MAX = -(2**31), 2**31 - 1
SPAN = 256  # elements of a captured array that kernels look at one by one

Bool = Any  # a condition: True, False, or what a machine has for one


@dataclass(frozen=True, eq=False, slots=True)
class Num:
    """An int of a machine, and between which numbers it lies whatever the tile."""

    raw: Any
    low: int
    high: int


def _corners(f: Callable[[int, int], int], a: Num, b: Num) -> tuple[int, int]:
    ends = [f(i, j) for i in (a.low, a.high) for j in (b.low, b.high)]
    return min(ends), max(ends)


# What an operation on ints makes of the numbers between which its operands lie. `div` and `mod` are by a divisor > 0.
_ANY: Callable[..., tuple[int, int]] = lambda a, b: (INT_MIN, INT_MAX)  # noqa: E731
_STATIC: Mapping[str, Callable[..., tuple[int, int]]] = {
    "add": lambda a, b: (a.low + b.low, a.high + b.high),
    "sub": lambda a, b: (a.low - b.high, a.high - b.low),
    "mul": lambda a, b: _corners(lambda i, j: i * j, a, b),
    "div": lambda a, b: _corners(lambda i, j: i // j, a, b),
    "mod": lambda a, b: (0, min(b.high - 1, a.high) if a.low >= 0 else b.high - 1),
    "min": lambda a, b: (min(a.low, b.low), min(a.high, b.high)),
    "max": lambda a, b: (max(a.low, b.low), max(a.high, b.high)),
} | dict.fromkeys(("floordiv", "floormod", "and", "or", "xor", "shl", "shr"), _ANY)


class Machine:
    """Carries out what the rules say; each distinct operation once, so that equal values are one object.

    A subclass has the operations at the end.

    span   elements of a captured array that are looked at
    """

    def __init__(self, span: int = SPAN) -> None:
        self.span = span
        self._known: dict[Any, Any] = {}
        self._numbers: dict[int, Num] = {}

    def _once(self, make: Callable[..., Any], name: str, *args: Any) -> Any:
        key = (name, *(a if isinstance(a, bool | str) else id(a) for a in args))
        found = self._known.get(key)
        if found is None:
            # The operands are kept, or another could get the identity of one of them.
            found = self._known[key] = make(name, *args), args
        return found[0]

    def number(self, value: int) -> Num:
        if value not in self._numbers:
            self._numbers[value] = Num(value, value, value)
        return self._numbers[value]

    # Ints.

    def int(self, name: str, a: Num, b: Num) -> Num:
        if name in ("min", "max"):
            if a is b or (a.high <= b.low if name == "min" else a.low >= b.high):
                return a
            if b.high <= a.low if name == "min" else b.low >= a.high:
                return b
        if name == "sub" and a is b:
            return self.number(0)
        for x, other in ((a, b), (b, a)):
            if x.low == x.high == 0 and (name == "add" or (name == "sub" and x is b)):
                return other
            if x.low == x.high == 1 and (name == "mul" or (name == "div" and x is b)):
                return other
        low, high = _STATIC[name](a, b)
        if low == high:
            return self.number(low)
        return self._once(lambda name, a, b: Num(self._int(name, a, b, low, high), low, high), name, a, b)

    def select(self, condition: Bool, a: Num, b: Num) -> Num:
        if isinstance(condition, bool) or a is b:
            return a if condition is True or a is b else b
        low, high = min(a.low, b.low), max(a.high, b.high)
        return self._once(
            lambda _, c, a, b: Num(self._select(c, a.raw, b.raw, low, high), low, high), "select", condition, a, b
        )

    def narrow(self, fits: Bool, a: Num, otherwise: int) -> Num:
        """a, known to be within 32 bits where it fits, else a number."""
        if fits is True:
            return a
        low = max(min(a.low, otherwise), INT_MIN)
        high = min(max(a.high, otherwise), INT_MAX)
        make = lambda _, fits, a, other: Num(self._narrow(fits, a, other.low), low, high)  # noqa: E731
        return self._once(make, "narrow", fits, a, self.number(otherwise))

    def wrapped(self, a: Num) -> Num:
        """a modulo 2^32, with its sign."""
        if a.low >= INT_MIN and a.high <= INT_MAX:
            return a
        return self._once(lambda _, a: Num(self._wrapped(a), INT_MIN, INT_MAX), "wrapped", a)

    def at_most(self, a: Num, b: Num) -> Bool:
        """a <= b"""
        if a is b or a.high <= b.low:
            return True
        return False if a.low > b.high else self._once(lambda _, a, b: self._less(a, b), "at_most", a, b)

    def below(self, a: Num, b: Num) -> Bool:
        """a < b"""
        return self.no(self.at_most(b, a))

    # Conditions.

    def both(self, *conditions: Bool) -> Bool:
        return self._joined("and", False, conditions)

    def either(self, *conditions: Bool) -> Bool:
        return self._joined("or", True, conditions)

    def _joined(self, name: str, strong: bool, conditions: Iterable[Bool]) -> Bool:
        found: Bool = not strong
        for c in conditions:
            if found is strong or c is strong:
                return strong
            if c is (not strong) or c is found:
                continue
            found = c if isinstance(found, bool) else self._once(self._logic, name, found, c)
        return found

    def no(self, a: Bool) -> Bool:
        if isinstance(a, bool):
            return not a
        return self._once(self._logic, "not", a)

    # Floats: raw values of the machine, in float32.

    def real(self, name: str, *args: Any) -> Any:
        return self._once(self._real, name, *args)

    def real_less(self, a: Any, b: Any) -> Bool:
        return self._once(lambda _, a, b: self._real_less(a, b), "real_less", a, b)

    def finite(self, *args: Any) -> Bool:
        return self.both(*(self._once(lambda _, a: self._finite(a), "finite", a) for a in args))

    def to_real(self, a: Num) -> Any:
        return self._once(lambda _, a: self._to_real(a.raw), "to_real", a)

    def to_int(self, fits: Bool, a: Any) -> Num:
        """Towards 0; only looked at where it fits."""
        if fits is False:
            return self.number(0)
        return self._once(lambda _, fits, a: Num(self._to_int(fits, a), INT_MIN, INT_MAX), "to_int", fits, a)

    # What subclasses do.

    def _int(self, name: str, a: Num, b: Num, low: int, high: int) -> Any:
        raise NotImplementedError

    def _select(self, condition: Bool, a: Any, b: Any, low: int, high: int) -> Any:
        raise NotImplementedError

    def _narrow(self, fits: Bool, a: Num, otherwise: int) -> Any:
        raise NotImplementedError

    def _wrapped(self, a: Num) -> Any:
        raise NotImplementedError

    def _less(self, a: Num, b: Num) -> Bool:
        """a <= b"""
        raise NotImplementedError

    def _logic(self, name: str, *args: Bool) -> Bool:
        raise NotImplementedError

    def _real(self, name: str, *args: Any) -> Any:
        raise NotImplementedError

    def _real_less(self, a: Any, b: Any) -> Bool:
        """a < b"""
        raise NotImplementedError

    def _finite(self, a: Any) -> Bool:
        raise NotImplementedError

    def _to_real(self, a: Any) -> Any:
        raise NotImplementedError

    def _to_int(self, fits: Bool, a: Any) -> Any:
        raise NotImplementedError

    def real_number(self, value: float) -> Any:
        raise NotImplementedError

    def scalar(self, slot: int, kind: str) -> Any:
        """A captured number: a Num, or a raw float."""
        raise NotImplementedError

    def extent(self, slot: int, axis: int) -> Num:
        raise NotImplementedError

    def element_range(self, slot: int) -> tuple[int, int]:
        """Between which numbers the elements of a captured int or bool array lie, by its dtype."""
        raise NotImplementedError

    def element(self, slot: int, known: Bool, indices: Sequence[Num], kind: str) -> Any:
        """One element: a raw value; read only where known."""
        raise NotImplementedError

    def extremes(self, slot: int, known: Bool, indices: Sequence[Num], last: Num, kind: str) -> tuple[Any, Any]:
        """Raw least and greatest of the elements from the last index to `last`; read only where known.

        Floats: (NaN, NaN) if one of them is NaN.
        """
        raise NotImplementedError


def range_of_dtype(dtype: Any) -> tuple[int, int]:
    """Between which numbers the elements of a captured array of ints lie, as mods have them."""
    if dtype == np.bool_:
        return 0, 1
    if dtype.kind not in "iu" or dtype.itemsize > 4 or dtype == np.uint32:
        return INT_MIN, INT_MAX
    return int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
