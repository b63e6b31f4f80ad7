"""Layouts: Python's offsets are the compilers', and packing refuses what does not fit."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from jit_toys import SM80
from needs import needs_nvrtc

from cuflash.errors import ArgumentError, CompileError
from cuflash.jit import layout, nvrtc, source

PARAMS = sorted(
    line.split()[1]
    for path in (source.folder() / "params").glob("*.cuh")
    for line in path.read_text().splitlines()
    if line.startswith("struct ") and line.split()[1].endswith("Params")
)
BASE = source.flatten("base.cuh", "cuda")
PIECES = (
    "bool", "u8", "u16", "u32", "i32", "u64", "i64", "float", "double", "const void*", "float*", "i32* const",
    "const u8* const*", "u32x4", "alignas(16) i32", "alignas(64) u8", "Inner",
)  # fmt: skip


def random_struct(rng: np.random.Generator) -> str:
    """A struct of 1 to 12 fields, some arrays, named P; with a struct inside it may name."""
    fields = []
    for i in range(rng.integers(1, 13)):
        dims = rng.choice(["", "", "", "[1]", "[3]", "[kCount]", "[2][3]"])
        fields.append(f"  {rng.choice(PIECES)} f{i}{dims};  // field {i}")
    align = rng.choice(["", "", "alignas(64) "])
    inner = "constexpr i32 kCount = 5;\nstruct Inner {\n  u8 a;\n  i64 b;\n  u16 c;\n};\n"
    return BASE + inner + f"struct {align}P {{\n" + "\n".join(fields) + "\n};\n"


def assertions(found: layout.Layout) -> str:
    lines = [f'static_assert(sizeof({found.name}) == {found.size}, "size");']
    lines += [
        f"static_assert(__builtin_offsetof({found.name}, {f.name}) == {f.offset} && "
        f'sizeof({found.name}::{f.name}) == {f.size}, "{f.name}");'
        for f in found.fields
    ]
    return "\n".join(lines) + "\n"


def refused_by_gxx(text: str, folder: Path) -> str:
    (folder / "t.cc").write_text(text)
    command = ["g++", "-std=c++17", "-fsyntax-only", str(folder / "t.cc")]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr


def all_texts(rng: np.random.Generator) -> list[tuple[str, layout.Layout]]:
    texts = [random_struct(rng) for _ in range(40)]
    found = [(text, layout.parse(text, "P")) for text in texts]
    real = source.flatten("params/forward.cuh", "cuda")
    return found + [(real, layout.parse(real, name)) for name in PARAMS if name in real]


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_offsets_are_those_of_the_host_compiler(rng: np.random.Generator, tmp_path: Path) -> None:
    whole = BASE
    for i, (text, found) in enumerate(all_texts(rng)):
        whole += f"namespace n{i} {{\n{text.replace(BASE, '')}\n{assertions(found)}}}\n"
    assert refused_by_gxx(whole, tmp_path) == ""
    # and a wrong figure is seen
    text, found = all_texts(rng)[0]
    wrong = assertions(found).replace(f"== {found.size},", f"== {found.size + 1},")
    assert "static assertion failed" in refused_by_gxx(text + wrong, tmp_path)


@needs_nvrtc
def test_offsets_are_those_of_nvrtc(rng: np.random.Generator) -> None:
    whole = BASE
    for i, (text, found) in enumerate(all_texts(rng)):
        whole += f"namespace n{i} {{\n{text.replace(BASE, '')}\n{assertions(found)}}}\n"
    nvrtc.compile(whole, SM80, "layouts.cu")
    with pytest.raises(CompileError, match="static assertion failed"):
        nvrtc.compile(BASE + 'static_assert(sizeof(u32x4) == 15, "wrong");', SM80, "layouts.cu")


@pytest.mark.parametrize("name", PARAMS)
def test_the_launch_structs_load_with_comments(name: str) -> None:
    found = layout.load(name)
    assert found.size <= 4096, "CUDA passes at most 4 KB of arguments"
    assert all(f.comment for f in found.fields if f.is_pointer), "a pointer says its shape"


@needs_nvrtc
def test_tensor_maps_lie_where_copies_can_read_them() -> None:
    text = BASE + "struct P {\n  i32 n;\n  TensorMap q;\n  i32 m;\n  TensorMap kv[2];\n};\n"
    found = layout.parse(text, "P")
    assert [found[name].offset for name in ("q", "m", "kv")] == [64, 192, 256] and found.size == 512
    maps = [bytes([i]) * 128 for i in range(3)]
    data = found.pack(n=1, q=maps[0], m=2, kv=maps[1:])
    assert (data[64:192], data[256:384], data[384:]) == tuple(maps)
    assert found.packer("q", "kv", "n", "m")(maps[0], maps[1:], 1, 2) == data
    nvrtc.compile(text + assertions(found), SM80, "maps.cu")


def test_pack_and_unpack_are_inverse(rng: np.random.Generator) -> None:
    text = BASE + "struct P {\n  u8 a;\n  float* p;\n  float c[8];\n  u32x4 map;\n  i64 n;\n  bool b;\n};\n"
    found = layout.parse(text, "P")
    values = {
        "a": 7, "p": 2**47 + 8, "c": tuple(rng.standard_normal(8).astype(np.float32).tolist()),
        "map": bytes(range(16)), "n": -5, "b": True,
    }  # fmt: skip
    data = found.pack(**values)
    assert len(data) == found.size == 80
    assert found.unpack(data) == values
    assert data[found["p"].offset :][:8] == struct.pack("<Q", 2**47 + 8)
    assert found.packer(*reversed(values))(*reversed(values.values())) == data
    assert found.unpack(found.pack(**{**values, "p": None}))["p"] == 0
    assert data[1:8] == bytes(7), "padding is zero, so equal values have equal bytes"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": None}, r"P\.n=None does not fit its type i32"),
        ({"n": 2**31}, r"P\.n=2147483648 does not fit its type i32"),
        ({"n": 1.5}, r"P\.n=1.5 does not fit its type i32"),
        ({"x": 1e39}, r"P\.x=1e\+39 does not fit its type float"),
        ({"p": -1}, r"P\.p=-1 does not fit its type void\*"),
        ({"c": (1, 2, 3)}, r"P\.c holds 2 elements, got 3"),
        ({"m": b"short"}, r"P\.m=b'short' does not fit its type u32x4"),
        ({"typo": 1}, "P: fields unknown typo"),
    ],
)
def test_values_that_do_not_fit_are_refused_by_name(change: dict, message: str) -> None:
    found = layout.parse(BASE + "struct P {\n  void* p;\n  i32 n;\n  float x;\n  i32 c[2];\n  u32x4 m;\n};\n", "P")
    good = {"p": 0, "n": 1, "x": 0.5, "c": (1, 2), "m": bytes(16)}
    with pytest.raises(ArgumentError, match=message):
        found.pack(**{**good, **change})
    with pytest.raises(ArgumentError, match="P: fields missing n"):
        found.pack(**{k: v for k, v in good.items() if k != "n"})


def test_the_packer_refuses_as_pack_does() -> None:
    found = layout.parse("struct P {\n  float* p;\n  i32 n;\n};\n", "P")
    pack = found.packer("n", "p")
    assert pack(1, None) == found.pack(p=None, n=1)
    with pytest.raises(ArgumentError, match=r"P\.n=4294967296 does not fit"):
        pack(2**32, 0)
    with pytest.raises(ArgumentError, match="1 values for 2 fields"):
        pack(1)
    with pytest.raises(ArgumentError, match="fields missing p"):
        found.packer("n")
    with pytest.raises(ArgumentError, match="named twice"):
        found.packer("n", "n", "p")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("  std::string s;", "is not `type name`"),
        ("  size_t n;", "type size_t is none of bool"),
        ("  i32 f() { return 1; }", "one field a line, ended by `;`"),
        ("  float c[kMissing];", "array length kMissing is neither a number"),
        ("  i32 a, b;", "is not `type name`"),
        ("", "has no fields"),
    ],
)
def test_structs_it_cannot_read_are_refused(body: str, message: str) -> None:
    with pytest.raises(CompileError, match=message):
        layout.parse(f"struct P {{\n{body}\n}};\n", "P")


def test_an_unknown_struct_is_refused() -> None:
    with pytest.raises(CompileError, match=r"no file in .*params defines struct NoParams"):
        layout.load("NoParams")
