"""What is compiled, and when: NVRTC for every architecture, gates on the machine code, and shapes that never recompile."""

from __future__ import annotations

import pytest
from needs import needs_nvrtc

from cuflash import arch, dtypes
from cuflash.jit import module, sass
from cuflash.ops import forward

ALL = ("sm_80", "sm_90a")  # every representative variant
SAMPLE = ("sm_86", "sm_89", "sm_100a", "sm_120a")  # a covering few


def specs(name: str) -> list[module.KernelSpec]:
    found = forward.representative(arch.named(name))
    if name in ALL:
        return found
    return found[::5]


@pytest.mark.parametrize(
    "name, index", [(name, i) for name in ALL + SAMPLE for i in range(len(specs(name)))]
)
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
    assert counts["HMMA"] > 0 and counts["LDSM"] > 0
    assert (counts["LDGSTS"] > 0) == (spec.variant.load_bytes >= 4)


def test_every_tile_fits_its_chip():
    for target in arch.ARCHES.values():
        for dtype in dtypes.KERNEL:
            for d in forward.HEAD_DIM_CLASSES:
                for d_v in forward.HEAD_DIM_CLASSES:
                    variant = forward.choose_variant(dtype, d, d_v, 16, target)
                    assert variant.smem_bytes <= target.smem_bytes, f"{target} {variant}"


def test_key_tile_depends_on_dtype_head_dim_and_chip_alone():
    """What bitwise equality alone, packed and dense rests on."""
    target = arch.named("sm_80")
    for load_bytes in (16, 4, 2):
        variant = forward.choose_variant(dtypes.float16, 100, 80, load_bytes, target)
        assert variant.tile == forward.TILES[2, 128][0]
