"""Gradients where rows are out of the ordinary: those that keep nothing, and those whose lse is large."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from backends import using

import cuflash
from cuflash import dtypes, reference

LARGEST = float(np.finfo(np.float32).max)
ROWS, KEYS, NOTHING = 40, 30, 10  # causal: the first NOTHING rows see no key
NO_NUMBERS = (np.nan, np.inf, -np.inf)


def inputs(dtype: str, rows: int = ROWS, keys: int = KEYS, seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    shapes = ((1, rows, 2, 16), (1, keys, 1, 16), (1, keys, 1, 16), (1, rows, 2, 16))
    return tuple(rng.standard_normal(shape).astype(dtypes.BY_NAME[dtype].numpy) for shape in shapes)


def gradients(backend: str, dout: np.ndarray, dlse: np.ndarray, *qkv: np.ndarray, **keywords: Any) -> tuple[Any, ...]:
    """(dq, dk, dv, dsink) and lse."""
    deterministic = keywords.pop("deterministic", True)
    with using(backend, "sm_80"):
        result = cuflash.attention(*qkv, aux=("lse",), **keywords)
        grads = cuflash.attention_backward(
            dout, *qkv, result.out, result.lse, dlse=dlse, deterministic=deterministic, **keywords
        )
    return (grads.dq, grads.dk, grads.dv, grads.dsink), result.lse


@pytest.mark.parametrize("sink", [None, np.array([1.5, -0.3], np.float32)], ids=["", "sink"])
@pytest.mark.parametrize("backend, dtype", [("reference", "float32"), ("emulator", "float16"), ("emulator", "float32")])
def test_rows_that_keep_nothing_ignore_what_is_no_number(backend, dtype, sink):
    """dout and dlse of theirs: the same gradients as of zeros. Where there is a sink, it still receives their dlse."""
    q, k, v, dout = inputs(dtype)
    dlse = np.random.default_rng(1).standard_normal((1, 2, ROWS)).astype(np.float32)
    dout[:, :NOTHING] = 0
    keywords: dict[str, Any] = {"causal": True, "sink": sink}
    want, lse = gradients(backend, dout, dlse, q, k, v, **keywords)
    if sink is not None:
        np.testing.assert_array_equal(lse[0, :, :NOTHING], np.broadcast_to(sink[:, None], (2, NOTHING)))
    for value in NO_NUMBERS:
        dout[0, 3, 0, 5], dout[0, :NOTHING, 1] = value, value
        got, _ = gradients(backend, dout, dlse, q, k, v, **keywords)
        for name, x, y in zip(("dq", "dk", "dv", "dsink"), got, want, strict=True):
            np.testing.assert_array_equal(x, y, err_msg=f"{name}, dout {value}")
        given = dlse.copy()
        given[0, :, :NOTHING] = value
        got, _ = gradients(backend, dout, given, q, k, v, **keywords)
        for name, x, y in zip(("dq", "dk", "dv"), got, want, strict=False):
            np.testing.assert_array_equal(x, y, err_msg=f"{name}, dlse {value}")
        assert sink is None or not np.isfinite(got[3]).any()


def test_atomic_gradients_and_mods_ignore_them_too():
    """dq added up by atomics, the gradient of what a score_mod captured, ALiBi's; rows past `seqused_q`."""
    q, k, v, dout = inputs("float16")
    used, table = np.array([ROWS - 4], np.int32), np.linspace(-1, 1, KEYS).astype(np.float32)
    dlse = np.ones((1, 2, ROWS), np.float32)
    mods = {"score_mod": lambda s, b, h, i, j: s + table[j], "mask_mod": lambda b, h, i, j: i >= j + NOTHING}
    slopes = {"alibi_slopes": np.array([0.5, 0.1], np.float32), "causal": True}
    for keywords in (mods, slopes):
        with using("emulator", "sm_80"):
            result = cuflash.attention(q, k, v, seqused_q=used, aux=("lse",), **keywords)
            empty = np.isneginf(result.lse[0])
            assert empty[:, [0, -1]].all() and not empty[:, 20].any()
            found = []
            for value in (0, np.nan):
                given = np.where(empty.T[None, :, :, None], np.float16(value), dout)
                got = cuflash.attention_backward(
                    given, q, k, v, result.out, result.lse, dlse=np.where(empty, np.float32(value), dlse),
                    seqused_q=used, captured_grads=True, **keywords,
                )  # fmt: skip
                found.append([got.dq, got.dk, got.dv, *got.dcaptured])
        assert len(found[0]) == 4
        for want, got in zip(*found, strict=True):
            np.testing.assert_allclose(got.astype(float), want.astype(float), atol=2e-3, rtol=2e-3)


def far_scores(rng: np.random.Generator) -> np.ndarray:
    """[ROWS, KEYS] float32: each row of one size, from 1e3 to the largest float, its scores equal or apart."""
    sizes = np.minimum(10.0 ** np.linspace(3, 38.6, ROWS), LARGEST) * rng.choice([-1, 1], ROWS)
    spread = rng.choice([0.0, 1.0, 1e-7, 0.1], ROWS)[:, None] * rng.uniform(0, 1, (ROWS, KEYS))
    return np.clip(sizes[:, None] * (1 - spread), -LARGEST, LARGEST).astype(np.float32)


@pytest.mark.parametrize("backend", ["reference", "emulator"])
def test_weights_are_at_most_1_however_lse_is_rounded(backend, seed):
    """P = exp(score - lse), lse of float32: with that lse the gradients are those of float64, P held to 1."""
    scores = far_scores(np.random.default_rng(seed))
    q, k, v, dout = inputs("float32", seed=seed)
    q = np.zeros_like(q)
    dlse = np.zeros((1, 2, ROWS), np.float32)
    (dq, dk, dv, _), lse = gradients(
        backend, dout, dlse, q, k, v, score_mod=lambda s, b, h, i, j: s + scores[i, j], deterministic=False
    )
    assert np.isfinite(lse).all()
    p = np.exp(np.minimum(scores - lse[0][:, :, None].astype(np.float64), 0))
    want = np.einsum("hij,ihd->jd", p, dout[0].astype(np.float64))
    # A score below 2^14 is rounded in base 2 as well.
    np.testing.assert_allclose(dv[0, :, 0], want, rtol=1e-2, atol=1e-2)
    for grad in (dq, dk):
        assert np.isfinite(grad).all() and np.abs(grad).max() < 1e3


def test_gradients_of_large_scores_stay_in_bounds(seed):
    """No NaN, and none far too large, in any way to a large score: a scale, ALiBi beside a soft cap, a sink."""
    q, k, v, dout = inputs("float32", seed=seed)
    dlse = np.ones((1, 2, ROWS), np.float32)
    for size in (1e5, 1e8, 1e20, 1e36):
        for deterministic in (True, False):
            for keywords, unit in (
                ({"scale": size}, size),
                ({"scale": -size}, size),
                ({"alibi_slopes": np.array([size, 1.0], np.float32), "softcap": 20.0}, 1.0),
                ({"sink": np.array([size, -size], np.float32)}, 1.0),
                ({"scale": size, "sink": np.array([size, 1.7 * size], np.float32)}, size),
            ):
                got, _ = gradients("emulator", dout, dlse, q, k, v, deterministic=deterministic, **keywords)
                for grad, times in zip(got, (unit, unit, 1.0, 1.0), strict=True):
                    if grad is not None:
                        assert np.abs(grad.astype(np.float64)).max() <= 1e4 * times, (keywords, deterministic)


def test_the_references_row_that_keeps_nothing_is_not_a_row_of_zeros():
    """A NaN in dout of a row that keeps a key is not hidden, though out is 0 there."""
    q, k, v, dout = inputs("float32")
    v[:] = 0
    dout[0, ROWS - 1, 0, 0] = np.nan
    out, lse, _ = reference.attention(q, k, v, causal=True)
    dq = reference.attention_backward(dout, q, k, v, out, lse, causal=True)[0]
    assert np.isnan(dq[0, ROWS - 1, 0]).any() and not np.isnan(dq[0, : ROWS - 1]).any()
