"""What the adapters ask of CuPy itself, with a CuPy of one page that writes down the calls."""

from __future__ import annotations

import contextlib
import ctypes
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.nowhere import CupyArray
from cuflash import array, dtypes
from cuflash.errors import UnsupportedError
from cuflash.frameworks import cupy as adapter
from cuflash.jit import driver


class CudaError(Exception):
    """Stands for cupy.cuda.runtime.CUDARuntimeError."""


class FakeCupy:
    """Two devices, of which 0 is current; a stream; events that are done when told so."""

    def __init__(self) -> None:
        self.current = 0
        self.copies: list[tuple[int, int]] = []
        self.events: list[SimpleNamespace] = []
        self.synchronized: list[int] = []
        self.stream = SimpleNamespace(ptr=0xABC, is_capturing=lambda: False)
        self.cuda = SimpleNamespace(
            Device=self.device,
            Event=self.event,
            get_current_stream=lambda device=-1: self.stream,
            runtime=SimpleNamespace(
                CUDARuntimeError=CudaError,
                getDevice=lambda: self.current,
                memcpyDeviceToHost=2,
                memcpyAsync=lambda to, source, size, kind, stream: self.copies.append((source, size)),
                streamSynchronize=self.synchronized.append,
            ),
        )

    @contextlib.contextmanager
    def device(self, index: int):
        before, self.current = self.current, index
        yield
        self.current = before

    def event(self, disable_timing: bool) -> SimpleNamespace:
        assert disable_timing
        event = SimpleNamespace(done=False, record=lambda stream: None)
        self.events.append(event)
        return event

    def empty(self, shape, dtype) -> CupyArray:
        x = CupyArray(0x7000, np.empty(shape, dtype))
        x.data.device_id = self.current
        x.data.copy_from_host_async = lambda source, size, stream: self.copies.append((source, size))
        return x


@pytest.fixture
def fake(monkeypatch) -> FakeCupy:
    made = FakeCupy()
    monkeypatch.setattr(adapter, "_cupy", lambda: made)
    monkeypatch.setattr(driver, "unwatched", contextlib.nullcontext)
    return made


def test_memory_comes_from_the_device_of_the_call_whichever_is_current(fake):
    for index in (0, 1):
        view = adapter.empty((2, 3), dtypes.bfloat16, ("cuda", index))
        assert view.device == ("cuda", index) and view.dtype is dtypes.bfloat16
        assert isinstance(adapter.wrap(view), CupyArray)
    assert fake.current == 0


def test_host_values_are_copied_once_without_waiting(fake):
    values = np.array([0, 3, 7], np.int32)
    view = adapter.upload(values, ("cuda", 1))
    assert view.device == ("cuda", 1) and view.shape == (3,) and view.dtype is dtypes.int32
    assert fake.copies == [(values.ctypes.data, 12)] and not fake.synchronized


def test_reading_back_waits_for_the_stream(fake):
    view = array.TensorView(0x7000, (3,), (1,), dtypes.int32, ("cuda", 0), False, None)
    assert adapter.download(view, 5).shape == (3,)
    assert fake.copies == [(0x7000, 12)] and fake.synchronized == [5]


def test_steps_backwards_are_read_back(fake, monkeypatch):
    x = np.arange(24, dtype=np.int16).reshape(4, 6)[::-1, 4:0:-2]
    monkeypatch.setattr(fake.cuda.runtime, "memcpyAsync", lambda to, at, count, *_: ctypes.memmove(to, at, count))
    view = array.TensorView(x.ctypes.data, x.shape, (-6, -2), dtypes.int16, ("cuda", 0), False, None)
    assert np.array_equal(adapter.download(view, 5), x)


def test_borrowed_arrays_live_until_their_work_is_done(fake):
    adapter._in_flight.clear()
    view = array.TensorView(0x7000, (3,), (1,), dtypes.int32, ("cuda", 0), False, None)
    for _ in range(3):
        adapter.retain_until_done([view], 0)
    assert len(adapter._in_flight) == 3
    fake.events[0].done = fake.events[1].done = True
    adapter.retain_until_done([view], 0)
    assert len(adapter._in_flight) == 2, "what is done is let go at the next call"
    for event in fake.events:
        event.done = True
    adapter.retain_until_done([view], 0)
    fake.events[-1].done = True
    adapter._in_flight.clear()


def test_streams_and_capture(fake):
    assert adapter.stream(0) == 0xABC
    assert adapter.capturing(0) is False


def test_no_gpu_is_said_with_the_remedy(fake):
    def no_driver():
        raise CudaError("cudaErrorNoDevice: no CUDA-capable device is detected")

    fake.cuda.runtime.getDevice = no_driver
    with pytest.raises(UnsupportedError, match=r"no GPU can be used \(cudaErrorNoDevice.*arch=.*emulator"):
        adapter.current_device()
