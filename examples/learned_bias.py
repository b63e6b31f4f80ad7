"""A score function of your own with a learned bias. PyTorch.

The bias depends on the distance between query and key, one table for each head, as in T5. The function captures the
table as a tensor; its gradient comes out of `backward`, and no matrix of biases is ever made.
"""

import torch

import cuflash

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
HEADS, FAR = 4, 8
table = torch.zeros(HEADS, 2 * FAR + 1, device=device, requires_grad=True)


def distance_bias(score, b, h, q_idx, kv_idx):
    distance = (kv_idx - q_idx).clip(-FAR, FAR)
    return score + table[h, distance + FAR]


q, k, v = (torch.randn(2, 100, HEADS, 32, device=device) for _ in range(3))
# The lesson to learn: a bias that falls with the distance.
right = -0.3 * (torch.arange(2 * FAR + 1, device=device) - FAR).abs().float()
with torch.no_grad():
    table += right
    wanted = cuflash.attention(q, k, v, score_mod=distance_bias)
    table.zero_()

optimizer = torch.optim.Adam([table], lr=0.1)
losses = []
for _ in range(30):
    loss = (cuflash.attention(q, k, v, score_mod=distance_bias) - wanted).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

learned = table.detach() - table.detach()[:, FAR : FAR + 1]  # softmax ignores a constant
print(f"loss {losses[0]:.1e} -> {losses[-1]:.1e}")
print("distance   ", *(f"{d:6d}" for d in range(0, FAR + 1, 2)))
print("learned    ", *(f"{x:6.2f}" for x in learned[0, FAR::2].tolist()))
print("right      ", *(f"{x:6.2f}" for x in right[FAR::2].tolist()))
assert losses[-1] < losses[0] / 10
