"""Before attention to a cache: new keys into it, queries rotated. The host half of kernels_cu/append_kv.cu."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from .. import dtypes
from ..arch import GRID_LIMITS, Arch
from ..array import TensorView
from ..dtypes import DType
from ..errors import UnsupportedError
from ..jit import layout, module
from .forward import Strides, buffers_of, strides_of

THREADS = 128


@dataclass(frozen=True, slots=True)
class AppendProblem:
    """An append without its pointers.

    new_rows, q_rows  dense: of every sequence; packed: in all. new_rows 0: nothing is appended
    page_size    of the cache, [pages, page_size, heads_kv, d]; of one in one piece the room of a sequence
    max_pages    entries of a sequence in page_table, int32 [batch, max_pages]; 1 where page b is sequence b's
    load_bytes   16, 4 or 2: what divides bases, strides and rows of all arrays
    rotary_dim   0: nothing is rotated, and there is no q
    advance      whether query i is rotated to its sequence's start + i, or all to the start
    tables       dtype of cos and sin; their strides count elements, from row to row
    """

    dtype: DType
    batch: int
    new_rows: int
    packed_new: bool
    q_rows: int
    packed_q: bool
    heads_q: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    k_strides: Strides
    v_strides: Strides
    k_cache_strides: Strides
    v_cache_strides: Strides
    q_strides: Strides
    q_rotated_strides: Strides
    load_bytes: int
    page_size: int
    max_pages: int = 1
    page_table_stride: int = 0
    rotary_dim: int = 0
    interleaved: bool = True
    advance: bool = True
    tables: DType = dtypes.float32
    cos_stride: int = 0
    sin_stride: int = 0


@dataclass(frozen=True, slots=True)
class AppendVariant:
    """All that the machine code depends on, beside the architecture."""

    element: DType
    load_bytes: int

    def members(self) -> dict[str, str | int | bool]:
        return {"Element": self.element.element, "kLoadBytes": self.load_bytes, "kThreads": THREADS}


@functools.cache
def kernel_spec(variant: AppendVariant) -> module.KernelSpec:
    return module.KernelSpec("append_kv.cu", "cuflash_append_kv", "AppendParams", variant, THREADS, 0)


POINTERS = (
    "k", "v", "k_cache", "v_cache", "q", "q_rotated", "rotary_cos", "rotary_sin", "cache_seqlens", "rotary_seqlens",
    "cu_seqlens_q", "cu_seqlens_k_new", "page_table", "cache_leftpad", "seqused_k", "pages",
)  # fmt: skip
WRITTEN = ("k_cache", "v_cache", "q_rotated", "seqused_k", "pages")
_ARRAYS = ("k", "v", "k_cache", "v_cache", "q", "q_rotated")


class AppendPlan:
    """A problem made ready for an architecture: kernel, grid, and all params but the pointers and one length."""

    def __init__(self, problem: AppendProblem, arch: Arch) -> None:
        p, self.problem, self.arch = problem, problem, arch
        if p.batch > GRID_LIMITS[2]:
            raise UnsupportedError(f"batch={p.batch} must be at most {GRID_LIMITS[2]}: split the batch")
        self.spec = kernel_spec(AppendVariant(p.dtype, max(p.load_bytes, min(p.dtype.itemsize, 4))))
        rows = [_blocks(p.new_rows, p.packed_new, p.batch)]
        if p.rotary_dim:
            rows.append(_blocks(p.q_rows, p.packed_q, p.batch))
        self.grid = (max(1, *rows), 3 if p.rotary_dim else 2 if p.new_rows else 1, p.batch)
        names = (
            "heads_q", "heads_kv", "head_dim", "head_dim_v", "page_size", "page_table_stride", "rotary_dim",
            "interleaved", "advance",
        )  # fmt: skip
        values = strides_of(p, *_ARRAYS) | {name: int(getattr(p, name)) for name in names}
        values |= {
            "new_len": 0 if p.packed_new else p.new_rows,
            "q_len": 0 if p.packed_q else p.q_rows,
            "capacity": p.page_size * p.max_pages,
            "tables_are_element": int(p.tables is not dtypes.float32),
            "cos_stride": p.cos_stride * p.tables.itemsize,
            "sin_stride": p.sin_stride * p.tables.itemsize,
        }
        self._values = tuple(values.values())
        self._pack = layout.load("AppendParams").packer(*POINTERS, "cache_seqlens_value", *values)

    def params(self, arrays: Mapping[str, TensorView], cache_seqlens: int = 0) -> bytes:
        return self._pack(*[arrays[n].ptr if n in arrays else 0 for n in POINTERS], cache_seqlens, *self._values)

    def launch(
        self,
        arrays: Mapping[str, TensorView],
        cache_seqlens: int = 0,
        *,
        backend: str,
        device: int | None = None,
        stream: int | None = None,
    ) -> None:
        """Writes k_cache and v_cache, q_rotated, and of seqused_k and pages what is in `arrays`.

        cache_seqlens  keys that every sequence has before, where `arrays` has no such array
        """
        if self.problem.batch == 0:
            return
        buffers = buffers_of(arrays, WRITTEN) if backend == "emulator" else ()
        kernel = module.load(self.spec, self.arch, backend, device)
        kernel.launch(self.grid, self.params(arrays, cache_seqlens), stream=stream, buffers=buffers)


def _blocks(rows: int, packed: bool, batch: int) -> int:
    """Blocks for the rows of a sequence: of packed ones, whose lengths nobody knows, some for the average."""
    return min(rows, 4 * math.ceil(rows / max(batch, 1))) if packed else rows


@functools.lru_cache(maxsize=4096)
def plan(problem: AppendProblem, arch: Arch) -> AppendPlan:
    """The plan of a problem. Compiles nothing: the first launch does."""
    return AppendPlan(problem, arch)


def representative(arch: Arch) -> list[module.KernelSpec]:
    """Variants that between them compile every line."""
    return [
        kernel_spec(AppendVariant(dtype, load_bytes))
        for dtype, load_bytes in ((dtypes.bfloat16, 16), (dtypes.float16, 2), (dtypes.float32, 4))
    ]
