"""cuflash: FlashAttention as a CuPy raw-kernel runtime library.

One function, `attention`, for dense and packed (variable-length) batches of NumPy, CuPy, PyTorch or JAX arrays. On a
GPU its kernels are CUDA C strings, compiled by NVRTC when first used; host arrays run on a NumPy reference, or, when
asked, run the same kernels on an emulator.

>>> import numpy as np, cuflash
>>> q = np.ones((1, 5, 4, 64), np.float16)
>>> k = v = np.ones((1, 9, 2, 64), np.float16)
>>> cuflash.attention(q, k, v, causal=True).shape
(1, 5, 4, 64)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import errors, mods
from .api import attention, attention_backward, plan
from .call.plan import Plan
from .call.results import AttentionGrads, AttentionOutput
from .flash import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from .flex import AuxOutput, AuxRequest, BlockMask, create_block_mask, create_mask, flex_attention
from .kvcache import flash_attn_with_kvcache
from .merge import merge_states
from .mods import and_masks, noop_mask, not_mask, or_masks
from .questions import Explanation, Support, explain, supports, warmup
from .sdpa import dot_product_attention, scaled_dot_product_attention
from .settings import config
from .slots import write_kv
from .trace.tracer import mod, static

if TYPE_CHECKING:
    from . import distributed, emulator, integrations, packing, workbench

__version__ = "0.1.0"

__all__ = [
    "AttentionGrads",
    "AttentionOutput",
    "AuxOutput",
    "AuxRequest",
    "BlockMask",
    "Explanation",
    "Plan",
    "Support",
    "__version__",
    "and_masks",
    "attention",
    "attention_backward",
    "config",
    "create_block_mask",
    "create_mask",
    "distributed",
    "dot_product_attention",
    "emulator",
    "errors",
    "explain",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "flex_attention",
    "integrations",
    "merge_states",
    "mod",
    "mods",
    "noop_mask",
    "not_mask",
    "or_masks",
    "packing",
    "plan",
    "scaled_dot_product_attention",
    "static",
    "supports",
    "warmup",
    "workbench",
    "write_kv",
]

_SUBMODULES = ("distributed", "emulator", "integrations", "packing", "workbench")  # imported when first named


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_SUBMODULES))
