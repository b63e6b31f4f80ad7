"""The small GPT of test_torch_learns.py in JAX: one compiled step for documents of any lengths."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
from backends import using
from samples import LONGEST, batches

import cuflash

jax = pytest.importorskip("jax")
jnp = jax.numpy

WIDTH, HEADS, LAYERS, DOCUMENTS = 32, 2, 2, 8
SLOPES = np.array([1.0, 0.25], np.float32)


def draw_weights():
    """As PyTorch's layers draw theirs."""
    rng = np.random.default_rng(0)
    weights = {"bytes": rng.standard_normal((128, WIDTH))}
    linear = {f"{name}{i}": shape for i in range(LAYERS) for name, shape in (
        ("qkv", (WIDTH, 3 * WIDTH)), ("out", (WIDTH, WIDTH)), ("up", (WIDTH, 4 * WIDTH)), ("down", (4 * WIDTH, WIDTH))
    )}  # fmt: skip
    for name, shape in (linear | {"last": (WIDTH, 128)}).items():
        weights[name] = rng.uniform(-1, 1, shape) / math.sqrt(shape[0])
    return {name: jnp.asarray(x, jnp.float32) for name, x in weights.items()}


def packed(q, k, v, starts, **broken):
    keywords = {"causal": True, "alibi_slopes": jnp.asarray(SLOPES)} | broken
    return cuflash.attention(q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, **keywords)


def plain(q, k, v, starts):
    """Softmax of the whole matrix, with a mask of documents and causal; rows that nobody owns are a document too."""
    rows = jnp.arange(len(q))
    document = jnp.searchsorted(starts, rows, side="right")
    distance = rows - rows[:, None]
    seen = (distance <= 0) & (document == document[:, None])
    scores = jnp.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[-1]) + SLOPES[:, None, None] * distance
    return jnp.einsum("hij,jhd->ihd", jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)), v)


def loss_of(w, ids, wanted, starts, attend):
    def norm(x):
        return jax.nn.standardize(x, epsilon=1e-5)

    x = w["bytes"][ids]
    for i in range(LAYERS):
        q, k, v = (norm(x) @ w[f"qkv{i}"]).reshape(-1, 3, HEADS, WIDTH // HEADS).swapaxes(0, 1)
        x = x + attend(q, k, v, starts).reshape(x.shape) @ w[f"out{i}"]
        x = x + jax.nn.gelu(norm(x) @ w[f"up{i}"]) @ w[f"down{i}"]
    chosen = jnp.take_along_axis(jax.nn.log_softmax(norm(x) @ w["last"]), wanted[:, None], axis=1)[:, 0]
    return jnp.where(jnp.arange(len(ids)) < starts[-1], chosen, 0).sum() / -starts[-1]


def train(attend, steps, **broken):
    """The loss of every step; asserts that one program served them all."""

    @jax.jit
    def step(w, speed, *batch):
        loss, slope = jax.value_and_grad(lambda w: loss_of(w, *batch, lambda *x: attend(*x, **broken)))(w)
        speed = jax.tree.map(lambda s, g: 0.9 * s + g, speed, slope)
        return jax.tree.map(lambda x, s: x - 0.3 * s, w, speed), speed, loss

    w = draw_weights()
    speed, losses = jax.tree.map(jnp.zeros_like, w), []
    for batch in batches(steps, DOCUMENTS):
        ids, starts, _ = cuflash.packing.pack([d[:-1] for d in batch])
        wanted = np.concatenate([d[1:] for d in batch])
        fill = (0, DOCUMENTS * LONGEST - len(ids))
        w, speed, loss = step(w, speed, np.pad(ids, fill), np.pad(wanted, fill), starts)
        losses.append(float(loss))
    assert step._cache_size() == 1, "lengths compile nothing"
    return np.array(losses)


@functools.cache
def expected():
    return train(plain, 60)


def relative_difference(ours):
    theirs = expected()[: len(ours)]
    return (np.abs(ours - theirs) / theirs).max()


def test_packed_documents_teach_what_plain_attention_teaches():
    ours = train(packed, 60)
    worst = relative_difference(ours)
    assert worst < 1e-4, f"the largest relative difference of the losses is {worst:.1e}"
    assert ours[0] > 0.9 * math.log(128) and ours[-10:].mean() < ours[0] / 2, f"{ours[0]:.2f} to {ours[-1]:.2f}"


def test_a_mistake_in_attention_shows():
    assert relative_difference(train(packed, 5, causal=False)) > 1e-3


def test_on_the_emulator():
    """The kernels themselves, forward and backward, in a few steps."""
    with using("emulator"), cuflash.emulator.counting() as counted:
        assert relative_difference(train(packed, 3)) < 1e-4
    assert counted.launches > 3 * LAYERS
