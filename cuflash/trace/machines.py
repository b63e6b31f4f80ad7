"""What carries out the rules of `intervals`: `Numbers` with NumPy, over many tiles at once, `Text` by writing C.

A machine has ints (`Num`), floats and conditions of its own. Each distinct operation is carried out once, so that equal
values are one object: `a is b` is how the rules see that the two ends of an interval are one value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .emit_c import C_TYPES, literal
from .emit_numpy import FUNCTIONS
from .expr import Mods, const

if TYPE_CHECKING:
    from .emit_c import Words

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


# With NumPy -----------------------------------------------------------------------------------------------------------


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
        return _element_range(self.arrays[slot].dtype)

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


def _element_range(dtype: Any) -> tuple[int, int]:
    if dtype == np.bool_:
        return 0, 1
    if dtype.kind not in "iu" or dtype.itemsize > 4 or dtype == np.uint32:
        return INT_MIN, INT_MAX
    return int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)


# As C ----------------------------------------------------------------------------------------------------------------


class Text(Machine):
    """Raw values are C expressions; each operation is a statement that names its result."""

    def __init__(self, mods: Mods, words: Words) -> None:
        super().__init__()
        self.mods = mods
        self.words = words
        self.lines: list[str] = []
        self.indent = "    "

    def line(self, text: str) -> None:
        self.lines.append(f"{self.indent}{text}\n")

    def _named(self, kind: str, text: str) -> str:
        name = f"n{len(self.lines)}"
        self.line(f"const {kind} {name} = {text};")
        return name

    @staticmethod
    def _is_wide(low: int, high: int) -> bool:
        return low < INT_MIN or high > INT_MAX

    def write(self, x: Num, wide: bool = False) -> str:
        if isinstance(x.raw, str):
            return f"static_cast<i64>({x.raw})" if wide and not self._is_wide(x.low, x.high) else x.raw
        return _integer(x.raw, wide)

    def _int(self, name: str, a: Num, b: Num, low: int, high: int) -> Any:
        wide = any(self._is_wide(*ends) for ends in ((a.low, a.high), (b.low, b.high), (low, high)))
        x, y = self.write(a, wide), self.write(b, wide)
        computed = "i64" if wide else "i32"
        if name in ("min", "max"):
            text = f"{name}_of({x}, {y})"
        elif name in _CALLS:
            text = f"{_CALLS[name]}({x}, {y})"
        elif name not in ("div", "mod"):
            text = f"{x} {_SIGNS[name]} {y}"
        elif a.low >= 0:
            computed = "u64" if wide else "u32"
            text = f"static_cast<{computed}>({x}) {_SIGNS[name]} static_cast<{computed}>({y})"
        elif not wide:
            text = f"floor_{name}_positive({x}, {y})"
        elif name == "div":
            text = f"{x} >= 0 ? {x} / {y} : -1 - (-1 - {x}) / {y}"
        else:
            text = f"{x} % {y} + ({x} % {y} < 0 ? {y} : 0)"
        kind = "i64" if self._is_wide(low, high) else "i32"
        return self._named(kind, text if kind == computed else f"static_cast<{kind}>({text})")

    def _select(self, condition: Bool, a: Any, b: Any, low: int, high: int) -> Any:
        wide = self._is_wide(low, high)
        kind = "i64" if wide else "i32"
        x, y = (v if isinstance(v, str) else _integer(v, wide) for v in (a, b))
        return self._named(kind, f"{condition} ? {x} : {y}")

    def _narrow(self, fits: Bool, a: Num, otherwise: int) -> Any:
        value = f"static_cast<i32>({self.write(a)})" if self._is_wide(a.low, a.high) else self.write(a)
        return self._named("i32", f"{fits} ? {value} : {_integer(otherwise, False)}")

    def _wrapped(self, a: Num) -> Any:
        return self._named("i32", f"static_cast<i32>({self.write(a)})")

    def _less(self, a: Num, b: Num) -> Bool:
        wide = self._is_wide(a.low, a.high) or self._is_wide(b.low, b.high)
        return self._named("bool", f"{self.write(a, wide)} <= {self.write(b, wide)}")

    def _logic(self, name: str, *args: Bool) -> Bool:
        return self._named("bool", f"!{args[0]}" if name == "not" else f"{args[0]} {_SIGNS[name]} {args[1]}")

    def _real(self, name: str, *args: Any) -> Any:
        if name in ("min", "max"):
            return self._named("float", f"{name}_of({args[0]}, {args[1]})")
        if name in ("floor", "ceil"):
            return self._named("float", f"hw::{name}({args[0]})")
        if name == "where":
            return self._named("float", f"{args[0]} ? {args[1]} : {args[2]}")
        return self._named("float", f"-{args[0]}" if name == "neg" else f"{args[0]} {_REAL_SIGNS[name]} {args[1]}")

    def _real_less(self, a: Any, b: Any) -> Bool:
        return self._named("bool", f"{a} < {b}")

    def _finite(self, a: Any) -> Bool:
        return self._named("bool", f"{a} - {a} == 0.0f")

    def _to_real(self, a: Any) -> Any:
        return self._named("float", f"static_cast<float>({a if isinstance(a, str) else _integer(a, False)})")

    def _to_int(self, fits: Bool, a: Any) -> Any:
        return self._named("i32", f"{'' if fits is True else f'!{fits} ? 0 : '}static_cast<i32>({a})")

    def real_number(self, value: float) -> Any:
        text = literal(const(float(value)))
        return f"({text})" if text.startswith("-") else text

    def scalar(self, slot: int, kind: str) -> Any:
        word = f"p.captured.words[{self.words.scalars[slot]}]"
        if kind == "float":
            return self._once(
                lambda *_: self._named("float", f"hw::bits_float(static_cast<u32>({word}))"), "scalar", word
            )
        make_it = lambda *_: Num(self._named("i32", f"static_cast<i32>({word})"), INT_MIN, INT_MAX)  # noqa: E731
        return self._once(make_it, "scalar", word)

    def extent(self, slot: int, axis: int) -> Num:
        word = f"p.captured.words[{self.words.extent(slot, axis)}]"
        make_it = lambda *_: Num(self._named("i32", f"static_cast<i32>({word})"), 0, INT_MAX)  # noqa: E731
        return self._once(make_it, "extent", word)

    def element_range(self, slot: int) -> tuple[int, int]:
        return _element_range(self.mods.arrays[slot].dtype.numpy)

    def element(self, slot: int, known: Bool, indices: Sequence[Num], kind: str) -> Any:
        read = self._read(slot, [self.write(i) for i in indices])
        name = C_TYPES["float" if kind == "float" else "int"]
        # What is not known may lie outside.
        return self._named(name, read if known is True else f"{known} ? {read} : 0")

    def _read(self, slot: int, indices: Sequence[str]) -> str:
        return f"load_{slot}({', '.join(['p', *indices])})"

    def extremes(self, slot: int, known: Bool, indices: Sequence[Num], last: Num, kind: str) -> tuple[Any, Any]:
        *leading, first = (self.write(i) for i in indices)
        end = self.write(last)
        lo, hi = f"lo{len(self.lines)}", f"hi{len(self.lines)}"
        read = self._read(slot, [*leading, "i"])
        if kind == "float":
            start = f"{known} ? {self._read(slot, [*leading, first])} : 0.0f"
            self.line(f"float {lo} = {start}, {hi} = {lo};")
            # A NaN takes the place of any number, and no number that of a NaN.
            update = f"{lo} = ({lo} != {lo}) | ({lo} <= x) ? {lo} : x; {hi} = ({hi} != {hi}) | ({hi} >= x) ? {hi} : x;"
        else:
            low, high = self.element_range(slot)
            self.line(f"i32 {lo} = {known} ? {_integer(high, False)} : {_integer(low, False)};")
            self.line(f"i32 {hi} = {known} ? {_integer(low, False)} : {_integer(high, False)};")
            update = f"{lo} = min_of({lo}, x); {hi} = max_of({hi}, x);"
        condition = f"i <= {end}" if known is True else f"{known} && i <= {end}"
        self.line(f"for (i32 i = {first}; {condition}; ++i) {{")
        self.line(f"  const {C_TYPES['float' if kind == 'float' else 'int']} x = {read};")
        self.line(f"  {update}")
        self.line("}")
        return lo, hi


_SIGNS = {"add": "+", "sub": "-", "mul": "*", "div": "/", "mod": "%", "and": "&", "or": "|", "xor": "^"}
_CALLS = {"shl": "shift_left", "shr": "shift_right", "floordiv": "floor_div", "floormod": "floor_mod"}
_REAL_SIGNS = {"add": "+", "sub": "-", "mul": "*", "div": "/"}


def _integer(value: int, wide: bool) -> str:
    if value == INT_MIN and not wide:
        return "(-2147483647 - 1)"
    text = f"{value}{'ll' if wide else ''}"
    return f"({text})" if value < 0 else text
