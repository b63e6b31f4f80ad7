"""PyTorch's CPU build as far as cuflash's adapter sees a CUDA build of it, on the driver stand-in.

    with in_place():
        q = on_gpu(torch.randn(1, 40, 2, 64).half(), device=0)   # q.device is cuda:0
        cuflash.attention(q, k, v)

The stand-in's memory is readable by the host, so a tensor of it is an ordinary one, whose address tells its device.
Replaced of PyTorch: what `Tensor.device` says, the functions that make tensors on a device, and what
`cuflash.frameworks.torch` asks about streams and capture, which are CuPy's here. All else is PyTorch as it is shipped:
its dispatcher, its autograd engine, its version counters. Its own kernels run on the host and at once, not in a
stream's order: of tensors here only views may be taken before somebody has waited.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch

from . import stand_in

_device = torch.Tensor.device
_recorded: list[Any] = []  # PyTorch's graphs have memory of their own, here that of the process


def _device_of(x: Any) -> Any:
    found = _device.__get__(x)
    if found.type != "cpu" or type(x) not in (torch.Tensor, torch.nn.Parameter):
        return found
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        return _device_of(torch._C._functorch.get_unwrapped(x))
    index = stand_in.device_of(x.untyped_storage().data_ptr())
    return found if index is None else torch.device("cuda", index)


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: int) -> torch.Tensor:
    """Memory of CuPy's pool, alive as long as the tensor."""
    import cupy

    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    with cupy.cuda.Device(device):
        memory = cupy.empty(max(1, nbytes), np.uint8)
        if cupy.cuda.get_current_stream().is_capturing():
            _recorded.append(memory)
    interface = {"data": (memory.data.ptr, False), "shape": memory.shape, "typestr": "|u1", "version": 3}
    held = type("Memory", (), {"__array_interface__": interface, "memory": memory})()
    return torch.from_numpy(np.asarray(held))[:nbytes].view(dtype).reshape(shape)


def on_gpu(x: torch.Tensor, device: int = 0) -> torch.Tensor:
    """A copy in a device's memory, in order with CuPy's current stream."""
    import cupy

    x = x.detach().contiguous()
    result = empty(tuple(x.shape), x.dtype, device)
    with cupy.cuda.Device(device):
        size, kind = x.numel() * x.element_size(), cupy.cuda.runtime.memcpyHostToDevice
        cupy.cuda.runtime.memcpyAsync(result.data_ptr(), x.data_ptr(), size, kind, _stream(device))
    return result


def _stream(device: int) -> int:
    import cupy

    return cupy.cuda.get_current_stream(device).ptr


def _elsewhere(function: Callable[..., Any], here: Callable[..., Any]) -> Callable[..., Any]:
    """A function of PyTorch's, and `here` instead of it where device= is a GPU."""

    def either(*arguments: Any, **keywords: Any) -> Any:
        device = keywords.get("device")
        if device is None or torch.device(device).type != "cuda":
            return function(*arguments, **keywords)
        return here(*arguments, keywords["dtype"], torch.device(device).index)

    return either


def _randint(high: int, shape: tuple[int, ...], dtype: torch.dtype, device: int) -> torch.Tensor:
    return on_gpu(torch.randint(high, shape, dtype=dtype), device)


def _to(function: Callable[..., Any]) -> Callable[..., Any]:
    def to(x: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        where = arguments[0] if arguments else None
        if isinstance(where, torch.device) and where.type == "cuda":
            return on_gpu(x, where.index)
        return function(x, *arguments, **keywords)

    return to


@contextlib.contextmanager
def in_place() -> Iterator[None]:
    """PyTorch as above, for a while."""
    import cupy

    def capturing() -> bool:
        return cupy.cuda.get_current_stream().is_capturing()

    major = cupy.cuda.runtime.runtimeGetVersion() // 1000
    with (
        mock.patch.object(torch.Tensor, "device", property(_device_of)),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", _stream, create=True),
        mock.patch.object(torch.cuda, "current_device", cupy.cuda.runtime.getDevice),
        mock.patch.object(torch.cuda, "device", cupy.cuda.Device),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", capturing),
        mock.patch.object(torch.version, "cuda", f"{major}.0"),
        mock.patch.object(torch, "empty", _elsewhere(torch.empty, empty)),
        mock.patch.object(torch, "randint", _elsewhere(torch.randint, _randint)),
        mock.patch.object(torch.Tensor, "to", _to(torch.Tensor.to)),
    ):
        yield
