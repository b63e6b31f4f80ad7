"""FlexAttention's names: `from cuflash import flex_attention, create_block_mask` in place of torch.nn.attention's.

What a mask_mod or score_mod means is what it means there; arrays may be of NumPy, CuPy, PyTorch or JAX. There is
nothing to compile first, and a `BlockMask` (block_mask.py) needs no building: kernels work out by themselves, from the
function, which tiles are empty, full or mixed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from . import mods
from .api import attention
from .block_kinds import Seen, mask_of
from .block_mask import BlockMask, require_mask
from .block_tables import as_used, checked_device, placed
from .call import number_checks
from .errors import ArgumentError, require
from .keywords import with_suggestions
from .mods.given import require_int
from .namespaces import functions_of
from .trace.uncompiled import outside_of_compilers

Array = Any  # of NumPy, CuPy, PyTorch or JAX


class AuxRequest(NamedTuple):
    """What `flex_attention` returns beside the result.

    lse         the logarithm of the softmax's denominator
    max_scores  each row's largest score
    """

    lse: bool = False
    max_scores: bool = False


class AuxOutput(NamedTuple):
    """What was asked for with `AuxRequest`, float32 [batch, heads, q_len]; the rest is None."""

    lse: Array = None
    max_scores: Array = None


@with_suggestions()
def flex_attention(
    query: Array,
    key: Array,
    value: Array,
    score_mod: Callable[..., Any] | None = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: dict[str, Any] | None = None,
    *,
    return_aux: AuxRequest | None = None,
) -> Any:
    """Attention with a function on its scores and a mask, as torch.nn.attention.flex_attention has it.

    query [batch, heads_q, q_len, d], key [batch, heads_kv, kv_len, d], value [batch, heads_kv, kv_len, d_v] -> out
    [batch, heads_q, q_len, d_v]; key and value may have batch 1, which serves all. The arrays are read in place,
    whatever their strides; memory of the result is [batch, q_len, heads_q, d_v], so that its transpose is free.

    score_mod       f(score, b, h, q_idx, kv_idx) -> score; the score that comes in is scaled
    block_mask      a `BlockMask` for these lengths, or PyTorch's
    scale           None: 1 / sqrt(d)
    enable_gqa      heads_kv may be less than heads_q, and divides it
    return_lse      return (out, lse), lse float32 [batch, heads_q, q_len], the natural logarithm
    return_aux      return (out, `AuxOutput`); not beside return_lse
    kernel_options  ignored with a warning: tiles follow from the problem and the device

    Raises `ArgumentError` for a mask of other lengths, and whatever `cuflash.attention` raises.

    >>> import numpy as np
    >>> x = np.random.default_rng(0).standard_normal((1, 2, 8, 16)).astype(np.float32)
    >>> block_mask = create_block_mask(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, None, None, 8, 8)
    >>> out, lse = flex_attention(x, x, x, block_mask=block_mask, return_lse=True)
    >>> out.shape, lse.shape, bool(np.allclose(out[:, :, 0], x[:, :, 0]))  # the first token sees itself alone
    ((1, 2, 8, 16), (1, 2, 8), True)
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        _require_4d(name, x)
    enable_gqa = number_checks.flag("enable_gqa", enable_gqa)
    return_lse = number_checks.flag("return_lse", return_lse)
    batch, heads_q, q_len, _ = query.shape
    heads_kv, kv_len = key.shape[1], key.shape[2]
    if heads_q != heads_kv and not enable_gqa:
        raise ArgumentError(
            f"query.shape[1]={heads_q} and key.shape[1]={heads_kv} must be the same number of heads: pass "
            "enable_gqa=True where a key head serves several query heads"
        )
    require(
        return_aux is None or isinstance(return_aux, AuxRequest) or _is_request(return_aux),
        f"return_aux={return_aux!r} must be an AuxRequest: pass AuxRequest(lse=True, max_scores=True)",
    )
    require(
        kernel_options is None or isinstance(kernel_options, Mapping),
        f"kernel_options={kernel_options!r} must be a dict, or None: leave it away",
    )
    if return_lse and return_aux is not None:
        raise ArgumentError(f"return_lse beside return_aux={return_aux!r}: pass return_aux=AuxRequest(lse=True) alone")
    if kernel_options:
        warnings.warn(
            f"kernel_options: {', '.join(map(str, kernel_options))} ignored: tiles and stages follow from the problem "
            "and the device; leave them away",
            UserWarning,
            stacklevel=3,  # behind with_suggestions
        )
    mask_mod = None
    if block_mask is not None:
        block_mask = _own(block_mask)
        block_mask.require_fits(batch, heads_q, q_len, kv_len)
        mask_mod = block_mask.as_mask_mod(query)
    if key.shape[0] == 1 != batch:
        key = _broadcast(key, (batch, *key.shape[1:]))
    if value.shape[0] == 1 != batch:
        value = _broadcast(value, (batch, *value.shape[1:]))
    wanted = AuxRequest(lse=True) if return_lse else AuxRequest() if return_aux is None else return_aux
    aux = ("lse",) * bool(wanted.lse) + ("max_logit",) * bool(wanted.max_scores)
    result = attention(
        query.swapaxes(1, 2), key.swapaxes(1, 2), value.swapaxes(1, 2),
        scale=scale, score_mod=score_mod, mask_mod=mask_mod, aux=aux,
    )  # fmt: skip
    if not aux:
        out = result.swapaxes(1, 2)
        return out if return_aux is None else (out, AuxOutput())
    out = result.out.swapaxes(1, 2)
    return (out, result.lse) if return_lse else (out, AuxOutput(result.lse, result.max_logit))


def _own(block_mask: Any) -> BlockMask:
    """A BlockMask as it is, one of PyTorch's by its blocks."""
    if isinstance(block_mask, BlockMask):
        return block_mask
    names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "BLOCK_SIZE", "mask_mod")
    if not all(hasattr(block_mask, name) for name in (*names, "seq_lengths")):
        raise ArgumentError(
            f"block_mask is a {type(block_mask).__qualname__}: pass what create_block_mask or BlockMask.from_kv_blocks "
            "gives; a function f(b, h, q_idx, kv_idx) goes to create_block_mask first"
        )
    return _of_pytorchs(block_mask, names)


@outside_of_compilers
def _of_pytorchs(block_mask: Any, names: tuple[str, ...]) -> BlockMask:
    fields: dict[str, Any] = {name: getattr(block_mask, name) for name in names}
    return BlockMask.from_kv_blocks(**fields, seq_lengths=tuple(block_mask.seq_lengths))


def _is_request(x: Any) -> bool:
    """Whether it is PyTorch's AuxRequest."""
    return isinstance(x, tuple) and hasattr(x, "lse") and hasattr(x, "max_scores")


def _require_4d(name: str, x: Any) -> None:
    if isinstance(x, type) or not hasattr(x, "shape") or not hasattr(x, "swapaxes"):
        raise ArgumentError(f"{name} is a {type(x).__qualname__}: pass a NumPy, CuPy, PyTorch or JAX array")
    if len(x.shape) != 4:
        raise ArgumentError(
            f"{name}.shape={tuple(x.shape)} must be [batch, heads, len, d]; for packed arrays, cuflash.attention takes "
            "score_mod, mask_mod and block_mask beside cu_seqlens"
        )


def _broadcast(x: Array, shape: tuple[int, ...]) -> Array:
    return x.expand(shape) if hasattr(x, "expand") else functions_of(x).broadcast_to(x, shape)


# Masks ----------------------------------------------------------------------------------------------------------------


@outside_of_compilers
def create_block_mask(
    mask_mod: Callable[..., Any] | None,
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device: Any = None,
    BLOCK_SIZE: int | tuple[int, int] = 128,
    _compile: bool = False,
    separate_full_blocks: bool = True,
    compute_dq_write_order: bool = False,
    dq_kv_order: bool = True,
    *,
    cu_seqlens: Array | None = None,
) -> BlockMask:
    """A mask for `flex_attention` or `attention`, of any function f(b, h, q_idx, kv_idx) -> bool.

    Builds nothing: whoever uses the mask calls the function. Blocks are worked out when they are asked for.

    B, H         batch and query heads it is for; None: one mask for all
    device       where block arrays are, when asked for: a PyTorch, CuPy or JAX device, or a PyTorch device's name:
                 arrays of that framework. None: beside the arrays that the function captures; if it captures none, on
                 PyTorch's accelerator (else its CPU) in a program that imported PyTorch, in NumPy in others
    BLOCK_SIZE   rows and columns of a block, one int or (q, kv)
    _compile     ignored: there is nothing to compile
    separate_full_blocks    False: full blocks are listed among those that are partly seen
    compute_dq_write_order  whether the mask has `dq_write_order` and `dq_write_order_full`, in ascending order of key
                            blocks, or with dq_kv_order in descending order. For others: cuflash needs none
    cu_seqlens   integers [documents + 1] from 0: a query sees its own document alone, and mask_mod (which may be None)
                 gets indices counted from its beginning: `mods.document`

    In a function under torch.compile it breaks the graph: make the mask outside.

    >>> block_mask = create_block_mask(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, None, None, 1024, 1024)
    >>> block_mask.shape, block_mask.sparsity()
    ((1, 1, 1024, 1024), 43.75)
    """
    shape = _shape((B, H, Q_LEN, KV_LEN))
    if mask_mod is None:
        require(cu_seqlens is not None, "mask_mod is None: pass a function f(b, h, q_idx, kv_idx), or cu_seqlens")
    else:
        require_mask("mask_mod", mask_mod)
    if cu_seqlens is not None:
        require(Q_LEN == KV_LEN, f"Q_LEN={Q_LEN} and KV_LEN={KV_LEN} must be the same with cu_seqlens: packed tokens")
        mask_mod = mods.document(cu_seqlens=cu_seqlens, total=Q_LEN, mask_mod=mask_mod)
    assert mask_mod is not None
    require(
        isinstance(dq_kv_order, bool),
        f"dq_kv_order={dq_kv_order!r} must be a bool: BlockMask.from_kv_blocks takes an order as an array",
    )
    order = dq_kv_order if number_checks.flag("compute_dq_write_order", compute_dq_write_order) else None
    separate = number_checks.flag("separate_full_blocks", separate_full_blocks)
    return BlockMask.of_function(mask_mod, shape, BLOCK_SIZE, checked_device(device), separate, order)


@outside_of_compilers
def create_mask(
    mod_fn: Callable[..., Any],
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device: Any = None,
) -> Array:
    """Which keys each query sees, bool [B, H, Q_LEN, KV_LEN], by a mask_mod, or by a score_mod: where it gives no -inf.

    Made in NumPy; `device` as for `create_block_mask`. For looking at: attention never needs it.

    >>> create_mask(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, 1, 1, 2, 3)[0, 0].tolist()
    [[True, False, False], [True, True, False]]
    """
    shape = _shape((B, H, Q_LEN, KV_LEN))
    if not callable(mod_fn):
        raise ArgumentError(f"mod_fn={mod_fn!r} must be a function f(b, h, q_idx, kv_idx) -> bool")
    checked_device(device)
    mod = Seen(mod_fn, shape[2:])
    mask = mask_of(mod, shape)
    return as_used(mask, mod.captured) if device is None else placed(mask, device)


def _shape(shape: Sequence[int | None]) -> tuple[int, int, int, int]:
    names = ("B", "H", "Q_LEN", "KV_LEN")
    b, h, q, k = (
        1 if n is None and name in "BH" else require_int(name, n, 0) for name, n in zip(names, shape, strict=True)
    )
    return b, h, q, k
