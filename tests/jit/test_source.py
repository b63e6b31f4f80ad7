"""Flattening: every file once, the real names and numbers, and edits that must match."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from jit_toys import TOY, ToyVariant

from cuflash.errors import ArgumentError, CompileError
from cuflash.jit import layout, source, variant
from cuflash.trace.emit_c import NO_MODS

KERNELS = sorted(p.name for p in source.folder().glob("*.cu"))


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / next(iter(files))


def test_each_file_is_inlined_once_and_cycles_end(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "root.cu": "#include <a.cuh>\n#include <b.cuh>\nint root;\n",
            "a.cuh": "#pragma once\n#include <b.cuh>\nint a;\n",
            "b.cuh": '#pragma once\n#include "a.cuh"\n#  include <root.cu>\nint b;\n',
        },
    )
    text = source.flatten(root, "cuda")
    assert re.findall(r"int (\w+);", text) == ["b", "a", "root"]
    assert "#include" not in text and "#pragma once" not in text


def flatten(root: str, target: str) -> str:
    """With a variant, where the kernel has any."""
    path = Path(root) if root == TOY else source.folder() / root
    has_variant = f"<{source.VARIANT_FILE}>" in path.read_text()
    return source.flatten(root, target, variant=variant.emit(ToyVariant()) if has_variant else "", mods=NO_MODS)


@pytest.mark.parametrize("target", source.TARGETS)
@pytest.mark.parametrize("root", [TOY, *KERNELS])
def test_every_line_keeps_its_file_and_number(root: str, target: str) -> None:
    text = flatten(root, target)
    files = {}
    for name, number, line in source.numbered(text):
        if name in (source.VARIANT_FILE, source.MODS_FILE):
            continue
        path = Path(TOY) if name == "toy.cu" else source.folder() / name
        lines = files.setdefault(name, path.read_text().splitlines())
        if line:  # an include or a pragma leaves an empty line
            assert line == lines[number - 1], f"{name}:{number}"
    assert any(name.startswith(f"hw_{target}/") for name in files)
    other = source.TARGETS[1 - source.TARGETS.index(target)]
    assert not any(name.startswith(f"hw_{other}/") for name in files)
    assert sum(line.strip() != "" for _, _, line in source.numbered(text)) > 50


@pytest.mark.parametrize("root", KERNELS)
def test_the_cuda_text_includes_nothing(root: str) -> None:
    text = flatten(root, "cuda")
    assert not re.search(r"^\s*#\s*include", text, re.M)


def test_a_missing_include_names_where_it_stands(tmp_path: Path) -> None:
    root = write(tmp_path, {"root.cu": "int x;\n#include <tile/none.cuh>\n"})
    with pytest.raises(CompileError, match=r"root\.cu:2: #include <tile/none\.cuh> is in none of"):
        source.flatten(root, "cuda")


def test_a_system_header_is_refused_outside_the_emulator(tmp_path: Path) -> None:
    root = write(tmp_path, {"root.cu": "#include <cstdint>\n"})
    with pytest.raises(CompileError, match="no CUDA or system header"):
        source.flatten(root, "emu")


def test_a_missing_root_and_an_unknown_target_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"no kernel source 'none\.cu'"):
        source.flatten("none.cu", "cuda")
    with pytest.raises(ArgumentError, match="target='hip' must be one of cuda, emu"):
        source.flatten("base.cuh", "hip")


def test_the_variant_stands_where_it_is_included(tmp_path: Path) -> None:
    root = write(tmp_path, {"root.cu": "#include <base.cuh>\n#include <variant.cuh>\nint after;\n"})
    text = source.flatten(root, "cuda", variant="struct Variant {\n};\n")
    where = [
        (file, number) for file, number, line in source.numbered(text) if line in ("struct Variant {", "int after;")
    ]
    assert where == [("variant.cuh", 1), ("root.cu", 3)]
    with pytest.raises(CompileError, match=r"root\.cu:2: includes <variant\.cuh>, but no variant was given"):
        source.flatten(root, "cuda")
    with pytest.raises(ArgumentError, match="a variant was given, but nothing"):
        source.flatten("base.cuh", "cuda", variant="struct Variant {};")


def test_the_size_of_the_params_is_asserted() -> None:
    text = layout.asserted(source.flatten("params/forward.cuh", "cuda"), "ForwardParams")
    assert re.search(r'^static_assert\(sizeof\(ForwardParams\) == \d+, "', text, re.M)
    with pytest.raises(CompileError, match="struct NoParams is not defined"):
        layout.asserted(source.flatten("params/forward.cuh", "cuda"), "NoParams")


def test_an_edit_changes_one_place_of_one_file() -> None:
    emitted = variant.emit(ToyVariant())
    plain = source.flatten(TOY, "cuda", variant=emitted)
    edit = source.Edit("toy.cu", "hw::cp_async_wait<0>();", "")
    text = source.flatten(TOY, "cuda", variant=emitted, edits=[edit])
    assert text == plain.replace("hw::cp_async_wait<0>();", "") != plain
    in_header = source.Edit("hw_cuda/async_copy.cuh", "cp.async.wait_group", "cp.async.wait_all; //")
    assert "wait_all" in source.flatten(TOY, "cuda", variant=emitted, edits=[edit, in_header])
    assert source.flatten(TOY, "cuda", variant=emitted) == plain  # the cached text is untouched


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (source.Edit("toy.cu", "no such text", ""), "found 0 times, must match exactly once"),
        (source.Edit("toy.cu", "hw::sync_threads();", ""), "found 2 times, must match exactly once"),
        (source.Edit("hw_emu/warp.cuh", "x", ""), r"not part of .*toy\.cu, whose files are base\.cuh"),
    ],
)
def test_an_edit_that_does_not_match_once_is_refused(edit: source.Edit, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        source.flatten(TOY, "cuda", variant=variant.emit(ToyVariant()), edits=[edit])


def test_a_file_edited_on_disk_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path / "kernels_cu", {"root.cu": "#include <a.cuh>\n", "a.cuh": "int old_text;\n"})
    monkeypatch.setattr(source, "folder", lambda: tmp_path / "kernels_cu")
    monkeypatch.setattr(source, "_RECHECK_SECONDS", -1.0)
    assert "old_text" in source.flatten(root, "cuda")
    before = source.generation()
    assert source.generation() == before
    (tmp_path / "kernels_cu" / "a.cuh").write_text("int text_between;\n")
    assert "text_between" in source.flatten(root, "cuda"), "a text is never older than its files"
    source.generation()
    before = source.generation()
    (tmp_path / "kernels_cu" / "a.cuh").write_text("int changed_text;\n")
    assert source.generation() == before + 1
    assert "changed_text" in source.flatten(root, "cuda")


def test_an_installed_package_is_not_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path / "_kernels_cu", {"root.cu": "int x;\n"})
    monkeypatch.setattr(source, "folder", lambda: tmp_path / "_kernels_cu")
    monkeypatch.setattr(source, "_RECHECK_SECONDS", -1.0)
    source.flatten(root, "cuda")
    before = source.generation()
    root.write_text("int y;\n")
    assert source.generation() == before
