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

import ctypes
import math
import numbers
import time
from dataclasses import dataclass

from .errors import require
from .jit import hostcxx, layout, source
from .jit.counters import Counters, counting
from .jit.emulated import launch
from .jit.events import Event, Trace, tracing
from .jit.schedule import LANDINGS as LANDINGS
from .jit.schedule import Schedule, schedule

__all__ = ["Counters", "Event", "Schedule", "Trace", "counting", "launch", "schedule", "speed", "tracing"]


def speed(seconds: float = 0.5) -> float:
    """`mma.m16n8k16` a second on one processor in a small attention kernel (kernels_cu/hw_emu/speed.cu), the best of
    runs that take `seconds` in all. Compiles the kernel if need be.
    """
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
            start = time.process_time()  # other processes do not count, and who runs the launch does
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
