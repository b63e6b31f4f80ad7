"""`cuflash.config`: every switch in one place. Each is also an environment variable, read once at import.

backend     CUFLASH_BACKEND     "auto" (cuda for device arrays, reference for host arrays), "cuda", "emulator",
                                "reference"
arch        CUFLASH_ARCH        architecture whose kernels the emulator runs, e.g. "sm_80"
check       CUFLASH_CHECK       1: also check what only the device knows, lengths, page ids and where mods read: waits
                                for it, and takes host time
cache_dir   CUFLASH_CACHE_DIR   where compiled kernels are kept
dump        CUFLASH_DUMP        a folder that receives the .cu, .cubin and .sass of every kernel compiled
on_compile  CUFLASH_ON_COMPILE  "progress", "quiet", "error", or (in Python only) a function of the event. Unless set
                                (None): "progress" on a terminal and in a notebook, else "quiet"
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ArgumentError

BACKENDS = ("auto", "cuda", "emulator", "reference")
ON_COMPILE = ("progress", "quiet", "error")


def on_terminal() -> bool:
    """Whether stderr is a terminal: somebody looks on, and lines can be taken back."""
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # there is none, as under pythonw, or it is closed
        return False


def in_notebook() -> bool:
    """Whether a notebook shows what is written."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None and hasattr(ipython, "get_ipython") else None
    return getattr(shell, "kernel", None) is not None


def _default_cache_dir() -> Path:
    try:
        from platformdirs import user_cache_path
    except ImportError:  # a bare checkout, run without an install
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cuflash"
    return user_cache_path("cuflash", appauthor=False)


class Config:
    """The settings; assign to change one. A wrong value is refused when it is assigned.

    >>> import cuflash
    >>> cuflash.config.on_compile = "quiet"
    """

    __slots__ = ("_arch", "_backend", "_cache_dir", "_check", "_dump", "_on_compile", "version")

    def __init__(self, environ: dict[str, str] | None = None) -> None:
        env = dict(os.environ) if environ is None else environ
        self.version = 0  # counts assignments: plans made under older settings are stale
        self.backend = env.get("CUFLASH_BACKEND") or "auto"
        self.arch = env.get("CUFLASH_ARCH") or "sm_80"
        self.check = (env.get("CUFLASH_CHECK") or "0").lower() not in ("0", "false", "no", "off")
        self.cache_dir = env.get("CUFLASH_CACHE_DIR") or None
        self.dump = env.get("CUFLASH_DUMP") or None
        self.on_compile = env.get("CUFLASH_ON_COMPILE") or None

    @property
    def backend(self) -> str:
        return self._backend

    @backend.setter
    def backend(self, value: str) -> None:
        if not isinstance(value, str) or value not in BACKENDS:
            raise ArgumentError(f"config.backend={value!r} (CUFLASH_BACKEND) must be one of {', '.join(BACKENDS)}")
        self._backend = value
        self.version += 1

    @property
    def arch(self) -> str:
        return self._arch

    @arch.setter
    def arch(self, value: str) -> None:
        from .arch import named

        self._arch = named(value).name
        self.version += 1

    @property
    def check(self) -> bool:
        return self._check

    @check.setter
    def check(self, value: bool) -> None:
        # An array has no one truth, and the text "0" is true.
        if not isinstance(value, (int, np.bool_)) or value not in (False, True):
            raise ArgumentError(f"config.check={value!r} (CUFLASH_CHECK) must be True or False")
        self._check = bool(value)
        self.version += 1

    @property
    def cache_dir(self) -> Path:
        return self._cache_dir or _default_cache_dir()

    @cache_dir.setter
    def cache_dir(self, value: str | os.PathLike[str] | None) -> None:
        self._cache_dir = _folder("cache_dir", value)
        self.version += 1

    @property
    def dump(self) -> Path | None:
        return self._dump

    @dump.setter
    def dump(self, value: str | os.PathLike[str] | None) -> None:
        self._dump = _folder("dump", value)
        self.version += 1

    @property
    def on_compile(self) -> str | Callable[[Any], None]:
        if self._on_compile is None:
            return "progress" if on_terminal() or in_notebook() else "quiet"
        return self._on_compile

    @on_compile.setter
    def on_compile(self, value: str | Callable[[Any], None] | None) -> None:
        if not (value is None or callable(value) or (isinstance(value, str) and value in ON_COMPILE)):
            raise ArgumentError(
                f"config.on_compile={value!r} (CUFLASH_ON_COMPILE) must be one of {', '.join(ON_COMPILE)}, a function "
                "of one argument, or None"
            )
        self._on_compile = value
        self.version += 1

    def __repr__(self) -> str:
        fields = ("backend", "arch", "check", "cache_dir", "dump", "on_compile")
        return "Config(" + ", ".join(f"{f}={getattr(self, f)!r}" for f in fields) + ")"


def _folder(name: str, value: Any) -> Path | None:
    """A path that somebody assigned; nothing, None."""
    if value is None:
        return None
    try:
        path = os.fspath(value)
        if not isinstance(path, str) or "\0" in path:
            raise TypeError
        return Path(path).expanduser() if path else None
    except (TypeError, RuntimeError):  # RuntimeError: "~" of somebody who has no home
        raise ArgumentError(
            f"config.{name}={value!r} (CUFLASH_{name.upper()}) must be a folder's path, a str or pathlib.Path"
        ) from None


config = Config()
