"""`BlockMask` against PyTorch's, which is built from the whole mask, and against the mask itself."""

from __future__ import annotations

import tracemalloc
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash import BlockMask, block_kinds, create_block_mask, create_mask, mods
from cuflash.errors import ArgumentError, TraceError

needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="PyTorch is not installed")

IDS = np.repeat(np.arange(6, dtype=np.int32), [50, 3, 70, 1, 90, 42])  # 256 tokens
PREFIX = np.array([10, 200], np.int32)


def causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return q_idx >= kv_idx


def window(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return (q_idx >= kv_idx) & (q_idx - kv_idx <= 40)


def by_head(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return (q_idx + h * 32 >= kv_idx) | (kv_idx < 20 * b)


def nothing(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return kv_idx < q_idx * 0


def documents(ids: Any) -> Any:
    return lambda b, h, q_idx, kv_idx: ids[q_idx] == ids[kv_idx]


def prefixes(lengths: Any) -> Any:
    return lambda b, h, q_idx, kv_idx: (kv_idx < lengths[b]) | (q_idx >= kv_idx)


CASES = {  # the mask, from the captured array as each framework has it; the shape; the size of blocks
    "causal": (lambda f: causal, (None, None, 256, 256), 64),
    "window": (lambda f: window, (None, None, 256, 256), 32),
    "ends of sequences cut blocks off": (lambda f: causal, (None, None, 200, 130), 64),
    "more keys than queries": (lambda f: window, (1, 1, 64, 200), (16, 64)),
    "by batch and head": (lambda f: by_head, (3, 2, 128, 192), (64, 32)),
    "documents": (lambda f: documents(f(IDS)), (None, None, 256, 256), 32),
    "prefixes of the batch": (lambda f: prefixes(f(PREFIX)), (2, None, 256, 256), 64),
    "nothing": (lambda f: nothing, (None, 2, 64, 64), 32),
    "everything": (lambda f: mods.noop_mask, (None, None, 96, 64), 32),
}
FIELDS = [
    f"{full}{side}_{what}" for full in ("", "full_") for side in ("kv", "q") for what in ("num_blocks", "indices")
]


@needs_torch
@pytest.mark.parametrize("name", CASES)
def test_blocks_are_those_of_pytorch(name: str) -> None:
    import torch
    from torch.nn.attention import flex_attention as flex

    make, (batch, heads, q_len, kv_len), size = CASES[name]
    ours = create_block_mask(make(np.asarray), batch, heads, q_len, kv_len, BLOCK_SIZE=size)
    theirs: Any = flex.create_block_mask(make(torch.from_numpy), batch, heads, q_len, kv_len, "cpu", size)
    for field in FIELDS:
        expected = getattr(theirs, field).numpy()
        got = np.asarray(getattr(ours, field))
        assert got.dtype == expected.dtype == np.int32
        np.testing.assert_array_equal(got, expected, err_msg=field)
    np.testing.assert_array_equal(ours.to_dense(), theirs.to_dense().numpy())
    assert ours.shape == theirs.shape and ours.numel() == theirs.numel()
    assert ours.seq_lengths == theirs.seq_lengths and ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    assert ours.to_string(limit=99) == theirs.to_string(limit=99)
    assert ours.to_string((2, 3)).splitlines()[:3] == theirs.to_string((2, 3)).splitlines()[:3]
    if not q_len % ours.BLOCK_SIZE[0] and not kv_len % ours.BLOCK_SIZE[1]:
        assert ours.sparsity() == pytest.approx(theirs.sparsity())
    expected = flex.create_mask(make(torch.from_numpy), batch, heads, q_len, kv_len, "cpu").numpy()
    np.testing.assert_array_equal(create_mask(make(np.asarray), batch, heads, q_len, kv_len), expected)


@pytest.mark.parametrize("name", CASES)
def test_blocks_are_those_of_the_mask(name: str) -> None:
    make, shape, size = CASES[name]
    block_mask, mask = (
        create_block_mask(make(np.asarray), *shape, BLOCK_SIZE=size),
        create_mask(make(np.asarray), *shape),
    )
    rows, columns = block_mask.BLOCK_SIZE
    for b, h, i, j in np.ndindex(*block_mask.kinds.shape):
        block = mask[b, h, i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        full = block.all() and block.shape == (rows, columns)
        assert block_mask.kinds[b, h, i, j] == (2 if full else 1 if block.any() else 0)


def test_building_costs_nothing_and_looking_costs_blocks() -> None:
    n = 1 << 16
    tracemalloc.start()
    create_block_mask(causal, None, None, 1 << 28, 1 << 28)  # 2 ** 56 pairs
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    sparsity = create_block_mask(
        mods.and_masks(window, lambda b, h, q_idx, kv_idx: q_idx < 4096), 8, 4, n, n
    ).sparsity()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 99.8 < sparsity < 100
    assert peak < 64 << 20  # the mask itself has 2 ** 37 entries


def test_a_million_tokens_cost_what_the_outline_has() -> None:
    n, ids = 1 << 20, np.repeat(np.arange(64, dtype=np.int32), 1 << 14)
    tracemalloc.start()
    rows = n // 128
    for mask, seen in ((causal, rows * (rows + 1) // 2), (mods.document(ids), 64 * 128 * 128)):
        block_mask = create_block_mask(mask, None, None, n, n)
        assert block_mask.sparsity() == pytest.approx(100 - 100 * seen / rows**2)
        lines = block_mask.to_string((4, 4)).splitlines()
        assert lines[1][:2] == "░░" if mask is causal else lines[1][2:] == "      "
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 512 << 20


def test_many_rows_of_blocks_are_drawn_in_few_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    tall = create_block_mask(lambda b, h, q_idx, kv_idx: q_idx < 5, None, None, 1 << 28, 2)
    assert tall.to_string((4, 4)).splitlines() == ["(0, 0)", "░░", "  ", "  ", "  "]
    with pytest.raises(ArgumentError, match="pass a smaller grid_size"):
        tall.to_string(-1)
    monkeypatch.setattr(block_kinds, "_MOST", 1 << 12)
    with pytest.raises(ArgumentError, match="larger BLOCK_SIZE"):
        create_block_mask(
            lambda b, h, q_idx, kv_idx: q_idx * 7 % 3 == kv_idx, None, None, 1 << 14, 2, BLOCK_SIZE=1
        ).sparsity()


@pytest.mark.slow
def test_kinds_of_random_masks_are_those_of_the_keys() -> None:
    draw = np.random.default_rng(7)
    for _ in range(60):
        q_len, kv_len = (int(n) for n in draw.integers(1, 400, 2))
        ids = np.sort(draw.integers(0, 5, max(q_len, kv_len))).astype(np.int32)
        size = tuple(int(n) for n in draw.integers(1, 40, 2))
        first, stride = (int(n) for n in draw.integers(1, 90, 2))
        mask = [
            lambda b, h, q, k, first=first: (q - k < first) & (q >= k),
            lambda b, h, q, k, ids=ids, first=first: (ids[q] == ids[k]) | (k < first),
            lambda b, h, q, k, stride=stride: q % stride == k % stride,
        ][int(draw.integers(3))]
        block_mask, keys = (
            create_block_mask(mask, 1, 1, q_len, kv_len, BLOCK_SIZE=size),
            create_mask(mask, 1, 1, q_len, kv_len),
        )
        keys = np.asarray(keys)[0, 0]
        for i, j in np.ndindex(*block_mask.kinds.shape[2:]):
            block = keys[i * size[0] : (i + 1) * size[0], j * size[1] : (j + 1) * size[1]]
            assert block_mask.kinds[0, 0, i, j] == (
                2 if block.all() and block.shape == size else 1 if block.any() else 0
            )
        assert block_mask.sparsity() == pytest.approx(
            create_block_mask(mask, 1, 1, q_len, kv_len, BLOCK_SIZE=size).sparsity()
        )


def test_blocks_are_seen_when_looked_at_first() -> None:
    ids = IDS.copy()
    block_mask = create_block_mask(documents(ids), None, None, 256, 256, BLOCK_SIZE=32)
    ids[:] = 0
    assert block_mask.sparsity() == 0


def test_create_mask_of_a_score_mod() -> None:
    mask = create_mask(lambda score, b, h, q_idx, kv_idx: np.where(q_idx >= kv_idx, score, -np.inf), 1, 2, 5, 7)
    np.testing.assert_array_equal(mask, np.broadcast_to(np.tril(np.ones((5, 7), bool)), (1, 2, 5, 7)))


def test_masks_that_are_the_same_for_all_are_computed_once() -> None:
    block_mask = create_block_mask(causal, 64, 32, 512, 512)
    assert block_mask.kinds.shape == (64, 32, 4, 4)
    np.testing.assert_array_equal(block_mask.kinds, np.broadcast_to(block_mask.kinds[0, 0], (64, 32, 4, 4)))


def test_of_cu_seqlens() -> None:
    starts = np.array([0, 50, 53, 123, 124, 214, 256])
    alone = create_block_mask(None, None, None, 256, 256, cu_seqlens=starts)
    np.testing.assert_array_equal(create_mask(alone.mask_mod, 1, 1, 256, 256)[0, 0], IDS[:, None] == IDS)
    around = create_block_mask(lambda b, h, q_idx, kv_idx: kv_idx < 2, None, None, 256, 256, cu_seqlens=starts)
    local = np.arange(256) - starts[IDS]
    expected = (IDS[:, None] == IDS) & (local < 2)
    np.testing.assert_array_equal(create_mask(around.mask_mod, 1, 1, 256, 256)[0, 0], expected)


# Parts of a mask ------------------------------------------------------------------------------------------------------

PARTS: list[tuple[Any, tuple[Any, Any, slice]]] = [  # an index, and that of the keys
    (1, (slice(1, 2), slice(None), slice(None))),
    ((slice(None), 1), (slice(None), slice(1, 2), slice(None))),
    ((-1, slice(0, 1)), (slice(2, 3), slice(0, 1), slice(None))),
    (slice(1, 3), (slice(1, 3), slice(None), slice(None))),
    ((slice(None, None, 2), slice(None, None, -1)), (slice(None, None, 2), slice(None, None, -1), slice(None))),
    ((slice(None), slice(None), 1), (slice(None), slice(None), slice(64, 128))),
    ((0, 0, slice(1, 3)), (slice(0, 1), slice(0, 1), slice(64, 192))),
    ((np.array([2, 0, 0]), slice(None)), (np.array([2, 0, 0]), slice(None), slice(None))),
    ((slice(None), slice(None), slice(2, 4)), (slice(None), slice(None), slice(128, 230))),
]


@pytest.mark.parametrize("made_of", ["function", "blocks"])
@pytest.mark.parametrize(("index", "keys"), PARTS)
def test_a_part_is_the_mask_of_these(index: Any, keys: Any, made_of: str) -> None:
    whole = create_block_mask(by_head, 3, 2, 230, 192, BLOCK_SIZE=64)
    if made_of == "blocks":
        whole = of_its_blocks(whole)
    part, mask = whole[index], np.asarray(create_mask(whole.as_mask_mod(), *whole.shape))
    for axis, some in enumerate(keys):
        mask = mask[(slice(None),) * axis + (some,)]
    assert part.shape == mask.shape
    np.testing.assert_array_equal(create_mask(part.as_mask_mod(), *part.shape), mask)
    if keys[2].stop is None:
        np.testing.assert_array_equal(part.kinds, whole.kinds[keys[:2][0]][:, keys[1]])


def test_rows_of_blocks_by_number() -> None:
    whole = create_block_mask(window, None, None, 230, 230, BLOCK_SIZE=64)
    mask = create_mask(window, 1, 1, 230, 230)
    part = whole[:, :, np.array([0, 2, 3])]
    np.testing.assert_array_equal(create_mask(part.mask_mod, *part.shape), mask[:, :, np.r_[0:64, 128:230]])
    with pytest.raises(ArgumentError, match=r"the last row of blocks, cut off by the sequence's end, must come last"):
        whole[:, :, np.array([3, 0])]


def test_a_part_knows_the_lengths_of_the_whole() -> None:
    whole = create_block_mask(mods.causal(), None, None, 128, 256, BLOCK_SIZE=64)
    part = whole[:, :, 1]
    mask = create_mask(mods.causal(), 1, 1, 128, 256)
    np.testing.assert_array_equal(create_mask(part.mask_mod, *part.shape), mask[:, :, 64:])


def test_one_of_a_batch_serves_any_batch() -> None:
    mask = create_block_mask(by_head, 3, 2, 64, 64)[2, 1].mask_mod
    np.testing.assert_array_equal(create_mask(mask, 4, 5, 64, 64)[3, 4], create_mask(by_head, 3, 2, 64, 64)[2, 1])


@pytest.mark.parametrize("lengths", [(100, 192), (230, 64), (65, 1)])
def test_adjust_is_the_upper_left(lengths: tuple[int, int]) -> None:
    whole = create_block_mask(by_head, 3, 2, 230, 192, BLOCK_SIZE=64)
    expected = create_mask(by_head, 3, 2, 230, 192)[..., : lengths[0], : lengths[1]]
    for mask in (whole, of_its_blocks(whole)):
        adjusted = mask._adjust(*lengths)
        assert adjusted.shape == (3, 2, *lengths)
        np.testing.assert_array_equal(create_mask(adjusted.as_mask_mod(), *adjusted.shape), expected)


# Made of blocks -------------------------------------------------------------------------------------------------------


def of_its_blocks(block_mask: BlockMask, of_numpy: Any = np.asarray) -> BlockMask:
    f = lambda x: of_numpy(np.asarray(x))  # noqa: E731

    blocks = (
        block_mask.kv_num_blocks,
        block_mask.kv_indices,
        block_mask.full_kv_num_blocks,
        block_mask.full_kv_indices,
    )
    return BlockMask.from_kv_blocks(
        *map(f, blocks),
        BLOCK_SIZE=block_mask.BLOCK_SIZE,
        mask_mod=block_mask.mask_mod,
        seq_lengths=block_mask.seq_lengths,
    )


@pytest.mark.parametrize("name", CASES)
def test_a_mask_made_of_its_own_blocks_is_the_mask(name: str) -> None:
    make, shape, size = CASES[name]
    block_mask = create_block_mask(make(np.asarray), *shape, BLOCK_SIZE=size)
    again = of_its_blocks(block_mask)
    np.testing.assert_array_equal(again.kinds, block_mask.kinds)
    mask = create_mask(block_mask.mask_mod, *shape)
    np.testing.assert_array_equal(create_mask(again.as_mask_mod(), *block_mask.shape), mask)
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(again, field), getattr(block_mask, field), err_msg=field)


def test_blocks_say_what_a_full_one_hides() -> None:
    # Row 0: block 1 in part; row 1: block 0 full although the function would hide it, block 2 in part.
    block_mask = BlockMask.from_kv_blocks(
        np.array([1, 1]), np.array([[1, 0, 2], [2, 1, 0]]), np.array([0, 1]), np.array([[0, 1, 2], [0, 1, 2]]),
        BLOCK_SIZE=(2, 4), mask_mod=lambda b, h, q_idx, kv_idx: kv_idx % 2 == 1, seq_lengths=(4, 11),
    )  # fmt: skip
    expected = [".....1.1...", ".....1.1...", "1111.....1.", "1111.....1."]
    mask = create_mask(block_mask.as_mask_mod(), 1, 1, 4, 11)[0, 0]
    assert ["".join("1" if x else "." for x in row) for row in mask] == expected
    assert block_mask.shape == (1, 1, 4, 11)


def test_without_a_function_listed_blocks_are_full() -> None:
    block_mask = BlockMask.from_kv_blocks(np.array([[[2, 1]]]), np.array([[[[1, 0], [1, 0]]]]), BLOCK_SIZE=4)
    expected = np.kron([[1, 1], [0, 1]], np.ones((4, 4))).astype(bool)
    np.testing.assert_array_equal(create_mask(block_mask.as_mask_mod(), 1, 1, 8, 8)[0, 0], expected)


@needs_torch
def test_one_of_pytorchs_is_taken_by_its_blocks() -> None:
    import torch
    from torch.nn.attention import flex_attention as flex

    theirs = flex.create_block_mask(window, 2, 1, 100, 150, "cpu", 32)
    q, k = torch.randn(2, 2, 100, 16), torch.randn(2, 2, 150, 16)
    expected = cuflash.flex_attention(q, k, k, block_mask=create_block_mask(window, None, None, 100, 150))
    torch.testing.assert_close(cuflash.flex_attention(q, k, k, block_mask=theirs), expected)


@needs_torch
def test_devices() -> None:
    import torch

    for block_mask in (
        create_block_mask(causal, None, None, 256, 256, device="cpu", BLOCK_SIZE=64),
        create_block_mask(causal, None, None, 256, 256, BLOCK_SIZE=64).to(torch.device("cpu")),
        of_its_blocks(create_block_mask(causal, None, None, 256, 256, BLOCK_SIZE=64), torch.from_numpy).to("cpu"),
    ):
        assert block_mask.kv_num_blocks.dtype == torch.int32
        assert block_mask.full_kv_num_blocks.tolist() == [[[0, 1, 2, 3]]]
    assert create_mask(causal, 1, 1, 4, 4, device="cpu").dtype == torch.bool


@pytest.mark.skipif(find_spec("jax") is None, reason="JAX is not installed")
def test_of_jax_arrays() -> None:
    import jax
    import jax.numpy as jnp

    block_mask = of_its_blocks(create_block_mask(by_head, 3, 2, 128, 192, BLOCK_SIZE=64), jnp.asarray)
    assert isinstance(block_mask.kv_indices, jax.Array)
    mask = create_mask(block_mask.as_mask_mod(), 3, 2, 128, 192, device=jax.devices()[0])
    assert isinstance(mask, jax.Array)
    np.testing.assert_array_equal(mask, create_mask(by_head, 3, 2, 128, 192))


# To look at -----------------------------------------------------------------------------------------------------------


def test_texts() -> None:
    block_mask = create_block_mask(causal, 2, 3, 512, 512)
    text = str(block_mask)
    assert text.startswith("BlockMask(shape=(2, 3, 512, 512), sparsity=37.50%,\n(0, 0)\n██      \n████    \n")
    assert "... 2 more: to_string(limit=) shows more of them" in text
    assert repr(block_mask) == "BlockMask(shape=(2, 3, 512, 512), BLOCK_SIZE=(128, 128), mask_mod=causal)"
    assert "from blocks" in repr(of_its_blocks(block_mask))
    assert create_block_mask(causal, None, None, 0, 0).sparsity() == 0


def test_a_long_mask_is_drawn_in_few_characters() -> None:
    text = create_block_mask(causal, None, None, 64 * 64, 64 * 64, BLOCK_SIZE=64).to_string()
    assert len(text.splitlines()) == 1 + 16 and "░" in text  # 64 rows of blocks, four to a line
    whole = create_block_mask(causal, None, None, 64 * 64, 64 * 64, BLOCK_SIZE=64).to_string(-1)
    assert len(whole.splitlines()) == 1 + 64


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_plot() -> None:
    with pytest.raises(ArgumentError, match="nothing to draw"):
        create_block_mask(causal, None, None, 0, 0).plot()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ax = create_block_mask(by_head, 3, 2, 230, 192, BLOCK_SIZE=64).plot(b=1, h=1)
    labels = [t.get_text() for t in ax.get_legend().get_texts()]
    kinds = create_block_mask(by_head, 3, 2, 230, 192, BLOCK_SIZE=64).kinds[1, 1]
    assert labels == [f"{name}: {np.sum(kinds == i)}" for i, name in enumerate(("empty", "partly seen", "full"))]
    assert len(ax.images) == 2
    assert len(create_block_mask(causal, None, None, 4096, 4096, BLOCK_SIZE=512).plot().images) == 1
    plt.close("all")


# Refused --------------------------------------------------------------------------------------------------------------

ONE = np.array([1]), np.array([[0]])


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: create_block_mask(causal, 1, 1, np.array([1, 2]), 8), ArgumentError, r"Q_LEN=array"),
        (lambda: create_block_mask(None, 1, 1, np.array([1, 2]), 8, cu_seqlens=[0, 8]), ArgumentError, r"Q_LEN=array"),
        (lambda: create_block_mask(causal, 1, 1, 8, 8, dq_kv_order=IDS), ArgumentError, r"must be a bool"),
        (lambda: create_block_mask(causal, 1, 1, 8, 8)[True], ArgumentError, r"index True of axis 0"),
        (lambda: create_mask(3, 1, 1, 8, 8), ArgumentError, r"mod_fn=3 must be a function"),
        (lambda: mods.visible(causal, 4, -1), ArgumentError, r"kv_len=-1 must be"),
        (lambda: mods.visible(causal, np.uint64(2**63), 1), ArgumentError, r"q_len=np.uint64\(.*at most 2147483647"),
        (lambda: mods.visible(causal, 2**20, 2**20), ArgumentError, r"and 4194304 is the most: pass smaller lengths"),
        (lambda: mods.visible(int, 4, 4), ArgumentError, r"it raised TypeError"),
        (lambda: create_mask(causal, 1, 1, 2**20, 2**20), ArgumentError, r"4294967296 is the most: look at blocks"),
        (
            lambda: create_mask(causal, 1, 1, 8, 8, device=np.ones(2)),
            ArgumentError,
            r"device=array.* must be a PyTorch",
        ),
        (lambda: create_block_mask(causal, 1, 1, 8, 8, device=()), ArgumentError, r"device=\(\) must be a PyTorch"),
        (lambda: create_block_mask(causal, 1, 1, 8, 8).to(1.5), ArgumentError, r"device=1\.5 must be a PyTorch"),
        (lambda: BlockMask.from_kv_blocks(ONE[0], np.float32), ArgumentError, r"kv_indices\.shape=\(\) must be"),
        (lambda: BlockMask((128, 128), *ONE, mask_mod=None), ArgumentError, r"mask_mod=None must be a function"),
        (
            lambda: create_block_mask(causal, 1, 1, 8, 8, separate_full_blocks=np.ones(2)),
            ArgumentError,
            r"separate_full_blocks is a ndarray and must be True or False",
        ),
        (lambda: mods.image_spans([None]), ArgumentError, r"ranges=\[None\] must be"),
        (lambda: create_block_mask(None, 1, 1, 8, 8), ArgumentError, r"mask_mod is None: pass a function"),
        (lambda: create_block_mask(3, 1, 1, 8, 8), ArgumentError, r"mask_mod=3 must be a function"),
        (lambda: create_block_mask(mods.softcap(1.0), 1, 1, 8, 8), ArgumentError, r"takes a score: .* as score_mod"),
        (lambda: create_block_mask(causal, 1, 1, -8, 8), ArgumentError, r"Q_LEN=-8 must be an int of at least 0"),
        (lambda: create_block_mask(causal, 1, 1, 8, None), ArgumentError, r"KV_LEN=None must be an int"),
        (lambda: create_block_mask(causal, 1, 1.5, 8, 8), ArgumentError, r"H=1\.5 must be an int"),
        (lambda: create_block_mask(causal, 1, 1, 8, 8, BLOCK_SIZE=0), ArgumentError, r"BLOCK_SIZE\[0\]=0"),
        (
            lambda: create_block_mask(None, 1, 1, 8, 9, cu_seqlens=[0, 8]),
            ArgumentError,
            r"must be the same with cu_seq",
        ),
        (lambda: create_mask(lambda b, h: True, 1, 1, 8, 8), TraceError, r"q_idx"),
        (lambda: create_mask(documents(IDS), 1, 1, 8, 999), ArgumentError, r"no element.* index 256 is outside"),
        (lambda: create_block_mask(causal, 1, 1, 8, 8)[0, 0, 0, 0], ArgumentError, r"at most"),
        (lambda: create_block_mask(causal, 2, 1, 8, 8)[2], IndexError, r"index 2 is outside of axis 0 .* 2 elements"),
        (
            lambda: BlockMask.from_kv_blocks(*ONE, full_kv_indices=ONE[1]),
            ArgumentError,
            r"full_kv_num_blocks is missing",
        ),
        (lambda: BlockMask.from_kv_blocks(ONE[0], ONE[0]), ArgumentError, r"kv_indices\.shape=\(1,\) must be"),
        (lambda: BlockMask.from_kv_blocks(ONE[0], [[0]]), ArgumentError, r"kv_indices\.shape=\(\) must be"),
        (
            lambda: BlockMask.from_kv_blocks(ONE[0], ONE[1] * 1.0),
            ArgumentError,
            r"kv_indices is a ndarray: pass integers",
        ),
        (
            lambda: BlockMask.from_kv_blocks(np.ones(2, int), ONE[1]),
            ArgumentError,
            r"must be that of kv_indices but for",
        ),
        (lambda: BlockMask.from_kv_blocks(ONE[0], ONE[1] + 1), ArgumentError, r"has \[1\]: blocks go from 0 to 0"),
        (
            lambda: BlockMask.from_kv_blocks(*ONE, seq_lengths=(500, 9)),
            ArgumentError,
            r"shape\[-2\]=1 must be the rows",
        ),
        (
            lambda: of_its_blocks(create_block_mask(causal, 1, 1, 8, 8))._adjust(999, 8),
            ArgumentError,
            r"must not exceed",
        ),
    ],
)
def test_refused(make: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()


def test_sizes_are_of_any_integer_type() -> None:
    """Whatever their width: they are Python's ints inside."""
    small = np.uint8(64)
    made = create_block_mask(causal, np.uint8(1), None, np.uint8(128), np.uint8(128), BLOCK_SIZE=small)
    assert (made.kinds == create_block_mask(causal, 1, None, 128, 128, BLOCK_SIZE=64).kinds).all()
    listed = BlockMask.from_kv_blocks(ONE[0], ONE[1], BLOCK_SIZE=np.uint8(200))
    assert listed.seq_lengths == (200, 200) and listed.kinds.tolist() == [[[[1]]]] and type(listed.BLOCK_SIZE[0]) is int
    assert made.to_string(grid_size=(np.uint8(20), np.uint8(20))) == made.to_string(grid_size=[20, 20])


def test_the_size_of_blocks_is_kept():
    mask = cuflash.create_block_mask(mods.causal(), None, None, 256, 256)
    with pytest.raises(ArgumentError, match=r"BLOCK_SIZE=64 cannot be set, for blocks of \(128, 128\)"):
        mask.BLOCK_SIZE = 64
    assert mask.BLOCK_SIZE == (128, 128)


@pytest.mark.parametrize("wrong", [[[1, 2], [3]], [[0], []]])
def test_indices_of_unequal_lengths_are_refused(wrong):
    mask = cuflash.create_block_mask(mods.causal(), None, None, 256, 256)
    with pytest.raises(IndexError, match="pass ints, slices or arrays of ints"):
        mask[wrong]
    with pytest.raises(ArgumentError, match="pass ints, slices or arrays of ints"):
        mask.plot(b=wrong)
    with pytest.raises(ArgumentError, match="flatten is a list and must be True or False"):
        mask.as_tuple(flatten=wrong)
