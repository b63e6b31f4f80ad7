"""`flash_attn.layers.rotary` and `flash_attn.ops.triton.rotary`: rotary position embedding (RoPE) of PyTorch tensors.

A pair (a, b) of a head's dimensions, at position p, becomes (a cos - b sin, a sin + b cos), with cos and sin from row p
of two tables [positions, rotary_dim / 2]. Pairs are (i, i + rotary_dim / 2), or interleaved (2i, 2i + 1); dimensions
from rotary_dim on stay as they are. Everything is computed in float32 (float64 for float64), on any device.

`apply_rotary` records no graph. Gradients of the others flow to x, qkv and kv, and not to the tables. Functions that
rotate in place return what they rotated: go on with that, for gradients are recorded there.
"""

from __future__ import annotations

import importlib
import operator
from typing import Any

from ...errors import ArgumentError
from ...settings import config
from .tensors import require_tensors

Tensor = Any
Index = tuple[Any, ...]  # what x[index] takes

torch: Any = importlib.import_module("torch")


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """Rotate x [batch, seqlen, heads, d], or packed [total, heads, d] with `cu_seqlens`, outside of autograd.

    cos, sin        [positions, rotary_dim / 2], rotary_dim up to d
    seqlen_offsets  the position of each sequence's first row: an int, or int32 or int64 [batch]
    cu_seqlens      int32 [batch + 1]: sequence b owns the rows cu_seqlens[b] to cu_seqlens[b + 1]; others stay
    max_seqlen      a hint, which the tables must have room for
    inplace         write into x and return it
    conjugate       rotate back

    Raises `ArgumentError` where a position lies outside of the tables. Of offsets on a GPU that is looked at where
    `config.check` is on; else such a row stays as it is.
    """
    with torch.no_grad():
        cos, sin = _rows(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen)
        if inplace:
            return _write(x, interleaved, [(...,)], (cos, sin), conjugate)
        return _rotated(x, cos, sin, interleaved, conjugate)


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """`apply_rotary`, with a gradient for x."""
    cos, sin = _rows(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen)
    if inplace:
        return _in_place(x, interleaved, [(...,)], (cos, sin))
    return _rotated(x, cos, sin, interleaved)


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Rotate q and k of qkv in place, and return qkv.

    qkv  [batch, seqlen, 3, heads, d], or [batch, seqlen, num_heads_q + 2 * heads_k, d] with num_heads_q
    cos_k, sin_k  tables for k; None: those of q

    The other arguments are those of `apply_rotary`.
    """
    require_tensors({"cos_k": cos_k, "sin_k": sin_k}, qkv=qkv)
    cos_k, sin_k = (cos if cos_k is None else cos_k), (sin if sin_k is None else sin_k)
    parts = _parts_of_qkv(qkv, num_heads_q)
    tables = (
        *_rows(qkv[parts[0]], cos, sin, seqlen_offsets),
        *_rows(qkv[parts[1]], cos_k, sin_k, seqlen_offsets),
    )
    return _in_place(qkv, interleaved, parts, tables)


def apply_rotary_emb_kv_(
    kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: int | Tensor = 0
) -> Tensor:
    """Rotate k of kv [batch, seqlen, 2, heads, d] in place, and return kv. Else as `apply_rotary`."""
    require_tensors(kv=kv)
    if kv.ndim != 5 or kv.shape[2] != 2:
        raise ArgumentError(
            f"kv.shape={tuple(kv.shape)} must be [batch, seqlen, 2, heads, head_dim]: stack k and v along dimension 2"
        )
    part = (slice(None), slice(None), 0)
    return _in_place(kv, interleaved, [part], _rows(kv[part], cos, sin, seqlen_offsets))


def apply_rotary_emb_torch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """The formula in the dtype that x, cos and sin promote to, with gradients for all three.

    x [batch, seqlen, heads, d]; cos, sin [seqlen, rotary_dim / 2] or [batch, seqlen, rotary_dim / 2].
    """
    require_tensors(x=x, cos=cos, sin=sin)
    n = 2 * cos.shape[-1]
    if n > x.shape[-1]:
        raise ArgumentError(f"cos.shape={tuple(cos.shape)}: rotary_dim={n} must be {x.shape[-1]}, x's, at most")
    cos, sin = (
        (t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1)).unsqueeze(-2) for t in (cos, sin)
    )
    return torch.cat((x[..., :n] * cos + rotate_half(x[..., :n], interleaved) * sin, x[..., n:]), -1)


def rotate_half(x: Tensor, interleaved: bool = False) -> Tensor:
    """Every pair (a, b) of the last dimension as (-b, a)."""
    first, second = _pairs(x, interleaved)
    return _joined(-second, first, interleaved)


class RotaryEmbedding(torch.nn.Module):
    """RoPE as a module: position p turns pair i by p / base^(2i / dim). Tables are made when first needed, and kept.

    dim         dimensions of a head that are rotated, an even number
    scale_base  q and k are also multiplied and divided by a factor that grows with the position (xPos, Sun et al.
                2022), so that scores fade with distance; 512 is usual
    pos_idx_in_fp32  changes nothing: positions are always float32
    """

    inv_freq: Tensor
    scale: Tensor | None

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: Any = None,
        *,
        pos_idx_in_fp32: bool = True,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.base = float(base)
        self.interleaved = interleaved
        self.scale_base = scale_base
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        scale = None
        if scale_base is not None:
            scale = (torch.arange(0, dim, 2, device=device, dtype=torch.float32) + 0.4 * dim) / (1.4 * dim)
        self.register_buffer("scale", scale, persistent=False)
        # Subclasses in models read these: tables of as many positions, for q, and with scale_base others for k.
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None
        self._cos_k_cached: Tensor | None = None
        self._sin_k_cached: Tensor | None = None

    def _compute_inv_freq(self, device: Any = None) -> Tensor:
        return 1.0 / self.base ** (torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim)

    def _update_cos_sin_cache(self, seqlen: int, device: Any = None, dtype: Any = None) -> None:
        """Make tables of `seqlen` positions, unless those at hand will do. None: inv_freq's device, float32."""
        device = self.inv_freq.device if device is None else torch.device(device)
        dtype = torch.float32 if dtype is None else dtype
        kept = self._cos_cached
        if kept is None or seqlen > self._seq_len_cached or kept.device != device or kept.dtype != dtype:
            self._seq_len_cached = seqlen
            with torch.inference_mode(False), torch.no_grad():  # for autograd may not save what inference mode makes
                self._make_tables(seqlen, device, dtype)

    def _make_tables(self, seqlen: int, device: Any, dtype: Any) -> None:
        # Positions and frequencies in float32, whatever .half() has made of the buffer: bfloat16 cannot tell 256 from
        # 257.
        inv_freq = self.inv_freq.to(device)
        if inv_freq.dtype != torch.float32:
            inv_freq = self._compute_inv_freq(device)
        position = torch.arange(seqlen, device=device, dtype=torch.float32)
        angles = torch.outer(position, inv_freq)
        cos, sin = angles.cos(), angles.sin()
        if self.scale is None:
            self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)
            return
        # Scores depend on differences of positions alone: counted from the middle, no power is large.
        scale = self.scale.to(device, torch.float32) ** ((position - seqlen // 2) / self.scale_base)[:, None]
        self._cos_cached, self._sin_cached = (cos * scale).to(dtype), (sin * scale).to(dtype)
        self._cos_k_cached, self._sin_k_cached = (cos / scale).to(dtype), (sin / scale).to(dtype)

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Any:
        """Rotate in place and return: qkv as of `apply_rotary_emb_qkv_`; or, where kv [batch, seqlen, 2, heads, d] is
        given, (q, kv) of q [batch, seqlen, heads, d].

        seqlen_offset  the position of the first row: an int, or int32 or int64 [batch], with max_seqlen
        max_seqlen     positions that the tables must have; None: seqlen + seqlen_offset
        """
        require_tensors({"kv": kv}, qkv=qkv)
        if max_seqlen is None and not isinstance(seqlen_offset, torch.Tensor):
            max_seqlen = qkv.shape[1] + seqlen_offset
        if max_seqlen is not None:
            self._update_cos_sin_cache(max_seqlen, qkv.device, qkv.dtype)
        if self._cos_cached is None:
            raise ArgumentError(
                "seqlen_offset is a tensor and max_seqlen=None: nothing says how many positions the tables need; pass "
                "max_seqlen, the largest offset plus seqlen"
            )
        tables, tables_k = (self._cos_cached, self._sin_cached), (self._cos_k_cached, self._sin_k_cached)
        if kv is None:
            return apply_rotary_emb_qkv_(qkv, *tables, *tables_k, self.interleaved, seqlen_offset, num_heads_q)
        q = apply_rotary_emb(qkv, *tables, self.interleaved, True, seqlen_offset)
        tables_k = tables if self.scale is None else tables_k
        return q, apply_rotary_emb_kv_(kv, *tables_k, self.interleaved, seqlen_offset)


# Rows of the tables ---------------------------------------------------------------------------------------------------


def _rows(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    offsets: int | Tensor,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The rows of cos and sin for those of x, [seqlen or total, 1, n] or [batch, seqlen, 1, n], without a graph."""
    _check(x, cos, sin, offsets, cu_seqlens)
    cos, sin = cos.detach(), sin.detach()
    longest = x.shape[1] if cu_seqlens is None else _whole("max_seqlen", 0 if max_seqlen is None else max_seqlen)
    per_sequence = isinstance(offsets, torch.Tensor)
    first = 0 if per_sequence else _whole("seqlen_offsets", offsets)
    if first + longest > len(cos):
        raise ArgumentError(
            f"cos.shape={tuple(cos.shape)}: positions go from {first} to {first + longest - 1}, and the tables have "
            f"{len(cos)}; make longer ones"
        )
    if cu_seqlens is None and not per_sequence:
        return cos[first : first + longest, None], sin[first : first + longest, None]
    positions, owned = _positions(x, offsets if per_sequence else first, cu_seqlens)
    inside = (positions >= 0) & (positions < len(cos)) & owned
    if (x.device.type == "cpu" or config.check) and not torch.compiler.is_compiling():
        wrong = positions[~inside & owned]
        if len(wrong):
            raise ArgumentError(
                f"position {wrong[:1].tolist()} must be from 0 to {len(cos) - 1}, the rows of cos: make longer tables, "
                "or look at seqlen_offsets"
            )
    # A row without a position stays as it is: behind the tables there is a row that turns by nothing.
    at = torch.where(inside, positions, len(cos))
    cos, sin = torch.cat((cos, cos.new_ones(1, cos.shape[1]))), torch.cat((sin, sin.new_zeros(1, sin.shape[1])))
    return cos[at].unsqueeze(-2), sin[at].unsqueeze(-2)


def _positions(x: Tensor, offsets: int | Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
    """The position of every row of x, and whether a sequence owns it. Waits for nothing."""
    if cu_seqlens is None:
        return offsets[:, None] + torch.arange(x.shape[1], device=x.device), True  # type: ignore[index]
    row = torch.arange(len(x), device=x.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True)  # the batch's size: of no sequence
    position = row - cu_seqlens[sequence]
    if isinstance(offsets, torch.Tensor):
        offsets = torch.nn.functional.pad(offsets, (0, 1))[sequence]
    return position + offsets, sequence < len(cu_seqlens) - 1


def _check(x: Tensor, cos: Tensor, sin: Tensor, offsets: Any, cu_seqlens: Tensor | None) -> None:
    require_tensors({"cu_seqlens": cu_seqlens}, x=x, cos=cos, sin=sin)
    if x.ndim != (4 if cu_seqlens is None else 3) or not x.is_floating_point():
        raise ArgumentError(
            f"x is {x.dtype} of shape {tuple(x.shape)}: it must be of floats, [batch, seqlen, heads, head_dim], or "
            "with cu_seqlens [total, heads, head_dim]"
        )
    if cos.ndim != 2 or cos.shape != sin.shape or 2 * cos.shape[1] > x.shape[-1]:
        raise ArgumentError(
            f"cos.shape={tuple(cos.shape)} and sin.shape={tuple(sin.shape)} must both be [positions, rotary_dim / 2], "
            f"with rotary_dim up to head_dim={x.shape[-1]}"
        )
    batch = x.shape[0]
    if cu_seqlens is not None:
        if cu_seqlens.ndim != 1 or len(cu_seqlens) == 0 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ArgumentError(
                f"cu_seqlens is {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}: it must be int32 [batch + 1]"
            )
        batch = len(cu_seqlens) - 1
    if isinstance(offsets, torch.Tensor):
        require_tensors(x=x, seqlen_offsets=offsets)
        if offsets.shape != (batch,) or offsets.dtype not in (torch.int32, torch.int64):
            raise ArgumentError(
                f"seqlen_offsets is {offsets.dtype} of shape {tuple(offsets.shape)}: it must be an int, or int32 or "
                f"int64 [{batch}], one for each sequence"
            )


def _whole(name: str, value: Any) -> int:
    if not isinstance(value, int):  # torch.compile's own ints are ints
        try:
            value = operator.index(value)
        except TypeError:
            raise ArgumentError(f"{name}={value!r} must be an int: it counts positions") from None
    if value < 0:
        raise ArgumentError(f"{name}={value} must be at least 0: it counts positions")
    return value


def _parts_of_qkv(qkv: Tensor, num_heads_q: int | None) -> list[Index]:
    """Where q and k are in qkv."""
    all_rows = slice(None), slice(None)
    if qkv.ndim == 5:
        if qkv.shape[2] != 3:
            raise ArgumentError(
                f"qkv.shape={tuple(qkv.shape)} must be [batch, seqlen, 3, heads, head_dim]: stack q, k and v along "
                "dimension 2, or merge their heads and pass num_heads_q"
            )
        return [(*all_rows, 0), (*all_rows, 1)]
    if qkv.ndim != 4 or num_heads_q is None:
        raise ArgumentError(
            f"qkv.shape={tuple(qkv.shape)} with num_heads_q={num_heads_q}: qkv must be [batch, seqlen, 3, heads, "
            "head_dim], or [batch, seqlen, num_heads_q + 2 * heads_k, head_dim] with num_heads_q"
        )
    heads, heads_q = qkv.shape[2], _whole("num_heads_q", num_heads_q)
    if heads_q > heads or (heads - heads_q) % 2:
        raise ArgumentError(
            f"qkv.shape[2]={heads} must be num_heads_q={heads_q} + 2 * heads_k: q's heads, then as many of k as of v"
        )
    end = heads_q + (heads - heads_q) // 2
    return [(*all_rows, slice(heads_q)), (*all_rows, slice(heads_q, end))]


# The rotation ---------------------------------------------------------------------------------------------------------


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, conjugate: bool = False) -> Tensor:
    n = 2 * cos.shape[-1]
    turned = _turned(x[..., :n], cos, sin, interleaved, conjugate)
    return turned if n == x.shape[-1] else torch.cat((turned, x[..., n:]), -1)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, conjugate: bool) -> Tensor:
    """All dimensions of x rotated, in x's dtype."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    first, second = _pairs(x.to(wide), interleaved)
    cos, sin = cos.to(wide), sin.to(wide)
    if conjugate:
        sin = -sin
    return _joined(first * cos - second * sin, first * sin + second * cos, interleaved).to(x.dtype)


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if x.shape[-1] % 2:
        raise ArgumentError(f"x.shape={tuple(x.shape)} must end in an even number: dimensions are rotated in pairs")
    half = x.shape[-1] // 2
    return (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])


def _joined(first: Tensor, second: Tensor, interleaved: bool) -> Tensor:
    return torch.stack((first, second), -1).flatten(-2) if interleaved else torch.cat((first, second), -1)


def _write(x: Tensor, interleaved: bool, parts: list[Index], tables: tuple[Tensor, ...], conjugate: bool) -> Tensor:
    """Rotate x[part] of each part in place, by cos and sin that follow one another in `tables`; return x."""
    for part, cos, sin in zip(parts, tables[::2], tables[1::2], strict=True):
        dimensions = x[part][..., : 2 * cos.shape[-1]]
        dimensions.copy_(_turned(dimensions, cos, sin, interleaved, conjugate))
    return x


def _in_place(x: Tensor, interleaved: bool, parts: list[Index], tables: tuple[Tensor, ...]) -> Tensor:
    if x.requires_grad and torch.is_grad_enabled():
        return _RotateInPlace.apply(x, interleaved, parts, *tables)
    return _write(x, interleaved, parts, tables, conjugate=False)


class _RotateInPlace(torch.autograd.Function):
    """Rotation in place, whose derivative is the rotation back, of a copy: others may hold the incoming gradient."""

    @staticmethod
    def forward(x: Tensor, interleaved: bool, parts: list[Index], *tables: Tensor) -> Tensor:
        return _write(x, interleaved, parts, tables, conjugate=False)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.interleaved, ctx.parts, *tables = inputs
        ctx.save_for_backward(*tables)
        # PyTorch refuses this for leaves and for views such as unbind's. Of those, what is returned has the right
        # gradient, and x itself that of before, as with flash-attn.
        if not (torch.compiler.is_compiling() or x._is_view() or x.is_leaf):
            ctx.mark_dirty(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dout,) = grads
        dx = _write(dout.clone(), ctx.interleaved, ctx.parts, ctx.saved_tensors, conjugate=True)
        return dx, None, None, *(None for _ in ctx.saved_tensors)
