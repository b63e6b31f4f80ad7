"""`flash_attn_with_kvcache` against caches put together by hand, and what it refuses with the cache untouched."""

from __future__ import annotations

import os
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from backends import using
from needs import needs_nvrtc
from recorded import KINDS, STREAM, recording
from test_paging import ABSURD

import cuflash
from cuflash import arch, reference
from cuflash.errors import ArgumentError, CompileError, EmulatorError, UnsupportedError
from cuflash.jit import layout, module
from cuflash.jit.source import Edit
from cuflash.ops import append, decode, forward

BACKENDS = ("reference", "emulator")
HEADS, HEADS_KV, D, D_V, ROOM = 4, 2, 16, 24, 24


def turned(x: np.ndarray, first: int, step: int, angles: np.ndarray, interleaved: bool) -> np.ndarray:
    """Rows of x [rows, heads, d] rotated, by complex numbers."""
    x, n = x.astype(np.float64), angles.shape[1]
    at = np.exp(1j * angles[first + step * np.arange(len(x))])[:, None]
    a, b = (x[..., 0 : 2 * n : 2], x[..., 1 : 2 * n : 2]) if interleaved else (x[..., :n], x[..., n : 2 * n])
    z = (a + 1j * b) * at
    pairs = np.stack([z.real, z.imag], -1) if interleaved else np.concatenate([z.real, z.imag], -1)
    return np.concatenate([pairs.reshape(*x.shape[:2], 2 * n), x[..., 2 * n :]], -1)


class Step:
    """One call: its arguments, and by hand what comes out and what the cache holds then."""

    def __init__(
        self, rng: np.random.Generator, *, page_size: int = 0, before=(5, 0, 13), new: Any = 3, packed=False,
        packed_new=False, index=False, pad=None, rotary_dim=0, interleaved=True, rotary_seqlens=None, queries=3,
        counts=(1, 0, 4), room=ROOM, **features: Any,
    ) -> None:  # fmt: skip
        batch, draw = len(before), lambda *shape: rng.standard_normal(shape).astype(np.float32)
        lengths_q = [2, queries + 1, 1] if packed else [queries] * batch
        counts = counts if packed_new else [new or 0] * batch
        self.features, self.lengths_q = features, lengths_q
        after = [b + n for b, n in zip(before, counts, strict=True)]
        self.q = draw(sum(lengths_q), HEADS, D)
        ks, vs = ([draw(n, HEADS_KV, d) for n in after] for d in (D, D_V))
        self.arguments: dict[str, Any] = {"cache_seqlens": np.array(before, np.int32), **features}
        turn_k = turn_q = lambda x, b: x
        if rotary_dim:
            angles = rng.uniform(0, 6, (room + 16, rotary_dim // 2))
            starts = before if rotary_seqlens is None else rotary_seqlens
            step = int(features.get("causal", False) or max(features.get("window_size", (-1, -1))) >= 0)
            turn_k = lambda x, b: turned(x, starts[b], 1, angles, interleaved)  # noqa: E731
            turn_q = lambda x, b: turned(x, starts[b], step, angles, interleaved)  # noqa: E731
            self.arguments |= {
                "rotary_cos": np.cos(angles).astype(np.float32), "rotary_sin": np.sin(angles).astype(np.float32),
                "rotary_interleaved": interleaved,
            }  # fmt: skip
            if rotary_seqlens is not None:
                self.arguments["rotary_seqlens"] = np.array(rotary_seqlens, np.int32)

        # The cache: everything but the keys that are there is NaN.
        if page_size:
            columns = -(-room // page_size)
            ids = rng.permutation(batch * columns + 2)[: batch * columns].reshape(batch, columns).astype(np.int32)
            shape, where = (batch * columns + 2, page_size), lambda b, n: (ids[b, n // page_size], n % page_size)
            table = ids.copy()
            for b, n in enumerate(after):
                table[b, -(-n // page_size) :] = ABSURD
            self.arguments["block_table"] = table
        else:
            lines = rng.permutation(batch + 2)[:batch].astype(np.int32) if index else np.arange(batch, dtype=np.int32)
            shape, where = (batch + 2 * index, room), lambda b, n: (lines[b], n)
            if index:
                self.arguments["cache_batch_idx"] = lines
        self.caches, self.expected_caches = [], []
        for sequences, d in ((ks, D), (vs, D_V)):
            cache = np.full((*shape, HEADS_KV, d), np.nan, np.float32)
            for b, x in enumerate(sequences):
                for n in range(before[b]):
                    cache[where(b, n)] = x[n]
            self.caches.append(cache.copy())
            for b, x in enumerate(sequences):
                rows = x[before[b] :] if d == D_V else turn_k(x[before[b] :], b)
                for n, row in enumerate(rows):
                    cache[where(b, before[b] + n)] = row
            self.expected_caches.append(cache)
        if new:
            fresh = [[x[n:] for x, n in zip(xs, before, strict=True)] for xs in (ks, vs)]
            self.arguments |= {"k": np.concatenate(fresh[0]), "v": np.concatenate(fresh[1])}
            if packed_new:
                self.arguments["cu_seqlens_k_new"] = np.cumsum([0, *counts]).astype(np.int32)
            else:
                self.arguments |= {n: self.arguments[n].reshape(batch, new, HEADS_KV, -1) for n in "kv"}
        starts_q = np.cumsum([0, *lengths_q])
        self.out, self.lse = [], []
        for b in range(batch):
            first = 0 if pad is None else pad[b]
            k, v = (
                np.stack([c[where(b, n)] for n in range(first, after[b])]) if after[b] > first
                else np.zeros((0, HEADS_KV, c.shape[-1])) for c in self.expected_caches
            )  # fmt: skip
            q = turn_q(self.q[starts_q[b] : starts_q[b + 1]], b)
            own = {n: x[b : b + 1] if n == "alibi_slopes" and np.ndim(x) == 2 else x for n, x in features.items()}
            out, lse, _ = reference.attention(
                q[None].astype(float), k[None].astype(float), v[None].astype(float), **own
            )
            self.out.append(out[0])
            self.lse.append(lse[0])
        if pad is not None:
            self.arguments["cache_leftpad"] = np.array(pad, np.int32)
        if packed:
            self.arguments["cu_seqlens_q"] = starts_q.astype(np.int32)
        else:
            self.q = self.q.reshape(batch, queries, HEADS, D)

    def check(self, array: Any = np.asarray, host: Any = np.asarray, backend: str = "reference") -> None:
        caches = [array(x) for x in self.caches]
        given = {n: array(x) if isinstance(x, np.ndarray) else x for n, x in self.arguments.items()}
        with using(backend):
            out, lse, *returned = cuflash.flash_attn_with_kvcache(
                array(self.q), *caches, **given, return_softmax_lse=True
            )
        rows = host(out).reshape(-1, HEADS, D_V)
        np.testing.assert_allclose(rows, np.concatenate(self.out), atol=3e-6)
        lse = host(lse) if host(lse).ndim == 2 else np.concatenate([*host(lse)], axis=1)
        np.testing.assert_allclose(lse, np.concatenate(self.lse, axis=1), atol=3e-6)
        for got, expected in zip(returned or caches, self.expected_caches, strict=True):
            np.testing.assert_allclose(host(got), expected, atol=1e-6)  # NaN where NaN was, too
        assert host(out).dtype == np.float32


CALLS: dict[str, dict[str, Any]] = {
    "append": {},
    "no new keys": {"new": None},
    "causal": {"causal": True},
    "window": {"window_size": (4, 1)},
    "softcap, alibi, sink": {"softcap": 2.0, "alibi_slopes": np.linspace(0.1, 1, 4, dtype=np.float32),
                             "sink": np.linspace(-1, 1, 4, dtype=np.float32)},
    "slopes by sequence": {"alibi_slopes": np.linspace(0.1, 1, 12, dtype=np.float32).reshape(3, 4), "causal": True},
    "mods": {"mask_mod": lambda b, h, q_idx, kv_idx: kv_idx % 3 != 1, "pad": (2, 0, 5),
             "score_mod": lambda score, b, h, q_idx, kv_idx, kv_len: score - (kv_len - kv_idx) * 0.2},
    "leftpad": {"pad": (2, 0, 5), "causal": True},
    "nothing but padding": {"pad": (5, 0, 13), "new": None},
    "packed queries": {"packed": True, "causal": True},
    "packed queries and keys": {"packed": True, "packed_new": True, "causal": True},
    "packed keys": {"packed_new": True},
    "rotary": {"rotary_dim": 16, "causal": True},
    "rotary, halves": {"rotary_dim": 10, "interleaved": False, "causal": True},
    "rotary, a window": {"rotary_dim": 2, "window_size": (-1, 3)},
    "rotary, all queries at one place": {"rotary_dim": 6, "interleaved": False},
    "rotary from elsewhere": {"rotary_dim": 8, "rotary_seqlens": (30, 2, 0), "causal": True},
    "rotary, packed": {"rotary_dim": 14, "packed": True, "packed_new": True, "causal": True, "pad": (1, 0, 2)},
    "one long among many": {"before": (5,) * 10, "packed_new": True, "counts": (1, 0, 0, 11, *[0] * 6)},
    "full": {"before": (21, 21, 21)},
    "a chunk of a prompt": {"queries": 36, "causal": True, "rotary_dim": 8, "rotary_seqlens": (0, 2, 3)},
    "chunks beside steps": {"queries": 36, "packed": True, "packed_new": True, "pad": (1, 0, 2)},
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["in one piece", "by index", 1, 5, 8, 256])
@pytest.mark.parametrize("what", CALLS)
def test_against_caches_by_hand(rng, what, where, backend):
    step = Step(rng, page_size=where if isinstance(where, int) else 0, index=where == "by index", **CALLS[what])
    step.check(backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("queries", [3, 36])
@pytest.mark.parametrize("page_size", [0, 8])
def test_documents_in_a_window_with_softcap(rng, page_size, queries, backend):
    """A mask that reads memory, beside arguments; by few queries in parts, by many in one piece."""
    documents = np.sort(rng.integers(0, 5, 64)).astype(np.int32)

    def mask_mod(b, h, q_idx, kv_idx, q_len, kv_len):
        return documents[q_idx + kv_len - q_len + 40] == documents[kv_idx + 40]

    Step(
        rng, page_size=page_size, queries=queries, pad=(2, 0, 5), mask_mod=mask_mod, window_size=(8, 1), softcap=2.0
    ).check(backend=backend)


@pytest.mark.parametrize("part", range(8))
@pytest.mark.parametrize("backend", BACKENDS)
def test_drawn_cases(part, backend):
    """40 combinations of everything, each."""
    rng = np.random.default_rng([int(os.environ["CUFLASH_TEST_SEED"]), part])
    some = lambda chance, value, otherwise=None: value if rng.random() < chance else otherwise  # noqa: E731
    for _ in range(40):
        new = int(rng.integers(0, 5))
        before = tuple(int(n) for n in rng.integers(0, ROOM - 4, 3))
        case = {
            "page_size": int(rng.choice([0, 0, 1, 2, 3, 7, 16, 64])), "before": before, "new": new or None,
            "packed": bool(rng.integers(2)), "packed_new": bool(new and rng.integers(2)),
            "pad": some(0.3, tuple(int(rng.integers(0, n + 1)) for n in before)),
            "rotary_dim": some(0.6, 2 * int(rng.integers(1, 9)), 0) if new else 0, "interleaved": bool(rng.integers(2)),
            "causal": bool(rng.integers(2)),
            "window_size": some(0.4, tuple(map(int, rng.integers(-1, 9, 2))), (-1, -1)),
            "softcap": some(0.3, 2.5, 0.0), "sink": some(0.3, rng.standard_normal(4).astype(np.float32)),
            "alibi_slopes": some(0.3, rng.random((3, 4)[rng.integers(2) :]).astype(np.float32)),
            "queries": int(rng.choice([1, 3, 3, 36])),
        }  # fmt: skip
        splits = [{}, {}, {"num_splits": 1}, {"num_splits": 3}, {"split_size": 64}][rng.integers(5)]
        case["index"] = not case["page_size"] and bool(rng.integers(2))
        if case["rotary_dim"]:
            case["rotary_seqlens"] = some(0.3, tuple(map(int, rng.integers(0, 30, 3))))
            case["queries"] = min(case["queries"], 3)  # of whose positions the tables have 40
        step = Step(rng, **case)
        step.arguments |= splits
        try:
            step.check(backend=backend)
        except Exception as error:
            error.add_note(f"of the case {case} with {splits}")
            raise


@pytest.mark.parametrize("what", ["append", "rotary, packed", "no new keys"])
@pytest.mark.parametrize("page_size", [0, 8])
def test_pytorch(rng, what, page_size):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    Step(rng, page_size=page_size, **CALLS[what]).check(torch.tensor)
    with torch.inference_mode():
        Step(rng, page_size=page_size, **CALLS[what]).check(torch.tensor)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", ["append", "rotary, packed", "no new keys", "mods"])
def test_torch_compile_keeps_one_graph(rng, what, backend):
    """Around an append that is made once, at its time; other lengths compile nothing."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    case = CALLS[what] | {n: cuflash.mod(f) for n, f in CALLS[what].items() if n.endswith("_mod")}
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, backend=count)
    def attend(q, k_cache, v_cache, given):
        before = k_cache.clone()
        out, lse = cuflash.flash_attn_with_kvcache(q * 1, k_cache, v_cache, **given, return_softmax_lse=True)
        return out + 0, lse, k_cache - before

    for before in ((5, 0, 13), (4, 1, 9)):
        step = Step(rng, page_size=8, **case | {"before": before} | ({"pad": (1, 0, 2)} if what == "mods" else {}))
        caches = [torch.tensor(x) for x in step.caches]
        given = {n: torch.tensor(x) if isinstance(x, np.ndarray) else x for n, x in step.arguments.items()}
        with torch.no_grad(), using(backend):
            out, _, _ = attend(torch.tensor(step.q), *caches, given)
        np.testing.assert_allclose(out.numpy().reshape(-1, HEADS, D_V), np.concatenate(step.out), atol=3e-6)
        for got, expected in zip(caches, step.expected_caches, strict=True):
            np.testing.assert_allclose(got.numpy(), expected, atol=1e-6)
    assert len(graphs) == 1


def test_torch_compile_takes_a_number_of_keys_as_one(rng):
    """A step of generation after the other: compiled for one length, then for all."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    graphs = []
    attend = lambda q, *caches, n: cuflash.flash_attn_with_kvcache(q, *caches, q, q, cache_seqlens=n, causal=True)  # noqa: E731
    compiled = torch.compile(attend, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    whole = torch.tensor(rng.standard_normal((2, 6, 2, 16)), dtype=torch.float32)
    caches = [torch.full_like(whole, float("nan")) for _ in "kv"]
    with torch.no_grad():
        out = torch.cat([compiled(whole[:, n : n + 1], *caches, n=n) for n in range(6)], dim=1)
        np.testing.assert_allclose(out, cuflash.attention(whole, whole, whole, causal=True), atol=1e-6)
    assert len(graphs) == 2


def test_torch_operator_says_what_it_writes(rng):
    """As PyTorch's own checks of an operator want it: schema, shapes, under functionalisation."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    from cuflash.autograd import torch_operators

    cache = torch.tensor(rng.standard_normal((2, 8, 2, 16)), dtype=torch.float32)
    q, k = (torch.tensor(rng.standard_normal((2, 1, 2, 16)), dtype=torch.float32) for _ in range(2))
    lengths = torch.tensor([3, 5], dtype=torch.int32)
    rest = (lengths, *[None] * 6, None, -1, 0, None, 0.0, True, 0, None, None, "", [], [])
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for operator, new in (
        (torch.ops.cuflash.attention_append, (k, k)),
        (torch.ops.cuflash.attention_to_cache, (None,) * 2),
    ):
        torch.library.opcheck(
            operator.default, (q, cache.clone(), cache.clone(), *new, None, None, None, None, *rest), test_utils=checks
        )
    assert torch_operators.CACHE_SCHEMA.count("Tensor?") == 13


@pytest.mark.parametrize("what", ["append", "rotary, packed", "no new keys"])
@pytest.mark.parametrize("page_size", [0, 8])
def test_jax_returns_new_caches(rng, what, page_size):
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    step = Step(rng, page_size=page_size, **CALLS[what])
    step.check(jax.numpy.asarray)
    old = [jax.numpy.asarray(x) for x in step.caches]
    given = {n: jax.numpy.asarray(x) if isinstance(x, np.ndarray) else x for n, x in step.arguments.items()}
    out = cuflash.flash_attn_with_kvcache(jax.numpy.asarray(step.q), *old, **given)
    assert isinstance(out, jax.Array if what == "no new keys" else tuple)
    for x, y in zip(old, step.caches, strict=True):
        np.testing.assert_array_equal(np.asarray(x), y)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", ["append", "rotary, packed", "no new keys", "mods"])
def test_jit_writes_over_donated_caches(rng, what, backend):
    """And gives the bits of a call outside."""
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    step = Step(rng, page_size=8, **CALLS[what])
    arrays = {n: jax.numpy.asarray(x) for n, x in step.arguments.items() if isinstance(x, np.ndarray)}
    rest = {n: x for n, x in step.arguments.items() if n not in arrays}

    def attend(q, k_cache, v_cache, given):
        return cuflash.flash_attn_with_kvcache(q, k_cache, v_cache, **given, **rest, return_softmax_lse=True)

    q, caches = jax.numpy.asarray(step.q), [jax.numpy.asarray(x) for x in step.caches]
    compiled = jax.jit(attend, donate_argnums=(1, 2) if "k" in arrays else ())
    with using(backend):
        expected = jax.block_until_ready(attend(q, *caches, arrays))
        memory = [x.unsafe_buffer_pointer() for x in caches]
        found = jax.block_until_ready(compiled(q, *caches, arrays))
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    for x, y in zip(found[2:], step.expected_caches, strict="k" in arrays):
        np.testing.assert_allclose(np.asarray(x), y, atol=1e-6)
    if "k" in arrays:
        assert [x.unsafe_buffer_pointer() for x in found[2:]] == memory
        with using(backend):  # not donated: a copy
            caches = [jax.numpy.asarray(x) for x in step.caches]
            again = jax.jit(attend)(q, *caches, arrays)
        for x, y in zip(caches, step.caches, strict=True):
            np.testing.assert_array_equal(np.asarray(x), y)
        np.testing.assert_array_equal(np.asarray(again[2]), np.asarray(found[2]))


def test_scan_generates(rng):
    """A loop of steps inside one program, the caches carried along."""
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    whole = jax.numpy.asarray(rng.standard_normal((6, 2, 1, 2, 16)), jax.numpy.float32)
    caches = [jax.numpy.full((2, 6, 2, 16), jax.numpy.nan) for _ in "kv"]

    def step(carry, x):
        out, *caches = cuflash.flash_attn_with_kvcache(x, *carry[1:], x, x, cache_seqlens=carry[0], causal=True)
        return (carry[0] + 1, *caches), out

    begin = jax.numpy.zeros(2, jax.numpy.int32)
    _, outs = jax.jit(lambda *carry: jax.lax.scan(step, carry, whole))(begin, *caches)
    x = whole[:, :, 0].swapaxes(0, 1)
    expected = cuflash.attention(x, x, x, causal=True)
    np.testing.assert_allclose(np.asarray(outs)[:, :, 0].swapaxes(0, 1), np.asarray(expected), atol=1e-6)


def test_jit_refuses(rng):
    """Known values when it traces, others when it runs; vmap, gradients; a number of keys is an array."""
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    jnp = jax.numpy
    cache, q = jnp.zeros((2, 8, 2, 16)), jnp.ones((2, 1, 2, 16))
    attend = lambda q, n: cuflash.flash_attn_with_kvcache(q, cache, cache, q, q, cache_seqlens=n)[0]  # noqa: E731
    with pytest.raises(ArgumentError, match=r"cache_seqlens\[0\]=8, and 1 new keys behind them"):
        jax.jit(lambda q: attend(q, 8))(q)
    with pytest.raises(Exception, match=r"cache_seqlens\[1\]=8, and 1 new keys behind them"):
        jax.jit(attend)(q, jnp.array([1, 8], jnp.int32)).block_until_ready()
    with pytest.raises(ArgumentError, match=r"cache_seqlens\.dtype=float32 must be int32: pass cache_seqlens\.astype"):
        jax.jit(attend)(q, jnp.ones(2))
    with pytest.raises(UnsupportedError, match=r"under jax\.vmap: its first axis is a batch already"):
        jax.vmap(lambda q: attend(q, jnp.array([1, 2], jnp.int32)))(q[None])
    with pytest.raises(UnsupportedError, match=r"has no gradient: to train, call cuflash\.attention"):
        jax.grad(lambda q: attend(q, 2).sum())(q)


@needs_nvrtc
def test_jax_on_a_gpu_launches_on_xlas_stream_and_memory(monkeypatch):
    """Every launch of a step, with workspace among the results; kernels are loaded when it is traced."""
    pytest.importorskip("jax", reason="JAX is not installed")
    from cuflash import dtypes
    from cuflash.autograd import jax_cache, jax_call, jax_ffi
    from cuflash.frameworks import CacheOptions

    shapes = {"q": (2, 1, 4, 16), "k_cache": (6, 8, 2, 16), "v_cache": (6, 8, 2, 16), "k": (2, 1, 2, 16),
              "v": (2, 1, 2, 16)}  # fmt: skip
    specs = [jax_ffi.Spec(name, shape, dtypes.float16) for name, shape in shapes.items()]
    specs += [jax_ffi.Spec("cache_seqlens", (2,), dtypes.int32), jax_ffi.Spec("block_table", (2, 3), dtypes.int32)]
    options = CacheOptions((-1, 0), None, 0.0, True, 0, None, None, True, False)
    loaded = []
    with recording() as recorder:
        monkeypatch.setattr(jax_call, "gpus", lambda: (0,))
        monkeypatch.setattr(module.CudaKernel, "prepare", lambda kernel: loaded.append(kernel.spec.source))
        static = jax_cache.CacheStatic(options, "auto", "sm_80")
        _, description = jax_cache._cache_described(static, tuple(specs), ("cuda", 0))
        sources = ["append_kv.cu", *PARTS]
        assert sorted(loaded) == sorted(sources)
        description = jax_ffi.Description.loads(description.dumps())
        device, given = ("cuda", 0), (*description.inputs, *description.results)
        views = {spec.name: spec.at(4096 * (i + 1), device, False) for i, spec in enumerate(given)}
        assert {"new_k_cache", "new_v_cache", "seqused_k", "partial_out", "out", "lse"} <= set(views)
        addresses = {name: view.ptr for name, view in views.items()}
        jax_ffi.operations["attention_to_cache"](description, device)(views, 77)
        assert [launch.kernel.spec.source for launch in recorder.launches] == sources
        assert {launch.stream for launch in recorder.launches} == {77}
        written = layout.load("AppendParams").unpack(recorder.launches[0].params)
        assert written["k_cache"] == addresses["new_k_cache"] and written["seqused_k"] == addresses["seqused_k"]


def test_lengths_of_any_kind(rng):
    """An int, a list, an array; without new keys none: the whole cache."""
    step = Step(rng, before=(5, 5, 5))
    for lengths in (5, [5, 5, 5], np.int64(5)):
        step.arguments["cache_seqlens"] = lengths
        step.check()
    cache = rng.standard_normal((2, 7, 2, 16)).astype(np.float32)
    q = rng.standard_normal((2, 1, 4, 16)).astype(np.float32)
    np.testing.assert_array_equal(cuflash.flash_attn_with_kvcache(q, cache, cache), cuflash.attention(q, cache, cache))


def test_splits_change_nothing(rng):
    for keywords in ({"num_splits": 3}, {"split_size": 64}, {"num_splits": 1, "pack_gqa": True}):
        step = Step(rng)
        step.arguments |= keywords
        step.check()


def test_generation_equals_recomputation(rng):
    """A token at a time, ragged, pages of 3; against attention over everything at the end."""
    lengths, steps = np.array([4, 1], np.int32), 6
    x = [rng.standard_normal((n + steps, 2, 8)).astype(np.float32) for n in lengths]
    pages, table = np.full((8, 3, 2, 8), np.nan, np.float32), rng.permutation(8).reshape(2, 4).astype(np.int32)
    caches = pages, pages.copy()
    new = np.concatenate([x[b][:n] for b, n in enumerate(lengths)])
    starts = np.cumsum([0, *lengths]).astype(np.int32)
    outs = [
        cuflash.flash_attn_with_kvcache(
            new, *caches, new, new, cache_seqlens=0, block_table=table, causal=True, cu_seqlens_q=starts,
            cu_seqlens_k_new=starts,
        )
    ]  # fmt: skip
    for step in range(steps):
        new = np.stack([x[b][n + step : n + step + 1] for b, n in enumerate(lengths)])
        outs.append(
            cuflash.flash_attn_with_kvcache(
                new, *caches, new, new, cache_seqlens=lengths + np.int32(step), page_table=table, causal=True
            )[:, 0]
        )
    for b, n in enumerate(lengths):
        whole = cuflash.attention(x[b][None], x[b][None], x[b][None], causal=True)[0]
        got = np.concatenate([outs[0][starts[b] : starts[b + 1]], *[o[b : b + 1] for o in outs[1:]]])
        np.testing.assert_allclose(got, whole, atol=1e-6)
        assert len(got) == n + steps


# Refusals -------------------------------------------------------------------------------------------------------------


def x(*shape: int, dtype: Any = np.float16) -> np.ndarray:
    return np.ones(shape, dtype)


def i32(*values: Any) -> np.ndarray:
    return np.array(values, np.int32)


def right() -> dict[str, Any]:
    return {
        "q": x(2, 3, 4, 16), "k_cache": x(2, 12, 2, 16), "v_cache": x(2, 12, 2, 16), "k": x(2, 3, 2, 16),
        "v": x(2, 3, 2, 16), "cache_seqlens": i32(9, 4), "rotary_cos": x(12, 4), "rotary_sin": x(12, 4), "causal": True,
    }  # fmt: skip


PAGED = {"k_cache": x(6, 4, 2, 16), "v_cache": x(6, 4, 2, 16), "block_table": i32([0, 1, 2], [5, 4, 3])}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "past the end": ({"cache_seqlens": i32(4, 10)}, r"cache_seqlens\[1\]=10, and 3 new.*0 to 12.*\(1 x 12\): make it "),
    "past the end, an int": ({"cache_seqlens": 10}, r"cache_seqlens\[0\]=10, and 3 new keys behind them"),
    "past the end of all ints": ({"cache_seqlens": 2**31 - 1}, r"cache_seqlens\[0\]=2147483647, and 3 new keys"),
    "below 0": ({"cache_seqlens": i32(0, -1)}, r"cache_seqlens\[1\]=-1"),
    "an int below 0": ({"cache_seqlens": -1}, r"cache_seqlens=-1 must be from 0"),
    "lengths int64": ({"cache_seqlens": np.array([1, 2])}, r"cache_seqlens\.dtype=int64 must be int32: pass cache_seq"),
    "lengths of another batch": ({"cache_seqlens": i32(1)}, r"cache_seqlens\.shape=\(1,\) must be \(2,\)"),
    "no lengths": ({"cache_seqlens": None}, r"cache_seqlens is None: pass how many keys.*behind which k and v are wri"),
    "k alone": ({"v": None}, r"of k and v one is given and one is None.*pass both or none"),
    "heads of k": ({"k": x(2, 3, 4, 16)}, r"k\.shape=\(2, 3, 4, 16\) must be \(2, new, 2, 16\)"),
    "as many v as k": ({"v": x(2, 2, 2, 16)}, r"v\.shape=\(2, 2, 2, 16\) must be.*and as many in v as in k"),
    "dtype of k": ({"k": x(2, 3, 2, 16, dtype=np.float32)}, r"k\.dtype=float32 must equal q\.dtype=float16: pass k\.a"),
    "dtype of the cache": ({"v_cache": x(2, 12, 2, 16, dtype=np.float32)}, r"v_cache\.dtype=float32 must equal q\.dty"),
    "caches differ": ({"v_cache": x(2, 11, 2, 16)}, r"v_cache\.shape=\(2, 11, 2, 16\) must be \(2, 12, 2\) and a head"),
    "a cache of 3 dimensions": ({"k_cache": x(12, 2, 16)}, r"k_cache\.shape=\(12, 2, 16\) must have 4 dimensions"),
    "head dim of the cache": ({"k_cache": x(2, 12, 2, 8)}, r"k_cache\.shape\[3\]=8 must equal q\.shape\[3\]=16"),
    "another batch": ({"k_cache": x(3, 12, 2, 16), "v_cache": x(3, 12, 2, 16)},
                      r"k_cache\.shape\[0\]=3 must equal the batch, 2: pass cache_batch_idx"),
    "q of 3 dimensions": ({"q": x(3, 4, 16)}, r"q\.shape=\(3, 4, 16\) must have 4 dimensions.*also cu_seqlens_q"),
    "no cache": ({"k_cache": None}, r"k_cache is a NoneType"),
    "index out of range": ({"cache_batch_idx": i32(0, 2)}, r"cache_batch_idx\[1\]=2 must be from 0 to 1, the last seq"),
    "index twice": ({"cache_batch_idx": i32(1, 1), "cache_seqlens": 4},
                    r"sequences 0 and 1 both append to row 4 of page \(or sequence\) 1 of the cache: give each a plac"),
    "index and pages": (PAGED | {"cache_batch_idx": i32(0, 1)}, r"cache_batch_idx is given beside block_table"),
    "leftpad": ({"cache_leftpad": i32(0, 8)}, r"cache_leftpad\[1\]=8 must be from 0 to 7, the keys of sequence 1"),
    "both names": (PAGED | {"page_table": PAGED["block_table"]}, r"block_table and page_table are both given"),
    "a page out of range": (PAGED | {"block_table": i32([0, 1, 6], [5, 4, 3])}, r"page_table\[0, 2\]=6 must be from 0"),
    "a table too short": (PAGED | {"block_table": i32([0, 1], [5, 4])}, r"cache_seqlens\[0\]=9, and 3 new.*\(2 x 4\):"),
    "pages shared": (PAGED | {"block_table": i32([0, 1, 2], [0, 2, 3]), "cache_seqlens": i32(9, 4)},
                     r"sequences 0 and 1 both append to row 1 of page \(or sequence\) 2"),
    "a table of int64": (PAGED | {"block_table": np.zeros((2, 3), int)}, r"block_table\.dtype=int64 must be int32"),
    "a table of another batch": (PAGED | {"block_table": i32([0, 1, 2])}, r"block_table\.shape=\(1, 3\) must be \(2, "),
    "rotary without k": ({"k": None, "v": None}, r"rotary_cos is given and k is None: rotate q yourself"),
    "cos alone": ({"rotary_sin": None}, r"rotary_cos and rotary_sin belong together"),
    "tables differ": ({"rotary_sin": x(11, 4)}, r"rotary_cos\.shape=\(12, 4\) and rotary_sin\.shape=\(11, 4\) must bo"),
    "tables too wide": ({"rotary_cos": x(12, 9), "rotary_sin": x(12, 9)}, r"rotary_cos\.shape\[1\]=9 must be at most "),
    "tables too short": ({"rotary_cos": x(11, 4), "rotary_sin": x(11, 4)},
                         r"rotary_cos\.shape\[0\]=11: sequence 0 needs positions 9 to 11: pass longer tables"),
    "tables of float64": ({"rotary_cos": x(12, 4, dtype=np.float64)}, r"rotary_cos\.dtype=float64 must be float16 or "),
    "positions": ({"rotary_seqlens": i32(0, 10)}, r"rotary_cos\.shape\[0\]=12: sequence 1 needs positions 10 to 12"),
    "both kinds of splits": ({"num_splits": 2, "split_size": 64}, r"num_splits=2 and split_size=64 are both given"),
    "splits below 0": ({"num_splits": -1}, r"num_splits=-1 must be an int of at least 0"),
    "parts of nothing": ({"split_size": 0}, r"split_size=0 must be a positive int or None: pass a mul"),
    "sink": ({"sink": x(3)}, r"sink\.shape=\(3,\) must be \(4,\)"),
    "window": ({"window_size": (-2, 0)}, r"window_size=\(-2, 0\): -2 must be -1"),
    "scale": ({"softmax_scale": float("nan")}, r"scale=nan must be finite"),
    "new lengths": ({"cu_seqlens_k_new": i32(0, 3, 7), "k": x(6, 2, 16), "v": x(6, 2, 16)},
                    r"cu_seqlens_k_new\[-1\]=7 must not exceed 6"),
    "lengths of no keys": ({"k": None, "v": None, "rotary_cos": None, "rotary_sin": None,
                            "cu_seqlens_k_new": i32(0, 3, 6)}, r"cu_seqlens_k_new is given and k is None"),
}  # fmt: skip
UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "qv": ({"qv": x(2, 3, 4, 16)}, r"qv: concatenate q with qv"),
    "descale": ({"k_descale": x(2, 2)}, r"k_descale: there are no arrays of 8 bits here: leave it None"),
    "margin": ({"sm_margin": 4}, r"sm_margin: leave it 0"),
}


def refused(changes: dict[str, Any], match: str, error: type[Exception], backend: str = "reference") -> None:
    arguments = right() | changes
    before = {n: a.copy() for n, a in arguments.items() if isinstance(a, np.ndarray)}
    with using(backend), pytest.raises(error, match=match) as caught:
        cuflash.flash_attn_with_kvcache(**arguments)
    assert "\n" not in str(caught.value)
    for n, a in before.items():
        np.testing.assert_array_equal(arguments[n], a, err_msg=f"{n} was written")


def test_a_kernel_that_does_not_compile_leaves_the_cache(monkeypatch):
    """Attention's kernel is compiled before the launch that appends."""
    cache, new = np.zeros((2, 16, 2, 64), np.float16), np.ones((2, 1, 2, 64), np.float16)
    q = np.ones((2, 1, 4, 64), np.float16)
    with using("emulator"):
        cuflash.flash_attn_with_kvcache(q, cache.copy(), cache.copy(), new, new, cache_seqlens=3)
        monkeypatch.setattr(cuflash.config, "on_compile", "error")
        never = lambda b, h, q_idx, kv_idx: (q_idx * 7919 + kv_idx) % 104729 > 3  # noqa: E731  compiled nowhere
        with pytest.raises(CompileError, match="would have to be compiled"):
            cuflash.flash_attn_with_kvcache(q, cache, cache.copy(), new, new, cache_seqlens=3, mask_mod=never)
    assert not cache.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments_leave_the_cache(what, backend):
    refused(*WRONG[what], ArgumentError, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mods_that_read_outside_leave_the_cache(backend):
    """Of 12 keys after appending, an array of 11 does not know the last."""
    bias = np.zeros(11, np.float32)
    mod = lambda score, b, h, q_idx, kv_idx: score + bias[kv_idx]  # noqa: E731
    refused({"score_mod": mod}, r"bias.*11.*a mod reads it there", ArgumentError, backend)


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_what_is_not_served(what):
    refused(*UNSUPPORTED[what], UnsupportedError)


def test_what_is_right():
    cuflash.flash_attn_with_kvcache(**right())
    cuflash.flash_attn_with_kvcache(**right() | PAGED)


def test_memory_that_cannot_be_written():
    cache = x(2, 12, 2, 16)
    cache.flags.writeable = False
    refused({"k_cache": cache}, r"k_cache is read-only: pass a writable array", ArgumentError)
    expanded = np.lib.stride_tricks.as_strided(x(12, 2, 16), (2, 12, 2, 16), (0, 64, 32, 2))
    refused({"v_cache": expanded}, r"v_cache\.strides=\(0, 32, 16, 1\): an expanded array", ArgumentError)
    cache = x(2, 12, 2, 16)
    refused(
        {"k_cache": cache, "v_cache": cache}, r"k_cache shares memory with v_cache, which is written too", ArgumentError
    )
    refused({"k_cache": cache, "k": cache[:, :3]}, r"k_cache shares memory with k, which is still read", ArgumentError)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["q", "k"])
def test_a_gradient_is_refused_once_it_is_asked_for(name, compiled):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    given, same = tensors(torch), tensors(torch)
    want = cuflash.flash_attn_with_kvcache(**same)
    given[name].requires_grad_()
    step = cuflash.flash_attn_with_kvcache
    if compiled:
        step = torch.compile(step, fullgraph=True, backend="aot_eager")
    out = step(**given)
    assert torch.equal(out, want) and out.requires_grad
    for cache in ("k_cache", "v_cache"):
        assert torch.equal(given[cache], same[cache]) and not given[cache].requires_grad
    with pytest.raises(
        UnsupportedError, match=r"has no gradient.*torch\.no_grad\(\).*to train, call cuflash\.attention"
    ):
        out.sum().backward()


def tensors(torch):
    return {n: torch.from_numpy(a.copy()) if isinstance(a, np.ndarray) else a for n, a in right().items()}


def test_a_cache_that_wants_a_gradient_is_not_written():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    given = tensors(torch)
    given["v_cache"].requires_grad_()
    before = given["k_cache"].clone()
    with pytest.raises(UnsupportedError, match=r"v_cache\.requires_grad is True.*pass v_cache\.detach\(\)"):
        cuflash.flash_attn_with_kvcache(**given)
    assert torch.equal(given["k_cache"], before)


def test_transformations_of_pytorch():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    given = tensors(torch)
    before = given["k_cache"].clone()
    q = given.pop("q")
    with pytest.raises(UnsupportedError, match=r"under torch\.func\.vmap: its first axis is a batch already"):
        torch.vmap(lambda q: cuflash.flash_attn_with_kvcache(q, **given))(q[None])
    assert torch.equal(given["k_cache"], before)
    with pytest.raises(UnsupportedError, match=r"has no gradient"):
        torch.func.grad(lambda q: cuflash.flash_attn_with_kvcache(q, **given).sum())(q)
    with torch.autocast("cpu"):  # casts nothing: a cache outlives the call
        assert torch.equal(cuflash.flash_attn_with_kvcache(q, **given), cuflash.flash_attn_with_kvcache(q, **given))


# Kernels --------------------------------------------------------------------------------------------------------------


DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


@pytest.mark.parametrize("dtype, d, load_bytes", [
    ("float16", 64, 16), ("bfloat16", 72, 16), ("bfloat16", 30, 4), ("float16", 17, 2), ("float32", 40, 16),
    ("float32", 11, 4),
])  # fmt: skip
@pytest.mark.parametrize("interleaved", [True, False])
def test_caches_have_the_bits_of_the_reference(rng, dtype, d, load_bytes, interleaved):
    """No queries, so that nothing but the append is launched; every load width, tables of either dtype, strides."""
    draw = lambda *shape: rng.standard_normal(shape).astype(DTYPES[dtype])  # noqa: E731
    heads, new = 3, rng.integers(1, 6)
    kv = draw(2, new, 2, heads, d)  # keys and values side by side
    for tables in {np.dtype(np.float32), np.dtype(DTYPES[dtype])}:
        dim = 2 * int(rng.integers(1, d // 2 + 1))
        cos, sin = (rng.uniform(-1, 1, (40, dim // 2)).astype(tables) for _ in range(2))
        arguments = {
            "k": kv[:, :, 0], "v": kv[:, :, 1], "rotary_cos": cos, "rotary_sin": sin,
            "cache_seqlens": i32(*rng.integers(0, 30, 2)), "rotary_interleaved": interleaved,
            "block_table": rng.permutation(12).reshape(2, 6).astype(np.int32),
        }  # fmt: skip
        caches = [np.zeros((12, 6, 2, heads, d), DTYPES[dtype]) for _ in BACKENDS]
        for backend, own in zip(BACKENDS, caches, strict=True):
            with using(backend):
                cuflash.flash_attn_with_kvcache(draw(2, 0, heads, d), own[:, :, 0], own[:, :, 1], **arguments)
        x, y = caches
        assert x.tobytes() == y.tobytes() and x[:, :, 0].any() and x[:, :, 1].any()
        assert load_bytes == last_append().load_bytes


def last_append() -> append.AppendVariant:
    """The variant of the append that was planned last."""
    from cuflash.call import cache_prepare

    plans = [p.append for p in cache_prepare.PREPARED.values() if p.append is not None]
    return plans[-1].spec.variant


@pytest.mark.parametrize("shape", [(0, 1), (2, 0), (2, 1)])
@pytest.mark.parametrize("new", [0, 2])
def test_nothing_is_legal(rng, shape, new):
    """No sequence, no query, no new key; no key at all."""
    batch, q_len = shape
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    cache, k = np.full((batch, 4, 2, 16), np.nan, np.float32), draw(batch, new, 2, 16)
    for backend in BACKENDS:
        with using(backend):
            out, lse = cuflash.flash_attn_with_kvcache(
                draw(batch, q_len, 4, 16), cache, cache.copy(), k, k, cache_seqlens=0, return_softmax_lse=True
            )
        assert out.shape == (batch, q_len, 4, 16)
        if not new:
            assert not out.any() and (lse == -np.inf).all()


def test_a_table_without_columns_is_legal(rng):
    q, pages = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 3, 4, 16), (5, 4, 2, 16)))
    for backend in BACKENDS:
        with using(backend):
            out, lse = cuflash.flash_attn_with_kvcache(
                q, pages, pages, cache_seqlens=i32(0, 0), block_table=np.zeros((2, 0), np.int32),
                return_softmax_lse=True,
            )  # fmt: skip
        assert not out.any() and (lse == -np.inf).all()


@pytest.mark.parametrize("page_size", [0, 16])
def test_keys_and_values_are_read_once(rng, page_size):
    """A step of generation, 8 query heads to a key head, at 4k."""
    length, d = 4096, 64
    q, k = (rng.standard_normal((1, 1, heads, d)).astype(np.float16) for heads in (8, 1))
    cache = rng.standard_normal((1, length + 1, 1, d)).astype(np.float16)
    arguments: dict[str, Any] = {"cache_seqlens": i32(length)}
    if page_size:
        cache = np.resize(cache, (length // page_size + 1, page_size, 1, d))
        arguments["block_table"] = rng.permutation(len(cache)).astype(np.int32)[None]
    with using("emulator"), cuflash.emulator.counting() as counters:
        cuflash.flash_attn_with_kvcache(q, cache, cache.copy(), k, k.copy(), **arguments)
    for name in "kv":
        assert counters.global_bytes_read[name] == (length + 1 + 1) * d * 2  # the new key too, where it comes from


@pytest.mark.parametrize("page_size", [0, 5])
def test_same_bits_in_any_batch(rng, page_size):
    """With split_size fixed: alone, and among others."""
    step = Step(rng, page_size=page_size, before=(5, 0, 200, 130), room=256, rotary_dim=8, causal=True)
    step.arguments["split_size"] = 64

    def attend(some: slice) -> np.ndarray:
        given = dict(step.arguments)
        caches = [x.copy() if page_size else x[some].copy() for x in step.caches]
        for name in ("k", "v", "cache_seqlens", "block_table"):
            if name in given:
                given[name] = given[name][some]
        with using("emulator"):
            return cuflash.flash_attn_with_kvcache(step.q[some], *caches, **given)

    together = attend(slice(None))
    for b in range(4):
        assert attend(slice(b, b + 1)).tobytes() == together[b : b + 1].tobytes()


def test_which_kernel(rng):
    """Few queries to a key head go to the one that splits keys, as do those that are asked to; others do not."""

    def plan(**keywords: Any) -> Any:
        step = Step(rng, **keywords.pop("step", {}))
        step.arguments |= keywords
        found = []
        with using("emulator"), pytest.MonkeyPatch.context() as patch:
            for plans in (decode.DecodePlan, forward.ForwardPlan):
                patch.setattr(plans, "launch", lambda self, *args, **kwargs: found.append(self))
            cuflash.flash_attn_with_kvcache(step.q, *step.caches, **step.arguments)
        return found[0]

    assert isinstance(plan(), decode.DecodePlan)
    assert isinstance(plan(step={"queries": 32}), decode.DecodePlan)
    assert isinstance(plan(step={"queries": 33}), forward.ForwardPlan)
    assert isinstance(plan(step={"queries": 33, "packed": True}, max_seqlen_q=8), decode.DecodePlan)
    assert isinstance(plan(step={"queries": 33}, num_splits=1), forward.ForwardPlan)
    assert isinstance(plan(step={"queries": 33}, num_splits=2), decode.DecodePlan)
    assert plan(step={"queries": 33}, split_size=128).split_size == 128
    assert [plan(step={"page_size": 256}, num_splits=n).split_size for n in (1, 2, 3, 99)] == [256, 128, 128, 64]


def test_numbers_compile_nothing(rng):
    """Lengths, batch, pages, splits, heads and head dims of one class: two variants of attention, two of the append."""
    specs = set()
    load = module.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load", lambda spec, *rest: (specs.add(spec), load(spec, *rest))[1])
        cases: tuple[dict[str, Any], ...] = (
            {"page_size": 8}, {"page_size": 3, "before": (0, 1)}, {"page_size": 64, "before": (9,) * 5},
            {"before": (4, 4)}, {"before": (4, 4), "index": True}, {"packed_new": True}, {"pad": (1, 0, 2)},
            {"rotary_dim": 8}, {"rotary_dim": 10, "interleaved": False},
        )  # fmt: skip
        for case in cases:
            for splits in ({}, {"num_splits": 2}, {"split_size": 64}):
                step = Step(rng, **case)
                step.arguments |= splits
                step.check(backend="emulator")
    names = sorted(spec.source for spec in specs)
    assert names == ["append_kv.cu", "combine.cu", "decode_plan.cu", "decode_sm80.cu", "decode_sm80.cu"]


# A step as it is launched: the bytes, and what they do.


def recorded(recorder, step: Step, kind: str, **arguments: Any) -> tuple[Any, list[Any]]:
    make = recorder.arrays[kind]
    given = {n: make(x) if isinstance(x, np.ndarray) else x for n, x in (step.arguments | arguments).items()}
    caches = [make(x) for x in step.caches]
    return cuflash.flash_attn_with_kvcache(make(step.q), *caches, **given, return_softmax_lse=True), caches


PARTS = ("decode_plan.cu", "decode_sm80.cu", "combine.cu")
LAUNCHED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "rotary, packed": (CALLS["rotary, packed"], ["append_kv.cu", *PARTS]),
    "leftpad": (CALLS["leftpad"] | {"num_splits": 2}, ["append_kv.cu", *PARTS[1:]]),
    "no new keys": (CALLS["no new keys"], [*PARTS]),
    "a chunk of a prompt": (CALLS["a chunk of a prompt"], ["append_kv.cu", "forward_sm80.cu"]),
}


@needs_nvrtc
@pytest.mark.parametrize("what", LAUNCHED)
@pytest.mark.parametrize("page_size", [0, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_recorded_bytes_give_the_right_answer(rng, what, page_size, kind):
    case, sources = LAUNCHED[what]
    splits = {n: x for n, x in case.items() if n == "num_splits"}
    step = Step(rng, page_size=page_size, **{n: x for n, x in case.items() if n not in splits})
    step.arguments |= splits
    with recording("sm_80") as recorder:
        (out, _), caches = recorded(recorder, step, kind)
        assert [launch.kernel.spec.source for launch in recorder.launches] == sources
        assert {launch.stream for launch in recorder.launches} == {STREAM}
        recorder.replay(len(sources))
        np.testing.assert_allclose(recorder.host(out).reshape(-1, HEADS, D_V), np.concatenate(step.out), atol=3e-6)
        for got, expected in zip(caches, step.expected_caches, strict=True):
            np.testing.assert_allclose(recorder.host(got), expected, atol=1e-6)


@needs_nvrtc
def test_bytes_do_not_depend_on_what_device_arrays_hold(rng):
    """So a captured graph replays right when lengths and pages in the same arrays change."""
    step = Step(rng, page_size=8, pad=(1, 0, 2), rotary_dim=8, causal=True)
    with recording() as recorder:
        recorder.capturing = True
        make = recorder.arrays["cupy stand-in"]
        given = {n: make(x) if isinstance(x, np.ndarray) else x for n, x in step.arguments.items()}
        q, caches = make(step.q), [make(x) for x in step.caches]
        for _ in range(2):
            cuflash.flash_attn_with_kvcache(q, *caches, **given)
            for name in ("cache_seqlens", "block_table", "cache_leftpad"):
                step.arguments[name][...] = 0
        first, second = recorder.launches[:4], recorder.launches[4:]
        # What each call allocates.
        scratch = {"seqused_k", "q_rotated", "out", "unit_begin", "q", "lse"}
        scratch |= {"partial_out", "partial_sum", "partial_max"}
        for a, b in zip(first, second, strict=True):
            one, other = (layout.load(x.kernel.spec.params).unpack(x.params) for x in (a, b))
            assert {n: x for n, x in one.items() if n not in scratch} == {
                n: x for n, x in other.items() if n not in scratch
            }
            assert a.grid == b.grid and a.kernel is b.kernel


@needs_nvrtc
def test_lengths_in_host_memory_beside_device_arrays(rng):
    """They are checked, copied once, and do not enter a graph."""
    step = Step(rng)
    with recording("sm_80") as recorder:
        (out, _), _ = recorded(recorder, step, "cupy stand-in", cache_seqlens=[5, 0, 13])
        assert [x.tolist() for x in recorder.uploads] == [[5, 0, 13]]
        recorder.replay(4)
        np.testing.assert_allclose(recorder.host(out).reshape(-1, HEADS, D_V), np.concatenate(step.out), atol=3e-6)
        paged = Step(rng, page_size=8)
        wide = np.full((3, 9), ABSURD, np.int32)
        wide[:, 2:5] = paged.arguments["block_table"]
        make = recorder.arrays["cupy stand-in"]
        given = {n: make(x) for n, x in paged.arguments.items()} | {"block_table": wide[:, 2:5]}
        caches = [make(x) for x in paged.caches]
        out = cuflash.flash_attn_with_kvcache(make(paged.q), *caches, **given)
        recorder.replay(4)
        np.testing.assert_allclose(recorder.host(out).reshape(-1, HEADS, D_V), np.concatenate(paged.out), atol=3e-6)
        launches = len(recorder.launches)
        with pytest.raises(ArgumentError, match=r"cache_seqlens\[1\]=22, and 3 new keys behind them"):
            recorded(recorder, step, "cupy stand-in", cache_seqlens=[5, 22, 13])
        with pytest.raises(ArgumentError, match=r"cache_seqlens\[0\]=22, and 3 new keys behind them"):
            recorded(recorder, step, "cupy stand-in", cache_seqlens=22)
        recorder.capturing = True
        with pytest.raises(ArgumentError, match=r"cache_seqlens in host memory cannot enter a CUDA graph"):
            recorded(recorder, step, "cupy stand-in", cache_seqlens=[5, 0, 13])
        assert len(recorder.launches) == launches


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [0, 8])
@pytest.mark.parametrize("what", CALLS)
def test_on_a_gpu(rng, what, page_size):
    import cupy

    Step(rng, page_size=page_size, **CALLS[what]).check(cupy.asarray, cupy.asnumpy, "auto")


@pytest.mark.gpu
@pytest.mark.parametrize("what", ["leftpad", "rotary, packed"])
def test_a_replayed_graph_reads_new_lengths(rng, what):
    """Captured with one step's lengths, pages and keys, replayed with another's."""
    import cupy

    first, second = (Step(rng, page_size=8, before=n, **CALLS[what]) for n in ((5, 1, 13), (9, 2, 6)))
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        q, *caches = (cupy.asarray(x) for x in (first.q, *first.caches))
        given = {n: cupy.asarray(x) if isinstance(x, np.ndarray) else x for n, x in first.arguments.items()}
        call = lambda: cuflash.flash_attn_with_kvcache(q, *caches, **given)  # noqa: E731
        call()  # compiles, and fills the memory pool
        stream.begin_capture()
        out = call()
        graph = stream.end_capture()
        for x, new in zip((q, *caches), (second.q, *second.caches), strict=True):
            x.set(new)
        for name, x in second.arguments.items():
            if isinstance(x, np.ndarray):
                given[name].set(x)
        graph.launch()
        stream.synchronize()
    np.testing.assert_allclose(cupy.asnumpy(out).reshape(-1, HEADS, D_V), np.concatenate(second.out), atol=3e-6)
    for got, expected in zip(caches, second.expected_caches, strict=True):
        np.testing.assert_allclose(cupy.asnumpy(got), expected, atol=1e-6)


DEVICE_KNOWN = {
    "lengths": {"cache_seqlens": i32(4, 10)}, "leftpad": {"cache_leftpad": i32(0, 8)},
    "index": {"cache_batch_idx": i32(0, 2)}, "index twice": {"cache_batch_idx": i32(1, 1), "cache_seqlens": i32(4, 4)},
    "a page": PAGED | {"block_table": i32([0, 1, 6], [5, 4, 3])}, "positions": {"rotary_seqlens": i32(0, 10)},
    "new lengths": {"cu_seqlens_k_new": i32(0, 3, 7), "k": x(6, 2, 16), "v": x(6, 2, 16)},
    "queries": {"q": x(6, 4, 16), "cu_seqlens_q": i32(0, 3, 7)},
}  # fmt: skip


@needs_nvrtc
@pytest.mark.parametrize("what", DEVICE_KNOWN)
def test_what_only_the_device_knows_is_checked_where_asked(what, monkeypatch):
    from cuflash.frameworks import cupy

    with recording("sm_80") as recorder:
        make = recorder.arrays["cupy stand-in"]
        arguments = right() | DEVICE_KNOWN[what]
        given = {n: make(a) if isinstance(a, np.ndarray) else a for n, a in arguments.items()}
        cuflash.flash_attn_with_kvcache(**given)
        count = len(recorder.launches)
        monkeypatch.setattr(cupy, "download", lambda view, stream: recorder.behind[view.ptr][1])
        monkeypatch.setattr(cuflash.config, "check", True)
        with pytest.raises(ArgumentError, match=r"\[|sequence"):
            cuflash.flash_attn_with_kvcache(**given)
        assert len(recorder.launches) == count
        cuflash.flash_attn_with_kvcache(**{n: make(a) if isinstance(a, np.ndarray) else a for n, a in right().items()})
        assert len(recorder.launches) == count + 4


@pytest.mark.parametrize("name", ["sm_80", "sm_90a"])
@needs_nvrtc
def test_machine_code(name):
    target = arch.named(name)
    for spec in append.representative(target):
        resources = module.compile(spec, target).resources
        assert (resources.spill_stores, resources.spill_loads, resources.stack_bytes) == (0, 0, 0)


KERNEL = "append_kv.cu"
BUGS = {
    "rows of the first sequence": Edit(KERNEL, "hw::load_global(cu_seqlens + sequence);", "0;"),
    "rows beyond the grid": Edit(KERNEL, "hw::grid_dim_x()) {\n    const i32 s", "rows.count) {\n    const i32 s"),
    "one slot too far": Edit(KERNEL, "const i32 slot = before + i;", "const i32 slot = before + i + 1;"),
    "the table's first column": Edit(KERNEL, "* p.page_table_stride + column", "* p.page_table_stride"),
    "the table's first row": Edit(KERNEL, "p.page_table + sequence * p.page_table_stride", "p.page_table"),
    "a slot counted from the cache's begin": Edit(KERNEL, "(slot - column * p.page_size) *", "slot *"),
    "values where keys go": Edit(KERNEL, "(keys ? p.k_cache : p.v_cache)", "(p.k_cache)"),
    "values rotated": Edit(KERNEL, "keys && p.rotary_cos != nullptr", "p.rotary_cos != nullptr"),
    "rotated from 0": Edit(KERNEL, "rotated ? start + i : -1", "rotated ? i : -1"),
    "queries all alike": Edit(KERNEL, "start + i * p.advance", "start"),
    "queries rotated where they are": Edit(KERNEL, "rows.begin * p.q_rotated_stride_row;", "0;"),
    "the other sign": Edit(KERNEL, "is_a ? xc - ys", "is_a ? xc + ys"),
    "rotated past rotary_dim": Edit(KERNEL, "if (e < p.rotary_dim) {", "if (e < p.rotary_dim + 2) {"),
    "units past the first head": Edit(KERNEL, "at = (i - head * units) * 16;", "at = i * 16;"),
    "padding counted": Edit(KERNEL, "p.capacity) - pad)", "p.capacity))"),
    "new keys not counted": Edit(KERNEL, "min_of(before + fresh.count, p.capacity)", "min_of(before, p.capacity)"),
    "lengths of the wrong array": Edit(KERNEL, "hw::load_global(p.rotary_seqlens + sequence)", "before"),
}  # fmt: skip


@pytest.mark.parametrize("name", [None, *BUGS])
def test_planted_bug_is_caught(edited, name, rng):
    steps = Step(rng, page_size=5, **CALLS["one long among many"]), Step(
        rng, page_size=5, packed=True, packed_new=True, pad=(1, 0, 2), rotary_dim=6, rotary_seqlens=(30, 2, 0),
        causal=True,
    )  # fmt: skip

    def run() -> None:
        for step in steps:
            step.check(backend="emulator")

    if name is None:
        run()
        return
    edited(BUGS[name])
    with pytest.raises((EmulatorError, AssertionError)):
        run()
