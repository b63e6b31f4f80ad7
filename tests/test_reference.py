"""The reference against definitions of its own: loops over scalars, PyTorch's attention, and identities."""

from __future__ import annotations

import math
import tracemalloc

import compare
import ml_dtypes
import numpy as np
import pytest
from cases import Poisoned, draw, poisoned
from hypothesis import given, settings
from hypothesis import strategies as st

from cuflash import reference
from cuflash.reference import attention


def loops(q, k, v, *, scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, sink=None,
          score_mod=None, mask_mod=None, b=0):  # fmt: skip
    """One sequence [len, heads, d], a scalar at a time, straight from the equations."""
    (m, heads_q, d), (n, heads_kv, d_v) = q.shape, (k.shape[0], *v.shape[1:])
    out, lse = np.zeros((m, heads_q, d_v)), np.full((heads_q, m), -np.inf)
    max_logit = np.full((heads_q, m), -np.inf)
    for h in range(heads_q):
        h_kv = h * heads_kv // heads_q
        for i in range(m):
            weights, scores = np.zeros(n), {}
            for j in range(n):
                diagonal = i + n - m
                if causal and j > diagonal:
                    continue
                if window_size[0] >= 0 and j < diagonal - window_size[0]:
                    continue
                if window_size[1] >= 0 and j > diagonal + window_size[1]:
                    continue
                if mask_mod is not None and not mask_mod(b, h, i, j):
                    continue
                s = sum(float(q[i, h, c]) * float(k[j, h_kv, c]) for c in range(d))
                s *= d**-0.5 if scale is None else scale
                if softcap:
                    s = softcap * math.tanh(s / softcap)
                if alibi_slopes is not None:
                    s -= float(alibi_slopes[h]) * abs(diagonal - j)
                if score_mod is not None:
                    s = score_mod(s, b, h, i, j)
                scores[j] = s
            if scores:
                max_logit[h, i] = max(scores.values())
            total = math.fsum(math.exp(s) for s in scores.values())
            total += math.exp(sink[h]) if sink is not None else 0.0
            lse[h, i] = math.log(total) if total > 0 else -math.inf
            for j, s in scores.items():
                weights[j] = math.exp(s) / total
            for c in range(d_v):
                out[i, h, c] = sum(weights[j] * float(v[j, h_kv, c]) for j in range(n))
    return out, lse, max_logit


def draws(rng, m, n, heads_q=2, heads_kv=1, d=5, d_v=3, dtype=np.float64):
    shapes = (m, heads_q, d), (n, heads_kv, d), (n, heads_kv, d_v)
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)


def dense(arrays):
    return tuple(x[None] for x in arrays)


def assert_same(actual, expected, rtol=1e-12):
    for x, y in zip(actual, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol)


FEATURES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (2, 1)},
    "left window, causal": {"window_size": (3, -1), "causal": True},
    "right window, causal": {"window_size": (-1, 2), "causal": True},
    "window of the diagonal": {"window_size": (0, 0)},
    "None is unlimited": {"window_size": (None, 2)},
    "softcap": {"softcap": 0.7},
    "alibi": {"alibi_slopes": np.array([0.3, 1.1])},
    "sink": {"sink": np.array([-1.0, 2.0])},
    "scale": {"scale": 1.7},
    "scale 0": {"scale": 0.0},
    "negative scale": {"scale": -0.9},
    "mask_mod": {"mask_mod": lambda b, h, q, k: (q * 3 + k + h) % 2 == 0},
    "score_mod": {"score_mod": lambda s, b, h, q, k: s * 0.5 + h - 0.1 * (q - k) + b},
    "all": {
        "causal": True,
        "window_size": (4, 0),
        "softcap": 2.0,
        "alibi_slopes": np.array([0.1, 0.2]),
        "sink": np.array([0.5, -0.5]),
        "scale": -0.4,
        "mask_mod": lambda b, h, q, k: k != 1,
        "score_mod": lambda s, b, h, q, k: s + 0.2 * k,
    },
}


@pytest.mark.parametrize("lengths", [(6, 6), (4, 7), (7, 4), (1, 5), (5, 1), (0, 3), (3, 0)], ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_against_loops(feature, lengths, rng):
    keywords = FEATURES[feature]
    one = draws(rng, *lengths)
    scalar = {k: w if k != "window_size" else tuple(-1 if x is None else x for x in w) for k, w in keywords.items()}
    expected = loops(*one, **scalar)
    out, lse, max_logit = attention(*dense(one), **keywords)
    assert_same((out[0], lse[0], max_logit[0]), expected)


@pytest.mark.parametrize("groups", [(1, 1), (4, 4), (4, 2), (6, 2), (8, 1)], ids=str)
def test_query_heads_share_key_heads(groups, rng):
    one = draws(rng, 4, 5, *groups)
    out, lse, max_logit = attention(*dense(one), causal=True)
    assert_same((out[0], lse[0], max_logit[0]), loops(*one, causal=True))


@pytest.mark.parametrize("feature", FEATURES)
def test_packed_sequences_against_loops(feature, rng):
    keywords = FEATURES[feature]
    scalar = {k: w if k != "window_size" else tuple(-1 if x is None else x for x in w) for k, w in keywords.items()}
    parts = [draws(rng, m, n) for m, n in ((3, 5), (0, 2), (4, 4), (2, 0), (0, 0), (5, 3))]
    q, k, v = (np.concatenate([part[i] for part in parts]) for i in range(3))
    cu_q, cu_k = ([0, *np.cumsum([len(part[i]) for part in parts])] for i in range(2))
    out, lse, max_logit = attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=np.array(cu_k, np.int32), **keywords)
    for b, part in enumerate(parts):
        rows = slice(cu_q[b], cu_q[b + 1])
        assert_same((out[rows], lse[:, rows], max_logit[:, rows]), loops(*part, b=b, **scalar))


def test_drawn_cases_against_the_naive_way_in_float64(seed):
    """Every feature at once, written a second time (compare.naive), at the lengths kernels are tested at."""
    for case in draw(60, seed, cost=600_000):
        inputs = case.inputs()
        q, k, v = (x.astype(np.float64) for x in (inputs.q, inputs.k, inputs.v))
        try:
            assert_same(attention(q, k, v, **inputs.keywords), compare.naive(q, k, v, **inputs.keywords), rtol=1e-9)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from None


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_dtype_follows_the_rule(dtype, seed):
    for case in (c for c in draw(48, seed, cost=600_000) if c.dtype == dtype):
        inputs = case.inputs()
        out, lse, max_logit = attention(inputs.q, inputs.k, inputs.v, **inputs.keywords)
        assert out.dtype == inputs.q.dtype and lse.dtype == max_logit.dtype == np.float32
        try:
            compare.check_forward(inputs.q, inputs.k, inputs.v, out, lse, max_logit, **inputs.keywords)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from None
        inputs.check_guards()


@pytest.mark.parametrize("options", ["plain", "causal", "gqa", "mask", "scale"])
def test_against_torch(options, rng):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    q, k, v = dense(draws(rng, 33, 33 if options == "causal" else 50, 6, 2 if options == "gqa" else 6, 16, 24))
    keywords, torch_keywords = {}, {}
    if options == "causal":
        keywords, torch_keywords = {"causal": True}, {"is_causal": True}
    if options == "mask":  # bottom-right, with a window
        offset = np.arange(50) - (np.arange(33)[:, None] + 50 - 33)
        keywords = {"causal": True, "window_size": (9, -1)}
        torch_keywords = {"attn_mask": torch.from_numpy((offset <= 0) & (offset >= -9))}
    if options == "scale":
        keywords, torch_keywords = {"scale": 0.3}, {"scale": 0.3}
    tensors = [torch.from_numpy(x).transpose(1, 2) for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *tensors, enable_gqa=options == "gqa", **torch_keywords
    ).transpose(1, 2)
    np.testing.assert_allclose(attention(q, k, v, **keywords)[0], expected.numpy(), rtol=1e-12, atol=1e-12)


# What the sequences own, and what nobody does. -----------------------------------------------------------------------


def test_rows_that_keep_nothing(rng):
    q, k, v = dense(draws(rng, 5, 3))  # causal, bottom-right: the first two queries stand before every key
    out, lse, max_logit = attention(q, k, v, causal=True)
    assert (out[0, :2] == 0).all() and (lse[0, :, :2] == -np.inf).all() and (max_logit[0, :, :2] == -np.inf).all()
    assert np.isfinite(lse[0, :, 2:]).all() and (out[0, 2:] != 0).all()

    sink = np.array([0.25, -3.0])
    out, lse, max_logit = attention(q, k, v, causal=True, sink=sink)
    assert (out[0, :2] == 0).all() and (lse[0, :, :2] == sink[:, None]).all()
    assert (max_logit[0, :, :2] == -np.inf).all()


@pytest.mark.parametrize("sink", [None, np.array([0.5, 7.0])], ids=["no sink", "sink"])
def test_rows_outside_every_sequence(sink, rng):
    q, k, v = draws(rng, 12, 9)
    out, lse, max_logit = attention(q, k, v, cu_seqlens_q=[0, 4, 7], cu_seqlens_k=[0, 5, 7], sink=sink)
    assert (out[7:] == 0).all() and (lse[:, 7:] == -np.inf).all() and (max_logit[:, 7:] == -np.inf).all()
    assert np.isfinite(lse[:, :7]).all()

    out, lse, max_logit = attention(
        q, k, v, cu_seqlens_q=[0, 4, 7], cu_seqlens_k=[0, 5, 7], seqused_q=[2, 3], seqused_k=[5, 0], sink=sink
    )
    for rows in (slice(2, 4), slice(7, 12)):
        assert (out[rows] == 0).all() and (lse[:, rows] == -np.inf).all() and (max_logit[:, rows] == -np.inf).all()
    assert (out[4:7] == 0).all()  # in a sequence, without a key
    assert (lse[:, 4:7] == (-np.inf if sink is None else sink[:, None])).all()

    out, lse, _ = attention(*dense((q, k, v)), seqused_q=np.array([5], np.int32), sink=sink)
    assert (out[0, 5:] == 0).all() and (lse[0, :, 5:] == -np.inf).all() and np.isfinite(lse[0, :, :5]).all()


def test_used_lengths_are_the_lengths(rng):
    """Causal, window, ALiBi and mods all align with what is used, dense and packed."""
    q, k, v = draws(rng, 9, 11)
    keywords = {
        "causal": True,
        "window_size": (4, -1),
        "alibi_slopes": np.array([0.2, 0.4]),
        "mask_mod": lambda b, h, q_idx, kv_idx, q_len, kv_len: (kv_idx < kv_len - 1) | (q_idx == q_len - 1),
    }
    expected = attention(*dense((q[:6], k[:8], v[:8])), **keywords)
    actual = attention(*dense((q, k, v)), seqused_q=[6], seqused_k=[8], **keywords)
    assert (actual[0][:, :6] == expected[0]).all() and (actual[1][:, :, :6] == expected[1]).all()
    actual = attention(q, k, v, cu_seqlens_q=[0, 9], cu_seqlens_k=[0, 11], seqused_q=[6], seqused_k=[8], **keywords)
    assert (actual[0][:6] == expected[0][0]).all() and (actual[1][:, :6] == expected[1][0]).all()


@pytest.mark.parametrize(
    "shape",
    [(0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 0, 0), (0, 0, 0)],
    ids=lambda s: "batch {} q_len {} k_len {}".format(*s),
)
def test_empty_dense(shape):
    batch, m, n = shape
    q, k, v = np.ones((batch, m, 4, 8)), np.ones((batch, n, 2, 8)), np.ones((batch, n, 2, 5))
    out, lse, max_logit = attention(q, k, v, causal=True)
    assert out.shape == (batch, m, 4, 5) and lse.shape == max_logit.shape == (batch, 4, m)
    assert (out == 0).all() and (lse == (-np.inf if n == 0 else lse)).all()


@pytest.mark.parametrize("cu", [[0], [0, 0], [0, 0, 0]], ids=str)
def test_empty_packed(cu):
    q, kv = np.ones((2, 4, 8), np.float16), np.ones((0, 2, 8), np.float16)
    out, lse, _ = attention(q, kv, kv, cu_seqlens_q=cu, cu_seqlens_k=cu, sink=np.ones(4))
    assert out.shape == (2, 4, 8) and (out == 0).all() and lse.shape == (4, 2) and (lse == -np.inf).all()


def test_what_nobody_owns_is_never_read(seed):
    """Rows past a sequence's end, past seqused and between strides are NaN in every drawn case."""
    for case in draw(60, seed + 1, cost=600_000):
        inputs = case.inputs()
        assert np.isnan(inputs.guards["q"].buffer[:128].view(inputs.q.dtype).astype(np.float32)).all()
        for x in attention(inputs.q, inputs.k, inputs.v, **inputs.keywords):
            assert not np.isnan(x.astype(np.float32)).any(), case
        inputs.check_guards()


def test_nan_that_a_sequence_owns_is_not_hidden(rng):
    q, k, v = dense(draws(rng, 4, 4, 2, 2))
    q[0, 1, 0] = np.nan
    out, lse, max_logit = attention(q, k, v)
    wrong = np.zeros((4, 2), bool)
    wrong[1, 0] = True
    assert (np.isnan(out[0]).all(axis=-1) == wrong).all() and (np.isnan(out[0]).any(axis=-1) == wrong).all()
    assert (np.isnan(lse[0]) == wrong.T).all() and (np.isnan(max_logit[0]) == wrong.T).all()

    q, k, v = dense(draws(rng, 4, 4, 2, 2))
    k[0, 2, 1, 3] = np.nan  # a key that rows 2 and 3 see
    out = attention(q, k, v, causal=True)[0]
    assert (np.isnan(out[0]).all(axis=-1) == [[0, 0], [0, 0], [0, 1], [0, 1]]).all()


# Modifications of scores. --------------------------------------------------------------------------------------------


def test_mods_see_local_coordinates(rng):
    seen = []

    def score_mod(score, b, h, q_idx, kv_idx, q_len, kv_len):
        assert all(x.dtype == np.int32 for x in (b, h, q_idx, kv_idx))
        assert np.broadcast_shapes(b.shape, h.shape, q_idx.shape, kv_idx.shape) == score.shape
        seen.append((b.item(), h.ravel().tolist(), q_idx.max() + 1 == q_len, kv_idx.max() + 1 == kv_len, q_len, kv_len))
        return score

    q, k, v = draws(rng, 7, 6, 4, 2)
    attention(q, k, v, cu_seqlens_q=[0, 4, 4, 7], cu_seqlens_k=[0, 1, 3, 6], score_mod=score_mod)
    assert seen == [(0, [0, 1, 2, 3], True, True, 4, 1), (2, [0, 1, 2, 3], True, True, 3, 3)]


def test_a_score_mod_sees_the_capped_and_biased_score_and_the_mask_comes_after(rng):
    q, k, v = dense(draws(rng, 3, 3))
    scores = {}

    def keep_score(score, b, h, q_idx, kv_idx):
        scores["seen"] = score
        return score + 100

    slopes = np.array([0.5, 0.25])
    max_logit = attention(q, k, v, softcap=0.5, alibi_slopes=slopes, causal=True, score_mod=keep_score)[2]
    dots = np.einsum("qhd,kd->hqk", q[0], k[0, :, 0]) / math.sqrt(5)
    distance = np.abs(np.arange(3)[:, None] - np.arange(3))
    np.testing.assert_allclose(scores["seen"], 0.5 * np.tanh(dots / 0.5) - slopes[:, None, None] * distance)
    expected = np.where(np.tri(3, dtype=bool), scores["seen"] + 100, -np.inf).max(axis=2)
    np.testing.assert_array_equal(max_logit[0], expected)


def test_mods_say_what_arguments_say(rng):
    q, k, v = dense(draws(rng, 6, 9))
    slopes = np.array([0.3, 0.7])
    expected = attention(q, k, v, causal=True, window_size=(3, -1), alibi_slopes=slopes, softcap=1.5, scale=0.8)

    def score_mod(score, b, h, q_idx, kv_idx, q_len, kv_len):
        return 1.5 * np.tanh(score / 1.5) - slopes[h] * np.abs(q_idx + kv_len - q_len - kv_idx)

    def mask_mod(b, h, q_idx, kv_idx, *, q_len, kv_len):
        position = q_idx + kv_len - q_len
        return (kv_idx <= position) & (kv_idx >= position - 3)

    assert_same(attention(q, k, v, score_mod=score_mod, mask_mod=mask_mod, scale=0.8), expected)


def test_conditions_compose_by_and(rng):
    q, k, v = dense(draws(rng, 5, 5))
    even = attention(q, k, v, causal=True, mask_mod=lambda b, h, q, k: k % 2 == 0)
    assert_same(even, attention(q, k, v, mask_mod=lambda b, h, q, k: (k % 2 == 0) & (k <= q)))
    nothing = attention(q, k, v, mask_mod=lambda b, h, q, k: False)
    assert (nothing[0] == 0).all() and (nothing[1] == -np.inf).all()
    nothing = attention(q, k, v, score_mod=lambda s, b, h, q, k: np.where(q == 2, -np.inf, s))
    assert (nothing[0][0, 2] == 0).all() and (nothing[1][0, :, 2] == -np.inf).all()


def test_alibi_slopes_for_each_sequence(rng):
    q, k, v = (np.concatenate([x, x]) for x in dense(draws(rng, 4, 6)))
    slopes = np.array([[0.1, 0.9], [2.0, 0.0]])
    both = attention(q, k, v, alibi_slopes=slopes)
    for b in range(2):
        one = attention(q[:1], k[:1], v[:1], alibi_slopes=slopes[b])
        assert (both[0][b] == one[0][0]).all() and (both[1][b] == one[1][0]).all()


def test_a_sink_is_in_the_denominator_only(rng):
    q, k, v = dense(draws(rng, 4, 6))
    sink = np.array([0.3, -2.0])
    out, lse, max_logit = attention(q, k, v)
    out_sink, lse_sink, max_sink = attention(q, k, v, sink=sink)
    np.testing.assert_allclose(lse_sink, np.logaddexp(lse, sink[:, None]))
    np.testing.assert_allclose(out_sink, out * np.exp(lse - lse_sink).swapaxes(1, 2)[..., None])
    assert (max_sink == max_logit).all()
    huge = attention(q, k, v, sink=np.array([1e4, -1e4]))
    assert (huge[0][:, :, 0] == 0).all() and (huge[1][0, 0] == 1e4).all()
    np.testing.assert_allclose(huge[0][:, :, 1], out[:, :, 1])


def test_large_scores_do_not_overflow(rng):
    q, k, v = dense(draws(rng, 8, 8, dtype=np.float32))
    out, lse, _ = attention(q, k, v, scale=1e5)
    assert np.isfinite(out).all() and np.isfinite(lse).all()


def test_scale_zero_is_the_mean(rng):
    q, k, v = dense(draws(rng, 3, 7))
    out, lse, max_logit = attention(q, k, v, scale=0.0)
    np.testing.assert_allclose(out[0], np.broadcast_to(v[0].mean(axis=0), out[0].shape))
    np.testing.assert_allclose(lse, math.log(7))
    assert (max_logit == 0).all()


# Types, blocks, memory. ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_dtypes(dtype, rng):
    q, k, v = dense(draws(rng, 9, 9, dtype=dtype))
    out, lse, max_logit = attention(q, k, v)
    computed = np.float64 if dtype == np.float64 else np.float32
    assert out.dtype == dtype and lse.dtype == max_logit.dtype == computed
    oracle = attention(q, k, v, compute_dtype=np.float64)
    assert all(x.dtype == np.float64 for x in oracle)
    eps = float(ml_dtypes.finfo(dtype).eps)
    np.testing.assert_allclose(out.astype(np.float64), oracle[0], rtol=0, atol=4 * eps)
    np.testing.assert_allclose(lse, oracle[1], rtol=0, atol=1e-5)


def test_float64_is_computed_in_float64(rng):
    one = draws(rng, 5, 5)
    out = attention(*dense(one))[0][0]
    assert np.abs(out - loops(*one)[0]).max() < 1e-14
    assert np.abs(attention(*dense(one), compute_dtype=np.float32)[0][0] - out).max() > 1e-10


@pytest.mark.parametrize("block", [1, 7, 40, 100])
@pytest.mark.parametrize("feature", ["plain", "all"])
def test_blocks_do_not_show(block, feature, rng, monkeypatch):
    q, k, v = dense(draws(rng, 13, 10, 6, 3))
    keywords = dict(FEATURES[feature])
    for name in ("alibi_slopes", "sink"):
        if name in keywords:
            keywords[name] = np.tile(keywords[name], 3)
    whole = attention(q, k, v, **keywords)
    monkeypatch.setattr(reference, "_BLOCK_SCORES", block)
    assert_same(attention(q, k, v, **keywords), whole)


def test_packed_dense_and_alone_give_the_same_bits(rng):
    for dtype in (np.float32, np.float16):
        q, k, v = (np.stack(x) for x in zip(*(draws(rng, 70, 90, 4, 2, 32, 32, dtype) for _ in range(3)), strict=True))
        keywords = {"causal": True, "window_size": (50, -1), "softcap": 3.0}
        together = attention(q, k, v, **keywords)
        packed = attention(
            *(x.reshape(-1, *x.shape[2:]) for x in (q, k, v)),
            cu_seqlens_q=np.arange(4) * 70,
            cu_seqlens_k=np.arange(4) * 90,
            **keywords,
        )
        for b in range(3):
            alone = attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], **keywords)
            assert (alone[0][0] == together[0][b]).all() and (alone[1][0] == together[1][b]).all()
            rows = slice(70 * b, 70 * b + 70)
            assert (packed[0][rows] == together[0][b]).all() and (packed[1][:, rows] == together[1][b]).all()


@pytest.mark.parametrize("layout", ["contiguous", "gaps", "heads_first"])
def test_strides(layout, rng):
    arrays = dense(draws(rng, 20, 30, 4, 2, 16, 8, np.float32))
    guards = [poisoned(x.shape, x.dtype, layout=layout, offset=1) for x in arrays]
    for guard, x in zip(guards, arrays, strict=True):
        guard.array[...] = x
    assert (attention(*(g.array for g in guards))[0] == attention(*arrays)[0]).all()


def test_memory_is_linear():
    def peak(length: int) -> int:
        x = np.zeros((length, 1, 8), np.float32)
        tracemalloc.start()
        attention(x, x, x, cu_seqlens_q=[0, length], cu_seqlens_k=[0, length], causal=True, softcap=1.0)
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    short, long = peak(1024), peak(4096)
    assert long < 4.5 * short, f"{short} bytes at 1024, {long} at 4096"
    assert long < 4096 * 4096 * 4, f"{long} bytes are as many as all scores take"


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(2, 40), st.integers(0, 2**31 - 1), st.data())
def test_halves_of_the_keys_merge_by_lse(m, n, numbers, data):
    """out = sum of the halves' outs, each weighted by exp(lse_half - lse)."""
    q, k, v = dense(draws(np.random.default_rng(numbers), m, n))
    cut = data.draw(st.integers(0, n))
    out, lse, max_logit = attention(q, k, v)
    halves = [attention(q, k[:, s], v[:, s]) for s in (slice(0, cut), slice(cut, n))]
    np.testing.assert_allclose(np.logaddexp(halves[0][1], halves[1][1]), lse)
    merged = sum(o * np.exp(half_lse - lse).swapaxes(1, 2)[..., None] for o, half_lse, _ in halves)
    np.testing.assert_allclose(merged, out, atol=1e-12)
    np.testing.assert_allclose(np.maximum(halves[0][2], halves[1][2]), max_logit)


# The traps themselves. -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "gaps", "heads_first"])
def test_a_write_beside_an_array_is_seen(layout):
    for where in (-1, 1, "between"):
        guarded: Poisoned = poisoned((3, 2, 8), np.float16, layout=layout)
        guarded.array[...] = 0
        guarded.check("x")
        begin = guarded.array.ctypes.data - guarded.buffer.ctypes.data
        if where == "between" and layout != "gaps":
            continue
        extent = sum((n - 1) * s for n, s in zip(guarded.array.shape, guarded.array.strides, strict=True)) + 2
        at = {-1: begin - 1, 1: begin + extent, "between": begin + 16}[where]
        guarded.buffer[at] = 0
        with pytest.raises(AssertionError, match="belong to no element"):
            guarded.check("x")
