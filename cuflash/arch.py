"""GPU architectures: what a kernel must know of the chip before it is compiled."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import ArgumentError, UnsupportedError


@dataclass(frozen=True)
class Arch:
    """One compilation target.

    name         NVRTC's name, e.g. "sm_90a": with the "a" where it opens instructions of that chip alone
    capability   (major, minor) of the devices it runs on
    smem_bytes   shared memory one block may ask for (CUDA C Programming Guide, "Technical
                 Specifications per Compute Capability")
    multiprocessors  of the device, or of the largest of its kind that is sold
    l2_bytes     its second-level cache, likewise
    """

    name: str
    capability: tuple[int, int]
    smem_bytes: int
    multiprocessors: int = 132
    l2_bytes: int = 50 * 2**20

    def __str__(self) -> str:
        return self.name


# Blocks of a grid along x, y and z, on every chip (CUDA C Programming Guide, the same table).
GRID_LIMITS = (2**31 - 1, 65535, 65535)

_KB, _MB = 1024, 2**20
_LONGEST_NAME = 32  # of what is taken for somebody's way to write an architecture, as 90, "sm90" or "9.0"
ARCHES = {
    a.name: a
    for a in (
        Arch("sm_80", (8, 0), 163 * _KB, 108, 40 * _MB),
        Arch("sm_86", (8, 6), 99 * _KB, 84, 6 * _MB),
        Arch("sm_87", (8, 7), 163 * _KB, 16, 4 * _MB),
        Arch("sm_89", (8, 9), 99 * _KB, 142, 96 * _MB),
        Arch("sm_90a", (9, 0), 227 * _KB, 132, 50 * _MB),
        Arch("sm_100a", (10, 0), 227 * _KB, 148, 126 * _MB),
        Arch("sm_103a", (10, 3), 227 * _KB, 148, 126 * _MB),
        Arch("sm_110a", (11, 0), 227 * _KB, 20, 32 * _MB),
        Arch("sm_120a", (12, 0), 99 * _KB, 188, 128 * _MB),
        Arch("sm_121a", (12, 1), 99 * _KB, 48, 24 * _MB),
    )
}
_BY_CAPABILITY = {a.capability: a for a in ARCHES.values()}


def named(name: str) -> Arch:
    """The architecture NVRTC calls `name`; the "a" may be left out.

    >>> named("sm_90").name
    'sm_90a'
    """
    arch = (ARCHES.get(name) or ARCHES.get(name + "a")) if isinstance(name, str) else None
    if arch is not None:
        return arch
    digits = "".join(re.findall("[0-9]+", str(name)[:_LONGEST_NAME]))
    meant = next((a.name for a in ARCHES.values() if digits == "".join(map(str, a.capability))), None)
    if meant is not None:
        raise ArgumentError(f"arch={name!r} is no architecture's name: pass {meant!r}")
    if not isinstance(name, str):
        raise ArgumentError(f"arch is a {type(name).__qualname__} and must be a name: pass one of {', '.join(ARCHES)}")
    raise UnsupportedError(
        f"arch={name!r} is not one of {', '.join(ARCHES)}: kernels use mma.sync and cp.async of "
        "bfloat16, which begin with compute capability 8.0; on older GPUs pass host arrays "
        "(the NumPy reference) instead"
    )


def of_capability(major: int, minor: int) -> Arch:
    """The target for a device of compute capability `major.minor`.

    A chip that is not in the table gets a plain target of its own, with the least shared memory any of them has.
    Raises `UnsupportedError` below 8.0.

    >>> of_capability(8, 8)
    Arch(name='sm_88', capability=(8, 8), smem_bytes=101376, multiprocessors=132, l2_bytes=52428800)
    """
    exact = _BY_CAPABILITY.get((major, minor))
    if exact is not None:
        return exact
    if major < 8:
        return named(f"sm_{major}{minor}")  # raises, naming the rule
    # Plain: an "a" target opens instructions that no kernel for an unknown chip uses.
    return Arch(f"sm_{major}{minor}", (major, minor), 99 * _KB)
