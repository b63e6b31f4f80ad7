"""The reference beside attention as one writes it in NumPy at first, with the whole matrix of scores.

The reference holds a block of scores at a time, so its memory grows with the length and not with its square. It should
not be slower for it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np

from cuflash import reference

from .schema import OURS, Row

NAIVE = "NumPy, whole scores"


def naive(q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool) -> np.ndarray:
    """q [batch, q_len, heads_q, d], k and v [batch, k_len, heads_kv, d] -> out in q's shape.

    >>> x = np.random.default_rng(0).standard_normal((3, 1, 5, 2, 4)).astype(np.float32)
    >>> np.allclose(naive(*x, causal=True), reference.attention(*x, causal=True)[0], atol=1e-6)
    True
    """
    group = q.shape[2] // k.shape[2]
    queries, keys, values = (np.ascontiguousarray(x.transpose(0, 2, 1, 3), np.float32) for x in (q, k, v))
    keys, values = np.repeat(keys, group, axis=1), np.repeat(values, group, axis=1)
    scores = queries @ keys.swapaxes(2, 3) * np.float32(q.shape[3] ** -0.5)
    if causal:
        q_len, k_len = scores.shape[2:]
        scores = np.where(np.arange(k_len) <= np.arange(q_len)[:, None] + k_len - q_len, scores, np.float32(-np.inf))
    weights = np.exp(scores - scores.max(axis=3, keepdims=True))
    weights /= weights.sum(axis=3, keepdims=True)
    return (weights @ values).transpose(0, 2, 1, 3)


def rows(lengths: tuple[int, ...] = (512, 1024, 2048, 4096), times: int = 5) -> Iterator[Row]:
    """Milliseconds by the clock of both in turn, and how many times the naive way's time the reference takes."""
    rng = np.random.default_rng(0)
    for length in lengths:
        for heads_kv in (8, 1):
            for d in (64, 128):
                q = rng.standard_normal((1, length, 8, d), dtype=np.float32)
                k, v = rng.standard_normal((2, 1, length, heads_kv, d), dtype=np.float32)
                for causal in (False, True):
                    case = f"1 x {length}, heads 8 and {heads_kv} x {d}{', causal' if causal else ''}"
                    calls: dict[str, Callable[[], object]] = {
                        OURS: lambda: reference.attention(q, k, v, causal=causal),  # noqa: B023 - called at once
                        NAIVE: lambda: naive(q, k, v, causal),  # noqa: B023
                    }
                    ms: dict[str, list[float]] = {impl: [] for impl in calls}
                    for _ in range(times):
                        for impl, call in calls.items():
                            began = time.perf_counter()
                            call()
                            ms[impl].append((time.perf_counter() - began) * 1e3)
                    theirs = statistics.median(ms[NAIVE])
                    for impl, found in ms.items():
                        low, middle, high = statistics.quantiles(found, n=4, method="inclusive")
                        ratio = {"of_naive": round(middle / theirs, 3)}
                        yield Row("reference", case, impl, ms=middle, spread=high - low, more=ratio)
