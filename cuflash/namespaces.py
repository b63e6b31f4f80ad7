"""The functions of an array's own framework, for what is computed by them: nothing is imported that the array is not
of."""

from __future__ import annotations

import importlib
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from .errors import ArgumentError

Array = Any  # of NumPy, CuPy, PyTorch or JAX

_NAMESPACES = {"numpy": "numpy", "cupy": "cupy", "torch": "torch", "jax": "jax.numpy", "jaxlib": "jax.numpy"}


def namespace(x: Array, name: str) -> Any:
    """The module with the functions for `x`, in which the four frameworks agree but for what is written below."""
    for cls in type(x).__mro__:
        module = _NAMESPACES.get(cls.__module__.partition(".")[0])
        if module is not None and hasattr(x, "reshape"):  # else a dtype, a size, a layer
            _require_plain(x, name, module)
            # Loaded already, with the array; compilers of PyTorch follow a look-up and no import.
            return sys.modules.get(module) or importlib.import_module(module)
    raise ArgumentError(
        f"{name} is a {type_name(x)}, not an array of NumPy, CuPy, PyTorch or JAX: wrap it with that framework's "
        "asarray or from_dlpack"
    )


def _require_plain(x: Array, name: str, module: str) -> None:
    """Refuses kinds of arrays on which the functions used here mean something else, or nothing."""
    if module == "numpy" and isinstance(x, np.matrix):
        raise ArgumentError(f"{name} is a numpy.matrix, which always has two dimensions: pass np.asarray({name})")
    if module == "torch" and (x.is_nested or str(x.layout) != "torch.strided"):
        raise ArgumentError(f"{name} is a nested or sparse tensor: pass a plain one, as {name}.values() or to_dense()")


def device_of(x: Array) -> AbstractContextManager[Any]:
    """Makes the device of `x` current where the framework would otherwise use another one: CuPy does."""
    return x.device if type(x).__module__.startswith("cupy") else nullcontext()


def type_name(x: Any) -> str:
    return f"{type(x).__module__}.{type(x).__qualname__}".removeprefix("builtins.")


def listed(x: Any, name: str) -> list[Any]:
    """The elements of a sequence, or of an array along its first dimension."""
    try:
        return list(x)
    except TypeError:
        raise ArgumentError(f"{name} is a {type_name(x)} and must be a sequence: pass a list") from None
    except MemoryError:
        raise ArgumentError(f"{name} has {len(x)} elements, for which memory has no room: pass fewer") from None


def functions_of(x: Any) -> Any:
    for cls in type(x).__mro__:
        module = _NAMESPACES.get(cls.__module__.partition(".")[0])
        if module is not None:
            return importlib.import_module(module)
    raise ArgumentError(f"a {type(x).__qualname__} is no array of NumPy, CuPy, PyTorch or JAX: convert it to one")


def arange(xp: Any, n: int, like: Any) -> Any:
    if xp.__name__ == "torch":
        return xp.arange(n, dtype=xp.int32, device=like.device)
    if xp.__name__ == "cupy":
        with like.device:
            return xp.arange(n, dtype=xp.int32)
    return xp.arange(n, dtype=xp.int32)
