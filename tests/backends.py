"""Running a case where kernels run: the emulator, on this machine's memory, or a GPU.

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_something(backend):
        out, lse, max_logit = backend.run(inputs)

Both take the arrays with their poisoned surroundings and give NumPy arrays back; both check that nothing was written
but the results.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from cases import Inputs

import cuflash

AUX = ("lse", "max_logit")


@contextlib.contextmanager
def using(backend: str, arch: str = "sm_80") -> Iterator[None]:
    """`cuflash.config` set for a while."""
    before = cuflash.config.backend, cuflash.config.arch
    cuflash.config.backend, cuflash.config.arch = backend, arch
    try:
        yield
    finally:
        cuflash.config.backend, cuflash.config.arch = before


class Emulator:
    name = "emulator"

    def run(self, inputs: Inputs, arch: str = "sm_80", **hints: Any) -> tuple[np.ndarray, ...]:
        with using("emulator", arch):
            result = cuflash.attention(
                inputs.q, inputs.k, inputs.v, out=inputs.out, aux=AUX, **inputs.keywords, **hints
            )
        inputs.check_guards()
        return inputs.out, result.lse, result.max_logit


class Cuda:
    name = "cuda"

    def run(self, inputs: Inputs, arch: str = "", **hints: Any) -> tuple[np.ndarray, ...]:
        import cupy

        buffers = {name: cupy.asarray(guard.buffer) for name, guard in inputs.guards.items()}
        arrays = {}
        for name, guard in inputs.guards.items():
            begin = guard.array.ctypes.data - guard.buffer.ctypes.data
            memory = cupy.cuda.MemoryPointer(
                buffers[name].data.mem, buffers[name].data.ptr + begin - buffers[name].data.mem.ptr
            )
            arrays[name] = cupy.ndarray(guard.array.shape, guard.array.dtype, memory, guard.array.strides)
        keywords = {k: cupy.asarray(v) if isinstance(v, np.ndarray) else v for k, v in inputs.keywords.items()}
        result = cuflash.attention(
            arrays["q"], arrays["k"], arrays["v"], out=arrays["out"], aux=AUX, **keywords, **hints
        )
        for name, buffer in buffers.items():
            inputs.guards[name].buffer[...] = buffer.get()
        inputs.check_guards()
        return inputs.out, result.lse.get(), result.max_logit.get()


BACKENDS = [
    pytest.param(Emulator(), id="emulator"),
    pytest.param(Cuda(), id="cuda", marks=pytest.mark.gpu),
]
