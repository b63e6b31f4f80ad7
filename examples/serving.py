"""A serving loop: requests come and go, their keys and values lie in the pages of one cache (paged KV cache).

A stand-in for a model makes queries, keys and values of a token. `flash_attn_with_kvcache` appends a step's new keys to
their pages and attends to all of them. One call serves all running requests.
"""

import numpy as np

import cuflash

try:
    import cupy as xp

    xp.cuda.runtime.getDeviceCount()
except Exception:
    xp = np
    print("no CuPy with a GPU here: NumPy arrays, on the CPU")

HEADS, HEADS_KV, HEAD_DIM, PAGE, PAGES = 8, 2, 64, 16, 32
k_cache, v_cache = (xp.zeros((PAGES, PAGE, HEADS_KV, HEAD_DIM), np.float16) for _ in range(2))
free_pages = list(range(PAGES))
table_of_embeddings = np.random.default_rng(0).standard_normal((100, HEADS + 2 * HEADS_KV, HEAD_DIM)).astype(np.float16)


class Request:
    def __init__(self, name, prompt, new_tokens):
        self.name, self.tokens, self.prompt_length, self.new_tokens = name, list(prompt), len(prompt), new_tokens
        self.cached, self.pages = 0, []

    def take_pages(self, length):
        while len(self.pages) * PAGE < length:
            self.pages.append(free_pages.pop())

    @property
    def done(self):
        return len(self.tokens) >= self.prompt_length + self.new_tokens


def step(requests):
    """One token for every request. Prompts that are not in the cache yet go in whole: queries are packed."""
    new = [request.tokens[request.cached :] for request in requests]
    starts = cuflash.packing.cu_seqlens_from(lengths=np.array([len(n) for n in new]))
    for request in requests:
        request.take_pages(len(request.tokens))
    most = max(len(request.pages) for request in requests)
    page_table = np.array([request.pages + [0] * (most - len(request.pages)) for request in requests], np.int32)
    qkv = xp.asarray(table_of_embeddings[np.concatenate(new)])
    out = cuflash.flash_attn_with_kvcache(
        qkv[:, :HEADS], k_cache, v_cache, qkv[:, HEADS:-HEADS_KV], qkv[:, -HEADS_KV:],
        cache_seqlens=xp.asarray([request.cached for request in requests], np.int32),
        page_table=xp.asarray(page_table), cu_seqlens_q=xp.asarray(starts), cu_seqlens_k_new=xp.asarray(starts),
        max_seqlen_q=max(map(len, new)), causal=True,
    )  # fmt: skip
    for request, last in zip(requests, starts[1:] - 1, strict=True):
        request.cached = len(request.tokens)
        request.tokens.append(int(abs(float(out[last].sum())) * 10) % 100)


waiting = [Request("A", range(20), 6), Request("B", range(30, 37), 9), Request("C", range(50, 90), 4)]
arrives = {0: 2, 3: 1}  # how many requests arrive at which step
running, finished, steps, most_pages = [], [], 0, 0
while running or waiting:
    for _ in range(arrives.get(steps, 0)):
        running.append(waiting.pop(0))
    step(running)
    steps += 1
    most_pages = max(most_pages, PAGES - len(free_pages))
    for request in [r for r in running if r.done]:
        running.remove(request)
        finished.append(request)
        free_pages += request.pages

for request in finished:
    print(f"{request.name}: prompt of {request.prompt_length}, then {request.tokens[request.prompt_length :]}")
print(f"{steps} steps, at most {most_pages} of {PAGES} pages in use")
assert len(free_pages) == PAGES
