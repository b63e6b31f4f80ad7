"""Keywords that a function does not have: which one was meant."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from .errors import KeywordError

F = TypeVar("F", bound=Callable[..., Any])

# Words for one thing in PyTorch, JAX, flash-attn, xFormers, FlashInfer and here.
_SYNONYMS = (
    ("scale", "softmax_scale", "sm_scale", "scaling", "scale_factor"),
    ("causal", "is_causal"),
    ("window_size", "local_window_size", "sliding_window", "window"),
    ("softcap", "soft_cap", "softcapping", "logits_soft_cap", "logit_cap"),
    ("dropout_p", "dropout", "p_dropout", "dropout_rate", "attn_dropout"),
    ("seed", "rng", "generator", "dropout_rng", "rng_key"),
    ("alibi_slopes", "alibi", "slopes"),
    ("sink", "sinks", "s_aux", "learnable_sink", "attention_sink"),
    ("page_table", "block_table", "block_tables"),
    ("seqused_q", "query_seq_lengths"),
    ("seqused_k", "key_value_seq_lengths", "cache_seqlens", "kv_seqlens", "seqlens_k"),
    ("attn_mask", "mask", "attention_mask"),
    ("bias", "attn_bias", "attention_bias"),
    ("q", "query", "queries"),
    ("k", "key", "keys"),
    ("v", "value", "values"),
    ("cu_seqlens_q", "cu_seqlens"),
    ("cu_seqlens_k", "cu_seqlens", "cu_seqlens_kv"),
    ("max_seqlen_q", "max_seqlen"),
    ("max_seqlen_k", "max_seqlen", "max_seqlen_kv"),
)
_LSE = "aux=('lse',)"
_MASK = (
    "mask_mod=f, where f(b, h, q_idx, kv_idx) says whether a query sees a key; scaled_dot_product_attention takes a "
    "mask as an array"
)
# What takes the place of a word: (needs this keyword, what to write).
_INSTEAD = {
    "attn_mask": ("mask_mod", _MASK),
    "attention_mask": ("mask_mod", _MASK),
    "mask": ("mask_mod", _MASK),
    "bias": ("score_mod", "score_mod=cuflash.mods.bias(bias)"),
    "attn_bias": ("score_mod", "score_mod=cuflash.mods.bias(bias)"),
    "attention_bias": ("score_mod", "score_mod=cuflash.mods.bias(bias)"),
    "attn_mask_type": ("causal", "causal"),
    "mask_mod": ("block_mask", "block_mask=cuflash.create_block_mask(mask_mod, None, None, q_len, kv_len)"),
    "return_lse": ("aux", _LSE),
    "return_softmax_lse": ("aux", _LSE),
    "return_attn_probs": ("aux", _LSE),
    "return_residual": ("aux", _LSE),
    "enable_gqa": ("cu_seqlens_q", "nothing: k and v may have fewer heads than q, a number that divides them"),
}


def with_suggestions(of: Callable[..., Any] | None = None) -> Callable[[F], F]:
    """Decorates a function: a keyword that it, or `of`, does not have raises `KeywordError`, which names the one meant.

    >>> @with_suggestions()
    ... def attend(q, *, scale=None): ...
    >>> attend(1, sm_scale=2)
    Traceback (most recent call last):
    cuflash.errors.KeywordError: attend() got an unexpected keyword argument 'sm_scale': did you mean scale?
    """

    def decorate(function: F) -> F:
        known = _names(function) if of is None else {*_names(function), *_names(of)}

        @functools.wraps(function)
        def call(*arguments: Any, **keywords: Any) -> Any:
            try:
                return function(*arguments, **keywords)
            except TypeError:
                for name in keywords:
                    if name not in known:
                        raise KeywordError(
                            f"{function.__name__}() got an unexpected keyword argument {name!r}: {meant(name, known)}"
                        ) from None
                raise

        return call  # type: ignore[return-value]

    return decorate


def _names(function: Callable[..., Any]) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}


def meant(name: str, known: Collection[str]) -> str:
    """What to write in place of a keyword `name`, of those that are `known`.

    >>> meant("casual", ("causal", "scale")), meant("xyz", ("causal",))
    ('did you mean causal?', 'it takes causal')
    """
    needs, instead = _INSTEAD.get(name, ("", ""))
    found = [word for words in _SYNONYMS if name in words for word in words if word in known]
    if found:
        return f"did you mean {' and '.join(dict.fromkeys(found))}?"
    if needs in known:
        return f"pass {instead}"
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return f"it takes {', '.join(sorted(known))}"
