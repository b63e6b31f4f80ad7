"""Context parallelism on a mesh axis of JAX, inside shard_map: equal rows on every device, padded at their end."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from .. import api
from ..errors import require
from . import globally

Plan = Any  # of plans.py, which calls this

_ARRAYS = ("positions", "starts", "place", "source", "whole")


class Arrays:
    """A plan's arrays as an argument of a compiled function: a pytree whose shapes are those of padded rows, so that
    plans of other lengths compile nothing anew.

    positions   int32 [ranks * rows]: a row's position in its document; 0 where a device has no such row
    starts      int32 [ranks * (documents + 1)]: where each document's rows begin on each device
    place       int32 [ranks * rows]: for each row of the batch its row among those of all devices
    source      int32 [ranks * rows]: and back; -1 where a device has no such row
    whole       int32 [documents + 1]: the batch's cu_seqlens
    """

    def __init__(self, axis: str, *arrays: Any) -> None:
        self.axis = axis
        self.positions, self.starts, self.place, self.source, self.whole = arrays

    def flattened(self) -> tuple[tuple[Any, ...], str]:
        return tuple(getattr(self, name) for name in _ARRAYS), self.axis


@functools.cache
def _registered() -> type[Arrays]:
    import jax

    jax.tree_util.register_pytree_node(Arrays, Arrays.flattened, lambda axis, arrays: Arrays(axis, *arrays))
    return Arrays


def arrays(plan: Plan) -> Arrays:
    import jax.numpy as jnp

    rows, documents = sizes(plan)
    positions = np.zeros((plan.ranks, rows), np.int32)
    starts = np.zeros((plan.ranks, documents + 1), np.int32)
    place, source = np.zeros(plan.ranks * rows, np.int32), np.full((plan.ranks, rows), -1, np.int32)
    for rank in range(plan.ranks):
        own = plan.of(rank)
        held = len(own.index)
        positions[rank, :held], source[rank, :held] = own.positions, own.index
        starts[rank] = held
        starts[rank, : len(own.cu_seqlens)] = own.cu_seqlens
        place[own.index] = rank * rows + np.arange(held)
    whole = np.full(documents + 1, plan.total, np.int32)
    whole[: len(plan.lengths) + 1] = plan.whole_cu_seqlens
    made = (positions.reshape(-1), starts.reshape(-1), place, source.reshape(-1), whole)
    return _registered()(str(plan.group), *map(jnp.asarray, made))


def specs(plan: Plan) -> Arrays:
    from jax.sharding import PartitionSpec

    own, everyone = PartitionSpec(str(plan.group)), PartitionSpec()
    return _registered()(str(plan.group), own, own, everyone, everyone, everyone)


def sizes(plan: Plan) -> tuple[int, int]:
    """(rows of a device, documents): what is padded to."""
    longest = max(plan.rows, default=0)
    rows, documents = plan.pad_rows or longest, plan.max_documents or len(plan.lengths)
    require(rows >= longest, f"pad_rows={rows} must be at least {longest}, the rows of the fullest rank of this plan")
    require(
        documents >= len(plan.lengths),
        f"max_documents={documents} must be at least {len(plan.lengths)}, the documents of this plan",
    )
    return rows, documents


def shard(plan: Plan, x: Any) -> Any:
    """[total, ...] -> [ranks * rows, ...], of which each device has its part; rows without an owner are 0."""
    import jax.numpy as jnp

    require(
        x.ndim > 0 and x.shape[0] == plan.total,
        f"x.shape={tuple(x.shape)} must begin with {plan.total}, the rows of the whole packed batch: its documents end "
        "to end",
    )
    source = arrays(plan).source
    owned = (source >= 0).reshape(-1, *[1] * (x.ndim - 1))
    return (
        jnp.where(owned, x[jnp.maximum(source, 0)], 0)
        if plan.total
        else jnp.zeros((len(source), *x.shape[1:]), x.dtype)
    )


def unshard(plan: Plan, x: Any) -> Any:
    """[ranks * rows, ...] -> [total, ...]."""
    rows, _ = sizes(plan)
    require(
        x.ndim > 0 and x.shape[0] == plan.ranks * rows,
        f"x.shape={tuple(x.shape)} must begin with {plan.ranks * rows}, {rows} rows for each of {plan.ranks} ranks: "
        "what shard_map put together",
    )
    return x[arrays(plan).place[: plan.total]]


@functools.cache
def _gather(axis: str) -> Any:
    """f(x [rows, ...], place, source) -> rows of all devices in the batch's order. Its gradient adds the devices' parts
    in float32, in their order."""
    import jax
    import jax.numpy as jnp

    @jax.custom_vjp
    def gather(x: Any, place: Any, source: Any) -> Any:
        return jax.lax.all_gather(x, axis, axis=0, tiled=True)[place]

    def forward(x: Any, place: Any, source: Any) -> Any:
        return gather(x, place, source), (place, source)

    def backward(kept: Any, d: Any) -> Any:
        place, source = kept
        ranks = jax.lax.axis_size(axis)
        owned = (source >= 0).reshape(-1, *[1] * (d.ndim - 1))
        sent = jnp.where(owned, d[jnp.maximum(source, 0)], 0).reshape(ranks, -1, *d.shape[1:])
        received = jax.lax.all_to_all(sent, axis, split_axis=0, concat_axis=0, tiled=False)
        total = received[0].astype(jnp.promote_types(d.dtype, jnp.float32))
        for rank in range(1, ranks):
            total = total + received[rank]
        none = (np.zeros(array.shape, jax.dtypes.float0) for array in (place, source))
        return (total.astype(d.dtype), *none)

    gather.defvjp(forward, backward)
    return gather


def attention(q: Any, k: Any, v: Any, plan: Arrays, keywords: dict[str, Any]) -> Any:
    for name, x in (("q", q), ("k", k), ("v", v)):
        require(x.ndim == 3, f"{name}.shape={tuple(x.shape)} must be [rows, heads, head dim]: batches are packed here")
        require(
            x.shape[0] == plan.positions.shape[0],
            f"{name}.shape={tuple(x.shape)} must begin with {plan.positions.shape[0]}, the padded rows of a device: "
            "call this inside shard_map, with plan.specs for the plan's arrays",
        )
    gather, starts = _gather(plan.axis), plan.starts
    causal, window_size = keywords.pop("causal"), keywords.pop("window_size")
    mask = globally.mask_of(plan.positions, starts, causal, window_size, keywords.pop("mask_mod"))
    slopes, score_mod = keywords.pop("alibi_slopes"), keywords.pop("score_mod")
    score = globally.score_of(plan.positions, starts, slopes, score_mod)
    return api.attention(
        q, gather(k, plan.place, plan.source), gather(v, plan.place, plan.source), cu_seqlens_q=starts,
        cu_seqlens_k=plan.whole, mask_mod=mask, score_mod=score, **keywords,
    )  # fmt: skip
