"""Masks and scores as a rank computes them: its rows are part of their documents, and mods see them where they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import mods
from ..mods.parts import with_lengths


def mask_of(
    positions: Any, starts: Any, causal: bool, window_size: tuple[int, int], mask_mod: Any
) -> Callable[..., Any] | None:
    """The mask of a rank whose row `starts[b] + q_idx` is at `positions[...]` of document b: causal and window from
    there, and `mask_mod`. Keys are the whole document's. None where every key is seen.
    """
    left, right = window_size[0], 0 if causal else window_size[1]
    if left < 0 and right < 0 and mask_mod is None:
        return None
    seen_by_mod = None if mask_mod is None else with_lengths("mask_mod", mask_mod)

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any, kv_len: Any) -> Any:
        at = positions[starts[b] + q_idx]
        seen = None
        if right >= 0:
            seen = kv_idx <= at + right if right else kv_idx <= at
        if left >= 0:
            near = kv_idx >= at - left
            seen = near if seen is None else seen & near
        if seen_by_mod is not None:
            own = seen_by_mod(b, h, at, kv_idx, kv_len, kv_len)
            seen = own if seen is None else seen & own
        return seen

    return mask


def score_of(positions: Any, starts: Any, alibi_slopes: Any, score_mod: Any) -> Any:
    """ALiBi and `score_mod` of a rank, likewise. None where scores stay."""
    steps = [] if alibi_slopes is None else [mods.alibi(alibi_slopes)]
    steps += [] if score_mod is None else [score_mod]
    if not steps:
        return None
    steps = [with_lengths("score_mod", step) for step in steps]

    def score(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any, kv_len: Any) -> Any:
        at = positions[starts[b] + q_idx]
        for step in steps:
            score = step(score, b, h, at, kv_idx, kv_len, kv_len)
        return score

    return score
