"""hw_cuda and hw_emu declare the same functions; a twin may add one parameter, the place of the call."""

from __future__ import annotations

import re

import pytest

from cuflash.jit import source

FILES = sorted(path.name for path in (source.folder() / "hw_cuda").glob("*.cuh"))
_COMMENT = re.compile(r"//[^\n]*")
_FUNCTION = re.compile(r"(?P<type>[\w ]+?) (?P<name>\w+(?:<\w+>)?)\((?P<parameters>.*?)\) ?[{;]")
_MACRO = re.compile(r"^#define (HW_\w+(?:\(\w+\))?)", re.MULTILINE)
_STRUCT = re.compile(r"struct \w+ \{[^}]*\};")


def text_of(folder: str, name: str) -> str:
    """Without comments, and without what the emulator's headers keep to themselves."""
    text = (source.folder() / folder / name).read_text()
    return _COMMENT.sub("", re.sub(r"namespace emu \{.*?\}  // namespace emu", "", text, flags=re.DOTALL))


def functions(folder: str, name: str) -> list[str]:
    found = []
    for rest in re.sub(r"\s+", " ", text_of(folder, name)).split("HW_DEVICE ")[1:]:
        if rest.startswith(("inline", "__device__")):
            continue  # the macro's definition
        m = _FUNCTION.match(rest)
        assert m, rest[:80]
        parameters = re.sub(r"(, )?Site site = Site::here\(\)", "", m["parameters"])
        found.append(f"{m['type']} {m['name']}({parameters})")
    return sorted(found)


def templates(folder: str, name: str) -> list[str]:
    return sorted(re.findall(r"template <[^>]*>\s+HW_DEVICE [\w ]+? \w+", text_of(folder, name)))


@pytest.mark.parametrize("name", FILES)
def test_twins_declare_the_same(name):
    assert functions("hw_emu", name) == functions("hw_cuda", name)
    assert templates("hw_emu", name) == templates("hw_cuda", name)
    for what in (_MACRO, _STRUCT):
        assert what.findall(text_of("hw_emu", name)) == what.findall(text_of("hw_cuda", name))


def test_the_comparison_sees_functions():
    declared = functions("hw_cuda", "matrix.cuh")
    assert "void ldmatrix_x4(u32 (&r)[4], u32 address)" in declared
    assert "i32 warp_idx()" in functions("hw_emu", "device.cuh")
    assert sum(len(functions("hw_cuda", name)) for name in FILES) > 40


def test_every_function_has_a_test():
    tests = "".join(path.read_text() for path in (source.folder().parent / "tests" / "hw").glob("*.py"))
    for name in FILES:
        for declaration in functions("hw_cuda", name):
            function = re.search(r"(\w+)(?:<\w+>)?\(", declaration)
            assert function and f"hw::{function[1]}" in tests, f"{declaration} of {name} appears in no test"
