"""The rules of numbers, flags, windows and hints in a call: host values, checked without looking at an array."""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np

from .. import frameworks
from ..errors import ArgumentError, require

AUX = ("lse", "max_logit", "dropout_mask")
_MAX_ROWS = 2**31 - 1  # kernels count rows in 32 bits (and offsets in 64)


def number(name: str, value: Any) -> float:
    """A finite host number."""
    if not isinstance(value, numbers.Real):
        raise ArgumentError(
            f"{name} is a {type(value).__qualname__} and must be a Python number, for it goes to the kernel by value: "
            + _plain(name, value, f"float({name})", by_mod=name != "dropout_p")
        )
    try:
        value = float(value)
    except OverflowError:  # an int past every float
        value = math.inf
    if not -_LARGEST <= value <= _LARGEST:  # compilers follow comparisons
        raise ArgumentError(
            f"{name}={value} must be finite, and at most {_LARGEST:.4g} in magnitude, for kernels get it as a float32: "
            f"{_REMEDIES.get(name, 'pass such a number')}"
        )
    return value


def _plain(name: str, value: Any, what: str, by_mod: bool = True) -> str:
    """What to pass instead of an array where Python needs a number: of one that JAX traces there is none."""
    if not frameworks.traced(value):
        return f"pass {what}"
    captured = ", or pass a score_mod or mask_mod that captures the traced value and does its work" if by_mod else ""
    return f"JAX traces it, so name it in static_argnames of jax.jit, or compute it outside{captured}"


_LARGEST = float(np.finfo(np.float32).max)

_REMEDIES = {
    "scale": "pass None for 1 / sqrt(head_dim)",
    "softcap": "pass 0.0 for no cap",
    "dropout_p": "pass 0.0 for no dropout",
}


def softcap(value: Any) -> float:
    """A positive number, or 0 for none."""
    value = number("softcap", value)
    require(value >= 0, f"softcap={value} must be positive, or 0 for none")
    return value


def dropout_p(value: Any) -> float:
    """A probability below 1."""
    p = number("dropout_p", value)
    require(0 <= p < 1, f"dropout_p={p} must be from 0 up to, not including, 1")
    return p


def window(window_size: Any, causal: bool) -> tuple[int, int]:
    """(left, right) with -1 for unlimited and causal folded in."""
    if not isinstance(causal, (bool, np.bool_)):
        raise ArgumentError(
            f"causal is a {type(causal).__qualname__} and must be True or False: "
            + _plain("causal", causal, "bool(causal)")
        )
    try:
        left, right = window_size
    except (TypeError, ValueError):
        raise ArgumentError(
            f"window_size={window_size!r} must be a pair (left, right), -1 or None for unlimited: for a causal "
            "window of n keys pass (n - 1, 0)"
        ) from None
    sides = []
    for side in (left, right):
        side = -1 if side is None else side
        if not isinstance(side, numbers.Integral):
            raise ArgumentError(
                f"window_size={window_size!r} must hold two ints: "
                + _plain("window_size", side, "(int(left), int(right))")
            )
        if int(side) < -1:  # the message is made only then: a compiler's symbolic int has no repr
            raise ArgumentError(f"window_size={window_size!r}: {side} must be -1 (or None: unlimited), 0 or more")
        sides.append(-1 if int(side) >= _MAX_ROWS else int(side))  # further than any row: unlimited
    left, right = sides
    return left, 0 if causal else right


def window_of(window_size: Any) -> Any:
    """An array of two, which flash-attn takes for a window, as a tuple; anything else as it is."""
    if not hasattr(window_size, "tolist") or isinstance(window_size, type):
        return window_size
    if frameworks.traced(window_size):
        raise ArgumentError(f"window_size={window_size!r} must hold two ints: {_plain('window_size', window_size, '')}")
    shape = getattr(window_size, "shape", ())
    require(
        math.prod(shape) == 2,
        f"window_size.shape={tuple(shape)} must be (2,), left and right: pass a tuple, (-1, -1) for no window",
    )
    return tuple(np.ravel(window_size.tolist()).tolist())


def hint(name: str, value: Any) -> int | None:
    """`max_seqlen_*`: a non-negative int or None. Of an array with one integer its value, or None where reading it
    would wait for a device: nothing depends on a hint."""
    if value is None:
        return None
    if not isinstance(value, numbers.Integral):
        if not hasattr(value, "shape"):
            raise ArgumentError(f"{name} is a {type(value).__qualname__} and must be an int or None: pass int({name})")
        try:
            values = frameworks.of(value, name).known(value)
        except ArgumentError as error:
            raise ArgumentError(f"{name}: {error}") from error
        if values is None:
            return None
        require(
            values.size == 1 and values.dtype.kind in "iu",
            f"{name} is an array of shape {values.shape} and dtype {values.dtype}, and must be one integer or None: "
            f"pass int({name}.max())",
        )
        value = values.item()
    if int(value) < 0:
        raise ArgumentError(f"{name}={value} must not be negative")
    return int(value)


def split_size(value: Any) -> int | None:
    """`split_size`: keys of a piece, or None. What a kernel's key block divides is for its plan to know."""
    if value is None:
        return None
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or int(value) < 1:
        raise ArgumentError(
            f"split_size={value!r} must be a positive int or None: "
            + _plain("split_size", value, "a multiple of 64", by_mod=False)
        )
    return int(value)


def aux_names(aux: Any) -> tuple[str, ...]:
    """The names in `aux`, checked."""
    if isinstance(aux, str):
        raise ArgumentError(f"aux={aux!r} must be a tuple of names: pass aux=({aux!r},)")
    try:
        given = iter(aux)
    except TypeError:
        raise ArgumentError(f"aux={aux!r} must be a tuple of names: pass () for none") from None
    names: list[str] = []
    for name in given:  # one by one: an array may have more elements than fit into a tuple
        require(isinstance(name, str) and name in AUX, f"aux names {name!r}: it must be one of {', '.join(AUX)}")
        names.append(name)
    return tuple(names)


def flag(name: str, value: Any) -> bool:
    """True or False; None is False."""
    if value is None or value is False or value is True:
        return bool(value)
    # An array has no one truth, or one that waits for the device; any text is true.
    if not isinstance(value, (int, np.bool_, np.integer)) or value not in (0, 1):
        raise ArgumentError(f"{name} is a {type(value).__qualname__} and must be True or False: pass bool({name})")
    return bool(value)


def count(name: str, value: Any, least: int = 1, most: int = _MAX_ROWS) -> int:
    """A host int within bounds."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise ArgumentError(f"{name}={value!r} must be an int: pass int({name})")
    require(least <= int(value) <= most, f"{name}={value!r} must be from {least} to {most}")
    return int(value)
