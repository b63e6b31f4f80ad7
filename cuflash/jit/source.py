"""One kernel, one string: inlines the files of kernels_cu/ into a text that includes nothing.

A flattened text compiles anywhere (no include path can be missing), its hash is an exact cache key (an edited header is
an edited text), and the emulator gets the very same one. `#line` directives keep the compiler's messages pointing at
the real files.

    #include <hw/matrix.cuh>    -> hw_cuda/matrix.cuh or hw_emu/matrix.cuh, by target
    #include <variant.cuh>      -> the generated text of `struct Variant`
    #include <mods.cuh>         -> the generated text of `struct Mods`
    #include <tile/mask.cuh>    -> that file under kernels_cu/

Only a file of hw_emu/ may include a header of the host's compiler; that stays in the text as it is.
"""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ArgumentError, CompileError

TARGETS = ("cuda", "emu")
VARIANT_FILE = "variant.cuh"
MODS_FILE = "mods.cuh"

_INCLUDE = re.compile(r'\s*#\s*include\s*(?:<([^>]+)>|"([^"]+)")')
_PRAGMA_ONCE = re.compile(r"\s*#\s*pragma\s+once\b")
ASSERTED = 'cuflash/jit/layout.py computed");'  # how the assertion ends that `layout` puts behind a kernel's text
_LINE = re.compile(r'\s*#line\s+(\d+)\s+"([^"]+)"')


@dataclass(frozen=True)
class Edit:
    """A change to the shipped text: in `file` (as `#line` names it), `old` becomes `new`.

    `old` must occur exactly once in the file. "": `new` is all of the file, which need neither exist nor be included.
    The text compiled is the shipped one but for this change, and has its own cache key. Tests plant bugs with it,
    `cuflash.workbench` compiles what a user wrote; there, `#line` says whose line is whose.
    """

    file: str
    old: str
    new: str


@functools.cache
def folder() -> Path:
    """Where the CUDA C sources are: beside the package in a checkout, inside it when installed.

    >>> (folder() / "base.cuh").is_file()
    True
    """
    package = Path(__file__).resolve().parent.parent
    candidates = (package.parent / "kernels_cu", package / "_kernels_cu")
    for candidate in candidates:
        if (candidate / "base.cuh").is_file():
            return candidate
    raise CompileError(
        f"the CUDA sources are neither at {candidates[0]} nor at {candidates[1]}: "
        "the installation is incomplete; reinstall cuflash"
    )


def flatten(
    root: str | os.PathLike[str],
    target: str,
    *,
    variant: str = "",
    mods: str = "",
    edits: Sequence[Edit] = (),
    folders: Sequence[str | os.PathLike[str]] = (),
) -> str:
    """The text of one kernel file with every include inlined, each file once.

    root     file name relative to kernels_cu, e.g. "forward_sm80.cu", or an absolute path
    target   "cuda" or "emu": which twin `<hw/...>` names
    variant  text for `#include <variant.cuh>`, from `variant.emit`
    mods     text for `#include <mods.cuh>`, from cuflash/trace/emit_c.py
    edits    changes to the files, see `Edit`
    folders  searched after kernels_cu (and the root's own folder, if it was given as a path)

    Raises CompileError for an include that is nowhere, ArgumentError for an edit that does not match exactly once, or
    a variant that no file includes.

    >>> print(flatten("base.cuh", "cuda").splitlines()[0])
    #line 1 "base.cuh"
    """
    if target not in TARGETS:
        raise ArgumentError(f"target={target!r} must be one of {', '.join(TARGETS)}")
    path = Path(root)
    search = [folder(), *([path.parent] if path.is_absolute() else []), *map(Path, folders)]
    generated = {VARIANT_FILE: variant, MODS_FILE: mods}
    return _Flattener(target, generated, search, edits).run(path)


class _Flattener:
    def __init__(self, target: str, generated: dict[str, str], search: Sequence[Path], edits: Sequence[Edit]) -> None:
        self.target = target
        self.generated = generated
        self.search = search
        self.edits = list(edits)
        self.whole = {e.file: e.new for e in edits if not e.old}
        self.seen: set[str] = set()
        self.out: list[str] = []

    def run(self, root: Path) -> str:
        path = self._find(str(root))
        if path is not None:
            self._inline(path, self._name(path))
        elif str(root) in self.whole:
            self._append(str(root), self._edited(str(root), ""), None)
        else:
            raise CompileError(f"no kernel source {str(root)!r} in {', '.join(map(str, self.search))}")
        if self.generated[VARIANT_FILE] and VARIANT_FILE not in self.seen:
            raise ArgumentError(f"a variant was given, but nothing {root} includes has `#include <{VARIANT_FILE}>`")
        unused = next((e for e in self.edits if e.old and e.file not in self.seen), None)
        if unused is not None:
            files = ", ".join(sorted(self.seen))
            raise ArgumentError(f"Edit(file={unused.file!r}): not part of {root}, whose files are {files}")
        return "\n".join(self.out) + "\n"

    def _inline(self, path: Path, name: str) -> None:
        self._append(name, self._edited(name, read(path)), path)

    def _append(self, name: str, text: str, path: Path | None) -> None:
        self.seen.add(name)  # before its includes: a cycle ends here
        self.out.append(f'#line 1 "{name}"')
        file, number = name, 0
        for line in text.splitlines():
            number += 1
            directive = _LINE.match(line)  # in an edited file: what follows was written elsewhere
            if directive is not None:
                file, number = directive[2], int(directive[1]) - 1
                self.out.append(line)
                continue
            include = _INCLUDE.match(line)
            if include is None:
                self.out.append("" if _PRAGMA_ONCE.match(line) else line)
            elif self._include(include, f"{file}:{number}", path, line):
                self.out.append(f'#line {number + 1} "{file}"')
            else:
                self.out.append("")

    def _include(self, include: re.Match[str], where: str, includer: Path | None, line: str) -> bool:
        """Handles one include; True if it put lines into the text."""
        wanted = include[1] or include[2]
        if wanted in self.generated:
            if wanted in self.seen:
                return False
            if not self.generated[wanted]:
                raise CompileError(f"{where}: includes <{wanted}>, but no {wanted.partition('.')[0]} was given")
            self._append(wanted, self._edited(wanted, self.generated[wanted]), None)
            return True
        found = self._find(wanted, beside=includer.parent if includer and include[2] else None)
        if found is None and wanted in self.whole:
            if wanted in self.seen:
                return False
            self._append(wanted, self._edited(wanted, ""), None)
            return True
        if found is None:
            if where.startswith("hw_emu/") and include[1]:
                self.out.append(line)  # a system header of the host compiler
                return True
            raise CompileError(
                f"{where}: {line.strip()} is in none of {', '.join(map(str, self.search))}; "
                "kernels include only files of kernels_cu (no CUDA or system header)"
            )
        name = self._name(found)
        if name in self.seen:
            return False
        self._inline(found, name)
        return True

    def _find(self, wanted: str, beside: Path | None = None) -> Path | None:
        if wanted.startswith("hw/"):
            wanted = f"hw_{self.target}/{wanted[3:]}"
        for base in [*([beside] if beside else []), *self.search]:
            candidate = base / wanted
            if candidate.is_file():
                return candidate.resolve()
        return None

    def _name(self, path: Path) -> str:
        for base in self.search:
            if path.is_relative_to(base.resolve()):
                return path.relative_to(base.resolve()).as_posix()
        return path.name

    def _edited(self, name: str, text: str) -> str:
        for edit in self.edits:
            if edit.file == name and not edit.old:
                text = edit.new
            elif edit.file == name:
                count = text.count(edit.old)
                if count != 1:
                    raise ArgumentError(
                        f"Edit(file={name!r}, old={edit.old!r}): found {count} times, must match exactly once"
                    )
                text = text.replace(edit.old, edit.new)
        return text


# --- Files, read once until they change ---------------------------------------------------------------------------

_files: dict[Path, tuple[tuple[int, int], str]] = {}  # path -> ((mtime in ns, size), text)
_RECHECK_SECONDS = 0.5
_generation = 0
_checked = 0.0


def read(path: Path) -> str:
    """The file's text, from memory until the file changes on disk."""
    stamp = _stamp(path)
    entry = _files.get(path)
    if entry is None or entry[0] != stamp:
        entry = _files[path] = (stamp, path.read_text(encoding="utf-8"))
    return entry[1]


def generation() -> int:
    """A number that grows when a file that was read has changed on disk: what was built from it is stale.

    Looks at the files at most twice a second (so a warm call pays for reading a clock), and never in an installed
    package, whose files do not change.
    """
    global _generation, _checked
    now = time.monotonic()
    if now - _checked > _RECHECK_SECONDS and folder().name == "kernels_cu":
        if any(_stamp(path) != entry[0] for path, entry in list(_files.items())):
            _files.clear()
            _generation += 1
        _checked = now
    return _generation


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return (0, 0)  # the file is gone: whoever reads it next says so
    return (status.st_mtime_ns, status.st_size)


# --- Reading a flattened text back --------------------------------------------------------------------------------


def numbered(text: str) -> Iterator[tuple[str, int, str]]:
    """Every line of a flattened text as (file, line number in it, line), the `#line` directives followed and left out,
    and so is what `flatten` put behind the last file.

    >>> list(numbered('#line 7 "a.cu"\\nint x;\\n'))
    [('a.cu', 7, 'int x;')]
    """
    file, number = "<text>", 1
    for line in text.splitlines():
        directive = _LINE.match(line)
        if directive is not None:
            number, file = int(directive[1]), directive[2]
            continue
        if not line.endswith(ASSERTED):
            yield file, number, line
        number += 1


CONTEXT_LINES = 2  # shown around a line that a message names


def around(lines: Mapping[tuple[str, int], str], file: str, at: int) -> list[str]:
    """A line of a flattened text and its neighbours, numbered, the line itself marked; nothing if it is not there.

    >>> text = '#line 1 "a.cu"\\nint x\\nint y;\\n'
    >>> print(*around({(f, n): line for f, n, line in numbered(text)}, "a.cu", 1), sep="\\n")
      >    1 | int x
           2 | int y;
    """
    if (file, at) not in lines:
        return []
    near = range(at - CONTEXT_LINES, at + CONTEXT_LINES + 1)
    return [f"  {'>' if n == at else ' '} {n:4d} | {lines[file, n]}" for n in near if (file, n) in lines]
