"""`flash_attn_with_kvcache` against caches put together by hand, and what it refuses with the cache untouched."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
from backends import using
from test_paging import ABSURD

import cuflash
from cuflash import reference
from cuflash.errors import ArgumentError, UnsupportedError

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
        packed_new=False, index=False, pad=None, rotary_dim=0, interleaved=True, rotary_seqlens=None, **features: Any,
    ) -> None:  # fmt: skip
        batch, draw = len(before), lambda *shape: rng.standard_normal(shape).astype(np.float32)
        lengths_q = [2, 4, 1] if packed else [3] * batch
        counts = [1, 0, 4] if packed_new else [new or 0] * batch
        self.features, self.lengths_q = features, lengths_q
        after = [b + n for b, n in zip(before, counts, strict=True)]
        self.q = draw(sum(lengths_q), HEADS, D)
        ks, vs = ([draw(n, HEADS_KV, d) for n in after] for d in (D, D_V))
        self.arguments: dict[str, Any] = {"cache_seqlens": np.array(before, np.int32), **features}
        turn_k = turn_q = lambda x, b: x
        if rotary_dim:
            angles = rng.uniform(0, 6, (40, rotary_dim // 2))
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
            columns = -(-ROOM // page_size)
            ids = rng.permutation(batch * columns + 2)[: batch * columns].reshape(batch, columns).astype(np.int32)
            shape, where = (batch * columns + 2, page_size), lambda b, n: (ids[b, n // page_size], n % page_size)
            table = ids.copy()
            for b, n in enumerate(after):
                table[b, -(-n // page_size) :] = ABSURD
            self.arguments["block_table"] = table
        else:
            lines = rng.permutation(batch + 2)[:batch].astype(np.int32) if index else np.arange(batch, dtype=np.int32)
            shape, where = (batch + 2 * index, ROOM), lambda b, n: (lines[b], n)
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
            self.q = self.q.reshape(batch, 3, HEADS, D)

    def check(self, array=np.asarray, host=np.asarray) -> None:
        caches = [array(x) for x in self.caches]
        given = {n: array(x) if isinstance(x, np.ndarray) else x for n, x in self.arguments.items()}
        out, lse, *returned = cuflash.flash_attn_with_kvcache(array(self.q), *caches, **given, return_softmax_lse=True)
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
    "full": {"before": (21, 21, 21)},
}  # fmt: skip


@pytest.mark.parametrize("where", ["in one piece", "by index", 1, 5, 8, 256])
@pytest.mark.parametrize("what", CALLS)
def test_against_caches_by_hand(rng, what, where):
    Step(rng, page_size=where if isinstance(where, int) else 0, index=where == "by index", **CALLS[what]).check()


@pytest.mark.parametrize("part", range(8))
def test_drawn_cases(part):
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
        }  # fmt: skip
        case["index"] = not case["page_size"] and bool(rng.integers(2))
        if case["rotary_dim"]:
            case["rotary_seqlens"] = some(0.3, tuple(map(int, rng.integers(0, 30, 3))))
        try:
            Step(rng, **case).check()
        except Exception as error:
            error.add_note(f"of the case {case}")
            raise


@pytest.mark.parametrize("what", ["append", "rotary, packed", "no new keys"])
@pytest.mark.parametrize("page_size", [0, 8])
def test_pytorch(rng, what, page_size):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    Step(rng, page_size=page_size, **CALLS[what]).check(torch.tensor)
    with torch.inference_mode():
        Step(rng, page_size=page_size, **CALLS[what]).check(torch.tensor)


def test_torch_compile_breaks_its_graph(rng):
    """Around an append that is made once, at its time."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    q, cache = torch.tensor(rng.standard_normal((2, 1, 2, 16))), torch.tensor(rng.standard_normal((2, 8, 2, 16)))
    lengths = torch.tensor([3, 5], dtype=torch.int32)

    def step(q, k_cache, v_cache):
        q = q * 2
        out = cuflash.flash_attn_with_kvcache(q, k_cache, v_cache, q, q, cache_seqlens=lengths, causal=True)
        return out + 1, k_cache[1, 5] - q[1, 0]

    given, compiled = ([q, cache.clone(), cache.clone()] for _ in range(2))
    expected = step(*given)
    with torch.no_grad():
        got = torch.compile(step, backend="eager")(*compiled)
    for x, y in zip((*got, *compiled), (*expected, *given), strict=True):
        assert torch.equal(x, y)
    assert not got[1].any()


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
    "q of 3 dimensions": ({"q": x(3, 4, 16)}, r"q\.shape=\(3, 4, 16\) must have 4 dimensions.*or pass cu_seqlens_q"),
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
    "parts of nothing": ({"split_size": 0}, r"split_size=0 must be an int of at least 1"),
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
    "chunk": ({"attention_chunk": 4}, r"attention_chunk: pass mask_mod"),
    "margin": ({"sm_margin": 4}, r"sm_margin: leave it 0"),
}


def refused(changes: dict[str, Any], match: str, error: type[Exception]) -> None:
    arguments = right() | changes
    before = {n: a.copy() for n, a in arguments.items() if isinstance(a, np.ndarray)}
    with pytest.raises(error, match=match) as caught:
        cuflash.flash_attn_with_kvcache(**arguments)
    assert "\n" not in str(caught.value)
    for n, a in before.items():
        np.testing.assert_array_equal(arguments[n], a, err_msg=f"{n} was written")


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments_leave_the_cache(what):
    refused(*WRONG[what], ArgumentError)


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


def test_kernels_and_gradients_refuse():
    with using("emulator"):
        refused(
            {}, r"no kernel appends to a cache.*cuflash\.attention\(q, k_cache, v_cache, seqused_k=", UnsupportedError
        )
    from recorded import recording

    with recording() as recorder:
        make = recorder.arrays["cupy stand-in"]
        arguments = {n: make(a) if isinstance(a, np.ndarray) else a for n, a in right().items()}
        with pytest.raises(UnsupportedError, match=r"no kernel appends to a cache"):
            cuflash.flash_attn_with_kvcache(**arguments)  # and nothing looked into memory
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    arguments = {n: torch.from_numpy(a) if isinstance(a, np.ndarray) else a for n, a in right().items()}
    arguments["q"].requires_grad_()
    with pytest.raises(
        UnsupportedError, match=r"has no gradient.*torch\.no_grad\(\).*to train, call cuflash\.attention"
    ):
        cuflash.flash_attn_with_kvcache(**arguments)
