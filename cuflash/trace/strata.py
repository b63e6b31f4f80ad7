"""What of a mask is whose: a row's bounds, and what is left for every element.

A tile has rows and columns; either may be the queries. A mask that is a half-line in the column, `kv_idx <= q_idx`,
is a bound of the row: computed once a row, and at an element two comparisons that are made anyway. The conjuncts that
are no half-lines stay, to be asked of every element.

    mask  ==  (column >= low) & (column <= high) & rest        low and high free of the column; inclusive

Comparisons of ints alone are turned around. It is right as long as sums of coordinates, lengths and captured ints
within 2^29 are meant as sums, and not as what is left of them in 32 bits.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from .expr import Expr, const, coordinate, leaves, make

LIMIT = 2**29  # of coordinates and lengths where there are mods: three of them and a captured int add up within 32 bits
FULL_RANGE = (-(2**31), 2**31 - 1)

_RANGES = {
    "q_idx": (0, LIMIT - 1), "kv_idx": (0, LIMIT - 1), "q_len": (0, LIMIT), "kv_len": (0, LIMIT),
    "b": (0, LIMIT), "h": (0, 65535),
}  # fmt: skip


class Interval(NamedTuple):
    """Of the column, both ends inclusive; None: no bound on that side."""

    low: Expr | None
    high: Expr | None


class Split(NamedTuple):
    """A mask taken apart for one column: `mask == (column in [low, high]) & rest`."""

    low: Expr | None
    high: Expr | None
    rest: Expr | None


def split(mask: Expr, column: str) -> Split:
    """Takes a mask apart for rows that are the other side of `column`, "q_idx" or "kv_idx".

    >>> from .expr import coordinate, make
    >>> q, k = coordinate("q_idx"), coordinate("kv_idx")
    >>> split(make("and", make("ge", q, k), make("eq", make("mod", k, const(4)), const(0))), "kv_idx")
    Split(low=None, high=q_idx, rest=((kv_idx % 4) == 0))
    """
    low = high = rest = None
    for x in conjuncts(mask):
        found = interval(x, column)
        if found is None:
            x = apart(x, column)
            rest = x if rest is None else make("and", rest, x)
            continue
        low = _joined("max", low, found.low)
        high = _joined("min", high, found.high)
    return Split(low, high, rest)


def conjuncts(x: Expr) -> list[Expr]:
    """The parts of `a & b & c`, in order; `~(a | b)` is `~a & ~b`."""
    if x.kind == "bool":
        if x.op == "and":
            return conjuncts(x.args[0]) + conjuncts(x.args[1])
        if x.op == "not" and x.args[0].op == "or" and x.args[0].kind == "bool":
            return [y for a in x.args[0].args for y in conjuncts(make("not", a))]
    return [x]


def apart(x: Expr, column: str) -> Expr:
    """The same bool, with `(p - column) % c == 0` as `column % c == p % c`: a term of the row and one of the column,
    where there was a division at every element.

    >>> from .expr import coordinate
    >>> distance = make("sub", coordinate("q_idx"), coordinate("kv_idx"))
    >>> apart(make("eq", make("mod", distance, const(3)), const(0)), "kv_idx")
    ((kv_idx % 3) == (q_idx % 3))
    """
    if x.kind == "bool" and x.op in ("and", "or", "not"):
        return make(x.op, *(apart(a, column) for a in x.args))
    if x.op not in ("eq", "ne") or x.args[0].op != "mod" or x.args[1] is not const(0):
        return x
    distance, c = x.args[0].args
    moved = None if column in leaves(c) else _linear(distance, column)
    if moved is None or moved[0] == 0 or moved[1].op == "const" or not _fits(distance):
        return x
    sign, rest = moved
    return make(x.op, make("mod", coordinate(column), c), make("mod", rest if sign < 0 else make("neg", rest), c))


def _joined(op: str, a: Expr | None, b: Expr | None) -> Expr | None:
    if a is None or b is None:
        return a if b is None else b
    return make(op, a, b)


_NEGATED = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}
_MIRRORED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "eq": "eq", "ne": "ne"}


@lru_cache(maxsize=8192)
def interval(x: Expr, column: str) -> Interval | None:
    """The interval of the column that a bool says, or None if it is none."""
    if x.kind != "bool":
        return None
    if column not in leaves(x):
        # All columns or none, as the row decides.
        return Interval(make("where", x, const(0), const(LIMIT)), None)
    if x.op == "and":
        a, b = (interval(y, column) for y in x.args)
        if a is None or b is None:
            return None
        return Interval(_joined("max", a.low, b.low), _joined("min", a.high, b.high))
    if x.op == "or":
        return _union(x.args[0], x.args[1], column)
    if x.op == "where":
        condition, a, b = x.args
        if column in leaves(condition):
            return None
        first, second = interval(a, column), interval(b, column)
        if first is None or second is None:
            return None
        low = _chosen(condition, first.low, second.low, const(0))
        return Interval(low, _chosen(condition, first.high, second.high, const(LIMIT)))
    if x.op == "not":
        inner = x.args[0]
        if inner.op in _NEGATED and inner.args[0].kind == "int":
            return interval(make(_NEGATED[inner.op], *inner.args), column)
        if inner.op in ("and", "or"):
            op = "or" if inner.op == "and" else "and"
            return interval(make(op, *(make("not", a) for a in inner.args)), column)
        return None
    if x.op in _NEGATED and x.op != "ne" and x.args[0].kind == "int":
        return _comparison(x.op, x.args[0], x.args[1], column)
    return None


def _chosen(condition: Expr, a: Expr | None, b: Expr | None, none: Expr) -> Expr | None:
    if a is None and b is None:
        return None
    return make("where", condition, none if a is None else a, none if b is None else b)


def _union(a: Expr, b: Expr, column: str) -> Interval | None:
    for one, other in ((a, b), (b, a)):
        if column not in leaves(one):
            found = interval(other, column)
            if found is None:
                return None
            low = None if found.low is None else make("where", one, const(0), found.low)
            high = None if found.high is None else make("where", one, const(LIMIT), found.high)
            return Interval(low, high)
    first, second = interval(a, column), interval(b, column)
    if first is None or second is None:
        return None
    if first.low is second.low is None and first.high is not None and second.high is not None:
        return Interval(None, make("max", first.high, second.high))
    if first.high is second.high is None and first.low is not None and second.low is not None:
        return Interval(make("min", first.low, second.low), None)
    return None


def _comparison(op: str, a: Expr, b: Expr, column: str) -> Interval | None:
    if column in leaves(a) and column in leaves(b):
        # q // c == k // c has it on one side alone; k - q <= k % 3 does not.
        moved = _linear(make("sub", a, b), column)
        return None if moved is None else _turned(op, *moved, const(0))
    if column in leaves(b):
        op, a, b = _MIRRORED[op], b, a
    if a.op == "abs":
        inner = a.args[0]
        if op not in ("lt", "le") or column not in leaves(inner):
            return None
        first = _comparison(op, inner, b, column)
        second = _comparison(_MIRRORED[op], inner, make("neg", _within(b)), column)
        if first is None or second is None:
            return None
        return Interval(_joined("max", first.low, second.low), _joined("min", first.high, second.high))
    if a.op == "floordiv" and column not in leaves(a.args[1]):
        return _of_quotient(op, a, b, column)
    moved = _linear(a, column)
    return None if moved is None else _turned(op, *moved, b)


def _of_quotient(op: str, a: Expr, b: Expr, column: str) -> Interval | None:
    """(column + rest) // c compared with b, for a constant c > 0: a bound at a multiple of c."""
    inner, c = a.args
    if c.op != "const" or c.value <= 0:
        return None
    low, high = value_range(b)
    if low * c.value < FULL_RANGE[0] or (high + 1) * c.value > FULL_RANGE[1]:
        return None
    first = make("mul", b, c)  # the first number whose quotient is b
    after = make("mul", make("add", b, const(1)), c)
    ends = {
        "lt": (("lt", first),),
        "le": (("lt", after),),
        "ge": (("ge", first),),
        "gt": (("ge", after),),
        "eq": (("ge", first), ("lt", after)),
    }
    low = high = None
    for comparison, end in ends[op]:
        found = _comparison(comparison, inner, end, column)
        if found is None:
            return None
        low, high = _joined("max", low, found.low), _joined("min", high, found.high)
    return Interval(low, high)


def _linear(x: Expr, column: str) -> tuple[int, Expr] | None:
    """(sign, rest) with x == sign * column + rest and rest free of the column; None if x is not of that form."""
    if column not in leaves(x):
        return 0, x
    if x.op == column:
        return 1, const(0)
    if x.op == "neg":
        inner = _linear(x.args[0], column)
        return None if inner is None else (-inner[0], make("neg", inner[1]))
    if x.op in ("add", "sub"):
        a, b = (_linear(y, column) for y in x.args)
        if a is None or b is None:
            return None
        sign = a[0] + (b[0] if x.op == "add" else -b[0])
        return (sign, make(x.op, a[1], b[1])) if abs(sign) <= 1 else None
    return None


def _turned(op: str, sign: int, rest: Expr, b: Expr) -> Interval | None:
    """sign * column + rest compared with b, as an interval of the column."""
    if sign == 0:
        return None
    end = make("sub", _within(b), _within(rest)) if sign > 0 else make("sub", _within(rest), _within(b))
    if sign < 0:
        op = _MIRRORED[op]
    below, above = make("sub", end, const(1)), make("add", end, const(1))
    if not (_fits(below) and _fits(above)):
        return None
    return {
        "lt": Interval(None, below),
        "le": Interval(None, end),
        "gt": Interval(above, None),
        "ge": Interval(end, None),
        "eq": Interval(end, end),
    }[op]


def _within(x: Expr) -> Expr:
    """x, brought into what a difference of coordinates can be, where it may lie outside; its leaves within it."""
    if x.op in ("add", "sub"):
        return make(x.op, *(_within(a) for a in x.args))
    if x.op == "neg":
        return make("neg", _within(x.args[0]))
    low, high = value_range(x)
    if low >= -LIMIT and high <= LIMIT:
        return x
    return make("max", make("min", x, const(LIMIT)), const(-LIMIT))


def _fits(x: Expr) -> bool:
    """Whether x leaves 32 bits nowhere."""
    return value_range(x) != FULL_RANGE


@lru_cache(maxsize=8192)
def value_range(x: Expr) -> tuple[int, int]:
    """What an int can be, whatever the captured values: (lowest, highest).

    >>> from .expr import coordinate
    >>> q, k = coordinate("q_idx"), coordinate("kv_idx")
    >>> value_range(make("sub", q, k)) == (1 - LIMIT, LIMIT - 1)
    True
    """
    if x.kind == "bool":
        return 0, 1
    if x.op == "const":
        return (int(x.value), int(x.value)) if x.kind == "int" else FULL_RANGE
    if x.op in _RANGES:
        return _RANGES[x.op]
    if x.op == "extent":
        return 0, FULL_RANGE[1]
    if x.kind != "int":
        return FULL_RANGE
    parts = [value_range(a) for a in x.args]
    found = FULL_RANGE
    if x.op in ("add", "sub", "mul", "min", "max", "neg", "abs"):
        found = _combined(x.op, parts)
    elif x.op == "where":
        found = min(parts[1][0], parts[2][0]), max(parts[1][1], parts[2][1])
    elif x.op == "floordiv" and parts[1][0] > 0:
        ends = [i // j for i in parts[0] for j in parts[1]]
        found = min(ends), max(ends)
    elif x.op == "mod" and parts[1][0] > 0:
        low, high = parts[0]
        found = (low, high) if 0 <= low and high < parts[1][0] else (0, parts[1][1] - 1)
    elif x.op == "and" and min(parts[0][0], parts[1][0]) >= 0:
        found = 0, min(parts[0][1], parts[1][1])
    elif x.op == "shr" and x.args[1].op == "const" and 0 <= x.args[1].value < 32:
        found = parts[0][0] >> x.args[1].value, parts[0][1] >> x.args[1].value
    return found if found[0] >= FULL_RANGE[0] and found[1] <= FULL_RANGE[1] else FULL_RANGE


def _combined(op: str, parts: list[tuple[int, int]]) -> tuple[int, int]:
    if FULL_RANGE in parts and op in ("add", "sub", "mul", "neg", "abs"):
        return FULL_RANGE
    a = parts[0]
    if op == "neg":
        return -a[1], -a[0]
    if op == "abs":
        return (0 if a[0] <= 0 <= a[1] else min(abs(a[0]), abs(a[1]))), max(abs(a[0]), abs(a[1]))
    b = parts[1]
    if op == "add":
        return a[0] + b[0], a[1] + b[1]
    if op == "sub":
        return a[0] - b[1], a[1] - b[0]
    if op == "mul":
        ends = [i * j for i in a for j in b]
        return min(ends), max(ends)
    return ((min if op == "min" else max)(a[0], b[0]), (min if op == "min" else max)(a[1], b[1]))
