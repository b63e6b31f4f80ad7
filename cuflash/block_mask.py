"""`BlockMask`, FlexAttention's name for a mask of given lengths.

A `BlockMask` holds a mask and the lengths it is for, to be looked at, and patterns that are data and no function
(`BlockMask.from_kv_blocks`). Nobody needs its blocks: kernels work out from the function which tiles are empty or full.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from . import mods
from .block_arrays import LISTS, BlockArrays
from .block_kinds import Grid, Seen, cells_of, mask_of
from .block_parts import BadIndexError, Chosen, elements_of, mask_at, mod_of_part
from .block_pictures import draw, means, text_of
from .block_tables import EMPTY, FULL, PARTIAL, checked_device, like, mod_of_table, moved, table_of
from .call import number_checks
from .errors import ArgumentError, UnsupportedError, require
from .mods.given import is_array, pair, require_int
from .trace.tracer import mod, takes_score
from .trace.uncompiled import outside_of_compilers

Array = Any  # of NumPy, CuPy, PyTorch or JAX


class BlockMask(BlockArrays):
    """A mask, the lengths it is for, and, when looked at, which of its blocks are empty, partly seen or full.

    Made by `create_block_mask` or `BlockMask.from_kv_blocks`, for `flex_attention(..., block_mask=)` and
    `attention(..., block_mask=)`, as often as one likes. One made of a function *is* that function, whatever the size
    of its blocks; one made of blocks shows what these say, and `mask_mod` decides in those that are partly seen.

    mask_mod      the function
    seq_lengths   (q_len, kv_len)
    BLOCK_SIZE    (q, kv)

    Both mask_mod and seq_lengths may be set, as in PyTorch: the blocks stay those of before, and the new function
    decides in the ones that are partly seen.

    Blocks are kept once they were looked at: after changing an array that the function reads, make a new mask to look
    at. Batch and heads of one element serve all. A mask can be pickled where its function can: those of `mods` and
    those that a module defines. In PyTorch it is a pytree, whose leaves are its block arrays.

    >>> from cuflash import create_block_mask
    >>> block_mask = create_block_mask(mods.sliding_window(100, 0), None, None, 512, 512)
    >>> print(block_mask)
    BlockMask(shape=(1, 1, 512, 512), sparsity=56.25%,
    (0, 0)
    ██
    ████
      ████
        ████
    )
    """

    def __init__(
        self,
        seq_lengths: tuple[int, int],
        kv_num_blocks: Array,
        kv_indices: Array,
        full_kv_num_blocks: Array | None = None,
        full_kv_indices: Array | None = None,
        q_num_blocks: Array | None = None,
        q_indices: Array | None = None,
        full_q_num_blocks: Array | None = None,
        full_q_indices: Array | None = None,
        BLOCK_SIZE: int | tuple[int, int] = 128,
        mask_mod: Callable[..., Any] = mods.noop_mask,
        *,
        dq_write_order: Array | None = None,
        dq_write_order_full: Array | None = None,
        dq_kv_order: Array | None = None,
        dq_kv_order_spt: bool | None = None,
    ) -> None:
        """From PyTorch's block arrays, as its own constructor: `from_kv_blocks` says what they are, and makes those of
        queries where they are None here."""
        block = pair("BLOCK_SIZE", BLOCK_SIZE)
        require_mask("mask_mod", mask_mod)
        _require_together("full_kv", full_kv_num_blocks, full_kv_indices)
        _require_together("full_q", full_q_num_blocks, full_q_indices)
        _require_together("q", q_num_blocks, q_indices)
        require(
            dq_write_order is not None or dq_write_order_full is None,
            "dq_write_order_full without dq_write_order: pass both",
        )
        listed: Any = tuple(kv_indices.shape) if is_array(kv_indices) else ()
        require(len(listed) >= 2, f"kv_indices.shape={listed} must be [B, H, q blocks, n]")
        lengths = _lengths(seq_lengths)
        grid = Grid(lengths, block)
        require(
            grid.blocks[0] == listed[-2],
            f"kv_indices.shape[-2]={listed[-2]} must be the rows of blocks of BLOCK_SIZE[0]={block[0]} in "
            f"seq_lengths[0]={lengths[0]}: pass the lengths that the blocks are for",
        )
        table = table_of(None, PARTIAL, "", kv_num_blocks, kv_indices, grid.blocks[1])
        if full_kv_indices is not None:
            table = table_of(table, FULL, "full_", full_kv_num_blocks, full_kv_indices, grid.blocks[1])
        table = table[(None,) * (4 - len(table.shape))]
        given = (
            kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices, q_num_blocks, q_indices, full_q_num_blocks,
            full_q_indices, dq_write_order, dq_write_order_full, dq_kv_order,
        )  # fmt: skip
        self._begin(mask_mod, (*table.shape[:2], *lengths), block, None, full_kv_indices is not None, dq_kv_order_spt)
        self._table = table
        self._arrays = dict(zip(self._TENSOR_ATTRS, given, strict=True))

    @classmethod
    def of_function(
        cls,
        mask_mod: Callable[..., Any],
        shape: tuple[int, int, int, int],
        block: int | tuple[int, int],
        device: Any,
        separate: bool = True,
        order: bool | None = None,
    ) -> BlockMask:
        """One that is a function."""
        made = cls.__new__(cls)
        made._begin(mask_mod, shape, pair("BLOCK_SIZE", block), device, separate, order)
        made._mod = mod(mask_mod, "mask")
        return made

    def _begin(self, *given: Any) -> None:
        super()._begin(*given)
        register_pytree()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_mod": None, "_home": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        register_pytree()
        if self._table is None is self._before:
            self._mod = mod(self._mask_mod, "mask")

    @property
    def mask_mod(self) -> Callable[..., Any]:
        return self._mask_mod

    @mask_mod.setter
    @outside_of_compilers
    def mask_mod(self, mask_mod: Callable[..., Any]) -> None:
        require_mask("mask_mod", mask_mod)
        self._keep_blocks()
        self._mask_mod, self._mod = mask_mod, None

    @property
    def seq_lengths(self) -> tuple[int, int]:
        return self._shape[2:]

    @seq_lengths.setter
    @outside_of_compilers
    def seq_lengths(self, seq_lengths: tuple[int, int]) -> None:
        lengths = _lengths(seq_lengths)
        blocks, wanted = self._grid.blocks, Grid(lengths, self.BLOCK_SIZE).blocks
        if self._table is not None or self._before is not None:
            blocks = tuple((self._table if self._table is not None else self.kinds).shape[2:])
        require(
            wanted[0] <= blocks[0] and wanted[1] <= blocks[1],
            f"seq_lengths={lengths} must fit the blocks that there are, {blocks[0]} x {blocks[1]} of "
            f"{self.BLOCK_SIZE}: make a new mask for longer sequences",
        )
        self._keep_blocks()
        self._shape = (*self._shape[:2], *lengths)
        self._mod = None

    def _keep_blocks(self) -> None:
        """Makes of one that is a function one of that function's blocks."""
        if self._table is None is self._before:
            self._before = copy.copy(self)

    @classmethod
    @outside_of_compilers
    def from_kv_blocks(
        cls,
        kv_num_blocks: Array,
        kv_indices: Array,
        full_kv_num_blocks: Array | None = None,
        full_kv_indices: Array | None = None,
        BLOCK_SIZE: int | tuple[int, int] = 128,
        mask_mod: Callable[..., Any] | None = None,
        seq_lengths: tuple[int, int] | None = None,
        compute_q_blocks: bool = True,
        *,
        dq_write_order: Array | None = None,
        dq_write_order_full: Array | None = None,
        dq_kv_order: Array | bool | None = None,
    ) -> BlockMask:
        """A mask of blocks: of row i of blocks, kv_indices[..., i, :kv_num_blocks[..., i]] are seen where `mask_mod`
        says so (None: everywhere), and those in full_kv_indices everywhere.

        kv_num_blocks, full_kv_num_blocks   integers [B, H, q blocks]; leading axes may be missing
        kv_indices, full_kv_indices         integers [B, H, q blocks, n], n up to the number of kv blocks
        seq_lengths                         (q_len, kv_len); None: as many whole blocks as there are, n for the keys
        compute_q_blocks                    False: q_num_blocks and its like are None; attention needs none of them
        dq_write_order, dq_write_order_full, dq_kv_order    kept and not used, as in PyTorch's

        The arrays must be of the framework and on the device of the queries. They are copied: a change shows in a new
        mask.

        >>> count, blocks = np.array([1, 2]), np.array([[0, 0], [0, 1]])
        >>> print(BlockMask.from_kv_blocks(count, blocks, BLOCK_SIZE=64).to_string())
        (0, 0)
        ██
        ████
        """
        block = pair("BLOCK_SIZE", BLOCK_SIZE)
        shape: Any = tuple(kv_indices.shape) if is_array(kv_indices) else ()
        require(len(shape) >= 2, f"kv_indices.shape={shape} must be [B, H, q blocks, n]")
        if seq_lengths is None:
            seq_lengths = shape[-2] * block[0], shape[-1] * block[1]
        compute_q_blocks = number_checks.flag("compute_q_blocks", compute_q_blocks)
        by_rule = isinstance(dq_kv_order, bool)
        made = cls(
            seq_lengths, kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices, BLOCK_SIZE=block,
            mask_mod=mods.noop_mask if mask_mod is None else mask_mod, dq_write_order=dq_write_order,
            dq_write_order_full=dq_write_order_full, dq_kv_order=None if by_rule else dq_kv_order,
            dq_kv_order_spt=dq_kv_order if by_rule else None,
        )  # fmt: skip
        if compute_q_blocks:
            for name in made._TENSOR_ATTRS:
                if "q_" in name and not name.startswith("dq_"):
                    made._arrays.pop(name)
        return made

    def as_mask_mod(self, q: Array = None) -> Callable[..., Any]:
        """What attention calls. q: an array of the call, beside which blocks are put that are in no array yet."""
        if self._before is not None and q is not None:
            home = type(q), getattr(q, "device", None)
            if self._mod is None or self._home != home:
                self._mod = _mod_beside(self, q)
                self._home = home
        if self._mod is None:
            table = self._given(self.kinds) if self._table is None else self._table
            self._mod = mod_of_table(table, self.BLOCK_SIZE, self._mask_mod)
        return self._mod

    def require_fits(self, batch: int, heads: int, q_len: int, kv_len: int) -> None:
        """Raises ArgumentError where the mask is for another call."""
        if self.seq_lengths != (q_len, kv_len):
            raise ArgumentError(
                f"block_mask is for q_len={self.seq_lengths[0]} and kv_len={self.seq_lengths[1]}, and the arrays have "
                f"{q_len} and {kv_len}: make one with create_block_mask(..., Q_LEN={q_len}, KV_LEN={kv_len})"
            )
        for axis, (name, n) in enumerate((("batch", batch), ("heads", heads))):
            if self._shape[axis] not in (1, n):
                raise ArgumentError(
                    f"block_mask.shape[{axis}]={self._shape[axis]} must be 1, or the {name} of the call, {n}: make one "
                    f"with create_block_mask(..., {'BH'[axis]}={n}), or None for all"
                )

    # Taken apart and put together, as PyTorch does -------------------------------------------------------------------

    def as_tuple(self, flatten: bool = True) -> tuple[Any, ...]:
        """Lengths, block arrays, size of blocks and function, in the order of PyTorch's; flatten: pairs as two."""
        arrays = (getattr(self, name) for name in self._TENSOR_ATTRS)
        flatten = number_checks.flag("flatten", flatten)
        pairs = (self._shape[2:], self.BLOCK_SIZE) if flatten else ((self._shape[2:],), (self.BLOCK_SIZE,))
        return (*pairs[0], *arrays, self.dq_kv_order_spt, *pairs[1], self.mask_mod)

    def _flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        found = {name: getattr(self, name) for name in self._TENSOR_ATTRS}
        missing = tuple(name for name, x in found.items() if x is None)
        context = *(getattr(self, name) for name in self._CONTEXT_ATTRS), missing
        return tuple(x for x in found.values() if x is not None), context

    @classmethod
    def _unflatten(cls, leaves: Any, context: tuple[Any, ...]) -> BlockMask:
        *named, missing = context
        names = [name for name in cls._TENSOR_ATTRS if name not in missing]
        found = dict(zip(cls._CONTEXT_ATTRS, named, strict=True)) | dict(zip(names, leaves, strict=True))
        return cls(**found)

    def _flatten_with_keys(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        from torch.utils._pytree import GetAttrKey

        leaves, context = self._flatten()
        names = [name for name in self._TENSOR_ATTRS if name not in context[-1]]
        return tuple((GetAttrKey(name), x) for name, x in zip(names, leaves, strict=True)), context

    @outside_of_compilers
    def to_string(self, grid_size: int | tuple[int, int] = (20, 20), limit: int = 4) -> str:
        """A picture in characters: █ all blocks seen at least in part, ░ some, a space none.

        grid_size   at most so many (rows, columns); -1: a character pair for each block
        limit       how many masks of batch and heads to show

        Raises `ArgumentError` for more than two million characters.
        """
        if self._decided_by_blocks:
            seen = self.kinds != EMPTY
            blocks, cells = seen.shape[2:], lambda b, h, steps: means(seen[b, h], steps)
        else:
            mod = self._seen()
            blocks, cells = self._grid.blocks, lambda b, h, steps: cells_of(mod, *mod.place(b, h), self._grid, steps)
        return text_of(self._shape[:2], blocks, cells, grid_size, limit)

    def __str__(self) -> str:
        return f"BlockMask(shape={self.shape}, sparsity={self.sparsity():.2f}%,\n{self.to_string().strip()}\n)"

    def __repr__(self) -> str:
        name = getattr(self.mask_mod, "__name__", repr(self.mask_mod))
        made = "" if self._table is None is self._before else ", from blocks"
        return f"BlockMask(shape={self.shape}, BLOCK_SIZE={self.BLOCK_SIZE}, mask_mod={name}{made})"

    def plot(self, b: int = 0, h: int = 0, ax: Any = None) -> Any:
        """Draws which keys are seen, and blocks by what they are, with matplotlib -> its Axes.

        Keys are drawn one by one up to a length of 2048; behind that blocks alone.
        """
        b, h = (Chosen(i, n, axis).start for axis, (i, n) in enumerate(zip((b, h), self._shape[:2], strict=True)))
        require(
            self.numel() > 0,
            f"plot of a mask of shape {self.shape}: there is nothing to draw; str(block_mask) says as much",
        )
        keys = None
        if max(self.seq_lengths) <= 2048:
            keys = mask_of(Seen(mask_at(self.as_mask_mod(), b, h), self.seq_lengths), (1, 1, *self.seq_lengths))[0, 0]
        return draw(self.kinds[b, h], keys, self._grid, f"b={b}, h={h}", ax)

    # Others made from it ----------------------------------------------------------------------------------------------

    @outside_of_compilers
    def to(self, device: Any) -> BlockMask:
        """The same, with block arrays on another device. What mask_mod captures stays where it is."""
        made = copy.copy(self)
        made._device = checked_device(device)
        if self._table is not None:
            made._table = moved(self._table, device)
            made._arrays = {name: x if x is None else moved(x, device) for name, x in self._arrays.items()}
            made._mod = None
        return made

    @outside_of_compilers
    def __getitem__(self, index: Any) -> BlockMask:
        """The mask of some of the batch, of the heads and of the rows of blocks: ints, slices or integer arrays.

        An int keeps its axis, with one element, as in PyTorch. The part can be used like the whole, for queries that
        are those of its rows: its q_len is theirs.

        >>> from cuflash import create_block_mask
        >>> block_mask = create_block_mask(mods.causal(), 4, 2, 512, 512)
        >>> block_mask[0].shape, block_mask[1:3, 1].shape, block_mask[:, :, 3].shape
        ((1, 2, 512, 512), (2, 1, 512, 512), (4, 2, 128, 512))
        """
        if self.dq_kv_order is not None:
            raise UnsupportedError(f"a part of a mask with dq_kv_order as an array: {_NEW_ORDER}")
        index = index if isinstance(index, tuple) else (index,)
        if any(i is Ellipsis for i in index):
            at = next(n for n, i in enumerate(index) if i is Ellipsis)
            index = (*index[:at], *[slice(None)] * (4 - len(index)), *index[at + 1 :])
        if len(index) > 3:
            raise BadIndexError(f"block_mask[{index}] must name batch, heads and rows of blocks at most")
        index = (*index, slice(None), slice(None), slice(None))[:3]
        sizes = *self._shape[:2], self._grid.blocks[0]
        chosen = [Chosen(i, n, axis) for axis, (i, n) in enumerate(zip(index, sizes, strict=True))]
        lists = [
            axis for axis, i in enumerate(index) if not isinstance(i, (int, slice)) and len(chosen[axis].numbers) > 1
        ]
        if len(lists) > 1:
            raise BadIndexError(
                f"block_mask[...] with arrays of several elements on axes {lists[0]} and {lists[1]}: they could mean "
                "pairs, as in NumPy, or all combinations: index one axis after the other, as "
                "block_mask[batches][:, heads]"
            )
        return self._part(chosen)

    def _part(self, chosen: list[Chosen]) -> BlockMask:
        size, (q_len, kv_len) = self.BLOCK_SIZE[0], self.seq_lengths
        numbers, whole = chosen[2].numbers, self._grid.blocks[0]
        rows = len(numbers) * size
        if len(numbers) and int(np.max(numbers)) == whole - 1:
            require(
                numbers[-1] == whole - 1 or q_len % size == 0,
                f"block_mask[:, :, {numbers.tolist()}]: the last row of blocks, cut off by the sequence's end, must "
                "come last",
            )
            rows -= -q_len % size
        mask_mod = self.mask_mod
        if not all(c.all for c in chosen):
            mask_mod = mod_of_part(mask_mod, chosen, size, self.seq_lengths)
        shape = len(chosen[0].numbers), len(chosen[1].numbers), rows, kv_len
        return self._with(
            mask_mod, shape, lambda before: before._part(chosen), lambda table: elements_of(table, chosen)
        )

    def _with(self, mask_mod: Any, shape: Any, of_before: Any, of_table: Any) -> BlockMask:
        """The same for another function and shape, whose blocks are a part of these."""
        made = BlockMask.__new__(BlockMask)
        made._begin(mask_mod, shape, self.BLOCK_SIZE, self._device, self._separate, self.dq_kv_order_spt)
        if self._before is not None:
            made._before = of_before(self._before)
        elif self._table is not None:
            made._table = of_table(self._table)
            if "q_num_blocks" in self._arrays and self._arrays["q_num_blocks"] is None:
                made._arrays = dict.fromkeys(name for name in LISTS if "q_" in name)
        else:
            made._mod = mod(mask_mod, "mask")
        return made

    @outside_of_compilers
    def _adjust(self, new_q_len: int, new_kv_len: int) -> BlockMask:
        """The mask for other lengths: of a function the function, of blocks the upper left ones."""
        if self.dq_kv_order is not None:
            raise UnsupportedError(f"other lengths of a mask with dq_kv_order as an array: {_NEW_ORDER}")
        lengths = _lengths((new_q_len, new_kv_len))
        rows, columns = Grid(lengths, self.BLOCK_SIZE).blocks
        if self._table is not None or self._before is not None:
            blocks = (self.kinds if self._table is None else self._table).shape[2:]
            require(
                rows <= blocks[0] and columns <= blocks[1],
                f"lengths {lengths} must not exceed those the blocks are for, {self.seq_lengths}: make a new mask",
            )

        def cropped(before: BlockMask) -> BlockMask:
            made = copy.copy(before)
            made._kinds = self.kinds[:, :, :rows, :columns]
            return made

        crop = lambda table: table[:, :, :rows, :columns]  # noqa: E731
        return self._with(self.mask_mod, (*self._shape[:2], *lengths), cropped, crop)


_NEW_ORDER = "make a new mask by BlockMask.from_kv_blocks with an order of its own"


@outside_of_compilers
def _mod_beside(block_mask: BlockMask, q: Array) -> Callable[..., Any]:
    """The mask of one whose function was changed, its blocks in the framework and on the device of q."""
    return mod_of_table(like(block_mask.kinds, q), block_mask.BLOCK_SIZE, block_mask.mask_mod)


def register_pytree() -> None:
    """Tells PyTorch what a BlockMask is made of, once it is there."""
    if BlockMask in _registered or "torch" not in sys.modules:
        return
    _registered.add(BlockMask)
    from torch.utils._pytree import register_pytree_node

    register_pytree_node(
        BlockMask,
        BlockMask._flatten,
        BlockMask._unflatten,
        flatten_with_keys_fn=BlockMask._flatten_with_keys,
        serialized_type_name="cuflash.BlockMask",
    )


_registered: set[type] = set()


def require_mask(name: str, mask_mod: Any) -> None:
    if not callable(mask_mod):
        raise ArgumentError(f"{name}={mask_mod!r} must be a function f(b, h, q_idx, kv_idx) -> bool")
    if takes_score(mask_mod):
        raise ArgumentError(
            f"{name} takes a score: a block mask is made of a function f(b, h, q_idx, kv_idx) -> bool; pass this one "
            "as score_mod"
        )


def _require_together(prefix: str, count: Any, indices: Any) -> None:
    if (count is None) != (indices is None):
        missing = f"{prefix}_indices" if indices is None else f"{prefix}_num_blocks"
        raise ArgumentError(f"{missing} is missing: how many blocks and which of them go together")


def _lengths(seq_lengths: Any) -> tuple[int, int]:
    require(
        isinstance(seq_lengths, (tuple, list)) and len(seq_lengths) == 2,
        f"seq_lengths={seq_lengths!r} must be (q_len, kv_len)",
    )
    return require_int("q_len", seq_lengths[0], 0), require_int("kv_len", seq_lengths[1], 0)
