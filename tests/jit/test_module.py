"""Loading and launching: compiled once, told to whoever listens, launched with the right bytes on the right device."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jit_toys
import numpy as np
import pytest
from jit_toys import SM80, fork, toy_layout, toy_spec
from needs import needs_nvdisasm, needs_nvrtc

from cuflash import arch
from cuflash.errors import ArgumentError, CompileError, UnsupportedError
from cuflash.jit import driver, hostcxx, module, nvrtc, sass, source
from cuflash.settings import config


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache on disk and in memory."""
    monkeypatch.setattr(config, "cache_dir", tmp_path / "cache")
    monkeypatch.setattr(config, "on_compile", "quiet")
    module.clear()
    yield tmp_path / "cache"
    module.clear()


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for every run of the compiler."""
    runs: list[str] = []
    real = nvrtc.compile

    def counted(text: str, target: arch.Arch, name: str, extra: tuple[str, ...] = ()) -> nvrtc.Cubin:
        runs.append(target.name)
        return real(text, target, name, extra)

    monkeypatch.setattr(nvrtc, "compile", counted)
    return runs


def toy_params(n: int = 5, factor: float = 2.0, x: int = 0, y: int = 0) -> bytes:
    return toy_layout().pack(x=x, y=y, n=n, factor=factor)


# --- Compiling ------------------------------------------------------------------------------------------------------


@needs_nvrtc
def test_a_spec_compiles_once_for_each_architecture_and_variant(compiles: list[str]) -> None:
    first = module.compile(toy_spec(), SM80)
    again = module.compile(toy_spec(), SM80)
    assert (first.cached, again.cached, first.path) == (False, True, again.path)
    assert again.cubin == first.cubin and again.resources.registers >= 8
    assert module.compile(toy_spec(), arch.named("sm_90a")).path != first.path
    assert module.compile(toy_spec(factor=4), SM80).path != first.path
    edit = source.Edit("toy.cu", "params.x + i", "params.x + i + 1")
    assert module.compile(toy_spec(edits=(edit,)), SM80).path != first.path
    assert compiles == ["sm_80", "sm_90a", "sm_80", "sm_80"]


@needs_nvrtc
def test_the_compiler_version_is_part_of_the_key(compiles: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module.compile(toy_spec(), SM80)
    monkeypatch.setattr(nvrtc, "version", lambda: (99, 9))
    module.compile(toy_spec(), SM80)
    assert len(compiles) == 2


@needs_nvrtc
def test_load_is_one_object_until_a_source_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = tmp_path / "toy.cu"
    shutil.copy(jit_toys.TOY, toy)
    spec = module.KernelSpec(str(toy), "cuflash_toy_scale", "ToyParams", jit_toys.ToyVariant(), 32, 0)
    monkeypatch.setattr(source, "_RECHECK_SECONDS", -1.0)
    kernel = module.load(spec, SM80, "cuda", 0)
    assert module.load(spec, SM80, "cuda", 0) is kernel
    assert module.load(spec, SM80, "cuda", 1) is not kernel
    toy.write_text(toy.read_text().replace("* params.factor", "+ params.factor"))
    changed = module.load(spec, SM80, "cuda", 0)
    assert changed is not kernel and changed.path != kernel.path and "+ params.factor" in changed.text


@needs_nvrtc
def test_eight_threads_compile_each_variant_once(compiles: list[str]) -> None:
    specs = [toy_spec(factor=f) for f in range(3)]
    found: list[module.Kernel] = []

    def work(i: int) -> None:
        for k in range(3):
            found.append(module.load(specs[(i + k) % 3], SM80, "cuda", 0))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(compiles) == 3 and len(found) == 24 and len(set(map(id, found))) == 3


@needs_nvrtc
def test_eight_processes_compile_each_variant_once_a_machine(fresh: Path) -> None:
    with ProcessPoolExecutor(8, multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(jit_toys.compile_toys, [str(fresh)] * 8, [[0, 1], [1, 0]] * 4))
    entries = [entry for result in results for entry in result]
    assert sum(not cached for _, cached in entries) == 2
    assert len({path for path, _ in entries}) == 2


@needs_nvrtc
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_while_another_thread_compiles_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    ready = nvrtc.compile(toy_spec().text("cuda"), SM80, "toy.cu")
    parent, compiling, release = os.getpid(), threading.Event(), threading.Event()

    def slow(*_: Any) -> nvrtc.Cubin:
        if os.getpid() == parent:
            compiling.set()
            release.wait(30)
        return ready

    monkeypatch.setattr(nvrtc, "compile", slow)
    monkeypatch.setattr(config, "on_compile", "progress")
    thread = threading.Thread(target=module.load, args=(toy_spec(), SM80, "cuda", 0))
    thread.start()
    assert compiling.wait(30)
    with module._state:  # another thread may be anywhere when a process forks
        pid = fork()
        if pid == 0:
            signal.alarm(30)
            module.load(toy_spec(factor=4), SM80, "cuda", 0)
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    release.set()
    thread.join()


@needs_nvrtc
def test_a_torn_cubin_is_compiled_again(compiles: list[str]) -> None:
    path = module.compile(toy_spec(), SM80).path
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    assert module.compile(toy_spec(), SM80).path.read_bytes()[:4] == b"\x7fELF"
    assert len(compiles) == 2


@needs_nvrtc
def test_more_shared_memory_than_the_chip_has_is_refused() -> None:
    base = toy_spec()
    spec = module.KernelSpec(base.source, base.entry, base.params, base.variant, 32, 100 << 10)
    assert module.compile(spec, SM80)
    with pytest.raises(
        CompileError, match="toy_scale asks for 102400 bytes of shared memory a block, sm_86 has 101376"
    ):
        module.compile(spec, arch.named("sm_86"))


@needs_nvrtc
def test_an_entry_the_file_does_not_have() -> None:
    spec = module.KernelSpec(jit_toys.TOY, "cuflash_typo", "ToyParams", jit_toys.ToyVariant(), 32, 0)
    for _ in range(2):  # compiled, and from the cache
        with pytest.raises(
            CompileError, match=r"toy\.cu has no kernel cuflash_typo, only cuflash_toy_\w+, cuflash_toy_"
        ):
            module.compile(spec, SM80)


def test_a_spec_is_a_key_that_travels() -> None:
    assert toy_spec() == toy_spec() and hash(toy_spec()) == hash(toy_spec())
    assert pickle.loads(pickle.dumps(toy_spec())) == toy_spec() != toy_spec(factor=4)
    hashed = toy_spec()
    code = "import pickle, sys; s = pickle.load(sys.stdin.buffer); import jit_toys; assert s in {jit_toys.toy_spec()}"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": str(hash(hashed) % 1000)}
    subprocess.run([sys.executable, "-c", code], input=pickle.dumps(hashed), env=env, check=True)
    assert toy_spec().name == "toy_scale"


def test_a_kernel_that_is_deleted_before_it_is_opened_is_built_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process clears the cache: what is loaded stays, what is looked for is made anew."""
    made, compile_emulated = [], module.compile_emulated

    def cleared_once(spec: module.KernelSpec) -> tuple[Path, str]:
        path, text = compile_emulated(spec)
        made.append(path if made else path.with_name("deleted.so"))
        return made[-1], text

    monkeypatch.setattr(config, "cache_dir", os.environ["CUFLASH_CACHE_DIR"])  # which has the emulator's runtime
    monkeypatch.setattr(module, "compile_emulated", cleared_once)
    module.clear()
    assert module.load(toy_spec(), SM80, "emulator").path == made[1] != made[0]


# --- Telling and dumping --------------------------------------------------------------------------------------------


@needs_nvrtc
def test_a_listener_hears_of_every_kernel_made_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[module.CompileEvent] = []
    monkeypatch.setattr(config, "on_compile", events.append)
    module.load(toy_spec(), SM80, "cuda", 0)
    module.load(toy_spec(), SM80, "cuda", 0)
    module.clear()
    module.load(toy_spec(), SM80, "cuda", 0)
    assert [(e.kernel, e.arch, e.cached) for e in events] == [
        ("toy_scale", "sm_80", False),
        ("toy_scale", "sm_80", True),
    ]
    assert events[0].variant == "Element=hw::Half kThreads=32 kFactor=3"
    assert events[0].seconds > events[1].seconds > 0


@needs_nvrtc
def test_error_refuses_to_compile_but_not_to_load(compiles: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "on_compile", "error")
    with pytest.raises(CompileError, match=r"toy_scale for sm_80 \(.*kFactor=3\) would have to be compiled.*warmup"):
        module.load(toy_spec(), SM80, "cuda", 0)
    assert compiles == []
    monkeypatch.setattr(config, "on_compile", "quiet")
    module.load(toy_spec(), SM80, "cuda", 0)
    module.clear()
    monkeypatch.setattr(config, "on_compile", "error")
    module.load(toy_spec(), SM80, "cuda", 0)


@needs_nvrtc
def test_progress_says_on_stderr_what_was_compiled(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(config, "on_compile", "progress")
    threads = [threading.Thread(target=module.load, args=(toy_spec(factor=f), SM80, "cuda", 0)) for f in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    out, err = capfd.readouterr()
    assert out == "" and len(re.findall(r"cuflash: compiling toy_scale for sm_80: \d+\.\d s", err)) == 3
    module.clear()
    module.load(toy_spec(), SM80, "cuda", 0)
    assert "compiling toy_scale" in capfd.readouterr().err
    module.clear()
    module.load(toy_spec(), SM80, "cuda", 0)
    assert capfd.readouterr().err == "", "a kernel found on disk is not worth a word"


@needs_nvrtc
@needs_nvdisasm
def test_dump_writes_text_cubin_and_sass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module.load(toy_spec(), SM80, "cuda", 0)
    monkeypatch.setattr(config, "dump", tmp_path / "dump")
    kernel = module.load(toy_spec(), SM80, "cuda", 0)  # loaded before, dumped all the same
    files = {p.suffix: p for p in (tmp_path / "dump").iterdir()}
    assert sorted(files) == [".cu", ".cubin", ".sass"]
    assert files[".cu"].name.startswith("toy_scale.sm_80.") and files[".cu"].read_text() == kernel.text
    assert files[".cubin"].read_bytes() == kernel.path.read_bytes()
    assert "cuflash_toy_scale" in sass.functions(files[".sass"].read_text())


# --- Launching ------------------------------------------------------------------------------------------------------


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(module, "launch_cuda", lambda *args: seen.append(args))
    return seen


@needs_nvrtc
def test_a_launch_is_recorded_whole_without_a_driver(launches: list[tuple[Any, ...]]) -> None:
    kernel = module.load(toy_spec("cuflash_toy_matrix"), SM80, "cuda", 3)
    kernel.launch((4, 2, 1), toy_params(), stream=1234)
    assert launches == [(kernel, (4, 2, 1), (32, 1, 1), toy_params(), 512, 1234)]
    assert isinstance(kernel, module.CudaKernel) and kernel.device == 3


@needs_nvrtc
def test_a_grid_is_checked_before_it_is_launched(launches: list[tuple[Any, ...]]) -> None:
    kernel = module.load(toy_spec(), SM80, "cuda", 0)
    for empty in ((0, 1, 1), (5, 0, 1), (1, 1, 0), (0, 70000, 1)):
        kernel.launch(empty, toy_params())
    assert launches == [], "an empty grid starts nothing; CuPy would start one block"
    for bad in ((2**31, 1, 1), (1, 65536, 1), (1, 1, 65536), (-1, 1, 1)):
        with pytest.raises(ArgumentError, match=r"grid=\(.*\) must be at most \(2147483647, 65535, 65535\)"):
            kernel.launch(bad, toy_params())
    kernel.launch((2**31 - 1, 65535, 65535), toy_params())
    assert len(launches) == 1
    with pytest.raises(ArgumentError, match="ToyParams has 24 bytes, got 23"):
        kernel.launch((1, 1, 1), toy_params()[:-1])


class FakeCuPy:
    """As much of CuPy as a launch uses, written down call by call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = 0
        self.calls: list[tuple[Any, ...]] = []
        monkeypatch.setattr(driver, "unwatched", contextlib.nullcontext)
        cupy, cuda = types.ModuleType("cupy"), types.ModuleType("cupy.cuda")
        runtime, function = types.ModuleType("cupy.cuda.runtime"), types.ModuleType("cupy.cuda.function")
        cupy.cuda, cuda.runtime, cuda.function = cuda, runtime, function  # type: ignore[attr-defined]
        runtime.getDevice = lambda: self.current  # type: ignore[attr-defined]
        function.CPointer = lambda address: types.SimpleNamespace(ptr=address)  # type: ignore[attr-defined]
        cuda.Device = self.device  # type: ignore[attr-defined]
        cupy.RawModule = self.raw_module  # type: ignore[attr-defined]
        for m in (cupy, cuda, runtime, function):
            monkeypatch.setitem(sys.modules, m.__name__, m)

    @contextlib.contextmanager
    def device(self, index: int) -> Iterator[None]:
        before, self.current = self.current, index
        yield
        self.current = before

    def raw_module(self, *, path: str) -> Any:
        fake = self

        class Function:
            def __setattr__(self, name: str, value: object) -> None:
                fake.calls.append(("set", name, value, fake.current))

            def compile(self) -> None:
                fake.calls.append(("compile", fake.current))

            def __call__(self, grid: Any, block: Any, args: Any, *, shared_mem: int, stream: Any) -> None:
                (value,) = args
                params = ctypes.string_at(value.ptr, toy_layout().size)
                pointer = None if stream is None else stream.ptr
                fake.calls.append(("launch", fake.current, grid, block, params, shared_mem, pointer))

        fake.calls.append(("load", Path(path).suffix, fake.current))
        return types.SimpleNamespace(get_function=lambda name: fake.calls.append(("get", name)) or Function())


@needs_nvrtc
@pytest.mark.parametrize("current", [0, 1])
def test_the_struct_goes_by_value_on_the_kernels_own_device(current: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuPy(monkeypatch)
    fake.current = current
    kernel = module.load(toy_spec(), SM80, "cuda", 1)
    assert fake.calls == [], "loading waits for the first launch or prepare"
    kernel.prepare()
    loading = [("load", ".cubin", 1), ("get", "cuflash_toy_scale"), ("compile", 1)]
    assert fake.calls == loading
    for i, stream in enumerate((None, 0, 77)):
        kernel.launch((i + 1, 1, 1), toy_params(n=i), stream=stream)
        assert fake.calls[3 + i] == ("launch", 1, (i + 1, 1, 1), (32, 1, 1), toy_params(n=i), 0, stream)
    assert len(fake.calls) == 6 and fake.current == current


@needs_nvrtc
def test_more_than_48_kb_is_allowed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuPy(monkeypatch)
    base = toy_spec()
    spec = module.KernelSpec(base.source, base.entry, base.params, base.variant, 32, 64 << 10)
    kernel = module.load(spec, SM80, "cuda", 0)
    kernel.launch((1, 1, 1), toy_params())
    kernel.launch((1, 1, 1), toy_params())
    assert [c for c in fake.calls if c[0] == "set"] == [("set", "max_dynamic_shared_size_bytes", 64 << 10, 0)]
    assert [c[5] for c in fake.calls if c[0] == "launch"] == [64 << 10] * 2


@needs_nvrtc
def test_no_cupy_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = module.load(toy_spec(), SM80, "cuda", 0)
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(UnsupportedError, match=r'device arrays need CuPy: pip install "cuflash\[cuda13\]"'):
        kernel.launch((1, 1, 1), toy_params())


def test_an_unknown_backend_and_a_missing_device_are_refused() -> None:
    with pytest.raises(ArgumentError, match="backend='hip' must be one of cuda, emulator"):
        module.load(toy_spec(), SM80, "hip", 0)
    with pytest.raises(ArgumentError, match="needs the index of a device"):
        module.load(toy_spec(), SM80, "cuda", None)


@pytest.mark.gpu
def test_the_toy_runs_on_a_gpu() -> None:
    import cupy

    major, minor = map(int, re.findall(r"^(\d+)(\d)$", cupy.cuda.Device(0).compute_capability)[0])
    kernel = module.load(toy_spec(), arch.of_capability(major, minor), "cuda", 0)
    x = cupy.arange(70, dtype=np.float32)
    y = cupy.full(70, np.nan, dtype=np.float32)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device(0).synchronize()
    kernel.launch((3, 1, 1), toy_params(70, 0.5, x.data.ptr, y.data.ptr), stream=stream.ptr)
    stream.synchronize()
    assert (y.get() == np.arange(70) * 1.5).all()


@pytest.mark.gpu
def test_cupys_raw_module_takes_the_text_and_the_options() -> None:
    import cupy

    function = cupy.RawModule(code=toy_spec().text("cuda"), options=nvrtc.options()).get_function("cuflash_toy_scale")
    x = cupy.arange(32, dtype=np.float32)
    y = cupy.empty_like(x)
    params = np.frombuffer(toy_params(32, 2.0, x.data.ptr, y.data.ptr), dtype=np.dtype(("V", toy_layout().size)))
    function((1,), (32,), (params,))
    assert (y.get() == np.arange(32) * 6).all()


def test_the_toy_runs_on_the_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        hostcxx.compiler()
    except CompileError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(config, "cache_dir", os.environ["CUFLASH_CACHE_DIR"])  # the run's: it has the runtime
    heard: list[module.CompileEvent] = []
    monkeypatch.setattr(config, "on_compile", heard.append)
    x = np.arange(70, dtype=np.float32)
    y = np.full(70, np.nan, dtype=np.float32)
    kernel = module.load(toy_spec(), SM80, "emulator", None)
    params = toy_params(70, 0.5, x.ctypes.data, y.ctypes.data)
    buffers = [
        module.Buffer("x", x.ctypes.data, x.nbytes, writable=False),
        module.Buffer("y", y.ctypes.data, y.nbytes, writable=True),
    ]
    kernel.launch((3, 1, 1), params, buffers=buffers)
    assert [(event.kernel, event.arch) for event in heard] == [("toy_scale", "emulator")]
    assert (y == np.arange(70) * 1.5).all()
