"""A child process that compiles and runs what a user wrote: whatever that does, this interpreter goes on.

One child serves call after call, so that only the first pays for starting it. One that crashes, or does not answer in
time, is ended, and the next call starts another. It is told `cuflash.config` and `emulator.schedule` with each call;
arrays travel as copies.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import CuflashError
from ..jit import schedule
from ..settings import config

_SETTINGS = ("arch", "cache_dir", "check", "dump")


class Stopped(CuflashError):
    """What was run in the child took too long, or took the child with it."""


def call(function: Callable[..., Any], *args: Any, seconds: float) -> Any:
    """function(*args) in the child. Raises what it raises, and `Stopped` where no answer comes.

    >>> call(divmod, 7, 2, seconds=60)
    (3, 1)
    """
    __tracebackhide__ = True
    with _lock:
        return _the_child().call(function, args, seconds)


def stop() -> None:
    """Ends the child; the next call starts another."""
    global _child
    with _lock:
        if _child is not None:
            _child.kill()
        _child = None


_lock = threading.Lock()
_child: _Child | None = None


def _the_child() -> _Child:
    global _child
    if _child is None or _child.owner != os.getpid() or not _child.alive:
        _child = _Child()
    return _child


class _Child:
    def __init__(self) -> None:
        self.owner = os.getpid()  # a fork of this process needs a child of its own
        self.errors = tempfile.TemporaryFile()
        package = str(Path(__file__).resolve().parents[2])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from cuflash.workbench.worker import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # Ctrl-C is for this process, which then ends the child
        )
        atexit.register(self.kill)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        if self.owner == os.getpid():
            atexit.unregister(self.kill)
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout, self.errors):
                try:
                    pipe.close()  # type: ignore[union-attr]
                except OSError:
                    pass  # what was still to be written has no reader any more

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], seconds: float) -> Any:
        __tracebackhide__ = True
        settings = {name: getattr(config, name) for name in _SETTINGS}
        request = pickle.dumps((settings, schedule.current(), function, args), pickle.HIGHEST_PROTOCOL)
        answers: queue.Queue[tuple[bool, Any, bool] | None] = queue.Queue()
        threading.Thread(target=self._exchange, args=(request, answers), daemon=True).start()
        try:
            answer = _awaited(answers, seconds)
        except BaseException:  # Stopped, or Ctrl-C
            self.kill()
            raise
        if answer is None:
            raise Stopped(self._epitaph())
        good, value, usable = answer
        if not usable:
            self.kill()
        if not good:
            raise value
        return value

    def _exchange(self, request: bytes, answers: queue.Queue[tuple[bool, Any, bool] | None]) -> None:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(request)
            stdin.flush()
            answers.put(pickle.load(stdout))
        except (OSError, EOFError, ValueError, pickle.UnpicklingError):
            answers.put(None)  # the child is gone

    def _epitaph(self) -> str:
        code = self.process.wait()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
        self.errors.seek(0)
        said = self.errors.read().decode(errors="replace").strip()
        self.kill()
        return f"the process that ran it ended with {how}" + (f"; its last words:\n{said[-2000:]}" if said else "")


def _awaited(answers: queue.Queue[Any], seconds: float) -> Any:
    """In short turns: an interrupt may come to another thread, and is heard between them."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        with contextlib.suppress(queue.Empty):
            return answers.get(timeout=min(0.2, left))
    raise Stopped(
        f"no answer after {seconds:g} seconds, so the process that ran it was ended. A loop without an end that "
        "touches no memory and meets no other thread looks like this, and so does a problem that is too large for the "
        "emulator: take a smaller one, or give it more time with seconds="
    )


# --- The child's side ---------------------------------------------------------------------------------------------


def serve() -> None:
    """Answers calls until there are no more."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anybody prints is no answer
    threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()
    config.on_compile = "quiet"
    while True:
        try:
            settings, order, function, args = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        answers.write(_answer(settings, order, function, args))
        answers.flush()


def _answer(
    settings: dict[str, Any], order: schedule.Schedule, function: Callable[..., Any], args: tuple[Any, ...]
) -> bytes:
    """Pickled: whether it went well, the result or the exception, and whether this process can go on: after a fault on
    a GPU nothing runs there any more."""
    usable = True
    try:
        for name, value in settings.items():
            if getattr(config, name) != value:
                setattr(config, name, value)
        schedule.resume(order)
        return pickle.dumps((True, function(*args), usable), pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        usable = not type(error).__module__.startswith("cupy")
        error.__traceback__ = error.__cause__ = error.__context__ = None
        said = error if usable else CuflashError(f"on the GPU: {error}; on('emulator') may say where")
    try:
        return pickle.dumps((False, said, usable), pickle.HIGHEST_PROTOCOL)
    except Exception:  # of some library, and not made to travel
        said = CuflashError(f"{type(said).__name__}: {said}")
        return pickle.dumps((False, said, usable), pickle.HIGHEST_PROTOCOL)


def _follow(parent: int) -> None:
    """Ends this process when its parent is gone, even in the middle of an endless kernel."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)
