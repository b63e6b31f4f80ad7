"""Mods as text and back: what a compiled program of a framework carries, in whichever process it runs."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from .. import dtypes
from .expr import ArraySlot, Expr, Mods, ScalarSlot, _intern, walk


@lru_cache(maxsize=4096)
def dumps(mods: Mods) -> str:
    """A line of JSON: nodes, each after those it is computed from, the places of score and mask, the slots.

    >>> from .expr import SCORE, coordinate, make
    >>> dumps(Mods(make("add", SCORE, coordinate("h")), None))
    '[[["score",[],"float",null],["h",[],"int",null],["float",[1],"float",null],["add",[0,2],"float",null]],3,null,[],[]]'
    """
    place: dict[Expr, int] = {}
    nodes = []
    for x in walk(*(root for root in (mods.score, mods.mask) if root is not None)):
        place[x] = len(nodes)
        nodes.append([x.op, [place[a] for a in x.args], x.kind, x.value])
    roots = (None if root is None else place[root] for root in (mods.score, mods.mask))
    arrays = [[a.name, a.dtype.name, a.ndim] for a in mods.arrays]
    return json.dumps([nodes, *roots, arrays, [[s.name, s.kind] for s in mods.scalars]], separators=(",", ":"))


@lru_cache(maxsize=4096)
def loads(text: str) -> Mods:
    """
    >>> from .expr import coordinate, load, make
    >>> mods = Mods(None, make("lt", coordinate("h"), load(0, "int", ())), (ArraySlot("n", dtypes.int32, 0),))
    >>> loads(dumps(mods)) == mods
    True
    """
    found, score, mask, arrays, scalars = json.loads(text)
    nodes: list[Expr] = []
    for op, args, kind, value in found:
        nodes.append(_intern(op, tuple(nodes[i] for i in args), kind, _as_it_was(value)))
    return Mods(
        None if score is None else nodes[score],
        None if mask is None else nodes[mask],
        tuple(ArraySlot(name, dtypes.BY_NAME[dtype], ndim) for name, dtype, ndim in arrays),
        tuple(ScalarSlot(name, kind) for name, kind in scalars),
    )


def _as_it_was(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
