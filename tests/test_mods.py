"""`cuflash.mods` against what their docstrings say, said once more here, a key at a time in plain Python."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from backends import using

import cuflash
from cuflash import mods
from cuflash.errors import ArgumentError
from cuflash.trace.expr import leaves
from cuflash.trace.intervals import classify
from cuflash.trace.tracer import bind

AUX = ("lse", "max_logit")
LENGTHS = [(7, 7), (3, 8), (8, 3), (1, 9)]  # (q_len, kv_len)


def shown(mask_mod: Any, q_len: int, kv_len: int, batch: int = 1, heads: int = 1) -> np.ndarray:
    """bool [batch, heads, q_len, kv_len], the mod called with NumPy arrays; traced it says the same."""
    mask = np.broadcast_to(call(mask_mod, (), batch, heads, q_len, kv_len), (batch, heads, q_len, kv_len))
    np.testing.assert_array_equal(cuflash.create_mask(mask_mod, batch, heads, q_len, kv_len), mask)
    return mask


def call(mod: Any, before: tuple[Any, ...], batch: int, heads: int, q_len: int, kv_len: int) -> Any:
    b, h, q, k = (np.arange(n, dtype=np.int32) for n in (batch, heads, q_len, kv_len))
    names = parameters(mod)
    lengths = {name: n for name, n in (("q_len", q_len), ("kv_len", kv_len)) if name in names}
    return mod(*before, b[:, None, None, None], h[:, None, None], q[:, None], k, **lengths)


def parameters(mod: Any) -> list[str]:
    return list(inspect.signature(getattr(mod, "function", mod)).parameters)


def plainly(sees: Callable[[int, int, int], bool], batch: int, q_len: int, kv_len: int) -> np.ndarray:
    """bool [batch, 1, q_len, kv_len] of sees(b, i, j)."""
    return np.array([[[[sees(b, i, j) for j in range(kv_len)] for i in range(q_len)]] for b in range(batch)], bool)


PREFIXES = np.array([0, 4], np.int32)
IDS = np.array([[0, 0, 1, 1, 1, 5, 5, 5], [3, 3, 3, 3, 9, 9, 9, 9]], np.int32)
STARTS = [[0, 0, 2, 2, 2, 5, 5, 5], [0, 0, 0, 0, 4, 4, 4, 4]]

MASKS: dict[str, tuple[Callable[[], Any], Callable[[int, int, int, int, int], bool]]] = {
    # (the mask, sees(b, i, j, p, kv_len)), p the position of query i among the keys
    "causal": (mods.causal, lambda b, i, j, p, n: j <= p),
    "window": (lambda: mods.sliding_window(2, 1), lambda b, i, j, p, n: p - 2 <= j <= p + 1),
    "window, left": (lambda: mods.sliding_window(2), lambda b, i, j, p, n: p - 2 <= j <= p),
    "window, right": (lambda: mods.sliding_window(None, 1), lambda b, i, j, p, n: j <= p + 1),
    "window, left alone": (lambda: mods.sliding_window(0, -1), lambda b, i, j, p, n: p <= j),
    "window, none": (lambda: mods.sliding_window(-1, None), lambda b, i, j, p, n: True),
    "prefix": (lambda: mods.prefix_lm(2), lambda b, i, j, p, n: j < 2 or j <= p),
    "prefix of b": (lambda: mods.prefix_lm(PREFIXES), lambda b, i, j, p, n: j < [0, 4][b] or j <= p),
    "prefix, 0-d": (lambda: mods.prefix_lm(np.array(3)), lambda b, i, j, p, n: j < 3 or j <= p),
    "chunked": (lambda: mods.chunked(3), lambda b, i, j, p, n: j // 3 == p // 3),
    "dilated": (lambda: mods.dilated_window(4, 2), lambda b, i, j, p, n: abs(p - j) <= 4 and (p - j) % 2 == 0),
    "noop": (lambda: mods.noop_mask, lambda b, i, j, p, n: True),
    "and": (
        lambda: mods.and_masks(mods.causal(), lambda b, h, q_idx, kv_idx: kv_idx % 2 == 0, mods.noop_mask),
        lambda b, i, j, p, n: j <= p and j % 2 == 0,
    ),
    "or": (
        lambda: mods.or_masks(lambda b, h, q_idx, kv_idx: kv_idx < 1, mods.sliding_window(0)),
        lambda b, i, j, p, n: j < 1 or j == p,
    ),
    "not": (lambda: mods.not_mask(mods.causal()), lambda b, i, j, p, n: j > p),
    "and of none": (mods.and_masks, lambda b, i, j, p, n: True),
    "or of none": (mods.or_masks, lambda b, i, j, p, n: False),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("q_len", "kv_len"), LENGTHS)
def test_a_mask_shows_what_its_text_says(name: str, q_len: int, kv_len: int) -> None:
    make, sees = MASKS[name]
    expected = plainly(lambda b, i, j: sees(b, i, j, i + kv_len - q_len, kv_len), 2, q_len, kv_len)
    np.testing.assert_array_equal(shown(make(), q_len, kv_len, batch=2), expected)


@pytest.mark.parametrize(("q_len", "kv_len"), LENGTHS)
def test_masks_are_aligned_as_the_arguments_are(q_len: int, kv_len: int, rng: np.random.Generator) -> None:
    q, k = rng.standard_normal((1, q_len, 2, 16)), rng.standard_normal((1, kv_len, 2, 16))
    arguments: dict[str, Any]
    for arguments, mask in (
        ({"causal": True}, mods.causal()),
        ({"window_size": (2, 1)}, mods.sliding_window(2, 1)),
        ({"window_size": (1, -1)}, mods.sliding_window(1, None)),
        ({"causal": True, "window_size": (3, 3)}, mods.and_masks(mods.causal(), mods.sliding_window(3, 3))),
    ):
        assert_same(
            cuflash.attention(q, k, k, mask_mod=mask, aux=AUX), cuflash.attention(q, k, k, aux=AUX, **arguments)
        )


def assert_same(result: cuflash.AttentionOutput, expected: cuflash.AttentionOutput) -> None:
    for x, y in zip(result[:3], expected[:3], strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "sees"),
    [
        pytest.param(lambda: mods.document(IDS), lambda b, i, j: IDS[b, i] == IDS[b, j], id="ids"),
        pytest.param(lambda: mods.document(IDS[0]), lambda b, i, j: IDS[0, i] == IDS[0, j], id="ids of all"),
        pytest.param(
            lambda: mods.document(IDS, kv_ids=IDS[0]), lambda b, i, j: IDS[b, i] == IDS[0, j], id="other ids of keys"
        ),
        pytest.param(
            lambda: mods.document(IDS, mask_mod=mods.causal()),
            lambda b, i, j: IDS[b, i] == IDS[b, j] and j <= i,
            id="around causal",
        ),
        pytest.param(
            lambda: mods.document(IDS, mask_mod=mods.prefix_lm(2)),
            lambda b, i, j: IDS[b, i] == IDS[b, j] and (j - STARTS[b][j] < 2 or j <= i),
            id="around a prefix, counted from the document's beginning",
        ),
        pytest.param(
            lambda: mods.document(cu_seqlens=[0, 2, 2, 5, 8]),
            lambda b, i, j: IDS[0, i] == IDS[0, j],
            id="offsets, of an empty document too",
        ),
        pytest.param(
            lambda: mods.document(cu_seqlens=np.array([0, 2, 5]), total=8, mask_mod=mods.natten_1d(2)),
            lambda b, i, j: IDS[0, i] == IDS[0, j] < 5 and (i < 2 or j - 2 in ({0, 1} if i < 4 else {1, 2})),
            id="offsets around natten, whose kernel the document's length moves; tokens behind the last see nothing",
        ),
    ],
)
def test_document(make: Callable[[], Any], sees: Callable[[int, int, int], bool]) -> None:
    np.testing.assert_array_equal(shown(make(), 8, 8, batch=2), plainly(sees, 2, 8, 8))


def test_document_ids_are_read_at_every_call() -> None:
    ids = np.array([0, 0, 1, 1])
    mask = mods.document(ids)
    before = shown(mask, 4, 4)
    ids[1] = 1
    assert (shown(mask, 4, 4) != before).any()
    np.testing.assert_array_equal(shown(mask, 4, 4)[0, 0], ids[:, None] == ids)


def clipped(i: int, kernel: int, n: int) -> range:
    """The keys of NATTEN along one axis of n."""
    first = min(max(i - kernel // 2, 0), n - kernel)
    return range(first, first + kernel)


@pytest.mark.parametrize("kernel", [1, 2, 3, 7])
def test_natten_1d(kernel: int) -> None:
    expected = plainly(lambda b, i, j: j in clipped(i, kernel, 7), 1, 7, 7)
    np.testing.assert_array_equal(shown(mods.natten_1d(kernel), 7, 7), expected)
    assert shown(mods.natten_1d(kernel), 1, 1).all()  # a kernel larger than the sequence sees it all


@pytest.mark.parametrize(("kernel", "tile"), [(3, None), ((2, 5), None), ((3, 2), (2, 3)), (1, (4, 1)), (3, (1, 6))])
def test_natten_2d(kernel: Any, tile: tuple[int, int] | None) -> None:
    height, width = 4, 6
    kernel_h, kernel_w = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    tile_h, tile_w = tile or (1, width)
    places = [
        (y + dy, x + dx)
        for y in range(0, height, tile_h)
        for x in range(0, width, tile_w)
        for dy in range(tile_h)
        for dx in range(tile_w)
    ]

    def sees(b: int, i: int, j: int) -> bool:
        (q_y, q_x), (k_y, k_x) = places[i], places[j]
        return k_y in clipped(q_y, kernel_h, height) and k_x in clipped(q_x, kernel_w, width)

    mask = shown(mods.natten_2d(height, width, kernel, tile), 24, 24)
    np.testing.assert_array_equal(mask, plainly(sees, 1, 24, 24))
    assert (mask.sum(-1) == kernel_h * kernel_w).all()


def test_image_spans() -> None:
    ranges = np.zeros((2, 8, 2), np.int32)
    ranges[0, 2:5] = 2, 5
    ranges[1, 0:3], ranges[1, 6:8] = (0, 3), (6, 8)
    spans = [[range(2, 5)], [range(3), range(6, 8)]]

    def sees(b: int, i: int, j: int) -> bool:
        return j <= i or any(i in s and j in s for s in spans[b])

    np.testing.assert_array_equal(shown(mods.image_spans(ranges), 8, 8, batch=2), plainly(sees, 2, 8, 8))
    within = plainly(lambda b, i, j: i - j in (0, 1) or any(i in s and j in s for s in spans[0]), 1, 8, 8)
    np.testing.assert_array_equal(shown(mods.image_spans(ranges[0], mods.sliding_window(1)), 8, 8), within)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
@pytest.mark.parametrize("nodes", [1, 5, 37])
def test_tree(dtype: Any, nodes: int, rng: np.random.Generator) -> None:
    parents = [[-1] + [int(rng.integers(i)) for i in range(1, nodes)] for _ in range(2)]
    sees = np.zeros((2, nodes, nodes), bool)
    for b in range(2):
        for node in range(nodes):
            at = node
            while at >= 0:
                sees[b, node, at] = True
                at = parents[b][at]
    padded = np.zeros((2, nodes, -(-nodes // 32) * 32), bool)
    padded[..., :nodes] = sees
    bits = np.packbits(padded, axis=-1, bitorder="little").view(dtype)
    expected = np.concatenate([np.ones((2, nodes, 11), bool), sees], axis=2)
    np.testing.assert_array_equal(shown(mods.tree(bits), nodes, nodes + 11, batch=2)[:, 0], expected)
    np.testing.assert_array_equal(shown(mods.tree(bits[1]), nodes, nodes + 11)[0, 0], expected[1])


EDGES = np.array([0, 37, 38, 121, 160, 256])
OF_TOKEN = np.repeat(np.arange(5), np.diff(EDGES)).astype(np.int32)
SPANS = np.zeros((256, 2), np.int32)
SPANS[40:100], SPANS[150:250] = (40, 100), (150, 250)


@pytest.mark.parametrize("lengths", [(256, 256), (130, 256)], ids=str)
@pytest.mark.parametrize(
    "make",
    [
        mods.causal,
        lambda: mods.sliding_window(40, 9),
        lambda: mods.and_masks(mods.causal(), mods.sliding_window(40)),
        lambda: mods.not_mask(mods.causal()),
        lambda: mods.prefix_lm(50),
        lambda: mods.prefix_lm(np.array([50])),
        lambda: mods.document(OF_TOKEN),
        lambda: mods.document(OF_TOKEN, mask_mod=mods.causal()),
        lambda: mods.document(cu_seqlens=EDGES, mask_mod=mods.prefix_lm(9)),
        lambda: mods.and_masks(mods.chunked(50), mods.causal()),
        lambda: mods.dilated_window(120, 40),
        lambda: mods.natten_1d(33),
        lambda: mods.natten_2d(16, 16, 5),
        lambda: mods.natten_2d(16, 16, 5, tile=(4, 4)),
        lambda: mods.image_spans(SPANS),
    ],
)
def test_tiles_that_are_empty_or_full_are_known_as_such(make: Callable[[], Any], lengths: tuple[int, int]) -> None:
    """What kernels skip, and where they need no mask: exactly as looking at every key would tell."""
    mask_mod, (q_len, kv_len), size = make(), lengths, 16
    (q_first, q_last), (k_first, k_last) = (
        (first, np.minimum(first + size, n) - 1) for n in lengths for first in [np.arange(0, n, size)]
    )
    bound = bind(None, mask_mod)
    assert bound.mods.mask is not None
    places = {"b": 0, "h": 0, "q_len": q_len, "kv_len": kv_len}
    places = {name: x for name, x in places.items() if name in leaves(bound.mods.mask)}
    queries = q_first[:, None], q_last[:, None]
    found = classify(bound.mods.mask, queries, (k_first, k_last), places, bound.arrays, bound.scalars)
    mask = shown(mask_mod, q_len, kv_len)[0, 0]
    for (i, j), kind in np.ndenumerate(np.broadcast_to(found, (len(q_first), len(k_first)))):
        tile = mask[q_first[i] : q_last[i] + 1, k_first[j] : k_last[j] + 1]
        assert kind == (2 if tile.all() else 1 if tile.any() else 0), (i, j)


# Scores ---------------------------------------------------------------------------------------------------------------


def scored(score_mod: Any, score: np.ndarray) -> np.ndarray:
    return np.broadcast_to(call(score_mod, (score,), *score.shape), score.shape)


def test_alibi_is_that_of_the_argument(rng: np.random.Generator) -> None:
    q, k = rng.standard_normal((2, 5, 4, 16)), rng.standard_normal((2, 9, 4, 16))
    paper = 2.0 ** (-8 * np.arange(1, 5, dtype=np.float32) / 4)
    for slopes, mod in (
        (paper, mods.alibi(4)),
        (paper, mods.alibi(paper)),
        (np.stack([paper, -paper]), mods.alibi(np.stack([paper, -paper]))),
    ):
        expected = cuflash.attention(q, k, k, alibi_slopes=slopes, aux=AUX)
        assert_same(cuflash.attention(q, k, k, score_mod=mod, aux=AUX), expected)


def test_softcap_is_that_of_the_argument(rng: np.random.Generator) -> None:
    q = 5 * rng.standard_normal((1, 6, 2, 16))
    expected = cuflash.attention(q, q, q, softcap=3.0, aux=AUX)
    for cap in (3.0, 3, np.array(3.0, np.float32)):
        for approximate in (False, True):
            assert_same(cuflash.attention(q, q, q, score_mod=mods.softcap(cap, approximate), aux=AUX), expected)


def test_relative_bias(rng: np.random.Generator) -> None:
    score, table = rng.standard_normal((1, 2, 4, 6)), rng.standard_normal((2, 5))
    for values in (table, table[1]):
        expected = score.copy()
        for h in range(2):
            for i in range(4):
                for j in range(6):
                    row = values[h] if values.ndim == 2 else values
                    expected[0, h, i, j] += row[min(max(j - (i + 2), -2), 2) + 2]
        np.testing.assert_array_equal(scored(mods.relative_bias(values), score), expected)


@pytest.mark.parametrize("shape", [(4, 6), (1, 6), (3, 4, 6), (1, 4, 6), (2, 3, 4, 6), (2, 1, 4, 1), (1, 1, 1, 6)])
def test_bias(shape: tuple[int, ...], rng: np.random.Generator) -> None:
    score, values = rng.standard_normal((2, 3, 4, 6)), rng.standard_normal(shape)
    np.testing.assert_array_equal(scored(mods.bias(values), score), score + values)


def test_compose_is_in_order(rng: np.random.Generator) -> None:
    score, values = rng.standard_normal((1, 1, 4, 6)), rng.standard_normal((4, 6))
    both = mods.compose(mods.bias(values), mods.softcap(2.0), mods.relative_bias(values[0, :3]))
    expected = scored(mods.relative_bias(values[0, :3]), 2 * np.tanh((score + values) / 2))
    np.testing.assert_allclose(scored(both, score), expected, rtol=1e-12)
    np.testing.assert_array_equal(scored(mods.compose(), score), score)


def test_a_mod_names_lengths_only_where_it_needs_them() -> None:
    plain = mods.and_masks(mods.noop_mask, mods.not_mask(lambda b, h, q_idx, kv_idx: kv_idx > 3))
    assert parameters(plain) == ["b", "h", "q_idx", "kv_idx"]
    assert parameters(mods.or_masks(plain, mods.causal())) == ["b", "h", "q_idx", "kv_idx", "q_len", "kv_len"]
    assert parameters(mods.compose(mods.softcap(1.0))) == ["score", "b", "h", "q_idx", "kv_idx"]


# On kernels -----------------------------------------------------------------------------------------------------------


def together(rng: np.random.Generator) -> dict[str, tuple[Any, Any, int, int]]:
    """All mods in a few kernels: (mask_mod, score_mod, q_len, kv_len), for 2 sequences and 4 heads."""
    floats = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    ids = np.sort(rng.integers(0, 5, (2, 70)), axis=1).astype(np.int32)
    ranges = np.zeros((2, 72, 2), np.int32)
    ranges[0, 5:40], ranges[1, 50:72] = (5, 40), (50, 72)
    sees = rng.random((2, 33, 33)) < 0.3
    return {
        "chunked, dilated, natten_1d; softcap, relative_bias": (
            mods.or_masks(mods.and_masks(mods.chunked(24), mods.dilated_window(40, 3)), mods.natten_1d(9)),
            mods.compose(mods.softcap(2.0), mods.relative_bias(floats(4, 41))),
            75,
            90,
        ),
        "document, prefix_lm, not, window; alibi, bias": (
            mods.or_masks(
                mods.document(ids, mask_mod=mods.prefix_lm(np.array([2, 9]))),
                mods.and_masks(mods.not_mask(mods.causal()), mods.sliding_window(0, 3)),
            ),
            mods.compose(mods.alibi(floats(2, 4)), mods.bias(floats(1, 70, 70))),
            70,
            70,
        ),
        "natten_2d, image_spans; alibi of heads": (
            mods.or_masks(mods.natten_2d(6, 12, (3, 4), tile=(3, 4)), mods.image_spans(ranges)),
            mods.alibi(4),
            72,
            72,
        ),
        "tree; approximate softcap": (
            mods.tree(np.packbits(sees, axis=-1, bitorder="little")),
            mods.softcap(np.array(1.5, np.float32), approximate=True),
            33,
            100,
        ),
    }


@pytest.mark.parametrize("name", together(np.random.default_rng()))
def test_kernels_do_what_the_reference_does(name: str, rng: np.random.Generator) -> None:
    mask_mod, score_mod, q_len, kv_len = together(rng)[name]
    features = dict(score_mod=score_mod, mask_mod=mask_mod)
    q, dout = rng.standard_normal((2, 2, q_len, 4, 32)).astype(np.float32)
    k, v = rng.standard_normal((2, 2, kv_len, 2, 32)).astype(np.float32)
    results = {}
    for backend in ("reference", "emulator"):
        with using(backend):
            result = cuflash.attention(q, k, v, aux=AUX, **features)
            grads = cuflash.attention_backward(dout, q, k, v, result.out, result.lse, captured_grads=True, **features)
            results[backend] = [*result[:3], *grads[:3], *grads.dcaptured]
    tolerance = 2e-3 if "approximate" in name else 2e-5
    for x, y in zip(*results.values(), strict=True):
        np.testing.assert_allclose(y, x, rtol=tolerance, atol=tolerance * max(1, float(np.abs(x).max())))


# Frameworks -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("torch") is None, reason="PyTorch is not installed")
def test_mods_take_tensors() -> None:
    import torch

    t = torch.from_numpy
    b, h, q, k = (torch.arange(n) for n in (2, 1, 8, 8))
    places = b[:, None, None, None], h[:, None, None], q[:, None], k
    starts = np.array([0, 2, 5, 8])
    for make in (
        lambda f: mods.document(f(IDS), mask_mod=mods.prefix_lm(f(PREFIXES))),
        lambda f: mods.document(cu_seqlens=f(starts), mask_mod=mods.natten_1d(2)),
        lambda f: mods.natten_2d(2, 4, 2, tile=(2, 2)),
    ):
        mask, same = make(t)(*places), shown(make(np.asarray), 8, 8, batch=2)
        np.testing.assert_array_equal(np.broadcast_to(mask, same.shape), same)
    table = torch.arange(5.0, requires_grad=True)
    score = torch.zeros(2, 1, 8, 8)
    (mods.compose(mods.relative_bias(table), mods.softcap(9.0))(score, *places, q_len=8, kv_len=8)).sum().backward()
    assert table.grad is not None and bool((table.grad > 0).all())


@pytest.mark.skipif(find_spec("jax") is None, reason="JAX is not installed")
def test_documents_of_jax_arrays() -> None:
    import jax.numpy as jnp

    mask = mods.document(jnp.asarray(IDS), mask_mod=mods.causal())
    np.testing.assert_array_equal(
        shown(mask, 8, 8, batch=2), shown(mods.document(IDS, mask_mod=mods.causal()), 8, 8, 2)
    )
    mask = mods.document(cu_seqlens=jnp.asarray([0, 2, 5]), total=8)
    np.testing.assert_array_equal(shown(mask, 8, 8), shown(mods.document(cu_seqlens=[0, 2, 5], total=8), 8, 8))


# Refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: mods.sliding_window(-2), r"left=-2 must be an int from 0, or -1 or None"),
        (lambda: mods.sliding_window(1, 1.5), r"right=1\.5 must be an int"),
        (lambda: mods.prefix_lm(-1), r"prefix_length=-1 must be an int of at least 0"),
        (lambda: mods.prefix_lm(np.zeros(2)), r"prefix_length\.dtype=float64 must be an integer: cast it"),
        (lambda: mods.prefix_lm(np.zeros((2, 2), int)), r"prefix_length\.shape=\(2, 2\) must be \[batch\]"),
        (lambda: mods.document(), r"either ids, .* or cu_seqlens"),
        (lambda: mods.document([0, 1], cu_seqlens=[0, 2]), r"pass one of them"),
        (lambda: mods.document([0, 1], kv_ids=[0, 1], mask_mod=mods.causal()), r"mask_mod beside kv_ids: .*and_masks"),
        (lambda: mods.document(np.zeros(3)), r"ids\.dtype=float64 must be an integer"),
        (lambda: mods.document([0, 1], mask_mod=3), r"mask_mod=3 must be a function"),
        (lambda: mods.document("ids"), r"ids is a str: pass an array, \[len\] or \[batch, len\]"),
        (lambda: mods.document(cu_seqlens=np.zeros(0, int)), r"cu_seqlens\.shape=\(0,\) must be \[documents \+ 1\]"),
        (lambda: mods.chunked(0), r"size=0 must be an int of at least 1"),
        (lambda: mods.dilated_window(3, 0), r"dilation=0 must be an int of at least 1"),
        (lambda: mods.natten_1d(True), r"kernel=True must be an int"),
        (lambda: mods.natten_2d(4, 4, 5), r"kernel=\(5, 5\) must fit the image, \(4, 4\)"),
        (lambda: mods.natten_2d(4, 4, 3, tile=(3, 2)), r"tile=\(3, 2\) must divide the image, \(4, 4\)"),
        (lambda: mods.natten_2d(4, 4, (1, 2, 3)), r"kernel=\(1, 2, 3\) must be an int, or two of them"),
        (lambda: mods.image_spans(np.zeros((4, 3), int)), r"ranges\.shape=\(4, 3\) must be \[q_len, 2\]"),
        (lambda: mods.tree(np.zeros((4, 1), np.int64)), r"bits\.dtype=int64 must be uint8 or int32: cast it"),
        (lambda: mods.alibi([0.5]), r"slopes=\[0\.5\] must be an array, .* or the number of heads"),
        (lambda: mods.alibi(np.zeros((1, 2, 3))), r"slopes\.shape=\(1, 2, 3\) must be \[heads\]"),
        (lambda: mods.softcap(0.0), r"cap=0\.0 must be a positive number"),
        (lambda: mods.softcap(np.float64("nan")), r"cap=np\.float64\(nan\) must be a positive number, at most"),
        (lambda: mods.softcap(1.0, approximate=np.ones(2)), r"approximate is a ndarray and must be True or False"),
        (lambda: mods.relative_bias(np.ndarray), r"table is a type: pass an array"),
        (lambda: mods.prefix_lm(np.int64(-1)), r"prefix_length=np\.int64\(-1\) must be an int of at least 0"),
        (
            lambda: mods.document(cu_seqlens=np.broadcast_to(np.int32(0), (2**33,))),
            r"no dimension may exceed 2147483647",
        ),
        (lambda: mods.document(cu_seqlens=[0, 2], total=2**31 - 1), r"total=2147483647: .* 268435456 is the most"),
        (lambda: cuflash.mod(mods.noop_mask, kind=np.ones(2)), r"kind=array.* must be \"score\" or \"mask\""),
        (lambda: mods.softcap(np.ones(2)), r"cap\.shape=\(2,\) must be no dimensions"),
        (lambda: mods.relative_bias(np.zeros((2, 4))), r"table\.shape=\(2, 4\) must end in an odd number"),
        (lambda: mods.bias(np.zeros(4)), r"values\.shape=\(4,\) must be"),
        (lambda: mods.and_masks(mods.causal(), None), r"mods\[1\]=None must be a function"),
        (lambda: mods.not_mask(5), r"mods\[0\]=5 must be a function"),
        (lambda: mods.compose(1), r"mods\[0\]=1 must be a function"),
    ],
)
def test_refused(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        make()


def test_the_names_of_flexattention_are_the_packages() -> None:
    for name in ("and_masks", "or_masks", "not_mask", "noop_mask"):
        assert getattr(cuflash, name) is getattr(mods, name)
