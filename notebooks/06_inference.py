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
# # Generating with a cache in pages
#
# A small GPT continues four prompts of unequal length, greedily, in float32. The keys and values of all that was said
# lie in pages, shuffled over one pool, and every step appends to them in place. Whatever the size of a page, the bytes
# that come out must be those of the slow way, which computes everything anew for every byte. Then one prompt gets many
# continuations, and its keys are held, and read, once for all of them. Needs PyTorch and some seconds, but no GPU;
# where there is one, it is used.

# %%
import inspect
import math

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.nn import functional as F

import cuflash

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_num_threads(1)  # so small a model only loses by more

# %% [markdown]
# ## 1. The model
#
# That of `05_training`: bytes in, the logits of the next byte out, positions by ALiBi's slopes alone. It learns the
# docstrings of `math` until its bytes begin to look like them.

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
    """`attends`: what each layer attends with."""

    def __init__(self):
        super().__init__()
        self.bytes = torch.nn.Embedding(128, WIDTH)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.last = torch.nn.LayerNorm(WIDTH), torch.nn.Linear(WIDTH, 128)

    def forward(self, ids, attends):
        x = self.bytes(ids)
        for block, attend in zip(self.blocks, attends, strict=True):
            x = block(x, attend)
        return self.last(self.norm(x))


def over_all(starts, longest):
    """Attention over whole sequences, packed end to end."""

    def attend(qkv):
        return cuflash.flash_attn_varlen_qkvpacked_func(qkv, starts, longest, causal=True, alibi_slopes=slopes)

    return [attend] * LAYERS


def as_ids(text):
    return torch.tensor(list(text.encode("ascii", "replace")), device=device)


def as_text(ids):
    return bytes(ids.tolist()).decode()


documents = [as_ids(inspect.getdoc(getattr(math, name)))[:97] for name in dir(math) if callable(getattr(math, name))]
torch.manual_seed(0)
model = GPT().to(device)
optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
for _ in range(100):
    batch = [documents[i] for i in torch.randint(len(documents), (8,))]
    ids, starts, longest = cuflash.packing.pack([d[:-1] for d in batch])
    loss = F.cross_entropy(model(ids, over_all(starts, longest)), torch.cat([d[1:] for d in batch]))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
torch.set_grad_enabled(False)
print(f"loss of the last batch: {loss:.2f} nats a byte, of {math.log(128):.2f} for one that knows nothing")

# %% [markdown]
# ## 2. The slow way
#
# Every byte costs attention over all bytes before it, in every layer.

# %%
PROMPTS = [as_ids(text) for text in ("Return the ", "x", "This function computes the sum of two ", "If the")]
STEPS = 64


def last_logits(sequences):
    """The logits of the byte behind each sequence."""
    ids, starts, longest = cuflash.packing.pack(sequences)
    return model(ids, over_all(starts, longest))[starts[1:].long() - 1]


sequences, lead = list(PROMPTS), math.inf
for _ in range(STEPS):
    (best, second), (new, _) = (x.unbind(-1) for x in last_logits(sequences).topk(2))
    lead = min(lead, float((best - second).min()))
    sequences = [torch.cat([sequence, byte[None]]) for sequence, byte in zip(sequences, new, strict=True)]
expected = [sequence[len(prompt) :] for sequence, prompt in zip(sequences, PROMPTS, strict=True)]
for prompt, said in zip(PROMPTS, expected, strict=True):
    print(repr(as_text(prompt)), "->", repr(as_text(said)))
print(f"the best byte leads by {lead:.1e} at the closest, which rounding must stay below")

# %% [markdown]
# ## 3. A cache in pages
#
# `Cache` holds, for each layer, pages of keys and of values that all sequences share, and a table with the pages of
# each sequence. It is given room for what is to come, in pages drawn from all over the pool; what it will never own is
# NaN. One function serves the prompts, of unequal length, and the steps, of one byte each: the queries are packed,
# `cu_seqlens` says whose they are, and `cache_seqlens` how much of each sequence is there already.
# `flash_attn_with_kvcache` writes the new keys and values where they belong, then attends to all.


# %%
class Cache:
    def __init__(self, room, page_size):
        """room: bytes that each sequence may have."""
        pages = [-(-n // page_size) for n in room]
        pool = sum(pages) + 3
        shape = (LAYERS, pool, page_size, HEADS, WIDTH // HEADS)
        self.k, self.v = (torch.full(shape, torch.nan, device=device) for _ in "kv")
        shuffled = np.random.default_rng(page_size).permutation(pool).tolist()
        table = np.full((len(room), max(pages)), -1, np.int32)  # entries that no sequence needs are never read
        for row, n in zip(table, pages, strict=True):
            row[:n] = [shuffled.pop() for _ in range(n)]
        self.table = torch.from_numpy(table).to(device)
        self.lengths = torch.zeros(len(room), dtype=torch.int32, device=device)

    def __call__(self, starts, longest):
        """What each layer attends with; afterwards the cache is so much longer."""

        def attend(qkv, k_cache, v_cache):
            q, k, v = qkv.unbind(1)
            return cuflash.flash_attn_with_kvcache(
                q, k_cache, v_cache, k, v, cache_seqlens=self.lengths, block_table=self.table, causal=True,
                alibi_slopes=slopes, cu_seqlens_q=starts, cu_seqlens_k_new=starts, max_seqlen_q=longest,
            )  # fmt: skip

        for k_cache, v_cache in zip(self.k, self.v, strict=True):
            yield lambda qkv, k_cache=k_cache, v_cache=v_cache: attend(qkv, k_cache, v_cache)
        self.lengths += starts.diff()


def generate(prompts, steps, cache):
    said, parts = [], prompts
    for _ in range(steps):
        ids, starts, longest = cuflash.packing.pack(parts)
        new = model(ids, cache(starts, longest))[starts[1:].long() - 1].argmax(-1)
        said.append(new)
        parts = list(new[:, None])
    return list(torch.stack(said, 1))


caches = {}
for page_size in (1, 16, 256):
    cache = caches[page_size] = Cache([len(prompt) + STEPS for prompt in PROMPTS], page_size)
    said = generate(PROMPTS, STEPS, cache)
    same = all(map(torch.equal, said, expected))
    print(f"pages of {page_size:3}: {len(cache.k[0]):3} pages, the same {len(PROMPTS)} x {STEPS} bytes: {same}")
    assert same

# %% [markdown]
# Whose are the pages of 16? Each column is a page of the pool; gray is what nobody owns.

# %%
cache = caches[16]
owner = np.full((16, len(cache.k[0])), np.nan)
for b, length in enumerate(cache.lengths.tolist()):
    for i in range(length):
        owner[i % 16, cache.table[b, i // 16]] = b
figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
axes.set_facecolor("lightgray")
picture = axes.imshow(owner, cmap=plt.get_cmap("viridis", len(PROMPTS)), vmin=-0.5, vmax=len(PROMPTS) - 0.5)
figure.colorbar(picture, ticks=range(len(PROMPTS)), label="sequence")
axes.set(xlabel="page", ylabel="place in the page")
plt.show()

# %% [markdown]
# Few queries of many keys have a kernel of their own: a block reads each key once for all query heads that share it,
# and several blocks share the keys of a long sequence, whose parts a last kernel puts together. `explain` says what a
# step would run on a GPU, or on the emulator, without running it.

# %%
cuflash.config.backend = "auto" if device == "cuda" else "emulator"
one_query = torch.zeros(len(PROMPTS), 1, HEADS, WIDTH // HEADS, device=device)
paged = {"page_table": cache.table, "seqused_k": cache.lengths}
print(cuflash.explain(one_query, cache.k[0], cache.v[0], **paged, causal=True, split_size=64))
cuflash.config.backend = "auto"

# %% [markdown]
# ## 4. One prompt, many continuations
#
# The prompt's keys are the same for every continuation, so they are computed, held and read once. At each step its
# queries meet two sets of keys: those of the prompt, which see the queries of all continuations as one sequence, and
# those of their own. `merge_states` puts the two results together by their logarithms of sums. The slopes count
# distances from a query's place, which attention to the prompt alone cannot know: a `score_mod` tells it. The place is
# a number, and a new one compiles nothing.
#
# The continuations begin with the eight likeliest bytes, and go on greedily.

# %%
MANY, LENGTH = 8, 24
prompt = as_ids("This function returns the square root of x, or raises ValueError if ")
logits = last_logits([prompt])[0]
first = logits.topk(MANY).indices

# The prompt, once.
shared = Cache([len(prompt)], page_size=len(prompt))
ids, starts, longest = cuflash.packing.pack([prompt])
assert torch.allclose(model(ids, shared(starts, longest))[-1], logits, atol=1e-4)
page = int(shared.table[0, 0])
own_k, own_v = torch.full((2, LAYERS, MANY, LENGTH, HEADS, WIDTH // HEADS), torch.nan, device=device)


def attend_to_both(qkv, layer, said):
    """qkv: of one byte of each continuation, `said` bytes behind the prompt."""
    q, k, v = qkv.unbind(1)
    place = len(prompt) + said

    def by_place(score, b, h, q_idx, kv_idx):
        return score - slopes[h] * (place - kv_idx)

    of_prompt = cuflash.attention(
        q[None], shared.k[layer, page][None], shared.v[layer, page][None], score_mod=by_place, aux=("lse",)
    )
    of_own, own_lse = cuflash.flash_attn_with_kvcache(
        q[:, None], own_k[layer], own_v[layer], k[:, None], v[:, None], cache_seqlens=said, causal=True,
        alibi_slopes=slopes, return_softmax_lse=True,
    )  # fmt: skip
    # [1, heads, continuations] of one sequence to [continuations, heads, 1]
    prompt_lse = of_prompt.lse.permute(2, 1, 0)
    return cuflash.merge_states([of_prompt.out[0][:, None], of_own], [prompt_lse, own_lse])[0][:, 0]


new, continuations, worst = first, first[:, None], 0.0
for said in range(LENGTH):
    attends = [lambda qkv, layer=layer, said=said: attend_to_both(qkv, layer, said) for layer in range(LAYERS)]
    found = model(new, attends)
    slow = last_logits([torch.cat([prompt, own]) for own in continuations])
    worst = max(worst, float((found - slow).abs().max()))
    new = found.argmax(-1)
    assert torch.equal(new, slow.argmax(-1))
    continuations = torch.cat([continuations, new[:, None]], 1)
for own in continuations:
    print(repr(as_text(own)))
print(f"largest difference of a logit from attention over prompt and continuation as one: {worst:.1e}")
assert worst < 1e-4
held, apart = len(prompt) + MANY * LENGTH, MANY * (len(prompt) + LENGTH)
print(f"keys and values held: {held} rows a layer; with a prompt for each continuation: {apart}")
