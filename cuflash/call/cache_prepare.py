"""What one kind of call to `flash_attn_with_kvcache` needs: checked, its kernels planned, found by its metadata."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .. import dtypes
from ..array import Device, TensorView, contiguous_strides
from ..dtypes import DType
from ..errors import require
from ..frameworks import CacheOptions, Framework
from ..jit import module
from ..settings import config
from ..trace.expr import Mods
from . import checks
from .cache_checks import CACHES, Views, batch_of, check_arrays, check_overlaps, check_places, check_rotary
from .prepare import PREPARED_LIMIT, Prepared, backend_of, prepare, problem_strides, widest_load


@dataclass(frozen=True, slots=True)
class PreparedCache:
    """What one kind of call needs, whatever its pointers: checked once, then found by the call's metadata."""

    attention: Prepared
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


PREPARED: dict[Any, PreparedCache] = {}


def prepared_for(
    framework: Framework, views: Views, plain: tuple[str, ...], options: CacheOptions, mods: Mods | None
) -> PreparedCache:
    q, k_cache, v_cache, k, v = (views.get(name) for name in ("q", *CACHES, "k", "v"))
    assert q is not None and k_cache is not None and v_cache is not None
    alignment = (q.ptr | k_cache.ptr | v_cache.ptr) & 15
    new = 0 if k is None or v is None else (k.ptr | v.ptr) & 15
    key = (
        framework.NAME, config.version, alignment, new, plain, options, mods,
        *[(n, x.shape, x.strides, x.dtype.name, x.device, x.readonly) for n, x in views.items()],
    )  # fmt: skip
    prepared = PREPARED.get(key)
    if prepared is None:
        prepared = prepare_cache(framework, views, plain, alignment, alignment | new, options, mods)
        if len(PREPARED) >= PREPARED_LIMIT:
            PREPARED.clear()
        PREPARED[key] = prepared
    if k is not None and framework.NAME != "JAX":  # whose caches are copied
        check_overlaps(views, prepared.extents)
    return prepared


def prepare_cache(
    framework: Framework,
    views: Views,
    plain: tuple[str, ...],
    alignment: int,
    alignment_append: int,
    options: CacheOptions,
    mods: Mods | None,
    backend: str | None = None,
) -> PreparedCache:
    """Check everything that does not depend on pointers and values, choose backend and kernels."""
    q, k = views["q"], views.get("k")
    device = q.device
    checks.same_device(views, plain)
    backend = backend_of(device, framework, backend or config.backend)
    packed, pad = "cu_seqlens_q" in views, "cache_leftpad" in views
    batch = batch_of(views, framework)
    check_arrays(views, framework, batch)
    page_size, pages = check_places(views, framework, batch)
    check_rotary(views, framework)
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
    attend = attended(given, views | there | made)
    attend.pop("cache_leftpad", None)  # which `attention` does not have
    if by_value:  # in whose place `attention` would have an array
        attend["seqused_k"] = _spec((batch,), dtypes.int32, device)
    attention = prepare(
        framework, attend, (), alignment, options.scale, False, options.window, options.softcap, options.max_seqlen_q,
        None, ("lse",) if options.lse else (), mods, 0.0, (), None, backend,
    )  # fmt: skip
    append = None
    if backend != "reference":
        attention = replace(attention, plan=_split(attention.plan, options))
        if k is not None or workspace:
            append = _append_plan(views, attention.plan.arch, alignment_append, options, batch, pages)
        workspace |= attention.workspace()
    return PreparedCache(
        attention, append, options, batch, None if "cu_seqlens_k_new" in views else 0 if k is None else k.shape[1],
        page_size, pages, given, {name: x.extent for name, x in views.items()}, attention.results, workspace, by_value,
    )  # fmt: skip


def _spec(shape: tuple[int, ...], dtype: DType, device: Device) -> TensorView:
    return TensorView(0, shape, contiguous_strides(shape), dtype, device, False, None)


def attended(given: dict[str, str], views: Views) -> Views:
    """The arrays of attention, by its names."""
    attend = {name: views[own] for name, own in given.items()}
    table = attend.get("page_table")
    if table is not None and table.ndim == 1:  # of a cache in one piece, whose sequences are its pages
        shape = (*table.shape, 1)
        attend["page_table"] = TensorView(table.ptr, shape, (1, 1), table.dtype, table.device, True, table.owner)
    return attend


def _split(plan: Any, options: CacheOptions) -> Any:
    """The plan that takes the keys in parts, where queries are few or parts are asked for; else the plan given."""
    from ..ops import decode

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
    from ..ops import append

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
        fields[f"{name}_strides"] = (0, 0, 0) if x is None else problem_strides(x.strides, rows)
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
        q_rotated_strides=problem_strides(contiguous, packed),
        load_bytes=widest_load(
            alignment, q.dtype.itemsize, [*strides, contiguous], [q.shape[-1], v_cache.shape[-1]]
        ),
        page_size=k_cache.shape[1],
        max_pages=pages,
        page_table_stride=views["block_table"].strides[0] if "block_table" in views else 1,
        **fields,
    ), arch)  # fmt: skip
