"""`vmap` of PyTorch's operators of attention: a batch of calls is one call with a larger batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from ..errors import UnsupportedError
from ..frameworks import torch as adapter
from ..trace import text
from ..trace.expr import leaves
from .torch_operators import DROPOUT, LIBRARY, PAGES, SINK, SLOPES, TENSORS, WITH_MODS, flat_of, nested_of

torch: Any = adapter.library()


def _attention_of_many(function: Any, n: int, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]) -> tuple[Any, Any]:
    tensors, numbers = arguments[: len(TENSORS)], arguments[len(TENSORS) :]
    # Packed, in pages, or dropout, which counts sequences within a call, or a sink each.
    apart = _apart(arguments[WITH_MODS:], in_dims[WITH_MODS:], 3)
    if tensors[3] is not None or tensors[PAGES] is not None or numbers[DROPOUT] or in_dims[SINK] is not None or apart:
        return _one_by_one(function, n, in_dims, arguments)
    batch = _batch_size(arguments[0], in_dims[0])
    folded = _fold_all(n, batch, in_dims[: len(TENSORS)], tensors)
    return _unfold_all(n, batch, function(*folded, *numbers))


def _backward_of_many(function: Any, n: int, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]) -> tuple[Any, Any]:
    end = 4 + len(TENSORS)
    results, tensors, numbers = arguments[:4], arguments[4:end], arguments[end:]
    # Packed, or dropout, or dsink, which is a sum over each call's batch.
    apart = _apart(arguments[4 + WITH_MODS :], in_dims[4 + WITH_MODS :], 4)
    if tensors[3] is not None or tensors[PAGES] is not None or numbers[DROPOUT] or tensors[SINK] is not None or apart:
        return _one_by_one(function, n, in_dims, arguments)
    batch = _batch_size(arguments[4], in_dims[4])
    slopes = tensors[SLOPES]
    rank = None if slopes is None else slopes.ndim - (in_dims[4 + SLOPES] is not None)
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
    for name, x, dim in zip(TENSORS, tensors, in_dims, strict=True):
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
        return flat_of(operator(*nested_of(flat, takes)))

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        last = arguments[-1]
        # None, or a list, stands for the dimensions of a list.
        tail = [None] if not isinstance(last, list) else [None] * len(last) if in_dims[-1] is None else [*in_dims[-1]]
        dims = (*(dim if isinstance(dim, int) else None for dim in in_dims[:-1]), *tail)
        results, out_dims = of_many(call, info.batch_size, dims, flat_of(arguments))
        return nested_of(results, gives), nested_of(out_dims, gives)

    torch.library.register_vmap(f"cuflash::{name}", rule, lib=LIBRARY)


for _name in ("attention", "attention_mods"):
    _vectorised(_name, _attention_of_many)
    _vectorised(f"{_name}_backward", _backward_of_many)


def _refuse_vmap(*_: Any) -> NoReturn:
    raise UnsupportedError(
        "flash_attn_with_kvcache under torch.func.vmap: its first axis is a batch already; call it outside of vmap on "
        "q.flatten(0, 1)"
    )


for _name in ("attention_append", "attention_to_cache"):
    torch.library.register_vmap(f"cuflash::{_name}", _refuse_vmap, lib=LIBRARY)
