"""What this machine has, found without importing CuPy, PyTorch or JAX and without CUDA installed."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

Version = tuple[int, ...]

_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@dataclass(frozen=True)
class Gpu:
    """A device as the driver names it. `capability` is (major, minor)."""

    index: int
    name: str
    capability: tuple[int, int]

    @property
    def supported(self) -> bool:
        return self.capability >= (8, 0)


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver: the newest CUDA it runs, (major, minor), and the devices it shows."""

    cuda: Version
    gpus: tuple[Gpu, ...]


@cache
def driver() -> Driver | None:
    """The driver, asked through its own library; None where there is none or it does not start."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return None
    cuda = (number.value // 1000, number.value % 1000 // 10)
    if library.cuInit(0) != 0 or library.cuDeviceGetCount(ctypes.byref(number)) != 0:
        return Driver(cuda, ())
    gpus = []
    for index in range(number.value):
        device, name, major, minor = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_int(), ctypes.c_int()
        library.cuDeviceGet(ctypes.byref(device), index)
        library.cuDeviceGetName(name, len(name), device)
        library.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device)
        library.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device)
        gpus.append(Gpu(index, name.value.decode(errors="replace"), (major.value, minor.value)))
    return Driver(cuda, tuple(gpus))


def gpus() -> tuple[Gpu, ...]:
    found = driver()
    return found.gpus if found else ()


def nvidia_card_without_driver() -> bool:
    """True if the PCI bus of a Linux machine shows an NVIDIA graphics card that no driver speaks for."""
    if driver() is not None:
        return False
    for vendor in Path("/sys/bus/pci/devices").glob("*/vendor"):
        try:
            if vendor.read_text().strip() == "0x10de" and (vendor.parent / "class").read_text().startswith("0x03"):
                return True
        except OSError:
            continue
    return False


def installed(distribution: str) -> str | None:
    """The version of an installed distribution, or None.

    >>> installed("numpy") is not None, installed("no-such-thing")
    (True, None)
    """
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def version_tuple(text: str) -> Version:
    """The leading numbers of a version.

    >>> version_tuple("2.11.0+cu130"), version_tuple("14.2.0rc1")
    ((2, 11, 0), (14, 2, 0))
    """
    numbers = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in numbers.group().split(".")) if numbers else ()


def cupy_wheels() -> dict[str, str]:
    """Every CuPy distribution here and its version: more than one is a mistake, they overwrite each other's files."""
    names = ("cupy", "cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x")
    return {name: version for name in names if (version := installed(name)) is not None}


def cupy_cuda_major() -> int | None:
    """The CUDA major version the installed CuPy wheel was built for; None if there is none, or it does not say."""
    for name in cupy_wheels():
        if found := re.fullmatch(r"cupy-cuda(\d+)x", name):
            return int(found.group(1))
    return None


def torch_cuda() -> str | None:
    """The CUDA version the installed PyTorch was built with, or None; read from its files, for importing it is slow."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text()
    except OSError:
        return None
    found = re.search(r"^cuda\b[^=]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return found.group(1) if found else None


def wanted_cuda_major() -> int:
    """The CUDA major version to install for: PyTorch's if it is here, else the driver's, else the newest."""
    if (torch := torch_cuda()) is not None:
        return int(torch.split(".")[0])
    found = driver()
    return 12 if found and found.cuda[0] < 13 else 13


def pip_install(*requirements: str) -> str:
    """The command that installs `requirements` into the running Python.

    >>> pip_install("a>=1").endswith('-m pip install "a>=1"')
    True
    """
    return " ".join([sys.executable, "-m", "pip", "install", *(f'"{r}"' for r in requirements)])


def pip_install_extra(extra: str) -> str:
    """The command that adds one of cuflash's extras, from the checkout if this is one."""
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "pyproject.toml").is_file() and (checkout / "kernels_cu").is_dir():
        return f'{sys.executable} -m pip install -e "{checkout}[{extra}]"'
    return pip_install(f"cuflash[{extra}]")


def cxx_compiler() -> str | None:
    """The C++ compiler the emulator would use, as a command; None where there is none."""
    from ..errors import CompileError
    from ..jit import hostcxx

    try:
        return " ".join(hostcxx.compiler())
    except CompileError:
        return None


def nvdisasm() -> str | None:
    """The disassembler that reads cubins: its path, or None."""
    from ..errors import UnsupportedError
    from ..jit import sass

    try:
        return str(sass.nvdisasm())
    except UnsupportedError:
        return None
