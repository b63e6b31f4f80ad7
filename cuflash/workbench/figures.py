"""What attention kernels do, as data and drawn from it by matplotlib: masks and their tiles, the order in which blocks
visit them, who waits for whom, and the bytes that move. All of it is recorded or counted on the emulator.

A picture is a `matplotlib.figure.Figure`: shown as the value of a notebook's cell, kept by `figure.savefig("a.png")`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ..errors import ArgumentError
from ..settings import config

Array = Any

SHADE = 0.35  # over what is seen


def subplots(width: float, height: float) -> tuple[Any, Any, Any]:
    """pyplot, and a figure and axes of so many inches, which pyplot lets go of: a notebook would show them twice."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ArgumentError("pictures are drawn by matplotlib: pip install matplotlib") from error
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    plt.close(figure)
    return plt, figure, axes


@contextlib.contextmanager
def on_emulator(target: str) -> Iterator[None]:
    before = config.backend, config.arch
    config.backend, config.arch = "emulator", target
    try:
        yield
    finally:
        config.backend, config.arch = before
