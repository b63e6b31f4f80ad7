"""Softcap and ALiBi as part of a score_mod: beside one, they are expressions like the user's own."""

from __future__ import annotations

from functools import lru_cache

from .. import dtypes
from .expr import SCORE, ArraySlot, Mods, ScalarSlot, coordinate, load, make, rebuild, scalar

SLOPES = "alibi_slopes"  # the name of their slot, which is the last


@lru_cache(maxsize=1024)
def fold(mods: Mods, softcap: bool, alibi: str | None) -> Mods:
    """score_mod(alibi(softcap(score))), in mods that have a score.

    softcap   whether to cap; its value goes into one more scalar slot, the last
    alibi     None, "head" (slopes [heads_q]) or "batch" ([batch, heads_q]), in one more array slot, the last

    >>> fold(Mods(make("neg", SCORE), None), True, "head").score
    -((number0 * tanh((score / number0))) - (array0[h] * float(abs(((q_idx + (kv_len - q_len)) - kv_idx)))))
    """
    assert mods.score is not None
    score, arrays, scalars = SCORE, mods.arrays, mods.scalars
    if softcap:
        cap = scalar(len(scalars), "float")
        score = make("mul", cap, make("tanh", make("div", score, cap)))
        scalars += (ScalarSlot("softcap", "float"),)
    if alibi is not None:
        q_idx, kv_idx, q_len, kv_len, b, h = map(coordinate, ("q_idx", "kv_idx", "q_len", "kv_len", "b", "h"))
        indices = (h,) if alibi == "head" else (b, h)
        distance = make("abs", make("sub", make("add", q_idx, make("sub", kv_len, q_len)), kv_idx))
        score = make("sub", score, make("mul", load(len(arrays), "float", indices), distance))
        arrays += (ArraySlot(SLOPES, dtypes.float32, len(indices)),)
    return Mods(rebuild(mods.score, {SCORE: score}), mods.mask, arrays, scalars)


def numbers(mods: Mods, scalars: tuple[int | float, ...], softcap: float) -> tuple[int | float, ...]:
    """The numbers of folded mods, in slot order."""
    return (*scalars, softcap) if mods.score is not None and softcap else scalars
