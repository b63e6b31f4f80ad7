"""What users give to the workbench: kernels of their own as text, arrays, grids; each checked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .. import frameworks
from ..call import number_checks
from ..errors import ArgumentError, CuflashError
from ..jit import module
from . import text

Array = Any  # of NumPy, CuPy, PyTorch, JAX or any other producer of DLPack
SECONDS = 60.0  # that anything in the child process may take

# What a kernel of the user's own finds included.
PRELUDE = ("base.cuh", "hw/device.cuh", "hw/math.cuh", "hw/warp.cuh", "hw/matrix.cuh", "hw/async_copy.cuh")
_ENTRY = re.compile(
    r"^HW_KERNEL\((?P<threads>[^\n]*?)\)\s*(?P<name>\w+)\s*\(\s*HW_GRID_CONSTANT\s+(?P<params>\w+)\s+\w+\s*\)",
    re.MULTILINE,
)


def own_kernel(
    whole: str, threads: int | None, before: module.KernelSpec, label: str | None = None, first_line: int = 1
) -> tuple[str, module.KernelSpec, str]:
    """(name, spec, text with its prelude) of a kernel of the user's own, launched as one before."""
    require_text("text", whole)
    found = list(_ENTRY.finditer(whole))
    if len(found) != 1:
        raise ArgumentError(
            f"the text has {len(found)} kernels, and must have one, that begins a line: "
            "HW_KERNEL(threads) name(HW_GRID_CONSTANT Params p) { ... }"
        )
    name, asked = found[0]["name"], found[0]["threads"].strip()
    if threads is not None:
        threads = number_checks.count("threads", threads)
    else:
        constant = re.search(rf"\bconstexpr\s+(?:i32|u32|int)\s+{re.escape(asked)}\s*=\s*(\d+)\s*;", whole)
        digits = asked if asked.isdecimal() else constant[1] if constant else None
        if digits is None and not before.threads:
            raise ArgumentError(f"HW_KERNEL({asked}): threads= says how many that are; only a number can be read here")
        threads = int(digits or before.threads)
    file = before.source or f"{name}.cu"
    prelude = "".join(f"#include <{x}>\n" for x in PRELUDE)
    if not whole.startswith(prelude):  # the first time
        own = whole.startswith("#line")  # says itself whose lines these are
        label = text.check_label(file if label is None else label)
        whole = prelude + whole if own else f'{prelude}#line {first_line} "{label}"\n{whole}'
    return name, module.KernelSpec(file, name, found[0]["params"], None, threads, before.smem_bytes), whole


def like_result(name: str, expected: Any, result: np.ndarray) -> np.ndarray:
    """What a reference gave, in the shape of what the kernel wrote."""
    found = np.asarray(expected)
    try:
        return np.broadcast_to(found, result.shape)
    except ValueError:
        raise ArgumentError(
            f"reference gave {name} of shape {found.shape}: the kernel writes one of shape {result.shape}"
        ) from None


def grid_of(grid: int | Sequence[int]) -> tuple[int, int, int]:
    """One to three numbers of blocks, as three."""
    sizes: tuple[Any, ...] = tuple(grid) if isinstance(grid, (tuple, list)) else (grid,)
    known = all(isinstance(n, (int, np.integer)) and 0 < int(n) < 2**31 for n in sizes)
    if not 0 < len(sizes) <= 3 or not known:
        raise ArgumentError(f"grid={grid!r} must be one to three numbers of blocks, each at least 1 and below 2**31")
    x, y, z = (*map(int, sizes), 1, 1)[:3]
    return x, y, z


def require_text(name: str, x: Any) -> None:
    """Raises ArgumentError for what is no str."""
    if not isinstance(x, str):
        raise ArgumentError(f"{name} is a {type(x).__qualname__} and must be a str")


def require_mapping(arguments: Any) -> None:
    """Raises ArgumentError for what is no dict."""
    if not isinstance(arguments, Mapping):
        raise ArgumentError(
            f"arguments is a {type(arguments).__qualname__} and must be a dict: a value for each field of Params"
        )


def is_array(x: Any) -> bool:
    """Of any framework."""
    return hasattr(x, "shape") and not np.isscalar(x)


def to_host(x: Any, name: str) -> np.ndarray:
    """A copy in host memory, contiguous."""
    framework = frameworks.of(x, name)
    try:
        view = framework.view(x)
    except CuflashError as error:
        raise type(error)(f"{name}: {error}") from None
    if view.device[0] == "cpu":
        return np.array(view.as_numpy(), order="C")
    return np.array(frameworks.cupy.download(view, framework.stream(view.device[1])), order="C")
