"""flash-attn 2's functions, by name, positional order and defaults: `import cuflash as flash_attn` works.

Each is a thin layer over `cuflash.attention`, whose docstring defines shapes, dtypes and masks. What differs from
flash-attn: float32 and every head dim from 1 to 256 are served, k and v may have different head dims, a fully masked
row has lse -inf, and a non-contiguous last dimension is refused instead of copied. `deterministic` is as there: without
it the last bits of dq may differ from run to run. Mods may be given too, by keyword: score_mod, mask_mod, block_mask.

With `dropout_p`, PyTorch tensors draw from their device's default generator. Other arrays have none, and flash-attn's
functions no seed: for them, `cuflash.attention`.

What flash-attn 3 and 4 and vLLM's fork take besides is taken by keyword: `More` has what is served. Of the rest, such
as qv, q_descale and sm_margin, anything but the default raises `UnsupportedError` with what to use instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypedDict, Unpack

import numpy as np

from . import autograd, frameworks, peers
from .api import attention
from .call import number_checks
from .call.views import host_lengths
from .errors import ArgumentError, UnsupportedError, require

Array = Any
Mod = Callable[..., Any]


class More(TypedDict, total=False):
    """Keywords of all functions here, beside flash-attn 2's.

    score_mod, mask_mod, block_mask  as of `attention`
    sink               [heads_q]; `learnable_sink` and `s_aux` are other names of it
    seqused_q, seqused_k  int32 [batch]: only the first rows of each sequence exist
    page_table         another name of block_table; dense queries need seqused_k beside it
    attention_chunk    > 0: a query sees the keys of its own chunk of so many positions alone, those with
                       kv_idx // attention_chunk equal to (q_idx + k_len - q_len) // attention_chunk
    num_splits         > 1: keys are taken in so many parts, as by `split_size` of `attention`, unless they are packed
    pack_gqa           changes nothing
    """

    score_mod: Mod | None
    mask_mod: Mod | None
    block_mask: Any
    sink: Array | None
    learnable_sink: Array | None
    s_aux: Array | None
    seqused_q: Array | None
    seqused_k: Array | None
    page_table: Array | None
    attention_chunk: int
    num_splits: int
    pack_gqa: bool | None


def flash_attn_func(
    q: Array,
    k: Array,
    v: Array,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **more: Unpack[More],
) -> Any:
    """Attention of q [batch, q_len, heads_q, d] to k, v [batch, k_len, heads_kv, d] -> out, q's shape.

    With `return_attn_probs`: (out, lse [batch, heads_q, q_len] float32, weights). The weights are for tests of dropout:
    [batch, heads_q, q_len, k_len], exp(score - the row's largest), negative where dropped, computed on the host; None
    without dropout.

    >>> import numpy as np
    >>> x = np.ones((2, 7, 4, 32), np.float16)
    >>> out, lse, _ = flash_attn_func(x, x, x, causal=True, return_attn_probs=True)
    >>> out.shape, lse.shape
    ((2, 7, 4, 32), (2, 4, 7))
    """
    return _call(
        q, k, v, return_attn_probs,
        dropout_p=dropout_p, scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap,
        alibi_slopes=alibi_slopes, deterministic=deterministic, **more,
    )  # fmt: skip


def flash_attn_kvpacked_func(
    q: Array,
    kv: Array,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **more: Unpack[More],
) -> Any:
    """`flash_attn_func` with kv [batch, k_len, 2, heads_kv, d], read in place."""
    k, v = _split(kv, "kv", 2, 5)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
        **more,
    )  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv: Array,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **more: Unpack[More],
) -> Any:
    """`flash_attn_func` with qkv [batch, len, 3, heads, d], read in place."""
    q, k, v = _split(qkv, "qkv", 3, 5)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
        **more,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Array | None = None,
    **more: Unpack[More],
) -> Any:
    """Attention of packed q [total_q, heads_q, d] to k, v [total_k, heads_kv, d] -> out, q's shape.

    Sequence b owns the rows cu_seqlens[b] to cu_seqlens[b + 1]; `max_seqlen_*` are hints. With `return_attn_probs`:
    (out, lse [heads_q, total_q] float32, weights as of `flash_attn_func`, [batch, heads_q, longest q, longest k]).
    With `block_table` int32 [batch, max_pages], k and v are [num_pages, page_size, heads_kv, d], and cu_seqlens_k or
    seqused_k says how many keys each sequence has: `page_table` and `seqused_k` of `attention`. With cu_seqlens_k
    None, k and v may be [batch, k_len, heads_kv, d], of which seqused_k says how many keys exist.
    """
    require(
        block_table is None or more.get("page_table") is None,
        "block_table and page_table are both given, and are two names of one argument: pass one",
    )
    more["page_table"] = more.get("page_table") if block_table is None else block_table
    if more["page_table"] is not None and cu_seqlens_k is not None:
        starts = host_lengths("cu_seqlens_k", cu_seqlens_k) if isinstance(cu_seqlens_k, (list, tuple)) else cu_seqlens_k
        frameworks.of(starts, "cu_seqlens_k")
        shape, dtype = getattr(starts, "shape", ()), getattr(starts, "dtype", None)
        if len(shape) != 1 or "int32" not in str(dtype) or shape[0] >= 2**31:
            raise ArgumentError(
                f"cu_seqlens_k is {dtype} of shape {tuple(shape)} and must be int32 [batch + 1]: cast it"
            )
        if more.get("seqused_k") is None:
            more["seqused_k"] = starts[1:] - starts[:-1]
        cu_seqlens_k = None
    if cu_seqlens_k is None and more["page_table"] is None and len(getattr(k, "shape", ())) == 4:
        # Dense keys beside packed queries, as flash-attn 3 takes them.
        batch, rows = k.shape[:2]
        cu_seqlens_k = [b * rows for b in range(batch + 1)]
        k, v = (x.reshape(batch * rows, *x.shape[2:]) for x in (k, v))
    return _call(
        q, k, v, return_attn_probs,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
        dropout_p=dropout_p, scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap,
        alibi_slopes=alibi_slopes, deterministic=deterministic, **more,
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q: Array,
    kv: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **more: Unpack[More],
) -> Any:
    """`flash_attn_varlen_func` with kv [total_k, 2, heads_kv, d], read in place."""
    k, v = _split(kv, "kv", 2, 4)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs, **more,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Array,
    cu_seqlens: Array,
    max_seqlen: int | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    **more: Unpack[More],
) -> Any:
    """`flash_attn_varlen_func` with qkv [total, 3, heads, d], read in place."""
    q, k, v = _split(qkv, "qkv", 3, 4)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size, softcap,
        alibi_slopes, deterministic, return_attn_probs, **more,
    )  # fmt: skip


def _call(
    q: Array,
    k: Array,
    v: Array,
    return_attn_probs: bool,
    *,
    sink: Array | None = None,
    learnable_sink: Array | None = None,
    s_aux: Array | None = None,
    mask_mod: Mod | None = None,
    attention_chunk: int = 0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    **keywords: Any,
) -> Any:
    foreign = {name: keywords.pop(name) for name in [*keywords] if name not in _OURS}
    peers.refuse(**foreign)
    return_attn_probs = number_checks.flag("return_attn_probs", return_attn_probs)
    keywords["sink"] = peers.sink(sink=sink, learnable_sink=learnable_sink, s_aux=s_aux)
    attention_chunk = peers.chunk_size(attention_chunk)
    framework = frameworks.of(q)
    if attention_chunk and framework is frameworks.torch and frameworks.torch.compiling():
        return autograd.outside_of_graphs()(
            _call, q, k, v, return_attn_probs, mask_mod=mask_mod, attention_chunk=attention_chunk,
            num_splits=num_splits, **keywords,
        )  # fmt: skip
    keywords["mask_mod"] = peers.chunk_mask(attention_chunk, mask_mod)
    keywords["split_size"] = _split_size(num_splits, k, keywords)
    # Read here, since below a window is part of a cache's key, and a tensor may change in place.
    keywords["window_size"] = number_checks.window_of(keywords["window_size"])
    p = number_checks.dropout_p(keywords["dropout_p"])
    if p and framework is not frameworks.torch:
        raise ArgumentError(
            f"dropout_p={p} with {framework.NAME} arrays, which have no default generator to draw a seed from: "
            "call cuflash.attention(..., dropout_p=..., seed=...)"
        )
    if not return_attn_probs:
        return attention(q, k, v, **keywords)
    if p:
        for name, remedy in _NO_WEIGHTS.items():
            if keywords.get(name) is not None:
                raise UnsupportedError(
                    f"return_attn_probs with {name} and dropout: the weights are made from whole sequences; {remedy}, "
                    "or ask for no weights"
                )
        seed, offset = frameworks.torch.draw_seed(frameworks.torch.view(q).device)
        keywords |= {"seed": seed, "offset": offset}
    result = attention(q, k, v, aux=("lse",), **keywords)
    return result.out, result.lse, _weights(q, k, **keywords) if p else None


_OURS = {
    "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "dropout_p", "scale", "causal", "window_size",
    "softcap", "alibi_slopes", "deterministic", *More.__annotations__,
}  # fmt: skip
_NO_WEIGHTS = {
    "page_table": "gather them, k[block_table].reshape(batch, -1, heads, d)",
    "seqused_q": "pass packed arrays without the rows that are not used",
    "seqused_k": "pass packed arrays without the rows that are not used",
}


def _split_size(num_splits: int, k: Array, keywords: dict[str, Any]) -> int | None:
    """`split_size` for so many parts of the room that keys have."""
    shape, table = getattr(k, "shape", ()), keywords.get("page_table")
    num_splits = peers.splits(num_splits)
    if num_splits < 2 or len(shape) < 2:
        return None
    if keywords.get("cu_seqlens_k") is not None:
        raise UnsupportedError(
            f"num_splits={num_splits} with cu_seqlens_k: packed keys are not split; pass 1, or keys in pages with "
            "block_table"
        )
    return peers.split_size(num_splits, shape[1] if table is None else shape[1] * table.shape[1])


def _weights(
    q: Array, k: Array, mask_mod: Mod | None, score_mod: Mod | None = None, block_mask: Any = None, **keywords: Any
) -> Array:
    """`reference.attention_weights` of PyTorch tensors."""
    from . import reference
    from .call.mods import bind_mods
    from .trace.host import HostMods

    unused = ("max_seqlen_q", "max_seqlen_k", "deterministic", "split_size", "sink", *_NO_WEIGHTS)
    keywords = {name: x for name, x in keywords.items() if name not in unused}
    host = lambda x: frameworks.torch.to_host(x) if hasattr(x, "detach") else x  # noqa: E731
    on_host: dict[str, Any] = {name: host(x) for name, x in ({"q": q, "k": k} | keywords).items()}
    on_host |= {name: int(np.asarray(on_host[name]).item()) for name in ("seed", "offset")}
    if not (score_mod is mask_mod is block_mask is None):
        bound = bind_mods(q, k, score_mod, mask_mod, block_mask)
        on_host |= HostMods(bound.mods, [host(x) for x in bound.arrays], bound.scalars).functions
    return frameworks.torch.from_host(reference.attention_weights(**on_host), like=q)


def _split(packed: Array, name: str, parts: int, ndim: int) -> tuple[Array, ...]:
    """The parts of a packed array, as views: the dimension before the heads counts them."""
    frameworks.of(packed, name)
    shape = getattr(packed, "shape", None)
    if shape is None or not hasattr(packed, "__getitem__"):
        raise ArgumentError(f"{name} is a {type(packed).__qualname__}: pass an array, or its parts to flash_attn_func")
    require(
        len(shape) == ndim and shape[ndim - 3] == parts,
        f"{name}.shape={tuple(shape)} must have {ndim} dimensions, [{'batch, len' if ndim == 5 else 'total'}, {parts}, "
        f"heads, head_dim]: stack the parts along dimension {ndim - 3}",
    )
    if frameworks.of(packed) is frameworks.torch:
        return packed.unbind(ndim - 3)  # whose gradient is written as one array, where that of slices is a sum of three
    before = (slice(None),) * (ndim - 3)
    return tuple(packed[(*before, i)] for i in range(parts))
