"""score_mod and mask_mod with PyTorch: gradients of what they capture, torch.func, compilers, checkpoints, autocast."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from backends import using

import cuflash
from cuflash import mods
from cuflash.errors import ArgumentError, UnsupportedError

torch = pytest.importorskip("torch")

Q_LEN, K_LEN, HEADS = 7, 9, 4
DOCUMENTS = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2])
WINDOW = 5


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch._dynamo.reset()


def tensors():
    """q, k, v, a relative bias, a temperature, ALiBi's slopes."""
    q, k, v = torch.randn(2, Q_LEN, HEADS, 16), torch.randn(2, K_LEN, 2, 16), torch.randn(2, K_LEN, 2, 16)
    return [x.requires_grad_() for x in (q, k, v, torch.randn(HEADS, 16), torch.tensor(1.2), torch.rand(HEADS))]


def mask_mod(b, h, q_idx, kv_idx):
    return (DOCUMENTS[q_idx] == DOCUMENTS[kv_idx]) | (q_idx - kv_idx < WINDOW)


def score_mod_of(bias, temperature):
    def score_mod(score, b, h, q_idx, kv_idx):
        return score * temperature + bias[h, q_idx - kv_idx + 8]

    return score_mod


def call(q, k, v, bias, temperature, slopes):
    score_mod = score_mod_of(bias, temperature)
    return cuflash.attention(q, k, v, score_mod=score_mod, mask_mod=mask_mod, alibi_slopes=slopes)


def dense(q, k, v, bias, temperature, slopes):
    """The same over all scores, in PyTorch alone."""
    i, j, h = torch.arange(Q_LEN)[:, None], torch.arange(K_LEN), torch.arange(HEADS)[:, None, None]
    s = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) * 0.25
    s = s - slopes[:, None, None] * (i + K_LEN - Q_LEN - j).abs()
    s = torch.where(mask_mod(0, h, i, j), s * temperature + bias[h, i - j + 8], -torch.inf)
    return torch.einsum("bhij,bjhd->bihd", s.softmax(-1), v.repeat_interleave(2, 2))


def loss(f):
    return lambda *args: f(*args).square().sum()


def grads_of(f, args):
    return torch.autograd.grad(loss(f)(*args), args)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


# --- autograd -----------------------------------------------------------------------------------------------------


def test_gradients_of_what_mods_capture():
    args = tensors()
    close(call(*args), dense(*args))
    close(grads_of(call, args), grads_of(dense, args))
    with torch.no_grad():
        close(call(*args), dense(*args))


def test_the_same_on_kernels():
    args = tensors()
    with using("emulator"):
        close(call(*args), dense(*args))
        close(grads_of(call, args), grads_of(dense, args))
        bias = args[3]
        compiled, before = [], cuflash.config.on_compile
        cuflash.warmup(
            dtype="float32",
            head_dim=16,
            backward=True,
            score_mod=score_mod_of(bias, args[4].detach()),
            mask_mod=mask_mod,
        )
        cuflash.config.on_compile = compiled.append
        try:
            call(*(x if x is bias else x.detach() for x in args[:5]), None).sum().backward()
        finally:
            cuflash.config.on_compile = before
        assert not compiled and bias.grad.any()


def test_only_what_asks_gets_a_gradient():
    args = [x.detach() for x in tensors()]
    args[3].requires_grad_()
    (found,) = torch.autograd.grad(loss(call)(*args), args[3])
    (expected,) = torch.autograd.grad(loss(dense)(*args), args[3])
    close(found, expected)


def test_views_and_expanded_tensors_get_the_gradients_of_their_bases():
    q, k, v, _, temperature, slopes = tensors()
    row = torch.randn(16, requires_grad=True)

    def through(f):
        return grads_of(lambda row: f(q, k, v, row.expand(HEADS, 16).flip(1), temperature, slopes), [row])

    close(through(call), through(dense))


def test_a_mask_has_no_gradient_for_what_it_reads():
    q, k, v, *_ = tensors()
    level = torch.zeros(K_LEN, requires_grad=True)
    out = cuflash.attention(q, k, v, mask_mod=lambda b, h, i, j: (level[j] >= 0) & (i >= j))
    assert torch.autograd.grad(out.sum(), level, allow_unused=True) == (None,)


def test_numpy_numbers_and_no_other_numpy_arrays():
    import numpy as np

    q, k, v, bias, *_ = tensors()
    half = np.array(0.5, np.float32)
    close(cuflash.attention(q, k, v, score_mod=lambda s, *_: s * half), cuflash.attention(q, k, v, scale=0.125))
    array = bias.detach().numpy()
    with pytest.raises(ArgumentError, match=r"array, which a mod captured, is a ndarray and q a torch.Tensor"):
        cuflash.attention(q, k, v, score_mod=lambda s, b, h, i, j: s + array[h, j])


def test_an_index_outside_of_its_tensor_is_named():
    q, k, v, bias, *_ = tensors()
    with pytest.raises(ArgumentError, match=r"^bias: index -1 is outside of axis 1"):
        cuflash.attention(q, k, v, score_mod=lambda s, b, h, i, j: s + bias[h, i - j - K_LEN])


def test_no_second_and_no_forward_derivative():
    args = tensors()
    (first,) = torch.autograd.grad(loss(call)(*args), args[3], create_graph=True)
    with pytest.raises(UnsupportedError, match="first derivative only"):
        torch.autograd.grad(first.sum(), args[3])
    bias = args[3].detach()
    with pytest.raises(UnsupportedError, match="forward-mode"):
        torch.func.jvp(lambda bias: call(*args[:3], bias, *args[4:]), (bias,), (bias,))


def test_attention_backward_of_tensors_without_gradients():
    args = tensors()
    q, k, v, bias, temperature, slopes = (x.detach() for x in args)
    keywords = {"score_mod": score_mod_of(bias, temperature), "mask_mod": mask_mod, "alibi_slopes": slopes}
    out, lse, *_ = cuflash.attention(q, k, v, aux=("lse",), **keywords)
    found = cuflash.attention_backward(2 * out, q, k, v, out, lse, captured_grads=True, **keywords)
    names = [x.split()[0] for x in cuflash.explain(q, k, v, **keywords).captured if " float" in x]
    named = dict(zip(names, found.dcaptured, strict=True))
    expected = grads_of(dense, args)
    close((*found[:3], named["bias"], named["temperature"], named["alibi_slopes"]), expected)
    bias.requires_grad_()
    with pytest.raises(UnsupportedError, match=r"bias\.requires_grad is True"):
        cuflash.attention_backward(out, q, k, v, out, lse, **keywords)


# --- torch.func ---------------------------------------------------------------------------------------------------


def test_torch_func_grad():
    args = tensors()
    found = torch.func.grad(loss(call), argnums=tuple(range(6)))(*args)
    close(found, grads_of(dense, args))


@pytest.mark.parametrize("reads_b", [False, True])
@pytest.mark.parametrize("mapped", [3, 6], ids=["q, k, v", "all"])
def test_vmap(mapped, reads_b):
    """With captured tensors of their own, or a mod that reads b, one call after another; else one call."""
    args, n = [x.detach() for x in tensors()], 3
    many = [torch.randn(n, *x.shape) if i < mapped else x for i, x in enumerate(args)]
    in_dims = tuple(0 if i < mapped else None for i in range(6))

    def f(q, k, v, bias, temperature, slopes):
        own = score_mod_of(bias, temperature)
        score_mod = (lambda s, b, h, i, j: own(s, b, h, i, j) + b) if reads_b else own
        return cuflash.attention(q, k, v, score_mod=score_mod, mask_mod=mask_mod, alibi_slopes=slopes)

    each = [[x[i] if i_dim == 0 else x for x, i_dim in zip(many, in_dims, strict=True)] for i in range(n)]
    close(torch.func.vmap(f, in_dims)(*many), torch.stack([f(*args) for args in each]))  # softmax forgets b
    every = tuple(range(6))
    expected = [torch.func.grad(loss(dense), every)(*args) for args in each]
    found = torch.func.vmap(torch.func.grad(loss(f), every), in_dims)(*many)
    close(found, tuple(torch.stack(parts) for parts in zip(*expected, strict=True)))
    shared = torch.func.grad(lambda *args: torch.func.vmap(f, in_dims)(*args).square().sum(), (3, 4))(*many)
    if mapped == 3:
        close(shared, tuple(sum(parts) for parts in list(zip(*expected, strict=True))[3:5]))


# --- Compilers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_call_has_one_graph_and_its_gradients(backend):
    args = tensors()
    score_mod, mask = cuflash.mod(score_mod_of(*args[3:5])), cuflash.mod(mask_mod)

    def f(q, k, v, slopes):
        return 2 * cuflash.attention(q, k, v, score_mod=score_mod, mask_mod=mask, alibi_slopes=slopes)

    compiled = torch.compile(f, fullgraph=True, backend=backend)
    out = compiled(*args[:3], args[5])
    close(out, 2 * dense(*args))
    close(torch.autograd.grad(out.square().sum(), args), torch.autograd.grad((2 * dense(*args)).square().sum(), args))


def test_ready_made_mods_and_block_masks_compile():
    q, k, v, *_ = tensors()
    score_mod, window = mods.softcap(3.0), mods.sliding_window(3, 3)
    block_mask = cuflash.create_block_mask(lambda b, h, i, j: i >= j, None, None, Q_LEN, K_LEN)

    def f(q, k, v):
        return cuflash.attention(q, k, v, score_mod=score_mod, mask_mod=window, block_mask=block_mask)

    close(torch.compile(f, fullgraph=True, backend="aot_eager")(q, k, v), f(q, k, v))


def test_a_bare_function_breaks_the_graph_once_and_the_warning_says_how_not_to():
    args = tensors()

    def f(*args):
        return 2 * call(*args)

    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(f, backend="aot_eager")
    with pytest.warns(UserWarning, match=r"breaks its graph .*score_mod = cuflash\.mod\(score_mod\)"):
        found = torch.autograd.grad(loss(compiled)(*args), args)
    assert len(torch._dynamo.utils.counters["graph_break"]) == 1
    close(found, grads_of(lambda *args: 2 * dense(*args), args))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"cuflash\.mod\(score_mod\)"):
        torch.compile(f, backend="aot_eager", fullgraph=True)(*args)


class Model(torch.nn.Module):
    """Attention with a learned relative bias."""

    def __init__(self, length=24, heads=2, d=16):
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(heads * d, 3 * heads * d), torch.nn.Linear(heads * d, heads * d)
        self.bias = bias = torch.nn.Parameter(torch.zeros(heads, 2 * length))
        self.score_mod = cuflash.mod(lambda score, b, h, q_idx, kv_idx: score + bias[h, q_idx - kv_idx + length])
        self.heads = heads

    def forward(self, x, mask_mod):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        out = cuflash.attention(q, k, v, score_mod=self.score_mod, mask_mod=mask_mod, causal=True)
        return self.out(out.flatten(2))


def documents(batch=2, length=24):
    """A mask of new documents."""
    ids = torch.randint(0, 3, (batch, length)).sort(1).values
    return cuflash.mod(lambda b, h, q_idx, kv_idx: ids[b, q_idx] == ids[b, kv_idx])


def test_a_compiled_model_trains_as_the_eager_one_does_in_one_graph():
    """Twenty steps, each with other documents."""
    runs = {}
    for compiled in (False, True):
        torch.manual_seed(1)
        model, graphs = Model(), []

        def backend(graph, example, graphs=graphs):
            from torch._dynamo.backends.debugging import aot_eager

            graphs.append(graph)
            return aot_eager(graph, example)

        step = torch.compile(model, fullgraph=True, backend=backend) if compiled else model
        optimizer, losses = torch.optim.SGD(model.parameters(), 0.5), []
        for _ in range(20):
            x = torch.randn(2, 24, 32)
            value = (step(x, documents()) - x).square().mean()
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(value.item())
        assert len(graphs) == compiled and losses[-1] < losses[0] and model.bias.detach().any()
        runs[compiled] = losses, [p.detach() for p in model.parameters()]
    close(torch.tensor(runs[True][0]), torch.tensor(runs[False][0]))
    close(runs[True][1], runs[False][1])


class Fixed(torch.nn.Module):
    """A model with a mask of its own."""

    def __init__(self):
        super().__init__()
        self.model, self.mask_mod = Model(), documents()
        torch.nn.init.normal_(self.model.bias)

    def forward(self, x):
        return self.model(x, self.mask_mod)


@pytest.mark.parametrize("strict", [False, True])
def test_export(tmp_path, strict):
    model, x = Fixed(), torch.randn(2, 24, 32)
    exported = torch.export.export(model, (x,), strict=strict)
    torch.export.save(exported, tmp_path / "model.pt2")
    close(torch.export.load(tmp_path / "model.pt2").module()(x), model(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant):
    model, x = Fixed(), torch.randn(2, 24, 32, requires_grad=True)
    grads = []
    for f in (model, lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)):
        model.zero_grad()
        f(x).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    close(*grads)


def test_autocast_leaves_what_mods_capture_alone():
    q, k, v, bias, temperature, slopes = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        out = call(q, k, v, bias, temperature, slopes)
    assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out.float().square().sum(), (q, bias))
    assert all(grad.dtype == torch.float32 for grad in grads)
    torch.testing.assert_close(out.float(), dense(q, k, v, bias, temperature, slopes), atol=0.05, rtol=0.05)


def test_a_mod_whose_tensor_changed_its_dtype_is_refused_where_it_cannot_be_traced_again():
    model = Fixed()
    model.half()
    x = torch.randn(2, 24, 32, dtype=torch.float16)
    assert model(x).dtype == torch.float16  # traced anew
    with pytest.raises(ArgumentError, match=r"bias, which a mod captured, is float16 .* trace it anew"):
        torch.compile(model, backend="eager")(x)


def test_no_warning_where_mods_are_traced_before():
    model, x = Fixed(), torch.randn(2, 24, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        torch.compile(model, fullgraph=True, backend="aot_eager")(x).sum().backward()


# What has no gradient, and what has its own ---------------------------------------------------------------------------


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad * 2


def test_an_autograd_function_is_its_forward_and_explain_says_so() -> None:
    q = torch.ones(1, 4, 1, 16)
    apply = Doubled.apply
    for score_mod in (lambda s, b, h, i, j: Doubled.apply(s) + i, lambda s, b, h, i, j: apply(s) + i):
        assert "(score * 2.0)" in repr(cuflash.mod(score_mod))
        assert "Doubled.backward is not called" in str(cuflash.explain(q, q, q, score_mod=score_mod))


def test_an_array_that_only_a_mask_reads_has_no_gradient() -> None:
    q = torch.randn(1, 5, 2, 16, requires_grad=True)
    limits, bias = (torch.randn(5, requires_grad=True) for _ in range(2))
    cuflash.attention(
        q, q, q, score_mod=lambda s, b, h, i, j: s + bias[j], mask_mod=lambda b, h, i, j: limits[j] > -9
    ).sum().backward()
    assert limits.grad is None and bias.grad is not None
