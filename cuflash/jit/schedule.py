"""How launches on the emulator run: in which order, on how many threads, and when copies land."""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..errors import require

DEFAULT_SEED = 20260
LANDINGS = ("late", "early")
DEFAULT_STEP_LIMIT = 400_000_000  # of one block: accesses and meetings of its threads; some 10 seconds
_MOST_THREADS = 1024


def is_count(value: object, least: int = 1, most: int = 2**64 - 1) -> bool:
    """Whether a value is an integer, no bool, between two others.

    >>> is_count(3), is_count(0), is_count(True)
    (True, False, False)
    """
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and least <= int(value) <= most


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
        require(is_count(self.seed, least=0), f"seed={self.seed!r} must be an integer of 64 bits")
        require(
            isinstance(self.landing, str) and self.landing in LANDINGS,
            f"landing={self.landing!r} must be one of {', '.join(LANDINGS)}",
        )
        require(is_count(self.step_limit), f"step_limit={self.step_limit!r} must be an int from 1 to 2**64 - 1")
        require(
            self.os_threads is None or is_count(self.os_threads, most=_MOST_THREADS),
            f"os_threads={self.os_threads!r} must be an int from 1 to {_MOST_THREADS}, or None",
        )


_schedule = Schedule()


def current() -> Schedule:
    """How a launch runs that begins now."""
    return _schedule


def resume(schedule: Schedule) -> None:
    """From now on launches run so, in any thread: a worker goes on where its parent is."""
    global _schedule
    _schedule = schedule


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
