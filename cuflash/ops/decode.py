"""Attention of few queries to many keys, in pieces: decode_sm80.cu computes each, combine.cu puts them together.

A `ForwardProblem` says what is asked for; its keys are dense or in pages, never packed. How rows and keys are cut into
pieces is told in kernels_cu/tile/pieces.cuh. Nothing of it depends on lengths that the host would have to know.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .. import dtypes
from ..arch import GRID_LIMITS, Arch
from ..array import TensorView
from ..dtypes import DType
from ..errors import ArgumentError, UnsupportedError
from ..jit import layout, module
from ..trace import emit_c
from ..trace.expr import Mods
from .forward import (
    UNLIMITED,
    Captured,
    ForwardProblem,
    buffers_of,
    head_dim_class,
    page_values,
    require_counts,
    score_values,
    strides_of,
    with_length,
)

# (bytes an element, head-dim class) -> keys of a tile. Rows are 16 a warp, of 4 warps.
BLOCK_K: dict[tuple[int, int], int] = {
    (2, 32): 64, (2, 64): 64, (2, 96): 64, (2, 128): 64, (2, 192): 64, (2, 256): 32,
    (4, 32): 64, (4, 64): 64, (4, 96): 32, (4, 128): 32, (4, 192): 16, (4, 256): 16,
}  # fmt: skip
# The same for a score_mod, whose terms take registers.
MOD_BLOCK_K: dict[tuple[int, int], int] = {(2, 192): 32, (2, 256): 16}  # twice as many spill on some chips
BLOCK_Q = 64
MAX_STAGES = 4


@dataclass(frozen=True, slots=True)
class DecodeVariant:
    """All that the machine code of decode_sm80.cu depends on, beside the architecture."""

    element: DType
    head_dim: int
    head_dim_v: int
    block_k: int
    load_bytes: int
    stages: int
    paged: bool = False
    mods: str = emit_c.NO_MODS

    @property
    def smem_bytes(self) -> int:
        """Q, and of each stage a tile of K, one of V, and what mods need of each key."""
        q = BLOCK_Q * self.head_dim * self.element.itemsize
        return q + self.stages * _stage_bytes(self.element, self.head_dim, self.head_dim_v, self.block_k, self.mods)

    def blocks(self, arch: Arch) -> int:
        """How many a multiprocessor runs at a time: two, as many as 255 registers a thread let, or one."""
        return 2 if 2 * (self.smem_bytes + BLOCK_SMEM) <= arch.smem_bytes + BLOCK_SMEM else 1

    def members(self) -> dict[str, str | int | bool]:
        return {
            "Element": self.element.element,
            "kHeadDim": self.head_dim,
            "kHeadDimV": self.head_dim_v,
            "kBlockQ": BLOCK_Q,
            "kBlockK": self.block_k,
            "kThreads": 2 * BLOCK_Q,
            "kLoadBytes": self.load_bytes,
            "kStages": self.stages,
            "kSharedBytes": self.smem_bytes,
            "kPaged": self.paged,
        }


BLOCK_SMEM = 1024  # of every block, the system's own; a multiprocessor has as much more than one block may ask for


def _stage_bytes(element: DType, head_dim: int, head_dim_v: int, block_k: int, mods: str) -> int:
    terms = -(-4 * block_k * emit_c.staged(mods)[1] // 128) * 128
    return block_k * (head_dim + head_dim_v) * element.itemsize + terms


@dataclass(frozen=True, slots=True)
class CombineVariant:
    """The same of combine.cu."""

    element: DType

    def members(self) -> dict[str, str | int | bool]:
        return {"Element": self.element.element, "kThreads": 128}


@dataclass(frozen=True, slots=True)
class PlanVariant:
    """The same of decode_plan.cu, which is one for all."""

    def members(self) -> dict[str, str | int | bool]:
        return {"kThreads": 1024}


PLAN = module.KernelSpec("decode_plan.cu", "cuflash_decode_plan", "DecodeParams", PlanVariant(), 1024, 32 * 16)


def choose_variant(
    dtype: DType,
    head_dim: int,
    head_dim_v: int,
    load_bytes: int,
    arch: Arch,
    *,
    mods: Mods | None = None,
    paged: bool = False,
) -> DecodeVariant:
    """The variant of decode_sm80.cu, as `forward.choose_variant`. Of chips the stages alone depend: as many as let two
    blocks share a multiprocessor, or, where that were one, as one block has room for."""
    d, d_v = head_dim_class(head_dim), head_dim_class(head_dim_v)
    row = dtype.itemsize, max(d, d_v)
    block_k = BLOCK_K[row]
    if mods is not None and mods.score is not None:
        block_k = MOD_BLOCK_K.get(row, block_k)
    text = emit_c.NO_MODS if mods is None else emit_c.mods_text(mods)
    q_bytes, stage = BLOCK_Q * d * dtype.itemsize, _stage_bytes(dtype, d, d_v, block_k, text)
    half = (arch.smem_bytes + BLOCK_SMEM) // 2 - BLOCK_SMEM
    stages = (half - q_bytes) // stage
    if stages < 2:
        stages = (arch.smem_bytes - q_bytes) // stage
    stages = max(1, min(stages, MAX_STAGES))
    return DecodeVariant(dtype, d, d_v, block_k, max(load_bytes, min(dtype.itemsize, 4)), stages, paged, text)


@functools.cache
def kernel_spec(variant: DecodeVariant) -> module.KernelSpec:
    return module.KernelSpec(
        "decode_sm80.cu", "cuflash_decode_sm80", "DecodeParams", variant, 2 * BLOCK_Q, variant.smem_bytes
    )


@functools.cache
def combine_spec(variant: CombineVariant) -> module.KernelSpec:
    return module.KernelSpec("combine.cu", "cuflash_combine", "DecodeParams", variant, 128, 0)


POINTERS = (
    "q", "k", "v", "out", "lse", "max_logit", "partial_out", "partial_sum", "partial_max", "unit_begin", "cu_seqlens_q",
    "cu_seqlens_k", "seqused_q", "seqused_k", "page_table", "cache_leftpad", "alibi_slopes", "sink",
)  # fmt: skip
WRITTEN = ("out", "lse", "max_logit", "partial_out", "partial_sum", "partial_max", "unit_begin")


class DecodePlan:
    """A problem made ready for an architecture: kernels, grids, workspace, and all params but the pointers.

    split_size   keys of a piece, a multiple of the kernel's key block: the order of sums, and so a sequence's bits,
                 depends on nothing else. None: the keys of all sequences together are cut into one even share for each
                 block that the device runs at a time, by their lengths on the device
    """

    def __init__(self, problem: ForwardProblem, arch: Arch, split_size: int | None = None) -> None:
        self.problem, self.arch, self.split_size = problem, arch, split_size
        _refuse(problem)
        require_counts(problem)
        self.variant = choose_variant(
            problem.dtype, problem.head_dim, problem.head_dim_v, problem.load_bytes, arch, mods=problem.mods,
            paged=problem.page_size > 0,
        )  # fmt: skip
        block_k = self.variant.block_k
        if split_size is not None and (not 0 < split_size <= UNLIMITED or split_size % block_k):
            raise ArgumentError(
                f"split_size={split_size} must be a multiple of {block_k}, the keys of a tile of this kernel, from "
                f"{block_k} to 2**30: pass {min(max(-(-split_size // block_k), 1) * block_k, UNLIMITED)}"
            )
        self.spec, self.combine = kernel_spec(self.variant), combine_spec(CombineVariant(problem.dtype))
        longest = min(problem.max_seqlen_q or problem.q_rows, problem.q_rows) if problem.packed else problem.q_rows
        group = problem.heads_q // max(problem.heads_kv, 1)
        rows = problem.q_rows if problem.packed else problem.batch * problem.q_rows
        blocks = self.variant.blocks(arch) * arch.multiprocessors
        if split_size is None:
            splits, self.grid = 0, (blocks, 1, 1)
            lines = problem.heads_q * rows + blocks * BLOCK_Q
            self.why = (
                f"keys: an even share of all sequences' for each of {blocks} blocks, {self.variant.blocks(arch)} a "
                f"multiprocessor; decode_plan counts them on the device, combine puts the pieces of a row together"
            )
        else:
            splits = max(1, math.ceil(problem.k_rows / split_size))
            self.grid = (math.ceil(max(longest, 1) * group / BLOCK_Q) * splits, problem.heads_kv, problem.batch)
            lines = splits * problem.heads_q * rows
            self.why = (
                f"keys: split_size={split_size}, up to {splits} pieces of a row; combine puts them together in "
                "their order, whatever else is in the batch; grid: (piece and row tile, key head, sequence)"
            )
        self.combine_grid = (math.ceil(max(longest, 1) / 4), problem.heads_q, problem.batch + problem.packed)
        if self.grid[0] >= UNLIMITED:
            raise UnsupportedError(f"split_size={split_size} makes {splits} pieces of each row: pass a larger one")
        self.workspace: dict[str, tuple[tuple[int, ...], DType]] = {
            "partial_out": ((lines * problem.head_dim_v,), dtypes.float32),
            "partial_sum": ((lines,), dtypes.float32),
            "partial_max": ((lines,), dtypes.float32),
        }
        if split_size is None:
            self.workspace["unit_begin"] = ((problem.batch + 1,), dtypes.int64)
        self.workspace_bytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.workspace.values())
        values = strides_of(problem, "q", "k", "v", "out") | score_values(problem)
        values |= page_values(problem.page_size, problem.page_table_stride)
        values |= {"partial_rows": rows, "heads_kv": problem.heads_kv, "block_k": block_k, "blocks": blocks}
        values |= {"splits": splits, "split_size": split_size or 0}
        fields = {f.name for f in layout.load("DecodeParams").fields}
        values = {name: value for name, value in values.items() if name in fields}
        self._values, self._k_len_at = tuple(values.values()), [*values].index("k_len")
        self._pack = layout.load("DecodeParams").packer(*POINTERS, "captured", *values)
        self._captured = Captured(problem.mods)
        self._launches = [(self.spec, self.grid), (self.combine, self.combine_grid)]
        if split_size is None:
            self._launches.insert(0, (PLAN, (1, 1, 1)))
        self.empty = not (rows and problem.heads_q)

    def described(self) -> tuple[module.KernelSpec, tuple[int, int, int], list[str]]:
        """For people: spec and grid of the kernel that reads keys, how these are cut, and a line for each launch."""
        names = [f"{spec.name}: grid {' x '.join(map(str, grid))}" for spec, grid in self._launches]
        return self.spec, self.grid, [self.why, *names]

    @property
    def specs(self) -> tuple[module.KernelSpec, ...]:
        """The kernels a launch runs."""
        return tuple(spec for spec, _ in self._launches)

    def params(
        self, arrays: Mapping[str, TensorView], captured: bytes = emit_c.NO_WORDS, k_len: int | None = None
    ) -> bytes:
        """The launch struct, the same for all kernels."""
        values = with_length(self._values, self._k_len_at, k_len)
        return self._pack(*[arrays[name].ptr if name in arrays else 0 for name in POINTERS], captured, *values)

    def launch(
        self,
        arrays: Mapping[str, TensorView],
        *,
        backend: str,
        device: int | None = None,
        stream: int | None = None,
        scalars: Sequence[int | float] = (),
        k_len: int | None = None,
    ) -> None:
        """Computes out (and lse, max_logit where they are in `arrays`) in place; `workspace` is in `arrays` too, of any
        contents. `scalars` and `k_len`: as `ForwardPlan.launch` takes them."""
        if self.empty:
            return
        params = self.params(arrays, self._captured.pack(arrays, scalars), k_len)
        buffers = buffers_of(arrays, WRITTEN) if backend == "emulator" else ()
        for spec, grid in self._launches:
            if 0 not in grid:
                module.load(spec, self.arch, backend, device).launch(grid, params, stream=stream, buffers=buffers)


def _refuse(problem: ForwardProblem) -> None:
    """What these kernels do not do."""
    if problem.dropout_p > 0:
        raise UnsupportedError(f"split_size: {NO_DROPOUT}")
    if problem.packed and not problem.page_size:
        raise UnsupportedError(f"split_size: {NO_PACKED_KEYS}")
    if problem.batch + 1 > GRID_LIMITS[2]:
        raise UnsupportedError(f"batch={problem.batch} must be below {GRID_LIMITS[2]}: split the batch")
    group = problem.heads_q // max(problem.heads_kv, 1)
    if problem.q_rows * group >= UNLIMITED:
        raise UnsupportedError(
            f"q has {problem.q_rows} rows of {group} heads a key head, a kernel counts to {UNLIMITED} of both: "
            "split the batch"
        )


NO_DROPOUT = "dropout is of training, whose kernels do not split the keys of a row: leave split_size None"
NO_PACKED_KEYS = "packed keys (cu_seqlens_k) are not split: pass them dense with seqused_k, or in pages with page_table"


def representative(arch: Arch) -> list[module.KernelSpec]:
    """Variants that between them compile every line: both key layouts, the widest rows of each size of element."""
    variants = [choose_variant(dtypes.bfloat16, d, d, 16, arch, paged=d == 128) for d in (128, 256)]
    variants += [choose_variant(dtypes.float32, d, d, 16, arch, paged=d == 256) for d in (192, 256)]
    return [*map(kernel_spec, variants), PLAN, combine_spec(CombineVariant(dtypes.bfloat16))]
