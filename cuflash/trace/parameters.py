"""The parameters of mods: which of the two a function is, and whether it can take what it is given."""

from __future__ import annotations

import inspect
from typing import Any

from ..errors import TraceError

PARAMETERS = {"score": ("score", "b", "h", "q_idx", "kv_idx"), "mask": ("b", "h", "q_idx", "kv_idx")}
LENGTHS = ("q_len", "kv_len")


def signature_of(function: Any) -> inspect.Signature | None:
    """Of a function; None where Python knows none."""
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


def needed(signature: inspect.Signature) -> tuple[list[str], bool]:
    """The positional parameters without defaults, and whether any number is taken."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = signature.parameters.values()
    names = [p.name for p in found if p.kind in positional and p.default is p.empty and p.name not in LENGTHS]
    return names, any(p.kind is p.VAR_POSITIONAL for p in found)


def kind_of(function: Any) -> str:
    """By the number of parameters: "score" or "mask"."""
    if not callable(function):
        raise TraceError(f"mod is given a {type(function).__qualname__}: pass a score_mod or a mask_mod, a function")
    signature = signature_of(function)
    names, open_ended = needed(signature) if signature else ([], True)
    if not open_ended:
        for kind, expected in PARAMETERS.items():
            if len(names) == len(expected):
                return kind
    raise TraceError(
        f"{called(function)} takes {_listed(names, open_ended)}: a score_mod takes (score, b, h, q_idx, kv_idx) and a "
        'mask_mod (b, h, q_idx, kv_idx); say which it is with kind="score" or kind="mask"'
    )


def called(function: Any) -> str:
    """What messages call a function."""
    return getattr(function, "__name__", None) or type(function).__qualname__


def _listed(names: list[str], open_ended: bool) -> str:
    return f"({', '.join([*names, *(['*args'] if open_ended else [])])})"


def check_parameters(function: Any, kind: str) -> tuple[str, ...]:
    """The lengths that a mod names. Raises TraceError where it cannot take what it is given."""
    signature = signature_of(function)
    if signature is None:
        return ()
    expected = PARAMETERS[kind]
    names, open_ended = needed(signature)
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    accepted = [p.name for p in signature.parameters.values() if p.kind in positional and p.name not in LENGTHS]
    if len(names) > len(expected) or (len(accepted) < len(expected) and not open_ended):
        other = "mask" if kind == "score" else "score"
        hint = f"; with {len(names)} it is a {other}_mod" if len(names) == len(PARAMETERS[other]) else ""
        raise TraceError(f"it takes {_listed(names, open_ended)} and is given {expected_by(kind)}{hint}")
    for place, name in enumerate(accepted[: len(expected)]):
        if name in PARAMETERS["score"] and name != expected[place]:
            raise TraceError(
                f"it has its parameter {name!r} where {expected[place]} is given: they come in the order "
                f"{expected_by(kind)}, under any name that is not another's"
            )
    wanted = [p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    unknown = [p.name for p in wanted if p.name not in LENGTHS]
    if unknown:
        raise TraceError(
            f"it needs the keyword {unknown[0]!r}, which nobody gives: bind it with "
            f"functools.partial(f, {unknown[0]}=...), or capture it. Given are {expected_by(kind)}, q_len and kv_len"
        )
    return tuple(n for n in LENGTHS if n in signature.parameters)


def expected_by(kind: str) -> str:
    """What a mod of a kind is given, for messages."""
    return f"({', '.join(PARAMETERS[kind])})"
