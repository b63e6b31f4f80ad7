"""What is asked of every cubin, and how many are made in a run: NVRTC takes a second for each, nvdisasm half of one.

@pytest.mark.parametrize("name, index", sampled(representative, {"sm_80": slice(None), "sm_90a": slice(0, 3)}))
def test_machine_code(name, index):
    compiled = checked(representative(arch.named(name))[index], name)
    assert counts(compiled)["HMMA"] > 0
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from cuflash import arch
from cuflash.arch import Arch
from cuflash.jit import module, nvrtc, sass


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


def ptx(spec: module.KernelSpec, name: str) -> str:
    """What NVRTC hands to ptxas: the order in it is that of the text where the text's asm keeps it."""
    from cuda.bindings import nvrtc as library

    program = library.nvrtcCreateProgram(spec.text("cuda").encode(), spec.source.encode(), 0, [], [])[1]
    flags = [x.encode() for x in nvrtc.command(arch.named(name))]
    assert library.nvrtcCompileProgram(program, len(flags), flags)[0] == 0
    text = bytes(library.nvrtcGetPTXSize(program)[1])
    assert library.nvrtcGetPTX(program, text)[0] == 0
    library.nvrtcDestroyProgram(program)
    return text.decode(errors="replace")


_PTX_REGISTER = re.compile(r"%\w+")
_PTX_BRACES = re.compile(r"\{(.*?)\}")  # sums; the left operand, where it is in registers


def misplaced(text: str) -> list[str]:
    """Instructions of a PTX text that stand between a wgmma.fence and a product behind it and write a register that the
    product uses, or between a product and the wait for it and touch its sums.

    >>> product = "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f1, %f2 /**/}, {%r1}, %rd1, p, 1, 1, 1;"
    >>> well = ["mul.f32 %f1, %f1, %f9;", "wgmma.fence.sync.aligned;", product, "wgmma.commit_group.sync.aligned;",
    ...         "mul.f32 %f3, %f3, %f9;", "wgmma.wait_group.sync.aligned 0;", "add.f32 %f4, %f1, %f2;"]
    >>> misplaced(chr(10).join(well))
    []
    >>> well[:2], well[5:] = well[1::-1], well[:4:-1]
    >>> misplaced(chr(10).join(well))
    ['mul.f32 %f1, %f1, %f9;', 'add.f32 %f4, %f1, %f2;']
    """
    found: list[str] = []
    written: list[tuple[str, str]] = []  # since the fence: instruction, register
    groups: list[set[str]] = [set()]  # sums of products under way; the last group is open
    for line in (x.strip() for x in text.splitlines()):
        name, _, operands = line.replace("\t", " ").partition(" ")
        registers = _PTX_REGISTER.findall(operands)
        if name.startswith("wgmma.fence"):
            written = []
        elif name.startswith("wgmma.mma_async"):
            braces = [set(_PTX_REGISTER.findall(x)) for x in _PTX_BRACES.findall(operands)]
            found += [x for x, register in written if register in set.union(*braces) and x not in found]
            groups[-1] |= braces[0]
        elif name.startswith("wgmma.commit_group"):
            groups.append(set())
        elif name.startswith("wgmma.wait_group"):
            groups = groups[-1 - int(operands.strip(" ;")) :]
        elif registers and not name.startswith(("//", ".")):
            found += [line] * any(register in group for group in groups for register in registers)
            written.append((line, registers[0]))
    return found


def sampled(representative: Callable[[Arch], list[Any]], usual: Mapping[str, slice]) -> list[Any]:
    """(architecture, index) of every representative kernel; what is not in its slice of `usual` is for -m slow."""
    params = []
    for name, part in usual.items():
        indices = range(len(representative(arch.named(name))))
        params += [pytest.param(name, i, marks=() if i in indices[part] else pytest.mark.slow) for i in indices]
    return params
