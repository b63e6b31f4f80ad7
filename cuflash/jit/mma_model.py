"""What an SM needs for one tile of a kernel of mma.sync, worked out from machine code: totals of each unit, at the
rates below. A prediction to rank kernels and tiles by and to see what binds them; no GPU is asked.

    function = sass.functions(sass.disassemble(cubin))[entry]
    tile = predict(function.main.path, arch)
    tile.shared / tile.matrix      # 1.19: reading shared memory takes longer than multiplying
    blocks_per_sm(arch, threads=128, registers=253, smem_bytes=48 << 10)    # 2

All warps of a block run the same loop, so the ratios of one warp's instructions are the block's. Hopper's wgmma kernels
have roles and turns: `sm_model` simulates those.

Left out: latencies, L2 and DRAM, the clock falling under load.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..arch import Arch
from .sass import opcode

# Clocks of an SM that one warp's HMMA.16816 with float32 sums takes, by compute capability: 2,048 products over those a
# clock of the data sheets. On 8.6, 8.9 and 12.0 these are the professional boards': GeForce's take twice as long.
_MATRIX_CLOCKS = {(8, 0): 2.0, (8, 7): 2.0, (9, 0): 2.0, (10, 0): 2.0, (10, 3): 2.0, (11, 0): 2.0}
_OTHER_MATRIX_CLOCKS = 4.0
_SHARED_BYTES = 128  # a clock
_MUFU_CLOCKS = 2.0  # 16 results a clock
_ISSUE_CLOCKS = 0.25  # four schedulers
# Compute capability -> KB of shared memory and threads of an SM (CUDA C Programming Guide, technical
# specifications). Each block also takes 1 KB for the system.
_LIMITS = {
    (8, 0): (164, 2048), (8, 6): (100, 1536), (8, 7): (164, 1536), (8, 9): (100, 1536), (9, 0): (228, 2048),
    (10, 0): (228, 2048), (10, 3): (228, 2048), (11, 0): (228, 1536), (12, 0): (100, 1536), (12, 1): (100, 1536),
}  # fmt: skip
_REGISTERS, _REGISTERS_AT_ONCE, _BLOCKS = 65536, 256, 32


@dataclass(frozen=True)
class TileTime:
    """Clocks of an SM for one trip of one warp round the main loop."""

    matrix: float  # products
    shared: float  # reads and writes of shared memory, copies into it included
    mufu: float  # exponentials
    issue: float

    @property
    def bound(self) -> str:
        """The unit that is busy longest."""
        return max(("matrix", "shared", "mufu", "issue"), key=lambda unit: getattr(self, unit))

    @property
    def tensor_use(self) -> float:
        """The share of the time that the tensor cores can be busy at most."""
        return self.matrix / getattr(self, self.bound)


def predict(path: Sequence[str], arch: Arch) -> TileTime:
    """The time of the loop whose instructions are `path` (`Loop.path`).

    >>> from cuflash import arch
    >>> loop = ["LDSM.16.M88.4 R4, [R8]", "HMMA.16816.F32 R4, R8, R12, R4", "HMMA.16816.F32 R4, R8, R12, R4"]
    >>> predict(loop, arch.named("sm_80"))
    TileTime(matrix=4.0, shared=4.0, mufu=0.0, issue=0.75)
    >>> predict(loop, arch.named("sm_89")).tensor_use
    1.0
    """
    names = [opcode(x) for x in path]
    one = _MATRIX_CLOCKS.get(arch.capability, _OTHER_MATRIX_CLOCKS)
    return TileTime(
        matrix=one * sum(_products(x) for x in names),
        shared=sum(_shared_bytes(x) for x in names) / _SHARED_BYTES,
        mufu=_MUFU_CLOCKS * sum(x.startswith("MUFU") for x in names),
        issue=_ISSUE_CLOCKS * len(names),
    )


def _products(name: str) -> float:
    """In units of HMMA.16816.

    >>> _products("HMMA.16816.F32.BF16"), _products("HMMA.1688.F32.TF32"), _products("FFMA")
    (1.0, 1.0, 0.0)
    """
    if not name.startswith("HMMA"):
        return 0.0
    return 0.5 if ".1688." in name and "TF32" not in name else 1.0  # TF32 multiplies at half of the rate


def _shared_bytes(name: str) -> int:
    """What a warp's instruction moves, no two banks in conflict.

    >>> [_shared_bytes(x) for x in ("LDSM.16.MT88.4", "LDS.128", "STS", "LDGSTS.E.BYPASS.LTC128B.128", "FADD")]
    [512, 512, 128, 512, 0]
    """
    kind, *modifiers = name.split(".")
    if kind in ("LDSM", "STSM"):
        return 128 * int(modifiers[-1])
    if kind not in ("LDS", "STS", "LDGSTS"):
        return 0
    bits = next((int(m) for m in reversed(modifiers) if m in ("64", "128")), 32)
    return 32 * bits // 8


def blocks_per_sm(arch: Arch, *, threads: int, registers: int, smem_bytes: int) -> int:
    """Blocks that run on one SM at the same time, of `registers` a thread and `smem_bytes` of shared memory.

    >>> from cuflash import arch
    >>> blocks_per_sm(arch.named("sm_80"), threads=128, registers=253, smem_bytes=48 << 10)
    2
    >>> blocks_per_sm(arch.named("sm_80"), threads=256, registers=255, smem_bytes=96 << 10)
    1
    """
    shared_kb, most_threads = _LIMITS.get(arch.capability, (100, 1536))
    a_warp = -(-registers * 32 // _REGISTERS_AT_ONCE) * _REGISTERS_AT_ONCE
    return min(
        _REGISTERS // (a_warp * (threads // 32)),
        shared_kb * 1024 // (smem_bytes + 1024),
        most_threads // threads,
        _BLOCKS,
    )
