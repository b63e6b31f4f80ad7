"""Launches on the emulator."""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import functools
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from ..arch import GRID_LIMITS
from ..errors import EmulatorError, require
from ..settings import config
from . import counters, events, hostcxx, native, progress, schedule, source

MAX_THREADS = 1024
MAX_SMEM_BYTES = 227 * 1024


class Buffer(Protocol):
    """An array that a launch may touch, see `cuflash.jit.module.Buffer`."""

    @property
    def name(self) -> str: ...
    @property
    def ptr(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def writable(self) -> bool: ...


@functools.cache
def runtime() -> ctypes.CDLL:
    """The emulator's runtime, loaded; compiled where it is not in the cache."""
    # Kernels find the runtime's functions among the process's: hence global.
    library = ctypes.CDLL(str(hostcxx.runtime()), mode=ctypes.RTLD_GLOBAL)
    library.cuflash_emu_launch.argtypes = (ctypes.POINTER(native.Launch), ctypes.POINTER(native.Result))
    library.cuflash_emu_launch.restype = None
    library.cuflash_emu_free.argtypes = (ctypes.POINTER(native.Result),)
    library.cuflash_emu_free.restype = None
    return library


@functools.cache
def open_kernel(library: Path, entry: str) -> tuple[int, int, bool, int]:
    """Address of a kernel in a shared object, the threads of a block it was compiled for, whether its warps meet at
    other barriers than the block's, and how many blocks are a cluster."""
    runtime()
    kernels = ctypes.CDLL(str(library))
    try:
        address = ctypes.cast(kernels[f"cuflash_emu_entry_{entry}"], ctypes.c_void_p).value
        threads = ctypes.c_int32.in_dll(kernels, f"cuflash_emu_threads_{entry}").value
        clocked = ctypes.c_int32.in_dll(kernels, f"cuflash_emu_clocked_{entry}").value
        cluster = ctypes.c_int32.in_dll(kernels, f"cuflash_emu_cluster_{entry}").value
    except (AttributeError, ValueError) as error:
        raise EmulatorError(f"launch: {library} has no kernel {entry!r}") from error
    assert address is not None
    return address, threads, bool(clocked), cluster


def launch(
    library: Path,
    entry: str,
    grid: tuple[int, int, int],
    threads: int,
    smem_bytes: int,
    params: bytes,
    buffers: Sequence[Buffer],
    *,
    seed: int | None = None,
    landing: str | None = None,
    text: str = "",
) -> None:
    """Runs a kernel to its end.

    library        from `hostcxx.compile`
    entry          the kernel's name in it
    threads        of a block
    smem_bytes     dynamic shared memory of a block
    params         the bytes of its struct
    buffers        every array the params point into
    seed, landing  see `schedule`, which gives what is None
    text           the flattened text that the library was made from, for `tracing` to quote

    Raises EmulatorError with a report at the first fault in the order of the blocks; what the blocks before it have
    written stays written. Ctrl-C, and what else a signal's handler raises in the main thread, stops a launch of that
    thread within milliseconds. One of some seconds shows on a terminal how many blocks have ended, where
    `config.on_compile` is "progress".
    """
    address, compiled_threads, clocked, cluster = open_kernel(library, entry)
    given = {"seed": seed, "landing": landing}
    how = replace(schedule.current(), **{name: value for name, value in given.items() if value is not None})
    shape = f"kernel {entry}, grid {grid}, {threads} threads, {smem_bytes} bytes of shared memory"
    _check_shape(shape, grid, threads, compiled_threads, smem_bytes)
    if grid[0] % cluster or threads * cluster > MAX_THREADS:
        raise EmulatorError(
            f"launch: {shape}: clusters of {cluster} blocks must divide grid.x, and here have at most "
            f"{MAX_THREADS} threads"
        )

    table = (native.Buffer * max(1, len(buffers)))()
    for at, buffer in enumerate(buffers):
        table[at] = native.Buffer(buffer.ptr, buffer.nbytes, buffer.name.encode(), buffer.writable)
    memory = ctypes.create_string_buffer(len(params) + 64)
    start = -ctypes.addressof(memory) % 64  # as aligned as a struct may ask
    memory[start : start + len(params)] = params
    counted, traced = counters.asked(), events.asked()
    request = native.Launch(
        entry=address,
        params=ctypes.addressof(memory) + start,
        grid=grid,
        threads=threads,
        smem_bytes=smem_bytes,
        buffer_count=len(buffers),
        buffers=table,
        seed=how.seed,
        step_limit=how.step_limit,
        early_landing=how.landing == "early",
        counting=bool(counted),
        os_threads=how.os_threads or _os_threads(),
        clocked=clocked,
        event_limit=max((limit for _, limit in traced), default=0),
        cluster=cluster,
        control=ctypes.pointer(native.Control()),
    )
    result = native.Result()
    try:
        _run(request, result, f"{entry.removeprefix('cuflash_')} on the emulator")
        report, costs = result.report, result.counters
        for trace, _ in traced:
            _add_events(trace, result, entry, grid, buffers, text)
    finally:
        runtime().cuflash_emu_free(ctypes.byref(result))
    if costs is not None:
        for each in counted:
            each.add(costs.decode())
    if report is not None:
        again = f"cuflash.emulator.schedule(seed={how.seed}, landing={how.landing!r})"
        raise EmulatorError(f"{report.decode(errors='replace')}\n  {shape}\n  the same again: with {again}")


_LOOK_SECONDS = 0.1
_LONG_SECONDS = 2.0  # before that nothing is shown


def _run(request: native.Launch, result: native.Result, what: str) -> None:
    """Runs a launch such that signals are heard meanwhile.

    Python hears them in the main thread, and only while that runs Python: it waits, and another thread runs the launch.
    """
    native = functools.partial(runtime().cuflash_emu_launch, ctypes.byref(request), ctypes.byref(result))
    if threading.get_ident() != threading.main_thread().ident:
        native()
        return
    ended, control = threading.Event(), request.control.contents

    def work() -> None:
        try:
            native()
        finally:
            ended.set()

    try:
        # Not threading.Thread, whose start() can be interrupted when the thread runs already and nobody knows it.
        _thread.start_new_thread(work, ())
    except RuntimeError:  # the system gives no more threads, or the interpreter ends
        native()
        return
    except BaseException:
        _stop(control, ended)
        raise
    try:
        _wait(ended, control, request, what)
    except BaseException:
        _stop(control, ended)
        raise


def _wait(ended: threading.Event, control: native.Control, request: native.Launch, what: str) -> None:
    """Until the launch has ended; says how far it is where it takes long."""
    blocks = request.grid[0] * request.grid[1] * request.grid[2] // request.cluster
    if ended.wait(_LONG_SECONDS):
        return
    with progress.running() as show:
        while not ended.wait(_LOOK_SECONDS):
            if config.on_compile == "progress":
                show(f"running {what}: {control.done} of {blocks} blocks")


def _stop(control: native.Control, ended: threading.Event) -> None:
    """Ends a launch, and comes back when it no longer uses its memory, whatever interrupts."""
    control.stop = 1
    while not ended.is_set():
        with contextlib.suppress(KeyboardInterrupt):
            ended.wait()


_DEFINITION = re.compile(r"^\s*(?:HW_DEVICE\b|HW_(?:CLUSTER_)?KERNEL\([^)]*\)).*?\b(\w+)\(")


@functools.lru_cache(8)
def _places(text: str) -> dict[tuple[str, int], tuple[str, str]]:
    """(file, line) -> what stands there, and the name of the function around it."""
    found, around = {}, {}
    for file, number, line in source.numbered(text):
        if definition := _DEFINITION.match(line):
            around[file] = definition[1]
        found[file, number] = line.strip(), around.get(file, "")
    return found


def _add_events(
    trace: events.Trace,
    result: native.Result,
    entry: str,
    grid: tuple[int, int, int],
    buffers: Sequence[Buffer],
    text: str,
) -> None:
    places = _places(text)
    kernel = entry.removeprefix("cuflash_")
    for e in result.events[: result.event_count]:
        block = e.block % grid[0], e.block // grid[0] % grid[1], e.block // grid[0] // grid[1]
        what, file, passed = e.what.decode(), e.file.decode(), bool(e.passed)
        where = e.object, e.phase, e.tick, file, e.line, *places.get((file, e.line), ("", ""))
        event = events.Event(kernel, trace.launches, block, e.warp, e.lanes, what, passed, *where)
        of = next((x for x in buffers if x.ptr <= e.begin < e.end <= x.ptr + x.nbytes), None)
        if of is not None:
            event = replace(event, buffer=of.name, begin=e.begin - of.ptr, end=e.end - of.ptr)
        trace.events.append(event)
    trace.dropped += result.dropped
    trace.launches += 1


def _check_shape(shape: str, grid: tuple[int, int, int], threads: int, compiled_threads: int, smem_bytes: int) -> None:
    """What CUDA refuses to launch, and what a whole warp needs."""
    if len(grid) != 3 or not all(0 < n <= most for n, most in zip(grid, GRID_LIMITS, strict=True)):
        raise EmulatorError(f"launch: {shape}: a grid has 1 to {GRID_LIMITS} blocks")
    if not 0 < threads <= MAX_THREADS or threads % 32:
        raise EmulatorError(f"launch: {shape}: a block has whole warps of 32, at most {MAX_THREADS} threads")
    if threads > compiled_threads:
        raise EmulatorError(f"launch: {shape}: HW_KERNEL promises at most {compiled_threads} threads")
    if not 0 <= smem_bytes <= MAX_SMEM_BYTES:
        raise EmulatorError(f"launch: {shape}: a block has at most {MAX_SMEM_BYTES} bytes of shared memory")


def _os_threads() -> int:
    if given := os.environ.get("CUFLASH_EMULATOR_THREADS"):
        require(given.isdecimal() and int(given) > 0, f"CUFLASH_EMULATOR_THREADS={given!r} must be at least 1")
        return int(given)
    if "PYTEST_XDIST_WORKER" in os.environ:
        return 1  # its siblings have the other processors
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
