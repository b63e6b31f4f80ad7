"""What a block mask is of, and its blocks as arrays: which are empty, partly seen or full.

`BlockMask` (block_mask.py) is one of these; this is the part of it that knows of blocks and of nothing else.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .block_kinds import Grid, Seen, kinds_of, sparsity_of
from .block_tables import EMPTY, FULL, PARTIAL, as_used, like, on_host, ordered, placed, write_orders
from .errors import ArgumentError
from .trace.tracer import mod
from .trace.uncompiled import outside_of_compilers

Array = Any  # of NumPy, CuPy, PyTorch or JAX

LISTS = tuple(
    f"{full}{side}_{what}" for side in ("kv", "q") for full in ("", "full_") for what in ("num_blocks", "indices")
)


class BlockArrays:
    """Lengths, size of blocks, function and blocks of a mask. The arrays are made of the function when asked for,
    unless they were given."""

    _TENSOR_ATTRS = (*LISTS, "dq_write_order", "dq_write_order_full", "dq_kv_order")
    _CONTEXT_ATTRS = ("seq_lengths", "BLOCK_SIZE", "mask_mod", "dq_kv_order_spt")

    def _begin(
        self, mask_mod: Any, shape: Any, block: tuple[int, int], device: Any, separate: bool, order: bool | None
    ) -> None:
        self._shape: tuple[int, int, int, int] = shape
        self._mask_mod, self._device = mask_mod, device
        self._block = block
        self.dq_kv_order_spt = order
        self._separate = separate  # whether full blocks are listed apart
        self._arrays: dict[str, Array] = {}  # block arrays that were given
        # What the blocks are of, where they are not those of mask_mod: a table, uint8 [B, H, q blocks, kv blocks], or
        # the mask that this one was before its function was changed.
        self._table: Array = None
        self._before: Any = None
        self._kinds: np.ndarray | None = None
        self._mod: Any = None
        self._home: Any = None  # framework and device for which _mod reads the blocks of a mask before

    @property
    def BLOCK_SIZE(self) -> tuple[int, int]:
        """(queries, keys) of a block."""
        return self._block

    @BLOCK_SIZE.setter
    def BLOCK_SIZE(self, value: Any) -> None:
        raise ArgumentError(
            f"BLOCK_SIZE={value!r} cannot be set, for blocks of {self._block} are what the mask lists: make another, "
            "with create_block_mask(..., BLOCK_SIZE=...)"
        )

    @property
    @outside_of_compilers
    def kinds(self) -> np.ndarray:
        """What each block is, uint8 [B, H, q blocks, kv blocks]: 0 empty, 1 partly seen, 2 full. In NumPy.

        A block that the end of the sequence cuts off is never full, as in PyTorch.
        """
        if self._kinds is None:
            if self._table is not None:
                self._kinds = on_host(self._table)
            elif self._before is not None:
                self._kinds = self._before.kinds
            else:
                kinds = kinds_of(self._seen(), self._shape, self._grid)
                self._kinds = kinds if self._separate else np.minimum(kinds, PARTIAL)
        assert self._kinds is not None
        return self._kinds

    def _seen(self) -> Seen:
        return Seen(self._mod, self._shape[2:])

    @property
    def _grid(self) -> Grid:
        return Grid(self._shape[2:], self.BLOCK_SIZE)

    @property
    def _decided_by_blocks(self) -> bool:
        return self._table is not None or self._before is not None or self._kinds is not None

    @outside_of_compilers
    def _listed(self, name: str) -> Array:
        """A block array: as it was given, else of the kinds of blocks."""
        if name in self._arrays:
            return self._arrays[name]
        full = name.startswith("full_")
        if full and not self._separate:
            return None
        chosen = self.kinds == (FULL if full else PARTIAL)
        found = ordered(chosen if "kv_" in name else chosen.swapaxes(2, 3))
        return self._given(found[name.endswith("indices")])

    @property
    def kv_num_blocks(self) -> Array:
        """int32 [B, H, q blocks]: how many blocks of a row are partly seen."""
        return self._listed("kv_num_blocks")

    @property
    def kv_indices(self) -> Array:
        """int32 [B, H, q blocks, kv blocks]: those that are partly seen, and behind them the others."""
        return self._listed("kv_indices")

    @property
    def full_kv_num_blocks(self) -> Array:
        """Likewise of full blocks; None where these are not listed apart."""
        return self._listed("full_kv_num_blocks")

    @property
    def full_kv_indices(self) -> Array:
        return self._listed("full_kv_indices")

    @property
    def q_num_blocks(self) -> Array:
        """int32 [B, H, kv blocks]: how many blocks of a column are partly seen."""
        return self._listed("q_num_blocks")

    @property
    def q_indices(self) -> Array:
        return self._listed("q_indices")

    @property
    def full_q_num_blocks(self) -> Array:
        return self._listed("full_q_num_blocks")

    @property
    def full_q_indices(self) -> Array:
        return self._listed("full_q_indices")

    @property
    def dq_write_order(self) -> Array:
        """int32 [B, H, kv blocks, q blocks]: beside `q_indices`, how many blocks of keys write before; None where it
        was not asked for."""
        return self._write_order("dq_write_order", 0)

    @property
    def dq_write_order_full(self) -> Array:
        return self._write_order("dq_write_order_full", 1)

    @property
    def dq_kv_order(self) -> Array:
        return self._arrays.get("dq_kv_order")

    @outside_of_compilers
    def _write_order(self, name: str, which: int) -> Array:
        if name in self._arrays or self.dq_kv_order_spt is None or (which and not self._separate):
            return self._arrays.get(name)
        return self._given(write_orders(self.kinds, self.dq_kv_order_spt)[which])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, q_len, kv_len)"""
        return self._shape

    def numel(self) -> int:
        """Pairs of a query and a key."""
        b, h, q, k = self._shape
        return b * h * q * k

    @outside_of_compilers
    def sparsity(self) -> float:
        """The percentage of blocks that are empty."""
        if not self._decided_by_blocks:
            return sparsity_of(self._seen(), self._shape, self._grid)
        return 100.0 * float(np.mean(self.kinds == EMPTY)) if self.kinds.size else 0.0

    @outside_of_compilers
    def to_dense(self) -> Array:
        """int32 [B, H, q blocks, kv blocks]: 1 where a block is not empty. `create_mask` shows each key."""
        return self._given((self.kinds != EMPTY).astype(np.int32))

    def _given(self, values: np.ndarray) -> Array:
        if self._device is not None:
            return placed(values, self._device)
        if self._table is not None:
            return like(values, self._table)
        traced = mod(self._mask_mod, "mask") if self._mod is None else self._mod
        return as_used(values, traced.bind().arrays)
