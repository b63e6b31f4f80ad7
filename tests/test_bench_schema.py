"""The file of results: written, read, named; which commit it names."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import schema
from benchmarks.schema import Results, Row

RESULTS = Results(
    "NVIDIA H200",
    "abc123",
    True,
    "2026-01-02T03:04:05+00:00",
    capability=[9, 0],
    driver="580.82.07",
    versions={"numpy": "2.4"},
    clocks={"sm_mhz": 1980.0},
    ceilings={"matmul_tflops": 790.0, "copy_gbps": 4300.0},
    rows=[
        Row("forward", "1 x 512", "cuflash", ms=0.5, spread=0.01, tflops=600.0),
        Row("decode", "b 8", "torch flash", error="does not take this"),
        Row("accuracy", "1 x 512", "cuflash", more={"rms": 1e-3}),
    ],
    more={"device_check": {"passed": 3}},
)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = schema.write(RESULTS, tmp_path / "new")
    assert path.name == "h200-2026-01-02T030405-abc123.json"
    assert schema.read(path) == RESULTS
    assert [p.name for p in path.parent.iterdir()] == [path.name], "nothing else is left"
    assert schema.write(RESULTS, tmp_path / "named.json") == tmp_path / "named.json"


def test_the_file_has_the_members_that_its_readers_expect(tmp_path: Path) -> None:
    whole = json.loads(schema.write(RESULTS, tmp_path).read_text())
    assert {"commit", "clean", "gpu", "driver", "versions", "clocks", "ceilings", "rows"} <= set(whole)
    assert set(whole["ceilings"]) >= {"matmul_tflops", "copy_gbps"}
    timed, failed, _ = whole["rows"]
    assert set(timed) == {"op", "case", "impl", "ms", "spread", "tflops", "error"}
    assert set(failed) == {"op", "case", "impl", "ms", "spread", "error"} and failed["ms"] is None


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 0}', '{"schema": 1, "rows": [{"speed": 1}]}', '{"schema": 1}'])
def test_what_is_no_file_of_results_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json is no file of results"):
        schema.read(tmp_path / "x.json")


def test_a_row_with_an_error_has_no_time() -> None:
    with pytest.raises(ValueError, match="must have no time"):
        Row("forward", "1 x 512", "cuflash", ms=1.0, error="wrong result")


def test_the_commit_comes_from_its_name_from_git_or_from_a_stamp(tmp_path: Path) -> None:
    assert schema.commit_measured("abc") == ("abc", None)
    assert schema.commit_measured("abc-dirty") == ("abc", False)
    assert schema.commit_measured(checkout=tmp_path) == ("unknown", None)
    (tmp_path / "COMMIT").write_text("0123456789abcdef\n")
    assert schema.commit_measured(checkout=tmp_path) == ("0123456789ab", True)
    (tmp_path / "COMMIT").write_text("0123456789abcdef dirty\n")
    assert schema.commit_measured(checkout=tmp_path) == ("0123456789ab", False)

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    (tmp_path / "code.py").write_text("a = 1\n")
    git("init", "-q")
    git("add", "code.py")
    git("commit", "-q", "-m", "first")
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "x.json").write_text("{}")
    commit, clean = schema.commit_measured(checkout=tmp_path)
    assert git("rev-parse", "HEAD").startswith(commit) and len(commit) == 12
    assert clean is True, "a stamp and a result are no change of the code"
    (tmp_path / "code.py").write_text("a = 2\n")
    assert schema.commit_measured(checkout=tmp_path) == (commit, False)


def test_a_machine_without_a_gpu_is_described_by_what_it_stands_for() -> None:
    found = schema.describe(schema.HARNESS_TEST, commit="abc")
    assert found.gpu == "none (harness test)" and not found.on_gpu and found.driver is None
    assert {"numpy", "python", "cuflash"} <= set(found.versions)
