"""The package as a house: no two modules import each other, none uses another's underscore names, no room is a hall.

Every import counts: with the module, inside of a function, for types alone.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "cuflash"
LINES, HOST_LINES = 500, 550

# What is still to be undone: modules that import each other, modules that use the underscore names of others, and files
# that are too long. Whoever undoes one takes it out.
CIRCLES: list[set[str]] = []
BORROWERS: set[str] = set()
HALLS = {"cli.device_check", "ops.backward", "ops.forward", "reference"}
FIELDS = {"_asdict", "_field_defaults", "_fields", "_make", "_replace"}  # public of a NamedTuple


def name_of(path: Path) -> str:
    """Of a module, without the package's own: trace.tracer, frameworks, ''."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(name: str, text: str) -> Iterator[tuple[str, str, str]]:
    """(module, what is taken out of it or "", the name it has here) of every import of ours in a module's text."""
    path = MODULES[name]
    package = [*path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found = [(alias.name.split("."), alias.asname or alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = [*base, *(node.module.split(".") if node.module else [])]
            found = [([*stem, alias.name], alias.asname or alias.name) for alias in node.names]
        else:
            continue
        for (root, *rest), here in found:
            if root != "cuflash":
                continue
            whole, inner = ".".join(rest), ".".join(rest[:-1])
            yield (whole, "", here) if whole in MODULES else (inner, rest[-1] if rest else "", here)


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """The sets of modules, of two and more, that reach each other."""
    reached: dict[str, set[str]] = {}
    for name in graph:
        seen: set[str] = set()
        pending = [name]
        while pending:
            for other in graph[pending.pop()] - seen:
                seen.add(other)
                pending.append(other)
        reached[name] = seen
    found: list[set[str]] = []
    for name in graph:
        group = {other for other in reached[name] if name in reached[other]}
        if len(group) > 1 and group not in found:
            found.append(group)
    return found


def borrowed(name: str, text: str) -> set[str]:
    """The underscore names of other modules that a module uses."""
    found, modules = set(), {}
    for module, member, here in imports(name, text):
        if member.startswith("_") and not member.startswith("__"):
            found.add(f"{module}.{member}")
        elif not member:
            modules[here] = module
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            if node.attr.startswith("_") and not node.attr.startswith("__") and node.attr not in FIELDS:
                found.add(f"{modules[node.value.id]}.{node.attr}")
    return found


def test_no_modules_import_each_other() -> None:
    graph = {
        name: {module for module, _, _ in imports(name, path.read_text(encoding="utf-8"))} - {name, ""}
        for name, path in MODULES.items()
    }
    assert circles(graph) == CIRCLES


def test_a_circle_is_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}) == [{"a", "b", "c"}]
    inside = "def f():\n    from ..jit import module\n    from .tracer import bind\n"
    assert [x[0] for x in imports("trace.expr", inside)] == ["jit.module", "trace.tracer"]


@pytest.mark.parametrize("name", MODULES)
def test_no_module_uses_the_underscore_names_of_another(name: str) -> None:
    found = borrowed(name, MODULES[name].read_text(encoding="utf-8"))
    assert not found if name not in BORROWERS else found, found


def test_an_underscore_name_is_seen() -> None:
    text = "from . import api\nfrom .jit.module import _load\ndef f():\n    return api._bind(), api.attention\n"
    assert borrowed("flash", text) == {"api._bind", "jit.module._load"}


def test_no_file_is_too_long() -> None:
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert {name for name, n in lines.items() if n > LINES} == HALLS
    host = (ROOT / "kernels_cu" / "hw_emu").glob("*.cpp")
    assert all(len(path.read_text(encoding="utf-8").splitlines()) <= HOST_LINES for path in host)
