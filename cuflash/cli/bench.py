"""`cuflash bench`: cuflash beside every other attention that is installed here; the benchmarks themselves lie in
`benchmarks/`, beside the package in a checkout and inside it in a wheel."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]


def benchmarks(name: str) -> Any:
    """A module of the benchmarks.

    >>> benchmarks("schema").OURS
    'cuflash'
    """
    if (PACKAGE / "_benchmarks").is_dir():
        return importlib.import_module(f"cuflash._benchmarks.{name}")
    if str(PACKAGE.parent) not in sys.path:
        sys.path.insert(0, str(PACKAGE.parent))
    return importlib.import_module(f"benchmarks.{name}")
