"""Between padded and packed batches: many sequences in one array, end to end, with no row wasted on padding.

A packed array holds the rows of every sequence, `[total, ...]`, and `cu_seqlens [batch + 1]`, int32 from 0, says where
each begins: sequence b owns the rows `cu_seqlens[b]` to `cu_seqlens[b + 1]`. `attention(..., cu_seqlens_q=...,
cu_seqlens_k=...)` takes the pair as it is.

Everything here works on arrays of NumPy, CuPy, PyTorch and JAX, by the array's own functions: the result stays in its
framework and on its device, and gradients flow through. Whatever has a size that depends on the values of a device
array (the rows a mask keeps) waits for the device once; `pack`, and `unpack` with a NumPy `cu_seqlens`, never do and
may stand under `jax.jit` and `torch.compile`.
"""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np

from .errors import ArgumentError, require

__all__ = ["Packed", "cu_seqlens_from", "pack", "pad_input", "unpack", "unpad_input"]

Array = Any  # of NumPy, CuPy, PyTorch or JAX


class Packed(NamedTuple):
    """Sequences end to end: `data [total, ...]`, `cu_seqlens [batch + 1]` int32, `max_seqlen`, the longest."""

    data: Array
    cu_seqlens: Array
    max_seqlen: int


def pack(arrays: Iterable[Array]) -> Packed:
    """Lay sequences `[len_b, ...]` of one framework, dtype and trailing shape end to end.

    >>> packed = pack([np.zeros((3, 4, 64)), np.zeros((0, 4, 64)), np.zeros((2, 4, 64))])
    >>> packed.data.shape, packed.cu_seqlens, packed.max_seqlen
    ((5, 4, 64), array([0, 3, 3, 5], dtype=int32), 3)
    """
    arrays = list(arrays)
    require(
        len(arrays) > 0,
        "arrays=[] must hold at least one sequence, whose framework and trailing shape the result takes: pass one "
        "array of length 0 for a batch without rows",
    )
    first, xp = arrays[0], _namespace(arrays[0], "arrays[0]")
    for i, x in enumerate(arrays):
        require(
            _namespace(x, f"arrays[{i}]") is xp,
            f"arrays[{i}] is a {_type_name(x)}, arrays[0] a {_type_name(first)}: all must be of one framework; "
            "convert with from_dlpack",
        )
        require(
            x.ndim > 0 and x.shape[1:] == first.shape[1:],
            f"arrays[{i}].shape={tuple(x.shape)} must be (length, *{tuple(first.shape[1:])}) as of arrays[0]: only "
            "the first dimension may differ",
        )
        require(x.dtype == first.dtype, f"arrays[{i}].dtype={x.dtype} must be {first.dtype} as of arrays[0]: cast it")
    lengths = [x.shape[0] for x in arrays]
    with _device_of(first):
        return Packed(xp.concatenate(arrays), _int32_like(first, _cumulative(lengths)), max(lengths))


def unpack(data: Array, cu_seqlens: Array | Sequence[int]) -> list[Array]:
    """The sequences of packed `data [total, ...]`, as views where the framework has views. Undoes `pack`.

    >>> [x.tolist() for x in unpack(np.arange(5), [0, 3, 3, 5])]
    [[0, 1, 2], [], [3, 4]]
    """
    _namespace(data, "data")
    bounds = _on_host(cu_seqlens)
    require(
        len(bounds) > 0 and bounds[0] == 0,
        f"cu_seqlens={bounds[:8]} must begin with 0: cu_seqlens_from(lengths=...) makes it from the lengths",
    )
    for b, (begin, end) in enumerate(itertools.pairwise(bounds)):
        require(
            begin <= end <= data.shape[0],
            f"cu_seqlens[{b + 1}]={end} must lie between cu_seqlens[{b}]={begin} and data.shape[0]={data.shape[0]}: "
            "it counts the rows up to the end of each sequence",
        )
    return [data[begin:end] for begin, end in itertools.pairwise(bounds)]


def unpad_input(x: Array, mask: Array, unused_mask: Array | None = None) -> tuple[Array, Array, Array, int, Array]:
    """The rows of a padded `x [batch, len, ...]` that `mask [batch, len]` (bool or int, nonzero: kept) selects.

    Returns, as flash-attn's function of this name does, `(x [total, ...], indices [total], cu_seqlens [batch + 1],
    max_seqlen, seqused [batch])`: indices are the places of the kept rows in x seen as [batch * len, ...], for
    `pad_input`. `unused_mask` selects further rows, which get their place in the packed array but are not counted in
    `seqused`. Waits for the device, which alone knows how many rows there are.

    >>> x = np.array([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0]])
    >>> unpad_input(x, x > 0)
    (array([1., 2., 3.]), array([0, 1, 3]), array([0, 2, 3], dtype=int32), 2, array([2, 1], dtype=int32))
    """
    xp = _namespace(x, "x")
    with _device_of(x):
        used = kept = _as_mask(mask, "mask", like=x)
        if unused_mask is not None:
            kept = used | _as_mask(unused_mask, "unused_mask", like=x)
        lengths = xp.sum(kept, 1, dtype=xp.int32)
        indices = xp.argwhere(kept.reshape(-1))[:, 0]
        rows = x.reshape((x.shape[0] * x.shape[1], *x.shape[2:]))[indices]
        max_seqlen = int(lengths.max()) if kept.shape[0] > 0 else 0
        return rows, indices, _cumulative_on_device(xp, lengths), max_seqlen, xp.sum(used, 1, dtype=xp.int32)


def pad_input(x: Array, indices: Array, batch: int, seqlen: int) -> Array:
    """Put packed rows `x [total, ...]` back at `indices [total]` of a padded `[batch, seqlen, ...]`, zero elsewhere.

    >>> pad_input(np.array([1.0, 2.0, 3.0]), np.array([0, 1, 3]), batch=2, seqlen=3)
    array([[1., 2., 0.],
           [3., 0., 0.]])
    """
    xp = _namespace(x, "x")
    require(
        tuple(indices.shape) == (x.shape[0],),
        f"indices.shape={tuple(indices.shape)} must be ({x.shape[0]},), one place for each row of x: pass the "
        "indices that unpad_input returned with it",
    )
    shape = (batch * seqlen, *x.shape[1:])
    with _device_of(x):
        padded = x.new_zeros(shape) if xp.__name__ == "torch" else xp.zeros_like(x, shape=shape)
        if hasattr(padded, "at"):  # JAX, whose arrays are values
            padded = padded.at[indices].set(x)
        else:
            padded[indices] = x  # in PyTorch recorded: gradients reach x
        return padded.reshape((batch, seqlen, *x.shape[1:]))


def cu_seqlens_from(
    *,
    lengths: Array | Sequence[int] | None = None,
    mask: Array | None = None,
    position_ids: Array | None = None,
) -> Array:
    """Where each sequence of a packed array begins, `[batch + 1]` int32, from exactly one of

    lengths       [batch] integers; a list or tuple gives a NumPy array
    mask          [batch, len] bool or int, nonzero: the row is kept
    position_ids  [total] or [batch, len] integers, which restart from 0 with each sequence; waits for the device

    in the framework and on the device of what is given.

    >>> cu_seqlens_from(lengths=[3, 0, 2])
    array([0, 3, 3, 5], dtype=int32)
    >>> cu_seqlens_from(mask=np.array([[1, 1, 1], [0, 1, 1]]))
    array([0, 3, 5], dtype=int32)
    >>> cu_seqlens_from(position_ids=np.array([0, 1, 2, 0, 1]))
    array([0, 3, 5], dtype=int32)
    """
    sources = {"lengths": lengths, "mask": mask, "position_ids": position_ids}
    given = [name for name, value in sources.items() if value is not None]
    require(
        len(given) == 1,
        f"{' and '.join(given) or 'nothing'} given: cu_seqlens_from takes exactly one of lengths, mask and "
        "position_ids; leave the others out",
    )
    if mask is not None:
        xp = _namespace(mask, "mask")
        with _device_of(mask):
            return _cumulative_on_device(xp, xp.sum(_as_mask(mask, "mask", like=mask), 1, dtype=xp.int32))
    if lengths is not None:
        if isinstance(lengths, Sequence):
            return _cumulative(list(lengths))
        xp = _namespace(lengths, "lengths")
        _require_integers(lengths, "lengths", ndim=1)
        with _device_of(lengths):
            return _cumulative(lengths.tolist()) if xp is np else _cumulative_on_device(xp, lengths)

    xp = _namespace(position_ids, "position_ids")
    _require_integers(position_ids, "position_ids")
    with _device_of(position_ids):
        positions = position_ids.reshape(-1)  # type: ignore[union-attr]
        total = positions.shape[0]
        starts = xp.argwhere(positions == 0)[:, 0]
        require(
            total == 0 or (starts.shape[0] > 0 and int(starts[0]) == 0),
            f"position_ids begin with {positions[:1].tolist()}, not with 0: each sequence starts from position 0; pass "
            "lengths= for sequences whose positions do not",
        )
        bounds = xp.concatenate([starts, _int32_like(positions, [total])])
        return bounds.to(xp.int32) if xp.__name__ == "torch" else bounds.astype(xp.int32)


# How the frameworks differ. ------------------------------------------------------------------------------------------

_NAMESPACES = {"numpy": "numpy", "cupy": "cupy", "torch": "torch", "jax": "jax.numpy", "jaxlib": "jax.numpy"}


def _namespace(x: Array, name: str) -> Any:
    """The module with the functions for `x`, in which the four frameworks agree but for what is written below."""
    for cls in type(x).__mro__:
        module = _NAMESPACES.get(cls.__module__.partition(".")[0])
        if module is not None:
            # Loaded already, with the array; compilers of PyTorch follow a look-up and no import.
            return sys.modules.get(module) or importlib.import_module(module)
    raise ArgumentError(
        f"{name} is a {_type_name(x)}, not an array of NumPy, CuPy, PyTorch or JAX: wrap it with that framework's "
        "asarray or from_dlpack"
    )


def _device_of(x: Array) -> AbstractContextManager[Any]:
    """Makes the device of `x` current where the framework would otherwise use another one: CuPy does."""
    return x.device if type(x).__module__.startswith("cupy") else nullcontext()


def _type_name(x: Any) -> str:
    return f"{type(x).__module__}.{type(x).__qualname__}".removeprefix("builtins.")


def _int32_like(x: Array, values: Any) -> Array:
    """Host integers as an int32 array in the framework and on the device of `x`."""
    xp = _namespace(x, "x")
    values = np.asarray(values, np.int32)
    if xp is np:
        return values
    if xp.__name__ == "torch":
        return xp.as_tensor(values, device=x.device)
    if xp.__name__ == "cupy":
        with _device_of(x):
            return xp.asarray(values)
    if _is_traced(x):  # under jax.jit x has no device yet: the constant goes where the computation runs
        return xp.asarray(values)
    return xp.asarray(values, device=next(iter(x.devices())))


def _is_traced(x: Array) -> bool:
    from jax.core import Tracer

    return isinstance(x, Tracer)


def _on_host(x: Array | Sequence[int]) -> list[int]:
    """Integers of a list or of an array of any framework, as Python ints."""
    if not isinstance(x, Sequence):
        _require_integers(x, "cu_seqlens", ndim=1)
    return [int(i) for i in (x if isinstance(x, Sequence) else x.tolist())]


def _require_integers(x: Array, name: str, ndim: int | None = None) -> None:
    require("int" in str(x.dtype), f"{name}.dtype={x.dtype} must be an integer: cast it to int32")
    require(ndim in (None, x.ndim), f"{name}.shape={tuple(x.shape)} must have {ndim} dimension: reshape it")


def _as_mask(mask: Array, name: str, like: Array) -> Array:
    """`mask [batch, len]` as bools. Floats are refused: in an additive mask 0 means kept, here it means dropped."""
    require(
        _namespace(mask, name) is _namespace(like, "x"),
        f"{name} is a {_type_name(mask)} beside a {_type_name(like)}: both must be of one framework; convert it with "
        "from_dlpack",
    )
    require(
        tuple(mask.shape) == tuple(like.shape[:2]) and mask.ndim == 2,
        f"{name}.shape={tuple(mask.shape)} must be [batch, len], the first two dimensions of {tuple(like.shape)}",
    )
    require(
        "bool" in str(mask.dtype) or "int" in str(mask.dtype),
        f"{name}.dtype={mask.dtype} must be bool or an integer, nonzero where the row is kept: pass {name} == 0 for an "
        f"additive mask, {name} > 0 for one of ones",
    )
    return mask != 0


def _cumulative(lengths: Sequence[int]) -> np.ndarray:
    """[0, l0, l0 + l1, ...] as int32, of lengths known to the host and therefore checked."""
    for b, length in enumerate(lengths):
        require(
            isinstance(length, (int, np.integer)) and not isinstance(length, bool) and length >= 0,
            f"lengths[{b}]={length!r} must be an integer of at least 0: it counts the rows of a sequence",
        )
    cumulative = np.cumsum([0, *lengths], dtype=np.int64)
    require(
        cumulative[-1] < 2**31,
        f"sum(lengths)={cumulative[-1]} must be below 2**31, for cu_seqlens is int32: split the batch",
    )
    return cumulative.astype(np.int32)


def _cumulative_on_device(xp: Any, lengths: Array) -> Array:
    """The same of lengths on a device, without looking at them."""
    return xp.concatenate([_int32_like(lengths, [0]), xp.cumsum(lengths, 0, dtype=xp.int32)])
