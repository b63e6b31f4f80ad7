"""One adapter a framework: view its arrays, allocate its results, name its stream. Nothing else knows a framework.

An adapter is a module with the functions of `Framework`. None imports its framework before an array of it arrives:
which one that is shows in the array's type.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..array import Device, TensorView
from ..dtypes import DType
from ..errors import ArgumentError
from . import cupy, dlpack, jax, numpy, torch


class CacheOptions(NamedTuple):
    """What `flash_attn_with_kvcache` is given beside arrays and mods."""

    window: tuple[int, int]  # causal folded in
    scale: float | None
    softcap: float
    interleaved: bool
    num_splits: int
    split_size: int | None
    max_seqlen_q: int | None
    lse: bool
    counted: bool  # cache_seqlens is an int


class Framework(Protocol):
    """What an adapter offers."""

    NAME: str

    def view(self, x: Any) -> TensorView:
        """Borrow an array. Raises `ArgumentError` where its memory cannot be read in place."""
        ...

    def looks_on(self, *arrays: Any) -> bool:
        """Whether the framework has to see the call as one operation of its own: to differentiate, vectorise, trace or
        compile it. Some of the arrays may be None."""
        ...

    def refuse_transformed(self, arrays: dict[str, Any]) -> None:
        """Raise `UnsupportedError` if one of the named arrays wants a gradient, in a call that gives none."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: DType, device: Device) -> TensorView:
        """Uninitialised memory from the framework's own allocator."""
        ...

    def wrap(self, view: TensorView) -> Any:
        """The framework's array of memory that `empty` gave, once it is written."""
        ...

    def written(self, x: Any) -> None:
        """Tell the framework that the caller's own array was written in place."""
        ...

    def stream(self, device: int) -> int:
        """Address of the stream that is current on a CUDA device; 0 is the default stream."""
        ...

    def capturing(self, device: int) -> bool:
        """Whether that stream records a CUDA graph instead of running."""
        ...

    def draw_seed(self, device: Device) -> tuple[Any, Any]:
        """Seed and offset of dropout from the framework's own generator, an integer array of one element each.
        Raises `ArgumentError` where it has none, with what to pass."""
        ...

    def known(self, x: Any) -> np.ndarray | None:
        """The values of an array in NumPy; None where there are none yet, or reading them would wait for a device."""
        ...

    def seed(self, x: Any) -> Any:
        """A seed of dropout: the framework's own kind of random state as an integer array of one element, others as
        they are."""
        ...

    def upload(self, values: np.ndarray, device: Device) -> TensorView:
        """Copy small host values to a CUDA device, in order with the current stream, without waiting."""
        ...

    def retain(self, views: Iterable[TensorView], device: int) -> None:
        """Keep borrowed arrays alive until the work just launched is done, where the framework would not."""
        ...

    def keep_recorded(self, views: Iterable[TensorView], device: int) -> None:
        """Keep what a call took for itself (workspace) for good where the current stream records a CUDA graph, which
        will write there again whenever it is replayed, and whose end nobody can see."""
        ...

    def cuda_version(self) -> str | None:
        """The CUDA version the framework was built for, e.g. "13.0"; None if it does not matter."""
        ...

    def advise(self, what: str, name: str) -> str:
        """How to write, in the framework's words, what mends argument `name`: what is the NumPy name of a dtype to
        cast to, "contiguous", or "device" (a copy on a GPU)."""
        ...


_BY_ROOT: dict[str, Framework] = {"numpy": numpy, "cupy": cupy, "torch": torch, "jax": jax, "jaxlib": jax}


def of(array: Any, name: str = "q") -> Framework:
    """The adapter for an array; `name` is the argument's, for the error.

    >>> import numpy as np
    >>> of(np.zeros(3)).NAME
    'NumPy'
    """
    cls = type(array)
    # The usual types without a cache: torch.compile would look into one, and warn.
    return _BY_ROOT.get(cls.__module__.partition(".")[0]) or _of_type(cls) or _refuse(array, name)


def traced(x: Any) -> bool:
    """Whether x stands for a value that JAX knows once the program runs, and that Python cannot read."""
    return _of_type(type(x)) is jax and jax.traced(x)


@lru_cache(maxsize=256)
def _of_type(cls: type) -> Framework | None:
    for base in cls.__mro__:  # subclasses of a tensor may live in any module
        framework = _BY_ROOT.get(base.__module__.partition(".")[0])
        if framework is not None:
            return framework
    return dlpack if hasattr(cls, "__dlpack__") and hasattr(cls, "__dlpack_device__") else None


def _refuse(array: Any, name: str) -> Framework:
    raise ArgumentError(
        f"{name} is a {type(array).__qualname__}: pass a NumPy, CuPy, PyTorch or JAX array, or any object with "
        "__dlpack__ and __dlpack_device__"
    )
