"""Attention as operations PyTorch knows: for autograd, torch.compile, torch.export, torch.func, autocast, checkpoints.

Two operators, `cuflash::attention` and `cuflash::attention_backward`, are what compilers and dispatch modes see:
opaque, with a shape rule each, and kernels that hand the tensors to `api`. Two `autograd.Function`s around them know
how to differentiate and how to vectorise (`vmap`). `attention` casts what autocast casts, and picks the way in.
Everything in here works on tensors alone, reads no value and waits for nothing.

Importing this module imports PyTorch; only `torch.py` does so, once a tensor asks for it.
"""

from __future__ import annotations

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
from .torch import _torch, draw_seed

torch: Any = _torch()

# The operators' arguments: tensors first, then numbers, both in this order wherever they travel as a tuple.
_TENSORS = (
    "q",
    "k",
    "v",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "seqused_q",
    "seqused_k",
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
    "Tensor? alibi_slopes, Tensor? sink, Tensor? seed, Tensor? offset, SymInt? max_seqlen_q, SymInt? max_seqlen_k, "
    "float? scale, SymInt left, SymInt right, float softcap, float dropout_p, SymInt seed_number, "
    "SymInt offset_number, bool deterministic, SymInt? split_size"
)
# Calls with mods are operators of their own, so that others carry nothing along. What they have besides: the mods, as
# `trace.text` writes them; the numbers they captured; which results are wanted; the arrays, as a list.
_MODS_SCHEMA = "str mods, float[] scalars"
_WITH_MODS = len(_TENSORS) + len(_NUMBERS)
_SLOPES, _SINK, _DROPOUT = _TENSORS.index("alibi_slopes"), _TENSORS.index("sink"), _NUMBERS.index("dropout_p")


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
    for name, x in (("k", k), ("v", v), ("alibi_slopes", alibi_slopes), ("sink", sink)):
        if x is not None and not isinstance(x, torch.Tensor):
            raise ArgumentError(
                f"{name} is a {type(x).__qualname__} and q a torch.Tensor: all arrays must be of one framework; "
                "convert with torch.from_dlpack, which copies nothing"
            )
    kind = q.device.type
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        low = torch.get_autocast_dtype(kind)
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
        alibi_slopes, sink, seed, offset, max_seqlen_q, max_seqlen_k, scale, *window_size, softcap,
        dropout_p, seed_number, offset_number,
        deterministic or torch.are_deterministic_algorithms_enabled(), split_size,
    )  # fmt: skip
    if bound is not None:
        mods = bound.mods if isinstance(bound.mods, str) else text.dumps(bound.mods)
        captured = _captured(bound, q)
        scalars = [float(x) for x in bound.scalars]
        if _in_torch_func(q, k, v, alibi_slopes, sink, *captured):
            return _AttentionMods.apply(*arguments, mods, _Whole(scalars), "max_logit" in aux, *captured)
        return torch.ops.cuflash.attention_mods.default(*arguments, mods, scalars, "max_logit" in aux, captured)
    arguments += ("max_logit" in aux,)
    if _in_torch_func(q, k, v, alibi_slopes, sink):
        return _Attention.apply(*arguments)
    return torch.ops.cuflash.attention.default(*arguments)


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


class _Whole(tuple):
    """A tuple that torch.func takes for one value."""


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


def _in_torch_func(*tensors: Any) -> bool:
    """Whether a transform of torch.func is at work, which follows an autograd.Function and not an operator."""
    if torch.compiler.is_compiling():
        return False
    transforms = torch._C._functorch.get_interpreter_stack()
    given = [x for x in tensors if x is not None]
    if transforms:
        if any(t.key() == torch._C._functorch.TransformType.Jvp for t in transforms):
            if any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in given):
                _refuse_forward_mode()
        return True
    if torch.autograd.forward_ad._current_level >= 0:
        if any(torch.autograd.forward_ad.unpack_dual(x).tangent is not None for x in given):
            _refuse_forward_mode()
    return False


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
    for name in _TENSORS[3:7]:
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
    # Gradients come as autograd left them, often expanded; whoever called attention has no hand in that.
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    with torch.no_grad():
        given = {"dout": dout, "out": out, "lse": lse} | ({} if dlse is None else {"dlse": dlse})
        grads = calls["attention_backward"](
            q, k, v, given=given, grads=("alibi_slopes",) if slopes else (), **_keywords(tuple(arguments))
        )
    dsink = _nothing(q) if grads.dsink is None else grads.dsink
    return grads.dq, grads.dk, grads.dv, dsink, grads.dcaptured[0] if slopes else _nothing(q)


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
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    given = {"dout": dout, "out": out, "lse": lse} | ({} if dlse is None else {"dlse": dlse.contiguous()})
    names = [f"captured{i}" for i, own in enumerate(wanted) if own] + ["alibi_slopes"] * slopes
    keywords = _keywords(tuple(arguments)) | {"bound": _bound(mods, scalars, captured)}
    with torch.no_grad():
        grads = calls["attention_backward"](q, k, v, given=given, grads=tuple(names), **keywords)
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


# `flash_attn_with_kvcache`: two operators, of which one says that it writes to the caches. No gradient.

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


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    """What the backward of `attention` will need."""
    out, lse, max_logit = output
    ctx.mark_non_differentiable(max_logit)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(out, lse, *inputs[: len(_TENSORS)])
    ctx.numbers = inputs[len(_TENSORS) : -1]


def _differentiate(backward: Callable[..., Any], ctx: Any, dout: Any, dlse: Any) -> tuple[Any, ...]:
    """A gradient, or None, for each argument of `attention`."""
    needed = ctx.needs_input_grad
    if dout is None and dlse is None:
        return (None,) * len(needed)
    out, lse, *tensors = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    dq, dk, dv, dsink, dslopes = backward(dout, dlse, out, lse, *tensors, *ctx.numbers, needed[_SLOPES])
    grads = [dq, dk, dv, *[None] * (len(needed) - 3)]
    grads[_SINK], grads[_SLOPES] = dsink, dslopes
    return tuple(grad if wanted else None for grad, wanted in zip(grads, needed, strict=True))


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    """There is no second derivative."""


def _refuse_second(ctx: Any, *grads: Any) -> NoReturn:
    raise UnsupportedError(
        "attention has a first derivative only, and this asks for a second (create_graph=True, torch.func.hessian, "
        "a gradient penalty): use torch.nn.functional.scaled_dot_product_attention with "
        "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
    )


def _operator_backward(ctx: Any, dout: Any, dlse: Any, _: Any) -> tuple[Any, ...]:
    return _differentiate(torch.ops.cuflash.attention_backward.default, ctx, dout, dlse)


torch.library.register_autograd("cuflash::attention", _operator_backward, setup_context=_keep, lib=_library)
torch.library.register_autograd(
    "cuflash::attention_backward", _refuse_second, setup_context=_keep_nothing, lib=_library
)


# With mods: arguments are "flat" where captured arrays are given one by one, as an autograd.Function needs them.


def _flat_attention(*flat: Any) -> tuple[Any, ...]:
    *arguments, mods, scalars, max_logit = flat[: _WITH_MODS + 3]
    return torch.ops.cuflash.attention_mods.default(
        *arguments, mods, list(scalars), max_logit, list(flat[_WITH_MODS + 3 :])
    )


def _flat_backward(*flat: Any) -> tuple[Any, ...]:
    end = _WITH_MODS + 8
    *arguments, mods, scalars, slopes, wanted = flat[:end]
    *grads, dcaptured = torch.ops.cuflash.attention_mods_backward.default(
        *arguments, mods, list(scalars), slopes, list(wanted), list(flat[end:])
    )
    return *grads, *dcaptured


def _keep_mods(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    out, lse, max_logit = output
    flat = (*inputs[:-1], *inputs[-1]) if isinstance(inputs[-1], list) else inputs
    ctx.mark_non_differentiable(max_logit)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(out, lse, *flat[: len(_TENSORS)], *flat[_WITH_MODS + 3 :])
    ctx.numbers, ctx.mods, ctx.scalars = flat[len(_TENSORS) : _WITH_MODS], flat[_WITH_MODS], flat[_WITH_MODS + 1]


def _differentiate_mods(backward: Callable[..., Any], ctx: Any, needed: Sequence[bool], dout: Any, dlse: Any) -> Any:
    """A gradient, or None, for each of the flat arguments."""
    if dout is None and dlse is None:
        return (None,) * len(needed)
    out, lse, *tensors = ctx.saved_tensors
    tensors, captured = tensors[: len(_TENSORS)], tensors[len(_TENSORS) :]
    if dout is None:
        dout = torch.zeros_like(out)
    learned = _read_by_score(ctx.mods)
    needed = [*needed[: _WITH_MODS + 3], *(own and i in learned for i, own in enumerate(needed[_WITH_MODS + 3 :]))]
    wanted = _Whole(needed[_WITH_MODS + 3 :])
    dq, dk, dv, dsink, dslopes, *dcaptured = backward(
        dout, dlse, out, lse, *tensors, *ctx.numbers, ctx.mods, _Whole(ctx.scalars), needed[_SLOPES], wanted, *captured
    )
    grads = [dq, dk, dv, *[None] * _WITH_MODS, *dcaptured]
    grads[_SINK], grads[_SLOPES] = dsink, dslopes
    return tuple(grad if own else None for grad, own in zip(grads, needed, strict=True))


@lru_cache(maxsize=1024)
def _read_by_score(mods: str) -> frozenset[int]:
    """The captured arrays on which scores depend: others have no gradient."""
    score = text.loads(mods).score
    found: set[int] = set()
    for x in walk(score) if score is not None else ():
        found.update(slots_of(x) if x.kind == "float" else ())
    return frozenset(found)


def _operator_backward_mods(ctx: Any, dout: Any, dlse: Any, _: Any) -> tuple[Any, ...]:
    *needed, captured = ctx.needs_input_grad
    flat = _differentiate_mods(_flat_backward, ctx, (*(x is True for x in needed), *captured), dout, dlse)
    grads = [*flat[: _WITH_MODS + 3], list(flat[_WITH_MODS + 3 :])]
    if not ctx.scalars:
        grads[_WITH_MODS + 1] = []  # an empty list counts as one of tensors
    return tuple(grads)


torch.library.register_autograd(
    "cuflash::attention_mods", _operator_backward_mods, setup_context=_keep_mods, lib=_library
)
torch.library.register_autograd(
    "cuflash::attention_mods_backward", _refuse_second, setup_context=_keep_nothing, lib=_library
)


class _Attention(torch.autograd.Function):
    """The operator once more, for torch.func."""

    setup_context = staticmethod(_keep)

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return torch.ops.cuflash.attention.default(*arguments)

    @staticmethod
    def backward(ctx: Any, dout: Any, dlse: Any, _: Any) -> tuple[Any, ...]:
        return _differentiate(_Backward.apply, ctx, dout, dlse)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        return _attention_of_many(_Attention.apply, info.batch_size, in_dims, arguments)


class _Backward(torch.autograd.Function):
    """Its backward, for transforms of the gradient."""

    setup_context = staticmethod(_keep_nothing)
    backward = staticmethod(_refuse_second)

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return torch.ops.cuflash.attention_backward.default(*arguments)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        return _backward_of_many(_Backward.apply, info.batch_size, in_dims, arguments)


class _AttentionMods(torch.autograd.Function):
    """The operator with mods, for torch.func."""

    setup_context = staticmethod(_keep_mods)
    forward = staticmethod(_flat_attention)

    @staticmethod
    def backward(ctx: Any, dout: Any, dlse: Any, _: Any) -> tuple[Any, ...]:
        return _differentiate_mods(_BackwardMods.apply, ctx, ctx.needs_input_grad, dout, dlse)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        return _attention_of_many(_AttentionMods.apply, info.batch_size, in_dims, arguments)


class _BackwardMods(torch.autograd.Function):
    setup_context = staticmethod(_keep_nothing)
    backward = staticmethod(_refuse_second)
    forward = staticmethod(_flat_backward)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        return _backward_of_many(_BackwardMods.apply, info.batch_size, in_dims, arguments)


# Vectorising: a batch of calls is one call with a larger batch --------------------------------------------------------


def _attention_of_many(function: Any, n: int, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]) -> tuple[Any, Any]:
    tensors, numbers = arguments[: len(_TENSORS)], arguments[len(_TENSORS) :]
    # Packed, or dropout, which counts sequences within a call, or a sink each.
    apart = _apart(arguments[_WITH_MODS:], in_dims[_WITH_MODS:], 3)
    if tensors[3] is not None or numbers[_DROPOUT] or in_dims[_SINK] is not None or apart:
        return _one_by_one(function, n, in_dims, arguments)
    batch = _batch_size(arguments[0], in_dims[0])
    folded = _fold_all(n, batch, in_dims[: len(_TENSORS)], tensors)
    return _unfold_all(n, batch, function(*folded, *numbers))


def _backward_of_many(function: Any, n: int, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]) -> tuple[Any, Any]:
    end = 4 + len(_TENSORS)
    results, tensors, numbers = arguments[:4], arguments[4:end], arguments[end:]
    # Packed, or dropout, or dsink, which is a sum over each call's batch.
    apart = _apart(arguments[4 + _WITH_MODS :], in_dims[4 + _WITH_MODS :], 4)
    if tensors[3] is not None or numbers[_DROPOUT] or tensors[_SINK] is not None or apart:
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


for _name, _of_many in (("attention", _attention_of_many), ("attention_backward", _backward_of_many)):

    def _vmap(
        info: Any, in_dims: tuple[Any, ...], *arguments: Any, _of_many: Any = _of_many, _name: str = _name
    ) -> Any:
        return _of_many(getattr(torch.ops.cuflash, _name).default, info.batch_size, in_dims, arguments)

    torch.library.register_vmap(f"cuflash::{_name}", _vmap, lib=_library)


def _vmap_attention_mods(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    flat, dims = _flattened(arguments, in_dims)
    return _attention_of_many(_flat_attention, info.batch_size, dims, flat)


def _vmap_backward_mods(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    flat, dims = _flattened(arguments, in_dims)
    grads, out_dims = _backward_of_many(_flat_backward, info.batch_size, dims, flat)
    return (*grads[:5], [*grads[5:]]), (*out_dims[:5], [*out_dims[5:]])


def _flattened(arguments: tuple[Any, ...], in_dims: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The operators' arguments with captured arrays one by one, and no other lists."""
    captured = arguments[-1]
    dims = in_dims[-1] if isinstance(in_dims[-1], (list, tuple)) else [in_dims[-1]] * len(captured)
    before = [_Whole(x) if isinstance(x, (list, tuple)) else x for x in arguments[:-1]]
    return (*before, *captured), (*(d if isinstance(d, int) else None for d in in_dims[:-1]), *dims)


torch.library.register_vmap("cuflash::attention_mods", _vmap_attention_mods, lib=_library)
torch.library.register_vmap("cuflash::attention_mods_backward", _vmap_backward_mods, lib=_library)
