"""Keys in pages: the same bits as keys in one piece, whatever the page size, order and what unused memory holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from backends import using

import cuflash
from cuflash import reference
from cuflash.errors import ArgumentError, UnsupportedError

ABSURD = -(2**31)  # a page that no memory has


def in_pages(rng: np.random.Generator, sequences: list[np.ndarray], page_size: int, spare: int = 2) -> tuple[Any, Any]:
    """Pages in no order, NaN where no key is, and a table absurd where nobody may look."""
    counts = [-(-len(x) // page_size) for x in sequences]
    ids = rng.permutation(sum(counts) + spare).astype(np.int32)
    pages = np.full((len(ids), page_size, *sequences[0].shape[1:]), np.nan, sequences[0].dtype)
    table = np.full((len(sequences), max(counts, default=0) + spare), ABSURD, np.int32)
    for b, x in enumerate(sequences):
        own, ids = ids[: counts[b]], ids[counts[b] :]
        table[b, : len(own)] = own
        for n, row in enumerate(x):
            pages[own[n // page_size], n % page_size] = row
    return pages, table


def both(
    rng, page_size: int, lengths_q=(3, 1, 5, 0), lengths_k=(9, 0, 33, 4), heads=(4, 2), dims=(16, 24)
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of one packed problem: with keys in pages, and in one piece."""
    draw = lambda n, h, d: rng.standard_normal((n, h, d)).astype(np.float32)  # noqa: E731
    q = draw(sum(lengths_q), heads[0], dims[0])
    ks, vs = ([draw(n, heads[1], d) for n in lengths_k] for d in dims)
    starts_q, starts_k = (np.cumsum([0, *n]).astype(np.int32) for n in (lengths_q, lengths_k))
    state = rng.bit_generator.state
    k, table = in_pages(rng, ks, page_size)
    rng.bit_generator.state = state  # the same order of pages
    v, _ = in_pages(rng, vs, page_size)
    used = np.array(lengths_k, np.int32)
    paged = {"q": q, "k": k, "v": v, "cu_seqlens_q": starts_q, "seqused_k": used, "page_table": table}
    whole = {"q": q, "k": np.concatenate(ks), "v": np.concatenate(vs), "cu_seqlens_q": starts_q,
             "cu_seqlens_k": starts_k}  # fmt: skip
    return paged, whole


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (5, 2)},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi_slopes": np.linspace(0.1, 1, 4, dtype=np.float32)},
    "sink": {"sink": np.linspace(-1, 1, 4, dtype=np.float32)},
    "mods": {"mask_mod": lambda b, h, q_idx, kv_idx: (kv_idx + b) % 3 != h % 3,
             "score_mod": lambda score, b, h, q_idx, kv_idx, q_len, kv_len: score + (kv_idx - kv_len) * 0.1},
    "dropout": {"dropout_p": 0.4, "seed": 7, "offset": 3},
    "all": {"causal": True, "window_size": (20, 0), "softcap": 3.0, "sink": np.zeros(4, np.float32),
            "alibi_slopes": np.full((4, 4), 0.2, np.float32), "dropout_p": 0.2, "seed": 1,
            "mask_mod": lambda b, h, q_idx, kv_idx: kv_idx % 4 != 1},
}  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", "emulator"])
@pytest.mark.parametrize("page_size", [1, 3, 16, 256])
@pytest.mark.parametrize("features", FEATURES)
def test_pages_change_no_bit(rng, backend, page_size, features):
    paged, whole = both(rng, page_size)
    aux = ("lse", "max_logit")
    if features == "dropout":
        aux += ("dropout_mask",)
        whole |= {"max_seqlen_k": paged["page_table"].shape[1] * page_size}
        paged |= {"max_seqlen_q": 5}
        whole |= {"max_seqlen_q": 5}
    with using(backend):
        got = cuflash.attention(**paged, **FEATURES[features], aux=aux)
        expected = cuflash.attention(**whole, **FEATURES[features], aux=aux)
    for name in aux:
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), err_msg=name)
    np.testing.assert_array_equal(got.out, expected.out)
    assert np.isfinite(got.out).all()


@pytest.mark.parametrize("backend", ["reference", "emulator"])
def test_dense_queries_and_strided_pages(rng, backend):
    """Queries [batch, q_len, ...]; keys and values as two halves of one array; a table that is a slice of a wider."""
    paged, whole = both(rng, 4, lengths_q=(3, 3), lengths_k=(7, 12), dims=(16, 16))
    kv = np.stack([paged["k"], paged["v"]], axis=2)
    wide = np.full((2, 9), ABSURD, np.int32)
    wide[:, : paged["page_table"].shape[1]] = paged["page_table"]
    with using(backend):
        out = cuflash.attention(
            paged["q"].reshape(2, 3, 4, 16), kv[:, :, 0], kv[:, :, 1], page_table=wide[:, :5], seqused_k=[7, 12],
            seqused_q=[3, 2], causal=True,
        )  # fmt: skip
        expected = cuflash.attention(**whole, seqused_q=[3, 2], causal=True)
    np.testing.assert_array_equal(out.reshape(6, 4, 16), expected)


def test_a_page_may_belong_to_many(rng):
    """A prompt's pages, in the table of every continuation."""
    pages = rng.standard_normal((3, 4, 2, 16)).astype(np.float32)
    q = rng.standard_normal((2, 1, 2, 16)).astype(np.float32)
    table = np.array([[2, 0], [2, 1]], np.int32)
    out = cuflash.attention(q, pages, pages, page_table=table, seqused_k=[6, 7])
    for b, n in ((0, 6), (1, 7)):
        keys = pages[table[b]].reshape(1, 8, 2, 16)[:, :n]
        np.testing.assert_array_equal(out[b : b + 1], cuflash.attention(q[b : b + 1], keys, keys))


@pytest.mark.parametrize("backend", ["reference", "emulator"])
def test_nothing_at_all(backend, monkeypatch):
    """No sequence, no page, no column."""
    monkeypatch.setattr(cuflash.config, "backend", backend)
    q, k = np.ones((0, 3, 2, 16), np.float16), np.ones((5, 4, 2, 16), np.float16)
    table = np.zeros((0, 3), np.int32)
    assert cuflash.attention(q, k, k, page_table=table, seqused_k=np.zeros(0, np.int32)).shape == q.shape
    q, table = np.ones((2, 3, 2, 16), np.float16), np.zeros((2, 0), np.int32)
    result = cuflash.attention(q, k[:0], k[:0], page_table=table, seqused_k=[0, 0], aux=("lse",))
    assert not result.out.any() and (result.lse == -np.inf).all()


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_frameworks(rng, name):
    paged, whole = both(rng, 3)
    if name == "torch":
        array = pytest.importorskip("torch", reason="PyTorch is not installed").from_numpy
    else:
        array = pytest.importorskip("jax", reason="JAX is not installed").numpy.asarray
    out = cuflash.attention(**{key: array(x) for key, x in paged.items()}, causal=True)
    np.testing.assert_array_equal(np.asarray(out), cuflash.attention(**whole, causal=True))


def test_no_gradient_flows_through_pages(rng):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    paged = {key: torch.from_numpy(x) for key, x in both(rng, 3)[0].items()}
    q = paged.pop("q").requires_grad_()
    with torch.no_grad():
        expected = cuflash.attention(q, **paged)
    for attend in (cuflash.attention, torch.compile(cuflash.attention, fullgraph=True, backend="aot_eager")):
        out = attend(q, **paged)
        assert torch.equal(out, expected) and out.requires_grad
        with pytest.raises(
            UnsupportedError, match=r"page_table: keys in pages have no gradient.*torch\.no_grad\(\), or gather"
        ):
            out.sum().backward()
    with torch.autocast("cpu"):  # queries are cast, not pages
        low = q.bfloat16()
        assert torch.equal(cuflash.attention(low, **paged), cuflash.attention(low.float(), **paged))
    many = torch.stack([q.detach(), -q.detach()])
    got = torch.func.vmap(lambda q: cuflash.attention(q, **paged))(many)
    assert torch.equal(got[0], expected) and torch.equal(got[1], cuflash.attention(-q.detach(), **paged))


def test_flash_attns_name(rng):
    """flash_attn_varlen_func(block_table=): cu_seqlens_k has the lengths."""
    paged, whole = both(rng, 4)
    starts_q, starts_k = whole["cu_seqlens_q"], whole["cu_seqlens_k"]
    for starts in (starts_k, starts_k.tolist()):
        out = cuflash.flash_attn_varlen_func(
            paged["q"], paged["k"], paged["v"], starts_q, starts, 5, 33, causal=True, block_table=paged["page_table"]
        )
        np.testing.assert_array_equal(out, cuflash.attention(**whole, causal=True))


def test_recorded_launches(rng):
    """What goes to the driver: lengths and pages are read on the device, so the bytes know nothing of them."""
    from recorded import recording

    paged, _ = both(rng, 4)
    with using("emulator"):
        expected = cuflash.attention(**paged, causal=True)
    with recording("sm_80") as recorder:
        make = recorder.arrays["cupy stand-in"]
        arrays = {name: make(x) for name, x in paged.items()}
        out = cuflash.attention(**arrays, causal=True)
        recorder.replay()
        assert recorder.host(out).tobytes() == expected.tobytes()
        recorder.behind[arrays["seqused_k"].data.ptr][1][...] = 1
        cuflash.attention(**arrays, causal=True, out=out)
        before, after = recorder.launches
        assert (before.params, before.grid) == (after.params, after.grid)


# Refusals -------------------------------------------------------------------------------------------------------------

Q, K = np.ones((2, 3, 4, 16), np.float16), np.ones((6, 4, 2, 16), np.float16)
TABLE, USED = np.array([[0, 1, 2], [5, 4, 3]], np.int32), np.array([9, 4], np.int32)
RIGHT: dict[str, Any] = {"q": Q, "k": K, "v": K, "page_table": TABLE, "seqused_k": USED}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no lengths": ({"seqused_k": None}, r"page_table is given and seqused_k is not: pages have room.*pass its length"),
    "cu_seqlens_k": ({"cu_seqlens_k": [0, 9, 13]}, r"cu_seqlens_k is given beside page_table.*pass their number"),
    "a list": ({"page_table": TABLE.tolist()}, r"page_table is a list: pass an int32 array \[batch, max_pages\]"),
    "int64": ({"page_table": TABLE.astype("i8")}, r"page_table\.dtype=int64 must be int32: pass page_table\.astype"),
    "one dimension": ({"page_table": TABLE[0]}, r"page_table\.shape=\(3,\) must be \(2, max_pages\): a row a sequence"),
    "another batch": ({"page_table": TABLE[:1]}, r"page_table\.shape=\(1, 3\) must be \(2, max_pages\)"),
    "strided": ({"page_table": np.zeros((2, 6), "i4")[:, ::2]}, r"page_table\.strides=\(6, 2\).*np\.ascontiguousarray"),
    "keys of 3 dimensions": ({"k": K[0], "v": K[0]}, r"k\.shape=\(4, 2, 16\) must have 4.*\[num_pages, page_size"),
    "packed queries alone": ({"q": Q[0]}, r"q\.shape=\(3, 4, 16\) must have 4 dimensions, \[batch, q_len"),
    "dense queries": ({"cu_seqlens_q": [0, 1, 3]}, r"q\.shape=\(2, 3, 4, 16\) must have 3 dimensions, \[total_q"),
    "no cu_seqlens": ({"q": Q[0], "cu_seqlens_q": []}, r"cu_seqlens_q\.shape=\(0,\) must be \(batch \+ 1,\)"),
    "pages of nothing": ({"k": K[:, :0], "v": K[:, :0]}, r"k\.shape\[1\]=0, the page size, must be at least 1"),
    "pages of v": ({"v": K[:5]}, r"v\.shape\[0\]=5 must equal k\.shape\[0\]=6: one page table serves keys and values"),
    "page size of v": ({"v": K[:, :3]}, r"v\.shape\[1\]=3 must equal k\.shape\[1\]=4"),
    "heads of k": ({"q": Q[:, :, :3]}, r"k\.shape\[2\]=2 must divide q\.shape\[2\]=3"),
    "too many keys": ({"seqused_k": [9, 13]}, r"seqused_k\[1\]=13 must be from 0 to 12, what 3 pages of 4 hold: give"),
    "a table too short": ({"page_table": TABLE[:, :2].copy()}, r"seqused_k\[0\]=9 must be from 0 to 8, what 2 pages"),
    "keys below 0": ({"seqused_k": [-1, 0]}, r"seqused_k\[0\]=-1 must be from 0 to 12"),
    "a page past the end": (
        {"page_table": np.array([[0, 1, 6], [5, 4, 3]], np.int32)},
        r"page_table\[0, 2\]=6 must be from 0 to 5, a page of k: sequence 0 has 9 keys and looks at its first 3",
    ),
    "a page below 0": (
        {"page_table": np.array([[0, 1, 2], [-1, 9, 9]], np.int32)},
        r"page_table\[1, 0\]=-1 must be from 0 to 5, a page of k: sequence 1 has 4 keys and looks at its first 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments(monkeypatch, what):
    monkeypatch.setattr(reference, "attention", lambda *_, **__: pytest.fail("a refused call went on"))
    changes, match = WRONG[what]
    for call in (cuflash.attention, cuflash.attention, cuflash.explain):  # nothing of a refused call is remembered
        with pytest.raises(ArgumentError, match=match):
            call(**RIGHT | changes)


def test_what_was_right_is_not_right_for_ever():
    """The second call has the metadata of the first."""
    cuflash.attention(**RIGHT)
    with pytest.raises(ArgumentError, match=r"page_table\[0, 0\]=77 must be from 0 to 5"):
        cuflash.attention(**RIGHT | dict[str, Any](page_table=TABLE + 77))


def test_gradients_refuse():
    lse = np.zeros((2, 4, 3), np.float32)
    match = r"page_table: keys in pages have no gradients: gather the pages.*attention_backward"
    with pytest.raises(UnsupportedError, match=match):
        cuflash.attention_backward(Q, **RIGHT, out=Q, lse=lse)
    with pytest.raises(UnsupportedError, match=match):
        cuflash.explain(**RIGHT, backward=True)


def test_checking_mode_reads_the_table_back(monkeypatch):
    """What only the device knows, on a stand-in for one: with kernels that would serve it."""
    from recorded import recording

    from cuflash import frameworks
    from cuflash.call import prepare

    monkeypatch.setattr(cuflash.config, "check", True)
    monkeypatch.setattr(prepare, "_refuse_pages", lambda backward: None)
    with recording() as recorder:
        monkeypatch.setattr(frameworks.cupy, "download", lambda view, stream: recorder.behind[view.ptr][1])
        make = recorder.arrays["cupy stand-in"]
        for what in ("a page past the end", "a page below 0", "too many keys"):
            changes, match = WRONG[what]
            arrays = {name: make(np.asarray(x, np.int32) if name == "seqused_k" else x)
                      for name, x in (RIGHT | changes).items()}  # fmt: skip
            with pytest.raises(ArgumentError, match=match):
                cuflash.explain(**arrays)
