"""Gradients of PyTorch tensors on the CPU, against attention written out in torch, which torch differentiates."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
import warnings

import pytest
from backends import using

import cuflash
from cuflash.errors import ArgumentError, UnsupportedError

torch = pytest.importorskip("torch")

# torch.compile's own: it makes an instance of every autograd.Function that it follows.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture(autouse=True)
def seeded(request):
    torch.manual_seed(len(request.node.name))
    yield
    torch._dynamo.reset()


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def inputs(batch=2, q_len=5, k_len=7, dtype=torch.float32, d=8):
    """q, k, v of two query heads a key head, sink and slopes, all of which want gradients."""
    q, k, v = (
        draw(batch, q_len, 4, d, dtype=dtype),
        draw(batch, k_len, 2, d, dtype=dtype),
        draw(batch, k_len, 2, 6, dtype=dtype),
    )
    return q, k, v, draw(4), torch.rand(4).requires_grad_()


def written_out(q, k, v, *, sink=None, slopes=None, causal=False, window=(-1, -1), softcap=0.0, kept=None):
    """(out, lse) of DESIGN's equations in float64, for torch's autograd to follow."""
    q, k, v = (x.double() for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    s = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    distance = torch.arange(k.shape[1]) - (torch.arange(q.shape[1]) + k.shape[1] - q.shape[1])[:, None]
    if slopes is not None:
        slopes = slopes.double() if slopes.ndim == 2 else slopes.double()[None]
        s = s - slopes[:, :, None, None] * distance.abs()
    keep = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        keep &= distance <= 0
    if window[0] >= 0:
        keep &= distance >= -window[0]
    if window[1] >= 0:
        keep &= distance <= window[1]
    s = s.masked_fill(~keep, -math.inf)
    if sink is not None:
        s = torch.cat([s, sink.double()[None, :, None, None].expand(*s.shape[:3], 1)], 3)
    lse = s.logsumexp(3)
    p = (s - lse[..., None]).exp()[..., : k.shape[1]]
    if kept is not None:  # the weights that dropout keeps, multiplied by 1 / (1 - dropout_p)
        p = p * kept
    return torch.einsum("bhij,bjhd->bihd", p, v), lse


def gradients(loss, tensors):
    return torch.autograd.grad(loss, tensors)


def assert_close(got, want, tolerance=2e-5):
    for i, (x, y) in enumerate(zip(got, want, strict=True)):
        assert x.shape == y.shape and not x.isnan().any(), i
        torch.testing.assert_close(
            x.double(), y.double(), rtol=tolerance, atol=tolerance, msg=lambda m, i=i: f"{i}: {m}"
        )


# --- values -------------------------------------------------------------------------------------------------------


FEATURES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (3, 1)},
    "softcap": {"softcap": 2.0, "causal": True},
}


@pytest.mark.parametrize("wanted", ["out", "lse", "both"])
@pytest.mark.parametrize("features", FEATURES)
def test_gradients_of_everything_that_has_one(features, wanted):
    keywords = FEATURES[features]
    tensors = q, k, v, sink, slopes = inputs()
    result = cuflash.attention(q, k, v, sink=sink, alibi_slopes=slopes, aux=("lse", "max_logit"), **keywords)
    same = {"causal": False, "window_size": (-1, -1), "softcap": 0.0} | keywords
    out, lse = written_out(
        q, k, v, sink=sink, slopes=slopes, causal=same["causal"], window=same["window_size"], softcap=same["softcap"]
    )
    assert_close((result.out, result.lse), (out, lse))
    assert not result.max_logit.requires_grad
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    used = {"out": (1, 0), "lse": (0, 1), "both": (1, 1)}[wanted]
    loss = sum(w * (x * dx).sum() for w, x, dx in zip(used, (result.out, result.lse), (dout, dlse), strict=True) if w)
    want = sum(w * (x * dx).sum() for w, x, dx in zip(used, (out, lse), (dout, dlse), strict=True) if w)
    wanting = [x for x in tensors if wanted != "lse" or x is not v]  # lse does not know of v
    got = gradients(loss, wanting)
    assert_close(got, gradients(want, wanting))
    for x, dx in zip(wanting, got, strict=True):
        assert dx.dtype == x.dtype


def test_slopes_of_every_sequence():
    q, k, v, _, _ = inputs()
    slopes = torch.rand(2, 4).requires_grad_()
    got = gradients(cuflash.attention(q, k, v, alibi_slopes=slopes).square().sum(), (q, slopes))
    assert_close(got, gradients(written_out(q, k, v, slopes=slopes)[0].square().sum(), (q, slopes)))


def test_gradcheck():
    q, k, v, _, _ = inputs(1, 3, 4, dtype=torch.float64, d=2)
    sink = draw(4, dtype=torch.float64)
    for keywords in FEATURES.values():
        assert torch.autograd.gradcheck(
            lambda *x, keywords=keywords: cuflash.attention(*x[:3], sink=x[3], **keywords), (q, k, v, sink)
        )


def test_packed_equals_one_by_one():
    lengths = (3, 0, 5)
    starts = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
    q, k, v = draw(9, 4, 8), draw(9, 2, 8), draw(9, 2, 8)  # row 8 belongs to nobody
    weights = torch.randn(9, 4, 8)
    out = cuflash.attention(q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, causal=True)
    got = gradients((out * weights).sum(), (q, k, v))
    parts = [
        written_out(*(x[None, b : b + n] for x in (q, k, v)), causal=True)[0][0]
        for b, n in zip(starts[:3], lengths, strict=True)
    ]
    assert_close(got, gradients((torch.cat(parts) * weights[:8]).sum(), (q, k, v)))
    assert all(not dx[8].any() for dx in got)
    # Host lengths, in every form, give the same bits.
    for other in (starts.tolist(), tuple(starts.tolist()), starts.numpy()):
        again = cuflash.attention(q, k, v, cu_seqlens_q=other, cu_seqlens_k=other, causal=True)
        assert all(map(torch.equal, gradients((again * weights).sum(), (q, k, v)), got))


def test_flash_attn_names():
    q, k, v, _, slopes = inputs(k_len=5)
    v = draw(2, 5, 2, 8)
    want = gradients(written_out(q, k, v, slopes=slopes, causal=True)[0].square().sum(), (q, k, v, slopes))
    out = cuflash.flash_attn_func(q, k, v, causal=True, alibi_slopes=slopes)
    assert_close(gradients(out.square().sum(), (q, k, v, slopes)), want)
    kv = torch.stack([k, v], 2).detach().requires_grad_()
    dkv = gradients(cuflash.flash_attn_kvpacked_func(q, kv, causal=True, alibi_slopes=slopes).square().sum(), kv)[0]
    assert_close(dkv.unbind(2), want[1:3])
    qkv = draw(2, 5, 3, 4, 8)
    dqkv = gradients(cuflash.flash_attn_qkvpacked_func(qkv, causal=True).square().sum(), qkv)[0]
    assert_close(
        dqkv.unbind(2), gradients(written_out(*qkv.unbind(2), causal=True)[0].square().sum(), qkv)[0].unbind(2)
    )
    starts = torch.tensor([0, 5, 10], dtype=torch.int32)
    flat = [x.detach().flatten(0, 1).requires_grad_() for x in (q, k, v)]
    out = cuflash.flash_attn_varlen_func(*flat, starts, starts, 5, 5, causal=True, alibi_slopes=slopes)
    assert_close(gradients(out.square().sum(), (*flat, slopes)), (*[x.flatten(0, 1) for x in want[:3]], want[3]))
    out, lse, _ = cuflash.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert lse.requires_grad


@pytest.mark.parametrize("which", range(5))
def test_only_what_is_asked_for(which):
    tensors = [x.detach() for x in inputs()]
    tensors[which].requires_grad_()
    q, k, v, sink, slopes = tensors
    out = cuflash.attention(q, k, v, sink=sink, alibi_slopes=slopes)
    out.sum().backward()
    assert [x.grad is not None for x in tensors] == [i == which for i in range(5)]


def test_no_gradients_no_graph():
    q, k, v, sink, _ = inputs()
    with torch.no_grad():
        assert not cuflash.attention(q, k, v, sink=sink).requires_grad
    with torch.inference_mode():
        assert cuflash.attention(q, k, v, sink=sink).is_inference()
    assert cuflash.attention(q.detach(), k.detach(), v.detach()).grad_fn is None


def test_views_and_expanded_gradients():
    x = draw(2, 4, 5, 3, 8)  # [batch, heads, len, three, d]
    q, k, v = x.transpose(1, 2).unbind(3)
    out = cuflash.attention(q, k, v)
    assert_close(gradients(out.sum(), x), gradients(written_out(q, k, v)[0].sum(), x))  # dout is expanded: stride 0
    dout = torch.randn(2, 4, 5, 8).transpose(1, 2)
    got = gradients((cuflash.attention(q, k, v) * dout).sum(), x)
    assert_close(got, gradients((written_out(q, k, v)[0] * dout).sum(), x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits(dtype):
    q, k, v, sink, slopes = inputs(dtype=dtype)
    out = cuflash.attention(q, k, v, sink=sink, alibi_slopes=slopes, causal=True)
    got = gradients(out.float().square().sum(), (q, k, v, sink, slopes))
    assert [x.dtype for x in got] == [dtype] * 3 + [torch.float32] * 2
    want, _ = written_out(q, k, v, sink=sink, slopes=slopes, causal=True)
    assert_close(got, gradients(want.square().sum(), (q, k, v, sink, slopes)), 0.05)


# --- dropout ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [7, 2**64 - 5, -1, "tensor"])
def test_gradients_of_dropout(seed):
    q, k, v, sink, slopes = tensors = inputs()
    seed = torch.tensor([2**40 + 1]) if seed == "tensor" else seed
    keywords = {"sink": sink, "alibi_slopes": slopes, "dropout_p": 0.25, "seed": seed, "offset": 3, "causal": True}
    with torch.no_grad():
        mask = cuflash.attention(q, k, v, **keywords, aux=("dropout_mask",)).dropout_mask
    assert 0 < mask.double().mean() < 1
    out = cuflash.attention(q, k, v, **keywords)
    want = written_out(q, k, v, sink=sink, slopes=slopes, causal=True, kept=mask / 0.75)[0]
    assert_close([out], [want])
    assert_close(gradients(out.square().sum(), tensors), gradients(want.square().sum(), tensors))


def test_seeds_come_from_the_default_generator():
    q, k, v, _, _ = inputs()

    def run(seed, call=cuflash.attention):
        torch.manual_seed(seed)
        out = call(q, k, v, dropout_p=0.5)
        return out, *gradients(out.sum(), (q, k, v))

    assert all(map(torch.equal, run(1), run(1)))
    assert not torch.equal(run(1)[0], run(2)[0])
    assert all(map(torch.equal, run(1), run(1, cuflash.flash_attn_func)))
    torch.manual_seed(1)
    with torch.no_grad():
        alike = cuflash.attention(q, k, v, dropout_p=0.5)
    assert torch.equal(alike, run(1)[0]), "with and without gradients"
    first, second = cuflash.attention(q, k, v, dropout_p=0.5), cuflash.attention(q, k, v, dropout_p=0.5)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_drops_the_same_weights_again(reentrant):
    q, k, v, _, _ = inputs()

    def call(q, k, v):
        return cuflash.attention(q, k, v, dropout_p=0.5).sin()

    torch.manual_seed(3)
    want = gradients(call(q, k, v).sum(), (q, k, v))
    torch.manual_seed(3)
    out = torch.utils.checkpoint.checkpoint(call, q, k, v, use_reentrant=reentrant)
    torch.rand(7)  # the backward must not mind what was drawn meanwhile
    out.sum().backward()
    assert_close([x.grad for x in (q, k, v)], want, 0)


def test_dropout_compiled_without_recompiling():
    from torch._dynamo.testing import CompileCounterWithBackend

    q, k, v, _, _ = inputs()
    counter = CompileCounterWithBackend("aot_eager")
    drawn = torch.compile(lambda q: cuflash.attention(q, k, v, dropout_p=0.5), fullgraph=True, backend=counter)
    first, second = drawn(q), drawn(q)
    assert not torch.equal(first, second) and counter.frame_count == 1
    given = torch.compile(
        lambda q, s: cuflash.attention(q, k, v, dropout_p=0.5, seed=s), fullgraph=True, backend=counter
    )
    for seed in (5, 6, 7, 8):
        got, want = given(q, seed), cuflash.attention(q, k, v, dropout_p=0.5, seed=seed)
        assert torch.equal(got, want)
        assert torch.equal(gradients(got.sum(), q)[0], gradients(want.sum(), q)[0])
    assert counter.frame_count <= 3, "seeds are run-time numbers"


def test_dropout_under_vmap():
    x = torch.randn(3, 1, 4, 2, 8)

    def call(x, seed=None):
        return cuflash.attention(x, x, x, dropout_p=0.5, seed=seed)

    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(call)(x)
    same = torch.func.vmap(call, randomness="same")(x[:1].expand(3, -1, -1, -1, -1))
    assert torch.equal(same[0], same[1])
    different = torch.func.vmap(call, randomness="different")(x[:1].expand(3, -1, -1, -1, -1))
    assert not torch.equal(different[0], different[1])
    seeds = torch.tensor([1, 2, 1])
    got = torch.func.vmap(call)(x, seeds)
    assert torch.equal(got, torch.stack([call(*pair) for pair in zip(x, seeds.tolist(), strict=True)]))
    got = torch.func.vmap(torch.func.grad(lambda *y: call(*y).square().sum()))(x, seeds)
    want = [torch.func.grad(lambda *y: call(*y).square().sum())(*pair) for pair in zip(x, seeds, strict=True)]
    assert torch.equal(got, torch.stack(want))


@pytest.mark.parametrize(
    "keywords, match",
    [
        ({"dropout_p": 1.0}, "dropout_p=1.0"),
        ({"dropout_p": -0.1}, "dropout_p=-0.1"),
        ({"dropout_p": 0.5, "seed": 1.5}, "seed=1.5 must be an int"),
        ({"dropout_p": 0.5, "seed": 1, "offset": "two"}, "offset='two' must be an int"),
        ({"dropout_p": 0.5, "seed": torch.ones(2, dtype=torch.int64)}, "seed"),
        ({"dropout_p": 0.5, "seed": torch.ones(1)}, "seed"),
    ],
)
def test_bad_dropout_is_refused(keywords, match):
    with pytest.raises(ArgumentError, match=f"^{match}"):
        cuflash.attention(*inputs()[:3], **keywords)


def test_the_dropout_mask_is_no_result_to_differentiate():
    with pytest.raises(UnsupportedError, match=r"^dropout_mask: "):
        cuflash.attention(*inputs()[:3], dropout_p=0.5, seed=1, aux=("dropout_mask",))


# --- what PyTorch does with operations ----------------------------------------------------------------------------


def operands(packed=False, **grads):
    q, k, v, sink, slopes = inputs()
    starts = None
    if packed:
        q, k, v = (x.detach().flatten(0, 1).requires_grad_() for x in (q, k, v))
        starts = [torch.tensor([0, n, 2 * n], dtype=torch.int32) for n in (5, 7)]
    return q, k, v, *(starts or [None, None]), sink, slopes


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed):
    q, k, v, starts_q, starts_k, sink, slopes = (None if x is None else x.detach() for x in operands(packed))
    common = (q, k, v, starts_q, starts_k, None, None, None, slopes, sink, None, None)
    cuflash.attention(q.requires_grad_(), k, v, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k)  # defines the operators
    common = (q.detach(), *common[1:])
    numbers = numbers_of("attention")
    torch.library.opcheck(torch.ops.cuflash.attention.default, (*common, *numbers))
    out, lse, *_ = torch.ops.cuflash.attention.default(*common, *numbers)
    backward = torch.ops.cuflash.attention_backward.default
    for dlse in (None, torch.randn_like(lse)):
        torch.library.opcheck(backward, (torch.randn_like(out), dlse, out, lse, *common, *numbers_of(backward)))


def numbers_of(operator):
    """Values for the arguments behind the tensors, by name."""
    if operator == "attention":
        operator = torch.ops.cuflash.attention.default
    values = {"left": -1, "right": 0, "softcap": 0.0, "deterministic": False, "max_logit": True, "slopes": True}
    values |= {"dropout_p": 0.25, "seed_number": -3, "offset_number": 4}
    known = [a for a in operator._schema.arguments if "Tensor" not in str(a.type)]
    return [values.get(a.name) for a in known]


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("packed", [False, True])
def test_compile_in_one_graph_without_recompiling(packed, dynamic):
    frames = []

    def backend(graph, example):
        frames.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    def call(q, k, v, starts_q, starts_k, sink, slopes, scale):
        result = cuflash.attention(
            q, k, v, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, sink=sink, alibi_slopes=slopes, causal=True,
            softcap=3.0, scale=scale, aux=("lse",),
        )  # fmt: skip
        return result.out * 2, result.lse

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend=backend)
    *_, sink, slopes = operands()
    for n in (5, 6, 9, 12):
        if packed:
            q, k, v = draw(n, 4, 8), draw(n, 2, 8), draw(n, 2, 8)
            starts = torch.tensor([0, 2, n], dtype=torch.int32)
        else:
            q, k, v, starts = draw(2, n, 4, 8), draw(2, n, 2, 8), draw(2, n, 2, 8), None
        arguments = (q, k, v, starts, starts, sink, slopes, 0.25)
        got, want = compiled(*arguments), call(*arguments)
        assert all(map(torch.equal, got, want))
        wanting = (q, k, v, sink, slopes)
        loss = [x[0].square().sum() + x[1].sin().sum() for x in (got, want)]
        assert all(map(torch.equal, gradients(loss[0], wanting), gradients(loss[1], wanting)))
    assert len(frames) <= 2, "a new length must not compile anew, once lengths are known to vary"


def test_compile_without_gradients_and_in_flash_attn_names():
    q, k, v, _, _ = (x.detach() for x in inputs())
    v = torch.randn(2, 7, 2, 8)

    def call(q, kv):
        return cuflash.flash_attn_kvpacked_func(q, kv, causal=True, window_size=(4, 0))

    kv = torch.stack([k, v], 2)
    assert torch.equal(torch.compile(call, fullgraph=True, backend="eager")(q, kv), call(q, kv))


@pytest.mark.slow
def test_compile_with_inductor():
    q, k, v, sink, slopes = inputs()

    def call(q, k, v, sink, slopes):
        return torch.nn.functional.gelu(cuflash.attention(q.exp(), k, v, sink=sink, alibi_slopes=slopes)) * 2

    got = torch.compile(call, fullgraph=True)(q, k, v, sink, slopes)
    want = call(q, k, v, sink, slopes)
    assert_close([got], [want])
    wanting = (q, k, v, sink, slopes)
    assert_close(gradients(got.sum(), wanting), gradients(want.sum(), wanting))


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_shapes(strict):
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return cuflash.attention(q, k, v, causal=True)

    batch, rows = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("rows", min=2, max=4096)
    x = torch.randn(3, 6, 2, 8)
    program = torch.export.export(Model(), (x, x, x), dynamic_shapes=({0: batch, 1: rows},) * 3, strict=strict)
    assert any("cuflash.attention" in str(node.target) for node in program.graph.nodes)
    y = torch.randn(2, 11, 2, 8)
    assert torch.equal(program.module()(y, y, y), cuflash.attention(y, y, y, causal=True))


def test_func_grad_and_vjp():
    tensors = q, k, v, *_ = [x.detach() for x in inputs()]

    def loss(q, k, v, sink, slopes):
        result = cuflash.attention(q, k, v, sink=sink, alibi_slopes=slopes, aux=("lse",))
        return result.out.square().sum() + result.lse.sum()

    got = torch.func.grad(loss, argnums=(0, 1, 2, 3, 4))(*tensors)
    wanting = [x.clone().requires_grad_() for x in tensors]
    assert_close(got, gradients(loss(*wanting), wanting), 0)
    jacobian = torch.func.jacrev(lambda q: cuflash.attention(q, k, v)[0, :2, 0, :2])(q)
    assert jacobian.shape == (2, 2, *q.shape) and jacobian.any()


IN_DIMS = {
    "q alone": (0, None, None, None, None),
    "q, k, v": (0, 0, 0, None, None),
    "odd places": (2, 1, 3, None, None),
    "slopes": (0, None, 0, None, 0),
    "everything": (0, 0, 0, 0, 0),
}


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("dims", IN_DIMS)
def test_vmap_and_vmap_of_grad(dims, sinks):
    in_dims = IN_DIMS[dims]
    n = 3
    many = [torch.stack([x.detach() + 0.1 * i for i in range(n)], d) if d is not None else x.detach()
            for x, d in zip(inputs(), in_dims, strict=True)]  # fmt: skip
    one = [[x if d is None else x.select(d, i) for x, d in zip(many, in_dims, strict=True)] for i in range(n)]

    def call(q, k, v, sink, slopes):
        return cuflash.attention(q, k, v, sink=sink if sinks else None, alibi_slopes=slopes, causal=True, aux=("lse",))[
            :2
        ]

    def loss(*x):
        out, lse = call(*x)
        return out.square().sum() + lse.sum()

    out, lse = torch.func.vmap(call, in_dims)(*many)
    for i in range(n):
        assert_close((out[i], lse[i]), call(*one[i]), 1e-6)
    wanting = (0, 1, 2, 4)
    got = torch.func.vmap(torch.func.grad(loss, wanting), in_dims)(*many)
    for i in range(n):
        assert_close([x[i] for x in got], torch.func.grad(loss, wanting)(*one[i]), 1e-5)
    got = torch.func.grad(lambda *x: torch.func.vmap(loss, in_dims)(*x).sum(), wanting)(*many)
    mapped = [x.clone().requires_grad_() for x in many]
    total = sum(
        loss(*[x if d is None else x.select(d, i) for x, d in zip(mapped, in_dims, strict=True)]) for i in range(n)
    )
    assert_close(got, gradients(total, [mapped[i] for i in wanting]), 1e-5)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("grads", [False, True])
def test_a_longest_length_may_be_a_tensor(grads, compiled):
    x = torch.randn(8, 2, 8).requires_grad_(grads)
    starts, longest = torch.tensor([0, 3, 8], dtype=torch.int32), torch.tensor(5)

    def call(x, longest):
        return cuflash.flash_attn_varlen_func(x, x, x, starts, starts, longest, longest, causal=True)

    got = (torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call)(x, longest)
    assert torch.equal(got, call(x, 5))
    if not compiled:
        with pytest.raises(
            ArgumentError, match=r"max_seqlen_q is an array of shape \(2,\) and dtype int64, and must be"
        ):
            call(x, torch.tensor([5, 5]))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("grads", [False, True])
def test_nested_tensors_are_told_what_to_pass(grads):
    parts = [torch.randn(n, 2, 8) for n in (3, 5)]
    x = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
    starts = x.offsets().int()
    packed = x.values().requires_grad_(grads)
    out = cuflash.attention(packed, packed, packed, cu_seqlens_q=starts, cu_seqlens_k=starts)
    nested = torch.nested.nested_tensor_from_jagged(out, x.offsets())  # as the message says
    assert_close(nested.unbind(), [cuflash.attention(*[y[None]] * 3)[0] for y in parts])
    for other in (x, torch.nested.as_nested_tensor(parts)):
        y = other.detach().requires_grad_(grads)
        with pytest.raises(UnsupportedError, match=r"q: a nested tensor.*x\.values\(\).*x\.offsets\(\)\.int\(\)"):
            cuflash.attention(y, y, y)


def of_all(x):
    return cuflash.attention(x, x, x, causal=True)


def loss_of(x):
    return of_all(x).square().sum()


TRANSFORMED = {
    "grad": lambda x: torch.func.grad(loss_of)(x[0]),
    "vjp": lambda x: torch.func.vjp(of_all, x[0])[1](x[1])[0],
    "jacrev": lambda x: torch.func.jacrev(lambda q: of_all(q)[:, :, 0, 0])(x[0]),
    "vmap": lambda x: torch.func.vmap(of_all)(x),
    "vmap of grad": lambda x: torch.func.vmap(torch.func.grad(loss_of))(x),
    "grad of vmap": lambda x: torch.func.grad(lambda x: torch.func.vmap(loss_of)(x).sum())(x),
    "grad with a mod": lambda x: torch.func.vmap(torch.func.grad(lambda q: of_mod(q).square().sum()))(x),
}


def of_mod(x, halved=cuflash.mod(lambda score, b, h, q_idx, kv_idx: score / 2)):  # noqa: B008
    return cuflash.attention(x, x, x, score_mod=halved)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("transformed", TRANSFORMED.values(), ids=[*TRANSFORMED])
def test_compiled_transforms_in_one_graph(transformed, backend):
    x = torch.randn(3, 1, 5, 2, 8)
    assert torch.equal(torch.compile(transformed, fullgraph=True, backend=backend)(x), transformed(x))


def test_jacrev_is_the_gradient_of_each_result():
    q = torch.randn(1, 5, 2, 8, requires_grad=True)
    got = torch.func.jacrev(lambda q: of_all(q)[0, :, 1, 3])(q.detach())
    assert_close(got, torch.stack([torch.autograd.grad(x, q, retain_graph=True)[0] for x in of_all(q)[0, :, 1, 3]]))


def test_vmap_of_packed_calls():
    q = torch.randn(3, 8, 2, 8)
    starts = torch.tensor([[0, 3, 8], [0, 0, 8], [0, 5, 6]], dtype=torch.int32)

    def call(q, starts):
        return cuflash.attention(q, q, q, cu_seqlens_q=starts, cu_seqlens_k=starts, causal=True)

    assert torch.equal(torch.func.vmap(call)(q, starts), torch.stack([call(*x) for x in zip(q, starts, strict=True)]))
    got = torch.func.vmap(torch.func.grad(lambda *x: call(*x).square().sum()))(q, starts)
    want = [torch.func.grad(lambda *x: call(*x).square().sum())(*x) for x in zip(q, starts, strict=True)]
    assert torch.equal(got, torch.stack(want))


@pytest.mark.parametrize("grads", [True, False])
def test_autocast(grads):
    q, k, v, sink, _ = (x.requires_grad_(grads) for x in inputs())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = torch.nn.functional.linear(q, torch.eye(8))
        assert mixed.dtype == torch.bfloat16
        out = cuflash.attention(mixed, k, v, sink=sink)
        assert out.dtype == torch.bfloat16
        double = [x.double() for x in (q, k, v)]
        assert cuflash.attention(*double, sink=sink).dtype == torch.float64
    assert torch.equal(out, cuflash.attention(*(x.bfloat16() for x in (q, k, v)), sink=sink))
    if grads:
        got = gradients(out.float().sum(), (q, k, v, sink))
        assert [x.dtype for x in got] == [torch.float32] * 4
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert cuflash.attention(q, k, v).dtype == torch.float32


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    q, k, v, sink, slopes = inputs()
    calls = []

    def call(q, k, v):
        calls.append(1)
        return cuflash.attention(q, k, v, sink=sink, alibi_slopes=slopes, causal=True).sin()

    want = gradients(call(q, k, v).sum(), (q, k, v, sink, slopes))
    for x in (q, k, v, sink, slopes):
        x.grad = None
    torch.utils.checkpoint.checkpoint(call, q, k, v, use_reentrant=reentrant).sum().backward()
    assert len(calls) == 3
    assert_close([x.grad for x in (q, k, v, sink, slopes)], want, 0)


def test_selective_checkpointing_keeps_attention():
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    q, k, v, _, _ = inputs()
    cuflash.attention(q, k, v)
    runs = []

    def policy(context, operator, *arguments, **keywords):
        kept = operator is torch.ops.cuflash.attention.default
        runs.append((kept, context.is_recompute))
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    loss = checkpoint(
        lambda *x: cuflash.attention(*x).sin(), q, k, v, use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(policy),
    ).sum()  # fmt: skip
    assert (True, False) in runs
    assert_close(gradients(loss, (q, k, v)), gradients(cuflash.attention(q, k, v).sin().sum(), (q, k, v)), 0)


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(2, 5, 4, 64, dtype=torch.float16)
        result = cuflash.attention(x, x, x[..., :32], aux=("lse", "max_logit"))
    assert result.out.shape == (2, 5, 4, 32) and result.out.dtype == torch.float16
    assert result.lse.shape == result.max_logit.shape == (2, 4, 5) and result.lse.dtype == torch.float32


@pytest.mark.parametrize("packed", [False, True])
def test_on_the_emulator(packed):
    q, k, v, sink, slopes = tensors = inputs(d=32)
    want = written_out(q, k, v, sink=sink, slopes=slopes, causal=True)[0]
    keywords = {"sink": sink, "alibi_slopes": slopes, "causal": True}
    with using("emulator"):
        if packed:
            starts = [torch.tensor([0, n, 2 * n], dtype=torch.int32) for n in (5, 7)]
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))
            out = cuflash.attention(q, k, v, cu_seqlens_q=starts[0], cu_seqlens_k=starts[1], **keywords)
            out = out.unflatten(0, (2, 5))
        else:
            out = cuflash.attention(q, k, v, **keywords)
        got = gradients(out.square().sum(), tensors)
    assert_close([out], [want])
    assert_close(got, gradients(want.square().sum(), tensors), 1e-4)


def test_deterministic_algorithms_reach_the_backward(monkeypatch):
    from cuflash.autograd import torch_operators

    q, k, v, _, _ = inputs()
    seen = []
    backward = torch_operators.Backward
    monkeypatch.setattr(torch_operators, "Backward", lambda *a: seen.append(a[2]) or backward(*a))
    gradients(cuflash.attention(q, k, v).sum(), q)
    gradients(cuflash.attention(q, k, v, deterministic=True).sum(), q)
    torch.use_deterministic_algorithms(True)
    try:
        gradients(cuflash.attention(q, k, v).sum(), q)
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [False, True, True]


def test_nothing_outlives_its_graph():
    import weakref

    q, k, v, _, _ = inputs()
    out = cuflash.attention(q, k, v)
    alive = weakref.ref(out)
    out.sum().backward()
    del out
    gc.collect()
    assert alive() is None


# --- refusals -----------------------------------------------------------------------------------------------------


def test_a_second_derivative_is_refused():
    q, k, v, _, _ = inputs()
    (dq,) = torch.autograd.grad(cuflash.attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(UnsupportedError, match="second"):
        dq.sum().backward()
    loss = lambda x: cuflash.attention(x, k, v).square().sum()  # noqa: E731
    with pytest.raises(UnsupportedError, match="second"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x).sum())(q.detach())


@pytest.mark.parametrize(
    "inner", [lambda f: f, torch.func.grad, torch.func.vmap], ids=["jvp", "jvp of grad", "jvp of vmap"]
)
def test_forward_mode_is_refused_in_torch_func(inner):
    x = torch.randn(1, 1, 2, 2, 8)

    def call(x):
        y = x if x.ndim == 4 else x[0]
        return cuflash.attention(y, y, y).sum()

    pushed = lambda x: torch.func.jvp(inner(call), (x,), (x,))  # noqa: E731
    for way in (pushed, torch.compile(pushed, backend="eager")):
        with pytest.raises(UnsupportedError, match="forward-mode"):
            way(x)


def test_forward_mode_is_refused_in_autograd():
    x = torch.ones(1, 2, 2, 8)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(UnsupportedError, match="forward-mode"):
            cuflash.attention(dual, x, x)
        assert cuflash.attention(x, x, x).shape == x.shape


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({n: lambda x: x[:, :, :1].repeat(1, 1, 3, 1) for n in "kv"}, ArgumentError, "must divide"),
        ({"v": lambda x: x.half()}, ArgumentError, "v.dtype=float16 must equal q.dtype=float32"),
        ({"k": lambda x: x.detach().numpy()}, ArgumentError, "k is a ndarray and q a torch.Tensor"),
        ({"sink": lambda x: x[:3]}, ArgumentError, r"sink.shape=\(3,\) must be \(4,\)"),
        ({"sink": lambda x: x.detach().tolist()}, ArgumentError, "sink is a list"),
        ({"scale": lambda x: math.inf}, ArgumentError, "scale=inf must be finite"),
        ({"window_size": lambda x: (-2, 0)}, ArgumentError, "window_size"),
        ({"aux": lambda x: ("probabilities",)}, ArgumentError, "aux names 'probabilities'"),
        ({"page_table": lambda x: torch.zeros(1)}, ArgumentError, "page_table is given and seqused_k is not"),
        ({"seqused_k": lambda x: [1, 99]}, ArgumentError, r"seqused_k\[1\]=99"),
        ({"seqused_k": lambda x: torch.tensor([1, 2])}, ArgumentError, "seqused_k.dtype=int64 must be int32"),
        ({"seqused_k": lambda x: 3}, ArgumentError, "seqused_k is a int"),
        ({"seqused_k": lambda x: torch.zeros(2, device="meta")}, ArgumentError, "seqused_k is on meta"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(change, error, match):
    q, k, v, sink, slopes = inputs()
    keywords = {"q": q, "k": k, "v": v, "sink": sink, "alibi_slopes": slopes}
    for name, make in change.items():
        keywords[name] = make(keywords.get(name))
    with pytest.raises(error, match=match):
        cuflash.attention(**keywords)


def test_an_input_written_to_before_its_backward_is_noticed():
    q, k, v, _, _ = inputs()
    x = q * 1
    out = cuflash.attention(x, k, v)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_no_warning_of_ours():
    q, k, v, _, _ = inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        torch.compile(cuflash.attention, fullgraph=True, backend="aot_eager")(q, k, v).sum().backward()


def test_gradients_import_no_compiler():
    """dynamo takes seconds to import, and nobody compiles here."""
    script = (
        "import sys, torch, cuflash\n"
        "q = torch.ones(1, 4, 2, 8, requires_grad=True)\n"
        "cuflash.attention(q, q, q, score_mod=lambda s, b, h, i, j: s * 2).sum().backward()\n"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
