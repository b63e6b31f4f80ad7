"""An expression computed with NumPy: what a mod means. Stands beside `emit_c`, which says the same in CUDA C.

Ints are int32 and wrap, floats are float32 (or float64, for an oracle), and nothing warns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .arithmetic import FUNCTIONS, made
from .expr import Expr, walk


def evaluate(
    roots: Sequence[Expr],
    leaves: Mapping[str, Any],
    arrays: Sequence[np.ndarray] = (),
    scalars: Sequence[int | float] = (),
    real: Any = np.float32,
    clip: bool = False,
) -> list[np.ndarray]:
    """The values of expressions.

    leaves   "score", "q_idx", ... -> arrays that broadcast with each other; only those that occur
    arrays, scalars   what the slots hold; an index outside of its array raises IndexError
    real     float32 or float64: what floats are computed in
    clip     bring such an index inside instead, as kernels on a GPU do

    >>> from .expr import coordinate, make
    >>> evaluate([make("ge", coordinate("q_idx"), coordinate("kv_idx"))],
    ...          {"q_idx": np.arange(2)[:, None], "kv_idx": np.arange(2)})[0].tolist()
    [[True, False], [True, True]]
    """
    done: dict[Expr, Any] = {}
    with np.errstate(all="ignore"):
        for x in walk(*roots):
            args = [done[a] for a in x.args]
            if x.op == "const":
                done[x] = made(x.value, x.kind, real)
            elif x.op == "scalar":
                done[x] = made(scalars[x.value], x.kind, real)
            elif x.op == "extent":
                done[x] = made(arrays[x.value[0]].shape[x.value[1]], "int")
            elif x.op == "load":
                done[x] = made(_element(arrays[x.value], args, clip), x.kind, real)
            elif x.op == "dot":
                a, b, split = x.value
                rows = _element(arrays[a], args[:split], clip), _element(arrays[b], args[split:], clip)
                done[x] = np.sum(made(rows[0], "float", real) * made(rows[1], "float", real), axis=-1)
            elif x.op == "float":
                done[x] = made(args[0], "float", real)
            elif x.op in FUNCTIONS:
                done[x] = FUNCTIONS[x.op](*args)
            else:
                done[x] = made(leaves[x.op], x.kind, real)
    return [np.asarray(done[x]) for x in roots]


def require_inside(array: np.ndarray, indices: Sequence[Any], where: Any = True) -> None:
    """Raises IndexError for the first index outside of its axis among those with `where`, which broadcasts to them."""
    for axis, i in enumerate(indices):
        bad = (i < 0) | (i >= array.shape[axis])
        if np.any(bad) and np.any(bad := bad & where):
            index = int(np.broadcast_to(i, bad.shape)[bad][0])
            raise IndexError(f"index {index} is outside of axis {axis}, which has {array.shape[axis]} elements")


def _element(array: np.ndarray, indices: Sequence[Any], clip: bool) -> np.ndarray:
    if clip:
        indices = [np.clip(i, 0, n - 1) for i, n in zip(indices, array.shape, strict=False)]
    else:
        require_inside(array, indices)
    return array[tuple(indices)] if indices else array
