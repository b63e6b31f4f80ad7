"""NumPy arrays: host memory. bfloat16 is `ml_dtypes.bfloat16`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import numpy as np

from ..array import Device, TensorView, empty_host, of_numpy
from ..dtypes import DType
from ..errors import ArgumentError

NAME: str = "NumPy"


def view(x: Any) -> TensorView:
    if not isinstance(x, np.ndarray):
        raise ArgumentError(f"a {type(x).__qualname__} is not an array: wrap it in np.asarray")
    if isinstance(x, np.ma.MaskedArray):
        raise ArgumentError("a masked array's mask would be lost: pass x.filled(0) and say what to ignore by seqused_k")
    return of_numpy(x)


def looks_on(*arrays: Any) -> bool:
    """NumPy never does."""
    return False


def refuse_transformed(arrays: dict[str, Any]) -> None:
    """NumPy arrays are never traced."""


def empty(shape: tuple[int, ...], dtype: DType, device: Device) -> TensorView:
    return of_numpy(empty_host(shape, dtype))


def wrap(view: TensorView) -> Any:
    return view.owner


def known(x: Any) -> np.ndarray | None:
    return np.asarray(x)


def written(x: Any) -> None:
    """Nothing records what was written."""


def stream(device: int) -> NoReturn:
    raise ArgumentError("NumPy arrays lie in host memory, which no stream serves")


def capturing(device: int) -> bool:
    return False


def draw_seed(device: Device) -> NoReturn:
    raise ArgumentError("seed is None, and dropout needs one: pass an int, as seed=int(rng.integers(2**63))")


def seed(x: Any) -> Any:
    return x


def upload(values: np.ndarray, device: Device) -> TensorView:
    return of_numpy(values)


def retain(views: Iterable[TensorView], device: int) -> None:
    """Work on the host is done when the call returns."""


def keep_recorded(views: Iterable[TensorView], device: int) -> None:
    """The host records no graphs."""


def cuda_version() -> None:
    return None


def advise(what: str, name: str) -> str:
    if what == "contiguous":
        return f"np.ascontiguousarray({name})"
    if what == "device":
        return f"cupy.asarray({name})"
    return f"{name}.astype({'ml_dtypes.bfloat16' if what == 'bfloat16' else f'np.{what}'})"
