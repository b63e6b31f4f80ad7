"""Calls of PyTorch and JAX programs on the driver stand-in: PyTorch as far as `torch_on_gpu` makes it one with CUDA,
JAX by call frames made by hand, on a thread whose context the driver's API set, as XLA's are."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any
from unittest import mock

import numpy as np

import cuflash
from cuflash.errors import ArgumentError

from . import stand_in
from .scenarios import GLOBAL, RELAXED, Cache, captured, expected, host, in_thread, raised

# --- PyTorch --------------------------------------------------------------------------------------------------------


def _torch_arrays(device: int = 0, arrays: tuple[np.ndarray, ...] | None = None) -> list[Any]:
    import torch

    from .torch_on_gpu import on_gpu

    return [on_gpu(torch.from_numpy(x), device) for x in (host() if arrays is None else arrays)]


def _near(got: Any, want: np.ndarray, atol: float = 3e-3) -> None:
    """Reads a tensor when all work is done, which PyTorch's own copy would wait for."""
    assert stand_in.run_all() == 0
    _close(got.detach().numpy(), want, atol)


def _close(got: np.ndarray, want: np.ndarray, atol: float = 3e-3) -> None:
    np.testing.assert_allclose(got.astype(np.float32), want.astype(np.float32), atol=atol)


@contextlib.contextmanager
def _stream_of(device: int) -> Iterator[Any]:
    """Makes a stream the current one of a device, which may not be the current device."""
    import cupy

    with cupy.cuda.Device(device):
        stream = cupy.cuda.Stream(non_blocking=True)
        stream.use()
    try:
        yield stream
    finally:
        with cupy.cuda.Device(device):
            cupy.cuda.Stream.null.use()


def torch_on_its_stream_and_device() -> None:
    """A call whose out= is given, one without, and one in a thread that has not used CUDA."""
    import torch

    from .torch_on_gpu import empty, in_place

    with in_place():
        for device in (0, 1):  # of which the first stays current
            q, k, v = _torch_arrays(device)
            assert q.device == torch.device("cuda", device)
            out = empty(tuple(q.shape), q.dtype, device)
            stand_in.run_all()  # the uploads were another stream's
            with _stream_of(device) as stream:
                with stand_in.recording() as lines:
                    assert cuflash.attention(q, k, v, causal=True, out=out) is out
                launches = [line for line in lines if line.startswith("launch")]
                assert len(launches) == 1 and f"stream={stream.ptr:x} dev={device}" in launches[0], launches
                assert out._version == 1
                made = cuflash.attention(q, k, v, causal=True)
                assert made.device == q.device and type(made) is torch.Tensor
            _near(out, expected())
            _near(made, expected())
        q, k, v = _torch_arrays()
        out = empty(tuple(q.shape), q.dtype, 0)
        in_thread(lambda: cuflash.attention(q, k, v, causal=True, out=out))
        _near(out, expected())


def torch_with_lengths_of_the_host() -> None:
    """Ragged rows, whose lengths PyTorch uploads; and an array of another device, which is refused."""
    import torch

    from .torch_on_gpu import in_place

    arrays, starts = tuple(x[0] for x in host()), np.array([0, 15, 40], np.int32)
    want = cuflash.attention(*arrays, cu_seqlens_q=starts, cu_seqlens_k=starts, causal=True)
    with in_place():
        q, k, v = _torch_arrays(arrays=arrays)

        def attend(k: Any) -> Any:
            return cuflash.attention(q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, causal=True)

        _near(attend(k), want)
        message = raised(ArgumentError, lambda: attend(torch.from_numpy(arrays[1])))
        assert "k" in message and "cuda" in message, message


def torch_trains() -> None:
    """Forward and backward by autograd, the backward in a thread of its own, as PyTorch's engine has one a device."""
    import torch

    from .torch_on_gpu import in_place

    result = cuflash.attention(*host(), causal=True, aux=("lse",))
    want = cuflash.attention_backward(host(1)[0], *host(), result.out, result.lse, causal=True)
    with in_place():
        q, k, v = (x.requires_grad_() for x in _torch_arrays())
        (dout,) = _torch_arrays(arrays=host(1)[:1])
        out = cuflash.attention(q, k, v, causal=True)
        assert out.grad_fn is not None and out.device == q.device
        grads: list[Any] = []
        in_thread(lambda: grads.extend(torch.autograd.grad(out, (q, k, v), dout)))
        _near(out, expected())
        for got, name in zip(grads, ("dq", "dk", "dv"), strict=True):
            assert got.device == q.device
            _near(got, getattr(want, name), 2e-2)


def torch_drops_by_its_own_generator() -> None:
    """The seed is drawn by PyTorch and stays on the device; the same seed drops the same."""
    import torch

    from .torch_on_gpu import in_place

    with in_place():
        arrays = _torch_arrays()
        outs = []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            outs.append(cuflash.attention(*arrays, causal=True, dropout_p=0.5))
        assert stand_in.run_all() == 0
        assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def torch_decodes_in_a_graph() -> None:
    """With another step's queries and lengths in the tensors when it is replayed."""
    import cupy

    from .torch_on_gpu import in_place

    first, second = Cache(), Cache((256, 1, 99), seed=2)
    stream = cupy.cuda.Stream(non_blocking=True)
    with in_place(), stream:
        tensors = _torch_arrays(arrays=(first.q, *first.caches, first.lengths))

        def attend() -> Any:
            q, k, v, lengths = tensors
            return cuflash.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, causal=True)

        _near(attend(), first.want)
        with captured(stream, RELAXED) as graphs:
            out = attend()
        for case in (second, first):
            for tensor, values in zip(tensors, (case.q, *case.caches, case.lengths), strict=True):
                tensor.numpy()[...] = values
            graphs[0].launch(stream)
            _near(out, case.want)


# --- JAX ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _jax_with_gpus() -> Iterator[list[Any]]:
    """Two GPUs for JAX to trace for. Of traced calls, descriptions are put into the list, and nothing runs."""
    import jax

    from cuflash.autograd import jax_call, jax_ffi

    described: list[Any] = []

    def call(description: Any, arrays: Any) -> Any:
        described.append(description)
        return [jax.numpy.zeros(spec.shape, spec.dtype.numpy) for spec in description.results]

    with (
        mock.patch.object(jax_call, "gpus", lambda: (0, 1)),
        mock.patch.object(jax_ffi, "call", call),
    ):
        jax.clear_caches()  # what was traced elsewhere
        yield described
        jax.clear_caches()


class _Program:
    """A traced call, and its run as XLA runs one: buffers and a stream of XLA's, a thread without CuPy."""

    def __init__(self, description: Any, arrays: dict[str, np.ndarray], device: int = 0) -> None:
        import cupy
        from xla_frames import Xla

        self.device = device
        with cupy.cuda.Device(device):
            self.stream = cupy.cuda.Stream(non_blocking=True)
            with self.stream:
                self.inputs = [cupy.asarray(arrays[spec.name]) for spec in description.inputs]
                self.results = {s.name: cupy.empty(s.shape, s.dtype.numpy) for s in description.results}
        addresses = [[x.data.ptr for x in part] for part in (self.inputs, self.results.values())]
        self.xla = Xla(description, *addresses, stream=self.stream.ptr)

    def call(self) -> None:
        """In this thread, whose context is what the driver was told."""
        assert self.xla.call("CUDA") is None, self.xla.errors

    def on_xlas_thread(self, work: Callable[[], Any] | None = None) -> None:
        """Work, or a call, in a thread whose context is set by the driver's API."""
        driver = ctypes.CDLL(stand_in.LIBRARY)

        def run() -> None:
            context = ctypes.c_void_p()
            assert driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), self.device) == 0
            assert driver.cuCtxSetCurrent(context) == 0
            (work or self.call)()

        in_thread(run)

    def read(self, name: str = "out") -> np.ndarray:
        import cupy

        self.stream.synchronize()
        return cupy.asnumpy(self.results[name])


def _traced() -> Any:
    """The description of a causal call."""
    import jax

    with _jax_with_gpus() as described:
        jax.eval_shape(lambda q, k, v: cuflash.attention(q, k, v, causal=True), *host())
    return described[0]


def jax_on_xlas_thread() -> None:
    """On each device, on XLA's stream, into XLA's memory."""
    arrays = dict(zip("qkv", host(), strict=True))
    description = _traced()
    for device in (0, 1):
        program = _Program(description, arrays, device)
        with stand_in.recording() as lines:
            program.on_xlas_thread()
        launches = [line for line in lines if line.startswith("launch")]
        where = f"stream={program.stream.ptr:x} dev={device}"
        assert launches and all(where in line for line in launches), launches
        _close(program.read(), expected())


def jax_in_a_command_buffer() -> None:
    """Recorded by XLA in each mode and replayed after the inputs changed, also where this process did not trace it."""
    import cupy

    from cuflash.autograd import jax_ffi
    from cuflash.jit import module

    description = _traced()
    for forget in (False, True):
        for mode in (GLOBAL, RELAXED):
            program = _Program(description, dict(zip("qkv", host(), strict=True)))
            program.stream.synchronize()
            if forget:
                module.clear()
                cupy.clear_memo()
                jax_ffi._prepared.cache_clear()
            graphs: list[Any] = []

            def record(program=program, mode=mode, graphs=graphs) -> None:
                with captured(program.stream, mode) as made:
                    program.call()
                graphs.extend(made)

            program.on_xlas_thread(record)
            for seed in (0, 1):
                with program.stream:
                    for array, values in zip(program.inputs, host(seed), strict=True):
                        array.set(values)
                graphs[0].launch(program.stream)
                _close(program.read(), expected(seed))


def jax_trains() -> None:
    """The gradient's two calls, whose workspace is XLA's."""
    import jax

    result = cuflash.attention(*host(), causal=True, aux=("lse",))
    (dout, *_) = host(1)
    want = cuflash.attention_backward(dout, *host(), result.out, result.lse, causal=True)
    with _jax_with_gpus() as described:
        loss = lambda q, k, v: (cuflash.attention(q, k, v, causal=True) * dout).sum()  # noqa: E731
        jax.eval_shape(jax.grad(loss, argnums=(0, 1, 2)), *host())
    traced = {description.operation: description for description in described}
    arrays = dict(zip("qkv", host(), strict=True))
    first = _Program(traced["attention"], arrays)
    first.on_xlas_thread()
    arrays |= {"out": first.read(), "lse": first.read("lse"), "dout": dout}
    second = _Program(traced["attention_backward"], arrays)
    second.on_xlas_thread()
    for name in ("dq", "dk", "dv"):
        _close(second.read(name), getattr(want, name), 2e-2)


_TORCH = [
    torch_on_its_stream_and_device, torch_with_lengths_of_the_host, torch_trains, torch_drops_by_its_own_generator,
    torch_decodes_in_a_graph,
]  # fmt: skip
_JAX = [jax_on_xlas_thread, jax_in_a_command_buffer, jax_trains]
SCENARIOS = (_TORCH if find_spec("torch") else []) + (_JAX if find_spec("jax") else [])
