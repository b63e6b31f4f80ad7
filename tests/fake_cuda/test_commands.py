"""The command line's commands for a GPU, on the driver stand-in."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import report, schema

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cuflash", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)


def test_doctor_names_the_stand_in():
    said = run("doctor").stdout
    assert "none (driver stand-in)" in said, said


@pytest.mark.slow
def test_device_check_from_start_to_end(tmp_path):
    """Every stage runs, or says why not; what it writes is a file of results, of which no page is made."""
    done = run("device-check", "--minutes", "2", "--out", str(tmp_path))
    ended = dict(re.findall(r"^(\w+): (\w+),", done.stdout, re.MULTILINE))
    assert list(ended) == ["hopper", "primitives", "tests", "sanitizer", "benchmark"], done.stdout + done.stderr
    # The benchmark measures a GPU: where there is none, that stage cannot pass.
    assert ended.pop("benchmark") == "failed" and "cuflash bench: it saw no GPU" in done.stdout, done.stdout
    assert "failed" not in ended.values() and done.returncode == 1, done.stdout
    assert " right" in done.stdout and "0 failed" in done.stdout
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".gz", ".json", ".log"]
    (found,) = schema.read_all(tmp_path)
    assert found[1].gpu == schema.STAND_IN
    with pytest.raises(ValueError, match="tells of no GPU"):
        report.newest([found])
