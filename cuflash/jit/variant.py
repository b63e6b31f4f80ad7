"""The compile-time choices of a kernel, as the text of `struct Variant`.

A variant is a frozen dataclass with `members()`: C name -> bool, int, or the name of a type. The dataclass is the key
in memory, its text is part of the key on disk, and a reader finds it in the dumped source. One whose kernel calls the
user's mods has their text besides, as `mods`.
"""

from __future__ import annotations

import re
from typing import Protocol, runtime_checkable

from ..errors import ArgumentError

_NAME = re.compile(r"[A-Za-z_]\w*")
_TYPE = re.compile(r"[A-Za-z_][\w:<>, ]*")


@runtime_checkable
class Variant(Protocol):
    """What `emit` takes: hashable, and able to list its members."""

    def members(self) -> dict[str, str | int | bool]: ...


def emit(variant: Variant) -> str:
    """The C++ text of the variant: types as `using`, numbers as `static constexpr`.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Toy:
    ...     head_dim: int
    ...     def members(self):
    ...         return {"Element": "hw::Half", "kHeadDim": self.head_dim, "kPaged": False}
    >>> print(emit(Toy(64)), end="")
    struct Variant {
      using Element = hw::Half;
      static constexpr i32 kHeadDim = 64;
      static constexpr bool kPaged = false;
    };
    """
    return "struct Variant {\n" + "".join(f"  {_member(n, v)}\n" for n, v in variant.members().items()) + "};\n"


def describe(variant: Variant) -> str:
    """The same in one line, for reports.

    >>> class Toy:
    ...     def members(self):
    ...         return {"Element": "hw::Half", "kHeadDim": 64, "kPaged": False}
    >>> describe(Toy())
    'Element=hw::Half kHeadDim=64 kPaged=false'
    """
    return " ".join(f"{name}={_literal(value)}" for name, value in variant.members().items())


def _member(name: str, value: str | int | bool) -> str:
    if not _NAME.fullmatch(name):
        raise ArgumentError(f"variant member {name!r} must be a C++ name")
    if isinstance(value, bool):
        return f"static constexpr bool {name} = {_literal(value)};"
    if isinstance(value, int):
        if not -(2**31) < value < 2**31:
            raise ArgumentError(f"variant member {name}={value} must fit 32 bits with its sign")
        return f"static constexpr i32 {name} = {value};"
    if isinstance(value, str) and _TYPE.fullmatch(value):
        return f"using {name} = {value};"
    raise ArgumentError(f"variant member {name}={value!r} must be a bool, an int, or the name of a type")


def _literal(value: str | int | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
