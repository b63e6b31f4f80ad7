"""FlexAttention's names: `from cuflash import flex_attention, create_block_mask` in place of torch.nn.attention's.

What a mask_mod or score_mod means is what it means there; arrays may be of NumPy, CuPy, PyTorch or JAX. There is
nothing to compile first, and a `BlockMask` needs no building: kernels work out by themselves, from the function, which
tiles are empty, full or mixed. It is here to hold a mask and the lengths it is for, to be looked at, and for patterns
that are data and no function (`BlockMask.from_kv_blocks`).
"""

from __future__ import annotations

import importlib.util
import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from . import frameworks, mods
from .api import attention
from .errors import ArgumentError, require
from .trace.emit_numpy import evaluate
from .trace.expr import leaves
from .trace.intervals import classify
from .trace.tracer import bind

Array = Any  # of NumPy, CuPy, PyTorch or JAX

EMPTY, PARTIAL, FULL = 0, 1, 2  # what a block is: no key seen, some, all


class AuxRequest(NamedTuple):
    """What `flex_attention` returns beside the result.

    lse         the logarithm of the softmax's denominator
    max_scores  each row's largest score
    """

    lse: bool = False
    max_scores: bool = False


class AuxOutput(NamedTuple):
    """What was asked for with `AuxRequest`, float32 [batch, heads, q_len]; the rest is None."""

    lse: Array = None
    max_scores: Array = None


def flex_attention(
    query: Array,
    key: Array,
    value: Array,
    score_mod: Callable[..., Any] | None = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: dict[str, Any] | None = None,
    *,
    return_aux: AuxRequest | None = None,
) -> Any:
    """Attention with a function on its scores and a mask, as torch.nn.attention.flex_attention has it.

    query [batch, heads_q, q_len, d], key [batch, heads_kv, kv_len, d], value [batch, heads_kv, kv_len, d_v] -> out
    [batch, heads_q, q_len, d_v]; key and value may have batch 1, which serves all. The arrays are read in place,
    whatever their strides; memory of the result is [batch, q_len, heads_q, d_v], so that its transpose is free.

    score_mod       f(score, b, h, q_idx, kv_idx) -> score; the score that comes in is scaled
    block_mask      a `BlockMask` for these lengths, or PyTorch's
    scale           None: 1 / sqrt(d)
    enable_gqa      heads_kv may be less than heads_q, and divides it
    return_lse      return (out, lse), lse float32 [batch, heads_q, q_len], the natural logarithm
    return_aux      return (out, `AuxOutput`); not beside return_lse
    kernel_options  ignored with a warning: tiles follow from the problem and the device

    Raises `ArgumentError` for a mask of other lengths, and whatever `cuflash.attention` raises.

    >>> import numpy as np
    >>> x = np.random.default_rng(0).standard_normal((1, 2, 8, 16)).astype(np.float32)
    >>> block_mask = create_block_mask(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, None, None, 8, 8)
    >>> out, lse = flex_attention(x, x, x, block_mask=block_mask, return_lse=True)
    >>> out.shape, lse.shape, bool(np.allclose(out[:, :, 0], x[:, :, 0]))  # the first token sees itself alone
    ((1, 2, 8, 16), (1, 2, 8), True)
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        _require_4d(name, x)
    batch, heads_q, q_len, _ = query.shape
    heads_kv, kv_len = key.shape[1], key.shape[2]
    if heads_q != heads_kv and not enable_gqa:
        raise ArgumentError(
            f"query.shape[1]={heads_q} and key.shape[1]={heads_kv} must be the same number of heads: pass "
            "enable_gqa=True where a key head serves several query heads"
        )
    if return_lse and return_aux is not None:
        raise ArgumentError(f"return_lse beside return_aux={return_aux!r}: pass return_aux=AuxRequest(lse=True) alone")
    if kernel_options:
        warnings.warn(
            f"kernel_options: {', '.join(kernel_options)} ignored: tiles and stages follow from the problem and the "
            "device; leave them away",
            UserWarning,
            stacklevel=2,
        )
    mask_mod = None
    if block_mask is not None:
        block_mask = _own(block_mask)
        block_mask._check(batch, heads_q, q_len, kv_len)
        mask_mod = block_mask._as_mask_mod()
    if key.shape[0] == 1 != batch:
        key = _broadcast(key, (batch, *key.shape[1:]))
    if value.shape[0] == 1 != batch:
        value = _broadcast(value, (batch, *value.shape[1:]))
    wanted = AuxRequest(lse=True) if return_lse else AuxRequest() if return_aux is None else return_aux
    aux = ("lse",) * bool(wanted.lse) + ("max_logit",) * bool(wanted.max_scores)
    result = attention(
        query.swapaxes(1, 2), key.swapaxes(1, 2), value.swapaxes(1, 2),
        scale=scale, score_mod=score_mod, mask_mod=mask_mod, aux=aux,
    )  # fmt: skip
    if not aux:
        out = result.swapaxes(1, 2)
        return out if return_aux is None else (out, AuxOutput())
    out = result.out.swapaxes(1, 2)
    return (out, result.lse) if return_lse else (out, AuxOutput(result.lse, result.max_logit))


def _require_4d(name: str, x: Any) -> None:
    if not hasattr(x, "shape") or not hasattr(x, "swapaxes"):
        raise ArgumentError(f"{name} is a {type(x).__qualname__}: pass a NumPy, CuPy, PyTorch or JAX array")
    if len(x.shape) != 4:
        raise ArgumentError(
            f"{name}.shape={tuple(x.shape)} must be [batch, heads, len, d]; for packed arrays, cuflash.attention takes "
            "score_mod, mask_mod and block_mask beside cu_seqlens"
        )


def _broadcast(x: Array, shape: tuple[int, ...]) -> Array:
    return x.expand(shape) if hasattr(x, "expand") else mods._namespace(x).broadcast_to(x, shape)


# Block masks ----------------------------------------------------------------------------------------------------------


def create_block_mask(
    mask_mod: Callable[..., Any] | None,
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device: Any = None,
    BLOCK_SIZE: int | tuple[int, int] = 128,
    _compile: bool = False,
    *,
    cu_seqlens: Array | None = None,
) -> BlockMask:
    """A mask for `flex_attention` or `attention`, of any function f(b, h, q_idx, kv_idx) -> bool.

    Builds nothing: whoever uses the mask calls the function. Blocks are worked out when they are asked for.

    B, H         batch and query heads it is for; None: one mask for all
    device       where block arrays are, when asked for: None: NumPy; a PyTorch, CuPy or JAX device, or a PyTorch
                 device's name: arrays of that framework
    BLOCK_SIZE   rows and columns of a block, one int or (q, kv)
    _compile     ignored: there is nothing to compile
    cu_seqlens   integers [documents + 1] from 0: a query sees its own document alone, and mask_mod (which may be None)
                 gets indices counted from its beginning: `mods.document`

    >>> block_mask = create_block_mask(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, None, None, 1024, 1024)
    >>> block_mask.shape, block_mask.sparsity()
    ((1, 1, 1024, 1024), 43.75)
    """
    if mask_mod is None:
        require(cu_seqlens is not None, "mask_mod is None: pass a function f(b, h, q_idx, kv_idx), or cu_seqlens")
    elif _takes_score("mask_mod", mask_mod):
        raise ArgumentError(
            "mask_mod takes a score: a block mask is made of a function f(b, h, q_idx, kv_idx) -> bool; pass this one "
            "as score_mod"
        )
    if cu_seqlens is not None:
        require(Q_LEN == KV_LEN, f"Q_LEN={Q_LEN} and KV_LEN={KV_LEN} must be the same with cu_seqlens: packed tokens")
        mask_mod = mods.document(cu_seqlens=cu_seqlens, total=Q_LEN, mask_mod=mask_mod)
    assert mask_mod is not None
    return BlockMask(mask_mod, (B, H, Q_LEN, KV_LEN), BLOCK_SIZE, device=device)


def create_mask(
    mod_fn: Callable[..., Any],
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device: Any = None,
) -> Array:
    """Which keys each query sees, bool [B, H, Q_LEN, KV_LEN], by a mask_mod, or by a score_mod: where it gives no -inf.

    Made in NumPy; `device` as for `create_block_mask`. For looking at: attention never needs it.

    >>> create_mask(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, 1, 1, 2, 3)[0, 0].tolist()
    [[True, False, False], [True, True, False]]
    """
    shape = _shape((B, H, Q_LEN, KV_LEN))
    mod = _Mod(mod_fn, shape[2:])
    mask = np.empty(shape, bool)
    keys, together = np.arange(shape[3]), max(1, _STRIP // max(shape[3], 1))
    for b, h in mod.places(shape):
        for begin in range(0, shape[2], together):
            rows = np.arange(begin, min(begin + together, shape[2]))
            mask[b, h, rows] = mod.seen(b, h, rows[:, None], keys)
    mod.spread(mask)
    return _placed(mask, device)


class BlockMask:
    """A mask, the lengths it is for, and, when looked at, which of its blocks are empty, partly seen or full.

    Made by `create_block_mask` or `BlockMask.from_kv_blocks`, for `flex_attention(..., block_mask=)` and
    `attention(..., block_mask=)`, as often as one likes. One made of a function *is* that function, whatever the size
    of its blocks; one made of blocks shows what these say, and `mask_mod` decides in those that are partly seen.

    mask_mod      the function
    seq_lengths   (q_len, kv_len)
    BLOCK_SIZE    (q, kv)

    Blocks are kept once they were looked at: after changing an array that the function reads, make a new mask to look
    at. Batch and heads of one element serve all.

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
        mask_mod: Callable[..., Any],
        shape: Sequence[int | None],
        BLOCK_SIZE: int | tuple[int, int],
        *,
        device: Any = None,
        table: Array = None,
    ) -> None:
        self._shape = _shape(shape)
        self.seq_lengths = self._shape[2:]
        self.BLOCK_SIZE = mods._pair("BLOCK_SIZE", BLOCK_SIZE)
        self.mask_mod = mask_mod
        self._device = device
        self._table = table  # of one made of blocks: what each is, uint8 [B, H, q blocks, kv blocks]
        self._kinds: np.ndarray | None = None
        self._mod = mods._mod(mask_mod, "mask") if table is None else _mod_of_table(table, self.BLOCK_SIZE, mask_mod)

    @classmethod
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
    ) -> BlockMask:
        """A mask of blocks: of row i of blocks, kv_indices[..., i, :kv_num_blocks[..., i]] are seen where `mask_mod`
        says so (None: everywhere), and those in full_kv_indices everywhere.

        kv_num_blocks, full_kv_num_blocks   integers [B, H, q blocks]; leading axes may be missing
        kv_indices, full_kv_indices         integers [B, H, q blocks, n], n up to the number of kv blocks
        seq_lengths                         (q_len, kv_len); None: as many whole blocks as there are, n for the keys
        compute_q_blocks                    ignored: they are worked out when asked for

        The arrays must be of the framework and on the device of the queries. They are copied: a change shows in a new
        mask.

        >>> count, blocks = np.array([1, 2]), np.array([[0, 0], [0, 1]])
        >>> print(BlockMask.from_kv_blocks(count, blocks, BLOCK_SIZE=64).to_string())
        (0, 0)
        ██
        ████
        """
        block = mods._pair("BLOCK_SIZE", BLOCK_SIZE)
        if (full_kv_num_blocks is None) != (full_kv_indices is None):
            missing = "full_kv_indices" if full_kv_indices is None else "full_kv_num_blocks"
            raise ArgumentError(f"{missing} is missing: how many full blocks and which of them go together")
        shape: Any = tuple(getattr(kv_indices, "shape", ()))
        require(len(shape) >= 2, f"kv_indices.shape={shape} must be [B, H, q blocks, n]")
        if seq_lengths is None:
            seq_lengths = shape[-2] * block[0], shape[-1] * block[1]
        blocks_kv = -(-seq_lengths[1] // block[1])
        require(
            -(-seq_lengths[0] // block[0]) == shape[-2],
            f"kv_indices.shape[-2]={shape[-2]} must be the rows of blocks of BLOCK_SIZE[0]={block[0]} in "
            f"seq_lengths[0]={seq_lengths[0]}: pass the lengths that the blocks are for",
        )
        whole = mask_mod is None
        table = _table_of(None, FULL if whole else PARTIAL, "", kv_num_blocks, kv_indices, blocks_kv)
        if full_kv_indices is not None:
            table = _table_of(table, FULL, "full_", full_kv_num_blocks, full_kv_indices, blocks_kv)
        table = table[(None,) * (4 - len(table.shape))]
        mask_mod = mods.noop_mask if mask_mod is None else mask_mod
        return cls(mask_mod, (*table.shape[:2], *seq_lengths), block, table=table)

    def _as_mask_mod(self) -> Callable[..., Any]:
        """What attention calls."""
        return self._mod

    def _check(self, batch: int, heads: int, q_len: int, kv_len: int) -> None:
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

    # Blocks -----------------------------------------------------------------------------------------------------------

    @property
    def kinds(self) -> np.ndarray:
        """What each block is, uint8 [B, H, q blocks, kv blocks]: 0 empty, 1 partly seen, 2 full. In NumPy.

        A block that the end of the sequence cuts off is never full, as in PyTorch.
        """
        if self._kinds is None:
            self._kinds = _kinds_of_mod(self) if self._table is None else _on_host(self._table)
        return self._kinds

    @property
    def kv_num_blocks(self) -> Array:
        """int32 [B, H, q blocks]: how many blocks of a row are partly seen."""
        return self._given(_ordered(self.kinds == PARTIAL)[0])

    @property
    def kv_indices(self) -> Array:
        """int32 [B, H, q blocks, kv blocks]: those that are partly seen, and behind them the others."""
        return self._given(_ordered(self.kinds == PARTIAL)[1])

    @property
    def full_kv_num_blocks(self) -> Array:
        return self._given(_ordered(self.kinds == FULL)[0])

    @property
    def full_kv_indices(self) -> Array:
        return self._given(_ordered(self.kinds == FULL)[1])

    @property
    def q_num_blocks(self) -> Array:
        """int32 [B, H, kv blocks]: how many blocks of a column are partly seen."""
        return self._given(_ordered((self.kinds == PARTIAL).swapaxes(2, 3))[0])

    @property
    def q_indices(self) -> Array:
        return self._given(_ordered((self.kinds == PARTIAL).swapaxes(2, 3))[1])

    @property
    def full_q_num_blocks(self) -> Array:
        return self._given(_ordered((self.kinds == FULL).swapaxes(2, 3))[0])

    @property
    def full_q_indices(self) -> Array:
        return self._given(_ordered((self.kinds == FULL).swapaxes(2, 3))[1])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, q_len, kv_len)"""
        return self._shape

    def numel(self) -> int:
        """Pairs of a query and a key."""
        b, h, q, k = self._shape
        return b * h * q * k

    def sparsity(self) -> float:
        """The percentage of blocks that are empty."""
        return 100.0 * float(np.mean(self.kinds == EMPTY)) if self.kinds.size else 0.0

    def to_dense(self) -> Array:
        """int32 [B, H, q blocks, kv blocks]: 1 where a block is not empty. `create_mask` shows each key."""
        return self._given((self.kinds != EMPTY).astype(np.int32))

    def to_string(self, grid_size: int | tuple[int, int] = (20, 20), limit: int = 4) -> str:
        """A picture in characters: █ all blocks seen at least in part, ░ some, a space none.

        grid_size   at most so many (rows, columns); -1: a character pair for each block
        limit       how many masks of batch and heads to show
        """
        seen = self.kinds != EMPTY
        rows, columns = seen.shape[2:]
        if isinstance(grid_size, int):
            grid_size = (grid_size, grid_size)
        steps = [max(1, -(-n // most)) if most > 0 else 1 for n, most in zip((rows, columns), grid_size, strict=True)]
        sections = []
        for i, (b, h) in enumerate(itertools.product(*map(range, self._shape[:2]))):
            if i == limit:
                sections.append(
                    f"... {self._shape[0] * self._shape[1] - limit} more: to_string(limit=) shows more of them, "
                    "block_mask[b, h] one\n"
                )
                break
            lines = [f"({b}, {h})"]
            for row in range(0, rows, steps[0]):
                part = [seen[b, h, row : row + steps[0], c : c + steps[1]] for c in range(0, columns, steps[1])]
                lines.append("".join(("█" if x.all() else "░" if x.any() else " ") * 2 for x in part))
            sections.append("\n".join(lines) + "\n")
        return "\n".join(sections)

    def __str__(self) -> str:
        return f"BlockMask(shape={self.shape}, sparsity={self.sparsity():.2f}%,\n{self.to_string().strip()}\n)"

    def __repr__(self) -> str:
        name = getattr(self.mask_mod, "__name__", repr(self.mask_mod))
        made = "" if self._table is None else ", from blocks"
        return f"BlockMask(shape={self.shape}, BLOCK_SIZE={self.BLOCK_SIZE}, mask_mod={name}{made})"

    def plot(self, b: int = 0, h: int = 0, ax: Any = None) -> Any:
        """Draws which keys are seen, and blocks by what they are, with matplotlib -> its Axes.

        Keys are drawn one by one up to a length of 2048; behind that blocks alone.
        """
        try:
            import matplotlib.pyplot as plt
            from matplotlib.colors import ListedColormap
            from matplotlib.patches import Patch
        except ImportError as error:
            raise ArgumentError("plot draws with matplotlib: pip install matplotlib, or print(block_mask)") from error
        q_len, kv_len = self.seq_lengths
        ax = plt.subplots(figsize=(5, 5), layout="constrained")[1] if ax is None else ax
        colors = ["#f4f4f4", "#f2b880", "#7fb3d5"]
        rows, columns = self.kinds.shape[2:]
        edges = 0, columns * self.BLOCK_SIZE[1], rows * self.BLOCK_SIZE[0], 0
        ax.imshow(self.kinds[b, h], cmap=ListedColormap(colors), vmin=0, vmax=2, extent=edges, interpolation="none")
        if max(q_len, kv_len) <= 2048:
            seen = np.zeros((q_len, kv_len, 4))
            seen[..., 3] = 0.45 * create_mask(_at(self._mod, b, h), 1, 1, q_len, kv_len)[0, 0]
            ax.imshow(seen, extent=(0, kv_len, q_len, 0), interpolation="none")
        ax.set(xlim=(0, kv_len), ylim=(q_len, 0), xlabel="kv_idx", ylabel="q_idx", title=f"b={b}, h={h}")
        names = ("empty", "partly seen", "full")
        ax.legend(
            handles=[
                Patch(facecolor=color, edgecolor="gray", label=f"{name}: {np.sum(self.kinds[b, h] == kind)}")
                for kind, (color, name) in enumerate(zip(colors, names, strict=True))
            ],
            loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3, fontsize="small", frameon=False, columnspacing=0.8,
            handlelength=1, handletextpad=0.4,
        )  # fmt: skip
        return ax

    # Others made from it ----------------------------------------------------------------------------------------------

    def to(self, device: Any) -> BlockMask:
        """The same, with block arrays on another device. What mask_mod captures stays where it is."""
        table = self._table
        if table is not None:
            table = table.to(device) if hasattr(table, "to") else _placed(_on_host(table), device)
        return BlockMask(self.mask_mod, self._shape, self.BLOCK_SIZE, device=device, table=table)

    def __getitem__(self, index: Any) -> BlockMask:
        """The mask of some of the batch, of the heads and of the rows of blocks: ints, slices or integer arrays.

        An int keeps its axis, with one element, as in PyTorch. The part can be used like the whole, for queries that
        are those of its rows: its q_len is theirs.

        >>> block_mask = create_block_mask(mods.causal(), 4, 2, 512, 512)
        >>> block_mask[0].shape, block_mask[1:3, 1].shape, block_mask[:, :, 3].shape
        ((1, 2, 512, 512), (2, 1, 512, 512), (4, 2, 128, 512))
        """
        index = index if isinstance(index, tuple) else (index,)
        require(len(index) <= 3, f"block_mask[{index}] must name batch, heads and rows of blocks at most")
        index = (*index, slice(None), slice(None), slice(None))[:3]
        sizes = *self._shape[:2], -(-self.seq_lengths[0] // self.BLOCK_SIZE[0])
        chosen = [_Chosen(i, n, axis) for axis, (i, n) in enumerate(zip(index, sizes, strict=True))]
        size, (q_len, kv_len) = self.BLOCK_SIZE[0], self.seq_lengths
        numbers = chosen[2].numbers
        rows = len(numbers) * size
        if len(numbers) and int(np.max(numbers)) == sizes[2] - 1:
            require(
                numbers[-1] == sizes[2] - 1 or q_len % size == 0,
                f"block_mask[:, :, {index[2]}]: the last row of blocks, cut off by the sequence's end, must come last",
            )
            rows -= -q_len % size
        mask_mod = self.mask_mod
        if not all(c.all for c in chosen):
            mask_mod = _mod_of_part(mask_mod, chosen, size, self.seq_lengths)
        table = self._table
        if table is not None:
            for axis, c in enumerate(chosen):
                table = table if c.all else table[(slice(None),) * axis + (c.index,)]
        shape = len(chosen[0].numbers), len(chosen[1].numbers), rows, kv_len
        return BlockMask(mask_mod, shape, self.BLOCK_SIZE, device=self._device, table=table)

    def _adjust(self, new_q_len: int, new_kv_len: int) -> BlockMask:
        """The mask for other lengths: of a function the function, of blocks the upper left ones."""
        shape, table = (*self._shape[:2], new_q_len, new_kv_len), self._table
        if table is not None:
            rows, columns = (-(-n // size) for n, size in zip(shape[2:], self.BLOCK_SIZE, strict=True))
            require(
                rows <= table.shape[2] and columns <= table.shape[3],
                f"lengths ({new_q_len}, {new_kv_len}) must not exceed those the blocks are for, {self.seq_lengths}: "
                "make a new mask",
            )
            table = table[:, :, :rows, :columns]
        return BlockMask(self.mask_mod, shape, self.BLOCK_SIZE, device=self._device, table=table)

    def _given(self, values: np.ndarray) -> Array:
        return _placed(values, self._device) if self._table is None else _like(values, self._table)


def _own(block_mask: Any) -> BlockMask:
    """A BlockMask as it is, one of PyTorch's by its blocks."""
    if isinstance(block_mask, BlockMask):
        return block_mask
    names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "BLOCK_SIZE", "mask_mod")
    if not all(hasattr(block_mask, name) for name in (*names, "seq_lengths")):
        raise ArgumentError(
            f"block_mask is a {type(block_mask).__qualname__}: pass what create_block_mask or BlockMask.from_kv_blocks "
            "gives; a function f(b, h, q_idx, kv_idx) goes to create_block_mask first"
        )
    fields: dict[str, Any] = {name: getattr(block_mask, name) for name in names}
    return BlockMask.from_kv_blocks(**fields, seq_lengths=tuple(block_mask.seq_lengths))


def _shape(shape: Sequence[int | None]) -> tuple[int, int, int, int]:
    for name, n in zip(("B", "H", "Q_LEN", "KV_LEN"), shape, strict=True):
        if not (n is None and name in "BH"):
            mods._require_int(name, n, 0)
    b, h, q, k = (1 if n is None else int(n) for n in shape)
    return b, h, q, k


# Blocks as arrays -----------------------------------------------------------------------------------------------------


def _ordered(seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many blocks of each row are true, and the columns, those of true blocks first."""
    return seen.sum(-1, dtype=np.int32), np.argsort(~seen, -1, kind="stable").astype(np.int32)


def _table_of(table: Array, kind: int, prefix: str, count: Array, indices: Array, columns: int) -> Array:
    """`table` [..., rows, columns] uint8 (None: of zeros) with `kind` where a list of blocks says so."""
    for name, x in ((f"{prefix}kv_num_blocks", count), (f"{prefix}kv_indices", indices)):
        require(
            hasattr(x, "dtype") and "int" in str(x.dtype),
            f"{name} is a {type(x).__qualname__}: pass integers in an array",
        )
    require(
        tuple(count.shape) == tuple(indices.shape[:-1]),
        f"{prefix}kv_num_blocks.shape={tuple(count.shape)} must be that of {prefix}kv_indices but for its last axis, "
        f"{tuple(indices.shape)}",
    )
    xp, shape = mods._namespace(indices), (*indices.shape[:-1], columns + 1)
    if xp is np:
        listed = np.arange(indices.shape[-1]) < count[..., None]
        bad = indices[listed & ((indices < 0) | (indices >= columns))]
        require(
            not bad.size, f"{prefix}kv_indices has {bad[:1]}: blocks go from 0 to {columns - 1}, of the keys' length"
        )
    entries = mods._arange(xp, indices.shape[-1], indices)
    # One column more takes what is not listed.
    place = xp.where(entries < count[..., None], indices, 0 * indices + columns)
    if xp.__name__ == "torch":
        new = xp.zeros(shape, dtype=xp.uint8, device=indices.device).scatter(-1, place.long(), kind)
    elif xp.__name__ == "jax.numpy":
        new = xp.put_along_axis(xp.zeros(shape, xp.uint8), place, xp.uint8(kind), -1, inplace=False)
    else:
        new = xp.zeros_like(place, dtype=xp.uint8, shape=shape)
        flat = place.reshape(-1, place.shape[-1])
        new.reshape(-1, columns + 1)[mods._arange(xp, len(flat), place)[:, None], flat] = kind
    new = new[..., :columns]
    return new if table is None else xp.maximum(table, new)


def _mod_of_table(table: Array, block: tuple[int, int], mask_mod: Any) -> Callable[..., Any]:
    one_b, one_h = table.shape[0] == 1, table.shape[1] == 1
    q_size, kv_size = block
    inner, all_full = mods._with_lengths("mask_mod", mask_mod), mask_mod is mods.noop_mask

    def block_table_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any, q_len: Any = None, kv_len: Any = None) -> Any:
        kind = table[0 if one_b else b, 0 if one_h else h, q_idx // q_size, kv_idx // kv_size]
        if all_full:
            return kind != 0
        return (kind == 2) | ((kind == 1) & inner(b, h, q_idx, kv_idx, q_len, kv_len))  # FULL, PARTIAL

    return mods._named_as_needed(block_table_mask, (mask_mod,))


class _Chosen:
    """Which elements of an axis an index chooses."""

    def __init__(self, index: Any, n: int, axis: int) -> None:
        if isinstance(index, (int, np.integer)):
            if not -n <= index < n:
                raise IndexError(f"index {index} is outside of axis {axis} of a block mask, which has {n} elements")
            index = slice(int(index) % n, int(index) % n + 1)
        self.index = index
        self.numbers = np.arange(n)[index if isinstance(index, slice) else _on_host(index)]
        self.all = len(self.numbers) == n and bool((self.numbers == np.arange(n)).all())
        steps = np.diff(self.numbers)
        self.regular = bool((steps == steps[:1]).all())
        self.start = int(self.numbers[0]) if len(self.numbers) else 0
        self.step = int(steps[0]) if len(steps) else 0
        self.values = None if self.regular else _int32(index)

    def map(self) -> Callable[[Any], Any]:
        """From an index in the part to one in the whole."""
        if self.all:
            return lambda i: i
        start, step, values = self.start, self.step, self.values
        return (lambda i: values[i]) if values is not None else lambda i: start + step * i


def _mod_of_part(mask_mod: Any, chosen: Sequence[_Chosen], size: int, lengths: tuple[int, int]) -> Callable[..., Any]:
    inner = mods._with_lengths("mask_mod", mask_mod)
    of_b, of_h, of_row = (c.map() for c in chosen)
    q_len, kv_len = lengths
    rows_all, begin, together = chosen[2].all, chosen[2].start * size, chosen[2].regular and chosen[2].step in (0, 1)

    def part_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        if not rows_all:
            q_idx = q_idx + begin if together else of_row(q_idx // size) * size + q_idx % size
        return inner(of_b(b), of_h(h), q_idx, kv_idx, q_len, kv_len)

    return mods._mod(part_mask)


def _at(mask_mod: Any, at_b: int, at_h: int) -> Callable[..., Any]:
    inner = mods._with_lengths("mask_mod", mask_mod)

    def one(b: Any, h: Any, q_idx: Any, kv_idx: Any, q_len: Any, kv_len: Any) -> Any:
        return inner(b + at_b, h + at_h, q_idx, kv_idx, q_len, kv_len)

    return one


# Looking at a mod -----------------------------------------------------------------------------------------------------

_STRIP = 1 << 20  # pairs of a query and a key looked at together


def _takes_score(name: str, mod: Any) -> bool:
    """Whether a function is a score_mod, by its first five parameters; else it is a mask_mod."""
    if not callable(mod):
        raise ArgumentError(f"{name}={mod!r} must be a function f(b, h, q_idx, kv_idx) -> bool")
    return len([p for p in mods._parameters(mod) if p not in ("q_len", "kv_len")]) == 5


class _Mod:
    """A mod, traced, to be computed on the host with what it captures now."""

    def __init__(self, f: Any, lengths: tuple[int, int]) -> None:
        self.lengths = lengths
        self.is_score = _takes_score("mod_fn", f)
        bound = bind(f) if self.is_score else bind(None, f)
        found = bound.mods.score if self.is_score else bound.mods.mask
        assert found is not None
        self.expr, self.depends = found, leaves(found)
        self.arrays, self.scalars = [_on_host(x) for x in bound.arrays], bound.scalars

    def places(self, shape: Sequence[int]) -> list[tuple[int, int]]:
        """The (b, h) that differ."""
        batch, heads = (n if name in self.depends else min(n, 1) for name, n in zip("bh", shape[:2], strict=True))
        return [(b, h) for b in range(batch) for h in range(heads)]

    def spread(self, x: np.ndarray) -> np.ndarray:
        """What was computed for `places` copied to all of [B, H, ...], in place."""
        for axis, name in enumerate("bh"):
            if name not in self.depends and x.shape[axis]:
                x[(slice(None),) * axis + (slice(1, None),)] = x[(slice(None),) * axis + (slice(1),)]
        return x

    def seen(self, b: Any, h: Any, q_idx: np.ndarray, kv_idx: np.ndarray) -> np.ndarray:
        """bool, of the shape to which everything broadcasts."""
        q_len, kv_len = self.lengths
        given = {"b": b, "h": h, "q_idx": q_idx, "kv_idx": kv_idx, "q_len": q_len, "kv_len": kv_len, "score": 0.0}
        try:
            (result,) = evaluate([self.expr], given, self.arrays, self.scalars)
        except IndexError as error:
            raise ArgumentError(
                f"the mod reads a captured array where it has no element, with q_len={q_len}, kv_len={kv_len}: {error}"
            ) from error
        seen = result != -np.inf if self.is_score else result
        return np.broadcast_to(seen, np.broadcast_shapes(np.shape(b), np.shape(h), q_idx.shape, kv_idx.shape))


def _kinds_of_mod(block_mask: BlockMask) -> np.ndarray:
    """By intervals, whole blocks at once; those that stay undecided key by key."""
    shape, (size_q, size_kv) = block_mask.shape, block_mask.BLOCK_SIZE
    q_len, kv_len = lengths = block_mask.seq_lengths
    mod = _Mod(block_mask._as_mask_mod(), lengths)
    q, k = np.arange(0, q_len, size_q), np.arange(0, kv_len, size_kv)
    kinds = np.zeros((*shape[:2], len(q), len(k)), np.uint8)
    if not kinds.size:
        return kinds
    last_q, last_k = np.minimum(q + size_q, q_len) - 1, np.minimum(k + size_kv, kv_len) - 1
    rows, keys = np.arange(size_q)[:, None], np.arange(size_kv)
    together = max(1, _STRIP // (size_q * size_kv))
    for b, h in mod.places(shape):
        values = {"b": b, "h": h, "q_len": q_len, "kv_len": kv_len}
        values = {name: value for name, value in values.items() if name in mod.depends}
        found = classify(mod.expr, (q[:, None], last_q[:, None]), (k, last_k), values, mod.arrays, mod.scalars)
        kinds[b, h] = found
        undecided = np.argwhere(kinds[b, h] == PARTIAL)
        for begin in range(0, len(undecided), together):
            i, j = undecided[begin : begin + together].T[:, :, None, None]
            q_idx, kv_idx = q[i] + rows, k[j] + keys
            inside = (q_idx < q_len) & (kv_idx < kv_len)
            seen = mod.seen(b, h, np.minimum(q_idx, q_len - 1), np.minimum(kv_idx, kv_len - 1)) & inside
            count = seen.sum((1, 2))
            kinds[b, h, i[:, 0, 0], j[:, 0, 0]] = (count > 0).astype(np.uint8) + (count == size_q * size_kv)
    cut = (last_q - q + 1 < size_q)[:, None] | (last_k - k + 1 < size_kv)
    kinds[:, :, cut] = np.minimum(kinds[:, :, cut], PARTIAL)
    return mod.spread(kinds)


# Between NumPy and the other frameworks -------------------------------------------------------------------------------


def _on_host(x: Any) -> np.ndarray:
    """A copy in NumPy. Waits for a device."""
    if isinstance(x, (np.ndarray, list, tuple)):
        return np.asarray(x)
    framework = frameworks.of(x, "index")
    if framework is frameworks.torch:
        return frameworks.torch.to_host(x)
    return x.get() if framework is frameworks.cupy else np.asarray(x)


def _int32(x: Any) -> Array:
    if isinstance(x, (list, tuple, np.ndarray)):
        return np.asarray(x, np.int32)
    xp = mods._namespace(x)
    return x.to(xp.int32) if xp.__name__ == "torch" else x.astype(xp.int32)


def _like(values: np.ndarray, x: Any) -> Array:
    """NumPy values in the framework and on the device of x."""
    xp = mods._namespace(x)
    if xp is np:
        return values
    if xp.__name__ == "jax.numpy":
        return xp.asarray(values, device=next(iter(x.devices())))
    return _placed(values, x.device)


def _placed(values: np.ndarray, device: Any) -> Array:
    """NumPy values on a device: of PyTorch by its name or object, of CuPy or JAX by its object; None: as they are."""
    root = type(device).__module__.partition(".")[0]
    if device is None:
        return values
    if root == "cupy":
        import cupy

        with device:
            return cupy.asarray(values)
    if root in ("jax", "jaxlib"):
        import jax

        return jax.device_put(values, device)
    if root == "builtins" and importlib.util.find_spec("torch") is None:
        return values  # a name such as "cpu", without the framework whose name it is
    import torch

    return torch.from_numpy(np.ascontiguousarray(values)).to(device)
