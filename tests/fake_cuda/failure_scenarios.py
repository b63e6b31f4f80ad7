"""Calls on the driver stand-in for which there is no memory, whose launch or module is refused, or whose kernel fails,
hangs or is interrupted: what is said, what was written, and that the next call is right."""

from __future__ import annotations

import signal
from typing import Any
from unittest import mock

import numpy as np

import cuflash
from cuflash.errors import DeviceError, DeviceMemoryError
from cuflash.frameworks import cupy as adapter
from cuflash.jit import module

from . import stand_in
from .scenarios import Appending, Cache, append, attend, captured, expected, host, near, raised, uploaded


def no_memory() -> None:
    """In each allocation of a call in turn: nothing was launched, and the next call is right."""
    import cupy

    cache = Cache()
    arrays = cache.uploaded()
    near(attend(*arrays), cache.want)
    pool = cupy.get_default_memory_pool()
    for count in range(20):
        pool.free_all_blocks()
        with stand_in.settings(allocations=count), stand_in.recording() as lines:
            try:
                out = attend(*arrays)
            except DeviceMemoryError as error:
                assert "on GPU 0" in str(error) and "free_all_blocks" in str(error)
            else:
                break
        assert not any(line.startswith("launch") for line in lines), lines
        near(attend(*arrays), cache.want)
    assert 2 <= count < 20
    near(out, cache.want)
    for array, values in zip(arrays, (cache.q, *cache.caches, cache.lengths), strict=True):
        np.testing.assert_array_equal(array.get(), values)


def no_memory_for_host_lengths() -> None:
    """What could not be copied is named, nothing was launched, and the next call is right."""
    import cupy

    arrays = tuple(x[0] for x in host())
    starts, others = np.array([0, 15, 40], np.int32), np.array([0, 20, 40], np.int32)
    want = cuflash.attention(*arrays, cu_seqlens_q=starts, cu_seqlens_k=others, causal=True)
    tensors = uploaded(arrays)
    out = cupy.empty_like(tensors[0])

    def attend() -> Any:
        return cuflash.attention(*tensors, cu_seqlens_q=starts, cu_seqlens_k=others, causal=True, out=out)

    near(attend(), want)
    cupy.cuda.Stream.null.synchronize()
    with cupy.cuda.using_allocator(None):  # a pool may have room for so little
        for count, name in enumerate(("cu_seqlens_q", "cu_seqlens_k")):
            with stand_in.settings(allocations=count), stand_in.recording() as lines:
                message = raised(DeviceMemoryError, attend)
            assert message.startswith(f"{name} in host memory") and "(3,), int32, on GPU 0" in message, message
            assert not any(line.startswith("launch") for line in lines), lines
    near(attend(), want)


def nothing_was_launched(arrays: list[Any], values: tuple[np.ndarray, ...], lines: list[str]) -> None:
    """And the caller's arrays are what they were."""
    assert not any(line.startswith("launch") for line in lines), lines
    for array, value in zip(arrays, values, strict=True):
        np.testing.assert_array_equal(array.get(), value)


def no_memory_for_an_append() -> None:
    """In each allocation in turn, without a pool that has room: no cache is written by a call that fails."""
    import cupy

    case = Appending(1, (7, 130, 200), 1)
    want, *caches = case.want
    arrays = uploaded(case.arrays)
    for count in range(20):
        cupy.cuda.Stream.null.synchronize()
        with cupy.cuda.using_allocator(None), stand_in.recording() as lines:
            with stand_in.settings(allocations=count):
                try:
                    out = append(*arrays)
                except DeviceMemoryError as error:
                    assert "on GPU 0" in str(error), error
                else:
                    break
        nothing_was_launched(arrays, case.arrays, lines)
    assert 2 <= count < 20
    for got, right in zip((out, *arrays[1:3]), (want, *caches), strict=True):
        near(got, right)


def no_memory_for_gradients() -> None:
    """In each allocation in turn, of packed sequences."""
    import cupy

    starts = np.array([0, 15, 40], np.int32)
    q, k, v = (x[0] for x in host())
    made = cuflash.attention(q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, causal=True, aux=("lse",))
    values = (made.out, q, k, v, made.out, made.lse, starts)

    def backward(*arrays: Any) -> Any:
        *rest, starts = arrays
        return cuflash.attention_backward(*rest, cu_seqlens_q=starts, cu_seqlens_k=starts, causal=True)

    arrays, want = uploaded(values), backward(*values)
    for count in range(20):
        cupy.cuda.Stream.null.synchronize()
        with cupy.cuda.using_allocator(None), stand_in.recording() as lines:
            with stand_in.settings(allocations=count):
                try:
                    grads = backward(*arrays)
                except DeviceMemoryError as error:
                    assert "on GPU 0" in str(error), error
                else:
                    break
        nothing_was_launched(arrays, values, lines)
    assert 4 <= count < 20
    for name in ("dq", "dk", "dv"):
        near(getattr(grads, name), getattr(want, name), 2e-2)


def no_memory_while_a_stream_is_captured() -> None:
    """In a mode that allows no allocation: what to do is said, the capture alone is lost."""
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        arrays = uploaded()
        stream.synchronize()
    messages: list[str] = []
    try:
        with cupy.cuda.using_allocator(None), captured(stream):  # a pool may have room
            messages.append(raised(DeviceError, lambda: cuflash.attention(*arrays, causal=True)))
    except RuntimeError as error:  # CuPy's, of the capture's end
        assert "Capture" in str(error)
    assert "in a mode other than relaxed" in messages[0] and "pass out=" in messages[0], messages
    with stream:
        near(cuflash.attention(*arrays, causal=True), expected())


def a_launch_is_refused() -> None:
    cache = Cache()
    arrays = cache.uploaded()
    near(attend(*arrays), cache.want)
    for which in (1, 2, 3):
        with stand_in.settings(failing_launch=which):
            message = raised(DeviceError, lambda: attend(*arrays))
        assert "could not be launched on GPU 0" in message and "LAUNCH_OUT_OF_RESOURCES" in message
        near(attend(*arrays), cache.want)


def a_kernel_fails() -> None:
    """While it runs: every later call says so, until the process is made whole."""
    import cupy

    arrays, others = uploaded(), uploaded()
    outs = [cupy.empty_like(arrays[0]) for _ in range(2)]
    with stand_in.settings(failing_kernel=1):
        cuflash.attention(*arrays, causal=True, out=outs[0])
        stand_in.run_all()
        # The driver refuses the map of one call and the launch of the other, whose maps are known.
        message = raised(DeviceError, lambda: cuflash.attention(*others, causal=True, out=outs[1]))
        assert "LAUNCH_FAILED" in message
        if adapter.arch_of(0).name == "sm_90a":
            assert "an earlier kernel of this process failed" in message
        message = raised(DeviceError, lambda: cuflash.attention(*arrays, causal=True, out=outs[0]))
        assert "LAUNCH_FAILED" in message
    near(cuflash.attention(*arrays, causal=True), expected())
    near(cuflash.attention(*others, causal=True), expected())


def a_module_is_not_loaded() -> None:
    import cupy

    arrays = uploaded()
    module.clear()
    cupy.clear_memo()
    with stand_in.settings(failing_load=1):
        message = raised(DeviceError, lambda: cuflash.attention(*arrays, causal=True))
    chip = adapter.arch_of(0).name
    kernel = "forward_sm90" if chip == "sm_90a" else "forward_sm80"
    assert f"{kernel} for {chip} could not be loaded on GPU 0" in message, message
    near(cuflash.attention(*arrays, causal=True), expected())


def a_module_of_an_append_is_not_loaded() -> None:
    """Of any of its kernels: no cache is written by a call that fails."""
    import cupy

    case = Appending(2, (7, 130, 200), 1)  # of a number of rows that no other scenario has: it is prepared here
    arrays = uploaded(case.arrays)
    for count in range(1, 20):
        module.clear()
        cupy.clear_memo()
        with stand_in.settings(failing_load=count), stand_in.recording() as lines:
            try:
                out = append(*arrays)
            except DeviceError as error:
                assert "could not be loaded on GPU 0" in str(error), error
            else:
                break
        nothing_was_launched(arrays, case.arrays, lines)
    assert 2 < count < 20
    for got, right in zip((out, *arrays[1:3]), case.want, strict=True):
        near(got, right)


def a_kernel_that_never_ends() -> None:
    """The call returns, and so does another one beside it."""
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        arrays = uploaded()
        stream.synchronize()
        with stand_in.settings(hanging=True):
            out = cuflash.attention(*arrays, causal=True)
            assert not stream.done
        near(out, expected())


def ctrl_c_while_a_kernel_runs() -> None:
    """It is raised where the program waits, and the next call is right."""
    from . import dispatch

    arrays = uploaded()
    out = cuflash.attention(*arrays, causal=True)
    with mock.patch.object(dispatch, "_emulate", lambda *launch: signal.raise_signal(signal.SIGINT)):
        raised(KeyboardInterrupt, out.get)
    near(cuflash.attention(*arrays, causal=True), expected())


SCENARIOS = [
    no_memory, no_memory_for_host_lengths, no_memory_for_an_append, no_memory_for_gradients,
    no_memory_while_a_stream_is_captured, a_launch_is_refused, a_kernel_fails, a_module_is_not_loaded,
    a_module_of_an_append_is_not_loaded, a_kernel_that_never_ends, ctrl_c_while_a_kernel_runs,
]  # fmt: skip
