"""JAX arrays. They are immutable: results are written into memory nobody has seen yet, then handed to JAX.

On the host that memory is NumPy's, aligned so that JAX adopts it without a copy; on a GPU it is CuPy's, handed over by
DLPack, which orders the two libraries' streams.
"""

from __future__ import annotations

from typing import Any, NoReturn

from ..array import HOST, Device, TensorView, dlpack_device, from_dlpack
from ..errors import ArgumentError, UnsupportedError
from . import cupy as _cupy
from . import dlpack as _dlpack

NAME: str = "JAX"


def _jax() -> Any:
    import jax  # at the first array, never earlier

    return jax


stream, capturing, upload, empty = _dlpack.stream, _dlpack.capturing, _dlpack.upload, _dlpack.empty
retain = _cupy.retain_until_done


def view(x: Any) -> TensorView:
    jax = _jax()
    if isinstance(x, jax.core.Tracer):
        raise UnsupportedError(
            "jax is tracing it (jit, grad, vmap, scan ...), and this call needs concrete arrays: call it outside of "
            "the transformation, pass jax.lax.stop_gradient of it under grad alone, or use jax.nn.dot_product_attention"
        )
    if not isinstance(x, jax.Array):
        raise ArgumentError(f"a {type(x).__qualname__} is not an array: wrap it in jnp.asarray")
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


def operation(*arrays: Any) -> None:
    """`view` refuses what JAX traces."""


def refuse_transformed(arrays: dict[str, Any]) -> None:
    """`view` refuses every tracer, and no other JAX array has a gradient."""


def wrap(view: TensorView) -> Any:
    jax = _jax()
    if view.device == HOST:
        return jax.device_put(view.owner, jax.devices("cpu")[0], may_alias=True)
    return jax.dlpack.from_dlpack(view.owner)


def written(x: Any) -> None:
    """Never called: `out=` is refused, as JAX arrays are immutable."""


def draw_seed(device: Device) -> NoReturn:
    raise ArgumentError(
        "seed is None, and dropout needs one: pass an int, or jax.random.bits(key, (1,)), new for every step"
    )


def cuda_version() -> None:
    return None


def advise(what: str, name: str) -> str:
    if what == "contiguous":
        return f"jnp.array({name})"
    if what == "device":
        return f"jax.device_put({name}, jax.devices('cuda')[0])"
    return f"{name}.astype(jnp.{what})"
