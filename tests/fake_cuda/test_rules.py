"""What the driver stand-in refuses, as its manuals say; no kernel runs."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from . import stand_in
from .scenarios import GLOBAL, RELAXED, in_thread

UNSUPPORTED, INVALIDATED, MERGE, UNJOINED, ISOLATION, IMPLICIT, CAPTURED_EVENT, WRONG_THREAD = (
    900, 901, 902, 904, 905, 906, 907, 908,
)  # fmt: skip


@pytest.fixture
def cupy():
    import cupy

    return cupy


@pytest.fixture
def streams(cupy):
    return [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]


def status(call: Callable[..., Any], *arguments: Any) -> int:
    """What CuPy's runtime raises; 0 if nothing."""
    try:
        call(*arguments)
    except RuntimeError as error:
        return error.status
    return 0


@contextlib.contextmanager
def captured(stream: Any, mode: int = RELAXED, ends: int = 0) -> Iterator[None]:
    """A capture whose end has a status."""
    with stream:
        stream.begin_capture(mode)
        yield
        assert status(stream.end_capture) == ends


def test_an_event_belongs_to_its_context(cupy, streams):
    with cupy.cuda.Device(1):
        event = cupy.cuda.Event()
    assert status(event.record, streams[0]) == 400


def test_a_capture_neither_is_waited_for_nor_asked(cupy, streams):
    for call in (streams[0].synchronize, lambda: streams[0].done, cupy.cuda.Device().synchronize):
        with captured(streams[0], ends=INVALIDATED):
            assert status(call) == UNSUPPORTED
    with cupy.cuda.Device(1):
        other = cupy.cuda.Stream(non_blocking=True)
        with captured(other):
            with cupy.cuda.Device(0):
                assert status(cupy.cuda.Device().synchronize) == 0, "another device's capture"


def test_an_event_of_a_capture(cupy, streams):
    with captured(streams[0]):
        event = streams[0].record()
        assert status(lambda: event.done) == CAPTURED_EVENT
    assert status(streams[1].wait_event, event) == CAPTURED_EVENT, "its capture has ended"


def test_a_capture_waits_for_no_event_from_outside(streams):
    event = streams[1].record()
    with captured(streams[0], ends=INVALIDATED):
        assert status(streams[0].wait_event, event) == ISOLATION


def test_two_captures_do_not_meet(streams):
    with captured(streams[0], ends=INVALIDATED), captured(streams[1], ends=INVALIDATED):
        event = streams[0].record()
        assert status(streams[1].wait_event, event) == MERGE


def test_a_fork_is_joined(cupy, streams):
    x = cupy.empty(4)
    with captured(streams[0], ends=UNJOINED):
        streams[1].wait_event(streams[0].record())
        x.data.memset_async(0, 4, streams[1])


def test_the_legacy_stream_beside_a_blocking_capture(cupy):
    x = cupy.empty(4)
    with captured(cupy.cuda.Stream(), ends=INVALIDATED):
        assert status(x.data.memset_async, 0, 4, cupy.cuda.Stream.null) == IMPLICIT


def test_no_memory_is_allocated_beside_a_capture(cupy, streams):
    """In CUDA's default mode by no thread."""
    runtime = cupy.cuda.runtime
    with captured(streams[0]):
        runtime.free(runtime.malloc(4))
    with captured(streams[0], GLOBAL, ends=INVALIDATED):
        assert status(runtime.malloc, 4) == UNSUPPORTED
    with captured(streams[0], GLOBAL, ends=INVALIDATED):
        found: list[int] = []
        in_thread(lambda: found.append(status(runtime.malloc, 4)))
        assert found == [UNSUPPORTED]


def test_a_capture_ends_in_its_thread(streams):
    found: list[int] = []
    with captured(streams[0], GLOBAL):
        in_thread(lambda: found.append(status(streams[0].end_capture)))
    assert found == [WRONG_THREAD]


def test_a_graph_is_not_launched_into_a_capture(cupy, streams):
    with streams[0]:
        streams[0].begin_capture(RELAXED)
        cupy.empty(4).data.memset_async(0, 4, streams[0])
        graph = streams[0].end_capture()
    with captured(streams[1], ends=INVALIDATED):
        assert status(graph.launch, streams[1]) == UNSUPPORTED


def test_memory_is_neither_cleared_nor_larger_than_asked(cupy):
    runtime = cupy.cuda.runtime
    pointer = runtime.malloc(1000)
    assert ctypes.string_at(pointer, 1000) == b"\xa5" * 1000
    assert status(runtime.memset, pointer, 0, 1001) == 1
    assert status(runtime.free, pointer + 8) == 1 and status(runtime.free, pointer) == 0
    assert stand_in.device_of(pointer) is None


def test_a_thread_begins_without_a_context():
    driver = ctypes.CDLL(stand_in.LIBRARY)
    found: list[int] = []
    in_thread(lambda: found.append(driver.cuStreamCreate(ctypes.byref(ctypes.c_void_p()), 1)))
    assert found == [201]
