"""The backward's machine code, by NVRTC for every architecture; lengths, seeds and rates that never recompile."""

from __future__ import annotations

import pytest
from needs import needs_nvrtc

from cuflash import arch, dtypes
from cuflash.jit import module, sass
from cuflash.ops import backward, forward

# Every representative variant, or every so manyeth.
EVERY = {"sm_80": 1, "sm_90a": 3, "sm_86": 12, "sm_89": 12, "sm_100a": 6, "sm_120a": 6}


def specs(name: str) -> list[module.KernelSpec]:
    return backward.representative(arch.named(name))[:: EVERY[name]]


@pytest.mark.parametrize("name, index", [(name, i) for name in EVERY for i in range(len(specs(name)))])
@needs_nvrtc
def test_machine_code(name, index):
    """No spill, no stack, no local memory; the instructions the kernel is made of; shared memory within the chip."""
    target = arch.named(name)
    spec = specs(name)[index]
    compiled = module.compile(spec, target)
    resources = compiled.resources
    assert (resources.spill_stores, resources.spill_loads, resources.stack_bytes) == (0, 0, 0)
    assert spec.smem_bytes + resources.static_smem_bytes <= target.smem_bytes
    assert not compiled.cubin.warnings
    counts = sass.functions(sass.disassemble(compiled.path))[spec.entry].counts
    assert counts["LDL"] == counts["STL"] == 0
    assert counts["ATOM"] == counts["RED"] == 0  # gradients are summed in one order
    if isinstance(spec.variant, backward.BackwardVariant):
        assert counts["HMMA"] > 0 and counts["LDSM"] > 0
        # Rows aligned to 2 bytes go through registers; lse and delta never do.
        assert (counts["LDGSTS"] > 0) == (spec.variant.load_bytes >= 4 or spec.variant.keys_held)


def test_every_tile_fits_every_chip():
    smallest = min(target.smem_bytes for target in arch.ARCHES.values())
    for dtype in dtypes.KERNEL:
        for d in forward.HEAD_DIM_CLASSES:
            for d_v in forward.HEAD_DIM_CLASSES:
                for variant in backward.choose_variants(dtype, d, d_v, 16):
                    assert variant.smem_bytes <= smallest, variant
