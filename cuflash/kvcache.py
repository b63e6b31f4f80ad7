"""`flash_attn_with_kvcache`: append to a cache of keys and values, then attend to it.

Arrays in host memory are served by the NumPy reference. Everything is checked before the cache is touched.
"""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np

from . import api, dtypes, frameworks, reference, validate
from .array import HOST, TensorView, of_numpy
from .errors import ArgumentError, UnsupportedError, require
from .frameworks import Framework
from .settings import config

Array = Any
Views = dict[str, TensorView]


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
    return_softmax_lse  return (out, lse); lse float32 [batch, heads_q, q_len] or [heads_q, total_q]

    The last query sees the last key, appended ones included; q_len and kv_len of mods, and kv_idx, count without the
    left padding. The other keywords are those of `attention`. num_splits and split_size, of which only one may be
    given, and pack_gqa change how kernels share out the work and no result.

    JAX arrays cannot be written to: with k, the result is a tuple that ends in the new k_cache and v_cache. At a call
    torch.compile breaks its graph.

    Raises `UnsupportedError` where kernels run, for gradients, and for qv, descales and attention_chunk; the message
    says what to use instead. A refused call has written nothing: it is checked before that all lengths, pages and
    positions lie within the cache and its tables, and that no two new keys go to one place.

    >>> import numpy as np
    >>> cache = np.full((2, 16, 1, 8), np.nan, np.float32)  # room for 16 keys, of which sequences have 0 and 3
    >>> cache[1, :3] = 1
    >>> new = np.ones((2, 1, 1, 8), np.float32)
    >>> out = flash_attn_with_kvcache(new, cache, cache.copy(), new, new, cache_seqlens=np.array([0, 3], np.int32))
    >>> out.ravel().tolist() == [1.0] * 16, int(np.isfinite(cache).all(axis=(2, 3)).sum())
    (True, 5)
    """
    if frameworks.of(q) is frameworks.torch and frameworks.torch.compiling():
        from .frameworks import torch_autograd

        return torch_autograd.outside_of_graph(
            flash_attn_with_kvcache, q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx,
            cache_leftpad, block_table, softmax_scale, causal, window_size, softcap, rotary_interleaved, alibi_slopes,
            num_splits, return_softmax_lse, page_table=page_table, cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q,
            cu_seqlens_k_new=cu_seqlens_k_new, rotary_seqlens=rotary_seqlens, sink=sink, score_mod=score_mod,
            mask_mod=mask_mod, split_size=split_size, qv=qv, q_descale=q_descale, k_descale=k_descale,
            v_descale=v_descale, attention_chunk=attention_chunk, scheduler_metadata=scheduler_metadata,
            pack_gqa=pack_gqa, sm_margin=sm_margin,
        )  # fmt: skip
    _refuse(
        qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale, attention_chunk=attention_chunk or None,
        scheduler_metadata=scheduler_metadata, sm_margin=sm_margin or None,
    )  # fmt: skip
    _check_splits(num_splits, split_size)
    require(
        block_table is None or page_table is None,
        "block_table and page_table are both given, and are two names of one argument: pass one",
    )
    block_table = page_table if block_table is None else block_table
    if hasattr(window_size, "tolist"):  # flash-attn takes a tensor of two
        window_size = tuple(np.ravel(window_size.tolist()).tolist())  # type: ignore[attr-defined]
    window = validate.window(window_size, causal)

    framework = frameworks.of(q)
    named = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v, "rotary_cos": rotary_cos,
             "rotary_sin": rotary_sin}  # fmt: skip
    arrays = {name: x for name, x in named.items() if x is not None or "cache" in name}
    if framework.operation(*arrays.values(), alibi_slopes, sink) is not None:
        raise UnsupportedError(
            "flash_attn_with_kvcache has no gradient and is followed by no transformation: call it outside of "
            "autograd, autocast, torch.func, torch.export and jax.jit, in PyTorch under torch.no_grad(), with arrays "
            "in host memory; to train, call cuflash.attention"
        )
    views = api._views(framework, arrays)
    api._refuse_cache(api._backend(views["q"].device, framework, config.backend))

    # Lengths and places, all on the host.
    batch, starts_q = _batch(views, cu_seqlens_q, framework)
    _check_arrays(views, framework, batch, packed_new=cu_seqlens_k_new is not None)
    num_pages, page_size = views["k_cache"].shape[:2]
    table = _table(framework, batch, num_pages, block_table, cache_batch_idx)
    before = _lengths_before(framework, cache_seqlens, batch, page_size, appends=k is not None, paged=block_table)
    new = _new_lengths(views, framework, cu_seqlens_k_new, batch)
    after = before + new
    _check_room(before, new, table.shape[1], page_size, cache_seqlens is None)
    pad = None if cache_leftpad is None else _ints(framework, "cache_leftpad", cache_leftpad, (batch,))
    if pad is not None:
        _check_each("cache_leftpad", pad, after, "the keys of sequence {b}")
    validate.page_ids(table, after, num_pages, page_size)
    _check_places(table, page_size, before, new)

    rotary: dict[str, Any] = {}
    turned = before if rotary_seqlens is None else _ints(framework, "rotary_seqlens", rotary_seqlens, (batch,))
    advance = max(window) >= 0
    if "rotary_cos" in views or "rotary_sin" in views or rotary_seqlens is not None:
        lengths_q = np.diff(starts_q) if starts_q is not None else np.full(batch, views["q"].shape[1])
        _check_rotary(views, turned, np.maximum(new, lengths_q if advance else np.minimum(lengths_q, 1)))
        rotary = {name: views[name].as_numpy() for name in ("rotary_cos", "rotary_sin")}

    bound = None
    if score_mod is not None or mask_mod is not None:
        bound = api.bind_mods(q, k_cache, score_mod, mask_mod, None)
    call = api._bind(
        q, k_cache, v_cache, starts_q, None, max_seqlen_q, None, None, after, table, softmax_scale, causal,
        tuple(window_size), softcap, alibi_slopes, sink, bound, 0.0, None, 0, None, None, None,
        ("lse",) if return_softmax_lse else (),
    )  # fmt: skip
    results = []

    # From here on nothing is refused.
    if k is not None:
        for name in ("k", "v"):
            cache, given = call.views[name], named[f"{name}_cache"]
            if framework.NAME == "JAX":
                call.views[name] = framework.empty(cache.shape, cache.dtype, HOST)
                call.views[name].as_numpy()[...] = cache.as_numpy()
                results.append(call.views[name])
            else:
                framework.written(given)
        cu_new = None if cu_seqlens_k_new is None else np.concatenate([[0], np.cumsum(new)])
        reference.append_kv(
            *(call.views[name].as_numpy() for name in ("k", "v")), *(views[name].as_numpy() for name in ("k", "v")),
            cache_seqlens=before, page_table=table, cu_seqlens_k_new=cu_new, rotary_seqlens=turned,
            rotary_interleaved=rotary_interleaved, **rotary,
        )  # fmt: skip
    if rotary:
        turned_q = reference.rotate_queries(
            views["q"].as_numpy(), *rotary.values(), starts=turned, advance=advance, cu_seqlens_q=starts_q,
            interleaved=rotary_interleaved,
        )  # fmt: skip
        call.views["q"] = of_numpy(turned_q)
    if pad is not None:
        call.views["leftpad_k"] = of_numpy(pad)
    out = call.run()
    first = (out.out, out.lse) if return_softmax_lse else (out,)
    if results:
        return (*first, *map(framework.wrap, results))
    return first if return_softmax_lse else out


def _refuse(**given: Any) -> None:
    """What flash-attn 3 has and this has not."""
    remedies = {
        "attention_chunk": "pass mask_mod, which may compare positions // chunk",
        "qv": "concatenate q with qv and the keys with the values they meet, and pass softmax_scale",
        "scheduler_metadata": "leave it None: nothing is planned beforehand",
        "sm_margin": "leave it 0",
    }
    for name, value in given.items():
        if value is not None:
            remedy = remedies.get(name, "there are no arrays of 8 bits here: leave it None, and pass wider ones")
            raise UnsupportedError(f"{name}: {remedy}")


def _check_splits(num_splits: Any, split_size: Any) -> None:
    for name, value, least in (("num_splits", num_splits, 0), ("split_size", split_size, 1)):
        require(
            value is None or (isinstance(value, numbers.Integral) and int(value) >= least),
            f"{name}={value!r} must be an int of at least {least}",
        )
    require(
        not num_splits or split_size is None,
        f"num_splits={num_splits} and split_size={split_size} are both given: one number of parts, or parts of one "
        "size; pass one of them",
    )


def _batch(views: Views, cu_seqlens_q: Any, framework: Framework) -> tuple[int, np.ndarray | None]:
    """The batch size, and where packed queries begin."""
    shape, packed = views["q"].shape, cu_seqlens_q is not None
    layout = "[total_q, heads, head_dim], as cu_seqlens_q are given" if packed else "[batch, q_len, heads, head_dim]"
    require(
        len(shape) == 4 - packed,
        f"q.shape={shape} must have {4 - packed} dimensions, {layout}: reshape it"
        + ("" if packed else ", or pass cu_seqlens_q for packed queries"),
    )
    if not packed:
        return shape[0], None
    starts = _ints(framework, "cu_seqlens_q", cu_seqlens_q, None)
    require(starts.size > 0, "cu_seqlens_q.shape=(0,) must be (batch + 1,): it starts with 0 even for an empty batch")
    validate.cu_seqlens("cu_seqlens_q", starts, shape[0])
    return starts.size - 1, starts


def _check_arrays(views: Views, framework: Framework, batch: int, packed_new: bool) -> None:
    """Shapes and dtypes of caches and of what is appended."""
    q, k_cache, v_cache = views["q"], views["k_cache"], views["v_cache"]
    require(
        ("k" in views) == ("v" in views),
        "of k and v one is given and one is None: new keys and values are appended together; pass both or none",
    )
    for name in ("k_cache", "v_cache"):
        x = views[name]
        require(
            x.ndim == 4,
            f"{name}.shape={x.shape} must have 4 dimensions, [batch, len, heads, head_dim], or [num_pages, page_size, "
            "heads, head_dim] with block_table: reshape it",
        )
    require(
        v_cache.shape[:3] == k_cache.shape[:3],
        f"v_cache.shape={v_cache.shape} must be {k_cache.shape[:3]} and a head dim, as k_cache's: one place holds a "
        "key and its value",
    )
    require(
        k_cache.shape[3] == q.shape[-1],
        f"k_cache.shape[3]={k_cache.shape[3]} must equal q.shape[{q.ndim - 1}]={q.shape[-1]}: queries and keys are "
        "multiplied",
    )
    for name in ("k_cache", "v_cache", "k", "v"):
        if name in views:
            dtype = views[name].dtype
            require(
                dtype is q.dtype,
                f"{name}.dtype={dtype} must equal q.dtype={q.dtype}: pass {framework.advise(q.dtype.name, name)}",
            )
    if "k" not in views:
        return
    for name in ("k", "v"):
        x, tail = views[name], views[f"{name}_cache"].shape[2:]
        lead = views["k"].shape[:1] if packed_new else (batch, *views["k"].shape[1:2])
        require(
            x.shape == (*lead, *tail) and x.ndim == 4 - packed_new,
            f"{name}.shape={x.shape} must be {'(total, ' if packed_new else f'({batch}, new, '}{tail[0]}, {tail[1]}): "
            f"the keys to append, with heads and head dim of {name}_cache"
            + (", and as many in v as in k" if name == "v" else ""),
        )
    if framework.NAME != "JAX":  # whose caches are copied
        for name in ("k_cache", "v_cache"):
            x = views[name]
            require(not x.readonly, f"{name} is read-only: pass a writable array")
            require(
                0 in x.shape or all(s != 0 for n, s in zip(x.shape, x.strides, strict=True) if n > 1),
                f"{name}.strides={x.strides}: an expanded array (stride 0) has several keys in one place; pass one "
                "with memory for each",
            )
        validate.no_overlap(views, ("k_cache", "v_cache"))


def _ints(framework: Framework, name: str, x: Any, shape: tuple[int, ...] | None) -> np.ndarray:
    """The values of an index array, int32 and of the right shape (None: one dimension)."""
    view = api._lengths_view(framework, x, name)
    require(
        view.dtype is dtypes.int32,
        f"{name}.dtype={view.dtype} must be int32: pass {framework.advise('int32', name)}",
    )
    if shape is None:
        require(view.ndim == 1, f"{name}.shape={view.shape} must have one dimension: pass {name}.reshape(-1)")
    else:
        require(view.shape == shape, f"{name}.shape={view.shape} must be {shape}: one entry a sequence")
    return np.ascontiguousarray(view.as_numpy())


def _table(framework: Framework, batch: int, num_pages: int, block_table: Any, batch_idx: Any) -> np.ndarray:
    """The page table; of a cache in one piece, whose sequences are its pages, one column."""
    if block_table is not None:
        require(
            batch_idx is None,
            "cache_batch_idx is given beside block_table, which says already where sequences lie: pass "
            "block_table[cache_batch_idx]",
        )
        view = api._views(frameworks.of(block_table, "block_table"), {"block_table": block_table})["block_table"]
        require(
            view.dtype is dtypes.int32,
            f"block_table.dtype={view.dtype} must be int32: pass {framework.advise('int32', 'block_table')}",
        )
        require(
            view.ndim == 2 and view.shape[0] == batch,
            f"block_table.shape={view.shape} must be ({batch}, max_pages): a row a sequence, with the ids of its pages",
        )
        return np.ascontiguousarray(view.as_numpy())
    if batch_idx is None:
        require(
            num_pages == batch,
            f"k_cache.shape[0]={num_pages} must equal the batch, {batch}: pass cache_batch_idx to say which sequences "
            "of the cache these are",
        )
        return np.arange(batch, dtype=np.int32)[:, None]
    index = _ints(framework, "cache_batch_idx", batch_idx, (batch,))
    _check_each("cache_batch_idx", index, np.full(batch, num_pages - 1), "the last sequence of k_cache")
    return index[:, None]


def _lengths_before(
    framework: Framework, given: Any, batch: int, page_size: int, appends: bool, paged: Any
) -> np.ndarray:
    if given is None:
        require(
            not appends and paged is None,
            "cache_seqlens is None: pass how many keys each sequence of the cache has"
            + (", behind which k and v are written" if appends else ", for its pages may have room for more"),
        )
        return np.full(batch, page_size, np.int32)
    if isinstance(given, numbers.Integral):
        require(0 <= int(given) < 2**31, f"cache_seqlens={given} must be from 0 to 2**31 - 1")
        return np.full(batch, int(given), np.int32)
    return _ints(framework, "cache_seqlens", given, (batch,))


def _new_lengths(views: Views, framework: Framework, cu_seqlens_k_new: Any, batch: int) -> np.ndarray:
    if cu_seqlens_k_new is None:
        return np.full(batch, views["k"].shape[1] if "k" in views else 0, np.int32)
    require("k" in views, "cu_seqlens_k_new is given and k is None: pass the packed keys and values, or leave it out")
    starts = _ints(framework, "cu_seqlens_k_new", cu_seqlens_k_new, (batch + 1,))
    validate.cu_seqlens("cu_seqlens_k_new", starts, views["k"].shape[0])
    return np.diff(starts)


def _check_each(name: str, values: np.ndarray, largest: np.ndarray, what: str) -> None:
    """Each entry from 0 to its largest."""
    wrong = np.flatnonzero((values < 0) | (values > largest))
    if wrong.size:
        b = int(wrong[0])
        raise ArgumentError(f"{name}[{b}]={values[b]} must be from 0 to {largest[b]}, {what.format(b=b)}: mend it")


def _check_room(before: np.ndarray, new: np.ndarray, pages: int, page_size: int, whole: bool) -> None:
    capacity = pages * page_size
    wrong = np.flatnonzero((before < 0) | (before.astype(np.int64) + new > capacity)) if not whole else np.zeros(0, int)
    if wrong.size:
        b = int(wrong[0])
        appended = f", and {new[b]} new keys behind them" if new[b] else ""
        raise ArgumentError(
            f"cache_seqlens[{b}]={before[b]}{appended}: the keys of sequence {b} must be from 0 to {capacity}, what "
            f"the cache has room for ({pages} x {page_size}): make it longer, or block_table wider"
        )


def _check_places(table: np.ndarray, page_size: int, before: np.ndarray, new: np.ndarray) -> None:
    """No two new keys go to one place."""
    at = [reference.cache_slots(table[b], page_size, int(before[b]), int(n)) for b, n in enumerate(new)]
    places = np.concatenate([pages.astype(np.int64) * page_size + rows for pages, rows in at] or [np.zeros(0, int)])
    order = np.argsort(places, kind="stable")
    twice = np.flatnonzero(np.diff(places[order]) == 0)
    if twice.size:
        first, second = np.repeat(np.arange(len(new)), new)[order[twice[0] : twice[0] + 2]]
        page, row = divmod(int(places[order[twice[0]]]), page_size)
        raise ArgumentError(
            f"sequences {first} and {second} both append to row {row} of page (or sequence) {page} of the cache: give "
            "each a place of its own in block_table or cache_batch_idx"
        )


def _check_rotary(views: Views, starts: np.ndarray, steps: np.ndarray) -> None:
    """Tables of a rotary embedding reach far enough: `steps` positions from each start on."""
    require(
        "rotary_cos" in views and "rotary_sin" in views,
        "rotary_cos and rotary_sin belong together, and rotary_seqlens to both: pass both tables, or none",
    )
    require("k" in views, "rotary_cos is given and k is None: rotate q yourself, or pass the keys to append")
    cos, sin, q = views["rotary_cos"], views["rotary_sin"], views["q"]
    require(
        cos.ndim == 2 and cos.shape == sin.shape,
        f"rotary_cos.shape={cos.shape} and rotary_sin.shape={sin.shape} must both be (positions, rotary_dim / 2): pass "
        "tables made together",
    )
    require(
        2 * cos.shape[1] <= q.shape[-1],
        f"rotary_cos.shape[1]={cos.shape[1]} must be at most {q.shape[-1] // 2}, half of q's head dim: rotary_dim is "
        "twice that",
    )
    for name, x in (("rotary_cos", cos), ("rotary_sin", sin)):
        require(x.dtype in (q.dtype, dtypes.float32), f"{name}.dtype={x.dtype} must be {q.dtype} or float32: cast it")
    wrong = np.flatnonzero((starts < 0) | (starts.astype(np.int64) + steps > cos.shape[0]))
    if wrong.size:
        b = int(wrong[0])
        raise ArgumentError(
            f"rotary_cos.shape[0]={cos.shape[0]}: sequence {b} needs positions {starts[b]} to "
            f"{int(starts[b]) + int(steps[b]) - 1}: pass longer tables"
        )
