"""Ranges: where a value lies in a tile, and what the operations on ints make of ranges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from .expr import Expr, leaves
from .machine import INT_MAX, INT_MIN, Bool, Machine, Num


class Range(NamedTuple):
    """Where an int lies in the tile, ends included. A value that is one for the whole tile has lo is hi."""

    lo: Num
    hi: Num


class Reals(NamedTuple):
    """Where a float lies, if known; then both ends are finite and it is no NaN."""

    lo: Any
    hi: Any
    known: Bool


class Fact(NamedTuple):
    """Of a bool in the tile: always true, never true."""

    yes: Bool
    no: Bool


@dataclass(frozen=True)
class Sum:
    """number + the sum of factor * atom. fits: it is within 32 bits all over the tile; else it says nothing.

    Sums in it may have left 32 bits and come back: modulo 2^32 they are what they are.
    """

    terms: dict[Expr, int]
    number: int
    fits: Bool = True

    def plus(self, other: Sum, factor: int, fits: Bool) -> Sum:
        terms = dict(self.terms)
        for atom, n in other.terms.items():
            terms[atom] = terms.get(atom, 0) + factor * n
        return Sum({a: n for a, n in terms.items() if n}, self.number + factor * other.number, fits)


class Bound(NamedTuple):
    """Of a comparison that has to hold: lo <= sum of the terms <= hi, or where c is given, sum + rest is r modulo c."""

    terms: dict[Expr, int]
    lo: Num | None = None
    hi: Num | None = None
    c: Num | None = None
    rest: Num | None = None
    fits: Bool = True


def moves(x: Expr) -> bool:
    """Whether an expression may have more than one value in a tile."""
    return not leaves(x).isdisjoint(("q_idx", "kv_idx"))


class IntRanges:
    """The operations on ranges of ints, carried out by a machine."""

    def __init__(self, machine: Machine) -> None:
        self.m = machine

    def unknown(self) -> Range:
        return Range(self.m.number(INT_MIN), self.m.number(INT_MAX))

    def _within(self, ends: Range, low: int, high: int) -> Bool:
        return self.m.both(self.m.at_most(self.m.number(low), ends.lo), self.m.at_most(ends.hi, self.m.number(high)))

    def _fitting(self, fits: Bool, ends: Range) -> Range:
        """The range where it fits, else unknown."""
        m = self.m
        if fits is True:
            return ends
        if fits is False:
            return self.unknown()
        return Range(m.narrow(fits, ends.lo, INT_MIN), m.narrow(fits, ends.hi, INT_MAX))

    def _wrapped(self, ends: Range) -> Range:
        """The range if it is within 32 bits, else unknown; of a single value, what is left of it in 32 bits."""
        if ends.lo is ends.hi:
            value = self.m.wrapped(ends.lo)
            return Range(value, value)
        return self._fitting(self._within(ends, INT_MIN, INT_MAX), ends)

    def _mul(self, a: Range, b: Range) -> Range:
        return self._wrapped(self._four("mul", a, b))

    def _four(self, name: str, a: Range, b: Range) -> Range:
        m = self.m
        ends = [m.int(name, i, j) for i in dict.fromkeys(a) for j in dict.fromkeys(b)]
        lo = hi = ends[0]
        for x in ends[1:]:
            lo, hi = m.int("min", lo, x), m.int("max", hi, x)
        return Range(lo, hi)

    def _min(self, a: Range, b: Range) -> Range:
        return Range(self.m.int("min", a.lo, b.lo), self.m.int("min", a.hi, b.hi))

    def _max(self, a: Range, b: Range) -> Range:
        return Range(self.m.int("max", a.lo, b.lo), self.m.int("max", a.hi, b.hi))

    def _abs(self, a: Range) -> Range:
        m = self.m
        zero = m.number(0)
        low, high = m.int("sub", zero, a.hi), m.int("sub", zero, a.lo)
        hi = m.int("max", a.hi, high)
        lo = hi if a.lo is a.hi else m.int("max", zero, m.int("max", a.lo, low))
        return self._wrapped(Range(lo, hi))

    def _floordiv(self, a: Range, c: Range) -> Range:
        m = self.m
        positive = m.at_most(m.number(1), c.lo)
        if positive is not True and (found := self._single("floordiv", a, c)):
            return found
        if c.lo is c.hi:
            divisor = self._positive(c.lo)
            return self._fitting(positive, Range(m.int("div", a.lo, divisor), m.int("div", a.hi, divisor)))
        divisor = Range(*(self._positive(x) for x in c))
        return self._fitting(positive, self._four("div", a, divisor))

    def _positive(self, c: Num) -> Num:
        """A divisor that stops nothing where it is no good."""
        return self.m.int("max", c, self.m.number(1))

    def _mod(self, a: Range, c: Range) -> Range:
        m = self.m
        positive = m.at_most(m.number(1), c.lo)
        if positive is not True and (found := self._single("floormod", a, c)):
            return found
        if c.lo is not c.hi:
            return self._fitting(positive, Range(m.number(0), m.int("sub", self._positive(c.hi), m.number(1))))
        divisor = self._positive(c.lo)
        lo, hi = m.int("mod", a.lo, divisor), m.int("mod", a.hi, divisor)
        # Within one row of the divisor: the distance of the ends is that of the remainders.
        row = self.same(m.int("sub", a.hi, a.lo), m.int("sub", hi, lo))
        first = m.select(row, lo, m.number(0))
        last = m.select(row, hi, m.int("sub", divisor, m.number(1)))
        return self._fitting(positive, Range(first, last))

    def same(self, a: Num, b: Num) -> Bool:
        return self.m.both(self.m.at_most(a, b), self.m.at_most(b, a))

    def _single(self, name: str, a: Range, b: Range) -> Range | None:
        """Of two single values, where an operation has no rule for ranges."""
        if a.lo is not a.hi or b.lo is not b.hi:
            return None
        value = self.m.int(name, a.lo, b.lo)
        return Range(value, value)

    def _and(self, a: Range, b: Range) -> Range:
        found = self._single("and", a, b)
        if found is not None:
            return found
        # With no negative it is neither negative nor larger.
        m = self.m
        zero = m.number(0)
        either = m.either(m.at_most(zero, a.lo), m.at_most(zero, b.lo))
        hi = m.int(
            "min",
            m.select(m.at_most(zero, a.lo), a.hi, m.number(INT_MAX)),
            m.select(m.at_most(zero, b.lo), b.hi, m.number(INT_MAX)),
        )
        return self._fitting(either, Range(zero, hi))

    def _or(self, a: Range, b: Range) -> Range:
        return self._single("or", a, b) or self.unknown()

    def _xor(self, a: Range, b: Range) -> Range:
        return self._single("xor", a, b) or self.unknown()

    def _shl(self, a: Range, b: Range) -> Range:
        return self._single("shl", a, b) or self.unknown()

    def _shr(self, a: Range, b: Range) -> Range:
        if b.lo is not b.hi:
            return self.unknown()
        return Range(self.m.int("shr", a.lo, b.lo), self.m.int("shr", a.hi, b.lo))

    def _truncated(self, a: Reals) -> Range:
        m = self.m
        limit = m.real_number(2.0**30)
        fits = m.both(a.known, m.real_less(m.real("neg", limit), a.lo), m.real_less(a.hi, limit))
        lo = m.to_int(fits, a.lo)
        return self._fitting(fits, Range(lo, lo if a.lo is a.hi else m.to_int(fits, a.hi)))
