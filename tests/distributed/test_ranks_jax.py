"""Context parallelism on a mesh axis of JAX."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import cuflash

pytest.importorskip("jax")

DEVICES = Path(__file__).with_name("jax_devices.py")


@pytest.mark.ranks
def test_four_devices(tmp_path):
    """In a process of its own: how many devices the CPU plays is settled when JAX starts."""
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": os.pathsep.join([str(Path(cuflash.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run([sys.executable, DEVICES], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "passed"
