"""Mods as text and back: what a compiled program of a framework carries, in whichever process it runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from .. import dtypes
from .expr import ArraySlot, Expr, Mods, ScalarSlot, intern, make, walk


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
    """Mods from their text. Of several lines, one mod each: their masks all hold, and slots are numbered through.

    >>> from .expr import coordinate, load, make
    >>> mods = Mods(None, make("lt", coordinate("h"), load(0, "int", ())), (ArraySlot("n", dtypes.int32, 0),))
    >>> loads(dumps(mods)) == mods
    True
    """
    if "\n" in text:
        return _joined([loads(line) for line in text.split("\n")])
    found, score, mask, arrays, scalars = json.loads(text)
    nodes: list[Expr] = []
    for op, args, kind, value in found:
        nodes.append(intern(op, tuple(nodes[i] for i in args), kind, _as_it_was(value)))
    return Mods(
        None if score is None else nodes[score],
        None if mask is None else nodes[mask],
        tuple(ArraySlot(name, dtypes.BY_NAME[dtype], ndim) for name, dtype, ndim in arrays),
        tuple(ScalarSlot(name, kind) for name, kind in scalars),
    )


def _as_it_was(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _joined(parts: Sequence[Mods]) -> Mods:
    score = mask = None
    arrays: tuple[ArraySlot, ...] = ()
    scalars: tuple[ScalarSlot, ...] = ()
    for part in parts:
        own_score, own_mask = (_moved(root, len(arrays), len(scalars)) for root in (part.score, part.mask))
        assert score is None or own_score is None
        score = own_score or score
        mask = own_mask if mask is None else mask if own_mask is None else make("and", mask, own_mask)
        arrays, scalars = arrays + part.arrays, scalars + part.scalars
    return Mods(score, mask, arrays, scalars)


def _moved(root: Expr | None, arrays: int, scalars: int) -> Expr | None:
    """An expression whose slots begin behind others."""
    if root is None:
        return None
    done: dict[Expr, Expr] = {}
    for x in walk(root):
        value = x.value
        if x.op == "load":
            value += arrays
        elif x.op == "scalar":
            value += scalars
        elif x.op == "extent":
            value = value[0] + arrays, value[1]
        elif x.op == "dot":
            value = value[0] + arrays, value[1] + arrays, value[2]
        done[x] = intern(x.op, tuple(done[a] for a in x.args), x.kind, value)
    return done[root]
