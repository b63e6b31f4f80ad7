"""What mods are made of others by: lengths passed on to whoever names them, and how a mod is pickled."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import ArgumentError
from ..trace.tracer import Mod, mod
from ..trace.uncompiled import outside_of_compilers

Array = Any  # of NumPy, CuPy, PyTorch or JAX; or a number where the text says so
Mask = Callable[..., Any]  # f(b, h, q_idx, kv_idx[, q_len, kv_len]) -> bool
Score = Callable[..., Any]  # f(score, b, h, q_idx, kv_idx[, q_len, kv_len]) -> score

Maker = TypeVar("Maker", bound=Callable[..., Any])


def ready_made(make: Maker) -> Maker:
    """A function that makes mods. They are pickled as its name and its arguments; compilers do not look into it."""

    @functools.wraps(make)
    def wrapper(*args: Any, **keywords: Any) -> Any:
        made = make(*args, **keywords)
        if isinstance(made, Mod):
            made.made_by = wrapper, args, keywords
        return made

    wrapper = outside_of_compilers(wrapper)
    return wrapper  # type: ignore[return-value]


def parameters(f: Any) -> tuple[str, ...]:
    f = getattr(f, "function", f)
    try:
        return tuple(inspect.signature(f).parameters)
    except (TypeError, ValueError):  # of C: those have no names to look at
        return ()


def with_lengths(name: str, f: Any) -> Any:
    """`f` that takes q_len and kv_len behind its other arguments, whether it wants them or not."""
    if not callable(f):
        raise ArgumentError(f"{name}={f!r} must be a function")
    names = parameters(f)
    wants_q, wants_k = "q_len" in names, "kv_len" in names

    def call(*arguments: Any) -> Any:
        *places, q_len, kv_len = arguments
        if wants_q and wants_k:
            return f(*places, q_len=q_len, kv_len=kv_len)
        if wants_q:
            return f(*places, q_len=q_len)
        return f(*places, kv_len=kv_len) if wants_k else f(*places)

    return call


def all_with_lengths(mods: tuple[Any, ...]) -> list[Any]:
    return [with_lengths(f"mods[{i}]", f) for i, f in enumerate(mods)]


def named_as_needed(f: Any, mods: tuple[Any, ...]) -> Any:
    """`f`, whose last two parameters are q_len and kv_len, without them if no mod that it calls names either."""
    if any(not {"q_len", "kv_len"}.isdisjoint(parameters(g)) for g in mods):
        return mod(f)

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return f(b, h, q_idx, kv_idx)

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return f(score, b, h, q_idx, kv_idx)

    return mod(score_mod if parameters(f)[0] == "score" else mask)
