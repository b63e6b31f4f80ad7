"""The rules of lengths and page tables whose values the host knows: given as such, or read back by `config.check`."""

from __future__ import annotations

import numpy as np

from ..array import TensorView
from ..errors import ArgumentError


def longest(starts: np.ndarray) -> int | None:
    """The longest sequence, for a hint; `starts` are not checked yet."""
    known = starts.dtype == np.int32 and starts.ndim == 1 and starts.size > 1 and starts.flags.c_contiguous
    return max(int(np.diff(starts).max()), 0) if known else None


def check_lengths(views: dict[str, TensorView], values: dict[str, np.ndarray]) -> None:
    for side in "qk":
        rows = views[side].shape[-3]
        starts, used = values.get(f"cu_seqlens_{side}"), values.get(f"seqused_{side}")
        if side == "k" and "page_table" in views:
            pages, table = views["page_table"].shape[1], values.get("page_table")
            if used is not None:
                paged_lengths("seqused_k", used, pages, rows)
                if table is not None:
                    page_ids(table, used, views["k"].shape[0], rows)
            continue
        if starts is not None:
            cu_seqlens(f"cu_seqlens_{side}", starts, rows)
        if used is not None:
            # Lengths the host does not know are at most the array's.
            seqused(f"seqused_{side}", used, np.diff(starts) if starts is not None else np.array([rows]))


def cu_seqlens(name: str, values: np.ndarray, rows: int) -> None:
    """Values known to the host: from 0, never falling, not past the array."""
    if values[0] != 0:
        raise ArgumentError(f"{name}[0]={values[0]} must be 0: the first sequence begins at the first row")
    falls = np.flatnonzero(values[1:] < values[:-1])
    if falls.size:
        at = int(falls[0]) + 1
        raise ArgumentError(
            f"{name}[{at}]={values[at]} must not be below {name}[{at - 1}]={values[at - 1]}: entries are running "
            "totals of the lengths; build them with cuflash.packing.cu_seqlens_from(lengths=...)"
        )
    if values[-1] > rows:
        raise ArgumentError(
            f"{name}[-1]={values[-1]} must not exceed {rows}, the rows of {name.split('_')[2]}: the last sequence "
            "would end past the array"
        )


def seqused(name: str, values: np.ndarray, lengths: np.ndarray) -> None:
    """Values known to the host: within each sequence. `lengths` [batch] or [1]."""
    wrong = np.flatnonzero((values < 0) | (values > lengths))
    if wrong.size:
        at = int(wrong[0])
        length = int(np.broadcast_to(lengths, values.shape)[at])
        raise ArgumentError(f"{name}[{at}]={values[at]} must be from 0 to {length}, the length of sequence {at}")


def paged_lengths(name: str, values: np.ndarray, pages: int, page_size: int) -> None:
    """Values known to the host: lengths that the pages of a sequence have room for."""
    wrong = np.flatnonzero((values < 0) | (values > pages * page_size))
    if wrong.size:
        at = int(wrong[0])
        raise ArgumentError(
            f"{name}[{at}]={values[at]} must be from 0 to {pages * page_size}, what {pages} pages of {page_size} hold: "
            "give page_table more columns"
        )


def page_ids(table: np.ndarray, used: np.ndarray, num_pages: int, page_size: int) -> None:
    """Values known to the host: the entries that sequences of `used` keys look at are pages."""
    looked_at = np.arange(table.shape[1]) < -(-used[:, None] // page_size)
    wrong = np.argwhere(looked_at & ((table < 0) | (table >= num_pages)))
    if wrong.size:
        b, at = map(int, wrong[0])
        raise ArgumentError(
            f"page_table[{b}, {at}]={table[b, at]} must be from 0 to {num_pages - 1}, a page of k: sequence {b} has "
            f"{used[b]} keys and looks at its first {-(-int(used[b]) // page_size)} entries"
        )
