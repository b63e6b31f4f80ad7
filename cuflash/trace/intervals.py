"""What a mask says of a whole tile of queries and keys: nothing is seen (EMPTY), all is seen (FULL), or MIXED.

Every int of the mask becomes an interval [lo, hi] that holds its values in the tile, every float likewise where it is
known, every bool two facts: always true, never true. MIXED is always right; EMPTY and FULL are claimed where they
follow. The rules stand once, in `Rules`, and are carried out by a machine: `Numbers` computes with NumPy over many
tiles at once (`classify`: for tests, block masks and plots), `Text` writes C (`classify_text`: a member of generated
`struct Mods`).

What is exact, so that no tile is MIXED that is EMPTY or FULL:

  - ints are sums of atoms with factors, `q_idx - kv_idx + 3`, so that what is on both sides of a comparison cancels and
    the rest has the values its ends say
  - conditions joined by & are looked at together: a tile is empty if bounds of q, k and q - k have nothing in common,
    or no multiple of c lies within them; a | b is ~(~a & ~b)
  - where the mask asks for q_idx % c or kv_idx % c, ranges are split at multiples of c: head row, whole rows, tail row,
    each classified by itself
  - captured ids between two indices: least and greatest are looked for, if there are at most 256

A sum that may leave 32 bits in the tile, where values wrap, is not known; an index outside of its array is an error
wherever it is used, so an interval of indices is cut to what the array has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .expr import Expr, Mods, const, coordinate, leaves, make, rebuild, walk
from .machines import INT_MAX, INT_MIN, SPAN, Bool, Machine, Num, Numbers, Text
from .strata import value_range

if TYPE_CHECKING:
    from .emit_c import Words

EMPTY, MIXED, FULL = 0, 1, 2
_WIDE = 2**62  # beyond it a sum is not followed
_SLACK = 2.0**-21  # of a float product or quotient, relative: however the kernel rounds it
_TINY = 2.0**-126  # absolute: denormals may be flushed


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


# Rules --------------------------------------------------------------------------------------------------------------


class Rules:
    """What follows for every node of a mask in one tile.

    ranges   of the coordinates, by name; those that are one value for the tile have lo is hi
    """

    def __init__(self, machine: Machine, ranges: Mapping[str, Range]) -> None:
        self.m = machine
        self.ranges = ranges
        self._sums: dict[Expr, Sum] = {}
        self._atoms: dict[Expr, Range] = {}
        self._reals: dict[Expr, Reals] = {}
        self._facts: dict[Expr, Fact] = {}

    # Ints: sums of atoms.

    def unknown(self) -> Range:
        return Range(self.m.number(INT_MIN), self.m.number(INT_MAX))

    def sum(self, x: Expr) -> Sum:
        """An int or bool as a sum."""
        found = self._sums.get(x)
        if found is None:
            found = self._sums[x] = self._sum(x)
        return found

    def _sum(self, x: Expr) -> Sum:
        if x.op == "const":
            return Sum({}, int(x.value))
        if x.kind == "int":
            found = None
            if x.op in ("add", "sub"):
                a, b = map(self.sum, x.args)
                found = a.plus(b, 1 if x.op == "add" else -1, True)
            elif x.op == "neg":
                found = self._times(self.sum(x.args[0]), -1)
            elif x.op == "not":  # ~x = -1 - x
                a = self._times(self.sum(x.args[0]), -1)
                found = Sum(a.terms, a.number - 1, a.fits)
            elif x.op == "mul" and x.args[1].op == "const":
                found = self._times(self.sum(x.args[0]), x.args[1].value)
            elif x.op == "mul" and x.args[0].op == "const":
                found = self._times(self.sum(x.args[1]), x.args[0].value)
            elif x.op == "shl" and x.args[1].op == "const" and 0 <= x.args[1].value < 31:
                found = self._times(self.sum(x.args[0]), 1 << x.args[1].value)
            if found is not None and (checked := self._checked(found)) is not None:
                return checked
        return Sum({x: 1}, 0)

    def _times(self, a: Sum, factor: int) -> Sum:
        return Sum({}, 0).plus(a, factor, True)

    def _checked(self, a: Sum) -> Sum | None:
        """With `fits` made to say whether it is within 32 bits; None if it is too large to tell."""
        ends = self.ends(a)
        return None if ends is None else Sum(a.terms, a.number, self._within(ends, INT_MIN, INT_MAX))

    def _within(self, ends: Range, low: int, high: int) -> Bool:
        return self.m.both(self.m.at_most(self.m.number(low), ends.lo), self.m.at_most(ends.hi, self.m.number(high)))

    def ends(self, a: Sum) -> Range | None:
        """Between which numbers a sum that fits lies; None if 64 bits may not hold them."""
        m = self.m
        lo = hi = m.number(a.number)
        size = abs(a.number)
        # Those of one value for the tile first, so that both ends share what they have in common.
        for atom, n in sorted(a.terms.items(), key=lambda term: self._moves(term[0])):
            r = self.atom(atom)
            size += abs(n) * max(abs(r.lo.low), abs(r.hi.high))
            if size > _WIDE:
                return None
            first, last = (r.lo, r.hi) if n > 0 else (r.hi, r.lo)
            lo, hi = self._added(lo, first, n), self._added(hi, last, n)
        return Range(lo, hi)

    def _added(self, total: Num, x: Num, factor: int) -> Num:
        m = self.m
        if factor == -1:
            return m.int("sub", total, x)
        return m.int("add", total, m.int("mul", x, m.number(factor)))

    @staticmethod
    def _moves(x: Expr) -> bool:
        return not leaves(x).isdisjoint(("q_idx", "kv_idx"))

    def range(self, x: Expr) -> Range:
        """Where an int or bool lies."""
        a = self.sum(x)
        if a.terms == {x: 1} and a.number == 0:
            return self.atom(x)
        ends = self.ends(a)
        assert ends is not None
        return self._wrapped(ends)

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

    def atom(self, x: Expr) -> Range:
        found = self._atoms.get(x)
        if found is None:
            found = self._atoms[x] = self._atom(x)
        return found

    def _atom(self, x: Expr) -> Range:
        m = self.m
        if x.op in self.ranges:
            return self.ranges[x.op]
        if x.kind == "bool":
            fact = self.fact(x)
            one, zero = m.number(1), m.number(0)
            return Range(m.select(fact.yes, one, zero), m.select(fact.no, zero, one))
        if x.op == "scalar":
            value = m.scalar(x.value, "int")
            return Range(value, value)
        if x.op == "extent":
            value = m.extent(*x.value)
            return Range(value, value)
        if x.op == "load":
            return self._loaded(x)
        if x.op == "int":
            return self.range(x.args[0]) if x.args[0].kind == "bool" else self._truncated(self.real(x.args[0]))
        if x.op == "where":
            a, b = self.range(x.args[1]), self.range(x.args[2])
            fact = self.fact(x.args[0])
            return Range(
                m.select(fact.yes, a.lo, m.select(fact.no, b.lo, m.int("min", a.lo, b.lo))),
                m.select(fact.yes, a.hi, m.select(fact.no, b.hi, m.int("max", a.hi, b.hi))),
            )
        if x.op in ("mul", "min", "max", "abs", "floordiv", "mod", "and", "or", "xor", "shl", "shr"):
            return getattr(self, f"_{x.op}")(*(self.range(a) for a in x.args))
        return self.unknown()

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

    def _indices(self, x: Expr) -> tuple[Bool, list[Num], Num | None]:
        """(whether elements are known, first indices, the last axis' last index or None if it is the first).

        Known: all indices but the last are one value, and the last has at most as many as the machine looks at.
        """
        m = self.m
        known: Bool = True
        first: list[Num] = []
        last = None
        for axis, i in enumerate(x.args):
            r = self.range(i)
            end = m.int("sub", m.extent(x.value, axis), m.number(1))
            lo = m.int("max", r.lo, m.number(0))
            hi = m.int("min", r.hi, end)
            first.append(lo)
            if r.lo is r.hi:
                known = m.both(known, m.at_most(lo, end), m.at_most(m.number(0), hi))
            elif axis + 1 == len(x.args):
                last = hi
                width = m.int("sub", hi, lo)
                known = m.both(known, self._within(Range(width, width), 0, m.span - 1))
            else:
                known = m.both(known, self.same(lo, hi))
        return known, first, last

    def _loaded(self, x: Expr) -> Range:
        m = self.m
        known, first, last = self._indices(x)
        low, high = m.element_range(x.value)
        if known is False:
            return Range(m.number(low), m.number(high))
        if last is None:
            one = Num(m.element(x.value, known, first, x.kind), low, high)
            return Range(one, one) if known is True else Range(m.narrow(known, one, low), m.narrow(known, one, high))
        lo, hi = m.extremes(x.value, known, first, last, x.kind)
        return Range(Num(lo, low, high), Num(hi, low, high))

    # Floats.

    def real(self, x: Expr) -> Reals:
        found = self._reals.get(x)
        if found is None:
            found = self._reals[x] = self._real(x)
        return found

    def _real(self, x: Expr) -> Reals:
        m = self.m
        if x.op == "const":
            value = m.real_number(x.value)
            return Reals(value, value, bool(np.isfinite(np.float32(x.value))))
        if x.op == "scalar":
            value = m.scalar(x.value, "float")
            return Reals(value, value, m.finite(value))
        if x.op == "load":
            known, first, last = self._indices(x)
            if known is False:
                return self._no_reals()
            if last is None:
                lo = hi = m.element(x.value, known, first, "float")
            else:
                lo, hi = m.extremes(x.value, known, first, last, "float")
            return self._finite(lo, hi, known)
        if x.op == "float":
            r = self.range(x.args[0])
            lo = m.to_real(r.lo)
            return Reals(lo, lo if r.lo is r.hi else m.to_real(r.hi), True)
        if x.op == "where":
            fact, a, b = self.fact(x.args[0]), self.real(x.args[1]), self.real(x.args[2])
            known = m.either(m.both(fact.yes, a.known), m.both(fact.no, b.known), m.both(a.known, b.known))
            lo = self._chosen(fact, a.lo, b.lo, m.real("min", a.lo, b.lo))
            return Reals(lo, self._chosen(fact, a.hi, b.hi, m.real("max", a.hi, b.hi)), known)
        if x.op not in ("add", "sub", "neg", "min", "max", "abs", "mul", "div", "floor", "ceil"):
            return self._no_reals()
        args = [self.real(a) for a in x.args]
        a, b = args[0], args[-1]
        known = m.both(a.known, b.known)
        if x.op == "add":
            return self._finite(m.real("add", a.lo, b.lo), m.real("add", a.hi, b.hi), known)
        if x.op == "sub":
            return self._finite(m.real("sub", a.lo, b.hi), m.real("sub", a.hi, b.lo), known)
        if x.op == "neg":
            return Reals(m.real("neg", a.hi), m.real("neg", a.lo), known)
        if x.op == "abs":
            minus = m.real("neg", a.hi), m.real("neg", a.lo)
            lo = m.real("max", m.real("max", a.lo, minus[0]), m.real_number(0.0))
            return Reals(lo, m.real("max", a.hi, minus[1]), known)
        if x.op in ("min", "max"):
            return Reals(m.real(x.op, a.lo, b.lo), m.real(x.op, a.hi, b.hi), known)
        if x.op in ("floor", "ceil"):
            return Reals(m.real(x.op, a.lo), m.real(x.op, a.hi), known)
        if x.op == "div":
            zero = m.real_number(0.0)
            known = m.both(known, m.either(m.real_less(zero, b.lo), m.real_less(b.hi, zero)))
        ends = [m.real(x.op, i, j) for i in a[:2] for j in b[:2]]
        lo = hi = ends[0]
        for end in ends[1:]:
            lo, hi = m.real("min", lo, end), m.real("max", hi, end)
        return self._finite(self._moved(lo, "sub"), self._moved(hi, "add"), m.both(known, m.finite(*ends)))

    def _no_reals(self) -> Reals:
        zero = self.m.real_number(0.0)
        return Reals(zero, zero, False)

    def _chosen(self, fact: Fact, a: Any, b: Any, both: Any) -> Any:
        m = self.m
        if fact.yes is True or fact.no is True:
            return a if fact.yes is True else b
        found = both if fact.no is False else m.real("where", fact.no, b, both)
        return found if fact.yes is False else m.real("where", fact.yes, a, found)

    def _finite(self, lo: Any, hi: Any, known: Bool) -> Reals:
        return Reals(lo, hi, self.m.both(known, self.m.finite(lo, hi)))

    def _moved(self, x: Any, direction: str) -> Any:
        m = self.m
        slack = m.real("mul", m.real("max", x, m.real("neg", x)), m.real_number(_SLACK))
        return m.real(direction, m.real(direction, x, slack), m.real_number(_TINY))

    # Bools.

    def fact(self, x: Expr) -> Fact:
        found = self._facts.get(x)
        if found is None:
            found = self._facts[x] = self._fact(x)
        return found

    def _fact(self, x: Expr) -> Fact:
        m = self.m
        if x.op == "const":
            return Fact(x.value, not x.value)
        if x.op == "signbit":
            return Fact(False, False)
        if x.op == "load":
            r = self._loaded(x)
            return Fact(m.at_most(m.number(1), r.lo), m.at_most(r.hi, m.number(0)))
        if x.op == "not":
            return self._opposite(self.fact(x.args[0]))
        if x.op == "or":
            return self._opposite(self._all([(a, False) for a in x.args]))
        if x.op == "where":
            c, a, b = x.args
            return self._either(self._all([(c, True), (a, True)]), self._all([(c, False), (b, True)]))
        if x.op == "xor" or (x.op in ("eq", "ne") and x.args[0].kind == "bool"):
            a, b = (self.fact(y) for y in x.args)
            unequal = Fact(
                m.either(m.both(a.yes, b.no), m.both(a.no, b.yes)), m.either(m.both(a.yes, b.yes), m.both(a.no, b.no))
            )
            return self._opposite(unequal) if x.op == "eq" else unequal
        if x.op in ("lt", "le", "gt", "ge") and x.args[0].kind == "bool":
            a, b = x.args if x.op in ("lt", "le") else x.args[::-1]
            # False < True.
            if x.op in ("lt", "gt"):
                return self._all([(a, False), (b, True)])
            return self._opposite(self._all([(a, True), (b, False)]))
        if (x.op in _COMPARISONS and x.args[0].kind == "float") or (x.op == "bool" and x.args[0].kind == "float"):
            return self._compared_reals(x)
        return self._all([(x, True)])

    @staticmethod
    def _opposite(fact: Fact) -> Fact:
        return Fact(fact.no, fact.yes)

    def _either(self, a: Fact, b: Fact) -> Fact:
        return Fact(self.m.either(a.yes, b.yes), self.m.both(a.no, b.no))

    def _compared_reals(self, x: Expr) -> Fact:
        m = self.m
        op = "ne" if x.op == "bool" else x.op
        a, b = self.real(x.args[0]), self.real(x.args[1] if x.op != "bool" else const(0.0))
        if op in ("gt", "ge"):
            a, b = b, a
        known = m.both(a.known, b.known)
        below, above = m.real_less(a.hi, b.lo), m.real_less(b.hi, a.lo)  # all of a below, above all of b
        reaches, passes = m.real_less(a.lo, b.hi), m.real_less(b.lo, a.hi)
        if op in ("lt", "gt"):
            return Fact(m.both(known, below), m.both(known, m.no(reaches)))
        if op in ("le", "ge"):
            return Fact(m.both(known, m.no(passes)), m.both(known, above))
        equal = Fact(m.both(known, m.no(reaches), m.no(passes)), m.both(known, m.either(below, above)))
        return equal if op == "eq" else self._opposite(equal)

    # Conditions joined by &.

    def _all(self, conditions: list[tuple[Expr, bool]]) -> Fact:
        """Of conditions that all have to hold, each with whether it has to be true or false."""
        m = self.m
        parts: list[Fact] = []
        bounds: list[Bound] = []
        pending = conditions[::-1]
        while pending:
            x, positive = pending.pop()
            if x.op == "not":
                pending.append((x.args[0], not positive))
            elif x.op == ("and" if positive else "or"):
                pending += [(a, positive) for a in reversed(x.args)]
            elif (x.op in _COMPARISONS and x.args[0].kind == "int") or (x.op == "bool" and x.args[0].kind == "int"):
                fact, found = self._compared(x, positive)
                parts.append(fact)
                bounds += found
            else:
                fact = self.fact(x)
                parts.append(fact if positive else self._opposite(fact))
        return Fact(m.both(*(f.yes for f in parts)), m.either(*(f.no for f in parts), *self._conflicts(bounds)))

    def _compared(self, x: Expr, positive: bool) -> tuple[Fact, list[Bound]]:
        """A comparison of ints: what is known of it, and what it asks for."""
        m = self.m
        op, (a, b) = ("ne", (x.args[0], const(0))) if x.op == "bool" else (x.op, x.args)
        if not positive:
            op = _NEGATED[op]
        if op in ("gt", "ge"):
            op, a, b = ("lt" if op == "gt" else "le"), b, a
        first, second = self.sum(a), self.sum(b)
        d = first.plus(second, -1, m.both(first.fits, second.fits))
        if op == "lt":  # a < b is a - b + 1 <= 0
            d = Sum(d.terms, d.number + 1, d.fits)
        ends = self.ends(d)
        if ends is None:
            return Fact(False, False), []
        zero, one = m.number(0), m.number(1)
        if op in ("lt", "le"):
            fact = Fact(m.both(d.fits, m.at_most(ends.hi, zero)), m.both(d.fits, m.at_most(one, ends.lo)))
            return fact, self._at_most_zero(d)
        yes = m.both(d.fits, m.at_most(zero, ends.lo), m.at_most(ends.hi, zero))
        never = m.both(d.fits, m.either(m.at_most(one, ends.lo), m.at_most(ends.hi, m.number(-1))))
        if op == "ne":
            # What could tell more of == is asked with its bounds.
            conflicts = self._conflicts(self._zero(d))
            return Fact(m.either(never, *conflicts), yes), []
        return Fact(yes, never), self._zero(d)

    def _split(self, d: Sum) -> tuple[dict[Expr, int], Range] | None:
        """What changes in the tile, and the rest's range."""
        moving = {a: n for a, n in d.terms.items() if self._moves(a)}
        rest = self.ends(Sum({a: n for a, n in d.terms.items() if a not in moving}, d.number))
        return None if rest is None or not moving else (moving, rest)

    def _at_most_zero(self, d: Sum) -> list[Bound]:
        """What d <= 0 asks for."""
        found = self._split(d)
        if found is None:
            return []
        terms, rest = found
        ((atom, n), *others) = terms.items()
        if not others and n == 1 and atom.op == "abs":
            inner = self.sum(atom.args[0])
            back = Sum({a: n for a, n in d.terms.items() if a is not atom}, d.number)
            # The least int is its own abs.
            signed = self.m.at_most(self.m.number(INT_MIN + 1), self.range(atom.args[0]).lo)
            fits = self.m.both(d.fits, inner.fits, signed)
            return [b for n in (1, -1) for b in self._at_most_zero(back.plus(inner, n, fits))]
        hi = self.m.int("sub", self.m.number(0), rest.lo)
        return [self._normal(Bound(terms, hi=hi, fits=d.fits))]

    def _zero(self, d: Sum) -> list[Bound]:
        """What d == 0 asks for."""
        found = self._split(d)
        if found is None:
            return []
        m = self.m
        terms, rest = found
        zero = m.number(0)
        bounds = [Bound(terms, m.int("sub", zero, rest.hi), m.int("sub", zero, rest.lo), fits=d.fits)]
        ((atom, n), *others) = terms.items()
        if not others and abs(n) == 1 and atom.op == "mod" and rest.lo is rest.hi:
            inner, c = self.sum(atom.args[0]), self.range(atom.args[1])
            split = self._split(inner)
            if split is not None and c.lo is c.hi and split[1].lo is split[1].hi:
                remainder = m.int("sub", zero, rest.lo) if n == 1 else rest.lo
                fits = m.both(d.fits, inner.fits, m.at_most(m.number(1), c.lo))
                number = m.int("sub", split[1].lo, remainder)
                bounds.append(self._normal(Bound(split[0], c=self._positive(c.lo), rest=number, fits=fits)))
        return [self._normal(b) for b in bounds]

    def _normal(self, bound: Bound) -> Bound:
        """With a sign that is the same for -x and x: the first moving atom's factor is positive."""
        first = min(bound.terms.items(), key=lambda term: ("q_idx" not in leaves(term[0]), repr(term[0])))
        if first[1] > 0:
            return bound
        zero = self.m.number(0)
        minus = lambda x: None if x is None else self.m.int("sub", zero, x)  # noqa: E731
        terms = {a: -n for a, n in bound.terms.items()}
        return Bound(terms, minus(bound.hi), minus(bound.lo), bound.c, minus(bound.rest), bound.fits)

    def _conflicts(self, bounds: list[Bound]) -> list[Bool]:
        """Conditions under which bounds that all have to hold cannot hold together in the tile."""
        m = self.m
        groups: dict[Any, list[Bound]] = {}
        for b in bounds:
            groups.setdefault(frozenset(b.terms.items()), []).append(b)
        conflicts: list[Bool] = []
        for group in groups.values():
            lo, hi = self._asked(group)
            if lo is not None and hi is not None and sum(b.c is None for b in group) > 1:
                conflicts.append(m.below(hi, lo))
            for b in group:
                if b.c is not None and b.rest is not None and (cut := self._cut(group)) is not None:
                    # The last x up to hi of which x + rest is a multiple of c.
                    top = m.int("add", cut.hi, b.rest)
                    last = m.int("sub", top, m.int("mod", top, b.c))
                    conflicts.append(m.both(b.fits, m.below(last, m.int("add", cut.lo, b.rest))))
        # Bounds of q - k and those of q and k may have nothing in common.
        q, k = (coordinate(name) for name in ("q_idx", "kv_idx"))
        of = [groups.get(frozenset(terms.items())) for terms in ({q: 1, k: -1}, {q: 1}, {k: 1})]
        if of[0] is not None and (of[1] or of[2]):
            ranges = [self._cut(group) if group else self.ranges[n] for group, n in zip(of, _SIDES, strict=True)]
            difference, of_q, of_k = ranges
            if difference and of_q and of_k:
                conflicts.append(m.below(m.int("sub", of_q.hi, of_k.lo), difference.lo))
                conflicts.append(m.below(difference.hi, m.int("sub", of_q.lo, of_k.hi)))
        return conflicts

    def _asked(self, group: list[Bound]) -> tuple[Num | None, Num | None]:
        """The narrowest of bounds of one sum."""
        m = self.m
        far = m.number(2**40)
        lo = hi = None
        for b in group:
            if b.lo is not None and abs(b.lo.low) < _WIDE:
                x = m.select(b.fits, b.lo, m.int("sub", m.number(0), far))
                lo = x if lo is None else m.int("max", lo, x)
            if b.hi is not None and abs(b.hi.high) < _WIDE:
                x = m.select(b.fits, b.hi, far)
                hi = x if hi is None else m.int("min", hi, x)
        return lo, hi

    def _cut(self, group: list[Bound]) -> Range | None:
        """What a tile has of a sum within its bounds."""
        m = self.m
        tile = self.ends(Sum(group[0].terms, 0))
        lo, hi = self._asked(group)
        if tile is None:
            return None
        return Range(
            tile.lo if lo is None else m.int("max", lo, tile.lo), tile.hi if hi is None else m.int("min", hi, tile.hi)
        )


# Tiles --------------------------------------------------------------------------------------------------------------

_SIDES = ("", "q_idx", "kv_idx")
_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
_NEGATED = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}


@lru_cache(maxsize=1024)
def _prepared(mask: Expr) -> tuple[Expr, Expr | None, Expr | None]:
    """(the mask with bits of powers of two as divisions, the divisors that split ranges of q_idx and kv_idx)."""
    change: dict[Expr, Expr] = {}
    for x in walk(mask):
        if x.kind == "int" and x.op in ("and", "shr"):
            a, b = x.args
            n = b.value if b.op == "const" else -1
            if x.op == "and" and n > 0 and n & (n + 1) == 0 and n < INT_MAX:
                change[x] = make("mod", rebuild(a, change), const(n + 1))
            elif x.op == "shr" and 0 < n < 31:
                change[x] = make("floordiv", rebuild(a, change), const(1 << n))
    mask = rebuild(mask, change)
    divisors: list[Expr | None] = []
    for name in ("q_idx", "kv_idx"):
        x = coordinate(name)
        found = [n.args[1] for n in walk(mask) if n.op == "mod" and n.args[0] is x and not Rules._moves(n.args[1])]
        # The smallest known number, for its multiples are the most; a captured one where there is no other.
        found.sort(key=lambda c: c.value if c.op == "const" and c.value > 0 else INT_MAX)
        divisors.append(found[0] if found else None)
    return mask, divisors[0], divisors[1]


def _coordinate(name: str, raw: Any) -> Num:
    return Num(raw, *value_range(coordinate(name)))


# With NumPy ---------------------------------------------------------------------------------------------------------


def classify(
    mask: Expr,
    q: tuple[Any, Any],
    k: tuple[Any, Any],
    values: Mapping[str, Any],
    arrays: Sequence[np.ndarray] = (),
    scalars: Sequence[int | float] = (),
    span: int = SPAN,
) -> np.ndarray:
    """EMPTY, MIXED or FULL of tiles: int8, of the shape to which everything broadcasts. A range of nothing is EMPTY.

    q, k     (first, last) query and key of each tile, ends included: ints or arrays
    values   b, h, q_len and kv_len of each tile, those that the mask reads
    arrays, scalars   what the slots of the mask hold
    span     elements of a captured array that are looked at for a tile, where they decide

    >>> q_idx, kv_idx = coordinate("q_idx"), coordinate("kv_idx")
    >>> first = np.arange(0, 384, 128)
    >>> classify(make("ge", q_idx, kv_idx), (first[:, None], first[:, None] + 127), (first, first + 127), {}).tolist()
    [[1, 0, 0], [2, 1, 0], [2, 2, 1]]
    """
    mask, *divisors = _prepared(mask)
    machine = Numbers(arrays, scalars, span)
    single = {}
    for name, value in values.items():
        n = _coordinate(name, np.asarray(value, np.int64))
        single[name] = Range(n, n)
    sides = []
    for (first, last), c in zip((q, k), divisors, strict=True):
        first, last = np.asarray(first, np.int64), np.asarray(last, np.int64)
        divisor = None
        if c is not None:
            of_tile = Rules(machine, single).range(c)
            divisor = of_tile.lo.raw if of_tile.lo is of_tile.hi else None
        sides.append([(first, last)] if divisor is None else _pieces(first, last, np.asarray(divisor)))
    empty: Any = True
    full: Any = True
    for q_lo, q_hi in sides[0]:
        for k_lo, k_hi in sides[1]:
            ranges = {
                "q_idx": Range(_coordinate("q_idx", q_lo), _coordinate("q_idx", q_hi)),
                "kv_idx": Range(_coordinate("kv_idx", k_lo), _coordinate("kv_idx", k_hi)),
            }
            fact = Rules(machine, single | ranges).fact(mask)
            nothing = (q_lo > q_hi) | (k_lo > k_hi)
            empty = empty & (nothing | fact.no)
            full = full & (nothing | fact.yes)
    shape = np.broadcast_shapes(*(np.shape(x) for x in (*q, *k, *values.values())))
    return np.broadcast_to(np.where(empty, EMPTY, np.where(full, FULL, MIXED)).astype(np.int8), shape)


def _pieces(first: Any, last: Any, c: Any) -> list[tuple[Any, Any]]:
    """first..last split at multiples of c: what is left of a row, whole rows, a row's beginning; some are empty."""
    c = np.where((c >= 1) & (c <= last), c, last + 1)
    following, tail = (first // c + 1) * c, last // c * c
    return [(first, np.minimum(following - 1, last)), (following, tail - 1), (np.maximum(tail, following), last)]


# As C ---------------------------------------------------------------------------------------------------------------


def classify_text(mods: Mods, words: Words) -> str:
    """The member `classify` of the generated `struct Mods`: 0, 1 or 2 (EMPTY, MIXED, FULL) of a tile that has elements.

    Ranges include both ends and lie inside the sequence.
    """
    assert mods.mask is not None
    mask, *divisors = _prepared(mods.mask)
    machine = Text(mods, words)
    single = {}
    for name in ("b", "h", "q_len", "kv_len"):
        n = _coordinate(name, f"t.{name}")
        single[name] = Range(n, n)
    of_tile = Rules(machine, single)
    rows = [None if c is None else of_tile.range(c) for c in divisors]
    loops = 0
    ranges = {}
    for side, name, row in zip("qk", ("q_idx", "kv_idx"), rows, strict=True):
        if row is not None and row.lo is row.hi:
            _split_text(machine, side, machine.write(row.lo))
            loops += 1
        ranges[name] = Range(_coordinate(name, f"{side}_lo"), _coordinate(name, f"{side}_hi"))
    fact = Rules(machine, single | ranges).fact(mask)
    yes, no = (str(c).lower() if isinstance(c, bool) else c for c in fact)
    if loops:
        machine.line(f"empty &= {no};")
        machine.line(f"full &= {yes};")
        machine.line("if (!empty & !full) return 1;")
        for _ in range(loops):
            machine.indent = machine.indent[2:]
            machine.line("}")
        machine.line("return empty ? 0 : full ? 2 : 1;")
    else:
        machine.line(f"return {no} ? 0 : {yes} ? 2 : 1;")
    before = "    bool empty = true, full = true;\n" if loops else ""
    split = ("first", "last")
    names = [
        f"i32 {side}_{end}"
        for side, row in zip("qk", rows, strict=True)
        for end in (split if row is not None and row.lo is row.hi else ("lo", "hi"))
    ]
    return (
        "  template <class Params>\n"
        f"  HW_DEVICE static i32 classify(const Params& p, const Tile& t, {', '.join(names)}) {{\n"
        f"{before}{''.join(machine.lines)}  }}\n"
    )


def _split_text(machine: Text, side: str, divisor: str) -> None:
    """Opens a loop over the pieces of a range, as `_pieces` has them."""
    first, last, c, following, tail, i = (f"{side}_{x}" for x in ("first", "last", "row", "next", "tail", "piece"))
    machine.line(f"const i32 {c} = ({divisor} >= 1) & ({divisor} <= {last}) ? {divisor} : {last} + 1;")
    machine.line(f"const i32 {following} = ({first} / {c} + 1) * {c}, {tail} = {last} / {c} * {c};")
    machine.line("HW_NO_UNROLL")
    machine.line(f"for (i32 {i} = 0; {i} < 3; ++{i}) {{")
    machine.indent += "  "
    machine.line(f"const i32 {side}_lo = {i} == 0 ? {first} : {i} == 1 ? {following} : max_of({tail}, {following});")
    machine.line(f"const i32 {side}_hi = {i} == 0 ? min_of({following} - 1, {last}) : {i} == 1 ? {tail} - 1 : {last};")
    machine.line(f"if ({side}_lo > {side}_hi) continue;")
