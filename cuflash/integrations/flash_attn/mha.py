"""`flash_attn.modules.mha`, as far as models import it without the rest: slopes of ALiBi, and attention as a module."""

from __future__ import annotations

import importlib
import math
import operator
from typing import Any

from ...errors import ArgumentError, require
from ...flash import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

Tensor = Any

torch: Any = importlib.import_module("torch")


def get_alibi_slopes(nheads: int) -> list[float]:
    """The slope of each of `nheads` heads, as ALiBi's authors choose them (Press et al. 2022).

    2^(-8 i / n) for i = 1 to n, where n is a power of two. Else those of the power of two below, and behind them every
    second one of the power above.

    >>> get_alibi_slopes(2), len(get_alibi_slopes(12))
    ([0.0625, 0.00390625], 12)
    """
    try:
        n = operator.index(nheads)
    except TypeError:
        raise ArgumentError(f"nheads={nheads!r} must be an int: it counts heads") from None
    require(n >= 1, f"nheads={n} must be at least 1: attention needs a head")
    power = 2 ** math.floor(math.log2(n))
    slopes = [2.0 ** (-8 * i / power) for i in range(1, power + 1)]
    return slopes + [2.0 ** (-4 * i / power) for i in range(1, 2 * (n - power), 2)]


class _FlashAttention(torch.nn.Module):
    """What the two modules share: numbers that go to the functions as they are. Dropout is for training alone."""

    alibi_slopes: Tensor | None

    def __init__(
        self,
        causal: bool,
        softmax_scale: float | None,
        attention_dropout: float,
        window_size: tuple[int, int],
        alibi_slopes: Tensor | None,
        deterministic: bool,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.drop = torch.nn.Dropout(attention_dropout)
        self.window_size = window_size
        self.deterministic = deterministic
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)

    def _keywords(self, causal: bool | None) -> dict[str, Any]:
        slopes = self.alibi_slopes  # which .half() of the model has made half as precise
        return {
            "dropout_p": self.drop.p if self.training else 0.0,
            "softmax_scale": self.softmax_scale,
            "causal": self.causal if causal is None else causal,
            "window_size": self.window_size,
            "alibi_slopes": None if slopes is None else slopes.to(torch.float32),
            "deterministic": self.deterministic,
        }


class FlashSelfAttention(_FlashAttention):
    """`flash_attn_qkvpacked_func` as a module; with `cu_seqlens`, `flash_attn_varlen_qkvpacked_func`."""

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ) -> None:
        super().__init__(causal, softmax_scale, attention_dropout, window_size, alibi_slopes, deterministic)

    def forward(
        self, qkv: Tensor, causal: bool | None = None, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None
    ) -> Tensor:
        """qkv [batch, seqlen, 3, heads, d] -> [batch, seqlen, heads, d]; with cu_seqlens int32 [batch + 1],
        [total, 3, heads, d] -> [total, heads, d]. `causal` takes the place of the module's."""
        if cu_seqlens is None:
            return flash_attn_qkvpacked_func(qkv, **self._keywords(causal))
        return flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, **self._keywords(causal))


class FlashCrossAttention(_FlashAttention):
    """`flash_attn_kvpacked_func` as a module; with `cu_seqlens`, `flash_attn_varlen_kvpacked_func`."""

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        alibi_slopes: Tensor | None = None,  # before window_size, as there
        window_size: tuple[int, int] = (-1, -1),
        deterministic: bool = False,
    ) -> None:
        super().__init__(causal, softmax_scale, attention_dropout, window_size, alibi_slopes, deterministic)

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
    ) -> Tensor:
        """q [batch, q_len, heads, d] and kv [batch, k_len, 2, heads_kv, d] -> q's shape; with cu_seqlens and
        cu_seqlens_k, [total_q, heads, d] and [total_k, 2, heads_kv, d]. `causal` takes the place of the module's."""
        if cu_seqlens is None:
            require(
                cu_seqlens_k is None, "cu_seqlens_k is given and cu_seqlens is not: packed keys need packed queries"
            )
            return flash_attn_kvpacked_func(q, kv, **self._keywords(causal))
        return flash_attn_varlen_kvpacked_func(
            q, kv, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k, **self._keywords(causal)
        )
