"""A CUDA driver without a GPU, put under the real CuPy of this process; tests/fake_cuda/driver is the driver itself.

    install()                       # before anything imports CuPy
    with settings(allocations=3, late=False):
        ...                         # adversaries, for a while
    with recording() as lines:
        cuflash.attention(...)      # lines: what the driver was asked for

The driver's functions are found by the name of its library: ours is loaded first, and every later dlopen of
libcuda.so.1 gives it. CuPy's runtime is inside of CuPy: the functions that are needed of it are replaced in the table
from which CuPy's other modules take them. All else is CuPy as it is shipped: its memory pool, streams, events, graphs,
RawModule and RawKernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.abc
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
VARIABLE = "CUFLASH_TEST_DRIVER"  # "stand-in", or "stand-in:8.0" for another compute capability
LIBRARY = "libcuda.so.1"

# Compute capability -> multiprocessors, and the most shared memory that a block may ask for, in bytes.
DEVICES = {
    (8, 0): (108, 166912), (8, 6): (84, 101376), (8, 9): (128, 101376), (9, 0): (132, 232448), (12, 0): (170, 101376),
}  # fmt: skip


class Settings(ctypes.Structure):
    """`Settings` of driver/state.hpp, which says what each is."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("devices", "major", "minor", "multiprocessors", "shared_optin", "version")),
        *((name, ctypes.c_bool) for name in ("late", "runtime_apart", "hanging")),
        ("allocations", ctypes.c_longlong),
        *((name, ctypes.c_int) for name in ("failing_launch", "launch_status", "failing_kernel", "failing_load")),
    ]


_library: Any = None


def library() -> Any:
    """The driver, whose functions are called with the interpreter's lock held."""
    if _library is None:
        raise RuntimeError("the driver stand-in is not installed")
    return _library


def installed() -> bool:
    return _library is not None


# --- Its adversaries ------------------------------------------------------------------------------------------------


def _settings() -> Settings:
    function = library().stand_in_settings
    function.restype = ctypes.POINTER(Settings)
    return function().contents


@contextlib.contextmanager
def settings(**values: Any) -> Iterator[Settings]:
    """Changes settings for a while. What failed meanwhile is mended behind it."""
    now = _settings()
    before = {name: getattr(now, name) for name, _ in Settings._fields_}
    for name, value in values.items():
        setattr(now, name, value)
    try:
        yield now
    finally:
        for name, value in before.items():
            setattr(now, name, value)
        library().stand_in_mend()


def mend() -> None:
    """Forgets that a kernel failed, of which no CUDA call can heal a process."""
    library().stand_in_mend()


def run_all() -> int:
    """Runs all work that waits. The status of what failed, or 0."""
    return _released().stand_in_run_all()


@contextlib.contextmanager
def recording() -> Iterator[list[str]]:
    """What the driver was asked for, a line each; filled when the block ends."""
    lines: list[str] = []
    library().stand_in_log(1)
    try:
        yield lines
    finally:
        text = ctypes.create_string_buffer(1 << 22)
        library().stand_in_lines(text, len(text))
        library().stand_in_log(0)
        lines[:] = text.value.decode().splitlines()


def blocks() -> list[tuple[int, int]]:
    """(address, bytes) of all device memory that is allocated."""
    room = 1 << 14
    found = (ctypes.c_uint64 * (2 * room))()
    count = library().stand_in_blocks(found, room)
    assert count <= room
    return [(found[2 * i], found[2 * i + 1]) for i in range(count)]


def device_of(address: int) -> int | None:
    """The device in whose memory an address lies; None for the host's."""
    found = ctypes.c_int()
    return found.value if library().stand_in_device(ctypes.c_uint64(address), ctypes.byref(found)) else None


# --- Installing -----------------------------------------------------------------------------------------------------

_LAUNCH = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int, ctypes.POINTER(ctypes.c_uint), ctypes.c_void_p,
    ctypes.c_uint64, ctypes.c_uint64, ctypes.POINTER(ctypes.c_int),
)  # fmt: skip
_kept: list[Any] = []  # what C holds by address


def install() -> None:
    """Makes the driver this process's, as `VARIABLE` in the environment says, and builds it if need be."""
    global _library
    if installed():
        return
    assert "cupy" not in sys.modules, "CuPy was imported before the driver stand-in"
    os.environ["CUPY_ACCELERATORS"] = ""  # libraries of CuPy's that have the runtime inside, too
    path = str(_built())
    ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)  # by its soname every later dlopen of the driver finds it
    _library = ctypes.PyDLL(path)
    capability = tuple(map(int, (os.environ.get(VARIABLE, "").partition(":")[2] or "9.0").split(".")))
    now = _settings()
    now.major, now.minor = capability
    now.multiprocessors, now.shared_optin = DEVICES[capability]
    now.devices = 2  # CuPy makes its memory pools for as many as it sees first
    sys.meta_path.insert(0, _BeforeCupy())


def for_children() -> None:
    """Lets processes that this one starts have the stand-in, too: its folder's `sitecustomize` installs it."""
    here = str(HERE / "site")
    if here not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))


def on_launch(function: Callable[..., None]) -> None:
    """function(path, kernel, device, shape, arguments, bytes, stream, status) runs a kernel, and writes a status."""
    _kept.append(_LAUNCH(function))
    library().stand_in_on_launch(_kept[-1])


def _released() -> Any:
    """The driver once more, whose functions are called without the interpreter's lock."""
    return ctypes.CDLL(_library._name)


def _built() -> Path:
    """The library, compiled once for its text."""
    sources = sorted((HERE / "driver").glob("*.?pp"))
    digest = hashlib.sha256(b"".join(s.read_bytes() for s in sources)).hexdigest()[:16]
    folder = Path(os.environ.get("CUFLASH_CACHE_DIR") or tempfile.gettempdir()) / f"driver-stand-in-{digest}"
    result = folder / LIBRARY
    if not result.exists():
        folder.mkdir(parents=True, exist_ok=True)
        made = folder / f"{LIBRARY}.{os.getpid()}"
        units = [str(s) for s in sources if s.suffix == ".cpp"]
        compiler = shlex.split(os.environ.get("CXX", "g++"))
        flags = ["-O1", "-std=c++17", "-shared", "-fPIC", f"-Wl,-soname,{LIBRARY}", "-ldl", "-lpthread"]
        subprocess.run([*compiler, *units, "-o", str(made), *flags], check=True)
        os.replace(made, result)  # whole or not at all, whoever else compiles it
    return result


class _BeforeCupy(importlib.abc.MetaPathFinder):
    """Replaces CuPy's runtime just before CuPy itself is imported, and says behind it what launches run."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "cupy":
            return None
        # Whoever asks need not import: this stays in place until somebody does.
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def with_the_stand_in(module: Any) -> None:
                from . import dispatch, runtime

                sys.meta_path.remove(self)
                runtime.replace(library())
                execute(module)
                dispatch.install()

            spec.loader.exec_module = with_the_stand_in  # type: ignore[method-assign]
        return spec
