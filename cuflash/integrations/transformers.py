"""Hugging Face Transformers: `register()`, then `from_pretrained(..., attn_implementation="cuflash")`.

Transformers calls two functions. One, once a forward pass, is told the mask a layer type needs, as padding and a rule
over positions; the other, once a layer, computes attention with what the first returned, a `Mask`. What a layer gets
as its mask is taken in one way:

- A `Mask`, or an array [batch or 1, heads or 1, q_len, k_len], of bools or of floats added to the scores, says all
  about which keys are seen, as with eager attention.
- An array [batch, k_len] says which keys are no padding; the layer, whether attention is causal, and its window.
- None leaves it to the layer, whether attention is causal, and its window, as with flash-attn.
"""

from __future__ import annotations

import importlib
from typing import Any

from ..api import attention
from ..errors import ArgumentError, UnsupportedError
from ..packing import pad_input

__all__ = ["register"]


def register(name: str = "cuflash") -> None:
    """Make `attn_implementation=name` run `cuflash.attention`. Needs Transformers 5.

    Padded batches (`attention_mask` [batch, len]), packed ones (`position_ids` that restart, or `cu_seq_lens_q` and
    `cu_seq_lens_k`), encoders, decoders and cross-attention, dynamic and static caches, sliding windows and chunks,
    softcap, sinks, position biases, dropout and grouped heads. Any other mask is served too, written out as
    bool [batch, 1, q_len, k_len]. `docs/transformers.md` names the models that cannot be served, and why.
    """
    modeling_utils = importlib.import_module("transformers.modeling_utils")
    masking_utils = importlib.import_module("transformers.masking_utils")

    modeling_utils.AttentionInterface.register(name, attention_forward)
    masking_utils.AttentionMaskInterface.register(name, attention_mask)
    _ours.add(name)
    # Transformers takes every name with "flash" in it for a build of flash-attn, which it looks for when a model is
    # made, swaps for another where a model lists those it knows, and believes unable to mask by chunks. Elsewhere the
    # name's meaning (sequences without padding, no mask of [len, len]) is right.
    for module in (modeling_utils, masking_utils):
        asked = getattr(module, "is_flash_attention_requested", None)
        if asked is not None and not hasattr(asked, "_cuflash"):
            vars(module)["is_flash_attention_requested"] = _unless_ours(asked)


_ours: set[str] = set()  # the names registered


def _unless_ours(asked: Any) -> Any:
    def is_flash_attention_requested(
        config: Any = None, requested_attention_implementation: str | None = None, *others: Any, **keywords: Any
    ) -> bool:
        named = requested_attention_implementation or getattr(config, "_attn_implementation", None)
        return named not in _ours and asked(config, requested_attention_implementation, *others, **keywords)

    is_flash_attention_requested._cuflash = True  # pyright: ignore[reportFunctionMemberAccess]
    return is_flash_attention_requested


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Any = None,
    use_vmap: bool = False,
    device: Any = None,
    **unused: Any,
) -> Any:
    """Called by Transformers for every kind of layer in a model -> what `attention_forward` gets as its mask."""
    from .transformers_masks import prepare

    return prepare(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, use_vmap, device
    )


def attention_forward(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Any = None,
    position_bias: Any = None,
    cu_seq_lens_q: Any = None,
    cu_seq_lens_k: Any = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **others: Any,
) -> tuple[Any, None]:
    """Called by Transformers for every layer: query, key, value [batch, heads, len, d] -> (out [batch, len, heads, d],
    None)."""
    for name in ("output_attentions", "cache"):
        if others.get(name) is not None and others[name] is not False:
            raise UnsupportedError(f"{name} with attn_implementation='cuflash': use attn_implementation='eager'")
    from .transformers_masks import Packed

    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    batch, q_len = q.shape[:2]
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    rule = _rule(attention_mask, q_len, k.shape[1], bool(causal), sliding_window)
    packed, max_seqlens = rule.packed, (None, None)
    if position_bias is not None or rule.bias is not None:
        packed = None  # a bias is told by the places of queries and keys in the batch
    elif cu_seq_lens_q is not None and cu_seq_lens_k is not None and rule.kept is None and rule.written is None:
        packed, max_seqlens = Packed(_int32(cu_seq_lens_q), _int32(cu_seq_lens_k)), (max_length_q, max_length_k)
    arguments = {"scale": scaling, "softcap": softcap or 0.0, "sink": s_aux, "dropout_p": dropout}
    if packed is None:
        return rule.attention(q, k, v, position_bias, **arguments), None
    k, v = k[:, : rule.keys], v[:, : rule.keys]
    q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    if packed.places_q is not None:
        q, k, v = q[packed.places_q], k[packed.places_k], v[packed.places_k]
    out = attention(
        q, k, v, cu_seqlens_q=packed.starts_q, cu_seqlens_k=packed.starts_k, max_seqlen_q=max_seqlens[0],
        max_seqlen_k=max_seqlens[1], causal=rule.causal, window_size=rule.window, **arguments,
    )  # fmt: skip
    if packed.places_q is not None:
        out = pad_input(out, packed.places_q, batch, q_len)
    return out.reshape(batch, q_len, *out.shape[-2:]), None


def _rule(mask: Any, q_len: int, k_len: int, causal: bool, sliding_window: int | None) -> Any:
    """The rule for queries and keys of one layer: the mask's, or with None and padding the layer's own."""
    from .transformers_masks import Mask, Rule

    before = -1 if sliding_window is None else sliding_window - 1
    window = before, 0 if causal else before
    if mask is None:
        return Rule(causal, window)
    if isinstance(mask, Mask):
        if tuple(mask.shape[-2:]) != (q_len, k_len):
            raise ArgumentError(
                f"a mask for {mask.shape[-2]} queries and {mask.shape[-1]} keys beside {q_len} and {k_len}: the model "
                "must make its mask for the queries and keys that its layers compute with"
            )
        return mask.rule
    kind = "bool" if "bool" in str(mask.dtype) else "float" if "float" in str(mask.dtype) else "other"
    if mask.ndim == 2 and kind != "float" and mask.shape[1] == k_len:
        return Rule(causal, window, kept=(mask != 0).contiguous())
    if mask.ndim == 4 and kind != "other" and mask.shape[2] in (1, q_len) and mask.shape[3] >= k_len:
        written = mask[..., :k_len].expand(-1, -1, q_len, -1).contiguous()
        return Rule(written=written) if kind == "bool" else Rule(bias=written)
    raise UnsupportedError(
        f"a mask of {mask.dtype} and shape {tuple(mask.shape)} beside {q_len} queries and {k_len} keys with "
        "attn_implementation='cuflash': pass the padding, attention_mask [batch, k_len], or a mask "
        "[batch, heads, q_len, k_len], bool or floats to be added to the scores"
    )


def _int32(x: Any) -> Any:
    torch: Any = importlib.import_module("torch")  # `import torch` would mean the file beside this one to pyright

    return x.to(torch.int32)
