"""`write_kv`: new keys and values into slots of a cache that the caller names, as serving engines keep them."""

from __future__ import annotations

import functools
import operator
from typing import Any

import numpy as np

from . import arch as arch_table
from . import dtypes, frameworks
from .array import TensorView
from .call.device_checks import download
from .call.prepare import widest_load
from .call.views import views_of
from .errors import ArgumentError, UnsupportedError, require
from .frameworks import Framework
from .settings import config
from .trace.uncompiled import outside_of_compilers

Array = Any
_CACHES = ("k_cache", "v_cache")


@outside_of_compilers
def write_kv(k: Array, v: Array, k_cache: Array, v_cache: Array, slot_mapping: Array) -> None:
    """Write the keys and values of tokens into a cache, in place: token i into slot `slot_mapping[i]`.

    k, v          [tokens, heads_kv, d], [tokens, heads_kv, d_v]; those behind the last slot are left
    k_cache       [num_pages, page_size, heads_kv, d], slot s being row s % page_size of page s // page_size; or
                  [slots, heads_kv, d]
    v_cache       likewise, d_v. Any strides with a unit last one: K and V may be interleaved in one array
    slot_mapping  int64 or int32 [slots]; a negative one is skipped

    All arrays are of one framework and dtype, float16, bfloat16 or float32, on one device; the slots may be a NumPy
    array or list beside arrays in host memory. What two tokens write to one slot is of either. Nothing is allocated and
    nothing waits, so that a CUDA graph may hold the call and read other slots at each replay.

    Raises `ArgumentError`, before anything is written, where shapes, dtypes or devices do not fit, and where the values
    of slots are known (in host memory, and under `config.check`) and one is behind the cache's end; elsewhere kernels
    skip such a slot. JAX arrays cannot be written to: `UnsupportedError`.

    >>> cache = np.zeros((2, 4, 1, 8), np.float32)  # two pages of four keys
    >>> new = np.ones((3, 1, 8), np.float32)
    >>> write_kv(new, 2 * new, cache, cache.copy(), np.array([5, -1, 0]))
    >>> np.argwhere(cache[:, :, 0, 0]).tolist()
    [[0, 0], [1, 1]]
    """
    framework = frameworks.of(k)
    if framework.NAME == "JAX":
        raise UnsupportedError(
            "k_cache is a JAX array, which cannot be written to: use flash_attn_with_kvcache, which returns the new "
            "caches, or k_cache.at[slots].set(k)"
        )
    given = {"k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache}
    views = views_of(framework, given, first="k")
    views["slot_mapping"] = _slots(framework, slot_mapping)
    _check(views)
    views |= {name: _in_pages(views[name]) for name in _CACHES}
    device = views["k"].device
    backend = _backend(device)
    slots = _known(framework, views)
    if slots is not None:
        _check_slots(slots, views["k_cache"])
    if backend == "reference":
        _write(views)
    else:
        from .ops import write_kv as kernel

        where: dict[str, Any] = {"arch": arch_table.named(config.arch)}
        if backend == "cuda":
            arch = frameworks.cupy.arch_of(device[1], framework.cuda_version())
            where = {"arch": arch, "device": device[1], "stream": framework.stream(device[1])}
        kernel.run(views, _load_bytes(views), backend=backend, **where)
        if backend == "cuda":
            framework.retain(views.values(), device[1])
    for name in _CACHES:
        framework.written(given[name])


def _slots(framework: Framework, x: Any) -> TensorView:
    if isinstance(x, (list, tuple)):
        try:
            x = np.array(x, np.int64) if len(x) else np.zeros(0, np.int64)
        except (TypeError, ValueError, OverflowError):
            raise ArgumentError(f"slot_mapping={x!r} must hold integers") from None
    if isinstance(x, np.ndarray):
        framework = frameworks.numpy
    return views_of(framework, {"slot_mapping": x}, first="k")["slot_mapping"]


def _in_pages(x: TensorView) -> TensorView:
    """A pool [slots, heads_kv, d] as pages of one slot."""
    if x.ndim == 4:
        return x
    (slots, *row), (step, *steps) = x.shape, x.strides
    return TensorView(x.ptr, (slots, 1, *row), (step, 0, *steps), x.dtype, x.device, x.readonly, x.owner)


def _check(views: dict[str, TensorView]) -> None:
    k, v, slots = views["k"], views["v"], views["slot_mapping"]
    require(k.ndim == 3, f"k.shape={k.shape} must be [tokens, heads_kv, d]")
    require(
        v.ndim == 3 and v.shape[:2] == k.shape[:2],
        f"v.shape={v.shape} must be [{k.shape[0]}, {k.shape[1]}, d_v], the tokens and heads of k",
    )
    require(
        k.dtype in dtypes.KERNEL,
        f"k.dtype={k.dtype} must be one of {', '.join(x.name for x in dtypes.KERNEL)}: cast it",
    )
    for name, new in zip(_CACHES, (k, v), strict=True):
        x = views[name]
        require(
            x.ndim in (3, 4) and x.shape[-2:] == new.shape[1:],
            f"{name}.shape={x.shape} must be [num_pages, page_size, {new.shape[1]}, {new.shape[2]}], or "
            f"[slots, {new.shape[1]}, {new.shape[2]}], of the heads and head dim of {name[0]}",
        )
        require(not x.readonly, f"{name} is read-only, and is written in place: pass a writable array")
    require(
        views["k_cache"].shape[:-1] == views["v_cache"].shape[:-1],
        f"v_cache.shape={views['v_cache'].shape} must have the pages and page size of k_cache, "
        f"{views['k_cache'].shape[:-2]}",
    )
    require(
        slots.ndim == 1 and slots.dtype in (dtypes.int32, dtypes.int64),
        f"slot_mapping is {slots.dtype} {slots.shape} and must be int64 or int32, [slots]",
    )
    require(
        slots.shape[0] <= k.shape[0],
        f"slot_mapping has {slots.shape[0]} slots and k {k.shape[0]} tokens: pass at most a slot for each token",
    )
    require(slots.ndim == 0 or slots.strides[0] == 1, "slot_mapping must be contiguous: pass slot_mapping.contiguous()")
    for name, x in views.items():
        require(
            x.device == k.device,
            f"{name} is on {x.device[0]} and k on {k.device[0]}: all arrays must be on one device",
        )
        if name == "slot_mapping":
            continue
        require(x.dtype is k.dtype, f"{name}.dtype={x.dtype} must equal k.dtype={k.dtype}: cast one of them")
        require(
            x.shape[-1] >= 1 and x.strides[-1] == 1 and min(x.strides) >= 0,
            f"{name}.strides={x.strides} (in elements) must end in 1 and not be negative: the elements of a row lie "
            "side by side",
        )


def _backend(device: tuple[str, int]) -> str:
    host = device[0] == "cpu"
    if config.backend == "auto":
        return "reference" if host else "cuda"
    require(
        host == (config.backend != "cuda"),
        f"k is {'in host memory' if host else 'on a GPU'} and config.backend={config.backend!r} runs elsewhere: set "
        "config.backend='auto'",
    )
    return config.backend


def _known(framework: Framework, views: dict[str, TensorView]) -> np.ndarray | None:
    """The slots, where the host has them or `config.check` asks for them."""
    kind, index = views["slot_mapping"].device
    # Reading waits for the device, which nothing may under capture.
    if kind == "cuda" and (not config.check or framework.capturing(index)):
        return None
    return download(framework, views, ["slot_mapping"])["slot_mapping"]


def _check_slots(slots: np.ndarray, cache: TensorView) -> None:
    most = cache.shape[0] * cache.shape[1]
    bad = np.flatnonzero(slots >= most)
    require(
        not len(bad),
        f"slot_mapping[{bad[0] if len(bad) else 0}]={slots[bad[0]] if len(bad) else 0} must be below {most}: the cache "
        f"has {cache.shape[0]} pages of {cache.shape[1]}; a negative one is skipped",
    )


def _write(views: dict[str, TensorView]) -> None:
    slots = views["slot_mapping"].as_numpy()
    tokens = np.flatnonzero(slots >= 0)
    at = np.divmod(slots[tokens], views["k_cache"].shape[1])
    for cache, new in zip(_CACHES, "kv", strict=True):
        views[cache].as_numpy()[at] = views[new].as_numpy()[tokens]


def _load_bytes(views: dict[str, TensorView]) -> int:
    """The widest load that every row of the four arrays is aligned to, and a whole number of."""
    arrays = [views[name] for name in ("k", "v", *_CACHES)]
    alignment = functools.reduce(operator.or_, (x.ptr for x in arrays))
    return widest_load(alignment, arrays[0].dtype.itemsize, [x.strides for x in arrays], [x.shape[-1] for x in arrays])
