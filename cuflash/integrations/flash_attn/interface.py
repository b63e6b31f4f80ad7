"""`flash_attn.flash_attn_interface`: the functions of `cuflash.flash`, and the passes that other code builds on.

Ring attention and its like call a forward and a backward pass of their own inside of an `autograd.Function`. These
record no graph. What differs from flash-attn's: a row that sees no key has lse -inf; the weights `S_dmask` are always
empty (`flash_attn_func(..., return_attn_probs=True)` gives them); what is returned of the backward is not padded.
"""

from __future__ import annotations

import importlib
from typing import Any

from ... import frameworks
from ...api import attention, attention_backward
from ...errors import ArgumentError, UnsupportedError
from ...flash import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from ...kvcache import flash_attn_with_kvcache
from .tensors import require_tensors

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

Tensor = Any

torch: Any = importlib.import_module("torch")


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q [batch, q_len, heads, d], k and v [batch, k_len, heads_kv, d] -> (out, lse, S_dmask, rng_state).

    out        q's shape and dtype
    lse        [batch, heads, q_len] float32, natural
    S_dmask    empty
    rng_state  [2] int64: seed and offset of dropout, for `_flash_attn_backward`; zeros without dropout
    """
    return _forward(
        q, k, v, dropout_p,
        scale=softmax_scale, causal=causal, window_size=(window_size_left, window_size_right), softcap=softcap,
        alibi_slopes=alibi_slopes,
    )  # fmt: skip


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
    num_splits: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_flash_attn_forward` of packed q [total_q, heads, d], k and v [total_k, heads_kv, d]; lse is [heads, total_q].

    seqused_k     int32 [batch]: keys of each sequence that are used; None: all
    block_table   int32 [batch, max_pages]: k and v are pages [num_pages, page_size, heads_kv, d]
    zero_tensors  changes nothing: every row is written

    Raises `UnsupportedError` for leftpad_k, and for num_splits beside 0 and 1.
    """
    if leftpad_k is not None:
        raise UnsupportedError("leftpad_k: no packed keys begin with padding; pass cu_seqlens_k that leave it out")
    if num_splits not in (0, 1):
        raise UnsupportedError(
            f"num_splits={num_splits}: this pass does not split keys; pass 0, or call cuflash.attention(..., "
            "split_size=...)"
        )
    if block_table is not None:
        if seqused_k is None:
            seqused_k = cu_seqlens_k[1:] - cu_seqlens_k[:-1]
        cu_seqlens_k = None
    return _forward(
        q, k, v, dropout_p,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
        seqused_k=seqused_k, page_table=block_table, scale=softmax_scale, causal=causal,
        window_size=(window_size_left, window_size_right), softcap=softcap, alibi_slopes=alibi_slopes,
    )  # fmt: skip


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    """Write the gradients of q, k and v into dq, dk and dv; None: nobody wants that one.

    dout, out    q's shape; softmax_lse [batch, heads, q_len] float32. out and lse need not be those of these keys
                 alone: with those of all the keys that a ring has seen, dk and dv are these keys' share
    rng_state    [2] int64, what the forward returned; needed for dropout

    Returns the sums of dout * out over the head dim, [batch, heads, q_len] float32.
    """
    return _backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, rng_state,
        scale=softmax_scale, causal=causal, window_size=(window_size_left, window_size_right), softcap=softcap,
        alibi_slopes=alibi_slopes, deterministic=deterministic,
    )  # fmt: skip


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """`_flash_attn_backward` of packed arrays; softmax_lse and what is returned are [heads, total_q]."""
    return _backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, rng_state,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
        scale=softmax_scale, causal=causal, window_size=(window_size_left, window_size_right), softcap=softcap,
        alibi_slopes=alibi_slopes, deterministic=deterministic,
    )  # fmt: skip


def _forward(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, **keywords: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    require_tensors(q=q, k=k, v=v)
    with torch.no_grad():
        rng_state = torch.zeros(2, dtype=torch.int64, device=q.device)
        if dropout_p:
            rng_state = torch.cat(frameworks.torch.draw_seed((q.device.type, q.device.index or 0)))
            keywords |= {"dropout_p": dropout_p, "seed": rng_state[:1], "offset": rng_state[1:]}
        q, k, v = map(_unit_stride, (q, k, v))
        result = attention(q, k, v, aux=("lse",), **keywords)
        return result.out, result.lse, q.new_empty(0), rng_state


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    rng_state: Tensor | None,
    **keywords: Any,
) -> Tensor:
    require_tensors({"rng_state": rng_state}, dout=dout, q=q, k=k, v=v, out=out, softmax_lse=lse)
    if dropout_p:
        if rng_state is None:
            raise ArgumentError(
                f"dropout_p={dropout_p} and rng_state=None: the backward must drop what the forward dropped; pass the "
                "rng_state that the forward returned"
            )
        keywords |= {"dropout_p": dropout_p, "seed": rng_state[:1], "offset": rng_state[1:]}
    with torch.no_grad():
        dout, q, k, v, out = map(_unit_stride, (dout, q, k, v, out))
        attention_backward(dout, q, k, v, out, lse.contiguous(), dq=dq, dk=dk, dv=dv, **keywords)
        return (dout.float() * out.float()).sum(-1).transpose(-1, -2).contiguous()


def _unit_stride(x: Tensor) -> Tensor:
    """x, or a copy where its last dimension has a stride: gradients often come expanded, and flash-attn copies too."""
    return x if x.stride(-1) == 1 else x.contiguous()
