"""score_mod, mask_mod and block_mask through `attention`, `attention_backward` and the questions: what they capture.

What mods mean is tests/trace's affair and test_reference's; here it is how they get to where they are computed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from backends import using
from recorded import KINDS, recording

import cuflash
from cuflash import frameworks, reference
from cuflash.call import bind
from cuflash.errors import ArgumentError, CuflashError, UnsupportedError

AUX = ("lse", "max_logit")


def arrays(rng, dtype=np.float32, q_len=7, k_len=9):
    q = rng.standard_normal((2, q_len, 4, 16)).astype(dtype)
    k, v = rng.standard_normal((2, 2, k_len, 2, 16)).astype(dtype)
    return q, k, v


def packed(rng):
    q = rng.standard_normal((12, 4, 16)).astype(np.float32)
    k, v = rng.standard_normal((2, 11, 2, 16)).astype(np.float32)
    return (q, k, v), {"cu_seqlens_q": np.array([0, 5, 12], np.int32), "cu_seqlens_k": np.array([0, 8, 11], np.int32)}


@pytest.fixture(params=["reference", "emulator"])
def backend(request):
    with using("auto" if request.param == "reference" else request.param):
        yield request.param


def assert_same(found, expected, tolerance=1e-5):
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


# --- Values -------------------------------------------------------------------------------------------------------


def test_all_kinds_of_captured_values(rng, backend):
    """Arrays of several dtypes and ranks, views with strides, numbers: as NumPy computes with them."""
    bias = rng.standard_normal((15, 8)).astype(np.float32)[::-1, ::2]  # negative and wide steps
    documents, heads = np.array([[0, 0, 0, 1, 1, 1, 1, 2, 2]] * 2), np.array([True, False, True, True])
    temperature, shift = np.array(1.25, np.float16), 0.5
    window = 5

    def score_mod(score, b, h, q_idx, kv_idx):
        return score * temperature + bias[q_idx - kv_idx + 8, h] * shift

    def mask_mod(b, h, q_idx, kv_idx, q_len, kv_len):
        same = documents[b, q_idx + kv_len - q_len] == documents[b, kv_idx]
        return (same | heads[h]) & (abs(q_idx - kv_idx) < window)

    q, k, v = arrays(rng)
    found = cuflash.attention(q, k, v, score_mod=score_mod, mask_mod=mask_mod, aux=AUX)
    assert_same(found[:3], reference.attention(q, k, v, score_mod=score_mod, mask_mod=mask_mod))


def test_what_changes_is_read_anew_and_compiles_nothing(rng, backend):
    q, k, v = arrays(rng)
    window, slope, table = 3, 0.5, rng.standard_normal(4).astype(np.float32)

    def score_mod(score, b, h, q_idx, kv_idx):
        return score + table[h] * slope

    def mask_mod(b, h, q_idx, kv_idx):
        return kv_idx - q_idx < window

    def check():
        found = cuflash.attention(q, k, v, score_mod=score_mod, mask_mod=mask_mod, aux=AUX)
        assert_same(found[:3], reference.attention(q, k, v, score_mod=score_mod, mask_mod=mask_mod))

    check()
    compiled, before = [], cuflash.config.on_compile
    cuflash.config.on_compile = compiled.append
    try:
        for window, slope in ((1, 0.25), (2, -3.0)):  # noqa: B007
            table *= 2  # in place
            check()
        table = rng.standard_normal(9).astype(np.float32)[:4]
        check()
        q, k, v = arrays(rng, q_len=5, k_len=20)
        check()
    finally:
        cuflash.config.on_compile = before
    assert not compiled


@pytest.mark.parametrize("slopes", [(4,), (2, 4)])
def test_softcap_and_alibi_come_before_a_score_mod(rng, backend, slopes):
    slopes = rng.random(slopes).astype(np.float32)
    gain = np.float32(0.7) * np.ones(4, np.float32)

    def score_mod(score, b, h, q_idx, kv_idx):
        return score * gain[h] + 0.1 * q_idx

    for (q, k, v), keywords in (packed(rng), (arrays(rng), {})):
        keywords |= {"softcap": 2.0, "alibi_slopes": slopes, "causal": True, "score_mod": score_mod}
        found = cuflash.attention(q, k, v, aux=AUX, **keywords)
        assert_same(found[:3], reference.attention(q, k, v, **keywords))
        explained = cuflash.explain(q, k, v, **keywords)
        assert explained.captured == ("gain float32[4]", f"alibi_slopes float32{list(slopes.shape)}")


def test_a_mask_mod_leaves_softcap_and_alibi_to_the_kernel(rng, backend):
    keywords = {"softcap": 2.0, "alibi_slopes": rng.random(4).astype(np.float32)}
    keywords["mask_mod"] = lambda b, h, q_idx, kv_idx: (q_idx + kv_idx + h) % 3 != 0
    q, k, v = arrays(rng)
    assert_same(cuflash.attention(q, k, v, aux=AUX, **keywords)[:3], reference.attention(q, k, v, **keywords))


def test_everything_composes(rng, backend):
    """Mods beside all other keywords, packed."""
    (q, k, v), keywords = packed(rng)
    bias = rng.standard_normal((4, 16)).astype(np.float32)
    keywords |= {
        "seqused_q": np.array([4, 7], np.int32), "seqused_k": np.array([8, 2], np.int32), "window_size": (6, 3),
        "causal": True, "softcap": 3.0, "sink": rng.standard_normal(4).astype(np.float32),
        "alibi_slopes": rng.random(4).astype(np.float32), "dropout_p": 0.25, "seed": 3, "offset": 5,
        "score_mod": lambda s, b, h, i, j: s + bias[h, i - j + 8], "mask_mod": lambda b, h, i, j: (i + j + b) % 4 != 1,
    }  # fmt: skip
    found = cuflash.attention(q, k, v, aux=AUX, **keywords)
    assert_same(found[:3], reference.attention(q, k, v, **keywords))


def test_block_masks_are_masks(rng, backend):
    q, k, v = arrays(rng, q_len=9)
    own, other = (lambda b, h, i, j: i >= j), (lambda b, h, i, j: j % 3 != 1)
    block_mask = cuflash.create_block_mask(own, None, None, 9, 9)
    both = lambda b, h, i, j: own(b, h, i, j) & other(b, h, i, j)  # noqa: E731
    np.testing.assert_array_equal(
        cuflash.attention(q, k, v, block_mask=block_mask), cuflash.attention(q, k, v, mask_mod=own)
    )
    np.testing.assert_array_equal(
        cuflash.attention(q, k, v, block_mask=block_mask, mask_mod=other), cuflash.attention(q, k, v, mask_mod=both)
    )
    with pytest.raises(ArgumentError, match="block_mask is for q_len=9 and kv_len=9, and the arrays have 7 and 9"):
        cuflash.attention(q[:, :7], k, v, block_mask=block_mask)


# --- Gradients ----------------------------------------------------------------------------------------------------


def numeric(f, x, eps=1e-6):
    """Central differences of f() by the elements of x, changed in place."""
    grad = np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        kept = x[i]
        x[i] = kept + eps
        above = f()
        x[i] = kept - eps
        grad[i] = (above - f()) / (2 * eps)
        x[i] = kept
    return grad


@pytest.mark.parametrize("alibi", [False, True])
def test_gradients_against_differences(rng, alibi):
    """q, k, v and captured float arrays; one read twice, one by an index that repeats, one that is a number."""
    q = rng.standard_normal((2, 3, 2, 4))
    k, v = rng.standard_normal((2, 2, 4, 1, 4))
    table, temperature, dense = rng.standard_normal((2, 9)), np.array(1.3), rng.standard_normal((3, 4))
    seen, ids = np.array([1.0, 0.0, 1.0, 1.0]), np.array([0, 2, 0])
    slopes = rng.random(2).astype(np.float32)

    def score_mod(score, b, h, q_idx, kv_idx):
        twice = table[h, q_idx - kv_idx + 4] * table[h, 8]
        return np.where(kv_idx == 3, score, np.tanh(score) * temperature + twice + dense[ids[q_idx], kv_idx])

    keywords = {"score_mod": score_mod, "mask_mod": lambda b, h, i, j: (seen[j] > 0) | (i == 1), "softcap": 2.0}
    if alibi:
        keywords["alibi_slopes"] = slopes
    out, lse, _, _ = cuflash.attention(q, k, v, aux=("lse",), **keywords)
    dout, dlse = rng.standard_normal(out.shape), rng.standard_normal(lse.shape).astype(np.float32)

    def loss():
        out, lse, _ = reference.attention(q, k, v, **keywords)
        return float((out * dout).sum() + (lse * dlse).sum())

    # lse is rounded to float32 in between.
    found = cuflash.attention_backward(dout, q, k, v, out, lse, dlse=dlse, captured_grads=True, **keywords)
    named = {text.split()[0]: text for text in cuflash.explain(q, k, v, **keywords).captured}
    assert named["table"] == "table float64[2, 9]" and named["ids"] == "ids int64[3]"
    floats = [name for name, text in named.items() if " float" in text]
    captured = dict(zip(floats, found.dcaptured, strict=True))
    assert captured.pop("seen") is None  # only the mask reads it
    if alibi:
        assert floats[-1] == "alibi_slopes"
        slopes = keywords["alibi_slopes"] = slopes.astype(np.float64)
        np.testing.assert_allclose(captured.pop("alibi_slopes"), numeric(loss, slopes), atol=3e-6)
    values = {"table": table, "temperature": temperature, "dense": dense}
    assert captured.keys() == values.keys()
    for x, grad in [*zip((q, k, v), found[:3], strict=True), *((values[n], grad) for n, grad in captured.items())]:
        assert grad.shape == x.shape and grad.dtype == x.dtype
        np.testing.assert_allclose(grad, numeric(loss, x), atol=3e-6)


def test_alibi_and_softcap_have_one_gradient_whether_folded_or_not(rng):
    q, k, v = arrays(rng)
    keywords = {"softcap": 1.5, "alibi_slopes": rng.random((2, 4)).astype(np.float32), "causal": True}
    out, lse, *_ = cuflash.attention(q, k, v, aux=("lse",), **keywords)
    own = cuflash.attention_backward(out, q, k, v, out, lse, captured_grads=True, **keywords)
    folded = cuflash.attention_backward(
        out, q, k, v, out, lse, captured_grads=True, score_mod=lambda s, b, h, i, j: s, **keywords
    )
    assert_same((*folded[:3], *folded.dcaptured), (*own[:3], *own.dcaptured))


def test_masked_scores_have_no_gradient_whatever_the_derivative_is(rng):
    """sqrt at 0 has an infinite slope; the mask hides it, and so does -inf."""
    q, k, v = arrays(rng, q_len=4, k_len=4)
    gain = np.ones(4, np.float32)

    def score_mod(score, b, h, q_idx, kv_idx):
        return np.where(q_idx >= kv_idx, score, -np.inf) + np.sqrt(abs(q_idx - kv_idx - 1) * gain[h] * 1.0)

    keywords = {"score_mod": score_mod, "mask_mod": lambda b, h, i, j: i != j + 1}
    out, lse, *_ = cuflash.attention(q, k, v, aux=("lse",), **keywords)
    grads = cuflash.attention_backward(out, q, k, v, out, lse, captured_grads=True, **keywords)
    for x in (*grads[:3], *grads.dcaptured):
        assert np.isfinite(x).all()


def test_gradients_of_16_bit_arrays_are_summed_in_more(rng):
    q, k, v = arrays(rng, np.float16, q_len=64, k_len=64)
    bias = rng.standard_normal(4).astype(np.float16)
    keywords = {"score_mod": lambda s, b, h, i, j: s * bias[h]}
    out, lse, *_ = cuflash.attention(q, k, v, aux=("lse",), **keywords)
    (found,) = cuflash.attention_backward(out, q, k, v, out, lse, captured_grads=True, **keywords).dcaptured
    assert found.dtype == np.float16
    bias = bias.astype(np.float32)
    (exact,) = cuflash.attention_backward(out, q, k, v, out, lse, captured_grads=True, **keywords).dcaptured
    np.testing.assert_allclose(found, exact, rtol=1e-3)


def test_gradients_nobody_asked_for_are_not_computed(rng):
    q, k, v = arrays(rng)
    bias = rng.standard_normal(4).astype(np.float32)
    keywords = {"score_mod": lambda s, b, h, i, j: s + bias[h]}
    out, lse, *_ = cuflash.attention(q, k, v, aux=("lse",), **keywords)
    assert cuflash.attention_backward(out, q, k, v, out, lse, **keywords).dcaptured == ()


# --- Refused ------------------------------------------------------------------------------------------------------


def test_an_index_outside_of_its_array_is_named(rng):
    q, k, v = arrays(rng)
    bias, table = rng.standard_normal(9).astype(np.float32), np.arange(6)
    out, lse, *_ = cuflash.attention(q, k, v, aux=("lse",))
    for mods, match in (
        (
            {"score_mod": lambda s, b, h, i, j: s + bias[i - j - 5]},
            r"^bias: index -\d is outside of axis 0, which has 9",
        ),
        ({"mask_mod": lambda b, h, i, j: table[j] == 0}, "^table: index 6 is outside of axis 0, which has 6 elements"),
        ({"score_mod": lambda s, b, h, i, j: s + bias[table[j % 6] + i + 1]}, "^bias: index 9"),
    ):
        with pytest.raises(ArgumentError, match=match):
            cuflash.attention(q, k, v, **mods)
        with pytest.raises(ArgumentError, match=match):
            cuflash.attention_backward(out, q, k, v, out, lse, **mods)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dlpack"])
def test_checking_mode_follows_what_mods_read(rng, monkeypatch, kind):
    """Kernels bring an index inside without a word: `config.check` finds it before they are launched."""
    monkeypatch.setattr(cuflash.config, "check", True)
    with recording() as recorder:
        monkeypatch.setattr(frameworks.cupy, "download", lambda view, stream: recorder.behind[view.ptr][1])
        make = recorder.arrays[kind]
        host = rng.standard_normal(9), rng.standard_normal((2, 4)), np.arange(6), rng.standard_normal((9, 3))
        bias, pairs, table, rows = (make(x.astype(np.float32 if x.dtype.kind == "f" else np.int32)) for x in host)
        (q, k, v), lengths = packed(rng)
        q, k, v = (make(x.astype(np.float16)) for x in (q, k, v))
        lengths = {name: make(x) for name, x in lengths.items()}  # of 5 and 7 queries, 8 and 3 keys
        few = {"seqused_q": make(np.array([4, 0], np.int32)), "seqused_k": make(np.array([6, 3], np.int32))}

        def bias_of(index):
            return lambda s, b, h, i, j: s + bias[index(b, h, i, j)]

        inside = [
            {"score_mod": bias_of(lambda b, h, i, j: i + 2)},
            # What causal rules out does not count.
            {"score_mod": bias_of(lambda b, h, i, j: i % 5 - j + 3), "causal": True},
            {"mask_mod": lambda b, h, i, j: table[j] == 0, **few},
            {"score_mod": lambda s, b, h, i, j: s + bias[(s > 0) * 8], "softcap": 5.0},
        ]
        for at, keywords in enumerate(inside):
            cuflash.attention(q, k, v, **lengths, **keywords)
            assert len(recorder.launches) == at + 1
        for keywords, match in (
            ({"score_mod": bias_of(lambda b, h, i, j: i + 3)}, "^bias: index 9 is outside of axis 0, which has 9 elem"),
            ({"score_mod": bias_of(lambda b, h, i, j: i % 5 - j - 7), "causal": True}, "^bias: index -1 "),
            ({"score_mod": lambda s, b, h, i, j: s + pairs[b, h + (i == 6)]}, "^pairs: index 4 is outside of axis 1"),
            ({"score_mod": bias_of(lambda b, h, i, j: table[j % 6] + i)}, "^bias: index 9"),
            ({"mask_mod": lambda b, h, i, j: table[j] == 0}, "^table: index 6 is outside of axis 0, which has 6 elem"),
            ({"mask_mod": lambda b, h, i, j: table[j - 7] == 0, **few}, "^table: index -1 "),
            ({"score_mod": lambda s, b, h, i, j: s + np.dot(rows[i], rows[j + 2])}, "^rows: index 9"),
            ({"score_mod": lambda s, b, h, i, j: s + bias[(s > 0) * 9]}, "^bias: index 9"),
        ):
            with pytest.raises(ArgumentError, match=match):
                cuflash.attention(q, k, v, **lengths, **keywords)
            assert len(recorder.launches) == len(inside)
        recorder.capturing = True  # nobody may wait then
        cuflash.attention(q, k, v, **lengths, score_mod=bias_of(lambda b, h, i, j: i + 3))


def test_captured_dtypes(rng, backend):
    q, k, v = arrays(rng)
    bias = rng.standard_normal(4)
    score_mod = lambda s, b, h, i, j: s + bias[h]  # noqa: E731
    if backend == "reference":
        cuflash.attention(q, k, v, score_mod=score_mod)
    else:
        with pytest.raises(UnsupportedError, match=r"bias\.dtype=float64.*capture bias\.astype\(np\.float32\)"):
            cuflash.attention(q, k, v, score_mod=score_mod)
    bias = bias.astype(np.uint32)
    with pytest.raises((ArgumentError, cuflash.errors.TraceError), match="bias"):
        cuflash.attention(q, k, v, score_mod=score_mod)


def test_captured_arrays_of_another_framework(rng):
    torch = pytest.importorskip("torch")
    q, k, v = arrays(rng)
    bias = torch.ones(4)
    match = "bias, which a mod captured, is a PyTorch array and q a NumPy array: .*from_dlpack"
    with pytest.raises(ArgumentError, match=match):
        cuflash.attention(q, k, v, score_mod=lambda s, b, h, i, j: s + bias[h])
    number = np.array(0.5, np.float32)  # one element of NumPy's serves every framework
    q, k, v = map(torch.from_numpy, (q, k, v))
    found = cuflash.attention(q, k, v, score_mod=lambda s, b, h, i, j: s * number)
    torch.testing.assert_close(found, cuflash.attention(q, k, v, scale=0.5 * 16**-0.5))


def test_captured_arrays_on_another_device(rng):
    q, k, v = arrays(rng)
    bias = np.ones(4, np.float32)
    with recording() as recorder:
        q, k, v = (recorder.arrays["cupy stand-in"](x) for x in (q, k, v))
        with pytest.raises(ArgumentError, match="bias, which a mod captured, is a NumPy array"):
            cuflash.attention(q, k, v, score_mod=lambda s, b, h, i, j: s + bias[h])
        assert not recorder.launches


def test_out_must_not_be_what_a_mod_reads(rng, backend):
    q, k, v = arrays(rng)
    out = np.zeros_like(q)
    with pytest.raises(ArgumentError, match="out shares memory with an array a mod captured"):
        cuflash.attention(q, k, v, out=out, score_mod=lambda s, b, h, i, j: s + out[b, i, h, 0])


# --- Questions ----------------------------------------------------------------------------------------------------


def test_explain_names_what_is_captured_and_why(rng, backend):
    q, k, v = arrays(rng)
    bias, window = rng.standard_normal((4, 32)).astype(np.float16), 4
    explained = cuflash.explain(
        q, k, v, score_mod=lambda s, b, h, i, j: s + bias[h, i - j + 16], mask_mod=lambda b, h, i, j: i - j < window
    )
    assert explained.captured == ("bias float16[4, 32]", "window")
    assert "captured      bias float16[4, 32], window" in str(explained)
    top_left = cuflash.explain(q, k, v, mask_mod=lambda b, h, q_idx, kv_idx: q_idx >= kv_idx)
    assert any("q_len" in reason for reason in top_left.why)


def test_warmup_compiles_what_a_call_with_mods_needs(rng):
    q, k, v = arrays(rng, np.float16)
    table, slopes = np.ones(4, np.float32), np.ones(4, np.float32)
    mods = {"score_mod": lambda s, b, h, i, j: s * table[h] + 0.25, "mask_mod": lambda b, h, i, j: i + 2 >= j}
    compiled, before = [], cuflash.config.on_compile
    with using("emulator"):
        cuflash.warmup(dtype="float16", head_dim=16, softcap=True, alibi_slopes=True, **mods)
        cuflash.config.on_compile = compiled.append
        try:
            cuflash.attention(q, k, v, softcap=3.0, alibi_slopes=slopes, **mods)
        finally:
            cuflash.config.on_compile = before
        with pytest.raises(ArgumentError, match="score_mod=True: a kernel is made for one function"):
            cuflash.warmup(dtype="float16", head_dim=16, score_mod=True)
    assert not compiled


def test_a_warm_call_prepares_nothing(rng):
    q, k, v = arrays(rng)
    table, factor = np.ones(4, np.float32), 0.5
    score_mod = lambda s, b, h, i, j: s * factor + table[h]  # noqa: E731
    bind.PREPARED.clear()
    for factor in (0.5, 0.25, 3.0):
        cuflash.attention(q, k, v, softcap=factor, score_mod=score_mod)
    assert len(bind.PREPARED) == 1


# --- Gradients on kernels -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_the_emulator_has_the_reference_s_gradients(rng, layout, deterministic):
    """Of everything at once: arrays of 16 bits and of rank 0 and 2, read at repeating places, slopes folded in."""
    (q, k, v), keywords = packed(rng) if layout == "packed" else (arrays(rng), {})
    bias, gain = rng.standard_normal((4, 20)).astype(np.float32)[:, ::-1], rng.standard_normal(8).astype(np.float16)
    temperature, limit = np.array(1.25, np.float32), np.array(5.0, np.float32)
    keywords |= {
        "softcap": 3.0, "alibi_slopes": rng.random((2, 4)).astype(np.float32), "causal": True,
        "sink": rng.standard_normal(4).astype(np.float32),
        "score_mod": lambda s, b, h, i, j: s * temperature + bias[h, i - j + 9] * gain[j % 8],
        "mask_mod": lambda b, h, i, j: (i + j + h) % 5 < limit,
    }  # fmt: skip
    out, lse, *_ = cuflash.attention(q, k, v, aux=("lse",), **keywords)
    dout, dlse = rng.standard_normal(out.shape).astype(np.float32), rng.standard_normal(lse.shape).astype(np.float32)

    def gradients():
        grads = cuflash.attention_backward(
            dout, q, k, v, out, lse, dlse=dlse, captured_grads=True, deterministic=deterministic, **keywords
        )
        return *grads[:4], *grads.dcaptured

    expected = gradients()
    with using("emulator"):
        found = gradients()
    assert len(expected) == 4 + 5
    for x, y in zip(found, expected, strict=True):
        if y is None:
            assert x is None
        else:
            assert x.dtype == y.dtype and x.shape == y.shape
            np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-3 if y.dtype == np.float16 else 2e-4)


def test_warmup_compiles_what_a_backward_with_mods_needs(rng):
    q, k, v = arrays(rng, np.float16)
    bias = np.ones(4, np.float32)
    mods = {"score_mod": lambda s, b, h, i, j: s + 0.5 * bias[h], "mask_mod": lambda b, h, i, j: i + 3 >= j}
    compiled, before = [], cuflash.config.on_compile
    with using("emulator"):
        cuflash.warmup(dtype="float16", head_dim=16, backward=True, **mods)
        cuflash.config.on_compile = compiled.append
        try:
            out, lse, *_ = cuflash.attention(q, k, v, aux=("lse",), **mods)
            cuflash.attention_backward(out, q, k, v, out, lse, **mods)
        finally:
            cuflash.config.on_compile = before
    assert not compiled


# --- Launches on a GPU --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind in ("cupy", "torch")])
def test_recorded_bytes_with_captured_arrays_give_the_right_answer(kind, rng, deterministic):
    """Nothing on the host looks into a captured device array; a number on the host is uploaded, but not in a graph."""
    q, k, v = arrays(rng)
    bias, ids = rng.standard_normal((4, 20)).astype(np.float32), np.array([0, 1, 1, 0, 2, 2, 0, 1, 2], np.int32)
    gain, half, shift = rng.standard_normal(4).astype(np.float16), np.array(0.5, np.float32), 0.25

    def mods(bias, ids, gain):
        return {
            "score_mod": lambda s, b, h, i, j: s * half + (bias[h, i - j + 9] + shift) * gain[h],
            "mask_mod": lambda b, h, i, j: ids[i] != ids[j],
            "causal": True,
        }

    on_host = mods(bias, ids, gain)
    out, lse, *_ = cuflash.attention(q, k, v, aux=("lse",), **on_host)
    expected = cuflash.attention_backward(out, q, k, v, out, lse, captured_grads=True, **on_host)
    with recording() as recorder:
        on_device = recorder.arrays[kind]
        dq, dk, dv, dout = map(on_device, (q, k, v, out))
        keywords = mods(*map(on_device, (bias, ids, gain)))
        found = cuflash.attention(dq, dk, dv, aux=("lse",), **keywords)
        assert [x.shape for x in recorder.uploads] == [()]
        recorder.replay()
        np.testing.assert_allclose(recorder.host(found.out), out, atol=1e-5)
        np.testing.assert_allclose(recorder.host(found.lse), lse, atol=1e-5)
        before = len(recorder.launches)
        grads = cuflash.attention_backward(
            dout, dq, dk, dv, found.out, found.lse, captured_grads=True, deterministic=deterministic, **keywords
        )
        recorder.replay(len(recorder.launches) - before)
        for x, y in zip((*grads[:3], *grads.dcaptured), (*expected[:3], *expected.dcaptured), strict=True):
            np.testing.assert_allclose(recorder.host(x), y, atol=1e-3)
        recorder.capturing = True
        with pytest.raises(
            ArgumentError, match="half, which a mod captured, lies in host memory and cannot enter a CUDA"
        ):
            cuflash.attention(dq, dk, dv, **keywords)


# Negative indices -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "emulator"])
def test_negative_indices_count_from_the_end(rng, monkeypatch, backend):
    """As in NumPy: in scores and masks, computed or not, of the last axis and of others; their gradients too."""
    monkeypatch.setattr(cuflash.config, "backend", backend)
    q, k, v = arrays(rng)
    q_len, kv_len = q.shape[1], k.shape[1]
    table = rng.standard_normal((4, 16)).astype(np.float32)
    kinds = (np.arange(kv_len) % 3).astype(np.int32)
    shift = np.array(-3, np.int32)

    def score(s, b, h, i, j):
        return s + table[-1 - h, i - j] * table[h - 4, shift] + table[0, -2]

    def mask(b, h, i, j):
        return (kinds[j - 2] != 1) | (kinds[-1] == 7)

    i, j = np.ogrid[:q_len, :kv_len]
    rows = np.arange(4)[:, None, None]
    factor = table[rows - 4, -3]
    bias = table[-1 - rows, i - j] * factor + table[0, -2]
    seen = np.broadcast_to(kinds[j - 2] != 1, (q_len, kv_len))
    written = {
        "score_mod": lambda s, b, h, i, j: s + bias_of[h, i, j],
        "mask_mod": lambda b, h, i, j: seen_of[i, j],
    }
    bias_of, seen_of = bias.astype(np.float32), seen.copy()
    found = cuflash.attention(q, k, v, score_mod=score, mask_mod=mask, aux=("lse",))
    expected = cuflash.attention(q, k, v, **written, aux=("lse",))
    np.testing.assert_allclose(found.out, expected.out, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(found.lse, expected.lse, rtol=1e-3, atol=1e-3)
    if backend == "emulator":
        return  # which compiles the kernel of the other direction for this alone
    dout = np.ones_like(expected.out)
    one, other = (
        cuflash.attention_backward(dout, q, k, v, expected.out, expected.lse, captured_grads=True, **mods)
        for mods in ({"score_mod": score, "mask_mod": mask}, written)
    )
    by_bias = other.dcaptured[0]
    learned = np.zeros_like(table, np.float64)
    reach = np.broadcast_shapes(by_bias.shape, (4, q_len, kv_len))
    np.add.at(learned, tuple(np.broadcast_to(x, reach) for x in (-1 - rows, i - j)), by_bias * factor)
    np.add.at(
        learned, tuple(np.broadcast_to(x, reach) for x in (rows - 4, np.array(-3))), by_bias * table[-1 - rows, i - j]
    )
    learned[0, -2] += by_bias.sum()
    np.testing.assert_allclose(one.dcaptured[0], learned, rtol=1e-4, atol=1e-4)


def test_an_index_that_is_no_negative_one_costs_nothing():
    """The text has no comparison for the masks whose indices are known from 0 on."""
    ids, table = np.zeros(8, np.int32), np.zeros((2, 5), np.float32)
    plain = cuflash.mods.document(ids), cuflash.mods.relative_bias(table), cuflash.mods.tree(np.zeros((4, 1), np.uint8))
    for mod in (*plain, cuflash.mods.bias(np.zeros((4, 4), np.float32))):
        assert ".shape[" not in repr(mod)
    assert "ids.shape[0]" in repr(cuflash.mod(lambda b, h, i, j: ids[j - 1] == 0))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((lambda: 1, 3, 3), r"must be a function f\(b, h, q_idx, kv_idx\) -> bool, .* it raised TypeError"),
        ((type, 3, 3), "mask_mod"),
        ((cuflash.mods.softcap(3.0), 3, 3), "mask_mod"),
        ((cuflash.mods.causal(), 3, 2**31 - 1), r"4194304 is the most: .* print\(create_block_mask"),
        ((cuflash.mods.causal(), 3, 3, 0, 2**31), r"h=2147483648 must be an int of .* at most 2147483647"),
    ],
)
def test_what_cannot_be_shown_is_refused(arguments: Any, says: str) -> None:
    with pytest.raises(CuflashError, match=says):
        cuflash.mods.visible(*arguments)
