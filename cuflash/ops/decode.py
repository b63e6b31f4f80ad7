"""Attention of few queries to many keys, in parts: decode_sm80.cu computes each part, combine.cu puts them together.

A `ForwardProblem` says what is asked for; its keys are dense or in pages, never packed. How many keys a part has,
`split_size`, is all that the order of sums depends on: with it fixed, a sequence has the same bits in any batch. The
parts that a launch has room for follow from the capacity of the cache, those in use from lengths on the device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from .. import dtypes
from ..arch import GRID_LIMITS, Arch
from ..array import TensorView
from ..dtypes import DType
from ..errors import ArgumentError, UnsupportedError
from ..jit import layout, module
from .forward import (
    UNLIMITED,
    ForwardProblem,
    buffers_of,
    head_dim_class,
    page_values,
    require_counts,
    score_values,
    strides_of,
)

# (bytes an element, head-dim class) -> keys of a tile. Rows are 16 a warp, of 4 warps.
BLOCK_K: dict[tuple[int, int], int] = {
    (2, 32): 64, (2, 64): 64, (2, 96): 64, (2, 128): 64, (2, 192): 64, (2, 256): 32,
    (4, 32): 64, (4, 64): 64, (4, 96): 32, (4, 128): 32, (4, 192): 16, (4, 256): 16,
}  # fmt: skip
BLOCK_Q = 64
DEFAULT_SPLIT = 512


@dataclass(frozen=True, slots=True)
class DecodeVariant:
    """All that the machine code of decode_sm80.cu depends on, beside the architecture."""

    element: DType
    head_dim: int
    head_dim_v: int
    load_bytes: int
    paged: bool

    @property
    def block_k(self) -> int:
        return BLOCK_K[self.element.itemsize, max(self.head_dim, self.head_dim_v)]

    @property
    def smem_bytes(self) -> int:
        """Q, one tile of K, one of V."""
        elements = (BLOCK_Q + self.block_k) * self.head_dim + self.block_k * self.head_dim_v
        return elements * self.element.itemsize

    def members(self) -> dict[str, str | int | bool]:
        return {
            "Element": self.element.element,
            "kHeadDim": self.head_dim,
            "kHeadDimV": self.head_dim_v,
            "kBlockQ": BLOCK_Q,
            "kBlockK": self.block_k,
            "kThreads": 2 * BLOCK_Q,
            "kLoadBytes": self.load_bytes,
            "kPaged": self.paged,
        }


@dataclass(frozen=True, slots=True)
class CombineVariant:
    """The same of combine.cu."""

    element: DType

    def members(self) -> dict[str, str | int | bool]:
        return {"Element": self.element.element, "kThreads": 128}


@functools.cache
def kernel_spec(variant: DecodeVariant) -> module.KernelSpec:
    return module.KernelSpec(
        "decode_sm80.cu", "cuflash_decode_sm80", "DecodeParams", variant, 2 * BLOCK_Q, variant.smem_bytes
    )


@functools.cache
def combine_spec(variant: CombineVariant) -> module.KernelSpec:
    return module.KernelSpec("combine.cu", "cuflash_combine", "DecodeParams", variant, 128, 0)


POINTERS = (
    "q", "k", "v", "out", "lse", "partial_out", "partial_lse", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k",
    "page_table", "cache_leftpad", "alibi_slopes", "sink",
)  # fmt: skip


class DecodePlan:
    """A problem made ready for an architecture: kernels, grids, workspace, and all params but the pointers."""

    def __init__(self, problem: ForwardProblem, arch: Arch, split_size: int = DEFAULT_SPLIT) -> None:
        if problem.mods is not None or problem.dropout_p > 0 or problem.max_logit or problem.seqused_q:
            raise UnsupportedError("decoding has no mods, dropout, max_logit or seqused_q: use the forward kernel")
        require_counts(problem)
        self.problem, self.arch, self.split_size = problem, arch, split_size
        d, d_v = head_dim_class(problem.head_dim), head_dim_class(problem.head_dim_v)
        itemsize = problem.dtype.itemsize
        load_bytes = max(problem.load_bytes, min(itemsize, 4))
        self.variant = DecodeVariant(problem.dtype, d, d_v, load_bytes, problem.page_size > 0)
        if not 0 < split_size <= UNLIMITED or split_size % self.variant.block_k:
            raise ArgumentError(
                f"split_size={split_size} must be a multiple of {self.variant.block_k}, at least that and at most 2**30"
            )
        if problem.batch + 1 > GRID_LIMITS[2]:
            raise UnsupportedError(f"batch={problem.batch} must be below {GRID_LIMITS[2]}: split the batch")
        self.decode, self.combine = kernel_spec(self.variant), combine_spec(CombineVariant(problem.dtype))
        self.splits = max(1, math.ceil(problem.k_rows / split_size))
        longest = min(problem.max_seqlen_q or problem.q_rows, problem.q_rows) if problem.packed else problem.q_rows
        group = problem.heads_q // max(problem.heads_kv, 1)
        rows = problem.q_rows if problem.packed else problem.batch * problem.q_rows
        tiles = math.ceil(max(longest, 1) * group / BLOCK_Q)
        self.grid = (tiles * self.splits, problem.heads_kv, problem.batch)
        self.combine_grid = (math.ceil(max(longest, 1) / 4), problem.heads_q, problem.batch + problem.packed)
        lines = self.splits * problem.heads_q * rows
        self.workspace = {
            "partial_out": ((lines * problem.head_dim_v,), dtypes.float32),
            "partial_lse": ((lines,), dtypes.float32),
        }
        values = strides_of(problem, "q", "k", "v", "out") | score_values(problem)
        values |= page_values(problem.page_size, problem.page_table_stride)
        values |= {"partial_rows": rows, "splits": self.splits, "split_size": split_size}
        fields = {f.name for f in layout.load("DecodeParams").fields}
        values = {name: value for name, value in values.items() if name in fields}
        self._values = tuple(values.values())
        self._pack = layout.load("DecodeParams").packer(*POINTERS, *values)
        self.empty = not (rows and problem.heads_q)

    @property
    def specs(self) -> tuple[module.KernelSpec, ...]:
        """The kernels a launch runs."""
        return (self.decode, self.combine)

    def params(self, arrays: Mapping[str, TensorView]) -> bytes:
        return self._pack(*[arrays[name].ptr if name in arrays else 0 for name in POINTERS], *self._values)

    def launch(
        self, arrays: Mapping[str, TensorView], *, backend: str, device: int | None = None, stream: int | None = None
    ) -> None:
        """Computes out (and lse where it is in `arrays`) in place; `workspace` is in `arrays` too, of any contents."""
        if self.empty:
            return
        params = self.params(arrays)
        written = ("out", "lse", *self.workspace)
        buffers = buffers_of(arrays, written) if backend == "emulator" else ()
        for spec, grid in ((self.decode, self.grid), (self.combine, self.combine_grid)):
            if 0 not in grid:
                module.load(spec, self.arch, backend, device).launch(grid, params, stream=stream, buffers=buffers)


def representative(arch: Arch) -> list[module.KernelSpec]:
    """Variants that between them compile every line: both key layouts, the widest rows of each size of element."""
    variants = [DecodeVariant(dtypes.bfloat16, d, d, 16, paged) for d, paged in ((128, True), (256, False))]
    variants += [DecodeVariant(dtypes.float32, d, d, 16, d == 256) for d in (192, 256)]
    return [*map(kernel_spec, variants), combine_spec(CombineVariant(dtypes.bfloat16))]
