"""Attention backward: the launches around kernels_cu/backward_sm80.cu, and the workspace between them.

    backward_delta   a number or two of every query row
    backward_sm80    with the keys held: dk, dv, and dq summed in float32 by atomics. Hopper has a kernel of its own for
                     this step, backward_sm90 (`backward_sm90.why_not` says for which calls it has not)
    backward_cast    dq of that sum, and what dsink needs of every row
    backward_sum     dsink, where it is wanted

That is five matrix products, and a dq whose last bits differ from run to run. For a deterministic call, where the
slopes' gradient is wanted, and in TWO_KERNELS, it is seven:

    backward_delta   as above
    backward_sm80    with the keys held: dk and dv; with the queries held: dq, and what dsink and the slopes' gradient
                     need. Scores are computed in both, so that each gradient is summed by the block that owns it: no
                     atomics, the same bits every time
    backward_sum     dsink and the slopes' gradient, where they are wanted

As in `forward`, what is compiled depends on `BackwardVariant` alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import dtypes
from ..arch import Arch
from ..array import TensorView
from ..dtypes import DType
from ..jit import layout, module
from ..trace import emit_c
from ..trace.expr import Mods
from . import backward_sm90, forward, order
from .forward import Strides


@dataclass(frozen=True, slots=True)
class BackwardProblem:
    """A backward call without its pointers: the fields of `ForwardProblem`, and those of the gradients.

    load_bytes       16, 4 or 2: what divides bases, strides and rows of q, k, v, out, dout, dq, dk and dv, all of them
    dlse             the gradient of lse is given (contiguous, as lse itself)
    dsink, dslopes   are wanted
    dcaptured        (slot, size) of the captured arrays whose gradients are
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
    dcaptured: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows of the side a block holds, rows of the tiles it moves over, warps; and the blocks that share the columns of
    dk and dv, where one has not registers enough for all."""

    held: int
    moved: int
    warps: int
    slices: int = 1


# (bytes an element, head-dim class) -> tile. Shared memory: two held tiles, three moved ones; where dq is accumulated
# also dS, one row for each that is held. All fit 99 KB.
TILES: dict[tuple[int, int], Tile] = {
    (2, 32): Tile(128, 64, 8),  # 28 KB and 16
    (2, 64): Tile(128, 64, 8),  # 56 KB and 16
    (2, 96): Tile(128, 32, 8),  # 66 KB and 8
    (2, 128): Tile(128, 32, 8),  # 88 KB and 8
    (2, 192): Tile(64, 16, 4, slices=3),  # 66 KB and 4
    (2, 256): Tile(64, 16, 4, slices=2),  # 88 KB and 4
    (4, 32): Tile(64, 32, 4),  # 28 KB and 8
    (4, 64): Tile(64, 16, 4),  # 44 KB and 8
    (4, 96): Tile(64, 16, 4),  # 66 KB and 8
    (4, 128): Tile(64, 16, 4),  # 88 KB and 8
    (4, 192): Tile(32, 16, 2, slices=2),  # 84 KB and 4
    (4, 256): Tile(16, 16, 1, slices=4),  # 80 KB and 2
}
# The same where loads are narrower than 16 bytes and these would spill.
NARROW_TILES: dict[tuple[int, int], Tile] = {
    (2, 128): Tile(128, 16, 8),  # 76 KB and 8; 128 x 32 spills on compute capability 10.0
    (2, 256): Tile(64, 16, 4, slices=4),  # 88 KB and 4; two slices spill there with NVRTC 13.0
}
# The same where two kernels compute, which they do where bits are to be the same every time.
DETERMINISTIC_TILES: dict[tuple[int, int], Tile] = {
    (2, 64): Tile(128, 32, 8),  # 48 KB; 128 x 64 spills on compute capability 12.0
}
# The same for a mask_mod alone and for a score_mod, whose terms take registers.
MASK_TILES: dict[tuple[int, int], Tile] = {
    (2, 128): Tile(128, 16, 8),
}
SCORE_TILES: dict[tuple[int, int], Tile] = MASK_TILES | {
    (2, 64): Tile(128, 32, 8),
}
# The same where dq is accumulated and weights are dropped.
DROPOUT_TILES: dict[tuple[int, int], Tile] = {
    (2, 128): Tile(128, 16, 8),  # 76 KB and 8; 128 x 32 spills on compute capability 9.0
}
# Rows of TILES that are always computed by two kernels: with dq too, one would spill, or compute scores twice.
TWO_KERNELS = {(4, 128)}


@dataclass(frozen=True, slots=True)
class BackwardVariant:
    """All that the main kernels' machine code depends on, beside the architecture."""

    element: DType
    head_dim: int
    head_dim_v: int
    tile: Tile
    load_bytes: int
    keys_held: bool
    accumulate_dq: bool
    dropout: bool = False
    fixed_sums: bool = False  # of the gradients of captured arrays
    mods: str = emit_c.NO_MODS

    @property
    def smem_bytes(self) -> int:
        tile, row, itemsize = self.tile, self.head_dim + self.head_dim_v, self.element.itemsize
        rows = tile.held * row + tile.moved * (row + self.head_dim)
        # With keys held, lse and delta of the moved queries besides, in two stages.
        stats = 16 * tile.moved if self.keys_held else 0
        scores = tile.held * max(tile.moved * itemsize, 64 if itemsize == 2 else 128) if self.accumulate_dq else 0
        # What mods need of the rows moved over, likewise.
        terms = 8 * tile.moved * emit_c.staged(self.mods)[0 if self.keys_held else 1]
        return rows * itemsize + stats + scores + terms

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
            "kAccumulateDq": self.accumulate_dq,
            "kDropout": self.dropout,
            "kFixedSums": self.fixed_sums,
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
class CastVariant:
    """All that backward_cast depends on. dq_order: how the sums lie, see backward_cast.cu."""

    element: DType
    head_dim: int
    load_bytes: int
    dq_order: int = 0

    @property
    def smem_bytes(self) -> int:
        return CAST_ROWS * self.head_dim * self.element.itemsize

    def members(self) -> dict[str, str | int | bool]:
        return {
            "Element": self.element.element,
            "kHeadDim": self.head_dim,
            "kRows": CAST_ROWS,
            "kThreads": CAST_THREADS,
            "kLoadBytes": self.load_bytes,
            "kDqOrder": self.dq_order,
        }


@dataclass(frozen=True, slots=True)
class SumVariant:
    """All that backward_sum depends on. held, warps: of the blocks that wrote the partial sums."""

    element: DType
    held: int
    warps: int

    def members(self) -> dict[str, str | int | bool]:
        packed = dtypes.float16 if self.element is dtypes.float32 else self.element
        return {
            "Element": self.element.element,
            "Packed": packed.element,
            "kHeld": self.held,
            "kWarps": self.warps,
        }


@dataclass(frozen=True, slots=True)
class CapturedGradientVariant:
    """All that captured_gradient depends on."""

    element: DType
    clear: bool
    fixed: bool

    def members(self) -> dict[str, str | int | bool]:
        packed = dtypes.float16 if self.element is dtypes.float32 else self.element
        return {
            "Element": self.element.element,
            "Packed": packed.element,
            "kThreads": GRADIENT_THREADS,
            "kClear": self.clear,
            "kFixed": self.fixed,
        }


DELTA_THREADS = 128
GRADIENT_THREADS = 256
CAST_THREADS = 128
CAST_ROWS = CAST_THREADS // 2  # of a block: a warp has 16


def choose_variants(
    dtype: DType,
    head_dim: int,
    head_dim_v: int,
    load_bytes: int,
    *,
    deterministic: bool,
    dropout: bool = False,
    mods: Mods | None = None,
    dcaptured: tuple[int, ...] = (),
    fixed_sums: bool = False,
) -> tuple[BackwardVariant, ...]:
    """The main kernels for a dtype, head dims, alignment, and dropout or none: one that holds the keys and accumulates
    dq; where deterministic and in TWO_KERNELS, one that holds the keys and one that holds the queries. Nothing else
    enters.
    """
    d, d_v = forward.head_dim_class(head_dim), forward.head_dim_class(head_dim_v)
    row = dtype.itemsize, max(d, d_v)
    accumulate = not deterministic and row not in TWO_KERNELS
    tile = NARROW_TILES.get(row, TILES[row]) if load_bytes < 16 else TILES[row]
    if not accumulate:
        tile = DETERMINISTIC_TILES.get(row, tile)
    elif dropout:
        tile = DROPOUT_TILES.get(row, tile)
    if mods is not None:
        tile = (MASK_TILES if mods.score is None else SCORE_TILES).get(row, tile)
    load_bytes = max(load_bytes, min(dtype.itemsize, 4))
    # (keys held, dq accumulated)
    sides = ((True, True),) if accumulate else ((True, False), (False, False))
    texts = {True: emit_c.NO_MODS, False: emit_c.NO_MODS}  # by whether keys are held
    if mods is not None:
        texts = {held: emit_c.mods_text(mods, backward=True, wanted=dcaptured if held else ()) for held in texts}
    return tuple(
        BackwardVariant(dtype, d, d_v, tile, load_bytes, *side, dropout, fixed_sums and side[0], texts[side[0]])
        for side in sides
    )


@functools.cache
def kernel_spec(
    variant: BackwardVariant | DeltaVariant | CastVariant | SumVariant | CapturedGradientVariant,
) -> module.KernelSpec:
    """Where a variant's kernel is written and how a block of it is launched."""
    match variant:
        case CapturedGradientVariant():
            return module.KernelSpec(
                source="captured_gradient.cu",
                entry="cuflash_captured_gradient",
                params="CapturedGradientParams",
                variant=variant,
                threads=GRADIENT_THREADS,
                smem_bytes=0,
            )
        case BackwardVariant():
            source, name, threads, smem = "backward_sm80.cu", "sm80", 32 * variant.tile.warps, variant.smem_bytes
        case DeltaVariant():
            source, name, threads, smem = "backward_delta.cu", "delta", DELTA_THREADS, 0
        case CastVariant():
            source, name, threads, smem = "backward_cast.cu", "cast", CAST_THREADS, variant.smem_bytes
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
    "dq_accum", "sink_partials", "slope_partials", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k",
    "alibi_slopes", "sink", "seed", "offset",
)  # fmt: skip
_WRITTEN = (
    "dq", "dk", "dv", "dsink", "dslopes", "lse_base2", "delta", "dq_accum", "sink_partials", "slope_partials",
    *(f"{name}{slot}" for name in ("dcaptured", "sums") for slot in range(emit_c.WORDS)),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Step:
    """One launch: its kernel, its grid, and the params that are no pointers, packed behind them."""

    spec: module.KernelSpec
    grid: tuple[int, int, int]
    why: str
    values: tuple[Any, ...]
    order: order.Order


def choose_order(p: BackwardProblem, arch: Arch, variant: Any, grid: order.Grid) -> order.Order:
    """Of a step's grid. Blocks of the main kernels hold keys and read the queries of all heads that share them, or hold
    queries and read keys; those of the other kernels have equally much to do."""
    if not isinstance(variant, BackwardVariant):
        return order.Order(heads=max(grid[1], 1))
    group, row_bytes = p.heads_q // max(p.heads_kv, 1), (p.head_dim + p.head_dim_v) * p.dtype.itemsize
    window = (p.window[1], p.window[0]) if variant.keys_held else p.window
    rows = p.q_rows if variant.keys_held else p.k_rows
    rows = order.rows_together(rows // max(p.batch, 1) if p.packed else rows, window, variant.tile.held)
    return order.choose(
        grid,
        arch,
        wanted=None,
        alike=forward.are_alike(p) and not p.packed,
        masked=p.mods is not None and p.mods.mask is not None,
        window=window,
        heads_together=variant.tile.slices if variant.keys_held else group,
        bytes_together=rows * row_bytes * (group if variant.keys_held else 1),
        threads=32 * variant.tile.warps,
    )


class BackwardPlan:
    """A problem made ready for an architecture: the launches in order, and the workspace between them.

    workspace   name -> (shape, dtype) of arrays that the caller allocates, their contents arbitrary
    """

    def __init__(self, problem: BackwardProblem, arch: Arch) -> None:
        p = self.problem = problem
        self.arch = arch
        # The gradient of a slope is summed over the queries of one head, which blocks that hold queries do as they go.
        two_kernels = p.deterministic or p.dslopes
        self.fallback = backward_sm90.why_not(p, arch)
        keys: BackwardVariant | backward_sm90.BackwardSm90Variant
        queries: list[BackwardVariant] = []
        self._maps: backward_sm90.TensorMaps | None = None
        if self.fallback:
            keys, *queries = choose_variants(
                p.dtype,
                p.head_dim,
                p.head_dim_v,
                p.load_bytes,
                deterministic=two_kernels,
                dropout=p.dropout_p > 0,
                mods=p.mods,
                dcaptured=tuple(slot for slot, _ in p.dcaptured),
                fixed_sums=p.deterministic and bool(p.dcaptured),
            )
            block_k, slices, dq_order = keys.tile.held, keys.tile.slices, 0
        else:
            keys = backward_sm90.choose_for(p)
            block_k, slices, dq_order = keys.tile.block_k, 1, keys.dq_order
            self._maps = backward_sm90.TensorMaps(p, keys)
        cast = CastVariant(p.dtype, keys.head_dim, keys.load_bytes, dq_order)
        sums = p.dsink or p.dslopes
        held, warps = (queries[0].tile.held, queries[0].tile.warps) if queries else (CAST_ROWS, CAST_THREADS // 32)
        slots = forward.slots_of(packed=p.packed, batch=p.batch, rows=p.q_rows, block=held)
        partials = slots * warps if sums else 0
        rows = (p.heads_q, p.q_rows) if p.packed else (p.batch, p.heads_q, p.q_rows)
        self.workspace: dict[str, tuple[tuple[int, ...], DType]] = {
            "lse_base2": (rows, dtypes.float32),
            "delta": (rows, dtypes.float32),
        }
        for name, wanted in (("sink_partials", p.dsink), ("slope_partials", p.dslopes)):
            if wanted:
                self.workspace[name] = (p.heads_q, partials), dtypes.float32
        dq_blocks = dq_accum_units = 0
        if keys.accumulate_dq:
            dq_blocks = forward.slots_of(packed=p.packed, batch=p.batch, rows=p.q_rows, block=16)
            shape = (p.heads_q, dq_blocks, keys.head_dim // 8, 4, 32)
            self.workspace["dq_accum"] = shape, dtypes.float32
            dq_accum_units = math.prod(shape) // 4

        values = (
            forward.strides_of(p, "q", "k", "v", "out", "dout", "dq", "dk", "dv")
            | forward.score_values(p)
            | {"heads_q": p.heads_q, "partials": partials, "dq_blocks": dq_blocks, "dq_accum_units": dq_accum_units}
            | {"scale": p.scale}
        )
        names = [*values, "packed_grid", "order"]
        fields = (*POINTERS, "seed_value", "offset_value", "captured", *names)
        self._pack = layout.load("BackwardParams").packer(*fields)
        if self._maps is not None:
            self._natural_scale = p.scale if values["raw_scores"] else 1.0
            self._pack_with_maps = layout.load(backward_sm90.PARAMS).packer(*fields, *backward_sm90.FIELDS)
        self._captured = forward.Captured(p.mods)

        def step(variant: Any, grid: order.Grid, slots: bool, why: str) -> Step:
            spec_of = backward_sm90.kernel_spec if variant is keys and self._maps is not None else kernel_spec
            chosen = choose_order(p, arch, variant, grid)
            return Step(spec_of(variant), grid, why, (*values.values(), int(slots), chosen.packed()), chosen)

        def step_over(variant: Any, rows: int, longest: int | None, heads: int, block: int) -> Step:
            return step(
                variant,
                *forward.choose_grid(
                    packed=p.packed, batch=p.batch, rows=rows, longest=longest, heads=heads, block=block
                ),
            )

        self.gradients = [CapturedGradient(p, slot, size) for slot, size in p.dcaptured]
        for gradient in self.gradients:
            self.workspace |= gradient.workspace

        delta = DeltaVariant(p.dtype, keys.head_dim_v, keys.load_bytes)
        unit_lanes = 8 if delta.head_dim_v * p.dtype.itemsize % 128 == 0 else 4
        blocks = -(-p.q_rows // (DELTA_THREADS // unit_lanes))
        # Where q is empty there may still be partial sums to clear.
        grid = (max(blocks, int(sums)), p.heads_q, 1 if p.packed else min(p.batch, forward.MAX_HEADS))
        self.steps = [
            step(delta, grid, False, "query rows"),
            # A block of Hopper's kernel has one tile: no hint may leave it more.
            step_over(keys, p.k_rows, p.max_seqlen_k if self._maps is None else None, p.heads_kv * slices, block_k),
        ]
        for variant, block in [(side, side.tile.held) for side in queries] or [(cast, CAST_ROWS)]:
            self.steps.append(step_over(variant, p.q_rows, p.max_seqlen_q, p.heads_q, block))
        if sums:
            sequences = min(p.batch, forward.MAX_HEADS) if p.dslopes and p.alibi == "batch" else 1
            grid = (p.heads_q, max(sequences, 1), 1)
            self.steps.append(step(SumVariant(p.dtype, held, warps), grid, False, "(head, sequence)"))

    @property
    def specs(self) -> tuple[module.KernelSpec, ...]:
        """The kernels a launch runs."""
        gradients = [spec for gradient in self.gradients for spec in gradient.specs]
        return (*(step.spec for step in self.steps), *gradients)

    def described(self) -> tuple[module.KernelSpec, tuple[int, int, int], list[str]]:
        """For people: the spec and grid of the kernel that computes dk and dv, and a line for each launch and for what
        decided between them."""
        lines = []
        for step in self.steps:
            name, held = step.spec.source.removesuffix(".cu"), ""
            if isinstance(step.spec.variant, BackwardVariant | backward_sm90.BackwardSm90Variant):
                by_keys = not isinstance(step.spec.variant, BackwardVariant) or step.spec.variant.keys_held
                held = " with the keys held" if by_keys else " with the queries held"
                held += ", dq added up by atomics" * step.spec.variant.accumulate_dq
            x, y, z = step.grid
            first = f"; {step.order}" if step.order.pairs else ""
            lines.append(f"{name}{held}: {x} x {y} x {z} blocks, {step.why}{first}")
        if self.arch.name == "sm_90a" and self.fallback:
            lines.append(f"kernel: backward_sm80 and not backward_sm90, for {self.fallback}")
        apart = "dq is computed apart, in seven matrix products instead of five, the same bits every time"
        keys = self.steps[1]
        if "dq_accum" in self.workspace:
            lines.append("deterministic=False: five matrix products; the last bits of dq differ from run to run")
        elif self.problem.deterministic:
            lines.append(f"deterministic=True: {apart}")
        elif self.problem.dslopes:
            lines.append(f"the gradient of alibi_slopes is wanted: {apart}")
        else:
            lines.append(f"registers are too few for {self.problem.dtype.name} with head dim 128: {apart}")
        return keys.spec, keys.grid, lines

    @property
    def workspace_bytes(self) -> int:
        return sum(dtype.itemsize * math.prod(shape) for shape, dtype in self.workspace.values())

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

        arrays: all of POINTERS that the problem has, the workspace among them; "captured<slot>" and "dcaptured<slot>".
        scalars: numbers that the mods captured.
        """
        pointers = [arrays[name].ptr if name in arrays else 0 for name in POINTERS]
        buffers = forward.buffers_of(arrays, _WRITTEN) if backend == "emulator" else ()
        captured = self._captured.pack(arrays, scalars)
        where = dict(arch=self.arch, backend=backend, device=device, stream=stream, buffers=buffers)
        for gradient in self.gradients:
            gradient.clear(arrays, **where)
        for step in self.steps:
            if step.grid[0] == 0:
                continue
            given = (*pointers, seed % 2**64, offset % 2**32, captured, *step.values)
            if self._maps is not None and step.spec.params == backward_sm90.PARAMS:
                maps = self._maps(backend, device, *(arrays[name].ptr for name in ("q", "k", "v", "dout")))
                params = self._pack_with_maps(*given, *maps, self._natural_scale)
            else:
                params = self._pack(*given)
            kernel = module.load(step.spec, self.arch, backend, device)
            kernel.launch(step.grid, params, stream=stream, buffers=buffers)
        for gradient in self.gradients:
            gradient.finish(arrays, **where)


class CapturedGradient:
    """The gradient of one captured array: sums that are cleared before the backward and brought to its dtype after it.

    Where they are float32 and so is the array, they are the gradient itself, "dcaptured<slot>".
    """

    def __init__(self, problem: BackwardProblem, slot: int, size: int) -> None:
        assert problem.mods is not None
        dtype = problem.mods.arrays[slot].dtype
        fixed = problem.deterministic
        self.size = size
        self.out = f"dcaptured{slot}"
        self.sums = f"sums{slot}" if fixed or dtype is not dtypes.float32 else self.out
        self.workspace: dict[str, tuple[tuple[int, ...], DType]] = {}
        if self.sums != self.out:
            self.workspace[self.sums] = ((size, 3), dtypes.uint64) if fixed else ((size,), dtypes.float32)
        self.specs = [kernel_spec(CapturedGradientVariant(dtype, True, fixed))]
        if self.sums != self.out:
            self.specs.append(kernel_spec(CapturedGradientVariant(dtype, False, fixed)))
        self._pack = layout.load("CapturedGradientParams").packer("sums", "out", "size")

    def clear(self, arrays: Mapping[str, TensorView], **where: Any) -> None:
        self._launch(self.specs[0], arrays[self.sums].ptr, 0, **where)

    def finish(self, arrays: Mapping[str, TensorView], **where: Any) -> None:
        for spec in self.specs[1:]:
            self._launch(spec, arrays[self.sums].ptr, arrays[self.out].ptr, **where)

    def _launch(
        self, spec: module.KernelSpec, sums: int, out: int, *, arch: Arch, backend: str, device: int | None,
        stream: int | None, buffers: Sequence[module.Buffer],
    ) -> None:  # fmt: skip
        blocks = min(-(-self.size // GRADIENT_THREADS), 1024)
        kernel = module.load(spec, arch, backend, device)
        kernel.launch((blocks, 1, 1), self._pack(sums, out, self.size), stream=stream, buffers=buffers)


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
        for deterministic in (True, False):
            chosen = choose_variants(dtype, d, d_v, load_bytes, deterministic=deterministic, dropout=dropout)
            specs += [kernel_spec(variant) for variant in chosen]
    for dtype in dtypes.KERNEL:
        specs.append(kernel_spec(DeltaVariant(dtype, 128, 16)))
        specs.append(kernel_spec(SumVariant(dtype, CAST_ROWS, CAST_THREADS // 32)))
        specs += [kernel_spec(CastVariant(dtype, d, 16)) for d in (64, 256)]
        specs += [
            kernel_spec(CapturedGradientVariant(dtype, clear, fixed)) for clear, fixed in ((True, True), (False, False))
        ]
    specs.append(kernel_spec(CapturedGradientVariant(dtypes.float32, False, True)))
    specs.append(kernel_spec(CastVariant(dtypes.float16, 256, 2)))
    return specs
