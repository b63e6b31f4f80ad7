"""What flash-attn 3 and 4, and forks of theirs, take besides flash-attn 2's arguments, in the words of `attention`.

Where there is no such thing here, `UnsupportedError` says what to use instead.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from . import frameworks, mods
from .errors import ArgumentError, KeywordError, UnsupportedError, require
from .keywords import meant

_REMEDIES = {
    "qv": "concatenate q with qv and the keys with the values they meet, and pass softmax_scale",
    "q_descale": "there are no arrays of 8 bits here: leave it None, and pass wider ones",
    "k_descale": "there are no arrays of 8 bits here: leave it None, and pass wider ones",
    "v_descale": "there are no arrays of 8 bits here: leave it None, and pass wider ones",
    "scheduler_metadata": "nothing is planned beforehand: leave it None",
    "disable_scheduler_metadata": "nothing is planned beforehand: leave it False",
    "sm_margin": "leave it 0, for kernels take every multiprocessor that is free: give work beside them a stream of a "
    "higher priority",
    "num_heads_q": "slice queries, keys and values out of the packed heads, and pass them to flash_attn_func",
    "gather_kv_indices": "gather the keys, k[indices], or say which are seen by mask_mod or block_mask",
    "min_seqlen_k": "it is not needed: leave it None",
    "seqlen_k_per_split": "pass it to cuflash.attention as split_size",
    "score_mod_bwd": "the derivative is made from score_mod: leave it None",
    "aux_tensors": "a score_mod or mask_mod captures arrays: read them there, and leave it None",
    "aux_scalars": "a score_mod or mask_mod captures numbers: read them there, and leave it None",
    "block_sparse_tensors": "pass block_mask, of cuflash.create_block_mask or cuflash.BlockMask.from_kv_blocks",
    "block_sparse_tensors_bwd": "gradients follow block_mask: leave it None",
    "return_lse": "pass return_attn_probs=True, or aux=('lse',) to cuflash.attention",
}
_TAKEN = (
    "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes", "deterministic", "return_attn_probs", "sink",
    "score_mod", "mask_mod", "block_mask", "attention_chunk", "num_splits",
)  # fmt: skip
_OFF = {"sm_margin": 0, "disable_scheduler_metadata": False, "return_lse": False}  # what others say for None


def refuse(**given: Any) -> None:
    """Raises for what is asked for and is not here; `KeywordError` for what nobody takes."""
    for name, value in given.items():
        if name not in _REMEDIES:
            raise KeywordError(f"got an unexpected keyword argument {name!r}: {meant(name, _TAKEN)}")
        if value is None or (name in _OFF and isinstance(value, (int, float)) and value == _OFF[name]):
            continue
        raise UnsupportedError(f"{name}: {_REMEDIES[name]}")


def sink(**given: Any) -> Any:
    """The one of several names of the sink that is given."""
    named = [name for name, x in given.items() if x is not None]
    require(len(named) < 2, f"{' and '.join(named)} are all given, and are names of one argument: pass one of them")
    return given[named[0]] if named else None


def chunk_size(attention_chunk: Any) -> int:
    """The positions of a chunk, checked; 0 for no chunks."""
    if not isinstance(attention_chunk, numbers.Integral) or isinstance(attention_chunk, bool) or attention_chunk < 0:
        remedy = "pass 0 for no chunks"
        if frameworks.traced(attention_chunk):
            remedy = "JAX traces it, so name it in static_argnames of jax.jit, or compute it outside"
        raise ArgumentError(f"attention_chunk={attention_chunk!r} must be an int of at least 0: {remedy}")
    return int(attention_chunk)


def chunk_mask(attention_chunk: int, mask_mod: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """mask_mod, and in chunks of so many positions: a query at position p = q_idx + k_len - q_len sees the keys from
    p // attention_chunk * attention_chunk on, attention_chunk of them. 0 for all."""
    if not attention_chunk:
        return mask_mod
    chunks = _chunked(attention_chunk)
    return chunks if mask_mod is None else mods.and_masks(mask_mod, chunks)


_chunked = lru_cache(maxsize=256)(mods.chunked)  # one function a size, so that it is traced once


def splits(num_splits: Any, split_size: Any = None) -> int:
    require(
        isinstance(num_splits, numbers.Integral) and 0 <= int(num_splits) < 2**31,
        f"num_splits={num_splits!r} must be an int of at least 0, below 2**31: pass 0 for an even share of keys for "
        "each block",
    )
    require(
        not num_splits or split_size is None,
        f"num_splits={num_splits} and split_size={split_size} are both given: one number of parts, or parts of one "
        "size; pass one of them",
    )
    return int(num_splits)


def split_size(num_splits: Any, keys: int) -> int | None:
    """The `split_size` that makes num_splits parts of so many keys. None for 0 and 1, as nothing is split then."""
    parts = splits(num_splits)
    return None if parts < 2 else max(1, math.ceil(keys / parts / _KEY_BLOCK)) * _KEY_BLOCK


_KEY_BLOCK = 64  # that of every kernel which splits keys, or a divisor
