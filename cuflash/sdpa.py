"""PyTorch's and JAX's names for attention: `scaled_dot_product_attention` and `dot_product_attention`.

Arguments, layouts and results are those of `torch.nn.functional.scaled_dot_product_attention` and
`jax.nn.dot_product_attention`; arrays may be of NumPy, CuPy, PyTorch or JAX in either. Causal masks and windows are
aligned at the first query and the first key, as they are there, and not at the last, as in `attention`. A mask or a
bias is read where it lies, through its strides: an axis of one element is read once for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from . import mods
from .api import attention
from .call.number_checks import flag
from .errors import ArgumentError, UnsupportedError, require
from .keywords import with_suggestions
from .namespaces import device_of, namespace
from .trace.tracer import mod
from .trace.uncompiled import outside_of_compilers

Array = Any  # of NumPy, CuPy, PyTorch or JAX


# PyTorch's ------------------------------------------------------------------------------------------------------------


@with_suggestions()
def scaled_dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    seed: Any = None,
    offset: Any = 0,
) -> Array:
    """softmax(scale * query @ key.T + mask) @ value, as `torch.nn.functional.scaled_dot_product_attention` has it.

    query [..., heads, q_len, d], key [..., heads, kv_len, d], value [..., heads, kv_len, d_v] -> [..., heads, q_len,
    d_v], of two dimensions or more; the leading ones and heads broadcast. Four dimensions are read in place, whatever
    their strides; more are copied where strides cannot join the leading ones.

    attn_mask      broadcasts to [..., heads, q_len, kv_len]: bool, True where a query sees a key; or floats that are
                   added to the scores, which get a gradient where they ask for one
    dropout_p      share of the weights to drop, at least 0 and below 1, always applied, in steps of 1/256. The rate is
                   PyTorch's, the weights dropped are others
    is_causal      query i sees the keys up to i, however many there are; beside attn_mask: both apply
    scale          None: 1 / sqrt(d)
    enable_gqa     a head of key and value serves query heads / its heads of them
    seed, offset   those of dropout, as in `attention`: in PyTorch by default drawn from the device's generator

    A row that sees no key is 0. Raises `ArgumentError` for shapes that do not fit, and whatever `attention` raises.
    Under torch.compile a mask breaks the graph; is_causal does not.

    >>> import numpy as np
    >>> x = np.random.default_rng(0).standard_normal((2, 4, 5, 16)).astype(np.float32)
    >>> padding = np.array([[True, True, True, False, False], [True] * 5])[:, None, None, :]
    >>> out = scaled_dot_product_attention(x, x, x, attn_mask=padding, is_causal=True)
    >>> out.shape, bool(np.allclose(out[:, :, 0], x[:, :, 0]))  # the first query sees the first key alone
    ((2, 4, 5, 16), True)
    """
    given = {"query": query, "key": key, "value": value}
    for name, x in given.items():
        _require_array(name, x)
        if getattr(x, "is_nested", False):
            raise UnsupportedError(
                f"{name} is a nested tensor: pass {name}.values() to cuflash.attention, with {name}.offsets() as "
                "cu_seqlens"
            )
        require(len(x.shape) >= 2, f"{name}.shape={tuple(x.shape)} must be [..., heads, len, d]: give it a length")
    is_causal, enable_gqa = flag("is_causal", is_causal), flag("enable_gqa", enable_gqa)
    xp = namespace(query, "query")
    most = max(len(x.shape) for x in given.values())
    q_len, kv_len = query.shape[-2], key.shape[-2]
    require(
        query.shape[-1] == key.shape[-1],
        f"key.shape[-1]={key.shape[-1]} must be query.shape[-1]={query.shape[-1]}: queries and keys are multiplied",
    )
    require(
        value.shape[-2] == kv_len,
        f"value.shape[-2]={value.shape[-2]} must be key.shape[-2]={kv_len}: every key has one value",
    )
    with device_of(query):
        lead = _broadcast_shape({name: tuple(x.shape[:-3]) for name, x in given.items()})
        q, k, v = (_flat(xp, x, lead) for x in given.values())
        q, k, v = _with_heads(xp, q, k, v, enable_gqa)
        heads = q.shape[1]
        score_mod = mask_mod = None
        if attn_mask is not None:
            _require_array("attn_mask", attn_mask)
            dense = _flat_mask(xp, attn_mask, lead, (heads, q_len, kv_len))
            score_mod, mask_mod = (None, _dense_mask(dense)) if _is_bool(dense) else (_dense_bias(dense), None)
        if is_causal:  # keys behind the last query are seen by none
            k, v = k[:, :, :q_len], v[:, :, :q_len]
        window = _from_the_end(None, 0 if is_causal else None, q_len, k.shape[2])
        assert window is not None
        out = attention(
            q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2),
            scale=scale, window_size=window, score_mod=score_mod, mask_mod=mask_mod,
            dropout_p=dropout_p, seed=seed, offset=offset,
        ).swapaxes(1, 2)  # fmt: skip
        if most == 4:
            return out
        return out[0, 0] if most == 2 else out.reshape((*lead, *out.shape[1:]))


def _broadcast_shape(shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    try:
        return np.broadcast_shapes(*shapes.values())
    except ValueError:
        told = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ArgumentError(f"the dimensions before heads must broadcast, and are {told}: make them the same") from None


def _flat(xp: Any, x: Array, lead: tuple[int, ...]) -> Array:
    """[..., heads, len, d], or [len, d], as [batch, heads, len, d]."""
    if len(x.shape) == 2:
        x = x[None]
    if tuple(x.shape[:-3]) != lead:
        x = xp.broadcast_to(x, (*lead, *x.shape[-3:]))
    return x if len(lead) == 1 else x.reshape((math.prod(lead), *x.shape[-3:]))


def _with_heads(xp: Any, q: Array, k: Array, v: Array, enable_gqa: bool) -> tuple[Array, Array, Array]:
    """[batch, heads, len, d] each, key and value of the same number of heads, which divides the query's."""
    heads = {"query": q.shape[1], "key": k.shape[1], "value": v.shape[1]}
    if not enable_gqa:
        most = max(heads.values())
        for name, n in heads.items():
            require(
                n in (1, most),
                f"{name} has {n} heads, and query, key and value must have the same number, {most}, or 1: pass "
                "enable_gqa=True where a key head serves several query heads",
            )
        q = _repeat_heads(xp, q, most)
    else:
        for name in ("key", "value"):
            require(
                heads[name] > 0 and heads["query"] % heads[name] == 0,
                f"{name}.shape[-3]={heads[name]} must divide query.shape[-3]={heads['query']}: with enable_gqa each "
                "head serves as many query heads",
            )
    shared = math.lcm(k.shape[1], v.shape[1])
    return q, _repeat_heads(xp, k, shared), _repeat_heads(xp, v, shared)


def _repeat_heads(xp: Any, x: Array, heads: int) -> Array:
    """[batch, heads, len, d], each head as often as it takes to have so many."""
    batch, held, length, d = x.shape
    if held == heads:
        return x
    if held == 1:
        return xp.broadcast_to(x, (batch, heads, length, d))
    repeated = xp.broadcast_to(x[:, :, None], (batch, held, heads // held, length, d))
    return repeated.reshape((batch, heads, length, d))


def _flat_mask(xp: Any, mask: Array, lead: tuple[int, ...], rest: tuple[int, int, int]) -> Array:
    """A mask that broadcasts to (*lead, heads, q_len, kv_len) as four dimensions, of which those of one element stay so
    where they can."""
    target = (*lead, *rest)
    shape = (1,) * (len(target) - len(mask.shape)) + tuple(mask.shape)
    if len(shape) > len(target) or any(n not in (1, m) for n, m in zip(shape, target, strict=True)):
        raise ArgumentError(
            f"attn_mask.shape={tuple(mask.shape)} must broadcast to [..., heads, q_len, kv_len]={target}: reshape it"
        )
    mask = _collapsed(mask.reshape(shape) if len(shape) != len(mask.shape) else mask)
    held = tuple(mask.shape[: len(lead)])
    if len(lead) == 1:
        return mask
    if any(n != 1 for n in held):
        mask, held = xp.broadcast_to(mask, (*lead, *mask.shape[-3:])), lead
    return mask.reshape((math.prod(held), *mask.shape[-3:]))


# JAX's ----------------------------------------------------------------------------------------------------------------


@with_suggestions()
def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Array | None = None,
    key_value_seq_lengths: Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Any:
    """softmax(scale * query @ key.T + bias, masked) @ value, as `jax.nn.dot_product_attention` has it.

    query [batch, q_len, heads_q, d], key [batch, kv_len, heads_kv, d], value [batch, kv_len, heads_kv, d_v] -> [batch,
    q_len, heads_q, d_v], or all without batch; heads_kv divides heads_q. Arrays are read in place.

    bias                   floats that broadcast to [batch, heads_q, q_len, kv_len], added to the scaled scores;
                           receives a gradient
    mask                   bools that broadcast likewise: True where a query sees a key
    scale                  None: 1 / sqrt(d)
    is_causal              query i sees the keys up to i, however many there are
    query_seq_lengths      int32 [batch]: how many queries of each sequence are used; the rows of others are 0
    key_value_seq_lengths  int32 [batch]: how many keys of each sequence are used
    local_window_size      (left, right), or one int for both: query i sees the keys from i - left to i + right
    implementation         None, "xla" or "cudnn": accepted without effect; cuflash's kernel runs
    return_residual        return (out, lse), lse float32 [batch, q_len, heads_q], which has no gradient

    A row that mask, window and lengths leave no key gets the mean of all values, as it does in JAX, which replaces
    masked scores by one large negative number. Raises `ArgumentError` for shapes that do not fit, and whatever
    `attention` raises.

    >>> import numpy as np
    >>> x = np.random.default_rng(0).standard_normal((2, 5, 4, 16)).astype(np.float32)
    >>> out = dot_product_attention(x, x, x, is_causal=True, key_value_seq_lengths=np.array([3, 5], np.int32))
    >>> out.shape, bool(np.allclose(out[:, 0], x[:, 0]))  # the first query sees the first key alone
    ((2, 5, 4, 16), True)
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        _require_array(name, x)
        require(
            len(x.shape) in (3, 4),
            f"{name}.shape={tuple(x.shape)} must be [batch, len, heads, d] or [len, heads, d]: reshape it",
        )
    is_causal = flag("is_causal", is_causal)
    return_residual = flag("return_residual", return_residual)
    require(
        implementation is None or (isinstance(implementation, str) and implementation in ("xla", "cudnn")),
        f"implementation={implementation!r} must be None, 'xla' or 'cudnn': leave it away",
    )
    xp, alone = namespace(query, "query"), len(query.shape) == 3
    left, right = _window(local_window_size)
    if is_causal:
        right = 0 if right is None else min(right, 0)
    with device_of(query):
        q, k, v = (x[None] if len(x.shape) == 3 else x for x in (query, key, value))
        (batch, q_len, heads, _), kv_len = q.shape, k.shape[1]
        require(
            tuple(v.shape[:3]) == tuple(k.shape[:3]),
            f"value.shape={tuple(value.shape)} must be key.shape={tuple(key.shape)} but for the last dimension",
        )
        target = (batch, heads, q_len, kv_len)
        score_mod = None if bias is None else _dense_bias(_as_mask(xp, "bias", bias, target))
        seen = [] if mask is None else [_dense_mask(_as_mask(xp, "mask", mask, target))]
        used_q, used_k = (
            None if x is None else _of_framework(xp, x) for x in (query_seq_lengths, key_value_seq_lengths)
        )
        keys, values = k, v
        if right is not None and key_value_seq_lengths is None:  # keys behind the last query's window are seen by none
            keys, values = (x[:, : max(0, q_len + right)] for x in (k, v))
        window = _from_the_end(left, right, q_len, keys.shape[1])
        if window is None or query_seq_lengths is not None or key_value_seq_lengths is not None:
            window = (-1, -1)
            seen.append(_window_from_the_start(left, right))
        seen = [f for f in seen if f is not None]
        # Rows without a key are looked for only where there may be any.
        blind = mask is not None or key_value_seq_lengths is not None or _hides_all(left, right, q_len, kv_len)
        result = attention(
            q, keys, values,
            scale=scale, window_size=window, score_mod=score_mod, mask_mod=mods.and_masks(*seen) if seen else None,
            seqused_q=used_q, seqused_k=used_k, aux=("lse",) if blind or return_residual else (),
        )  # fmt: skip
        if not (blind or return_residual):
            return result[0] if alone else result
        out, lse = result.out, result.lse.swapaxes(1, 2)  # [batch, q_len, heads]
        nothing = lse == -xp.inf
        if blind and kv_len:
            out = _mean_where(xp, nothing, used_q, out, v)
        if alone:
            out, lse, nothing = out[0], lse[0], nothing[0]
        return (out, _residual(xp, lse, nothing, kv_len)) if return_residual else out


def _as_mask(xp: Any, name: str, x: Array, target: tuple[int, ...]) -> Array:
    """bias or mask as an array of four dimensions that broadcasts to `target`."""
    x = _of_framework(xp, x)
    require(
        (name == "mask") == _is_bool(x),
        f"{name}.dtype={x.dtype} must be {'bool: pass floats to add as bias' if name == 'mask' else 'floats: cast it'}",
    )
    shape = (1,) * (4 - len(x.shape)) + tuple(x.shape)
    require(
        len(shape) == 4 and all(n in (1, m) for n, m in zip(shape, target, strict=True)),
        f"{name}.shape={tuple(x.shape)} must broadcast to [batch, heads_q, q_len, kv_len]={target}: reshape it",
    )
    return _collapsed(x if len(x.shape) == 4 else x.reshape(shape))


def _of_framework(xp: Any, x: Any) -> Array:
    """What `jax.nn` makes an array of: a NumPy array, a list, a number."""
    return x if hasattr(x, "shape") and not isinstance(x, np.ndarray | np.generic) else xp.asarray(x)


def _window(size: Any) -> tuple[int | None, int | None]:
    if size is None:
        return None, None
    pair = size if isinstance(size, tuple | list) else (size, size)
    require(
        len(pair) == 2 and all(isinstance(n, int | np.integer) and not isinstance(n, bool) for n in pair),
        f"local_window_size={size!r} must be an int, or two of them: (left, right)",
    )
    return int(pair[0]), int(pair[1])


def _window_from_the_start(left: int | None, right: int | None) -> Callable[..., Any] | None:
    """q_idx - left <= kv_idx <= q_idx + right; None: no limit on that side."""
    if left is None and right is None:
        return None
    no_left, no_right = left is None, right is None
    left, right = left or 0, right or 0

    def window_from_the_start(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        if no_left:
            return kv_idx <= q_idx + right
        if no_right:
            return kv_idx >= q_idx - left
        return (kv_idx >= q_idx - left) & (kv_idx <= q_idx + right)

    return mod(window_from_the_start)


def _hides_all(left: int | None, right: int | None, q_len: int, kv_len: int) -> bool:
    """Whether the window leaves some query no key."""
    if left is not None and (q_len - 1 - left >= kv_len or (right is not None and left + right < 0)):
        return True
    return right is not None and right < 0


def _mean_where(xp: Any, nothing: Array, used: Array | None, out: Array, value: Array) -> Array:
    """`out` [batch, q_len, heads_q, d_v], but the mean of all values in rows that see no key, of the queries used."""
    (batch, q_len, heads, d_v), heads_kv = out.shape, value.shape[2]
    mean = xp.mean(value, 1)[:, None, :, None]  # [batch, 1, heads_kv, 1, d_v]
    mean = xp.broadcast_to(mean, (batch, 1, heads_kv, heads // heads_kv, d_v)).reshape((batch, 1, heads, d_v))
    if used is not None:
        rows = xp.arange(q_len) if xp.__name__ != "torch" else xp.arange(q_len, device=out.device)
        nothing = nothing & (rows < used[:, None])[:, :, None]
    return xp.where(nothing[..., None], mean, out)


_MASKED = -0.7 * float(np.finfo(np.float32).max)  # what JAX replaces masked scores by


def _residual(xp: Any, lse: Array, nothing: Array, kv_len: int) -> Array:
    """lse as JAX gives it: float32, without a gradient, that of `kv_len` equal scores where nothing is seen."""
    lse = xp.where(nothing, xp.full_like(lse, _MASKED + math.log(max(kv_len, 1))), lse)
    if xp.__name__ == "torch":
        return lse.detach()
    if xp.__name__ == "jax.numpy":
        import jax

        return jax.lax.stop_gradient(lse)
    return lse


# What both are made of ------------------------------------------------------------------------------------------------


def _from_the_end(left: int | None, right: int | None, q_len: int, kv_len: int) -> tuple[int, int] | None:
    """A window around i, as `attention` counts it: around i + kv_len - q_len. None where that has no such window.

    >>> _from_the_end(None, 0, 5, 5), _from_the_end(None, 0, 5, 3), _from_the_end(1, 1, 5, 3)
    ((-1, 0), (-1, 2), None)
    """
    shift = kv_len - q_len
    left = -1 if left is None else left + shift if left + shift >= 0 else None
    right = -1 if right is None else right - shift if right - shift >= 0 else None
    return None if left is None or right is None else (left, right)


@outside_of_compilers
def _dense_bias(values: Array) -> Callable[..., Any] | None:
    return None if 0 in values.shape else mods.bias(values)


@outside_of_compilers
def _dense_mask(values: Array) -> Callable[..., Any] | None:
    """Reads bools [batch, heads, q_len, kv_len], of which an axis of one element serves all."""
    if 0 in values.shape:
        return None
    for_all_b, for_all_h, for_all_q, for_all_k = (n == 1 for n in values.shape)

    def dense_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        b, h = 0 if for_all_b else b, 0 if for_all_h else h
        return values[b, h, 0 if for_all_q else q_idx, 0 if for_all_k else kv_idx]

    return mod(dense_mask)


def _collapsed(x: Array) -> Array:
    """x with one element along every axis that repeats one, as a mask that was expanded does: so that kernels read it
    once. What asks for a gradient is left alone, for that has the shape of x."""
    if getattr(x, "requires_grad", False):
        return x
    strides = x.stride() if hasattr(x, "stride") else getattr(x, "strides", None)
    if not strides or 0 not in strides:
        return x
    return x[tuple(slice(0, 1) if step == 0 else slice(None) for step in strides)]


def _is_bool(x: Array) -> bool:
    kind = str(x.dtype).rpartition(".")[2]
    require(
        kind == "bool" or "float" in kind,
        f"a mask of dtype {x.dtype} must be of bools (True: seen) or of floats to add: cast it",
    )
    return kind == "bool"


def _require_array(name: str, x: Any) -> None:
    if isinstance(x, type) or not hasattr(x, "shape") or not hasattr(x, "swapaxes"):
        raise ArgumentError(f"{name} is a {type(x).__qualname__}: pass a NumPy, CuPy, PyTorch or JAX array")
