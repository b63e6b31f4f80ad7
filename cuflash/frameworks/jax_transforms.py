"""Attention as an operation JAX knows: under jit, grad, vmap, scan, checkpoint, shard_map and sharded arrays.

From the inside out: `jax_ffi.call` is what a compiled program runs, on the arrays of one device. `custom_partitioning`
splits it over devices by batch and heads, `custom_vmap` folds a mapped axis into the batch, `custom_jvp` refuses second
derivatives by name, `custom_vjp` gives the first. Each layer is built once for a set of static keywords, so that JAX
finds what it traced and compiled before. Nothing here reads a value on a device.

Importing this module imports JAX; only `jax.py` does so, once an array asks for it.
"""

from __future__ import annotations

import functools
import importlib
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .. import dtypes
from ..array import HOST, Device, TensorView
from ..errors import ArgumentError, UnsupportedError
from ..settings import config
from ..trace import text
from ..trace.expr import leaves
from ..trace.fold import numbers
from . import CacheOptions, calls, jax_ffi
from . import jax as _adapter

jax: Any = _adapter._jax()
jnp: Any = jax.numpy
custom_partitioning: Any = importlib.import_module("jax.experimental.custom_partitioning").custom_partitioning
NamedSharding, PartitionSpec = jax.sharding.NamedSharding, jax.sharding.PartitionSpec

Arrays = dict[str, Any]  # by name

# Every array of a call by its dimensions, dense: batch, s and t rows of q and k, heads of q, g heads of k, d and e head
# dims. Packed arrays have no batch: their s and t are the rows of all sequences. n: never split.
_DIMS = {
    "q": "b s h d", "k": "b t g d", "v": "b t g e",
    "cu_seqlens_q": "n", "cu_seqlens_k": "n", "seqused_q": "b", "seqused_k": "b",
    "alibi_slopes": "b h", "sink": "h", "seed": "n", "offset": "n",
    "out": "b s h e", "lse": "b h s", "max_logit": "b h s", "dout": "b s h e", "dlse": "b h s",
    "dq": "b s h d", "dk": "b t g d", "dv": "b t g e", "dsink": "h", "dslopes": "b h",
}  # fmt: skip
_LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")
_SECOND = (
    "cuflash.attention has first derivatives in reverse alone, by jax.grad, jax.vjp and jax.value_and_grad: for others "
    "use jax.nn.dot_product_attention"
)


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


def attention(
    q: Any, k: Any, v: Any, *, alibi_slopes: Any, sink: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, seqused_q: Any,
    seqused_k: Any, page_table: None = None, dropout_p: float = 0.0, seed: Any = None, offset: Any = 0,
    bound: Any = None, **keywords: Any,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """`cuflash.attention` of JAX arrays -> (out, lse, max_logit); gradients flow through out and lse."""
    floats = {"q": q, "k": k, "v": v, "alibi_slopes": alibi_slopes, "sink": sink}
    lengths = dict(zip(_LENGTHS, (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k), strict=True))
    floats, lengths = ({n: x for n, x in part.items() if x is not None} for part in (floats, lengths))
    for name, x in floats.items():
        if not isinstance(x, jax.Array):
            raise ArgumentError(
                f"{name} is a {type(x).__qualname__} and q a JAX array: all arrays must be of one framework; wrap it "
                "in jnp.asarray"
            )
    static = Static(**keywords, dropout_p=dropout_p, backend=config.backend, arch=config.arch)
    whole = _known_lengths(floats, lengths)
    if bound is not None:
        static = _replaced(static, mods=text.dumps(bound.mods), scalars=bound.scalars)
        for i, (slot, x) in enumerate(zip(bound.mods.arrays, bound.arrays, strict=True)):
            (floats if slot.dtype.is_float else whole)[f"captured{i}"] = _captured(slot.name, x)
    if dropout_p:
        whole |= {"seed": _random_number("seed", seed), "offset": _random_number("offset", offset)}
    _description("attention", static, floats | whole)  # what is wrong is said here, where the caller is
    if config.check and bound is not None:
        _check_known(bound, floats | whole, static)
    # Under shard_map, every array varies over the axes that any varies over; the gradient of one that did not is
    # summed over them by the transpose of this cast.
    axes = frozenset().union(*(_varying(x) for x in (floats | whole).values()))
    floats, whole = ({n: _cast(x, axes) for n, x in part.items()} for part in (floats, whole))
    try:
        results = _differentiable(static)(floats, whole)
    except TypeError as error:
        if "jvp" not in str(error):
            raise
        raise UnsupportedError(f"jax.jvp, jax.jacfwd: {_SECOND}") from error
    return results["out"], results.get("lse"), results.get("max_logit")


def _captured(name: str, x: Any) -> Any:
    if isinstance(x, np.ndarray) and x.ndim == 0:
        return jnp.asarray(x)
    if not isinstance(x, jax.Array):
        raise ArgumentError(
            f"{name}, which a mod captured, is a {type(x).__qualname__} and q a JAX array: all arrays must be of one "
            "framework; wrap it in jnp.asarray"
        )
    return x


def _known_lengths(floats: Arrays, lengths: Arrays) -> Arrays:
    """Lengths as JAX arrays; values that are at hand are checked."""
    known: Arrays = {}
    for name, x in lengths.items():
        if isinstance(x, (list, tuple, np.ndarray)):
            known[name] = x
        elif not isinstance(x, jax.Array):
            raise ArgumentError(f"{name} is a {type(x).__qualname__}: pass an int32 JAX array, a list or a NumPy array")
        elif not isinstance(x, jax.core.Tracer) and (_on_host(x) or (config.check and x.is_fully_addressable)):
            known[name] = np.asarray(x)
    views = {side: _spec(side, floats[side]).at(0, HOST, True) for side in "qk"}
    return lengths | {name: jnp.asarray(x) for name, x in calls["known_lengths"](views, known).items()}


def _check_known(bound: Any, arrays: Arrays, static: Static) -> None:
    """Refuses mods that read outside of an array, where all it takes to know is at hand."""
    if not any(isinstance(x, jax.core.Tracer) or not x.is_fully_addressable for x in arrays.values()):
        views = {name: _spec(name, x).at(0, HOST, True) for name, x in arrays.items()}
        known = {name: np.asarray(x) for name, x in arrays.items()}
        calls["check_known"](bound, views, known, static.scale, static.window_size, static.softcap)


def _random_number(name: str, x: Any) -> Any:
    """Seed or offset of dropout as an array of one element: a new number compiles nothing."""
    if x is None:
        _adapter.draw_seed(HOST)
    x = _adapter.seed(x) if name == "seed" else x
    if isinstance(x, jax.Array):
        return x.reshape(1) if x.size == 1 else x
    if not isinstance(x, (int, np.integer)):
        raise ArgumentError(f"{name} is a {type(x).__qualname__}: pass an int, or an integer array of one element")
    x = int(x) % (2**32 if name == "offset" else 2**64)  # more of an offset is never used
    if x < 2**32:
        return jnp.asarray([x], jnp.uint32)
    if not jax.config.jax_enable_x64:
        raise ArgumentError(
            f"{name}={x} must be from 0 to 2**32 - 1 while JAX has no 64-bit integers: pass such a one, or set "
            'jax.config.update("jax_enable_x64", True)'
        )
    return jnp.asarray([x], jnp.uint64)


def _on_host(x: Any) -> bool:
    return all(device.platform == "cpu" for device in x.devices())


# Derivatives ------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def _differentiable(static: Static) -> Callable[[Arrays, Arrays], Arrays]:
    def forward(floats: Arrays, lengths: Arrays) -> Arrays:
        return _once_differentiable("attention", static)(floats | lengths)

    def rule_forward(floats: Arrays, lengths: Arrays) -> tuple[Arrays, Any]:
        with_lse = static if "lse" in static.aux else _replaced(static, aux=(*static.aux, "lse"))
        optional = (name for name in floats if name not in ("q", "k", "v", "sink"))
        # NOTE: what is known when traced travels as a shape. JAX remembers this function's result for each choice of
        # what is differentiated, but of its structure the last alone.
        wanted = {name: jnp.zeros(int(floats[name].perturbed)) for name in optional}
        floats, lengths = ({n: x.value for n, x in part.items()} for part in (floats, lengths))
        results = _once_differentiable("attention", with_lse)(floats | lengths)
        saved = {name: results[name] for name in ("out", "lse")}
        returned = {name: x for name, x in results.items() if name == "out" or name in static.aux}
        return returned, (floats, lengths, saved, wanted)

    def rule_backward(residuals: Any, cotangents: Arrays) -> tuple[Arrays, None]:
        floats, lengths, saved, wanted = residuals
        zero = {name for name, x in cotangents.items() if isinstance(x, jax.custom_derivatives.SymbolicZero)}
        if "max_logit" in cotangents and "max_logit" not in zero:
            raise UnsupportedError(
                "max_logit has no gradient: take jax.lax.stop_gradient(result.max_logit) where it enters the loss"
            )
        arrays = floats | lengths | saved
        if "out" in zero:
            arrays["dout"] = _cast(jnp.zeros_like(saved["out"]), _varying(saved["out"]))
        else:
            arrays["dout"] = cotangents["out"]
        if "lse" in cotangents and "lse" not in zero:
            arrays["dlse"] = cotangents["lse"]
        keywords = _replaced(static, aux=(), grads=tuple(sorted(name for name, x in wanted.items() if x.size)))
        found = _once_differentiable("attention_backward", keywords)(arrays)
        return {name: _as_typed(found.get(_gradient(name)), x) for name, x in floats.items()}, None

    differentiable = jax.custom_vjp(forward)
    differentiable.defvjp(rule_forward, rule_backward, symbolic_zeros=True)
    return jax.jit(differentiable, inline=True)


@functools.lru_cache(maxsize=1024)
def _once_differentiable(operation: str, static: Static) -> Callable[[Arrays], Arrays]:
    """Refuses by name what would differentiate a derivative, or the call without its `custom_vjp`."""
    function = jax.custom_jvp(_mappable(operation, static))

    @function.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        raise UnsupportedError(_SECOND)

    return function


def _replaced(static: Static, **changes: Any) -> Static:
    return Static(**(asdict(static) | changes))


# vmap -------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def _mappable(operation: str, static: Static) -> Callable[[Arrays], Arrays]:
    """A mapped axis of dense arrays is folded into the batch. Where the fold would mean something else (packed
    sequences, a sink, what mods capture or a gradient of them for each element, dropout and mods that know the batch
    index), one element is computed after another."""
    function = jax.custom_batching.custom_vmap(lambda arrays: _sharded(operation, static, arrays))

    @function.def_vmap
    def _(size: int, batched: tuple[dict[str, bool]], arrays: Arrays) -> tuple[Arrays, dict[str, bool]]:
        (mapped,) = batched
        for_each = mapped.get("sink", False) or (operation == "attention_backward" and "sink" in arrays)
        if static.mods:
            for_each |= "b" in _read_by_mods(static) or any(mapped[name] for name in arrays if _is_captured(name))
            for_each |= any(_is_captured(name) for name in static.grads)
        if for_each or "cu_seqlens_q" in arrays or static.dropout_p:
            rest = {name: x for name, x in arrays.items() if not mapped[name]}
            over = {name: x for name, x in arrays.items() if mapped[name]}
            results = jax.lax.map(lambda element: function(rest | element), over)
        else:
            batch = arrays["q"].shape[1 if mapped["q"] else 0]
            slopes = "alibi_slopes" in static.grads or mapped.get("alibi_slopes", False)
            folded = {}
            for name, x in arrays.items():
                if "b" in _DIMS.get(name, "") and (name != "alibi_slopes" or slopes or x.ndim - mapped[name] == 2):
                    x = x if mapped[name] else jnp.broadcast_to(x, (size, *x.shape))
                    if name == "alibi_slopes" and x.ndim == 2:  # one a head, for every sequence
                        x = jnp.broadcast_to(x[:, None], (size, batch, x.shape[-1]))
                    x = x.reshape(-1, *x.shape[2:])
                folded[name] = x
            results = {
                name: x.reshape(size, -1, *x.shape[1:]) if batch else x.reshape(size, 0, *x.shape[1:])
                for name, x in function(folded).items()
            }
            if "dslopes" in results and arrays["alibi_slopes"].ndim - mapped["alibi_slopes"] == 1:
                results["dslopes"] = results["dslopes"].sum(axis=1)
        return results, dict.fromkeys(results, True)

    return function


# Devices ----------------------------------------------------------------------------------------------------------


def _sharded(operation: str, static: Static, arrays: Arrays) -> Arrays:
    """The call on arrays that may be spread over devices, each of which computes its own sequences and heads."""
    if jax.sharding.get_abstract_mesh().manual_axes:  # shard_map has split them, into what each device computes
        return _call(operation, static, arrays)
    names = _in_order(arrays)
    description = _description(operation, static, arrays)
    results = [name for spec in description.results if (name := _result(spec.name, arrays))]
    dims = {name: _dims(name, arrays) for name in (*names, *results)}
    batch, heads_q, heads_kv = arrays["q"].shape[0], arrays["q"].shape[-2], arrays["k"].shape[-2]
    known = "bh" if static.dropout_p else _read_by_mods(static)  # by which a weight depends on its sequence and head

    def local(*parts: Any) -> tuple[Any, ...]:
        found = _call(operation, static, dict(zip(names, parts, strict=True)))
        return tuple(found[name] for name in results)

    def split(mesh: Any, spec: Any) -> tuple[Callable[..., Any], list[Any], list[Any]]:
        """What each device computes where q is split by `spec`, and how inputs and results are split."""
        given = dict(zip(dims["q"], (*spec, *(None,) * len(dims["q"])), strict=False))
        axes = {"b": _axes(given.get("b")), "h": _axes(given["h"])}
        for dim, counts in (("b", (batch,)), ("h", (heads_q, heads_kv))):
            devices = math.prod(mesh.shape[axis] for axis in axes[dim])
            if dim in known or any(n > 1 and n % devices for n in counts):
                axes[dim] = ()
        axes["g"] = axes["h"] if heads_kv > 1 else ()

        def summed(*parts: Any) -> tuple[Any, ...]:
            """A gradient of what several devices share is the sum of theirs."""
            found = []
            for name, x in zip(results, local(*parts), strict=True):
                own = {axis for dim in dims[name] for axis in axes.get(dim, ())}
                shared = tuple(axis for axis in (*axes["b"], *axes["h"]) if axis not in own)
                found.append(jax.lax.psum(x, shared) if shared else x)
            return tuple(found)

        specs = {name: PartitionSpec(*(axes.get(dim) or None for dim in dims[name])) for name in dims}
        return summed, [specs[name] for name in names], [specs[name] for name in results]

    parts = [arrays[name] for name in names]
    sharding = jax.typeof(arrays["q"]).sharding
    if sharding.mesh.explicit_axes:  # the types of the arrays say how they are split
        computed, taken, made = split(sharding.mesh, sharding.spec)
        parts = [jax.sharding.reshard(x, spec) for x, spec in zip(parts, taken, strict=True)]
        spread = jax.shard_map(computed, in_specs=tuple(taken), out_specs=tuple(made), check_vma=False)
        return dict(zip(results, spread(*parts), strict=True))

    def partition(mesh: Any, shapes: Any, _: Any) -> Any:
        computed, *specs = split(mesh, shapes[0].sharding.spec)
        taken, made = (tuple(NamedSharding(mesh, spec) for spec in side) for side in specs)
        return mesh, computed, made, taken

    # Query heads come in groups, one a key head: split between groups, they take their key heads with them.
    factor = {"h": "h" if heads_kv == 1 else "g" if heads_q == heads_kv else "(g r)"}
    texts = {
        name: " ".join(f"n_{name}_{i}" if dim == "n" else factor.get(dim, dim) for i, dim in enumerate(dims[name]))
        for name in dims
    }
    rule = " -> ".join(", ".join(texts[name] for name in side) for side in (names, results))
    free = "" if static.dropout_p else [f for f in "bhg" if f.replace("g", "h") not in known]
    whole = [f for f in dict.fromkeys(re.findall(r"\w+", rule)) if f not in free]  # in the order JAX numbers them
    sizes = {"r": heads_q // heads_kv} if "(g r)" in rule else {}
    partitioned = custom_partitioning(local)
    partitioned.def_partition(partition, sharding_rule=rule, need_replication_factors=tuple(whole), **sizes)
    return dict(zip(results, partitioned(*parts), strict=True))


def _dims(name: str, arrays: Arrays) -> tuple[str, ...]:
    """The dimensions of an array of this call."""
    if _is_captured(name):
        return ("n",) * arrays[name.removeprefix("d")].ndim
    dims = _DIMS[name].split()
    if name in ("alibi_slopes", "dslopes") and arrays["alibi_slopes"].ndim == 1:
        return ("h",)
    if "cu_seqlens_q" not in arrays:
        return tuple(dims)
    if name.startswith("seqused") or "slopes" in name:
        return ("n", *dims[1:])
    return tuple(dim for dim in dims if dim != "b")


def _is_captured(name: str) -> bool:
    """Whether an array is one that mods captured, or the gradient of one."""
    return name.startswith(("captured", "dcaptured"))


def _in_order(arrays: Arrays) -> list[str]:
    """The names of a call's arrays, always in the same order."""
    captured = sorted((name for name in arrays if _is_captured(name)), key=lambda name: int(name[len("captured") :]))
    return [name for name in _DIMS if name in arrays] + captured


def _gradient(name: str) -> str:
    return {"alibi_slopes": "dslopes"}.get(name, f"d{name}")


def _result(name: str, arrays: Arrays) -> str:
    """What a result below is here: ALiBi's slopes, beside a score_mod captured like the arrays before them, keep their
    own name. "" for workspace."""
    if name == f"dcaptured{sum(map(_is_captured, arrays))}":
        return "dslopes"
    return name if name in _DIMS or re.fullmatch(r"dcaptured\d+", name) else ""


@functools.lru_cache(maxsize=1024)
def _read_by_mods(static: Static) -> frozenset[str]:
    """The coordinates that mods read: "b", "h" and so on."""
    mods = text.loads(static.mods) if static.mods else None
    roots = () if mods is None else (root for root in (mods.score, mods.mask) if root is not None)
    return frozenset().union(*map(leaves, roots))


def _axes(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _varying(x: Any) -> frozenset[str]:
    """The axes of a shard_map over which a value differs between devices, as far as JAX keeps account of it."""
    aval = jax.typeof(x)
    kind = getattr(aval, "manual_axis_type", None)
    return frozenset(getattr(aval, "vma", ()) if kind is None else kind.varying)


def _as_typed(x: Any, like: Any) -> Any:
    """x split over devices as `like` is, where that is part of their types."""
    sharding = jax.typeof(like).sharding
    return jax.sharding.reshard(x, sharding.spec) if x is not None and sharding.mesh.explicit_axes else x


def _cast(x: Any, axes: frozenset[str]) -> Any:
    missing = tuple(sorted(axes - _varying(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


# The call ---------------------------------------------------------------------------------------------------------


def _call(operation: str, static: Static, arrays: Arrays) -> Arrays:
    description = _description(operation, static, arrays)
    found = jax_ffi.call(description, [arrays[spec.name] for spec in description.inputs])
    axes = _varying(arrays["q"])
    pairs = zip(description.results, found, strict=True)
    return {name: _cast(x, axes) for spec, x in pairs if (name := _result(spec.name, arrays))}


def _description(operation: str, static: Static, arrays: Arrays) -> jax_ffi.Description:
    inputs = tuple(_spec(name, arrays[name]) for name in _in_order(arrays))
    return _described(operation, static, inputs, _target())


@functools.lru_cache(maxsize=4096)
def _described(operation: str, static: Static, inputs: tuple[jax_ffi.Spec, ...], device: Device) -> jax_ffi.Description:
    """Checks the call by shapes and dtypes alone. On a GPU, XLA also owns the workspace."""
    prepared = _prepare(operation, static, inputs, device)
    results = [jax_ffi.Spec(*result) for result in prepared.results]
    if device != HOST:
        results += [jax_ffi.Spec(name, *what) for name, what in prepared.workspace().items()]
        for gpu in _gpus():  # nothing may compile or load while XLA records a graph
            prepared.load(gpu)
    return jax_ffi.Description(operation, asdict(static), inputs, tuple(results))


def _prepare(operation: str, static: Static, inputs: tuple[jax_ffi.Spec, ...], device: Device) -> Any:
    keywords = asdict(static)
    keywords |= {name: tuple(keywords[name]) for name in ("window_size", "aux", "grads")}
    keywords["mods"] = text.loads(static.mods) if static.mods else None
    del keywords["arch"], keywords["scalars"]
    return calls["prepare"](_Lent(0), {spec.name: spec.at(0, device, True) for spec in inputs}, **keywords)


def _spec(name: str, x: Any) -> jax_ffi.Spec:
    dtype = dtypes.BY_NAME.get(str(x.dtype))
    if dtype is None:
        _adapter.refuse_key(x, name)
        raise ArgumentError(f"{name}: {dtypes.unknown(x.dtype)}")
    return jax_ffi.Spec(name, tuple(x.shape), dtype)


@functools.cache
def _gpus() -> tuple[int, ...]:
    """Indices of this process's GPUs."""
    try:
        return tuple(device.local_hardware_id for device in jax.local_devices(backend="cuda"))
    except RuntimeError:  # JAX has no such backend here
        return ()


def _target() -> Device:
    """The device a traced call is checked for; one that ends up elsewhere is checked again there, when it runs."""
    return ("cuda", _gpus()[0]) if _gpus() and config.backend in ("auto", "cuda") else HOST


class _Lent:
    """The adapter of memory that XLA lends for one run, on its stream."""

    NAME = _adapter.NAME
    advise = staticmethod(_adapter.advise)
    cuda_version = staticmethod(_adapter.cuda_version)

    def __init__(self, stream: int) -> None:
        self._stream = stream

    def stream(self, device: int) -> int:
        return self._stream

    def empty(self, shape: tuple[int, ...], dtype: dtypes.DType, device: Device) -> TensorView:
        if device != HOST:
            raise UnsupportedError(
                "this program was traced where no GPU is, and has no workspace for one: trace it with a GPU at hand"
            )
        return _adapter.empty(shape, dtype, device)

    def keep_recorded(self, views: Any, device: int) -> None:
        """The workspace is XLA's."""

    def retain(self, views: Any, device: int) -> None:
        """XLA reuses memory in the order of its stream."""


def _operation(description: jax_ffi.Description, device: Device) -> jax_ffi.Run:
    """An operation of `jax_ffi`: prepared for one device, then run on any memory of it."""
    static = Static(**description.keywords)
    prepared = _prepare(description.operation, static, description.inputs, device)
    execute, scalars = calls["execute"], tuple(static.scalars)
    if static.mods:
        scalars = numbers(text.loads(static.mods), scalars, static.softcap)
    return lambda views, stream: execute(_Lent(stream), views, prepared, scalars)


jax_ffi.operations |= {"attention": _operation, "attention_backward": _operation}


# `flash_attn_with_kvcache` ----------------------------------------------------------------------------------------


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
        elif not isinstance(x, jax.core.Tracer) and (_on_host(x) or (config.check and x.is_fully_addressable)):
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
            given[f"captured{i}"] = _captured(slot.name, x)
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
    inputs = tuple(_spec(name, x) for name, x in given.items())
    prepared, _ = _cache_described(static, inputs, _target())  # what is wrong is said here, where the caller is
    calls["check_cache"](prepared, {spec.name: spec.at(0, HOST, True) for spec in inputs}, known)
    axes = frozenset().union(*(_varying(x) for x in given.values()))
    results = _cache_function(static, tuple(given))({name: _cast(x, axes) for name, x in given.items()})
    wanted = ["out", "lse"] if options.lse else ["out"]
    return tuple(results[name] for name in (*wanted, "new_k_cache", "new_v_cache") if name in results)


@functools.lru_cache(maxsize=1024)
def _cache_function(static: CacheStatic, names: tuple[str, ...]) -> Callable[[Arrays], Arrays]:
    def call(arrays: Arrays) -> Arrays:
        inputs = tuple(_spec(name, arrays[name]) for name in names)
        _, description = _cache_described(static, inputs, _target())
        found = jax_ffi.call(description, [arrays[name] for name in names])
        axes = _varying(arrays["q"])
        return {spec.name: _cast(x, axes) for spec, x in zip(description.results, found, strict=True)}

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
        for gpu in _gpus():  # nothing may compile or load while XLA records a graph
            prepared.load(gpu)
    keywords = asdict(static) | {"options": list(static.options)}
    return prepared, jax_ffi.Description("attention_to_cache", keywords, inputs, tuple(results))


def _prepare_cache(static: CacheStatic, inputs: tuple[jax_ffi.Spec, ...], device: Device) -> Any:
    mods = text.loads(static.mods) if static.mods else None
    views = {spec.name: spec.at(0, device, True) for spec in inputs}
    return calls["prepare_cache"](_Lent(0), views, static.options, mods, static.backend)


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
        calls["execute_cache"](_Lent(stream), views, prepared, scalars)

    return run


jax_ffi.operations["attention_to_cache"] = _cache_operation
