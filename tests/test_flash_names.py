"""What flash-attn 3 and 4 take besides flash-attn 2's arguments: served, or refused by name with what to use."""

from __future__ import annotations

import numpy as np
import pytest

import cuflash
from cuflash.errors import ArgumentError, UnsupportedError


def drawn(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def of_mask(q, k, v, seen, sink=None):
    """Attention of one sequence, [len, heads, d], by a matrix of which keys are seen."""
    k, v = (x.repeat(q.shape[1] // x.shape[1], 1).astype(np.float64) for x in (k, v))
    scores = np.where(seen, np.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5, -np.inf)
    weights = np.exp(scores - np.maximum(scores.max(-1, keepdims=True), -1e30))
    total = weights.sum(-1, keepdims=True)
    if sink is not None:
        total = total + np.exp(sink[:, None, None] - np.maximum(scores.max(-1, keepdims=True), -1e30))
    return np.einsum("hqk,khd->qhd", weights / np.where(total == 0, 1, total), v)


def chunks(q_len, k_len, size, window=(-1, -1)):
    """The keys that flash-attn 3 leaves of a chunk."""
    p, j = np.arange(q_len)[:, None] + k_len - q_len, np.arange(k_len)
    first = p - p % size
    left, right = (10**9 if side < 0 else side for side in window)
    return (j >= first) & (j < first + size) & (j >= p - left) & (j <= p + right)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("q_len, k_len, size", [(9, 9, 4), (5, 11, 3), (11, 5, 4), (1, 9, 4), (7, 7, 1), (6, 9, 50)])
def test_attention_in_chunks(rng, q_len, k_len, size, causal):
    q, k, v = drawn(rng, 2, q_len, 4, 16), drawn(rng, 2, k_len, 2, 16), drawn(rng, 2, k_len, 2, 16)
    for window in ((-1, -1), (2, 1)):
        out = cuflash.flash_attn_func(q, k, v, causal=causal, window_size=window, attention_chunk=size)
        seen = chunks(q_len, k_len, size, (window[0], 0) if causal else window)
        for b in range(2):
            np.testing.assert_allclose(out[b], of_mask(q[b], k[b], v[b], seen), atol=2e-6)


def test_chunks_of_packed_sequences_in_pages_and_in_caches(rng):
    q, k, v = drawn(rng, 7, 2, 16), drawn(rng, 12, 1, 16), drawn(rng, 12, 1, 16)
    starts_q, starts_k = np.array([0, 3, 7], np.int32), np.array([0, 5, 12], np.int32)
    out = cuflash.flash_attn_varlen_func(q, k, v, starts_q, starts_k, 4, 7, causal=True, attention_chunk=3)
    sequences = [
        of_mask(q[slice(*at)], k[slice(*on)], v[slice(*on)], chunks(at[1] - at[0], on[1] - on[0], 3, (-1, 0)))
        for at, on in (((0, 3), (0, 5)), ((3, 7), (5, 12)))
    ]
    np.testing.assert_allclose(out, np.concatenate(sequences), atol=2e-6)
    even = lambda b, h, q_idx, kv_idx: kv_idx % 2 == 0  # noqa: E731
    out = cuflash.flash_attn_func(q[None, :4], k[None, :7], v[None, :7], attention_chunk=3, mask_mod=even)
    want = of_mask(q[:4], k[:7], v[:7], chunks(4, 7, 3) & (np.arange(7) % 2 == 0))
    np.testing.assert_allclose(out[0], want, atol=2e-6)
    cache = {"k_cache": k[None], "v_cache": v[None], "cache_seqlens": np.array([9], np.int32)}
    out = cuflash.flash_attn_with_kvcache(q[None, :4], **cache, causal=True, attention_chunk=4)
    np.testing.assert_allclose(out[0], of_mask(q[:4], k[:9], v[:9], chunks(4, 9, 4, (-1, 0))), atol=2e-6)


def test_sinks_by_every_name(rng):
    q, sink = drawn(rng, 1, 5, 2, 16), drawn(rng, 2)
    want = of_mask(q[0], q[0], q[0], np.tri(5, dtype=bool), sink)
    for name in ("sink", "learnable_sink", "s_aux"):
        for out in (
            cuflash.flash_attn_func(q, q, q, causal=True, **{name: sink}),
            cuflash.flash_attn_qkvpacked_func(np.stack([q, q, q], 2), causal=True, **{name: sink}),
            cuflash.flash_attn_with_kvcache(q, q, q, causal=True, **{name: sink}),
        ):
            np.testing.assert_allclose(out[0], want[:], atol=2e-6)
    with pytest.raises(ArgumentError, match="sink and s_aux are all given, and are names of one argument"):
        cuflash.flash_attn_func(q, q, q, sink=sink, s_aux=sink)


def test_lengths_in_use_and_keys_beside_packed_queries(rng):
    q, k = drawn(rng, 2, 5, 2, 16), drawn(rng, 2, 9, 1, 16)
    used_q, used_k = np.array([3, 5], np.int32), np.array([4, 9], np.int32)
    want = cuflash.attention(q, k, k, causal=True, seqused_q=used_q, seqused_k=used_k)
    out = cuflash.flash_attn_func(q, k, k, causal=True, seqused_q=used_q, seqused_k=used_k)
    np.testing.assert_array_equal(out, want)
    starts = np.array([0, 3, 8], np.int32)
    flat, pages = np.concatenate([q[0, :3], q[1]]), np.array([[0], [1]], np.int32)
    want = np.concatenate([want[0, :3], want[1]])
    given = {"seqused_k": used_k, "causal": True}
    for out in (
        cuflash.flash_attn_varlen_func(flat, k, k, starts, None, 5, 9, **given),
        cuflash.flash_attn_varlen_func(flat, k, k, starts, None, 5, 9, block_table=pages, **given),
        cuflash.flash_attn_varlen_func(flat, k, k, starts, None, 5, 9, page_table=pages, **given),
    ):
        np.testing.assert_array_equal(out, want)


def test_parts_of_keys(rng):
    q, k = drawn(rng, 1, 3, 2, 16), drawn(rng, 1, 200, 1, 16)
    want = cuflash.flash_attn_func(q, k, k)
    for splits in ({"num_splits": 0}, {"num_splits": 3}, {"num_splits": 2, "pack_gqa": True}):
        np.testing.assert_allclose(cuflash.flash_attn_func(q, k, k, **splits), want, atol=1e-6)
    starts = np.array([0, 3], np.int32)
    with pytest.raises(UnsupportedError, match=r"num_splits=2 with cu_seqlens_k: packed keys are not split; pass 1"):
        cuflash.flash_attn_varlen_func(q[0], k[0, :3], k[0, :3], starts, starts, 3, 3, num_splits=2)
    with pytest.raises(ArgumentError, match=r"num_splits=-1 must be an int"):
        cuflash.flash_attn_func(q, k, k, num_splits=-1)


@pytest.mark.parametrize(
    "name, off",
    [
        ("qv", None), ("q_descale", None), ("k_descale", None), ("v_descale", None), ("sm_margin", 0),
        ("scheduler_metadata", None), ("num_heads_q", None), ("gather_kv_indices", None), ("score_mod_bwd", None),
        ("aux_tensors", None), ("aux_scalars", None), ("block_sparse_tensors", None), ("return_lse", False),
    ],
)  # fmt: skip
def test_the_rest_is_refused_with_what_to_use(name, off):
    q = np.ones((1, 2, 2, 16), np.float32)
    np.testing.assert_array_equal(cuflash.flash_attn_func(q, q, q, **{name: off}), q)
    for value in (np.ones((1, 2), np.float32), 8):
        with pytest.raises(UnsupportedError, match=f"^{name}: "):
            cuflash.flash_attn_func(q, q, q, **{name: value})


def test_wrong_values_and_words():
    q = np.ones((1, 2, 2, 16), np.float32)
    for value in (np.ones(2), "yes", 1.0):
        with pytest.raises(ArgumentError, match=r"return_attn_probs is a \w+ and must be True or False"):
            cuflash.flash_attn_func(q, q, q, return_attn_probs=value)
    for value in (-1, 1.5, np.ones(2), None, True):
        for call in (cuflash.flash_attn_func, cuflash.flash_attn_with_kvcache):
            with pytest.raises(ArgumentError, match=r"attention_chunk=.* must be an int of at least 0: pass 0"):
                call(q, q, q, attention_chunk=value)
    for name in ("attention_chunks", "seed", "out", "aux"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            cuflash.flash_attn_func(q, q, q, **{name: 4})


@pytest.mark.filterwarnings("ignore:torch.compile breaks its graph")
def test_torch_follows_chunks_and_sinks(rng):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    q, sink = torch.from_numpy(drawn(rng, 1, 7, 2, 16)), torch.from_numpy(drawn(rng, 2))

    def call(q, sink):
        return cuflash.flash_attn_func(q, q, q, causal=True, attention_chunk=3, learnable_sink=sink)

    want = of_mask(*[q[0].numpy()] * 3, chunks(7, 7, 3, (-1, 0)), sink.numpy())
    np.testing.assert_allclose(call(q, sink)[0], want, atol=2e-6)
    np.testing.assert_allclose(torch.compile(call, backend="eager")(q, sink)[0], want, atol=2e-6)
    torch.autograd.gradcheck(call, [x.double().requires_grad_() for x in (q, sink)])


def test_a_traced_chunk_is_told_to_be_static():
    jax = pytest.importorskip("jax")
    x = jax.numpy.ones((1, 4, 1, 16))
    with pytest.raises(ArgumentError, match=r"attention_chunk=.* static_argnames"):
        jax.jit(cuflash.flash_attn_func)(x, x, x, attention_chunk=2)
