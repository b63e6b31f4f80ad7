"""The rules of arrays in a call to `flash_attn_with_kvcache`, beside those of attention."""

from __future__ import annotations

from .. import dtypes
from ..array import TensorView
from ..errors import require
from ..frameworks import Framework
from . import checks

Views = dict[str, TensorView]

CACHES = ("k_cache", "v_cache")

ARRAYS = ("q", *CACHES, "k", "v", "rotary_cos", "rotary_sin", "alibi_slopes", "sink")

INDICES = (
    "cache_seqlens", "cache_batch_idx", "cache_leftpad", "block_table", "cu_seqlens_q", "cu_seqlens_k_new",
    "rotary_seqlens",
)  # fmt: skip


def batch_of(views: Views, framework: Framework) -> int:
    """The batch size."""
    shape, starts = views["q"].shape, views.get("cu_seqlens_q")
    layout = (
        "[batch, q_len, heads, head_dim]" if starts is None else "[total_q, heads, head_dim], as cu_seqlens_q are given"
    )
    require(
        len(shape) == 3 + (starts is None),
        f"q.shape={shape} must have {3 + (starts is None)} dimensions, {layout}: "
        + checks.with_heads("q", shape, "batch, q_len" if starts is None else "total_q"),
    )
    if starts is None:
        return shape[0]
    require(
        starts.ndim == 1, f"cu_seqlens_q.shape={starts.shape} must have one dimension: pass cu_seqlens_q.reshape(-1)"
    )
    require(starts.size > 0, "cu_seqlens_q.shape=(0,) must be (batch + 1,): it starts with 0 even for an empty batch")
    return starts.size - 1


def check_arrays(views: Views, framework: Framework, batch: int) -> None:
    """Shapes, dtypes and strides of caches and of what is appended."""
    q, k_cache, v_cache = views["q"], views["k_cache"], views["v_cache"]
    packed_new = "cu_seqlens_k_new" in views
    require(
        ("k" in views) == ("v" in views),
        "of k and v one is given and one is None: new keys and values are appended together; pass both or none",
    )
    for name in CACHES:
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
    for name in ("q", *CACHES, "k", "v"):
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
        for name in CACHES:
            x = views[name]
            require(not x.readonly, f"{name} is read-only: pass a writable array")
            require(
                0 in x.shape or all(s != 0 for n, s in zip(x.shape, x.strides, strict=True) if n > 1),
                f"{name}.strides={x.strides}: an expanded array (stride 0) has several keys in one place; pass one "
                "with memory for each",
            )


def check_places(views: Views, framework: Framework, batch: int) -> tuple[int, int]:
    """Dtypes and shapes of what says where keys are -> the page size, and how many pages a sequence has."""
    shapes = dict.fromkeys(INDICES, (batch,)) | dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k_new"), (batch + 1,))
    for name in INDICES:
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


def check_rotary(views: Views, framework: Framework) -> None:
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


def check_overlaps(views: Views, extents: dict[str, tuple[int, int]]) -> None:
    """Caches share no memory with each other or with what is read. Mostly their ranges show it."""
    reach = {name: (x.ptr - extents[name][0], x.ptr + extents[name][1]) for name, x in views.items()}
    for cache in CACHES:
        begin, end = reach[cache]
        if any(b < end and begin < e for name, (b, e) in reach.items() if name != cache):
            return checks.no_overlap(views, CACHES)
