"""Ready-made scores."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import require
from ..trace.symbols import call, traced
from ..trace.tracer import mod
from .given import is_array, require_int, require_ndim
from .parts import Array, Score, all_with_lengths, named_as_needed, ready_made

_LARGEST = float(np.finfo(np.float32).max)


@ready_made
def alibi(slopes: Array) -> Score:
    """score - slope * |p(q_idx) - kv_idx|: attention with linear biases, Press et al. 2022.

    slopes   floats [heads] or [batch, heads], which may receive a gradient; or the number of heads: then the paper's,
             2 ** (-8 * (h + 1) / heads)

    >>> alibi(np.array([1.0, 0.5]))(0.0, 0, np.array([0, 1]), 2, 0, 3, 3)
    array([-2., -1.])
    """
    if not is_array(slopes):
        require(
            isinstance(slopes, (int, np.integer)),
            f"slopes={slopes!r} must be an array, [heads] or [batch, heads], or the number of heads",
        )
        heads = require_int("slopes", slopes, 1)

        def alibi_of_heads(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any, q_len: Any, kv_len: Any) -> Any:
            return score - 2.0 ** (-8.0 * (h + 1) / heads) * abs(q_idx + (kv_len - q_len) - kv_idx)

        return mod(alibi_of_heads)
    require_ndim("slopes", slopes, (1, 2), "[heads] or [batch, heads]")
    batched = len(slopes.shape) == 2

    def alibi_score(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any, q_len: Any, kv_len: Any) -> Any:
        slope = slopes[b, h] if batched else slopes[h]
        return score - slope * abs(q_idx + (kv_len - q_len) - kv_idx)

    return mod(alibi_score)


@ready_made
def softcap(cap: Array, approximate: bool = False) -> Score:
    """cap * tanh(score / cap): scores stay between -cap and cap, as in Gemma 2.

    cap           a number or an array of no dimensions, which may receive a gradient
    approximate   by the tanh of the hardware, with a relative error of about 2 ** -11, on GPUs

    >>> softcap(2.0)(np.array([0.0, 100.0]), 0, 0, 0, 0)
    array([0., 2.])
    """
    if is_array(cap):
        require_ndim("cap", cap, (0,), "no dimensions: one number")
    else:
        require(
            isinstance(cap, (int, float, np.integer, np.floating)) and bool(0 < cap <= _LARGEST),
            f"cap={cap!r} must be a positive number, at most {_LARGEST:.4g}; for no cap leave the mod away",
        )
    require(
        isinstance(approximate, (bool, np.bool_)),
        f"approximate is a {type(approximate).__qualname__} and must be True or False: pass bool(approximate)",
    )

    def softcap_score(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return cap * _tanh(score / cap, approximate)

    return mod(softcap_score)


@ready_made
def relative_bias(table: Array) -> Score:
    """score + table[h, clip(kv_idx - p, -R, R) + R]: a bias learned for each distance, Shaw et al. 2018.

    table   floats [heads, 2 R + 1] or [2 R + 1], which may receive a gradient; distances beyond R share the ends

    >>> score = relative_bias(np.array([10.0, 20.0, 30.0]))
    >>> score(1.0, 0, 0, np.array([0, 1, 2]), np.array([2, 1, 0]), 3, 3)
    array([31., 21., 11.])
    """
    require_ndim("table", table, (1, 2), "[heads, 2 R + 1] or [2 R + 1]")
    entries = int(table.shape[-1])
    require(
        entries % 2 == 1,
        f"table.shape={tuple(table.shape)} must end in an odd number, 2 R + 1: a bias for each distance from -R to R",
    )
    furthest = entries // 2
    by_head = len(table.shape) == 2

    def relative_score(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any, q_len: Any, kv_len: Any) -> Any:
        # In this order, so that the index is seen to be no negative one.
        distance = (kv_idx - (q_idx + (kv_len - q_len)) + furthest).clip(None, 2 * furthest).clip(0, None)
        return score + (table[h, distance] if by_head else table[distance])

    return mod(relative_score)


@ready_made
def bias(values: Array) -> Score:
    """score + values[b, h, q_idx, kv_idx], of floats that may receive a gradient.

    values   [q_len, kv_len], [heads, q_len, kv_len] or [batch, heads, q_len, kv_len]; where an axis has one element, it
             serves all

    >>> score = bias(np.arange(4.0).reshape(1, 4))  # one row for all queries
    >>> score(np.zeros(4), 0, 0, 7, np.arange(4))
    array([0., 1., 2., 3.])
    """
    require_ndim("values", values, (2, 3, 4), "[[[batch,] heads,] q_len, kv_len]")
    shape = (1,) * (4 - len(values.shape)) + tuple(values.shape)
    for_all_b, for_all_h, for_all_q, for_all_k = (n == 1 for n in shape)
    ndim_is_2, ndim_is_3 = len(values.shape) == 2, len(values.shape) == 3

    def bias_score(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        b, h = 0 if for_all_b else b, 0 if for_all_h else h
        q_idx, kv_idx = 0 if for_all_q else q_idx, 0 if for_all_k else kv_idx
        if ndim_is_2:
            return score + values[q_idx, kv_idx]
        return score + (values[h, q_idx, kv_idx] if ndim_is_3 else values[b, h, q_idx, kv_idx])

    return mod(bias_score)


@ready_made
def compose(*score_mods: Score) -> Score:
    """One score mod after the other, the first first.

    >>> double = lambda score, b, h, q_idx, kv_idx: 2 * score
    >>> compose(double, softcap(1.0))(np.array([50.0]), 0, 0, 0, 0)
    array([1.])
    """
    steps = all_with_lengths(score_mods)

    def composed_score(
        score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any, q_len: Any = None, kv_len: Any = None
    ) -> Any:
        for step in steps:
            score = step(score, b, h, q_idx, kv_idx, q_len, kv_len)
        return score

    return named_as_needed(composed_score, score_mods)


def _tanh(x: Any, approximate: bool) -> Any:
    if approximate and traced(x):
        return call("tanh_approx", (x,), {}, "tanh")
    return x.tanh() if hasattr(x, "tanh") else np.tanh(x)
