"""Attention forward: which kernel and tile, which grid, and the launch. The host half of kernels_cu/forward_sm80.cu
and forward_sm90.cu.

A `ForwardProblem` is everything the host knows of a call but its pointers; `plan` turns it into a `ForwardPlan` once,
and a plan launches any number of times. What is compiled depends on its variant alone: two problems with the same
variant share one kernel, whatever their lengths, batch, heads and numbers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .. import dtypes, philox
from ..arch import GRID_LIMITS, Arch
from ..array import TensorView
from ..dtypes import DType
from ..errors import ArgumentError, UnsupportedError
from ..jit import layout, module, sass, sm_model, tensor_map
from ..trace import emit_c
from ..trace.expr import Mods
from ..trace.strata import LIMIT as MAX_ROWS_OF_MODS
from . import order

HEAD_DIM_CLASSES = (32, 64, 96, 128, 192, 256)
MAX_ROWS = 2**30 - 2**16  # kernels add a window (2^30: none) to a row's index in 32 bits
MAX_HEADS = GRID_LIMITS[1]
UNLIMITED = 2**30
LOG2_E = 1.4426950408889634

Strides = tuple[int, int, int]  # (batch, row, head) in elements; batch 0 when packed


@dataclass(frozen=True, slots=True)
class Options:
    """`kernel_options`: what is chosen for a caller who does not. None of them changes what a result means.

    kernel      "sm_80": the kernel that runs on every GPU, where the chip has one of its own
    persistent  whether a dense batch is computed by a block for each multiprocessor, which goes over its share of the
                query tiles and loads for the next while it computes one, or by a block for each; Hopper's kernel alone
    pack_heads  whether the rows of a tile are queries of all heads that share a key head, or of one head; likewise
    cluster     2: two blocks with neighbouring query tiles run together, and each brings half of every key tile to
                both; likewise. Never chosen: what it saves, and costs, is to be measured
    order       "long": tiles with more keys are computed first, or "position": as the grid counts them
    """

    kernel: str | None = None
    persistent: bool | None = None
    pack_heads: bool | None = None
    cluster: int | None = None
    order: str | None = None


@dataclass(frozen=True, slots=True)
class ForwardProblem:
    """A forward call without its pointers.

    q_rows, k_rows   dense: length of every sequence; packed: rows in all
    max_seqlen_q     packed: the longest query length if the host knows it; a wrong one costs time and never a row
    page_size        0: keys as q is; else k and v are [pages, page_size, heads_kv, d], whatever q is: their strides
                     are (page, row, head), k_rows is max_pages * page_size, and seqused_k tells their lengths
    num_pages        of k and v
    max_pages        entries of a sequence in page_table, int32 [batch, max_pages]
    page_table_stride  elements from one sequence's entries to the next's
    load_bytes       16, 4 or 2: what divides bases, strides and rows of q, k, v and out, all of them
    window           (left, right) keys visible on either side of the diagonal, -1: all; causal is right <= 0
    alibi            None, "head" (slopes [heads_q]) or "batch" ([batch, heads_q]), contiguous
    sink             None, "float32" or "element" (the dtype of q), contiguous
    dropout_p        share of the weights to drop; its seed and offset are given at the launch
    seed             dtype of an array of one element that holds the seed; None: a number
    mods             what score_mod and mask_mod compute; softcap and ALiBi are in there beside a score_mod
    options          what the caller chose of how it is computed
    """

    dtype: DType
    batch: int
    packed: bool
    q_rows: int
    k_rows: int
    max_seqlen_q: int | None
    heads_q: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    q_strides: Strides
    k_strides: Strides
    v_strides: Strides
    out_strides: Strides
    load_bytes: int
    scale: float
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    seqused_q: bool = False
    seqused_k: bool = False
    alibi: str | None = None
    sink: str | None = None
    lse: bool = True
    max_logit: bool = False
    dropout_p: float = 0.0
    seed: DType | None = None
    mods: Mods | None = None
    page_size: int = 0
    num_pages: int = 0
    max_pages: int = 0
    page_table_stride: int = 0
    options: Options = Options()


@dataclass(frozen=True, slots=True)
class Tile:
    """Query rows and keys of a tile, and the warps that compute it."""

    block_q: int
    block_k: int
    warps: int


def both(tile: Tile) -> tuple[Tile, Tile]:
    return tile, tile


# (bytes an element, head-dim class) -> tile, and another where a block has less than 163 KB of shared memory.
# Each compiles without a spill for every architecture it is meant for; the class is that of the
# wider of d and d_v. block_k depends on this table alone, so that sums are taken in one order whatever the lengths.
TILES: dict[tuple[int, int], tuple[Tile, Tile]] = {
    (2, 32): both(Tile(128, 64, 4)),  # 16 KB
    # 32 KB. Four warps have two row tiles each, so that a K or V fragment read serves both; on compute capability 12.0
    # that spills, and chips of its kind have shared-memory bandwidth to spare for their matrix units.
    (2, 64): (Tile(128, 64, 4), Tile(128, 64, 8)),
    (2, 96): both(Tile(128, 64, 8)),  # 48 KB
    (2, 128): (Tile(128, 128, 8), Tile(128, 64, 8)),  # 96 KB, 64 KB
    (2, 192): both(Tile(128, 64, 8)),  # 96 KB
    (2, 256): both(Tile(128, 32, 8)),  # 96 KB; 128 x 64 spills on compute capability 10.0
    (4, 32): both(Tile(64, 64, 4)),  # 24 KB
    (4, 64): both(Tile(64, 64, 4)),  # 48 KB
    (4, 96): both(Tile(64, 32, 4)),  # 48 KB
    (4, 128): both(Tile(64, 32, 4)),  # 64 KB
    (4, 192): both(Tile(64, 16, 4)),  # 72 KB; 64 x 32 takes twice as long to compile
    (4, 256): both(Tile(64, 16, 4)),  # 96 KB
}
# The same where dropout is on and these would spill.
DROPOUT_TILES: dict[tuple[int, int], tuple[Tile, Tile]] = {
    (2, 192): both(Tile(128, 32, 8)),  # 72 KB; 128 x 64 spills on compute capability 10.0
}
# The same where loads are narrower than 16 bytes.
NARROW_TILES: dict[tuple[int, int], tuple[Tile, Tile]] = {
    (4, 256): both(Tile(32, 16, 2)),  # 64 KB; 64 x 16 spills on compute capability 12.0
}
# The same for a score_mod, whose terms take registers.
MOD_TILES: dict[tuple[int, int], tuple[Tile, Tile]] = {
    (2, 64): both(Tile(128, 64, 8)),  # 32 KB
    (2, 128): (Tile(128, 64, 8), Tile(128, 32, 8)),  # 64 KB, 48 KB: the larger spills on compute capability 12.0
    (2, 192): both(Tile(128, 32, 8)),  # 72 KB
    (2, 256): both(Tile(128, 16, 8)),  # 80 KB
}
SMALL_SMEM = 163 * 1024


@dataclass(frozen=True, slots=True)
class ForwardVariant:
    """All that a forward kernel's machine code depends on, beside the architecture."""

    element: DType
    head_dim: int
    head_dim_v: int
    tile: Tile
    load_bytes: int
    dropout: bool = False
    mods: str = emit_c.NO_MODS
    paged: bool = False

    @property
    def smem_bytes(self) -> int:
        """Q (where the output is gathered at the end), one tile of K, one of V, what mods need of each key, and the
        bounds of each query under a mask."""
        q = self.tile.block_q * max(self.head_dim, self.head_dim_v)
        tiles = (q + self.tile.block_k * (self.head_dim + self.head_dim_v)) * self.element.itemsize
        terms = 4 * self.tile.block_k * emit_c.staged(self.mods)[1]
        bounds = 8 * self.tile.block_q if emit_c.has_mask(self.mods) else 0
        return tiles + terms + bounds

    def members(self) -> dict[str, str | int | bool]:
        return {
            "Element": self.element.element,
            "kHeadDim": self.head_dim,
            "kHeadDimV": self.head_dim_v,
            "kBlockQ": self.tile.block_q,
            "kBlockK": self.tile.block_k,
            "kThreads": 32 * self.tile.warps,
            "kLoadBytes": self.load_bytes,
            "kSharedBytes": self.smem_bytes,
            "kDropout": self.dropout,
            "kPaged": self.paged,
        }


def head_dim_class(d: int) -> int:
    """The smallest class that holds d; the rest of a row is zeros in shared memory.

    >>> head_dim_class(80)
    96
    """
    for size in HEAD_DIM_CLASSES:
        if d <= size:
            return size
    raise UnsupportedError(f"head_dim={d} must be at most {HEAD_DIM_CLASSES[-1]}: split the heads, or use host arrays")


def choose_variant(
    dtype: DType,
    head_dim: int,
    head_dim_v: int,
    load_bytes: int,
    arch: Arch,
    *,
    dropout: bool = False,
    mods: Mods | None = None,
    paged: bool = False,
) -> ForwardVariant:
    """The variant for a dtype, head dims, alignment, dropout or none, mods, and keys in pages or not. Nothing else
    enters: not lengths, batch, heads or numbers, page sizes, the rate of dropout and what mods capture among them."""
    d, d_v = head_dim_class(head_dim), head_dim_class(head_dim_v)
    row = dtype.itemsize, max(d, d_v)
    large, small = DROPOUT_TILES.get(row, TILES[row]) if dropout else TILES[row]
    if load_bytes < 16:
        large, small = NARROW_TILES.get(row, (large, small))
    if mods is not None and mods.score is not None:
        large, small = MOD_TILES.get(row, (large, small))
    tile = large if arch.smem_bytes >= SMALL_SMEM else small
    text = emit_c.NO_MODS if mods is None else emit_c.mods_text(mods)
    return ForwardVariant(dtype, d, d_v, tile, max(load_bytes, min(dtype.itemsize, 4)), dropout, text, paged)


# Head-dim class of the wider of d and d_v -> tile of forward_sm90.cu: 64 rows for each warpgroup of consumers, one more
# produces. Those of kernels.md's table that keep a block's tiles in shared memory twice and spill nothing.
SM90_TILES: dict[int, Tile] = {
    32: Tile(192, 128, 16),  # 48 KB
    64: Tile(192, 128, 16),  # 88 KB; three consumers: exponentials bound it, and more warps issue more of them
    96: Tile(128, 160, 12),  # 144 KB
    128: Tile(128, 128, 12),  # 160 KB
    192: Tile(128, 96, 12),  # 192 KB
    256: Tile(128, 80, 12),  # 224 KB
}
# The same with a score_mod, a mask of more than bounds, or dropout, which take registers and shared memory.
SM90_NARROWER_TILES: dict[int, Tile] = {
    32: Tile(192, 96, 16),
    64: Tile(192, 96, 16),
    256: Tile(128, 64, 12),
}
SM90_SMEM = 227 * 1024
SM90_DROPOUT_TILES: dict[int, Tile] = {192: Tile(128, 64, 12)}


@dataclass(frozen=True, slots=True)
class ForwardSm90Variant:
    """All that the machine code of forward_sm90.cu depends on."""

    element: DType
    head_dim: int
    head_dim_v: int
    tile: Tile
    dropout: bool = False
    mods: str = emit_c.NO_MODS
    paged: bool = False
    cluster: int = 1

    @property
    def smem_bytes(self) -> int:
        return self._smem_bytes(self.q_stages)

    @property
    def q_stages(self) -> int:
        """2 where they fit: Q of a block's next tile lands while this one is computed."""
        return 2 if self._smem_bytes(2) <= SM90_SMEM else 1

    def _smem_bytes(self, q_stages: int) -> int:
        """Of a Q stage: Q, and the bounds of each query under a mask. Two tiles of K and of V, twice what mods need of
        each key, a word a thread, and what the roles tell each other."""
        q = self.tile.block_q * max(self.head_dim, self.head_dim_v) * self.element.itemsize
        bounds = 8 * self.tile.block_q if emit_c.has_mask(self.mods) else 0
        keys = 2 * self.tile.block_k * (self.head_dim + self.head_dim_v) * self.element.itemsize
        terms = 8 * self.tile.block_k * emit_c.staged(self.mods)[1]
        return q_stages * (q + bounds + 32) + keys + terms + 4 * 32 * self.tile.warps + 72

    @property
    def turns(self) -> bool:
        """Whether consumers take turns at issuing products. Two do: left to themselves they may run in step, and
        neither computes softmax while the other multiplies. Three are bound by exponentials: turns make them wait."""
        return self.tile.warps == 12

    @property
    def registers(self) -> tuple[int, int]:
        """Of a producer's thread and of a consumer's: together what the block has. A mask of more than bounds has the
        producer look through tiles, for which it needs some more."""
        walks = emit_c.keeps_more_than_bounds(self.mods)
        if self.tile.warps == 16:
            return (56, 152) if walks else (32, 160)
        if walks and self.paged and max(self.head_dim, self.head_dim_v) <= 128:
            return 72, 216  # wider heads' consumers need the others
        return (56, 224) if walks else (40, 232)

    def members(self) -> dict[str, str | int | bool]:
        producer, consumer = self.registers
        return {
            "Element": self.element.element,
            "kHeadDim": self.head_dim,
            "kHeadDimV": self.head_dim_v,
            "kBlockQ": self.tile.block_q,
            "kBlockK": self.tile.block_k,
            "kThreads": 32 * self.tile.warps,
            "kLoadBytes": 16,
            "kSharedBytes": self.smem_bytes,
            "kTurns": self.turns,
            "kQStages": self.q_stages,
            "kProducerRegisters": producer,
            "kConsumerRegisters": consumer,
            "kDropout": self.dropout,
            "kPaged": self.paged,
            "kCluster": self.cluster,
        }


def why_not_sm90(p: ForwardProblem, arch: Arch) -> str:
    """Why forward_sm80.cu computes a problem, and not forward_sm90.cu; "" where the latter does."""
    if arch.name != "sm_90a":
        return f"{arch.name} has no wgmma"
    if p.options.kernel == "sm_80":
        return "kernel_options ask for it"
    if p.dtype.itemsize != 2:
        return f"wgmma does not multiply {p.dtype.name} to its accuracy"
    if p.load_bytes < 16:
        return "tensor copies want bases, strides and rows that are multiples of 16 bytes"
    for name in ("q",) if p.page_size else ("q", "k", "v"):
        stride = unfit_stride(p, name)
        if stride is not None:
            return f"a stride of {name}, {stride}, is not positive, or too long for tensor copies"
    return ""


def axes_of(p: ForwardProblem, name: str) -> tuple[int, int, int]:
    """Sizes of the axes that the strides of q, k or v are of."""
    if name == "q":
        return 1 if p.packed else p.batch, p.q_rows, p.heads_q
    if p.page_size:
        return p.num_pages, p.page_size, p.heads_kv
    return 1 if p.packed else p.batch, p.k_rows, p.heads_kv


def unfit_stride(p: ForwardProblem, name: str) -> int | None:
    """A stride of q, k or v that no tensor map can hold."""
    for stride, size in zip(getattr(p, f"{name}_strides"), axes_of(p, name), strict=True):
        if size > 1 and not 0 < stride * p.dtype.itemsize < tensor_map.MAX_STRIDE:
            return stride
    return None


def rows_of_copy(p: ForwardProblem, block_k: int) -> tuple[int, str]:
    """How many rows of a page one tensor copy brings, and why; 0: rows are gathered one by one.

    Whole parts of pages are whole parts of key tiles, each at a multiple of the 8 rows that a swizzle repeats over.
    """
    rows = math.gcd(p.page_size, block_k)
    if rows % 8:
        return 0, f"gathered row by row, for pages of {p.page_size} and tiles of {block_k} have no 8 rows in common"
    if unfit_stride(p, "k") is not None or unfit_stride(p, "v") is not None:
        return 0, "gathered row by row, for a stride is not positive, or too long for tensor copies"
    return rows, f"by tensor copies of {rows} rows, which pages of {p.page_size} and tiles of {block_k} consist of"


def choose_sm90_variant(
    dtype: DType,
    head_dim: int,
    head_dim_v: int,
    *,
    dropout: bool = False,
    mods: Mods | None = None,
    paged: bool = False,
) -> ForwardSm90Variant:
    """As `choose_variant`, where `why_not_sm90` has nothing against it."""
    d, d_v = head_dim_class(head_dim), head_dim_class(head_dim_v)
    row = max(d, d_v)
    tile = SM90_TILES[row]
    if (d, d_v) == (192, 128):
        tile = SM90_TILES[128]  # 208 KB
    text = emit_c.NO_MODS if mods is None else emit_c.mods_text(mods)
    if dropout or (mods is not None and (mods.score is not None or emit_c.keeps_more_than_bounds(text))):
        tile = SM90_NARROWER_TILES.get(row, tile)
    if dropout:
        tile = SM90_DROPOUT_TILES.get(row, tile)
    if paged and tile.warps == 16:
        # Three consumers leave too few registers to the warps that load pages. The same keys at a time.
        tile = Tile(128, tile.block_k, 12)
    return ForwardSm90Variant(dtype, d, d_v, tile, dropout, text, paged)


def are_alike(p: Any) -> bool:
    """p: a problem of the forward or the backward. Whether all query tiles of a dense batch see the same keys."""
    return p.window == (-1, -1) and not p.seqused_q and not p.seqused_k and (p.mods is None or p.mods.mask is None)


def require_pairs(p: ForwardProblem, tiles: int) -> None:
    """Clusters of two have what they need; `tiles` of queries a head."""
    if p.packed or p.page_size or not are_alike(p) or tiles % 2:
        raise UnsupportedError(
            "kernel_options: cluster=2 is for dense batches without causal, window, masks, used lengths and pages, and "
            f"an even number of query tiles, not {tiles}: leave it None"
        )


def heads_of_tile(p: ForwardProblem, block_q: int) -> int:
    """How many query heads have their rows in one tile of forward_sm90.cu: 1, or all that share a key head.

    Then the keys are loaded, and multiplied, once for all of them. The bits of a result are the same, so lengths may
    decide: it is so where it leaves less than 0.9 of the tiles (as FlashAttention-3 chooses)."""
    group, wanted = p.heads_q // max(p.heads_kv, 1), p.options.pack_heads
    can = group <= 64 and p.mods is None and p.dropout_p == 0
    if wanted and not can:
        raise UnsupportedError(
            "kernel_options: pack_heads is for up to 64 query heads a key head, without mods and dropout: leave it None"
        )
    queries = math.ceil(p.q_rows / max(p.batch, 1)) if p.packed else p.q_rows
    together = math.ceil(queries / (block_q // 64 * (64 // group))) if can else math.inf
    pays = together < 0.9 * group * math.ceil(queries / block_q)
    return group if can and (pays if wanted is None else wanted) else 1


@functools.cache
def kernel_spec(variant: ForwardVariant | ForwardSm90Variant) -> module.KernelSpec:
    """Where the variant's kernel is written and how a block of it is launched."""
    if isinstance(variant, ForwardSm90Variant):
        return module.KernelSpec(
            source="forward_sm90.cu",
            entry="cuflash_forward_sm90" if variant.cluster == 1 else "cuflash_forward_sm90_pair",
            params="ForwardSm90Params",
            variant=variant,
            threads=32 * variant.tile.warps,
            smem_bytes=variant.smem_bytes,
            registers=(variant.registers[0],) + (variant.registers[1],) * (variant.tile.warps // 4 - 1),
        )
    return module.KernelSpec(
        source="forward_sm80.cu",
        entry="cuflash_forward_sm80",
        params="ForwardParams",
        variant=variant,
        threads=32 * variant.tile.warps,
        smem_bytes=variant.smem_bytes,
    )


def choose_grid(
    *, packed: bool, batch: int, rows: int, longest: int | None, heads: int, block: int
) -> tuple[tuple[int, int, int], bool, str]:
    """The grid over tiles of `block` rows, whether its blocks are (slot, head), and the reason; (0, 0, 0) where there
    is nothing to write.

    rows      dense: of every sequence; packed: in all
    longest   packed: the longest sequence, if known

    (tile, head, sequence) when the longest sequence wastes few blocks on the others, else (slot, head): see
    kernels_cu/tile/schedule.cuh. Only numbers the host has anyway decide.
    """
    if rows == 0 or heads == 0 or (batch == 0 and not packed):
        return (0, 0, 0), False, "nothing to compute"
    if not packed:
        blocks = math.ceil(rows / block)
        if batch <= MAX_HEADS:
            return (blocks, heads, batch), False, "dense: (query block, head, sequence)"
        return (blocks * batch, heads, 1), True, f"batch={batch} exceeds the grid's {MAX_HEADS}: (slot, head)"
    blocks = math.ceil(min(longest or rows, rows) / block)
    if batch < MAX_HEADS and batch * blocks <= 1.25 * (rows / block + batch):
        # One slice more than sequences: the rows behind the last one are written as zeros.
        return (blocks, heads, batch + 1), False, "packed, similar lengths: (query block, head, sequence)"
    why = "longest length unknown" if longest is None else "lengths differ"
    slots = slots_of(packed=True, batch=batch, rows=rows, block=block)
    return (slots, heads, 1), True, f"packed, {why}: (slot, head), each block finds its sequence in cu_seqlens"


def slots_of(*, packed: bool, batch: int, rows: int, block: int) -> int:
    """How many slots hold every tile of every sequence, and of the rows behind the last."""
    return rows // block + batch + 1 if packed else batch * math.ceil(rows / block)


# Pointers of ForwardParams and the name of the array each is taken from.
POINTERS = (
    "q", "k", "v", "out", "lse", "max_logit", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "page_table",
    "cache_leftpad", "alibi_slopes", "sink", "seed", "offset",
)  # fmt: skip
_WRITTEN = ("out", "lse", "max_logit", "dropout_mask")
# Of ForwardSm90Params.
MAPS = ("q_map", "k_map", "v_map")


class ForwardPlan:
    """A problem made ready for an architecture: variant, grid, and all params but the pointers."""

    def __init__(self, problem: ForwardProblem, arch: Arch) -> None:
        self.problem = problem
        self.arch = arch
        choices: dict[str, Any] = {
            "dropout": problem.dropout_p > 0, "mods": problem.mods, "paged": problem.page_size > 0
        }  # fmt: skip
        self.variant: ForwardVariant | ForwardSm90Variant
        self.fallback = why_not_sm90(problem, arch)
        if not self.fallback:
            self.variant = choose_sm90_variant(problem.dtype, problem.head_dim, problem.head_dim_v, **choices)
        else:
            self.variant = choose_variant(
                problem.dtype, problem.head_dim, problem.head_dim_v, problem.load_bytes, arch, **choices
            )
        block_q = self.variant.tile.block_q
        self._with_maps = isinstance(self.variant, ForwardSm90Variant)
        self._group_heads = heads_of_tile(problem, block_q) if self._with_maps else 1
        if isinstance(self.variant, ForwardSm90Variant) and problem.options.cluster == 2:
            require_pairs(problem, math.ceil(problem.q_rows / (block_q // 64 * (64 // self._group_heads))))
            self.variant = replace(self.variant, cluster=2)
        self.spec = kernel_spec(self.variant)
        groups = problem.heads_q // self._group_heads
        self.grid, slots, self.why = choose_grid(
            packed=problem.packed,
            batch=problem.batch,
            rows=problem.q_rows,
            longest=problem.max_seqlen_q,
            heads=groups,
            block=block_q // 64 * (64 // self._group_heads) if self._with_maps else block_q,
        )
        if self._group_heads > 1:
            self.why += f"; the {self._group_heads} query heads of a key head share tiles, and count as one"
        if problem.options.cluster == 2:
            self.why += "; blocks in pairs, each loads half of the keys of both"
        self.workspace_bytes = 0
        values = strides_of(problem, "q", "k", "v", "out") | score_values(problem)
        values["packed_grid"] = int(slots)
        self.order = self._choose_order()
        values["order"] = self.order.packed()
        values |= page_values(problem.page_size, problem.page_table_stride)
        self._page_rows, self._why_page_rows = 0, ""
        if self._with_maps:
            if problem.page_size:
                self._page_rows, self._why_page_rows = rows_of_copy(problem, self.variant.tile.block_k)
            values |= {
                "group_heads": self._group_heads,
                "group_queries": 64 // self._group_heads,
                "group_multiplier": -(-4096 // self._group_heads),
                "groups": groups,
                "persistent_tiles": self._choose_persistence(),
                "page_rows": self._page_rows,
            }
        self._values, self._k_len_at = tuple(values.values()), [*values].index("k_len")
        names = (*POINTERS, "seed_value", "offset_value", "captured", *values, *(MAPS if self._with_maps else ()))
        self._pack = layout.load(self.spec.params).packer(*names)
        self._captured = Captured(problem.mods)

    def _choose_order(self) -> order.Order:
        p, block_k = self.problem, self.variant.tile.block_k
        rows = p.k_rows // max(p.batch, 1) if p.packed and not p.page_size else p.k_rows
        row_bytes = (p.head_dim + p.head_dim_v) * p.dtype.itemsize
        return order.choose(
            self.grid,
            self.arch,
            wanted=p.options.order if self._is_ordered() else "position",
            alike=are_alike(p) and not p.packed,
            masked=p.mods is not None and p.mods.mask is not None,
            cluster=p.options.cluster or 1,
            window=p.window,
            heads_together=p.heads_q // max(p.heads_kv, 1) // self._group_heads,
            bytes_together=order.rows_together(rows, p.window, max(block_k, self.variant.tile.block_q)) * row_bytes,
            threads=self.spec.threads,
        )

    def _is_ordered(self) -> bool:
        """Whether the kernel asks for an order: `kOrdered` in its text."""
        v = self.variant
        return self._with_maps or v.element is not dtypes.float32 or v.head_dim < 256

    def _choose_persistence(self) -> int:
        """How many query tiles blocks go over in steps, where `grid` becomes one of a block for each multiprocessor;
        0: it stays. By itself where tiles have equally many keys, so that shares are equal, and there is more than one
        of them for a block; where they differ, the grid gives each multiprocessor that is done the next longest."""
        p, total = self.problem, math.prod(self.grid)
        wanted, can = p.options.persistent, not (p.packed or p.page_size) and 0 < total < 2**31
        if wanted and not can:
            raise UnsupportedError("kernel_options: persistent is for dense batches, not in pages: leave it None")
        if not can or not (are_alike(p) and total > self.arch.multiprocessors if wanted is None else wanted):
            return 0
        cluster = p.options.cluster or 1
        self.grid = (min(total, self.arch.multiprocessors // cluster * cluster), 1, 1)
        self.why = self.why.replace("dense: (", "dense, persistent: each block goes over (")
        return total

    def params(
        self,
        pointers: Sequence[int],
        seed: int = 0,
        offset: int = 0,
        captured: bytes = emit_c.NO_WORDS,
        *,
        backend: str = "cuda",
        device: int | None = None,
        k_len: int | None = None,
    ) -> bytes:
        """The launch struct, pointers in the order of POINTERS (0: null); the others as `launch` takes them."""
        maps = self._maps(backend, device, *pointers[:3]) if self._with_maps else ()
        values = with_length(self._values, self._k_len_at, k_len)
        return self._pack(*pointers, seed % 2**64, offset % 2**32, captured, *values, *maps)

    @property
    def specs(self) -> tuple[module.KernelSpec, ...]:
        """The kernels a launch runs."""
        return (self.spec,)

    def described(self) -> tuple[module.KernelSpec, tuple[int, int, int], list[str]]:
        """For people: spec and grid of the kernel, and why."""
        lines = [f"grid: {self.why}"]
        if self.order.pairs:
            lines.append(f"order: {self.order}")
        if self.arch.name == "sm_90a" and self.fallback:
            lines.append(f"kernel: forward_sm80 and not forward_sm90, for {self.fallback}")
        if self._why_page_rows:
            lines.append(f"keys: {self._why_page_rows}")
        return self.spec, self.grid, lines

    def kernel(self, backend: str, device: int | None) -> module.Kernel:
        """The compiled kernel, compiling it if this machine never did."""
        return module.load(self.spec, self.arch, backend, device)

    def launch(
        self,
        arrays: Mapping[str, TensorView],
        *,
        backend: str,
        device: int | None = None,
        stream: int | None = None,
        seed: int = 0,
        offset: int = 0,
        scalars: Sequence[int | float] = (),
        k_len: int | None = None,
    ) -> None:
        """Computes out (and lse, max_logit where they are in `arrays`) in place.

        k_len          keys of every sequence, at most the problem's; None: all of those
        seed, offset   dropout's, where they are not in `arrays` as one integer each
        scalars        numbers that the mods captured; their arrays are "captured0", "captured1", ... of `arrays`
        """
        if self.grid[0] == 0:
            return
        pointers = [arrays[name].ptr if name in arrays else 0 for name in POINTERS]
        buffers = buffers_of(arrays) if backend == "emulator" else ()
        captured = self._captured.pack(arrays, scalars)
        params = self.params(pointers, seed, offset, captured, backend=backend, device=device, k_len=k_len)
        self.kernel(backend, device).launch(self.grid, params, stream=stream, buffers=buffers)

    @functools.lru_cache(maxsize=1024)  # noqa: B019 - plans are kept for good, and allocators give the same addresses again
    def _maps(self, backend: str, device: int | None, q: int, k: int, v: int) -> list[bytes]:
        """How tensor copies find q, k and v: head_dim, heads, rows, batch; head_dim, heads, rows, pages."""
        p, tile = self.problem, self.variant.tile
        block_k = self._page_rows if p.page_size else tile.block_k // (p.options.cluster or 1)
        maps = []
        for name, pointer, d, columns, block in (
            ("q", q, p.head_dim, self.variant.head_dim, 64 // self._group_heads),
            ("k", k, p.head_dim, self.variant.head_dim, block_k),
            ("v", v, p.head_dim_v, self.variant.head_dim_v, block_k),
        ):
            if block == 0:  # rows are gathered
                maps.append(bytes(tensor_map.BYTES))
                continue
            swizzle = 128 if columns % 64 == 0 else 64
            axes = axes_of(p, name)
            dims = (d, *(max(n, 1) for n in axes[::-1]))
            steps = getattr(p, f"{name}_strides")
            strides = [n * p.dtype.itemsize if size > 1 else 16 for n, size in zip(steps[::-1], dims[1:], strict=True)]
            # Without rows nothing is read, and there is no address.
            address = pointer if min(axes) else q
            box = (swizzle // 2, self._group_heads if name == "q" else 1, block, 1)
            maps.append(tensor_map.encode(backend, address, p.dtype.name, dims, tuple(strides), box, swizzle, device))
        return maps


class Captured:
    """How the values that mods captured travel to a kernel."""

    def __init__(self, mods: Mods | None) -> None:
        self.words = None if mods is None else emit_c.Words(mods)
        self._names = () if mods is None else tuple(f"captured{i}" for i in range(len(mods.arrays)))
        slots = () if self.words is None else self.words.gradients
        self._gradients = [(slot, f"sums{slot}", f"dcaptured{slot}") for slot in slots]

    def pack(self, arrays: Mapping[str, TensorView], scalars: Sequence[int | float]) -> bytes:
        if self.words is None or not (self._names or scalars):
            return emit_c.NO_WORDS
        views = [arrays[name] for name in self._names]
        gradients = {}
        for slot, summed, gradient in self._gradients:
            sums = arrays.get(summed) or arrays.get(gradient)
            if sums is not None:
                gradients[slot] = sums.ptr
        return self.words.pack([(x.ptr, x.shape, x.strides) for x in views], scalars, gradients)


def strides_of(problem: Any, *names: str) -> dict[str, int]:
    """The stride fields of a params struct, in bytes, from `<name>_strides` of a problem."""
    return {
        f"{name}_stride_{axis}": stride * problem.dtype.itemsize
        for name in names
        for axis, stride in zip(("batch", "row", "head"), getattr(problem, f"{name}_strides"), strict=True)
    }


def with_length(values: tuple[Any, ...], at: int, k_len: int | None) -> tuple[Any, ...]:
    """A launch's numbers with another number of keys at its place, where one is given."""
    return values if k_len is None else (*values[:at], k_len, *values[at + 1 :])


def score_values(p: Any) -> dict[str, Any]:
    """The fields that ForwardParams and BackwardParams share and that are neither pointers nor strides of q, k, v."""
    scale_log2 = p.scale * LOG2_E
    # A scale too small to be a normal float, zero or negative cannot stand inside the exponential: there -inf, a masked
    # score, must stay -inf.
    by_mod = p.mods is not None and p.mods.score is not None
    raw = p.softcap == 0 and p.alibi is None and scale_log2 >= 1e-30 and not by_mod
    # Scores are in natural units, for in base 2 the largest would be past float32; the exponential goes over to base 2.
    score_scale = p.scale / p.softcap if p.softcap else p.scale
    if not max(abs(scale_log2), abs(score_scale), p.softcap) < 3e38:
        raise ArgumentError(
            f"scale={p.scale} with softcap={p.softcap} leaves float32: scale, and scale / softcap, must be below 2e38"
        )
    return {
        "lse_stride_batch": 0 if p.packed else p.heads_q * p.q_rows,
        "lse_stride_head": p.q_rows,
        "alibi_stride_batch": p.heads_q if p.alibi == "batch" else 0,
        "batch": p.batch,
        "q_len": p.q_rows,
        "k_len": p.k_rows,
        "head_group": p.heads_q // max(p.heads_kv, 1),
        "head_dim": p.head_dim,
        "head_dim_v": p.head_dim_v,
        "window_left": UNLIMITED if p.window[0] < 0 else min(p.window[0], UNLIMITED),
        "window_right": UNLIMITED if p.window[1] < 0 else min(p.window[1], UNLIMITED),
        "sink_is_element": int(p.sink == "element"),
        "score_scale": score_scale,
        "score_cap": p.softcap,
        "softmax_scale": scale_log2 if raw else LOG2_E,
        "raw_scores": int(raw),
        **dropout_values(p.dropout_p, p.seed),
    }


# Of the integer a seed's pointer leads to, by dtype: what a kernel calls seed_format.
SEED_FORMATS = {dtypes.uint32: 0, dtypes.int32: 1, dtypes.int64: 2, dtypes.uint64: 2}


def dropout_values(p: float, seed: DType | None) -> dict[str, Any]:
    """The fields of a params struct that describe dropout, but for seed and offset (kernels_cu/tile/dropout.cuh)."""
    return {
        "keep_scale": 1 / (1 - p),
        "keep_threshold": philox.keep_threshold(p),
        "seed_format": 0 if seed is None else SEED_FORMATS[seed],
    }


def page_values(page_size: int, table_stride: int) -> dict[str, int]:
    """The fields of a params struct that describe pages: kernels divide by page_size as kernels_cu/tile/paged.cuh says.

    >>> values = page_values(48, 7)
    >>> (1000 * values["page_multiplier"] >> 31 + values["page_shift"]) == 1000 // 48
    True
    """
    multiplier, shift = order.divisor(page_size)
    return {
        "page_table_stride": table_stride,
        "page_size": page_size,
        "page_multiplier": multiplier,
        "page_shift": shift,
    }


def require_counts(problem: Any) -> None:
    """Rows and heads are as many as a kernel can count."""
    for name, rows in (("q", problem.q_rows), ("k", problem.k_rows)):
        if rows > MAX_ROWS:
            raise UnsupportedError(f"{name} has {rows} rows, a kernel counts to {MAX_ROWS}: split the batch")
        if rows > MAX_ROWS_OF_MODS and problem.mods is not None:
            raise UnsupportedError(f"{name} has {rows} rows, mods count to {MAX_ROWS_OF_MODS}: split the batch")
    if problem.heads_q > MAX_HEADS:
        raise UnsupportedError(f"heads_q={problem.heads_q} must be at most {MAX_HEADS}: split the heads")


@functools.lru_cache(maxsize=4096)
def plan(problem: ForwardProblem, arch: Arch) -> ForwardPlan:
    """The plan of a problem. Compiles nothing: the first launch, or `ForwardPlan.kernel`, does."""
    require_counts(problem)
    return ForwardPlan(problem, arch)


def buffers_of(arrays: Mapping[str, TensorView], written: Sequence[str] = _WRITTEN) -> list[module.Buffer]:
    """The memory each array spans, for the emulator's bounds checks."""
    buffers = []
    for name, view in arrays.items():
        before, after = view.extent  # captured arrays may step backwards
        buffers.append(module.Buffer(name, view.ptr - before, before + after, name in written))
    return buffers


def representative(arch: Arch) -> list[module.KernelSpec]:
    """Variants that between them compile every line of every tile: each dtype and class with dropout and without, each
    load width, d != d_v, keys in pages."""
    variants = [
        choose_variant(dtype, d, d, 16, arch)
        for dtype in (dtypes.bfloat16, dtypes.float16, dtypes.float32)
        for d in HEAD_DIM_CLASSES
    ]
    variants += [
        choose_variant(dtypes.float32 if i % 3 == 2 else dtypes.bfloat16, d, d, 16, arch, dropout=True)
        for i, d in enumerate(HEAD_DIM_CLASSES)
    ]
    variants += [
        choose_variant(dtype, d, d_v, load_bytes, arch)
        for dtype, d, d_v, load_bytes in (
            (dtypes.bfloat16, 64, 64, 4),
            (dtypes.bfloat16, 64, 64, 2),
            (dtypes.float16, 128, 128, 4),
            (dtypes.float16, 128, 128, 2),
            (dtypes.bfloat16, 256, 256, 2),
            (dtypes.float32, 128, 128, 4),
            (dtypes.float32, 256, 256, 4),
            (dtypes.bfloat16, 192, 128, 16),
            (dtypes.float16, 64, 256, 16),
            (dtypes.float32, 256, 32, 16),
        )
    ]
    variants += [
        choose_variant(dtype, d, d_v, load_bytes, arch, paged=True)
        for dtype, d, d_v, load_bytes in (
            (dtypes.bfloat16, 64, 64, 16),
            (dtypes.float16, 128, 128, 16),
            (dtypes.bfloat16, 256, 256, 16),
            (dtypes.float32, 256, 256, 16),
            (dtypes.bfloat16, 192, 128, 4),
            (dtypes.float16, 32, 32, 2),
        )
    ]
    return [kernel_spec(v) for v in variants]


def predicted(variant: ForwardSm90Variant, loop: sass.Loop) -> sm_model.TileTime:
    """What a multiprocessor would need for a plain key tile of forward_sm90.cu, whose KV loop is `loop`."""
    consumers = variant.tile.warps // 4 - 1
    copied = variant.tile.block_k * (variant.head_dim + variant.head_dim_v) * variant.element.itemsize
    return sm_model.predict(loop.path, consumers=consumers, copied_bytes=copied)


def representative_sm90(arch: Arch) -> list[module.KernelSpec]:
    """The same of forward_sm90.cu: every tile, each class with dropout and without; keys in pages."""
    if arch.name != "sm_90a":
        return []
    dims = [*((d, d) for d in HEAD_DIM_CLASSES), (192, 128)]
    variants = [
        choose_sm90_variant((dtypes.float16, dtypes.bfloat16)[i % 2], *d, dropout=dropout)
        for dropout in (False, True)
        for i, d in enumerate(dims)
    ]
    variants += [replace(choose_sm90_variant(dtypes.float16, d, d), cluster=2) for d in (64, 128, 256)]
    variants += [choose_sm90_variant(dtypes.bfloat16, d, d, paged=True) for d in (64, 128, 256)]
    return [kernel_spec(v) for v in variants]
