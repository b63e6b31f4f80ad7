"""What a mask says of a whole tile of queries and keys: nothing is seen (EMPTY), all is seen (FULL), or MIXED.

Every int of the mask becomes an interval [lo, hi] that holds its values in the tile, every float likewise where it is
known, every bool two facts: always true, never true. MIXED is always right; EMPTY and FULL are claimed where they
follow. The rules stand once, in `conditions.Rules`, and are carried out by a machine: `Numbers` computes with NumPy
over many tiles at once (`classify`: for tests, block masks and plots), `Text` writes C (`classify_text`: a member of
generated `struct Mods`).

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
from functools import lru_cache
from typing import Any

import numpy as np

from .c_text import Words
from .conditions import Rules
from .expr import Expr, Mods, const, coordinate, make, rebuild, walk
from .machine import INT_MAX, SPAN, Num
from .machine_c import Text
from .machine_numpy import Numbers
from .ranges import Range, moves
from .strata import value_range

EMPTY, MIXED, FULL = 0, 1, 2


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
        found = [n.args[1] for n in walk(mask) if n.op == "mod" and n.args[0] is x and not moves(n.args[1])]
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
