"""Attention in NumPy: the definition every kernel is tested against, and the backend for host arrays.

For one query head and one sequence, with queries `q [q_len, d]`, keys `k [k_len, d]` and values `v [k_len, d_v]`:

    s[i, j] = scale * dot(q[i], k[j])                       the score of query i and key j
    s[i, j] = softcap * tanh(s[i, j] / softcap)             if softcap > 0
    s[i, j] = s[i, j] - slope * |i + k_len - q_len - j|     if ALiBi slopes are given
    s[i, j] = score_mod(s[i, j], b, h, i, j)                if given
    s[i, j] = -inf                                          where a mask says so
    p[i, :] = softmax(s[i, :])                              a sink adds exp(sink) to the denominator
    out[i]  = sum_j p[i, j] * v[j]
    lse[i]  = log(sum_j exp(s[i, j]) + exp(sink))           the logarithm of softmax's denominator

Queries and keys are aligned at their ends: query i sits at key position `i + k_len - q_len`, so that the last query
sees the last key. Causal keeps the keys up to that position, a window (left, right) those at most `left` before and
`right` after it. Query head h reads key head `h // (heads_q // heads_kv)`.

Query rows are taken a block at a time, each against all the keys it may see, so memory grows with the length and not
with its square. Only rows that a sequence owns are ever read: what lies behind a sequence's end may be NaN.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

# Scores held at a time: a block of query rows takes as many rows, and then as many heads, as fit. 2 MB of float32 stays
# in a core's cache and still makes matrices large enough for BLAS to be fast.
_BLOCK_SCORES = 1 << 19

Lengths = np.ndarray | Sequence[int]


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
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
    score_mod: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    compute_dtype: Any = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Attention of dense or packed NumPy arrays -> (out, lse, max_logit).

    q [batch, q_len, heads_q, d], k [batch, k_len, heads_kv, d], v [batch, k_len, heads_kv, d_v], or, with
    `cu_seqlens_q` and `cu_seqlens_k` [batch + 1] from 0, packed [total_q, heads_q, d], [total_k, heads_kv, d],
    [total_k, heads_kv, d_v]: sequence b owns the rows cu_seqlens[b] to cu_seqlens[b + 1]. `seqused_q`, `seqused_k`
    [batch] shorten each sequence to its first rows. float16, bfloat16 (ml_dtypes), float32 or float64, any strides.

    scale         multiplies q.k; any finite number; None: 1 / sqrt(d)
    window_size   (left, right) keys kept on either side of the diagonal; -1 or None: all
    alibi_slopes  [heads_q] or [batch, heads_q]
    sink          [heads_q], a learnable score without a value
    score_mod     f(score, b, h, q_idx, kv_idx) -> score, and
    mask_mod      f(b, h, q_idx, kv_idx) -> bool, on NumPy arrays that broadcast to [heads, rows, keys]: int32
                  indices, local to the sequence. Either may also name q_len and kv_len and gets them as ints.

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
    heads_q, head_dim = q.shape[-2:]
    dtype = np.dtype(compute_dtype or (np.float64 if q.dtype == np.float64 else np.float32))
    batch = len(cu_seqlens_q) - 1 if cu_seqlens_q is not None else q.shape[0]
    left, right = (math.inf if w is None or w < 0 else w for w in window_size)
    slopes = None if alibi_slopes is None else np.broadcast_to(np.asarray(alibi_slopes, dtype), (batch, heads_q))

    rows_shape = q.shape[:-2]  # (batch, q_len) or (total_q,)
    out = np.zeros((*rows_shape, heads_q, v.shape[-1]), q.dtype if compute_dtype is None else dtype)
    lse = np.full((*rows_shape[:-1], heads_q, rows_shape[-1]), -np.inf, dtype)
    max_logit = np.full_like(lse, -np.inf)

    rows_q = _rows_of_sequences(q, cu_seqlens_q, seqused_q)
    rows_k = _rows_of_sequences(k, cu_seqlens_k, seqused_k)
    for b, (at_q, at_k) in enumerate(zip(rows_q, rows_k, strict=True)):
        at_lse = (*at_q[:-1], slice(None), at_q[-1])
        # Infinite or NaN values that the sequence owns are its own affair: they come out, without a warning.
        with np.errstate(all="ignore"):
            _attend(
                q[at_q], k[at_k], v[at_k], out[at_q], lse[at_lse], max_logit[at_lse],
                b=b,
                dtype=dtype,
                scale=1.0 / math.sqrt(head_dim) if scale is None else float(scale),
                left=left,
                right=0 if causal else right,
                softcap=float(softcap),
                slopes=None if slopes is None else slopes[b],
                sink=None if sink is None else np.asarray(sink).astype(dtype),
                score_mod=score_mod,
                mask_mod=mask_mod,
            )  # fmt: skip
    return out, lse, max_logit


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


def _attend(
    q: np.ndarray,  # [q_len, heads_q, d]
    k: np.ndarray,  # [k_len, heads_kv, d]
    v: np.ndarray,  # [k_len, heads_kv, d_v]
    out: np.ndarray,  # [q_len, heads_q, d_v], written
    lse: np.ndarray,  # [heads_q, q_len], written
    max_logit: np.ndarray,  # [heads_q, q_len], written
    *,
    b: int,
    dtype: np.dtype,
    scale: float,
    left: float,
    right: float,
    softcap: float,
    slopes: np.ndarray | None,  # [heads_q]
    sink: np.ndarray | None,  # [heads_q]
    score_mod: Callable[..., Any] | None,
    mask_mod: Callable[..., Any] | None,
) -> None:
    """One sequence: block by block over query rows, for as many key heads at a time as fit."""
    (q_len, heads_q, _), (k_len, heads_kv, _) = q.shape, k.shape
    group = heads_q // heads_kv
    # The sizes depend on this sequence alone, so its bits do not change with what else is in the batch.
    rows = min(max(_BLOCK_SCORES // max(group * k_len, 1), 1), max(q_len, 1))
    key_heads = max(_BLOCK_SCORES // max(group * k_len * rows, 1), 1)
    lengths = {"q_len": q_len, "kv_len": k_len}
    score_mod = score_mod and _with_lengths(score_mod, lengths)
    mask_mod = mask_mod and _with_lengths(mask_mod, lengths)

    for head_kv in range(0, heads_kv, key_heads):
        heads_k = slice(head_kv, min(head_kv + key_heads, heads_kv))
        heads = slice(heads_k.start * group, heads_k.stop * group)
        keys = np.ascontiguousarray(k[:, heads_k].swapaxes(0, 1), dtype)  # [key heads, k_len, d]
        values = np.ascontiguousarray(v[:, heads_k].swapaxes(0, 1), dtype)
        for first_row in range(0, q_len, rows):
            block = slice(first_row, min(first_row + rows, q_len))
            position = np.arange(block.start, block.stop) + (k_len - q_len)  # where each row stands among the keys
            # The keys that causal and window leave to any row of this block.
            first = max(0, position[0] - left)
            last = max(first, min(k_len, position[-1] + right + 1))
            seen = slice(int(first), int(last))
            distance = np.arange(seen.start, seen.stop) - position[:, None]  # [rows, keys], 0 on the diagonal

            queries = np.ascontiguousarray(q[block, heads].swapaxes(0, 1), dtype)  # [heads, rows, d]
            s = scale * _matmul_grouped(queries, keys[:, seen].swapaxes(1, 2))  # [heads, rows, keys]
            if softcap > 0:
                s = softcap * np.tanh(s / softcap)
            if slopes is not None:
                s -= slopes[heads, None, None] * np.abs(distance).astype(dtype)

            index = (
                np.full((1, 1, 1), b, np.int32),
                np.arange(heads.start, heads.stop, dtype=np.int32)[:, None, None],
                np.arange(block.start, block.stop, dtype=np.int32)[:, None],
                np.arange(seen.start, seen.stop, dtype=np.int32),
            )
            if score_mod is not None:
                s = np.broadcast_to(np.asarray(score_mod(s, *index), dtype), s.shape)
            keep = (distance >= -left) & (distance <= right)
            if mask_mod is not None:
                keep = keep & np.asarray(mask_mod(*index), bool)
            if not keep.all():
                s = np.where(keep, s, -np.inf)

            # softmax: the largest score is subtracted first, so that exp() cannot overflow
            largest = s.max(axis=2, initial=-np.inf)  # [heads, rows]
            max_logit[heads, block] = largest
            sinks = None if sink is None else sink[heads, None]
            base = largest if sinks is None else np.maximum(largest, sinks)
            base = np.where(base == -np.inf, dtype.type(0), base)  # a row of nothing: exp(-inf - 0) is 0
            p = np.exp(s - base[:, :, None])
            kept = p.sum(axis=2)
            denominator = kept if sinks is None else kept + np.exp(sinks - base)
            lse[heads, block] = base + np.log(denominator)
            o = _matmul_grouped(p, values[:, seen]) / denominator[:, :, None]
            out[block, heads] = np.where(largest[:, :, None] == -np.inf, dtype.type(0), o).swapaxes(0, 1)


def _matmul_grouped(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x [heads_q, m, a] @ y [heads_kv, a, n] -> [heads_q, m, n]; each matrix of y serves a group of x."""
    (heads_q, m, a), (heads_kv, _, n) = x.shape, y.shape
    return (x.reshape(heads_kv, heads_q // heads_kv * m, a) @ y).reshape(heads_q, m, n)


def _with_lengths(mod: Callable[..., Any], lengths: dict[str, int]) -> Callable[..., Any]:
    """`mod` with those of q_len and kv_len bound that it names among its parameters."""
    named = {name: lengths[name] for name in inspect.signature(mod).parameters if name in lengths}
    return lambda *args: mod(*args, **named)
