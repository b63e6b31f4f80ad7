"""What the answer is: attention and its gradients in float64, of one key head of one sequence.

Every implementation, ours among them, is held against this before it is timed. It takes rows of queries in turns, so
that long sequences fit, and runs where the arrays are: NumPy's or CuPy's.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .cases import Problem
from .inputs import bits, floats

_ELEMENTS = 1 << 25  # of the scores held at once


def solve(problem: Problem, arrays: dict[str, Any], b: int, head_kv: int, xp: Any, gradients: bool) -> dict[str, Any]:
    """out [q_len, group, d] of sequence b and the query heads that share a key head; with gradients also dq, of that
    shape, and dk, dv [k_len, d]. `arrays` as `slice_of` takes them."""
    q_len, k_len = problem.q_lens[b], problem.k_lens[b]
    group = problem.heads // problem.heads_kv
    heads = slice(head_kv * group, (head_kv + 1) * group)
    q = _double(xp, slice_of(problem, arrays["q"], "q", b)[:, heads])
    k, v = (_double(xp, keys_of(problem, arrays, name, b)[:, head_kv]) for name in ("k", "v"))
    dout = _double(xp, slice_of(problem, arrays["dout"], "q", b)[:, heads]) if gradients else None
    out, dq = xp.zeros_like(q), xp.zeros_like(q)
    dk, dv = xp.zeros_like(k), xp.zeros_like(v)
    step = max(1, _ELEMENTS // max(k_len, 1))
    j = xp.arange(k_len)[None]
    cap = float(problem.mask.size) if problem.mask.kind == "softcap" else 0.0
    for first in range(0, q_len, step):
        rows = slice(first, min(first + step, q_len))
        i = xp.arange(rows.start, rows.stop)[:, None]
        keep = problem.mask.keep(xp, i, j, q_len, k_len)
        for g in range(group):
            scores = q[rows, g] @ k.T * problem.scale
            slope = 1.0
            if cap:
                scores = cap * xp.tanh(scores / cap)
                slope = 1.0 - (scores / cap) ** 2
            scores = scores + problem.mask.bias(xp, heads.start + g, problem.heads, i, j, q_len, k_len)
            scores = xp.where(keep, scores, -np.inf)
            p = xp.exp(scores - scores.max(axis=1, keepdims=True))
            p /= p.sum(axis=1, keepdims=True)
            out[rows, g] = p @ v
            if dout is not None:
                dv += p.T @ dout[rows, g]
                delta = (dout[rows, g] * out[rows, g]).sum(axis=1, keepdims=True)
                ds = p * (dout[rows, g] @ v.T - delta) * slope * problem.scale
                dq[rows, g] = ds @ k
                dk += ds.T @ q[rows, g]
    return {"out": out, "dq": dq, "dk": dk, "dv": dv} if gradients else {"out": out}


def slice_of(problem: Problem, x: Any, rows_of: str, b: int) -> Any:
    """The rows of sequence b, [len, heads, d], of an array in the problem's layout; rows_of "q" or "k"."""
    lens = problem.q_lens if rows_of == "q" else problem.k_lens
    if problem.layout == "packed":
        first = sum(lens[:b])
        return x[first : first + lens[b]]
    return x[b, : lens[b]]


def keys_of(problem: Problem, arrays: dict[str, Any], name: str, b: int) -> Any:
    """The keys or values of sequence b, [k_len, heads_kv, d], gathered from pages where they lie in pages."""
    if problem.layout != "pages":
        return slice_of(problem, arrays[name], "k", b)
    used = arrays["page_table"][b, : problem.pages[b]]
    pages = bits(arrays[name])[used]
    return pages.reshape(-1, *pages.shape[2:])[: problem.k_lens[b]]


def _double(xp: Any, x: Any) -> Any:
    return floats(xp, x).astype(xp.float64)


# --- comparing --------------------------------------------------------------------------------------------------------

# Of the norm of the right answer. A key too many or too few moves a row by more; rounding to the dtype, and weights
# rounded before the second product, by less: 0.3 % and 0.05 % are seen in bfloat16 and float16, gradients twice that.
TOLERANCE = {"bfloat16": 0.02, "float16": 0.005, "float32": 0.003}
ROW_TOLERANCE = {"bfloat16": 0.1, "float16": 0.05, "float32": 0.02}


def difference(problem: Problem, name: str, got: Any, right: Any, xp: Any) -> str | None:
    """Why `got` is not the right answer up to rounding, or None if it is. [len, ..., d] both; rows of out count alone.

    >>> p = Problem((2,), (2,), 1, 1, 4, dtype="float32")
    >>> difference(p, "out", np.ones((2, 1, 4)), np.full((2, 1, 4), 2.0), np)
    'out differs from attention in float64 by 50 % of its size'
    """
    error = got.astype(xp.float64) - right
    # Sums, means and maxima of floats are what CuPy has ready; for `isfinite(..).all()` it would compile for seconds.
    size = float(xp.sqrt((right**2).mean())) if right.size else 0.0
    by = float(xp.sqrt((error**2).mean())) / max(size, 1e-3) if right.size else 0.0
    if not math.isfinite(by):
        return f"{name} is not finite everywhere"
    if by > TOLERANCE[problem.dtype] * (1 if name == "out" else 2):
        return f"{name} differs from attention in float64 by {100 * by:.3g} % of its size"
    if name == "out" and right.size:
        rows = xp.sqrt((error**2).mean(axis=-1)) / (xp.sqrt((right**2).mean(axis=-1)) + 0.05 * size)
        if (worst := float(rows.max())) > ROW_TOLERANCE[problem.dtype]:
            return f"a row of out differs from attention in float64 by {100 * worst:.3g} % of its size"
    return None


EXPONENTS = range(-30, 5)


def statistics(got: Any, right: Any, xp: Any) -> dict[str, Any]:
    """{rms, max, size, histogram}: the errors, the root mean square of the right answer, and how many errors lie below
    2**-30, then from each power of two to the next."""
    error = abs(got.astype(xp.float64) - right).ravel()
    size = float(xp.sqrt((right**2).mean()))
    error = error.get() if hasattr(error, "get") else error  # for CuPy's bincount it would compile for seconds
    exponent = np.floor(np.log2(np.maximum(error, 2.0 ** (EXPONENTS[0] - 1))))
    bins = np.clip(exponent, EXPONENTS[0] - 1, EXPONENTS[-1]).astype(np.int64) - (EXPONENTS[0] - 1)
    counts = np.bincount(bins, minlength=len(EXPONENTS) + 1)
    return {
        "rms": float(np.sqrt((error**2).mean())),
        "max": float(error.max()),
        "size": size,
        "histogram": {"first_exponent": EXPONENTS[0] - 1, "counts": [int(n) for n in counts]},
    }
