"""The command line: what doctor makes of machines that are not this one, explain, device-check without a GPU."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import cuflash
import cuflash.reference
from cuflash import cli
from cuflash.arch import ARCHES
from cuflash.cli import compile as compile_command
from cuflash.cli import device_check, doctor, machine
from cuflash.cli.machine import Driver, Gpu
from cuflash.errors import CompileError
from cuflash.jit import nvrtc
from cuflash.jit.source import folder as kernel_folder

ROOT = Path(__file__).resolve().parents[1]
HOPPER, TURING, FUTURE = Gpu(0, "NVIDIA H200", (9, 0)), Gpu(0, "Tesla T4", (7, 5)), Gpu(0, "NVIDIA X", (14, 2))
DRIVER13, DRIVER12 = Driver((13, 0), (HOPPER,)), Driver((12, 8), (HOPPER,))
CUPY13, CUPY12 = {"cupy-cuda13x": "14.2.0"}, {"cupy-cuda12x": "14.2.0"}


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app(), list(arguments))


# --- doctor -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[doctor.Line]]:
    """Doctor's findings on a machine described by keywords; what is not named is in order, for CUDA 13."""

    def examine(
        driver: Driver | None = DRIVER13,
        cupy: Mapping[str, str] = CUPY13,
        torch: tuple[str | None, str | None] = ("2.13.0", "13.0"),
        bindings: str | None = "13.0.3",
        nvrtc_version: tuple[int, int] | None = (13, 0),
        compiler: str | None = "g++",
        disassembler: str | None = "/bin/nvdisasm",
        card: bool = False,
    ) -> list[doctor.Line]:
        def version() -> tuple[int, int]:
            if nvrtc_version is None:
                raise CompileError("no NVRTC")
            return nvrtc_version

        versions = {"torch": torch[0], "cuda-bindings": bindings}
        for owner, name, answer in (
            (machine, "driver", lambda: driver),
            (machine, "cupy_wheels", lambda: dict(cupy)),
            (machine, "installed", versions.get),
            (machine, "torch_cuda", lambda: torch[1]),
            (machine, "cxx_compiler", lambda: compiler),
            (machine, "nvdisasm", lambda: disassembler),
            (machine, "nvidia_card_without_driver", lambda: card),
            (nvrtc, "version", version),
            (nvrtc, "supported_archs", lambda: ("75", "80", "90", "100")),
            (cuflash.emulator, "speed", lambda: 300_000.0),
        ):
            monkeypatch.setattr(owner, name, answer)
        return list(doctor.examine())

    return examine


@pytest.mark.parametrize(
    ("described", "name", "state", "found", "remedy"),
    [
        (dict(driver=None, card=True), "driver", "missing", "no driver", "driver"),
        (dict(driver=Driver((13, 0), (TURING,))), "GPU 0", "mismatch", "7.5.*begin with 8.0", "host arrays"),
        (dict(cupy={}), "CuPy", "missing", "not installed", r"\[cuda13\]"),
        (dict(cupy={}, torch=("2.9.0", "12.8")), "CuPy", "missing", "not installed", r"\[cuda12\]"),
        (dict(cupy={}, torch=(None, None), driver=DRIVER12), "CuPy", "missing", "", r"\[cuda12\]"),
        (dict(cupy={"cupy-cuda13x": "13.6.0"}), "CuPy", "mismatch", "14.1.1 or later", r"\[cuda13\]"),
        (dict(cupy=CUPY13 | CUPY12), "CuPy", "mismatch", "overwrite", "uninstall -y cupy-cuda13x cupy-cuda12x"),
        (dict(driver=DRIVER12), "CuPy", "mismatch", "CUDA 13.*12.8", r"uninstall.*\[cuda12\]"),
        (dict(cupy=CUPY12, bindings="12.9.1"), "PyTorch", "mismatch", "CUDA 13.0, CuPy for CUDA 12", "uninstall.*13"),
        (dict(bindings=None), "cuda-python", "missing", "not installed", r"\[cuda13\]"),
        (dict(bindings="12.9.1"), "cuda-python", "mismatch", "CuPy is for CUDA 13", r"cuda-bindings==13\.\*"),
        (dict(nvrtc_version=None), "NVRTC", "missing", "no libnvrtc of CUDA 13", r"cuda-toolkit\[nvrtc,cudart\]==13"),
        (dict(driver=DRIVER12), "NVRTC", "mismatch", "driver of CUDA 12.8 cannot load", r"\[cuda12\]"),
        (dict(driver=Driver((13, 0), (FUTURE,))), "NVRTC", "mismatch", "does not know NVIDIA X", "--upgrade"),
        (dict(compiler=None), "C++ compiler", "missing", "none", r"g\+\+|gcc|xcode|zig"),
    ],
)
def test_doctor_names_what_is_wrong_and_the_remedy(pretend, described, name, state, found, remedy) -> None:
    (line,) = [line for line in pretend(**described) if line.name == name]
    assert line.state == state
    assert re.search(found, line.found)
    assert re.search(remedy, line.remedy)


@pytest.mark.parametrize(
    "described",
    [
        {},
        dict(driver=DRIVER12, cupy=CUPY12, torch=("2.9.0", "12.8"), bindings="12.9.1", nvrtc_version=(12, 9)),
        dict(nvrtc_version=(13, 4)),  # a newer minor version is fine: what it makes is machine code, not PTX
        dict(torch=(None, None)),
        dict(torch=("2.13.0+cpu", None)),
        dict(driver=None, cupy={}, bindings=None, nvrtc_version=None, disassembler=None),  # a laptop
    ],
)
def test_doctor_finds_nothing_to_mend_where_there_is_nothing(pretend, described) -> None:
    assert {line.state for line in pretend(**described)} <= {"ok", "unused"}


def test_doctor_reports_a_cache_that_cannot_be_written(pretend, monkeypatch, tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    monkeypatch.setattr(cuflash.config, "cache_dir", in_the_way / "cache")
    (line,) = [line for line in pretend() if line.name == "cache"]
    assert line.state == "missing" and "CUFLASH_CACHE_DIR" in line.remedy


def test_compile_leaves_no_kernel_out() -> None:
    compiled = {spec.source for name in ("sm_80", "sm_90a") for spec in compile_command.specs(ARCHES[name])}
    assert compiled == {path.name for path in kernel_folder().glob("*.cu")}


def test_doctor_shows_a_long_path_whole(capsys: pytest.CaptureFixture[str]) -> None:
    path = "/" + "x" * 300
    doctor._print([doctor.Line("nvdisasm", "ok", path)])
    assert path in "".join(capsys.readouterr().out.split())


def test_doctor_exits_1_if_something_needs_mending(monkeypatch: pytest.MonkeyPatch) -> None:
    for state, status in (("ok", 0), ("unused", 0), ("missing", 1), ("mismatch", 1)):
        lines = [doctor.Line("thing", state, "found [so]", "mend it")]
        monkeypatch.setattr(doctor, "examine", lambda lines=lines: iter(lines))
        done = invoke("doctor", "--json")
        assert done.exit_code == status
        assert json.loads(done.stdout) == [vars(lines[0])]
        shown = invoke("doctor").output
        assert state in shown and "found [so]" in shown and ("mend it" in shown) == (state != "ok")


def test_doctor_on_this_machine() -> None:
    lines = {line["name"]: line for line in json.loads(invoke("doctor", "--json").stdout)}
    assert lines["python"]["state"] == "ok"
    if lines["C++ compiler"]["state"] == "ok":
        assert "mma.m16n8k16 a second" in lines["emulator"]["found"]


# --- what the machine has ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("line", "cuda"), [("cuda: Optional[str] = '13.0'", "13.0"), ("cuda = None", None)])
def test_torchs_cuda_is_read_from_its_files(monkeypatch, tmp_path: Path, line: str, cuda: str | None) -> None:
    (tmp_path / "version.py").write_text(f"__version__ = '2.13.0'\n{line}\nhip = None\n")
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: spec)
    assert machine.torch_cuda() == cuda


# --- explain ----------------------------------------------------------------------------------------------------------


def test_explain_shows_the_kernel_and_its_text() -> None:
    arguments = "explain --dtype float16 --heads 8 --heads-kv 2 --lengths 5,17,300 --causal".split()
    told = json.loads(invoke(*arguments, "--json").stdout)
    assert told["kernel"] == "forward_sm80" and told["backend"] == "emulator" and told["grid"][1] == 8
    assert told["why"] and "hw::Half" in told["variant"]
    assert "forward_sm80" in invoke(*arguments).stdout
    source = invoke(*arguments, "--source").stdout
    assert source.strip() == told["source"].strip()
    assert "cuflash_forward_sm80" in source and "#include" not in source


def test_explain_takes_every_feature_and_restores_the_settings() -> None:
    before = cuflash.config.backend, cuflash.config.arch
    done = invoke(
        *"explain --dense --lengths 64,64 --lengths-k 70,70 --window 16,0 --softcap 30 --alibi --sink".split(),
        *"--head-dim-v 32 --backend reference".split(),
    )
    assert done.exit_code == 0 and "reference" in done.stdout
    assert (cuflash.config.backend, cuflash.config.arch) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lengths", "5,x"], "whole numbers"),
        (["--dtype", "float8"], "dtype='float8' must be one of float16, bfloat16, float32"),
        (["--lengths", "3,4", "--lengths-k", "3"], "as many sequences"),
        (["--dense", "--lengths", "3,4"], "must all be equal"),
        (["--heads", "8", "--heads-kv", "3"], "3"),
        (["--arch", "sm_75"], "sm_75"),
    ],
)
def test_wrong_arguments_are_one_line_and_status_1(arguments: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cuflash", "explain", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("cuflash: ") and said in done.stderr
    assert len(done.stderr.splitlines()) == 1


# --- device-check -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "cupy", "said"),
    [
        ((), {}, "no GPU here"),
        ((TURING,), {"cupy-cuda12x": "14.2.0"}, "Tesla T4 is older"),
        ((HOPPER,), {}, "CuPy is not; install it with"),
    ],
)
def test_device_check_without_a_gpu_says_so_and_exits_2(monkeypatch, tmp_path: Path, gpus, cupy, said) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: gpus)
    monkeypatch.setattr(machine, "cupy_wheels", lambda: cupy)
    done = invoke("device-check", "--out", str(tmp_path))
    assert done.exit_code == 2
    assert said in done.output
    assert not list(tmp_path.iterdir())


def test_device_check_writes_what_its_stages_found(monkeypatch, tmp_path: Path) -> None:
    """The stages themselves need a GPU; what is made of their answers does not."""
    timing = {"ms": 1.0, "tflops": 600.0}
    row = {"case": {}, "name": "a case", "cuflash": timing, "torch cudnn": timing, "torch flash": {"error": "no"}}
    tests = {"ok": True, "passed": 3, "failed": 0, "skipped": 1, "seconds": 2.0, "failures": []}
    for name, answer in (
        ("run_pytest", lambda arguments, seconds: tests | {"ok": "tests/hw" in arguments}),
        ("first_call_seconds", lambda: {"cold": 1.0, "on_disk": 0.04}),
        ("host_microseconds", lambda: 12.5),
        ("measure_forward", lambda on_case: [row]),
    ):
        monkeypatch.setattr(device_check, name, answer)
    monkeypatch.setattr(machine, "driver", lambda: Driver((13, 0), (HOPPER,)))
    monkeypatch.setattr(machine, "cupy_wheels", lambda: {"cupy-cuda13x": "14.2.0"})
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 0))
    done = invoke("device-check", "--out", str(tmp_path), "--commit", "abc123")
    assert done.exit_code == 1, "a failed stage must be seen in the status"
    assert "600" in done.output and "12.5 us" in done.output
    (path,) = tmp_path.iterdir()
    assert re.fullmatch(r"h200-\d{4}-\d\d-\d\dT\d{6}-abc123\.json", path.name)
    result = json.loads(path.read_text())
    assert result["machine"]["gpu"] == "NVIDIA H200" and result["forward"] == [row]
    assert result["primitives"]["ok"] and not result["tests"]["ok"]


def test_device_check_reads_pytests_own_report(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'one is not two'\n"
        "@pytest.mark.skip\ndef test_left_out(): pass\n"
        "@pytest.fixture\ndef broken(): raise ValueError('broken')\n"
        "def test_error(broken): pass\n"
    )
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", f"--junitxml={report}", "test_it.py"]
    subprocess.run(command, cwd=tmp_path, capture_output=True)
    found = device_check.read_junit(report.read_text())
    assert (found["ok"], found["passed"], found["failed"], found["skipped"]) == (False, 1, 2, 1)
    assert "one is not two" in found["failures"][0]["message"]
    assert "2 failed" in device_check.summary(found) and "test_it::test_bad" in device_check.summary(found)


def test_the_work_of_a_case_is_counted_by_the_pairs_it_sees() -> None:
    case = device_check.Case((3, 5), heads=4, heads_kv=2, head_dim=8, causal=True, packed=True)
    seen = sum(j <= i for n in case.lengths for i in range(n) for j in range(n))
    assert case.flops == 2 * 2 * 8 * 4 * seen
    assert case.bytes == sum(2 * 8 * 8 * heads for heads in (4, 2, 2, 4))
    assert all(sum(c.lengths) == 16384 for c in device_check.cases() if not c.packed)
    assert all(0.9 * 16384 < sum(c.lengths) <= 16384 for c in device_check.cases() if c.packed)
    assert len({c.name for c in device_check.cases()}) == len(device_check.cases())


def test_timing_takes_the_inputs_in_turn_and_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for CuPy whose clock is moved by the calls."""
    clock = [0.0]

    class Event:
        def record(self) -> None:
            self.at = clock[0]

    cuda = SimpleNamespace(
        Event=Event,
        get_elapsed_time=lambda start, end: end.at - start.at,
        get_current_stream=lambda: SimpleNamespace(synchronize=lambda: None),
    )
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
    seen: list[int] = []

    def call(which: int) -> None:
        seen.append(which)
        clock[0] += 100.0 if len(seen) == 20 else 2.0  # one slow call, which a mean would show

    case = device_check.Case((64,), 1, 1, 64, False)
    result = device_check._timed(call, [(0,), (1,), (2,)], case)
    assert result == {"ms": 2.0, "tflops": case.flops / 2e-3 / 1e12}
    assert set(seen) == {0, 1, 2} and all(a != b for a, b in itertools.pairwise(seen[5:]))


def test_random_inputs_are_rounded_to_bfloat16_by_their_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """With NumPy in CuPy's place, which has the same functions."""
    import ml_dtypes

    fake = SimpleNamespace(random=np.random, float32=np.float32, uint32=np.uint32, uint16=np.uint16)
    monkeypatch.setitem(sys.modules, "cupy", fake)
    case = device_check.Case((8, 8), 4, 2, 16, False)
    q, k, v = device_check._random_inputs(case, seed=1)
    assert q.shape == (2, 8, 4, 16) and k.shape == v.shape == (2, 8, 2, 16) and q.dtype == ml_dtypes.bfloat16
    exact = np.random.default_rng(1).standard_normal(q.shape, dtype=np.float32)
    np.testing.assert_array_equal(q.view(np.uint16), exact.astype(ml_dtypes.bfloat16).view(np.uint16))


def test_the_attentions_of_pytorch_are_measured_beside_ours(monkeypatch, rng: np.random.Generator) -> None:
    """On the CPU, where PyTorch has one of the three kernels."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device_check, "_timed", lambda call, inputs, case: [call(*x) for x in inputs] and {"ms": 1.0})
    case = device_check.Case((16, 16), heads=4, heads_kv=4, head_dim=32, causal=True)
    inputs = [tuple(rng.standard_normal((3, 2, 16, 4, 32), np.float32)) for _ in range(2)]
    ours, _, _ = cuflash.reference.attention(*inputs[0], causal=True)
    results = device_check._measure_torch(case, inputs, ours)
    assert set(results) == {"torch flash", "torch cudnn", "torch efficient"}
    measured = [r for r in results.values() if "error" not in r]
    assert measured and all(r["ms"] == 1.0 and r["max_difference"] < 1e-5 for r in measured)
    assert all(r["error"] for r in results.values() if r not in measured)
