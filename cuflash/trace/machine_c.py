"""The machine that writes: the rules of `intervals` as statements of C."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .c_text import C_TYPES, Words, literal
from .expr import Mods, const
from .machine import INT_MAX, INT_MIN, Bool, Machine, Num, range_of_dtype


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
        return range_of_dtype(self.mods.arrays[slot].dtype.numpy)

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
