"""Calls that torch.compile leaves out of its graph.

A module of its own: it imports dynamo, which takes seconds, and is imported where dynamo is at work already.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from ..frameworks import torch as adapter

torch: Any = adapter.library()


@torch.compiler.disable(
    reason="torch.compile cannot look into a mod: trace it before, as score_mod = cuflash.mod(score_mod) outside of "
    "what is compiled, and pass what that returns"
)
def uncompiled(function: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
    """Calls a function outside of the graph that torch.compile makes, which breaks in two here."""
    warnings.warn(
        "torch.compile breaks its graph at this call of attention, for it cannot look into a mod: trace it before, as "
        "score_mod = cuflash.mod(score_mod) outside of what is compiled, and pass what that returns",
        stacklevel=3,
    )
    return function(*args, **keywords)
