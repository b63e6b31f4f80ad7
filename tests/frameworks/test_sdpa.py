"""`scaled_dot_product_attention` beside PyTorch's and `dot_product_attention` beside JAX's: drawn arguments, values and
gradients; what they refuse; NumPy arrays through both."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cuflash
from cuflash.errors import ArgumentError, UnsupportedError

# Of float64 gradients: lse is float32.
TOLERANCE = {"float32": 3e-6, "float64": 1e-6, "bfloat16": 3e-2, "float16": 3e-3}
SHAPE = (2, 4, 5, 7)  # batch, heads, queries, keys


def floats(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def masked(rng: np.random.Generator, shape: tuple[int, ...], share: float = 0.4) -> np.ndarray:
    """Bools that broadcast to a shape: some axes of one element, the first ones perhaps missing, some rows empty."""
    held = [n if rng.random() < 0.6 else 1 for n in shape]
    return rng.random(held[rng.integers(0, len(shape) - 1) :]) > share


# --- PyTorch's --------------------------------------------------------------------------------------------------------


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch")


def theirs_and_ours(torch: Any, inputs: dict[str, Any], **keywords: Any) -> list[tuple[Any, Any]]:
    """Out, and the gradients of what asks for one, by PyTorch's function and by ours."""
    results = []
    for function in (torch.nn.functional.scaled_dot_product_attention, cuflash.scaled_dot_product_attention):
        held = {name: x.detach().clone().requires_grad_(x.requires_grad) for name, x in inputs.items()}
        out = function(**held, **keywords)
        wanted = [x for x in held.values() if x.requires_grad]
        dout = torch.sin(torch.arange(out.numel(), dtype=torch.float32)).reshape(out.shape).to(out.dtype)
        results.append([out.detach(), *torch.autograd.grad(out, wanted, dout, allow_unused=True)])
    return list(zip(*results, strict=True))


def check(pairs: list[tuple[Any, Any]]) -> None:
    for theirs, ours in pairs:
        assert theirs.shape == ours.shape and theirs.dtype == ours.dtype
        tolerance = TOLERANCE[str(theirs.dtype).removeprefix("torch.")]
        scale = float(theirs.abs().max()) if theirs.numel() else 1.0
        np.testing.assert_allclose(ours.double(), theirs.double(), rtol=0, atol=tolerance * max(1.0, scale))


@pytest.mark.parametrize("draw", range(24))
def test_pytorchs_values_and_gradients(torch: Any, rng: np.random.Generator, draw: int) -> None:
    batch, heads, q_len, kv_len = (int(rng.integers(1, n + 1)) for n in SHAPE)
    gqa = bool(rng.integers(2)) and heads % 2 == 0
    lead: tuple[int, ...] = [(batch,), (), (batch, 2)][rng.integers(3)]
    heads_kv = heads // 2 if gqa else [heads, 1][rng.integers(2)]
    dtype = [torch.float32, torch.float64, torch.bfloat16][draw % 3]
    d, d_v = (int(rng.integers(1, 20)) for _ in range(2))
    shapes = {"query": (heads, q_len, d), "key": (heads_kv, kv_len, d), "value": (heads_kv, kv_len, d_v)}
    inputs = {
        name: torch.from_numpy(floats(rng, *lead, *shape)).to(dtype).requires_grad_() for name, shape in shapes.items()
    }
    keywords = dict(enable_gqa=gqa, scale=[None, 0.3][rng.integers(2)])
    match rng.integers(4):
        case 0:
            keywords["is_causal"] = True
        case 1:
            keywords["attn_mask"] = torch.from_numpy(masked(rng, (*lead, heads, q_len, kv_len)))
        case 2:
            bias = floats(rng, *masked(rng, (*lead, heads, q_len, kv_len)).shape)
            inputs["attn_mask"] = torch.from_numpy(bias).to(dtype).requires_grad_()
        case 3:
            bias = np.where(masked(rng, (*lead, heads, q_len, kv_len)), np.float32(0), -np.inf)
            keywords["attn_mask"] = torch.from_numpy(bias).to(dtype)
    check(theirs_and_ours(torch, inputs, **keywords))


@pytest.mark.parametrize(
    "shapes",
    [
        ((5, 8), (7, 8), (7, 3)),  # no heads
        ((4, 5, 8), (4, 7, 8), (4, 7, 8)),
        ((2, 4, 5, 8), (4, 7, 8), (1, 4, 7, 8)),  # a batch of one for all
        ((1, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
        ((2, 1, 5, 8), (2, 4, 7, 8), (2, 1, 7, 8)),  # a head for all
        ((2, 3, 4, 5, 8), (3, 4, 7, 8), (2, 1, 4, 7, 8)),
        ((2, 4, 5, 8), (2, 4, 0, 8), (2, 4, 0, 8)),  # no keys
    ],
)
@pytest.mark.parametrize("with_mask", [False, True])
def test_leading_dimensions_broadcast_as_pytorchs(torch: Any, rng: Any, shapes: Any, with_mask: bool) -> None:
    names = ("query", "key", "value")
    inputs = {name: torch.from_numpy(floats(rng, *s)).requires_grad_() for name, s in zip(names, shapes, strict=True)}
    kv_len = shapes[1][-2]
    mask = torch.from_numpy(rng.random((5, kv_len)) > 0.3) if with_mask else None
    check(theirs_and_ours(torch, inputs, attn_mask=mask))


def test_key_and_value_of_unequal_heads(torch: Any, rng: np.random.Generator) -> None:
    shapes = {"query": (2, 12, 5, 8), "key": (2, 2, 7, 8), "value": (2, 3, 7, 8)}
    inputs = {name: torch.from_numpy(floats(rng, *shape)).requires_grad_() for name, shape in shapes.items()}
    check(theirs_and_ours(torch, inputs, enable_gqa=True))


def test_is_causal_and_a_mask_both_apply(torch: Any, rng: np.random.Generator) -> None:
    q, k = (torch.from_numpy(floats(rng, 2, 4, n, 8)) for n in (5, 7))
    mask = torch.from_numpy(rng.random((5, 7)) > 0.3)
    ours = cuflash.scaled_dot_product_attention(q, k, k, mask, is_causal=True)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, k, mask & torch.ones(5, 7).tril().bool())
    assert torch.allclose(theirs, ours, atol=1e-5)


def test_an_expanded_mask_is_read_once_and_nothing_is_copied(backend, addresses, torch: Any) -> None:
    q = torch.randn(2, 4, 5, 64).half()
    mask = (torch.rand(2, 1, 1, 5) > 0.3).expand(2, 4, 5, 5)
    ours = cuflash.scaled_dot_product_attention(q, q, q, mask)
    for name in ("q", "k", "v"):
        assert addresses[name] == q.data_ptr(), f"{name} was copied"
    theirs = torch.nn.functional.scaled_dot_product_attention(q.double(), q.double(), q.double(), mask)
    assert torch.allclose(theirs, ours.double(), atol=2e-3)


def test_dropout_has_its_rate_and_follows_the_generator(torch: Any) -> None:
    q = torch.zeros(2, 4, 64, 8)
    v = torch.eye(64).expand(2, 4, 64, 64)  # out is the weights, of which each is 1 / 64
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(cuflash.scaled_dot_product_attention(q, q, v, dropout_p=0.25) * 64)
    first, again, other = runs
    assert torch.equal(first, again) and not torch.equal(first, other)
    kept = first != 0
    assert torch.allclose(first[kept], torch.tensor(1 / 0.75)) and abs(kept.float().mean() - 0.75) < 0.02


def test_is_causal_breaks_no_graph_under_compile(torch: Any) -> None:
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8)
    compiled = torch.compile(cuflash.scaled_dot_product_attention, fullgraph=True, backend="eager")
    theirs = torch.nn.functional.scaled_dot_product_attention
    assert torch.allclose(compiled(q, k, k, is_causal=True), theirs(q, k, k, is_causal=True), atol=1e-5)
    assert torch.allclose(compiled(q, k, k), theirs(q, k, k), atol=1e-5)


def test_a_mask_under_compile_breaks_the_graph_and_is_right(torch: Any) -> None:
    q, mask = torch.randn(2, 4, 5, 8), torch.rand(5, 5) > 0.3
    compiled = torch.compile(cuflash.scaled_dot_product_attention, backend="eager")
    theirs = torch.nn.functional.scaled_dot_product_attention(q, q, q, mask)
    assert torch.allclose(compiled(q, q, q, mask), theirs, atol=1e-5)


def test_nested_tensors_are_refused_with_what_to_pass(torch: Any) -> None:
    x = torch.nested.nested_tensor([torch.randn(4, 3, 8), torch.randn(4, 5, 8)], layout=torch.jagged)
    with pytest.raises(UnsupportedError, match=r"query is a nested tensor: .*cu_seqlens"):
        cuflash.scaled_dot_product_attention(x, x, x)


X = np.ones((2, 4, 5, 8), np.float32)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (dict(query=X[0, 0, 0]), r"query.shape=\(8,\) must be"),
        (dict(query=[1.0]), "query is a list"),
        (dict(key=X[..., :4]), r"key.shape\[-1\]=4 must be query.shape\[-1\]=8"),
        (dict(value=X[:, :, :3]), r"value.shape\[-2\]=3 must be key.shape\[-2\]=5"),
        (dict(key=X[:, :2], value=X[:, :2]), "key has 2 heads.*enable_gqa=True"),
        (dict(key=X[:, :3], value=X[:, :3], enable_gqa=True), r"key.shape\[-3\]=3 must divide query.shape\[-3\]=4"),
        (dict(key=np.ones((3, 4, 5, 8), np.float32)), r"must broadcast, and are query \(2,\), key \(3,\)"),
        (dict(attn_mask=np.ones((5, 6), bool)), r"attn_mask.shape=\(5, 6\) must broadcast to .*\(2, 4, 5, 5\)"),
        (dict(attn_mask=np.ones((3, 2, 4, 5, 5), bool)), "attn_mask.shape=.* must broadcast"),
        (dict(attn_mask=np.ones((5, 5), np.int32)), "of dtype int32 must be of bools"),
        (dict(attn_mask=True), "attn_mask is a bool: pass"),
        (dict(is_causal="yes"), "is_causal is a str"),
        (dict(dropout_p=1.5), "dropout_p=1.5"),
        (dict(dropout_p=0.5), "seed"),
    ],
)
def test_wrong_arguments_of_pytorchs_are_named(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        cuflash.scaled_dot_product_attention(**{"query": X, "key": X, "value": X, **wrong})


# --- JAX's ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def jax() -> Any:
    return pytest.importorskip("jax")


def drawn_for_jax(rng: np.random.Generator) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays that may get a gradient, and everything else."""
    batch, heads, q_len, kv_len = (int(rng.integers(1, n + 1)) for n in SHAPE)
    heads_kv = heads // 2 if heads % 2 == 0 and rng.integers(2) else heads
    lead = (batch,) if rng.integers(4) else ()
    d = int(rng.integers(1, 20))
    shapes = {"query": (q_len, heads, d), "key": (kv_len, heads_kv, d), "value": (kv_len, heads_kv, d)}
    inputs = {name: floats(rng, *lead, *shape) for name, shape in shapes.items()}
    target = (*(lead or (1,)), heads, q_len, kv_len)

    def of_target() -> tuple[int, ...]:  # JAX adds missing leading axes, too
        return masked(rng, target).shape

    keywords: dict[str, Any] = {"is_causal": bool(rng.integers(2)), "scale": [None, 0.3][rng.integers(2)]}
    if rng.integers(2):
        inputs["bias"] = floats(rng, *of_target())
    if rng.integers(2):
        keywords["mask"] = rng.random(of_target()) > 0.4
    if rng.integers(2):
        keywords["local_window_size"] = [2, (1, 0), (0, 3), (9, 1)][rng.integers(4)]
    for name, length in (("query_seq_lengths", q_len), ("key_value_seq_lengths", kv_len)):
        if rng.integers(3) == 0:
            keywords[name] = rng.integers(0, length + 1, target[0]).astype(np.int32)
    return inputs, keywords


@pytest.mark.parametrize("draw", [*range(3), *(pytest.param(n, marks=pytest.mark.slow) for n in range(3, 40))])
def test_jaxs_values_and_gradients(jax: Any, rng: np.random.Generator, draw: int) -> None:
    inputs, keywords = drawn_for_jax(rng)
    keywords = {n: jax.numpy.asarray(x) if isinstance(x, np.ndarray) else x for n, x in keywords.items()}
    arrays = {name: jax.numpy.asarray(x) for name, x in inputs.items()}

    def loss(function: Any, arrays: dict[str, Any]) -> tuple[Any, Any]:
        out, residual = function(**arrays, **keywords, return_residual=True)
        weights = jax.numpy.sin(jax.numpy.arange(out.size)).reshape(out.shape)
        return (out * weights).sum(), (out, residual)

    found = [
        jax.jit(jax.value_and_grad(lambda x, f=f: loss(f, x), has_aux=True))(arrays)
        for f in (jax.nn.dot_product_attention, cuflash.dot_product_attention)
    ]
    ((_, theirs), their_grads), ((_, ours), our_grads) = found
    for name, (a, b) in {
        "out": (theirs[0], ours[0]),
        "residual": (theirs[1], ours[1]),
        **{f"d{name}": (their_grads[name], our_grads[name]) for name in arrays},
    }.items():
        assert a.shape == b.shape and a.dtype == b.dtype, name
        np.testing.assert_allclose(b, a, rtol=2e-5, atol=1e-5, err_msg=f"{name} {keywords}")


def test_jaxs_under_jit_and_without_residual(jax: Any, rng: np.random.Generator) -> None:
    q, k = (jax.numpy.asarray(floats(rng, 2, n, 4, 8)) for n in (5, 7))
    mask = jax.numpy.asarray(rng.random((2, 1, 5, 7)) > 0.3)
    keywords = dict(is_causal=True, local_window_size=(3, 0), query_seq_lengths=jax.numpy.asarray([5, 2], "int32"))

    def call(function: Any) -> Any:
        return jax.jit(lambda q, k, mask: function(q, k, k, mask=mask, **keywords))(q, k, mask)

    theirs, ours = (call(f) for f in (jax.nn.dot_product_attention, cuflash.dot_product_attention))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_lists_become_arrays_as_in_jax(jax: Any, rng: np.random.Generator) -> None:
    q = jax.numpy.asarray(floats(rng, 2, 5, 4, 8))
    keywords = dict(key_value_seq_lengths=[3, 5], mask=np.ones((1, 1, 1, 5), bool))
    theirs, ours = (
        f(q, q, q, **{**keywords, "key_value_seq_lengths": jax.numpy.asarray([3, 5], "int32")} if theirs else keywords)
        for f, theirs in ((jax.nn.dot_product_attention, True), (cuflash.dot_product_attention, False))
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (dict(query=np.ones((5, 8), np.float32)), r"query.shape=\(5, 8\) must be \[batch, len, heads, d\]"),
        (dict(value=X[:, :2]), "value.shape=.* must be key.shape="),
        (dict(mask=np.ones((2, 5), bool)), r"mask.shape=\(2, 5\) must broadcast to"),
        (dict(mask=np.ones((4, 4), np.float32)), "mask.dtype=float32 must be bool: pass floats to add as bias"),
        (dict(bias=np.ones((4, 4), bool)), "bias.dtype=bool must be floats"),
        (dict(bias=np.ones((1, 1, 1, 4, 4), np.float32)), "bias.shape"),
        (dict(local_window_size=(1, 2, 3)), r"local_window_size=\(1, 2, 3\) must be an int, or two"),
        (dict(local_window_size=1.5), "local_window_size=1.5"),
        (dict(implementation="triton"), "implementation='triton' must be None, 'xla' or 'cudnn'"),
        (dict(is_causal=X), "is_causal is a ndarray"),
    ],
)
def test_wrong_arguments_of_jaxs_are_named(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        cuflash.dot_product_attention(**{"query": X, "key": X, "value": X, **wrong})


# --- NumPy through both -----------------------------------------------------------------------------------------------


def test_both_are_attention_of_numpy_arrays(backend, rng: np.random.Generator) -> None:
    q = rng.standard_normal((2, 5, 4, 64)).astype(np.float16)
    expected = cuflash.attention(q, q, q, causal=True)
    np.testing.assert_array_equal(cuflash.dot_product_attention(q, q, q, is_causal=True), expected)
    found = cuflash.scaled_dot_product_attention(*(q.swapaxes(1, 2),) * 3, is_causal=True)
    np.testing.assert_array_equal(found.swapaxes(1, 2), expected)


@pytest.mark.gpu
def test_both_of_cupy_arrays(rng: np.random.Generator) -> None:
    import cupy

    q = rng.standard_normal((2, 5, 4, 64)).astype(np.float16)
    mask = rng.random((2, 1, 1, 5)) > 0.3
    there = cupy.asarray(q)
    found = cuflash.dot_product_attention(there, there, there, is_causal=True, local_window_size=2)
    expected = cuflash.dot_product_attention(q, q, q, is_causal=True, local_window_size=2)
    np.testing.assert_allclose(cupy.asnumpy(found), expected, atol=2e-3)
    x, there = q.swapaxes(1, 2), there.swapaxes(1, 2)
    found = cuflash.scaled_dot_product_attention(there, there, there, cupy.asarray(mask))
    expected = cuflash.scaled_dot_product_attention(x, x, x, mask)
    np.testing.assert_allclose(cupy.asnumpy(found), expected, atol=2e-3)
