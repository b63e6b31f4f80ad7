"""The rules of the arrays of a call to `attention`, checked before anything is launched or written.

Each function raises `ArgumentError` (a rule is broken) or `UnsupportedError` (a request no kernel serves) with the
value, the rule and the remedy. Nothing here reads a device array or depends on a framework: arrays are `TensorView`s,
and a framework's own words for a remedy come from its adapter.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from .. import dtypes
from ..array import Device, TensorView, device_name
from ..errors import ArgumentError, UnsupportedError, require
from ..frameworks import Framework
from ..trace.expr import Mods

"""The rules of a call to `attention`, checked before anything is launched or written.

Each function raises `ArgumentError` (a rule is broken) or `UnsupportedError` (a request no kernel serves) with the
value, the rule and the remedy. Nothing here reads a device array or depends on a framework: arrays are `TensorView`s,
and a framework's own words for a remedy come from its adapter.
"""

MAX_HEAD_DIM = 256

_MAX_ROWS = 2**31 - 1  # kernels count rows in 32 bits (and offsets in 64)

_DENSE = {name: f"[batch, {name}_len, heads, head_dim]" for name in "qkv"}

_PACKED = {name: f"[total_{name}, heads, head_dim]" for name in "qkv"}

_PAGED = "[num_pages, page_size, heads, head_dim]"

Views = dict[str, TensorView]


def layout(views: Views) -> bool:
    """Check the ranks of q, k, v -> True for the packed layout, False for the dense one; with pages, of q alone."""
    if "page_table" in views:
        return _paged_layout(views)
    for given, missing in (("cu_seqlens_q", "cu_seqlens_k"), ("cu_seqlens_k", "cu_seqlens_q")):
        if given in views and missing not in views:
            raise ArgumentError(
                f"{given} is given and {missing} is not: the packed layout needs both; "
                + _as_packed(missing[-1], views[missing[-1]].shape)
            )
    packed = "cu_seqlens_q" in views
    for name in "qkv":
        shape = views[name].shape
        if packed:
            require(
                len(shape) == 3,
                f"{name}.shape={shape} must have 3 dimensions, {_PACKED[name]}, as cu_seqlens are given: "
                + (
                    f"merge batch and length by {name}.reshape(-1, heads, head_dim), or leave cu_seqlens out for "
                    f"{_DENSE[name]}"
                    if len(shape) == 4
                    else with_heads(name, shape, "total")
                ),
            )
        else:
            require(
                len(shape) == 4,
                f"{name}.shape={shape} must have 4 dimensions, {_DENSE[name]}: {with_heads(name, shape, 'batch, len')}",
            )
        require(max(shape) <= _MAX_ROWS, f"{name}.shape={shape}: no dimension may exceed {_MAX_ROWS}; split the call")
    return packed


def _as_packed(name: str, shape: tuple[int, ...]) -> str:
    """How to write a dense array as a packed one."""
    if len(shape) != 4:
        return "for self-attention pass the same array twice"
    batch, rows, heads, head_dim = shape
    arrays, with_v = (name, "") if name == "q" else ("k and v", ", and v likewise")
    return (
        f"{arrays} of shape [batch, length, heads, head_dim] become packed as {name}.reshape(-1, {heads}, {head_dim})"
        f"{with_v}, with cu_seqlens_{name}=np.arange({batch + 1}, dtype=np.int32) * {rows}, beside which "
        f"seqused_{name} says how many rows each has"
    )


def with_heads(name: str, shape: tuple[int, ...], rows: str) -> str:
    """How to mend an array of another rank, what its dimensions may be being told by their number."""
    if len(shape) == 3 and "batch" in rows:
        return f"for one sequence pass {name}[None], for packed sequences also cu_seqlens_q and cu_seqlens_k"
    if len(shape) == 2:
        first = f"1, {shape[0]}" if "batch" in rows else f"{shape[0]}"
        return (
            f"if a row of {shape[1]} holds all heads, pass {name}.reshape({first}, heads, {shape[1]} // heads), "
            f"if it is one head, {name}.reshape({first}, 1, {shape[1]})"
        )
    if len(shape) == 5:
        return (
            f"q, k, v of one array are for flash_attn_qkvpacked_func; else pass {name}.reshape({rows}, heads, head_dim)"
        )
    return f"say which dimension is which by {name}.reshape({rows}, heads, head_dim)"


def _paged_layout(views: Views) -> bool:
    """The same with a page table, which says where keys lie: no cu_seqlens can."""
    require(
        "seqused_k" in views,
        "page_table is given and seqused_k is not: pages have room for more keys than a sequence has; pass its length "
        "for each",
    )
    require(
        "cu_seqlens_k" not in views,
        "cu_seqlens_k is given beside page_table, which says where the keys of a sequence lie: pass their number as "
        "seqused_k, cu_seqlens_k[1:] - cu_seqlens_k[:-1]",
    )
    packed = "cu_seqlens_q" in views
    for name in "qkv":
        shape = views[name].shape
        layout = _PAGED if name != "q" else _PACKED["q"] if packed else _DENSE["q"]
        dimensions = 3 if name == "q" and packed else 4
        require(
            len(shape) == dimensions,
            f"{name}.shape={shape} must have {dimensions} dimensions, {layout}"
            + (", as cu_seqlens_q are given: " if dimensions == 3 else " beside page_table: ")
            + with_heads(name, shape, layout[1:].rpartition(", heads")[0]),
        )
        require(max(shape) <= _MAX_ROWS, f"{name}.shape={shape}: no dimension may exceed {_MAX_ROWS}; split the call")
    require(views["k"].shape[1] > 0, "k.shape[1]=0, the page size, must be at least 1: a page holds keys")
    return packed


def element_types(views: Views, backend: str, framework: Framework) -> None:
    """One float dtype for q, k and v, of those the backend computes in."""
    dtype = views["q"].dtype
    if not dtype.is_float:
        raise ArgumentError(
            f"q.dtype={dtype} must be float16, bfloat16 or float32: pass what a projection to heads gives, not "
            "positions, token ids or a mask; quantized values must be multiplied by their scale first"
        )
    for name in "kv":
        require(
            views[name].dtype is dtype,
            f"{name}.dtype={views[name].dtype} must equal q.dtype={dtype}: pass {framework.advise(dtype.name, name)}",
        )
    if dtype is dtypes.float64 and backend != "reference":
        raise UnsupportedError(
            f"q.dtype=float64 runs on the NumPy reference alone, and the backend here is {backend!r}: pass "
            f"{framework.advise('float32', 'q')} (k and v likewise), or host arrays with config.backend='auto'"
        )


def same_device(views: Views, plain: Sequence[str]) -> None:
    """Every array on the device of q; plain lengths (lists, NumPy arrays) may lie beside device arrays."""
    device = views["q"].device
    for name, view in views.items():
        if view.device != device and name not in plain and not name.startswith("captured"):
            raise ArgumentError(
                f"{name} is on {device_name(view.device)} and q on {device_name(device)}: all arrays must be on one "
                f"device; move {name} there"
            )


def shapes(views: Views, packed: bool) -> None:
    """Batch, lengths, heads and head dims of q, k, v fit together."""
    q, k, v = (views[name].shape for name in "qkv")
    axis = -3  # of the rows
    paged = "page_table" in views
    swapped = _swap_hint(q, k, v) if not (packed or paged) else ""
    if paged:
        require(v[0] == k[0], f"v.shape[0]={v[0]} must equal k.shape[0]={k[0]}: one page table serves keys and values")
    elif not packed:
        for name, shape in (("k", k), ("v", v)):
            require(shape[0] == q[0], f"{name}.shape[0]={shape[0]} must equal q.shape[0]={q[0]}, the batch: expand it")
    require(
        v[axis] == k[axis],
        f"v.shape[{len(v) + axis}]={v[axis]} must equal k.shape[{len(k) + axis}]={k[axis]}: each key has one value",
    )
    heads, heads_k = len(q) - 2, len(k) - 2
    require(
        v[-2] == k[-2],
        f"v.shape[{heads_k}]={v[-2]} must equal k.shape[{heads_k}]={k[-2]}: keys and values have the same heads"
        + swapped,
    )
    require(
        k[-2] > 0 and q[-2] > 0,
        f"q.shape[{heads}]={q[-2]} and k.shape[{heads_k}]={k[-2]} must be at least 1: attention needs a head",
    )
    require(
        q[-2] % k[-2] == 0,
        f"k.shape[{heads_k}]={k[-2]} must divide q.shape[{heads}]={q[-2]}: each key head serves a whole group of query "
        f"heads; repeat or drop heads of k and v" + swapped,
    )
    require(
        k[-1] == q[-1],
        f"k.shape[{heads_k + 1}]={k[-1]} must equal q.shape[{heads + 1}]={q[-1]}: queries and keys are multiplied",
    )
    for name, at, n in (("q", heads + 1, q[-1]), ("v", heads_k + 1, v[-1])):
        require(n > 0, f"{name}.shape[{at}]=0: the head dim must be at least 1")
        if n > MAX_HEAD_DIM:
            raise UnsupportedError(
                f"{name}.shape[{at}]={n}: head dims go from 1 to {MAX_HEAD_DIM}; for a larger one use "
                "torch.nn.functional.scaled_dot_product_attention"
            )
    if swapped and k[-2] > 128 and k[1] < k[2] and q[1] < q[2]:
        raise ArgumentError(
            f"q.shape={q} and k.shape={k} read as {q[2]} query and {k[2]} key heads over {k[1]} keys{swapped}; if the "
            "heads are meant so, pass them in groups of 128 at most"
        )


def _swap_hint(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> str:
    """What to add to an error where [batch, heads, len, d] would have made a right call."""
    fits = k[:-1] == v[:-1] and k[1] > 0 and q[1] % k[1] == 0 and q[2] > q[1]
    if not fits:
        return ""
    return (
        f"; heads and length look swapped: attention takes [batch, len, heads, head_dim], and q.shape={q} looks like "
        "[batch, heads, len, head_dim]; pass q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2), which copy nothing"
    )


# What a captured array may hold: "int" expressions have 32 bits with their sign.
_CAPTURED = (
    dtypes.float16, dtypes.bfloat16, dtypes.float32, dtypes.int8, dtypes.int16, dtypes.int32, dtypes.int64,
    dtypes.uint8, dtypes.bool_,
)  # fmt: skip


def captured(views: Sequence[TensorView], mods: Mods, device: Device, backend: str, framework: Framework) -> None:
    """Dtypes and devices of captured arrays, in slot order."""
    for slot, view in zip(mods.arrays, views, strict=True):
        name = slot.name
        if view.dtype is not slot.dtype or view.ndim != slot.ndim:
            raise ArgumentError(
                f"{name}, which a mod captured, is {view.dtype} of {view.ndim} dimensions, and was {slot.dtype} of "
                f"{slot.ndim} when cuflash.mod traced it: trace it anew"
            )
        if view.dtype is dtypes.float64 and backend != "reference":
            raise UnsupportedError(
                f"{name}.dtype=float64, which a mod captured: no kernel reads it; capture "
                f"{framework.advise('float32', name)}"
            )
        if view.dtype not in _CAPTURED and view.dtype is not dtypes.float64:
            raise ArgumentError(
                f"{name}.dtype={view.dtype}, which a mod captured, must be one of "
                f"{', '.join(t.name for t in _CAPTURED)}: capture {framework.advise('int32', name)}"
            )
        # NOTE: one number in host memory is uploaded.
        if view.device != device and not (view.ndim == 0 and view.device[0] == "cpu"):
            raise ArgumentError(
                f"{name}, which a mod captured, is on {device_name(view.device)} and q on {device_name(device)}: all "
                f"arrays must be on one device; move {name} there"
            )


def strides(views: Views, framework: Framework) -> None:
    """Unit step within a row of q, k, v, and of out and their gradients; no backward steps."""
    for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv"):
        view = views.get(name)
        if view is None or view.ndim == 0:  # whose shape is refused elsewhere
            continue
        written = name in ("dq", "dk", "dv") or (name == "out" and "dout" not in views)
        remedy = "allocate it contiguous" if written else f"pass {framework.advise('contiguous', name)}"
        require(
            view.strides[-1] == 1,
            f"{name}.strides={view.strides} (in elements) must end in 1: the elements of a row lie side by side; "
            + remedy,
        )
        require(min(view.strides) >= 0, f"{name}.strides={view.strides} (in elements) must not be negative: {remedy}")


def outputs(views: Views, shapes: dict[str, tuple[int, ...]], framework: Framework) -> None:
    """Arrays to write to, `shapes` by name, are writable memory of the right shape and dtype that nothing shares."""
    dtype = views["q"].dtype
    for name, shape in shapes.items():
        view = views[name]
        owner = "q's, with v's head dim" if name == "out" else f"that of {name[1:]}, whose gradient it is"
        require(view.shape == shape, f"{name}.shape={view.shape} must be {shape}: {owner}")
        require(
            view.dtype is dtype,
            f"{name}.dtype={view.dtype} must equal q.dtype={dtype}: pass an array of that dtype, or leave {name} out "
            "and cast the result",
        )
        require(
            not view.readonly,
            f"{name} is read-only ({framework.NAME} arrays are immutable): leave {name}= away and take the result"
            if framework.NAME == "JAX"
            else f"{name} is read-only: pass a writable array",
        )
        require(
            all(s != 0 for n, s in zip(view.shape, view.strides, strict=True) if n > 1) or 0 in view.shape,
            f"{name}.strides={view.strides}: an expanded array (stride 0) has several results in one place; pass one "
            "with memory for each",
        )
    no_overlap(views, shapes)


def no_overlap(views: Views, written: Collection[str]) -> None:
    """Arrays to write to share no memory, neither with an input nor with each other."""
    for target in written:
        for name, view in views.items():
            use = "written too" if name in written else f"still read while {target} is written"
            known = f"an array a mod captured ({name})" if name.startswith("captured") else name
            require(
                name == target or not views[target].overlaps(view),
                f"{target} shares memory with {known}, which is {use}: pass other memory",
            )


def gradients(views: Views, out_shape: tuple[int, ...], lse_shape: tuple[int, ...], framework: Framework) -> None:
    """What `attention_backward` gets beside the arguments of `attention`: out, lse and the gradients for them."""
    dtype = views["q"].dtype
    for name, shape, expected, whose in (
        ("out", out_shape, dtype, "the result of attention with these q, k, v"),
        ("dout", out_shape, dtype, "out's, for which it is the gradient"),
        ("lse", lse_shape, dtypes.float32, 'what attention(..., aux=("lse",)) returned, natural logarithms'),
        ("dlse", lse_shape, dtypes.float32, "lse's, for which it is the gradient"),
    ):
        view = views.get(name)
        if view is None:
            continue
        require(view.shape == shape, f"{name}.shape={view.shape} must be {shape}: {whose}")
        require(
            view.dtype is expected,
            f"{name}.dtype={view.dtype} must be {expected}: {whose}; pass {framework.advise(expected.name, name)}",
        )
        require(
            shape is out_shape or view.is_contiguous,
            f"{name}.strides={view.strides} (in elements) must be a contiguous array's: pass "
            f"{framework.advise('contiguous', name)}",
        )


def index_arrays(views: Views, packed: bool, framework: Framework) -> int:
    """Dtypes and shapes of cu_seqlens and seqused -> the batch size."""
    for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"):
        view = views.get(name)
        if view is None:
            continue
        require(
            view.dtype is dtypes.int32,
            f"{name}.dtype={view.dtype} must be int32: pass {framework.advise('int32', name)}",
        )
        require(view.ndim == 1, f"{name}.shape={view.shape} must have one dimension: pass {name}.reshape(-1)")
        require(
            view.strides[0] == 1,
            f"{name}.strides={view.strides} must be (1,): pass {framework.advise('contiguous', name)}",
        )
    if "page_table" in views:
        batch = views["cu_seqlens_q"].shape[0] - 1 if packed else views["q"].shape[0]
        require(batch >= 0, "cu_seqlens_q.shape=(0,) must be (batch + 1,): it starts with 0 even for an empty batch")
        _page_table(views["page_table"], batch, framework)
    elif packed:
        starts_q, starts_k = views["cu_seqlens_q"].shape[0], views["cu_seqlens_k"].shape[0]
        require(starts_q >= 1, "cu_seqlens_q.shape=(0,) must be (batch + 1,): it starts with 0 even for an empty batch")
        require(
            starts_q == starts_k,
            f"cu_seqlens_k.shape=({starts_k},) must equal cu_seqlens_q.shape=({starts_q},): one entry a sequence and "
            "one more",
        )
        batch = starts_q - 1
    else:
        batch = views["q"].shape[0]
    for name in ("seqused_q", "seqused_k"):
        if name in views:
            require(
                views[name].shape == (batch,),
                f"{name}.shape={views[name].shape} must be ({batch},): one length a sequence",
            )
    return batch


def _page_table(table: TensorView, batch: int, framework: Framework) -> None:
    require(
        table.dtype is dtypes.int32,
        f"page_table.dtype={table.dtype} must be int32: pass {framework.advise('int32', 'page_table')}",
    )
    require(
        table.ndim == 2 and table.shape[0] == batch,
        f"page_table.shape={table.shape} must be ({batch}, max_pages): a row a sequence, with the ids of its pages",
    )
    require(
        table.strides[1] == 1 and table.strides[0] >= 0,
        f"page_table.strides={table.strides} (in elements) must end in 1 and not be negative: pass "
        f"{framework.advise('contiguous', 'page_table')}",
    )


def head_arrays(views: Views, batch: int, framework: Framework) -> None:
    """Shapes and dtypes of the arrays with a number for each query head."""
    heads = views["q"].shape[-2]
    slopes, sink = views.get("alibi_slopes"), views.get("sink")
    if slopes is not None:
        require(
            slopes.dtype is dtypes.float32,
            f"alibi_slopes.dtype={slopes.dtype} must be float32: pass {framework.advise('float32', 'alibi_slopes')}",
        )
        require(
            slopes.shape in ((heads,), (batch, heads)),
            f"alibi_slopes.shape={slopes.shape} must be ({heads},) or ({batch}, {heads}): one slope a query head, or "
            "one a sequence and query head",
        )
    if sink is not None:
        dtype = views["q"].dtype
        require(
            sink.dtype in (dtypes.float32, dtype),
            f"sink.dtype={sink.dtype} must be float32 or q's {dtype}: pass {framework.advise('float32', 'sink')}",
        )
        require(sink.shape == (heads,), f"sink.shape={sink.shape} must be ({heads},): one number a query head")
    for name, view in (("alibi_slopes", slopes), ("sink", sink)):
        if view is not None:
            require(
                view.is_contiguous,
                f"{name}.strides={view.strides} (in elements) must be a contiguous array's: pass "
                f"{framework.advise('contiguous', name)}",
            )


def random_numbers(views: Views, framework: Framework) -> None:
    """Dtypes and shapes of seed and offset, where they are arrays."""
    for name in ("seed", "offset"):
        view = views.get(name)
        if view is None:
            continue
        require(
            view.dtype in (dtypes.int32, dtypes.uint32, dtypes.int64, dtypes.uint64),
            f"{name}.dtype={view.dtype} must be int64, or another integer of 32 or 64 bits: pass "
            f"{framework.advise('int64', name)}",
        )
        require(
            math.prod(view.shape) == 1, f"{name}.shape={view.shape} must be (1,): pass one number for the whole call"
        )
