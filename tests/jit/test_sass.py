"""Reading machine code: the toy's instructions and loop are found, and nothing is counted twice."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from jit_toys import toy_spec
from needs import needs_nvdisasm, needs_nvrtc

from cuflash import arch
from cuflash.errors import CompileError, UnsupportedError
from cuflash.jit import module, sass

SAMPLE = """
	.section	.text.first,"ax",@progbits
.text.first:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_2:
        /*0010*/                   LDSM.16.M88.4 R4, [R8] ;
.L_x_1:
        /*0020*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0030*/               @P1 LDS R3, [R2] ;
        /*0040*/              @!P0 BRA `(.L_x_1) ;
        /*0050*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0060*/               @P0 BRA `(.L_x_2) ;
        /*0070*/                   MUFU.EX2 R0, R0 ;
.L_x_3:
        /*0080*/                   FADD R0, R0, R1 ;
        /*0090*/               @P0 BRA P2, `(.L_x_3) ;
        /*00a0*/                   BRA `(.L_x_4) ;
.L_x_4:
        /*00b0*/                   EXIT ;
.text.second:
.L_x_5:
        /*0000*/                   HGMMA.64x64x16.F32 R24, gdesc[UR4], R24, gsb0 ;
        /*0010*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0020*/                   MUFU.EX2 R0, R0 ;
        /*0030*/              @UP0 BRA.U `(.L_x_5) ;
"""


def test_functions_counts_and_innermost_matrix_loops() -> None:
    found = sass.functions(SAMPLE)
    first, second = found["first"], found["second"]
    assert list(found) == ["first", "second"]
    picked = {c: first.counts[c] for c in ("HMMA", "LDSM", "LDS", "MUFU", "BRA", "FADD", "HGMMA", "total")}
    assert picked == {"HMMA": 2, "LDSM": 1, "LDS": 1, "MUFU": 1, "BRA": 4, "FADD": 1, "HGMMA": 0, "total": 12}
    (loop,) = first.loops
    assert loop.length == 3 and loop.counts["HMMA"] == 1, "the inner of two, and not the loop without a product"
    (loop,) = second.loops
    assert loop.counts["HGMMA"] == 1
    assert [s["MUFU"] for s in loop.segments("WARPGROUP.DEPBAR")] == [0, 1]


@needs_nvrtc
@needs_nvdisasm
@pytest.mark.parametrize("name", ["sm_80", "sm_90a"])
def test_the_toy_has_what_its_text_says(name: str) -> None:
    compiled = module.compile(toy_spec("cuflash_toy_matrix"), arch.named(name))
    found = sass.functions(sass.disassemble(compiled.path))
    matrix, scale = found["cuflash_toy_matrix"], found["cuflash_toy_scale"]
    picked = {c: matrix.counts[c] for c in ("HMMA", "LDSM", "LDGSTS", "MUFU", "BAR", "STG", "LDL", "STL")}
    assert picked == {"HMMA": 1, "LDSM": 1, "LDGSTS": 1, "MUFU": 1, "BAR": 2, "STG": 1, "LDL": 0, "STL": 0}
    (loop,) = matrix.loops
    assert {c: loop.counts[c] for c in ("HMMA", "LDSM", "BAR", "MUFU")} == {"HMMA": 1, "LDSM": 1, "BAR": 2, "MUFU": 0}
    assert scale.loops == () and scale.counts["LDG"] == scale.counts["STG"] == 1


@needs_nvdisasm
def test_a_file_that_is_no_cubin(tmp_path: Path) -> None:
    (tmp_path / "x.cubin").write_text("no")
    with pytest.raises(CompileError, match=r"nvdisasm could not read .*x\.cubin"):
        sass.disassemble(tmp_path / "x.cubin")


def test_no_nvdisasm_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sass.sysconfig, "get_path", lambda kind: str(tmp_path))
    for variable in ("PATH", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.setenv(variable, str(tmp_path))
    with pytest.raises(UnsupportedError, match="pip install nvidia-cuda-nvdisasm"):
        sass.nvdisasm()
    tool = tmp_path / "bin" / "nvdisasm"
    tool.parent.mkdir()
    tool.write_text("")
    if os.name == "posix":
        assert sass.nvdisasm() == tool


def test_a_retry_behind_the_kernels_end_is_no_loop():
    text = """.text.f:
.L_x_1:
        /*0000*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R13], R2 ;
        /*0010*/              @!P0 BRA `(.L_x_2) ;
.L_x_3:
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR16], R24 ;
        /*0030*/               @P1 BRA `(.L_x_1) ;
        /*0040*/                   EXIT ;
.L_x_2:
        /*0050*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R13], R2 ;
        /*0060*/              @!P0 BRA `(.L_x_2) ;
        /*0070*/                   BRA `(.L_x_3) ;"""
    assert [loop.length for loop in sass.functions(text)["f"].loops] == [4]
