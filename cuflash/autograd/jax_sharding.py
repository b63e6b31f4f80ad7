"""Attention on JAX arrays that are spread over devices, each of which computes its own sequences and heads."""

from __future__ import annotations

import functools
import importlib
import math
import re
from collections.abc import Callable
from typing import Any

from ..frameworks import jax as adapter
from ..trace import text
from ..trace.expr import leaves
from .jax_call import DIMS, Arrays, Static, call, description_of, in_order, is_captured, result_of

jax: Any = adapter.library()

custom_partitioning: Any = importlib.import_module("jax.experimental.custom_partitioning").custom_partitioning

NamedSharding, PartitionSpec = jax.sharding.NamedSharding, jax.sharding.PartitionSpec


def sharded(operation: str, static: Static, arrays: Arrays) -> Arrays:
    """The call on arrays that may be spread over devices, each of which computes its own sequences and heads."""
    if jax.sharding.get_abstract_mesh().manual_axes:  # shard_map has split them, into what each device computes
        return call(operation, static, arrays)
    names = in_order(arrays)
    description = description_of(operation, static, arrays)
    results = [name for spec in description.results if (name := result_of(spec.name, arrays))]
    dims = {name: _dims(name, arrays) for name in (*names, *results)}
    batch, heads_q, heads_kv = arrays["q"].shape[0], arrays["q"].shape[-2], arrays["k"].shape[-2]
    known = "bh" if static.dropout_p else read_by_mods(static)  # by which a weight depends on its sequence and head

    def local(*parts: Any) -> tuple[Any, ...]:
        found = call(operation, static, dict(zip(names, parts, strict=True)))
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
    if is_captured(name):
        return ("n",) * arrays[name.removeprefix("d")].ndim
    dims = DIMS[name].split()
    if name in ("alibi_slopes", "dslopes") and arrays["alibi_slopes"].ndim == 1:
        return ("h",)
    if "cu_seqlens_q" not in arrays:
        return tuple(dims)
    if name.startswith("seqused") or "slopes" in name:
        return ("n", *dims[1:])
    return tuple(dim for dim in dims if dim != "b")


@functools.lru_cache(maxsize=1024)
def read_by_mods(static: Static) -> frozenset[str]:
    """The coordinates that mods read: "b", "h" and so on."""
    mods = text.loads(static.mods) if static.mods else None
    roots = () if mods is None else (root for root in (mods.score, mods.mask) if root is not None)
    return frozenset().union(*map(leaves, roots))


def _axes(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
