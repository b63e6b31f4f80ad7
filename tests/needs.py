"""What some tests need and a machine may lack: each a mark that skips, with the reason counted at the end."""

from __future__ import annotations

import pytest

from cuflash.errors import CompileError
from cuflash.jit import nvrtc


def _missing_nvrtc() -> bool:
    try:
        nvrtc.version()
    except CompileError:
        return True
    return False


needs_nvrtc = pytest.mark.skipif(_missing_nvrtc(), reason="NVRTC is not installed")
