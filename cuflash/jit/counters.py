"""What launches on the emulator cost."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field


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

    def add(self, text: str) -> None:
        """One launch's, as the runtime writes them: lines of group, name and number."""
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


def asked() -> tuple[Counters, ...]:
    """Those that want to know what a launch costs that begins now."""
    return tuple(_counting)


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
