"""Compiled files on disk: each built once a machine, never run torn or foreign.

A cache folder holds, for every key (a hash of everything the payload depends on),

    <key>.json            which payload it is, and what its builder noted
    <sha256 of it>.cubin  the payload, named by its own content: a path never changes its meaning
    <key>.lock            held while the payload is built

Every file is written under a temporary name and moved into place. A payload whose bytes do not hash to its name is
built again. The folder is private (mode 0700); one that somebody else owns or may write to is not used. Where nothing
can be written, a temporary folder serves this process, with one warning.
"""

from __future__ import annotations

import contextlib
import contextvars
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..settings import config

POLL_SECONDS = 0.02
LOCK_SECONDS = 300.0  # longer than any compile; a lock held longer is ignored, which costs a second build and no more

_OWN = re.compile(r"[0-9a-f]{64}\.(json|lock|cubin|so|bin)")
_TEMPORARY = ".tmp-"

Make = Callable[[], bytes | tuple[bytes, Mapping[str, Any]]]


@dataclass(frozen=True)
class Entry:
    """A file in the cache: where it is, what its builder noted (JSON values), whether this call built it."""

    path: Path
    note: dict[str, Any]
    built: bool


def key_of(*parts: str | bytes) -> str:
    """A key of everything named: the SHA-256 of the parts, each with its length before it.

    >>> key_of("ab", "c") == key_of("a", "bc")
    False
    """
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def build(kind: str, key: str, suffix: str, make: Make) -> Path:
    """The path of the payload of `key`, made by `make()` unless it is there. See `fetch`."""
    return fetch(kind, key, suffix, make).path


def fetch(kind: str, key: str, suffix: str, make: Make) -> Entry:
    """The entry of `key` in the folder `kind`; `make` is called at most once a machine while the file lasts.

    kind     a folder of its own under `config.cache_dir`, e.g. "cubin"
    key      from `key_of`
    suffix   of the payload's file name, e.g. ".cubin"
    make     returns the payload, or (payload, note); what it raises is passed on, and nothing is kept

    Safe for threads, processes, and forks in between.
    """
    folder = _folder(kind)
    found = _look(folder, key, suffix)
    if found is not None:
        return found
    with _locked(folder, key) as writable:
        found = _look(folder, key, suffix) or (_fallback and _look(_temporary(kind), key, suffix))
        if found:
            return found
        with _around.get()(), around_builds(contextlib.nullcontext):  # a build inside this one is part of it
            made = make()
        data, note = made if isinstance(made, tuple) else (made, {})
        if writable:
            try:
                return _store(folder, key, suffix, data, dict(note))
            except OSError as error:
                _warn(folder, error)
        return _store(_temporary(kind), key, suffix, data, dict(note))


@contextlib.contextmanager
def around_builds(hook: Callable[[], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
    """While this lasts, every `make` this thread calls runs inside `hook()`: it may show progress, or refuse."""
    token = _around.set(hook)
    try:
        yield
    finally:
        _around.reset(token)


_around: contextvars.ContextVar[Callable[[], contextlib.AbstractContextManager[Any]]] = contextvars.ContextVar(
    "around_builds", default=contextlib.nullcontext
)


def keep(kind: str, name: str, data: bytes) -> Path:
    """Writes a file for people to read into the folder `kind`; returns its path."""
    folder = _folder(kind)
    try:
        _write(folder / name, data)
        return folder / name
    except OSError as error:
        _warn(folder, error)
        _write(_temporary(kind) / name, data)
        return _temporary(kind) / name


@dataclass(frozen=True)
class Usage:
    """What lies in the cache folder: how many payloads, bytes of these and what belongs to them, and bytes of the rest
    (texts that did not compile, the demo's encoder)."""

    folder: Path
    payloads: int
    payload_bytes: int
    other_bytes: int


def usage() -> Usage:
    root = config.cache_dir
    payloads = payload_bytes = other_bytes = 0
    for path in root.rglob("*") if root.is_dir() else ():
        try:
            size = path.stat().st_size if path.is_file() else None
        except OSError:  # gone meanwhile
            continue
        if size is None:
            continue
        if _OWN.fullmatch(path.name) and path.parent.parent == root:
            payloads, payload_bytes = payloads + (path.suffix == ".json"), payload_bytes + size
        else:
            other_bytes += size
    return Usage(root, payloads, payload_bytes, other_bytes)


def clear() -> tuple[int, int]:
    """Deletes payloads, and texts that did not compile -> (files, bytes). Nothing that this module did not write.

    Other processes may use the cache meanwhile: what they have loaded they keep, what they look for they build again.
    """
    root, count, freed = config.cache_dir, 0, 0
    files = [f for f in (root.glob("*/*") if root.is_dir() else ()) if _is_own(f)]
    for path in sorted(files, key=lambda f: f.suffix != ".json"):  # a payload that nothing names is not looked for
        with contextlib.suppress(OSError):  # deleted by another, or not ours to delete
            size = path.stat().st_size
            path.unlink()
            count, freed = count + 1, freed + size
    return count, freed


def _is_own(path: Path) -> bool:
    """Whether this module wrote the file, and nobody writes it now."""
    if path.is_symlink() or not path.is_file():
        return False
    if path.name.startswith(_TEMPORARY):  # left behind, unless it is young
        try:
            return time.time() - path.stat().st_mtime > LOCK_SECONDS
        except OSError:
            return False
    kept = path.parent.name == "failed" and path.suffix == ".cu"
    return kept or _OWN.fullmatch(path.name) is not None


# --- Looking and storing ------------------------------------------------------------------------------------------


def _look(folder: Path, key: str, suffix: str) -> Entry | None:
    try:
        record = json.loads((folder / f"{key}.json").read_bytes())
        digest, note = record["sha256"], record["note"]
        path = folder / f"{digest}{suffix}"
        intact = record["key"] == key and hashlib.sha256(path.read_bytes()).hexdigest() == digest
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not there, or broken: built again
    return Entry(path, note, built=False) if intact else None


def _store(folder: Path, key: str, suffix: str, data: bytes, note: dict[str, Any]) -> Entry:
    digest = hashlib.sha256(data).hexdigest()
    path = folder / f"{digest}{suffix}"
    _write(path, data, mode=0o700)  # a shared object must be executable where the folder is mounted strictly
    _write(folder / f"{key}.json", json.dumps({"key": key, "sha256": digest, "note": note}).encode())
    return Entry(path, note, built=True)


def _write(path: Path, data: bytes, mode: int = 0o600) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=_TEMPORARY)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def _locked(folder: Path, key: str) -> Iterator[bool]:
    """Holds the key's lock across threads and processes; yields whether the folder can be written.

    The lock is the operating system's, so it ends with the process that held it, however that ended.
    """
    try:
        descriptor = os.open(folder / f"{key}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        _warn(folder, error)
        yield False
        return
    try:
        end = time.monotonic() + LOCK_SECONDS
        while not _try_lock(descriptor) and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
        yield True
    finally:
        _unlock(descriptor)
        os.close(descriptor)


try:
    import fcntl

    def _try_lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Anything but "held by another" is a file system without locks: two may then build, which is safe.
            return error.errno not in (errno.EAGAIN, errno.EACCES)
        return True

    def _unlock(descriptor: int) -> None:
        # Said in so many words, because a child forked meanwhile holds a copy of the descriptor.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)

except ImportError:  # Windows
    import msvcrt

    def _try_lock(descriptor: int) -> bool:
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        return True

    def _unlock(descriptor: int) -> None:
        with contextlib.suppress(OSError):
            msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)  # type: ignore[attr-defined]


# --- The folder ---------------------------------------------------------------------------------------------------

_state = threading.Lock()
_warned = False
_fallback: tuple[int, Path] | None = None  # (process that made it, folder)


def _folder(kind: str) -> Path:
    """The private folder of this kind, made if need be; a temporary one if it cannot be used."""
    folder = config.cache_dir / kind
    try:
        if not folder.is_dir():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_private(folder)
    except OSError as error:
        _warn(folder, error)
        return _temporary(kind)
    return folder


def _require_private(folder: Path) -> None:
    if not hasattr(os, "getuid"):
        return  # Windows: a user's folders are their own by default
    status = folder.stat()
    if status.st_uid not in (os.getuid(), 0):
        raise PermissionError(f"it belongs to another user (uid {status.st_uid}), who could put any code there")
    if stat.S_IMODE(status.st_mode) & 0o022:
        if status.st_uid != os.getuid():
            raise PermissionError("others may write to it")
        folder.chmod(0o700)


def _temporary(kind: str) -> Path:
    global _fallback
    with _state:
        if _fallback is None or _fallback[0] != os.getpid():
            import atexit

            owner, root = os.getpid(), Path(tempfile.mkdtemp(prefix="cuflash-"))
            _fallback = owner, root
            # A forked child inherits the hook, but the folder is its parent's.
            atexit.register(lambda: shutil.rmtree(root, ignore_errors=True) if os.getpid() == owner else None)
        folder = _fallback[1] / kind
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _warn(folder: Path, error: Exception) -> None:
    global _warned
    with _state:
        first, _warned = not _warned, True
    if first:
        warnings.warn(
            f"cuflash cannot keep compiled kernels in {folder}: {error}. They are kept for this process only; "
            "point CUFLASH_CACHE_DIR (or cuflash.config.cache_dir) at a folder of your own to compile once",
            RuntimeWarning,
            stacklevel=2,
        )


def _after_fork() -> None:
    global _state
    _state = threading.Lock()  # a thread that held it does not exist in the child


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
