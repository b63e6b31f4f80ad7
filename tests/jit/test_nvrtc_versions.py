"""Every kernel through several NVRTCs, each in an environment of its own, by: pytest -m slow -k nvrtc_versions

Each environment is made with venv and pip (about 200 MB), from the index pip is set up for.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
COMMON = ["numpy", "ml_dtypes", "rich", "typer", "nvidia-cuda-nvdisasm"]
VERSIONS = {
    "12.9": ["cuda-bindings==12.9.*", "nvidia-cuda-nvrtc-cu12==12.9.*"],
    "13.0": ["cuda-bindings==13.0.*", "nvidia-cuda-nvrtc==13.0.*"],
    "13": ["cuda-bindings==13.*", "nvidia-cuda-nvrtc==13.*"],  # the newest
}
EVERYTHING = ("sm_80", "sm_90a")
SAMPLE = ("sm_86", "sm_89", "sm_100a", "sm_120a")


def python_with(version: str, folder: Path) -> Path:
    """The Python of a new environment that holds this NVRTC and what `cuflash compile` needs."""
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    done = subprocess.run([*pip, *COMMON, *VERSIONS[version]], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"NVRTC {version} could not be installed: {done.stderr.strip().splitlines()[-1]}")
    return python


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "darwin", reason="NVRTC is not made for macOS")
@pytest.mark.parametrize("version", VERSIONS)
def test_every_kernel_compiles_without_spills(version: str, tmp_path: Path) -> None:
    python = python_with(version, tmp_path / "venv")
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CUFLASH_CACHE_DIR": str(tmp_path / "cache")}

    def run(*arguments: str) -> str:
        done = subprocess.run([str(python), *arguments], capture_output=True, text=True, env=env, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    found = run("-c", "from cuflash.jit import nvrtc; print(*nvrtc.version(), sep='.')").strip()
    assert found.startswith(version), "the environment has the NVRTC asked for"
    arches = [flag for name in (*EVERYTHING, *SAMPLE) for flag in ("--arch", name)]
    rows = json.loads(run("-m", "cuflash", "compile", "--json", *arches))
    assert {row["arch"] for row in rows} == {*EVERYTHING, *SAMPLE}
    bad = [
        row
        for row in rows
        if row["error"] or row["spill_stores"] or row["spill_loads"] or row["stack_bytes"] or row["warnings"]
        or row["sass"] is None or row["sass"]["LDL"] or row["sass"]["STL"]
        or bool(row["sass"]["HMMA"]) != row["kernel"].endswith("_sm80")
    ]  # fmt: skip
    slowest = max(rows, key=lambda row: row["compile_ms"] or 0)
    print(f"NVRTC {found}: {len(rows)} cubins, slowest {slowest['compile_ms']} ms: {slowest['variant']}")
    assert bad == []
