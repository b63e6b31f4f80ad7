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
# # Training on packed documents
#
# A small GPT learns docstrings of Python's own functions, twice: from documents packed end to end, by cuflash, and from
# the same documents padded to the longest, by PyTorch's `scaled_dot_product_attention` with a mask. Both must see the
# same losses: in float32 to its last digits, in bfloat16 within the spread of seeds. Then the same step in JAX. Needs
# PyTorch and half a minute, but no GPU; where there is one, it is used.

# %%
import inspect
import itertools
import math

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.nn import functional as F

import cuflash

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_num_threads(1)  # so small a model only loses by more

# %% [markdown]
# ## 1. Documents, packed and padded
#
# A document is a docstring, as bytes, cut at 97: every byte but the last is read, every byte but the first predicted.
# Eight make a batch. Packed, its rows are those that some document owns; padded, each document fills up to the longest.

# %%
LONGEST, DOCUMENTS = 96, 8
owners = (bytes, dict, float, int, itertools, list, math, set, str)
texts = sorted({inspect.getdoc(getattr(owner, name)) or "" for owner in owners for name in dir(owner)})
documents = [np.array(list(t.encode("ascii", "replace"))[: LONGEST + 1]) for t in texts if len(t) >= 20]


def batches(steps):
    """The same documents in the same order for every training."""
    rng = np.random.default_rng(0)
    for _ in range(steps):
        yield [documents[i] for i in rng.integers(len(documents), size=DOCUMENTS)]


lengths = np.array([[len(d) - 1 for d in batch] for batch in batches(100)])
print(f"{len(documents)} documents of {lengths.min()} to {lengths.max()} bytes; one: {bytes(documents[0].tolist())!r}")
print(f"rows of 100 batches: {lengths.sum()} packed, {DOCUMENTS * lengths.max(axis=1).sum()} padded")

# %% [markdown]
# ## 2. The model
#
# Bytes in, the logits of the next byte out. All it knows of positions are ALiBi's slopes in attention, so a row's place
# in memory plays no part, and the layout enters in `attend` alone: an array of rows and `cu_seqlens`, or a mask.

# %%
WIDTH, HEADS, LAYERS = 64, 4, 2
slopes = 2.0 ** -torch.arange(HEADS, device=device)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.between = torch.nn.LayerNorm(WIDTH), torch.nn.LayerNorm(WIDTH)
        self.qkv, self.out = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Linear(WIDTH, WIDTH)
        self.up, self.down = torch.nn.Linear(WIDTH, 4 * WIDTH), torch.nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x, attend):
        qkv = self.qkv(self.before(x)).unflatten(-1, (3, HEADS, WIDTH // HEADS))
        x = x + self.out(attend(qkv).flatten(-2))
        return x + self.down(F.gelu(self.up(self.between(x))))


class GPT(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.bytes = torch.nn.Embedding(128, WIDTH)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.last = torch.nn.LayerNorm(WIDTH), torch.nn.Linear(WIDTH, 128)

    def forward(self, ids, attend):
        x = self.bytes(ids)
        for block in self.blocks:
            x = block(x, attend)
        return self.last(self.norm(x)).float()


def packed_loss(model, batch, causal=True):
    """By cuflash: no row of padding."""
    ids, starts, longest = cuflash.packing.pack([d[:-1] for d in batch])
    wanted = torch.cat([d[1:] for d in batch])

    def attend(qkv):
        return cuflash.flash_attn_varlen_qkvpacked_func(qkv, starts, longest, causal=causal, alibi_slopes=slopes)

    return F.cross_entropy(model(ids, attend), wanted)


def padded_loss(model, batch):
    """By PyTorch: a mask of causal, padding and slopes."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([d[:-1] for d in batch], batch_first=True)
    wanted = pad([d[1:] for d in batch], batch_first=True, padding_value=-100)
    places = torch.arange(ids.shape[1], device=device)
    distance = places - places[:, None]
    owned = places < torch.tensor([len(d) - 1 for d in batch], device=device)[:, None]
    mask = (slopes[:, None, None] * distance).where((distance <= 0) & owned[:, None, None], -torch.inf)

    def attend(qkv):
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype)).transpose(1, 2)

    return F.cross_entropy(model(ids, attend).flatten(0, 1), wanted.flatten(), ignore_index=-100)


RATE, MOMENTUM = 0.3, 0.9


def train(loss_of, seed=0, steps=100, low=False, **options):
    """The loss of every step. The seed draws the weights; `low`: bfloat16, where PyTorch's autocast takes it."""
    torch.manual_seed(seed)
    model = GPT().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    losses = []
    for batch in batches(steps):
        with torch.autocast(device, torch.bfloat16, enabled=low):
            loss = loss_of(model, [torch.as_tensor(d, device=device) for d in batch], **options)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses)


# %% [markdown]
# ## 3. In float32
#
# One seed, one hundred steps. The weights of step 100 hang on every gradient before it, so a gradient that was wrong
# anywhere would part the two curves.

# %%
ours, theirs = train(packed_loss), train(padded_loss)
apart = np.abs(ours - theirs) / theirs
print(f"packed, cuflash: {ours[0]:.4f} to {ours[-10:].mean():.4f}, the mean of the last ten steps")
print(f"padded, PyTorch: {theirs[0]:.4f} to {theirs[-10:].mean():.4f}")
print(f"largest relative difference of the losses: {apart.max():.1e}")
assert apart.max() < 1e-4
assert ours[-10:].mean() < ours[0] / 2

# %% [markdown]
# Would a mistake be seen? Here is one: cuflash without `causal` lets each byte see those behind it, the answer among
# them.

# %%
wrong = train(packed_loss, steps=30, causal=False)
print(f"after 30 steps: {wrong[-1]:.2f} instead of {theirs[29]:.2f}")
assert np.abs(wrong - theirs[:30]).max() > 0.1

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
left.plot(theirs, linewidth=4, alpha=0.4, label="padded, PyTorch")
left.plot(ours, linewidth=1, label="packed, cuflash")
left.plot(wrong, linewidth=1, linestyle=":", label="packed, causal forgotten")
left.set(xlabel="step", ylabel="loss, nats a byte", ylim=(0, None), title="float32")
left.legend()
right.semilogy(apart, ".")  # a step without difference has no dot
right.axhline(1e-4, linestyle=":", color="gray")
right.set(xlabel="step", ylim=(1e-9, 1e-3), title="relative difference, and what is allowed")
plt.show()

# %% [markdown]
# ## 4. In bfloat16
#
# bfloat16 has 8 bits, and the two round in different places: single steps differ in the third digit. Whether the models
# learn alike shows in the mean of the last ten of 20 steps, over three seeds.

# %%
seeds = range(3)
low = {f.__name__: np.stack([train(f, seed, steps=20, low=True) for seed in seeds]) for f in (packed_loss, padded_loss)}
ends = {name: losses[:, -10:].mean(axis=1) for name, losses in low.items()}
for name, last in ends.items():
    print(f"{name}: {last.mean():.4f} with a standard deviation of {last.std(ddof=1):.4f}: {np.round(last, 4)}")
ours_low, theirs_low = ends["packed_loss"], ends["padded_loss"]
assert abs(ours_low.mean() - theirs_low.mean()) < 2 * theirs_low.std(ddof=1)

figure, axes = plt.subplots(figsize=(4, 3), layout="constrained")
for (name, losses), width, alpha in zip(low.items(), (1, 4), (1, 0.4), strict=True):
    axes.plot(losses.mean(axis=0), linewidth=width, alpha=alpha, label=name.replace("_loss", ", mean of 3"))
axes.set(xlabel="step", ylabel="loss, nats a byte", ylim=(0, None), title="bfloat16")
axes.legend()
plt.show()

# %% [markdown]
# ## 5. The same step in JAX
#
# From the same weights, by their PyTorch names, on the same documents. A compiled program has one shape, so the packed
# array gets as many rows as a batch can have. `cu_seqlens` says which of them are owned: no length compiles anything
# anew, and rows behind the last document take no part.


# %%
def train_in_jax(weights, steps):
    """The loss of every step, as `train` has it for the packed layout, and how often the step was compiled."""
    import jax
    from jax import numpy as jnp

    steep = jnp.asarray(slopes.cpu().numpy())

    def model(w, ids, starts):
        def linear(name, x):
            return x @ w[name + ".weight"].T + w[name + ".bias"]

        def norm(name, x):
            return jax.nn.standardize(x, epsilon=1e-5) * w[name + ".weight"] + w[name + ".bias"]

        x = w["bytes.weight"][ids]
        for block in (f"blocks.{i}." for i in range(LAYERS)):
            qkv = linear(block + "qkv", norm(block + "before", x)).reshape(-1, 3, HEADS, WIDTH // HEADS)
            q, k, v = qkv.swapaxes(0, 1)
            seen = cuflash.attention(q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, causal=True, alibi_slopes=steep)
            x = x + linear(block + "out", seen.reshape(x.shape))
            up = jax.nn.gelu(linear(block + "up", norm(block + "between", x)), approximate=False)
            x = x + linear(block + "down", up)
        return linear("last", norm("norm", x))

    def loss_of(w, ids, wanted, starts):
        chosen = jnp.take_along_axis(jax.nn.log_softmax(model(w, ids, starts)), wanted[:, None], axis=1)[:, 0]
        return -jnp.where(jnp.arange(len(ids)) < starts[-1], chosen, 0).sum() / starts[-1]

    @jax.jit
    def step(w, speed, *batch):
        loss, slope = jax.value_and_grad(loss_of)(w, *batch)
        speed = jax.tree.map(lambda s, g: MOMENTUM * s + g, speed, slope)
        return jax.tree.map(lambda x, s: x - RATE * s, w, speed), speed, loss

    w = {name: jnp.asarray(x) for name, x in weights.items()}
    speed, losses = jax.tree.map(jnp.zeros_like, w), []
    for batch in batches(steps):
        packed, wanted = cuflash.packing.pack([d[:-1] for d in batch]), np.concatenate([d[1:] for d in batch])
        fill = (0, DOCUMENTS * LONGEST - len(wanted))
        with jax.default_matmul_precision("float32"):  # on a GPU JAX would take fewer bits
            w, speed, loss = step(w, speed, np.pad(packed.data, fill), np.pad(wanted, fill), packed.cu_seqlens)
        losses.append(float(loss))
    return np.array(losses), step._cache_size()


torch.manual_seed(0)
weights = {name: x.detach().numpy() for name, x in GPT().state_dict().items()}
try:
    in_jax, compiled = train_in_jax(weights, steps=30)
except ImportError:
    print("JAX is not installed")
else:
    apart = np.abs(in_jax - theirs[:30]) / theirs[:30]
    print(f"JAX, packed: {in_jax[0]:.4f} to {in_jax[-10:].mean():.4f} in 30 steps; compiled {compiled} time")
    print(f"largest relative difference from PyTorch's losses: {apart.max():.1e}")
    assert apart.max() < 1e-4 and compiled == 1
