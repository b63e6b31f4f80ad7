"""Keys and values into named slots of a cache. The host half of kernels_cu/write_kv.cu."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from .. import dtypes
from ..arch import GRID_LIMITS, Arch
from ..array import TensorView
from ..dtypes import DType
from ..jit import layout, module
from .forward import buffers_of

THREADS = 128
POINTERS = ("k", "v", "k_cache", "v_cache", "slot_mapping")
WRITTEN = ("k_cache", "v_cache")


@dataclass(frozen=True, slots=True)
class WriteKvVariant:
    """All that the machine code depends on, beside the architecture."""

    element: DType
    load_bytes: int

    def members(self) -> dict[str, str | int | bool]:
        return {"Element": self.element.element, "kLoadBytes": self.load_bytes, "kThreads": THREADS}


@functools.cache
def kernel_spec(variant: WriteKvVariant) -> module.KernelSpec:
    return module.KernelSpec("write_kv.cu", "cuflash_write_kv", "WriteKvParams", variant, THREADS, 0)


def run(
    arrays: Mapping[str, TensorView],
    load_bytes: int,
    *,
    arch: Arch,
    backend: str,
    device: int | None = None,
    stream: int | None = None,
) -> None:
    """Writes k_cache and v_cache [pages, page_size, heads_kv, d] from k and v [tokens, heads_kv, d].

    load_bytes  16, 4 or 2: what divides bases, strides and rows of the four arrays
    """
    k, v, k_cache, slots = (arrays[name] for name in ("k", "v", "k_cache", "slot_mapping"))
    tokens, pages, page_size = slots.shape[0], *k_cache.shape[:2]
    if not tokens:
        return
    spec = kernel_spec(WriteKvVariant(k.dtype, max(load_bytes, min(k.dtype.itemsize, 4))))
    strides: dict[str, int] = {}
    for name, axes in (
        ("k", ("row", "head")),
        ("v", ("row", "head")),
        *((n, ("page", "row", "head")) for n in WRITTEN),
    ):
        x = arrays[name]
        strides |= {f"{name}_stride_{a}": s * x.dtype.itemsize for a, s in zip(axes, x.strides, strict=False)}
    params = layout.load("WriteKvParams").pack(
        **{name: arrays[name].ptr for name in POINTERS},
        **strides,
        slots=tokens,
        capacity=pages * page_size,
        page_size=page_size,
        heads_kv=k.shape[1],
        head_dim=k.shape[2],
        head_dim_v=v.shape[2],
        slots_are_i64=int(slots.dtype is dtypes.int64),
    )
    buffers = buffers_of(arrays, WRITTEN) if backend == "emulator" else ()
    kernel = module.load(spec, arch, backend, device)
    kernel.launch((min(tokens, GRID_LIMITS[0]), 2, 1), params, stream=stream, buffers=buffers)


def representative(arch: Arch) -> list[module.KernelSpec]:
    """Variants that between them compile every line."""
    return [
        kernel_spec(WriteKvVariant(dtype, load_bytes))
        for dtype, load_bytes in ((dtypes.bfloat16, 16), (dtypes.float16, 2), (dtypes.float32, 4))
    ]
