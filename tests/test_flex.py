"""`flex_attention`: the examples of FlexAttention's announcement, against PyTorch's own and autograd over dense scores.

Forward, out, lse and the largest score are those of `torch.nn.attention.flex_attention` on the CPU. PyTorch has no
backward there: gradients, those of captured tensors too, are those of autograd over the whole matrix of scores.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
from backends import using

import cuflash
from cuflash import (
    AuxOutput,
    AuxRequest,
    BlockMask,
    and_masks,
    attention,
    create_block_mask,
    flex_attention,
    mods,
    or_masks,
)
from cuflash.errors import ArgumentError, CuflashError

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
import torch.nn.attention.flex_attention as theirs  # noqa: E402

BATCH, HEADS, LENGTH, DIM = 2, 2, 80, 16


class Example(NamedTuple):
    score_mod: Any = None
    mask_mod: Any = None
    captured: tuple[Any, ...] = ()  # tensors that receive gradients
    tolerance: float = 2e-5
    dense: Any = None  # of the whole matrix of scores, where torch.vmap of score_mod has no gradient


EXAMPLES: dict[str, Callable[[], Example]] = {}


def example(name: str) -> Callable[[Callable[[], Example]], Callable[[], Example]]:
    return lambda make: EXAMPLES.setdefault(name, make)


def numbers(*shape: int, seed: int = 0, grad: bool = True) -> Any:
    values = np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)
    return torch.from_numpy(np.asarray(values)).requires_grad_(grad)


# Scores ---------------------------------------------------------------------------------------------------------------


@example("noop")
def _() -> Example:
    return Example(score_mod=lambda score, b, h, q_idx, kv_idx: score)


@example("relative position")
def _() -> Example:
    return Example(score_mod=lambda score, b, h, q_idx, kv_idx: score + (q_idx - kv_idx))


def alibi(slopes: Any) -> Any:
    return lambda score, b, h, q_idx, kv_idx: score + slopes[h] * (q_idx - kv_idx)


@example("ALiBi from a table")
def _() -> Example:
    slopes = torch.exp2(-8.0 * torch.arange(1, HEADS + 1) / HEADS).requires_grad_()
    return Example(score_mod=alibi(slopes), captured=(slopes,))


@example("softcap")
def _() -> Example:
    cap = 2

    def capped(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return cap * torch.tanh(score / cap)

    return Example(score_mod=capped)


@example("softcap, approximate")
def _() -> Example:
    return Example(score_mod=mods.softcap(2.0, approximate=True), tolerance=2e-3)


@example("causal as a score")
def _() -> Example:
    return Example(
        score_mod=lambda score, b, h, q_idx, kv_idx: torch.where(q_idx >= kv_idx, score, -float("inf")),
    )


BIAS: Any = None  # read by a mod, and changed between calls


def global_bias(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return score + BIAS[q_idx][kv_idx]


@example("bias from a global")
def _() -> Example:
    global BIAS
    BIAS = numbers(LENGTH, LENGTH)
    return Example(score_mod=global_bias, captured=(BIAS,), dense=lambda score: score + BIAS)


@example("bias of no dimensions")
def _() -> Example:
    temperature = torch.tensor(0.5, requires_grad=True)
    return Example(score_mod=lambda score, b, h, q_idx, kv_idx: score * temperature, captured=(temperature,))


@example("bias of each head")
def _() -> Example:
    table = numbers(HEADS, 2 * LENGTH - 1)

    def relative(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score + table[h, q_idx - kv_idx + LENGTH - 1]

    return Example(score_mod=relative, captured=(table,))


@example("a mask turned into a score")
def _() -> Example:
    def hide(mask_mod: Any) -> Any:
        def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            return torch.where(mask_mod(b, h, q_idx, kv_idx), score, -math.inf)

        return score_mod

    return Example(score_mod=hide(sliding_window_causal))


# Masks ----------------------------------------------------------------------------------------------------------------


def causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return q_idx >= kv_idx


WINDOW = 17


def sliding_window(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return q_idx - kv_idx <= WINDOW


def sliding_window_causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return (q_idx >= kv_idx) & (q_idx - kv_idx <= WINDOW)


@example("causal as a mask")
def _() -> Example:
    return Example(mask_mod=causal)


@example("window and causal in one function")
def _() -> Example:
    return Example(mask_mod=sliding_window_causal)


@example("window and causal by and_masks")
def _() -> Example:
    return Example(mask_mod=and_masks(causal, sliding_window))


@example("window and causal by PyTorch's and_masks")
def _() -> Example:
    return Example(mask_mod=theirs.and_masks(causal, sliding_window))


@example("prefix or causal by or_masks")
def _() -> Example:
    return Example(mask_mod=or_masks(causal, lambda b, h, q_idx, kv_idx: kv_idx < 20))


def prefix_lm(lengths: Any) -> Any:
    return lambda b, h, q_idx, kv_idx: (kv_idx <= lengths[b]) | (q_idx >= kv_idx)


@example("prefix of each sequence")
def _() -> Example:
    return Example(mask_mod=prefix_lm(torch.tensor([10, 60], dtype=torch.int32)))


@example("prefix, a tensor of no dimensions")
def _() -> Example:
    prefix_length = torch.tensor(30)

    def prefix(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return kv_idx <= prefix_length

    return Example(mask_mod=or_masks(causal, prefix))


LENGTHS = [30, 1, 25, 24]  # of documents in a sequence
DOCUMENTS = np.repeat(np.arange(4), LENGTHS)


@example("documents")
def _() -> Example:
    document_id = torch.from_numpy(DOCUMENTS)

    def documents(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return document_id[q_idx] == document_id[kv_idx]

    return Example(mask_mod=documents)


@example("documents around a prefix")
def _() -> Example:
    document_id = torch.from_numpy(DOCUMENTS)
    offsets = torch.tensor([0, *np.cumsum(LENGTHS)], dtype=torch.int32)

    def within(mask_mod: Any) -> Any:
        def documents(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            same = document_id[q_idx] == document_id[kv_idx]
            q_local = q_idx - offsets[document_id[q_idx]]
            kv_local = kv_idx - offsets[document_id[kv_idx]]
            return same & mask_mod(b, h, q_local, kv_local)

        return documents

    prefixes = torch.tensor([5, 12])
    return Example(mask_mod=within(prefix_lm(prefixes)))


@example("jagged sequences, window and causal")
def _() -> Example:
    sequence = torch.from_numpy(DOCUMENTS).to(torch.int32)

    def jagged(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (sequence[q_idx] == sequence[kv_idx]) & (q_idx >= kv_idx) & (q_idx - kv_idx <= 10)

    return Example(mask_mod=jagged)


@example("a bias and a mask")
def _() -> Example:
    bias = numbers(HEADS)
    return Example(lambda score, b, h, q_idx, kv_idx: score * bias[h], sliding_window_causal, (bias,))


# --- against PyTorch --------------------------------------------------------------------------------------------------


def made(name: str) -> tuple[Example, tuple[Any, Any, Any]]:
    one = EXAMPLES[name]()
    q, k, v = (numbers(BATCH, HEADS, LENGTH, DIM, seed=i) for i in range(3))
    return one, (q, k, v)


def ours_of(one: Example, backend: str) -> Any:
    block_mask = None
    if one.mask_mod is not None:
        block_mask = create_block_mask(one.mask_mod, BATCH, None, LENGTH, LENGTH)

    def call(*qkv: Any, **keywords: Any) -> Any:
        with using(backend):
            return flex_attention(*qkv, score_mod=one.score_mod, block_mask=block_mask, **keywords)

    return call


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """PyTorch's flex_attention as it is without torch.compile, and without its advice about that."""
    monkeypatch.setattr(theirs, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


BACKENDS = ["reference", "emulator"]
# Kernels of the backward take a second to compile, each example its own: every third, and with -m slow all.
BACKWARD = [
    pytest.param(name, backend, marks=pytest.mark.slow if backend == "emulator" and i % 3 else ())
    for i, name in enumerate(EXAMPLES)
    for backend in BACKENDS
]


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", EXAMPLES)
def test_forward_is_pytorchs(name: str, backend: str) -> None:
    one, qkv = made(name)
    with torch.no_grad():
        out, found = ours_of(one, backend)(*qkv, return_aux=AuxRequest(lse=True, max_scores=True))
        for expected, lse in (forward_of_pytorch(one, qkv), dense(one, *qkv)):
            assert_close(out, expected, one.tolerance)
            assert_close(found.lse, lse, one.tolerance)


def forward_of_pytorch(one: Example, qkv: Any) -> Any:
    block_mask = None
    if one.mask_mod is not None:
        mask_mod = getattr(one.mask_mod, "function", one.mask_mod)
        block_mask = theirs.create_block_mask(mask_mod, BATCH, None, LENGTH, LENGTH, "cpu")
    score_mod = getattr(one.score_mod, "function", one.score_mod)
    q, k, v = (x.detach() for x in qkv)  # it has no backward here, and refuses what wants one
    out, aux = theirs.flex_attention(
        q, k, v, score_mod=score_mod, block_mask=block_mask, return_aux=theirs.AuxRequest(lse=True)
    )
    return out, aux.lse


@pytest.mark.parametrize("name, backend", BACKWARD)
def test_gradients_are_those_of_dense_scores(name: str, backend: str) -> None:
    one, qkv = made(name)
    d_out, d_lse, expected = gradients_of_dense(one, qkv)
    keywords = dict(score_mod=one.score_mod, mask_mod=one.mask_mod)
    q, k, v, d_out = (x.detach().transpose(1, 2) for x in (*qkv, d_out))
    with using(backend), torch.no_grad():
        out, lse, *_ = attention(q, k, v, aux=("lse",), **keywords)
        found = cuflash.attention_backward(d_out, q, k, v, out, lse, dlse=d_lse, captured_grads=True, **keywords)
    for x, y in zip(found[:3], expected[:3], strict=True):
        assert_close(x.transpose(1, 2), y, one.tolerance)
    assert len(found.dcaptured) == len(one.captured)
    for x, y in zip(found.dcaptured, expected[3:], strict=True):
        assert_close(x, y, one.tolerance)


@pytest.mark.parametrize("name, backend", BACKWARD)
def test_autograd_gives_these_gradients(name: str, backend: str) -> None:
    one, qkv = made(name)
    d_out, d_lse, expected = gradients_of_dense(one, qkv)
    results = ours_of(one, backend)(*qkv, return_lse=True)
    with using(backend):
        found = torch.autograd.grad(results, (*qkv, *one.captured), (d_out, d_lse))
    for x, y in zip(found, expected, strict=True):
        assert_close(x, y, one.tolerance)


def gradients_of_dense(one: Example, qkv: Any) -> Any:
    """The gradients for out and lse, and those that follow for q, k, v and what is captured."""
    d_out = numbers(BATCH, HEADS, LENGTH, DIM, seed=7, grad=False)
    d_lse = numbers(BATCH, HEADS, LENGTH, seed=8, grad=False)
    return d_out, d_lse, torch.autograd.grad(dense(one, *qkv), (*qkv, *one.captured), (d_out, d_lse))


def dense(one: Example, q: Any, k: Any, v: Any) -> Any:
    """out, lse of the whole matrix of scores, in float64."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    score = q.double() @ k.double().mT / math.sqrt(DIM)
    if one.dense is not None:
        score = one.dense(score)
    elif one.score_mod is not None:
        f = getattr(one.score_mod, "function", one.score_mod)
        places: tuple[tuple[int | None, ...], ...] = ((0,) + (None,) * i + (0,) + (None,) * (3 - i) for i in range(4))  # type: ignore
        for axes in reversed(list(places)):
            f = torch.vmap(f, in_dims=axes)
        with TransformGetItemToIndex():
            score = f(score, *map(torch.arange, score.shape))
    if one.mask_mod is not None:
        seen = cuflash.create_mask(one.mask_mod, *score.shape, device="cpu")
        score = torch.where(seen, score, -math.inf)
    return torch.softmax(score, -1) @ v.double(), torch.logsumexp(score, -1)


def assert_close(found: Any, expected: Any, tolerance: float = 2e-5) -> None:
    found, expected = (x.detach().double() for x in (found, expected))
    assert found.shape == expected.shape
    error = (found - expected).abs().max().item()
    assert error <= tolerance * max(1.0, expected.abs().max().item()), f"largest error {error:.2e}"


# --- used again -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("backend", BACKENDS)
def test_new_values_are_seen_and_compile_nothing(backend: str) -> None:
    global BIAS, WINDOW
    q, k, v = (numbers(BATCH, HEADS, LENGTH, DIM, seed=i, grad=False) for i in range(3))
    before = cuflash.config.on_compile
    try:
        for i in range(4):
            if backend != "reference" and i == 1:
                cuflash.config.on_compile = "error"
            BIAS, WINDOW = numbers(LENGTH, LENGTH, seed=i, grad=False), 5 * i
            for one in (
                Example(score_mod=global_bias),
                Example(score_mod=alibi(numbers(HEADS, seed=i, grad=False))),
                Example(mask_mod=sliding_window_causal),
                Example(mask_mod=prefix_lm(torch.tensor([i, 9 * i]))),
            ):
                assert_close(ours_of(one, backend)(q, k, v), forward_of_pytorch(one, (q, k, v))[0])
    finally:
        cuflash.config.on_compile = before
        WINDOW = 17


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_block_mask_made_of_its_parts(backend: str) -> None:
    """Each row of blocks sees the first block in part, its own and the one before in full."""
    size, rows = 16, LENGTH // 16
    count, blocks = torch.ones(1, 1, rows, dtype=torch.int32), torch.zeros(1, 1, rows, rows, dtype=torch.int32)
    count[..., 0] = 0
    full_count = torch.tensor([[[1, 1, 2, 2, 2]]], dtype=torch.int32)
    full = torch.zeros_like(blocks)
    for i in range(rows):
        full[0, 0, i, :2] = torch.tensor([i, i - 1 if i > 1 else 0])
    parts = dict(BLOCK_SIZE=size, mask_mod=lambda b, h, q_idx, kv_idx: kv_idx % 3 == b)
    q, k, v = (numbers(BATCH, HEADS, LENGTH, DIM, seed=i, grad=False) for i in range(3))
    with using(backend):
        mask = BlockMask.from_kv_blocks(count, blocks, full_count, full, **parts)
        out = flex_attention(q, k, v, block_mask=mask)
        local = flex_attention(q, k, v, block_mask=BlockMask.from_kv_blocks(full_count, full, BLOCK_SIZE=size))
    # PyTorch's flex_attention goes by mask_mod alone on the CPU: here blocks are spread out by hand.
    spread = torch.ones(size, size, dtype=torch.bool)
    in_full = torch.kron(theirs.BlockMask.from_kv_blocks(full_count, full).to_dense().bool(), spread)
    in_part = torch.kron(theirs.BlockMask.from_kv_blocks(count, blocks).to_dense().bool(), spread)
    third = torch.arange(LENGTH) % 3 == torch.arange(BATCH)[:, None, None, None]
    for result, seen in ((out, in_full | (in_part & third)), (local, in_full)):
        score = torch.where(seen, q @ k.mT / math.sqrt(DIM), -math.inf)
        assert_close(result, torch.softmax(score, -1) @ v)


def test_partial_and_one_block_mask_through_several_layers() -> None:
    block_mask = create_block_mask(sliding_window_causal, None, None, LENGTH, LENGTH)
    layer = functools.partial(flex_attention, block_mask=block_mask, scale=0.3)
    x = numbers(1, HEADS, LENGTH, DIM)
    deep = layer(layer(layer(x, x, x), x, x), x, x)
    (gradient,) = torch.autograd.grad(deep.sum(), x)
    y = x.double()
    seen = cuflash.create_mask(sliding_window_causal, 1, 1, LENGTH, LENGTH, device="cpu")
    expected = y
    for _ in range(3):
        score = torch.where(seen, 0.3 * expected @ y.mT, -math.inf)
        expected = torch.softmax(score, -1) @ y
    assert_close(deep, expected)
    assert_close(gradient, torch.autograd.grad(expected.sum(), x)[0])


def test_compiled_with_a_block_mask_and_a_learned_bias() -> None:
    table = numbers(HEADS, 2 * LENGTH + 1)
    q, k, v = (numbers(1, HEADS, LENGTH, DIM, seed=i) for i in range(3))
    block_mask = create_block_mask(and_masks(causal, mods.sliding_window(20, 0)), None, None, LENGTH, LENGTH)
    attend = functools.partial(flex_attention, score_mod=mods.relative_bias(table), block_mask=block_mask)
    compiled = torch.compile(lambda *qkv: attend(*qkv), fullgraph=True, backend="aot_eager")
    wanted = q, k, v, table
    expected = torch.autograd.grad(attend(q, k, v).square().sum(), wanted)
    for x, y in zip(torch.autograd.grad(compiled(q, k, v).square().sum(), wanted), expected, strict=True):
        assert_close(x, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_jagged_sequences_are_packed_ones(backend: str) -> None:
    """A mask of documents over one long sequence, and packed sequences with the same mask in local indices."""
    starts = np.array([0, *np.cumsum(LENGTHS)], np.int32)
    q, k, v = (np.random.default_rng(i).standard_normal((LENGTH, 4, DIM)).astype(np.float32) for i in range(3))
    window = and_masks(causal, lambda b, h, q_idx, kv_idx: q_idx - kv_idx <= 7)
    with using(backend):
        packed = attention(q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, mask_mod=window)
        block_mask = create_block_mask(window, None, None, LENGTH, LENGTH, cu_seqlens=starts)
        out = flex_attention(*(x.swapaxes(0, 1)[None] for x in (q, k, v)), block_mask=block_mask)
    np.testing.assert_allclose(out[0].swapaxes(0, 1), packed, rtol=1e-5, atol=1e-5)


# --- FlexAttention's conventions --------------------------------------------------------------------------------------


def test_what_is_returned() -> None:
    q = numbers(1, 2, 5, DIM, grad=False)
    out = flex_attention(q, q, q)
    assert out.shape == q.shape
    pair = flex_attention(q, q, q, return_lse=True)
    assert isinstance(pair, tuple) and pair[1].shape == (1, 2, 5)
    assert_close(pair[1], torch.logsumexp(q @ q.mT / 4, -1))
    for request in (AuxRequest(), AuxRequest(lse=True), AuxRequest(max_scores=True), AuxRequest(True, True)):
        result, aux = flex_attention(q, q, q, return_aux=request)
        assert_close(result, out)
        assert isinstance(aux, AuxOutput)
        assert [x is not None for x in aux] == list(request)
        if aux.max_scores is not None:
            assert_close(aux.max_scores, (q @ q.mT / 4).amax(-1))
    result, aux = flex_attention(q, q, q, return_aux=theirs.AuxRequest(lse=True))
    assert_close(aux.lse, pair[1])


@pytest.mark.usefixtures("eager")
def test_shapes_scales_strides_and_groups() -> None:
    q, k, v = numbers(2, 30, 6, DIM, grad=False), numbers(2, 40, 2, DIM, seed=1, grad=False), numbers(2, 40, 2, 24)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.detach().transpose(1, 2)
    block_mask = create_block_mask(causal, None, None, 30, 40)
    for keywords in ({}, {"scale": 0.7}, {"scale": -0.5}):
        expected = theirs.flex_attention(
            q, k, v, block_mask=theirs.create_block_mask(causal, None, None, 30, 40, "cpu"), enable_gqa=True, **keywords
        )
        found = flex_attention(q, k, v, None, block_mask, enable_gqa=True, **keywords)
        assert found.shape == (2, 6, 30, 24)
        assert_close(found, expected)
    one_for_all = flex_attention(q, k[:1], v[:1], block_mask=block_mask, enable_gqa=True)
    assert_close(one_for_all, flex_attention(q, k[[0, 0]], v[[0, 0]], block_mask=block_mask, enable_gqa=True))


def test_nothing_is_copied() -> None:
    q = np.ones((1, 3, 2, DIM), np.float32).swapaxes(1, 2)
    out = flex_attention(q, q, q)
    assert out.swapaxes(1, 2).flags.c_contiguous  # as [batch, len, heads, d] it is whole
    ours = numbers(1, 3, 2, DIM, grad=False).transpose(1, 2)
    assert flex_attention(ours, ours, ours).stride() == ours.stride()


def test_numpy_mods_on_numpy_arrays() -> None:
    draw = np.random.default_rng(0).standard_normal
    q, bias = draw((2, 2, 20, DIM)).astype(np.float32), draw((2, 20)).astype(np.float32)

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return np.where(kv_idx % 2 == 0, score + bias[h, kv_idx], np.minimum(score, 0.5))

    out = flex_attention(q, q, q, score_mod)
    score = q @ q.swapaxes(2, 3) / 4
    score = np.where(np.arange(20) % 2 == 0, score + bias[:, None], np.minimum(score, 0.5))
    weights = np.exp(score) / np.exp(score).sum(-1, keepdims=True)
    np.testing.assert_allclose(out, weights @ q, rtol=1e-5, atol=1e-6)


def test_jax_arrays() -> None:
    jnp = pytest.importorskip("jax.numpy", reason="JAX is not installed")
    q = np.random.default_rng(0).standard_normal((1, 2, 20, DIM)).astype(np.float32)
    block_mask = create_block_mask(sliding_window_causal, None, None, 20, 20)
    out, lse = flex_attention(*[jnp.asarray(q)] * 3, block_mask=block_mask, return_lse=True)
    expected = flex_attention(q, q, q, block_mask=block_mask, return_lse=True)
    np.testing.assert_allclose(out, expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lse, expected[1], rtol=1e-5, atol=1e-6)


def test_kernel_options_are_named_in_one_warning() -> None:
    q = np.ones((1, 1, 4, DIM), np.float32)
    with pytest.warns(UserWarning, match=r"kernel_options: BLOCK_M, num_stages ignored") as caught:
        flex_attention(q, q, q, kernel_options={"BLOCK_M": 64, "num_stages": 2})
    assert len(caught) == 1 and caught[0].filename == __file__


Q = np.ones((2, 2, 8, DIM), np.float32)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: flex_attention(Q[0], Q, Q), r"query\.shape=\(2, 8, 16\) must be \[batch, heads, len, d\]; for packed"),
        (lambda: flex_attention(Q, Q.tolist(), Q), r"key is a list: pass a NumPy, CuPy, PyTorch or JAX array"),
        (lambda: flex_attention(Q, Q[:, :1], Q[:, :1]), r"query\.shape\[1\]=2 and key\.shape\[1\]=1 .*enable_gqa=True"),
        (lambda: flex_attention(Q, Q, Q, return_lse=True, return_aux=AuxRequest()), r"pass return_aux=AuxRequest"),
        (
            lambda: flex_attention(Q, Q, Q, block_mask=create_block_mask(causal, None, None, 8, 9)),
            r"block_mask is for q_len=8 and kv_len=9, and the arrays have 8 and 8: .*Q_LEN=8, KV_LEN=8",
        ),
        (
            lambda: flex_attention(Q, Q, Q, block_mask=create_block_mask(causal, 3, 1, 8, 8)),
            r"block_mask\.shape\[0\]=3 must be 1, or the batch of the call, 2: .*create_block_mask\(\.\.\., B=2\)",
        ),
        (
            lambda: flex_attention(Q, Q, Q, block_mask=create_block_mask(causal, 1, 4, 8, 8)),
            r"block_mask\.shape\[1\]=4 must be 1, or the heads of the call, 2",
        ),
        (lambda: flex_attention(Q, Q, Q, block_mask=causal), r"block_mask is a function: .* create_block_mask first"),
        (lambda: flex_attention(Q, Q, Q, score_mod=causal), r"score"),
    ],
)
def test_refused(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(CuflashError, match=says) as caught:
        call()
    assert isinstance(caught.value, ArgumentError) or "score_mod" in str(caught.value)
