"""Attention as an operation JAX knows: under jit, grad, vmap, scan, checkpoint, shard_map and sharded arrays.

From the inside out: `jax_ffi.call` is what a compiled program runs, on the arrays of one device. `custom_partitioning`
splits it over devices by batch and heads, `custom_vmap` folds a mapped axis into the batch, `custom_jvp` refuses second
derivatives by name, `custom_vjp` gives the first. Each layer is built once for a set of static keywords, so that JAX
finds what it traced and compiled before. Nothing here reads a value on a device.

Importing this module imports JAX; that is done once an array asks for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from ..array import HOST
from ..call import traced
from ..call.arguments import LENGTHS, Arguments
from ..errors import ArgumentError, UnsupportedError
from ..frameworks import jax as adapter
from ..settings import config
from ..trace import text
from ..trace.tracer import Bound
from .jax_cache import attention_to_cache as attention_to_cache
from .jax_call import DIMS, Arrays, Static, captured_array, cast, description_of, is_captured, on_host, spec_of, varying
from .jax_sharding import read_by_mods, sharded

jax: Any = adapter.library()
jnp: Any = jax.numpy

SECOND = (
    "cuflash.attention has first derivatives in reverse alone, by jax.grad, jax.vjp and jax.value_and_grad: for others "
    "use jax.nn.dot_product_attention"
)


def attention(q: Any, k: Any, v: Any, arguments: Arguments, bound: Bound | None) -> tuple[Any, Any, Any]:
    """`cuflash.attention` of JAX arrays and normalised arguments -> (out, lse, max_logit); gradients flow through
    out and lse."""
    floats = {"q": q, "k": k, "v": v, "alibi_slopes": arguments.alibi_slopes, "sink": arguments.sink}
    lengths = {name: getattr(arguments, name) for name in LENGTHS}
    floats, lengths = ({n: x for n, x in part.items() if x is not None} for part in (floats, lengths))
    for name, x in floats.items():
        if not isinstance(x, jax.Array):
            raise ArgumentError(
                f"{name} is a {type(x).__qualname__} and q a JAX array: all arrays must be of one framework; wrap it "
                "in jnp.asarray"
            )
    left, right = arguments.window_size
    assert left is not None and right is not None  # as `normalised` leaves it
    static = Static(
        arguments.max_seqlen_q, arguments.max_seqlen_k, arguments.scale, (left, right), arguments.softcap,
        arguments.dropout_p, arguments.deterministic, arguments.split_size, tuple(arguments.aux), config.backend,
        config.arch,
    )  # fmt: skip
    whole = _known_lengths(floats, lengths)
    if bound is not None:
        static = _replaced(static, mods=text.dumps(bound.mods), scalars=bound.scalars)
        for i, (slot, x) in enumerate(zip(bound.mods.arrays, bound.arrays, strict=True)):
            (floats if slot.dtype.is_float else whole)[f"captured{i}"] = captured_array(slot.name, x)
    if arguments.dropout_p:
        whole |= {"seed": _random_number("seed", arguments.seed), "offset": _random_number("offset", arguments.offset)}
    description_of("attention", static, floats | whole)  # what is wrong is said here, where the caller is
    if config.check and bound is not None:
        _check_known(bound, floats | whole, static)
    # Under shard_map, every array varies over the axes that any varies over; the gradient of one that did not is
    # summed over them by the transpose of this cast.
    axes = frozenset().union(*(varying(x) for x in (floats | whole).values()))
    floats, whole = ({n: cast(x, axes) for n, x in part.items()} for part in (floats, whole))
    try:
        results = _differentiable(static)(floats, whole)
    except TypeError as error:
        if "jvp" not in str(error):
            raise
        raise UnsupportedError(f"jax.jvp, jax.jacfwd: {SECOND}") from error
    return results["out"], results.get("lse"), results.get("max_logit")


def _known_lengths(floats: Arrays, lengths: Arrays) -> Arrays:
    """Lengths as JAX arrays; values that are at hand are checked."""
    known: Arrays = {}
    for name, x in lengths.items():
        if isinstance(x, (list, tuple, np.ndarray)):
            known[name] = x
        elif not isinstance(x, jax.Array):
            raise ArgumentError(f"{name} is a {type(x).__qualname__}: pass an int32 JAX array, a list or a NumPy array")
        elif not isinstance(x, jax.core.Tracer) and (on_host(x) or (config.check and x.is_fully_addressable)):
            known[name] = np.asarray(x)
    views = {side: spec_of(side, floats[side]).at(0, HOST, True) for side in "qk"}
    return lengths | {name: jnp.asarray(x) for name, x in traced.known_lengths(views, known).items()}


def _check_known(bound: Any, arrays: Arrays, static: Static) -> None:
    """Refuses mods that read outside of an array, where all it takes to know is at hand."""
    if not any(isinstance(x, jax.core.Tracer) or not x.is_fully_addressable for x in arrays.values()):
        views = {name: spec_of(name, x).at(0, HOST, True) for name, x in arrays.items()}
        known = {name: np.asarray(x) for name, x in arrays.items()}
        traced.check_known(bound, views, known, static.scale, static.window_size, static.softcap)


def _random_number(name: str, x: Any) -> Any:
    """Seed or offset of dropout as an array of one element: a new number compiles nothing."""
    if x is None:
        adapter.draw_seed(HOST)
    x = adapter.seed(x) if name == "seed" else x
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
            arrays["dout"] = cast(jnp.zeros_like(saved["out"]), varying(saved["out"]))
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
        raise UnsupportedError(SECOND)

    return function


def _replaced(static: Static, **changes: Any) -> Static:
    return Static(**(asdict(static) | changes))


@functools.lru_cache(maxsize=1024)
def _mappable(operation: str, static: Static) -> Callable[[Arrays], Arrays]:
    """A mapped axis of dense arrays is folded into the batch. Where the fold would mean something else (packed
    sequences, a sink, what mods capture or a gradient of them for each element, dropout and mods that know the batch
    index), one element is computed after another."""
    function = jax.custom_batching.custom_vmap(lambda arrays: sharded(operation, static, arrays))

    @function.def_vmap
    def _(size: int, batched: tuple[dict[str, bool]], arrays: Arrays) -> tuple[Arrays, dict[str, bool]]:
        (mapped,) = batched
        for_each = mapped.get("sink", False) or (operation == "attention_backward" and "sink" in arrays)
        if static.mods:
            for_each |= "b" in read_by_mods(static) or any(mapped[name] for name in arrays if is_captured(name))
            for_each |= any(is_captured(name) for name in static.grads)
        if for_each or "cu_seqlens_q" in arrays or static.dropout_p:
            rest = {name: x for name, x in arrays.items() if not mapped[name]}
            over = {name: x for name, x in arrays.items() if mapped[name]}
            results = jax.lax.map(lambda element: function(rest | element), over)
        else:
            batch = arrays["q"].shape[1 if mapped["q"] else 0]
            slopes = "alibi_slopes" in static.grads or mapped.get("alibi_slopes", False)
            folded = {}
            for name, x in arrays.items():
                if "b" in DIMS.get(name, "") and (name != "alibi_slopes" or slopes or x.ndim - mapped[name] == 2):
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


def _gradient(name: str) -> str:
    return {"alibi_slopes": "dslopes"}.get(name, f"d{name}")


def _as_typed(x: Any, like: Any) -> Any:
    """x split over devices as `like` is, where that is part of their types."""
    sharding = jax.typeof(like).sharding
    return jax.sharding.reshard(x, sharding.spec) if x is not None and sharding.mesh.explicit_axes else x
