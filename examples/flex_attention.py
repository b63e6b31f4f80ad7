"""FlexAttention code with one import changed. PyTorch.

Before:  from torch.nn.attention.flex_attention import create_block_mask, flex_attention
         flex_attention, create_block_mask = torch.compile(flex_attention), torch.compile(create_block_mask)
"""

import torch

from cuflash import create_block_mask, flex_attention

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
B, H, N, D = 2, 4, 160, 32
documents = torch.arange(N, device=device) // 50  # four documents in one row
slopes = 0.5 ** torch.arange(1, H + 1, device=device)


def own_document_causal(b, h, q_idx, kv_idx):
    return (q_idx >= kv_idx) & (documents[q_idx] == documents[kv_idx])


def alibi(score, b, h, q_idx, kv_idx):
    return score - slopes[h] * (q_idx - kv_idx)


q, k, v = (torch.randn(B, H, N, D, device=device, requires_grad=True) for _ in range(3))
block_mask = create_block_mask(own_document_causal, None, None, N, N, device=device)  # nothing is built
out = flex_attention(q, k, v, score_mod=alibi, block_mask=block_mask)
out.sum().backward()

# The same by a matrix of all scores.
i = torch.arange(N, device=device)
scores = q @ k.mT / D**0.5 - slopes[:, None, None] * (i[:, None] - i)
seen = (i[:, None] >= i) & (documents[:, None] == documents)
expected = torch.where(seen, scores, -torch.inf).softmax(-1) @ v
(dq,) = torch.autograd.grad(expected.sum(), q)

print(f"out {tuple(out.shape)}, largest difference {(out - expected).abs().max().item():.1e}")
print(f"dq  {tuple(q.grad.shape)}, largest difference {(q.grad - dq).abs().max().item():.1e}")
print(f"{block_mask.sparsity():.0f} % of the blocks of 128 x 128 are skipped")
torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
torch.testing.assert_close(q.grad, dq, rtol=1e-3, atol=1e-3)
