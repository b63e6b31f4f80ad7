"""PyTorch tensors on the CPU: the same numbers as NumPy's, in place, and never a silent zero for a gradient."""

from __future__ import annotations

import contextlib

import ml_dtypes
import numpy as np
import pytest
from samples import DTYPES, sample

import cuflash
from cuflash import frameworks, packing
from cuflash.errors import ArgumentError, UnsupportedError

torch = pytest.importorskip("torch")


def to_torch(x: np.ndarray):
    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def to_numpy(x) -> np.ndarray:
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_as_numpy_without_a_copy(backend, addresses, rng, dtype):
    s = sample(rng, dtype)
    expected = cuflash.attention(**s.arrays, causal=True, aux=("lse", "max_logit"))
    tensors = {name: to_torch(x) for name, x in s.arrays.items()}
    result = cuflash.attention(**tensors, causal=True, aux=("lse", "max_logit"))
    for name, x in s.arrays.items():
        assert addresses[name] == tensors[name].data_ptr() == x.ctypes.data, f"{name} was copied"
    for got, want in zip(result[:3], expected[:3], strict=True):
        assert type(got) is torch.Tensor and got.device.type == "cpu" and got.is_contiguous()
        np.testing.assert_array_equal(to_numpy(got), want)


def test_out_and_the_result_are_the_memory_written(backend, addresses):
    q = torch.randn(2, 5, 4, 64, dtype=torch.bfloat16)
    result = cuflash.attention(q, q, q)
    if backend == "emulator":
        assert addresses["out"] == result.data_ptr()
    out = torch.zeros_like(q)
    version = out._version
    assert cuflash.attention(q, q, q, out=out) is out
    assert torch.equal(out, result)
    assert out._version > version, "autograd must be able to see that out has changed"


def test_transposed_and_sliced_tensors(backend, addresses):
    x = (
        torch.randn(2, 4, 9, 3, 64).half()[:, :, :, 0].transpose(1, 2)
    )  # [batch, len, heads, d] of [batch, heads, len, d]
    result = cuflash.attention(x, x, x)
    assert addresses["q"] == x.data_ptr()
    assert torch.equal(result, cuflash.attention(*[x.contiguous()] * 3))


def test_expanded_tensors_and_empty_ones(backend):
    q = torch.randn(1, 4, 1, 64).half().expand(3, 4, 2, 64)
    assert torch.equal(cuflash.attention(q, q, q), cuflash.attention(*[q.contiguous()] * 3))
    empty = torch.empty(0, 4, 2, 64)
    assert cuflash.attention(empty, empty, empty).shape == empty.shape


def test_cu_seqlens_as_a_list_or_numpy(backend, rng):
    s = sample(rng, "float16")
    q, k, v = (to_torch(x) for x in (s.q, s.k, s.v))
    want = cuflash.attention(q, k, v, **{n: to_torch(x) for n, x in s.lengths.items()})
    assert torch.equal(cuflash.attention(q, k, v, **s.lengths), want)
    assert torch.equal(cuflash.attention(q, k, v, **{n: x.tolist() for n, x in s.lengths.items()}), want)


def test_packing_meets_attention(backend):
    sequences = [torch.randn(n, 2, 64).half() for n in (3, 0, 5)]
    packed = packing.pack(sequences)
    out = cuflash.attention(
        packed.data, packed.data, packed.data, cu_seqlens_q=packed.cu_seqlens, cu_seqlens_k=packed.cu_seqlens
    )
    for got, x in zip(packing.unpack(out, packed.cu_seqlens), sequences, strict=True):
        assert torch.equal(got, cuflash.attention(x[None], x[None], x[None])[0])


# --- gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["q", "k", "v", "alibi_slopes", "sink", "out"])
def test_an_out_that_autograd_would_follow_is_refused(name):
    arrays = {n: torch.randn(1, 3, 2, 8) for n in ("q", "k", "v", "out")}
    arrays |= {n: torch.randn(2) for n in ("alibi_slopes", "sink")}
    arrays[name].requires_grad_()
    with pytest.raises(UnsupportedError, match=r"^out: .*torch\.no_grad\(\)"):
        cuflash.attention(**arrays)
    with torch.no_grad():
        result = cuflash.attention(**arrays)
    assert not result.requires_grad or result is arrays["out"]
    with torch.inference_mode():
        cuflash.attention(**arrays)


@pytest.mark.parametrize("name", ["dout", "q", "k", "v", "out"])
def test_attention_backward_refuses_what_needs_a_gradient(name):
    arrays = {n: torch.randn(1, 3, 2, 8) for n in ("dout", "q", "k", "v", "out")} | {"lse": torch.ones(1, 2, 3)}
    arrays[name].requires_grad_()
    with pytest.raises(UnsupportedError, match=rf"{name}\.requires_grad .*torch\.no_grad\(\) .*{name}\.detach\(\)"):
        cuflash.attention_backward(**arrays)
    with torch.no_grad():
        assert not cuflash.attention_backward(**arrays).dq.requires_grad


def test_parameters_and_modules_under_no_grad():
    parameter = torch.nn.Parameter(torch.ones(1, 2, 2, 8))
    with torch.no_grad():
        assert type(cuflash.attention(parameter, parameter, parameter)) is torch.Tensor


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda x: x.to("meta"), "device 'meta'"),
        (lambda x: x.to_sparse(), "sparse"),
        (lambda x: torch._neg_view(x), "negated"),
        (lambda x: x.to(torch.complex64), "complex64"),
    ],
)
def test_tensors_without_plain_memory_are_refused(make, match):
    x = torch.ones(1, 2, 2, 8)
    with pytest.raises((ArgumentError, UnsupportedError), match=match):
        cuflash.attention(x, make(x), x)


def test_a_window_may_be_a_tensor_in_flash_attns_functions():
    """And one that changed in place is read anew."""
    q, k, v = torch.randn(3, 1, 9, 2, 32).unbind()
    window = torch.tensor([3, 1])
    for _ in range(2):
        expected = cuflash.flash_attn_func(q, k, v, window_size=tuple(window.tolist()))
        assert torch.equal(cuflash.flash_attn_func(q, k, v, window_size=window), expected)
        window[0] = 0
    with pytest.raises(cuflash.errors.ArgumentError, match="window_size"):
        cuflash.flash_attn_func(q, k, v, window_size=torch.tensor([3, 1, 2]))


def test_capture_is_asked_of_the_device_of_the_call(monkeypatch):
    """And not of the one that is current."""
    current = [0]

    @contextlib.contextmanager
    def device(index):
        before, current[0] = current[0], index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[0] == 1)
    assert [frameworks.torch.capturing(index) for index in (0, 1)] == [False, True]
    assert current == [0]
