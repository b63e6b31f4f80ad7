"""Running kernels without a GPU: launches on the emulator, what they cost, what their warps do, and in which order.

    with cuflash.emulator.counting() as counters:
        cuflash.attention(q, k, v)              # under config.backend = "emulator"
    counters.matrix_instructions                # {"mma_m16n8k16_f16": 128}

    with cuflash.emulator.schedule(seed=7, landing="early"):
        cuflash.attention(q, k, v)              # another order; the result must have the same bits

    with cuflash.emulator.tracing() as trace:
        cuflash.attention(q, k, v)              # what every warp does, event by event

A fault raises `cuflash.errors.EmulatorError`. Its message begins with what it is:

    race            two warps use one byte of shared memory, one writes, and no barrier orders them; or a copy to it is
                    in flight, or a matrix product that reads it or adds to the accumulators that changed
    proxy           a tensor copy or a matrix product meets what threads wrote, and they did not fence
    protocol        an mbarrier, named barrier, tensor map, descriptor or register count used against its rules; a block
                    that ends before its copies and products
    uninitialised   a read of shared memory that nobody has written
    out of bounds   an access outside of the block's shared memory or the launch's arrays, or a write to a read-only one
    misaligned      an address that is no multiple of the access's size
    divergence      threads that must meet stand at different instructions
    collective      lanes wait for others that have exited
    deadlock        no thread can run on
    runaway         a block took more steps than allowed
    fault           a wild pointer, a stack overflow, or (on x86-64) an integer division by zero in the kernel
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import functools
import math
import numbers
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from .arch import GRID_LIMITS
from .errors import EmulatorError, require
from .jit import progress
from .settings import config

DEFAULT_SEED = 20260
LANDINGS = ("late", "early")
DEFAULT_STEP_LIMIT = 400_000_000  # of one block: accesses and meetings of its threads; some 10 seconds
MAX_THREADS = 1024
MAX_SMEM_BYTES = 227 * 1024
_MOST_THREADS = 1024

__all__ = ["Counters", "Event", "Schedule", "Trace", "counting", "launch", "schedule", "speed", "tracing"]


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


def _is_count(value: object, least: int = 1, most: int = 2**64 - 1) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and least <= int(value) <= most


# --- What a launch costs ------------------------------------------------------------------------------------------


@dataclass
class Counters:
    """Sums over the launches counted. Only what is not zero has an entry; a site is "file:line".

    launches              kernels started
    matrix_instructions   name -> matrix multiplications, e.g. "mma_m16n8k16_f16", one for a whole warp, or
                          "wgmma_m64n128k16_bf16", one for a warpgroup
    matrix_moves          name -> ldmatrix and stmatrix, likewise; tensor copies, "tma_load" and "tma_store"
    exchanges             name -> times the lanes of a warp told each other values: "shfl_xor", "ballot" ...
    barriers              times a block, or the threads of a named barrier, met
    global_bytes_read     buffer -> bytes asked for by loads and asynchronous copies
    global_bytes_written  buffer -> bytes
    global_sectors        32-byte sectors touched, each counted once for an instruction of a warp
    sectors               site -> of these, those that the access there touched
    uncoalesced           site -> sectors beyond those its bytes would fill
    shared_bytes          bytes of shared memory that threads read and wrote
    shared_passes         site -> passes over shared memory, of 128 bytes at most, that the access there took
    bank_conflicts        site -> passes beyond those its bytes need
    """

    launches: int = 0
    matrix_instructions: Counter[str] = field(default_factory=Counter)
    matrix_moves: Counter[str] = field(default_factory=Counter)
    exchanges: Counter[str] = field(default_factory=Counter)
    barriers: int = 0
    global_bytes_read: Counter[str] = field(default_factory=Counter)
    global_bytes_written: Counter[str] = field(default_factory=Counter)
    global_sectors: int = 0
    sectors: Counter[str] = field(default_factory=Counter)
    uncoalesced: Counter[str] = field(default_factory=Counter)
    shared_bytes: int = 0
    shared_passes: Counter[str] = field(default_factory=Counter)
    bank_conflicts: Counter[str] = field(default_factory=Counter)

    @property
    def total_matrix_instructions(self) -> int:
        """Matrix multiplications of all kinds."""
        return sum(self.matrix_instructions.values())

    def _add(self, text: str) -> None:
        self.launches += 1
        groups = {
            "matrix": self.matrix_instructions,
            "moves": self.matrix_moves,
            "read": self.global_bytes_read,
            "written": self.global_bytes_written,
            "exchanges": self.exchanges,
            "sectors": self.sectors,
            "uncoalesced": self.uncoalesced,
            "shared_passes": self.shared_passes,
            "bank_conflicts": self.bank_conflicts,
        }
        for line in text.splitlines():
            group, name, number = line.split("\t")
            if group == "total":
                setattr(self, name, getattr(self, name) + int(number))
            elif int(number):
                groups[group][name] += int(number)


_counting: list[Counters] = []


@contextlib.contextmanager
def counting() -> Iterator[Counters]:
    """Counts what every launch on the emulator costs while this lasts, in any thread. Launches run slower meanwhile.

    >>> with counting() as counters:
    ...     pass
    >>> counters.launches, counters.total_matrix_instructions
    (0, 0)
    """
    counters = Counters()
    _counting.append(counters)
    try:
        yield counters
    finally:
        _counting[:] = [c for c in _counting if c is not counters]


# --- What its warps do --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Event:
    """What a warp did at one place. Where it may have to wait there are two: it comes, and it goes on (`passed`).

    kernel   the kernel's name, and `launch`, which of the trace's launches: 0, 1, ...
    block    (x, y, z); of a cluster, whose blocks run as one, the first
    warp     of the block, those of a cluster's blocks one after the other, and `lanes`, how many of its lanes did it
    what     sync_threads, cluster_sync, mbarrier_init, mbarrier_arrive, mbarrier_arrive_at, mbarrier_arrive_expect_tx,
             mbarrier_wait, named_sync, named_arrive, tma_load, tma_store, bulk_commit, bulk_wait, cp_async_16,
             cp_async_4, cp_async_commit, cp_async_wait, wgmma, wgmma_commit, wgmma_wait, mma_m16n8k16,
             mma_m16n8k8_tf32, shfl, shfl_xor and so on, register_alloc, register_dealloc, exit. Loads and
             stores by threads are not among them
    object   an mbarrier's offset in shared memory (of tma_load: the one its bytes are counted by), a named barrier's
             number, 0 for sync_threads and cluster_sync; -1: none
    phase    of the mbarrier or barrier: its number, from 0 (-1: a wait that never waits). Of asynchronous copies and
             products their group; of a wait for groups the last that it waits for
    tick     steps the block had taken: accesses to memory and meetings of its threads, one warp after the other. An
             event is no earlier than what its warp does before it
    file, line  where in the kernel's text, and what stands there: `code`, in the `function` ("" where the launch was
             given no text)
    buffer   of a copy: the array, and its bytes [begin, end), for a tensor's box from its first to behind its last
    """

    kernel: str
    launch: int
    block: tuple[int, int, int]
    warp: int
    lanes: int
    what: str
    passed: bool
    object: int
    phase: int
    tick: int
    file: str
    line: int
    code: str = ""
    function: str = ""
    buffer: str = ""
    begin: int = 0
    end: int = 0


@dataclass(repr=False)
class Trace:
    """The events of the launches traced: launch by launch, block by block, in the order in which they happened;
    those of a warp in the order of its program.

    dropped   how many were not kept, because their block had more than the limit
    launches  kernels started
    """

    events: list[Event] = field(default_factory=list)
    dropped: int = 0
    launches: int = 0

    def __repr__(self) -> str:
        kernels = ", ".join(dict.fromkeys(e.kernel for e in self.events))
        return f"Trace({len(self.events):,} events, of {kernels or 'no kernel'})"


_tracing: list[tuple[Trace, int]] = []


@contextlib.contextmanager
def tracing(limit: int = 200_000) -> Iterator[Trace]:
    """Keeps what the warps of every launch do while this lasts, in any thread: at most `limit` events of a block.

    A launch that ends with a report leaves what its blocks did until then.

    >>> with tracing() as trace:
    ...     pass
    >>> trace.events, trace.dropped
    ([], 0)
    """
    require(
        _is_count(limit), f"limit={limit!r} must be an int from 1 to 2**64 - 1: the events that are kept of a block"
    )
    entry = Trace(), limit
    _tracing.append(entry)
    try:
        yield entry[0]
    finally:
        _tracing[:] = [e for e in _tracing if e is not entry]


# --- In which order ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """How launches run.

    seed        draws the order of blocks, and between barriers of warps and lanes
    landing     "late": an asynchronous copy lands in the wait that covers it; "early": when it is issued
    step_limit  a block that takes more steps (accesses to memory, meetings of threads) is stopped
    os_threads  threads of this machine that blocks are spread over. Nothing but time depends on it, and, with more than
                one, the order in which blocks add to a number by atomics. None: one for each processor, or
                CUFLASH_EMULATOR_THREADS; one in a worker of pytest-xdist
    """

    seed: int = DEFAULT_SEED
    landing: str = "late"
    step_limit: int = DEFAULT_STEP_LIMIT
    os_threads: int | None = None

    def __post_init__(self) -> None:
        require(_is_count(self.seed, least=0), f"seed={self.seed!r} must be an integer of 64 bits")
        require(
            isinstance(self.landing, str) and self.landing in LANDINGS,
            f"landing={self.landing!r} must be one of {', '.join(LANDINGS)}",
        )
        require(_is_count(self.step_limit), f"step_limit={self.step_limit!r} must be an int from 1 to 2**64 - 1")
        require(
            self.os_threads is None or _is_count(self.os_threads, most=_MOST_THREADS),
            f"os_threads={self.os_threads!r} must be an int from 1 to {_MOST_THREADS}, or None",
        )


_schedule = Schedule()


@contextlib.contextmanager
def schedule(
    *,
    seed: int | None = None,
    landing: str | None = None,
    step_limit: int | None = None,
    os_threads: int | None = None,
) -> Iterator[Schedule]:
    """Sets how launches run while this lasts, in any thread; what is not given stays as it is. See `Schedule`.

    >>> with schedule(seed=3, landing="early") as chosen:
    ...     chosen.seed, chosen.landing
    (3, 'early')
    """
    global _schedule
    given = {"seed": seed, "landing": landing, "step_limit": step_limit, "os_threads": os_threads}
    before = _schedule
    _schedule = replace(before, **{name: value for name, value in given.items() if value is not None})
    try:
        yield _schedule
    finally:
        _schedule = before


def _os_threads() -> int:
    if given := os.environ.get("CUFLASH_EMULATOR_THREADS"):
        require(given.isdecimal() and int(given) > 0, f"CUFLASH_EMULATOR_THREADS={given!r} must be at least 1")
        return int(given)
    if "PYTEST_XDIST_WORKER" in os.environ:
        return 1  # its siblings have the other processors
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- Launching ----------------------------------------------------------------------------------------------------


class _Control(ctypes.Structure):  # CuflashEmuControl in kernels_cu/hw_emu/runtime.cpp, and so on
    _fields_ = (("stop", ctypes.c_int32), ("done", ctypes.c_uint64))


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("begin", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
        ("writable", ctypes.c_int32),
    )


class _Launch(ctypes.Structure):
    _fields_ = (
        ("entry", ctypes.c_void_p),
        ("params", ctypes.c_void_p),
        ("grid", ctypes.c_int32 * 3),
        ("threads", ctypes.c_int32),
        ("smem_bytes", ctypes.c_uint32),
        ("buffer_count", ctypes.c_int32),
        ("buffers", ctypes.POINTER(_Buffer)),
        ("seed", ctypes.c_uint64),
        ("step_limit", ctypes.c_uint64),
        ("early_landing", ctypes.c_int32),
        ("counting", ctypes.c_int32),
        ("os_threads", ctypes.c_int32),
        ("clocked", ctypes.c_int32),
        ("event_limit", ctypes.c_uint64),
        ("cluster", ctypes.c_int32),
        ("control", ctypes.POINTER(_Control)),
    )


class _Event(ctypes.Structure):
    _fields_ = (
        ("tick", ctypes.c_uint64),
        ("begin", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("what", ctypes.c_char_p),
        ("file", ctypes.c_char_p),
        ("line", ctypes.c_int32),
        ("block", ctypes.c_int32),
        ("warp", ctypes.c_int32),
        ("lanes", ctypes.c_int32),
        ("object", ctypes.c_int32),
        ("phase", ctypes.c_int32),
        ("passed", ctypes.c_int32),
    )


class _Result(ctypes.Structure):
    _fields_ = (
        ("report", ctypes.c_char_p),
        ("counters", ctypes.c_char_p),
        ("events", ctypes.POINTER(_Event)),
        ("event_count", ctypes.c_uint64),
        ("dropped", ctypes.c_uint64),
    )


@functools.cache
def _runtime() -> ctypes.CDLL:
    from .jit import hostcxx

    # Kernels find the runtime's functions among the process's: hence global.
    library = ctypes.CDLL(str(hostcxx.runtime()), mode=ctypes.RTLD_GLOBAL)
    library.cuflash_emu_launch.argtypes = (ctypes.POINTER(_Launch), ctypes.POINTER(_Result))
    library.cuflash_emu_launch.restype = None
    library.cuflash_emu_free.argtypes = (ctypes.POINTER(_Result),)
    library.cuflash_emu_free.restype = None
    return library


@functools.cache
def open_kernel(library: Path, entry: str) -> tuple[int, int, bool, int]:
    """Address of a kernel in a shared object, the threads of a block it was compiled for, whether its warps meet at
    other barriers than the block's, and how many blocks are a cluster."""
    _runtime()
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
    how = replace(_schedule, **{name: value for name, value in given.items() if value is not None})
    shape = f"kernel {entry}, grid {grid}, {threads} threads, {smem_bytes} bytes of shared memory"
    _check_shape(shape, grid, threads, compiled_threads, smem_bytes)
    if grid[0] % cluster or threads * cluster > MAX_THREADS:
        raise EmulatorError(
            f"launch: {shape}: clusters of {cluster} blocks must divide grid.x, and here have at most "
            f"{MAX_THREADS} threads"
        )

    table = (_Buffer * max(1, len(buffers)))()
    for at, buffer in enumerate(buffers):
        table[at] = _Buffer(buffer.ptr, buffer.nbytes, buffer.name.encode(), buffer.writable)
    memory = ctypes.create_string_buffer(len(params) + 64)
    start = -ctypes.addressof(memory) % 64  # as aligned as a struct may ask
    memory[start : start + len(params)] = params
    counted, traced = tuple(_counting), tuple(_tracing)
    request = _Launch(
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
        control=ctypes.pointer(_Control()),
    )
    result = _Result()
    try:
        _run(request, result, f"{entry.removeprefix('cuflash_')} on the emulator")
        report, counters = result.report, result.counters
        for trace, _ in traced:
            _add_events(trace, result, entry, grid, buffers, text)
    finally:
        _runtime().cuflash_emu_free(ctypes.byref(result))
    if counters is not None:
        for each in counted:
            each._add(counters.decode())
    if report is not None:
        again = f"cuflash.emulator.schedule(seed={how.seed}, landing={how.landing!r})"
        raise EmulatorError(f"{report.decode(errors='replace')}\n  {shape}\n  the same again: with {again}")


_LOOK_SECONDS = 0.1
_LONG_SECONDS = 2.0  # before that nothing is shown


def _run(request: _Launch, result: _Result, what: str) -> None:
    """Runs a launch such that signals are heard meanwhile.

    Python hears them in the main thread, and only while that runs Python: it waits, and another thread runs the launch.
    """
    native = functools.partial(_runtime().cuflash_emu_launch, ctypes.byref(request), ctypes.byref(result))
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


def _wait(ended: threading.Event, control: _Control, request: _Launch, what: str) -> None:
    """Until the launch has ended; says how far it is where it takes long."""
    blocks = request.grid[0] * request.grid[1] * request.grid[2] // request.cluster
    if ended.wait(_LONG_SECONDS):
        return
    with progress.running() as show:
        while not ended.wait(_LOOK_SECONDS):
            if config.on_compile == "progress":
                show(f"running {what}: {control.done} of {blocks} blocks")


def _stop(control: _Control, ended: threading.Event) -> None:
    """Ends a launch, and comes back when it no longer uses its memory, whatever interrupts."""
    control.stop = 1
    while not ended.is_set():
        with contextlib.suppress(KeyboardInterrupt):
            ended.wait()


_DEFINITION = re.compile(r"^\s*(?:HW_DEVICE\b|HW_(?:CLUSTER_)?KERNEL\([^)]*\)).*?\b(\w+)\(")


@functools.lru_cache(8)
def _places(text: str) -> dict[tuple[str, int], tuple[str, str]]:
    """(file, line) -> what stands there, and the name of the function around it."""
    from .jit import source

    found, around = {}, {}
    for file, number, line in source.numbered(text):
        if definition := _DEFINITION.match(line):
            around[file] = definition[1]
        found[file, number] = line.strip(), around.get(file, "")
    return found


def _add_events(
    trace: Trace, result: _Result, entry: str, grid: tuple[int, int, int], buffers: Sequence[Buffer], text: str
) -> None:
    places = _places(text)
    kernel = entry.removeprefix("cuflash_")
    for e in result.events[: result.event_count]:
        block = e.block % grid[0], e.block // grid[0] % grid[1], e.block // grid[0] // grid[1]
        what, file, passed = e.what.decode(), e.file.decode(), bool(e.passed)
        where = e.object, e.phase, e.tick, file, e.line, *places.get((file, e.line), ("", ""))
        event = Event(kernel, trace.launches, block, e.warp, e.lanes, what, passed, *where)
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


# --- Speed --------------------------------------------------------------------------------------------------------


def speed(seconds: float = 0.5) -> float:
    """`mma.m16n8k16` a second on one processor in a small attention kernel (kernels_cu/hw_emu/speed.cu), the best of
    runs that take `seconds` in all. Compiles the kernel if need be.
    """
    from .jit import hostcxx, layout, source

    require(
        isinstance(seconds, numbers.Real) and 0 < seconds < math.inf, f"seconds={seconds!r} must be a number above 0"
    )
    text = source.flatten("hw_emu/speed.cu", "emu")
    library = hostcxx.compile(text)
    length, dim, heads = 512, 64, 1
    memory = ctypes.create_string_buffer(4 * length * dim * 2 + 16)
    begin = ctypes.addressof(memory) + -ctypes.addressof(memory) % 16
    pointers = {name: begin + at * length * dim * 2 for at, name in enumerate(("q", "k", "v", "out"))}
    params = layout.parse(text, "SpeedParams").pack(**pointers, k_len=length, scale_log2=0.18)
    buffers = [_Extent(name, pointer, length * dim * 2, name == "out") for name, pointer in pointers.items()]
    instructions = 2 * (length // 16) * (length // 8) * (dim // 16) * heads
    best, end = 0.0, time.process_time() + seconds
    with schedule(os_threads=1):
        while True:
            start = time.process_time()  # other processes do not count, and a launch has a thread of its own
            launch(library, "cuflash_emu_speed", (length // 64, heads, 1), 128, 3 * 64 * dim * 2, params, buffers)
            now = time.process_time()
            best = max(best, instructions / (now - start))
            if now > end:
                return best


@dataclass(frozen=True)
class _Extent:
    name: str
    ptr: int
    nbytes: int
    writable: bool
