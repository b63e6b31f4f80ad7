"""flash-attn's functions with dropout: PyTorch's generator, and the weights they return for tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from backends import using

import cuflash

torch: Any = pytest.importorskip("torch", reason="PyTorch is not installed")
P = 0.17


@pytest.fixture(params=["auto", "emulator"])
def backend(request):
    with using(request.param):
        yield request.param


def drawn(rng: np.random.Generator, *shape: int) -> Any:
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(torch.float16)


def out_of_weights(weights: Any, v: Any) -> Any:
    """What the weights say the result is: [len, heads, d] of [heads, q_len, k_len]."""
    kept = torch.where(weights > 0, weights, 0.0).float() / weights.abs().float().sum(-1, keepdim=True) / (1 - P)
    group = weights.shape[0] // v.shape[1]
    return torch.einsum("hqk,khd->qhd", kept, v.repeat_interleave(group, 1).float())


def test_weights_tell_what_was_dropped(backend, rng):
    q, k, v = drawn(rng, 2, 33, 4, 32), drawn(rng, 2, 47, 2, 32), drawn(rng, 2, 47, 2, 32)
    out, lse, weights = cuflash.flash_attn_func(q, k, v, P, causal=True, return_attn_probs=True)
    assert weights.shape == (2, 4, 33, 47) and weights.dtype == q.dtype
    _, plain_lse, none = cuflash.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert none is None and torch.equal(lse, plain_lse)
    seen = torch.ones(33, 47, dtype=torch.bool).tril(47 - 33)
    assert not weights[..., ~seen].any() and abs((weights[..., seen] < 0).float().mean() - P) < 0.03
    for b in range(2):
        torch.testing.assert_close(out_of_weights(weights[b], v[b]), out[b].float(), atol=4e-3, rtol=0)


def test_weights_of_a_call_with_mods(backend, rng):
    q, k, v = drawn(rng, 1, 33, 4, 32), drawn(rng, 1, 47, 2, 32), drawn(rng, 1, 47, 2, 32)
    bias = torch.randn(4, 80)
    score_mod, mask_mod = (lambda s, b, h, i, j: s + bias[h, i - j + 47]), (lambda b, h, i, j: (i + j) % 3 != 0)
    out, _, weights = cuflash.flash_attn_func(
        q, k, v, P, softcap=2.0, return_attn_probs=True, score_mod=score_mod, mask_mod=mask_mod
    )
    assert not weights[..., (torch.arange(33)[:, None] + torch.arange(47)) % 3 == 0].any()
    torch.testing.assert_close(out_of_weights(weights[0], v[0]), out[0].float(), atol=4e-3, rtol=0)


def test_weights_of_packed_sequences(backend, rng):
    q, k = drawn(rng, 30, 2, 32), drawn(rng, 50, 2, 32)
    starts_q, starts_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 9, 30], [0, 17, 50]))
    out, _, weights = cuflash.flash_attn_varlen_func(q, k, k, starts_q, starts_k, 21, 33, P, return_attn_probs=True)
    assert weights.shape == (2, 2, 21, 33) and not weights[0, :, 9:].any() and not weights[0, :, :, 17:].any()
    torch.testing.assert_close(out_of_weights(weights[0, :, :9, :17], k[:17]), out[:9].float(), atol=4e-3, rtol=0)
    torch.testing.assert_close(out_of_weights(weights[1], k[17:]), out[9:].float(), atol=4e-3, rtol=0)


def test_masks_come_from_the_default_generator(backend, rng):
    q = drawn(rng, 1, 40, 2, 32)

    def call() -> Any:
        return cuflash.flash_attn_func(q, q, q, P)

    torch.manual_seed(5)
    first, second = call(), call()
    torch.manual_seed(5)
    assert torch.equal(call(), first) and torch.equal(call(), second) and not torch.equal(first, second)
    state = torch.get_rng_state()
    cuflash.explain(q, q, q, dropout_p=P)
    cuflash.attention(q, q, q, dropout_p=P, seed=3)
    cuflash.flash_attn_func(q, q, q)
    assert torch.equal(torch.get_rng_state(), state), "only a mask that needs a seed draws one"
