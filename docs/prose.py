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
    """Rows as a list of definitions. A row may have three columns, or hold two definitions; from a line on that is no
    row, it is prose.

    >>> print(_definitions("q, k  arrays   out  an array\\ncheck  CHECK  more\\nprose"))
    ``q, k``
        arrays
    ``out``
        an array
    ``check``
        ``CHECK``: more
    <BLANKLINE>
    prose
    """
    done: list[str] = []
    lines = block.splitlines()
    column = re.search(r" {2,}", block).end()  # type: ignore[union-attr]
    for at, line in enumerate(lines):
        fields = re.split(r" {2,}", line, maxsplit=3)
        if line.startswith(" "):
            done.append("    " + _inline(line.strip()))
            continue
        if len(fields) == 1 and line[column - 1 : column] == " ":  # a name as wide as the column
            fields = [line[:column].strip(), line[column:]]
        if len(fields) == 1:
            return "\n".join([*done, "", *map(_inline, lines[at:])])
        rows = [fields[:2], fields[2:]] if len(fields) == 4 else [fields]
        for name, *texts in rows:
            done += [f"``{name}``", "    " + _inline(": ".join([*(f"`{t}`" for t in texts[:-1]), texts[-1]]))]
    return "\n".join(done)


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
