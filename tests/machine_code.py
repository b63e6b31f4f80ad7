"""What is asked of every cubin, and how many are made in a run: NVRTC takes a second for each, nvdisasm half of one.

@pytest.mark.parametrize("name, index", sampled(representative, {"sm_80": slice(None), "sm_90a": slice(0, 3)}))
def test_machine_code(name, index):
    compiled = checked(representative(arch.named(name))[index], name)
    assert counts(compiled)["HMMA"] > 0
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from cuflash import arch
from cuflash.arch import Arch
from cuflash.jit import module, sass


def checked(spec: module.KernelSpec, name: str) -> module.Compiled:
    """Compiled without a spill, a stack (so without local memory) or a warning; its shared memory fits the chip."""
    target = arch.named(name)
    compiled = module.compile(spec, target)
    resources = compiled.resources
    assert (resources.spill_stores, resources.spill_loads, resources.stack_bytes) == (0, 0, 0), spec.variant
    assert spec.smem_bytes + resources.static_smem_bytes <= target.smem_bytes
    assert not compiled.cubin.warnings
    return compiled


def counts(compiled: module.Compiled) -> dict[str, int]:
    """How many instructions of each class, see `sass.count`: none that reads or writes local memory."""
    found = sass.functions(sass.disassemble(compiled.path))[compiled.spec.entry].counts
    assert found["LDL"] == found["STL"] == 0
    return found


def sampled(representative: Callable[[Arch], list[Any]], usual: Mapping[str, slice]) -> list[Any]:
    """(architecture, index) of every representative kernel; what is not in its slice of `usual` is for -m slow."""
    params = []
    for name, part in usual.items():
        indices = range(len(representative(arch.named(name))))
        params += [pytest.param(name, i, marks=() if i in indices[part] else pytest.mark.slow) for i in indices]
    return params
