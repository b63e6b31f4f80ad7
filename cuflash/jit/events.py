"""What the warps of launches on the emulator do, event by event."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from ..errors import require
from .schedule import is_count


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


def asked() -> tuple[tuple[Trace, int], ...]:
    """The traces that want the events of a launch that begins now, each with how many of a block."""
    return tuple(_tracing)


@contextlib.contextmanager
def tracing(limit: int = 200_000) -> Iterator[Trace]:
    """Keeps what the warps of every launch do while this lasts, in any thread: at most `limit` events of a block.

    A launch that ends with a report leaves what its blocks did until then.

    >>> with tracing() as trace:
    ...     pass
    >>> trace.events, trace.dropped
    ([], 0)
    """
    require(is_count(limit), f"limit={limit!r} must be an int from 1 to 2**64 - 1: the events that are kept of a block")
    entry = Trace(), limit
    _tracing.append(entry)
    try:
        yield entry[0]
    finally:
        _tracing[:] = [e for e in _tracing if e is not entry]
