"""Readers: the text of a Python function that walks again to what a trace has found, written along the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from .expr import Mods


class Bound(NamedTuple):
    """The mods of one call.

    mods     their structure: what compiled code depends on
    arrays   what the mods capture, as found, in the order of mods.arrays
    scalars  Python numbers in the order of mods.scalars
    notes    what a user may want to know, for `explain`
    """

    mods: Mods
    arrays: tuple[Any, ...] = ()
    scalars: tuple[int | float, ...] = ()
    notes: tuple[str, ...] = ()


# Of a score_mod and a mask_mod: their structure and present values; None where the trace does not hold for them.
Reader = Callable[[Any, Any], Bound | None]


class Script:
    """The text of a reader, `read(s, m)`: variables, conditions and constants."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.constants: dict[str, Any] = {}
        self.variables: dict[tuple[str, str], str] = {}

    def read(self, parent: str, text: str) -> str:
        """The variable that holds `text` of a parent variable, "{}" in it."""
        key = parent, text
        if key not in self.variables:
            self.variables[key] = variable = f"v{len(self.variables)}"
            self.lines.append(f"{variable} = {text.format(parent)}")
        return self.variables[key]

    def unless(self, condition: str) -> None:
        """The trace holds no longer where a condition is true."""
        line = f"if {condition}: return"
        if line not in self.lines[-4:]:
            self.lines.append(line)

    def constant(self, value: Any) -> str:
        name = f"k{len(self.constants)}"
        self.constants[name] = value
        return name

    def is_type(self, variable: str, value: Any) -> None:
        self.unless(f"type({variable}) is not {self.constant(type(value))}")

    def compiled(self, result: str) -> Reader:
        """The reader, which comes to `result` where the trace holds."""
        text = "def read(s, m):\n" + "".join(f"    {line}\n" for line in (*self.lines, f"return {result}"))
        space: dict[str, Any] = dict(self.constants)
        exec(compile(text, "<cuflash reader>", "exec"), space)
        return space["read"]
