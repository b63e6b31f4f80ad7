"""PyTorch's operators of attention: opaque, with a shape rule each, and kernels that hand the tensors to `call`.

Everything in here works on tensors alone, reads no value and waits for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..call.arguments import Arguments, Backward
from ..call.bind import bind
from ..call.cache import append_and_attend
from ..frameworks import CacheOptions
from ..frameworks import torch as adapter
from ..trace import text
from ..trace.tracer import Bound

torch: Any = adapter.library()

# The operators' arguments: tensors first, then numbers, both in this order wherever they travel as a tuple.
TENSORS = (
    "q",
    "k",
    "v",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "seqused_q",
    "seqused_k",
    "page_table",
    "alibi_slopes",
    "sink",
    "seed",
    "offset",
)

NUMBERS = (
    "max_seqlen_q", "max_seqlen_k", "scale", "left", "right", "softcap", "dropout_p", "seed_number", "offset_number",
    "deterministic", "split_size",
)  # fmt: skip

_SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_q, Tensor? seqused_k, "
    "Tensor? page_table, Tensor? alibi_slopes, Tensor? sink, Tensor? seed, Tensor? offset, SymInt? max_seqlen_q, "
    "SymInt? max_seqlen_k, float? scale, SymInt left, SymInt right, float softcap, float dropout_p, "
    "SymInt seed_number, SymInt offset_number, bool deterministic, SymInt? split_size"
)

# Calls with mods are operators of their own, so that others carry nothing along. What they have besides: the mods, as
# `trace.text` writes them; the numbers they captured; which results are wanted; the arrays, as a list.
_MODS_SCHEMA = "str mods, float[] scalars"

WITH_MODS = len(TENSORS) + len(NUMBERS)

PAGES, SLOPES, SINK = (TENSORS.index(name) for name in ("page_table", "alibi_slopes", "sink"))

LENGTHS, DROPOUT = TENSORS[3 : PAGES + 1], NUMBERS.index("dropout_p")


def _arguments(given: Sequence[Any], aux: tuple[str, ...] = ()) -> Arguments:
    """The keywords of `attention` from the operators' arguments after q, k and v."""
    named: dict[str, Any] = dict(zip((*TENSORS[3:], *NUMBERS), given, strict=True))
    for name in LENGTHS:
        x = named[name]
        if x is not None and x.device.type == "cpu":
            named[name] = x.numpy()  # host values may stand beside device arrays in this form
    named["window_size"] = named.pop("left"), named.pop("right")
    for name in ("seed", "offset"):
        number = named.pop(name + "_number")
        if named[name] is None:
            named[name] = number % 2**64
    return Arguments(**named, aux=aux)


def _bound(mods: str, scalars: Sequence[float], captured: Sequence[Any]) -> Bound:
    found = text.loads(mods)
    numbers = (int(x) if slot.kind == "int" else x for slot, x in zip(found.scalars, scalars, strict=True))
    return Bound(found, tuple(captured), tuple(numbers))


_AUX = {False: ("lse",), True: ("lse", "max_logit")}  # by whether max_logit is wanted


def _attention_kernel(q: Any, k: Any, v: Any, *rest: Any) -> tuple[Any, Any, Any]:
    *given, max_logit = rest
    with torch.no_grad():
        result = bind(q, k, v, _arguments(given, _AUX[max_logit])).run()
    return result.out, result.lse, result.max_logit if max_logit else _nothing(q)


def _attention_shapes(q: Any, k: Any, v: Any, cu_seqlens_q: Any, *rest: Any) -> tuple[Any, Any, Any]:
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    rows = q.shape[:-2]
    lse = q.new_empty((*rows[:-1], q.shape[-2], rows[-1]), dtype=torch.float32)
    return out, lse, torch.empty_like(lse) if rest[-1] else _nothing(q)


def _backward_kernel(
    dout: Any, dlse: Any, out: Any, lse: Any, q: Any, k: Any, v: Any, *rest: Any
) -> tuple[Any, Any, Any, Any, Any]:
    *given, slopes = rest
    arguments, grads_of = _arguments(given), ("alibi_slopes",) if slopes else ()
    with torch.no_grad():
        backward = Backward(_given(dout, dlse, out, lse), {}, arguments.deterministic, grads_of)
        grads = bind(q, k, v, arguments, None, backward).gradients()
    dsink = _nothing(q) if grads.dsink is None else grads.dsink
    return grads.dq, grads.dk, grads.dv, dsink, grads.dcaptured[0] if slopes else _nothing(q)


def _given(dout: Any, dlse: Any, out: Any, lse: Any) -> dict[str, Any]:
    """Of a backward, as it reads them: autograd and vmap leave tensors expanded, in which the caller has no hand."""
    given = {"dout": dout if dout.stride(-1) == 1 else dout.contiguous(), "out": out, "lse": lse.contiguous()}
    return given if dlse is None else given | {"dlse": dlse.contiguous()}


def _attention_mods_kernel(q: Any, k: Any, v: Any, *rest: Any) -> tuple[Any, Any, Any]:
    *given, mods, scalars, max_logit, captured = rest
    with torch.no_grad():
        result = bind(q, k, v, _arguments(given, _AUX[max_logit]), _bound(mods, scalars, captured)).run()
    return result.out, result.lse, result.max_logit if max_logit else _nothing(q)


def _attention_mods_shapes(*arguments: Any) -> tuple[Any, Any, Any]:
    return _attention_shapes(*arguments[:-1])


def _backward_mods_kernel(
    dout: Any, dlse: Any, out: Any, lse: Any, q: Any, k: Any, v: Any, *rest: Any
) -> tuple[Any, Any, Any, Any, Any, list[Any]]:
    *given, mods, scalars, slopes, wanted, captured = rest
    names = [f"captured{i}" for i, own in enumerate(wanted) if own] + ["alibi_slopes"] * slopes
    arguments = _arguments(given)
    with torch.no_grad():
        backward = Backward(_given(dout, dlse, out, lse), {}, arguments.deterministic, tuple(names))
        grads = bind(q, k, v, arguments, _bound(mods, scalars, captured), backward).gradients()
    found = dict(zip(names, grads.dcaptured, strict=True))
    dcaptured = []
    for i, x in enumerate(captured):
        grad = found.get(f"captured{i}")
        if grad is None:  # nobody asked, or it is read by a mask alone
            grad = torch.zeros_like(x, memory_format=torch.contiguous_format) if wanted[i] else _nothing(q)
        dcaptured.append(grad)
    dsink = _nothing(q) if grads.dsink is None else grads.dsink
    return grads.dq, grads.dk, grads.dv, dsink, found["alibi_slopes"] if slopes else _nothing(q), dcaptured


def _backward_mods_shapes(*arguments: Any) -> tuple[Any, Any, Any, Any, Any, list[Any]]:
    *others, slopes, wanted, captured = arguments
    grads = _backward_shapes(*others[:-2], slopes)
    return *grads, [
        x.new_empty(x.shape) if own else _nothing(arguments[4]) for x, own in zip(captured, wanted, strict=True)
    ]


def _backward_shapes(
    dout: Any, dlse: Any, out: Any, lse: Any, q: Any, k: Any, v: Any, *rest: Any
) -> tuple[Any, Any, Any, Any, Any]:
    slopes, sink = rest[SLOPES - 3], rest[SINK - 3]
    grads = (x.new_empty(x.shape) for x in (q, k, v))
    dsink = _nothing(q) if sink is None else sink.new_empty(sink.shape)
    return *grads, dsink, slopes.new_empty(slopes.shape) if rest[-1] else _nothing(q)


def _nothing(like: Any) -> Any:
    """What stands for a result nobody asked for: an operator's results are always tensors."""
    return like.new_empty((0,), dtype=torch.float32)


LIBRARY = torch.library.Library("cuflash", "DEF")  # lives as long as the operators do

TAGS = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)

for _name, _signature, _kernel, _shapes in (
    (
        "attention",
        f"({_SCHEMA}, bool max_logit) -> (Tensor out, Tensor lse, Tensor max_logit)",
        _attention_kernel,
        _attention_shapes,
    ),
    (
        "attention_backward",
        f"(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, {_SCHEMA}, bool slopes) -> "
        "(Tensor dq, Tensor dk, Tensor dv, Tensor dsink, Tensor dslopes)",
        _backward_kernel,
        _backward_shapes,
    ),
    (
        "attention_mods",
        f"({_SCHEMA}, {_MODS_SCHEMA}, bool max_logit, Tensor[] captured) -> (Tensor out, Tensor lse, Tensor max_logit)",
        _attention_mods_kernel,
        _attention_mods_shapes,
    ),
    (
        "attention_mods_backward",
        f"(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, {_SCHEMA}, {_MODS_SCHEMA}, bool slopes, bool[] wanted, "
        "Tensor[] captured) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsink, Tensor dslopes, Tensor[] dcaptured)",
        _backward_mods_kernel,
        _backward_mods_shapes,
    ),
):
    LIBRARY.define(_name + _signature, tags=TAGS)
    for _key in ("CPU", "CUDA"):
        LIBRARY.impl(_name, _kernel, _key)
    torch.library.register_fake(f"cuflash::{_name}", _shapes, lib=LIBRARY)

CACHE_ARRAYS = ("q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin", "alibi_slopes", "sink")

CACHE_INDICES = (
    "cache_seqlens", "cache_batch_idx", "cache_leftpad", "block_table", "cu_seqlens_q", "cu_seqlens_k_new",
    "rotary_seqlens",
)  # fmt: skip

CACHE_SCHEMA = ", ".join(
    [f"Tensor? {name}" for name in (*CACHE_ARRAYS[3:], *CACHE_INDICES)]
    + ["SymInt? length", "SymInt left", "SymInt right", "float? scale", "float softcap", "bool interleaved"]
    + ["SymInt num_splits", "SymInt? split_size", "SymInt? max_seqlen_q", "str mods, float[] scalars"]
    + ["Tensor[] captured"]
)


def _cache_kernel(*arguments: Any) -> tuple[Any, Any]:
    tensors, rest = arguments[: len(CACHE_ARRAYS)], arguments[len(CACHE_ARRAYS) :]
    positions, rest = rest[: len(CACHE_INDICES)], rest[len(CACHE_INDICES) :]
    length, left, right, scale, softcap, interleaved, num_splits, split_size, max_seqlen_q, mods, scalars, captured = (
        rest
    )
    arrays = {name: x for name, x in zip(CACHE_ARRAYS, tensors, strict=True) if x is not None}
    indices = {  # host values may stand beside device arrays as NumPy arrays
        name: x.numpy() if x.device.type == "cpu" else x
        for name, x in zip(CACHE_INDICES, positions, strict=True) if x is not None
    }  # fmt: skip
    options = CacheOptions(
        (left, right), scale, softcap, interleaved, num_splits, split_size, max_seqlen_q, True, length is not None
    )
    with torch.no_grad():
        return append_and_attend(arrays, indices, options, length, _bound(mods, scalars, captured) if mods else None)


def _cache_shapes(q: Any, k_cache: Any, v_cache: Any, *rest: Any) -> tuple[Any, Any]:
    return _attention_shapes(q, k_cache, v_cache, None, False)[:2]


for _name, _first, _second in (("attention_append", "(a!)", "(b!)"), ("attention_to_cache", "", "")):
    LIBRARY.define(
        f"{_name}(Tensor q, Tensor{_first} k_cache, Tensor{_second} v_cache, {CACHE_SCHEMA}) -> (Tensor out, "
        "Tensor lse)",
        tags=TAGS,
    )
    for _key in ("CPU", "CUDA"):
        LIBRARY.impl(_name, _cache_kernel, _key)
    torch.library.register_fake(f"cuflash::{_name}", _cache_shapes, lib=LIBRARY)


def flat_of(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """An operator's arguments or results, a list of tensors at their end one by one."""
    return (*values[:-1], *values[-1]) if isinstance(values[-1], list) else values


def nested_of(flat: tuple[Any, ...], schema: Sequence[Any]) -> tuple[Any, ...]:
    """The inverse."""
    before = len(schema) - 1
    return (*flat[:before], [*flat[before:]]) if isinstance(schema[before].type, torch.ListType) else flat
