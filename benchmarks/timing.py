"""Clocks, and the loop in which implementations take turns.

On a GPU a call is timed by CUDA events on the stream it runs on. A GPU that waits for the host would show the host's
time: so before each burst it gets copies to do, until the host is ahead of it. The copies also sweep the cache.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol


class Clock(Protocol):
    """Where arrays live and how time is read there."""

    xp: Any  # NumPy or CuPy
    gpu: bool

    def memory(self) -> int | None:
        """Bytes that the device has, free or not; None where nobody asks."""
        ...

    def mark(self) -> Any:
        """A point in the order of what was submitted."""
        ...

    def between(self, start: Any, end: Any) -> float:
        """Milliseconds from one mark to another, both reached."""
        ...

    def wait(self) -> None:
        """Until all that was submitted is done, by whatever framework."""
        ...

    def get_ahead(self, ms: float) -> None:
        """Give the device that much to do, so that the host gets ahead of it."""
        ...

    def release(self) -> None:
        """Give memory that nobody holds back, to whoever asks next."""
        ...

    def bytes_at_peak(self, call: Callable[[], Any], framework: str) -> int | None:
        """Bytes that a call holds at most beside what was there before it; None if nothing here counts them."""
        ...


class HostClock:
    """The CPU's: for trying the harness where no GPU is. Nothing is asynchronous."""

    gpu = False

    def __init__(self) -> None:
        import numpy

        self.xp = numpy

    def memory(self) -> None:
        return None

    def mark(self) -> float:
        return time.perf_counter()

    def between(self, start: float, end: float) -> float:
        return (end - start) * 1e3

    def wait(self) -> None:
        pass

    def get_ahead(self, ms: float) -> None:
        pass

    def release(self) -> None:
        pass

    def bytes_at_peak(self, call: Callable[[], Any], framework: str) -> int | None:
        import tracemalloc

        if framework != "numpy":
            return None
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            result = call()
            peak = tracemalloc.get_traced_memory()[1]
            del result
        finally:
            tracemalloc.stop()
        return peak - before


class CudaClock:
    """The current GPU's, on the legacy default stream, which PyTorch and CuPy share unless told otherwise."""

    gpu = True
    _SWEEP = 256 << 20  # bytes of a copy, several times any L2

    def __init__(self) -> None:
        import cupy

        self.xp = cupy
        self._from, self._to = (cupy.zeros(self._SWEEP, cupy.uint8) for _ in range(2))
        self._copy_ms = 0.1
        start = self.mark()
        for _ in range(10):
            self._copy()
        end = self.mark()
        self.wait()
        self._copy_ms = self.between(start, end) / 10

    def _copy(self) -> None:
        self._to.data.copy_from_device_async(self._from.data, self._SWEEP)

    def memory(self) -> int:
        return self.xp.cuda.Device().mem_info[1]

    def mark(self) -> Any:
        event = self.xp.cuda.Event()
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        return self.xp.cuda.get_elapsed_time(start, end)

    def wait(self) -> None:
        self.xp.cuda.Device().synchronize()

    def get_ahead(self, ms: float) -> None:
        for _ in range(min(200, 1 + round(ms / self._copy_ms))):
            self._copy()

    def release(self) -> None:
        gc.collect()  # graphs of gradients hold one another
        self.xp.get_default_memory_pool().free_all_blocks()
        if torch := _imported("torch"):
            torch.cuda.empty_cache()

    def bytes_at_peak(self, call: Callable[[], Any], framework: str) -> int | None:
        self.wait()
        if framework == "torch":
            torch = _imported("torch")
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            result = call()
            peak = torch.cuda.max_memory_allocated() - before
            del result
            return peak
        if framework != "numpy":  # the framework of this clock's arrays: CuPy
            return None
        pool = self.xp.get_default_memory_pool()
        before = peak = pool.used_bytes()

        class Watch(self.xp.cuda.MemoryHook):  # type: ignore[name-defined]
            name = "peak"

            def malloc_postprocess(self, **_: Any) -> None:
                nonlocal peak
                peak = max(peak, pool.used_bytes())

        with Watch():
            result = call()
        del result
        return peak - before


def _imported(name: str) -> Any:
    import sys

    return sys.modules.get(name)


# --- taking turns -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds of a call: the median, and the width of the middle half."""

    ms: float
    spread: float

    @staticmethod
    def of(samples: Sequence[float]) -> Timing:
        """
        >>> Timing.of([4.0, 2.0, 3.0, 2.5, 90.0])
        Timing(ms=3.0, spread=1.5)
        """
        if len(samples) < 2:
            return Timing(samples[0], 0.0)
        low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
        return Timing(middle, high - low)


@dataclasses.dataclass
class Prepared:
    """An implementation ready to be called, on one copy of the inputs after the other.

    calls     one for each copy of the inputs; each returns what the implementation returns
    arrays    that, as {name: array of the clock's framework, float32, in the problem's layout}
    finish    waits until a result is there. Given where an implementation keeps streams of its own, which events on
              ours say nothing of: it is timed by the host's clock then, burst by burst
    framework which one allocates: "numpy" (the clock's own), "torch" or "jax"
    more      what its row tells beside the time
    """

    calls: list[Callable[[], Any]]
    arrays: Callable[[Any], dict[str, Any]]
    finish: Callable[[Any], Any] | None = None
    framework: str = "torch"
    more: dict[str, Any] = dataclasses.field(default_factory=dict)


WARM_UP, ROUNDS, MOST_CALLS = 3, 5, 50


def take_turns(
    contestants: dict[str, Prepared], clock: Clock, seconds: float, host_clock: Callable[[], float] = time.perf_counter
) -> dict[str, Timing | str]:
    """Time every contestant for about `seconds`, in rounds in which each has its turn: what drifts, drifts for all.

    {name: its timing, or what it raised}. Who raises is out of the game, the others go on. Every turn begins with
    another contestant, every call takes the next copy of the inputs.
    """
    found: dict[str, Timing | str] = {}
    bursts: dict[str, int] = {}
    ahead: dict[str, float] = {}
    samples: dict[str, list[float]] = {}
    for name, one in contestants.items():
        try:
            for i in range(WARM_UP):
                result = one.calls[i % len(one.calls)]()
            _finish(one, result, clock)
            host, device = _one_burst(one, clock, WARM_UP, 0, 0.0, host_clock)
            each = max(device, 1e-3)  # ms
            bursts[name] = max(1, min(MOST_CALLS, round(seconds * 1e3 / ROUNDS / each)))
            ahead[name] = 1.5 * host * bursts[name]
            samples[name] = []
        except Exception as error:
            found[name] = message(error)
    for turn in range(ROUNDS):
        names = [name for name in contestants if name in samples]
        for name in names[turn % max(1, len(names)) :] + names[: turn % max(1, len(names))]:
            try:
                first = turn * bursts[name]
                taken: list[float] = []
                _one_burst(contestants[name], clock, bursts[name], first, ahead[name], host_clock, taken)
                samples[name] += taken
            except Exception as error:
                found[name] = message(error)
                del samples[name]
    return {name: found.get(name) or Timing.of(samples[name]) for name in contestants}


def _one_burst(
    one: Prepared, clock: Clock, calls: int, first: int, ahead: float, host_clock: Callable[[], float],
    taken: list[float] | None = None,
) -> tuple[float, float]:  # fmt: skip
    """Call `calls` times, from the inputs numbered `first` on; (ms of the host, ms of the device) a call. The times of
    single calls go to `taken`."""
    result = None
    clock.wait()
    if one.finish is not None:
        began = host_clock()
        for i in range(calls):
            result = one.calls[(first + i) % len(one.calls)]()
        _finish(one, result, clock)
        each = (host_clock() - began) * 1e3 / calls
        if taken is not None:
            taken.append(each)
        return each, each
    clock.get_ahead(ahead)
    began = host_clock()
    marks = []
    for i in range(calls):
        start = clock.mark()
        result = one.calls[(first + i) % len(one.calls)]()
        marks.append((start, clock.mark()))
    host = (host_clock() - began) * 1e3 / calls
    clock.wait()
    times = [clock.between(start, end) for start, end in marks]
    if taken is not None:
        taken += times
    return host, statistics.median(times)


def _finish(one: Prepared, result: Any, clock: Clock) -> None:
    if one.finish is not None:
        one.finish(result)
    clock.wait()


def message(error: BaseException) -> str:
    """One line on what was raised.

    >>> message(ValueError("no\\nmore")), message(MemoryError())
    ('ValueError: no', 'MemoryError')
    """
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


# --- the host's share -------------------------------------------------------------------------------------------------


def host_time(call: Callable[[], Any], clock: Clock, rounds: int = 9) -> Timing:
    """Milliseconds that a call keeps the host: many are issued in short rounds, so that no queue fills."""
    began = time.perf_counter()
    for _ in range(WARM_UP):
        call()
    clock.wait()
    each = (time.perf_counter() - began) / WARM_UP  # a first call may have compiled: then rounds are short
    calls = max(2, min(50, round(0.01 / each)))
    for _ in range(calls):
        call()
    clock.wait()
    samples = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(calls):
            call()
        samples.append((time.perf_counter() - began) * 1e3 / calls)
        clock.wait()
    return Timing.of(samples)


# --- ceilings ---------------------------------------------------------------------------------------------------------


_MATMUL = 8192  # rows and columns


def ceilings(clock: Clock, seconds: float = 1.0) -> dict[str, float]:
    """What this device reaches at best: matmul_tflops, copy_gbps, launch_us. On a CPU, of a small problem."""
    xp = clock.xp
    n = _MATMUL if clock.gpu else 128
    found = {}
    times = take_turns({"matmul": Prepared(_matmuls(clock, n), dict)}, clock, seconds)
    if isinstance(matmul := times["matmul"], Timing):
        found["matmul_tflops"] = 2 * n**3 / matmul.ms / 1e9
    size = (1 << 30) if clock.gpu else (1 << 20)
    call = functools.partial(xp.copyto, xp.zeros(size, xp.uint8), xp.zeros(size, xp.uint8))
    times = take_turns({"copy": Prepared([call], dict)}, clock, seconds / 2)
    if isinstance(copy := times["copy"], Timing):
        found["copy_gbps"] = 2 * size / copy.ms / 1e6
    del call
    launch = host_time(_launch(clock), clock)
    found["launch_us"] = launch.ms * 1e3
    clock.release()
    return found


def _matmuls(clock: Clock, n: int) -> list[Callable[[], Any]]:
    """Products of matrices of normal draws, in bfloat16 where PyTorch is there to do them, else in CuPy's float16."""
    xp = clock.xp
    random = xp.random.default_rng(0)
    a, b = (random.standard_normal((n, n), dtype=xp.float32) for _ in range(2))
    if not clock.gpu:
        return [lambda: a @ b]
    a, b = a.astype(xp.float16), b.astype(xp.float16)
    try:
        import torch
    except ImportError:
        return [lambda: xp.matmul(a, b)]
    if not torch.cuda.is_available():
        return [lambda: xp.matmul(a, b)]
    x, y = (torch.from_dlpack(matrix).bfloat16() for matrix in (a, b))
    return [lambda: torch.mm(x, y)]


def _launch(clock: Clock) -> Callable[[], Any]:
    if not clock.gpu:
        return lambda: None
    kernel = clock.xp.RawKernel('extern "C" __global__ void nothing() {}', "nothing")
    return lambda: kernel((1,), (1,), ())
