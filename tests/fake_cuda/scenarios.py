"""Calls as programs make them, on the driver stand-in, each with what has to come of it. `test_scenarios` runs them as
they are, `test_planted` with a mistake in the host's code."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import cuflash
from cuflash.errors import ArgumentError
from cuflash.frameworks import cupy as adapter
from cuflash.jit import module

from . import stand_in

GLOBAL, RELAXED = 0, 2
BATCH, KEYS, HEADS, DIM = 3, 256, 2, 64


class Producer:
    """An array that has nothing but the DLPack protocol, of a library that works on the stream it was made on."""

    def __init__(self, x: Any) -> None:
        import cupy

        self.x, self.stream = x, cupy.cuda.get_current_stream()

    def __dlpack__(self, **keywords: Any) -> Any:
        with self.stream:
            return self.x.__dlpack__(**keywords)

    def __dlpack_device__(self) -> Any:
        return self.x.__dlpack_device__()


@functools.cache
def host(seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal((1, 40, 2, DIM)).astype(np.float16) for _ in range(3))


@functools.cache
def expected(seed: int = 0) -> np.ndarray:
    return cuflash.attention(*host(seed), causal=True)


def uploaded(arrays: tuple[np.ndarray, ...] | None = None) -> list[Any]:
    import cupy

    return [cupy.asarray(x) for x in (host() if arrays is None else arrays)]


def near(got: Any, want: np.ndarray, atol: float = 3e-3) -> None:
    import cupy

    np.testing.assert_allclose(cupy.asnumpy(got).astype(np.float32), want.astype(np.float32), atol=atol)


def in_thread(work: Callable[[], Any]) -> None:
    """Runs it in a thread of its own, and raises what it raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


@contextlib.contextmanager
def captured(stream: Any, mode: int = GLOBAL) -> Iterator[list[Any]]:
    """Records what the block does into the graph that it fills its list with."""
    graphs: list[Any] = []
    with stream:
        stream.begin_capture(mode)
        try:
            yield graphs
        finally:
            graph = stream.end_capture()
        graphs.append(graph)


def raised(kind: type[BaseException], work: Callable[[], Any]) -> str:
    try:
        work()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


class Cache:
    """A call with a cache, and what it gives for other lengths and queries."""

    def __init__(self, lengths: tuple[int, ...] = (7, 130, 256), seed: int = 1) -> None:
        rng = np.random.default_rng(seed)
        draw = lambda *shape: rng.standard_normal(shape).astype(np.float16)  # noqa: E731
        self.q = draw(BATCH, 1, HEADS, DIM)
        self.caches = draw(BATCH, KEYS, HEADS, DIM), draw(BATCH, KEYS, HEADS, DIM)
        self.lengths = np.array(lengths, np.int32)

    @property
    def want(self) -> np.ndarray:
        return cuflash.flash_attn_with_kvcache(self.q, *self.caches, cache_seqlens=self.lengths, causal=True)

    def uploaded(self) -> list[Any]:
        return uploaded((self.q, *self.caches, self.lengths))


def attend(q: Any, k: Any, v: Any, lengths: Any) -> Any:
    return cuflash.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, causal=True)


class Appending(Cache):
    """New keys and values for a cache, and what it is afterwards."""

    def __init__(self, new: int, lengths: tuple[int, ...], seed: int) -> None:
        super().__init__(lengths, seed)
        rng = np.random.default_rng(seed + 100)
        self.q, k, v = (rng.standard_normal((BATCH, new, HEADS, DIM)).astype(np.float16) for _ in range(3))
        self.arrays = (self.q, *self.caches, k, v, self.lengths)

    @property
    def want(self) -> tuple[np.ndarray, ...]:
        q, *caches, k, v, lengths = (x.copy() for x in self.arrays)
        return append(q, *caches, k, v, lengths), *caches


def append(q: Any, k_cache: Any, v_cache: Any, k: Any, v: Any, lengths: Any) -> Any:
    return cuflash.flash_attn_with_kvcache(q, k_cache, v_cache, k=k, v=v, cache_seqlens=lengths, causal=True)


# --- Streams, devices, threads --------------------------------------------------------------------------------------


def a_stream_of_the_callers() -> None:
    import cupy

    with cupy.cuda.Stream(non_blocking=True):
        near(cuflash.attention(*uploaded(), causal=True), expected())


def a_device_that_is_not_current() -> None:
    import cupy

    with cupy.cuda.Device(1):
        arrays = uploaded()
    out = cuflash.attention(*arrays, causal=True)
    assert out.device.id == 1 and cupy.cuda.runtime.getDevice() == 0
    near(out, expected())


def a_thread_that_has_not_used_cuda() -> None:
    """Of arrays that no tensor map was made for, by a kernel that another thread loaded."""
    import cupy

    kept = uploaded()
    cuflash.attention(*kept, causal=True)
    arrays = uploaded()
    out = cupy.empty_like(arrays[0])
    in_thread(lambda: cuflash.attention(*arrays, causal=True, out=out))
    near(out, expected())
    with cupy.cuda.Device(1):
        there = uploaded()
    in_thread(lambda: near(cuflash.attention(*there, causal=True), expected()))


def a_runtime_with_a_device_of_its_own() -> None:
    """Whatever context the driver has current: results come out on the arrays' device."""
    import cupy

    driver = ctypes.CDLL(stand_in.LIBRARY)

    def work(device: int) -> None:
        context = ctypes.c_void_p()
        assert driver.cuInit(0) == driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 1 - device) == 0
        with cupy.cuda.Device(device):
            arrays = uploaded()
            cupy.cuda.Stream.null.synchronize()
        assert driver.cuCtxSetCurrent(context) == 0
        out = cuflash.attention(*arrays, causal=True)
        assert out.device.id == device
        near(out, expected())

    with stand_in.settings(runtime_apart=True):
        for device in (0, 1):
            in_thread(lambda device=device: work(device))


def a_cache_with_lengths_of_its_own() -> None:
    cache = Cache()
    near(attend(*cache.uploaded()), cache.want)


def host_lengths() -> None:
    """Checked, and copied on the stream of the call; one array that is both is copied once."""
    import cupy

    q, k, v = (x[0] for x in host())
    starts = np.array([0, 15, 40], np.int32)
    want = cuflash.attention(q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, causal=True)
    with cupy.cuda.Stream(non_blocking=True):
        arrays = uploaded((q, k, v))
        copies, upload = [], adapter.upload
        adapter.upload = lambda values, device: copies.append(values) or upload(values, device)
        try:
            out = cuflash.attention(*arrays, cu_seqlens_q=starts, cu_seqlens_k=starts, causal=True)
        finally:
            adapter.upload = upload
        near(out, want)
        assert len(copies) == 1, "one array was copied twice"


def host_lengths_under_capture() -> None:
    import cupy

    arrays, starts = uploaded(tuple(x[0] for x in host())), np.array([0, 40], np.int32)
    out = cupy.empty_like(arrays[0])
    with captured(cupy.cuda.Stream(non_blocking=True)):
        try:
            cuflash.attention(*arrays, cu_seqlens_q=starts, cu_seqlens_k=starts, causal=True, out=out)
        except ArgumentError as error:
            assert "cannot enter a CUDA graph" in str(error)
        else:
            raise AssertionError("host values entered a graph")


def a_number_of_keys_is_no_array() -> None:
    """That every sequence has: no launch writes it down."""
    cache = Cache((77, 77, 77))
    q, k, v, _ = cache.uploaded()
    attend(q, k, v, 77)
    with stand_in.recording() as lines:
        out = attend(q, k, v, 77)
    names = [line.split()[1] for line in lines if line.startswith("launch")]
    assert names == ["cuflash_decode_plan", "cuflash_decode_sm80", "cuflash_combine"], names
    near(out, cache.want)


def explain_names_the_stand_in() -> None:
    """Where a call would run, as the driver calls it."""
    assert "runs on GPU 0: none (driver stand-in)" in str(cuflash.explain(*uploaded(), causal=True))


# --- DLPack ---------------------------------------------------------------------------------------------------------


def arrays_of_a_producer_that_die_after_the_call() -> None:
    """On a stream whose memory another one's allocations take next."""
    import cupy

    near(cuflash.attention(*map(Producer, uploaded()), causal=True), expected())
    theirs, ours = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
    with theirs:
        arrays = [Producer(x) for x in uploaded()]
    with ours:
        out = cuflash.attention(*arrays, causal=True)
    del arrays
    with theirs:  # where the pool gives the memory of the dead ones again
        new = uploaded(tuple(np.full_like(x, 7) for x in host()))
        theirs.synchronize()
    with ours:
        near(out, expected())
    del new


def arrays_that_a_producer_still_writes() -> None:
    """On its own stream: the call's waits for it."""
    import cupy

    with cupy.cuda.Stream(non_blocking=True):
        arrays = [Producer(x) for x in uploaded()]
    with cupy.cuda.Stream(non_blocking=True):
        near(cuflash.attention(*arrays, causal=True), expected())


def a_producer_under_capture() -> None:
    """Neither is the capture lost, nor any later call."""
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        arrays = [Producer(x) for x in uploaded()]
        near(cuflash.attention(*arrays, causal=True), expected())
    with captured(stream, RELAXED) as graphs:
        out = cuflash.attention(*arrays, causal=True)
    with stream:
        graphs[0].launch(stream)
        near(out, expected())
        near(cuflash.attention(*arrays, causal=True), expected())


# --- Graphs ---------------------------------------------------------------------------------------------------------


def a_first_call_under_capture() -> None:
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        arrays = uploaded()
    out = cupy.empty_like(arrays[0])
    for mode in (GLOBAL, RELAXED):
        module.clear()
        cupy.clear_memo()
        with captured(stream, mode) as graphs:
            cuflash.attention(*arrays, causal=True, out=out)
        graphs[0].launch(stream)
        stream.synchronize()
        near(out, expected())


def a_replay_writes_to_nobodys_memory() -> None:
    """With other lengths and queries in the arrays, the pool emptied and filled between; several graphs alive."""
    import cupy

    pool = cupy.get_default_memory_pool()
    stream = cupy.cuda.Stream(non_blocking=True)
    first, second = Cache(), Cache((256, 1, 99), seed=2)
    with stream:
        arrays = first.uploaded()
        attend(*arrays)
    graphs, outs = [], []
    for _ in range(2):
        with captured(stream, RELAXED) as made:
            outs.append(attend(*arrays))
        graphs += made
    pool.free_all_blocks()
    with stream:
        others = [cupy.asarray(np.full(1 << n, 7, np.uint8)) for n in range(2, 20) for _ in range(3)]
        for case in (first, second):
            for array, values in zip(arrays, (case.q, *case.caches, case.lengths), strict=True):
                array.set(values)
            for graph, out in zip(graphs, outs, strict=True):
                graph.launch(stream)
                near(out, case.want)
        changed = [x.nbytes for x in others if not (x.get() == 7).all()]
    assert not changed, f"replays wrote into arrays of {changed} bytes that are not theirs"


def an_append_in_a_graph() -> None:
    """Of one new token, and of a prompt: several graphs of each, replayed with other lengths, keys and queries. Each
    replay appends behind the lengths that are in the array then, and the rest of the cache stays."""
    import cupy

    pool = cupy.get_default_memory_pool()
    stream = cupy.cuda.Stream(non_blocking=True)
    for new in (1, 24):
        steps = [Appending(new, *each) for each in (((7, 130, 200), 1), ((0, 64, 232), 2), ((90, 1, 33), 3))]
        with stream:
            arrays = uploaded(steps[0].arrays)
            append(*arrays)
            graphs, outs = [], []
            for _ in range(2):
                with captured(stream, RELAXED) as made:
                    outs.append(append(*arrays))
                graphs += made
            pool.free_all_blocks()
            others = [cupy.asarray(np.full(1 << n, 7, np.uint8)) for n in range(2, 20) for _ in range(3)]
            for step in steps:
                out, k_cache, v_cache = step.want
                for graph, result in zip(graphs, outs, strict=True):
                    for array, values in zip(arrays, step.arrays, strict=True):
                        array.set(values)
                    graph.launch(stream)
                    near(result, out)
                    np.testing.assert_array_equal(arrays[1].get(), k_cache)
                    np.testing.assert_array_equal(arrays[2].get(), v_cache)
            changed = [x.nbytes for x in others if not (x.get() == 7).all()]
        assert not changed, f"replays wrote into arrays of {changed} bytes that are not theirs"


def captures_keep_what_they_took_and_nothing_else_is_kept() -> None:
    """A thousand captures: the workspace of each stays; of calls that run at once, nothing."""
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    cache = Cache()
    with stream:
        arrays = cache.uploaded()
        attend(*arrays)
        before = len(adapter._recorded)
        for _ in range(100):
            attend(*arrays)
        assert len(adapter._recorded) == before, "a call that was not recorded left something"
        stream.synchronize()
        held = []
        for _ in range(1000):
            with captured(stream, RELAXED):
                attend(*arrays)
            held.append(len(adapter._recorded))
    each = held[0] - before
    assert 0 < each < 8 and held == [before + each * (i + 1) for i in range(1000)]


def a_backward_in_a_graph() -> None:
    """The forward and the backward of one call, replayed after its inputs were rewritten in place."""
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        arrays = uploaded()

        def step() -> Any:
            result = cuflash.attention(*arrays, causal=True, aux=("lse",))
            return result, cuflash.attention_backward(result.out, *arrays, result.out, result.lse, causal=True)

        step()
        with captured(stream) as graphs:
            result, grads = step()
        for array, values in zip(arrays, host(1), strict=True):
            array.set(values)
        graphs[0].launch(stream)
        want = cuflash.attention(*host(1), causal=True, aux=("lse",))
        near(result.out, want.out)
        gradients = cuflash.attention_backward(want.out, *host(1), want.out, want.lse, causal=True)
        for name in ("dq", "dk", "dv"):
            got, right = getattr(grads, name).get().astype(np.float32), getattr(gradients, name).astype(np.float32)
            np.testing.assert_allclose(got, right, atol=2e-2)


def a_ragged_step_in_a_graph() -> None:
    """Forward and backward of packed sequences, in several graphs, replayed with other lengths and rows: the pool was
    emptied, and what filled it stays as it is."""
    import cupy

    pool = cupy.get_default_memory_pool()
    stream = cupy.cuda.Stream(non_blocking=True)

    def step(q: Any, k: Any, v: Any, starts: Any) -> tuple[Any, ...]:
        lengths = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": 40, "max_seqlen_k": 40}
        made = cuflash.attention(q, k, v, **lengths, causal=True, aux=("lse",))
        grads = cuflash.attention_backward(made.out, q, k, v, made.out, made.lse, **lengths, causal=True)
        return made.out, made.lse, grads.dq, grads.dk, grads.dv

    draws = [(*(x[0] for x in host(seed)), np.array(starts, np.int32)) for seed, starts in enumerate(
        ([0, 15, 40], [0, 40, 40], [0, 1, 40])
    )]  # fmt: skip
    with stream:
        arrays = uploaded(draws[0])
        step(*arrays)
        graphs, results = [], []
        for _ in range(2):
            with captured(stream, RELAXED) as made:
                results.append(step(*arrays))
            graphs += made
        pool.free_all_blocks()
        others = [cupy.asarray(np.full(1 << n, 7, np.uint8)) for n in range(2, 20) for _ in range(3)]
        for draw in reversed(draws):
            want = step(*draw)
            for array, values in zip(arrays, draw, strict=True):
                array.set(values)
            for graph, result in zip(graphs, results, strict=True):
                graph.launch(stream)
                for got, right in zip(result, want, strict=True):
                    near(got, right, 2e-2)
        changed = [x.nbytes for x in others if not (x.get() == 7).all()]
    assert not changed, f"replays wrote into arrays of {changed} bytes that are not theirs"


def a_capture_while_another_thread_works() -> None:
    import cupy

    arrays = uploaded()
    near(cuflash.attention(*map(Producer, arrays), causal=True), expected())
    stream, other = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    out = cupy.empty_like(arrays[0])

    def work() -> None:
        with other:
            for _ in range(3):
                cuflash.attention(*map(Producer, arrays), causal=True)

    for _ in range(2):  # CuPy's pool must have enough: it cannot allocate while a stream is captured in this mode
        work()
        other.synchronize()
    module.clear()
    cupy.clear_memo()
    with captured(stream) as graphs:
        in_thread(work)
        cuflash.attention(*arrays, causal=True, out=out)
    graphs[0].launch(stream)
    stream.synchronize()
    near(out, expected())


SCENARIOS = [
    a_stream_of_the_callers, a_device_that_is_not_current, a_thread_that_has_not_used_cuda,
    a_runtime_with_a_device_of_its_own, a_cache_with_lengths_of_its_own, host_lengths, host_lengths_under_capture,
    a_number_of_keys_is_no_array, explain_names_the_stand_in, arrays_of_a_producer_that_die_after_the_call,
    arrays_that_a_producer_still_writes, a_producer_under_capture, a_first_call_under_capture,
    a_replay_writes_to_nobodys_memory, an_append_in_a_graph, captures_keep_what_they_took_and_nothing_else_is_kept,
    a_backward_in_a_graph, a_ragged_step_in_a_graph, a_capture_while_another_thread_works,
]  # fmt: skip
