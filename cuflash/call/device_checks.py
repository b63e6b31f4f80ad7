"""What only the device knows, copied back and checked: for `config.check`, and for arrays in host memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .. import reference
from ..array import Device, TensorView
from ..frameworks import Framework, cupy
from ..trace.expr import Mods
from ..trace.host import HostMods
from .arguments import LENGTHS
from .mods import captured_names


def download(framework: Framework, views: dict[str, TensorView], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Arrays of a call copied to the host, for `config.check`. Waits for the device."""
    return {
        name: x.as_numpy() if x.device[0] == "cpu" else cupy.download(x, framework.stream(x.device[1]))
        for name, x in ((name, views[name]) for name in names)
    }


def read_back(framework: Framework, views: dict[str, TensorView], device: Device) -> dict[str, np.ndarray]:
    """The values of device lengths, for `config.check`."""
    names = [n for n in (*LENGTHS, "page_table") if n in views and views[n].device[0] == "cuda"]
    return download(framework, views, names)


def check_indices(
    mods: Mods,
    scalars: tuple[int | float, ...],
    views: dict[str, TensorView],
    lengths: dict[str, np.ndarray],
    fetch: Callable[[Sequence[str]], dict[str, np.ndarray]],
    window: tuple[int, int],
    scale: float | None,
) -> None:
    """Refuses mods that read outside of an array they captured, where kernels would read at its end, for
    `config.check`. `lengths` are those among the views, `fetch` copies others to the host."""
    host = HostMods(mods, [*fetch(captured_names(mods, views)).values()], scalars)
    if host.reads_by_score:
        arrays: dict[str, Any] = {**fetch(["q", "k", "v"]), **lengths, **host.functions}
        reference.attention(**arrays, window_size=window, scale=scale)
        return
    sides = []
    for side in "qk":
        starts, used = lengths.get(f"cu_seqlens_{side}"), lengths.get(f"seqused_{side}")
        rows = views[side].shape
        whole = np.full(rows[0], rows[1]) if starts is None else np.diff(starts)
        sides.append((whole if used is None else used).tolist())
    host.check_indices([*zip(*sides, strict=True)], views["q"].shape[-2], window)
