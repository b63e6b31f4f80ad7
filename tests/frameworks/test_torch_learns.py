"""A small GPT learns the project's own README: paragraphs packed with cuflash, padded with PyTorch's attention."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

import cuflash

torch = pytest.importorskip("torch")
F = torch.nn.functional

ROOT = Path(__file__).resolve().parents[2]
WIDTH, HEADS, LAYERS, LONGEST = 32, 2, 2, 48


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
    """Bytes in, logits of the next byte out: rows of any shape, with their positions, and the attention to use."""

    def __init__(self):
        super().__init__()
        self.bytes, self.places = torch.nn.Embedding(128, WIDTH), torch.nn.Embedding(LONGEST, WIDTH)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(LAYERS))
        self.last = torch.nn.Linear(WIDTH, 128)

    def forward(self, ids, places, attend):
        x = self.bytes(ids) + self.places(places)
        for block in self.blocks:
            x = block(x, attend)
        return self.last(x)


def documents():
    """Paragraphs of unequal length, as bytes."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").encode("ascii", "ignore").decode()
    parts = [p.strip()[: LONGEST + 1] for p in text.split("\n\n")]
    return [torch.tensor(list(p.encode())) for p in parts if len(p) > 8]


def packed_loss(model, batch):
    """No row of padding: what the documents own and nothing else."""
    packed = cuflash.packing.pack([d[:-1] for d in batch])
    places = torch.cat([torch.arange(len(d) - 1) for d in batch])

    def attend(qkv):
        starts, longest = packed.cu_seqlens, packed.max_seqlen
        return cuflash.flash_attn_varlen_qkvpacked_func(qkv, starts, longest, causal=True)

    return F.cross_entropy(model(packed.data, places, attend), torch.cat([d[1:] for d in batch]))


def padded_loss(model, batch):
    """PyTorch's own, with a mask of causal and padding."""
    ids = torch.nn.utils.rnn.pad_sequence([d[:-1] for d in batch], batch_first=True)
    wanted = torch.nn.utils.rnn.pad_sequence([d[1:] for d in batch], batch_first=True, padding_value=-100)
    longest = ids.shape[1]
    kept = torch.arange(longest) < torch.tensor([len(d) - 1 for d in batch])[:, None]
    mask = kept[:, None, None, :] & torch.ones(longest, longest, dtype=torch.bool).tril()

    def attend(qkv):
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    return F.cross_entropy(model(ids, torch.arange(longest), attend).flatten(0, 1), wanted.flatten(), ignore_index=-100)


def train(loss_of, steps=60):
    torch.manual_seed(0)
    model, texts = GPT(), documents()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    losses = []
    for _ in range(steps):
        batch = [texts[i] for i in torch.randint(len(texts), (8,))]
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_packed_documents_teach_what_padded_ones_teach():
    ours, theirs = train(packed_loss), train(padded_loss)
    worst = max(abs(x - y) / y for x, y in zip(ours, theirs, strict=True))
    assert worst < 1e-4, f"the largest relative difference of the losses is {worst:.1e}"
    assert ours[0] > 0.9 * math.log(128) and sum(ours[-10:]) / 10 < ours[0] / 2, f"{ours[0]:.2f} to {ours[-1]:.2f}"
