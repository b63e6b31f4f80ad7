"""The emulator's own behaviour: orders drawn from a seed, launches refused, the kernel it measures itself with."""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from backends import using

import cuflash
from cuflash import emulator
from cuflash.errors import ArgumentError, CompileError, EmulatorError
from cuflash.jit import cache, emulated, hostcxx, layout, module, progress, source

SPEED = "hw_emu/speed.cu"
LENGTH = 128
BARRIER = "everyone has read V.\n    hw::cp_async_wait<0>();\n    hw::sync_threads();"


@functools.cache
def compiled(*edits: source.Edit):
    text = source.flatten(SPEED, "emu", edits=edits)
    return hostcxx.compile(text), layout.parse(text, "SpeedParams")


def attend(seed: int = 0, *edits: source.Edit, grid=(LENGTH // 64, 1, 1), threads=128, smem_bytes=3 * 64 * 128, **how):
    """One run of the measuring kernel on fixed draws: (q, k, v, out)."""
    library, params = compiled(*edits)
    rng = np.random.default_rng(3)
    memory = np.empty((4, LENGTH * 64 + 32), ml_dtypes.bfloat16)
    arrays = [row[-row.ctypes.data % 32 // 2 :][: LENGTH * 64].reshape(LENGTH, 64) for row in memory]
    arrays[:3] = [np.copyto(x, rng.standard_normal(x.shape).astype(x.dtype)) or x for x in arrays[:3]]
    arrays[3][...] = np.nan
    named = dict(zip(("q", "k", "v", "out"), arrays, strict=True))
    packed = params.pack(
        **{name: x.ctypes.data for name, x in named.items()}, k_len=LENGTH, scale_log2=0.125 * np.log2(np.e)
    )
    buffers = [module.Buffer(name, x.ctypes.data, x.nbytes, name == "out") for name, x in named.items()]
    emulator.launch(library, "cuflash_emu_speed", grid, threads, smem_bytes, packed, buffers, seed=seed, **how)
    return arrays


def test_the_measuring_kernel_computes_attention():
    q, k, v, out = (x.astype(np.float64) for x in attend())
    p = np.exp(q @ k.T * 0.125)
    np.testing.assert_allclose(out, p / p.sum(1, keepdims=True) @ v, atol=0.01)


def test_any_order_gives_the_same_bits():
    results = {
        attend(seed, landing=landing)[3].tobytes() for landing in emulator.LANDINGS for seed in range(20)
    }  # and no report
    assert len(results) == 1


@pytest.mark.parametrize("landing", emulator.LANDINGS)
def test_the_same_seed_gives_the_same_report(landing):
    edit = source.Edit(SPEED, BARRIER, BARRIER.replace("hw::sync_threads();", ""))
    reports = []
    for seed in [*range(6), *range(6)]:
        with pytest.raises(EmulatorError) as raised:
            attend(seed, edit, landing=landing)
        reports.append(str(raised.value))
    assert reports[:6] == reports[6:]
    assert len({report.replace(f"seed={seed % 6}", "") for seed, report in enumerate(reports)}) > 1


def test_the_report_does_not_depend_on_the_threads_of_this_machine():
    edit = source.Edit(SPEED, BARRIER, BARRIER.replace("hw::cp_async_wait<0>();", ""))
    reports = set()
    for os_threads in (1, 2, 5):
        with emulator.schedule(os_threads=os_threads), pytest.raises(EmulatorError) as raised:
            attend(1, edit)
        reports.add(str(raised.value))
    assert len(reports) == 1


def test_a_schedule_ends_and_nests():
    with emulator.schedule(seed=5) as outer:
        with emulator.schedule(landing="early") as inner:
            assert (inner.seed, inner.landing) == (5, "early")
        assert (outer.seed, outer.landing) == (5, "late")
    with emulator.schedule() as default:
        assert default == emulator.Schedule()


@pytest.mark.parametrize(
    "wrong", [{"seed": -1}, {"seed": 2**64}, {"landing": "soon"}, {"step_limit": 0}, {"os_threads": 0}]
)
def test_a_wrong_schedule_is_refused(wrong):
    with pytest.raises(ArgumentError, match=next(iter(wrong))), emulator.schedule(**wrong):
        pass


def test_counting_nests_and_ends():
    with emulator.counting() as outer:
        attend()
        with emulator.counting() as inner:
            attend()
    attend()
    assert (outer.launches, inner.launches) == (2, 1)
    expected = 2 * (LENGTH // 16) * (LENGTH // 8) * 4
    assert inner.matrix_instructions == {"mma_m16n8k16_bf16": expected}
    assert outer.total_matrix_instructions == 2 * expected
    assert inner.global_bytes_read == {"q": LENGTH * 128, "k": 2 * LENGTH * 128, "v": 2 * LENGTH * 128}
    assert inner.global_bytes_written == {"out": LENGTH * 128}
    assert not inner.bank_conflicts


@pytest.mark.parametrize(
    "shape, says",
    [
        ({"grid": (1, 65536, 1)}, "a grid has 1 to"),
        ({"grid": (0, 1, 1)}, "a grid has 1 to"),
        ({"threads": 100}, "whole warps"),
        ({"threads": 2048}, "at most 1024"),
        ({"threads": 160}, "promises at most 128"),
        ({"smem_bytes": 227 * 1024 + 1}, "at most 232448 bytes"),
        ({"smem_bytes": 3 * 64 * 128 - 16}, "out of bounds"),
    ],
)
def test_a_launch_cuda_would_refuse_is_refused(shape, says):
    with pytest.raises(EmulatorError, match=says):
        attend(**shape)


def test_an_unknown_kernel_is_named():
    with pytest.raises(EmulatorError, match="no kernel 'nobody'"):
        emulator.launch(compiled()[0], "nobody", (1, 1, 1), 32, 0, b"", [])


def test_speed_is_a_number():
    assert emulator.speed(0.01) > 0


def test_speed_counts_the_time_of_whichever_thread_runs_the_launch(monkeypatch):
    launches = []

    def launch(*args):
        def work():
            end = time.process_time() + 0.01
            while time.process_time() < end:
                pass

        launches.append(threading.Thread(target=work))
        launches[-1].start()
        launches[-1].join()

    monkeypatch.setattr(emulator, "launch", launch)
    emulator.speed(0.02)
    assert len(launches) <= 3


# --- The compiler -------------------------------------------------------------------------------------------------


def test_an_error_names_file_and_line():
    edit = source.Edit(SPEED, "hw::cp_async_commit();\n}", "hw::cp_async_comit();\n}")
    with pytest.raises(CompileError) as raised:
        compiled(edit)
    line = source.read(source.folder() / SPEED).split("hw::cp_async_commit();\n}")[0].count("\n") + 1
    assert f"{SPEED}:{line}: " in str(raised.value)
    assert re.search(rf"^  > +{line} \|   *hw::cp_async_comit\(\);$", str(raised.value), re.MULTILINE)
    assert f"\n    {line - 1:4d} | " in str(raised.value)  # the code around


def test_compiling_twice_compiles_once(monkeypatch):
    text = source.flatten(SPEED, "emu")
    first = hostcxx.compile(text)
    monkeypatch.setattr(hostcxx, "_compile", None)
    assert hostcxx.compile(text) == first


@pytest.mark.parametrize(
    "environment, says",
    [({"CXX": "/nowhere/g++"}, "unset CXX"), ({"CXX": "", "PATH": "/nowhere"}, "apt-get install g\\+\\+")],
)
def test_a_missing_compiler_is_named(monkeypatch, environment, says):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(hostcxx.importlib.util, "find_spec", lambda name: None)
    hostcxx.compiler.cache_clear()
    try:
        with pytest.raises(CompileError, match=says):
            hostcxx.compiler()
    finally:
        hostcxx.compiler.cache_clear()


def test_another_processor_has_other_files(monkeypatch):
    text = source.flatten(SPEED, "emu")
    keys = []
    monkeypatch.setattr(cache, "build", lambda kind, key, suffix, make: keys.append(key))
    for processor in ("one", "other"):
        monkeypatch.setattr(hostcxx, "_processor", lambda p=processor: p)
        hostcxx._fixed_parts.cache_clear()
        hostcxx.compile(text)
    hostcxx._fixed_parts.cache_clear()
    assert keys[0] != keys[1]


def test_a_report_in_a_thread_of_a_forked_process():
    """The interpreter survives a wild pointer in a kernel, wherever it runs, and its own handlers are back after."""
    program = """
import faulthandler, multiprocessing, signal, threading
faulthandler.enable()
from test_emulator import attend, SPEED, source, EmulatorError, pytest
wild = source.Edit(SPEED, "  float o[8][4]", "  *reinterpret_cast<volatile i32*>(64ull) = 1;\\n  float o[8][4]")
def work():
    for _ in range(3):
        with pytest.raises(EmulatorError, match="fault: .*0x40"):
            attend(0, wild)
        attend()
    print("survived")
work()
threads = [threading.Thread(target=work) for _ in range(3)]
[t.start() for t in threads], [t.join() for t in threads]
child = multiprocessing.get_context("fork").Process(target=work)
child.start(), child.join()
assert child.exitcode == 0
"""
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("survived") == 5, done.stderr


# --- Somebody waits -----------------------------------------------------------------------------------------------


@pytest.fixture
def long_call():
    """A call that takes the emulator half a minute, of a kernel that other tests compile, too."""
    x = np.ones((1, 4000, 16, 64), np.float16)
    with using("emulator"):
        cuflash.attention(x[:, :9, :1], x[:, :9, :1], x[:, :9, :1])  # compiles
        yield lambda: cuflash.attention(x, x, x)


def interrupt_soon() -> None:
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()


def test_an_interrupt_ends_a_launch_and_leaves_the_emulator_usable(long_call):
    for _ in range(2):
        interrupt_soon()
        began = time.perf_counter()
        with pytest.raises(KeyboardInterrupt):
            long_call()
        assert time.perf_counter() - began < 10  # of some 30 s
        out = attend()[3]
        assert np.isfinite(out.astype(np.float32)).all()


def test_an_interrupt_ends_a_block_that_never_does():
    endless = source.Edit(SPEED, BARRIER, BARRIER + "\n    for (;;) hw::sync_threads();")
    compiled(endless)
    interrupt_soon()
    with emulator.schedule(step_limit=2**63), pytest.raises(KeyboardInterrupt):
        attend(0, endless)


def test_a_long_launch_shows_on_a_terminal_how_far_it_is(long_call, monkeypatch):
    lines = []
    monkeypatch.setattr(emulated, "_LONG_SECONDS", 0.0)
    monkeypatch.setattr(emulated, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(progress._lines, "change", lambda key, line, said="": lines.append(line))
    for terminal, mode in ((False, "progress"), (True, "quiet"), (True, "progress")):
        assert lines == []
        monkeypatch.setattr(progress, "on_terminal", lambda terminal=terminal: terminal)
        monkeypatch.setattr(cuflash.config, "on_compile", mode)
        interrupt_soon()
        with pytest.raises(KeyboardInterrupt):
            long_call()
    assert re.fullmatch(r"running forward_sm80 on the emulator: \d+ of 512 blocks", lines[0]) and lines[-1] is None


def test_a_notebook_says_beforehand_what_it_waits_for(monkeypatch, capfd):
    monkeypatch.setattr(progress, "in_notebook", lambda: True)
    with progress.compiling("forward_sm80 for [emulator]"):
        assert capfd.readouterr().err == "cuflash: compiling forward_sm80 for [emulator] ...\n"
    assert re.fullmatch(r"cuflash: compiling forward_sm80 for \[emulator\]: 0\.\d s\n", capfd.readouterr().err)
