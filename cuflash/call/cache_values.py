"""Lengths and places of one call of `flash_attn_with_kvcache`, where the host knows them, and their rules."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .. import reference
from ..errors import ArgumentError
from . import length_checks
from .cache_checks import Views
from .cache_prepare import PreparedCache


class Values(NamedTuple):
    """Lengths and places, in NumPy; None for those that only the device knows, or that are not given."""

    starts_q: np.ndarray | None
    starts_new: np.ndarray | None
    before: np.ndarray | None  # [batch]
    new: np.ndarray | None
    table: np.ndarray | None  # [batch, pages]
    pad: np.ndarray | None
    turned: np.ndarray | None  # where rotary embeddings begin

    @property
    def after(self) -> np.ndarray | None:
        return None if self.before is None or self.new is None else self.before + self.new


def values_of(prepared: PreparedCache, views: Views, known: dict[str, np.ndarray], length: int) -> Values:
    """Of arrays those in `known`; `length` where there is no cache_seqlens."""
    batch, starts_new, before = prepared.batch, known.get("cu_seqlens_k_new"), known.get("cache_seqlens")
    if "cache_seqlens" not in views:
        before = np.full(batch, length, np.int32)
    new = np.full(batch, prepared.new, np.int32) if prepared.new is not None else None
    if starts_new is not None:
        new = np.diff(starts_new)
    table = known.get("block_table")
    if "cache_batch_idx" in known:
        table = known["cache_batch_idx"][:, None]
    elif "block_table" not in views and "cache_batch_idx" not in views:
        table = np.arange(batch, dtype=np.int32)[:, None]
    turned = known.get("rotary_seqlens") if "rotary_seqlens" in views else before
    return Values(known.get("cu_seqlens_q"), starts_new, before, new, table, known.get("cache_leftpad"), turned)


def check_values(prepared: PreparedCache, views: Views, values: Values) -> None:
    """Lengths lie within arrays, pages within the cache, and no two new keys go to one place, as far as is known."""
    if values.starts_q is not None:
        length_checks.cu_seqlens("cu_seqlens_q", values.starts_q, views["q"].shape[0])
    if values.starts_new is not None:
        length_checks.cu_seqlens("cu_seqlens_k_new", values.starts_new, views["k"].shape[0])
    before, new, after, table = values.before, values.new, values.after, values.table
    num_pages, page_size = views["k_cache"].shape[:2]
    if before is not None:
        _check_room(before, np.zeros_like(before) if new is None else new, prepared.pages, page_size)
    if values.pad is not None:
        largest = np.full(prepared.batch, prepared.capacity) if after is None else after
        _check_each("cache_leftpad", values.pad, largest, "the keys of sequence {b}")
    if table is not None:
        if "cache_batch_idx" in views:
            largest = np.full(prepared.batch, num_pages - 1)
            _check_each("cache_batch_idx", table[:, 0], largest, "the last sequence of k_cache")
        elif after is not None:
            length_checks.page_ids(table, after, num_pages, page_size)
        if before is not None and new is not None and ("cache_batch_idx" in views or "block_table" in views):
            _check_apart(table, page_size, before, new)
    if "rotary_cos" in views and values.turned is not None:
        steps = np.zeros(prepared.batch, np.int32) if new is None else new
        lengths_q = None if values.starts_q is None else np.diff(values.starts_q)
        if "cu_seqlens_q" not in views:
            lengths_q = np.full(prepared.batch, views["q"].shape[1])
        if lengths_q is not None:
            steps = np.maximum(steps, lengths_q if max(prepared.options.window) >= 0 else np.minimum(lengths_q, 1))
        _check_positions(values.turned, steps, views["rotary_cos"].shape[0])


def _check_each(name: str, values: np.ndarray, largest: np.ndarray, what: str) -> None:
    """Each entry from 0 to its largest."""
    wrong = np.flatnonzero((values < 0) | (values > largest))
    if wrong.size:
        b = int(wrong[0])
        raise ArgumentError(f"{name}[{b}]={values[b]} must be from 0 to {largest[b]}, {what.format(b=b)}: mend it")


def _check_room(before: np.ndarray, new: np.ndarray, pages: int, page_size: int) -> None:
    capacity = pages * page_size
    wrong = np.flatnonzero((before < 0) | (before.astype(np.int64) + new > capacity))
    if wrong.size:
        b = int(wrong[0])
        appended = f", and {new[b]} new keys behind them" if new[b] else ""
        raise ArgumentError(
            f"cache_seqlens[{b}]={before[b]}{appended}: the keys of sequence {b} must be from 0 to {capacity}, what "
            f"the cache has room for ({pages} x {page_size}): make it longer, or block_table wider"
        )


def _check_apart(table: np.ndarray, page_size: int, before: np.ndarray, new: np.ndarray) -> None:
    """No two new keys go to one place."""
    at = [reference.cache_slots(table[b], page_size, int(before[b]), int(n)) for b, n in enumerate(new)]
    places = np.concatenate([pages.astype(np.int64) * page_size + rows for pages, rows in at] or [np.zeros(0, int)])
    order = np.argsort(places, kind="stable")
    twice = np.flatnonzero(np.diff(places[order]) == 0)
    if twice.size:
        first, second = np.repeat(np.arange(len(new)), new)[order[twice[0] : twice[0] + 2]]
        page, row = divmod(int(places[order[twice[0]]]), page_size)
        raise ArgumentError(
            f"sequences {first} and {second} both append to row {row} of page (or sequence) {page} of the cache: give "
            "each a place of its own in block_table or cache_batch_idx"
        )


def _check_positions(starts: np.ndarray, steps: np.ndarray, positions: int) -> None:
    """Tables of a rotary embedding reach far enough: `steps` positions from each start on."""
    wrong = np.flatnonzero((starts < 0) | (starts.astype(np.int64) + steps > positions))
    if wrong.size:
        b = int(wrong[0])
        raise ArgumentError(
            f"rotary_cos.shape[0]={positions}: sequence {b} needs positions {starts[b]} to "
            f"{int(starts[b]) + int(steps[b]) - 1}: pass longer tables"
        )
