"""Calls whose launch goes nowhere, for machines without a GPU: what CuPy, PyTorch and the driver do in a call is left
out, what cuflash does itself is done. The tests record launches by it; offline.py times calls.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np

from cuflash import arch, array, dtypes, frameworks
from cuflash.array import TensorView
from cuflash.jit import module, tensor_map

STREAM = 0x57EA  # the address of every framework's current stream


class CupyArray:
    """What the CuPy adapter reads of an array: a stand-in that needs no CuPy."""

    __module__ = "cupy._core.core"
    # By these the tracer of mods knows an array.
    shape: tuple[int, ...] = ()
    dtype: Any = None
    __cuda_array_interface__ = None

    class _Pointer:
        def __init__(self, ptr: int) -> None:
            self.ptr, self.device_id = ptr, 0

    def __init__(self, address: int, host: np.ndarray) -> None:
        self.data = self._Pointer(address)
        self.shape, self.strides, self.dtype, self.ndim = host.shape, host.strides, host.dtype, host.ndim


def cupy_array(address: int, host: np.ndarray) -> Any:
    """A real CuPy array, like `host`, over memory that nobody may touch."""
    import cupy

    memory = cupy.cuda.UnownedMemory(address, host.nbytes, host, device_id=0)
    return cupy.ndarray(host.shape, host.dtype, cupy.cuda.MemoryPointer(memory, 0))


def torch_tensor(address: int, host: np.ndarray) -> Any:
    """A CUDA tensor of PyTorch, like `host`, over memory that nobody may touch: no operation on it is possible."""
    import torch

    class CudaTensor(torch.Tensor):
        def data_ptr(self) -> int:
            return address

        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise AssertionError(f"{func} was called on a device tensor")

    strides = [s // host.itemsize for s in host.strides]
    dtype = getattr(torch, host.dtype.name)
    return torch.Tensor._make_wrapper_subclass(
        CudaTensor, host.shape, strides=strides, dtype=dtype, device=torch.device("cuda", 0)
    )


@contextlib.contextmanager
def no_gpu(
    name: str,
    *,
    launch: Callable[..., None],
    empty: Callable[[Any, tuple[int, ...], dtypes.DType], TensorView],
    upload: Callable[[Any, np.ndarray], TensorView],
    capturing: Callable[[], bool] = lambda: False,
) -> Iterator[None]:
    """No driver, no CuPy and no GPU needed: what would ask one of them is replaced while this lasts.

    name            the architecture of the GPU that is not there
    launch          gets what `module.launch_cuda` gets
    empty, upload   memory for a result, and a copy of a host array, of a framework: its adapter is their first argument
    """
    with contextlib.ExitStack() as stack:

        def replace(target: Any, **functions: Any) -> None:
            for attribute, function in functions.items():
                stack.enter_context(mock.patch.object(target, attribute, function))

        replace(module, launch_cuda=launch)
        replace(module.CudaKernel, prepare=lambda kernel: None)
        # Maps, which the driver would write in a form of its own, from all but the device.
        replace(tensor_map, _driver=lambda *tensor: tensor_map._emulated(*tensor[:-1]))
        stack.callback(tensor_map.encode.cache_clear)
        replace(frameworks.cupy, arch_of=lambda device, cuda_version=None: arch.named(name))
        replace(frameworks.cupy, device_name=lambda device: "none")

        def allocating(adapter: Any) -> Callable[..., TensorView]:
            return lambda shape, dtype, device: empty(adapter, shape, dtype)

        def uploading(adapter: Any) -> Callable[[np.ndarray, array.Device], TensorView]:
            return lambda values, device: upload(adapter, values)

        for adapter in (frameworks.cupy, frameworks.dlpack, frameworks.torch):
            replace(
                adapter,
                empty=allocating(adapter),
                upload=uploading(adapter),
                stream=lambda device: STREAM,
                capturing=lambda device: capturing(),
            )
        if importlib.util.find_spec("torch"):
            replace(frameworks.torch, cuda_version=lambda: "13.0")
        yield
