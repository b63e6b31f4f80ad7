"""PyTorch's flash backend as cuflash: SDPA and varlen_attn, forward and backward.

On a CPU PyTorch gives SDPA to another operator than on CUDA; here that one is led to CUDA's, which are ours.
"""

from __future__ import annotations

import pytest

import cuflash
from cuflash.integrations import torch as registry

torch = pytest.importorskip("torch")
attention = pytest.importorskip("torch.nn.attention")
if not hasattr(attention, "register_flash_attention_impl"):
    pytest.skip("this PyTorch has no registry of flash-attention implementations", allow_module_level=True)
varlen_attn = pytest.importorskip("torch.nn.attention.varlen").varlen_attn
scaled_dot_product_attention = torch.nn.functional.scaled_dot_product_attention

ATEN = torch.ops.aten
CALLS: list[str] = []


def forward_for_cpu(query, key, value, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    assert attn_mask is None
    found = ATEN._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)
    return found[0], found[1]


def backward_for_cpu(grad, query, key, value, out, lse, dropout_p, is_causal, *, attn_mask=None, scale=None):
    nothing = torch.empty(0, dtype=torch.uint64)
    lengths = query.shape[2], key.shape[2]
    return ATEN._scaled_dot_product_flash_attention_backward(
        grad, query, key, value, out, lse, None, None, *lengths, dropout_p, is_causal, nothing, nothing, scale=scale
    )


@pytest.fixture
def active(monkeypatch):
    """cuflash for CPU tensors, as `activate_flash_attention_impl` makes it for those on CUDA."""
    CALLS.clear()
    for name in ("attention", "attention_backward"):
        plain = getattr(registry.api, name)
        monkeypatch.setattr(
            registry.api, name, lambda *a, plain=plain, name=name, **kw: CALLS.append(name) or plain(*a, **kw)
        )

    def activated():
        handle = registry.activated("CPU")
        library = handle._library
        library.impl("_scaled_dot_product_flash_attention_for_cpu", forward_for_cpu, "CPU", allow_override=True)
        library.impl(
            "_scaled_dot_product_flash_attention_for_cpu_backward", backward_for_cpu, "CPU", allow_override=True
        )
        return handle

    attention.register_flash_attention_impl("cuflash on CPU", register_fn=activated)
    attention.activate_flash_attention_impl("cuflash on CPU")
    yield
    attention.restore_flash_attention_impl()


def drawn(*shapes, seed=0, dtype=torch.float32):
    made = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=made, dtype=dtype).requires_grad_() for shape in shapes]


def values(function, arrays, weights):
    out = function(*arrays)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), arrays)]


def plain(q, k, v, causal=False, scale=None):
    """SDPA by its formula."""
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("causal, scale", [(False, None), (True, None), (True, 0.3)])
def test_sdpa(active, causal, scale):
    arrays = drawn((2, 4, 20, 32), (2, 4, 20, 32), (2, 4, 20, 32))
    weights = torch.randn(2, 4, 20, 32)
    found = values(lambda *x: scaled_dot_product_attention(*x, is_causal=causal, scale=scale), arrays, weights)
    assert CALLS == ["attention", "attention_backward"]
    expected = values(lambda *x: plain(*x, causal, scale), arrays, weights)
    for x, right in zip(found, expected, strict=True):
        torch.testing.assert_close(x, right, atol=2e-5, rtol=1e-4)


def test_a_gradient_that_is_one_element_everywhere(active):
    arrays = drawn((1, 2, 9, 16), (1, 2, 9, 16), (1, 2, 9, 16))
    scaled_dot_product_attention(*arrays).sum().backward()
    right = values(plain, [x.detach().requires_grad_() for x in arrays], torch.ones(1, 2, 9, 16))[1:]
    for x, grad in zip(arrays, right, strict=True):
        torch.testing.assert_close(x.grad, grad, atol=1e-5, rtol=1e-4)


def test_dropout_is_drawn_by_torch_and_the_same_backward(active):
    q, k, v = drawn((1, 2, 64, 16), (1, 2, 64, 16), (1, 2, 64, 16))

    def step(seed):
        torch.manual_seed(seed)
        found = ATEN._scaled_dot_product_flash_attention(q, k, v, 0.5, False)
        out, lse, state, unused = found[0], found[1], found[6], found[7]
        assert state.dtype == torch.uint64 and state.shape == (2,) and unused.shape == ()
        grads = ATEN._scaled_dot_product_flash_attention_backward(
            torch.ones_like(out), q, k, v, out, lse, None, None, 64, 64, 0.5, False, state, unused
        )
        return out, grads

    with torch.no_grad():
        (a, grads), (b, _), (c, _) = step(1), step(1), step(2)
    assert torch.equal(a, b) and not torch.equal(a, c)
    # out is linear in v: with all-ones dout, dv's rows sum to the sum of the weights that are kept.
    torch.testing.assert_close((grads[2] * v).sum(), a.sum(), atol=1e-3, rtol=1e-4)


STARTS = torch.tensor([0, 7, 20], dtype=torch.int32)


@pytest.mark.parametrize(
    "window, ours", [((-1, -1), {}), ((-1, 0), {"causal": True}), ((4, 0), {"window_size": (4, 0)})]
)
def test_varlen_attn(active, window, ours):
    arrays = drawn((20, 4, 32), (20, 2, 32), (20, 2, 32))
    weights = torch.randn(20, 4, 32)
    found = values(
        lambda *x: varlen_attn(*x, STARTS, STARTS, 13, 13, window_size=window, enable_gqa=True), arrays, weights
    )
    assert CALLS == ["attention", "attention_backward"]
    right = values(lambda *x: cuflash.attention(*x, cu_seqlens_q=STARTS, cu_seqlens_k=STARTS, **ours), arrays, weights)
    for x, expected in zip(found, right, strict=True):
        torch.testing.assert_close(x, expected, atol=1e-6, rtol=1e-5)


def test_varlen_attn_of_pages(active):
    q, k, v = (x.detach() for x in drawn((3, 2, 32), (4, 16, 2, 32), (4, 16, 2, 32)))
    starts, used = torch.tensor([0, 1, 3], dtype=torch.int32), torch.tensor([5, 20], dtype=torch.int32)
    table = torch.tensor([[0, 1], [3, 2]], dtype=torch.int32)
    found = varlen_attn(q, k, v, starts, None, 2, 32, seqused_k=used, block_table=table)
    right = cuflash.attention(q, k, v, cu_seqlens_q=starts, seqused_k=used, page_table=table)
    assert torch.equal(found, right) and CALLS[0] == "attention"


def test_written_into_out(active):
    q, k, v = (x.detach() for x in drawn((20, 2, 32), (20, 2, 32), (20, 2, 32)))
    out = torch.full_like(q, torch.nan)
    lse = ATEN._flash_attention_forward_no_dropout_inplace(out, q, k, v, STARTS, STARTS, 13, 13, 0.0, True, False)
    right = cuflash.attention(q, k, v, cu_seqlens_q=STARTS, cu_seqlens_k=STARTS, causal=True, aux=("lse",))
    assert torch.equal(out, right.out) and torch.equal(lse, right.lse)


def test_under_compile(active):
    arrays = drawn((1, 2, 12, 16), (1, 2, 12, 16), (1, 2, 12, 16))
    weights = torch.randn(1, 2, 12, 16)
    compiled = torch.compile(lambda *x: scaled_dot_product_attention(*x, is_causal=True), backend="aot_eager")
    found, expected = values(compiled, arrays, weights), values(lambda *x: plain(*x, True), arrays, weights)
    for x, right in zip(found, expected, strict=True):
        torch.testing.assert_close(x, right, atol=2e-5, rtol=1e-4)
    assert "attention" in CALLS and "attention_backward" in CALLS


def test_restored_to_torchs_bits():
    arrays = drawn((2, 2, 20, 32), (2, 2, 20, 32), (2, 2, 20, 32))
    before = scaled_dot_product_attention(*arrays, is_causal=True)
    registry.register()
    assert registry.NAME in attention.list_flash_attention_impls()
    attention.activate_flash_attention_impl(registry.NAME)  # for CUDA: harmless here
    assert attention.current_flash_attention_impl() == registry.NAME
    assert torch.equal(scaled_dot_product_attention(*arrays, is_causal=True), before)
    attention.restore_flash_attention_impl()
    assert attention.current_flash_attention_impl() is None
    assert torch.equal(scaled_dot_product_attention(*arrays, is_causal=True), before)


def test_the_debug_mask_is_refused(active):
    q, k, v = (x.detach() for x in drawn((20, 2, 32), (20, 2, 32), (20, 2, 32)))
    with pytest.raises(cuflash.errors.UnsupportedError, match="return_debug_mask=True is not available"):
        ATEN._flash_attention_forward(q, k, v, STARTS, STARTS, 13, 13, 0.0, True, True)
