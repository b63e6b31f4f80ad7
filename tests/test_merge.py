"""`merge_states` in every framework: values, -inf, gradients, a shared prefix, and what is refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from test_packing import NAMES, framework

import cuflash
from cuflash import errors, reference


@pytest.fixture(params=NAMES)
def xp(request):
    return framework(request.param)


def parts(rng, cuts=(0, 3, 3, 8, 9), rows=4, heads=2, dtype=np.float32):
    """Attention over parts of the keys, and over all of them."""
    q, k, v = (rng.standard_normal((2, n, heads, 8)).astype(dtype) for n in (rows, cuts[-1], cuts[-1]))
    states = [
        reference.attention(q, k[:, a:b], v[:, a:b])[:2] for a, b in itertools.pairwise(cuts)
    ]  # the empty one is 0 with lse -inf
    return states, reference.attention(q, k, v)[:2]


def test_parts_make_the_whole(xp, rng):
    states, (out, lse) = parts(rng)
    outs, lses = ([xp.asarray(x) for x in column] for column in zip(*states, strict=True))
    merged, merged_lse = cuflash.merge_states(outs, lses)
    assert isinstance(merged, xp.type) and isinstance(merged_lse, xp.type)
    np.testing.assert_allclose(xp.host(merged), out, atol=1e-6)
    np.testing.assert_allclose(xp.host(merged_lse), lse, atol=1e-6)
    alone, alone_lse = cuflash.merge_states(outs[:1], lses[:1])
    np.testing.assert_array_equal(xp.host(alone), states[0][0])
    np.testing.assert_array_equal(xp.host(alone_lse), states[0][1])


def test_stacked_and_packed(rng):
    states, (out, lse) = parts(rng)
    outs, lses = (np.stack(column) for column in zip(*states, strict=True))
    merged, merged_lse = cuflash.merge_states(outs[:, 0], lses[:, 0])  # of one sequence: [total, heads, d]
    np.testing.assert_allclose(merged, out[0], atol=1e-6)
    np.testing.assert_allclose(merged_lse, lse[0], atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_dtypes(rng, dtype):
    states, (out, _) = parts(rng, dtype=dtype)
    outs, lses = ([*column] for column in zip(*states, strict=True))
    merged, merged_lse = cuflash.merge_states(outs, [x.astype(np.float32) for x in lses])
    assert merged.dtype == dtype and merged_lse.dtype == np.float32
    np.testing.assert_allclose(merged, out, atol=2e-3 if dtype == np.float16 else 1e-6)
    merged, merged_lse = cuflash.merge_states(outs, lses)
    assert merged_lse.dtype == lses[0].dtype


def test_parts_without_a_key_contribute_nothing(xp, rng):
    out, lse = rng.standard_normal((1, 3, 2, 4)).astype(np.float32), np.zeros((1, 2, 3), np.float32)
    lse[0, 1, 2] = -np.inf  # and in both parts: a row that sees no key
    nothing = np.full_like(lse, -np.inf)
    merged, merged_lse = cuflash.merge_states(
        [xp.asarray(np.full_like(out, np.nan)), xp.asarray(out)], [xp.asarray(nothing), xp.asarray(lse)]
    )
    expected = out.copy()
    expected[0, 2, 1] = 0
    np.testing.assert_array_equal(xp.host(merged), expected)
    np.testing.assert_array_equal(xp.host(merged_lse), lse)


def test_large_and_far_apart(xp):
    """exp(lse) overflows; of two parts as far apart as 200 the smaller vanishes."""
    outs = [xp.asarray(np.full((1, 1, 1, 2), x, np.float32)) for x in (1.0, 3.0, 7.0)]
    lses = [xp.asarray(np.full((1, 1, 1), x, np.float32)) for x in (500.0, 500.0, 300.0)]
    out, lse = cuflash.merge_states(outs, lses)
    np.testing.assert_allclose(xp.host(out), 2.0)
    np.testing.assert_allclose(xp.host(lse), 500 + np.log(2), rtol=1e-6)


def test_nan_of_a_part_is_not_hidden():
    one, lse = np.ones((1, 1, 1, 2), np.float32), np.zeros((1, 1, 1), np.float32)
    assert np.isnan(cuflash.merge_states([one * np.nan, one], [lse, lse])[0]).all()
    assert np.isnan(cuflash.merge_states([one, one], [lse * np.nan, lse])[1]).all()


def gradients_of_parts(rng):
    """Parts in float64, one of them empty and one row empty in all; the loss's gradients, and those of the parts by
    differences of the same formula in NumPy."""
    outs = [rng.standard_normal((1, 2, 2, 3)) for _ in range(3)]
    lses = [rng.standard_normal((1, 2, 2)) for _ in range(3)]
    lses[1][...] = -np.inf
    for lse in lses:
        lse[0, 1, 1] = -np.inf
    dout, dlse = rng.standard_normal((1, 2, 2, 3)), rng.standard_normal((1, 2, 2))

    def loss(outs, lses):
        out, lse = cuflash.merge_states(outs, lses)
        return (out * dout).sum() + np.where(lse == -np.inf, 0, lse * dlse).sum()

    expected, step = [], 1e-5
    for which, arrays in enumerate((outs, lses)):
        for i, x in enumerate(arrays):
            slope = np.zeros_like(x)
            for at in np.ndindex(*x.shape):
                if np.isfinite(x[at]):
                    sides = []
                    for sign in (1, -1):
                        changed = [[*outs], [*lses]]
                        changed[which][i] = x.copy()
                        changed[which][i][at] += sign * step
                        sides.append(loss(*changed))
                    slope[at] = (sides[0] - sides[1]) / (2 * step)
            expected.append(slope)
    return outs, lses, dout, dlse, expected


def test_gradients_in_pytorch(rng):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    outs, lses, dout, dlse, expected = gradients_of_parts(rng)
    inputs = [torch.tensor(x, requires_grad=True) for x in (*outs, *lses)]
    with torch.autograd.detect_anomaly(check_nan=True):
        out, lse = cuflash.merge_states(inputs[:3], inputs[3:])
        got = torch.autograd.grad([out, lse], inputs, [torch.tensor(dout), torch.tensor(dlse)])
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x.numpy(), y, atol=1e-8)


def test_gradients_in_jax(rng):
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    outs, lses, dout, dlse, expected = gradients_of_parts(rng)

    @jax.jit
    def gradients(outs, lses):
        _, back = jax.vjp(cuflash.merge_states, outs, lses)
        return back((jax.numpy.asarray(dout, "float32"), jax.numpy.asarray(dlse, "float32")))

    inputs = [[jax.numpy.asarray(x, "float32") for x in arrays] for arrays in (outs, lses)]
    got = [*gradients(*inputs)[0], *gradients(*inputs)[1]]
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(np.asarray(x), y, atol=1e-5)


def test_under_torch_compile(rng):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    states, (out, _) = parts(rng)
    outs, lses = ([torch.tensor(x) for x in column] for column in zip(*states, strict=True))
    compiled = torch.compile(cuflash.merge_states, backend="eager", fullgraph=True)
    np.testing.assert_allclose(compiled(outs, lses)[0].numpy(), out, atol=1e-6)


def test_a_prompt_that_many_continuations_share(xp, rng):
    """Its keys are held once and read by all continuations' queries as one packed sequence; the continuations are
    ragged. Equal to giving each a prompt of its own."""
    heads, lengths, prompt_len = 2, (3, 1, 6), 9
    draw = lambda n: rng.standard_normal((n, heads, 16)).astype(np.float32)  # noqa: E731
    total, starts = sum(lengths), np.cumsum([0, *lengths]).astype(np.int32)
    q, k, v, prompt_k, prompt_v = draw(total), draw(total), draw(total), draw(prompt_len), draw(prompt_len)
    on = lambda *arrays: [xp.asarray(x) for x in arrays]  # noqa: E731

    every = np.array([0, total], np.int32), np.array([0, prompt_len], np.int32)
    shared = cuflash.attention(*on(q, prompt_k, prompt_v), cu_seqlens_q=every[0], cu_seqlens_k=every[1], aux=("lse",))
    own = cuflash.attention(*on(q, k, v), cu_seqlens_q=starts, cu_seqlens_k=starts, causal=True, aux=("lse",))
    out, lse = cuflash.merge_states([shared.out, own.out], [shared.lse, own.lse])

    for b in range(len(lengths)):
        rows = slice(starts[b], starts[b + 1])
        keys, values = (np.concatenate([p, x[rows]])[None] for p, x in ((prompt_k, k), (prompt_v, v)))
        expected = reference.attention(q[rows][None], keys, values, causal=True)
        np.testing.assert_allclose(xp.host(out)[rows], expected[0][0], atol=2e-6)
        np.testing.assert_allclose(xp.host(lse)[:, rows], expected[1][0], atol=2e-6)


X, L = np.ones((1, 3, 2, 4), np.float16), np.zeros((1, 2, 3), np.float32)
WRONG = {
    "no parts": ([], [], r"outs=\[\] must hold at least one part: pass what attention"),
    "numbers": (1, 2, r"outs is a int and must be a sequence: pass a list"),
    "integers": ([X.astype("i4")], [L], r"outs\[0\]\.dtype=int32 must be a float"),
    "one lse missing": ([X, X], [L], r"len\(lses\)=1 must equal len\(outs\)=2: one lse a part"),
    "a list": ([[1.0]], [L], r"outs\[0\] is a list, not an array of NumPy"),
    "shapes differ": ([X, X[:, :2]], [L, L], r"outs\[1\]\.shape=\(1, 2, 2, 4\) must equal outs\[0\]\.shape=\(1, 3,"),
    "lses differ": ([X, X], [L, L[:, :1]], r"lses\[1\]\.shape=\(1, 1, 3\) must equal lses\[0\]\.shape"),
    "dtypes differ": ([X, X.astype("f4")], [L, L], r"outs\[1\]\.dtype=float32 must be float16 as of outs\[0\]: cast"),
    "rows before heads": ([X], [L.swapaxes(1, 2)], r"lses\[0\]\.shape=\(1, 3, 2\) must be \(1, 2, 3\), heads before"),
    "2 dimensions": ([X[0, 0]], [L], r"outs\[0\]\.shape=\(2, 4\) must have 4 dimensions.*reshape"),
    "an lse of 16 bits": ([X], [L.astype("f2")], r"lses\[0\]\.dtype=float16 must be float32: pass the lse that"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments(what):
    outs, lses, match = WRONG[what]
    with pytest.raises(errors.ArgumentError, match=match):
        cuflash.merge_states(outs, lses)


def test_frameworks_do_not_mix():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    with pytest.raises(errors.ArgumentError, match=r"lses\[0\] is a numpy\.ndarray, outs\[0\] a torch\.Tensor"):
        cuflash.merge_states([torch.ones(1, 3, 2, 4)], [L])
