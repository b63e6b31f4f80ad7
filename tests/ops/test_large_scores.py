"""Scores of any size, up to the largest float: the weights that float64 gives them, in every forward kernel.

Scores come from a table, `s + scores[q_idx, kv_idx]` with queries of zeros, so that they are known to the bit.
"""

from __future__ import annotations

import numpy as np
import pytest
from backends import using

import cuflash
from cuflash import dtypes

LARGEST = float(np.finfo(np.float32).max)
FAR = 2.0**24 * np.log(2)  # where a score in base 2 is 2^24: rows beyond are summed differently (tile/softmax.cuh)
SINKS = (-1e38, 3e38, 1e9, -5.0)
KEYS = 200  # several tiles of every kernel, and a part of one

# (dtype, architecture, split_size): forward_sm80, forward_sm90, and decode_sm80 with combine.
KERNELS = {
    "float16": ("float16", "sm_80", None),
    "float32": ("float32", "sm_80", None),
    "sm_90": ("bfloat16", "sm_90a", None),
    "split": ("float32", "sm_80", 64),
}


def row_of(rng: np.random.Generator) -> np.ndarray:
    """One row of scores, float32 [KEYS]: of a magnitude from 1e-30 to the largest float, of one of several kinds."""
    size = min(10.0 ** rng.uniform(-30, 38.6), LARGEST) * rng.choice([-1, 1])
    if rng.random() < 0.3:
        size = FAR * rng.choice([-1, 1]) * (1 + rng.uniform(-1e-6, 1e-6))
    ulp = abs(np.float32(size) - np.nextafter(np.float32(size), np.float32(0)))
    position = np.arange(KEYS)
    kind = rng.integers(8)
    if kind == 0:
        row = np.full(KEYS, size)
    elif kind == 1:  # a few units in the last place apart
        row = size - np.sign(size) * ulp * rng.integers(0, 4, KEYS)
    elif kind == 2:
        row = size * rng.uniform(-1, 1, KEYS)
    elif kind == 3:  # the maximum grows over the tiles, this way or that
        row = size * np.linspace(*rng.permutation([0.0, 1.0]), KEYS)
    elif kind == 4:  # tiles of small scores between tiles of large ones
        row = np.where(position // 16 % 2 == 0, size, rng.uniform(-3, 3, KEYS))
    elif kind == 5:  # small steps around a large score
        row = size + rng.uniform(-4, 4, KEYS)
    elif kind == 6:
        row = np.where(rng.random(KEYS) < 0.9, -LARGEST, size)
    else:
        row = rng.standard_normal(KEYS) * 3
    row = np.clip(row, -LARGEST, LARGEST).astype(np.float32)
    if rng.random() < 0.3:
        row[rng.random(KEYS) < 0.5] = -np.inf
    return row


def expected(scores: np.ndarray, v: np.ndarray, sink: float = -np.inf) -> tuple[np.ndarray, np.ndarray]:
    """(out, lse) in float64; scores [rows, KEYS], v [KEYS, d]."""
    s = scores.astype(np.float64)
    top = np.maximum(s.max(axis=1, keepdims=True), sink)
    top = np.where(top == -np.inf, 0, top)
    weights = np.exp(s - top)
    total = weights.sum(axis=1, keepdims=True) + np.exp(sink - top)
    with np.errstate(all="ignore"):
        out = np.where(total == 0, 0, weights / total) @ v.astype(np.float64)
        return out, (top + np.log(total))[:, 0]


def check(name: str, scores: np.ndarray, sink: float | None, rng: np.random.Generator) -> np.ndarray:
    """Attention over these scores, [rows, KEYS], by the kernel of that name: out [rows, d]."""
    dtype, arch, split_size = KERNELS[name]
    kind = dtypes.BY_NAME[dtype].numpy
    q = np.zeros((1, len(scores), 1, 16), kind)
    k, v = (rng.standard_normal((1, KEYS, 1, 16)).astype(kind) for _ in range(2))
    own = None if sink is None else np.array([sink], np.float32)
    with using("emulator", arch):
        result = cuflash.attention(
            q, k, v, score_mod=lambda s, b, h, i, j: s + scores[i, j], sink=own, split_size=split_size,
            aux=("lse", "max_logit"),
        )  # fmt: skip
    out, lse = expected(scores, v[0, :, 0], -np.inf if sink is None else np.float64(np.float32(sink)))
    unit = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-20}[dtype]
    error = np.abs(result.out[0, :, 0].astype(np.float64) - out).max(axis=1)
    allowed = 2 * unit * float(np.abs(v).max())  # weights are rounded, and the result
    wrong = ~(error <= allowed)
    assert not wrong.any(), f"{name}: rows {np.flatnonzero(wrong)[:5]}: off by {error[wrong][:5]}"
    np.testing.assert_allclose(result.max_logit[0, 0], scores.max(axis=1), rtol=2.0**-22, atol=1e-37)
    np.testing.assert_allclose(result.lse[0, 0], lse, rtol=3e-7, atol=3e-6)
    return result.out[0, :, 0]


def drawn(rng: np.random.Generator) -> np.ndarray:
    """70 rows, one of which keeps nothing."""
    scores = np.stack([row_of(rng) for _ in range(70)])
    scores[3] = -np.inf
    return scores


@pytest.mark.parametrize("name", KERNELS)
def test_scores_of_any_size(name, seed):
    rng = np.random.default_rng(seed)
    scores = drawn(rng)
    for sink in (None, float(rng.choice(SINKS))):
        check(name, scores, sink, rng)


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_scores_of_any_size_at_length(name, seed):
    for n in range(40):
        rng = np.random.default_rng([seed, n])
        for sink in (None, *SINKS):
            check(name, drawn(rng), sink, rng)


@pytest.mark.parametrize("name", KERNELS)
def test_a_rows_bits_do_not_depend_on_how_large_its_neighbours_are(name, seed):
    scores = drawn(np.random.default_rng(seed))
    near = np.abs(scores.max(axis=1)) < FAR * (1 - 1e-3)
    assert 10 < near.sum() < 60
    alone = np.where(near[:, None], scores, np.float32(0))
    outs = [check(name, s, None, np.random.default_rng(seed)) for s in (scores, alone)]
    np.testing.assert_array_equal(outs[0][near], outs[1][near])


@pytest.mark.parametrize(
    "name, by", [("float16", "argument"), ("float32", "argument"), ("sm_90", "argument"), ("float16", "mod")]
)
def test_a_soft_cap_keeps_the_digits_of_float32(name, by):
    """Of one key the largest score is the score: cap tanh(s / cap), for caps far above all scores, too."""
    dtype, arch, _ = KERNELS[name]
    kind = dtypes.BY_NAME[dtype].numpy
    q, k = (np.zeros((1, rows, 1, 16), kind) for rows in (70, 1))
    q[0, :, 0, 0], k[..., 0] = np.linspace(-60, 60, 70).astype(kind), 1
    s = q[0, :, 0, 0].astype(np.float64)
    for cap in (0.7, 20.0, 50.0, 1e3, 1e5, 1e8, 1e30):
        for scale in (1.0, 2.0**-8):
            keywords = {"softcap": cap} if by == "argument" else {"score_mod": cuflash.mods.softcap(cap)}
            with using("emulator", arch):
                found = cuflash.attention(q, k, k, scale=scale, aux=("max_logit",), **keywords).max_logit[0, 0]
            np.testing.assert_allclose(found, cap * np.tanh(s * scale / cap), rtol=2.0**-21)
