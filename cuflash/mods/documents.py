"""Where the document of each token begins and ends, by the array's own functions."""

from __future__ import annotations

from typing import Any

from ..errors import require
from ..namespaces import arange, functions_of
from .given import require_int

_MOST_TOKENS = 2**28  # of which a document mask keeps two numbers each


def documents_of_offsets(offsets: Any, total: int | None) -> tuple[Any, Any]:
    """int32 [total] each; a token behind the last document has an empty one."""
    require(offsets.shape[0] > 0, f"cu_seqlens.shape={tuple(offsets.shape)} must be [documents + 1]: it begins with 0")
    if total is None:
        total = int(offsets[-1])
    total = require_int("total", total, 0)
    require(
        total <= _MOST_TOKENS,
        f"total={total}: arrays of so many tokens are made, and {_MOST_TOKENS} is the most; pass how many there are",
    )
    xp = functions_of(offsets)
    offsets = offsets.to(xp.int32) if xp.__name__ == "torch" else offsets.astype(xp.int32)
    tokens = arange(xp, total, offsets)
    bounds = xp.concatenate([offsets, offsets[-1:]])
    own = xp.searchsorted(offsets[1:], tokens, side="right")
    return bounds[own], bounds[own + 1]


def documents_of_ids(ids: Any) -> tuple[Any, Any]:
    """int32, of the shape of ids."""
    xp, n = functions_of(ids), ids.shape[-1]
    tokens = arange(xp, n, ids)
    changes = ids[..., 1:] != ids[..., :-1]
    edge = xp.ones_like(ids[..., :1] == ids[..., :1])
    starts = _running_max(xp, xp.where(xp.concatenate([edge, changes], -1), tokens, 0 * tokens))
    backwards = xp.where(xp.concatenate([changes, edge], -1), -1 - tokens, 0 * tokens - n)
    ends = -xp.flip(_running_max(xp, xp.flip(backwards, (-1,))), (-1,))
    return starts, ends


def _running_max(xp: Any, x: Any) -> Any:
    if xp.__name__ == "torch":
        return xp.cummax(x, -1).values
    if xp.__name__ == "jax.numpy":
        import jax

        return jax.lax.cummax(x, axis=x.ndim - 1)
    return xp.maximum.accumulate(x, axis=-1)
