"""Any other producer of the DLPack protocol: borrowed, and answered with NumPy (host) or CuPy (device) arrays."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np

from ..array import HOST, Device, TensorView, dlpack_device, from_dlpack
from ..dtypes import DType
from ..errors import ArgumentError
from . import cupy as _cupy
from . import numpy as _numpy

NAME: str = "DLPack"

stream, capturing, upload = _cupy.stream, _cupy.capturing, _cupy.upload
seed = _numpy.seed
keep_recorded = _cupy.keep_recorded
retain = _cupy.retain_until_done  # the producer may reuse the memory on a stream of its own


def view(x: Any) -> TensorView:
    device = dlpack_device(x)
    try:
        if device == HOST:
            return from_dlpack(x)
        # The producer makes the stream that will read the memory wait for its own work. 0 is not a stream there: 1 is
        # the legacy default stream's name.
        return from_dlpack(x, stream=stream(device[1]) or 1)
    except BufferError as error:
        raise ArgumentError(f"a {type(x).__qualname__} would not export its memory: {error}") from error


def looks_on(*arrays: Any) -> bool:
    """The protocol knows arrays, not calls."""
    return False


def refuse_transformed(arrays: dict[str, Any]) -> None:
    """The protocol has no notion of a gradient."""


def empty(shape: tuple[int, ...], dtype: DType, device: Device) -> TensorView:
    return (_numpy if device == HOST else _cupy).empty(shape, dtype, device)


def wrap(view: TensorView) -> Any:
    return view.owner


def known(x: Any) -> np.ndarray | None:
    return view(x).as_numpy() if dlpack_device(x) == HOST else None


def written(x: Any) -> None:
    """Nothing records what was written."""


def draw_seed(device: Device) -> NoReturn:
    raise ArgumentError("seed is None, and dropout needs one: pass an int")


def cuda_version() -> None:
    return None


def advise(what: str, name: str) -> str:
    if what == "contiguous":
        return f"a contiguous copy of {name}"
    if what == "device":
        return f"a copy of {name} on a GPU"
    return f"{name} cast to {what}"
