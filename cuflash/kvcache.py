"""`flash_attn_with_kvcache`: append to a cache of keys and values, then attend to it."""

from __future__ import annotations

import numbers
from typing import Any

from . import autograd, frameworks, peers
from .call import number_checks
from .call.cache import append_and_attend
from .call.cache_checks import ARRAYS, INDICES
from .call.mods import bind_mods, traced_before
from .errors import ArgumentError, require
from .frameworks import CacheOptions

Array = Any


def flash_attn_with_kvcache(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    k: Array | None = None,
    v: Array | None = None,
    rotary_cos: Array | None = None,
    rotary_sin: Array | None = None,
    cache_seqlens: Any = None,
    cache_batch_idx: Array | None = None,
    cache_leftpad: Array | None = None,
    block_table: Array | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Array | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    page_table: Array | None = None,
    cu_seqlens_q: Array | None = None,
    max_seqlen_q: int | None = None,
    cu_seqlens_k_new: Array | None = None,
    rotary_seqlens: Array | None = None,
    sink: Array | None = None,
    learnable_sink: Array | None = None,
    s_aux: Array | None = None,
    score_mod: Any = None,
    mask_mod: Any = None,
    split_size: int | None = None,
    qv: Array | None = None,
    q_descale: Array | None = None,
    k_descale: Array | None = None,
    v_descale: Array | None = None,
    attention_chunk: int = 0,
    scheduler_metadata: Any = None,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Any:
    """Append k and v to a cache, in place, and attend to all of it -> out, q's shape with v's head dim.

    q                [batch, q_len, heads_q, d], or packed [total_q, heads_q, d] with `cu_seqlens_q`
    k_cache, v_cache [batch_cache, len, heads_kv, d]; with `block_table` (or `page_table`, its other name), int32
                     [batch, max_pages], pages [num_pages, page_size, heads_kv, d] of any size
    k, v             [batch, new, heads_kv, d], or packed with `cu_seqlens_k_new`: written behind the keys that are
                     there. None: nothing is appended
    cache_seqlens    an int, or int32 [batch]: keys in the cache before appending. None, without k: the whole cache
    rotary_cos, rotary_sin  [positions, rotary_dim / 2], of q's dtype or float32, any even rotary_dim up to d: new keys
                     are rotated to their places in the cache, queries to cache_seqlens + i if causal or in a window,
                     else all to cache_seqlens; rotary_seqlens, int32 [batch], takes the place of cache_seqlens there.
                     Pairs are neighbours, or with rotary_interleaved=False first half and second half
    cache_batch_idx  int32 [batch]: which sequence of the cache is whose; not with pages
    cache_leftpad    int32 [batch]: rows at the cache's beginning that are no keys
    sink             [heads_q], as of `attention`; `learnable_sink` and `s_aux` are other names of it
    attention_chunk  as of `flash_attn_func`
    return_softmax_lse  return (out, lse); lse float32 [batch, heads_q, q_len] or [heads_q, total_q]

    The last query sees the last key, appended ones included; q_len and kv_len of mods, and kv_idx, count without the
    left padding. The other keywords are those of `attention`.

    Where at most 64 queries share a key head, kernels take keys in parts, so that all of the GPU has work: an even
    share of all keys for each block (num_splits=0), num_splits parts of the cache's room, or parts of split_size keys,
    a multiple of 64. Only one may be given. They change the order of sums, and so last bits, which with num_splits=0
    depend on what else is in the batch, and with split_size never do. pack_gqa changes nothing.

    JAX arrays cannot be written to: with k, the result is a tuple that ends in the new k_cache and v_cache. Under
    jax.jit they take the memory of the old ones where those are donated; else each call copies the cache.
    torch.compile keeps the call, and its writes, in the graph; there mods are those that `cuflash.mod` traced outside.

    There is no gradient: in PyTorch its backward raises `UnsupportedError`, and new keys enter the cache without the
    graph behind them. So do gradients in JAX, vmap, qv and descales; the message says what to use instead. A refused
    call has written nothing: it is checked before that all lengths, pages and positions lie within the cache and its
    tables, and that no two new keys go to one place. Of arrays on a device that is known to the device alone, and
    checked where `config.check` asks for it; lengths in lists and NumPy arrays always are. A first call compiles: make
    one before a CUDA graph captures another.

    >>> import numpy as np
    >>> cache = np.full((2, 16, 1, 8), np.nan, np.float32)  # room for 16 keys, of which sequences have 0 and 3
    >>> cache[1, :3] = 1
    >>> new = np.ones((2, 1, 1, 8), np.float32)
    >>> out = flash_attn_with_kvcache(new, cache, cache.copy(), new, new, cache_seqlens=np.array([0, 3], np.int32))
    >>> out.ravel().tolist() == [1.0] * 16, int(np.isfinite(cache).all(axis=(2, 3)).sum())
    (True, 5)
    """
    peers.refuse(
        qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale, scheduler_metadata=scheduler_metadata,
        sm_margin=sm_margin,
    )  # fmt: skip
    num_splits = peers.splits(num_splits, split_size)
    sink = peers.sink(sink=sink, learnable_sink=learnable_sink, s_aux=s_aux)
    require(
        block_table is None or page_table is None,
        "block_table and page_table are both given, and are two names of one argument: pass one",
    )
    block_table = page_table if block_table is None else block_table
    window_size = number_checks.window_of(window_size)
    length = None
    if isinstance(cache_seqlens, numbers.Integral):
        length, cache_seqlens = int(cache_seqlens), None
        if not 0 <= length < 2**31:  # the message is made only then: a compiler's symbolic int has no repr
            raise ArgumentError(f"cache_seqlens={length} must be from 0 to 2**31 - 1")
    given = dict(zip(ARRAYS, (q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, alibi_slopes, sink), strict=True))
    arrays = {name: x for name, x in given.items() if x is not None or name in ARRAYS[:3]}
    given = dict(zip(INDICES, (
        cache_seqlens, cache_batch_idx, cache_leftpad, block_table, cu_seqlens_q, cu_seqlens_k_new, rotary_seqlens,
    ), strict=True))  # fmt: skip
    indices = {name: x for name, x in given.items() if x is not None}
    options = CacheOptions(
        number_checks.window(window_size, causal),
        None if softmax_scale is None else number_checks.number("scale", softmax_scale), number_checks.softcap(softcap),
        number_checks.flag("rotary_interleaved", rotary_interleaved), num_splits,
        number_checks.split_size(split_size), number_checks.hint("max_seqlen_q", max_seqlen_q),
        number_checks.flag("return_softmax_lse", return_softmax_lse), length is not None,
    )  # fmt: skip
    framework = frameworks.of(q)
    bound = None
    attention_chunk = peers.chunk_size(attention_chunk)
    if score_mod is not None or mask_mod is not None or attention_chunk:
        if framework is frameworks.torch and frameworks.torch.compiling():
            bound = None if attention_chunk else traced_before(q, k_cache, score_mod, mask_mod, None)
            if bound is None:
                return autograd.outside_of_graphs()(
                    flash_attn_with_kvcache, q, k_cache, v_cache, k, v, rotary_cos, rotary_sin,
                    cache_seqlens if length is None else length, cache_batch_idx, cache_leftpad, block_table,
                    softmax_scale, causal, window_size, softcap, rotary_interleaved, alibi_slopes, num_splits,
                    return_softmax_lse, cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q,
                    cu_seqlens_k_new=cu_seqlens_k_new, rotary_seqlens=rotary_seqlens, sink=sink, score_mod=score_mod,
                    mask_mod=mask_mod, split_size=split_size, attention_chunk=attention_chunk,
                )  # fmt: skip
        else:
            bound = bind_mods(q, k_cache, score_mod, peers.chunk_mask(attention_chunk, mask_mod), None)
    captured = () if bound is None else bound.arrays
    looks_on = framework.looks_on(*arrays.values(), *captured)
    operation = autograd.operations(framework).attention_to_cache if looks_on else append_and_attend
    out, *others = operation(arrays, indices, options, length, bound)
    return (out, *others) if others else out
