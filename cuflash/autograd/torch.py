"""Attention as operations PyTorch knows: for autograd, torch.compile, torch.export, torch.func, autocast, checkpoints.

Operators such as `cuflash::attention` are what compilers and dispatch modes see: `torch_operators` has them,
`torch_derivatives` their gradients, `torch_vmap` their rule for `vmap`, so that transforms and compilers, and the two
together, follow them as they follow PyTorch's own. `attention` casts what autocast casts. Everything in here works on
tensors alone, reads no value and waits for nothing.

Importing this module imports PyTorch: that is done once a tensor asks for it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..call.arguments import Arguments
from ..errors import ArgumentError, UnsupportedError
from ..frameworks import CacheOptions
from ..frameworks import torch as adapter
from ..frameworks.torch import NESTED, draw_seed
from ..trace import text
from ..trace.tracer import Bound
from . import torch_derivatives as torch_derivatives
from . import torch_vmap as torch_vmap
from .torch_operators import CACHE_ARRAYS, CACHE_INDICES, LENGTHS

torch: Any = adapter.library()


def attention(q: Any, k: Any, v: Any, arguments: Arguments, bound: Bound | None) -> tuple[Any, Any, Any]:
    """`cuflash.attention` of tensors and normalised arguments -> (out, lse, max_logit); gradients flow through
    out and lse."""
    alibi_slopes, sink, page_table = arguments.alibi_slopes, arguments.sink, arguments.page_table
    for name, x in (("q", q), ("k", k), ("v", v), ("alibi_slopes", alibi_slopes), ("sink", sink)):
        if x is not None and not isinstance(x, torch.Tensor):
            raise ArgumentError(
                f"{name} is a {type(x).__qualname__} and q a torch.Tensor: all arrays must be of one framework; "
                "convert with torch.from_dlpack, which copies nothing"
            )
        if x is not None and x.is_nested:
            raise UnsupportedError(f"{name}: {NESTED}")
    kind = q.device.type
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        # Pages, which outlive the call, are never copied: queries are cast to their dtype.
        low = torch.get_autocast_dtype(kind) if page_table is None else k.dtype
        q, k, v = (x.to(low) if x.dtype in (torch.float32, torch.float16, torch.bfloat16) else x for x in (q, k, v))
        if sink is not None and sink.dtype not in (torch.float32, low):
            sink = sink.to(torch.float32)
    seed_number = offset_number = 0
    seed, offset = arguments.seed, arguments.offset
    if arguments.dropout_p:
        if seed is None:
            seed, offset = draw_seed((kind, q.device.index or 0))
        seed, seed_number = _random_number("seed", seed)
        offset, offset_number = _random_number("offset", offset)
    else:
        seed = offset = None
    given = (
        q, k, v,
        *[_lengths(name, getattr(arguments, name), q) for name in LENGTHS], alibi_slopes, sink, seed, offset,
        arguments.max_seqlen_q, arguments.max_seqlen_k, arguments.scale, *arguments.window_size, arguments.softcap,
        arguments.dropout_p, seed_number, offset_number,
        arguments.deterministic or torch.are_deterministic_algorithms_enabled(), arguments.split_size,
    )  # fmt: skip
    max_logit = "max_logit" in arguments.aux
    if bound is not None:
        mods = bound.mods if isinstance(bound.mods, str) else text.dumps(bound.mods)
        captured = _captured(bound, q)
        scalars = [float(x) for x in bound.scalars]
        return torch.ops.cuflash.attention_mods.default(*given, mods, scalars, max_logit, captured)
    return torch.ops.cuflash.attention.default(*given, max_logit)


def _captured(bound: Bound, q: Any) -> list[Any]:
    """The arrays that mods captured, as tensors."""
    found = []
    for i, x in enumerate(bound.arrays):
        if isinstance(x, np.ndarray) and x.ndim == 0:
            x = torch.as_tensor(x)
        if not isinstance(x, torch.Tensor):
            name = "an array" if isinstance(bound.mods, str) else bound.mods.arrays[i].name
            raise ArgumentError(
                f"{name}, which a mod captured, is a {type(x).__qualname__} and q a torch.Tensor: all arrays must be "
                "of one framework; convert with torch.from_dlpack, which copies nothing"
            )
        found.append(x)
    return found


def _lengths(name: str, x: Any, q: Any) -> Any:
    """cu_seqlens or seqused as a tensor: those of the caller, or host values, which stay on the host until launch."""
    if x is None or isinstance(x, torch.Tensor):
        if x is not None and x.device != q.device:
            raise ArgumentError(
                f"{name} is on {x.device} and q on {q.device}: all arrays must be on one device; move {name} there, or "
                "pass a list, which is checked and copied"
            )
        return x
    if isinstance(x, (list, tuple)):
        return torch.tensor(x, dtype=torch.int32)
    if isinstance(x, np.ndarray):
        return torch.as_tensor(x)
    raise ArgumentError(f"{name} is a {type(x).__qualname__}: pass an int32 tensor, a list or a NumPy array")


def _random_number(name: str, x: Any) -> tuple[Any, int]:
    """A seed or offset as (tensor, 0) or (None, int), the int as the operators' signed 64 bits."""
    if isinstance(x, torch.Tensor):
        return x, 0
    if isinstance(x, np.ndarray) and x.size == 1 and x.dtype.kind in "iu":
        x = x.item()
    if not isinstance(x, (int, np.integer)):
        raise ArgumentError(f"{name}={x!r} must be an int, or an integer tensor of one element: pass int({name})")
    x = int(x)
    return None, x - 2**64 if 2**63 <= x < 2**64 else x


def attention_to_cache(
    arrays: dict[str, Any], indices: dict[str, Any], options: CacheOptions, length: int | None, bound: Bound | None
) -> tuple[Any, ...]:
    """`cuflash.flash_attn_with_kvcache` of tensors -> (out,) or (out, lse); the caches are written in place."""
    q = arrays["q"]
    for name, x in arrays.items():
        if not isinstance(x, torch.Tensor):
            raise ArgumentError(
                f"{name} is a {type(x).__qualname__} and q a torch.Tensor: all arrays must be of one framework; "
                "convert with torch.from_dlpack, which copies nothing"
            )
    if "k" in arrays and torch.is_grad_enabled():
        for name in ("k_cache", "v_cache"):
            if arrays[name].requires_grad:
                raise UnsupportedError(
                    f"{name}.requires_grad is True, and the call writes to it: keys in a cache have no gradient; pass "
                    f"{name}.detach(), which is the same memory"
                )
    mods, scalars, captured = "", [], []
    if bound is not None:
        mods = bound.mods if isinstance(bound.mods, str) else text.dumps(bound.mods)
        scalars, captured = [float(x) for x in bound.scalars], _captured(bound, q)
    operator = torch.ops.cuflash.attention_append if "k" in arrays else torch.ops.cuflash.attention_to_cache
    out, lse = operator.default(
        *[arrays.get(name) for name in CACHE_ARRAYS],
        *[_lengths(name, indices.get(name), q) for name in CACHE_INDICES],
        length, *options.window, options.scale, options.softcap, options.interleaved, options.num_splits,
        options.split_size, options.max_seqlen_q, mods, scalars, captured,
    )  # fmt: skip
    return (out, lse) if options.lse else (out,)
