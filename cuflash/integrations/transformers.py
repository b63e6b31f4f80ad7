"""Hugging Face Transformers: `register()`, then `from_pretrained(..., attn_implementation="cuflash")`.

Transformers calls two functions. One, once a forward pass, is told the mask a layer type needs, as padding and a rule
over positions; the other, once a layer, computes attention with what the first returned. The first one here turns
padding and packing into `cu_seqlens`, so that no layer computes on padding or waits for the device, and refuses every
rule that causal, window and packing do not say.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from ..api import attention
from ..errors import UnsupportedError
from ..packing import cu_seqlens_from, pad_input

__all__ = ["register"]


class Rows(NamedTuple):
    """What a layer has to know about its mask.

    window     keys a query sees, itself included; None: all before it
    causal     whether it sees none behind it
    starts_q   int32 [sequences + 1] where the sequences of packed queries begin; None: a dense batch
    starts_k   likewise for keys
    places_q   [total_q] which rows of [batch * q_len] the packed queries are; None: all, in order
    places_k   likewise for keys, of [batch * k_len]
    k_len      rows of the cache that are in use; None: all
    """

    window: int | None
    causal: bool
    starts_q: Any = None
    starts_k: Any = None
    places_q: Any = None
    places_k: Any = None
    k_len: int | None = None


def register(name: str = "cuflash") -> None:
    """Make `attn_implementation=name` run `cuflash.attention`. Needs Transformers 5 or a late 4.

    Padded batches (`attention_mask` [batch, len]), packed ones (`position_ids` that restart, or `cu_seq_lens_q` and
    `cu_seq_lens_k`), sliding windows, softcap, sinks, dropout and grouped heads. A model whose mask is none of these,
    such as blocks of image tokens that see each other, raises `UnsupportedError`.
    """
    modeling_utils = importlib.import_module("transformers.modeling_utils")
    masking_utils = importlib.import_module("transformers.masking_utils")

    modeling_utils.AttentionInterface.register(name, attention_forward)
    masking_utils.AttentionMaskInterface.register(name, attention_mask)
    _ours.add(name)
    # Transformers takes every name with "flash" in it for a build of flash-attn, which it looks for when a model is
    # made, and swaps for another where a model lists those it knows. Elsewhere the name's meaning (sequences without
    # padding, no mask of [len, len]) is right.
    asked = getattr(modeling_utils, "is_flash_attention_requested", None)
    if asked is not None and not hasattr(asked, "_cuflash"):

        def is_flash_attention_requested(*positional: Any, **keywords: Any) -> bool:
            named = keywords.get("requested_attention_implementation")
            return named not in _ours and asked(*positional, **keywords)

        is_flash_attention_requested._cuflash = True  # pyright: ignore[reportFunctionMemberAccess]
        vars(modeling_utils)["is_flash_attention_requested"] = is_flash_attention_requested


_ours: set[str] = set()  # the names registered


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
) -> Rows | None:
    """Called by Transformers for every kind of layer in a model -> what `attention_forward` gets as its mask."""
    causal, window, sequences = mask_function is None, None, None
    for rule in _rules(mask_function) if mask_function is not None else ():
        name = getattr(rule, "__qualname__", repr(rule)).partition(".")[0]
        if name == "causal_mask_function":
            causal = True
        elif name == "sliding_window_overlay":
            window = _closure(rule)["sliding_window"]
        elif name == "packed_sequence_mask_function":
            sequences = _closure(rule)["packed_sequence_mask"]
        elif use_vmap or name != "bidirectional_mask_function":
            raise UnsupportedError(
                f"this model masks by {name}, which attn_implementation='cuflash' does not know (causal, sliding "
                "window, padding and packing): use attn_implementation='sdpa'"
            )
    import torch

    if sequences is not None:
        first = torch.ones_like(sequences, dtype=torch.bool)
        first[:, 1:] = sequences[:, 1:] != sequences[:, :-1]
        begins = first.flatten().nonzero().flatten()
        starts = torch.cat([begins, begins.new_tensor([first.numel()])]).to(torch.int32)
        return Rows(window, causal, starts, starts)
    used = int(q_offset) + q_length - kv_offset  # a static cache is longer than what it holds
    if attention_mask is None and 0 < used < kv_length:
        return Rows(window, causal, k_len=used)
    if attention_mask is not None:
        kept = attention_mask[:, kv_offset : kv_offset + kv_length].to(torch.bool)
        if kept.shape[1] < kv_length or not kept.all():
            return _padded(kept, q_length, window, causal)
    return None if causal and window is None else Rows(window, causal)


def _padded(kept: Any, q_length: int, window: int | None, causal: bool) -> Rows:
    """Rows of a batch with padding: `kept` bool [batch, k_len], whose last columns are the queries."""
    queries = kept[:, -q_length:]
    return Rows(
        window, causal, cu_seqlens_from(mask=queries), cu_seqlens_from(mask=kept),
        queries.flatten().nonzero().flatten(), kept.flatten().nonzero().flatten(), kept.shape[1],
    )  # fmt: skip


def _rules(function: Any) -> Iterator[Any]:
    """The functions that `function` is the conjunction of."""
    name = getattr(function, "__qualname__", "")
    cells = _closure(function)
    if name.startswith("and_masks."):
        for part in cells["mask_functions"]:
            yield from _rules(part)
    elif name.startswith("remap_positions_for_packed_sequence."):
        yield from _rules(cells["mask_function"])
    else:
        yield function


def _closure(function: Any) -> dict[str, Any]:
    cells = getattr(function, "__closure__", None) or ()
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells, strict=True)}


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
    cu_seq_lens_q: Any = None,
    cu_seq_lens_k: Any = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **others: Any,
) -> tuple[Any, None]:
    """Called by Transformers for every layer: query, key, value [batch, heads, len, d] -> (out [batch, len, heads, d],
    None)."""
    for name in ("position_bias", "output_attentions", "cache"):
        if others.get(name) is not None and others[name] is not False:
            raise UnsupportedError(f"{name} with attn_implementation='cuflash': use attn_implementation='eager'")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    batch, q_len = q.shape[:2]
    rows = attention_mask
    if rows is None:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        rows = Rows(sliding_window, bool(causal))
    elif not isinstance(rows, Rows):
        if rows.ndim != 2:
            raise UnsupportedError(
                f"a mask of shape {tuple(rows.shape)} with attn_implementation='cuflash': pass the padding alone, "
                "attention_mask [batch, len], or use attn_implementation='sdpa'"
            )
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        rows = _padded(rows.bool(), q_len, sliding_window, bool(causal))
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        rows = Rows(rows.window, rows.causal, _int32(cu_seq_lens_q), _int32(cu_seq_lens_k))
    else:
        max_length_q = max_length_k = None
    if rows.k_len is not None:
        k, v = k[:, : rows.k_len], v[:, : rows.k_len]
    if rows.starts_q is not None:
        q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
        if rows.places_q is not None:
            q, k, v = q[rows.places_q], k[rows.places_k], v[rows.places_k]
    before = -1 if rows.window is None else rows.window - 1
    out = attention(
        q, k, v,
        cu_seqlens_q=rows.starts_q, cu_seqlens_k=rows.starts_k, max_seqlen_q=max_length_q, max_seqlen_k=max_length_k,
        scale=scaling, causal=rows.causal, window_size=(before, before), softcap=softcap or 0.0, sink=s_aux,
        dropout_p=dropout,
    )  # fmt: skip
    if rows.places_q is not None:
        out = pad_input(out, rows.places_q, batch, q_len)
    return out.reshape(batch, q_len, *out.shape[-2:]), None


def _int32(x: Any) -> Any:
    import torch

    return x.to(torch.int32)
