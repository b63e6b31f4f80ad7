"""Hopper's attention backward: which calls it serves, its tiles, and its tensor maps. The host half of
kernels_cu/backward_sm90.cu; `backward` has the launches around it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from .. import dtypes
from ..arch import Arch
from ..dtypes import DType
from ..jit import module, sass, sm_model, tensor_map
from ..trace import emit_c
from ..trace.expr import Mods
from . import forward
from .forward import Tile

BackwardProblem = Any  # of backward.py, which asks this module

PARAMS = "BackwardSm90Params"
# Its fields beside those of BackwardParams.
FIELDS = ("q_map", "k_map", "v_map", "dout_map", "natural_scale")
BLOCK_K = 128  # two warpgroups of consumers have 64 keys each

# Head-dim class of the wider of d and d_v -> queries of a tile, where its rows are plain. With 128, P is taken from
# what was rounded for dv: registers do not hold both.
PLAIN: dict[int, int] = {32: 128, 64: 128, 96: 64, 128: 80}
RICH = 64  # the same where they are rich
SCORE_MOD_DIMS, DROPOUT_DIMS = 64, 96  # the widest beside which these have registers


@dataclass(frozen=True, slots=True)
class BackwardSm90Variant:
    """All that the machine code of backward_sm90.cu depends on.

    rich   scores are capped, have ALiBi, go through mods, or are dropped; or their scale is 0 or negative
    """

    element: DType
    head_dim: int
    head_dim_v: int
    tile: Tile
    rich: bool = False
    dropout: bool = False
    mods: str = emit_c.NO_MODS

    @property
    def accumulate_dq(self) -> bool:
        return True

    @property
    def dq_order(self) -> int:
        """`CastVariant.dq_order`: a lane's four sums side by side; or so, and rows of the sums are columns of dq."""
        return 2 if self.tile.block_q % 64 else 1

    @property
    def load_bytes(self) -> int:
        return 16

    @property
    def smem_bytes(self) -> int:
        """K, V; two tiles of Q, dO and dS, twice what is known of each query; a word a thread, and what the roles tell
        each other."""
        tile, row = self.tile, self.head_dim + self.head_dim_v
        tiles = (tile.block_k * row + 2 * tile.block_q * (row + tile.block_k)) * self.element.itemsize
        rows = 2 * tile.block_q * (12 + 4 * emit_c.staged(self.mods)[0])
        return tiles + rows + 16 + 4 * 32 * tile.warps + 72

    @property
    def registers(self) -> tuple[int, int]:
        """Of a copying warp's thread and of a consumer's: together what the block has. Under a mask_mod the former look
        through tiles, for which they could do with more; wide heads' consumers leave them none."""
        walks = emit_c.has_mask(self.mods) and max(self.head_dim, self.head_dim_v) <= 96
        return (56, 224) if walks else (24, 240)

    def members(self) -> dict[str, str | int | bool]:
        producer, consumer = self.registers
        return {
            "Element": self.element.element,
            "kHeadDim": self.head_dim,
            "kHeadDimV": self.head_dim_v,
            "kBlockQ": self.tile.block_q,
            "kBlockK": self.tile.block_k,
            "kThreads": 32 * self.tile.warps,
            "kSharedBytes": self.smem_bytes,
            "kRich": self.rich,
            "kProducerRegisters": producer,
            "kConsumerRegisters": consumer,
            "kDropout": self.dropout,
        }


def why_not(p: BackwardProblem, arch: Arch) -> str:
    """Why backward_sm80.cu computes a problem, and not backward_sm90.cu; "" where the latter does."""
    if arch.name != "sm_90a":
        return f"{arch.name} has no wgmma"
    if p.dtype.itemsize != 2:
        return f"wgmma does not multiply {p.dtype.name} to its accuracy"
    if p.deterministic:
        return "deterministic=True, and this one adds dq up in no order"
    if p.dslopes:
        return "the gradient of alibi_slopes, which is summed where queries are held"
    widest = forward.head_dim_class(max(p.head_dim, p.head_dim_v))
    if widest not in PLAIN:
        return f"head dims above {max(PLAIN)} have no tile that fits a multiprocessor's registers"
    for what, wanted, most in (
        ("a score_mod", p.mods is not None and p.mods.score is not None, SCORE_MOD_DIMS),
        ("dropout", p.dropout_p > 0, DROPOUT_DIMS),
    ):
        if wanted and widest > most:
            return f"{what}, for which head dims above {most} leave too few registers"
    if p.load_bytes < 16:
        return "tensor copies want bases, strides and rows that are multiples of 16 bytes"
    for name in ("q", "k", "v", "dout"):
        for stride, size in zip(getattr(p, f"{name}_strides"), axes_of(p, name), strict=True):
            if size > 1 and not 0 < stride * p.dtype.itemsize < tensor_map.MAX_STRIDE:
                return f"a stride of {name}, {stride}, is not positive, or too long for tensor copies"
    return ""


def axes_of(p: BackwardProblem, name: str) -> tuple[int, int, int]:
    """Sizes of the axes that the strides of q, k, v or dout are of."""
    of_queries = name in ("q", "dout")
    rows, heads = (p.q_rows, p.heads_q) if of_queries else (p.k_rows, p.heads_kv)
    return 1 if p.packed else p.batch, rows, heads


def choose_variant(
    dtype: DType,
    head_dim: int,
    head_dim_v: int,
    *,
    rich: bool = False,
    dropout: bool = False,
    mods: Mods | None = None,
    dcaptured: tuple[int, ...] = (),
) -> BackwardSm90Variant:
    """The variant for a dtype, head dims and plain rows or rich ones, where `why_not` has nothing against it. Nothing
    else enters: not lengths, batch or heads.

    rich   besides what mods and dropout make so
    """
    d, d_v = forward.head_dim_class(head_dim), forward.head_dim_class(head_dim_v)
    rich = rich or dropout or (mods is not None and (mods.score is not None or mods.mask is not None))
    rows = RICH if rich else PLAIN[max(d, d_v)]
    if rows % 64 and d != 128:
        rows = RICH  # dq's columns are rows of its product, 64 for each warpgroup
    tile = Tile(rows, BLOCK_K, 12)
    text = emit_c.NO_MODS if mods is None else emit_c.mods_text(mods, backward=True, wanted=dcaptured)
    return BackwardSm90Variant(dtype, d, d_v, tile, rich, dropout, text)


def choose_for(p: BackwardProblem) -> BackwardSm90Variant:
    """The same for a problem."""
    return choose_variant(
        p.dtype,
        p.head_dim,
        p.head_dim_v,
        rich=not forward.score_values(p)["raw_scores"],
        dropout=p.dropout_p > 0,
        mods=p.mods,
        dcaptured=tuple(slot for slot, _ in p.dcaptured),
    )


@functools.cache
def kernel_spec(variant: BackwardSm90Variant) -> module.KernelSpec:
    """Where the variant's kernel is written and how a block of it is launched."""
    return module.KernelSpec(
        source="backward_sm90.cu",
        entry="cuflash_backward_sm90",
        params=PARAMS,
        variant=variant,
        threads=32 * variant.tile.warps,
        smem_bytes=variant.smem_bytes,
        registers=(variant.registers[0], *[variant.registers[1]] * 2),
    )


class TensorMaps:
    """TMA's descriptions of a problem's q, k, v and dout, by their addresses."""

    def __init__(self, problem: BackwardProblem, variant: BackwardSm90Variant) -> None:
        self._problem = problem
        tile = variant.tile
        # Columns of a chunk, as BackwardPlan of the kernel has them: parts of dq's columns begin where a chunk does.
        part = variant.head_dim // (1 if tile.block_q == BLOCK_K else 2)
        chunk = next(n for n in (64, 32, 16) if part % n == 0)
        chunk_v = 64 if variant.head_dim_v % 64 == 0 else 32
        # head dim, columns and rows of a copy
        self._copies = {
            "q": (problem.head_dim, chunk, tile.block_q),
            "k": (problem.head_dim, chunk, tile.block_k),
            "v": (problem.head_dim_v, chunk_v, tile.block_k),
            "dout": (problem.head_dim_v, chunk_v, tile.block_q),
        }

    @functools.lru_cache(maxsize=1024)  # noqa: B019 - plans are kept for good, and allocators give the same addresses again
    def __call__(self, backend: str, device: int | None, q: int, k: int, v: int, dout: int) -> tuple[bytes, ...]:
        """Axes: head_dim, heads, rows, batch. There are keys."""
        p, maps = self._problem, []
        for (name, (d, columns, rows)), pointer in zip(self._copies.items(), (q, k, v, dout), strict=True):
            axes = axes_of(p, name)
            dims = (d, *(max(n, 1) for n in axes[::-1]))
            steps = getattr(p, f"{name}_strides")
            strides = [n * p.dtype.itemsize if size > 1 else 16 for n, size in zip(steps[::-1], dims[1:], strict=True)]
            # Without rows nothing is read, and there is no address.
            address = pointer if min(axes) else k
            box = (columns, 1, rows, 1)
            maps.append(
                tensor_map.encode(backend, address, p.dtype.name, dims, tuple(strides), box, 2 * columns, device)
            )
        return tuple(maps)


def predicted(variant: BackwardSm90Variant, loop: sass.Loop) -> sm_model.TileTime:
    """What a multiprocessor would need for a plain tile of queries of backward_sm90.cu, whose loop is `loop`."""
    copied = variant.tile.block_q * (variant.head_dim + variant.head_dim_v) * variant.element.itemsize
    return sm_model.predict(loop.path, consumers=2, copied_bytes=copied)


def representative(arch: Arch) -> list[module.KernelSpec]:
    """Variants that between them compile every line of every tile: each class of plain rows and of rich ones, d != d_v,
    dropout."""
    if arch.name != "sm_90a":
        return []
    dims = [(d, d) for d in PLAIN]
    variants = [
        choose_variant((dtypes.bfloat16, dtypes.float16)[i % 2], *pair, rich=rich)
        for rich in (False, True)
        for i, pair in enumerate([*dims, (64, 128), (128, 64)])
    ]
    variants += [choose_variant(dtypes.bfloat16, d, d, dropout=True) for d in PLAIN if d <= DROPOUT_DIMS]
    return [kernel_spec(v) for v in variants]
