# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Masks and scores in Python
#
# A mask says which keys a query sees, a score mod changes a score before the softmax. Both are ordinary functions of
# indices, as FlexAttention has them, and its functions run unchanged. This notebook goes through the examples of
# FlexAttention's announcement, looks at what a kernel makes of such a function, and counts what a mask costs. It needs
# a C++ compiler and no GPU.

# %%
import matplotlib.pyplot as plt
import numpy as np

import cuflash
from cuflash import and_masks, create_block_mask, flex_attention, mods, or_masks

rng = np.random.default_rng(0)
LENGTH, HEADS = 128, 2

# %% [markdown]
# ## 1. Which keys a query sees
#
# `mask_mod(b, h, q_idx, kv_idx)` gives a truth value for one query and one key. It may read arrays and numbers around
# it. `and_masks`, `or_masks` and `not_mask` put functions together; `mods` has some that are ready made.


# %%
def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


WINDOW = 24


def window(b, h, q_idx, kv_idx):
    return q_idx - kv_idx <= WINDOW


prefix_length = np.array([40], np.int32)  # of each sequence of the batch


def prefix(b, h, q_idx, kv_idx):
    return kv_idx < prefix_length[b]


document = np.repeat([0, 1, 2], [30, 60, 38]).astype(np.int32)  # of each token


def same_document(b, h, q_idx, kv_idx):
    return document[q_idx] == document[kv_idx]


masks = {
    "causal": causal,
    "sliding window": and_masks(causal, window),
    "prefix": or_masks(causal, prefix),
    "documents": same_document,
    "jagged: documents, causal, window": and_masks(same_document, causal, window),
    "a prefix in each document": mods.document(
        document, mask_mod=or_masks(causal, lambda b, h, q_idx, kv_idx: kv_idx < 12)
    ),
    "dilated window": mods.dilated_window(48, 8),
    "neighbourhood of a 16 x 8 image": mods.natten_2d(16, 8, 5),
}
figure, axes = plt.subplots(2, 4, figsize=(13, 7), layout="constrained")
for ax, (name, mask_mod) in zip(axes.flat, masks.items(), strict=True):
    create_block_mask(mask_mod, None, None, LENGTH, LENGTH, BLOCK_SIZE=16).plot(ax=ax)
    ax.set(title=name, xlabel="", ylabel="")
plt.show()

# %% [markdown]
# The pictures are made of blocks of 16 x 16: empty, full, or partly seen. A kernel skips what is empty, and looks at
# single elements only where a block is partly seen. `create_block_mask` is for looking: it builds nothing that a kernel
# would need, and `plot` works out its blocks when it is called.
#
# ## 2. What becomes of a score
#
# `score_mod(score, b, h, q_idx, kv_idx)` gets the scaled product of a query and a key, and gives what goes into the
# softmax. The examples of the announcement, in NumPy (PyTorch's functions do as well):

# %%
slopes = 2.0 ** -np.arange(1.0, HEADS + 1, dtype=np.float32)
table = rng.standard_normal((HEADS, 2 * LENGTH - 1)).astype(np.float32)
temperature = np.float32(0.5)

scores = {
    "unchanged": lambda score, b, h, q_idx, kv_idx: score,
    "relative position": lambda score, b, h, q_idx, kv_idx: score + (q_idx - kv_idx),
    "ALiBi": lambda score, b, h, q_idx, kv_idx: score + slopes[h] * (kv_idx - q_idx),
    "softcap": lambda score, b, h, q_idx, kv_idx: 2.0 * np.tanh(score / 2.0),
    "bias of each head and distance": lambda score, b, h, q_idx, kv_idx: score + table[h, q_idx - kv_idx + LENGTH - 1],
    "temperature": lambda score, b, h, q_idx, kv_idx: score * temperature,
    "causal as a score": lambda score, b, h, q_idx, kv_idx: np.where(q_idx >= kv_idx, score, -np.inf),
}

# %% [markdown]
# What they mean can be written down without any kernel: call the function on all pairs at once. `flex_attention` must
# agree. Arrays in host memory, as here, it computes in NumPy; the same call with arrays on a GPU runs a kernel.


# %%
def dense(q, k, v, score_mod=None, mask_mod=None):
    """The whole matrix of scores: q, k, v [batch, heads, length, d]."""
    scores = q @ k.swapaxes(2, 3) / q.shape[-1] ** 0.5
    b, h, i, j = np.ix_(*map(np.arange, scores.shape))
    if score_mod is not None:
        scores = score_mod(scores, b, h, i, j)
    if mask_mod is not None:
        scores = np.where(cuflash.create_mask(mask_mod, 1, HEADS, LENGTH, LENGTH), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ v


q, k, v = rng.standard_normal((3, 1, HEADS, LENGTH, 32)).astype(np.float32)
for name, mask_mod in masks.items():
    out = flex_attention(q, k, v, block_mask=create_block_mask(mask_mod, None, None, LENGTH, LENGTH))
    print(f"{name:35} largest difference {np.abs(out - dense(q, k, v, mask_mod=mask_mod)).max():.0e}")
for name, score_mod in scores.items():
    out = flex_attention(q, k, v, score_mod)
    print(f"{name:35} largest difference {np.abs(out - dense(q, k, v, score_mod)).max():.0e}")

# %% [markdown]
# ## 3. What a kernel makes of it
#
# A function is called once, with symbols for its arguments, and what it does to them is written down: an expression,
# which `mod` shows. Of a mask the kernel gets up to three functions of CUDA C:
#
# - `bounds_q`: for a query, the interval of keys it can see at all. Everything of the form "up to", "from", "at most so
#   far" goes there, and costs what `causal=True` costs: a comparison with two numbers a row.
# - `keep_q`: what is left to ask of each pair. Often nothing.
# - `classify`: whether a tile is empty, full or mixed, by interval arithmetic on the ranges of its indices.

# %%
print(cuflash.mod(and_masks(causal, window)))
cuflash.config.backend = "emulator"
x = rng.standard_normal((1, 512, HEADS, 64)).astype(np.float16)  # of attention: [batch, length, heads, d]


def emitted(name, **mod):
    """The function of that name in the text of the kernel."""
    text = cuflash.explain(x, x, x, **mod).source
    text = text[text.index("struct Mods {") :]
    begin = text.index(f" {name}(const Params& p, const Tile& t")
    return "  HW_DEVICE static" + text[text.rindex("static", 0, begin) + 6 : text.index("\n  }", begin) + 4]


def every_fourth(b, h, q_idx, kv_idx):
    return (q_idx >= kv_idx) & ((q_idx - kv_idx) % 4 == 0)


print(emitted("bounds_q", mask_mod=and_masks(causal, window)))
print(emitted("keep_q", mask_mod=and_masks(causal, window)))

# %% [markdown]
# A window and causal are bounds, and nothing is left. `t.t0` is the window, read from the call's parameters: another
# number compiles nothing. "Every fourth key" is a bound and something to keep; a score is an expression of the score
# `s`:

# %%
print(emitted("bounds_q", mask_mod=every_fourth))
print(emitted("keep_q", mask_mod=every_fourth))
print(emitted("score", score_mod=mods.relative_bias(table[:, 64:193])))

# %% [markdown]
# ## 4. What it costs
#
# On the emulator each tile of 128 queries and 64 keys takes 512 matrix instructions at head dim 64. So counting these
# tells how many tiles a kernel computed; a `BlockMask` with blocks of that size tells how many are not empty. They must
# be the same number. No mask takes memory: as a matrix, that of 512 tokens would have 262,144 entries, one of 100,000
# tokens ten billion.

# %%
WINDOW, document = 100, np.repeat([0, 1, 2, 3], [100, 28, 256, 128]).astype(np.int32)  # for 512 tokens
seen = {
    "causal, window of 100": and_masks(causal, window),
    "every fourth key": every_fourth,
    "documents, causal": and_masks(same_document, causal),
}
print(f"{'':24}{'tiles':>8}{'not empty':>12}{'of all':>8}{'mixed':>8}")
for name, mask_mod in seen.items():
    with cuflash.emulator.counting() as counted:
        cuflash.attention(x, x, x, mask_mod=mask_mod)
    tiles = counted.total_matrix_instructions // (512 * HEADS)
    blocks = create_block_mask(mask_mod, None, None, 512, 512, BLOCK_SIZE=(128, 64)).kinds
    print(f"{name:24}{tiles:8}{(blocks > 0).sum():12}{(blocks > 0).mean():8.0%}{(blocks == 1).sum():8}")
    assert tiles == (blocks > 0).sum()

# %% [markdown]
# Documents that lie end to end need no mask: with `cu_seqlens`, indices count within each sequence, and no block looks
# at another's keys. The result is the same.

# %%
starts = np.array([0, 100, 128, 384, 512], np.int32)
by_mask = cuflash.attention(x, x, x, mask_mod=and_masks(same_document, causal))[0]
cuflash.config.backend = "auto"
packed = cuflash.attention(x[0], x[0], x[0], cu_seqlens_q=starts, cu_seqlens_k=starts, mask_mod=causal)
print(f"largest difference {np.abs(by_mask.astype(np.float32) - packed).max():.0e}, in float16, of emulator and NumPy")

# %% [markdown]
# ## 5. Numbers and arrays around a function
#
# They are read at every call. From here on, whatever would compile raises; windows of any width run all the same.

# %%
cuflash.config.backend, cuflash.config.on_compile = "emulator", "error"
for WINDOW in (0, 10, 63, 64, 300):
    with cuflash.emulator.counting() as counted:
        cuflash.attention(x, x, x, mask_mod=and_masks(causal, window))
    print(f"window {WINDOW:3}: {counted.total_matrix_instructions // (512 * HEADS):2} tiles")
print("captured:", cuflash.explain(x, x, x, mask_mod=and_masks(same_document, window)).captured)
cuflash.config.backend, cuflash.config.on_compile = "auto", "quiet"

# %% [markdown]
# A float array that a score mod reads receives its gradient: from PyTorch's autograd, from `jax.grad`, and here from
# `attention_backward`. So a bias can be learned. Below, the results of attention with a hidden bias of each distance
# are given, and its table is found again, by steps against the sign of the gradient that grow smaller. (What is added
# to all of a row's scores changes nothing, so the table is found up to a constant.)

# %%
REACH = 8
distances = np.arange(-REACH, REACH + 1)
hidden = np.cos(distances / 2).astype(np.float32)
q, k, v = rng.standard_normal((3, 8, 48, 1, 16)).astype(np.float32)
target = cuflash.attention(q, k, v, score_mod=mods.relative_bias(hidden))

learned, losses = np.zeros_like(hidden), []
bias = mods.relative_bias(learned)
for step in 0.3 * 0.93 ** np.arange(60):
    out, lse, *_ = cuflash.attention(q, k, v, score_mod=bias, aux=("lse",))
    losses.append(float(((out - target) ** 2).sum()))
    grads = cuflash.attention_backward(2 * (out - target), q, k, v, out, lse, score_mod=bias, captured_grads=True)
    learned -= step * np.sign(grads.dcaptured[0])  # in place: the next call reads it

figure, axes = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
axes[0].semilogy(losses)
axes[0].set(xlabel="step", ylabel="squared error")
axes[1].plot(distances, hidden - hidden.mean(), "k-", label="hidden")
axes[1].plot(distances, learned - learned.mean(), "o", label="learned")
axes[1].set(xlabel="kv_idx - q_idx", ylabel="bias")
axes[1].legend()
plt.show()
assert losses[-1] < 1e-3 * losses[0]

# %% [markdown]
# ## 6. What is told, and what is refused
#
# `explain` says what a call would do. Of a mask that compares `q_idx` with `kv_idx` it says that where lengths differ,
# the first query stands on the first key, as in FlexAttention; `causal=True` and `cuflash.mods` align the last ones. A
# step of generation wants the latter.

# %%
print("q_idx >= kv_idx")
mods.visible(causal, 2, 6)
print("mods.causal()")
mods.visible(mods.causal(), 2, 6)

# %% [markdown]
# What cannot be followed is refused with the line, and what to write there.


# %%
def branching(b, h, q_idx, kv_idx):
    if q_idx < 4:
        return True
    return q_idx >= kv_idx


try:
    cuflash.mod(branching)
except cuflash.errors.TraceError as error:
    print(str(error).partition(": ")[2])
