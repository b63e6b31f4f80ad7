"""The tolerance rule tells right from wrong: it passes good roundings and catches small mistakes."""

from __future__ import annotations

import compare
import ml_dtypes
import numpy as np
import pytest

from cuflash import reference
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


# Gradients. ----------------------------------------------------------------------------------------------------------


def as_a_kernel(dtype, dout, q, k, v, dlse, monkeypatch, **keywords):
    """The reference's gradients, with P and dS rounded to 16 bits where kernels hand them to a matrix instruction."""
    out, lse, _ = attention(q, k, v, **keywords)
    grouped, summed = reference._matmul_grouped, reference._matmul_summed

    def rounded(x):
        return x.astype(dtype).astype(x.dtype)

    with monkeypatch.context() as patch:
        patch.setattr(reference, "_matmul_grouped", lambda x, y: grouped(rounded(x), y))
        patch.setattr(reference, "_matmul_summed", lambda x, y, heads: summed(rounded(x), y, heads))
        return reference.attention_backward(dout, q, k, v, out, lse, dlse=dlse, **keywords)


BACKWARD = {"causal": True, "softcap": 2.0, "alibi_slopes": np.array([0.01, 0.02]), "sink": np.array([1.0, -1.0])}


@pytest.fixture
def backward_arrays(rng, arrays):
    def make(dtype):
        q, k, v = arrays(dtype)
        dout = rng.standard_normal((*q.shape[:-1], v.shape[-1])).astype(dtype)
        return dout, q, k, v, rng.standard_normal((1, 2, 40)).astype(np.float32)

    return make


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keywords", [{"causal": True}, BACKWARD], ids=["causal", "all"])
def test_right_gradients_pass_and_naive_ones_too(dtype, keywords, backward_arrays, monkeypatch):
    dout, q, k, v, dlse = backward_arrays(dtype)
    grads = as_a_kernel(dtype, dout, q, k, v, dlse, monkeypatch, **keywords)
    assert compare.check_backward(dout, q, k, v, *grads, dlse=dlse, **keywords) < 0.7
    naive, _ = compare.naive_backward(dout, q, k, v, dlse=dlse, **keywords)
    naive = [x.astype(dtype) if i < 3 else x if keywords is BACKWARD else None for i, x in enumerate(naive)]
    assert compare.check_backward(dout, q, k, v, *naive, dlse=dlse, **keywords) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "mistake, seen_in",
    [
        ("a key dropped", "dk"),
        ("the diagonal missed", "dq"),
        ("one key too many", "dq"),
        ("scale", "dq"),
        ("dlse forgotten", "dq"),
        ("delta forgotten", "dq"),
        ("softcap's slope forgotten", "dq"),
        ("a query head left out of its group", "dk"),
        ("the last row of dout left out", "dq"),
        ("a row moved", "dv"),
        ("the sink's gradient of one row left out", "dsink"),
        ("slopes by distance from the start", "dslopes"),
    ],
)
def test_wrong_gradients_are_caught(mistake, seen_in, dtype, backward_arrays, monkeypatch):
    arrays = dout, q, k, v, dlse = backward_arrays(dtype)
    right = wrong = as_a_kernel(dtype, *arrays, monkeypatch, **BACKWARD)
    if mistake == "a key dropped":
        wrong = as_a_kernel(dtype, *arrays, monkeypatch, **BACKWARD, mask_mod=lambda b, h, i, j: j != 77)
    elif mistake == "the diagonal missed":
        off = {"causal": False, "mask_mod": lambda b, h, i, j, q_len, kv_len: j < i + kv_len - q_len}
        wrong = as_a_kernel(dtype, *arrays, monkeypatch, **{**BACKWARD, **off})
    elif mistake == "one key too many":
        wrong = as_a_kernel(dtype, *arrays, monkeypatch, **{**BACKWARD, "causal": False, "window_size": (-1, 1)})
    elif mistake == "scale":
        wrong = (right[0] * dtype(1.02), *right[1:])
    elif mistake == "dlse forgotten":
        wrong = as_a_kernel(dtype, dout, q, k, v, None, monkeypatch, **BACKWARD)
    elif mistake == "delta forgotten":
        out, lse, _ = attention(q, k, v, **BACKWARD)
        wrong = reference.attention_backward(dout, q, k, v, out * dtype(0), lse, dlse=dlse, **BACKWARD)
    elif mistake == "softcap's slope forgotten":
        blocks = reference._blocks
        with monkeypatch.context() as patch:
            patch.setattr(reference, "_blocks", lambda *a: (block._replace(tanh=None) for block in blocks(*a)))
            wrong = as_a_kernel(dtype, *arrays, monkeypatch, **BACKWARD)
    elif mistake == "a query head left out of its group":
        one = (x[:, :, :1] for x in (dout, q))
        alone = {**BACKWARD, "alibi_slopes": BACKWARD["alibi_slopes"][:1], "sink": BACKWARD["sink"][:1]}
        wrong = (right[0], *as_a_kernel(dtype, *one, k, v, dlse[:, :1], monkeypatch, **alone)[1:3], *right[3:])
    elif mistake == "the last row of dout left out":
        cut = dout.copy()
        cut[:, -1] = 0
        wrong = as_a_kernel(dtype, cut, q, k, v, dlse, monkeypatch, **BACKWARD)
    elif mistake == "a row moved":
        right[2][0, [3, 4]] = right[2][0, [4, 3]]
    elif mistake == "the sink's gradient of one row left out":
        part = as_a_kernel(dtype, *(x[:, :39] for x in (dout, q)), k[:, :299], v[:, :299], dlse[..., :39], monkeypatch,
                           **BACKWARD)  # fmt: skip
        wrong = (*right[:3], part[3], right[4])
    else:
        wrong = (*right[:4], right[4] * 1.1)
    with pytest.raises(AssertionError, match=rf"\b{seen_in}: .*off by more than allowed, in \d+ rows; the worst at"):
        grads = [x if name == seen_in else y for name, x, y in zip(compare.GRADIENTS, wrong, right, strict=True)]
        compare.check_backward(dout, q, k, v, *grads, dlse=dlse, **BACKWARD)
