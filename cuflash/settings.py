"""`cuflash.config`: every switch in one place. Each is also an environment variable, read once at import.

backend     CUFLASH_BACKEND     "auto" (cuda for device arrays, reference for host arrays), "cuda", "emulator",
                                "reference"
arch        CUFLASH_ARCH        architecture whose kernels the emulator runs, e.g. "sm_80"
check       CUFLASH_CHECK       1: also check what only the device knows, lengths, page ids and where mods read: waits
                                for it, and takes host time
cache_dir   CUFLASH_CACHE_DIR   where compiled kernels are kept
dump        CUFLASH_DUMP        a folder that receives the .cu, .cubin and .sass of every kernel compiled
on_compile  CUFLASH_ON_COMPILE  "progress", "quiet", "error", or (in Python only) a function of the event
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import ArgumentError

BACKENDS = ("auto", "cuda", "emulator", "reference")
ON_COMPILE = ("progress", "quiet", "error")


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
        self.check = (env.get("CUFLASH_CHECK") or "0").lower() not in ("0", "false", "no")
        self.cache_dir = env.get("CUFLASH_CACHE_DIR") or None
        self.dump = env.get("CUFLASH_DUMP") or None
        self.on_compile = env.get("CUFLASH_ON_COMPILE") or "quiet"

    @property
    def backend(self) -> str:
        return self._backend

    @backend.setter
    def backend(self, value: str) -> None:
        if value not in BACKENDS:
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
        self._check = bool(value)
        self.version += 1

    @property
    def cache_dir(self) -> Path:
        return self._cache_dir or _default_cache_dir()

    @cache_dir.setter
    def cache_dir(self, value: str | os.PathLike[str] | None) -> None:
        self._cache_dir = Path(value).expanduser() if value else None
        self.version += 1

    @property
    def dump(self) -> Path | None:
        return self._dump

    @dump.setter
    def dump(self, value: str | os.PathLike[str] | None) -> None:
        self._dump = Path(value).expanduser() if value else None
        self.version += 1

    @property
    def on_compile(self) -> str | Callable[[Any], None]:
        return self._on_compile

    @on_compile.setter
    def on_compile(self, value: str | Callable[[Any], None]) -> None:
        if not callable(value) and value not in ON_COMPILE:
            raise ArgumentError(
                f"config.on_compile={value!r} (CUFLASH_ON_COMPILE) must be one of {', '.join(ON_COMPILE)}, or a "
                "function of one argument"
            )
        self._on_compile = value
        self.version += 1

    def __repr__(self) -> str:
        fields = ("backend", "arch", "check", "cache_dir", "dump", "on_compile")
        return "Config(" + ", ".join(f"{f}={getattr(self, f)!r}" for f in fields) + ")"


config = Config()
