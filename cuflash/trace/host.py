"""Mods with their values, as the functions of arrays that `reference` takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any, NoReturn

import numpy as np

from ..errors import ArgumentError
from .derive import gradients
from .emit_numpy import evaluate, require_inside
from .expr import Expr, Mods, walk
from .expr import leaves as leaves_of

_Read = list[tuple[int, Sequence[Expr]]]  # slots of arrays, each with the indices of one element or row
_CHECKED_AT_ONCE = 2**22  # pairs of a query and a key


class HostMods:
    """Mods, the arrays and the numbers they captured, in slot order.

    wanted      slots of arrays whose gradients `backward` sums up
    gradients   these sums, float64 in the arrays' shapes, by slot
    """

    def __init__(
        self, mods: Mods, arrays: Sequence[np.ndarray], scalars: Sequence[int | float], wanted: Collection[int] = ()
    ) -> None:
        self.mods, self.arrays, self.scalars = mods, arrays, scalars
        self.gradients = {slot: np.zeros(arrays[slot].shape) for slot in wanted}

    @property
    def functions(self) -> dict[str, Callable[..., np.ndarray]]:
        """score_mod, mask_mod: those there are."""
        found: dict[str, Callable[..., np.ndarray]] = {}
        if self.mods.score is not None:
            found["score_mod"] = _Score(self, self.mods.score)
        if self.mods.mask is not None:
            found["mask_mod"] = self.mask
        return found

    def mask(self, b: Any, h: Any, q_idx: Any, kv_idx: Any, q_len: int, kv_len: int) -> np.ndarray:
        assert self.mods.mask is not None
        leaves = dict(b=b, h=h, q_idx=q_idx, kv_idx=kv_idx, q_len=q_len, kv_len=kv_len)
        return self.evaluate([self.mods.mask], leaves, np.float32)[0]

    def evaluate(self, roots: Sequence[Expr], leaves: Mapping[str, Any], real: Any) -> list[np.ndarray]:
        try:
            return evaluate(roots, leaves, self.arrays, self.scalars, real)
        except IndexError as error:
            self._refuse(roots, leaves, error)

    def _refuse(self, roots: Sequence[Expr], leaves: Mapping[str, Any], error: IndexError) -> NoReturn:
        """Names the array that is read outside of."""
        for read in _reads(*roots):
            self._require_inside(read, leaves)
        raise error

    @property
    def reads_by_score(self) -> bool:
        """Whether a score decides where an array is read."""
        return any("score" in leaves_of(i) for read in self._reads for _, indices in read for i in indices)

    def check_indices(self, lengths: Sequence[tuple[int, int]], heads: int, window: tuple[int, int]) -> None:
        """Raises ArgumentError if an array is read outside of for a query and a key that the window leaves.

        lengths  (q_len, kv_len) of each sequence
        window   with causal folded in, -1 for unlimited
        """
        left, right = (math.inf if side < 0 else side for side in window)
        for b, (q_len, kv_len) in enumerate(lengths):
            rows = max(_CHECKED_AT_ONCE // max(heads * kv_len, 1), 1)
            for first in range(0, q_len, rows):
                q_idx = np.arange(first, min(first + rows, q_len), dtype=np.int32)[:, None]
                kv_idx = np.arange(kv_len, dtype=np.int32)
                distance = kv_idx - (q_idx + (kv_len - q_len))
                at = dict(
                    b=np.full((1, 1, 1), b, np.int32), h=np.arange(heads, dtype=np.int32)[:, None, None],
                    q_idx=q_idx, kv_idx=kv_idx, q_len=q_len, kv_len=kv_len,
                )  # fmt: skip
                for read in self._reads:
                    self._require_inside(read, at, (distance >= -left) & (distance <= right))

    @property
    def _reads(self) -> list[_Read]:
        return _reads(*(x for x in (self.mods.score, self.mods.mask) if x is not None))

    def _require_inside(self, read: _Read, leaves: Mapping[str, Any], where: Any = True) -> None:
        for slot, indices in read:
            try:
                values = evaluate(indices, leaves, self.arrays, self.scalars, clip=True)
                require_inside(self.arrays[slot], values, where)
            except IndexError as error:
                raise ArgumentError(
                    f"{self.mods.arrays[slot].name}: {error}; a mod reads it there for some b, h, q_idx, kv_idx (the "
                    "length was added to a negative index): clamp the index, as by np.clip, also where np.where would "
                    "not use it"
                ) from None


def _reads(*roots: Expr) -> list[_Read]:
    """Every place where expressions read arrays, those that others' indices need first."""
    found: list[_Read] = []
    for x in walk(*roots):
        if x.op == "load":
            found.append([(x.value, x.args)])
        elif x.op == "dot":
            a, b, split = x.value
            found.append([(a, x.args[:split]), (b, x.args[split:])])
    return found


class _Score:
    """A score_mod with its derivative, as `reference.ScoreMod` wants it."""

    def __init__(self, host: HostMods, score: Expr) -> None:
        self._host, self._score = host, score

    def __call__(
        self, score: np.ndarray, b: Any, h: Any, q_idx: Any, kv_idx: Any, q_len: int, kv_len: int
    ) -> np.ndarray:
        leaves = dict(score=score, b=b, h=h, q_idx=q_idx, kv_idx=kv_idx, q_len=q_len, kv_len=kv_len)
        return self._host.evaluate([self._score], leaves, score.dtype)[0]

    def backward(
        self, ds: np.ndarray, score: np.ndarray, b: Any, h: Any, q_idx: Any, kv_idx: Any, q_len: int, kv_len: int
    ) -> np.ndarray:
        """The gradient of the score that came in, from `ds`, that of the score that went out; 0 where that is 0.

        Adds to the gradients of the arrays.
        """
        leaves = dict(score=score, b=b, h=h, q_idx=q_idx, kv_idx=kv_idx, q_len=q_len, kv_len=kv_len)
        sums = self._host.gradients
        by_score, by_load = _derivatives(self._score, tuple(sums))
        indices = [i for load in by_load for i in load.args]
        slope, *rest = self._host.evaluate([by_score, *by_load.values(), *indices], leaves, score.dtype)
        slopes, at = rest[: len(by_load)], iter(rest[len(by_load) :])
        none = ds == 0  # masked scores are not in the domain of what may stand here: 0 * inf
        for load, d in zip(by_load, slopes, strict=True):
            _add(sums[load.value], [next(at) for _ in load.args], np.where(none, 0, ds * d))
        return np.where(none, 0, ds * slope).astype(score.dtype, copy=False)


@lru_cache(maxsize=1024)
def _derivatives(score: Expr, slots: tuple[int, ...]) -> tuple[Expr, dict[Expr, Expr]]:
    return gradients(score, slots)


def _add(total: np.ndarray, indices: Sequence[np.ndarray], values: np.ndarray) -> None:
    """total[indices] += values, where indices repeat."""
    reach = np.broadcast_shapes(*(i.shape for i in indices))
    reach = (1,) * (values.ndim - len(reach)) + reach
    # What all elements of an axis add to one place is summed first.
    axes = tuple(axis for axis, n in enumerate(reach) if n == 1)
    values = values.sum(axis=axes, keepdims=True, dtype=np.float64)
    if indices:
        np.add.at(total, tuple(np.broadcast_to(i, values.shape) for i in indices), values)
    else:
        total += values.item()
