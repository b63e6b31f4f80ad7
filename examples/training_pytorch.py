"""A training step on sequences of unequal length, packed end to end: no row is padding. PyTorch.

Six sentences of "a b c a b c ..." with periods of their own; a one-layer transformer learns to continue them.
"""

import torch
import torch.nn.functional as F

from cuflash import flash_attn_varlen_qkvpacked_func, packing

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
torch.manual_seed(0)


class Model(torch.nn.Module):
    def __init__(self, tokens=16, heads=4, head_dim=32):
        super().__init__()
        width = heads * head_dim
        self.heads, self.head_dim = heads, head_dim
        self.embed = torch.nn.Embedding(tokens, width)
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.out = torch.nn.Linear(width, tokens)

    def forward(self, ids, cu_seqlens, max_seqlen):  # ids [total]: all sequences, end to end
        x = self.embed(ids)
        qkv = self.qkv(x).view(-1, 3, self.heads, self.head_dim)
        attended = flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, causal=True)
        return self.out(x + attended.flatten(1))


lengths_and_periods = [(5, 2), (9, 3), (40, 4), (17, 5), (3, 2), (28, 7)]
sentences = [torch.arange(n, device=device) % period for n, period in lengths_and_periods]
packed = packing.pack([s[:-1] for s in sentences])
targets = torch.cat([s[1:] for s in sentences])

model = Model().to(device, dtype)
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
losses = []
for _ in range(30):
    loss = F.cross_entropy(model(packed.data, packed.cu_seqlens, packed.max_seqlen).float(), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

padded = len(sentences) * packed.max_seqlen
print(f"{len(packed.data)} tokens in {len(sentences)} sequences; a padded batch would compute {padded}")
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps")
assert losses[-1] < losses[0] / 3
