"""Parts of a mask: which of the batch, the heads and the rows of blocks an index chooses, and the mask of these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .block_tables import like, on_host
from .errors import ArgumentError
from .mods.parts import with_lengths
from .trace.tracer import mod

Array = Any  # of NumPy, CuPy, PyTorch or JAX


class BadIndexError(ArgumentError, IndexError):
    """A block mask has no such part."""


_MOST = 2**31 - 1  # elements of an axis of a mask


class Chosen:
    """Which elements of an axis an index chooses."""

    def __init__(self, index: Any, n: int, axis: int) -> None:
        where = f"axis {axis} of a block mask, which has {n} elements"
        given: Any = ()
        if not isinstance(index, slice):
            if isinstance(index, (bool, np.bool_)) or index is None or isinstance(index, (str, float)):
                raise BadIndexError(f"index {index!r} of {where}: pass ints, slices or arrays of ints")
            if isinstance(index, int) and not -n <= index < n:  # of any size: NumPy has none for 2**64
                raise BadIndexError(f"index {index} is outside of {where}")
            try:
                values = np.asarray(index if isinstance(index, int) else on_host(index))
            except ValueError as error:  # lists of unequal lengths
                raise BadIndexError(f"index {index!r} of {where}: pass ints, slices or arrays of ints") from error
            if values.size > _MOST:
                raise BadIndexError(f"index of shape {values.shape} of {where}: {_MOST} elements are the most")
            if values.dtype == bool and values.shape == (n,):
                values = np.flatnonzero(values)
            values = values.astype(np.int32) if isinstance(index, (list, tuple)) and not index else values
            if values.dtype.kind not in "iu" or values.ndim > 1:
                raise BadIndexError(
                    f"index of shape {values.shape}, {values.dtype}, of {where}: pass ints, slices or arrays of ints "
                    "of one axis"
                )
            given, index = index, values.reshape(-1)
            outside = index[(index < -n) | (index >= n)]
            if outside.size:
                raise BadIndexError(f"index {outside[0]} is outside of {where}")
        try:
            self.numbers = np.arange(n)[index]
        except (TypeError, ValueError) as error:
            raise BadIndexError(f"index {index!r} of {where}: {error}") from None
        self.all = len(self.numbers) == n and bool((self.numbers == np.arange(n)).all())
        steps = np.diff(self.numbers)
        self.regular = bool((steps == steps[:1]).all())
        self.start = int(self.numbers[0]) if len(self.numbers) else 0
        self.step = int(steps[0]) if len(steps) else 0
        # In the framework of the index: kernels read it.
        numbers = self.numbers.astype(np.int32)
        self.values = None if self.regular else numbers if isinstance(given, (list, tuple)) else like(numbers, given)

    def map(self) -> Callable[[Any], Any]:
        """From an index in the part to one in the whole."""
        if self.all:
            return lambda i: i
        start, step, values = self.start, self.step, self.values
        return (lambda i: values[i]) if values is not None else lambda i: start + step * i


def mod_of_part(mask_mod: Any, chosen: Sequence[Chosen], size: int, lengths: tuple[int, int]) -> Callable[..., Any]:
    inner = with_lengths("mask_mod", mask_mod)
    of_b, of_h, of_row = (c.map() for c in chosen)
    q_len, kv_len = lengths
    rows_all, begin, together = chosen[2].all, chosen[2].start * size, chosen[2].regular and chosen[2].step in (0, 1)

    def part_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        if not rows_all:
            q_idx = q_idx + begin if together else of_row(q_idx // size) * size + q_idx % size
        return inner(of_b(b), of_h(h), q_idx, kv_idx, q_len, kv_len)

    made = mod(part_mask)
    made.made_by = mod_of_part, (mask_mod, chosen, size, lengths), {}
    return made


def mask_at(mask_mod: Any, at_b: int, at_h: int) -> Callable[..., Any]:
    """The mask of one batch and head."""
    inner = with_lengths("mask_mod", mask_mod)

    def one(b: Any, h: Any, q_idx: Any, kv_idx: Any, q_len: Any, kv_len: Any) -> Any:
        return inner(b + at_b, h + at_h, q_idx, kv_idx, q_len, kv_len)

    return one


def elements_of(table: Array, chosen: Sequence[Chosen]) -> Array:
    """A table's elements that an index chooses of each of its first axes."""
    for axis, c in enumerate(chosen):
        if not c.all:
            regular = c.regular and c.step > 0
            index = slice(c.start, c.start + c.step * len(c.numbers), c.step) if regular else like(c.numbers, table)
            table = table[(slice(None),) * axis + (index,)]
    return table
