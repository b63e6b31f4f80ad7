"""The mask of dropout, written out. The host half of kernels_cu/dropout_mask.cu."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..arch import GRID_LIMITS, Arch
from ..array import TensorView
from ..errors import UnsupportedError
from ..jit import layout, module
from .forward import ForwardProblem, buffers_of, dropout_values

SPEC = module.KernelSpec(
    source="dropout_mask.cu",
    entry="cuflash_dropout_mask",
    params="DropoutMaskParams",
    variant=None,
    threads=128,
    smem_bytes=0,
)
POINTERS = ("dropout_mask", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "seed", "offset")


def spec(shape: tuple[int, ...]) -> module.KernelSpec:
    """The kernel that writes a mask [batch, heads_q, rows, keys]; `UnsupportedError` for one of too many rows."""
    batch, _, rows, _ = shape
    most = GRID_LIMITS[0]
    if math.prod(shape) and batch * rows > most:
        raise UnsupportedError(f"a dropout mask of {batch} x {rows} rows has more than {most}: split the batch")
    return SPEC


def run(
    problem: ForwardProblem,
    arrays: Mapping[str, TensorView],
    *,
    backend: str,
    arch: Arch,
    device: int | None = None,
    stream: int | None = None,
    seed: int = 0,
    offset: int = 0,
) -> None:
    """Writes `arrays["dropout_mask"]`, bool [batch, heads_q, rows, keys]: where `problem`'s dropout keeps a weight.

    The other arrays, seed and offset are those of the forward call. Rows and keys that a sequence lacks are False.
    """
    batch, heads_q, rows, keys = arrays["dropout_mask"].shape
    if not batch * heads_q * rows * keys:
        return
    params = layout.load("DropoutMaskParams").pack(
        **{name: arrays[name].ptr if name in arrays else 0 for name in POINTERS},
        batch=batch,
        q_len=problem.q_rows,
        k_len=problem.k_rows,
        rows=rows,
        keys=keys,
        seed_value=seed % 2**64,
        offset_value=offset % 2**32,
        **dropout_values(problem.dropout_p, problem.seed),
    )
    used = {name: arrays[name] for name in POINTERS if name in arrays}
    buffers = buffers_of(used) if backend == "emulator" else ()
    kernel = module.load(spec(arrays["dropout_mask"].shape), arch, backend, device)
    kernel.launch((batch * rows, heads_q, 1), params, stream=stream, buffers=buffers)
