"""The cache of compiled files: built once, whole or not at all, and survived when it cannot be written."""

from __future__ import annotations

import json
import multiprocessing
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import jit_toys
import pytest

from cuflash.errors import CompileError
from cuflash.jit import cache
from cuflash.settings import config

KEY = cache.key_of("some", "kernel")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(config, "cache_dir", tmp_path / "cache")
    monkeypatch.setattr(cache, "_warned", False)
    monkeypatch.setattr(cache, "_fallback", None)
    yield tmp_path / "cache"


class Maker:
    """A `make` that counts its calls."""

    def __init__(self, payload: bytes = b"payload") -> None:
        self.payload = payload
        self.calls = 0

    def __call__(self) -> tuple[bytes, dict]:
        self.calls += 1
        return self.payload, {"call": self.calls}


def test_a_payload_is_made_once_and_kept_with_its_note(folder: Path) -> None:
    make = Maker()
    first = cache.fetch("test", KEY, ".bin", make)
    second = cache.fetch("test", KEY, ".bin", make)
    assert (first.built, second.built, make.calls) == (True, False, 1)
    assert first.path == second.path == cache.build("test", KEY, ".bin", make)
    assert first.path.read_bytes() == b"payload" and first.path.suffix == ".bin"
    assert second.note == {"call": 1}
    held = cache.usage()
    assert (held.folder, held.payloads, held.other_bytes) == (folder, 1, 0) and held.payload_bytes > len(b"payload")


def test_files_are_private_and_whole(folder: Path) -> None:
    path = cache.build("test", KEY, ".bin", Maker())
    assert stat.S_IMODE((folder / "test").stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
    assert not list((folder / "test").glob(".tmp-*"))


def test_keys_kinds_and_parts_do_not_mix(folder: Path) -> None:
    makers = [Maker(bytes([i])) for i in range(3)]
    for i, (kind, key) in enumerate([("a", KEY), ("b", KEY), ("a", cache.key_of("some", "other"))]):
        assert cache.build(kind, key, ".bin", makers[i]).read_bytes() == bytes([i])
    assert cache.key_of("ab", "c") != cache.key_of("a", "bc") != cache.key_of("abc")


def test_an_error_of_the_maker_leaves_nothing(folder: Path) -> None:
    def make() -> bytes:
        raise CompileError("no")

    with pytest.raises(CompileError):
        cache.build("test", KEY, ".bin", make)
    assert not list((folder / "test").glob("*.json"))
    assert cache.build("test", KEY, ".bin", Maker()).read_bytes() == b"payload"


def torn(path: Path, manifest: Path) -> None:
    path.write_bytes(path.read_bytes()[:3])


def foreign(path: Path, manifest: Path) -> None:
    path.write_bytes(b"\x7fELF something else")


def gone(path: Path, manifest: Path) -> None:
    path.unlink()


def torn_manifest(path: Path, manifest: Path) -> None:
    manifest.write_text(manifest.read_text()[:20])


def foreign_manifest(path: Path, manifest: Path) -> None:
    manifest.write_text("[1, 2]")


def manifest_of_another_key(path: Path, manifest: Path) -> None:
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "key": cache.key_of("other")}))


@pytest.mark.parametrize("damage", [torn, foreign, gone, torn_manifest, foreign_manifest, manifest_of_another_key])
def test_a_damaged_entry_is_built_again(folder: Path, damage) -> None:
    make = Maker()
    path = cache.build("test", KEY, ".bin", make)
    damage(path, folder / "test" / f"{KEY}.json")
    assert cache.build("test", KEY, ".bin", make).read_bytes() == b"payload"
    assert make.calls == 2
    cache.build("test", KEY, ".bin", make)
    assert make.calls == 2, "and is whole again"


def test_eight_threads_build_once() -> None:
    make, together, paths = Maker(), threading.Barrier(8), []

    def slow() -> tuple[bytes, dict]:
        time.sleep(0.2)
        return make()

    def work() -> None:
        together.wait()
        paths.append(cache.build("test", KEY, ".bin", slow))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert make.calls == 1 and len(set(paths)) == 1 and len(paths) == 8


def test_eight_processes_build_each_key_once(folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    jobs = [(str(folder), f"{k:064x}", str(log)) for k in range(3) for _ in range(8)]
    with ProcessPoolExecutor(8, multiprocessing.get_context("spawn")) as pool:
        paths = list(pool.map(jit_toys.build_in_cache, *zip(*jobs, strict=True)))
    builds = [line.split()[0] for line in log.read_text().splitlines()]
    assert sorted(builds) == [f"{k:064x}" for k in range(3)]
    assert len(set(paths)) == 1, "the same bytes are the same file"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_while_another_thread_builds_does_not_hang() -> None:
    building, done = threading.Event(), threading.Event()

    def slow() -> bytes:
        building.set()
        done.wait(10)
        return b"payload"

    thread = threading.Thread(target=cache.build, args=("test", KEY, ".bin", slow))
    thread.start()
    building.wait(10)
    pid = jit_toys.fork()
    if pid == 0:
        other = cache.build("test", cache.key_of("child"), ".bin", lambda: b"child")
        os._exit(0 if other.read_bytes() == b"child" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    done.set()
    thread.join()
    make = Maker()
    cache.build("test", KEY, ".bin", make)
    assert make.calls == 0


def test_a_process_that_dies_while_building_blocks_nobody(folder: Path) -> None:
    code = f"import jit_toys; jit_toys.die_while_building({str(folder)!r}, {KEY!r})"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == 9
    assert (folder / "test" / f"{KEY}.lock").exists() and (folder / "test" / ".tmp-half").exists()
    assert cache.build("test", KEY, ".bin", Maker()).read_bytes() == b"payload"


def test_a_lock_held_too_long_is_passed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LOCK_SECONDS", 0.05)
    (folder / "test").mkdir(parents=True)
    with cache._locked(folder / "test", KEY):
        result: list[Path] = []
        other = threading.Thread(target=lambda: result.append(cache.build("test", KEY, ".bin", Maker())))
        other.start()
        other.join()
    assert result[0].read_bytes() == b"payload"


# --- Folders that cannot be used ------------------------------------------------------------------------------------


def expect_fallback(folder: Path) -> None:
    """Two builds work, from a temporary folder, with one warning in all that names the folder and the remedy."""
    make = Maker()
    with pytest.warns(RuntimeWarning, match="cuflash cannot keep compiled kernels in .*CUFLASH_CACHE_DIR") as caught:
        first = cache.build("test", KEY, ".bin", make)
        second = cache.build("test", KEY, ".bin", make)
        cache.build("test", cache.key_of("another"), ".bin", Maker(b"another"))
    assert len(caught) == 1 and str(folder) in str(caught[0].message)
    assert first == second and first.read_bytes() == b"payload" and make.calls == 1
    assert not first.is_relative_to(folder)


def test_a_folder_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(config, "cache_dir", tmp_path / "file" / "cache")
    expect_fallback(tmp_path / "file" / "cache")


def test_a_folder_on_a_read_only_file_system(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = cache.build("test", cache.key_of("kept"), ".bin", Maker(b"kept"))
    real = os.open

    def read_only(path, flags, *args, **kwargs):
        if str(path).startswith(str(folder)) and flags & (os.O_CREAT | os.O_RDWR | os.O_WRONLY):
            raise OSError(30, "Read-only file system", str(path))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", read_only)
    assert cache.build("test", cache.key_of("kept"), ".bin", Maker()) == kept, "what is there is used, without a word"
    expect_fallback(folder)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission(folder: Path) -> None:
    cache.build("test", cache.key_of("kept"), ".bin", Maker())
    (folder / "test").chmod(0o500)
    expect_fallback(folder)
    (folder / "test").chmod(0o700)


def test_a_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = cache._write

    def full(path: Path, data: bytes, mode: int = 0o600) -> None:
        if path.is_relative_to(folder):
            raise OSError(28, "No space left on device", str(path))
        real(path, data, mode)

    monkeypatch.setattr(cache, "_write", full)
    expect_fallback(folder)


def test_a_write_cut_short_leaves_no_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: str, destination: str) -> None:
        raise OSError(28, "No space left on device", destination)

    (folder / "test").mkdir(parents=True)
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        cache._write(folder / "test" / "x.bin", b"data")
    assert list((folder / "test").iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no owners here")
def test_a_folder_of_another_user_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.build("test", KEY, ".bin", Maker(b"planted"))
    if os.getuid() == 0:
        os.chown(folder / "test", 12345, -1)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    expect_fallback(folder)


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no modes here")
def test_a_folder_others_may_write_to_is_made_private(folder: Path) -> None:
    (folder / "test").mkdir(parents=True)
    (folder / "test").chmod(0o777)
    cache.build("test", KEY, ".bin", Maker())
    assert stat.S_IMODE((folder / "test").stat().st_mode) == 0o700


def test_builds_can_be_watched_and_refused() -> None:
    import contextlib

    seen = []

    @contextlib.contextmanager
    def hook() -> Iterator[None]:
        seen.append("begin")
        yield
        seen.append("end")

    def make() -> bytes:  # a build inside a build is part of it
        cache.build("test", cache.key_of("inner"), ".bin", Maker())
        return b"outer"

    with cache.around_builds(hook):
        cache.build("test", KEY, ".bin", make)
        cache.build("test", KEY, ".bin", make)
    assert seen == ["begin", "end"]


def test_clearing_deletes_what_is_ours_and_nothing_else(folder: Path) -> None:
    path = cache.build("test", KEY, ".bin", Maker())
    cache.keep("failed", "forward.0123456789.cu", b"text")
    elsewhere = folder / "encoder" / "weights.safetensors"
    elsewhere.parent.mkdir()
    others = (elsewhere, folder / "README", folder / "test" / "notes.json", folder / "test" / ".tmp-young")
    for other in others:
        other.write_bytes(b"12345")
    (folder / "test" / f"{'0' * 64}.bin").symlink_to(elsewhere)
    assert cache.usage().other_bytes == len(b"text") + 4 * 5
    count, freed = cache.clear()
    assert count == 4 and freed > len(b"payload") + len(b"text")  # payload, record, lock, text
    assert not path.exists() and all(other.read_bytes() == b"12345" for other in others)
    assert cache.usage().payloads == 0 and cache.clear() == (0, 0)
    assert cache.build("test", KEY, ".bin", Maker()) == path  # the same again
