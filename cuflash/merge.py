"""Attention in parts: results over disjoint sets of keys, merged into the result over all of them.

Works on arrays of NumPy, CuPy, PyTorch and JAX by their own functions: gradients are those of the framework's autograd,
and nothing waits for a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from .errors import require
from .packing import device_of, listed, namespace_of, type_name

Array = Any  # of NumPy, CuPy, PyTorch or JAX


def merge_states(outs: Sequence[Array], lses: Sequence[Array]) -> tuple[Array, Array]:
    """Attention over all keys -> (out, lse), from attention over disjoint parts of them.

    outs  one array a part, `[batch, q_len, heads_q, d_v]` or packed `[total_q, heads_q, d_v]`: the softmax of that part
    lses  one array a part, `[batch, heads_q, q_len]` or `[heads_q, total_q]`: natural logarithms of its denominators

    as `attention(..., aux=("lse",))` returns them; sequences of arrays, or arrays whose first dimension counts the
    parts. With m the largest of a row's lses,

        w[i] = exp(lse[i] - m)      lse = m + log(sum_i w[i])      out = sum_i w[i] * out[i] / sum_i w[i]

    The sums are in the lses' dtype, or out's where that is wider; out and lse come in the dtypes of the parts. A part
    with lse -inf contributes nothing, whatever its out holds, and receives gradient 0; a row that is -inf in every part
    is 0 with lse -inf. Causal masks and windows are aligned at the end of the keys that a call gets: let them apply to
    the last part alone, or say what a part sees by a mask_mod. A sink belongs into one part.

    This is section 2.2 of Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018), and what
    flash-decoding and ring attention do between blocks.

    One prompt of 5 tokens, 3 continuations of it with 2 tokens of their own each: the prompt's keys are held, and read,
    once, by the queries of all continuations as one sequence.

    >>> import numpy as np
    >>> from cuflash import attention
    >>> draw = np.random.default_rng(0).standard_normal
    >>> prompt, own, q = (draw(s).astype(np.float32) for s in [(1, 5, 2, 16), (3, 2, 2, 16), (3, 2, 4, 16)])
    >>> shared = attention(q.reshape(1, 6, 4, 16), prompt, prompt, aux=("lse",))
    >>> rest = attention(q, own, own, causal=True, aux=("lse",))
    >>> shared_lse = shared.lse.reshape(4, 3, 2).swapaxes(0, 1)  # [heads, rows] of one sequence to [batch, heads, rows]
    >>> out, lse = merge_states([shared.out.reshape(3, 2, 4, 16), rest.out], [shared_lse, rest.lse])
    >>> whole = np.concatenate([np.repeat(prompt, 3, axis=0), own], axis=1)  # each with a prompt of its own
    >>> bool(np.allclose(out, attention(q, whole, whole, causal=True), atol=1e-6))
    True
    """
    outs, lses = listed(outs, "outs"), listed(lses, "lses")
    _check(outs, lses)
    xp = namespace_of(outs[0], "outs[0]")
    out_dtype, lse_dtype = outs[0].dtype, lses[0].dtype
    wide = out_dtype if "float64" in str(out_dtype) else lse_dtype
    with device_of(outs[0]), _quiet(xp):
        lses = [_cast(x, wide) for x in lses]
        # A constant to autograd: that it cancels out of both results is known here, and not there.
        largest = lses[0]
        for x in lses[1:]:
            largest = xp.maximum(largest, x)
        base = _constant(xp, xp.where(largest == -xp.inf, xp.zeros_like(largest), largest))
        weights = [xp.exp(x - base) for x in lses]
        total = sum(weights[1:], weights[0])
        # Neither branch of a `where` may be infinite where it is not taken: its gradient would be 0 * inf.
        nothing = total == 0
        total = xp.where(nothing, xp.ones_like(total), total)
        lse = xp.where(nothing, xp.full_like(total, -xp.inf), base + xp.log(total))
        out = None
        for x, w in zip(outs, weights, strict=True):
            share = (w / total).swapaxes(-1, -2)[..., None]
            x = _cast(x, wide)
            part = xp.where(share == 0, xp.zeros_like(x), x) * share
            out = part if out is None else out + part
        return _cast(out, out_dtype), _cast(lse, lse_dtype)


def _check(outs: list[Array], lses: list[Array]) -> None:
    require(len(outs) > 0, "outs=[] must hold at least one part: pass what attention(..., aux=('lse',)) returned")
    require(
        len(outs) == len(lses),
        f"len(lses)={len(lses)} must equal len(outs)={len(outs)}: one lse a part; pass what attention(..., "
        "aux=('lse',)) returned with each out",
    )
    xp = namespace_of(outs[0], "outs[0]")
    for what, arrays in (("outs", outs), ("lses", lses)):
        for i, x in enumerate(arrays):
            require(
                namespace_of(x, f"{what}[{i}]") is xp,
                f"{what}[{i}] is a {type_name(x)}, outs[0] a {type_name(outs[0])}: all must be of one framework; "
                "convert with from_dlpack",
            )
            first = arrays[0]
            require(
                tuple(x.shape) == tuple(first.shape),
                f"{what}[{i}].shape={tuple(x.shape)} must equal {what}[0].shape={tuple(first.shape)}: parts are of the "
                "same queries; pad or split them",
            )
            require(x.dtype == first.dtype, f"{what}[{i}].dtype={x.dtype} must be {first.dtype} as of {what}[0]: cast")
    require(
        "float" in str(outs[0].dtype), f"outs[0].dtype={outs[0].dtype} must be a float: pass what attention returned"
    )
    shape, lse_shape = tuple(outs[0].shape), tuple(lses[0].shape)
    require(
        len(shape) in (3, 4),
        f"outs[0].shape={shape} must have 4 dimensions, [batch, q_len, heads_q, d_v], or 3, [total_q, heads_q, d_v]: "
        "reshape it",
    )
    expected = (*shape[:-3], shape[-2], shape[-3])
    require(
        lse_shape == expected,
        f"lses[0].shape={lse_shape} must be {expected}, heads before rows, for outs[0].shape={shape}: pass the "
        "lse that attention returned with it",
    )
    require(
        "float32" in str(lses[0].dtype) or "float64" in str(lses[0].dtype),
        f"lses[0].dtype={lses[0].dtype} must be float32: pass the lse that attention returned",
    )


# How the frameworks differ. ------------------------------------------------------------------------------------------


def _cast(x: Array, dtype: Any) -> Array:
    if x.dtype == dtype:
        return x
    return x.to(dtype) if hasattr(x, "to") and not hasattr(x, "astype") else x.astype(dtype)


def _constant(xp: Any, x: Array) -> Array:
    """`x`, seen by no derivative."""
    if xp.__name__ == "torch":
        return x.detach()
    if xp.__name__ == "jax.numpy":
        from jax.lax import stop_gradient

        return stop_gradient(x)
    return x


def _quiet(xp: Any) -> Any:
    """NaN that a part owns comes out, without NumPy's warning."""
    return xp.errstate(all="ignore") if xp.__name__ == "numpy" else nullcontext()
