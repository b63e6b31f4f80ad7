"""Ready-made masks and scores, to pass as `mask_mod` and `score_mod`, or to build others from.

A mask says which keys a query sees, `f(b, h, q_idx, kv_idx) -> bool`; a score mod changes a score,
`f(score, b, h, q_idx, kv_idx) -> score`. Both may also name `q_len` and `kv_len`, the lengths of the sequence. They are
ordinary Python functions, and so are those below: made of operators alone, they mean the same on the symbols they are
traced with and on arrays.

With unequal lengths, masks here are aligned at the ends, as `causal=True` and `window_size` are: query i stands at key
position

    p(i) = i + kv_len - q_len

so that the last query sees the last key. Numbers and the contents of arrays are read at every call, so that new ones
compile nothing; arrays must be of the framework and on the device of q.

>>> import numpy as np, cuflash
>>> q = np.ones((1, 6, 2, 32), np.float32)
>>> mask = and_masks(causal(), sliding_window(2, 0))
>>> cuflash.attention(q, q, q, mask_mod=mask, score_mod=softcap(30.0)).shape
(1, 6, 2, 32)
"""

from __future__ import annotations

from .masks import (
    and_masks,
    causal,
    chunked,
    dilated_window,
    document,
    image_spans,
    natten_1d,
    natten_2d,
    noop_mask,
    not_mask,
    or_masks,
    prefix_lm,
    sliding_window,
    tree,
    visible,
)
from .scores import alibi, bias, compose, relative_bias, softcap

__all__ = [
    "alibi",
    "and_masks",
    "bias",
    "causal",
    "chunked",
    "compose",
    "dilated_window",
    "document",
    "image_spans",
    "natten_1d",
    "natten_2d",
    "noop_mask",
    "not_mask",
    "or_masks",
    "prefix_lm",
    "relative_bias",
    "sliding_window",
    "softcap",
    "tree",
    "visible",
]
