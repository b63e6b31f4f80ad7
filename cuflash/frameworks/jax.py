"""JAX arrays. They are immutable: results are written into memory nobody has seen yet, then handed to JAX.

Concrete arrays on the host, all on one device, are read where they lie; results are NumPy's memory, aligned so that JAX
adopts it without a copy. What JAX traces, and arrays on GPUs or several devices, are `autograd/`'s work, where XLA
owns all memory. On a GPU what is left for here allocates with CuPy and is handed over by DLPack, which orders the two
libraries' streams.
"""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np

from ..array import HOST, Device, TensorView, dlpack_device, from_dlpack
from ..errors import ArgumentError, UnsupportedError
from . import cupy as _cupy
from . import dlpack as _dlpack

NAME: str = "JAX"


def library() -> Any:
    import jax  # at the first array, never earlier

    return jax


stream, capturing, upload, empty = _dlpack.stream, _dlpack.capturing, _dlpack.upload, _dlpack.empty
retain, keep_recorded = _cupy.retain_until_done, _cupy.keep_recorded


def view(x: Any) -> TensorView:
    jax = library()
    if isinstance(x, jax.core.Tracer):
        raise UnsupportedError(
            "jax is tracing it (jit, grad, vmap, scan ...), and this call needs concrete arrays: call it outside of "
            "the transformation; cuflash.attention is served under all of them"
        )
    if not isinstance(x, jax.Array):
        raise ArgumentError(f"a {type(x).__qualname__} is not an array: wrap it in jnp.asarray")
    refuse_key(x)
    if len(x.devices()) > 1:
        raise UnsupportedError(
            f"it is sharded over {len(x.devices())} devices: bring it to one with jax.device_put(x, device)"
        )
    device = dlpack_device(x)
    if device == HOST:
        x.block_until_ready()  # JAX computes on the host asynchronously as well
        borrowed = from_dlpack(x)
    else:
        borrowed = from_dlpack(x, stream=stream(device[1]) or 1)
    borrowed.readonly = True  # its capsules do not say so
    return borrowed


def looks_on(*arrays: Any) -> bool:
    """JAX does where it traces, and at arrays on GPUs or on several devices: XLA orders all their work."""
    jax = library()
    return any(isinstance(x, jax.Array) and (isinstance(x, jax.core.Tracer) or not _on_one_host(x)) for x in arrays)


def _on_one_host(x: Any) -> bool:
    devices = x.devices()
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


def refuse_transformed(arrays: dict[str, Any]) -> None:
    """`view` refuses every tracer, and no other JAX array has a gradient."""


def wrap(view: TensorView) -> Any:
    jax = library()
    if view.device == HOST:
        return jax.device_put(view.owner, jax.devices("cpu")[0], may_alias=True)
    return jax.dlpack.from_dlpack(view.owner)


def known(x: Any) -> np.ndarray | None:
    refuse_key(x)
    return None if traced(x) or not _on_one_host(x) else np.asarray(x)


def traced(x: Any) -> bool:
    return isinstance(x, library().core.Tracer)


def refuse_key(x: Any, name: str = "") -> None:
    jax = library()
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        raise ArgumentError(
            f"{name and f'{name}: '}dtype {x.dtype} is that of keys of jax.random, which are no numbers: pass what "
            "jax.random draws with one, or one key as seed="
        )


def seed(x: Any) -> Any:
    """Of a key of jax.random, of either kind, the 32 bits it draws, where it is."""
    jax = library()
    if not isinstance(x, jax.Array):
        return x
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        if x.shape != ():
            raise ArgumentError(
                f"seed is an array of keys, of shape {x.shape}, and must be one key: pass seed[0], or for a mask an "
                "example jax.vmap over keys and examples"
            )
    elif not (x.dtype == "uint32" and x.ndim == 1 and x.shape[0] > 1):  # as the keys of jax.random.PRNGKey are
        return x
    try:
        return jax.random.bits(x, (1,), "uint32")
    except (TypeError, ValueError):  # as many numbers as no key has
        return x


def written(x: Any) -> None:
    """Never called: `out=` is refused, as JAX arrays are immutable."""


def draw_seed(device: Device) -> NoReturn:
    raise ArgumentError("seed is None, and dropout needs one: pass an int, or a key of jax.random, new for every step")


def cuda_version() -> None:
    return None


def advise(what: str, name: str) -> str:
    if what == "contiguous":
        return f"jnp.array({name})"
    if what == "device":
        return f"jax.device_put({name}, jax.devices('cuda')[0])"
    return f"{name}.astype(jnp.{what})"
