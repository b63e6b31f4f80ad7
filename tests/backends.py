"""Running a case where kernels run: the emulator, on this machine's memory, or a GPU.

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_something(backend):
        out, lse, max_logit = backend.run(inputs)

Both take the arrays with their poisoned surroundings and give NumPy arrays back; both check that nothing was written
but the results.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from cases import Gradients, Inputs, Poisoned

import cuflash

AUX = ("lse", "max_logit")
ARCH = os.environ.get("CUFLASH_TEST_ARCH", "sm_80")  # of the emulator, where a test asks for none


@contextlib.contextmanager
def using(backend: str, arch: str = ARCH) -> Iterator[None]:
    """`cuflash.config` set for a while."""
    before = cuflash.config.backend, cuflash.config.arch
    cuflash.config.backend, cuflash.config.arch = backend, arch
    try:
        yield
    finally:
        cuflash.config.backend, cuflash.config.arch = before


class Emulator:
    name = "emulator"

    def run(self, inputs: Inputs, arch: str = ARCH, **hints: Any) -> tuple[np.ndarray, ...]:
        """(out, lse, max_logit) of a case."""
        with using("emulator", arch):
            result = cuflash.attention(
                inputs.q, inputs.k, inputs.v, out=inputs.out, aux=AUX, **inputs.keywords, **hints
            )
        inputs.check_guards()
        return inputs.out, result.lse, result.max_logit

    def run_backward(
        self, inputs: Inputs, given: Gradients, arch: str = ARCH, captured_grads: bool = True, **hints: Any
    ) -> cuflash.AttentionGrads:
        """The gradients of a case whose `run` is done: those of out and lse are in `given`, where dq, dk, dv go too."""
        with using("emulator", arch):
            lse = cuflash.attention(inputs.q, inputs.k, inputs.v, aux=AUX, **inputs.keywords).lse
            grads = cuflash.attention_backward(
                given.dout, inputs.q, inputs.k, inputs.v, inputs.out, lse, dlse=given.dlse,
                captured_grads=captured_grads, **given.targets, **inputs.keywords, **hints,
            )  # fmt: skip
        given.check_guards()
        return grads


class Cuda:
    name = "cuda"

    def run(self, inputs: Inputs, arch: str = "", **hints: Any) -> tuple[np.ndarray, ...]:
        import cupy

        buffers, arrays = on_device(inputs.guards)
        keywords = {k: cupy.asarray(v) if isinstance(v, np.ndarray) else v for k, v in inputs.keywords.items()}
        result = cuflash.attention(
            arrays["q"], arrays["k"], arrays["v"], out=arrays["out"], aux=AUX, **keywords, **hints
        )
        for name, buffer in buffers.items():
            inputs.guards[name].buffer[...] = buffer.get()
        inputs.check_guards()
        return inputs.out, result.lse.get(), result.max_logit.get()

    def run_backward(
        self, inputs: Inputs, given: Gradients, arch: str = "", captured_grads: bool = True, **hints: Any
    ) -> cuflash.AttentionGrads:
        import cupy

        _, arrays = on_device(inputs.guards)
        buffers, gradients = on_device(given.guards)
        keywords = {k: cupy.asarray(v) if isinstance(v, np.ndarray) else v for k, v in inputs.keywords.items()}
        q, k, v, out = (arrays[name] for name in ("q", "k", "v", "out"))
        lse = cuflash.attention(q, k, v, aux=AUX, **keywords).lse
        dlse = None if given.dlse is None else cupy.asarray(given.dlse)
        grads = cuflash.attention_backward(
            gradients.pop("dout"), q, k, v, out, lse, dlse=dlse, captured_grads=captured_grads, **gradients,
            **keywords, **hints,
        )  # fmt: skip
        for name, buffer in buffers.items():
            given.guards[name].buffer[...] = buffer.get()
        given.check_guards()
        host = lambda x: None if x is None else x.get()  # noqa: E731
        return cuflash.AttentionGrads(
            **given.targets, dsink=host(grads.dsink), dcaptured=tuple(map(host, grads.dcaptured))
        )


def on_device(guards: dict[str, Poisoned]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Whole buffers as CuPy arrays, and the arrays inside them."""
    import cupy

    buffers = {name: cupy.asarray(guard.buffer) for name, guard in guards.items()}
    arrays = {}
    for name, guard in guards.items():
        begin = guard.array.ctypes.data - guard.buffer.ctypes.data
        whole = buffers[name].data
        memory = cupy.cuda.MemoryPointer(whole.mem, whole.ptr + begin - whole.mem.ptr)
        arrays[name] = cupy.ndarray(guard.array.shape, guard.array.dtype, memory, guard.array.strides)
    return buffers, arrays


BACKENDS = [
    pytest.param(Emulator(), id="emulator"),
    pytest.param(Cuda(), id="cuda", marks=pytest.mark.gpu),
]
