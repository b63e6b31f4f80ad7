"""NVRTC without a GPU: six architectures, errors that name our lines, and every way it can be missing."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest
from jit_toys import SM80, toy_spec
from needs import needs_nvrtc

from cuflash import arch
from cuflash.errors import CompileError, UnsupportedError
from cuflash.jit import nvrtc, source
from cuflash.settings import config

ARCHES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a")


@needs_nvrtc
@pytest.mark.parametrize("name", ARCHES)
def test_the_wrappers_compile_for(name: str) -> None:
    if not any(name[3:].rstrip("a") == known for known in nvrtc.supported_archs()):
        pytest.skip(f"this NVRTC does not know {name}")
    cubin = nvrtc.compile(toy_spec().text("cuda"), arch.named(name), "toy.cu")
    assert cubin.data[:4] == b"\x7fELF"
    assert set(cubin.resources) == {"cuflash_toy_scale", "cuflash_toy_matrix"}
    for used in cubin.resources.values():
        assert used.registers >= 8
        assert (used.stack_bytes, used.spill_stores, used.spill_loads) == (0, 0, 0)
    assert cubin.warnings == ()
    assert nvrtc.Cubin.from_note(cubin.data, cubin.note()) == cubin


@needs_nvrtc
def test_spills_and_stack_are_seen() -> None:
    text = """extern "C" __global__ void __launch_bounds__(1024, 2) spiller(float* p, int n) {
      float a[80], b[8];
      for (int i = 0; i < 80; ++i) a[i] = p[i * n];
      for (int k = 0; k < n; ++k) for (int i = 0; i < 80; ++i) a[i] = a[i] * a[(i + 7) % 80] + p[k];
      for (int i = 0; i < 8; ++i) b[i] = a[i];
      for (int i = 0; i < 80; ++i) p[i * n] = a[i] + b[n & 7];
    }"""
    used = nvrtc.compile(text, SM80, "spiller.cu").resources["spiller"]
    assert used.registers <= 32 and used.stack_bytes > 0 and used.spill_stores > 0 and used.spill_loads > 0


@needs_nvrtc
def test_an_error_names_the_file_and_line_and_shows_them() -> None:
    edit = source.Edit("hw_cuda/warp.cuh", "__ballot_sync(0xffffffffu, predicate)", "no_such_function(predicate)")
    spec = toy_spec(edits=(edit,))
    path = source.folder() / "hw_cuda" / "warp.cuh"
    lines = path.read_text().splitlines()
    at = next(n for n, line in enumerate(lines, 1) if "__ballot_sync" in line)
    with pytest.raises(CompileError) as caught:
        nvrtc.compile(spec.text("cuda"), SM80, "toy.cu")
    message = str(caught.value)
    assert re.match(r"toy\.cu for sm_80 \(NVRTC \d+\.\d+\) did not compile:\n", message)
    assert f'hw_cuda/warp.cuh:{at}: error: identifier "no_such_function" is undefined' in message
    assert re.search(rf"^  > +{at} \| .*no_such_function\(predicate\)", message, re.M)
    assert re.search(rf"^    +{at - 1} \| {re.escape(lines[at - 2])}$", message, re.M), "the line before, unmarked"
    assert re.search(rf"^    +{at + 1} \| {re.escape(lines[at])}$", message, re.M)
    assert caught.value.source == spec.text("cuda") and "no_such_function" in caught.value.log
    written = Path(message.rpartition("The whole text: ")[2])
    assert written.read_text() == caught.value.source


@needs_nvrtc
def test_an_error_in_the_variant_is_shown_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "cache_dir", tmp_path)
    text = source.flatten(toy_spec().source, "cuda", variant="struct Variant {\n  using Element = hw::Quarter;\n};\n")
    with pytest.raises(
        CompileError, match=r"variant\.cuh:2: error: (.|\n)*>    2 \|   using Element = hw::Quarter;"
    ) as e:
        nvrtc.compile(text, SM80, "toy.cu")
    assert [str(e.value).rpartition("The whole text: ")[2]] == [str(p) for p in (tmp_path / "failed").iterdir()]


@needs_nvrtc
def test_many_errors_are_cut_short() -> None:
    text = '#line 1 "many.cu"\n' + "\n".join(f"int x{i} = missing{i};" for i in range(20))
    with pytest.raises(CompileError, match=r"\.\.\. and \d+ more") as caught:
        nvrtc.compile(text, SM80, "many.cu")
    assert str(caught.value).count("error:") == nvrtc.SHOWN_ERRORS


@needs_nvrtc
def test_warnings_are_kept_and_unused_variables_are_not_worth_one() -> None:
    text = 'extern "C" __global__ void f(int* p) { int unused = 3; } __device__ int g() {}'
    (warning,) = nvrtc.compile(text, SM80, "w.cu").warnings
    assert "missing return" in warning


@needs_nvrtc
def test_an_architecture_this_nvrtc_does_not_know() -> None:
    future = arch.Arch("sm_999a", (99, 9), 99 << 10)
    major, minor = nvrtc.version()
    with pytest.raises(UnsupportedError, match=rf"NVRTC {major}\.{minor} does not know sm_999a.*sm_80.*pip install"):
        nvrtc.compile("", future, "x.cu")


def test_no_nvrtc_at_all_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    nvrtc._library.cache_clear()
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    try:
        with pytest.raises(CompileError, match=r'NVRTC, which .*pip install "cuflash\[cuda1[23]\]"'):
            nvrtc.version()
    finally:
        nvrtc._library.cache_clear()


@pytest.mark.parametrize(("wheel", "extra"), [("12", "cuda12"), ("13", "cuda13"), (None, "cuda13")])
def test_the_extra_named_is_that_of_the_cupy_installed(
    wheel: str | None, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib import metadata

    def distribution(name: str) -> object:
        if wheel is None or name != f"cupy-cuda{wheel}x":
            raise metadata.PackageNotFoundError(name)
        return object()

    monkeypatch.setattr(metadata, "distribution", distribution)
    assert re.search(r'pip install "cuflash\[(\w+)\]"', nvrtc._remedy())[1] == extra  # type: ignore[index]


def test_cupy_takes_the_same_options() -> None:
    """CuPy adds the architecture, -default-device and -ftz itself; older NVRTCs refuse an option given twice."""
    assert not any(o.startswith(("-arch", "-ftz", "-default-device")) for o in nvrtc.options())
    assert set(nvrtc.options()) < set(nvrtc.command(SM80))
    assert {"-arch=sm_90a", "-ftz=false", "-default-device"} < set(nvrtc.command(arch.named("sm_90a")))


@needs_nvrtc
def test_threads_compile_side_by_side() -> None:
    results: dict[int, nvrtc.Cubin] = {}

    def work(i: int) -> None:
        results[i] = nvrtc.compile(toy_spec(factor=i).text("cuda"), SM80, "toy.cu")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(results) == [0, 1, 2, 3]
    assert len({r.data for r in results.values()}) == 4


def test_the_log_is_read_kernel_by_kernel() -> None:
    log = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'a' for 'sm_90a'
ptxas info    : Function properties for a
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers
ptxas info    : Compiling entry function 'b' for 'sm_90a'
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ...
ptxas info    : Function properties for b
ptxas         .     16 bytes stack frame, 20 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 16 bytes cumulative stack size, 1024 bytes smem, 376 bytes cmem[0]
"""
    assert nvrtc.parse_resources(log) == {
        "a": nvrtc.Resources(168, 0, 0, 0, 0),
        "b": nvrtc.Resources(255, 16, 20, 24, 1024),
    }
    (warning,) = nvrtc.parse_warnings(log)
    assert "wgmma.mma_async instructions are serialized" in warning


@needs_nvrtc
@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_denormal_floats_are_flushed_by_approximate_instructions_alone(kernel: str) -> None:
    """In PTX: comparisons, roundings and products of what mods read keep them, as reference and emulator do."""
    import numpy as np

    from cuflash import dtypes
    from cuflash.ops import backward, forward
    from cuflash.trace import tracer

    table = np.full(64, 1e-40, np.float32)
    mods = tracer.bind(
        lambda s, b, h, q, k: np.floor(s * table[q]) + np.exp(np.maximum(s, table[k])) / table[k],
        lambda b, h, q, k: table[k] > 0,
    ).mods
    if kernel == "forward":
        spec = forward.kernel_spec(forward.choose_variant(dtypes.float16, 64, 64, 16, SM80, mods=mods))
    else:
        spec = backward.kernel_spec(
            backward.choose_variants(dtypes.float16, 64, 64, 16, deterministic=False, mods=mods)[0]
        )
    flags = [f.replace("-arch=sm_", "-arch=compute_") for f in nvrtc.command(SM80) if "ptxas" not in f]
    library = nvrtc._library()[0]
    program = nvrtc._ok(library.nvrtcCreateProgram(spec.text("cuda").encode(), b"denormals.cu", 0, [], []))[0]
    try:
        nvrtc._ok(library.nvrtcCompileProgram(program, len(flags), [f.encode() for f in flags]))
        ptx = nvrtc._buffer(library.nvrtcGetPTXSize, library.nvrtcGetPTX, program).decode()
    finally:
        library.nvrtcDestroyProgram(program)
    flushing = set(re.findall(r"[\w.]+\.ftz[\w.]*", ptx))
    assert flushing and all(re.fullmatch(r"\w+\.approx\.ftz\.f32", name) for name in flushing), flushing
    assert len(re.findall(r"\bsetp\.\w+\.f32|\bcvt\.rmi\.f32", ptx)) > 20
