"""`BlockMask` where a program treats it as PyTorch's: sets its function, gives it arrays, takes it apart."""

from __future__ import annotations

import functools
import pickle
from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash import BlockMask, create_block_mask, create_mask, mods
from cuflash.errors import ArgumentError, UnsupportedError

torch = pytest.importorskip("torch")
flex = pytest.importorskip("torch.nn.attention.flex_attention")


def causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return q_idx >= kv_idx


def checkers(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return (q_idx + kv_idx) % 2 == 0


def near(b: Any, h: Any, q_idx: Any, kv_idx: Any, *, size: Any = 3) -> Any:
    return abs(q_idx - kv_idx) < size


def of_both(function: Any, q_len: int, kv_len: int, size: int, **keywords: Any) -> list[Any]:
    """Our mask and PyTorch's."""
    return [
        made(function, None, None, q_len, kv_len, device="cpu", BLOCK_SIZE=size, **keywords)
        for made in (create_block_mask, flex.create_block_mask)
    ]


def shown(block_mask: Any, q_len: int, kv_len: int) -> np.ndarray:
    """Which keys attention sees: by the weights of an identity."""
    q, k, v = torch.zeros(1, 1, q_len, 16), torch.zeros(1, 1, kv_len, 16), torch.eye(kv_len)[None, None]
    if isinstance(block_mask, BlockMask):
        columns = [cuflash.flex_attention(q, k, part, block_mask=block_mask) for part in v.split(128, -1)]
        return torch.cat(columns, -1)[0, 0].numpy() > 0
    flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
    try:
        return flex.flex_attention(q, k, v, block_mask=block_mask)[0, 0].numpy() > 0
    finally:
        flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = False


@pytest.mark.parametrize("function", [checkers, causal, mods.causal(), functools.partial(near, size=9)])
def test_a_function_that_is_set_decides_in_blocks_that_are_partly_seen(function: Any) -> None:
    ours, _ = of_both(causal, 100, 100, 32)
    ours.mask_mod = function
    blocks = np.kron(create_block_mask(causal, None, None, 100, 100, BLOCK_SIZE=32).kinds[0, 0], np.ones((32, 32)))
    blocks = blocks[:100, :100]
    expected = (blocks == 2) | ((blocks == 1) & np.asarray(create_mask(function, 1, 1, 100, 100)[0, 0]))
    np.testing.assert_array_equal(shown(ours, 100, 100), expected)
    assert ours.mask_mod is function
    np.testing.assert_array_equal(ours.kinds, create_block_mask(causal, None, None, 100, 100, BLOCK_SIZE=32).kinds)


def test_the_blocks_and_the_function_are_pytorchs_then() -> None:
    both = of_both(causal, 96, 96, 32)
    for block_mask in both:
        block_mask.mask_mod = checkers
    for name in BlockMask._TENSOR_ATTRS[:8]:
        np.testing.assert_array_equal(getattr(both[0], name), getattr(both[1], name))
    # What PyTorch computes: full blocks whole, the function in the others.
    full, some = (
        np.kron(flex._ordered_to_dense(count, indices, 3)[0, 0], np.ones((32, 32))).astype(bool)
        for count, indices in (
            (both[1].full_kv_num_blocks, both[1].full_kv_indices),
            (both[1].kv_num_blocks, both[1].kv_indices),
        )
    )
    i, j = np.indices((96, 96))
    np.testing.assert_array_equal(shown(both[0], 96, 96), full | (some & ((i + j) % 2 == 0)))


@pytest.mark.parametrize("position", [0, 70, 255])
@pytest.mark.parametrize("as_array", [False, True])
def test_decoding_as_gpt_fast_does(position: int, as_array: bool) -> None:
    whole = create_block_mask(causal, None, None, 256, 256, BLOCK_SIZE=64)
    row = position // 64
    block_mask = whole[:, :, torch.tensor([row]) if as_array else row]

    def shifted(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return causal(b, h, q_idx + position, kv_idx)

    block_mask.mask_mod = shifted
    block_mask.seq_lengths = (1, 256)
    assert block_mask.shape == (1, 1, 1, 256) and whole.mask_mod is causal
    np.testing.assert_array_equal(shown(block_mask, 1, 256)[0], np.arange(256) <= position)
    block_mask.mask_mod = lambda b, h, q_idx, kv_idx: kv_idx == 3  # and once more
    np.testing.assert_array_equal(shown(block_mask, 1, 256)[0], (np.arange(256) == 3) | (np.arange(256) < row * 64))


def test_lengths_that_the_blocks_cannot_have() -> None:
    block_mask = create_block_mask(causal, None, None, 100, 100, BLOCK_SIZE=64)
    with pytest.raises(ArgumentError, match=r"seq_lengths=\(100, 129\) must fit the blocks"):
        block_mask.seq_lengths = (100, 129)
    with pytest.raises(ArgumentError, match=r"seq_lengths=3 must be \(q_len, kv_len\)"):
        block_mask.seq_lengths = 3
    with pytest.raises(ArgumentError, match="mask_mod takes a score"):
        block_mask.mask_mod = lambda score, b, h, q_idx, kv_idx: score


def test_without_a_function_blocks_are_listed_as_they_were_given() -> None:
    given = torch.tensor([[[1, 2]]], dtype=torch.int32), torch.tensor([[[[0, 1], [0, 1]]]], dtype=torch.int32)
    ours, theirs = (kind.from_kv_blocks(*given, BLOCK_SIZE=64) for kind in (BlockMask, flex.BlockMask))
    for name in BlockMask._TENSOR_ATTRS:
        a, b = getattr(ours, name), getattr(theirs, name)
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b)
    assert ours.sparsity() == theirs.sparsity() == 25
    assert BlockMask.from_kv_blocks(*given, compute_q_blocks=False).q_indices is None


@pytest.mark.parametrize("keywords", [{}, {"separate_full_blocks": False}, {"compute_dq_write_order": True},
                                      {"compute_dq_write_order": True, "dq_kv_order": False}])  # fmt: skip
def test_taken_apart_and_put_together(keywords: Any) -> None:
    ours, theirs = of_both(causal, 200, 130, 32, **keywords)
    a, b = ours.as_tuple(), theirs.as_tuple()
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y) if isinstance(y, torch.Tensor) else x is y or pytest.fail(f"{x} {y}")
    assert ours.as_tuple(flatten=False)[0] == (200, 130)
    built = BlockMask((a[0], a[1]), *a[2:10], (a[-3], a[-2]), a[-1])
    leaves, spec = torch.utils._pytree.tree_flatten(ours)
    assert [x.shape for x in leaves] == [y.shape for y in theirs._flatten()[0]]
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    expected = np.tril(np.ones((200, 130), bool))
    for block_mask in (built, again):
        np.testing.assert_array_equal(shown(block_mask, 200, 130), expected)
        np.testing.assert_array_equal(block_mask.q_indices, theirs.q_indices)
    keys = [str(key[0]) for key, _ in torch.utils._pytree.tree_flatten_with_path(ours)[0]]
    assert keys[:2] == [".kv_num_blocks", ".kv_indices"]


def test_an_order_as_an_array_is_kept_and_not_divided() -> None:
    given = torch.tensor([[[1, 1]]]), torch.tensor([[[[0, 1], [1, 0]]]])
    block_mask = BlockMask.from_kv_blocks(*given, BLOCK_SIZE=8, dq_kv_order=torch.tensor([[[1, 0]]]))
    assert block_mask.dq_kv_order.tolist() == [[[1, 0]]] and block_mask.dq_write_order is None
    for use in (lambda: block_mask[0], lambda: block_mask._adjust(8, 8)):
        with pytest.raises(UnsupportedError, match="make a new mask"):
            use()


def test_arrays_are_tensors_where_pytorch_is_used() -> None:
    assert isinstance(create_block_mask(causal, None, None, 64, 64).kv_indices, torch.Tensor)
    assert isinstance(create_mask(causal, 1, 1, 4, 4), torch.Tensor)
    table = np.zeros(64, np.int32)
    assert isinstance(create_block_mask(mods.document(table), None, None, 64, 64).kv_indices, np.ndarray)


BAD_INDICES = [
    2, -3, True, None, "a", 1.0, np.array([0, 5]), np.array([0, 2, 6]), np.array([[0]]), (0, 0, 0, 0), (2**64, 0),
    10**400, np.zeros(0, np.complex64), np.broadcast_to(np.int32(0), (2**33,)),
]  # fmt: skip


@pytest.mark.parametrize("index", BAD_INDICES)
def test_a_bad_index(index: Any) -> None:
    block_mask = create_block_mask(causal, 2, 2, 64, 64)
    with pytest.raises(IndexError) as found:
        block_mask[index]
    assert isinstance(found.value, ArgumentError)


def test_arrays_on_two_axes_are_told_apart() -> None:
    block_mask = create_block_mask(causal, 2, 2, 64, 64, BLOCK_SIZE=16)
    with pytest.raises(IndexError, match=r"on axes 0 and 2: .* block_mask\[batches\]\[:, heads\]"):
        block_mask[[1, 0], :, [0, 1]]
    assert block_mask[[1, 0]][:, [0]].shape == block_mask[[1, 0], [0]].shape == (2, 1, 64, 64)


def test_indices_of_any_kind() -> None:
    block_mask = create_block_mask(causal, 2, 2, 64, 64, BLOCK_SIZE=16)
    assert block_mask[...].shape == (2, 2, 64, 64) and block_mask[..., 1].shape == (2, 2, 16, 64)
    assert block_mask[torch.tensor(1)].shape == block_mask[np.array([True, False])].shape == (1, 2, 64, 64)


# Pickled --------------------------------------------------------------------------------------------------------------

IDS = np.repeat(np.arange(4, dtype=np.int32), 16)
PICKLED = {
    "causal": lambda: mods.causal(),
    "document": lambda: mods.document(IDS, mask_mod=mods.causal()),
    "joined": lambda: mods.and_masks(causal, mods.not_mask(mods.sliding_window(3, None)), mods.or_masks(causal, near)),
    "prefixes": lambda: mods.prefix_lm([3]),
    "of a module": lambda: causal,
    "bound": lambda: functools.partial(near, size=5),
    "a part": lambda: create_block_mask(mods.causal(), 1, 1, 64, 64, BLOCK_SIZE=32)[0, 0, :2].mask_mod,
}


@pytest.mark.parametrize("name", PICKLED)
def test_masks_are_pickled(name: str) -> None:
    mask = PICKLED[name]()
    block_mask = create_block_mask(mask, None, None, 64, 64, BLOCK_SIZE=16)
    changed = create_block_mask(causal, None, None, 64, 64, BLOCK_SIZE=16)
    changed.mask_mod = mask
    for x in (block_mask, changed, create_block_mask(causal, None, None, 64, 64, BLOCK_SIZE=16)[:, :, 1:3]):
        again = pickle.loads(pickle.dumps(x))
        assert again.shape == x.shape
        np.testing.assert_array_equal(*(create_mask(y.as_mask_mod(), *x.shape) for y in (x, again)))
    np.testing.assert_array_equal(
        create_mask(pickle.loads(pickle.dumps(mask)), 1, 1, 64, 64), create_mask(mask, 1, 1, 64, 64)
    )


def test_scores_are_pickled() -> None:
    for score in (mods.alibi(4), mods.softcap(3.0), mods.relative_bias(np.ones((2, 5), np.float32)),
                  mods.compose(mods.softcap(1.0), mods.bias(np.ones((3, 3), np.float32)))):  # fmt: skip
        assert repr(pickle.loads(pickle.dumps(score))) == repr(score)


# Under torch.compile --------------------------------------------------------------------------------------------------

x = torch.randn(1, 2, 40, 16, generator=torch.Generator().manual_seed(0))
INSIDE = {
    "create_block_mask": lambda q: cuflash.flex_attention(q, q, q, block_mask=create_block_mask(causal, 1, 1, 40, 40)),
    "create_mask": lambda q: q.sum() * create_mask(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, 1, 1, 3, 3),
    "mods": lambda q: cuflash.flex_attention(q, q, q, score_mod=mods.softcap(3.0)),
    "mod": lambda q: cuflash.flex_attention(q, q, q, score_mod=cuflash.mod(lambda s, b, h, i, j: s * 2)),
    "joined": lambda q: cuflash.attention(*[q.transpose(1, 2)] * 3, mask_mod=mods.and_masks(causal, near)),
}


@pytest.mark.filterwarnings("ignore:torch.compile breaks")
@pytest.mark.parametrize("name", INSIDE)
def test_masks_are_made_under_torch_compile(name: str) -> None:
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(INSIDE[name], backend="eager")(x), INSIDE[name](x))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"make both outside of what is compiled, as score_mod = "):
        torch.compile(INSIDE[name], backend="eager", fullgraph=True)(x)


GIVEN = torch.ones(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 1, dtype=torch.int32)
OURS = create_block_mask(causal, 1, 1, 40, 40, device="cpu")
THEIRS = flex.create_block_mask(causal, 1, 1, 40, 40, device="cpu")


def changed(block_mask: Any) -> Any:
    block_mask.mask_mod = near
    return block_mask


CHANGED = {
    "indexed": lambda: OURS[0],
    "its function set": lambda: changed(create_block_mask(causal, 1, 1, 40, 40)),
    "other lengths": lambda: OURS._adjust(40, 40),
    "constructor": lambda: BlockMask((40, 40), *GIVEN, mask_mod=causal),
    "from blocks": lambda: BlockMask.from_kv_blocks(*GIVEN, mask_mod=causal, seq_lengths=(40, 40)),
    "pytorch's": lambda: THEIRS,
}


@pytest.mark.filterwarnings("ignore:torch.compile breaks")
@pytest.mark.parametrize("name", CHANGED)
def test_masks_are_changed_under_torch_compile(name: str) -> None:
    step = lambda q: cuflash.flex_attention(q, q, q, block_mask=CHANGED[name]())  # noqa: E731
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(step, backend="eager")(x), step(x))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="make both outside of what is compiled, as score_mod = "):
        torch.compile(step, backend="eager", fullgraph=True)(x)


@pytest.mark.parametrize("look", [lambda: OURS.kv_indices.sum(), lambda: OURS.sparsity(), lambda: OURS.to_dense()[0]])
def test_blocks_looked_at_under_torch_compile(look: Any) -> None:
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="make both outside of what is compiled, as score_mod = "):
        torch.compile(lambda q: q * look(), backend="eager", fullgraph=True)(x)


def test_export_that_runs_python_as_it_is_traces_functions() -> None:
    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = torch.nn.Parameter(torch.linspace(-1, 1, 80))

        def forward(self, q: Any) -> Any:
            return cuflash.flex_attention(q, q, q, lambda s, b, h, i, j: s + self.bias[i - j + 40], THEIRS)

    model = Attention()
    exported = torch.export.export(model, (x,), strict=False).module()
    torch.testing.assert_close(exported(2 * x), model(2 * x))


def test_a_mask_made_outside_is_used_inside() -> None:
    torch._dynamo.reset()
    block_mask = create_block_mask(mods.causal(), None, None, 40, 40)
    step = lambda q: cuflash.flex_attention(q, q, q, block_mask=block_mask)  # noqa: E731
    torch.testing.assert_close(torch.compile(step, backend="eager", fullgraph=True)(x), step(x))
