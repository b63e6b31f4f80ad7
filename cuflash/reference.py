"""Attention in NumPy: the definition every kernel is tested against, and the backend for host arrays.

For one query head and one sequence, with queries `q [q_len, d]`, keys `k [k_len, d]` and values `v [k_len, d_v]`:

    s[i, j] = scale * dot(q[i], k[j])                       the score of query i and key j
    s[i, j] = softcap * tanh(s[i, j] / softcap)             if softcap > 0
    s[i, j] = s[i, j] - slope * |i + k_len - q_len - j|     if ALiBi slopes are given
    s[i, j] = score_mod(s[i, j], b, h, i, j)                if given
    s[i, j] = -inf                                          where a mask says so
    p[i, :] = softmax(s[i, :])                              a sink adds exp(sink) to the denominator
    p[i, j] = p[i, j] / (1 - dropout_p), or 0               where dropout keeps or drops (cuflash/philox.py)
    out[i]  = sum_j p[i, j] * v[j]
    lse[i]  = log(sum_j exp(s[i, j]) + exp(sink))           the logarithm of softmax's denominator

Queries and keys are aligned at their ends: query i sits at key position `i + k_len - q_len`, so that the last query
sees the last key. Causal keeps the keys up to that position, a window (left, right) those at most `left` before and
`right` after it. Query head h reads key head `h // (heads_q // heads_kv)`. The equations of the gradients stand in
`attention_backward`.

Query rows are taken a block at a time, each against all the keys it may see, so memory grows with the length and not
with its square. Only rows that a sequence owns are ever read: what lies behind a sequence's end may be NaN.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from . import philox

# Scores held at a time: a block of query rows takes as many rows, and then as many heads, as fit. 2 MB of float32 stays
# in a core's cache and still makes matrices large enough for BLAS to be fast.
_BLOCK_SCORES = 1 << 19

Lengths = np.ndarray | Sequence[int]


class ScoreMod(Protocol):
    """A score_mod that knows its derivative, as `attention_backward` wants it."""

    def __call__(self, score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any, q_len: int, kv_len: int) -> Any: ...

    def backward(
        self, ds: np.ndarray, score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any, q_len: int, kv_len: int
    ) -> np.ndarray:
        """The gradient of the score that came in, from `ds`, that of the score that went out.

        `ds` is 0 where a score is masked; each element is handed in once. What else the mod makes of it, such as the
        gradients of arrays it reads, is its own affair.
        """
        ...


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    cu_seqlens_q: Lengths | None = None,
    cu_seqlens_k: Lengths | None = None,
    seqused_q: Lengths | None = None,
    seqused_k: Lengths | None = None,
    page_table: np.ndarray | None = None,
    leftpad_k: Lengths | None = None,
    scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: np.ndarray | None = None,
    sink: np.ndarray | None = None,
    score_mod: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    offset: int = 0,
    compute_dtype: Any = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Attention of dense or packed NumPy arrays -> (out, lse, max_logit).

    q [batch, q_len, heads_q, d], k [batch, k_len, heads_kv, d], v [batch, k_len, heads_kv, d_v], or, with
    `cu_seqlens_q` and `cu_seqlens_k` [batch + 1] from 0, packed [total_q, heads_q, d], [total_k, heads_kv, d],
    [total_k, heads_kv, d_v]: sequence b owns the rows cu_seqlens[b] to cu_seqlens[b + 1]. `seqused_q`, `seqused_k`
    [batch] shorten each sequence to its first rows. float16, bfloat16 (ml_dtypes), float32 or float64, any strides.

    With `page_table` [batch, max_pages], k and v are [num_pages, page_size, heads_kv, d] and the queries dense or
    packed: key n of sequence b is row n % page_size of page page_table[b, n // page_size], and it has seqused_k[b] of
    them. Entries of the table behind those are not looked at. `leftpad_k` [batch]: the first keys are no part of a
    sequence, which has that many fewer; kv_idx counts from the first key that is.

    scale         multiplies q.k; any finite number; None: 1 / sqrt(d)
    window_size   (left, right) keys kept on either side of the diagonal; -1 or None: all
    alibi_slopes  [heads_q] or [batch, heads_q]
    sink          [heads_q], a learnable score without a value
    score_mod     f(score, b, h, q_idx, kv_idx) -> score, and
    mask_mod      f(b, h, q_idx, kv_idx) -> bool, on NumPy arrays that broadcast to [heads, rows, keys]: int32
                  indices, local to the sequence. Either may also name q_len and kv_len and gets them as ints.
    dropout_p     from 0 up to 1: the share of weights to drop, chosen by seed, offset and position

    out has q's shape with d_v in place of d, and q's dtype. lse and max_logit, the largest score of a row before the
    sink, are [batch, heads_q, q_len] or [heads_q, total_q], in the dtype of the computation: float32, or float64 for
    float64 arrays. `compute_dtype` sets that dtype, and out comes in it too: with np.float64 the result is the oracle.

    A row that keeps no key has out 0, lse -inf (the sink's value where there is one) and max_logit -inf; a row
    outside every sequence has out 0, lse -inf and max_logit -inf. Arguments are taken as checked by the caller.

    >>> q = np.ones((1, 2, 1, 4), np.float32)
    >>> v = np.arange(3, dtype=np.float32).reshape(1, 3, 1, 1)
    >>> out, lse, max_logit = attention(q, np.ones((1, 3, 1, 4), np.float32), v, causal=True)
    >>> out.ravel(), max_logit.ravel()  # two queries behind three keys: they see two keys, then three
    (array([0.5, 1. ], dtype=float32), array([2., 2.], dtype=float32))
    """
    dtype = _computed_in(q, compute_dtype)
    rules = _rules(
        q, _batch(q, cu_seqlens_q), dtype, scale=scale, causal=causal, window_size=window_size, softcap=softcap,
        alibi_slopes=alibi_slopes, score_mod=score_mod, mask_mod=mask_mod, dropout=(dropout_p, seed, offset),
    )  # fmt: skip
    sinks = None if sink is None else np.asarray(sink).astype(dtype)[:, None]

    *lead, rows, heads_q, _ = q.shape  # lead: (batch,), or () for packed arrays
    out = np.zeros((*q.shape[:-1], v.shape[-1]), q.dtype if compute_dtype is None else dtype)
    lse = np.full((*lead, heads_q, rows), -np.inf, dtype)
    max_logit = np.full_like(lse, -np.inf)
    rows_q = _rows_of_sequences(q, cu_seqlens_q, seqused_q)
    keys, values = (_keys_of_sequences(x, cu_seqlens_k, seqused_k, page_table, leftpad_k) for x in (k, v))
    for rule, at_q, k_b, v_b in zip(rules, rows_q, keys, values, strict=True):
        at_lse = _heads_first(at_q)
        # Infinite or NaN values that the sequence owns are its own affair: they come out, without a warning.
        with np.errstate(all="ignore"):
            _attend(rule, q[at_q], k_b, v_b, sinks, out[at_q], lse[at_lse], max_logit[at_lse])
    return out, lse, max_logit


def _attend(
    rule: _Rule,
    q: np.ndarray,  # [q_len, heads_q, d]
    k: np.ndarray,  # [k_len, heads_kv, d]
    v: np.ndarray,  # [k_len, heads_kv, d_v]
    sinks: np.ndarray | None,  # [heads_q, 1]
    out: np.ndarray,  # [q_len, heads_q, d_v], written
    lse: np.ndarray,  # [heads_q, q_len], written
    max_logit: np.ndarray,  # [heads_q, q_len], written
) -> None:
    """One sequence."""
    for block in _blocks(rule, q, k, v):
        at = block.heads, block.rows
        # softmax: the largest score is subtracted first, so that exp() cannot overflow
        largest = block.s.max(axis=2, initial=-np.inf)  # [heads, rows]
        base = largest if sinks is None else np.maximum(largest, sinks[block.heads])
        base = np.where(base == -np.inf, rule.dtype.type(0), base)  # a row of nothing: exp(-inf - 0) is 0
        p = block.s - base[:, :, None]
        np.exp(p, out=p)
        kept = p.sum(axis=2)
        denominator = kept if sinks is None else kept + np.exp(sinks[block.heads] - base)
        max_logit[at] = largest
        lse[at] = base + np.log(denominator)
        if block.dropout is not None:
            p *= block.dropout
        o = _matmul_grouped(p, block.v) / denominator[:, :, None]
        out[at[::-1]] = np.where(largest[:, :, None] == -np.inf, rule.dtype.type(0), o).swapaxes(0, 1)


def attention_backward(
    dout: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    out: np.ndarray,
    lse: np.ndarray,
    *,
    dlse: np.ndarray | None = None,
    cu_seqlens_q: Lengths | None = None,
    cu_seqlens_k: Lengths | None = None,
    seqused_q: Lengths | None = None,
    seqused_k: Lengths | None = None,
    scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: np.ndarray | None = None,
    sink: np.ndarray | None = None,
    score_mod: ScoreMod | None = None,
    mask_mod: Callable[..., Any] | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    offset: int = 0,
    compute_dtype: Any = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Gradients of a loss for the inputs of `attention` -> (dq, dk, dv, dsink, dslopes).

    `dout` (out's shape) and `dlse` (lse's shape; None: zeros) are the loss's gradients for the results of `attention`,
    `out` and `lse` those results; the rest are the arguments it had. With P, the softmax's weights, made again from
    the scores and lse:

        delta[i] = dot(dout[i], out[i]) - dlse[i]
        P[i, j]  = exp(s[i, j] - lse[i])                        0 where masked
        dv[j]    = sum_i P[i, j] * dout[i]
        dS[i, j] = P[i, j] * (dot(dout[i], v[j]) - delta[i])    the gradient of the final score
        dS[i, j] = score_mod.backward(dS[i, j], s, b, h, i, j)  if given; s the score it was given
        dsink    = -sum_i exp(sink - lse[i]) * delta[i]
        dslope   = -sum_ij dS[i, j] * |i + k_len - q_len - j|
        dS[i, j] *= 1 - tanh(scale * dot(q[i], k[j]) / softcap)^2      if softcap > 0
        dq[i]    = scale * sum_j dS[i, j] * k[j]
        dk[j]    = scale * sum_i dS[i, j] * q[i]

    With dropout, P[i, j] in dv and dot(dout[i], v[j]) in dS are multiplied by what P was: 0 or 1 / (1 - dropout_p).

    A key head's dk and dv sum over the query heads it serves. dq, dk and dv have the shapes and dtypes of q, k and v
    (`compute_dtype` where that is given); dsink [heads_q] and dslopes (the slopes' shape) are in the dtype of the
    computation, and None without a sink or slopes. What no sequence owns has gradient 0, and so has a row that keeps
    no key, but that a sink receives its dlse.

    >>> q = np.ones((1, 2, 1, 4), np.float32)
    >>> k, v = np.ones((1, 3, 1, 4), np.float32), np.arange(3, dtype=np.float32).reshape(1, 3, 1, 1)
    >>> out, lse, _ = attention(q, k, v, causal=True)
    >>> dq, dk, dv, _, _ = attention_backward(np.ones_like(out), q, k, v, out, lse, causal=True)
    >>> dv.ravel().round(4)  # the weights of each key: 1/2 + 1/3, 1/2 + 1/3, 1/3
    array([0.8333, 0.8333, 0.3333], dtype=float32)
    """
    dtype = _computed_in(q, compute_dtype)
    batch, heads_q = _batch(q, cu_seqlens_q), q.shape[-2]
    rules = _rules(
        q, batch, dtype, scale=scale, causal=causal, window_size=window_size, softcap=softcap,
        alibi_slopes=alibi_slopes, score_mod=score_mod, mask_mod=mask_mod, dropout=(dropout_p, seed, offset),
    )  # fmt: skip
    dq, dk, dv = (np.zeros(x.shape, x.dtype if compute_dtype is None else dtype) for x in (q, k, v))
    dsink, dslopes = np.zeros(heads_q, dtype), np.zeros((batch, heads_q), dtype)
    rows_q = _rows_of_sequences(q, cu_seqlens_q, seqused_q)
    rows_k = _rows_of_sequences(k, cu_seqlens_k, seqused_k)
    for rule, at_q, at_k in zip(rules, rows_q, rows_k, strict=True):
        with np.errstate(all="ignore"):
            at_lse = _heads_first(at_q)
            d_o, lse_b = dout[at_q].astype(dtype), lse[at_lse].astype(dtype)
            delta = (d_o * out[at_q].astype(dtype)).sum(axis=2).T  # [heads, rows]
            d_lse = dtype.type(0) if dlse is None else dlse[at_lse].astype(dtype)
            dq[at_q], dk[at_k], dv[at_k], dslopes[rule.b], nothing = _attend_backward(
                rule, q[at_q], k[at_k], v[at_k], d_o, delta - d_lse, lse_b
            )
            if sink is not None:
                own = np.asarray(sink).astype(dtype)[:, None]
                weights = np.exp(np.minimum(own - lse_b, 0))
                terms = weights * (np.where(nothing, dtype.type(0), delta) - d_lse)
                dsink -= np.where(own == -np.inf, dtype.type(0), terms).sum(axis=1)
    if alibi_slopes is not None and np.ndim(alibi_slopes) == 1:
        dslopes = dslopes.sum(axis=0)
    return dq, dk, dv, None if sink is None else dsink, None if alibi_slopes is None else dslopes


def _attend_backward(
    rule: _Rule,
    q: np.ndarray,  # [q_len, heads_q, d]
    k: np.ndarray,  # [k_len, heads_kv, d]
    v: np.ndarray,  # [k_len, heads_kv, d_v]
    dout: np.ndarray,  # [q_len, heads_q, d_v]
    delta: np.ndarray,  # [heads_q, q_len]
    lse: np.ndarray,  # [heads_q, q_len]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One sequence -> dq, dk, dv in the shapes of q, k, v, dslopes [heads_q], which rows keep nothing [heads_q, q_len].

    The latter ignore dout and delta, for 0 times these may be NaN.
    """
    dq, dk, dv = (np.zeros((x.shape[1], x.shape[0], x.shape[2]), rule.dtype) for x in (q, k, v))  # heads first
    dslopes = np.zeros(q.shape[1], rule.dtype)
    nothing = np.ones(lse.shape, bool)
    for block in _blocks(rule, q, k, v):
        at, at_kv = (block.heads, block.rows), (block.heads_kv, block.keys)
        d_o = np.ascontiguousarray(dout[at[::-1]].swapaxes(0, 1))  # [heads, rows, d_v]
        nothing[at] = (block.s == -np.inf).all(axis=2)
        d_o[nothing[at]] = 0
        # No weight is above 1: where lse is large its round-off alone would say so.
        exponent = np.minimum(block.s - lse[at][:, :, None], 0)
        p = np.where(block.s == -np.inf, rule.dtype.type(0), np.exp(exponent))
        dp = _matmul_grouped(d_o, block.v.swapaxes(1, 2))
        if block.dropout is not None:
            dp *= block.dropout
        dv[at_kv] += _matmul_summed(p if block.dropout is None else p * block.dropout, d_o, len(block.v))
        ds = p * (dp - delta[at][:, :, None])
        ds = np.where(block.s == -np.inf, rule.dtype.type(0), ds)
        if rule.score_mod is not None:
            backward = _with_lengths(rule.score_mod.backward, {"q_len": len(q), "kv_len": len(k)})
            ds = backward(ds, block.unmodified, *block.index)
        if rule.slopes is not None:
            assert block.distance is not None
            dslopes[block.heads] -= (ds * np.abs(block.distance).astype(rule.dtype)).sum(axis=(1, 2))
        if block.tanh is not None:
            ds *= 1 - block.tanh**2
        dq[at] = rule.scale * _matmul_grouped(ds, block.k)
        dk[at_kv] += rule.scale * _matmul_summed(ds, block.q, len(block.k))
    return dq.swapaxes(0, 1), dk.swapaxes(0, 1), dv.swapaxes(0, 1), dslopes, nothing


def dropout_mask(
    mask: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    *,
    cu_seqlens_q: Lengths | None = None,
    cu_seqlens_k: Lengths | None = None,
    seqused_q: Lengths | None = None,
    seqused_k: Lengths | None = None,
    page_table: np.ndarray | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    offset: int = 0,
    **unused: Any,
) -> None:
    """Write to `mask`, bool [batch, heads_q, rows, keys], which weights `attention` keeps with the same arguments.

    What lies behind a sequence's queries and keys is False. Causal, window and mask_mod do not show.
    """
    lengths_q = [rows[-1].stop - rows[-1].start for rows in _rows_of_sequences(q, cu_seqlens_q, seqused_q)]
    lengths_k = [len(keys) for keys in _keys_of_sequences(k, cu_seqlens_k, seqused_k, page_table, None)]
    mask[...] = philox.dropout_mask(mask.shape, lengths_q, lengths_k, seed, offset, dropout_p)


def attention_weights(
    q: np.ndarray,
    k: np.ndarray,
    *,
    cu_seqlens_q: Lengths | None = None,
    cu_seqlens_k: Lengths | None = None,
    scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: np.ndarray | None = None,
    score_mod: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    offset: int = 0,
) -> np.ndarray:
    """exp(score - the row's largest), negative where dropout drops -> [batch, heads_q, longest q, longest k].

    The softmax before a row is divided by its sum; times exp(max_logit - lse) it is the softmax. 0 where masked and
    where a sequence has no such query or key. In the dtype `attention` computes in.
    """
    dtype = _computed_in(q, None)
    rules = _rules(
        q, _batch(q, cu_seqlens_q), dtype, scale=scale, causal=causal, window_size=window_size, softcap=softcap,
        alibi_slopes=alibi_slopes, score_mod=score_mod, mask_mod=mask_mod, dropout=(dropout_p, seed, offset),
    )  # fmt: skip
    sequences = [
        (q[at_q], k[at_k])
        for at_q, at_k in zip(
            _rows_of_sequences(q, cu_seqlens_q, None), _rows_of_sequences(k, cu_seqlens_k, None), strict=True
        )
    ]
    longest = (max((len(x[side]) for x in sequences), default=0) for side in (0, 1))
    weights = np.zeros((len(sequences), q.shape[-2], *longest), dtype)
    for rule, (q_b, k_b) in zip(rules, sequences, strict=True):
        for block in _blocks(rule, q_b, k_b, k_b):
            largest = block.s.max(axis=2, initial=-np.inf, keepdims=True)
            w = np.exp(block.s - np.where(largest == -np.inf, dtype.type(0), largest))
            if block.dropout is not None:
                w = np.where(block.dropout == 0, -w, w)
            weights[rule.b, block.heads, block.rows, block.keys] = w
    return weights


# Caches ---------------------------------------------------------------------------------------------------------------


def append_kv(
    k_cache: np.ndarray,
    v_cache: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    cache_seqlens: Lengths,
    page_table: np.ndarray,
    cu_seqlens_k_new: Lengths | None = None,
    rotary_cos: np.ndarray | None = None,
    rotary_sin: np.ndarray | None = None,
    rotary_seqlens: Lengths | None = None,
    rotary_interleaved: bool = True,
) -> None:
    """Write new keys and values into a cache, in place: the keys rotated, where there is a rotary embedding.

    k_cache [num_pages, page_size, heads_kv, d], v_cache likewise; key n of sequence b is row n % page_size of page
    page_table[b, n // page_size], and a cache [batch, len, heads_kv, d] is one whose pages are the sequences. k, v
    [batch, new, heads_kv, d], or packed by `cu_seqlens_k_new`: new key i of sequence b becomes its key
    cache_seqlens[b] + i, and is rotated to position rotary_seqlens[b] + i (None: cache_seqlens). Nothing else is
    written, and no entry of the table looked at that no new key goes to.
    """
    starts = cache_seqlens if rotary_seqlens is None else rotary_seqlens
    for b, rows in enumerate(_rows_of_sequences(k, cu_seqlens_k_new, None)):
        new = np.arange(len(k[rows]))
        at = cache_slots(page_table[b], k_cache.shape[1], int(cache_seqlens[b]), len(new))
        keys = k[rows]
        if rotary_cos is not None and rotary_sin is not None:
            keys = rotary(keys, rotary_cos, rotary_sin, int(starts[b]) + new, rotary_interleaved)
        k_cache[at], v_cache[at] = keys, v[rows]


def cache_slots(pages: np.ndarray, page_size: int, begin: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(page, row) of the keys from `begin` on of a sequence with these pages.

    >>> cache_slots(np.array([7, 3, 5]), page_size=4, begin=6, count=3)
    (array([3, 3, 5]), array([2, 3, 0]))
    """
    at = np.arange(begin, begin + count)
    return pages[at // page_size], at % page_size


def rotate_queries(
    q: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    *,
    starts: Lengths,
    advance: bool,
    cu_seqlens_q: Lengths | None = None,
    interleaved: bool = True,
) -> np.ndarray:
    """Queries, dense or packed, by a rotary embedding: row i of sequence b to position starts[b] + i, or, unless
    `advance`, all its rows to starts[b], as flash-attn does where neither causal nor a window tells rows apart."""
    rotated = q.copy()
    for b, rows in enumerate(_rows_of_sequences(q, cu_seqlens_q, None)):
        steps = np.arange(len(q[rows])) * int(advance)
        rotated[rows] = rotary(q[rows], cos, sin, int(starts[b]) + steps, interleaved)
    return rotated


def rotary(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, positions: np.ndarray, interleaved: bool) -> np.ndarray:
    """x [rows, heads, d] with row i rotated to positions[i]; cos, sin [len, rotary_dim / 2] by position.

    Pair j of the first rotary_dim elements, (2 j, 2 j + 1) where interleaved, else (j, rotary_dim / 2 + j), becomes
    (a * cos - b * sin, a * sin + b * cos); the others stay. Computed in float32 (float64 for float64), rounded once.

    >>> x = np.array([[[1.0, 0.0, 5.0]]], np.float32)
    >>> quarter = np.zeros((3, 1), np.float32), np.ones((3, 1), np.float32)
    >>> rotary(x, *quarter, positions=np.array([2]), interleaved=True)
    array([[[0., 1., 5.]]], dtype=float32)
    """
    half, dtype = cos.shape[1], _computed_in(x, None)
    first, second = slice(0, half), slice(half, 2 * half)
    if interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    c, s = (table[positions][:, None].astype(dtype) for table in (cos, sin))
    a, b = x[..., first].astype(dtype), x[..., second].astype(dtype)
    rotated = x.copy()
    with np.errstate(all="ignore"):
        rotated[..., first], rotated[..., second] = a * c - b * s, a * s + b * c
    return rotated


# Sequences ------------------------------------------------------------------------------------------------------------


def _computed_in(q: np.ndarray, compute_dtype: Any) -> np.dtype:
    return np.dtype(compute_dtype or (np.float64 if q.dtype == np.float64 else np.float32))


def _batch(q: np.ndarray, cu_seqlens_q: Lengths | None) -> int:
    return len(cu_seqlens_q) - 1 if cu_seqlens_q is not None else q.shape[0]


def _rows_of_sequences(x: np.ndarray, cu_seqlens: Lengths | None, seqused: Lengths | None) -> list[tuple[Any, ...]]:
    """For each sequence the index of its used rows in x: (b, slice) in a dense array, (slice,) in a packed one."""
    if cu_seqlens is None:
        bounds = [(b, 0, x.shape[1]) for b in range(x.shape[0])]
    else:
        bounds = [(b, int(cu_seqlens[b]), int(cu_seqlens[b + 1])) for b in range(len(cu_seqlens) - 1)]
    indices = []
    for b, begin, end in bounds:
        if seqused is not None:
            end = min(end, begin + int(seqused[b]))
        indices.append((b, slice(begin, end)) if cu_seqlens is None else (slice(begin, end),))
    return indices


def _keys_of_sequences(
    x: np.ndarray,
    cu_seqlens: Lengths | None,
    seqused: Lengths | None,
    page_table: np.ndarray | None,
    leftpad: Lengths | None,
) -> Iterator[np.ndarray]:
    """For each sequence its rows [k_len, heads, d] of keys or values: views, copies where they lie in pages."""
    if page_table is None:
        for b, rows in enumerate(_rows_of_sequences(x, cu_seqlens, seqused)):
            yield x[rows][0 if leftpad is None else int(leftpad[b]) :]
        return
    assert seqused is not None, "paged keys have no other length"
    for b, pages in enumerate(page_table):
        used = int(seqused[b])
        held = x[pages[: -(-used // x.shape[1])]].reshape(-1, *x.shape[2:])
        yield held[0 if leftpad is None else int(leftpad[b]) : used]


def _heads_first(rows: tuple[Any, ...]) -> tuple[Any, ...]:
    """The index of a sequence's rows in lse, from that in q."""
    return (*rows[:-1], slice(None), rows[-1])


# Scores ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rule:
    """What turns the queries and keys of sequence b into scores."""

    b: int
    dtype: np.dtype
    scale: float
    left: float
    right: float
    softcap: float
    slopes: np.ndarray | None  # [heads_q]
    score_mod: Any
    mask_mod: Callable[..., Any] | None
    dropout: tuple[float, int, int]  # p, seed, offset


def _rules(
    q: np.ndarray,
    batch: int,
    dtype: np.dtype,
    *,
    scale: float | None,
    causal: bool,
    window_size: tuple[int | None, int | None],
    softcap: float,
    alibi_slopes: np.ndarray | None,
    score_mod: Callable[..., Any] | None,
    mask_mod: Callable[..., Any] | None,
    dropout: tuple[float, int, int],
) -> list[_Rule]:
    """One a sequence."""
    heads_q, head_dim = q.shape[-2:]
    left, right = (math.inf if w is None or w < 0 else w for w in window_size)
    slopes = None if alibi_slopes is None else np.broadcast_to(np.asarray(alibi_slopes, dtype), (batch, heads_q))
    return [
        _Rule(
            b,
            dtype,
            scale=1.0 / math.sqrt(head_dim) if scale is None else float(scale),
            left=left,
            right=0 if causal else right,
            softcap=float(softcap),
            slopes=None if slopes is None else slopes[b],
            score_mod=score_mod,
            mask_mod=mask_mod,
            dropout=dropout,
        )
        for b in range(batch)
    ]


class _Block(NamedTuple):
    """A block of query rows of some heads, the keys that any of the rows may see, and the scores between them."""

    heads: slice  # of the queries
    heads_kv: slice
    rows: slice
    keys: slice
    q: np.ndarray  # [heads, rows, d]
    k: np.ndarray  # [heads_kv, keys, d]
    v: np.ndarray  # [heads_kv, keys, d_v]
    s: np.ndarray  # [heads, rows, keys], -inf where masked
    unmodified: np.ndarray | None  # what score_mod was given, s's shape
    tanh: np.ndarray | None  # the softcap's, s's shape
    distance: np.ndarray | None  # [rows, keys], 0 on the diagonal; where slopes ask for it
    dropout: np.ndarray | None  # what weights are multiplied by, s's shape: 0 or 1 / (1 - p)
    index: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # b, h, q_idx, kv_idx: int32, broadcasting to s


def _blocks(rule: _Rule, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> Iterator[_Block]:
    """One sequence, block by block over query rows, for as many key heads at a time as fit."""
    (q_len, heads_q, _), (k_len, heads_kv, _), dtype = q.shape, k.shape, rule.dtype
    group = heads_q // heads_kv
    # The sizes depend on this sequence alone, so its bits do not change with what else is in the batch.
    rows = min(max(_BLOCK_SCORES // max(group * k_len, 1), 1), max(q_len, 1))
    key_heads = max(_BLOCK_SCORES // max(group * k_len * rows, 1), 1)
    lengths = {"q_len": q_len, "kv_len": k_len}
    score_mod = rule.score_mod and _with_lengths(rule.score_mod, lengths)
    mask_mod = rule.mask_mod and _with_lengths(rule.mask_mod, lengths)

    for head_kv in range(0, heads_kv, key_heads):
        heads_k = slice(head_kv, min(head_kv + key_heads, heads_kv))
        heads = slice(heads_k.start * group, heads_k.stop * group)
        keys = np.ascontiguousarray(k[:, heads_k].swapaxes(0, 1), dtype)  # [key heads, k_len, d]
        values = np.ascontiguousarray(v[:, heads_k].swapaxes(0, 1), dtype)
        for first_row in range(0, q_len, rows):
            block = slice(first_row, min(first_row + rows, q_len))
            position = np.arange(block.start, block.stop) + (k_len - q_len)  # where each row stands among the keys
            # The keys that causal and window leave to any row of this block.
            first = max(0, position[0] - rule.left)
            last = max(first, min(k_len, position[-1] + rule.right + 1))
            seen = slice(int(first), int(last))
            # Each row sees each key where the last row sees the first key and the first row the last key.
            whole = first - position[-1] >= -rule.left and last - 1 - position[0] <= rule.right
            distance = keep = None
            if not whole or rule.slopes is not None:
                distance = np.arange(seen.start, seen.stop, dtype=np.int32) - position.astype(np.int32)[:, None]

            queries = np.ascontiguousarray(q[block, heads].swapaxes(0, 1), dtype)
            s = _matmul_grouped(queries, keys[:, seen].swapaxes(1, 2))
            s *= dtype.type(rule.scale)
            tanh = None
            if rule.softcap > 0:
                tanh = np.tanh(s / rule.softcap)
                s = rule.softcap * tanh
            if rule.slopes is not None:
                assert distance is not None
                s -= rule.slopes[heads, None, None] * np.abs(distance).astype(dtype)

            index = (
                np.full((1, 1, 1), rule.b, np.int32),
                np.arange(heads.start, heads.stop, dtype=np.int32)[:, None, None],
                np.arange(block.start, block.stop, dtype=np.int32)[:, None],
                np.arange(seen.start, seen.stop, dtype=np.int32),
            )
            unmodified = s if score_mod is not None else None
            if score_mod is not None:
                s = np.broadcast_to(np.asarray(score_mod(s, *index), dtype), s.shape)
            if distance is not None and not whole:
                keep = (distance >= -rule.left) & (distance <= rule.right)
            if mask_mod is not None:
                kept = np.asarray(mask_mod(*index), bool)
                keep = kept if keep is None else keep & kept
            if keep is not None and not keep.all():
                s = np.where(keep, s, dtype.type(-np.inf))
            p, seed, offset = rule.dropout
            dropout = philox.dropout_keep(*index, seed, offset, p, heads_q) * dtype.type(1 / (1 - p)) if p else None
            yield _Block(
                heads, heads_k, block, seen, queries, keys[:, seen], values[:, seen], s, unmodified, tanh, distance,
                dropout, index,
            )  # fmt: skip


def _matmul_grouped(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x [heads_q, m, a] @ y [heads_kv, a, n] -> [heads_q, m, n]; each matrix of y serves a group of x."""
    (heads_q, m, a), (heads_kv, _, n) = x.shape, y.shape
    return (x.reshape(heads_kv, heads_q // heads_kv * m, a) @ y).reshape(heads_q, m, n)


def _matmul_summed(x: np.ndarray, y: np.ndarray, heads_kv: int) -> np.ndarray:
    """x.T [heads_q, a, m] @ y [heads_q, m, n], summed over each group of heads -> [heads_kv, a, n]."""
    heads_q, m, a = x.shape
    rows = heads_q // heads_kv * m
    return x.reshape(heads_kv, rows, a).swapaxes(1, 2) @ y.reshape(heads_kv, rows, y.shape[2])


def _with_lengths(mod: Callable[..., Any], lengths: dict[str, int]) -> Callable[..., Any]:
    """`mod` with those of q_len and kv_len bound that it names among its parameters."""
    named = {name: lengths[name] for name in inspect.signature(mod).parameters if name in lengths}
    return lambda *args: mod(*args, **named)
