"""From the docstrings of cuflash, which are plain text to be read where they stand, to what Sphinx reads."""

from __future__ import annotations

import re
import textwrap
import types

import cuflash

# A row of columns: what is described, two spaces or more, its description. Formulas have such gaps too.
_ROW = re.compile(r"([^\s=]+(?: [^\s=]+)*) {2,}([^\s#].*)")


def public_names(module: types.ModuleType = cuflash) -> list[str]:
    """Full names of all that is public: cuflash.attention, cuflash.mods, cuflash.mods.causal."""
    names = []
    for name in module.__all__:
        names.append(f"{module.__name__}.{name}")
        if isinstance(member := getattr(module, name), types.ModuleType):
            names += public_names(member)
    return names


# How prose may call them: attention, mods.causal, cuflash.mods.causal; errors by their bare names too.
_NAMES = {name.removeprefix(f"cuflash.{s}"): name for name in public_names() for s in ("", "errors.")}


def to_rst(lines: list[str]) -> list[str]:
    """The lines of a docstring as reStructuredText: examples stay, columns become lists of definitions, what else is
    indented is shown as it is, and words in backticks are code, with a link where they name something public.

    >>> print("\\n".join(to_rst(["See `attention`, `max(x)`, a*b.", "", "left   its *name*", "       goes on"])))
    See :py:obj:`attention <cuflash.attention>`, ``max(x)``, a\\*b.
    <BLANKLINE>
    ``left``
        its \\*name\\*
        goes on
    <BLANKLINE>
    """
    done: list[str] = []
    for block in re.split(r"\n\s*\n", "\n".join(lines)):
        inner = textwrap.dedent(block)
        if not block.strip() or block.startswith(">>>"):
            made = block
        elif _ROW.match(inner):
            made = _definitions(inner)
        elif block.startswith("    "):
            made = "::\n\n" + block
        else:
            made = _inline(block)
        done += [*made.splitlines(), ""]
    return done


def _definitions(block: str) -> str:
    lines: list[str] = []
    first = _ROW.match(block)
    column = first.start(2) if first else 0
    for line in block.splitlines():
        if line.startswith(" "):
            lines.append("    " + _inline(line.strip()))
            continue
        row = _ROW.match(line)
        name, text = row.groups() if row else (line[:column].strip(), line[column:])  # a name as wide as the column
        if second := _ROW.match(text):  # a third column
            text = f"`{second[1]}`: {second[2]}"
        lines += [f"``{name}``", "    " + _inline(text)]
    return "\n".join(lines)


def _inline(text: str) -> str:
    parts = text.split("`")
    for at, part in enumerate(parts):
        if at % 2 == 0:
            parts[at] = re.sub(r"[\\*_|]", r"\\\g<0>", part)
        elif part in _NAMES:
            parts[at] = f":py:obj:`{part} <{_NAMES[part]}>`"
        else:
            parts[at] = f"``{part}``"
    return "".join(parts)
