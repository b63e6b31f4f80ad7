"""Attention backward: three launches around kernels_cu/backward_sm80.cu, and the workspace between them.

    backward_delta   a number or two of every query row
    backward_sm80    with the keys held: dk and dv; with the queries held: dq. Scores are computed in both, so that each
                     gradient is summed by the block that owns it: no atomics, the same bits every time
    backward_sum     dsink and the slopes' gradient, where they are wanted

As in `forward`, what is compiled depends on `BackwardVariant` alone.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import dtypes
from ..arch import Arch
from ..array import TensorView
from ..dtypes import DType
from ..jit import layout, module
from ..trace.expr import Mods
from . import forward
from .forward import Strides


@dataclass(frozen=True, slots=True)
class BackwardProblem:
    """A backward call without its pointers: the fields of `ForwardProblem`, and those of the gradients.

    load_bytes       16, 4 or 2: what bases and strides of q, k, v, out, dout, dq, dk and dv are all aligned to
    dlse             the gradient of lse is given (contiguous, as lse itself)
    dsink, dslopes   are wanted
    """

    dtype: DType
    batch: int
    packed: bool
    q_rows: int
    k_rows: int
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    heads_q: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    q_strides: Strides
    k_strides: Strides
    v_strides: Strides
    out_strides: Strides
    dout_strides: Strides
    dq_strides: Strides
    dk_strides: Strides
    dv_strides: Strides
    load_bytes: int
    scale: float
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    seqused_q: bool = False
    seqused_k: bool = False
    alibi: str | None = None
    sink: str | None = None
    dlse: bool = False
    dsink: bool = False
    dslopes: bool = False
    deterministic: bool = False
    dropout_p: float = 0.0
    seed: DType | None = None
    mods: Mods | None = None


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows of the side a block holds, rows of the tiles it moves over, warps; and the blocks that share the columns of
    dk and dv, where one has not registers enough for all."""

    held: int
    moved: int
    warps: int
    slices: int = 1


# (bytes an element, head-dim class) -> tile. Shared memory: two held tiles, three moved ones; all fit 99 KB.
TILES: dict[tuple[int, int], Tile] = {
    (2, 32): Tile(128, 64, 8),  # 28 KB
    (2, 64): Tile(128, 64, 8),  # 56 KB
    (2, 96): Tile(128, 32, 8),  # 66 KB
    (2, 128): Tile(128, 32, 8),  # 88 KB
    (2, 192): Tile(64, 16, 4, slices=3),  # 66 KB
    (2, 256): Tile(64, 16, 4, slices=2),  # 88 KB
    (4, 32): Tile(64, 32, 4),  # 28 KB
    (4, 64): Tile(64, 16, 4),  # 44 KB
    (4, 96): Tile(64, 16, 4),  # 66 KB
    (4, 128): Tile(64, 16, 4),  # 88 KB
    (4, 192): Tile(32, 16, 2, slices=2),  # 84 KB
    (4, 256): Tile(16, 16, 1, slices=4),  # 80 KB
}
# The same where rows are not aligned to 16 bytes and these would spill.
NARROW_TILES: dict[tuple[int, int], Tile] = {
    (2, 128): Tile(128, 16, 8),  # 76 KB; 128 x 32 spills on compute capability 10.0
}


@dataclass(frozen=True, slots=True)
class BackwardVariant:
    """All that the two main kernels' machine code depends on, beside the architecture."""

    element: DType
    head_dim: int
    head_dim_v: int
    tile: Tile
    load_bytes: int
    keys_held: bool
    dropout: bool = False

    @property
    def smem_bytes(self) -> int:
        tile, row = self.tile, self.head_dim + self.head_dim_v
        rows = tile.held * row + tile.moved * (row + self.head_dim)
        # With keys held, lse and delta of the moved queries besides, in two stages.
        return rows * self.element.itemsize + (16 * tile.moved if self.keys_held else 0)

    def members(self) -> dict[str, str | int | bool]:
        return {
            "Element": self.element.element,
            "kHeadDim": self.head_dim,
            "kHeadDimV": self.head_dim_v,
            "kHeld": self.tile.held,
            "kMoved": self.tile.moved,
            "kThreads": 32 * self.tile.warps,
            "kSlices": self.tile.slices if self.keys_held else 1,
            "kLoadBytes": self.load_bytes,
            "kSharedBytes": self.smem_bytes,
            "kKeysHeld": self.keys_held,
            "kDropout": self.dropout,
        }


@dataclass(frozen=True, slots=True)
class DeltaVariant:
    """All that backward_delta depends on."""

    element: DType
    head_dim_v: int
    load_bytes: int

    def members(self) -> dict[str, str | int | bool]:
        return {
            "Element": self.element.element,
            "kHeadDimV": self.head_dim_v,
            "kThreads": DELTA_THREADS,
            "kLoadBytes": self.load_bytes,
        }


@dataclass(frozen=True, slots=True)
class SumVariant:
    """All that backward_sum depends on."""

    element: DType
    tile: Tile

    def members(self) -> dict[str, str | int | bool]:
        packed = dtypes.float16 if self.element is dtypes.float32 else self.element
        return {
            "Element": self.element.element,
            "Packed": packed.element,
            "kHeld": self.tile.held,
            "kWarps": self.tile.warps,
        }


DELTA_THREADS = 128


def choose_variants(
    dtype: DType, head_dim: int, head_dim_v: int, load_bytes: int, *, dropout: bool = False
) -> tuple[BackwardVariant, BackwardVariant]:
    """(keys held, queries held) for a dtype, head dims, alignment, and dropout or none. Nothing else enters."""
    d, d_v = forward.head_dim_class(head_dim), forward.head_dim_class(head_dim_v)
    row = dtype.itemsize, max(d, d_v)
    tile = NARROW_TILES.get(row, TILES[row]) if load_bytes < 16 else TILES[row]
    load_bytes = max(load_bytes, min(dtype.itemsize, 4))
    keys, queries = (BackwardVariant(dtype, d, d_v, tile, load_bytes, held, dropout) for held in (True, False))
    return keys, queries


@functools.cache
def kernel_spec(variant: BackwardVariant | DeltaVariant | SumVariant) -> module.KernelSpec:
    """Where a variant's kernel is written and how a block of it is launched."""
    match variant:
        case BackwardVariant():
            source, name, threads, smem = "backward_sm80.cu", "sm80", 32 * variant.tile.warps, variant.smem_bytes
        case DeltaVariant():
            source, name, threads, smem = "backward_delta.cu", "delta", DELTA_THREADS, 0
        case SumVariant():
            source, name, threads, smem = "backward_sum.cu", "sum", 32, 0
    return module.KernelSpec(
        source=source,
        entry=f"cuflash_backward_{name}",
        params="BackwardParams",
        variant=variant,
        threads=threads,
        smem_bytes=smem,
    )


# Pointers of BackwardParams and the name of the array each is taken from.
POINTERS = (
    "q", "k", "v", "out", "dout", "lse", "dlse", "dq", "dk", "dv", "dsink", "dslopes", "lse_base2", "delta",
    "sink_partials", "slope_partials", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "alibi_slopes", "sink",
    "seed", "offset",
)  # fmt: skip
_WRITTEN = (
    "dq", "dk", "dv", "dsink", "dslopes", "lse_base2", "delta", "sink_partials", "slope_partials",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Step:
    """One launch: its kernel, its grid, and the params that are no pointers, packed behind them."""

    spec: module.KernelSpec
    grid: tuple[int, int, int]
    why: str
    values: tuple[Any, ...]


class BackwardPlan:
    """A problem made ready for an architecture: the launches in order, and the workspace between them.

    workspace   name -> (shape, dtype) of arrays that the caller allocates, their contents arbitrary
    """

    def __init__(self, problem: BackwardProblem, arch: Arch) -> None:
        p = self.problem = problem
        self.arch = arch
        keys, queries = choose_variants(p.dtype, p.head_dim, p.head_dim_v, p.load_bytes, dropout=p.dropout_p > 0)
        tile = queries.tile
        slots = forward.slots_of(packed=p.packed, batch=p.batch, rows=p.q_rows, block=tile.held)
        sums = p.dsink or p.dslopes
        partials = slots * tile.warps if sums else 0
        rows = (p.heads_q, p.q_rows) if p.packed else (p.batch, p.heads_q, p.q_rows)
        self.workspace: dict[str, tuple[tuple[int, ...], DType]] = {
            "lse_base2": (rows, dtypes.float32),
            "delta": (rows, dtypes.float32),
        }
        for name, wanted in (("sink_partials", p.dsink), ("slope_partials", p.dslopes)):
            if wanted:
                self.workspace[name] = (p.heads_q, partials), dtypes.float32

        values = (
            forward.strides_of(p, "q", "k", "v", "out", "dout", "dq", "dk", "dv")
            | forward.score_values(p)
            | {"heads_q": p.heads_q, "partials": partials, "scale": p.scale}
        )
        names = [*values, "packed_grid"]
        self._pack = layout.load("BackwardParams").packer(*POINTERS, "seed_value", "offset_value", "captured", *names)
        self._captured = forward.Captured(p.mods)

        def step(variant: Any, grid: tuple[int, int, int], slots: bool, why: str) -> Step:
            return Step(kernel_spec(variant), grid, why, (*values.values(), int(slots)))

        delta = DeltaVariant(p.dtype, keys.head_dim_v, keys.load_bytes)
        unit_lanes = 8 if delta.head_dim_v * p.dtype.itemsize % 128 == 0 else 4
        blocks = -(-p.q_rows // (DELTA_THREADS // unit_lanes))
        # Where q is empty there may still be partial sums to clear.
        grid = (max(blocks, int(sums)), p.heads_q, 1 if p.packed else min(p.batch, forward.MAX_HEADS))
        self.steps = [step(delta, grid, False, "query rows")]
        sides = (
            (keys, p.k_rows, p.max_seqlen_k, p.heads_kv * keys.tile.slices),
            (queries, p.q_rows, p.max_seqlen_q, p.heads_q),
        )
        for variant, side_rows, longest, heads in sides:
            chosen = forward.choose_grid(
                packed=p.packed, batch=p.batch, rows=side_rows, longest=longest, heads=heads, block=tile.held
            )
            self.steps.append(step(variant, *chosen))
        if sums:
            sequences = min(p.batch, forward.MAX_HEADS) if p.dslopes and p.alibi == "batch" else 1
            grid = (p.heads_q, max(sequences, 1), 1)
            self.steps.append(step(SumVariant(p.dtype, tile), grid, False, "(head, sequence)"))

    @property
    def specs(self) -> tuple[module.KernelSpec, ...]:
        """The kernels a launch runs."""
        return tuple(step.spec for step in self.steps)

    def described(self) -> tuple[module.KernelSpec, tuple[int, int, int], list[str]]:
        """For people: the spec and grid of the kernel that computes dk and dv, and a line for each launch."""
        lines = []
        for step in self.steps:
            name, held = step.spec.source.removesuffix(".cu"), ""
            if isinstance(step.spec.variant, BackwardVariant):
                held = " with the keys held" if step.spec.variant.keys_held else " with the queries held"
            x, y, z = step.grid
            lines.append(f"{name}{held}: {x} x {y} x {z} blocks, {step.why}")
        keys = self.steps[1]
        return keys.spec, keys.grid, lines

    @property
    def workspace_bytes(self) -> int:
        sizes = [dtype.itemsize * functools.reduce(int.__mul__, shape, 1) for shape, dtype in self.workspace.values()]
        return sum(sizes)

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
    ) -> None:
        """Computes dq, dk, dv (and dsink, dslopes where the problem wants them) in place.

        arrays: all of POINTERS that the problem has, the workspace among them.
        """
        pointers = [arrays[name].ptr if name in arrays else 0 for name in POINTERS]
        buffers = forward.buffers_of(arrays, _WRITTEN) if backend == "emulator" else ()
        captured = self._captured.pack(arrays, scalars)
        for step in self.steps:
            params = self._pack(*pointers, seed % 2**64, offset % 2**32, captured, *step.values)
            kernel = module.load(step.spec, self.arch, backend, device)
            kernel.launch(step.grid, params, stream=stream, buffers=buffers)


@functools.lru_cache(maxsize=4096)
def plan(problem: BackwardProblem, arch: Arch) -> BackwardPlan:
    """The plan of a problem. Compiles nothing: the first launch does."""
    forward.require_counts(problem)
    return BackwardPlan(problem, arch)


def representative(arch: Arch) -> list[module.KernelSpec]:
    """Variants that between them compile every line of every tile: each dtype and class, each load width, d != d_v."""
    calls: list[tuple[DType, int, int, int, bool]] = [
        (dtype, d, d, 16, False)
        for dtype in (dtypes.bfloat16, dtypes.float16, dtypes.float32)
        for d in forward.HEAD_DIM_CLASSES
    ]
    calls += [
        (dtypes.bfloat16, 64, 64, 4, False),
        (dtypes.float16, 128, 128, 2, False),
        (dtypes.bfloat16, 256, 256, 2, False),
        (dtypes.float32, 128, 128, 4, False),
        (dtypes.bfloat16, 192, 128, 16, False),
        (dtypes.float16, 64, 256, 16, False),
        *((dtypes.float16, d, d, 16, True) for d in forward.HEAD_DIM_CLASSES),
        (dtypes.float32, 64, 64, 16, True),
    ]
    specs = []
    for dtype, d, d_v, load_bytes, dropout in calls:
        specs += [kernel_spec(v) for v in choose_variants(dtype, d, d_v, load_bytes, dropout=dropout)]
    for dtype in dtypes.KERNEL:
        specs.append(kernel_spec(DeltaVariant(dtype, 128, 16)))
        specs.append(kernel_spec(SumVariant(dtype, TILES[dtype.itemsize, 64])))
    return specs
