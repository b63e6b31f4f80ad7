"""The reference's gradients against finite differences, PyTorch's autograd and identities; and as `attention_backward`
gives them for host arrays."""

from __future__ import annotations

import tracemalloc

import compare
import ml_dtypes
import numpy as np
import pytest
from cases import Case, draw
from hypothesis import given, settings
from hypothesis import strategies as st

import cuflash
from cuflash import reference
from cuflash.philox import dropout_keep
from cuflash.reference import attention, attention_backward

NAMES = compare.GRADIENTS
FEATURES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (2, 1)},
    "left window, causal": {"window_size": (3, -1), "causal": True},
    "window of the diagonal": {"window_size": (0, 0)},
    "None is unlimited": {"window_size": (None, 2)},
    "softcap": {"softcap": 0.7},
    "alibi": {"alibi_slopes": np.array([0.3, 1.1, 0.2, 0.7])},
    "sink": {"sink": np.array([-1.0, 2.0, 0.0, 0.5])},
    "scale": {"scale": 1.7},
    "scale 0": {"scale": 0.0},
    "negative scale": {"scale": -0.9},
    "mask_mod": {"mask_mod": lambda b, h, q, k: (q * 3 + k + h) % 2 == 0},
    "dropout": {"dropout_p": 0.4, "seed": 5, "offset": 2},
    "all": {
        "causal": True,
        "window_size": (4, 0),
        "softcap": 2.0,
        "alibi_slopes": np.array([0.1, 0.2, 0.3, 0.4]),
        "sink": np.array([0.5, -0.5, 1.0, 0.0]),
        "scale": -0.4,
        "mask_mod": lambda b, h, q, k: k != 1,
        "dropout_p": 0.2,
        "seed": 2**40 + 1,
    },
}
LENGTHS = [(6, 6), (4, 7), (7, 4), (1, 5), (5, 1), (0, 3), (3, 0)]


def draws(rng, m, n, heads_q=4, heads_kv=2, d=5, d_v=3, dtype=np.float64, batch=1):
    shapes = (batch, m, heads_q, d), (batch, n, heads_kv, d), (batch, n, heads_kv, d_v)
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)


def losses(rng, out, lse):
    """Gradients for out and lse; a row that keeps nothing has a constant lse, -inf."""
    return rng.standard_normal(out.shape), np.where(np.isneginf(lse), 0, rng.standard_normal(lse.shape))


def gradients(rng, q, k, v, **keywords):
    """-> dout, dlse, and the gradients by name."""
    out, lse, _ = attention(q, k, v, **keywords)
    dout, dlse = losses(rng, out, lse)
    found = attention_backward(dout, q, k, v, out, lse, dlse=dlse, **keywords)
    return dout, dlse, {name: x for name, x in zip(NAMES, found, strict=True) if x is not None}


def assert_same(actual, expected, tolerance=1e-12):
    for x, y in zip(actual, expected, strict=True):
        if x is not y:
            np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


# Against the forward. ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_against_finite_differences(feature, lengths, rng):
    """Along random directions, for every input at once and for each by itself."""
    keywords = FEATURES[feature]
    q, k, v = draws(rng, *lengths)
    dout, dlse, grads = gradients(rng, q, k, v, **keywords)
    inputs = {"dq": q, "dk": k, "dv": v, "dsink": keywords.get("sink"), "dslopes": keywords.get("alibi_slopes")}

    def loss(step, directions):
        moved = {name: inputs[name] + step * directions.get(name, 0) for name in grads}
        others = {"sink": moved.get("dsink"), "alibi_slopes": moved.get("dslopes")}
        out, lse, _ = attention(moved["dq"], moved["dk"], moved["dv"], **{**keywords, **others})
        return (dout * out).sum() + (dlse * np.where(np.isneginf(lse), 0, lse)).sum()

    every = {name: rng.standard_normal(inputs[name].shape) for name in grads}
    for directions in (every, *({name: direction} for name, direction in every.items())):
        # Four points: the error of the formula falls with the fourth power of the step.
        h = 1e-3
        near, far = (loss(x, directions) - loss(-x, directions) for x in (h, 2 * h))
        slope = (8 * near - far) / (12 * h)
        expected = sum((grads[name] * direction).sum() for name, direction in directions.items())
        np.testing.assert_allclose(slope, expected, rtol=1e-7, atol=1e-8, err_msg=str([*directions]))


@pytest.mark.parametrize("feature", [f for f in FEATURES if f != "mask_mod"])
def test_against_autograd(feature, rng):
    """PyTorch, over the dense scores of a batch of unequal used lengths."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    keywords = {name: x for name, x in FEATURES[feature].items() if name != "mask_mod"}
    used_q, used_k = [6, 3, 0, 5], [7, 0, 4, 2]
    q, k, v = draws(rng, 6, 7, batch=4)
    dout, dlse, grads = gradients(rng, q, k, v, seqused_q=used_q, seqused_k=used_k, **keywords)

    given = {"dq": q, "dk": k, "dv": v, "dsink": keywords.get("sink"), "dslopes": keywords.get("alibi_slopes")}
    leaves = {name: torch.tensor(given[name], requires_grad=True) for name in grads}
    left, right = (10**9 if w is None or w < 0 else w for w in keywords.get("window_size", (-1, -1)))
    right = 0 if keywords.get("causal") else right
    loss = torch.zeros((), dtype=torch.float64)
    for b, (m, n) in enumerate(zip(used_q, used_k, strict=True)):
        tq, tk, tv = (leaves[name][b, :rows].transpose(0, 1) for name, rows in (("dq", m), ("dk", n), ("dv", n)))
        tk, tv = (x.repeat_interleave(2, dim=0) for x in (tk, tv))
        s = tq @ tk.transpose(1, 2) * keywords.get("scale", 5**-0.5)
        if "softcap" in keywords:
            s = keywords["softcap"] * torch.tanh(s / keywords["softcap"])
        offset = torch.arange(n) - (torch.arange(m)[:, None] + n - m)
        if "dslopes" in leaves:
            s = s - leaves["dslopes"][:, None, None] * offset.abs()
        s = s.masked_fill((offset < -left) | (offset > right), -torch.inf)
        sink = (
            leaves["dsink"][:, None, None].expand(-1, m, 1) if "dsink" in leaves else torch.full((4, m, 1), -torch.inf)
        )
        lse = torch.logsumexp(torch.cat([s, sink], dim=2), dim=2)
        empty = torch.isneginf(lse)
        p = torch.exp(s - lse.masked_fill(empty, 0)[..., None])
        if "dropout_p" in keywords:
            kept = dropout_keep(
                b, np.arange(4)[:, None, None], np.arange(m)[:, None], np.arange(n), keywords["seed"],
                keywords.get("offset", 0), keywords["dropout_p"], 4,
            )  # fmt: skip
            p = p * torch.from_numpy(kept) / (1 - keywords["dropout_p"])
        loss = loss + ((p @ tv).transpose(0, 1) * torch.from_numpy(dout[b, :m])).sum()
        loss = loss + (lse.masked_fill(empty, 0) * torch.from_numpy(dlse[b, :, :m])).sum()
    expected = torch.autograd.grad(loss, [*leaves.values()])
    assert_same(grads.values(), [x.numpy() for x in expected], 1e-11)


def test_alibi_slopes_for_each_sequence_have_their_own_gradients(rng):
    q, k, v = (np.concatenate([x, x]) for x in draws(rng, 4, 6))
    slopes = np.array([0.1, 0.9, 0.3, 0.0])
    shared, own = (gradients(np.random.default_rng(1), q, k, v, alibi_slopes=s)[2] for s in (slopes, [slopes, slopes]))
    assert own["dslopes"].shape == (2, 4) and shared["dslopes"].shape == (4,)
    np.testing.assert_allclose(own["dslopes"].sum(axis=0), shared["dslopes"])


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 2), (6, 2), (8, 1)], ids=str)
def test_a_key_heads_gradient_sums_over_its_group(heads, rng):
    q, k, v = draws(rng, 4, 5, *heads)
    group = heads[0] // heads[1]
    _, _, shared = gradients(np.random.default_rng(1), q, k, v, causal=True)
    expanded = (np.repeat(x, group, axis=2) for x in (k, v))
    _, _, each = gradients(np.random.default_rng(1), q, *expanded, causal=True)
    np.testing.assert_allclose(shared["dq"], each["dq"])
    for name, x in (("dk", k), ("dv", v)):
        np.testing.assert_allclose(shared[name], each[name].reshape(*x.shape[:3], group, -1).sum(axis=3))


@pytest.mark.parametrize("feature", FEATURES)
def test_packed_sequences_are_computed_one_by_one(feature, rng):
    """To the bit; with dropout, whose mask depends on the index of the sequence, at the same index."""
    keywords = FEATURES[feature]
    lengths = ((3, 5), (0, 2), (4, 4), (2, 0), (0, 0), (5, 3))
    parts = [[x[0] for x in draws(rng, m, n)] for m, n in lengths]
    q, k, v = (np.concatenate([part[i] for part in parts]) for i in range(3))
    cu_q, cu_k = ([0, *np.cumsum([n[i] for n in lengths])] for i in range(2))
    together = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, **keywords}
    dout, dlse, grads = gradients(rng, q, k, v, **together)
    sums = {name: 0.0 for name in ("dsink", "dslopes") if name in grads}
    for b in range(len(parts)):
        rows_q, rows_k = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        starts = ([0] * (b + 1) + [length] for length in lengths[b])
        alone = {**keywords, **dict(zip(("cu_seqlens_q", "cu_seqlens_k"), starts, strict=True))}
        arrays = q[rows_q], k[rows_k], v[rows_k]
        out, lse, _ = attention(*arrays, **alone)
        found = attention_backward(dout[rows_q], *arrays, out, lse, dlse=dlse[:, rows_q], **alone)
        for name, x, rows in zip(NAMES, found, (rows_q, rows_k, rows_k, None, None), strict=True):
            if rows is not None:
                np.testing.assert_array_equal(x, grads[name][rows], err_msg=name)
            elif x is not None:
                sums[name] = sums[name] + x
    assert_same(sums.values(), [grads[name] for name in sums])


def test_dense_and_packed_agree(rng):
    arrays = draws(rng, 7, 9, batch=3)
    keywords = {"causal": True, "softcap": 2.0, "sink": np.ones(4)}
    _, _, dense = gradients(np.random.default_rng(1), *arrays, **keywords)
    out, lse, _ = attention(*arrays, **keywords)
    dout, dlse = losses(np.random.default_rng(1), out, lse)
    flat = [x.reshape(-1, *x.shape[2:]) for x in (dout, *arrays, out)]
    flat_lse, flat_dlse = (x.swapaxes(0, 1).reshape(4, -1) for x in (lse, dlse))
    starts = {"cu_seqlens_q": np.arange(4) * 7, "cu_seqlens_k": np.arange(4) * 9}
    found = attention_backward(*flat, flat_lse, dlse=flat_dlse, **starts, **keywords)
    for name, x in zip(NAMES, found, strict=True):
        if x is not None:
            np.testing.assert_array_equal(x.ravel(), dense[name].ravel())


# What the sequences own, and what nobody does. -----------------------------------------------------------------------


def test_rows_that_keep_nothing_have_no_gradient(rng):
    q, k, v = draws(rng, 5, 3)  # causal, bottom-right: the first two queries stand before every key
    out, lse, _ = attention(q, k, v, causal=True)
    dout, dlse = rng.standard_normal(out.shape), rng.standard_normal(lse.shape)  # dlse of -inf too: of a constant
    dq, dk, dv, dsink, dslopes = attention_backward(dout, q, k, v, out, lse, dlse=dlse, causal=True)
    assert (dq[:, :2] == 0).all() and (dq[:, 2:] != 0).all() and dsink is None and dslopes is None
    later = (dout[:, 2:], q[:, 2:], k, v, out[:, 2:], lse[..., 2:])
    expected = attention_backward(*later, dlse=dlse[..., 2:], causal=True)
    assert_same((dq[:, 2:], dk, dv), expected[:3])


def test_a_sink_receives_the_dlse_of_rows_that_keep_nothing(rng):
    q, k, v = draws(rng, 5, 0)
    sink = np.array([0.25, -3.0, 0.0, 2.0])
    dout, dlse, grads = gradients(rng, q, k, v, sink=sink)
    np.testing.assert_allclose(grads["dsink"], dlse.sum(axis=(0, 2)))
    assert not grads["dq"].any()
    # The lse of such a row may be -inf only where no sequence owns it: no gradient then.
    out, lse, _ = attention(q, k, v, sink=sink, seqused_q=[2])
    dsink = attention_backward(dout, q, k, v, out, lse, dlse=dlse, sink=sink, seqused_q=[2])[3]
    np.testing.assert_allclose(dsink, dlse[..., :2].sum(axis=(0, 2)))


def test_a_sink_of_minus_infinity_is_none(rng):
    q, k, v = draws(rng, 5, 3)
    sink = np.full(4, -np.inf)
    _, _, without = gradients(np.random.default_rng(1), q, k, v, causal=True)
    _, _, grads = gradients(np.random.default_rng(1), q, k, v, causal=True, sink=sink)
    assert (grads.pop("dsink") == 0).all()
    assert_same(grads.values(), without.values())


def test_rows_outside_every_sequence_have_no_gradient(rng):
    q, k, v = (x[0] for x in draws(rng, 12, 9))
    keywords = {"cu_seqlens_q": [0, 4, 7], "cu_seqlens_k": [0, 5, 7], "seqused_q": [2, 3], "seqused_k": [5, 1]}
    _, _, grads = gradients(rng, q, k, v, **keywords)
    for name, owned in (("dq", [0, 1, 4, 5, 6]), ("dk", [0, 1, 2, 3, 4, 5]), ("dv", [0, 1, 2, 3, 4, 5])):
        assert np.flatnonzero(grads[name].any(axis=(1, 2))).tolist() == owned, name


def test_used_lengths_are_the_lengths(rng):
    q, k, v = draws(rng, 9, 11)
    keywords = {"causal": True, "window_size": (4, -1), "alibi_slopes": np.linspace(0.2, 0.8, 4)}
    out, lse, _ = attention(q, k, v, seqused_q=[6], seqused_k=[8], **keywords)
    dout, dlse = losses(rng, out, lse)
    used = attention_backward(dout, q, k, v, out, lse, dlse=dlse, seqused_q=[6], seqused_k=[8], **keywords)
    cut = dout[:, :6], q[:, :6], k[:, :8], v[:, :8], out[:, :6], lse[..., :6]
    short = attention_backward(*cut, dlse=dlse[..., :6], **keywords)
    for x, y, rows in zip(used, short, (6, 8, 8, None, None), strict=True):
        if x is not None and y is not None:
            np.testing.assert_array_equal(x if rows is None else x[:, :rows], y)


@pytest.mark.parametrize(
    "shape",
    [(0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 0, 0), (0, 0, 0)],
    ids=lambda s: "batch {} q_len {} k_len {}".format(*s),
)
def test_empty_dense(shape, rng):
    q, k, v = draws(rng, *shape[1:], batch=shape[0])
    _, _, grads = gradients(rng, q, k, v, causal=True, sink=np.ones(4))
    for name, x in (("dq", q), ("dk", k), ("dv", v)):
        assert grads[name].shape == x.shape and not grads[name].any()


@pytest.mark.parametrize("cu", [[0], [0, 0], [0, 0, 0]], ids=str)
def test_empty_packed(cu, rng):
    q, k, v = (x[0] for x in draws(rng, 2, 0))
    _, _, grads = gradients(rng, q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, sink=np.ones(4))
    assert all(not x.any() for x in grads.values()) and grads["dq"].shape == q.shape


def test_what_nobody_owns_is_never_read(seed):
    """Rows past a sequence's end, past seqused and between strides are NaN in every case, in out and dout too."""
    for case in draw(60, seed + 2, cost=400_000):
        inputs, backward = case.inputs(), case.gradients()
        out, lse, _ = attention(inputs.q, inputs.k, inputs.v, **inputs.keywords)
        begin = 0
        for b, length in enumerate(case.lengths_q):  # what the forward wrote there is not read either
            used = length if case.seqused_q is None else case.seqused_q[b]
            out[slice(begin + used, begin + length) if case.packed else (b, slice(used, None))] = np.nan
            begin += length
        grads = attention_backward(
            backward.dout, inputs.q, inputs.k, inputs.v, out, lse, dlse=backward.dlse, **inputs.keywords
        )
        for name, x in zip(NAMES, grads, strict=True):
            assert x is None or not np.isnan(x.astype(np.float32)).any(), f"{name}: {case}"


def test_nan_that_a_sequence_owns_is_not_hidden(rng):
    q, k, v = draws(rng, 4, 4, 2, 2)
    out, lse, _ = attention(q, k, v)
    dout, dlse = losses(rng, out, lse)
    dout[0, 1, 0, 2] = np.nan  # of row 1 and head 0
    dq, dk, dv, *_ = attention_backward(dout, q, k, v, out, lse, dlse=dlse)
    wrong = np.zeros((4, 2), bool)
    wrong[1, 0] = True
    assert (np.isnan(dq[0]).all(axis=-1) == wrong).all() and (np.isnan(dq[0]).any(axis=-1) == wrong).all()
    assert np.isnan(dk[0, :, 0]).all() and not np.isnan(dk[0, :, 1]).any()
    assert np.isnan(dv[0, :, 0, 2]).all() and not np.isnan(dv[0, :, :, :2]).any()

    dout, dlse = losses(rng, out, lse)
    dlse[0, 1, 2] = np.nan
    dq, dk, dv, *_ = attention_backward(dout, q, k, v, out, lse, dlse=dlse)
    assert np.isnan(dq[0, 2, 1]).all() and np.isnan(dk[0, :, 1]).all()
    assert not np.isnan(dq[0, :, 0]).any() and not np.isnan(dk[0, :, 0]).any() and not np.isnan(dv).any()


def test_a_masked_pair_has_no_gradient_whatever_it_holds(rng):
    """Values that a row may not see do not reach its dq: the mask is not a weight of 0 times infinity."""
    q, k, v = draws(rng, 4, 4, 2, 2)
    out, lse, _ = attention(q, k, v, causal=True)
    dout, dlse = losses(rng, out, lse)
    expected = attention_backward(dout, q, k, v, out, lse, dlse=dlse, causal=True)[0]
    v[0, 3] = np.inf
    dq = attention_backward(dout, q, k, v, out, lse, dlse=dlse, causal=True)[0]
    np.testing.assert_allclose(dq[0, :3], expected[0, :3])


# Types, blocks, memory. ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_dtype_follows_the_rule(dtype, seed):
    for case in (c for c in draw(48, seed, cost=400_000) if c.dtype == dtype):
        inputs, backward = case.inputs(), case.gradients()
        arrays = inputs.q, inputs.k, inputs.v
        out, lse, _ = attention(*arrays, **inputs.keywords)
        grads = attention_backward(backward.dout, *arrays, out, lse, dlse=backward.dlse, **inputs.keywords)
        assert [x.dtype for x in grads[:3]] == [inputs.q.dtype] * 3
        try:
            compare.check_backward(backward.dout, *arrays, *grads, dlse=backward.dlse, **inputs.keywords)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from None
        backward.check_guards()


@pytest.mark.parametrize("block", [1, 7, 40, 100])
@pytest.mark.parametrize("feature", ["plain", "all"])
def test_blocks_do_not_show(block, feature, rng, monkeypatch):
    arrays = draws(rng, 13, 10)
    whole = gradients(np.random.default_rng(1), *arrays, **FEATURES[feature])[2]
    monkeypatch.setattr(reference, "_BLOCK_SCORES", block)
    parts = gradients(np.random.default_rng(1), *arrays, **FEATURES[feature])[2]
    assert_same(parts.values(), whole.values())


def test_memory_is_linear():
    def peak(length: int) -> int:
        x = np.zeros((length, 1, 8), np.float32)
        starts = {"cu_seqlens_q": [0, length], "cu_seqlens_k": [0, length]}
        out, lse, _ = attention(x, x, x, **starts, softcap=1.0)
        tracemalloc.start()
        attention_backward(x, x, x, x, out, lse, **starts, softcap=1.0)
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    short, long = peak(1024), peak(4096)
    assert long < 4.5 * short, f"{short} bytes at 1024, {long} at 4096"
    assert long < 4096 * 4096 * 4, f"{long} bytes are as many as all scores take"


@settings(max_examples=30)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**31 - 1), st.sampled_from(sorted(FEATURES)))
def test_identities(m, n, numbers, feature):
    """A score moved for all keys of a row alike moves nothing: sum_j dS_ij = dlse_i - (the sink's part). And scaling
    q by t while k is divided by t changes nothing: sum q dq = sum k dk."""
    rng = np.random.default_rng(numbers)
    q, k, v = draws(rng, m, n)
    _, dlse, grads = gradients(rng, q, k, v, **FEATURES[feature])
    np.testing.assert_allclose((q * grads["dq"]).sum(), (k * grads["dk"]).sum(), atol=1e-9)
    if feature == "sink":
        # Added to every score and to the sink, a number moves lse alone, and by itself.
        constant = (
            np.concatenate([q, np.ones((1, m, 4, 1))], axis=3),
            np.concatenate([k, np.zeros((1, n, 2, 1))], axis=3),
        )
        out, lse, _ = attention(*constant, v, scale=5**-0.5, **FEATURES[feature])
        dout = np.random.default_rng(1).standard_normal(out.shape)
        _, dk, _, dsink, _ = attention_backward(
            dout, *constant, v, out, lse, dlse=dlse, scale=5**-0.5, **FEATURES[feature]
        )
        moved = dk[0, :, :, 5].sum(axis=0) * 5**0.5 + dsink.reshape(2, 2).sum(axis=1)
        np.testing.assert_allclose(moved, dlse[0].sum(axis=1).reshape(2, 2).sum(axis=1), atol=1e-9)


# attention_backward, for host arrays. ---------------------------------------------------------------------------------

CASE = Case(
    "float16", (9, 0, 70), (30, 4, 70), 4, 2, 24, 16, seqused_k=(12, 4, 70), causal=True, window_size=(20, -1),
    softcap=5.0, alibi="batch", sink="element", scale=-0.3, seed=3,
)  # fmt: skip


@pytest.mark.parametrize("kind", ["numpy", "torch", "jax"])
def test_every_framework_gets_the_references_gradients(kind):
    inputs, backward = CASE.inputs(), CASE.gradients()
    out, lse, _ = attention(inputs.q, inputs.k, inputs.v, **inputs.keywords)
    arrays = [backward.dout, inputs.q, inputs.k, inputs.v, out, lse]
    expected = attention_backward(*arrays, dlse=backward.dlse, **inputs.keywords)
    convert = {"numpy": lambda x: x, "torch": _to_torch, "jax": _to_jax}[kind]
    keywords = {name: convert(x) if isinstance(x, np.ndarray) else x for name, x in inputs.keywords.items()}
    grads = cuflash.attention_backward(
        *map(convert, arrays), dlse=convert(backward.dlse), captured_grads=True, **keywords
    )
    assert {type(x) for x in (*grads[:4], *grads.dcaptured)} == {type(convert(out))}
    found = [*grads[:4], *grads.dcaptured]
    for name, x, wanted in zip(NAMES, found, expected, strict=True):
        dtype = np.float32 if name == "dslopes" else np.float16
        assert str(x.dtype).removeprefix("torch.") == np.dtype(dtype).name and tuple(x.shape) == wanted.shape
        np.testing.assert_array_equal(np.asarray(x), wanted.astype(dtype), err_msg=name)


def _to_torch(x):
    return pytest.importorskip("torch").from_numpy(np.ascontiguousarray(x))


def _to_jax(x):
    return pytest.importorskip("jax").numpy.asarray(x)


def test_what_is_not_asked_for_is_not_there(rng):
    q, k, v = draws(rng, 5, 5, dtype=np.float32)
    out, lse, _ = attention(q, k, v)
    grads = cuflash.attention_backward(out, q, k, v, out, lse, captured_grads=True)
    assert grads.dsink is None and grads.dcaptured == ()
    slopes = np.ones(4, np.float32)
    assert cuflash.attention_backward(out, q, k, v, out, lse, alibi_slopes=slopes).dcaptured == ()


def test_a_packed_projection_gets_a_packed_gradient(rng):
    qkv = rng.standard_normal((2, 9, 3, 4, 16)).astype(ml_dtypes.bfloat16)
    q, k, v = (qkv[:, :, i] for i in range(3))
    out, lse, *_ = cuflash.attention(q, k, v, aux=("lse",))
    dout = rng.standard_normal(out.shape).astype(out.dtype)
    expected = cuflash.attention_backward(dout, q, k, v, out, lse)
    dqkv = np.full_like(qkv, np.nan)
    for _ in range(2):  # the second time from the table of prepared calls
        grads = cuflash.attention_backward(
            dout, q, k, v, out, lse, dq=dqkv[:, :, 0], dk=dqkv[:, :, 1], dv=dqkv[:, :, 2]
        )
        assert np.shares_memory(grads.dk, dqkv)
        np.testing.assert_array_equal(dqkv, np.stack(expected[:3], axis=2))
        dqkv[...] = np.nan


def test_gradients_are_the_same_every_time(rng):
    q, k, v = draws(rng, 40, 50, dtype=np.float32)
    out, lse, *_ = cuflash.attention(q, k, v, aux=("lse",))
    first, second = (cuflash.attention_backward(out, q, k, v, out, lse, deterministic=d) for d in (False, True))
    for x, y in zip(first[:3], second[:3], strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_gradient_beyond_16_bits_is_infinite():
    q = np.full((1, 2, 1, 4), 100, np.float16)
    k = np.array([1.0, 2.0], np.float16).reshape(1, 2, 1, 1) * np.ones(4, np.float16)
    v = np.array([1000.0, -1000.0], np.float16).reshape(1, 2, 1, 1)
    out, lse, *_ = cuflash.attention(q, k, v, scale=1e-3, aux=("lse",))
    grads = cuflash.attention_backward(np.full_like(out, 4e4), q, k, v, out, lse, scale=1e-3)
    assert np.isinf(grads.dk).all() and np.isfinite(grads.dv).all()
