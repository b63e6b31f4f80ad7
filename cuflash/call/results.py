"""What calls return beside a plain array."""

from __future__ import annotations

from typing import Any, NamedTuple

Array = Any


class AttentionOutput(NamedTuple):
    """What `attention` returns when `aux` names something; what was not named is None.

    out        as without aux
    lse        float32 [batch, heads_q, q_len] or [heads_q, total_q]: natural logarithm of the softmax denominator
    max_logit  float32, lse's shape: the row's largest score before the sink
    dropout_mask  bool [batch, heads_q, q_len, k_len], or [batch, heads_q, max_seqlen_q, max_seqlen_k] of packed
                  arrays (of keys in pages as many as those hold): whether dropout keeps a weight; False for rows and
                  keys that a sequence lacks
    """

    out: Array
    lse: Array = None
    max_logit: Array = None
    dropout_mask: Array = None


class AttentionGrads(NamedTuple):
    """What `attention_backward` returns: gradients in the shapes and dtypes of what they are for.

    dq, dk, dv  of q, k and v
    dsink       of the sink; None without one
    dcaptured   with `captured_grads`, those of the float arrays in `explain(...).captured`, in its order: what the
                mods captured, then `alibi_slopes`; None for one that only a mask reads
    """

    dq: Array
    dk: Array
    dv: Array
    dsink: Array = None
    dcaptured: tuple[Array, ...] = ()
