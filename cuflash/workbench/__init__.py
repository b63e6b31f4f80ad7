"""Prototyping kernels by hand: edit, run, check, see what it costs and why. With a GPU or without.

    from cuflash import workbench

    base = workbench.load("forward_sm80", q, k, v, causal=True)    # one of our kernels, and the call that runs it
    print(base.function("OnlineSoftmax::update"))
    mine = base.replace_function("OnlineSoftmax::update", text)    # another version; base stays as it is
    mine.check()                                                   # right? and where not: the worst element
    mine.counters()                                                # of the emulator: bytes, bank conflicts ...
    mine.resources("sm_90a")                                       # registers, spills, occupancy: by NVRTC, anywhere
    mine.diff(base)                                                # what changed

`kernel` takes a text of your own. In IPython, Jupyter and VS Code, `%load_ext cuflash.workbench` brings two magics,
`%%cuflash_kernel` and `%%cuflash_mod`, whose messages point at the cell's lines.

What is compiled and run is so in a child process with a time limit: an endless loop or a crash ends that process alone.

`plot_mask`, `plot_visits`, `plot_timeline` and `plot_bytes` draw what attention kernels do.
"""

from __future__ import annotations

from typing import Any

from .kernel import Kernel, kernel
from .ours import load
from .plots_bytes import Traffic, bytes_moved, plot_bytes
from .plots_mask import plot_mask
from .plots_timeline import Bar, Timeline, plot_timeline, timeline
from .plots_visits import Visit, plot_visits, visits
from .report import Check, Compared, Counts, Diff, MachineCode, Resources, Timing
from .worker import Stopped

__all__ = [
    "Bar",
    "Check",
    "Compared",
    "Counts",
    "Diff",
    "Kernel",
    "MachineCode",
    "Resources",
    "Stopped",
    "Timeline",
    "Timing",
    "Traffic",
    "Visit",
    "bytes_moved",
    "kernel",
    "load",
    "plot_bytes",
    "plot_mask",
    "plot_timeline",
    "plot_visits",
    "timeline",
    "visits",
]


def load_ipython_extension(ipython: Any) -> None:
    """What `%load_ext cuflash.workbench` calls."""
    from . import magics

    magics.register(ipython)
