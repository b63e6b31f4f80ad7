"""Functions that torch.compile must not look into: it breaks its graph at them, and runs them as they are.

A mod is traced by calling it on symbols, and dynamo would trace that again. Nothing here imports PyTorch where the
program has not.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

_REMEDY = (
    "torch.compile cannot look into a mod, nor into a block mask: make both outside of what is compiled, as "
    "score_mod = cuflash.mod(score_mod) or block_mask = cuflash.create_block_mask(...), and use them inside"
)


def outside_of_compilers(function: F) -> F:
    """A function that runs outside of the graphs of torch.compile, which break there. With fullgraph=True, and in
    torch.export, it is refused with the remedy."""

    @functools.wraps(function)
    def wrapper(*args: Any, **keywords: Any) -> Any:
        torch = sys.modules.get("torch")
        if torch is None or "torch._dynamo" not in sys.modules:
            return function(*args, **keywords)
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break(msg=_REMEDY)  # what fullgraph=True shows
        # Behind a break of the graph dynamo goes on with the functions that are called, so it is told not to.
        return _uncompiled()(function, *args, **keywords)

    return wrapper  # type: ignore[return-value]


def _uncompiled() -> Callable[..., Any]:
    """Calls a function that dynamo leaves alone. Made once, and kept where dynamo can read it: of `functools.cache` it
    would warn."""
    if not _made:
        torch: Any = sys.modules["torch"]

        @torch.compiler.disable(reason=_REMEDY)
        def uncompiled(function: Callable[..., Any], /, *args: Any, **keywords: Any) -> Any:
            return function(*args, **keywords)

        _made.append(uncompiled)
    return _made[0]


_made: list[Callable[..., Any]] = []
