"""The derivatives of PyTorch's operators of attention: nodes in autograd's graph, and in those of torch.func."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NoReturn

from ..errors import UnsupportedError
from ..frameworks import torch as adapter
from ..trace import text
from ..trace.expr import slots_of, walk
from .torch_operators import LIBRARY, PAGES, SINK, SLOPES, TAGS, TENSORS, WITH_MODS, flat_of, nested_of

torch: Any = adapter.library()

enable_single_level_autograd_function: Any = importlib.import_module(
    "torch._functorch.utils"
).enable_single_level_autograd_function


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
                results = flat_of(_below_autograd(operator, keys, nested_of(flat, takes)))
            keep(ctx, flat, results)
            return results

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            return None, *backward(ctx, ctx.needs_input_grad[1:], *grads)

    def follow(keys: Any, *arguments: Any) -> Any:
        flat = flat_of(arguments)
        tensors = [x for x in flat if isinstance(x, torch.Tensor)]
        if torch.autograd.forward_ad._current_level >= 0:
            if any(torch.autograd.forward_ad.unpack_dual(x).tangent is not None for x in tensors):
                _refuse_forward_mode()
        if not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
            return _below_autograd(operator, keys, arguments)
        # NOTE: not Node.apply, which would hand the call to torch.func, and that has brought it here.
        with enable_single_level_autograd_function():
            return nested_of(super(torch.autograd.Function, Node).apply(keys, *flat), gives)

    Node.__name__ = Node.__qualname__ = name
    LIBRARY.impl(name, follow, "Autograd", with_keyset=True)


def _refuse_forward_mode() -> NoReturn:
    raise UnsupportedError(
        "attention has no forward-mode derivative (torch.func.jvp, jacfwd, forward_ad): use torch.func.vjp, jacrev or "
        "torch.autograd.grad, pass x.detach(), or use torch.nn.functional.scaled_dot_product_attention with "
        "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
    )


def _below_autograd(operator: Any, keys: Any, arguments: tuple[Any, ...]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return operator.redispatch(keys & torch._C._after_autograd_keyset, *arguments)


def _keep(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
    """What the backward of `attention` will need."""
    out, lse, max_logit = outputs
    ctx.mark_non_differentiable(max_logit)
    ctx.set_materialize_grads(False)
    ctx.paged = inputs[PAGES] is not None
    if ctx.paged:
        return _keep_shapes(ctx, inputs, outputs)
    ctx.save_for_backward(out, lse, *inputs[: len(TENSORS)], *inputs[WITH_MODS + 3 :])
    ctx.numbers, ctx.mods = inputs[len(TENSORS) : WITH_MODS], inputs[WITH_MODS : WITH_MODS + 2]


def _differentiate(ctx: Any, needed: tuple[bool, ...], dout: Any, dlse: Any, _: Any) -> tuple[Any, ...]:
    """A gradient, or None, for each argument of `attention`."""
    if dout is None and dlse is None:
        return (None,) * len(needed)
    if ctx.paged:
        return _refuse_gradient(_NO_PAGED_GRADIENT, ctx, needed, dout, dlse)
    out, lse, *tensors = ctx.saved_tensors
    given = (torch.zeros_like(out) if dout is None else dout, dlse, out, lse, *tensors[: len(TENSORS)], *ctx.numbers)
    captured = tensors[len(TENSORS) :]
    if len(needed) == WITH_MODS + 1:
        dcaptured: list[Any] = []
        dq, dk, dv, dsink, dslopes = torch.ops.cuflash.attention_backward.default(*given, needed[SLOPES])
    else:
        learned = _read_by_score(ctx.mods[0])
        wanted = [own and i in learned for i, own in enumerate(needed[WITH_MODS + 3 :])]
        needed = (*needed[: WITH_MODS + 3], *wanted)
        dq, dk, dv, dsink, dslopes, dcaptured = torch.ops.cuflash.attention_mods_backward.default(
            *given, *ctx.mods, needed[SLOPES], wanted, captured
        )
    grads = [dq, dk, dv, *[None] * (len(needed) - 3 - len(dcaptured)), *dcaptured]
    grads[SINK], grads[SLOPES] = dsink, dslopes
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
LIBRARY.define("no_gradient(Tensor grad, SymInt[] shape, ScalarType dtype, str why) -> Tensor", tags=TAGS)

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
    LIBRARY.impl("no_gradient", _no_gradient_kernel, _key)

torch.library.register_fake(
    "cuflash::no_gradient", lambda grad, shape, dtype, why: grad.new_empty(shape, dtype=dtype), lib=LIBRARY
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
