"""benchmarks/results/static-*.json: the machine code of this tree is no worse than the committed file says."""

from __future__ import annotations

import dataclasses
import json

import pytest
from needs import needs_nvrtc

from benchmarks import machine_code, report, schema
from benchmarks.schema import OURS, Results, Row
from cuflash import arch

USUAL = ("forward_sm80, sm_80, d 128", "forward_sm90, sm_90a, d 64", "forward_sm90, sm_90a, d 128")
USUAL += ("backward_sm80, sm_80, d 128, keys held, accumulate dq",)


def _cases() -> list[str]:
    return [case for name in machine_code.ARCHES for case, _ in machine_code.specs(arch.named(name))]


def _spec(case: str):
    name = case.split(", ")[1]
    return dict(machine_code.specs(arch.named(name)))[case], arch.named(name)


@needs_nvrtc
@pytest.mark.parametrize(
    "case", [case if case in USUAL else pytest.param(case, marks=pytest.mark.slow) for case in _cases()]
)
def test_no_kernel_is_worse_than_the_file_says(case):
    found = machine_code.committed()
    assert found is not None, "python -m benchmarks.machine_code writes it"
    path, results = found
    compiler = schema.versions()["nvrtc"]
    if compiler != results.versions["nvrtc"]:
        pytest.skip(f"{path.name} was made by NVRTC {results.versions['nvrtc']}, and here is {compiler}: renew it")
    row = machine_code.row(case, *_spec(case))
    before = {row.case: row for row in results.rows}
    assert row is not None and case in before, f"{path.name} has no such row: renew it"
    assert machine_code.worse(before[case], row) == []


def test_the_file_has_every_kernel_and_its_reason_stands_in_the_changelog():
    found = machine_code.committed()
    assert found is not None
    assert {row.case for row in found[1].rows} == set(_cases())
    changelog = (schema.CHECKOUT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert found[1].more.get("worse_because", "") in changelog
    page = machine_code.page(found[1])
    assert page in report.LONG_README.read_text(encoding="utf-8"), "cuflash bench-report writes the page anew"
    assert page.count("| forward_sm90, sm_90a, d 128 |") == page.count("| forward_sm80, sm_80, d 256 |") == 1


MORE = dict(tile="128 x 64 x 4", instructions=500, products=100, shared_over_matrix=1.0, blocks=2, registers=200)
OLD = Row("code", "a kernel", OURS, more={**MORE, "spills": 0, "tensor_use": 0.9, "bound": "matrix"})


@pytest.mark.parametrize(
    "change", [{"instructions": 506}, {"shared_over_matrix": 1.02}, {"blocks": 1}, {"spills": 4}, {"tensor_use": 0.89}]
)
def test_each_figure_can_get_worse(change):
    new = dataclasses.replace(OLD, more=OLD.more | change)
    assert len(machine_code.worse(OLD, new)) == 1 and machine_code.worse(new, OLD) == []


def test_a_worse_file_needs_a_reason_that_the_changelog_gives(tmp_path, monkeypatch, capsys):
    results = Results(schema.STATIC, "abc", True, "2026-01-01T00:00:00+00:00", rows=[OLD])
    first = schema.write(results, tmp_path / "static-2026-01-01-abc.json")
    worse = dataclasses.replace(OLD, more=OLD.more | {"spills": 8})
    monkeypatch.setattr(machine_code, "rows", lambda: iter([worse]))
    monkeypatch.setattr(machine_code, "CHECKOUT", tmp_path)
    (tmp_path / "CHANGELOG.md").write_text("- A kernel spills, for the sake of the argument.")
    for because in ("", "No reason at all."):
        assert machine_code.renew(tmp_path, because) == 1
        assert "a kernel: spills: 0 to 8" in capsys.readouterr().out and first.exists()
    assert machine_code.renew(tmp_path, "A kernel spills, for the sake of the argument.") == 0
    (path,) = tmp_path.glob("static-*.json")
    assert path != first and json.loads(path.read_text())["worse_because"].startswith("A kernel spills")
    monkeypatch.setattr(machine_code, "rows", lambda: iter([]))
    assert machine_code.renew(tmp_path, "") == 1 and "a kernel: gone" in capsys.readouterr().out
