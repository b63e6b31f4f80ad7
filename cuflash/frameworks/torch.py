"""PyTorch tensors, on the host or a CUDA device."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np

from ..array import HOST, Device, TensorView
from ..dtypes import BY_NAME, DType, unknown
from ..errors import ArgumentError, UnsupportedError

NAME: str = "PyTorch"

NESTED = (
    "a nested tensor is not read, but what it is made of: of a jagged x [batch, length, heads, head_dim] pass "
    "x.values() and, as cu_seqlens_q and cu_seqlens_k, x.offsets().int(); torch.nested.nested_tensor_from_jagged(out, "
    "x.offsets()) nests the result, and torch.nested.as_nested_tensor([*x.unbind()], layout=torch.jagged) makes others "
    "jagged"
)


def library() -> Any:
    import torch  # at the first tensor, never earlier

    return torch


@cache
def _dtypes() -> dict[Any, DType]:
    torch = library()
    return {getattr(torch, t.name): t for t in BY_NAME.values() if hasattr(torch, t.name)}


def view(x: Any) -> TensorView:
    torch = library()
    if x.is_nested:
        raise UnsupportedError(NESTED)
    dtype = _dtypes().get(x.dtype)
    if dtype is None:
        raise ArgumentError(unknown(x.dtype))
    where = x.device
    kind = where.type
    if kind == "cuda":
        device: Device = ("cuda", where.index)
    elif kind == "cpu":
        device = HOST
    else:
        raise UnsupportedError(f"a tensor on device {kind!r} cannot be read: move it to 'cuda' or 'cpu'")
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        raise UnsupportedError(
            "torch.func transforms (grad, vmap, jvp) cannot see through this call: call it outside of them; attention "
            "itself may be called inside"
        )
    if x.layout is not torch.strided or x.is_neg():
        raise ArgumentError("a sparse or lazily negated tensor has no plain memory: pass to_dense() or resolve_neg()")
    ptr = x.data_ptr()
    if ptr == 0 and x.numel():
        raise ArgumentError(f"a {type(x).__qualname__} has no memory of its own: pass the local torch.Tensor it wraps")
    return TensorView(ptr, tuple(x.shape), x.stride(), dtype, device, False, x)


def looks_on(*arrays: Any) -> bool:
    torch = library()
    return torch.compiler.is_compiling() or _watched(torch, arrays)


def compiling() -> bool:
    """Whether dynamo follows this code (torch.compile, strict torch.export), which then may not look into Python.

    Not so where torch.export runs it as it is (strict=False), though `torch.compiler.is_compiling()` says so, too.
    """
    return library().compiler.is_dynamo_compiling()


def _watched(torch: Any, arrays: tuple[Any, ...]) -> bool:
    if torch.is_grad_enabled():
        for x in arrays:
            if getattr(x, "requires_grad", False):
                return True
    return (
        torch._C._functorch.peek_interpreter_stack() is not None  # torch.func
        or torch._C._len_torch_dispatch_stack() > 0  # fake tensors, tracing, selective checkpoints
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._is_any_autocast_enabled()
        or torch._C._get_tracing_state() is not None  # torch.jit.trace
    )


def refuse_transformed(arrays: dict[str, Any]) -> None:
    torch = library()
    if torch.is_grad_enabled():
        for name, x in arrays.items():
            if x.requires_grad:
                raise UnsupportedError(
                    f"{name}.requires_grad is True and gradients are on, but the results of attention_backward have "
                    f"none: call it under torch.no_grad() or pass {name}.detach(); to train, call attention and leave "
                    "the rest to autograd"
                )
    if torch.autograd.forward_ad._current_level >= 0:
        for name, x in arrays.items():
            if torch.autograd.forward_ad.unpack_dual(x).tangent is not None:
                raise UnsupportedError(
                    f"{name} is a dual tensor of forward-mode differentiation, which attention_backward does not "
                    f"follow: pass {name}.detach()"
                )


def empty(shape: tuple[int, ...], dtype: DType, device: Device) -> TensorView:
    torch = library()
    where = torch.device("cuda", device[1]) if device[0] == "cuda" else torch.device("cpu")
    return view(torch.empty(shape, dtype=getattr(torch, dtype.name), device=where))


def wrap(view: TensorView) -> Any:
    return view.owner


def written(x: Any) -> None:
    torch = library()
    torch.autograd.graph.increment_version(x)  # a backward pass that saved x must see that it has changed


def stream(device: int) -> int:
    torch = library()
    return torch._C._cuda_getCurrentRawStream(device)


def capturing(device: int) -> bool:
    cuda = library().cuda
    if cuda.current_device() == device:
        return cuda.is_current_stream_capturing()
    with cuda.device(device):
        return cuda.is_current_stream_capturing()


def to_host(x: Any) -> np.ndarray:
    """A copy in NumPy, floats of 16 bits as float32. Waits for the device."""
    x = x.detach()
    return (x.float() if x.is_floating_point() and x.element_size() < 4 else x).cpu().numpy()


def known(x: Any) -> np.ndarray | None:
    torch = library()
    if torch.compiler.is_compiling() or x.device.type != "cpu" or torch._C._len_torch_dispatch_stack() > 0:
        return None
    return None if torch._C._functorch.is_functorch_wrapped_tensor(x) else to_host(x)


def from_host(values: np.ndarray, like: Any) -> Any:
    """A tensor of NumPy values with the dtype and on the device of another."""
    return library().from_numpy(values).to(device=like.device, dtype=like.dtype)


def draw_seed(device: Device) -> tuple[Any, Any]:
    """Drawn on the device without a wait, so that manual_seed, checkpointing and graph replay do as they always do."""
    torch = library()
    where = torch.device("cuda", device[1]) if device[0] == "cuda" else torch.device("cpu")
    drawn = torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=where)
    return drawn[:1], drawn[1:]


def seed(x: Any) -> Any:
    return x


def upload(values: np.ndarray, device: Device) -> TensorView:
    torch = library()
    return view(torch.from_numpy(values).to(torch.device("cuda", device[1]), non_blocking=True))


def retain(views: Iterable[TensorView], device: int) -> None:
    """PyTorch's allocator reuses memory in the order of the stream, which is the one used here."""


def keep_recorded(views: Iterable[TensorView], device: int) -> None:
    """PyTorch's graphs allocate from a memory pool of their own, which lives as long as they do."""


def cuda_version() -> str | None:
    torch = library()
    if torch.version.hip is not None:
        raise UnsupportedError(
            "this PyTorch is built for AMD GPUs (ROCm), and the kernels are CUDA: use "
            "torch.nn.functional.scaled_dot_product_attention there"
        )
    return torch.version.cuda


def advise(what: str, name: str) -> str:
    if what == "contiguous":
        return f"{name}.contiguous()"
    if what == "device":
        return f"{name}.cuda()"
    return f"{name}.to(torch.{what})"
