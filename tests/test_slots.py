"""write_kv: tokens to the slots that the caller names, and to no other place."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from backends import using
from needs import needs_nvrtc

import cuflash
from cuflash import arch
from cuflash.errors import ArgumentError, UnsupportedError
from cuflash.jit import module
from cuflash.jit.source import Edit
from cuflash.ops import write_kv as kernel

BACKENDS = ["reference", "emulator", pytest.param("cuda", marks=pytest.mark.gpu)]


def caches(rng, pages, size, heads, d, d_v, dtype, layout):
    """k_cache and v_cache, strided as engines stride them, and the array that holds all of their memory."""
    if layout == "interleaved":  # vLLM: [pages, heads, size, K and V side by side]
        whole = rng.standard_normal((pages, heads, size, d + d_v)).astype(dtype)
        k, v = np.split(whole.transpose(0, 2, 1, 3), [d], axis=3)
        return k, v, [whole]
    if layout == "pool":  # SGLang: [slots, heads, d]
        k = rng.standard_normal((pages * size, heads, d)).astype(dtype)
        v = rng.standard_normal((pages * size, heads, d_v)).astype(dtype)
        return k, v, [k, v]
    k = rng.standard_normal((pages, size, heads, d)).astype(dtype)
    v = rng.standard_normal((pages, size, heads, d_v)).astype(dtype)
    return k, v, [k, v]


def expected(k, v, k_cache, v_cache, slots):
    found = []
    for new, cache in ((k, k_cache), (v, v_cache)):
        cache = cache.copy()
        rows = cache.reshape(-1, *cache.shape[-2:]) if cache.ndim == 4 else cache
        for i, slot in enumerate(slots):
            if slot >= 0:
                rows[slot] = new[i]
        found.append(rows.reshape(cache.shape))
    return found


def written(backend, k, v, k_cache, v_cache, whole, slots):
    """The caches after the call; `whole`'s arrays are changed too, on a GPU by what came back."""
    if backend != "cuda":
        with using(backend):
            assert cuflash.write_kv(k, v, k_cache, v_cache, slots) is None
        return
    import cupy

    on_device = [cupy.asarray(x) for x in whole]
    moved = []
    for cache in (k_cache, v_cache):
        i = next(i for i, x in enumerate(whole) if np.shares_memory(x, cache))
        begin = cache.ctypes.data - whole[i].ctypes.data
        pointer = on_device[i].data + begin
        moved.append(cupy.ndarray(cache.shape, cache.dtype, pointer, cache.strides))
    cuflash.write_kv(cupy.asarray(k), cupy.asarray(v), *moved, cupy.asarray(slots))
    for x, changed in zip(whole, on_device, strict=True):
        x[...] = changed.get()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["pages", "interleaved", "pool"])
def test_tokens_go_to_their_slots_and_nowhere_else(backend, layout, rng):
    for heads, d, d_v, dtype, integer in (
        (2, 64, 32, np.float16, np.int64), (1, 5, 3, np.float16, np.int32), (3, 6, 6, np.float32, np.int64),
    ):  # fmt: skip
        pages, size, tokens = 3, 4, 7
        k_cache, v_cache, whole = caches(rng, pages, size, heads, d, d_v, dtype, layout)
        slots = rng.permutation(pages * size)[:tokens].astype(integer)
        slots[[1, 4]] = -1, -3
        k = rng.standard_normal((tokens + 2, heads, 2 * d)).astype(dtype)[..., ::2].copy()
        v = rng.standard_normal((heads, tokens + 2, d_v)).astype(dtype).swapaxes(0, 1)  # strided
        right = expected(k, v, k_cache, v_cache, slots)
        written(backend, k, v, k_cache, v_cache, whole, slots)
        np.testing.assert_array_equal(k_cache, right[0])
        np.testing.assert_array_equal(v_cache, right[1])


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_what_is_written_is_attended_to(backend, rng):
    """Against a cache that holds the keys in one piece."""
    k, v, q = (rng.standard_normal((9, 2, 16)).astype(np.float32) for _ in range(3))
    k_cache, v_cache, _ = caches(rng, 4, 4, 2, 16, 16, np.float32, "interleaved")
    table = np.array([[3, 0, 2]], np.int32)
    slots = np.array([table[0, i // 4] * 4 + i % 4 for i in range(9)], np.int64)
    starts, used = np.array([0, 9], np.int32), np.array([9], np.int32)
    with using(backend):
        cuflash.write_kv(k, v, k_cache, v_cache, slots)
        paged = cuflash.attention(
            q, k_cache, v_cache, cu_seqlens_q=starts, page_table=table, seqused_k=used, causal=True
        )
        whole = cuflash.attention(q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, causal=True)
    np.testing.assert_allclose(paged, whole, atol=2e-6)


def test_nothing_to_write(rng):
    k_cache, v_cache, _ = caches(rng, 2, 4, 1, 8, 8, np.float16, "pages")
    before = k_cache.copy()
    none = np.zeros((0, 1, 8), np.float16)
    for backend in BACKENDS[:2]:
        with using(backend):
            cuflash.write_kv(none, none, k_cache, v_cache, [])
    assert (k_cache == before).all()


def test_torch_tensors_and_their_gradients(rng):
    torch = pytest.importorskip("torch")
    k, v = (torch.randn(3, 2, 8, requires_grad=True) for _ in range(2))
    cache = torch.zeros(2, 2, 4, 16)
    k_cache, v_cache = cache.transpose(1, 2).split(8, dim=-1)
    version = k_cache._version
    cuflash.write_kv(k, v, k_cache, v_cache, torch.tensor([6, -1, 0]))
    assert torch.equal(k_cache[1, 2], k[0]) and torch.equal(v_cache[0, 0], v[2]) and not cache.requires_grad
    assert k_cache._version > version, "autograd sees that it has changed"

    def step(k, v):
        cuflash.write_kv(k, v, k_cache, v_cache, torch.tensor([1, 2, 3]))
        return k + 1

    assert torch.equal(torch.compile(step, backend="eager")(k, v), k + 1)
    assert torch.equal(k_cache[0, 1:], k)


def test_jax_arrays_are_refused():
    jnp = pytest.importorskip("jax.numpy")
    x = jnp.zeros((2, 4, 1, 8))
    with pytest.raises(UnsupportedError, match="use flash_attn_with_kvcache"):
        cuflash.write_kv(x[0], x[0], x, x, jnp.zeros(4, jnp.int32))


NEW, CACHE, SLOTS = np.zeros((3, 2, 8), np.float16), np.zeros((2, 4, 2, 8), np.float16), np.array([0, 1, 2])
READ_ONLY = CACHE.copy()
READ_ONLY.flags.writeable = False
BAD = [
    ({"slot_mapping": np.array([0, 8, 1])}, r"slot_mapping\[1\]=8 must be below 8: the cache has 2 pages of 4"),
    ({"slot_mapping": np.array([0.0, 1.0])}, "must be int64 or int32"),
    ({"slot_mapping": np.zeros((3, 1), np.int64)}, "must be int64 or int32"),
    ({"slot_mapping": np.zeros(4, np.int64)}, "4 slots and k 3 tokens"),
    ({"slot_mapping": ["a"]}, "must hold integers"),
    ({"slot_mapping": np.zeros(6, np.int64)[::2]}, "must be contiguous"),
    ({"k": NEW[0]}, r"k.shape=\(2, 8\) must be \[tokens, heads_kv, d\]"),
    ({"v": NEW[:2]}, "the tokens and heads of k"),
    ({"k": NEW.astype(np.float64)}, "must be one of"),
    ({"v_cache": CACHE.astype(np.float32)}, r"v_cache.dtype=float32 must equal k.dtype=float16"),
    ({"k_cache": CACHE[..., :4]}, "of the heads and head dim of k"),
    ({"v_cache": np.zeros((1, 4, 2, 8), np.float16)}, "must have the pages and page size of k_cache"),
    ({"k_cache": READ_ONLY}, "k_cache is read-only"),
    ({"k": np.zeros((3, 2, 16), np.float16)[..., ::2]}, "must end in 1"),
    ({"k": None}, "k"),
    ({"k_cache": [1]}, "k_cache"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_bad_arguments_write_nothing(change, message):
    caches = {"k_cache": CACHE.copy(), "v_cache": CACHE.copy()}
    given = {"k": NEW + 1, "v": NEW + 1, "slot_mapping": SLOTS, **caches, **change}
    for backend in BACKENDS[:2]:
        with using(backend), pytest.raises(ArgumentError, match=message):
            cuflash.write_kv(**given)
    assert not any(x.any() for x in caches.values())


def test_a_slot_behind_the_end_is_nobodys(rng, monkeypatch):
    """Where nobody knows the slots, as on a GPU, the kernel skips one that is out of range."""
    monkeypatch.setattr(cuflash.slots, "_known", lambda framework, slots: None)
    k_cache, v_cache, _ = caches(rng, 2, 4, 1, 8, 8, np.float16, "pages")
    before = k_cache.copy()
    k = np.ones((3, 1, 8), np.float16)
    with using("emulator"):
        cuflash.write_kv(k, k, k_cache, v_cache, np.array([8, 2**40, 3]))
    before[0, 3] = 1
    np.testing.assert_array_equal(k_cache, before)


PLANTED = {
    "a negative slot is written": (
        "if (slot < 0 || slot >= p.capacity) continue;",
        "if (slot >= p.capacity) continue;",
    ),
    "values go where keys go": ("keys ? p.k_cache : p.v_cache", "keys ? p.k_cache : p.k_cache"),
    "the last unit is left out": ("i < p.heads_kv * units;", "i < p.heads_kv * units - 1;"),
    "slots are 32 bits": ("return p.slots_are_i64 ?", "return false ?"),
    "rows count from the cache's start": ("(slot - page * p.page_size) * to_row", "slot * to_row"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bugs(name, rng, monkeypatch):
    edit, spec = Edit("write_kv.cu", *PLANTED[name]), kernel.kernel_spec
    monkeypatch.setattr(kernel, "kernel_spec", lambda variant: dataclasses.replace(spec(variant), edits=(edit,)))
    with pytest.raises((AssertionError, cuflash.errors.EmulatorError)):
        test_tokens_go_to_their_slots_and_nowhere_else("emulator", "pages", rng)


@needs_nvrtc
@pytest.mark.parametrize("name", ["sm_80", "sm_90a", "sm_120a"])
def test_machine_code(name):
    from machine_code import checked

    for spec in kernel.representative(arch.named(name)):
        assert isinstance(checked(spec, name), module.Compiled)
