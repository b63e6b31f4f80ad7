"""The scripts of examples/ run, and print what they find. Each checks its own result."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from cuflash.cli import machine

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
PRINTED = {
    "cupy_arrays": r"out \S*ndarray \(2, 100, 8, 64\) float16",
    "flex_attention": r"out \(2, 4, 160, 32\), largest difference \d\.\de-0[5-9]",
    "learned_bias": r"learned +0\.00 +-0\.\d\d",
    "serving": r"9 steps, at most 6 of 32 pages in use",
    "shared_prefix": r"keys held: 315 instead of 1215",
    "training_jax": r"^compiling the step\nloss 2\.\d+ -> [01]\.\d+ in 40 steps",
    "training_pytorch": r"96 tokens in 6 sequences; a padded batch would compute 234\nloss 2\.\d+ -> 0\.\d+",
    "write_a_kernel": r"sectors beyond need +\S +14,336 +\S +0",
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_example_runs(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in re.findall(r"^import (torch|jax)$", script.read_text(encoding="utf-8"), re.MULTILINE):
        pytest.importorskip(name, reason=f"{name} is not installed")
    if script.stem == "write_a_kernel" and machine.cxx_compiler() is None:
        pytest.skip("there is no C++ compiler")
    runpy.run_path(str(script), run_name="__main__")
    assert re.search(PRINTED[script.stem], capsys.readouterr().out)


def test_every_example_is_listed() -> None:
    listed = re.findall(r"\]\((\w+)\.py\)", (EXAMPLES / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == [path.stem for path in SCRIPTS] == sorted(PRINTED)
