"""cuflash behind PyTorch's own names: scaled_dot_product_attention and varlen_attn run its kernels.

    import cuflash.integrations.torch
    from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

    cuflash.integrations.torch.register()
    activate_flash_attention_impl("cuflash")

From then on the calls that PyTorch gives to its flash backend on CUDA run cuflash, forward and backward, in unchanged
models and under torch.compile: float16 and bfloat16 without a mask, causal or not, with dropout, and `varlen_attn` with
GQA, windows, pages and lengths. What PyTorch gives to another backend (float32, masks, causal attention of unequal
lengths) stays there. `restore_flash_attention_impl()` undoes it.

PyTorch has the registry since 2.11.
"""

from __future__ import annotations

import importlib
from typing import Any

from .. import api
from ..errors import UnsupportedError
from ..frameworks.torch import draw_seed

NAME = "cuflash"

__all__ = ["register"]


def register(name: str = NAME) -> None:
    """Make cuflash known to PyTorch's registry of flash-attention implementations. Nothing changes before
    `activate_flash_attention_impl(name)`. It may be called again, and in a process without CUDA.

    Raises UnsupportedError where this PyTorch has no such registry.
    """
    try:
        from torch.nn.attention import register_flash_attention_impl
    except ImportError:
        raise UnsupportedError(
            f"PyTorch {_torch().__version__} has no registry of flash-attention implementations: 2.11 or later has "
            "one; call cuflash.attention instead"
        ) from None
    register_flash_attention_impl(name, register_fn=activated)


class Handle:
    """What keeps the overrides alive; `remove` ends them."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def remove(self) -> None:
        self._library = None


def activated(key: str = "CUDA") -> Handle:
    """PyTorch's operators overridden for the dispatch key of a device, for as long as the handle lives."""
    from torch.library import Library

    library = Library("aten", "IMPL")
    for operator in (
        _flash_attention_forward,
        _flash_attention_forward_no_dropout_inplace,
        _flash_attention_backward,
        _scaled_dot_product_flash_attention,
        _scaled_dot_product_flash_attention_backward,
    ):
        library.impl(operator.__name__, operator, key)
    return Handle(library)


# Operators ----------------------------------------------------------------------------------------------------------
# Named as PyTorch names them. Dense arrays of _flash_attention_* are [batch, len, heads, d]; those of _scaled_* have
# the heads before the length.


def _flash_attention_forward(
    query: Any,
    key: Any,
    value: Any,
    cum_seq_q: Any,
    cum_seq_k: Any,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Any = None,
    alibi_slopes: Any = None,
    block_table: Any = None,
    num_splits: int | None = None,
    out: Any = None,
) -> tuple[Any, ...]:
    """num_splits is not needed: rows are computed in the order of keys, whatever it is."""
    if return_debug_mask:
        raise UnsupportedError(
            "return_debug_mask=True is not available: cuflash.attention(aux=('dropout_mask',)) has it"
        )
    state, keywords = _random(query, dropout_p)
    result = api.attention(
        _unit(query),
        _unit(key),
        _unit(value),
        **_lengths(cum_seq_q, None if block_table is not None else cum_seq_k, max_q, max_k),
        seqused_k=seqused_k,
        page_table=block_table,
        scale=scale,
        causal=is_causal,
        window_size=_window(window_size_left, window_size_right),
        alibi_slopes=alibi_slopes,
        out=out,
        aux=("lse",),
        **keywords,
    )
    return result.out, result.lse, *state, query.new_empty(0)


def _flash_attention_forward_no_dropout_inplace(
    out: Any,
    query: Any,
    key: Any,
    value: Any,
    cum_seq_q: Any,
    cum_seq_k: Any,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    **keywords: Any,
) -> Any:
    return _flash_attention_forward(
        query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, 0.0, is_causal, return_debug_mask, out=out, **keywords
    )[1]


def _flash_attention_backward(
    grad_out: Any,
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    logsumexp: Any,
    cum_seq_q: Any,
    cum_seq_k: Any,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Any,
    unused: Any,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Any, ...]:
    return _gradients(
        (grad_out, query, key, value, out),
        logsumexp,
        dropout_p,
        rng_state,
        **_lengths(cum_seq_q, cum_seq_k, max_q, max_k),
        scale=scale,
        causal=is_causal,
        window_size=_window(window_size_left, window_size_right),
    )


def _scaled_dot_product_flash_attention(
    query: Any,
    key: Any,
    value: Any,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out, lse, state, unused, mask = _flash_attention_forward(
        q, k, v, None, None, 0, 0, dropout_p, is_causal, return_debug_mask, scale=scale
    )
    return out.transpose(1, 2), lse, None, None, query.shape[2], key.shape[2], state, unused, mask


def _scaled_dot_product_flash_attention_backward(
    grad_out: Any,
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    logsumexp: Any,
    cum_seq_q: Any,
    cum_seq_k: Any,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Any,
    philox_offset: Any,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    arrays = tuple(x.transpose(1, 2) for x in (grad_out, query, key, value, out))
    grads = _gradients(arrays, logsumexp, dropout_p, philox_seed, scale=scale, causal=is_causal)
    return tuple(grad.transpose(1, 2) for grad in grads)


def _gradients(
    arrays: tuple[Any, ...], lse: Any, dropout_p: float, state: Any, **keywords: Any
) -> tuple[Any, Any, Any]:
    torch = _torch()
    dout, q, k, v, out = (_unit(x) for x in arrays)
    if any(stride == 0 and n > 1 for stride, n in zip(dout.stride(), dout.shape, strict=True)):
        dout = dout.contiguous()  # of sum().backward(): one element, expanded
    if dropout_p > 0:
        seed, offset = state.view(torch.int64).unbind()
        keywords |= {"dropout_p": dropout_p, "seed": seed, "offset": offset}
    grads = api.attention_backward(
        dout, q, k, v, out, lse, deterministic=torch.are_deterministic_algorithms_enabled(), **keywords
    )
    return grads.dq, grads.dk, grads.dv


def _random(query: Any, dropout_p: float) -> tuple[tuple[Any, Any], dict[str, Any]]:
    """((rng_state uint64 [2], unused), the keywords of attention): seed and offset, drawn on the device."""
    torch = _torch()
    unused = torch.empty((), dtype=torch.uint64, device=query.device)
    if not dropout_p:
        return (torch.zeros(2, dtype=torch.uint64, device=query.device), unused), {}
    seed, offset = draw_seed((query.device.type, query.device.index or 0))
    state = torch.stack([seed.reshape(()), offset.reshape(())])
    return (state.view(torch.uint64), unused), {"dropout_p": dropout_p, "seed": seed, "offset": offset}


def _torch() -> Any:
    """PyTorch: `import torch` would mean this file to a type checker."""
    return importlib.import_module("torch")


def _lengths(starts_q: Any, starts_k: Any, longest_q: int, longest_k: int) -> dict[str, Any]:
    """As keywords of `attention`; none where arrays are dense."""
    if starts_q is None:
        return {}
    longest = {"max_seqlen_q": int(longest_q), "max_seqlen_k": int(longest_k)}
    return {"cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k, **longest}


def _window(left: int | None, right: int | None) -> tuple[int, int]:
    return (-1 if left is None else int(left), -1 if right is None else int(right))


def _unit(x: Any) -> Any:
    """With a unit last stride, as kernels read rows."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()
