"""Backends for host arrays, and an eye on which memory the work is done in."""

from __future__ import annotations

import numpy as np
import pytest
from backends import using

from cuflash import reference
from cuflash.ops import forward


@pytest.fixture(params=["reference", "emulator"])
def backend(request):
    """The backends that host arrays run on."""
    with using("auto" if request.param == "reference" else request.param):
        yield request.param


@pytest.fixture
def addresses(monkeypatch):
    """Argument name -> address, of the arrays of the latest call, as the backend got them."""
    seen: dict[str, int] = {}
    attention, launch = reference.attention, forward.ForwardPlan.launch

    def watched_attention(q, k, v, **keywords):
        seen.clear()
        arrays = {"q": q, "k": k, "v": v, **keywords}
        seen.update({name: x.ctypes.data for name, x in arrays.items() if isinstance(x, np.ndarray)})
        return attention(q, k, v, **keywords)

    def watched_launch(self, arrays, **keywords):
        seen.clear()
        seen.update({name: view.ptr for name, view in arrays.items()})
        return launch(self, arrays, **keywords)

    monkeypatch.setattr(reference, "attention", watched_attention)
    monkeypatch.setattr(forward.ForwardPlan, "launch", watched_launch)
    return seen
