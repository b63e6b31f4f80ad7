"""The tolerance rule tells right from wrong: it passes good roundings and catches small mistakes."""

from __future__ import annotations

import compare
import ml_dtypes
import numpy as np
import pytest

from cuflash.reference import attention

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32]


@pytest.fixture
def arrays(rng):
    def make(dtype, q_len=40, k_len=300):
        shapes = (1, q_len, 2, 64), (1, k_len, 1, 64), (1, k_len, 1, 32)
        return tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)

    return make


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_right_result_passes_and_the_naive_one_too(dtype, arrays):
    q, k, v = arrays(dtype)
    assert compare.check_forward(q, k, v, *attention(q, k, v, causal=True), causal=True) < 0.6
    out = compare.naive(q, k, v, causal=True)[0].astype(dtype)
    assert compare.check_forward(q, k, v, out, causal=True) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "mistake",
    [
        "a key dropped",
        "the diagonal missed",
        "one key too many",
        "scale",
        "heads exchanged",
        "a row moved",
        "lse base 2",
    ],
)
def test_mistakes_are_caught(mistake, dtype, arrays):
    q, k, v = arrays(dtype)
    keywords = {"causal": True}
    if mistake == "a key dropped":
        wrong = attention(q, k, v, mask_mod=lambda b, h, i, j: j != 77, **keywords)
    elif mistake == "the diagonal missed":
        wrong = attention(q, k, v, mask_mod=lambda b, h, i, j, q_len, kv_len: j < i + kv_len - q_len)
    elif mistake == "one key too many":
        wrong = attention(q, k, v, window_size=(-1, 1))
    elif mistake == "scale":
        wrong = attention(q, k, v, scale=0.126, **keywords)
    else:
        wrong = attention(q, k, v, **keywords)
        if mistake == "heads exchanged":
            wrong = wrong[0][:, :, ::-1], wrong[1], wrong[2]
        elif mistake == "a row moved":
            wrong[0][0, [3, 4]] = wrong[0][0, [4, 3]]
        else:
            wrong = wrong[0], wrong[1] / np.float32(np.log(2)), wrong[2]
    with pytest.raises(AssertionError, match=r"off by more than allowed, in \d+ rows; the worst at"):
        compare.check_forward(q, k, v, *wrong, **keywords)


def test_infinities_and_nan_are_reported_by_themselves():
    oracle = np.array([[1.0, -np.inf, 2.0, np.nan]])
    assert compare.close(oracle.astype(np.float32), oracle, oracle) == 0
    for at, value, what in ((0, np.nan, "NaN"), (0, -np.inf, "-inf"), (2, np.inf, "+inf"), (3, 0.0, "NaN")):
        actual = oracle.astype(np.float32)
        actual[0, at] = value
        with pytest.raises(AssertionError) as caught:
            compare.close(actual, oracle, oracle, name="lse")
        assert str(caught.value).startswith(f"lse: {what} misplaced in 1 of 4") and f"(0, {at})" in str(caught.value)


def test_the_worst_element_is_named():
    oracle = np.zeros((3, 4, 5))
    actual = oracle.astype(np.float32)
    actual[1, 2, 3], actual[2, 0, 0] = 0.5, 0.1
    with pytest.raises(AssertionError, match=r"2 of 60 .* in 2 rows; the worst at \(1, 2, 3\): 0.5, expected 0"):
        compare.close(actual, oracle, oracle)


def test_an_error_in_a_small_row_does_not_hide_behind_a_large_one():
    oracle = np.array([[1000.0, 1.0], [1.0, 1.0]])
    naive = oracle + np.array([[4.0, 0.0], [0.0, 0.0]])
    actual = (oracle + np.array([[0.0, 0.0], [0.0, 0.05]])).astype(np.float16)
    with pytest.raises(AssertionError, match=r"\(1, 1\)"):
        compare.close(actual, oracle, naive)
