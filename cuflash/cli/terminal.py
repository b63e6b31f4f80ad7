"""Where commands print."""

from __future__ import annotations

from typing import Any


def console(stderr: bool = False) -> Any:
    """A rich console. It is wide where nobody looks: in a file or a pipe tables are not folded to 80 columns."""
    from rich.console import Console

    found = Console(stderr=stderr)
    return found if found.is_terminal else Console(stderr=stderr, width=240)
