"""What some tests need and a machine may lack: each a mark that skips, with the reason counted at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cuflash.errors import CuflashError
from cuflash.jit import nvrtc, sass


def _refuses(question: Callable[[], Any]) -> bool:
    try:
        question()
    except CuflashError:
        return True
    return False


needs_nvrtc = pytest.mark.skipif(_refuses(nvrtc.version), reason="NVRTC is not installed")
needs_nvdisasm = pytest.mark.skipif(_refuses(sass.nvdisasm), reason="nvdisasm is not installed")
