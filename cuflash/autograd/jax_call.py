"""What a compiled JAX program runs on the arrays of one device: described when it is traced, prepared where it runs."""

from __future__ import annotations

import functools
import re
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .. import dtypes
from ..array import HOST, Device, TensorView
from ..call.traced import execute_traced, prepare_traced
from ..errors import ArgumentError, UnsupportedError
from ..frameworks import jax as adapter
from ..settings import config
from ..trace import text
from ..trace.fold import numbers
from . import jax_ffi

jax: Any = adapter.library()
jnp: Any = jax.numpy

Arrays = dict[str, Any]  # by name


# Every array of a call by its dimensions, dense: batch, s and t rows of q and k, heads of q, g heads of k, d and e head
# dims. Packed arrays have no batch: their s and t are the rows of all sequences. n: never split.
DIMS = {
    "q": "b s h d", "k": "b t g d", "v": "b t g e",
    "cu_seqlens_q": "n", "cu_seqlens_k": "n", "seqused_q": "b", "seqused_k": "b",
    "alibi_slopes": "b h", "sink": "h", "seed": "n", "offset": "n",
    "out": "b s h e", "lse": "b h s", "max_logit": "b h s", "dout": "b s h e", "dlse": "b h s",
    "dq": "b s h d", "dk": "b t g d", "dv": "b t g e", "dsink": "h", "dslopes": "b h",
}  # fmt: skip


@dataclass(frozen=True)
class Static:
    """What a call is compiled for, beside shapes and dtypes."""

    max_seqlen_q: int | None
    max_seqlen_k: int | None
    scale: float | None
    window_size: tuple[int, int]
    softcap: float
    dropout_p: float
    deterministic: bool
    split_size: int | None
    aux: tuple[str, ...]
    backend: str  # config.backend and config.arch when it was traced
    arch: str
    grads: tuple[str, ...] = ()  # of a backward: arrays beside q, k, v and sink that want a gradient
    mods: str = ""  # as `trace.text` writes them
    scalars: tuple[int | float, ...] = ()  # that mods captured


def call(operation: str, static: Static, arrays: Arrays) -> Arrays:
    description = description_of(operation, static, arrays)
    found = jax_ffi.call(description, [arrays[spec.name] for spec in description.inputs])
    axes = varying(arrays["q"])
    pairs = zip(description.results, found, strict=True)
    return {name: cast(x, axes) for spec, x in pairs if (name := result_of(spec.name, arrays))}


def description_of(operation: str, static: Static, arrays: Arrays) -> jax_ffi.Description:
    inputs = tuple(spec_of(name, arrays[name]) for name in in_order(arrays))
    return _described(operation, static, inputs, target())


@functools.lru_cache(maxsize=4096)
def _described(operation: str, static: Static, inputs: tuple[jax_ffi.Spec, ...], device: Device) -> jax_ffi.Description:
    """Checks the call by shapes and dtypes alone. On a GPU, XLA also owns the workspace."""
    prepared = _prepare(operation, static, inputs, device)
    results = [jax_ffi.Spec(*result) for result in prepared.results]
    if device != HOST:
        results += [jax_ffi.Spec(name, *what) for name, what in prepared.workspace().items()]
        for gpu in gpus():  # nothing may compile or load while XLA records a graph
            prepared.load(gpu)
    return jax_ffi.Description(operation, asdict(static), inputs, tuple(results))


def _prepare(operation: str, static: Static, inputs: tuple[jax_ffi.Spec, ...], device: Device) -> Any:
    keywords = asdict(static)
    keywords |= {name: tuple(keywords[name]) for name in ("window_size", "aux", "grads")}
    keywords["mods"] = text.loads(static.mods) if static.mods else None
    del keywords["arch"], keywords["scalars"]
    return prepare_traced(Lent(0), {spec.name: spec.at(0, device, True) for spec in inputs}, **keywords)


def spec_of(name: str, x: Any) -> jax_ffi.Spec:
    dtype = dtypes.BY_NAME.get(str(x.dtype))
    if dtype is None:
        adapter.refuse_key(x, name)
        raise ArgumentError(f"{name}: {dtypes.unknown(x.dtype)}")
    return jax_ffi.Spec(name, tuple(x.shape), dtype)


@functools.cache
def gpus() -> tuple[int, ...]:
    """Indices of this process's GPUs."""
    try:
        return tuple(device.local_hardware_id for device in jax.local_devices(backend="cuda"))
    except RuntimeError:  # JAX has no such backend here
        return ()


def target() -> Device:
    """The device a traced call is checked for; one that ends up elsewhere is checked again there, when it runs."""
    return ("cuda", gpus()[0]) if gpus() and config.backend in ("auto", "cuda") else HOST


def on_host(x: Any) -> bool:
    return all(device.platform == "cpu" for device in x.devices())


def captured_array(name: str, x: Any) -> Any:
    if isinstance(x, np.ndarray) and x.ndim == 0:
        return jnp.asarray(x)
    if not isinstance(x, jax.Array):
        raise ArgumentError(
            f"{name}, which a mod captured, is a {type(x).__qualname__} and q a JAX array: all arrays must be of one "
            "framework; wrap it in jnp.asarray"
        )
    return x


def is_captured(name: str) -> bool:
    """Whether an array is one that mods captured, or the gradient of one."""
    return name.startswith(("captured", "dcaptured"))


def in_order(arrays: Arrays) -> list[str]:
    """The names of a call's arrays, always in the same order."""
    captured = sorted((name for name in arrays if is_captured(name)), key=lambda name: int(name[len("captured") :]))
    return [name for name in DIMS if name in arrays] + captured


def result_of(name: str, arrays: Arrays) -> str:
    """What a result below is here: ALiBi's slopes, beside a score_mod captured like the arrays before them, keep their
    own name. "" for workspace."""
    if name == f"dcaptured{sum(map(is_captured, arrays))}":
        return "dslopes"
    return name if name in DIMS or re.fullmatch(r"dcaptured\d+", name) else ""


def varying(x: Any) -> frozenset[str]:
    """The axes of a shard_map over which a value differs between devices, as far as JAX keeps account of it."""
    aval = jax.typeof(x)
    kind = getattr(aval, "manual_axis_type", None)
    return frozenset(getattr(aval, "vma", ()) if kind is None else kind.varying)


def cast(x: Any, axes: frozenset[str]) -> Any:
    missing = tuple(sorted(axes - varying(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


class Lent:
    """The adapter of memory that XLA lends for one run, on its stream."""

    NAME = adapter.NAME
    advise = staticmethod(adapter.advise)
    cuda_version = staticmethod(adapter.cuda_version)

    def __init__(self, stream: int) -> None:
        self._stream = stream

    def stream(self, device: int) -> int:
        return self._stream

    def empty(self, shape: tuple[int, ...], dtype: dtypes.DType, device: Device) -> TensorView:
        if device != HOST:
            raise UnsupportedError(
                "this program was traced where no GPU is, and has no workspace for one: trace it with a GPU at hand"
            )
        return adapter.empty(shape, dtype, device)

    def keep_recorded(self, views: Any, device: int) -> None:
        """The workspace is XLA's."""

    def retain(self, views: Any, device: int) -> None:
        """XLA reuses memory in the order of its stream."""


def _operation(description: jax_ffi.Description, device: Device) -> jax_ffi.Run:
    """An operation of `jax_ffi`: prepared for one device, then run on any memory of it."""
    static = Static(**description.keywords)
    prepared = _prepare(description.operation, static, description.inputs, device)
    scalars = tuple(static.scalars)
    if static.mods:
        scalars = numbers(text.loads(static.mods), scalars, static.softcap)
    return lambda views, stream: execute_traced(Lent(stream), views, prepared, scalars)


jax_ffi.operations |= {"attention": _operation, "attention_backward": _operation}
