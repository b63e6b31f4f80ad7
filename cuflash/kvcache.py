"""`flash_attn_with_kvcache`: append to a cache of keys and values, then attend to it.

As in `api`, a call is *bound* (its arrays viewed), *checked and planned* where its metadata is new, and *run*: one
launch writes new keys and values into the cache, rotates queries and works out lengths, then attention is launched on
the whole cache, by the kernel that splits the keys where queries are few. Everything is checked before the first of
them. In host memory NumPy does the same, unless the emulator is asked for.
"""

from __future__ import annotations

import numbers
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from . import api, dtypes, frameworks, peers, reference, validate
from .array import Device, TensorView, contiguous_strides, of_numpy
from .dtypes import DType
from .errors import ArgumentError, require
from .frameworks import CacheOptions, Framework
from .jit import module
from .settings import config
from .trace.expr import Mods
from .trace.tracer import Bound

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
    window_size = validate.window_of(window_size)
    length = None
    if isinstance(cache_seqlens, numbers.Integral):
        length, cache_seqlens = int(cache_seqlens), None
        if not 0 <= length < 2**31:  # the message is made only then: a compiler's symbolic int has no repr
            raise ArgumentError(f"cache_seqlens={length} must be from 0 to 2**31 - 1")
    given = dict(zip(_ARRAYS, (q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, alibi_slopes, sink), strict=True))
    arrays = {name: x for name, x in given.items() if x is not None or name in _ARRAYS[:3]}
    given = dict(zip(_INDICES, (
        cache_seqlens, cache_batch_idx, cache_leftpad, block_table, cu_seqlens_q, cu_seqlens_k_new, rotary_seqlens,
    ), strict=True))  # fmt: skip
    indices = {name: x for name, x in given.items() if x is not None}
    options = CacheOptions(
        validate.window(window_size, causal),
        None if softmax_scale is None else validate.number("scale", softmax_scale), validate.softcap(softcap),
        validate.flag("rotary_interleaved", rotary_interleaved), num_splits,
        validate.split_size(split_size), validate.hint("max_seqlen_q", max_seqlen_q),
        validate.flag("return_softmax_lse", return_softmax_lse), length is not None,
    )  # fmt: skip
    framework = frameworks.of(q)
    bound = None
    attention_chunk = peers.chunk_size(attention_chunk)
    if score_mod is not None or mask_mod is not None or attention_chunk:
        if framework is frameworks.torch and frameworks.torch.compiling():
            bound = None if attention_chunk else api._traced_before(q, k_cache, score_mod, mask_mod, None)
            if bound is None:
                from .frameworks import torch_autograd

                return torch_autograd.uncompiled(
                    flash_attn_with_kvcache, q, k_cache, v_cache, k, v, rotary_cos, rotary_sin,
                    cache_seqlens if length is None else length, cache_batch_idx, cache_leftpad, block_table,
                    softmax_scale, causal, window_size, softcap, rotary_interleaved, alibi_slopes, num_splits,
                    return_softmax_lse, cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q,
                    cu_seqlens_k_new=cu_seqlens_k_new, rotary_seqlens=rotary_seqlens, sink=sink, score_mod=score_mod,
                    mask_mod=mask_mod, split_size=split_size, attention_chunk=attention_chunk,
                )  # fmt: skip
        else:
            bound = api.bind_mods(q, k_cache, score_mod, peers.chunk_mask(attention_chunk, mask_mod), None)
    captured = () if bound is None else bound.arrays
    operation = framework.cache_operation(*arrays.values(), *captured)
    if operation is None:
        out, *others = _append_and_attend(arrays, indices, options, length, bound)
    else:
        out, *others = operation(arrays, indices, options, length, bound)
    return (out, *others) if others else out


def _append_and_attend(
    arrays: dict[str, Array],
    indices: dict[str, Any],
    options: CacheOptions,
    length: int | None,
    bound: Bound | None,
) -> tuple[Array, ...]:
    """The call, of arrays that nobody follows -> out, lse if wanted, JAX's new caches."""
    framework = frameworks.of(arrays["q"])
    views = api._views(framework, arrays)
    plain = tuple(name for name, x in indices.items() if isinstance(x, (list, tuple, np.ndarray)))
    views |= {name: api._lengths_view(framework, x, name) for name, x in indices.items()}
    starts = views.get("cu_seqlens_q")
    if starts is not None and starts.device[0] == "cpu" and options.max_seqlen_q is None:
        options = options._replace(max_seqlen_q=api._longest(starts.as_numpy()))
    scalars: tuple[int | float, ...] = ()
    mods = None
    if bound is not None:
        views |= api._captured_views(framework, bound)
        mods, scalars, softcap = api._folded(bound, views, options.softcap)
        options = options._replace(softcap=softcap)
    prepared = _prepared_for(framework, views, plain, options, mods)
    step = _Step(framework, views, prepared, scalars, length)
    step.check()
    if bound is not None and prepared.device[0] == "cuda":
        step.uploads |= api._captured_uploads(framework, bound, views, prepared.device)

    # From here on nothing is refused.
    results = [name for name, _, _ in prepared.results]
    if "k" in views and framework.NAME == "JAX":
        for name in _CACHES:
            cache = views[name]
            views[name] = framework.empty(cache.shape, cache.dtype, cache.device)
            views[name].as_numpy()[...] = cache.as_numpy()
        results += _CACHES
    step.run()
    if "k" in views and framework.NAME != "JAX":
        for name in _CACHES:
            framework.written(arrays[name])
    return tuple(framework.wrap(views[name]) for name in results)


frameworks.calls["attention_to_cache"] = _append_and_attend

_CACHES = ("k_cache", "v_cache")
_ARRAYS = ("q", *_CACHES, "k", "v", "rotary_cos", "rotary_sin", "alibi_slopes", "sink")
_INDICES = (
    "cache_seqlens", "cache_batch_idx", "cache_leftpad", "block_table", "cu_seqlens_q", "cu_seqlens_k_new",
    "rotary_seqlens",
)  # fmt: skip


# Prepare --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What one kind of call needs, whatever its pointers: checked once, then found by the call's metadata."""

    attention: api._Prepared
    append: Any  # ops.append.AppendPlan; None on the reference, and where there is nothing to do before attention
    options: CacheOptions
    batch: int
    new: int | None  # keys appended to each sequence; None: packed ones
    page_size: int  # of a cache in one piece the keys a sequence has room for
    pages: int  # that a sequence has
    given: dict[str, str]  # which of the call's arrays each of attention's is
    extents: dict[str, tuple[int, int]]  # of every array the bytes before and behind its pointer
    results: tuple[tuple[str, tuple[int, ...], DType], ...]  # (name, shape, dtype)
    workspace: dict[str, tuple[tuple[int, ...], DType]]  # of kernels: (shape, dtype) by name
    length_by_value: bool  # whether attention is told of the keys by a number, and not by an array

    @property
    def device(self) -> Device:
        return self.attention.device

    @property
    def capacity(self) -> int:
        return self.page_size * self.pages

    def load(self, device: int) -> None:
        """Compiles and loads the kernels on a GPU."""
        self.attention.load(device)
        if self.append is not None:
            module.load(self.append.spec, self.append.arch, "cuda", device).prepare()


_prepared: dict[Any, _Prepared] = {}
_PREPARED_LIMIT = 4096


def _prepared_for(
    framework: Framework, views: Views, plain: tuple[str, ...], options: CacheOptions, mods: Mods | None
) -> _Prepared:
    q, k_cache, v_cache, k, v = (views.get(name) for name in ("q", *_CACHES, "k", "v"))
    assert q is not None and k_cache is not None and v_cache is not None
    alignment = (q.ptr | k_cache.ptr | v_cache.ptr) & 15
    new = 0 if k is None or v is None else (k.ptr | v.ptr) & 15
    key = (
        framework.NAME, config.version, alignment, new, plain, options, mods,
        *[(n, x.shape, x.strides, x.dtype.name, x.device, x.readonly) for n, x in views.items()],
    )  # fmt: skip
    prepared = _prepared.get(key)
    if prepared is None:
        prepared = _prepare(framework, views, plain, alignment, alignment | new, options, mods)
        if len(_prepared) >= _PREPARED_LIMIT:
            _prepared.clear()
        _prepared[key] = prepared
    if k is not None and framework.NAME != "JAX":  # whose caches are copied
        _check_overlaps(views, prepared.extents)
    return prepared


def _prepare(
    framework: Framework,
    views: Views,
    plain: tuple[str, ...],
    alignment: int,
    alignment_append: int,
    options: CacheOptions,
    mods: Mods | None,
    backend: str | None = None,
) -> _Prepared:
    """Check everything that does not depend on pointers and values, choose backend and kernels."""
    q, k = views["q"], views.get("k")
    device = q.device
    validate.same_device(views, plain)
    backend = api._backend(device, framework, backend or config.backend)
    packed, pad = "cu_seqlens_q" in views, "cache_leftpad" in views
    batch = _batch(views, framework)
    _check_arrays(views, framework, batch)
    page_size, pages = _check_places(views, framework, batch)
    _check_rotary(views, framework)
    counted = options.counted or "cache_seqlens" in views
    require(
        counted or (k is None and "block_table" not in views),
        "cache_seqlens is None: pass how many keys each sequence of the cache has"
        + (", behind which k and v are written" if k is not None else ", for its pages may have room for more"),
    )

    # What attention is given. Kernels find a cache in one piece by pages of that size where more than its beginning is
    # to be said of a sequence; what only the device knows, the launch before attention writes.
    workspace: dict[str, tuple[tuple[int, ...], DType]] = {}
    given = {"q": "q", "k": "k_cache", "v": "v_cache"}
    if backend == "reference" or packed or pad or "block_table" in views or "cache_batch_idx" in views:
        given["page_table"] = next((n for n in ("block_table", "cache_batch_idx") if n in views), "pages")
        if given["page_table"] == "pages":
            workspace["pages"] = ((batch,), dtypes.int32)
    # A number that is all sequences' is a number of the launch's.
    by_value = options.counted and not pad and "cu_seqlens_k_new" not in views and backend != "reference"
    if "cache_seqlens" in views and k is None and not pad:
        given["seqused_k"] = "cache_seqlens"
    elif not by_value and (counted or "page_table" in given):
        given["seqused_k"] = "seqused_k"
        workspace["seqused_k"] = ((batch,), dtypes.int32)
    if "rotary_cos" in views:
        given["q"] = "q_rotated"
        workspace["q_rotated"] = (q.shape, q.dtype)
    if pad:
        given["cache_leftpad"] = "cache_leftpad"
    captured = [name for name in views if name.startswith("captured")]
    given |= {name: name for name in ("cu_seqlens_q", "alibi_slopes", "sink", *captured) if name in views}

    # By shapes alone: what is made later, or copied to the device, lies there.
    there = {name: _spec(x.shape, x.dtype, device) for name in plain if (x := views[name]).device != device}
    made = {name: _spec(shape, dtype, device) for name, (shape, dtype) in workspace.items()}
    attend = _attended(given, views | there | made)
    attend.pop("cache_leftpad", None)  # which `attention` does not have
    if by_value:  # in whose place `attention` would have an array
        attend["seqused_k"] = _spec((batch,), dtypes.int32, device)
    attention = api._prepare(
        framework, attend, (), alignment, options.scale, False, options.window, options.softcap, options.max_seqlen_q,
        None, ("lse",) if options.lse else (), mods, 0.0, (), None, backend,
    )  # fmt: skip
    append = None
    if backend != "reference":
        attention = replace(attention, plan=_split(attention.plan, options))
        if k is not None or workspace:
            append = _append_plan(views, attention.plan.arch, alignment_append, options, batch, pages)
        workspace |= attention.workspace()
    return _Prepared(
        attention, append, options, batch, None if "cu_seqlens_k_new" in views else 0 if k is None else k.shape[1],
        page_size, pages, given, {name: x.extent for name, x in views.items()}, attention.results, workspace, by_value,
    )  # fmt: skip


def _spec(shape: tuple[int, ...], dtype: DType, device: Device) -> TensorView:
    return TensorView(0, shape, contiguous_strides(shape), dtype, device, False, None)


def _attended(given: dict[str, str], views: Views) -> Views:
    """The arrays of attention, by its names."""
    attend = {name: views[own] for name, own in given.items()}
    table = attend.get("page_table")
    if table is not None and table.ndim == 1:  # of a cache in one piece, whose sequences are its pages
        shape = (*table.shape, 1)
        attend["page_table"] = TensorView(table.ptr, shape, (1, 1), table.dtype, table.device, True, table.owner)
    return attend


def _split(plan: Any, options: CacheOptions) -> Any:
    """The plan that takes the keys in parts, where queries are few or parts are asked for; else the plan given."""
    from .ops import decode

    problem = plan.problem
    longest = min(problem.q_rows, problem.max_seqlen_q or problem.q_rows) if problem.packed else problem.q_rows
    few = longest * (problem.heads_q // problem.heads_kv) <= decode.BLOCK_Q
    asked = options.num_splits > 1 or options.split_size is not None
    if not (few or asked):
        return plan
    if options.split_size is not None:
        return decode.DecodePlan(problem, plan.arch, options.split_size)
    split = decode.DecodePlan(problem, plan.arch)
    if options.num_splits:
        block = split.variant.block_k
        blocks = max(1, -(-problem.k_rows // (options.num_splits * block)))
        split = decode.DecodePlan(problem, plan.arch, blocks * block)
    return split


def _append_plan(views: Views, arch: Any, alignment: int, options: CacheOptions, batch: int, pages: int) -> Any:
    from .ops import append

    q, k_cache, v_cache = views["q"], views["k_cache"], views["v_cache"]
    k, v, cos, sin = (views.get(name) for name in ("k", "v", "rotary_cos", "rotary_sin"))
    packed, packed_new, contiguous = "cu_seqlens_q" in views, "cu_seqlens_k_new" in views, contiguous_strides(q.shape)
    fields: dict[str, Any] = {}
    if cos is not None and sin is not None:
        fields = {
            "rotary_dim": 2 * cos.shape[1], "interleaved": options.interleaved, "advance": max(options.window) >= 0,
            "tables": cos.dtype, "cos_stride": cos.strides[0], "sin_stride": sin.strides[0],
        }  # fmt: skip
    arrays = {"k": (k, packed_new), "v": (v, packed_new), "k_cache": (k_cache, False), "v_cache": (v_cache, False)}
    arrays["q"] = (q, packed)
    for name, (x, rows) in arrays.items():
        fields[f"{name}_strides"] = (0, 0, 0) if x is None else api._problem_strides(x.strides, rows)
    strides = [x.strides for x, _ in arrays.values() if x is not None]
    return append.plan(append.AppendProblem(
        dtype=q.dtype,
        batch=batch,
        new_rows=0 if k is None else k.shape[-3],
        packed_new=packed_new,
        q_rows=q.shape[-3],
        packed_q=packed,
        heads_q=q.shape[-2],
        heads_kv=k_cache.shape[-2],
        head_dim=q.shape[-1],
        head_dim_v=v_cache.shape[-1],
        q_rotated_strides=api._problem_strides(contiguous, packed),
        load_bytes=api._load_bytes(
            alignment, q.dtype.itemsize, [*strides, contiguous], [q.shape[-1], v_cache.shape[-1]]
        ),
        page_size=k_cache.shape[1],
        max_pages=pages,
        page_table_stride=views["block_table"].strides[0] if "block_table" in views else 1,
        **fields,
    ), arch)  # fmt: skip


# Run ------------------------------------------------------------------------------------------------------------------


class _Values(NamedTuple):
    """Lengths and places, in NumPy; None for those that only the device knows, or that are not given."""

    starts_q: np.ndarray | None
    starts_new: np.ndarray | None
    before: np.ndarray | None  # [batch]
    new: np.ndarray | None
    table: np.ndarray | None  # [batch, pages]
    pad: np.ndarray | None
    turned: np.ndarray | None  # where rotary embeddings begin

    @property
    def after(self) -> np.ndarray | None:
        return None if self.before is None or self.new is None else self.before + self.new


def _values(prepared: _Prepared, views: Views, known: dict[str, np.ndarray], length: int) -> _Values:
    """Of arrays those in `known`; `length` where there is no cache_seqlens."""
    batch, starts_new, before = prepared.batch, known.get("cu_seqlens_k_new"), known.get("cache_seqlens")
    if "cache_seqlens" not in views:
        before = np.full(batch, length, np.int32)
    new = np.full(batch, prepared.new, np.int32) if prepared.new is not None else None
    if starts_new is not None:
        new = np.diff(starts_new)
    table = known.get("block_table")
    if "cache_batch_idx" in known:
        table = known["cache_batch_idx"][:, None]
    elif "block_table" not in views and "cache_batch_idx" not in views:
        table = np.arange(batch, dtype=np.int32)[:, None]
    turned = known.get("rotary_seqlens") if "rotary_seqlens" in views else before
    return _Values(known.get("cu_seqlens_q"), starts_new, before, new, table, known.get("cache_leftpad"), turned)


class _Step:
    """One call: its arrays, and what was prepared for their metadata.

    length  the keys that every sequence has, where `views` have no cache_seqlens; None: all there is room for
    """

    def __init__(
        self, framework: Framework, views: Views, prepared: _Prepared, scalars: tuple[int | float, ...],
        length: int | None,
    ) -> None:  # fmt: skip
        self.framework, self.views, self.prepared, self.scalars = framework, views, prepared, scalars
        self.length = prepared.capacity if length is None else length
        self.uploads: dict[str, np.ndarray] = {}  # host values that kernels on a device need

    def check(self) -> None:
        """What the host knows of lengths and places; with `config.check` what the device does, too."""
        framework, views, device = self.framework, self.views, self.prepared.device
        known = {name: views[name].as_numpy() for name in _INDICES if name in views and views[name].device[0] == "cpu"}
        if device[0] == "cuda":
            self.uploads = dict(known)
            if known and framework.capturing(device[1]):
                raise ArgumentError(
                    f"{', '.join(known)} in host memory cannot enter a CUDA graph, which would replay these very "
                    "values: copy to the device before the capture and pass that array"
                )
            # Reading back waits for the device, which nothing may under capture.
            checking = config.check and not framework.capturing(device[1])
            if checking:
                known |= api._download(framework, views, [n for n in _INDICES if n in views and n not in known])
        else:
            checking = True
        if known or (self.prepared.options.counted and not self._plainly_fits()):
            _check_values(self.prepared, views, _values(self.prepared, views, known, self.length))
        if checking and self.prepared.attention.mods is not None:
            self._check_indices(_values(self.prepared, views, known, self.length))

    def _plainly_fits(self) -> bool:
        """Whether a number of keys, where nothing else is known, can be seen to be right without looking further."""
        new = self.prepared.new
        return new is not None and self.length + new <= self.prepared.capacity and "rotary_cos" not in self.views

    def _check_indices(self, values: _Values) -> None:
        """That mods read inside of arrays they captured, where no score decides on it."""
        from .trace.host import HostMods

        mods, q, after = self.prepared.attention.mods, self.views["q"], values.after
        assert mods is not None and after is not None
        captured = api._download(self.framework, self.views, api._captured_names(mods, self.views))
        host = HostMods(mods, [*captured.values()], self.scalars)
        if not host.reads_by_score:
            starts, pad = values.starts_q, values.pad
            lengths_q = np.full(self.prepared.batch, q.shape[1]) if starts is None else np.diff(starts)
            lengths = zip(lengths_q.tolist(), (after if pad is None else after - pad).tolist(), strict=True)
            host.check_indices([*lengths], q.shape[-2], self.prepared.options.window)

    def run(self) -> None:
        """Computes what `prepared.results` names, in `views` where that is there."""
        prepared, framework, views = self.prepared, self.framework, self.views
        attend = self._run_reference() if prepared.attention.plan is None else self._launch_append()
        names = [*(name for name, _, _ in prepared.results), *prepared.attention.workspace()]
        attend |= {name: views[name] for name in names if name in views}
        api._Call(framework, attend, {}, prepared.attention, {}, self.scalars, self._numbers())._execute()
        views |= {name: attend[name] for name, _, _ in prepared.results}

    def _numbers(self) -> dict[str, int]:
        """What attention is told beside arrays: how many keys every sequence has, where no array says so."""
        if not self.prepared.length_by_value:
            return {}
        assert self.prepared.new is not None
        return {"k_len": self.length + self.prepared.new}

    def _launch_append(self) -> Views:
        """The launch before attention -> attention's arrays."""
        prepared, framework, views, device = self.prepared, self.framework, self.views, self.prepared.device
        api.upload_all(framework, self.uploads, views, device)
        api.take_results(framework, prepared.results, views, device)  # before the caches are written, which a lack of
        api.take_workspace(framework, prepared.workspace, views, device)  # memory leaves as they were
        prepared.attention.compile()
        if prepared.append is not None:
            table = views.get("block_table") or views.get("cache_batch_idx")
            arrays = views if table is None else {**views, "page_table": table}
            where: dict[str, Any] = {"backend": "emulator"}
            if device[0] == "cuda":
                where = {"backend": "cuda", "device": device[1], "stream": framework.stream(device[1])}
            prepared.append.launch(arrays, self.length, **where)
            if device[0] == "cuda":
                framework.retain(views.values(), device[1])
        return _attended(prepared.given, views)

    def _run_reference(self) -> Views:
        """The same in NumPy."""
        views, options = self.views, self.prepared.options
        arrays = {name: view.as_numpy() for name, view in views.items()}
        values = _values(self.prepared, views, arrays, self.length)
        before, after, table, turned = values.before, values.after, values.table, values.turned
        assert before is not None and after is not None and table is not None and turned is not None
        tables = {name: arrays[name] for name in ("rotary_cos", "rotary_sin") if name in arrays}
        if "k" in views:
            reference.append_kv(
                *(arrays[name] for name in (*_CACHES, "k", "v")), cache_seqlens=before, page_table=table,
                cu_seqlens_k_new=values.starts_new, rotary_seqlens=turned,
                rotary_interleaved=options.interleaved, **tables,
            )  # fmt: skip
        made = {"pages": np.arange(self.prepared.batch, dtype=np.int32), "seqused_k": after.astype(np.int32)}
        if tables:
            made["q_rotated"] = reference.rotate_queries(
                arrays["q"], *tables.values(), starts=turned, advance=max(options.window) >= 0,
                cu_seqlens_q=values.starts_q, interleaved=options.interleaved,
            )  # fmt: skip
        attend = _attended(self.prepared.given, views | {name: of_numpy(x) for name, x in made.items()})
        if "cache_leftpad" in attend:
            attend["leftpad_k"] = attend.pop("cache_leftpad")
        return attend


# Traced: a framework that compiles programs knows shapes when it traces a call, and memory when it runs one. ----------


def _prepare_traced(
    framework: Framework, views: Views, options: CacheOptions, mods: Mods | None, backend: str
) -> _Prepared:
    """Checks and plans a call by views without memory, aligned to 16."""
    if mods is not None:
        mods, _, softcap = api._folded(Bound(mods), views, options.softcap)
        options = options._replace(softcap=softcap)
    return _prepare(framework, views, (), 0, 0, options, mods, backend)


def _check_traced(prepared: _Prepared, views: Views, known: dict[str, Any]) -> dict[str, np.ndarray]:
    """Checks index arrays whose values are known -> in NumPy."""
    known = {name: api._lengths_view(frameworks.numpy, x, name).as_numpy() for name, x in known.items()}
    _check_values(prepared, views, _values(prepared, views, known, prepared.capacity))
    return known


def _execute_traced(framework: Framework, views: Views, prepared: _Prepared, scalars: tuple[int | float, ...]) -> None:
    """Runs it. The views hold results, and workspace on a GPU, too."""
    step = _Step(framework, views, prepared, scalars, None)
    if prepared.device[0] == "cpu":
        step.check()
    step.run()


frameworks.calls |= {
    "prepare_cache": _prepare_traced, "check_cache": _check_traced, "execute_cache": _execute_traced,
}  # fmt: skip


# Checks ---------------------------------------------------------------------------------------------------------------


def _batch(views: Views, framework: Framework) -> int:
    """The batch size."""
    shape, starts = views["q"].shape, views.get("cu_seqlens_q")
    layout = (
        "[batch, q_len, heads, head_dim]" if starts is None else "[total_q, heads, head_dim], as cu_seqlens_q are given"
    )
    require(
        len(shape) == 3 + (starts is None),
        f"q.shape={shape} must have {3 + (starts is None)} dimensions, {layout}: "
        + validate.with_heads("q", shape, "batch, q_len" if starts is None else "total_q"),
    )
    if starts is None:
        return shape[0]
    require(
        starts.ndim == 1, f"cu_seqlens_q.shape={starts.shape} must have one dimension: pass cu_seqlens_q.reshape(-1)"
    )
    require(starts.size > 0, "cu_seqlens_q.shape=(0,) must be (batch + 1,): it starts with 0 even for an empty batch")
    return starts.size - 1


def _check_arrays(views: Views, framework: Framework, batch: int) -> None:
    """Shapes, dtypes and strides of caches and of what is appended."""
    q, k_cache, v_cache = views["q"], views["k_cache"], views["v_cache"]
    packed_new = "cu_seqlens_k_new" in views
    require(
        ("k" in views) == ("v" in views),
        "of k and v one is given and one is None: new keys and values are appended together; pass both or none",
    )
    for name in _CACHES:
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
    for name in ("q", *_CACHES, "k", "v"):
        if name in views:
            x = views[name]
            require(
                x.dtype is q.dtype,
                f"{name}.dtype={x.dtype} must equal q.dtype={q.dtype}: pass {framework.advise(q.dtype.name, name)}",
            )
            require(
                x.strides[-1] == 1 and min(x.strides) >= 0,
                f"{name}.strides={x.strides} (in elements) must end in 1 and not be negative: the elements of a row "
                f"lie side by side; pass {framework.advise('contiguous', name)}",
            )
    require(
        not packed_new or "k" in views,
        "cu_seqlens_k_new is given and k is None: pass the packed keys and values, or leave it out",
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
        for name in _CACHES:
            x = views[name]
            require(not x.readonly, f"{name} is read-only: pass a writable array")
            require(
                0 in x.shape or all(s != 0 for n, s in zip(x.shape, x.strides, strict=True) if n > 1),
                f"{name}.strides={x.strides}: an expanded array (stride 0) has several keys in one place; pass one "
                "with memory for each",
            )


def _check_places(views: Views, framework: Framework, batch: int) -> tuple[int, int]:
    """Dtypes and shapes of what says where keys are -> the page size, and how many pages a sequence has."""
    shapes = dict.fromkeys(_INDICES, (batch,)) | dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k_new"), (batch + 1,))
    for name in _INDICES:
        if name not in views:
            continue
        x = views[name]
        require(
            x.dtype is dtypes.int32,
            f"{name}.dtype={x.dtype} must be int32: pass {framework.advise('int32', name)}",
        )
        if name == "block_table":
            require(
                x.ndim == 2 and x.shape[0] == batch,
                f"block_table.shape={x.shape} must be ({batch}, max_pages): a row a sequence, with the ids of its "
                "pages",
            )
        else:
            require(x.shape == shapes[name], f"{name}.shape={x.shape} must be {shapes[name]}: one entry a sequence")
        require(
            x.strides[-1] == 1 and min(x.strides) >= 0,
            f"{name}.strides={x.strides} (in elements) must end in 1 and not be negative: pass "
            f"{framework.advise('contiguous', name)}",
        )
    (num_pages, page_size), k = views["k_cache"].shape[:2], views.get("k")
    require(page_size > 0, "k_cache.shape[1]=0 must be at least 1: make room for keys")
    pages = views["block_table"].shape[1] if "block_table" in views else 1
    require(
        "block_table" not in views or "cache_batch_idx" not in views,
        "cache_batch_idx is given beside block_table, which says already where sequences lie: pass "
        "block_table[cache_batch_idx]",
    )
    require(
        "block_table" in views or "cache_batch_idx" in views or num_pages == batch,
        f"k_cache.shape[0]={num_pages} must equal the batch, {batch}: pass cache_batch_idx to say which sequences "
        "of the cache these are",
    )
    if k is not None and k.ndim == 4:
        require(
            k.shape[1] <= pages * page_size,
            f"k.shape[1]={k.shape[1]} must be at most {pages * page_size}, the keys that a sequence of the cache has "
            f"room for ({pages} x {page_size}): make it longer, or block_table wider",
        )
    return page_size, pages


def _check_rotary(views: Views, framework: Framework) -> None:
    """Tables of a rotary embedding."""
    given = [name for name in ("rotary_cos", "rotary_sin", "rotary_seqlens") if name in views]
    if not given:
        return
    require(
        given[:2] == ["rotary_cos", "rotary_sin"],
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
        0 < 2 * cos.shape[1] <= q.shape[-1],
        f"rotary_cos.shape[1]={cos.shape[1]} must be at most {q.shape[-1] // 2}, half of q's head dim, and at least 1: "
        "rotary_dim is twice that",
    )
    for name, x in (("rotary_cos", cos), ("rotary_sin", sin)):
        require(x.dtype in (q.dtype, dtypes.float32), f"{name}.dtype={x.dtype} must be {q.dtype} or float32: cast it")
        require(
            x.strides[1] == 1 and x.strides[0] >= 0,
            f"{name}.strides={x.strides} (in elements) must end in 1 and not be negative: pass "
            f"{framework.advise('contiguous', name)}",
        )
    require(
        cos.dtype is sin.dtype,
        f"rotary_sin.dtype={sin.dtype} must equal rotary_cos.dtype={cos.dtype}: pass tables made together",
    )


def _check_overlaps(views: Views, extents: dict[str, tuple[int, int]]) -> None:
    """Caches share no memory with each other or with what is read. Mostly their ranges show it."""
    reach = {name: (x.ptr - extents[name][0], x.ptr + extents[name][1]) for name, x in views.items()}
    for cache in _CACHES:
        begin, end = reach[cache]
        if any(b < end and begin < e for name, (b, e) in reach.items() if name != cache):
            return validate.no_overlap(views, _CACHES)


def _check_values(prepared: _Prepared, views: Views, values: _Values) -> None:
    """Lengths lie within arrays, pages within the cache, and no two new keys go to one place, as far as is known."""
    if values.starts_q is not None:
        validate.cu_seqlens("cu_seqlens_q", values.starts_q, views["q"].shape[0])
    if values.starts_new is not None:
        validate.cu_seqlens("cu_seqlens_k_new", values.starts_new, views["k"].shape[0])
    before, new, after, table = values.before, values.new, values.after, values.table
    num_pages, page_size = views["k_cache"].shape[:2]
    if before is not None:
        _check_room(before, np.zeros_like(before) if new is None else new, prepared.pages, page_size)
    if values.pad is not None:
        largest = np.full(prepared.batch, prepared.capacity) if after is None else after
        _check_each("cache_leftpad", values.pad, largest, "the keys of sequence {b}")
    if table is not None:
        if "cache_batch_idx" in views:
            largest = np.full(prepared.batch, num_pages - 1)
            _check_each("cache_batch_idx", table[:, 0], largest, "the last sequence of k_cache")
        elif after is not None:
            validate.page_ids(table, after, num_pages, page_size)
        if before is not None and new is not None and ("cache_batch_idx" in views or "block_table" in views):
            _check_apart(table, page_size, before, new)
    if "rotary_cos" in views and values.turned is not None:
        steps = np.zeros(prepared.batch, np.int32) if new is None else new
        lengths_q = None if values.starts_q is None else np.diff(values.starts_q)
        if "cu_seqlens_q" not in views:
            lengths_q = np.full(prepared.batch, views["q"].shape[1])
        if lengths_q is not None:
            steps = np.maximum(steps, lengths_q if max(prepared.options.window) >= 0 else np.minimum(lengths_q, 1))
        _check_positions(values.turned, steps, views["rotary_cos"].shape[0])


def _check_each(name: str, values: np.ndarray, largest: np.ndarray, what: str) -> None:
    """Each entry from 0 to its largest."""
    wrong = np.flatnonzero((values < 0) | (values > largest))
    if wrong.size:
        b = int(wrong[0])
        raise ArgumentError(f"{name}[{b}]={values[b]} must be from 0 to {largest[b]}, {what.format(b=b)}: mend it")


def _check_room(before: np.ndarray, new: np.ndarray, pages: int, page_size: int) -> None:
    capacity = pages * page_size
    wrong = np.flatnonzero((before < 0) | (before.astype(np.int64) + new > capacity))
    if wrong.size:
        b = int(wrong[0])
        appended = f", and {new[b]} new keys behind them" if new[b] else ""
        raise ArgumentError(
            f"cache_seqlens[{b}]={before[b]}{appended}: the keys of sequence {b} must be from 0 to {capacity}, what "
            f"the cache has room for ({pages} x {page_size}): make it longer, or block_table wider"
        )


def _check_apart(table: np.ndarray, page_size: int, before: np.ndarray, new: np.ndarray) -> None:
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


def _check_positions(starts: np.ndarray, steps: np.ndarray, positions: int) -> None:
    """Tables of a rotary embedding reach far enough: `steps` positions from each start on."""
    wrong = np.flatnonzero((starts < 0) | (starts.astype(np.int64) + steps > positions))
    if wrong.size:
        b = int(wrong[0])
        raise ArgumentError(
            f"rotary_cos.shape[0]={positions}: sequence {b} needs positions {starts[b]} to "
            f"{int(starts[b]) + int(steps[b]) - 1}: pass longer tables"
        )
