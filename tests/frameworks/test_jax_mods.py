"""score_mod and mask_mod with JAX: what they capture, traced or not, is an operand with a gradient."""

from __future__ import annotations

import numpy as np
import pytest
from backends import using

import cuflash
from cuflash.errors import ArgumentError, UnsupportedError

jax = pytest.importorskip("jax")
jnp = jax.numpy

Q_LEN, K_LEN, HEADS = 7, 9, 4
DOCUMENTS = jnp.array([0, 0, 0, 1, 1, 1, 1, 2, 2])
WINDOW = 5
EVERY = tuple(range(6))


def draw(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


@pytest.fixture
def given(rng):
    """q, k, v, a relative bias, a temperature, ALiBi's slopes."""
    q, k, v = draw(rng, 2, Q_LEN, HEADS, 16), draw(rng, 2, K_LEN, 2, 16), draw(rng, 2, K_LEN, 2, 16)
    return q, k, v, draw(rng, HEADS, 16), jnp.float32(1.2), jnp.abs(draw(rng, HEADS))


def mask_mod(b, h, q_idx, kv_idx):
    return (DOCUMENTS[q_idx] == DOCUMENTS[kv_idx]) | (q_idx - kv_idx < WINDOW)


def score_mod_of(bias, temperature):
    return lambda score, b, h, q_idx, kv_idx: score * temperature + bias[h, q_idx - kv_idx + 8]


def call(q, k, v, bias, temperature, slopes):
    score_mod = score_mod_of(bias, temperature)
    return cuflash.attention(q, k, v, score_mod=score_mod, mask_mod=mask_mod, alibi_slopes=slopes)


def dense(q, k, v, bias, temperature, slopes):
    """The same over all scores, in JAX alone."""
    i, j, h = jnp.arange(Q_LEN)[:, None], jnp.arange(K_LEN), jnp.arange(HEADS)[:, None, None]
    s = jnp.einsum("bihd,bjhd->bhij", q, k.repeat(2, 2)) * 0.25
    s = s - slopes[:, None, None] * abs(i + K_LEN - Q_LEN - j)
    s = jnp.where(mask_mod(0, h, i, j), s * temperature + bias[h, i - j + 8], -jnp.inf)
    return jnp.einsum("bhij,bjhd->bihd", jax.nn.softmax(s), v.repeat(2, 2))


def loss(f):
    return lambda *args: (f(*args) ** 2).sum()


def close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-3, atol=2e-4)


def test_values(given):
    close(call(*given), dense(*given))
    close(jax.jit(call)(*given), dense(*given))


def test_the_same_on_kernels(given):
    with using("emulator"):
        found = jax.jit(jax.value_and_grad(loss(call), EVERY))(*given)
    close(found, jax.value_and_grad(loss(dense), EVERY)(*given))


def test_gradients_of_what_mods_capture(given):
    expected = jax.grad(loss(dense), EVERY)(*given)
    close(jax.grad(loss(call), EVERY)(*given), expected)
    close(jax.jit(jax.grad(loss(call), EVERY))(*given), expected)
    for i in EVERY:  # of one alone, where all others are at hand
        close(jax.grad(loss(call), i)(*given), expected[i])
    close(jax.jit(jax.grad(loss(jax.checkpoint(call)), EVERY))(*given), expected)


def test_a_mask_has_no_gradient_for_what_it_reads(given):
    q, k, v, *_ = given
    f = lambda level: cuflash.attention(q, k, v, mask_mod=lambda b, h, i, j: level[j] >= 0).sum()  # noqa: E731
    assert not jax.grad(f)(jnp.zeros(K_LEN)).any()


@pytest.mark.parametrize("reads_b", [False, True])
@pytest.mark.parametrize("mapped", [3, 6], ids=["q, k, v", "all"])
def test_vmap(rng, given, mapped, reads_b):
    """With captured arrays of their own, or a mod that reads b, one call after another; else one call."""
    n = 3
    many = [draw(rng, n, *x.shape) if i < mapped else x for i, x in enumerate(given)]
    in_axes = tuple(0 if i < mapped else None for i in EVERY)

    def f(q, k, v, bias, temperature, slopes):
        own = score_mod_of(bias, temperature)
        score_mod = (lambda s, b, h, i, j: own(s, b, h, i, j) + b) if reads_b else own  # softmax forgets b
        return cuflash.attention(q, k, v, score_mod=score_mod, mask_mod=mask_mod, alibi_slopes=slopes)

    for transform in (
        lambda f: jax.vmap(f, in_axes),
        lambda f: jax.vmap(jax.grad(loss(f), EVERY), in_axes),
        lambda f: jax.grad(loss(jax.vmap(f, in_axes)), EVERY),
    ):
        close(transform(f)(*many), transform(dense)(*many))


def test_scan_over_captured_arrays(rng, given):
    q, k, v, _, temperature, slopes = given
    biases = draw(rng, 3, HEADS, 16)

    def total(f):
        def step(sum_so_far, bias):
            out = f(q, k, v, bias, temperature, slopes)
            return sum_so_far + out.sum(), out**2

        return lambda biases: (lambda found: found[0] + found[1].sum())(jax.lax.scan(step, 0.0, biases))

    close(jax.jit(jax.grad(total(call)))(biases), jax.grad(total(dense))(biases))


def test_a_jitted_step_trains_with_one_compile(rng):
    """A learned relative bias and masks of documents, new ones every step; gradients as of dense scores."""
    length, heads, d = 12, 2, 8
    weights = {"qkv": draw(rng, 16, 3 * heads * d) * 0.2, "out": draw(rng, heads * d, 16) * 0.2}
    weights["bias"] = jnp.zeros((heads, 2 * length))

    def model(attention, weights, x, documents):
        q, k, v = jnp.moveaxis((x @ weights["qkv"]).reshape(*x.shape[:2], 3, heads, d), 2, 0)
        return attention(q, k, v, weights["bias"], documents).reshape(*x.shape[:2], -1) @ weights["out"]

    def ours(q, k, v, bias, documents):
        return cuflash.attention(
            q, k, v, causal=True, score_mod=lambda s, b, h, i, j: s + bias[h, i - j + length],
            mask_mod=lambda b, h, i, j: documents[b, i] == documents[b, j],
        )  # fmt: skip

    def plain(q, k, v, bias, documents):
        i, j, h = jnp.arange(length)[:, None], jnp.arange(length), jnp.arange(heads)[:, None, None]
        s = jnp.einsum("bihd,bjhd->bhij", q, k) * d**-0.5 + bias[h, i - j + length]
        seen = (documents[:, None, :, None] == documents[:, None, None, :]) & (i >= j)
        return jnp.einsum("bhij,bjhd->bihd", jax.nn.softmax(jnp.where(seen, s, -jnp.inf)), v)

    runs = []
    for attention in (ours, plain):

        @jax.jit
        def step(weights, x, documents, attention=attention):
            error = lambda w: ((model(attention, w, x, documents) - x) ** 2).mean()  # noqa: E731
            value, grads = jax.value_and_grad(error)(weights)
            return value, jax.tree.map(lambda w, g: w - 0.5 * g, weights, grads)

        draws, now, losses = np.random.default_rng(1), weights, []
        for _ in range(20):
            documents = jnp.asarray(np.sort(draws.integers(0, 3, (2, length))))
            value, now = step(now, draw(draws, 2, length, 16), documents)
            losses.append(value)
        assert step._cache_size() == 1 and losses[-1] < losses[0] and now["bias"].any()
        runs.append((losses, now))
    close(*runs)


def test_a_new_number_is_read_anew_and_the_traced_one_stays(given):
    q, k, v, *_ = given
    factor = 0.5
    f = lambda q: cuflash.attention(q, k, v, score_mod=lambda s, *_: s * factor)  # noqa: E731
    jitted = jax.jit(f)
    close(jitted(q), cuflash.attention(q, k, v, scale=0.125))
    factor = 2.0
    close(f(q), cuflash.attention(q, k, v, scale=0.5))
    close(jitted(q), cuflash.attention(q, k, v, scale=0.125))  # as every Python number under jit
    half = np.array(0.5, np.float32)
    close(jax.jit(lambda q: cuflash.attention(q, k, v, score_mod=lambda s, *_: s * half))(q), jitted(q))


def test_mods_traced_before(given):
    q, k, v, bias, temperature, _ = given
    score_mod, mask = cuflash.mod(score_mod_of(bias, temperature)), cuflash.mod(mask_mod)
    block_mask = cuflash.create_block_mask(mask_mod, None, None, Q_LEN, K_LEN)
    f = lambda **mods: jax.jit(lambda q: cuflash.attention(q, k, v, score_mod=score_mod, **mods))(q)  # noqa: E731
    expected = cuflash.attention(q, k, v, score_mod=score_mod_of(bias, temperature), mask_mod=mask_mod)
    close(f(mask_mod=mask), expected)
    close(f(block_mask=block_mask), expected)


def test_refused_by_name(given, monkeypatch):
    q, k, v, bias, *_ = given
    array = np.asarray(bias)
    with pytest.raises(ArgumentError, match=r"array, which a mod captured, is a ndarray and .*jnp\.asarray"):
        jax.jit(lambda q: cuflash.attention(q, k, v, score_mod=lambda s, b, h, i, j: s + array[h, j]))(q)
    with pytest.raises(ArgumentError, match="array, which a mod captured, is a NumPy array and q a JAX array"):
        cuflash.attention(q, k, v, score_mod=lambda s, b, h, i, j: s + array[h, j])
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"bias: index -\d+ is outside of axis 1"):
        jax.jit(lambda q: cuflash.attention(q, k, v, score_mod=lambda s, b, h, i, j: s + bias[h, i - j - 1000]))(q)
    with monkeypatch.context() as patch, pytest.raises(ArgumentError, match=r"^bias: index -\d+ is outside of axis 1"):
        patch.setattr(cuflash.config, "check", True)  # known before anything runs, wherever that would be
        cuflash.attention(q, k, v, score_mod=lambda s, b, h, i, j: s + bias[h, i - j - 1000])
    with pytest.raises(UnsupportedError, match="first derivatives"):
        jax.grad(lambda bias: jax.grad(lambda x: call(q, k, v, x, *given[4:]).sum())(bias).sum())(bias)
