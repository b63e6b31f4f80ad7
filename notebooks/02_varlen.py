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
# # Sequences of unequal length
#
# Sentences, documents and conversations are never equally long. A padded batch makes them so, and pays for rows that
# nobody reads. A packed batch lays them end to end and says where each begins. This notebook goes from one to the
# other, looks at what a kernel must know to find its rows, beside flash-attn's way of doing it, and counts on the
# emulator what is saved. It needs a C++ compiler and no GPU.

# %%
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap

import cuflash
from cuflash import packing
from cuflash.jit import source

rng = np.random.default_rng(0)

# %% [markdown]
# ## 1. From padding to cu_seqlens
#
# Five sequences, one of them empty, as a tokenizer would hand them over: padded to the longest, with a mask.
# `unpad_input` keeps the rows that the mask shows; `cu_seqlens` is the running sum of the lengths, so that sequence `b`
# owns the rows `cu_seqlens[b]` to `cu_seqlens[b + 1]`. flash-attn has functions of the same names that return the same.

# %%
lengths = np.array([200, 0, 37, 512, 90])
mask = np.arange(lengths.max()) < lengths[:, None]
padded = rng.standard_normal((*mask.shape, 4, 64)).astype(np.float16)  # [batch, longest, heads, head_dim]

packed, indices, cu_seqlens, longest, _ = packing.unpad_input(padded, mask)
print("padded", padded.shape, "packed", packed.shape, "cu_seqlens", cu_seqlens.tolist())

figure, axes = plt.subplots(2, 1, figsize=(7, 2.6), height_ratios=[5, 1], layout="constrained")
rows = np.where(mask, np.arange(len(lengths))[:, None] + 1, 0)
colors = ListedColormap(["#eeeeee", "#4c72b0", "#999999", "#dd8452", "#55a868", "#c44e52"])
axes[0].imshow(rows, aspect="auto", cmap=colors, vmin=0, vmax=5, interpolation="none")
axes[0].set(title=f"padded: {mask.size} rows, {1 - mask.mean():.0%} of them padding", xticks=[], ylabel="sequence")
axes[1].imshow(rows[mask][None], aspect="auto", cmap=colors, vmin=0, vmax=5, interpolation="none")
axes[1].set(title=f"packed: {len(packed)} rows", yticks=[], xticks=cu_seqlens[[0, 2, 3, 4, 5]])
plt.show()

# %% [markdown]
# The same numbers come from lengths, from the mask, or from position ids that begin anew with each sequence. Sequences
# that are separate arrays go through `pack`, which knows everything without a look at the values; `unpack` and
# `pad_input` go back.

# %%
by_lengths = packing.cu_seqlens_from(lengths=lengths)
by_mask = packing.cu_seqlens_from(mask=mask)
positions = np.concatenate([np.arange(n) for n in lengths])
by_positions = packing.cu_seqlens_from(position_ids=positions)
print(by_lengths, by_mask, by_positions, "an empty sequence has no position to begin with")

pieces = packing.unpack(packed, cu_seqlens)
print([len(piece) for piece in pieces], packing.pack(pieces).cu_seqlens)
again = packing.pad_input(packed, indices, *mask.shape)
assert np.array_equal(again[mask], padded[mask]) and not again[~mask].any()

# %% [markdown]
# ## 2. What a block must find out
#
# A block of the kernel computes a tile of 128 queries of one head. It is told its place in a grid, and must find which
# sequence that is, where its rows begin in memory, how many there are, and which keys they see. The stations of a call,
# in flash-attn 2 (`csrc/flash_attn`) and here:
#
# | | flash-attn 2 | cuflash |
# |---|---|---|
# | check, gather pointers and strides | `mha_varlen_fwd`, `set_params_fprop` | `call/bind.py`, `call/checks.py` |
# | choose a kernel | `run_mha_fwd`, `run_flash_fwd` | `choose_variant` in `ops/forward.py` |
# | the grid | (block, sequence, head) | `choose_grid`: (block, head, sequence) or (slot, head) |
# | which sequence am I | `blockIdx.y`, then `BlockInfo` | `tiles_of_block`, then `read_sequence` |
# | compute a tile of rows | `compute_attn_1rowblock` | `forward_tile` in `forward_sm80.cu` |
# | which keys | `n_block_min`, `n_block_max` | `interval_of_tile` in `tile/mask.cuh` |
#
# - **Choosing.** `run_mha_fwd` switches over dtype, head dim and causal, then come dropout, and in `run_flash_fwd`
#   even lengths, even head dim, window, ALiBi, softcap and returned weights: every combination was compiled when
#   the wheel was built. Here dtype, head dims, alignment, dropout, pages and mods make a kernel, compiled when first
#   needed; lengths, windows, ALiBi and softcap are branches inside one.
# - **The grid.** There it has ⌈`max_seqlen_q` / 128⌉ blocks for every sequence, so that number must be right. Here no
#   length need be known, and a wrong one loses no row.
# - **Nothing to do.** There a block that begins behind its sequence's end returns. Here blocks stride over tiles, and
#   those left over write zeros behind the last sequence.
# - **Keys.** Both walk from the last key tile to the first. There masked tiles have a loop of their own, here the mask
#   stands behind a branch that whole warps take.
# - **A row that sees no key** is 0 in both. Its lse is +inf there and -inf here: it counts nothing where parts of
#   attention are put together.
#
# `BlockInfo` is a struct of lengths and offsets, read once by each block. Ours is `Sequence`; this is its text, as it
# goes into every kernel:

# %%
text = (source.folder() / "tile" / "sequence.cuh").read_text(encoding="utf-8")
print(text[text.index("struct Sequence") : text.index("// index: in the batch")])

# %% [markdown]
# ### Two grids
#
# With one block for each (block, head, sequence), short sequences get as many blocks as the longest, and most of them
# find nothing to do. So where lengths differ much, blocks are counted across sequences. The host knows only the total,
# and asks for `total // 128 + batch` *slots* a head, and one for what lies behind the last sequence; sequence `b` owns
# those from `cu_seqlens[b] // 128 + b` on. That is at least as many as it has tiles, so a block that searches
# `cu_seqlens` for its slot finds its sequence, with no list made before and nothing for the host to wait for. The same
# rule in NumPy:

# %%
BLOCK = 128
tiles = -(-lengths // BLOCK)
by_sequence = np.where(np.arange(tiles.max()) < tiles[:, None], np.arange(len(lengths))[:, None] + 1, 0)

first_slot = cu_seqlens // BLOCK + np.arange(len(cu_seqlens))  # of each sequence, and of what lies behind the last
slots = np.arange(first_slot[-1] + 1)
owner = np.searchsorted(first_slot, slots, side="right") - 1
place = slots - first_slot[owner]
by_slot = np.where(place < np.append(tiles, 0)[owner], owner + 1, 0)[None]

figure, axes = plt.subplots(2, 1, figsize=(7, 2.8), height_ratios=[5, 1], layout="constrained")
for ax, blocks, name in zip(axes, (by_sequence, by_slot), ("(block, sequence)", "(slot)"), strict=True):
    ax.pcolormesh(blocks, cmap=colors, vmin=0, vmax=5, edgecolors="white", linewidth=2)
    ax.set(title=f"{name}: {blocks.size} blocks a head, {(blocks > 0).sum()} with work", xticks=[], yticks=[])
    ax.invert_yaxis()
plt.show()

# %% [markdown]
# `explain` says which one a call takes, and why. Nearly equal lengths take the first, for there it wastes nothing.

# %%
cuflash.config.backend = "emulator"


def call(x, starts, function=cuflash.attention, **keywords):
    """Causal attention of 4 query heads to 2 key heads, all from one packed array."""
    return function(x, x[:, :2], x[:, 2:], cu_seqlens_q=starts, cu_seqlens_k=starts, causal=True, **keywords)


for some in (lengths, np.array([200, 190, 180, 170, 199])):
    starts = packing.cu_seqlens_from(lengths=some)
    explained = call(np.zeros((starts[-1], 4, 64), np.float16), starts, cuflash.explain, max_seqlen_q=int(some.max()))
    print(some.tolist(), explained.grid, *explained.why, sep="\n    ")

# %% [markdown]
# ## 3. What it costs
#
# The emulator runs the kernel's own text and counts. A padded batch computes every row, so its cost is that of five
# sequences of 512; the packed one computes the tiles that there are. Both give the same rows.

# %%
kv = padded[:, :, :2].copy(), padded[:, :, 2:].copy()
with cuflash.emulator.counting() as of_padded:
    out_padded = cuflash.attention(padded.copy(), *kv, causal=True)
with cuflash.emulator.counting() as of_packed:
    k, v = packed[:, :2].copy(), packed[:, 2:].copy()
    out = cuflash.attention(packed, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, causal=True)

print(f"{'':24}{'padded':>12}{'packed':>12}")
costs = {
    "rows of q": (mask.size, len(packed)),
    "matrix instructions": [c.total_matrix_instructions for c in (of_padded, of_packed)],
    "bytes of q read": [c.global_bytes_read["q"] for c in (of_padded, of_packed)],
    "bytes of k and v read": [c.global_bytes_read["k"] + c.global_bytes_read["v"] for c in (of_padded, of_packed)],
    "bytes of out written": [c.global_bytes_written["out"] for c in (of_padded, of_packed)],
    "meetings at barriers": [c.barriers for c in (of_padded, of_packed)],
}
for name, (with_padding, without) in costs.items():
    print(f"{name:24}{with_padding:12,}{without:12,}   {without / with_padding:4.0%}")
assert np.array_equal(out, out_padded[mask])  # causal: padding behind a row is never seen by it

# %% [markdown]
# The rows are equal to the last bit: a sequence's result does not depend on what else is in the batch, nor on how it
# lies in memory.
#
# The instructions can be worked out by hand: a tile of 128 queries and 64 keys takes two products of 16 x 8 x 16
# pieces, and a causal block walks over the key tiles up to its last row. So what longer and more uneven batches save
# follows without running them.


# %%
def instructions(lengths, heads=4, head_dim=64, block_q=128, block_k=64):
    """Of a causal forward: for each block of queries, the key tiles up to its last row."""
    of_a_tile = 2 * (block_q // 16) * (block_k // 8) * (head_dim // 16)
    key_tiles = sum(-(-min(n, first + block_q) // block_k) for n in lengths for first in range(0, n, block_q))
    return int(heads * key_tiles * of_a_tile)


assert instructions(lengths) == of_packed.total_matrix_instructions
assert instructions([512] * 5) == of_padded.total_matrix_instructions

spreads = np.linspace(0, 1.5, 7)  # of the logarithm of the lengths
shares = []
for spread in spreads:
    drawn = np.clip(np.exp(rng.normal(6, spread, 256)), 1, 8192).astype(int)
    shares.append((drawn.mean() / drawn.max(), instructions(drawn) / instructions([drawn.max()] * len(drawn))))
figure, ax = plt.subplots(figsize=(5, 3))
ax.plot(spreads, np.array(shares) * 100, "o-", label=["rows", "matrix instructions"])
ax.set(xlabel="spread of lengths (of their logarithm)", ylabel="% of a padded batch", ylim=(0, 105))
ax.legend()
plt.show()

# %% [markdown]
# ## 4. Rows that are there and not used
#
# A buffer may hold more rows than a sequence uses: `seqused_q`, `seqused_k` count those in use. What lies behind them
# is never seen, not even NaN; the rows of the result behind them are 0, their lse -inf. So are rows that see no key,
# such as those of a sequence that has queries and no keys.

# %%
used = np.array([150, 0, 37, 512, 1], np.int32)
spoilt = packed.copy()
for begin, end, n in zip(cu_seqlens[:-1], cu_seqlens[1:], used, strict=True):
    spoilt[begin + n : end] = np.nan
result = call(spoilt, cu_seqlens, seqused_q=used, seqused_k=used, aux=("lse",))
print("NaN in the result:", int(np.isnan(result.out).sum()))
print("rows of 0:", int((result.out == 0).all(axis=(1, 2)).sum()), "of", int((lengths - used).sum()), "that are unused")

no_keys = cuflash.attention(packed[:4], k[:3], v[:3], cu_seqlens_q=[0, 2, 4], cu_seqlens_k=[0, 0, 3], aux=("lse",))
print("lse of the first head:", no_keys.lse[0].round(2))

# %% [markdown]
# ## 5. Shared key heads
#
# Here 4 query heads share 2 key heads, as in most models today (grouped-query attention): head `h` reads key head
# `h // 2`, in place. That halves the keys that are kept and moved to the chip; each block still asks for its own, and
# where queries are few, in generation, another kernel reads a key once for all heads that share it.

# %%
repeated = [np.repeat(x, 2, axis=1) for x in (k, v)]  # what the kernel spares you
out_repeated = cuflash.attention(packed, *repeated, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, causal=True)
assert np.array_equal(out, out_repeated)
print(f"k and v: {k.nbytes + v.nbytes:,} bytes, repeated {sum(x.nbytes for x in repeated):,}")

# %% [markdown]
# ## 6. Lengths compile nothing
#
# All of this was one kernel. From here on, whatever would compile raises; ten more batches, of any lengths, with hints
# that are wrong, run.

# %%
cuflash.config.on_compile = "error"
for _ in range(10):
    some = rng.integers(0, 80, rng.integers(1, 8))
    starts = packing.cu_seqlens_from(lengths=some)
    x = rng.standard_normal((starts[-1], 4, 64)).astype(np.float16)
    found = call(x, starts, max_seqlen_q=int(rng.integers(1, 100)))
    cuflash.config.backend = "reference"
    assert np.allclose(found, call(x, starts), atol=2e-3)
    cuflash.config.backend = "emulator"
print("ten batches, no kernel compiled, and each agrees with NumPy")
