"""Reads the machine code of a cubin: which instructions a kernel has, and what its main loops are made of.

nvdisasm, which turns a cubin into text, comes with the PyPI package nvidia-cuda-nvdisasm or a CUDA toolkit.
"""

from __future__ import annotations

import collections
import functools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import CompileError, UnsupportedError

# Opcode classes by what they do; an instruction counts for the longest that begins its opcode.
CLASSES = (
    "HMMA", "IMMA", "HGMMA", "QGMMA", "UTCHMMA",  # matrix products
    "MUFU", "FFMA", "FMUL", "FADD", "FMNMX", "FSEL", "FSETP", "F2FP", "SHFL",  # softmax
    "LDSM", "STSM", "LDS", "STS",  # shared memory
    "LDGSTS", "LDGDEPBAR", "DEPBAR", "UTMALDG", "UTMASTG", "SYNCS",  # asynchronous copies and their waits
    "LDG", "STG", "ATOM", "ATOMG", "RED", "REDG",  # global memory
    "LDL", "STL",  # local memory: spills, or arrays indexed at run time
    "BAR", "WARPGROUP", "WARPSYNC", "BRA",
)  # fmt: skip
MATRIX = ("HMMA", "IMMA", "HGMMA", "QGMMA", "UTCHMMA")

_FUNCTION = re.compile(r"^\.text\.(\w+):|^\s*\.section\s+\.text\.(\w+)")
_LABEL = re.compile(r"^(\.L_x_\w+):")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);")
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")
_ALWAYS = re.compile(r"BRA(\.\w+)* `")
_MOST = 0.7  # of a kernel's matrix instructions: what makes a loop the main one
_TARGET = re.compile(r"\bBRA\b.*?(\.L_x_\w+)")


@dataclass(frozen=True)
class Loop:
    """An innermost loop of a kernel: its instructions in order, from the label jumped back to."""

    instructions: tuple[str, ...]
    skips: tuple[tuple[int, int], ...] = ()  # branches forward within it: the instruction, the one it goes to

    @property
    def length(self) -> int:
        return len(self.instructions)

    @property
    def selecting(self) -> int:
        """How many instructions only a masked tile executes: those that one branch goes over and that select scores.

        >>> Loop(("HMMA R4, R8, R12, R4", "@P0 BRA 4", "FSEL R1, R2, R3, P1", "FSEL R2, R3, R4, P1", "EXIT"),
        ...      skips=((1, 4),)).selecting
        2
        """
        over = [self.instructions[a + 1 : b] for a, b in self.skips]
        return max(((count(x)["FSEL"], -len(x)) for x in over), default=(0, 0))[1] * -1

    @functools.cached_property
    def path(self) -> tuple[str, ...]:
        """The shortest way through all its products: of a tile that nothing is masked of and no score changed in.

        >>> Loop(("HMMA R4, R8, R12, R4", "@P0 BRA 4", "FMUL R1, R2, R3", "FMUL R2, R3, R4", "EXIT"),
        ...      skips=((1, 4),)).path
        ('HMMA R4, R8, R12, R4', '@P0 BRA 4', 'EXIT')
        >>> len(Loop(("@P0 BRA 3", "HMMA R4, R8, R12, R4", "HMMA R4, R8, R12, R4", "EXIT"), skips=((0, 3),)).path)
        4
        """
        left, after = [(0, 0)] * (self.length + 1), [0] * self.length  # (-products, instructions) to the end
        targets = dict(self.skips)
        for at in reversed(range(self.length)):
            ways = {at + 1} if at not in targets else {targets[at]} if self._leaves(at) else {targets[at], at + 1}
            after[at] = min(ways, key=left.__getitem__)
            products, instructions = left[after[at]]
            left[at] = products - _products(self.instructions[at : at + 1]), instructions + 1
        way = [0]
        while after[way[-1]] < self.length:
            way.append(after[way[-1]])
        return tuple(self.instructions[at] for at in way)

    @property
    def shortest(self) -> int:
        """How many instructions `path` has."""
        return len(self.path)

    def _leaves(self, at: int) -> bool:
        return _ALWAYS.match(self.instructions[at]) is not None

    @functools.cached_property
    def counts(self) -> dict[str, int]:
        return count(self.instructions)

    def in_window(self, opcode: str) -> tuple[int, int]:
        """How often it has an opcode between its two waits for products of a warpgroup, while the later of them run;
        and in all. (0, .) where it has no such waits."""
        waits = [i for i, x in enumerate(self.instructions) if x.startswith("WARPGROUP.DEPBAR")]
        found = [i for i, x in enumerate(self.instructions) if opcode in x]
        return sum(len(waits) == 2 and waits[0] < i < waits[1] for i in found), len(found)

    def segments(self, boundary: str) -> list[dict[str, int]]:
        """Counts of the stretches between instructions whose opcode begins with `boundary`, e.g. "WARPGROUP.DEPBAR":
        shows what is issued while asynchronous products are under way."""
        parts: list[list[str]] = [[]]
        for instruction in self.instructions:
            if opcode(instruction).startswith(boundary):
                parts.append([])
            else:
                parts[-1].append(instruction)
        return [count(p) for p in parts]


@dataclass(frozen=True)
class Function:
    """The machine code of one kernel."""

    name: str
    instructions: tuple[str, ...]
    loops: tuple[Loop, ...]  # innermost ones that hold matrix instructions
    main: Loop | None = (
        None  # the smallest that holds most matrix instructions, whatever loops it holds; None: none does
    )

    @functools.cached_property
    def counts(self) -> dict[str, int]:
        return count(self.instructions)

    @property
    def local_by_role(self) -> tuple[int, int] | None:
        """Accesses to local memory of warps that take registers, and of those that give theirs up, whose code stands
        behind; None where no warps do."""
        given = [i for i, x in enumerate(self.instructions) if "USETMAXREG.DEALLOC" in x]
        if len(given) != 1:
            return None
        local = [i for i, x in enumerate(self.instructions) if opcode(x).split(".")[0] in ("LDL", "STL")]
        return sum(i < given[0] for i in local), sum(i > given[0] for i in local)


def nvdisasm() -> Path:
    """The disassembler: beside this Python (the PyPI package), on PATH, or in CUDA_HOME.

    Raises UnsupportedError, with the remedy, where there is none.
    """
    name = "nvdisasm.exe" if sys.platform == "win32" else "nvdisasm"
    site = {Path(sysconfig.get_path(kind)) / "nvidia" for kind in ("purelib", "platlib")}
    candidates = [p for s in sorted(site) for p in (*s.glob(f"cu*/bin/{name}"), *s.glob(f"cuda_nvdisasm/bin/{name}"))]
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            candidates.append(Path(os.environ[variable]) / "bin" / name)
    on_path = shutil.which(name)
    if on_path:
        candidates.append(Path(on_path))
    found = next((c for c in candidates if c.is_file()), None)
    if found is None:
        raise UnsupportedError("nvdisasm, which reads cubins, was not found: pip install nvidia-cuda-nvdisasm")
    return found


def disassemble(cubin: Path) -> str:
    """The cubin's SASS as nvdisasm prints it. Raises UnsupportedError without nvdisasm, CompileError if it fails."""
    result = subprocess.run([nvdisasm(), str(cubin)], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise CompileError(f"nvdisasm could not read {cubin}: {result.stderr.strip()}", log=result.stderr)
    return result.stdout


def functions(text: str) -> dict[str, Function]:
    """Every kernel in nvdisasm's output, by name.

    >>> text = '''.text.f:
    ... .L_x_1:
    ...         /*0000*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
    ...         /*0010*/              @!P0 BRA `(.L_x_1) ;
    ...         /*0020*/                   EXIT ;'''
    >>> f = functions(text)["f"]
    >>> f.counts["HMMA"], [loop.length for loop in f.loops]
    (1, [2])
    """
    out: dict[str, Function] = {}
    name, instructions, labels = "", [], {}

    def close() -> None:
        if name and instructions:
            loops = _matrix_loops(instructions, labels)
            inner = [r for r in loops if not any(o != r and r[0] <= o[0] and o[1] <= r[1] for o in loops)]
            most = [r for r in loops if _products(instructions[slice(*r)]) > _MOST * _products(instructions)]
            main = min(most, key=lambda r: r[1] - r[0], default=None)
            out[name] = Function(
                name,
                tuple(instructions),
                tuple(_loop(instructions, labels, *r) for r in inner),
                None if main is None else _loop(instructions, labels, *main),
            )

    for line in text.splitlines():
        if m := _FUNCTION.match(line):
            if (m[1] or m[2]) != name:
                close()
                name, instructions, labels = m[1] or m[2], [], {}
        elif m := _LABEL.match(line):
            labels[m[1]] = len(instructions)
        elif m := _INSTRUCTION.match(line):
            instructions.append(m[2].strip())
    close()
    return out


def opcode(instruction: str) -> str:
    """The opcode with its modifiers, without the predicate.

    >>> opcode("@!P0 LDGSTS.E.BYPASS.128 [R3], [R4.64]")
    'LDGSTS.E.BYPASS.128'
    """
    return _PREDICATE.sub("", instruction).split(None, 1)[0]


def count(instructions: Sequence[str]) -> dict[str, int]:
    """Opcode class -> how often; every class of `CLASSES` is there, and "total".

    >>> counts = count(["LDS R1, [R2]", "LDSM.16.M88.4 R4, [R8]", "@P1 EXIT"])
    >>> counts["LDS"], counts["LDSM"], counts["HMMA"], counts["total"]
    (1, 1, 0, 3)
    """
    opcodes = collections.Counter(opcode(i).split(".")[0] for i in instructions)
    out = {c: opcodes[c] + opcodes["U" + c] for c in CLASSES}  # U: the uniform data path's form
    out["total"] = len(instructions)
    return out


def _products(instructions: Sequence[str]) -> int:
    return sum(opcode(x).split(".")[0] in MATRIX for x in instructions)


def _matrix_loops(instructions: list[str], labels: dict[str, int]) -> list[tuple[int, int]]:
    """(first, last) instruction of every loop that holds matrix instructions, loops around loops included."""
    ranges = []
    for at, instruction in enumerate(instructions):
        m = _TARGET.search(instruction)
        if m and labels.get(m[1], at + 1) <= at:
            begin = labels[m[1]]
            if "EXIT" in instructions[begin:at]:
                continue  # not a loop: a wait's second try, kept behind the end of the kernel, jumps back into it
            if _products(instructions[begin : at + 1]):
                ranges.append((begin, at))
    return ranges


def _loop(instructions: list[str], labels: dict[str, int], begin: int, end: int) -> Loop:
    return Loop(tuple(instructions[begin : end + 1]), tuple(_skips(instructions, labels, begin, end)))


def _skips(instructions: list[str], labels: dict[str, int], begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Branches forward within [begin, end], counted from begin."""
    for at in range(begin, end + 1):
        m = _TARGET.search(instructions[at])
        if m and at < labels.get(m[1], at) <= end:
            yield at - begin, labels[m[1]] - begin
