"""A small GPT generates: from caches in pages, and many continuations of one prompt, as computing everything anew does.

`notebooks/06_inference.ipynb` is the longer form.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from backends import using

import cuflash

torch = pytest.importorskip("torch")
from test_torch_learns import HEADS, LAYERS, SLOPES, WIDTH, packed_loss, trained  # noqa: E402

DIM = WIDTH // HEADS
PROMPTS = ("Redistributions of ", "T", "IN NO EVENT SHALL THE COPYRIGHT ", "copyright notice")


def as_ids(text: str) -> Any:
    return torch.tensor(list(text.encode()))


@pytest.fixture(scope="module")
def model() -> Any:
    return trained(packed_loss, 150)[0].requires_grad_(False)


def over_all(starts, longest):
    def attend(qkv):
        return cuflash.flash_attn_varlen_qkvpacked_func(qkv, starts, longest, causal=True, alibi_slopes=SLOPES)

    return attend


def last_logits(model, sequences):
    """Of the byte behind each sequence, computed from nothing but the sequences, on the reference."""
    ids, starts, longest = cuflash.packing.pack(sequences)
    with using("auto"):
        return model(ids, over_all(starts, longest))[starts[1:].long() - 1]


@pytest.fixture(scope="module")
def expected(model) -> list[Any]:
    """64 bytes behind each prompt. The best of them leads by far more than rounding can move it."""
    sequences = [as_ids(p) for p in PROMPTS]
    for _ in range(64):
        best, new = last_logits(model, sequences).topk(2)
        assert (best[:, 0] - best[:, 1]).min() > 1e-4
        sequences = [torch.cat([s, n]) for s, n in zip(sequences, new[:, :1], strict=True)]
    said = [s[len(p) :] for s, p in zip(sequences, PROMPTS, strict=True)]
    assert all(len(set(s.tolist())) > 5 for s in said)
    return said


class Cache:
    """Pages of every layer, shuffled; NaN where nobody wrote, table entries that lead nowhere where nobody looks."""

    def __init__(self, room: list[int], page_size: int):
        pages = [-(-n // page_size) for n in room]
        pool = sum(pages) + 3
        self.k, self.v = torch.full((2, LAYERS, pool, page_size, HEADS, DIM), torch.nan)
        self.table = torch.full((len(room), max(pages)), 2**30, dtype=torch.int32)
        shuffled = torch.from_numpy(np.random.default_rng(page_size).permutation(pool))
        for row, part in zip(self.table, shuffled[: sum(pages)].split(pages), strict=True):
            row[: len(part)] = part
        self.lengths = torch.zeros(len(room), dtype=torch.int32)

    def attends(self, starts: Any, **keywords: Any) -> Iterator[Any]:
        """What each layer attends with."""
        for k_cache, v_cache in zip(self.k, self.v, strict=True):
            yield lambda qkv, k_cache=k_cache, v_cache=v_cache: cuflash.flash_attn_with_kvcache(
                qkv[:, 0], k_cache, v_cache, qkv[:, 1], qkv[:, 2], cache_seqlens=self.lengths, block_table=self.table,
                causal=True, alibi_slopes=SLOPES, cu_seqlens_q=starts, cu_seqlens_k_new=starts, **keywords,
            )  # fmt: skip
        self.lengths += starts.diff()


def generate(model, steps: int, page_size: int, **keywords: Any) -> list[Any]:
    cache = Cache([len(p) + steps for p in PROMPTS], page_size)
    parts, said = [as_ids(p) for p in PROMPTS], []
    for _ in range(steps):
        ids, starts, _ = cuflash.packing.pack(parts)
        attends = cache.attends(starts, **keywords)
        said.append(model(ids, lambda qkv, attends=attends: next(attends)(qkv))[starts[1:].long() - 1].argmax(-1))
        assert next(attends, None) is None  # every layer had its turn; the cache is so much longer
        parts = list(said[-1][:, None])
    return list(torch.stack(said, 1))


@pytest.mark.parametrize("page_size", [1, 16, 256])
@pytest.mark.parametrize(
    "backend, steps", [("auto", 64), ("emulator", 4), pytest.param("emulator", 64, marks=pytest.mark.slow)]
)
def test_a_cache_in_pages_gives_what_full_recomputation_gives(model, expected, backend, steps, page_size):
    """The prompts, ragged, go in at once; then a byte of each at a time."""
    with using(backend):
        said = generate(model, steps, page_size)
    for have, want in zip(said, expected, strict=True):
        assert have.tolist() == want[:steps].tolist()


def test_splitting_the_keys_says_the_same(model, expected):
    with using("emulator"):
        said = generate(model, 3, 16, split_size=64)
    assert [s.tolist() for s in said] == [s[:3].tolist() for s in expected]


@pytest.mark.parametrize("backend, length", [("auto", 16), ("emulator", 3)])
def test_many_continuations_share_one_prompt(model, backend, length):
    """Its keys are held once, and seen by the queries of all as one sequence; the two parts are merged."""
    many, prompt = 5, as_ids(PROMPTS[2] * 3)
    keys = []  # of the prompt, a pair a layer

    def keeping(qkv):
        keys.append(qkv[:, 1:].unbind(1))
        return over_all(torch.tensor([0, len(prompt)], dtype=torch.int32), len(prompt))(qkv)

    logits = model(prompt, keeping)[-1]
    own = torch.full((2, LAYERS, many, length, HEADS, DIM), torch.nan)
    first = new = logits.topk(many).indices
    continuations = first[:, None]
    for said in range(length):
        place, layers = len(prompt) + said, iter(range(LAYERS))

        def by_place(score, b, h, q_idx, kv_idx, place=place):
            return score - SLOPES[h] * (place - kv_idx)

        def attend(qkv, said=said, by_place=by_place, layers=layers):
            layer = next(layers)
            q, k, v = qkv.unbind(1)
            k_prompt, v_prompt = (x[None] for x in keys[layer])
            shared = cuflash.attention(q[None], k_prompt, v_prompt, score_mod=by_place, aux=("lse",))
            rest, lse = cuflash.flash_attn_with_kvcache(
                q[:, None], own[0, layer], own[1, layer], k[:, None], v[:, None], cache_seqlens=said, causal=True,
                alibi_slopes=SLOPES, return_softmax_lse=True,
            )  # fmt: skip
            parts = [shared.out[0][:, None], rest], [shared.lse.permute(2, 1, 0), lse]
            return cuflash.merge_states(*parts)[0][:, 0]

        with using(backend):
            found = model(new, attend)
        full = last_logits(model, [torch.cat([prompt, c]) for c in continuations])
        torch.testing.assert_close(found, full, rtol=2e-5, atol=2e-5)
        new = found.argmax(-1)
        continuations = torch.cat([continuations, new[:, None]], 1)
    assert len({tuple(c.tolist()) for c in continuations}) == many
