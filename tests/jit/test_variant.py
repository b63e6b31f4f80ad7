"""The text of struct Variant."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from cuflash.errors import ArgumentError
from cuflash.jit import variant


@dataclass(frozen=True)
class Any:
    name: str
    value: object

    def members(self) -> dict:
        return {self.name: self.value}


@pytest.mark.parametrize(
    ("value", "line"),
    [
        (True, "static constexpr bool kX = true;"),
        (False, "static constexpr bool kX = false;"),
        (1, "static constexpr i32 kX = 1;"),
        (-7, "static constexpr i32 kX = -7;"),
        (2**31 - 1, "static constexpr i32 kX = 2147483647;"),
        ("hw::Bfloat16", "using kX = hw::Bfloat16;"),
        ("Keys<64, hw::Half>", "using kX = Keys<64, hw::Half>;"),
    ],
)
def test_members(value: object, line: str) -> None:
    assert variant.emit(Any("kX", value)) == f"struct Variant {{\n  {line}\n}};\n"


@pytest.mark.parametrize(
    ("name", "value"),
    [("kX", 2**31), ("kX", -(2**31)), ("kX", 1.5), ("kX", None), ("kX", "a; int b"), ("", 1), ("k X", 1), ("9", 1)],
)
def test_what_is_no_member_is_refused(name: str, value: object) -> None:
    with pytest.raises(ArgumentError, match="variant member"):
        variant.emit(Any(name, value))
