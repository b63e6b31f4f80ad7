"""Kernels of the user's own: right, wrong, costly, and faulty in every way that the emulator reports."""

from __future__ import annotations

import os
import signal
import threading
import time

import numpy as np
import pytest

import cuflash
from cuflash import workbench
from cuflash.errors import ArgumentError, CompileError, EmulatorError, UnsupportedError
from cuflash.workbench import report, worker

HEAD = """\
struct Params {
  const float* x;
  float* y;
  i32 n;
};
HW_KERNEL(64) toy(HW_GRID_CONSTANT Params p) {
  const i32 i = hw::thread_idx();
  const u32 smem = hw::smem_base();
"""
FIRST = HEAD.count("\n") + 1  # line of the body's first line
X = np.arange(64, dtype=np.float32)


def toy(body: str, reference=lambda x, y, n: 2 * x, **options) -> workbench.Kernel:
    arguments = {"x": X, "y": np.full(64, np.nan, np.float32), "n": 64}
    options = {"smem_bytes": 8192, "label": "cell toy", **options}
    return workbench.kernel(f"{HEAD}{body}\n}}\n", arguments, reference=reference, **options)


RIGHT = "  hw::store_global(p.y + i, 2.0f * hw::load_global(p.x + i));"


def test_a_right_kernel_checks_and_runs() -> None:
    kernel = toy(RIGHT)
    assert kernel.check()
    np.testing.assert_array_equal(kernel.run(), 2 * X)
    assert "right" in str(kernel.check())
    assert np.isnan(kernel.problem.arguments["y"]).all()  # the arguments stay as they were
    assert kernel.bind({"x": 2 * X}).check()
    assert kernel.bind(grid=(2, 1)).counters().global_bytes_read == {"x": 512}


def test_a_wrong_kernel_has_its_worst_element_named() -> None:
    check = toy(RIGHT.replace("2.0f", "(i == 17 ? 3.0f : i == 5 ? 2.5f : 2.0f)")).check()
    assert not check
    worst = check.worst
    assert (worst.name, worst.index, worst.got, worst.expected, worst.wrong) == ("y", (17,), 51.0, 34.0, 2)
    assert worst.allowed == pytest.approx(16 * 2.0**-23 * 126)
    assert "WRONG: 2 of 64" in str(check) and "y[17]" in str(check)


def test_what_a_kernel_did_not_write_is_wrong() -> None:
    check = toy("  if (i != 40) " + RIGHT.strip()).check()
    assert check.worst.index == (40,) and np.isnan(check.worst.got)


def test_an_element_may_be_off_by_what_is_allowed_and_no_more() -> None:
    expected, inf, nan = np.zeros(6), np.inf, np.nan
    got = np.array([0.99, -1.01, 1.5, 0.0, nan, inf])
    found = report.compare("y", got, expected, np.float64(1), str)
    assert (found.wrong, found.count, found.index) == (4, 6, (4,))
    same = report.compare("y", np.array([inf, -inf, nan]), np.array([inf, -inf, nan]), np.float64(1), str)
    assert same.wrong == 0
    assert report.compare("y", np.array([inf, 1.0]), np.array([-inf, nan]), np.float64(1), str).wrong == 2


def test_a_planted_bank_conflict_is_counted_at_its_line() -> None:
    body = """\
  hw::store_shared(smem + STEP * i, hw::load_global(p.x + i));
  hw::store_global(p.y + i, 2.0f * hw::load_shared<float>(smem + STEP * i));"""
    planted, mended = toy(body.replace("STEP", "128")), toy(body.replace("STEP", "4"))
    assert planted.check() and mended.check()
    counts = planted.counters()
    assert counts.bank_conflicts == {f"cell toy:{FIRST}": 62, f"cell toy:{FIRST + 1}": 62}
    assert counts.accesses[0][1:] == ("shared", 64, 62)
    assert "hw::store_shared(smem + 128 * i" in str(counts)
    assert mended.counters().totals["bank conflicts"] == 0
    diff = mended.diff(planted)
    assert diff.counters["bank conflicts"] == (124, 0)
    assert diff.counters["global bytes read"] == (256, 256)
    assert "-  hw::store_shared(smem + 128 * i" in diff.text and "+  hw::store_shared(smem + 4 * i" in diff.text
    assert "-124" in str(diff)


def test_a_planted_uncoalesced_read_is_counted_at_its_line() -> None:
    body = "  hw::store_global(p.y + i, 2.0f * hw::load_global(p.x + i));"
    planted = toy(body.replace("p.x + i", "p.x + 8 * i % 64 + i / 8"))
    counts = planted.counters()
    assert counts.uncoalesced == {f"cell toy:{FIRST}": 8 * 2 - 8}
    assert counts.accesses[0][1:] == ("global", 16 + 8, 8)
    assert toy(body).counters().totals["sectors beyond need"] == 0


FAULTS = {
    "race": (
        "  hw::store_shared(smem + 4 * i, 1.0f);\n  hw::sync_threads();\n  hw::store_shared(smem + 4 * i, 2.0f);\n"
        "  hw::load_shared<float>(smem + 4 * (63 - i));",
        (2, 3),
    ),
    "uninitialised": ("  hw::sync_warp();\n  hw::load_shared<float>(smem + 4 * i);", (1,)),
    "out of bounds": ("  hw::load_global(p.x + i + 1);", (0,)),
    "divergence": ("  if (i < 9)\n    hw::shfl_xor(i, 1);\n  else\n    hw::ballot(true);", (1, 3)),
    "deadlock": ("  if (i % 32 < 16) hw::sync_threads();\n  hw::sync_warp();", (0, 1)),
    "runaway": ("  for (i32 k = 0; k != -1; ++k) hw::store_shared(smem + 4 * i, 1.0f);", (0,)),
    "fault": ("  *reinterpret_cast<volatile i32*>(64ull) = 1;", ()),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_is_reported_with_the_code_of_the_cell(kind: str) -> None:
    body, named = FAULTS[kind]
    lines = body.splitlines()
    with cuflash.emulator.schedule(seed=7, step_limit=100_000), pytest.raises(EmulatorError) as raised:
        toy(body).check()
    report = str(raised.value)
    assert report.startswith(f"{kind}: ") and "seed=7" in report
    for at in named:
        assert f"cell toy:{FIRST + at}" in report
        assert f"  > {FIRST + at:4d} | {lines[at]}" in report


@pytest.mark.parametrize("arch", ["emulator", "sm_80"])
def test_a_text_that_does_not_compile_shows_the_line_and_the_code_around(arch: str) -> None:
    kernel = toy("  const float z = 1.0f\n  hw::store_global(p.y + i, zz);\n  (void)z;")
    with pytest.raises(CompileError) as raised:
        kernel.compile(arch)
    message = str(raised.value)
    assert f"cell toy:{FIRST + 1}: " in message
    assert f"  > {FIRST + 1:4d} |   hw::store_global(p.y + i, zz);" in message
    assert f"    {FIRST:4d} |   const float z = 1.0f" in message


@pytest.mark.parametrize("arch", ["emulator", "sm_80"])
def test_a_text_that_does_not_end_is_blamed_where_it_opens(arch: str) -> None:
    with pytest.raises(CompileError) as raised:
        toy("  if (i < 3) {").compile(arch)
    message = str(raised.value)
    assert "cuflash_emu" not in message and "to match this" in message
    assert "HW_KERNEL(64) toy(HW_GRID_CONSTANT Params p) {" in message


def test_names_of_cuda_have_their_remedy() -> None:
    with pytest.raises(CompileError, match=r"threadIdx is not known here: hw::thread_idx\(\)"):
        toy("  const i32 x = threadIdx.x;").compile()


def test_what_an_assembler_says_is_cut() -> None:
    lines = '  asm volatile("nonsense.u32;");\n' * 40
    with pytest.raises(CompileError, match=r"\.\.\. and \d+ lines more") as raised:
        toy(lines).compile("sm_80")
    assert len(str(raised.value).splitlines()) < 20


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("  for (volatile i32 k = 0; k == 0;) {}", "no answer after 1 seconds"),
        ("  asm volatile(\"syscall\" :: \"a\"(231), \"D\"(3));", "ended with status 3"),
    ],
)  # fmt: skip
def test_what_hangs_or_dies_leaves_the_interpreter_alive(body: str, says: str) -> None:
    if "syscall" in body and os.uname().machine != "x86_64":
        pytest.skip("an exit in the words of x86-64")
    kernel = toy(body).compile()
    with pytest.raises(workbench.Stopped, match=says):
        kernel.check(seconds=1)
    assert worker.call(divmod, 7, 2, seconds=60) == (3, 1)  # the next has a child again


def test_an_interrupt_ends_the_child_and_not_the_interpreter() -> None:
    before = worker.call(os.getpid, seconds=60)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
    timer = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])  # as Ctrl-C and a notebook's stop button do
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            worker.call(time.sleep, 60, seconds=60)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert worker.call(os.getpid, seconds=60) != before


def test_several_results_come_by_name_and_are_checked_by_name() -> None:
    text = """\
struct Params {
  const i32* x;
  i32* y;
  i32* z;
};
HW_KERNEL(32) both(HW_GRID_CONSTANT Params p) {
  const i32 i = hw::thread_idx();
  hw::store_global(p.y + i, hw::load_global(p.x + i) + 1);
  hw::store_global(p.z + i, i);
}
"""
    x = np.arange(32, dtype=np.int32)
    arguments = {"x": x, "y": 0 * x, "z": 0 * x}
    kernel = workbench.kernel(text, arguments, reference=lambda x, y, z: {"y": x + 1, "z": 2 * x})
    assert [*kernel.run()] == ["y", "z"]
    y, z = kernel.check().results
    assert (y.wrong, z.wrong, z.index, z.allowed) == (0, 31, (31,), 0.0)  # integers are right or wrong


def test_resources_and_machine_code_of_an_architecture() -> None:
    kernel = toy(RIGHT)
    used = kernel.resources("sm_90a")
    assert (used.threads, used.shared_bytes, used.spilled_bytes) == (64, 8192, 0)
    assert 0 < used.registers < 40
    assert (used.blocks, used.limited_by) == (229 // 9, "shared memory")
    assert "limited by shared memory" in str(used)
    code = kernel.sass("sm_90a")
    assert code.function.counts["STG"] == 1 and "STG.E" in code.text
    more = toy(f"  hw::store_shared(smem + 4 * i, 1.0f);\n{RIGHT}")
    assert more.diff(kernel, counters=False, arch="sm_90a").resources["instructions: STS"] == (0, 1)


def test_a_trace_is_what_the_timeline_draws() -> None:
    kernel = toy("  hw::cp_async_4(smem + 4 * i, p.x + i, 4);\n  hw::cp_async_commit();\n  hw::cp_async_wait<0>();")
    events = kernel.trace().events
    assert {(e.file, e.line) for e in events if e.what == "cp_async_4"} == {("cell toy", FIRST)}
    assert "copies of warp 1" in workbench.timeline(kernel.trace()).rows


def test_bench_needs_a_gpu() -> None:
    if why := cuflash.workbench.jobs.why_no_gpu():
        with pytest.raises(UnsupportedError, match="counters\\(\\) and resources\\(\\)"):
            toy(RIGHT).bench()
        with pytest.raises(UnsupportedError, match="backend='emulator'"):
            toy(RIGHT).on("cuda").run()
        assert why


@pytest.mark.gpu
def test_a_kernel_runs_and_is_timed_on_a_gpu() -> None:
    kernel = toy(RIGHT).on("cuda")
    assert kernel.check()
    assert kernel.bench(repeats=5).median > 0


def test_a_text_may_include_files_of_the_kernels_and_a_function_bring_its_own() -> None:
    kernel = toy(RIGHT)
    text = """\
#include <tile/shared_tile.cuh>
HW_DEVICE float doubled(float x) { return 2.0f * x; }
HW_KERNEL(64) toy(HW_GRID_CONSTANT Params p) {
  const i32 i = hw::thread_idx();
  const u32 at = SharedTile<64>::address(hw::smem_base(), i, 0);
  hw::store_shared(at, doubled(hw::load_global(p.x + i)));
  hw::store_global(p.y + i, hw::load_shared<float>(at));
}
"""
    changed = kernel.replace_function("toy", text, label="cell b", first_line=2)
    assert changed.check()
    assert "tile/shared_tile.cuh" in changed.files and "cell b:7" in changed.counters().shared_passes


def test_versions_are_independent() -> None:
    first = toy(RIGHT)
    second = first.edit("toy.cu", "2.0f", "3.0f")
    third = second.replace_function("toy", "HW_KERNEL(32) toy(HW_GRID_CONSTANT Params p) {}\n")
    assert "2.0f" in first.function("toy") and "3.0f" in second.function("toy")
    assert third.specs[0].threads == 32 and first.specs[0].threads == 64
    assert second.check().worst.got == 3 * second.check().worst.expected / 2


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_results_are_arrays_of_the_framework_given(framework: str) -> None:
    library = pytest.importorskip(framework)
    asarray = library.tensor if framework == "torch" else library.numpy.asarray
    kernel = toy(RIGHT).bind()
    text = kernel.text("toy.cu")
    made = workbench.kernel(text, {"x": asarray(X), "y": asarray(0 * X), "n": 64}, smem_bytes=8192, label="cell toy")
    out = made.run()
    assert type(out) is type(asarray(X))
    np.testing.assert_array_equal(np.asarray(out), 2 * X)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: workbench.kernel("int x;", {"x": X}), "has 0 kernels"),
        (lambda: workbench.kernel(HEAD + "}", {"n": 3}), "has no array"),
        (lambda: workbench.kernel(HEAD + "}", {"x": X, "n": 3}), "no value for y"),
        (lambda: workbench.kernel(HEAD + "}", {"x": X, "y": X, "n": 3, "m": 1}), "no field m"),
        (lambda: workbench.kernel(HEAD + "}", {"x": X, "y": X, "n": X}), "i32 takes a number"),
        (lambda: workbench.kernel(HEAD + "}", {"x": X, "y": 1, "n": 1}), "takes an array"),
        (lambda: toy(RIGHT).bind({"x": X.astype(np.float64)}), r"x has dtype=float64, and its field is a float\*"),
        (lambda: toy(RIGHT, reference=lambda **_: X[:3]).check(), r"y of shape \(3,\): the kernel writes .* \(64,\)"),
        (lambda: workbench.kernel(HEAD.replace("64", "V::k") + "}", {"x": X, "y": X, "n": 1}), "HW_KERNEL.V::k.: thr"),
        (lambda: toy(RIGHT, grid=(1, 0)), "one to three numbers of blocks"),
        (lambda: toy(RIGHT, reference=None).check(), "pass reference="),
        (lambda: toy(RIGHT, reference=lambda **_: {"z": X}).check(), "reference gave z; the kernel writes y"),
        (lambda: toy(RIGHT).replace("tile/none.cuh", ""), "none of this kernel's files"),
        (lambda: toy(RIGHT).replace_function("none", ""), "no function 'none'"),
        (lambda: toy(RIGHT).replace_function("toy", "int x;"), "defines no function 'toy'.*It is now"),
        (lambda: toy(RIGHT).edit("toy.cu", "p.", ""), "occurs 3 times in toy.cu"),
        (lambda: toy(RIGHT).on("tpu"), "must be one of cuda, emulator"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(make, says: str) -> None:
    with pytest.raises(ArgumentError, match=f"(?s){says}"):
        make()


def test_reports_show_as_html_and_as_figures() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    counts = toy(RIGHT).counters()
    assert "<pre" in counts._repr_html_() and "global bytes read" in counts._repr_html_()
    assert len(counts.plot().axes) == 2


def test_a_fault_on_a_gpu_ends_the_child() -> None:
    """Its context is lost with it: the next call has another."""
    before = worker.call(os.getpid, seconds=60)
    with pytest.raises(cuflash.errors.CuflashError, match=r"on the GPU: .*; on\('emulator'\) may say where"):
        worker.call(
            exec, "class E(Exception): __module__ = 'cupy.cuda.runtime'\nraise E('illegal address')", {}, seconds=60
        )
    assert worker.call(os.getpid, seconds=60) != before
