"""Lines on stderr that say what one is waiting for: a kernel that compiles, a long launch on the emulator."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from ..settings import in_notebook, on_terminal


class _Lines:
    """What is shown now, whichever threads wait for it: one changing line on a terminal, elsewhere what is kept."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shown: dict[object, str] = {}
        self._status: Any = None

    def change(self, key: object, line: str | None, said: str = "") -> None:
        """Shows `line`, or no longer (None); `said` stays."""
        from rich.console import Console

        with self._lock:
            if self._status is None:
                # Plain lines wherever there is no terminal: rich's way in notebooks needs ipywidgets, and a kernel of
                # Jupyter claims to be a terminal by FORCE_COLOR.
                console = Console(stderr=True, highlight=False, force_jupyter=False, force_terminal=on_terminal())
                self._status = console.status("")
                self._status.start()
            if line is None:
                self._shown.pop(key, None)
            else:
                self._shown[key] = line
            if said:
                self._status.console.print(f"cuflash: {said}", markup=False, soft_wrap=True)
            if self._shown:
                self._status.update("; ".join(self._shown.values()))
            else:
                self._status.stop()
                self._status = None


_lines = _Lines()


@contextlib.contextmanager
def compiling(what: str) -> Iterator[None]:
    """Says that `what` is compiled while this lasts, and how long it took."""
    key, start = object(), time.perf_counter()
    # Where no line can be taken back, a notebook says beforehand why nothing happens; for a log the end will do.
    _lines.change(key, f"compiling {what}", f"compiling {what} ..." if in_notebook() and not on_terminal() else "")
    try:
        yield
    finally:
        _lines.change(key, None, f"compiling {what}: {time.perf_counter() - start:.1f} s")


@contextlib.contextmanager
def running() -> Iterator[Callable[[str], None]]:
    """-> a function that shows a line instead of the one before, while this lasts; nothing of it stays. On a terminal
    alone."""
    key, used = object(), False

    def show(line: str) -> None:
        nonlocal used
        if on_terminal():
            used = True
            _lines.change(key, line)

    try:
        yield show
    finally:
        if used:
            _lines.change(key, None)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_lines.__init__)  # threads that held the lock do not exist in the child
