"""The exceptions cuflash raises. Every message says the value, the rule and the remedy.

All derive from `CuflashError`; each also derives from the built-in exception a caller would expect, so
`except ValueError` keeps working. A refused call has launched nothing and written nothing; where a GPU failed
(`DeviceError`, but not `DeviceMemoryError`), what the call was to write is undefined.
"""

from __future__ import annotations

__all__ = [
    "ArgumentError", "CompileError", "CuflashError", "DeviceError", "DeviceMemoryError", "DistributedError",
    "EmulatorError", "KeywordError", "TraceError", "UnsupportedError",
]  # fmt: skip


class CuflashError(Exception):
    """Base of every error raised by cuflash."""


class ArgumentError(CuflashError, ValueError):
    """An argument breaks a rule of the function it was passed to: shape, dtype, device, stride, range."""


class KeywordError(ArgumentError, TypeError):
    """A keyword that the function does not have; the message names the one that was meant, if there is one."""


class UnsupportedError(CuflashError, NotImplementedError):
    """The request is meaningful, but not available here; the message says what to use instead."""


class CompileError(CuflashError):
    """A kernel did not compile, or no compiler was found.

    The message has the compiler's errors with the lines of our files around them; `log` is all the compiler said,
    `source` the text it was given ("" where there was none).
    """

    def __init__(self, message: str, *, log: str = "", source: str = "") -> None:
        super().__init__(message)
        self.log = log
        self.source = source


class DeviceError(CuflashError, RuntimeError):
    """A GPU, or its driver, failed at what no argument explains: a launch, a module, an earlier kernel's fault."""


class DeviceMemoryError(DeviceError, MemoryError):
    """A GPU has too little memory left for a call's results or workspace. Nothing was launched for the call."""


class DistributedError(CuflashError, RuntimeError):
    """A collective of `cuflash.distributed` failed: a rank is missing, or made another call."""


class TraceError(CuflashError):
    """A Python score_mod or mask_mod could not be turned into an expression."""


class EmulatorError(CuflashError):
    """The emulator saw a fault: a race, a deadlock, a divergence, an access out of bounds or to poison."""


def require(condition: bool, message: str) -> None:
    """Raise `ArgumentError(message)` unless `condition` holds. For checks outside the warm path.

    >>> require(8 % 2 == 0, "heads_q=8 must be a multiple of heads_kv=2")
    """
    if not condition:
        raise ArgumentError(message)
