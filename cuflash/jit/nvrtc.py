"""A flattened text -> a cubin for one exact architecture, through NVRTC. Needs no GPU and no driver.

NVRTC comes with the extras `cuda12` and `cuda13`, or any CUDA toolkit the loader of cuda-python finds.
"""

from __future__ import annotations

import functools
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..arch import Arch
from ..errors import CompileError, UnsupportedError
from . import cache, source

SHOWN_ERRORS = 5
_SHOWN_LINES = 12  # of a log in which no message names a line of the text

_MESSAGE = re.compile(r"^(?P<file>[^\s()][^()\n]*)\((?P<line>\d+)\): (?P<kind>.*?(?:error|warning).*?): ?(?P<text>.*)$")
_ENTRY = re.compile(r"Compiling entry function '(\w+)' for")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(.*)")
_STATIC_SMEM = re.compile(r"(\d+)(?:\+\d+)? bytes smem")


@dataclass(frozen=True)
class Resources:
    """What one kernel uses, as ptxas reports it: registers a thread; bytes of stack and spills a thread; static shared
    memory a block (without what a launch asks for)."""

    registers: int = 0
    stack_bytes: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    static_smem_bytes: int = 0


@dataclass(frozen=True)
class Cubin:
    """A compiled text: the file's bytes, the compiler's log, and per kernel (entry name) its resources."""

    data: bytes = field(repr=False)
    log: str = field(repr=False)
    resources: dict[str, Resources]
    warnings: tuple[str, ...]
    compile_ms: float

    def note(self) -> dict[str, Any]:
        """All but the bytes, as JSON values: kept beside the file in the cache."""
        return {
            "log": self.log,
            "resources": {name: asdict(r) for name, r in self.resources.items()},
            "warnings": list(self.warnings),
            "compile_ms": self.compile_ms,
        }

    @staticmethod
    def from_note(data: bytes, note: dict[str, Any]) -> Cubin:
        """The inverse of `note`."""
        resources = {name: Resources(**r) for name, r in note["resources"].items()}
        return Cubin(data, note["log"], resources, tuple(note["warnings"]), note["compile_ms"])


def options() -> tuple[str, ...]:
    """The options the language of the kernels needs: `cupy.RawModule(code=text, options=options())` takes them too,
    and adds an architecture and -default-device itself; and -ftz=true, the one difference from `command`: denormal
    floats that a mod compares or rounds are 0 then."""
    return ("-std=c++17", "--diag-suppress=177")  # 177: declared but never used


def command(arch: Arch, extra: tuple[str, ...] = ()) -> tuple[str, ...]:
    """All options of a compile. -ftz=false: denormal floats stay what they are, as on the reference and the emulator.
    It costs nothing, for approximate instructions are spelt with .ftz where they are wrapped (hw_cuda/math.cuh)."""
    return (*options(), "-default-device", "-ftz=false", f"-arch={arch.name}", "--ptxas-options=-v", *extra)


def version() -> tuple[int, int]:
    """NVRTC's (major, minor) version. Raises CompileError, with the remedy, where there is none."""
    return _library()[1]


def key_parts(arch: Arch, extra: tuple[str, ...] = ()) -> tuple[str, ...]:
    """What a cubin depends on besides its text: the compiler and its options."""
    return ("nvrtc", *map(str, version()), *command(arch, extra))


def supported_archs() -> tuple[str, ...]:
    """The compute capabilities this NVRTC compiles for, as "80", "90", ..."""
    nvrtc = _library()[0]
    return tuple(str(a) for a in _ok(nvrtc.nvrtcGetSupportedArchs())[0])


def compile(text: str, arch: Arch, name: str, extra: tuple[str, ...] = ()) -> Cubin:
    """Compiles a flattened text. `name` stands in messages that concern the whole text.

    Raises CompileError with the compiler's messages, each with the source lines around it, and the attributes `log`
    and `source`; UnsupportedError where this NVRTC is too old for `arch`. One call, one thread; calls may overlap.
    """
    nvrtc, (major, minor) = _library()
    require_arch(arch)
    flags = command(arch, extra)
    program = _ok(nvrtc.nvrtcCreateProgram(text.encode(), name.encode(), 0, [], []))[0]
    try:
        start = time.perf_counter()
        status = nvrtc.nvrtcCompileProgram(program, len(flags), [f.encode() for f in flags])[0]
        compile_ms = (time.perf_counter() - start) * 1e3
        log = (
            _buffer(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
            .rstrip(b"\0 \n")
            .decode(errors="replace")
        )
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise _failure(text, log or str(status), name, f"{name} for {arch.name} (NVRTC {major}.{minor})")
        data = _buffer(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return Cubin(data, log, parse_resources(log), parse_warnings(log), compile_ms)


# --- The library --------------------------------------------------------------------------------------------------


@functools.cache
def _library() -> tuple[Any, tuple[int, int]]:
    try:
        from cuda.bindings import nvrtc

        found = _ok(nvrtc.nvrtcVersion())
    except Exception as error:  # no cuda-python, no libnvrtc, or one that does not fit the other
        raise CompileError(
            f"NVRTC, which compiles the kernels, cannot be used here ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no message'}). {_remedy()}"
        ) from error
    return nvrtc, (found[0], found[1])


def _remedy() -> str:
    from importlib import metadata

    for cuda in ("12", "13"):
        try:
            metadata.distribution(f"cupy-cuda{cuda}x")
        except metadata.PackageNotFoundError:
            continue
        return f'CuPy here is for CUDA {cuda}: pip install "cuflash[cuda{cuda}]"'
    return (
        'pip install "cuflash[cuda13]", or "cuflash[cuda12]" for a driver older than 580 (nvidia-smi shows it); '
        "without a GPU, CUFLASH_BACKEND=emulator needs only a C++ compiler"
    )


def require_arch(arch: Arch) -> None:
    """Raises UnsupportedError, with the remedy, if this NVRTC does not compile for `arch`."""
    known = supported_archs()
    digits = arch.name.removeprefix("sm_").rstrip("af")
    if digits in known:
        return
    major, minor = version()
    remedy = (
        "upgrade it: pip install -U nvidia-cuda-nvrtc"
        if major >= 13
        else 'pip install "cuflash[cuda13]" (driver 580 or later)'
    )
    raise UnsupportedError(
        f"NVRTC {major}.{minor} does not know {arch.name}, it compiles for sm_{', sm_'.join(known)}; {remedy}"
    )


def _ok(result: tuple[Any, ...]) -> tuple[Any, ...]:
    status, *values = result
    if int(status) != 0:
        raise CompileError(f"NVRTC: {status}")
    return tuple(values)


def _buffer(size: Any, fill: Any, program: Any) -> bytes:
    data = bytes(_ok(size(program))[0])  # the binding writes into it; nobody else holds it
    _ok(fill(program, data))
    return data


# --- The log ------------------------------------------------------------------------------------------------------


def parse_resources(log: str) -> dict[str, Resources]:
    """Per kernel, what `--ptxas-options=-v` printed.

    >>> parse_resources('''ptxas info    : Compiling entry function 'f' for 'sm_80'
    ...     8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
    ... ptxas info    : Used 40 registers, used 1 barriers, 96 bytes smem, 376 bytes cmem[0]''')
    {'f': Resources(registers=40, stack_bytes=8, spill_stores=4, spill_loads=12, static_smem_bytes=96)}
    """
    out: dict[str, Resources] = {}
    entry, frame = "", (0, 0, 0)
    for line in log.splitlines():
        if m := _ENTRY.search(line):
            entry, frame = m[1], (0, 0, 0)
        elif m := _STACK.search(line):
            frame = (int(m[1]), int(m[2]), int(m[3]))
        elif entry and (m := _USED.search(line)):
            smem = _STATIC_SMEM.search(m[2])
            out[entry] = Resources(int(m[1]), *frame, int(smem[1]) if smem else 0)
            entry = ""
    return out


def parse_warnings(log: str) -> tuple[str, ...]:
    """The lines of a log that warn: the front end's, and ptxas' about lost performance."""
    shown = re.compile(r"\bwarning\b|Potential Performance Loss")
    return tuple(s.strip() for s in log.splitlines() if shown.search(s) and not s.startswith("Remark"))


def _failure(text: str, log: str, name: str, what: str) -> CompileError:
    lines: dict[tuple[str, int], str] = {(f, n): line for f, n, line in source.numbered(text)}
    parts = []
    messages = [m for line in log.splitlines() if (m := _MESSAGE.match(line)) and "error" in m["kind"]]
    for m in messages[:SHOWN_ERRORS]:
        file, at = m["file"], int(m["line"])
        parts.append(f"{file}:{at}: {m['kind']}: {m['text']}")
        parts += source.around(lines, file, at)
    if len(messages) > SHOWN_ERRORS:
        parts.append(f"... and {len(messages) - SHOWN_ERRORS} more")
    if not messages:  # ptxas' own, which may be hundreds alike
        said = log.splitlines()
        parts += said[:_SHOWN_LINES]
        if len(said) > _SHOWN_LINES:
            parts.append(f"... and {len(said) - _SHOWN_LINES} lines more")
    written = cache.keep("failed", f"{Path(name).stem}.{cache.key_of(text)[:10]}.cu", text.encode())
    parts.append(f"The whole text: {written}")
    return CompileError(f"{what} did not compile:\n" + "\n".join(parts), log=log, source=text)
