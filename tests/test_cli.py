"""The command line: what doctor makes of machines that are not this one, explain, what is common to all commands."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from needs import needs_nvdisasm, needs_nvrtc
from typer.testing import CliRunner

import cuflash
import cuflash.reference
from cuflash import cli
from cuflash.arch import ARCHES
from cuflash.cli import compile as compile_command
from cuflash.cli import doctor, machine
from cuflash.cli.bench import benchmarks
from cuflash.cli.machine import Driver, Gpu
from cuflash.dtypes import bfloat16
from cuflash.errors import ArgumentError, CompileError, CuflashError, UnsupportedError
from cuflash.jit import cache, nvrtc
from cuflash.jit.source import folder as kernel_folder
from cuflash.ops import forward

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


def test_doctor_without_a_gpu_proposes_what_is_of_use_without_one(pretend) -> None:
    laptop = dict(driver=None, cupy={}, nvrtc_version=None, disassembler=None)
    for bindings, name, remedy in (
        (None, "cuda-python", r"\[nvrtc\]"),
        ("13.0.3", "NVRTC", r"cuda-toolkit\[nvrtc\]==13"),
    ):
        lines = {line.name: line for line in pretend(**laptop, bindings=bindings)}
        assert lines[name].state == "unused" and re.search(remedy, lines[name].remedy)
        assert not any(
            word in line.remedy for line in lines.values() for word in ("cuda12", "cuda13", "cupy", "cudart")
        )


def test_doctor_reports_a_cache_that_cannot_be_written(pretend, monkeypatch, tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    monkeypatch.setattr(cuflash.config, "cache_dir", in_the_way / "cache")
    (line,) = [line for line in pretend() if line.name == "cache"]
    assert line.state == "missing" and "CUFLASH_CACHE_DIR" in line.remedy


def test_the_cache_is_told_and_cleared(pretend, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuflash.config, "cache_dir", tmp_path)
    cache.build("emulator", cache.key_of("kernel"), ".so", lambda: b"0" * 3_000_000)
    weights = tmp_path / "encoder" / "model.bin"
    weights.parent.mkdir()
    weights.write_bytes(b"0" * 5_000_000)
    said = f"{tmp_path}: 1 kernels, 3.0 MB; besides 5.0 MB, the demo's encoder and the like"
    (line,) = [line for line in pretend() if line.name == "cache"]
    assert (line.state, line.found) == ("ok", said)
    assert invoke("cache").stdout == said + "\n"
    told = json.loads(invoke("cache", "--clear", "--json").stdout)
    assert told["deleted_files"] == 3 and told["kernels"] == 0 and told["other_bytes"] == weights.stat().st_size


def test_compile_leaves_no_kernel_out() -> None:
    compiled = {spec.source for name in ("sm_80", "sm_90a") for spec in compile_command.specs(ARCHES[name])}
    assert compiled == {path.name for path in kernel_folder().glob("*.cu")}


@needs_nvrtc
@needs_nvdisasm
def test_compile_reports_what_a_kernel_with_roles_does() -> None:
    hopper, other = (
        compile_command.report(forward.kernel_spec(variant), ARCHES["sm_90a"])
        for variant in (
            forward.choose_sm90_variant(bfloat16, 128, 128),
            forward.choose_variant(bfloat16, 128, 128, 16, ARCHES["sm_90a"]),
        )
    )
    assert hopper["error"] is None and hopper["consumer_spills"] == hopper["producer_spills"] == 0
    inside, everywhere = hopper["maxima_in_window"]
    assert inside == everywhere > 0 and hopper["ex2_in_window"][1] > 0
    assert 0.99 < hopper["tensor_use"] <= 1 and hopper["loop_instructions"] > 0
    for name in ("consumer_spills", "maxima_in_window", "ex2_in_window", "loop_instructions", "tensor_use"):
        assert other[name] is None


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
    ],
)
def test_wrong_arguments_are_one_line_and_status_2(arguments: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cuflash", "explain", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("cuflash: ") and said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_version_is_told() -> None:
    done = invoke("--version")
    assert done.exit_code == 0 and done.stdout == f"cuflash {cuflash.__version__}\n"


@pytest.mark.parametrize(
    ("error", "status"), [(ArgumentError("wrong"), 2), (UnsupportedError("not here"), 1), (CompileError("no"), 1)]
)
def test_the_exit_status_says_whose_mistake_it_is(monkeypatch, capsys, error: CuflashError, status: int) -> None:
    def application(**keywords: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "app", lambda: application)
    monkeypatch.setattr(cuflash.config, "on_compile", "quiet")
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == status and capsys.readouterr().err == f"cuflash: {error}\n"


def test_compared_results_must_be_files(tmp_path: Path) -> None:
    missing = tmp_path / "before.json"
    error = invoke("bench-compare", str(missing), str(missing)).exception
    assert isinstance(error, ArgumentError) and str(error).startswith(f"{missing} is not a file: pass two files")


def test_bench_outside_of_a_checkout_asks_where_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks("schema"), "RESULTS", Path("benchmarks") / "results")  # as in a wheel
    error = invoke("bench", "import").exception
    assert isinstance(error, ArgumentError) and "pass --out FOLDER" in str(error)


def test_bench_says_which_options_have_no_effect_without_a_gpu(monkeypatch, tmp_path: Path) -> None:
    def run(*arguments: Any) -> None:
        raise ArgumentError("enough")

    monkeypatch.setattr(benchmarks("offline"), "run", run)
    done = invoke("bench", "import", "--quick", "--peers", "torch", "--out", str(tmp_path))
    assert "--quick has no effect: it is for measurements on a GPU" in done.output
    assert "--peers has no effect" in done.output and "--minutes" not in done.output
