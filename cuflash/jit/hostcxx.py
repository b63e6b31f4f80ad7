"""String to shared object: the flattened text of a kernel through this machine's C++ compiler, for the emulator.

    library = hostcxx.compile(source.flatten("forward_sm80.cu", "emu", variant=...))

The emulator's runtime (kernels_cu/hw_emu/runtime.cpp) is compiled once, at -O3; a kernel at -O1, where compiling and
running it together take the least time.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..errors import CompileError
from . import cache, source

COMPILERS = ("g++", "clang++", "c++")

_FLAGS = (
    "-std=c++17", "-fPIC", "-shared", "-march=native", "-pthread", "-w",
    # Fibers leave functions by longjmp and switch stacks: no checks that would take that for damage.
    "-fno-stack-protector", "-U_FORTIFY_SOURCE",
    "-fno-sanitize=undefined",  # which ziglang adds by itself
    *(("-Wl,-undefined,dynamic_lookup",) if sys.platform == "darwin" else ()),
)  # fmt: skip
_RUNTIME_FLAGS = ("-O3",)
# Products and sums are fused where the kernel says so and nowhere else; errno is not looked at.
# A large frame touches its pages in order, so that it meets the guard below a thread's stack and not what lies beyond.
_KERNEL_FLAGS = (
    "-O1", "-ffp-contract=off", "-fno-math-errno", "-fno-exceptions", "-fvisibility=hidden", "-fstack-clash-protection",
    "-fwrapv",  # ints of mods wrap
)  # fmt: skip

_KERNEL = re.compile(
    r"^HW_(?:KERNEL\((?P<threads>.+)\)|CLUSTER_KERNEL\((?P<own>.+),\s*(?P<cluster>\d+)\))\s*(?P<name>\w+)\s*\(",
    re.MULTILINE,
)
_ERROR = re.compile(r"^(?P<file>[^\s:][^:\n]*):(?P<line>\d+):(?:\d+:)? (?:fatal )?error: (?P<what>.*)$", re.MULTILINE)
_UNMATCHED = re.compile(
    r"^(?P<file>[^\s:][^:\n]*):(?P<line>\d+):(?:\d+:)? note: (?P<what>to match this .*)$", re.MULTILINE
)
_SHOWN_ERRORS = 5
_ENTRY = "template <class Params> void cuflash_emu_call_"
# A kernel that includes this file has warps that meet at other barriers than the block's.
_CLOCKED = "hw_emu/barrier.cuh"


@functools.cache
def compiler() -> tuple[str, ...]:
    """The C++ compiler as a command: $CXX, g++, clang++, c++, or the one that the package ziglang brings.

    Raises CompileError, saying what to install, if there is none.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        if shutil.which(named[0]) is None:
            raise CompileError(f"CXX={os.environ['CXX']!r}: no such program; unset CXX, or name a C++17 compiler")
        return tuple(named)
    for name in COMPILERS:
        if path := shutil.which(name):
            return (path,)
    if importlib.util.find_spec("ziglang") is not None:
        return (sys.executable, "-m", "ziglang", "c++")
    raise CompileError(
        f"the emulator compiles kernels with a C++ compiler, and none of {', '.join(COMPILERS)} is here: install g++ "
        "(apt-get install g++, dnf install gcc-c++, xcode-select --install), or: pip install ziglang"
    )


def compile(text: str) -> Path:
    """The shared object of a flattened kernel text (target "emu"), from the cache or compiled.

    Raises CompileError with the compiler's errors at their places in the files of kernels_cu.
    """
    clocked = f'#line 1 "{_CLOCKED}"' in text
    text += "".join(
        _entry(m["name"], m["threads"] or m["own"], int(m["cluster"] or 1), clocked) for m in _KERNEL.finditer(text)
    )

    def make() -> bytes:
        runtime()  # a part of what the caller waits for
        return _compile(text, _KERNEL_FLAGS)

    return cache.build("emulator", cache.key_of(text, *_KERNEL_FLAGS, *_fixed_parts()), ".so", make)


def runtime() -> Path:
    """The shared object of the emulator's runtime, from the cache or compiled."""
    folder = source.folder()
    text = source.flatten(folder / "hw_emu" / "runtime.cpp", "emu")
    key = cache.key_of(text, *_RUNTIME_FLAGS, *_fixed_parts())
    return cache.build("emulator", key, ".so", lambda: _compile(text, _RUNTIME_FLAGS))


def _entry(name: str, threads: str, cluster: int, clocked: bool) -> str:
    """Text that lets the runtime call a kernel whose parameter it does not know."""
    return f"""
{_ENTRY}{name}(void (*kernel)(Params), const void* params) {{
  kernel(*static_cast<const Params*>(params));
}}
extern "C" __attribute__((visibility("default"))) void cuflash_emu_entry_{name}(const void* params) {{
  cuflash_emu_call_{name}(&{name}, params);
}}
extern "C" __attribute__((visibility("default"))) const i32 cuflash_emu_threads_{name} = {threads};
extern "C" __attribute__((visibility("default"))) const i32 cuflash_emu_clocked_{name} = {int(clocked)};
extern "C" __attribute__((visibility("default"))) const i32 cuflash_emu_cluster_{name} = {cluster};
"""


def _compile(text: str, flags: Sequence[str]) -> bytes:
    with tempfile.TemporaryDirectory(prefix="cuflash-") as folder:
        file, out = Path(folder) / "kernel.cpp", Path(folder) / "kernel.so"
        file.write_text(text, encoding="utf-8")
        command = [*compiler(), *_FLAGS, *flags, str(file), "-o", str(out), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode != 0:
            raise CompileError(_explain(text, command, done.stderr), log=done.stderr, source=text)
        return out.read_bytes()


def _explain(text: str, command: Sequence[str], log: str) -> str:
    """The compiler's errors, each with the lines around."""
    lines: dict[tuple[str, int], str] = {(f, n): line for f, n, line in source.numbered(text)}
    file, end = next((place for place, line in lines.items() if line.startswith(_ENTRY)), ("", 0))
    errors = list(_ERROR.finditer(log))
    # What comes behind the kernel, from `_entry`, is not at fault: the kernel's text has not ended.
    behind = [x for x in errors if x["file"] == file and int(x["line"]) >= end > 0]
    errors = [x for x in errors if x not in behind]
    shown = [f"{command[0]} could not compile it:"]
    if behind:
        shown.append(f"{file}: behind its last line: {behind[-1]['what']}")
        for note in _UNMATCHED.finditer(log):
            shown.append(f"{note['file']}:{note['line']}: {note['what']}")
            shown += source.around(lines, note["file"], int(note["line"]))
    for error in errors[:_SHOWN_ERRORS]:
        shown.append(f"{error['file']}:{error['line']}: {error['what']}")
        shown += source.around(lines, error["file"], int(error["line"]))
    if len(errors) > _SHOWN_ERRORS:
        shown.append(f"and {len(errors) - _SHOWN_ERRORS} more errors")
    return "\n".join(shown if errors or behind else [f"{shlex.join(command)} failed:", log.strip()[-4000:]])


@functools.cache
def _fixed_parts() -> tuple[str, ...]:
    """What a shared object depends on besides the text: compiler, its version, flags, and this processor."""
    command = compiler()
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, errors="replace").stdout
    return (*command, version, *_FLAGS, platform.system(), platform.machine(), _processor())


def _processor() -> str:
    """The instruction sets that -march=native may choose: a cache folder may be shared by unlike machines."""
    try:
        info = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return platform.processor()
    return "\n".join(re.findall(r"^(?:flags|Features|model name)\s*:.*$", info.split("\n\n", 1)[0], re.MULTILINE))
