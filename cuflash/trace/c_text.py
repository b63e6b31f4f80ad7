"""One expression as CUDA C: literals, operations, and where a kernel finds the values that mods capture."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence

from ..errors import UnsupportedError
from .expr import Expr, Mods, const
from .strata import FULL_RANGE, value_range

WORDS = 64  # of 8 bytes: kernels_cu/params/captured.cuh has the same number

C_TYPES = {"bool": "bool", "int": "i32", "float": "float"}
ELEMENTS = {
    "float16": "hw::Half", "bfloat16": "hw::Bfloat16", "float32": "float", "int8": "signed char", "int16": "short",
    "int32": "i32", "int64": "i64", "uint8": "u8", "uint16": "u16", "uint32": "u32", "uint64": "u64", "bool": "u8",
}  # fmt: skip

# What C writes for an operation on values of one kind. Divisions, shifts and conversions: `Writer._operation`.
_TEXT = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "neg": "-{0}",
    "lt": "{0} < {1}", "le": "{0} <= {1}", "gt": "{0} > {1}", "ge": "{0} >= {1}", "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "and": "{0} & {1}", "or": "{0} | {1}", "xor": "{0} ^ {1}", "where": "{0} ? {1} : {2}",
}  # fmt: skip
_CALLS = {
    "div": "float_div", "pow": "power_of", "exp": "exp_of", "exp2": "hw::exp2_approx", "log": "log_of",
    "log2": "hw::log2_approx", "tanh": "tanh_of", "tanh_approx": "hw::tanh_approx", "sigmoid": "sigmoid_of",
    "sqrt": "hw::sqrt_approx", "rsqrt": "hw::rsqrt_approx", "sin": "sin_of", "cos": "cos_of", "floor": "hw::floor",
    "ceil": "hw::ceil", "erf": "hw::erf", "expm1": "hw::expm1", "log1p": "hw::log1p", "atan": "hw::atan",
    "atan2": "hw::atan2", "signbit": "sign_bit", "float16": "rounded_to<hw::Half>",
    "bfloat16": "rounded_to<hw::Bfloat16>",
}  # fmt: skip


class Words:
    """Where a call's captured values lie in `Captured`, eight bytes each.

    An array has its address, its strides in elements, its extents; a number has a word; then come the addresses of the
    gradients of float arrays.
    """

    def __init__(self, mods: Mods) -> None:
        self.arrays: list[int] = []
        self._ndims = [array.ndim for array in mods.arrays]
        at = 0
        for array in mods.arrays:
            self.arrays.append(at)
            at += 1 + 2 * array.ndim
        self.scalars = range(at, at + len(mods.scalars))
        at += len(mods.scalars)
        self.gradients: dict[int, int] = {}
        for slot, array in enumerate(mods.arrays):
            if array.kind == "float":
                self.gradients[slot] = at
                at += 1
        if at > WORDS:
            raise UnsupportedError(
                f"the mods capture {len(mods.arrays)} arrays and {len(mods.scalars)} numbers, {at} words of the "
                f"{WORDS} that fit: stack arrays of one shape into one and index it"
            )
        self._no_gradients = [0] * len(self.gradients)
        form = "<" + "".join(f"{1 + 2 * a.ndim}q" for a in mods.arrays)
        form += "".join("q" if s.kind == "int" else "f4x" for s in mods.scalars)
        form += f"{len(self.gradients)}q"
        self._pack = struct.Struct(form + f"{8 * WORDS - struct.calcsize(form)}x").pack

    def extent(self, slot: int, axis: int) -> int:
        """The word that has an array's length along an axis."""
        return self.arrays[slot] + 1 + self._ndims[slot] + axis

    def pack(
        self,
        arrays: Iterable[tuple[int, Sequence[int], Sequence[int]]],
        scalars: Sequence[int | float],
        addresses: Mapping[int, int] | None = None,
    ) -> bytes:
        """The block's bytes, from (address, shape, strides) of each array, and those of gradients by slot."""
        values: list[int | float] = []
        for pointer, shape, strides in arrays:
            values += (pointer, *strides, *shape)
        values += scalars
        values += [addresses.get(slot, 0) for slot in self.gradients] if addresses else self._no_gradients
        return self._pack(*values)


NO_WORDS = bytes(8 * WORDS)


def literal(x: Expr) -> str:
    """A constant in C."""
    if x.kind == "bool":
        return str(x.value).lower()
    if x.kind == "int":
        return "(-2147483647 - 1)" if x.value == -(2**31) else f"({x.value})" if x.value < 0 else str(x.value)
    value = x.value
    if math.isnan(value):
        return "hw::bits_float(0x7fffffffu)"
    single = struct.unpack("<I", struct.pack("<f", value) if abs(value) <= _LARGEST else _infinite(value))[0]
    if single & 0x7FFFFFFF == 0x7F800000:
        return "-kInfinity" if value < 0 else "kInfinity"
    return f"{struct.unpack('<f', struct.pack('<I', single))[0]!r}f"


_LARGEST = 3.4028235677973366e38  # what still rounds to a finite float32


def _infinite(value: float) -> bytes:
    return struct.pack("<f", math.copysign(math.inf, value))


class Writer:
    """Statements that compute expressions: each distinct one is a local, named once.

    given   expressions that have a name already
    """

    def __init__(self, words: Words, given: Mapping[Expr, str], indent: str = "    ") -> None:
        self.words = words
        self.names = dict(given)
        self.lines: list[str] = []
        self.indent = indent

    def value(self, x: Expr) -> str:
        """What to write for an expression; statements it needs are added."""
        name = self.names.get(x)
        if name is not None:
            return name
        if x.op == "const":
            return literal(x)
        if x.op == "scalar":
            word = f"p.captured.words[{self.words.scalars[x.value]}]"
            return f"static_cast<i32>({word})" if x.kind == "int" else f"hw::bits_float(static_cast<u32>({word}))"
        if x.op == "extent":
            slot, axis = x.value
            return f"static_cast<i32>(p.captured.words[{self.words.extent(slot, axis)}])"
        text = self._operation(x, [self.value(a) for a in x.args])
        name = self.names[x] = f"v{len(self.lines)}"
        self.lines.append(f"const {C_TYPES[x.kind]} {name} = {text};")
        return name

    def statement(self, text: str) -> None:
        self.lines.append(text)

    def text(self) -> str:
        return "".join(f"{self.indent}{line}\n" for line in self.lines)

    def _operation(self, x: Expr, args: list[str]) -> str:
        if x.op == "load":
            return f"load_{x.value}({', '.join(['p', *args])})"
        if x.op == "dot":
            return f"dot_{'_'.join(map(str, x.value))}({', '.join(['p', *args])})"
        inner = x.args[0].kind if x.args else x.kind
        if x.op in ("floordiv", "mod"):
            return self._division(x, args)
        if x.op in ("min", "max"):
            return f"{f'float_{x.op}' if x.kind == 'float' else f'{x.op}_of'}({args[0]}, {args[1]})"
        if x.op == "abs":
            return f"hw::abs({args[0]})" if x.kind == "float" else f"{args[0]} < 0 ? -{args[0]} : {args[0]}"
        if x.op == "not":
            return f"!{args[0]}" if x.kind == "bool" else f"~{args[0]}"
        if x.op in ("shl", "shr"):
            n = x.args[1]
            if n.op == "const" and 0 <= n.value < 32 and x.op == "shr":
                return f"{args[0]} >> {args[1]}"
            return f"shift_{'left' if x.op == 'shl' else 'right'}({args[0]}, {args[1]})"
        if x.op == "div" and x.args[1].op == "const" and x.args[1].value != 0.0:
            reciprocal = _reciprocal(x.args[1].value)
            if math.frexp(x.args[1].value)[0] in (0.5, -0.5):  # exact by a power of two
                return f"{args[0]} * {reciprocal}"
            return f"float_div_by({args[0]}, {args[1]}, {reciprocal})"
        if x.op == "int":
            return f"hw::to_int({args[0]})" if inner == "float" else f"static_cast<i32>({args[0]})"
        if x.op == "float":
            return f"static_cast<float>({args[0]})"
        if x.op == "bool":
            return f"{args[0]} != {'0.0f' if inner == 'float' else '0'}"
        if x.op in _CALLS:
            return f"{_CALLS[x.op]}({', '.join(args)})"
        return _TEXT[x.op].format(*args)

    def _division(self, x: Expr, args: list[str]) -> str:
        name = "div" if x.op == "floordiv" else "mod"
        if x.kind == "float":
            return f"float_{x.op}({args[0]}, {args[1]})"
        divisor = value_range(x.args[1])
        if divisor[0] <= 0:
            return f"floor_{name}({args[0]}, {args[1]})"
        low, high = value_range(x.args[0])
        if low >= 0 and (low, high) != FULL_RANGE:
            sign = "/" if x.op == "floordiv" else "%"
            return f"static_cast<i32>(static_cast<u32>({args[0]}) {sign} static_cast<u32>({args[1]}))"
        return f"floor_{name}_positive({args[0]}, {args[1]})"


def _reciprocal(value: float) -> str:
    return literal(const(1.0 / value))
