"""When is a result right? The rule of every numerical test, and the naive attention it needs.

A kernel that rounds as it must cannot match the oracle (float64) to a fixed number of digits: how far it may be off
depends on the data. So the allowance is measured: the same maths done naively in the working dtype, rounding after
every step as eager code does, is off by some amount; a good kernel is off by no more than twice that, plus a few units
in the last place for rows where the naive way is right by luck. flash-attn's own tests have this rule for a whole
array; here it holds for each row, since a wrong row in a long sequence is small beside the errors of short ones.
"""

from __future__ import annotations

import inspect
from typing import Any

import ml_dtypes
import numpy as np

from cuflash import philox, reference

# Units in the last place allowed on top, times the sum of the magnitudes that were added up. Rounding the weights and
# then the result to 16 bits costs at most half a unit each. In float32 an error of the score, some units of the largest
# score, is an error of the weight: `check_forward` multiplies by that score. (A single pass of tf32 instead of three is
# a thousand times worse.)
ULPS = {"float16": 1, "bfloat16": 1, "float32": 8, "float64": 8}

# The special-function unit gives 0 for weights below 2^-126 (".ftz"): a row of such weights, under a sink far above all
# scores, may come out as 0.
FLUSHED = 2.0**-120


def close(
    actual: np.ndarray,
    oracle: np.ndarray,
    naive: np.ndarray,
    *,
    dtype: Any = None,
    magnitude: np.ndarray | float | None = None,
    name: str = "out",
) -> float:
    """Assert that `actual` is as near to `oracle` as the rule asks; returns the largest error over its allowance.

    The allowance of a row (the last axis) is twice the naive way's largest error in it, plus ULPS units in the last
    place of `dtype` (actual's own) times `magnitude` (default: the oracle's). Infinities and NaN must stand exactly
    where the oracle has them.
    """
    assert actual.shape == oracle.shape, f"{name}: shape {actual.shape}, expected {oracle.shape}"
    dtype = np.dtype(dtype or actual.dtype)
    actual, oracle, naive = (np.asarray(x, np.float64) for x in (actual, oracle, naive))
    if actual.size == 0:
        return 0.0
    for what, test in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        wrong = test(actual) != test(oracle)
        if wrong.any():
            at = _first(wrong)
            raise AssertionError(
                f"{name}: {what} misplaced in {wrong.sum()} of {wrong.size} elements ({(wrong & test(actual)).sum()} "
                f"too many), the first at {at}: {actual[at]}, expected {oracle[at]}"
            )
    finite = np.isfinite(oracle)
    oracle = np.where(finite, oracle, 0)
    error = np.abs(np.where(finite, actual, 0) - oracle)
    naive_error = np.where(finite & np.isfinite(naive), np.abs(np.where(finite, naive, 0) - oracle), 0)
    magnitude = np.abs(oracle) if magnitude is None else np.where(np.isfinite(magnitude), magnitude, 0)
    tiny = max(float(ml_dtypes.finfo(dtype).smallest_subnormal), FLUSHED)
    units = ULPS[dtype.name] * float(ml_dtypes.finfo(dtype).eps) * magnitude
    allowed = 2 * naive_error.max(axis=-1, keepdims=True) + units + tiny
    ratio = error / allowed
    if (ratio > 1).any():
        at = np.unravel_index(ratio.argmax(), ratio.shape)
        at = tuple(int(i) for i in at)
        raise AssertionError(
            f"{name}: {(ratio > 1).sum()} of {ratio.size} elements off by more than allowed, in "
            f"{(ratio > 1).any(axis=-1).sum()} rows; the worst at {at}: {actual[at]:.9g}, expected {oracle[at]:.9g}, "
            f"off by {error[at]:.3g} where {np.broadcast_to(allowed, error.shape)[at]:.3g} is allowed and the naive "
            f"way is off by {naive_error[at]:.3g}; first wrong element {_first(ratio > 1)}"
        )
    return float(ratio.max())


def _first(where: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argwhere(where)[0])


def check_forward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    out: np.ndarray,
    lse: np.ndarray | None = None,
    max_logit: np.ndarray | None = None,
    **keywords: Any,
) -> float:
    """Assert that a forward result follows the rule; `keywords` as of `reference.attention`. Returns the worst ratio.

    lse and max_logit are float32 whatever the arrays are, and are held to it: a key left out of a long row shows there
    first.
    """
    # The second half of the values is there for sum_j p_j |v_j|: what rounding the weights is relative to.
    both, *oracle = reference.attention(
        q, k, np.concatenate([v, np.abs(v)], axis=-1), compute_dtype=np.float64, **keywords
    )
    oracle_out, magnitude = np.split(both, 2, axis=-1)
    naive_out, *_ = naive(q, k, v, **keywords)
    _, *exact = reference.attention(q, k, v, compute_dtype=np.float32, **keywords)
    largest = _largest_of(q, k, keywords)
    of_score = 1 + largest if out.dtype.itemsize >= 4 else 1
    worst = close(out, oracle_out, naive_out, magnitude=magnitude * of_score)
    if keywords.get("softcap") and out.dtype.itemsize == 2:
        largest = keywords["softcap"]  # for 16-bit elements softcap is right to a float32 unit of the cap
    for name, actual, right, rough in zip(("lse", "max_logit"), (lse, max_logit), oracle, exact, strict=True):
        if actual is not None:
            assert actual.dtype == np.float32, f"{name}.dtype={actual.dtype}, expected float32"
            ratio = close(actual, right, rough, magnitude=1 + largest, name=name)
            worst = max(worst, ratio)
    return worst


def _largest_of(q: np.ndarray, k: np.ndarray, keywords: dict[str, Any]) -> float:
    """A bound of the final scores' magnitude."""
    scale = keywords.get("scale")
    largest = _largest_score(q, k, q.shape[-1] ** -0.5 if scale is None else scale)
    if keywords.get("softcap"):
        largest = min(largest, keywords["softcap"])
    if keywords.get("alibi_slopes") is not None:
        largest += float(np.abs(keywords["alibi_slopes"]).max(initial=0)) * max(q.shape[-3], k.shape[-3])
    return largest


def _largest_score(q: np.ndarray, k: np.ndarray, scale: float) -> float:
    """A bound of |scale * q.k|, by the norms of the rows; rows of NaN belong to nobody."""
    norms = [np.linalg.norm(np.nan_to_num(x.astype(np.float64), nan=0.0), axis=-1).max(initial=0) for x in (q, k)]
    return float(abs(scale) * norms[0] * norms[1])


def naive(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    seqused_q: Any = None,
    seqused_k: Any = None,
    scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: np.ndarray | None = None,
    sink: np.ndarray | None = None,
    score_mod: Any = None,
    mask_mod: Any = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    offset: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Attention as eager code does it, every intermediate rounded to q's dtype -> (out, lse, max_logit) in float32.

    Written without a look at `reference`: one head at a time, the whole score matrix at once.
    """
    dtype = q.dtype
    wide = np.float64 if dtype == np.float64 else np.float32

    def rounded(x: Any) -> np.ndarray:
        return np.asarray(x).astype(dtype).astype(wide)

    dense = cu_seqlens_q is None
    batch = q.shape[0] if dense else len(cu_seqlens_q) - 1
    heads_q, heads_kv = q.shape[-2], k.shape[-2]
    out = np.zeros((*q.shape[:-1], v.shape[-1]), wide)
    lse = np.full((batch, heads_q, q.shape[1]) if dense else (heads_q, q.shape[0]), -np.inf, wide)
    max_logit = np.full_like(lse, -np.inf)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    left, right = (10**9 if w is None or w < 0 else w for w in window_size)
    right = min(right, 0) if causal else right
    for b in range(batch):
        if dense:
            q_b, k_b, v_b, out_b, lse_b, max_b = q[b], k[b], v[b], out[b], lse[b], max_logit[b]
        else:
            rows_q = slice(int(cu_seqlens_q[b]), int(cu_seqlens_q[b + 1]))
            rows_k = slice(int(cu_seqlens_k[b]), int(cu_seqlens_k[b + 1]))
            q_b, k_b, v_b, out_b = q[rows_q], k[rows_k], v[rows_k], out[rows_q]
            lse_b, max_b = lse[:, rows_q], max_logit[:, rows_q]
        m = len(q_b) if seqused_q is None else int(seqused_q[b])
        n = len(k_b) if seqused_k is None else int(seqused_k[b])
        distance = np.arange(n) - (np.arange(m)[:, None] + n - m)
        keep = (distance >= -left) & (distance <= right)
        places = np.arange(m)[:, None], np.arange(n)
        lengths = {"q_len": m, "kv_len": n}
        for h in range(heads_q):
            h_kv = h // (heads_q // heads_kv)
            with np.errstate(all="ignore"):
                s = rounded(q_b[:m, h].astype(wide) @ k_b[:n, h_kv].astype(wide).T)
                s = rounded(s * rounded(scale))
                if softcap:
                    s = rounded(rounded(np.tanh(rounded(s / softcap))) * softcap)
                if alibi_slopes is not None:
                    slope = np.broadcast_to(alibi_slopes, (batch, heads_q))[b, h]
                    s = rounded(s - rounded(slope * np.abs(distance)))
                if score_mod is not None:
                    s = rounded(score_mod(s, b, h, *places, **_named(score_mod, lengths)))
                s = np.where(keep, s, -np.inf)
                if mask_mod is not None:
                    s = np.where(mask_mod(b, h, *places, **_named(mask_mod, lengths)), s, -np.inf)
                max_b[h, :m] = s.max(axis=1, initial=-np.inf)
                if sink is not None:
                    s = np.concatenate([s, np.full((m, 1), rounded(sink[h]), wide)], axis=1)
                top = s.max(axis=1, initial=-np.inf, keepdims=True)
                e = np.exp(s - np.where(np.isneginf(top), 0, top))
                total = e.sum(axis=1, keepdims=True)
                p = rounded(np.where(total == 0, 0, e / total))[:, :n]
                if dropout_p:
                    rows = np.arange(m)[:, None]
                    kept = philox.dropout_keep(b, h, rows, np.arange(n), seed, offset, dropout_p, heads_q)
                    p = rounded(np.where(kept, p / (1 - dropout_p), 0))
                out_b[:m, h] = rounded(p @ v_b[:n, h_kv].astype(wide))
                lse_b[h, :m] = (np.where(np.isneginf(top), 0, top) + np.log(total))[:, 0]
    return out, lse, max_logit


def _named(mod: Any, lengths: dict[str, int]) -> dict[str, int]:
    """Those lengths that a mod names."""
    return {name: n for name, n in lengths.items() if name in inspect.signature(mod).parameters}


# Gradients. ----------------------------------------------------------------------------------------------------------

GRADIENTS = ("dq", "dk", "dv", "dsink", "dslopes")  # in the order of `reference.attention_backward`


def check_backward(
    dout: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    dq: np.ndarray,
    dk: np.ndarray,
    dv: np.ndarray,
    dsink: np.ndarray | None = None,
    dslopes: np.ndarray | None = None,
    *,
    dlse: np.ndarray | None = None,
    **keywords: Any,
) -> float:
    """Assert that gradients follow the rule; `keywords` as of `reference.attention`. Returns the worst ratio.

    The oracle differentiates its own float64 forward pass, so the error of the kernel's out and lse counts as its own.

    dq, dk and dv are held to the rule row by row, as the forward: a tile left out shows in few rows. What comes on top
    of the naive error (`naive_backward` returns its magnitudes) is not the sum of all magnitudes, as in the forward: a
    gradient is a sum of both signs, hundreds of terms long, and that bound would be as large as the gradient in 16
    bits. Roundings are independent, so the root of the sum of squares is taken: a unit in the last place of it is five
    standard deviations of the sum of all roundings.
    dsink and dslopes have one number a head (and sequence), each a row of its own here.
    """
    out, lse, _ = reference.attention(q, k, v, compute_dtype=np.float64, **keywords)
    arguments = {"dlse": dlse, **keywords}
    oracle = reference.attention_backward(dout, q, k, v, out, lse, compute_dtype=np.float64, **arguments)
    rough, magnitudes = naive_backward(dout, q, k, v, **arguments)
    of_score = 1 + _largest_of(q, k, keywords) if q.dtype.itemsize >= 4 else 1  # as in check_forward
    worst = 0.0
    for name, actual, right, off, magnitude in zip(
        GRADIENTS, (dq, dk, dv, dsink, dslopes), oracle, rough, magnitudes, strict=True
    ):
        assert (actual is not None) <= (right is not None), f"{name} of an input that is not there"
        if actual is not None:
            if name in ("dsink", "dslopes"):
                actual, right, off, magnitude = (x[..., None] for x in (actual, right, off, magnitude))
            ratio = close(actual, right, off, dtype=q.dtype, magnitude=magnitude * of_score, name=name)
            worst = max(worst, ratio)
    return worst


def naive_backward(
    dout: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    dlse: np.ndarray | None = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    seqused_q: Any = None,
    seqused_k: Any = None,
    scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: np.ndarray | None = None,
    sink: np.ndarray | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    offset: int = 0,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What eager code's autograd computes, every intermediate rounded to q's dtype, in float32 -> GRADIENTS, and for
    each the magnitude that a few units in the last place are relative to (see `check_backward`).

    One head at a time, the whole score matrix at once; k and v are expanded to the query heads and their gradients,
    rounded, summed. Differs from the equations of `reference.attention_backward` as autograd does: the gradient of the
    softmax is P * (dP - sum_j P dP), without delta.
    """
    dtype = q.dtype
    wide = np.float64 if dtype == np.float64 else np.float32
    # Below the smallest normal number the unit of rounding shrinks no further.
    normal = float(ml_dtypes.finfo(dtype).smallest_normal)
    # A kernel's tanh, right to some units of float32, leaves that much of 1 - tanh^2 where it saturates.
    of_tanh = 2 * 2.0**-23 / float(ml_dtypes.finfo(dtype).eps) * ULPS["float32"] / ULPS[dtype.name] if softcap else 0

    def rounded(x: Any) -> np.ndarray:
        return np.asarray(x).astype(dtype).astype(wide)

    def squares(x: np.ndarray) -> np.ndarray:
        return np.asarray(x, np.float64) ** 2

    dense = cu_seqlens_q is None
    batch = q.shape[0] if dense else len(cu_seqlens_q) - 1
    heads_q, heads_kv = q.shape[-2], k.shape[-2]
    shapes = q.shape, k.shape, v.shape, (heads_q,), (batch, heads_q)
    grads = [np.zeros(shape, wide) for shape in shapes]
    variances = [np.zeros(shape) for shape in shapes]  # sums of squares
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    left, right = (10**9 if w is None or w < 0 else w for w in window_size)
    right = min(right, 0) if causal else right
    for b in range(batch):
        if dense:
            at_q, at_k, at_lse = (b, slice(None)), (b, slice(None)), (b,)
        else:
            at_q, at_k = (slice(int(cu[b]), int(cu[b + 1])) for cu in (cu_seqlens_q, cu_seqlens_k))
            at_lse = (slice(None), at_q)
        q_b, dout_b, k_b, v_b = q[at_q], dout[at_q], k[at_k], v[at_k]
        m = len(q_b) if seqused_q is None else int(seqused_q[b])
        n = len(k_b) if seqused_k is None else int(seqused_k[b])
        distance = np.arange(n) - (np.arange(m)[:, None] + n - m)
        keep = (distance >= -left) & (distance <= right)
        for h in range(heads_q):
            h_kv = h // (heads_q // heads_kv)
            q_h, dout_h, k_h, v_h = (x.astype(wide) for x in (q_b[:m, h], dout_b[:m, h], k_b[:n, h_kv], v_b[:n, h_kv]))
            dlse_h = np.zeros(m, wide) if dlse is None else dlse[at_lse][h, :m].astype(wide)
            with np.errstate(all="ignore"):
                s = rounded(rounded(q_h @ k_h.T) * rounded(scale))
                slope_of_cap = 1.0
                if softcap:
                    tanh = rounded(np.tanh(rounded(s / softcap)))
                    s, slope_of_cap = rounded(tanh * softcap), 1 - tanh**2
                if alibi_slopes is not None:
                    s = rounded(s - rounded(np.broadcast_to(alibi_slopes, (batch, heads_q))[b, h] * np.abs(distance)))
                s = np.where(keep, s, -np.inf)
                sinks = np.full((m, 1), -np.inf if sink is None else rounded(sink[h]), wide)
                s = np.concatenate([s, sinks], axis=1)
                top = s.max(axis=1, keepdims=True)
                e = np.exp(s - np.where(np.isneginf(top), 0, top))
                total = e.sum(axis=1, keepdims=True)
                p = rounded(np.where(total == 0, 0, e / total))
                weights, p_sink = p[:, :n], p[:, n]
                dropped = np.ones((m, n), wide)
                if dropout_p:
                    kept = philox.dropout_keep(
                        b, h, np.arange(m)[:, None], np.arange(n), seed, offset, dropout_p, heads_q
                    )
                    dropped = kept * wide(1 / (1 - dropout_p))
                used = rounded(weights * dropped)
                o = rounded(used @ v_h)
                dp = rounded(rounded(dout_h @ v_h.T) * dropped)
                delta = (weights * dp).sum(axis=1) - dlse_h
                ds = np.where(keep, rounded(weights * (dp - delta[:, None])), 0)
                raw = rounded(rounded(ds * slope_of_cap) * rounded(scale))
                dslope, dsink_rows = -ds * np.abs(distance), -rounded(p_sink * delta)
                parts = raw @ k_h, raw.T @ q_h, used.T @ dout_h

                # What roundings are relative to: the weights, dS, and through delta the output's elements.
                by_o = np.sqrt(squares(dout_h * o).sum(axis=1))  # [m]
                s_unit = abs(scale) * np.where(keep, np.maximum(abs(ds) * (slope_of_cap + of_tanh), normal), 0)
                p_unit = abs(scale) * weights * slope_of_cap
                from_o = by_o[:, None] * (p_unit @ np.abs(k_h)) if n else np.zeros((m, q.shape[-1]))
                used_unit = np.where(keep & (dropped > 0), np.maximum(used, normal), 0)
                roundings = (
                    squares(s_unit) @ squares(k_h) + squares(from_o),
                    squares(s_unit).T @ squares(q_h) + squares(p_unit * by_o[:, None]).T @ squares(q_h),
                    squares(used_unit).T @ squares(dout_h),
                )
                by_distance = (weights * np.abs(distance)).sum(axis=1)
                dslope_unit = squares(dslope).sum() + squares(by_o * by_distance).sum()
                dsink_unit = squares(p_sink * by_o).sum() + squares(dsink_rows).sum()
            for i, at in enumerate(((at_q, m, h), (at_k, n, h_kv), (at_k, n, h_kv))):
                where, rows, head = at
                grads[i][where][:rows, head] += rounded(parts[i])
                variances[i][where][:rows, head] += roundings[i] + squares(parts[i])
            grads[3][h] += dsink_rows.sum()
            variances[3][h] += dsink_unit
            grads[4][b, h] += dslope.sum()
            variances[4][b, h] += dslope_unit
    if alibi_slopes is not None and alibi_slopes.ndim == 1:
        grads[4], variances[4] = grads[4].sum(axis=0), variances[4].sum(axis=0)
    return grads, [np.sqrt(x) + np.abs(g) for x, g in zip(variances, grads, strict=True)]
