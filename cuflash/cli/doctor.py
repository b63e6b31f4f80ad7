"""`cuflash doctor`: what this machine has for cuflash, what is missing or does not fit, and what mends it."""

from __future__ import annotations

import json
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..arch import of_capability
from ..errors import CuflashError
from . import machine, terminal

MIN_CUPY = (14, 1, 1)  # earlier ones refuse bfloat16 arrays of other frameworks, or do not find NVRTC's wheel
MARKS = {"ok": "[green]ok[/]", "missing": "[red]missing[/]", "mismatch": "[red]mismatch[/]", "unused": "[dim]unused[/]"}


@dataclass(frozen=True)
class Line:
    """One finding. `state` is "ok", "missing", "mismatch", or "unused": not here, and not needed on this machine."""

    name: str
    state: str
    found: str
    remedy: str = ""


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of text.")] = False) -> None:
    """Say what is there, what is missing and what does not fit. Exit status 0 if nothing needs mending, else 1."""
    from rich.console import Console

    with Console(stderr=True).status("looking around", spinner="dots"):
        lines = list(examine())
    if as_json:
        print(json.dumps([asdict(line) for line in lines]))
    else:
        _print(lines)
    raise typer.Exit(int(any(line.state in ("missing", "mismatch") for line in lines)))


def examine() -> Iterator[Line]:
    """Every finding, in the order in which one leads to the next."""
    yield Line("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for check in (_driver, _gpus, _cupy, _torch, _bindings, _nvrtc, _compiler, _emulator, _cache, _nvdisasm):
        try:
            yield from check()
        except CuflashError as error:
            yield Line(check.__name__.lstrip("_"), "missing", str(error))


def _has_gpu() -> bool:
    return any(gpu.supported for gpu in machine.gpus())


def _absent(name: str, found: str, remedy: str, without_gpu: str = "") -> Line:
    """Something for a GPU that is not here: missing where there is a GPU, else nothing to mend, and `without_gpu` says
    what adds it where it is of use without one."""
    return Line(name, "missing", found, remedy) if _has_gpu() else Line(name, "unused", found, without_gpu)


def _extra() -> str:
    return machine.pip_install_extra(f"cuda{machine.wanted_cuda_major()}")


def _dotted(version: machine.Version) -> str:
    return ".".join(map(str, version))


def _driver() -> Iterator[Line]:
    driver = machine.driver()
    if driver is not None:
        yield Line("driver", "ok", f"runs CUDA up to {_dotted(driver.cuda)}")
    elif machine.nvidia_card_without_driver():
        debian = Path("/etc/debian_version").exists()
        remedy = "sudo apt-get install nvidia-driver" if debian else "install the driver from nvidia.com/drivers"
        yield Line("driver", "missing", "an NVIDIA card, but no driver for it", remedy)
    else:
        yield Line("driver", "unused", "none, and no NVIDIA card seen; kernels run on the emulator")


def _gpus() -> Iterator[Line]:
    for gpu in machine.gpus():
        what = f"{gpu.name}, compute capability {_dotted(gpu.capability)}"
        if gpu.supported:
            yield Line(f"GPU {gpu.index}", "ok", f"{what}, kernels for {of_capability(*gpu.capability)}")
        else:
            yield Line(
                f"GPU {gpu.index}", "mismatch", f"{what}; the kernels begin with 8.0 (mma.sync of bfloat16, cp.async)",
                "pass host arrays on this machine, or use a GPU from Ampere on",
            )  # fmt: skip
    driver = machine.driver()
    if driver is not None and not driver.gpus:
        yield Line("GPU", "unused", "the driver shows none (is CUDA_VISIBLE_DEVICES empty?)")


def _cupy() -> Iterator[Line]:
    wheels = machine.cupy_wheels()
    if not wheels:
        yield _absent("CuPy", "not installed; it loads and launches the kernels", _extra())
        return
    found = ", ".join(f"{name} {version}" for name, version in wheels.items())
    if len(wheels) > 1:
        remedy = f"{sys.executable} -m pip uninstall -y {' '.join(wheels)} && {_extra()}"
        yield Line("CuPy", "mismatch", f"{found}: they overwrite each other's files", remedy)
        return
    (name, version), major, driver = *wheels.items(), machine.cupy_cuda_major(), machine.driver()
    if machine.version_tuple(version) < MIN_CUPY:
        yield Line("CuPy", "mismatch", f"{found}; {_dotted(MIN_CUPY)} or later is needed", _extra())
    elif driver is not None and major is not None and major > driver.cuda[0]:
        remedy = f"{sys.executable} -m pip uninstall -y {name} && {machine.pip_install_extra(f'cuda{driver.cuda[0]}')}"
        too_old = f"{found} is for CUDA {major}, the driver runs up to {_dotted(driver.cuda)}"
        yield Line("CuPy", "mismatch", too_old, remedy)
    else:
        yield Line("CuPy", "ok", found)


def _torch() -> Iterator[Line]:
    version, torch, cupy = machine.installed("torch"), machine.torch_cuda(), machine.cupy_cuda_major()
    if version is None:
        return
    if torch is not None and cupy is not None and int(torch.split(".")[0]) != cupy:
        wheels = " ".join(machine.cupy_wheels())
        yield Line(
            "PyTorch", "mismatch", f"{version} is for CUDA {torch}, CuPy for CUDA {cupy}: two sets of CUDA libraries",
            f"{sys.executable} -m pip uninstall -y {wheels} && {_extra()}",
        )  # fmt: skip
    else:
        yield Line("PyTorch", "ok", f"{version}, {'CPU build' if torch is None else f'CUDA {torch}'}")


def _bindings() -> Iterator[Line]:
    version = machine.installed("cuda-bindings")
    if version is None:
        not_here = (
            "cuda-bindings is not installed; it is how NVRTC is reached, which compiles kernels without a GPU too"
        )
        yield _absent("cuda-python", not_here, _extra(), machine.pip_install_extra("nvrtc"))
        return
    cupy = machine.cupy_cuda_major()
    if cupy is not None and machine.version_tuple(version)[0] != cupy:
        yield Line(
            "cuda-python", "mismatch", f"cuda-bindings {version}, but CuPy is for CUDA {cupy}",
            machine.pip_install(f"cuda-bindings=={cupy}.*", f"cuda-toolkit[nvrtc,cudart]=={cupy}.*"),
        )  # fmt: skip
    else:
        yield Line("cuda-python", "ok", f"cuda-bindings {version}")


def _nvrtc() -> Iterator[Line]:
    from ..jit import nvrtc

    if machine.installed("cuda-bindings") is None:
        return
    try:
        version = nvrtc.version()
    except CuflashError:
        major = machine.version_tuple(machine.installed("cuda-bindings") or "13")[0]
        remedy = machine.pip_install(f"cuda-toolkit[nvrtc,cudart]=={major}.*")
        without_gpu = machine.pip_install(f"cuda-toolkit[nvrtc]=={major}.*")
        yield _absent("NVRTC", f"no libnvrtc of CUDA {major} is found", remedy, without_gpu)
        return
    driver = machine.driver()
    if driver is not None and version[0] > driver.cuda[0]:
        too_old = f"{_dotted(version)} makes code that a driver of CUDA {_dotted(driver.cuda)} cannot load"
        yield Line("NVRTC", "mismatch", too_old, machine.pip_install_extra(f"cuda{driver.cuda[0]}"))
        return
    known = nvrtc.supported_archs()
    for gpu in machine.gpus():
        chip = "".join(map(str, gpu.capability))
        if gpu.supported and chip not in known:
            unknown = f"{_dotted(version)} does not know {gpu.name} (sm_{chip})"
            yield Line("NVRTC", "mismatch", unknown, f"{machine.pip_install('cuda-toolkit[nvrtc,cudart]')} --upgrade")
            return
    yield Line("NVRTC", "ok", f"{_dotted(version)}, compiles for sm_{', sm_'.join(known)}")


def _compiler() -> Iterator[Line]:
    compiler = machine.cxx_compiler()
    if compiler is not None:
        yield Line("C++ compiler", "ok", compiler)
    else:
        none = "none; the emulator needs one (g++, clang++ or $CXX)"
        yield Line("C++ compiler", "missing", none, _install_compiler())


def _install_compiler() -> str:
    if shutil.which("apt-get"):
        return "sudo apt-get install -y g++"
    if shutil.which("dnf"):
        return "sudo dnf install -y gcc-c++"
    if sys.platform == "darwin":
        return "xcode-select --install"
    return machine.pip_install("ziglang")


def _emulator() -> Iterator[Line]:
    from .. import emulator

    if machine.cxx_compiler() is not None:
        speed = emulator.speed()
        yield Line("emulator", "ok", f"{speed:,.0f} mma.m16n8k16 a second on one core")


def _cache() -> Iterator[Line]:
    from ..jit import cache

    held = cache.usage()
    folder, what = held.folder, f"{held.folder}: {described(held)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".doctor"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        remedy = "export CUFLASH_CACHE_DIR=SOME_FOLDER_OF_YOURS"
        yield Line("cache", "missing", f"{folder} cannot be written: {error}", remedy)
        return
    yield Line("cache", "ok", what)


def described(held: Any) -> str:
    """A `cache.Usage` in words."""
    text = f"{held.payloads} kernels, {held.payload_bytes / 1e6:.1f} MB"
    return text + (
        f"; besides {held.other_bytes / 1e6:.1f} MB, the demo's encoder and the like" if held.other_bytes else ""
    )


def _nvdisasm() -> Iterator[Line]:
    found = machine.nvdisasm()
    if found is not None:
        yield Line("nvdisasm", "ok", found)
    else:
        yield Line(
            "nvdisasm", "unused", "none; only `cuflash compile` and the tests read machine code",
            machine.pip_install("nvidia-cuda-nvdisasm"),
        )  # fmt: skip


def _print(lines: list[Line]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for overflow in ("ellipsis", "ellipsis", "fold"):  # a path is of use only whole
        table.add_column(overflow=overflow)
    for line in lines:
        table.add_row(line.name, MARKS[line.state], escape(line.found))
    console = terminal.console()
    console.print(table)
    remedies = [line for line in lines if line.remedy and line.state != "ok"]
    if remedies:
        console.print("\nTo mend or add:")
    for line in remedies:
        console.print(f"  [bold]{line.name}[/]  {escape(line.remedy)}", soft_wrap=True)
