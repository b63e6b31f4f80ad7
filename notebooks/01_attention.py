# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Attention three times
#
# The same function, first as four lines of NumPy, then by tiles as a GPU computes it, on the emulator, and last as one
# call on whatever arrays you have. Nothing here needs a GPU; where there is one, the last part uses it.

# %%
import itertools

import matplotlib.pyplot as plt
import numpy as np

import cuflash

rng = np.random.default_rng(0)

# %% [markdown]
# ## 1. In NumPy
#
# Every query is compared with every key; the weights, a softmax of the scores, mix the values. Several sequences lie
# in one array, end to end, and `cu_seqlens` says where each begins. The picture shows the weights of one head: a block
# for each sequence, causal inside it, and nothing between sequences. White is what need not be computed.

# %%
lengths = [5, 17, 40]
x = [(0.5 * rng.standard_normal((n, 2, 64))).astype(np.float16) for n in lengths]
tokens, cu_seqlens, longest = cuflash.packing.pack(x)


def weights_of(q, k, causal=True):
    """softmax(q k^T / sqrt(d)) of one head [rows, d]: float32 [rows, keys]."""
    scores = q.astype(np.float32) @ k.astype(np.float32).T / q.shape[-1] ** 0.5
    if causal:
        scores = np.where(np.tri(*scores.shape, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


picture = np.full((sum(lengths), sum(lengths)), np.nan)
for begin, end in itertools.pairwise(cu_seqlens):
    seen = weights_of(tokens[begin:end, 0], tokens[begin:end, 0])
    picture[begin:end, begin:end] = np.where(seen > 0, seen, np.nan)

figure, axes = plt.subplots(figsize=(4, 4))
axes.imshow(picture, cmap="viridis", vmin=0, vmax=0.4)
axes.set(xlabel="key", ylabel="query", title=f"{len(lengths)} sequences, {sum(lengths)} tokens, packed")
plt.show()
print(f"computed {np.isfinite(picture).sum()} weights of {longest * longest * len(lengths)} in a padded batch")

# %% [markdown]
# ## 2. By tiles
#
# The matrix of weights grows with the square of the length, so FlashAttention never holds it. It walks over the keys a
# tile at a time with three running values a row: the largest score `m`, the `total` of the weights relative to it, and
# the output `acc` so far. When a tile brings a larger score, what was gathered is scaled down, and no more is needed.


# %%
def attention_by_tiles(q, k, v, tile=64):
    """One head, not causal: q [rows, d], k and v [keys, d] -> [rows, d], float32."""
    q, k, v = (a.astype(np.float32) for a in (q, k, v))
    m = np.full(len(q), -np.inf, np.float32)
    total = np.zeros(len(q), np.float32)
    acc = np.zeros((len(q), v.shape[1]), np.float32)
    for begin in range(0, len(k), tile):
        scores = q @ k[begin : begin + tile].T / q.shape[1] ** 0.5
        larger = np.maximum(m, scores.max(axis=1))
        weights = np.exp(scores - larger[:, None])
        shrink = np.exp(m - larger)
        total = total * shrink + weights.sum(axis=1)
        acc = acc * shrink[:, None] + weights @ v[begin : begin + tile]
        m = larger
    return acc / total[:, None]


q, k, v = rng.standard_normal((3, 1, 128, 1, 64)).astype(np.float16)
by_tiles = attention_by_tiles(q[0, :, 0], k[0, :, 0], v[0, :, 0])
at_once = weights_of(q[0, :, 0], k[0, :, 0], causal=False) @ v[0, :, 0].astype(np.float32)
print("largest difference between tiles and the whole matrix:", np.abs(by_tiles - at_once).max())

# %% [markdown]
# ### The same tile on the emulator
#
# The kernel in `kernels_cu/` does exactly this, with 16 x 8 x 16 matrix products of a whole warp. The emulator runs its
# text on this machine, every thread as a fiber, in an order drawn from a seed. It also counts.

# %%
cuflash.config.backend = "emulator"
with cuflash.emulator.counting() as counted:
    on_emulator = cuflash.attention(q, k, v)

print("largest difference from the NumPy tiles:", np.abs(on_emulator[0, :, 0] - by_tiles).max())
print("matrix products of a warp:", dict(counted.matrix_instructions))
print("expected, 2 products of 128 x 128 x 64:", 2 * (128 // 16) * (128 // 8) * (64 // 16))
print("bytes read: ", dict(counted.global_bytes_read))
print("bytes written:", dict(counted.global_bytes_written), "- no score ever leaves the chip")

# %% [markdown]
# Whatever the order in which warps and lanes run, and whether a copy lands at its first or last legal moment, the
# result has the same bits. A missing barrier would be reported as a race, by file and line.

# %%
orders = [(seed, landing) for seed in (1, 2, 3) for landing in ("early", "late")]
for seed, landing in orders:
    with cuflash.emulator.schedule(seed=seed, landing=landing):
        assert np.array_equal(cuflash.attention(q, k, v), on_emulator)
print(f"{len(orders)} schedules, the same bits")

# %% [markdown]
# ## 3. One call, any arrays
#
# `attention` takes arrays of NumPy, CuPy, PyTorch or JAX and answers in kind. Arrays on a GPU run the kernel there. On
# the host the backend is the NumPy reference, unless the emulator is asked for. `explain` says what a call would do.

# %%
lengths_of = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
out = cuflash.attention(tokens, tokens, tokens, **lengths_of, causal=True)  # still on the emulator
expected = np.concatenate([weights_of(s[:, 0], s[:, 0]) @ s[:, 0].astype(np.float32) for s in x])
print("packed batch, largest difference from NumPy:", np.abs(out[:, 0] - expected).max())
print(cuflash.explain(tokens, tokens, tokens, **lengths_of, causal=True))

# %%
cuflash.config.backend = "auto"


def same_call(name, array):
    there, starts = array(tokens), array(cu_seqlens)
    answer = cuflash.attention(there, there, there, cu_seqlens_q=starts, cu_seqlens_k=starts, causal=True)
    print(f"{name:8} {type(answer).__module__.split('.')[0]:8} {tuple(answer.shape)}")


same_call("NumPy", np.asarray)
try:
    import torch

    same_call("PyTorch", lambda a: torch.from_numpy(a).to("cuda" if torch.cuda.is_available() else "cpu"))
except ImportError:
    print("PyTorch  is not installed")
try:
    import jax

    same_call("JAX", jax.numpy.asarray)
except ImportError:
    print("JAX      is not installed")
try:
    import cupy

    if cupy.is_available():
        same_call("CuPy", cupy.asarray)
    else:
        print("CuPy     sees no GPU")
except ImportError:
    print("CuPy     is not installed")
