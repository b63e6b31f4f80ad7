"""What a multiprocessor of a Hopper GPU would need for one key tile, worked out from machine code: a prediction to rank
kernels and tiles by and to see what binds them, not a measurement. No GPU is asked, and none has confirmed it.

    function = sass.functions(sass.disassemble(cubin))[entry]
    tile = predict(function.loops[0].path, consumers=2, copied_bytes=128 * (128 + 128) * 2)
    tile.tensor_use          # 0.97: the tensor cores can be busy for 97 % of the time at most

Two things are computed. Totals: what the instructions of a tile take of each unit, at the rates below. And a simulation
of one of the four sub-partitions, where one warp of each consumer warpgroup goes round the loop: who issues when, who
waits for whose turn, which products are under way; the mean over several distances between their starts. The tensor
cores are never busier than either allows.

Left out: that loads come late, the L2 cache, the clock falling under load, and masked tiles. Published kernels of this
kind reach 0.8 to 0.9 of the bound at head dims up to 128, and about all of it at 256.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from .sass import opcode

SHARED_BYTES = 128  # a clock, of all that reads and writes shared memory
# Pipe -> the clocks that an instruction of a warp occupies it, and those until its result may be used.
PIPES = {"fma": (1, 4), "alu": (2, 5), "mufu": (8, 20), "shared": (2, 24), "other": (1, 6)}
QUEUE = 2  # products that a sub-partition may have issued and not finished
_BEGINNINGS = {
    "alu": (
        "FMNMX", "F2FP", "ISETP", "FSETP", "FSEL", "SEL", "LOP3", "PLOP3", "IADD", "VIADD", "VIMNMX", "SHF", "LEA",
        "PRMT",
    ),
    "fma": ("FFMA", "FADD", "FMUL", "IMAD", "MOV", "CS2R"),
    "mufu": ("MUFU",),
    "shared": ("SHFL", "LDS"),
}  # fmt: skip
# Whose first operand is not a register that they write.
_WRITE_NOTHING = ("STS", "BAR", "SYNCS", "BRA", "ISETP", "FSETP", "PLOP", "R2UR", "STG", "STSM", "FENCE")
_REGISTER = re.compile(r"\bR(\d+)\b")
_ROUNDS, _SETTLED = 20, 8  # trips round the loop; those not counted
# Clocks between two warps' starts. Who is first where both want the same is chance, and may stay so: hence several.
_SKEWS = range(200, 2001, 300)


@dataclass(frozen=True)
class TileTime:
    """Clocks of one multiprocessor for one key tile of all its consumer warpgroups."""

    tensor: float  # that its tensor cores multiply
    mufu: float  # that its exponentials take
    shared: float  # that its shared memory is read by products and written by copies
    issue: int  # that a scheduler of it issues instructions
    simulated: float  # that the loop takes as simulated: one waits for another

    @property
    def clocks(self) -> float:
        """From one key tile to the next."""
        return max(self.simulated, self.shared)

    @property
    def tensor_use(self) -> float:
        """The share of the time that the tensor cores can be busy at most."""
        return self.tensor / self.clocks

    @property
    def issue_use(self) -> float:
        """The share of the time that a scheduler issues."""
        return self.issue / self.clocks


@dataclass(frozen=True)
class _Step:
    """An instruction: the pipe it goes to, or "product", "products done", "take turn", "give turn"."""

    kind: str
    reads: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()
    clocks: float = 0.0  # of a product
    shared_bytes: int = 0  # that a product of four warps reads
    commits: bool = False  # a product: the last of its group
    left: int = 0  # products done: groups that may still be under way


def predict(path: Sequence[str], *, consumers: int, copied_bytes: int) -> TileTime:
    """The time of the loop whose instructions are `path` (`Loop.path`), run by `consumers` warpgroups of 64 rows each,
    while `copied_bytes` of keys and values arrive.

    Two products one after the other, and nothing else: bound by the tensor cores.

    >>> loop = ["HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x0", "BRA `(.L_x_1)"]
    >>> tile = predict(loop, consumers=2, copied_bytes=0)
    >>> tile.tensor, tile.shared, tile.issue, tile.tensor_use > 0.9
    (128.0, 96.0, 6, True)
    """
    steps = [_step(x) for x in path]
    return TileTime(
        tensor=consumers * sum(s.clocks for s in steps),
        mufu=float(consumers * PIPES["mufu"][0] * sum(s.kind == "mufu" for s in steps)),
        shared=(consumers * sum(s.shared_bytes for s in steps) + copied_bytes) / SHARED_BYTES,
        issue=consumers * len(steps),
        simulated=statistics.fmean(_simulate(steps, consumers, skew) for skew in _SKEWS),
    )


def _step(instruction: str) -> _Step:
    name = opcode(instruction)
    if name.startswith("HGMMA"):
        n = int(re.search(r"64x(\d+)x", name)[1])  # type: ignore[index]
        from_registers = re.search(r"R\d+, R\d+, gdesc", instruction) is not None
        shared = 32 * n + (0 if from_registers else 64 * 32)
        return _Step(
            "product", clocks=max(n / 2, shared / SHARED_BYTES), shared_bytes=shared, commits="gsb0" in instruction
        )
    if name.startswith("WARPGROUP.DEPBAR"):
        return _Step("products done", left=int(re.search(r"gsb0, 0x(\d+)", instruction)[1], 16))  # type: ignore[index]
    if name.startswith("BAR.SYNC"):
        return _Step("take turn")
    if name.startswith("BAR.ARV"):
        return _Step("give turn")
    kind = next((k for k, names in _BEGINNINGS.items() if name.startswith(names)), "other")
    operands = instruction[instruction.index(name) + len(name) :].split(",")
    registers = [tuple(int(r) for r in _REGISTER.findall(x)) for x in operands]
    first = 0 if name.startswith(_WRITE_NOTHING) else 1
    return _Step(kind, sum(registers[first:], ()), sum(registers[:first], ()))


def _simulate(steps: Sequence[_Step], consumers: int, skew: int) -> float:
    """Clocks in which each warp goes round the loop once, on average, when it has settled. Each starts `skew` clocks
    behind the one before.

    Each clock one warp issues one instruction: the one that issued last if it can, else the next that can.
    """
    turns = any(s.kind == "give turn" for s in steps)
    at, rounds = [0] * consumers, [0] * consumers
    ready: list[defaultdict[int, float]] = [defaultdict(float) for _ in range(consumers)]  # register -> when
    groups: list[list[float]] = [[] for _ in range(consumers)]  # when each ends
    turn = [int(w == 0) for w in range(consumers)]
    free = dict.fromkeys(PIPES, 0.0)  # pipe -> when
    queue: list[float] = []  # products: when each ends
    marks: list[tuple[float, int]] = []  # when the warp that is ahead went round; how often all did until then
    now, latest = 0.0, 0

    def when(w: int) -> float:
        """The clock from which on warp w can issue, as far as it depends on no other warp's turn."""
        step = steps[at[w]]
        start = float(w * skew)
        if step.kind == "product":
            under_way = [q for q in queue if q > now]
            return max(start, under_way[-QUEUE]) if len(under_way) >= QUEUE else start
        if step.kind == "products done":
            under_way = [g for g in groups[w] if g > now]
            return max(start, under_way[-step.left - 1]) if len(under_way) > step.left else start
        if step.kind == "take turn":
            return start if not turns or turn[w] else float("inf")
        if step.kind == "give turn":
            return start
        return max([start, free[step.kind], *(ready[w][r] for r in (*step.reads, *step.writes))])

    while len(marks) < _ROUNDS:
        order = [(latest + j) % consumers for j in range(consumers)]
        w = next((w for w in order if when(w) <= now), None)
        if w is None:
            now = float(math.ceil(min(map(when, order))))
            continue
        step, latest = steps[at[w]], w
        if step.kind == "product":
            end = max(queue[-1] if queue else 0.0, now + 2) + step.clocks
            queue = [*(q for q in queue if q > now), end]
            if step.commits:
                groups[w] = [*(g for g in groups[w] if g > now), end]
        elif step.kind == "take turn":
            turn[w] -= 1
        elif step.kind == "give turn":
            turn[(w + 1) % consumers] += 1
        elif step.kind in PIPES:
            occupied, latency = PIPES[step.kind]
            free[step.kind] = now + occupied
            for register in step.writes:
                ready[w][register] = now + latency
        at[w] += 1
        if at[w] == len(steps):
            at[w], rounds[w] = 0, rounds[w] + 1
            if rounds[w] > len(marks):
                marks.append((now, sum(rounds)))
        now += 1
    (begin, before), (end, after) = marks[_SETTLED], marks[-1]
    return (end - begin) * consumers / (after - before)
