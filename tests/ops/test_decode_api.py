"""`attention(..., split_size=)`: keys in pieces, on every framework's arrays."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from backends import BACKENDS, using
from cases import Case
from compare import check_forward
from recorded import recording

import cuflash
from cuflash.errors import ArgumentError, UnsupportedError

AUX = ("lse", "max_logit")


def arrays(rng: np.random.Generator, batch: int = 3, q_len: int = 2, k_len: int = 300, dtype: str = "float32") -> Any:
    q = rng.standard_normal((batch, q_len, 4, 64)).astype(dtype)
    k, v = rng.standard_normal((2, batch, k_len, 2, 64)).astype(dtype)
    return q, k, v


def in_pages(x: np.ndarray, page_size: int, order: np.ndarray) -> np.ndarray:
    """The pages that `order` [batch, pages] names, of dense keys whose length is a whole number of pages."""
    pages = np.empty((order.size, page_size, *x.shape[2:]), x.dtype)
    pages[order.reshape(-1)] = x.reshape(-1, *pages.shape[1:])
    return pages


DOCUMENTS = np.random.default_rng(0).integers(0, 2, (3, 320)).astype(np.int32)
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True, "softcap": 5.0, "sink": np.ones(4, np.float32)},
    "window": {"window_size": (100, 0), "alibi_slopes": np.ones(4, np.float32) / 9},
    "window, softcap, documents": {
        "causal": True,
        "window_size": (90, 0),
        "softcap": 3.0,
        "mask_mod": lambda b, h, i, j: DOCUMENTS[b, j] == 1,
    },
    "mods": {"score_mod": lambda s, b, h, i, j: s + 0.01 * h * j, "mask_mod": lambda b, h, i, j: (j + h) % 3 != 0},
}


@pytest.mark.parametrize("layout", ["dense", "pages", "packed queries over pages"])
@pytest.mark.parametrize("features", FEATURES)
def test_the_result_is_that_of_the_definition(features, layout, rng):
    q, k, v = arrays(rng, k_len=320)
    keywords: dict[str, Any] = FEATURES[features] | {"seqused_k": np.array([320, 5, 150], np.int32), "aux": AUX}
    if layout != "dense":
        table = rng.permutation(60).reshape(3, 20).astype(np.int32)
        k, v = (in_pages(x, 16, table) for x in (k, v))
        keywords["page_table"] = table
    if "packed" in layout:
        q, keywords["cu_seqlens_q"] = q.reshape(-1, 4, 64), [0, 1, 4, 6]
    expected = cuflash.attention(q, k, v, split_size=64, **keywords)  # the reference, which takes no notice of it
    assert all((x == y).all() for x, y in zip(expected[:3], cuflash.attention(q, k, v, **keywords), strict=False))
    with using("emulator"), cuflash.emulator.counting() as counters:
        found = cuflash.attention(q, k, v, split_size=128, **keywords)
    assert counters.launches == 2
    for x, y in zip(found[:3], expected, strict=False):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype, d", [("float16", 64), ("bfloat16", 128), ("float32", 96)])
def test_backends(backend, dtype, d):
    """The arrays' surroundings are poisoned, and stay as they were."""
    case = Case(
        dtype, (3,) * 4, (700,) * 4, 8, 2, d, d, packed=False, causal=True, window_size=(600, 0), softcap=20.0,
        alibi="head", sink="float32", seqused_k=(700, 0, 5, 300), layout="gaps",
    )  # fmt: skip
    inputs = case.inputs()
    results = backend.run(inputs, split_size=128)
    check_forward(inputs.q, inputs.k, inputs.v, *results, **inputs.keywords)


@pytest.mark.parametrize("page_size", [0, 1, 16])
def test_a_sequence_has_the_same_bits_in_any_batch(page_size, rng):
    """Alone and among others, whatever their lengths, at whatever place in the batch, with more room or less."""
    q, k, v = arrays(rng, batch=4, k_len=320, dtype="float16")
    lengths = np.array([320, 7, 129, 200], np.int32)
    results = []
    with using("emulator"):
        for chosen in ([0, 1, 2, 3], [3, 0], [1], [2, 2, 1], [0], [3, 2, 1]):
            room = -(-int(lengths[chosen].max()) // 16) * 16
            q_, k_, v_ = q[chosen], k[chosen, :room], v[chosen, :room]
            keywords: dict[str, Any] = {"seqused_k": lengths[chosen]}
            if page_size:
                table = rng.permutation(len(chosen) * room // page_size).reshape(len(chosen), -1).astype(np.int32)
                k_, v_ = (in_pages(np.ascontiguousarray(x), page_size, table) for x in (k_, v_))
                keywords["page_table"] = table
            out, lse, *_ = cuflash.attention(q_, k_, v_, causal=True, split_size=64, aux=("lse",), **keywords)
            results += [(b, out[i].tobytes() + lse[i].tobytes()) for i, b in enumerate(chosen)]
    assert len(set(results)) == 4


def test_other_sizes_give_other_bits(rng):
    """So that the test above can fail."""
    with using("emulator"):
        outs = [cuflash.attention(*arrays(np.random.default_rng(0)), split_size=n).tobytes() for n in (64, 128, 64)]
    assert outs[0] == outs[2] != outs[1]


def test_numbers_compile_nothing(rng):
    compiled = []
    before = cuflash.config.on_compile
    with using("emulator"):
        cuflash.warmup(dtype="float16", head_dim=64, split_size=True)
        cuflash.config.on_compile = compiled.append
        try:
            for batch, q_len, k_len, size in ((1, 1, 70, 64), (3, 5, 200, 128), (2, 16, 33, 4096)):
                cuflash.attention(
                    *arrays(rng, batch, q_len, k_len, "float16"), split_size=size, causal=True, softcap=2.0
                )
        finally:
            cuflash.config.on_compile = before
    assert not compiled


def test_explain(rng):
    q, k, v = arrays(rng)
    with using("emulator"):
        told = cuflash.explain(q, k, v, split_size=128)
    assert told.kernel == "decode_sm80" and told.grid == (3, 2, 3)
    # 3 pieces of 24 rows and heads, of 64 sums, the weights' sum and the maximum in float32
    assert told.workspace_bytes == 3 * 24 * 66 * 4
    text = str(told)
    assert "split_size=128, up to 3 pieces of a row; combine puts them together" in text
    assert "combine: grid 1 x 4 x 3" in text


def test_what_is_refused(rng):
    q, k, v = arrays(rng)
    size: Any
    packed = {"cu_seqlens_q": [0, 6], "cu_seqlens_k": [0, 900]}
    with using("emulator"):
        for size, says in (
            (100, "split_size=100 must be a multiple of 64, the keys of a tile of this kernel.*: pass 128"),
            (0, "split_size=0 must be a positive int or None"),
            (64.0, "split_size=64.0 must be a positive int or None"),
        ):
            with pytest.raises(ArgumentError, match=says):
                cuflash.attention(q, k, v, split_size=size)
        with pytest.raises(UnsupportedError, match=r"split_size: dropout.*leave split_size None"):
            cuflash.attention(q, k, v, split_size=64, dropout_p=0.5, seed=1)
        with pytest.raises(UnsupportedError, match=r"split_size: packed keys.*pass them dense with seqused_k"):
            rows = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v)]
            cuflash.attention(*rows, split_size=64, **packed)


def test_gradients_are_as_always(rng):
    """The forward's result is another by its roundings alone; the backward takes no notice."""
    q, k, v = arrays(rng)
    with using("emulator"):
        out, lse, *_ = cuflash.attention(q, k, v, causal=True, split_size=64, aux=("lse",))
        keywords: dict[str, Any] = {"causal": True, "deterministic": True}
        grads = [cuflash.attention_backward(out, q, k, v, out, lse, split_size=n, **keywords) for n in (64, None)]
    for x, y in zip(grads[0][:3], grads[1][:3], strict=True):
        assert x.tobytes() == y.tobytes()


def test_on_a_gpu_what_is_launched_gives_the_same(rng):
    """Recorded, as for a GPU, and run from those bytes."""
    host = arrays(rng, dtype="float16")
    used = np.array([300, 0, 77], np.int32)
    with recording() as recorder:
        device = [recorder.arrays["cupy stand-in"](x) for x in (*host, used)]
        result = cuflash.attention(*device[:3], seqused_k=device[3], causal=True, split_size=128, aux=("lse",))
        assert [launch.kernel.spec.name for launch in recorder.launches] == ["decode_sm80", "combine"]
        recorder.replay(2)
        found = recorder.host(result.out), recorder.host(result.lse)
    with using("emulator", "sm_90a"):
        out, lse, *_ = cuflash.attention(*host, seqused_k=used, causal=True, split_size=128, aux=("lse",))
    assert (found[0] == out).all() and (found[1] == lse).all()


@pytest.mark.skipif(find_spec("torch") is None, reason="PyTorch is not installed")
def test_torch(rng):
    """Without gradients, with them, compiled, mapped: the bits of NumPy."""
    import torch

    host = arrays(rng)
    with using("emulator"):
        out = cuflash.attention(*host, causal=True, split_size=64)
        q, k, v = (torch.from_numpy(x) for x in host)

        def attend(q: Any, k: Any, v: Any) -> Any:
            return cuflash.attention(q, k, v, causal=True, split_size=64)

        found = {
            "plain": attend(q, k, v),
            "vmap": torch.func.vmap(attend)(q[:, None], k[:, None], v[:, None])[:, 0],
            "compiled": torch.compile(attend, backend="eager", fullgraph=True)(q, k, v),
        }
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        found["autograd"] = attend(*inputs)
        found["autograd"].sum().backward()
        lse = cuflash.attention(*host, causal=True, split_size=64, aux=("lse",)).lse
        grads = cuflash.attention_backward(np.ones_like(out), host[0], host[1], host[2], out, lse, causal=True)
    for name, x in found.items():
        assert x.detach().numpy().tobytes() == out.tobytes(), name
    for x, y in zip(inputs, grads[:3], strict=True):
        np.testing.assert_allclose(x.grad.numpy(), y, atol=1e-5)


@pytest.mark.skipif(find_spec("jax") is None, reason="JAX is not installed")
def test_jax(rng):
    import jax

    host = arrays(rng)
    with using("emulator"):
        out = cuflash.attention(*host, causal=True, split_size=64)
        q, k, v = (jax.numpy.asarray(x) for x in host)

        def attend(q: Any, k: Any, v: Any) -> Any:
            return cuflash.attention(q, k, v, causal=True, split_size=64)

        for function in (attend, jax.jit(attend)):
            assert np.asarray(function(q, k, v)).tobytes() == out.tobytes()
        dv = jax.grad(lambda v: attend(q, k, v).sum())(v)
    np.testing.assert_allclose(dv.sum(axis=(1, 3)), np.full((3, 2), 2 * 2 * 64), rtol=1e-4)  # each weight sums to 1
