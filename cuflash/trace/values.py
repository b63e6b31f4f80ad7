"""Where the ints and floats of a mask lie in a tile: the rules for every node that is no condition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .expr import Expr
from .machine import INT_MAX, INT_MIN, Bool, Machine, Num
from .ranges import Fact, IntRanges, Range, Reals, Sum, moves

WIDE = 2**62  # beyond it a sum is not followed
_SLACK = 2.0**-21  # of a float product or quotient, relative: however the kernel rounds it
_TINY = 2.0**-126  # absolute: denormals may be flushed


class Values(IntRanges):
    """Sums, ranges and reals of one tile. What is true of a condition (`fact`) is for `conditions.Rules` to say.

    ranges   of the coordinates, by name; those that are one value for the tile have lo is hi
    """

    def __init__(self, machine: Machine, ranges: Mapping[str, Range]) -> None:
        super().__init__(machine)
        self.ranges = ranges
        self._sums: dict[Expr, Sum] = {}
        self._atoms: dict[Expr, Range] = {}
        self._reals: dict[Expr, Reals] = {}

    def fact(self, x: Expr) -> Fact:
        """Of a bool."""
        raise NotImplementedError

    # Ints: sums of atoms.

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

    def ends(self, a: Sum) -> Range | None:
        """Between which numbers a sum that fits lies; None if 64 bits may not hold them."""
        m = self.m
        lo = hi = m.number(a.number)
        size = abs(a.number)
        # Those of one value for the tile first, so that both ends share what they have in common.
        for atom, n in sorted(a.terms.items(), key=lambda term: moves(term[0])):
            r = self.atom(atom)
            size += abs(n) * max(abs(r.lo.low), abs(r.hi.high))
            if size > WIDE:
                return None
            first, last = (r.lo, r.hi) if n > 0 else (r.hi, r.lo)
            lo, hi = self._added(lo, first, n), self._added(hi, last, n)
        return Range(lo, hi)

    def _added(self, total: Num, x: Num, factor: int) -> Num:
        m = self.m
        if factor == -1:
            return m.int("sub", total, x)
        return m.int("add", total, m.int("mul", x, m.number(factor)))

    def range(self, x: Expr) -> Range:
        """Where an int or bool lies."""
        a = self.sum(x)
        if a.terms == {x: 1} and a.number == 0:
            return self.atom(x)
        ends = self.ends(a)
        assert ends is not None
        return self._wrapped(ends)

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
