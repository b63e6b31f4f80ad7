"""Many continuations of one prompt: the prompt's keys are held once, and read once for all of them.

Attention runs in two parts, over the prompt and over each continuation's own tokens; `merge_states` puts them together.
"""

import numpy as np

import cuflash

HEADS, HEADS_KV, HEAD_DIM, PROMPT = 8, 2, 64, 300
lengths = np.array([3, 1, 7, 4])  # tokens of each continuation so far
rng = np.random.default_rng(0)


def draw(tokens, heads):
    return rng.standard_normal((tokens, heads, HEAD_DIM)).astype(np.float32)


total = int(lengths.sum())
q, k, v = draw(total, HEADS), draw(total, HEADS_KV), draw(total, HEADS_KV)
prompt_k, prompt_v = draw(PROMPT, HEADS_KV), draw(PROMPT, HEADS_KV)

# To the prompt, the queries of all continuations are one sequence. All of them see all of it: no mask.
shared = cuflash.attention(q, prompt_k, prompt_v, cu_seqlens_q=[0, total], cu_seqlens_k=[0, PROMPT], aux=("lse",))
# Their own tokens: one sequence each, causal.
starts = cuflash.packing.cu_seqlens_from(lengths=lengths)
own = cuflash.attention(q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, causal=True, aux=("lse",))
out, lse = cuflash.merge_states([shared.out, own.out], [shared.lse, own.lse])

# The same with a copy of the prompt for each continuation.
packed_k, packed_v = (
    np.concatenate([part for n in range(len(lengths)) for part in (prompt, x[starts[n] : starts[n + 1]])])
    for prompt, x in ((prompt_k, k), (prompt_v, v))
)
copies = cuflash.packing.cu_seqlens_from(lengths=PROMPT + lengths)
expected = cuflash.attention(q, packed_k, packed_v, cu_seqlens_q=starts, cu_seqlens_k=copies, causal=True)

print(f"{len(lengths)} continuations of {PROMPT} tokens: out {out.shape}, lse {lse.shape}")
print(f"keys held: {PROMPT + total} instead of {len(packed_k)}")
print(f"largest difference from copies of the prompt: {np.abs(out - expected).max():.1e}")
np.testing.assert_allclose(out, expected, atol=1e-5)
