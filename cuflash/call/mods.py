"""The mods of a call: what they compute and captured, bound to the arrays and numbers of one call."""

from __future__ import annotations

from collections.abc import Container
from functools import lru_cache
from typing import Any

import numpy as np

from .. import frameworks
from ..array import Device, TensorView
from ..errors import ArgumentError, CuflashError, require
from ..frameworks import Framework
from ..trace import tracer
from ..trace.expr import Mods
from ..trace.fold import fold
from ..trace.fold import numbers as folded_numbers
from ..trace.tracer import Bound

Array = Any


def bind_mods(q: Array, k: Array, score_mod: Any, mask_mod: Any, block_mask: Any) -> Bound:
    """What a call's mods compute and captured: a `tracer.Bound`. At least one is given."""
    for name, mod in (("score_mod", score_mod), ("mask_mod", mask_mod)):
        if mod is not None and not callable(mod):
            raise ArgumentError(f"{name}={mod!r} must be a function")
    if block_mask is not None:
        own = _mask_of(q, k, block_mask)
        if mask_mod is None:
            mask_mod = own
        else:
            from ..mods import and_masks

            mask_mod = and_masks(mask_mod, own)
    return tracer.bind(score_mod, mask_mod)


def traced_before(q: Array, k: Array, score_mod: Any, mask_mod: Any, block_mask: Any) -> Bound | None:
    """The same where a compiler of PyTorch follows and nothing can be traced: of mods that `cuflash.mod` traced
    outside, by their attributes, `Bound.mods` being text. None for others."""
    mods = [score_mod, mask_mod]
    if block_mask is not None:
        mods.append(_mask_of(q, k, block_mask))
    text, arrays, scalars = "", (), ()
    for kind, mod in zip(("score", "mask", "mask"), mods, strict=False):
        if mod is not None:
            if type(mod) is not tracer.Mod:
                return None
            require(mod.kind == kind, f"{kind}_mod is traced as a {mod.kind}_mod: pass it as that")
            text += ("\n" if text else "") + mod.text
            arrays, scalars = (*arrays, *mod.kept_arrays), (*scalars, *mod.kept_scalars)
    return Bound(text, arrays, scalars)  # type: ignore[arg-type]


def _mask_of(q: Array, k: Array, block_mask: Any) -> Any:
    """The mask_mod that a block mask is, once it is known to be for this call."""
    if not hasattr(block_mask, "as_mask_mod"):
        raise ArgumentError(
            f"block_mask is a {type(block_mask).__qualname__}: pass what cuflash.create_block_mask returned, "
            "or a function as mask_mod="
        )
    shape: Any = tuple(getattr(q, "shape", ()))
    keys: Any = tuple(getattr(k, "shape", ()))
    if len(shape) == len(keys) == 4:  # packed sequences have lengths of their own
        block_mask.require_fits(shape[0], shape[2], shape[1], keys[1])
    return block_mask.as_mask_mod(q)


def captured_views(framework: Framework, bound: Bound) -> dict[str, TensorView]:
    """Views of captured arrays, "captured0" and so on: of the framework of q, or of one element in host memory."""
    views = {}
    known: type | None = None
    for name, slot, x in zip(_numbered(len(bound.arrays)), bound.mods.arrays, bound.arrays, strict=True):
        other = framework if type(x) is known else frameworks.of(x, slot.name)
        if other is framework:
            known = type(x)
        elif not (slot.ndim == 0 and other is frameworks.numpy):
            raise ArgumentError(
                f"{slot.name}, which a mod captured, is a {other.NAME} array and q a {framework.NAME} array: all "
                "arrays must be of one framework; convert with from_dlpack, which copies nothing"
            )
        try:
            views[name] = other.view(x)
        except CuflashError as error:
            raise type(error)(f"{slot.name}, which a mod captured: {error}") from error
    return views


@lru_cache
def _numbered(count: int) -> tuple[str, ...]:
    return tuple(f"captured{i}" for i in range(count))


def captured_names(mods: Mods, views: Container[str]) -> list[str]:
    """The names of the views of captured arrays, in slot order: the slopes of ALiBi keep theirs."""
    return [name if name in views else "alibi_slopes" for name in _numbered(len(mods.arrays))]


def fold_in(bound: Bound, views: dict[str, TensorView], softcap: float) -> tuple[Mods, tuple[int | float, ...], float]:
    """Beside a score_mod, softcap and ALiBi become part of it -> mods, their numbers, the softcap that is left."""
    mods, scalars = bound.mods, bound.scalars
    slopes = views.get("alibi_slopes")
    if mods.score is None or not (softcap or slopes is not None):
        return mods, scalars, softcap
    alibi = None if slopes is None else "head" if slopes.ndim == 1 else "batch"
    return fold(mods, softcap > 0, alibi), folded_numbers(mods, scalars, softcap), 0.0


def captured_uploads(
    framework: Framework, bound: Bound, views: dict[str, TensorView], device: Device
) -> dict[str, np.ndarray]:
    """Captured arrays of one element in host memory, which a device kernel cannot read there."""
    found = {}
    for i, slot in enumerate(bound.mods.arrays):
        if slot.ndim == 0 and (view := views[f"captured{i}"]).device[0] == "cpu":
            found[f"captured{i}"] = view.as_numpy()
            if framework.capturing(device[1]):
                raise ArgumentError(
                    f"{slot.name}, which a mod captured, lies in host memory and cannot enter a CUDA graph, which "
                    "would replay this very value: copy it to the device before the capture"
                )
    return found
