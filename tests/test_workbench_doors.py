"""Fuzz of doors of the emulator and the workbench that run no kernel: a right result or a `CuflashError`.

As in test_front_door.py, whose draws these are.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from backends import using
from doors import Door
from test_front_door import check

import cuflash
from cuflash import emulator, workbench


@functools.cache
def trace() -> emulator.Trace:
    x = np.zeros((1, 40, 1, 64), np.float16)
    with using("emulator"), emulator.tracing() as found:
        cuflash.attention(x, x, x)
    return found


def title(**arguments: Any) -> np.ndarray:
    return np.array(workbench.plot_mask(**arguments).axes[0].get_title())


def rows(**arguments: Any) -> np.ndarray:
    return np.array(workbench.timeline(trace(), **arguments).rows)


DOORS = (
    Door("workbench.plot_mask", title, lambda: {
        "q_len": 9, "k_len": 12, "mask_mod": None, "causal": True, "window_size": (4, 0), "tile": (4, 4), "h": 0,
    }, kernels=False),
    Door("workbench.timeline", rows, lambda: {
        "block": (0, 0, 0), "launch": 0, "copy_ticks": 24, "product_ticks": 3, "shuffle_ticks": 6,
    }, kernels=False),
)  # fmt: skip


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.name)
def test_each_right_call_is_right(door: Door) -> None:
    door.call(**door.arguments())


def test_what_is_drawn(seed: int) -> None:
    for number in range(40):
        check(seed, number, DOORS)


@pytest.mark.slow
def test_what_is_drawn_deeply(seed: int) -> None:
    for number in range(4000):
        check(seed + 1, number, DOORS)
