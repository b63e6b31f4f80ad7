"""Attention as operations PyTorch knows: for autograd, torch.compile, torch.export, torch.func, autocast, checkpoints.

Two operators, `cuflash::attention` and `cuflash::attention_backward`, are what compilers and dispatch modes see:
opaque, with a shape rule each, kernels that hand the tensors to `api`, a derivative, and a rule for `vmap`, so that
transforms and compilers, and the two together, follow them as they follow PyTorch's own. `attention` casts what
autocast casts. Everything in here works on tensors alone, reads no value and waits for nothing.

Importing this module imports PyTorch; only `torch.py` does so, once a tensor asks for it.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NoReturn

import numpy as np

from ..errors import ArgumentError, UnsupportedError
from ..trace import text
from ..trace.expr import leaves, slots_of, walk
from ..trace.tracer import Bound
from . import CacheOptions, calls
from .torch import NESTED, _torch, draw_seed

torch: Any = _torch()
enable_single_level_autograd_function: Any = importlib.import_module(
    "torch._functorch.utils"
).enable_single_level_autograd_function

# The operators' arguments: tensors first, then numbers, both in this order wherever they travel as a tuple.
_TENSORS = (
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
_NUMBERS = (
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
_WITH_MODS = len(_TENSORS) + len(_NUMBERS)
_PAGES, _SLOPES, _SINK = (_TENSORS.index(name) for name in ("page_table", "alibi_slopes", "sink"))
_LENGTHS, _DROPOUT = _TENSORS[3 : _PAGES + 1], _NUMBERS.index("dropout_p")


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    seqused_q: Any,
    seqused_k: Any,
    page_table: Any,
    scale: float | None,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Any,
    sink: Any,
    dropout_p: float,
    seed: Any,
    offset: Any,
    deterministic: bool,
    split_size: int | None,
    aux: tuple[str, ...],
    bound: Bound | None,
) -> tuple[Any, Any, Any]:
    """`cuflash.attention` of tensors -> (out, lse, max_logit); gradients flow through out and lse."""
    for name, x in (("q", q), ("k", k), ("v", v), ("alibi_slopes", alibi_slopes), ("sink", sink)):
        if x is not None and not isinstance(x, torch.Tensor):
            raise ArgumentError(
                f"{name} is a {type(x).__qualname__} and q a torch.Tensor: all arrays must be of one framework; "
                "convert with torch.from_dlpack, which copies nothing"
            )
        if x is not None and x.is_nested:
            raise UnsupportedError(f"{name}: {NESTED}")
    kind = q.device.type
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        # Pages, which outlive the call, are never copied: queries are cast to their dtype.
        low = torch.get_autocast_dtype(kind) if page_table is None else k.dtype
        q, k, v = (x.to(low) if x.dtype in (torch.float32, torch.float16, torch.bfloat16) else x for x in (q, k, v))
        if sink is not None and sink.dtype not in (torch.float32, low):
            sink = sink.to(torch.float32)
    seed_number = offset_number = 0
    if dropout_p:
        if seed is None:
            seed, offset = draw_seed((kind, q.device.index or 0))
        seed, seed_number = _random_number("seed", seed)
        offset, offset_number = _random_number("offset", offset)
    else:
        seed = offset = None
    arguments = (
        q, k, v,
        _lengths("cu_seqlens_q", cu_seqlens_q, q), _lengths("cu_seqlens_k", cu_seqlens_k, q),
        _lengths("seqused_q", seqused_q, q), _lengths("seqused_k", seqused_k, q),
        _lengths("page_table", page_table, q), alibi_slopes, sink, seed, offset,
        max_seqlen_q, max_seqlen_k, scale, *window_size, softcap, dropout_p, seed_number, offset_number,
        deterministic or torch.are_deterministic_algorithms_enabled(), split_size,
    )  # fmt: skip
    if bound is not None:
        mods = bound.mods if isinstance(bound.mods, str) else text.dumps(bound.mods)
        captured = _captured(bound, q)
        scalars = [float(x) for x in bound.scalars]
        return torch.ops.cuflash.attention_mods.default(*arguments, mods, scalars, "max_logit" in aux, captured)
    return torch.ops.cuflash.attention.default(*arguments, "max_logit" in aux)


def _captured(bound: Bound, q: Any) -> list[Any]:
    """The arrays that mods captured, as tensors."""
    found = []
    for i, x in enumerate(bound.arrays):
        if isinstance(x, np.ndarray) and x.ndim == 0:
            x = torch.as_tensor(x)
        if not isinstance(x, torch.Tensor):
            name = "an array" if isinstance(bound.mods, str) else bound.mods.arrays[i].name
            raise ArgumentError(
                f"{name}, which a mod captured, is a {type(x).__qualname__} and q a torch.Tensor: all arrays must be "
                "of one framework; convert with torch.from_dlpack, which copies nothing"
            )
        found.append(x)
    return found


@torch.compiler.disable(
    reason="torch.compile cannot look into a mod: trace it before, as score_mod = cuflash.mod(score_mod) outside of "
    "what is compiled, and pass what that returns"
)
def uncompiled(function: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
    """Calls a function outside of the graph that torch.compile makes, which breaks in two here."""
    warnings.warn(
        "torch.compile breaks its graph at this call of attention, for it cannot look into a mod: trace it before, as "
        "score_mod = cuflash.mod(score_mod) outside of what is compiled, and pass what that returns",
        stacklevel=3,
    )
    return function(*args, **keywords)


def _refuse_forward_mode() -> NoReturn:
    raise UnsupportedError(
        "attention has no forward-mode derivative (torch.func.jvp, jacfwd, forward_ad): use torch.func.vjp, jacrev or "
        "torch.autograd.grad, pass x.detach(), or use torch.nn.functional.scaled_dot_product_attention with "
        "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
    )


def _lengths(name: str, x: Any, q: Any) -> Any:
    """cu_seqlens or seqused as a tensor: those of the caller, or host values, which stay on the host until launch."""
    if x is None or isinstance(x, torch.Tensor):
        if x is not None and x.device != q.device:
            raise ArgumentError(
                f"{name} is on {x.device} and q on {q.device}: all arrays must be on one device; move {name} there, or "
                "pass a list, which is checked and copied"
            )
        return x
    if isinstance(x, (list, tuple)):
        return torch.tensor(x, dtype=torch.int32)
    if isinstance(x, np.ndarray):
        return torch.as_tensor(x)
    raise ArgumentError(f"{name} is a {type(x).__qualname__}: pass an int32 tensor, a list or a NumPy array")


def _random_number(name: str, x: Any) -> tuple[Any, int]:
    """A seed or offset as (tensor, 0) or (None, int), the int as the operators' signed 64 bits."""
    if isinstance(x, torch.Tensor):
        return x, 0
    if isinstance(x, np.ndarray) and x.size == 1 and x.dtype.kind in "iu":
        x = x.item()
    if not isinstance(x, (int, np.integer)):
        raise ArgumentError(f"{name}={x!r} must be an int, or an integer tensor of one element: pass int({name})")
    x = int(x)
    return None, x - 2**64 if 2**63 <= x < 2**64 else x


# The operators --------------------------------------------------------------------------------------------------------


def _keywords(arguments: tuple[Any, ...]) -> dict[str, Any]:
    """The keywords of `attention` from the operators' arguments after q, k and v."""
    named: dict[str, Any] = dict(zip((*_TENSORS[3:], *_NUMBERS), arguments, strict=True))
    for name in _LENGTHS:
        x = named[name]
        if x is not None and x.device.type == "cpu":
            named[name] = x.numpy()  # host values may stand beside device arrays in this form
    named["window_size"] = named.pop("left"), named.pop("right")
    for name in ("seed", "offset"):
        number = named.pop(name + "_number")
        if named[name] is None:
            named[name] = number % 2**64
    return named


def _bound(mods: str, scalars: Sequence[float], captured: Sequence[Any]) -> Bound:
    found = text.loads(mods)
    numbers = (int(x) if slot.kind == "int" else x for slot, x in zip(found.scalars, scalars, strict=True))
    return Bound(found, tuple(captured), tuple(numbers))


def _attention_kernel(q: Any, k: Any, v: Any, *rest: Any) -> tuple[Any, Any, Any]:
    *arguments, max_logit = rest
    keywords = _keywords(tuple(arguments))
    del keywords["deterministic"]  # the forward always is
    with torch.no_grad():
        result = calls["attention"](q, k, v, aux=("lse", "max_logit") if max_logit else ("lse",), **keywords)
    return result.out, result.lse, result.max_logit if max_logit else _nothing(q)


def _attention_shapes(q: Any, k: Any, v: Any, cu_seqlens_q: Any, *rest: Any) -> tuple[Any, Any, Any]:
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    rows = q.shape[:-2]
    lse = q.new_empty((*rows[:-1], q.shape[-2], rows[-1]), dtype=torch.float32)
    return out, lse, torch.empty_like(lse) if rest[-1] else _nothing(q)


def _backward_kernel(
    dout: Any, dlse: Any, out: Any, lse: Any, q: Any, k: Any, v: Any, *rest: Any
) -> tuple[Any, Any, Any, Any, Any]:
    *arguments, slopes = rest
    with torch.no_grad():
        grads = calls["attention_backward"](
            q, k, v, given=_given(dout, dlse, out, lse), grads=("alibi_slopes",) if slopes else (),
            **_keywords(tuple(arguments)),
        )  # fmt: skip
    dsink = _nothing(q) if grads.dsink is None else grads.dsink
    return grads.dq, grads.dk, grads.dv, dsink, grads.dcaptured[0] if slopes else _nothing(q)


def _given(dout: Any, dlse: Any, out: Any, lse: Any) -> dict[str, Any]:
    """Of a backward, as it reads them: autograd and vmap leave tensors expanded, in which the caller has no hand."""
    given = {"dout": dout if dout.stride(-1) == 1 else dout.contiguous(), "out": out, "lse": lse.contiguous()}
    return given if dlse is None else given | {"dlse": dlse.contiguous()}


def _attention_mods_kernel(q: Any, k: Any, v: Any, *rest: Any) -> tuple[Any, Any, Any]:
    *arguments, mods, scalars, max_logit, captured = rest
    keywords = _keywords(tuple(arguments))
    del keywords["deterministic"]
    with torch.no_grad():
        result = calls["attention"](
            q, k, v, aux=("lse", "max_logit") if max_logit else ("lse",), bound=_bound(mods, scalars, captured),
            **keywords,
        )  # fmt: skip
    return result.out, result.lse, result.max_logit if max_logit else _nothing(q)


def _attention_mods_shapes(*arguments: Any) -> tuple[Any, Any, Any]:
    return _attention_shapes(*arguments[:-1])


def _backward_mods_kernel(
    dout: Any, dlse: Any, out: Any, lse: Any, q: Any, k: Any, v: Any, *rest: Any
) -> tuple[Any, Any, Any, Any, Any, list[Any]]:
    *arguments, mods, scalars, slopes, wanted, captured = rest
    names = [f"captured{i}" for i, own in enumerate(wanted) if own] + ["alibi_slopes"] * slopes
    keywords = _keywords(tuple(arguments)) | {"bound": _bound(mods, scalars, captured)}
    with torch.no_grad():
        grads = calls["attention_backward"](q, k, v, given=_given(dout, dlse, out, lse), grads=tuple(names), **keywords)
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
    slopes, sink = rest[_SLOPES - 3], rest[_SINK - 3]
    grads = (x.new_empty(x.shape) for x in (q, k, v))
    dsink = _nothing(q) if sink is None else sink.new_empty(sink.shape)
    return *grads, dsink, slopes.new_empty(slopes.shape) if rest[-1] else _nothing(q)


def _nothing(like: Any) -> Any:
    """What stands for a result nobody asked for: an operator's results are always tensors."""
    return like.new_empty((0,), dtype=torch.float32)


_library = torch.library.Library("cuflash", "DEF")  # lives as long as the operators do
_TAGS = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)
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
    _library.define(_name + _signature, tags=_TAGS)
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _kernel, _key)
    torch.library.register_fake(f"cuflash::{_name}", _shapes, lib=_library)


# `flash_attn_with_kvcache`: two operators, of which one says that it writes to the caches.

_CACHE_ARRAYS = ("q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin", "alibi_slopes", "sink")
_CACHE_INDICES = (
    "cache_seqlens", "cache_batch_idx", "cache_leftpad", "block_table", "cu_seqlens_q", "cu_seqlens_k_new",
    "rotary_seqlens",
)  # fmt: skip
_CACHE_SCHEMA = ", ".join(
    [f"Tensor? {name}" for name in (*_CACHE_ARRAYS[3:], *_CACHE_INDICES)]
    + ["SymInt? length", "SymInt left", "SymInt right", "float? scale", "float softcap", "bool interleaved"]
    + ["SymInt num_splits", "SymInt? split_size", "SymInt? max_seqlen_q", "str mods, float[] scalars"]
    + ["Tensor[] captured"]
)


def attention_to_cache(
    arrays: dict[str, Any], indices: dict[str, Any], options: CacheOptions, length: int | None, bound: Bound | None
) -> tuple[Any, ...]:
    """`cuflash.flash_attn_with_kvcache` of tensors -> (out,) or (out, lse); the caches are written in place."""
    q = arrays["q"]
    for name, x in arrays.items():
        if not isinstance(x, torch.Tensor):
            raise ArgumentError(
                f"{name} is a {type(x).__qualname__} and q a torch.Tensor: all arrays must be of one framework; "
                "convert with torch.from_dlpack, which copies nothing"
            )
    if "k" in arrays and torch.is_grad_enabled():
        for name in ("k_cache", "v_cache"):
            if arrays[name].requires_grad:
                raise UnsupportedError(
                    f"{name}.requires_grad is True, and the call writes to it: keys in a cache have no gradient; pass "
                    f"{name}.detach(), which is the same memory"
                )
    mods, scalars, captured = "", [], []
    if bound is not None:
        mods = bound.mods if isinstance(bound.mods, str) else text.dumps(bound.mods)
        scalars, captured = [float(x) for x in bound.scalars], _captured(bound, q)
    operator = torch.ops.cuflash.attention_append if "k" in arrays else torch.ops.cuflash.attention_to_cache
    out, lse = operator.default(
        *[arrays.get(name) for name in _CACHE_ARRAYS],
        *[_lengths(name, indices.get(name), q) for name in _CACHE_INDICES],
        length, *options.window, options.scale, options.softcap, options.interleaved, options.num_splits,
        options.split_size, options.max_seqlen_q, mods, scalars, captured,
    )  # fmt: skip
    return (out, lse) if options.lse else (out,)


def _cache_kernel(*arguments: Any) -> tuple[Any, Any]:
    tensors, rest = arguments[: len(_CACHE_ARRAYS)], arguments[len(_CACHE_ARRAYS) :]
    positions, rest = rest[: len(_CACHE_INDICES)], rest[len(_CACHE_INDICES) :]
    length, left, right, scale, softcap, interleaved, num_splits, split_size, max_seqlen_q, mods, scalars, captured = (
        rest
    )
    arrays = {name: x for name, x in zip(_CACHE_ARRAYS, tensors, strict=True) if x is not None}
    indices = {  # host values may stand beside device arrays as NumPy arrays
        name: x.numpy() if x.device.type == "cpu" else x
        for name, x in zip(_CACHE_INDICES, positions, strict=True) if x is not None
    }  # fmt: skip
    options = CacheOptions(
        (left, right), scale, softcap, interleaved, num_splits, split_size, max_seqlen_q, True, length is not None
    )
    with torch.no_grad():
        return calls["attention_to_cache"](
            arrays, indices, options, length, _bound(mods, scalars, captured) if mods else None
        )


def _cache_shapes(q: Any, k_cache: Any, v_cache: Any, *rest: Any) -> tuple[Any, Any]:
    return _attention_shapes(q, k_cache, v_cache, None, False)[:2]


for _name, _first, _second in (("attention_append", "(a!)", "(b!)"), ("attention_to_cache", "", "")):
    _library.define(
        f"{_name}(Tensor q, Tensor{_first} k_cache, Tensor{_second} v_cache, {_CACHE_SCHEMA}) -> (Tensor out, "
        "Tensor lse)",
        tags=_TAGS,
    )
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _cache_kernel, _key)
    torch.library.register_fake(f"cuflash::{_name}", _cache_shapes, lib=_library)


# Derivatives ----------------------------------------------------------------------------------------------------------


def _differentiable(name: str, keep: Callable[..., None], backward: Callable[..., tuple[Any, ...]]) -> None:
    """Gives an operator its derivative: `keep(ctx, inputs, outputs)` saves what `backward(ctx, needed, *grads)` reads,
    all of them flat: of a list of tensors, which comes last, one after another.

    The derivatives of `torch.library.register_autograd` refuse to run inside torch.func. These are a node in the graph
    of each transform, as those of PyTorch's own operators are, and compilers need to know nothing of it.
    """
    operator = getattr(torch.ops.cuflash, name).default
    takes, gives = operator._schema.arguments, operator._schema.returns

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keys: Any, *flat: Any) -> tuple[Any, ...]:
            # Autograd has turned gradients off in here, and transforms further out follow this call as well.
            with torch.enable_grad(), torch.autograd.forward_ad._set_fwd_grad_enabled(True):
                results = _flat(_below_autograd(operator, keys, _nested(flat, takes)))
            keep(ctx, flat, results)
            return results

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            return None, *backward(ctx, ctx.needs_input_grad[1:], *grads)

    def follow(keys: Any, *arguments: Any) -> Any:
        flat = _flat(arguments)
        tensors = [x for x in flat if isinstance(x, torch.Tensor)]
        if torch.autograd.forward_ad._current_level >= 0:
            if any(torch.autograd.forward_ad.unpack_dual(x).tangent is not None for x in tensors):
                _refuse_forward_mode()
        if not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
            return _below_autograd(operator, keys, arguments)
        # NOTE: not Node.apply, which would hand the call to torch.func, and that has brought it here.
        with enable_single_level_autograd_function():
            return _nested(super(torch.autograd.Function, Node).apply(keys, *flat), gives)

    Node.__name__ = Node.__qualname__ = name
    _library.impl(name, follow, "Autograd", with_keyset=True)


def _below_autograd(operator: Any, keys: Any, arguments: tuple[Any, ...]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return operator.redispatch(keys & torch._C._after_autograd_keyset, *arguments)


def _flat(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """An operator's arguments or results, a list of tensors at their end one by one."""
    return (*values[:-1], *values[-1]) if isinstance(values[-1], list) else values


def _nested(flat: tuple[Any, ...], schema: Sequence[Any]) -> tuple[Any, ...]:
    """The inverse."""
    before = len(schema) - 1
    return (*flat[:before], [*flat[before:]]) if isinstance(schema[before].type, torch.ListType) else flat


def _keep(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
    """What the backward of `attention` will need."""
    out, lse, max_logit = outputs
    ctx.mark_non_differentiable(max_logit)
    ctx.set_materialize_grads(False)
    ctx.paged = inputs[_PAGES] is not None
    if ctx.paged:
        return _keep_shapes(ctx, inputs, outputs)
    ctx.save_for_backward(out, lse, *inputs[: len(_TENSORS)], *inputs[_WITH_MODS + 3 :])
    ctx.numbers, ctx.mods = inputs[len(_TENSORS) : _WITH_MODS], inputs[_WITH_MODS : _WITH_MODS + 2]


def _differentiate(ctx: Any, needed: tuple[bool, ...], dout: Any, dlse: Any, _: Any) -> tuple[Any, ...]:
    """A gradient, or None, for each argument of `attention`."""
    if dout is None and dlse is None:
        return (None,) * len(needed)
    if ctx.paged:
        return _refuse_gradient(_NO_PAGED_GRADIENT, ctx, needed, dout, dlse)
    out, lse, *tensors = ctx.saved_tensors
    given = (torch.zeros_like(out) if dout is None else dout, dlse, out, lse, *tensors[: len(_TENSORS)], *ctx.numbers)
    captured = tensors[len(_TENSORS) :]
    if len(needed) == _WITH_MODS + 1:
        dcaptured: list[Any] = []
        dq, dk, dv, dsink, dslopes = torch.ops.cuflash.attention_backward.default(*given, needed[_SLOPES])
    else:
        learned = _read_by_score(ctx.mods[0])
        wanted = [own and i in learned for i, own in enumerate(needed[_WITH_MODS + 3 :])]
        needed = (*needed[: _WITH_MODS + 3], *wanted)
        dq, dk, dv, dsink, dslopes, dcaptured = torch.ops.cuflash.attention_mods_backward.default(
            *given, *ctx.mods, needed[_SLOPES], wanted, captured
        )
    grads = [dq, dk, dv, *[None] * (len(needed) - 3 - len(dcaptured)), *dcaptured]
    grads[_SINK], grads[_SLOPES] = dsink, dslopes
    return tuple(grad if wanted else None for grad, wanted in zip(grads, needed, strict=True))


@lru_cache(maxsize=1024)
def _read_by_score(mods: str) -> frozenset[int]:
    """The captured arrays on which scores depend: others have no gradient."""
    score = text.loads(mods).score
    found: set[int] = set()
    for x in walk(score) if score is not None else ():
        found.update(slots_of(x) if x.kind == "float" else ())
    return frozenset(found)


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
    """There is no second derivative."""


def _refuse_second(*_: Any) -> NoReturn:
    raise UnsupportedError(
        "attention has a first derivative only, and this asks for a second (create_graph=True, torch.func.hessian, "
        "a gradient penalty): use torch.nn.functional.scaled_dot_product_attention with "
        "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
    )


# Keys in a cache have no gradient. A call with gradients on is none the worse for it: what raises is its backward, by
# an operator, so that a compiler which makes the backward before anybody wants it only writes it down.
_library.define("no_gradient(Tensor grad, SymInt[] shape, ScalarType dtype, str why) -> Tensor", tags=_TAGS)
_NO_CACHE_GRADIENT = (
    "flash_attn_with_kvcache has no gradient, and this asks for one: call it under torch.no_grad(), or pass "
    "q.detach(); to train, call cuflash.attention"
)
_NO_PAGED_GRADIENT = (
    "page_table: keys in pages have no gradient, and this asks for one: call attention under torch.no_grad(), or "
    "gather the pages of each sequence, k[page_table].reshape(batch, -1, heads, d), and pass seqused_k"
)


def _no_gradient_kernel(grad: Any, shape: Any, dtype: Any, why: str) -> NoReturn:
    raise UnsupportedError(why)


for _key in ("CPU", "CUDA"):
    _library.impl("no_gradient", _no_gradient_kernel, _key)
torch.library.register_fake(
    "cuflash::no_gradient", lambda grad, shape, dtype, why: grad.new_empty(shape, dtype=dtype), lib=_library
)


def _keep_shapes(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
    """What a gradient would look like. Nothing is kept alive for it."""
    ctx.shapes = [(x.shape, x.dtype) if isinstance(x, torch.Tensor) else None for x in inputs]


def _refuse_gradient(why: str, ctx: Any, needed: tuple[bool, ...], *grads: Any) -> tuple[Any, ...]:
    grad = next(x for x in grads if x is not None)
    operator = torch.ops.cuflash.no_gradient.default
    return tuple(operator(grad, *like, why) if own else None for own, like in zip(needed, ctx.shapes, strict=True))


for _name in ("attention", "attention_mods"):
    _differentiable(_name, _keep, _differentiate)
    _differentiable(f"{_name}_backward", _keep_nothing, _refuse_second)
for _name in ("attention_append", "attention_to_cache"):
    _differentiable(_name, _keep_shapes, functools.partial(_refuse_gradient, _NO_CACHE_GRADIENT))


# Vectorising: a batch of calls is one call with a larger batch --------------------------------------------------------


def _attention_of_many(function: Any, n: int, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]) -> tuple[Any, Any]:
    tensors, numbers = arguments[: len(_TENSORS)], arguments[len(_TENSORS) :]
    # Packed, in pages, or dropout, which counts sequences within a call, or a sink each.
    apart = _apart(arguments[_WITH_MODS:], in_dims[_WITH_MODS:], 3)
    if (
        tensors[3] is not None
        or tensors[_PAGES] is not None
        or numbers[_DROPOUT]
        or in_dims[_SINK] is not None
        or apart
    ):
        return _one_by_one(function, n, in_dims, arguments)
    batch = _batch_size(arguments[0], in_dims[0])
    folded = _fold_all(n, batch, in_dims[: len(_TENSORS)], tensors)
    return _unfold_all(n, batch, function(*folded, *numbers))


def _backward_of_many(function: Any, n: int, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]) -> tuple[Any, Any]:
    end = 4 + len(_TENSORS)
    results, tensors, numbers = arguments[:4], arguments[4:end], arguments[end:]
    # Packed, or dropout, or dsink, which is a sum over each call's batch.
    apart = _apart(arguments[4 + _WITH_MODS :], in_dims[4 + _WITH_MODS :], 4)
    if (
        tensors[3] is not None
        or tensors[_PAGES] is not None
        or numbers[_DROPOUT]
        or tensors[_SINK] is not None
        or apart
    ):
        return _one_by_one(function, n, in_dims, arguments)
    batch = _batch_size(arguments[4], in_dims[4])
    slopes = tensors[_SLOPES]
    rank = None if slopes is None else slopes.ndim - (in_dims[4 + _SLOPES] is not None)
    folded = [_fold(n, x, dim) for x, dim in zip(results, in_dims[:4], strict=True)]
    folded += _fold_all(n, batch, in_dims[4:end], tensors, own_slopes=True)
    grads, dims = _unfold_all(n, batch, function(*folded, *numbers))
    if rank == 1 and dims[-1] is not None:
        grads = (*grads[:-1], grads[-1].sum(1))
    return grads, dims


def _apart(rest: tuple[Any, ...], in_dims: tuple[Any, ...], n: int) -> bool:
    """Whether mods keep calls from being one: they read b, or what they capture, or its gradient, is each call's own.
    rest: the arguments from the mods on, n of them before the captured arrays."""
    if len(rest) < n:
        return False
    mods, wanted = text.loads(rest[0]), rest[3] if n == 4 else ()
    reads = [leaves(root) for root in (mods.score, mods.mask) if root is not None]
    return any("b" in names for names in reads) or any(dim is not None for dim in in_dims[n:]) or any(wanted)


def _batch_size(q: Any, dim: int | None) -> int:
    return q.shape[0] if dim is None or dim > 0 else q.shape[1]


def _fold(n: int, x: Any, dim: int | None) -> Any:
    """[..., n, ...] or one for all n -> [n * batch, ...]"""
    if x is None:
        return None
    x = x.unsqueeze(0).expand(n, *x.shape) if dim is None else x.movedim(dim, 0)
    return _readable(x.flatten(0, 1))


def _readable(x: Any) -> Any:
    """What `attention` takes in place: q, k and v with a unit last stride, the rest contiguous."""
    return x if x.ndim > 2 and x.stride(-1) == 1 else x.contiguous()


def _fold_all(n: int, batch: int, in_dims: Any, tensors: Any, own_slopes: bool = False) -> list[Any]:
    """The tensors of n dense calls as those of one. Slopes [heads] stay unless each call has (`own_slopes`) its own."""
    folded = []
    for name, x, dim in zip(_TENSORS, tensors, in_dims, strict=True):
        if name == "alibi_slopes" and x is not None and x.ndim - (dim is not None) == 1:
            if dim is not None or own_slopes:
                x = x.unsqueeze(0).expand(n, -1) if dim is None else x.movedim(dim, 0)
                x = _readable(x.unsqueeze(1).expand(n, batch, x.shape[-1]).flatten(0, 1))
        elif name not in ("sink", "seed", "offset"):
            x = _fold(n, x, dim)
        folded.append(x)
    return folded


def _unfold_all(n: int, batch: int, results: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[int | None, ...]]:
    """[n * batch, ...] -> [n, batch, ...], but for results nobody asked for."""
    dims = tuple(0 if x.ndim > 1 else None for x in results)
    return tuple(x if d is None else x.unflatten(0, (n, batch)) for x, d in zip(results, dims, strict=True)), dims


def _one_by_one(
    function: Callable[..., Any], n: int, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]
) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """What cannot be folded, one call after another."""
    every = [
        function(
            *[x if dim is None else _readable(x.select(dim, i)) for x, dim in zip(arguments, in_dims, strict=True)]
        )
        for i in range(n)
    ]
    results = tuple(torch.stack(parts) for parts in zip(*every, strict=True))
    return results, (0,) * len(results)


def _vectorised(name: str, of_many: Callable[..., Any]) -> None:
    """Gives an operator its rule for `vmap`."""
    operator = getattr(torch.ops.cuflash, name).default
    takes, gives = operator._schema.arguments, operator._schema.returns

    def call(*flat: Any) -> tuple[Any, ...]:
        return _flat(operator(*_nested(flat, takes)))

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        last = arguments[-1]
        # None, or a list, stands for the dimensions of a list.
        tail = [None] if not isinstance(last, list) else [None] * len(last) if in_dims[-1] is None else [*in_dims[-1]]
        dims = (*(dim if isinstance(dim, int) else None for dim in in_dims[:-1]), *tail)
        results, out_dims = of_many(call, info.batch_size, dims, _flat(arguments))
        return _nested(results, gives), _nested(out_dims, gives)

    torch.library.register_vmap(f"cuflash::{name}", rule, lib=_library)


for _name in ("attention", "attention_mods"):
    _vectorised(_name, _attention_of_many)
    _vectorised(f"{_name}_backward", _backward_of_many)


def _refuse_vmap(*_: Any) -> NoReturn:
    raise UnsupportedError(
        "flash_attn_with_kvcache under torch.func.vmap: its first axis is a batch already; call it outside of vmap on "
        "q.flatten(0, 1)"
    )


for _name in ("attention_append", "attention_to_cache"):
    torch.library.register_vmap(f"cuflash::{_name}", _refuse_vmap, lib=_library)
