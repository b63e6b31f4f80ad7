"""What is true of a mask in a tile: the rules for conditions, also for several that have to hold together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .expr import Expr, const, coordinate, leaves
from .machine import INT_MIN, Bool, Machine, Num
from .ranges import Bound, Fact, Range, Sum, moves
from .values import WIDE, Values

_SIDES = ("", "q_idx", "kv_idx")
_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
_NEGATED = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}


class Rules(Values):
    """What follows for every node of a mask in one tile."""

    def __init__(self, machine: Machine, ranges: Mapping[str, Range]) -> None:
        super().__init__(machine, ranges)
        self._facts: dict[Expr, Fact] = {}

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
        moving = {a: n for a, n in d.terms.items() if moves(a)}
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
            if b.lo is not None and abs(b.lo.low) < WIDE:
                x = m.select(b.fits, b.lo, m.int("sub", m.number(0), far))
                lo = x if lo is None else m.int("max", lo, x)
            if b.hi is not None and abs(b.hi.high) < WIDE:
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
