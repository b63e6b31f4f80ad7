"""`flash_attn_with_kvcache` as an operation JAX knows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..array import HOST, Device, TensorView
from ..call import cache
from ..errors import ArgumentError, UnsupportedError
from ..frameworks import CacheOptions
from ..frameworks import jax as adapter
from ..settings import config
from ..trace import text
from ..trace.fold import numbers
from . import jax_call, jax_ffi
from .jax_call import Arrays, Lent, captured_array, cast, on_host, spec_of, varying

jax: Any = adapter.library()
jnp: Any = jax.numpy


@dataclass(frozen=True)
class CacheStatic:
    """What a call is compiled for, beside shapes and dtypes."""

    options: CacheOptions
    backend: str  # config.backend and config.arch when it was traced
    arch: str
    mods: str = ""
    scalars: tuple[int | float, ...] = ()


def attention_to_cache(
    arrays: Arrays, indices: dict[str, Any], options: CacheOptions, length: int | None, bound: Any
) -> tuple[Any, ...]:
    """`cuflash.flash_attn_with_kvcache` of JAX arrays -> out, lse if wanted, with new keys the new caches."""
    given, known = dict(arrays), {}
    for name, x in indices.items():
        if isinstance(x, (list, tuple, np.ndarray)):
            known[name] = x
        elif not isinstance(x, jax.Array):
            raise ArgumentError(f"{name} is a {type(x).__name__}: pass an int32 JAX array, a list or a NumPy array")
        elif not isinstance(x, jax.core.Tracer) and (on_host(x) or (config.check and x.is_fully_addressable)):
            known[name] = np.asarray(x)
        given[name] = jnp.asarray(x, jnp.int32) if isinstance(x, (list, tuple)) else jnp.asarray(x)
    if length is not None:  # as an array: a new number compiles nothing
        batch = indices["cu_seqlens_q"].shape[0] - 1 if "cu_seqlens_q" in indices else arrays["q"].shape[0]
        known["cache_seqlens"] = np.full(batch, length, np.int32)
        given["cache_seqlens"] = jnp.asarray(known["cache_seqlens"])
        options = options._replace(counted=False)
    static = CacheStatic(options, config.backend, config.arch)
    if bound is not None:
        static = CacheStatic(options, config.backend, config.arch, text.dumps(bound.mods), bound.scalars)
        for i, (slot, x) in enumerate(zip(bound.mods.arrays, bound.arrays, strict=True)):
            given[f"captured{i}"] = captured_array(slot.name, x)
    for name, x in arrays.items():
        if not isinstance(x, jax.Array):
            raise ArgumentError(
                f"{name} is a {type(x).__qualname__} and q a JAX array: all arrays must be of one framework; wrap it "
                "in jnp.asarray"
            )
        if not isinstance(x, jax.core.Tracer) and len(x.devices()) > 1:
            raise UnsupportedError(
                f"{name} is sharded over {len(x.devices())} devices: call flash_attn_with_kvcache inside of "
                "jax.shard_map, each device on its own sequences or heads"
            )
    inputs = tuple(spec_of(name, x) for name, x in given.items())
    prepared, _ = _cache_described(static, inputs, jax_call.target())  # what is wrong is said here, where the caller is
    cache.check_traced(prepared, {spec.name: spec.at(0, HOST, True) for spec in inputs}, known)
    axes = frozenset().union(*(varying(x) for x in given.values()))
    results = _cache_function(static, tuple(given))({name: cast(x, axes) for name, x in given.items()})
    wanted = ["out", "lse"] if options.lse else ["out"]
    return tuple(results[name] for name in (*wanted, "new_k_cache", "new_v_cache") if name in results)


@functools.lru_cache(maxsize=1024)
def _cache_function(static: CacheStatic, names: tuple[str, ...]) -> Callable[[Arrays], Arrays]:
    def call(arrays: Arrays) -> Arrays:
        inputs = tuple(spec_of(name, arrays[name]) for name in names)
        _, description = _cache_described(static, inputs, jax_call.target())
        found = jax_ffi.call(description, [arrays[name] for name in names])
        axes = varying(arrays["q"])
        return {spec.name: cast(x, axes) for spec, x in zip(description.results, found, strict=True)}

    mapped = jax.custom_batching.custom_vmap(call)

    @mapped.def_vmap
    def _(*_: Any) -> Any:
        raise UnsupportedError("flash_attn_with_kvcache under jax.vmap: its first axis is a batch already; use that")

    function = jax.custom_jvp(mapped)

    @function.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        raise UnsupportedError("flash_attn_with_kvcache has no gradient: to train, call cuflash.attention")

    return jax.jit(function, inline=True)


@functools.lru_cache(maxsize=4096)
def _cache_described(
    static: CacheStatic, inputs: tuple[jax_ffi.Spec, ...], device: Device
) -> tuple[Any, jax_ffi.Description]:
    prepared = _prepare_cache(static, inputs, device)
    results = [jax_ffi.Spec(*result) for result in prepared.results]
    if any(spec.name == "k" for spec in inputs):
        results += [spec._replace(name=f"new_{spec.name}") for spec in inputs if spec.name in ("k_cache", "v_cache")]
    if device != HOST:
        results += [jax_ffi.Spec(name, *what) for name, what in prepared.workspace.items()]
        for gpu in jax_call.gpus():  # nothing may compile or load while XLA records a graph
            prepared.load(gpu)
    keywords = asdict(static) | {"options": list(static.options)}
    return prepared, jax_ffi.Description("attention_to_cache", keywords, inputs, tuple(results))


def _prepare_cache(static: CacheStatic, inputs: tuple[jax_ffi.Spec, ...], device: Device) -> Any:
    mods = text.loads(static.mods) if static.mods else None
    views = {spec.name: spec.at(0, device, True) for spec in inputs}
    return cache.prepare_traced(Lent(0), views, static.options, mods, static.backend)


def _cache_operation(description: jax_ffi.Description, device: Device) -> jax_ffi.Run:
    keywords = dict(description.keywords)
    window, *rest = keywords.pop("options")
    static = CacheStatic(CacheOptions(tuple(window), *rest), **keywords)
    prepared = _prepare_cache(static, description.inputs, device)
    scalars = tuple(static.scalars)
    if static.mods:
        scalars = numbers(text.loads(static.mods), scalars, static.options.softcap)

    def run(views: dict[str, TensorView], stream: int) -> None:
        for name in ("k_cache", "v_cache"):
            if f"new_{name}" in views:  # the same memory, or a copy that XLA has made
                views[name] = views.pop(f"new_{name}")
        cache.execute_traced(Lent(stream), views, prepared, scalars)

    return run


jax_ffi.operations["attention_to_cache"] = _cache_operation
