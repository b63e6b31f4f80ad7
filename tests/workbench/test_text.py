"""Functions found and replaced in CUDA text, and lines that still know where they come from."""

from __future__ import annotations

import re

import pytest

from cuflash.errors import ArgumentError
from cuflash.jit import source
from cuflash.workbench import text

HEADER = """\
#pragma once
// int f() { not this one }
template <class T, int n = 3>
struct A {
  int x = f(1);
  // What f does.
  HW_DEVICE static int f(int x) const {
    if (g(x)) { return f(x - 1); }  // }
    return "}"[0];
  }
};
struct B : A {
 public:
  explicit B(int y) : x(y), z{y} { f(y); }
  auto f() -> int { return 1; }
};
int f(float);
HW_KERNEL(64) f_kernel(int p) { f(p); }
"""


def texts(name: str) -> list[tuple[str, str]]:
    return [(x.name, HEADER[x.begin : x.end]) for x in text.functions(HEADER, name)]


def test_definitions_are_found_with_their_scopes() -> None:
    found = texts("f")
    assert [name for name, _ in found] == ["A::f", "B::f"]
    assert found[0][1].startswith("HW_DEVICE static int f(int x) const {")
    assert found[0][1].endswith('return "}"[0];\n  }')
    assert texts("A::f") == found[:1]
    assert texts("B::B") == [("B::B", "explicit B(int y) : x(y), z{y} { f(y); }")]
    assert texts("f_kernel") == [("f_kernel", "HW_KERNEL(64) f_kernel(int p) { f(p); }")]
    assert texts("g") == texts("C::f") == []


def test_every_function_of_the_tiles_is_found() -> None:
    """By a rule of its own: what stands on one line between HW_DEVICE and a parenthesis."""
    missing = []
    for file in sorted((source.folder() / "tile").glob("*.cuh")):
        whole = file.read_text()
        for name in set(re.findall(r"^ *HW_DEVICE [\w:<>,*& ]*?(?<!operator)\b(\w+)\(.*[{,]$", whole, re.MULTILINE)):
            missing += [] if text.functions(whole, name) else [f"{file.name}: {name}"]
    assert not missing


def test_a_replaced_function_keeps_the_lines_of_all_others() -> None:
    (function,) = text.functions(HEADER, "A::f")
    new = "HW_DEVICE static int f(int x) const {\n  return 2;\n}"
    changed = text.replaced(HEADER, function, new, "a.cuh", "cell a", 2)
    lines = HEADER.splitlines()
    before = {line: n for n, line in enumerate(lines, 1) if lines.count(line) == 1}
    for file, number, line in source.numbered(f'#line 1 "a.cuh"\n{changed}'):
        if file == "cell a":
            assert new.splitlines()[number - 2] == line
        elif line in before:
            assert before[line] == number
    (again,) = text.functions(changed, "A::f")
    twice = text.replaced(changed, again, new.replace("2", "3"), "a.cuh", "cell b")
    assert twice.count("return 3") == 1 and "return 2" not in twice
    assert ("a.cuh", before["struct B : A {"]) in [(f, n) for f, n, _ in source.numbered(twice)]


def test_flattened_text_follows_the_directives_of_an_edited_file() -> None:
    whole = source.read(source.folder() / "tile/fragment.cuh")
    moved = '#pragma once\n#line 5 "cell a"\n#include <base.cuh>\n' + whole
    flat = source.flatten("tile/fragment.cuh", "emu", edits=(source.Edit("tile/fragment.cuh", "", moved),))
    places = {line: (file, n) for file, n, line in source.numbered(flat)}
    line = "struct Fragment {"
    assert places[line] == ("cell a", 6 + whole.splitlines().index(line))


def test_a_report_gets_the_code_of_the_lines_it_names_once() -> None:
    lines = {("cell a", n): f"line {n}" for n in range(1, 9)}
    report = "race: the read at cell a:7 and the write at cell a:2, tile/x.cuh:3; again cell a:7"
    shown = text.with_code(report, lines, frozenset(["cell a"])).splitlines()
    assert shown[0] == report
    assert [x for x in shown if x.startswith("  >")] == ["  >    7 | line 7", "  >    2 | line 2"]


@pytest.mark.parametrize("label", ["", 'a"b', "a:1", "a\nb"])
def test_a_label_that_no_message_could_carry_is_refused(label: str) -> None:
    with pytest.raises(ArgumentError, match="label="):
        text.check_label(label)
