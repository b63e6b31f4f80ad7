"""The expressions a mod is made of: scores, coordinates, numbers and captured values, and what is computed from them.

An `Expr` is a node of a graph without cycles. Equal expressions are one object: `is` compares them, a dictionary
finds them, and what is written twice is computed once. Three kinds of value:

    "bool"    true or false
    "int"     32 bits with their sign; sums and products wrap, as in NumPy's int32 and in C with -fwrapv
    "float"   float32

    leaves                what                                                   kind
    score                 the score that comes in                                float
    b h q_idx kv_idx      which sequence, query head, query and key              int
    q_len kv_len          lengths of the sequence                                int
    const (value)         a Python bool, int or float                            by value
    scalar (value: slot)  a captured number, read at run time                    int or float
    extent (value: slot, axis)  the length of a captured array along an axis     int
    load (value: slot)    an element of a captured array; args: all its indices  by the array's dtype
    dot (value: slots)    of rows of two captured arrays, along their last axis; args: the other indices of both  float

`OPS` lists the others with what they take and give. Kinds are made alike where they meet: bool < int < float.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any
from weakref import WeakValueDictionary

from ..dtypes import DType
from ..errors import TraceError
from .arithmetic import apply

COORDINATES = ("b", "h", "q_idx", "kv_idx", "q_len", "kv_len")
RANK = {"bool": 0, "int": 1, "float": 2}

# op -> (number of arguments, what the arguments are made, what comes out); "same": the highest kind among them.
OPS: dict[str, tuple[int, str, str]] = {
    "add": (2, "number", "same"),
    "sub": (2, "number", "same"),
    "mul": (2, "number", "same"),
    "div": (2, "float", "float"),
    "floordiv": (2, "number", "same"),  # rounds down, as Python does; by 0: 0 for ints
    "mod": (2, "number", "same"),  # has the sign of the divisor, as Python's; by 0: 0 for ints
    "pow": (2, "float", "float"),
    "neg": (1, "number", "same"),
    "abs": (1, "number", "same"),
    "min": (2, "number", "same"),
    "max": (2, "number", "same"),
    "lt": (2, "same", "bool"),
    "le": (2, "same", "bool"),
    "gt": (2, "same", "bool"),
    "ge": (2, "same", "bool"),
    "eq": (2, "same", "bool"),
    "ne": (2, "same", "bool"),
    "and": (2, "bits", "same"),  # of bools: logical; of ints: bit by bit
    "or": (2, "bits", "same"),
    "xor": (2, "bits", "same"),
    "not": (1, "bits", "same"),
    "shl": (2, "int", "int"),  # by 32 and more, or less than 0: 0
    "shr": (2, "int", "int"),  # keeps the sign; by 32 and more, or less than 0: 0 or -1
    "where": (3, "where", "same"),
    "exp": (1, "float", "float"),
    "exp2": (1, "float", "float"),
    "log": (1, "float", "float"),
    "log2": (1, "float", "float"),
    "tanh": (1, "float", "float"),
    "tanh_approx": (1, "float", "float"),  # the hardware's: relative error about 2^-11
    "sigmoid": (1, "float", "float"),
    "sqrt": (1, "float", "float"),
    "rsqrt": (1, "float", "float"),
    "sin": (1, "float", "float"),
    "cos": (1, "float", "float"),
    "erf": (1, "float", "float"),
    "expm1": (1, "float", "float"),
    "log1p": (1, "float", "float"),
    "atan": (1, "float", "float"),
    "atan2": (2, "float", "float"),
    "signbit": (1, "float", "bool"),  # true of -0.0, too
    "float16": (1, "float", "float"),  # rounded to what that dtype has
    "bfloat16": (1, "float", "float"),
    "floor": (1, "float", "float"),
    "ceil": (1, "float", "float"),
    "float": (1, "float", "float"),
    "int": (1, "any", "int"),  # towards 0
    "bool": (1, "any", "bool"),  # != 0
}


class Expr:
    """A node. Make one with `make`, `const`, `coordinate`, `scalar` or `load`, never by hand.

    op     a leaf's name or a key of OPS
    args   the expressions it is computed from
    kind   "bool", "int" or "float"
    value  of a const its value, of a scalar or load the slot
    """

    __slots__ = ("__weakref__", "args", "kind", "op", "value")

    op: str
    args: tuple[Expr, ...]
    kind: str
    value: Any

    def __repr__(self) -> str:
        return show(self)

    def __reduce__(self) -> Any:
        return intern, (self.op, self.args, self.kind, self.value)


_known: WeakValueDictionary[Any, Expr] = WeakValueDictionary()


def intern(op: str, args: tuple[Expr, ...], kind: str, value: Any = None) -> Expr:
    # NOTE: 0.0 and -0.0, and 1 and True, are equal in Python and different here.
    key = op, args, kind, repr(value)
    found = _known.get(key)
    if found is None:
        found = Expr()
        found.op, found.args, found.kind, found.value = op, args, kind, value
        found = _known.setdefault(key, found)
    return found


SCORE = intern("score", (), "float")
_COORDINATES = {name: intern(name, (), "int") for name in COORDINATES}
_KEEP = (SCORE, *_COORDINATES.values())


def coordinate(name: str) -> Expr:
    """b, h, q_idx, kv_idx, q_len or kv_len.

    >>> coordinate("q_idx")
    q_idx
    """
    return _COORDINATES[name]


def const(value: bool | int | float) -> Expr:
    """A number known when the kernel is compiled.

    >>> const(3), const(True), const(0.5)
    (3, True, 0.5)
    """
    if isinstance(value, bool):
        return intern("const", (), "bool", value)
    if isinstance(value, int):
        if not -(2**31) <= value < 2**31:
            raise TraceError(f"the int {value} does not fit 32 bits, in which mods compute: write float({value})")
        return intern("const", (), "int", value)
    return intern("const", (), "float", float(value))


def scalar(slot: int, kind: str) -> Expr:
    """The captured number in a slot, "int" or "float"."""
    return intern("scalar", (), kind, slot)


def load(slot: int, kind: str, indices: tuple[Expr, ...]) -> Expr:
    """An element of the captured array in a slot; indices count from 0 (symbols.Rows wraps negative ones)."""
    return intern("load", tuple(cast(i, "int") for i in indices), kind, slot)


def extent(slot: int, axis: int) -> Expr:
    """The length of the captured array in a slot along an axis."""
    return intern("extent", (), "int", (slot, axis))


def dot(slot_a: int, indices_a: tuple[Expr, ...], slot_b: int, indices_b: tuple[Expr, ...]) -> Expr:
    """sum(a[indices_a, :] * b[indices_b, :]) of two captured arrays; `value` is (slot_a, slot_b, len(indices_a))."""
    args = tuple(cast(i, "int") for i in (*indices_a, *indices_b))
    return intern("dot", args, "float", (slot_a, slot_b, len(indices_a)))


def cast(x: Expr, kind: str) -> Expr:
    """x as another kind.

    >>> cast(coordinate("q_idx"), "float")
    float(q_idx)
    """
    if x.kind == kind:
        return x
    if x.op == "const":
        if kind == "int" and x.kind == "float" and not math.isfinite(x.value):
            raise TraceError(f"{x.value} is no int")
        return const({"bool": bool, "int": int, "float": float}[kind](x.value))
    return intern(kind, (x,), kind)


def highest(*args: Expr) -> str:
    return max((x.kind for x in args), key=RANK.__getitem__)


def make(op: str, *args: Expr) -> Expr:
    """An operation on expressions, their kinds made alike, and simplified where that changes no result.

    Raises TraceError for kinds the operation does not take.

    >>> q, k = coordinate("q_idx"), coordinate("kv_idx")
    >>> make("ge", q, k), make("add", q, const(0)), make("mul", const(2), const(0.5))
    ((q_idx >= kv_idx), q_idx, 1.0)
    """
    count, takes, gives = OPS[op]
    if len(args) != count:
        raise TraceError(f"{op} takes {count} arguments, got {len(args)}")
    if takes == "where":
        kind = highest(*args[1:])
        args = tuple(cast(x, k) for x, k in zip(args, ("bool", kind, kind), strict=True))
    elif takes in ("float", "int"):
        if takes == "int" and any(x.kind == "float" for x in args):
            raise TraceError(f"{op} of a float: cast it to an int first")
        args = tuple(cast(x, takes) for x in args)
        kind = takes
    elif takes != "any":
        kind = highest(*args)
        if takes == "bits" and kind == "float":
            raise TraceError(f"{op} of a float: compare it first, or cast it to an int")
        if takes == "number" and kind == "bool":
            kind = "int"
        args = tuple(cast(x, kind) for x in args)
    else:
        kind = gives
        if args[0].kind == gives:
            return args[0]
    if op == "float":
        return args[0]
    kind = kind if gives == "same" else gives
    simple = _simplified(op, args, kind)
    return intern(op, args, kind) if simple is None else simple


def _simplified(op: str, args: tuple[Expr, ...], kind: str) -> Expr | None:
    if all(x.op == "const" for x in args):
        return _folded(op, args, kind)
    if op == "where":
        if args[0].op == "const":
            return args[1] if args[0].value else args[2]
        if args[1] is args[2]:
            return args[1]
    is_const = lambda x, value: x.op == "const" and x.value == value  # noqa: E731
    if len(args) == 2:
        a, b = args
        if kind == "bool" and op in ("and", "or"):
            for x, other in ((a, b), (b, a)):
                if x.op == "const":
                    return other if x.value == (op == "and") else x
            if a is b:
                return a
        if kind == "int":
            if op in ("add", "sub", "or", "xor", "shl", "shr") and is_const(b, 0):
                return a
            if op in ("add", "or", "xor") and is_const(a, 0):
                return b
            if op in ("mul", "floordiv") and is_const(b, 1):
                return a
            if op == "mul" and is_const(a, 1):
                return b
            if op == "sub" and a is b:
                return const(0)
        # A float sum with 0 is not left out: it turns -0 into 0.
        if kind == "float" and ((op in ("mul", "div") and is_const(b, 1.0)) or (op == "sub" and is_const(b, 0.0))):
            return a
        if kind == "float" and op == "mul" and is_const(a, 1.0):
            return b
        if op in ("min", "max") and a is b:
            return a
        if op == "pow" and b.op == "const":
            if b.value == 2.0:
                return make("mul", a, a)
            if b.value == 0.5:
                return make("sqrt", a)
            if b.value == 1.0:
                return a
    if op in ("not", "neg") and args[0].op == op:
        return args[0].args[0]
    return None


def _folded(op: str, args: tuple[Expr, ...], kind: str) -> Expr | None:
    value = apply(op, kind, *[x.value for x in args])
    return intern("const", (), kind, {"bool": bool, "int": int, "float": float}[kind](value))


# Questions --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=65536)
def leaves(x: Expr) -> frozenset[str]:
    """The leaves an expression depends on, by name: "score", "q_idx", ..., "scalar", "load".

    >>> sorted(leaves(make("lt", coordinate("kv_idx"), load(0, "int", (coordinate("b"),)))))
    ['b', 'kv_idx', 'load']
    """
    own = frozenset((x.op,)) if x.op not in OPS and x.op != "const" else frozenset()
    return own.union(*(leaves(a) for a in x.args))


def walk(*roots: Expr) -> Iterator[Expr]:
    """Every distinct node, each after the ones it is computed from."""
    seen: set[Expr] = set()
    stack = [(x, False) for x in reversed(roots)]
    while stack:
        x, ready = stack.pop()
        if x in seen:
            continue
        if ready:
            seen.add(x)
            yield x
        else:
            stack.append((x, True))
            stack += [(a, False) for a in reversed(x.args)]


def slots_of(x: Expr) -> tuple[int, ...]:
    """The captured arrays that a node itself asks for, by slot."""
    if x.op == "load":
        return (x.value,)
    return x.value[:2] if x.op == "dot" else x.value[:1] if x.op == "extent" else ()


def rebuild(x: Expr, change: dict[Expr, Expr]) -> Expr:
    """x with some of its nodes replaced.

    >>> rebuild(make("neg", SCORE), {SCORE: const(2.0)})
    -2.0
    """
    done = dict(change)
    for node in walk(x):
        if node not in done:
            args = tuple(done[a] for a in node.args)
            if args == node.args:
                done[node] = node
            else:
                done[node] = make(node.op, *args) if node.op in OPS else intern(node.op, args, node.kind, node.value)
    return done[x]


_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "floordiv": "//", "mod": "%", "pow": "**", "lt": "<", "le": "<=",
    "gt": ">", "ge": ">=", "eq": "==", "ne": "!=", "and": "&", "or": "|", "xor": "^", "shl": "<<", "shr": ">>",
}  # fmt: skip


def show(x: Expr, names: dict[tuple[str, int], str] | None = None) -> str:
    """As one would write it in Python. names: of captured values, by ("scalar" | "load", slot)."""
    if x.op == "const":
        return repr(x.value)
    if x.op in ("scalar", "load"):
        name = (names or {}).get((x.op, x.value), f"{'number' if x.op == 'scalar' else 'array'}{x.value}")
        return name + (f"[{', '.join(show(a, names) for a in x.args)}]" if x.args else "")
    if x.op == "extent":
        slot, axis = x.value
        return f"{(names or {}).get(('load', slot), f'array{slot}')}.shape[{axis}]"
    args = [show(a, names) for a in x.args]
    if x.op == "dot":
        a, b = ((names or {}).get(("load", slot), f"array{slot}") for slot in x.value[:2])
        split = x.value[2]
        return f"dot({a}[{', '.join(args[:split])}], {b}[{', '.join(args[split:])}])"
    if x.op in _INFIX:
        return f"({args[0]} {_INFIX[x.op]} {args[1]})"
    if x.op == "neg":
        return f"-{args[0]}"
    if x.op == "not":
        return f"~{args[0]}"
    return f"{x.op}({', '.join(args)})" if args else x.op


# Of a call --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ArraySlot:
    """A captured array as code sees it: the values are pointers, given at run time.

    name   for people: of the variable it was found in
    wants_gradient   a float array that may receive one (where a gradient is asked for)
    """

    name: str
    dtype: DType
    ndim: int

    @property
    def kind(self) -> str:
        return "bool" if self.dtype.name == "bool" else "float" if self.dtype.is_float else "int"


@dataclass(frozen=True, slots=True)
class ScalarSlot:
    """A captured number: kind is "int" or "float"."""

    name: str
    kind: str


@dataclass(frozen=True)
class Mods:
    """The structure of a call's mods: all that compiled code depends on. Values travel apart.

    score    the new score, or None
    mask     whether a key is seen ("bool"), or None
    arrays, scalars   what `load` and `scalar` slots name
    """

    score: Expr | None
    mask: Expr | None
    arrays: tuple[ArraySlot, ...] = ()
    scalars: tuple[ScalarSlot, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.score, self.mask, self.arrays, self.scalars)))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined]

    @cached_property
    def has_single_numbers(self) -> bool:
        """Whether there are arrays of no dimensions, which may lie in host memory."""
        return any(a.ndim == 0 for a in self.arrays)

    @property
    def names(self) -> dict[tuple[str, int], str]:
        """For `show`."""
        found = {("load", i): a.name for i, a in enumerate(self.arrays)}
        return found | {("scalar", i): s.name for i, s in enumerate(self.scalars)}
