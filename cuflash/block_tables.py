"""Blocks as arrays: lists of blocks, tables of what each block is, and their ways between frameworks."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from . import frameworks, mods
from .errors import require
from .mods.parts import named_as_needed, with_lengths
from .namespaces import arange, functions_of
from .trace.uncompiled import outside_of_compilers

Array = Any  # of NumPy, CuPy, PyTorch or JAX

EMPTY, PARTIAL, FULL = 0, 1, 2  # what a block is: no key seen, some, all


def ordered(seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many blocks of each row are true, and the columns, those of true blocks first."""
    return seen.sum(-1, dtype=np.int32), np.argsort(~seen, -1, kind="stable").astype(np.int32)


@outside_of_compilers
def table_of(table: Array, kind: int, prefix: str, count: Array, indices: Array, columns: int) -> Array:
    """`table` [..., rows, columns] uint8 (None: of zeros) with `kind` where a list of blocks says so."""
    for name, x in ((f"{prefix}kv_num_blocks", count), (f"{prefix}kv_indices", indices)):
        require(
            hasattr(x, "dtype") and "int" in str(x.dtype),
            f"{name} is a {type(x).__qualname__}: pass integers in an array",
        )
    require(
        tuple(count.shape) == tuple(indices.shape[:-1]),
        f"{prefix}kv_num_blocks.shape={tuple(count.shape)} must be that of {prefix}kv_indices but for its last axis, "
        f"{tuple(indices.shape)}",
    )
    xp, shape = functions_of(indices), (*indices.shape[:-1], columns + 1)
    if xp is np:
        listed = np.arange(indices.shape[-1]) < count[..., None]
        bad = indices[listed & ((indices < 0) | (indices >= columns))]
        require(
            not bad.size, f"{prefix}kv_indices has {bad[:1]}: blocks go from 0 to {columns - 1}, of the keys' length"
        )
    entries = arange(xp, indices.shape[-1], indices)
    # One column more takes what is not listed.
    place = xp.where(entries < count[..., None], indices, 0 * indices + columns)
    if xp.__name__ == "torch":
        new = xp.zeros(shape, dtype=xp.uint8, device=indices.device).scatter(-1, place.long(), kind)
    elif xp.__name__ == "jax.numpy":
        new = xp.put_along_axis(xp.zeros(shape, xp.uint8), place, xp.uint8(kind), -1, inplace=False)
    else:
        new = xp.zeros_like(place, dtype=xp.uint8, shape=shape)
        flat = place.reshape(-1, place.shape[-1])
        new.reshape(-1, columns + 1)[arange(xp, len(flat), place)[:, None], flat] = kind
    new = new[..., :columns]
    return new if table is None else xp.maximum(table, new)


def mod_of_table(table: Array, block: tuple[int, int], mask_mod: Any) -> Callable[..., Any]:
    """The mask that a table of blocks [B, H, q blocks, kv blocks] is, with `mask_mod` in those that are partly seen."""
    one_b, one_h = table.shape[0] == 1, table.shape[1] == 1
    q_size, kv_size = block
    inner, all_full = with_lengths("mask_mod", mask_mod), mask_mod is mods.noop_mask

    def block_table_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any, q_len: Any = None, kv_len: Any = None) -> Any:
        row, column = (q_idx // q_size).clip(0, None), (kv_idx // kv_size).clip(0, None)  # seen to be no negative ones
        kind = table[0 if one_b else b, 0 if one_h else h, row, column]
        if all_full:
            return kind != 0
        return (kind == 2) | ((kind == 1) & inner(b, h, q_idx, kv_idx, q_len, kv_len))  # FULL, PARTIAL

    return named_as_needed(block_table_mask, (mask_mod,))


def write_orders(kinds: np.ndarray, descending: bool) -> tuple[np.ndarray, np.ndarray]:
    """In which order blocks of keys add to the gradient of each block of queries, as PyTorch's `dq_write_order` and
    `dq_write_order_full` say it: int32 [B, H, kv blocks, q blocks], beside `q_indices` and `full_q_indices`."""
    seen = (kinds != EMPTY).astype(np.int32)
    total = seen.cumsum(-1, dtype=np.int32)
    rank = total - seen
    if descending:
        rank = total[..., -1:] - 1 - rank
    by_column = rank.swapaxes(2, 3)
    partial, full = (
        np.take_along_axis(by_column, ordered((kinds == kind).swapaxes(2, 3))[1], -1) for kind in (PARTIAL, FULL)
    )
    return partial, full


# Between NumPy and the other frameworks -------------------------------------------------------------------------------


def on_host(x: Any) -> np.ndarray:
    """A copy in NumPy. Waits for a device."""
    if isinstance(x, (np.ndarray, list, tuple)):
        return np.asarray(x)
    framework = frameworks.of(x, "index")
    if framework is frameworks.torch:
        return frameworks.torch.to_host(x)
    return x.get() if framework is frameworks.cupy else np.asarray(x)


def like(values: np.ndarray, x: Any) -> Array:
    """NumPy values in the framework and on the device of x."""
    xp = functions_of(x)
    if xp is np:
        return values
    if xp.__name__ == "jax.numpy":
        import jax

        # What jit traces with has no device yet.
        return xp.asarray(values, device=None if isinstance(x, jax.core.Tracer) else next(iter(x.devices())))
    return placed(values, x.device)


def as_used(values: np.ndarray, captured: tuple[Any, ...]) -> Array:
    """NumPy values where a mask has its arrays: of their framework and on their device. One that has none: tensors on
    PyTorch's current accelerator, else its CPU, where the program uses PyTorch; else as they are."""
    for x in captured:
        return like(values, x)
    torch = sys.modules.get("torch")
    if torch is None:
        return values
    return placed(values, torch.accelerator.current_accelerator() or "cpu")


def moved(x: Array, device: Any) -> Array:
    """An array on another device."""
    checked_device(device, there=True)
    return x.to(device) if hasattr(x, "to") else placed(on_host(x), device)


def checked_device(device: Any, there: bool = False) -> Any:
    """The same, if it is what `placed` takes; with `there` also of this machine. Else raises ArgumentError."""
    root = type(device).__module__.partition(".")[0]
    known = device is None or isinstance(device, str)
    if root == "cupy":
        import cupy

        known = isinstance(device, cupy.cuda.Device)
    elif root in ("jax", "jaxlib"):
        import jax

        known = isinstance(device, (jax.Device, jax.sharding.Sharding))
    elif root == "torch" or isinstance(device, (str, int)):
        known = known if "torch" not in sys.modules else _known_to_torch(device, there)
    require(
        known,
        f"device={device!r} must be a PyTorch, CuPy or JAX device of this machine, or the name of one of PyTorch's, "
        "such as 'cuda:0'; leave it away for the device of the arrays that the mask reads",
    )
    return device


def _known_to_torch(device: Any, there: bool) -> bool:
    import torch

    try:
        found = torch.device(device)
        if there:
            torch.empty(0, device=found)
    except (TypeError, ValueError, OverflowError, RuntimeError, AssertionError):
        return False
    return True


def placed(values: np.ndarray, device: Any) -> Array:
    """NumPy values on a device: of PyTorch by its name or object, of CuPy or JAX by its object; None: as they are."""
    root = type(device).__module__.partition(".")[0]
    if device is None:
        return values
    if root == "cupy":
        import cupy

        with device:
            return cupy.asarray(values)
    if root in ("jax", "jaxlib"):
        import jax

        return jax.device_put(values, device)
    if root == "builtins" and importlib.util.find_spec("torch") is None:
        return values  # a name such as "cpu", without the framework whose name it is
    import torch

    checked_device(device, there=True)
    return torch.from_numpy(np.ascontiguousarray(values)).to(device)
