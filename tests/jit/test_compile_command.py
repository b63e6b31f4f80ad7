"""`cuflash compile`: the report has what its readers rely on, and a kernel that fails is said and counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from jit_toys import toy_spec
from needs import needs_nvdisasm, needs_nvrtc
from typer.testing import CliRunner

from cuflash.cli import compile as command
from cuflash.errors import ArgumentError, UnsupportedError
from cuflash.jit import module, sass, source
from cuflash.settings import config

FIELDS = {
    "kernel", "arch", "variant", "registers", "spill_stores", "spill_loads", "stack_bytes", "smem_bytes",
    "compile_ms", "warnings", "cubin", "sass",
}  # fmt: skip


@pytest.fixture(autouse=True)
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[module.KernelSpec]:
    specs = [toy_spec("cuflash_toy_matrix"), toy_spec("cuflash_toy_scale", factor=7)]
    monkeypatch.setattr(command, "specs", lambda arch: specs)
    monkeypatch.setattr(config, "cache_dir", tmp_path / "cache")
    return specs


def run(*arguments: str):
    app = typer.Typer()
    app.command()(command.compile_kernels)
    return CliRunner().invoke(app, list(arguments))


@needs_nvrtc
@needs_nvdisasm
def test_json_lists_every_kernel_and_architecture(tmp_path: Path) -> None:
    result = run("--arch", "sm_80", "--arch", "sm_90", "--json", "--out", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    wanted = [(k, a) for a in ("sm_80", "sm_90a") for k in ("toy_matrix", "toy_scale")]
    assert [(row["kernel"], row["arch"]) for row in rows] == wanted
    for row in rows:
        assert row.keys() >= FIELDS and row["error"] is None and row["warnings"] == []
        assert (row["spill_stores"], row["spill_loads"], row["stack_bytes"]) == (0, 0, 0)
        assert row["registers"] >= 8 and row["compile_ms"] > 0
        assert row["sass"].keys() >= {"HMMA", "HGMMA", "MUFU", "LDSM", "LDGSTS", "LDL", "STL"}
        assert Path(row["cubin"]).read_bytes()[:4] == b"\x7fELF"
    assert [row["smem_bytes"] for row in rows] == [512, 0, 512, 0]
    assert [row["sass"]["HMMA"] for row in rows] == [1, 0, 1, 0], "each row counts its own kernel alone"
    assert [[loop["HMMA"] for loop in row["loops"]] for row in rows] == [[1], [], [1], []]
    assert rows[1]["variant"] == "Element=hw::Half kThreads=32 kFactor=7"
    assert len({row["cubin"] for row in rows}) == 4
    again = json.loads(run("--arch", "sm_80", "--json").stdout)
    assert [row["cached"] for row in again] == [True, True] and again[0]["cubin"] is None
    assert again[0]["compile_ms"] == rows[0]["compile_ms"], "what the compile took, not the look-up"


@needs_nvrtc
def test_the_table_and_the_filter() -> None:
    result = run("--arch", "sm_80", "--kernel", "matr")
    assert result.exit_code == 0 and "toy_matrix" in result.stdout and "toy_scale" not in result.stdout
    assert isinstance(run("--kernel", "typo").exception, ArgumentError)
    assert "there are toy_matrix, toy_scale" in str(run("--kernel", "typo").exception)


@needs_nvrtc
def test_a_kernel_that_fails_is_reported_beside_the_others(toys: list[module.KernelSpec]) -> None:
    toys.append(toy_spec(edits=(source.Edit("toy.cu", "* params.factor", "* params.typo"),)))
    result = run("--arch", "sm_80", "--json")
    assert result.exit_code == 1
    good, _, bad = json.loads(result.stdout)
    assert good["error"] is None and bad["registers"] is None and 'has no member "typo"' in bad["error"]
    table = run("--arch", "sm_80")
    assert table.exit_code == 1 and "failed" in table.stdout and 'has no member "typo"' in table.stdout


@needs_nvrtc
def test_without_a_disassembler_the_counts_are_null(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise UnsupportedError("no nvdisasm")

    monkeypatch.setattr(sass, "nvdisasm", none)
    result = run("--arch", "sm_80", "--json")
    assert result.exit_code == 0 and [row["sass"] for row in json.loads(result.stdout)] == [None, None]
    assert "pip install nvidia-cuda-nvdisasm" in run("--arch", "sm_80").stdout


def test_an_unknown_architecture_is_refused() -> None:
    assert isinstance(run("--arch", "sm_75").exception, UnsupportedError)
