"""The layers of the project, the reach of its CUDA C, and what its README promises, read from the files themselves."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import readme

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "cuflash"
KERNELS = ROOT / "kernels_cu"

# A module may import from its own layer and from those before it. A folder stands for all its files; what is not listed
# has no place yet and fails.
LAYERS = (
    ("errors",),
    ("dtypes",),
    ("arch",),
    ("settings",),
    ("array",),
    ("philox",),
    ("reference",),
    ("trace",),
    ("mods", "packing"),
    ("merge",),
    ("jit", "emulator"),
    ("ops",),
    ("frameworks",),
    ("call",),
    ("autograd",),
    ("peers", "block_tables"),
    ("block_kinds", "block_parts"),
    ("block_arrays", "block_pictures"),
    ("block_mask",),
    ("api",),
    ("questions", "flash", "flex", "kvcache"),
    ("integrations",),
    ("workbench",),
    ("cli",),
    ("__init__", "__main__"),
)
LAYER = {name: i for i, names in enumerate(LAYERS) for name in names}
MODULES = sorted(PACKAGE.rglob("*.py"))
FRAMEWORKS = {"cupy", "cupy_backends", "torch", "jax", "jaxlib", "cuda"}


def unit(module: Path) -> str:
    """The name a module has in LAYERS: jit/source.py -> jit, api.py -> api."""
    return module.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST, module: Path) -> Iterator[tuple[str, bool]]:
    """(absolute dotted name, whether it runs when the module is imported) of every import in a module."""
    later = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef) or is_type_checking(n)]
    inside = {id(inner) for outer in later for inner in ast.walk(outer)}
    package = [*module.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{stem}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield name, id(node) not in inside


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@pytest.mark.parametrize("module", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_run_one_way(module: Path) -> None:
    own = LAYER[unit(module)]
    for name, at_import in imports(ast.parse(module.read_text(encoding="utf-8")), module):
        root, _, rest = name.partition(".")
        assert not (root in FRAMEWORKS and at_import), f"{name} is imported with the module: import it in a function"
        if root == "cuflash":
            target = rest.split(".")[0] or "__init__"
            assert LAYER.get(target, LAYER["__init__"]) <= own, f"{unit(module)} must not import {name}"


def dotted(module: Path) -> str:
    return ".".join(module.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


NAMES = {dotted(module): module for module in MODULES}


def needs(module: Path) -> set[str]:
    """The modules of the package that a module imports, in functions as well; its own package only by name."""
    found = set()
    for name, _ in imports(ast.parse(module.read_text(encoding="utf-8")), module):
        while name and name not in NAMES:
            name = name.rpartition(".")[0]
        found.add(name)
    return found - {"", dotted(module)}


# Where circles and borrowed names still stand; each name here is one to take away.
CIRCLES = {"cuflash.trace", "cuflash.jit", "cuflash.emulator"}
BORROWED = {
    "cuflash.trace", "cuflash.jit", "cuflash.workbench",
    "cuflash.flex", "cuflash.block_arrays", "cuflash.block_mask", "cuflash.block_parts", "cuflash.block_tables",  # mods
}  # fmt: skip


def excepted(name: str, allowed: set[str]) -> bool:
    return any(name == a or name.startswith(f"{a}.") for a in allowed)


def test_no_module_needs_itself_through_others() -> None:
    graph = {name: needs(module) for name, module in NAMES.items()}
    graph["cuflash"] = set()  # the public names, imported by whatever names the package
    reach = {name: set(found) for name, found in graph.items()}
    for middle in graph:
        for found in reach.values():
            if middle in found:
                found |= reach[middle]
    circles = sorted(name for name, found in reach.items() if name in found and not excepted(name, CIRCLES))
    assert not circles, f"in a circle of imports: {', '.join(circles)}"


@pytest.mark.parametrize("module", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_module_uses_anothers_underscore_names(module: Path) -> None:
    tree = ast.parse(module.read_text(encoding="utf-8"))
    ours = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("cuflash"))
        for alias in node.names
    }
    borrowed = [name for name, _ in imports(tree, module) if name.startswith("cuflash") and "._" in name]
    borrowed += [
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ours
        and node.attr.startswith("_") and not node.attr.startswith("__") and node.attr not in FIELDS
    ]  # fmt: skip
    assert not borrowed or excepted(dotted(module), BORROWED), f"{dotted(module)} borrows {', '.join(borrowed)}"


FIELDS = {"_fields", "_field_defaults", "_asdict", "_replace", "_make"}  # public of a NamedTuple


@pytest.mark.parametrize("module", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda p: p.name)
def test_benchmarks_are_above_the_package_and_import_peers_where_they_are_used(module: Path) -> None:
    peers = FRAMEWORKS | {"flash_attn", "flashinfer", "xformers", "matplotlib", "rich", "typer"}
    for name, at_import in imports(ast.parse(module.read_text(encoding="utf-8")), module):
        assert not (name.partition(".")[0] in peers and at_import), f"import {name} in a function"


def test_every_module_has_its_layer() -> None:
    assert {unit(module) for module in MODULES} <= set(LAYER)


# --- kernels_cu -------------------------------------------------------------------------------------------------------

SOURCES = sorted(p for p in KERNELS.rglob("*") if p.suffix in (".cu", ".cuh"))
REACH = {  # what a file of each folder may include, beside its own folder
    "base.cuh": set(),
    "params": {"base.cuh"},
    "hw_cuda": {"base.cuh", "hw"},
    "hw_emu": {"base.cuh", "hw"},
    "tile": {"base.cuh", "hw", "params", "variant.cuh", "mods.cuh"},
    "kernel": {"base.cuh", "hw", "params", "tile", "variant.cuh"},
}


def code(text: str) -> str:
    """`text` without comments and string literals."""
    return re.sub(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\])*"', " ", text, flags=re.DOTALL)


def place(source: Path) -> str:
    parts = source.relative_to(KERNELS).parts
    return parts[0] if len(parts) > 1 or parts[0] == "base.cuh" else "kernel"


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.relative_to(KERNELS).as_posix())
def test_cuda_includes_run_one_way_and_name_only_our_files(source: Path) -> None:
    where = place(source)
    for name in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', source.read_text(encoding="utf-8"), re.MULTILINE):
        target = name.split("/")[0]
        if where == "hw_emu" and "/" not in name:
            continue  # the emulator's runtime is C++ on the host and may use its library
        assert target == where or target in REACH[where], f"{where} must not include <{name}>"


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.relative_to(KERNELS).as_posix())
def test_asm_and_the_preprocessor_stay_in_the_hardware_wrappers(source: Path) -> None:
    text = code(source.read_text(encoding="utf-8"))
    if place(source) != "hw_cuda" and place(source) != "hw_emu":
        assert not re.search(r"\basm\b", text), "asm belongs into hw_cuda"
        assert not re.search(r"^\s*#\s*(if|ifdef|ifndef|elif|else|define|undef)\b", text, re.MULTILINE)


def test_every_wrapper_has_its_twin() -> None:
    real, twin = ({p.name for p in (KERNELS / folder).glob("*.cuh")} for folder in ("hw_cuda", "hw_emu"))
    assert real <= twin, f"without a twin: {sorted(real - twin)}"


# --- README -----------------------------------------------------------------------------------------------------------

README = (ROOT / "README.md").read_text(encoding="utf-8")


def first_block(heading: str, language: str = "sh") -> str:
    section = re.split(r"^## ", README, flags=re.MULTILINE)
    (text,) = [s for s in section if s.startswith(heading + "\n")]
    found = re.search(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert found, f"'## {heading}' has no block of {language}"
    return found[1]


@pytest.mark.parametrize(("heading", "ends"), [("Run it", "-m cuflash demo"), ("Test it", "-m pytest")])
def test_the_readme_runs_and_tests_with_one_command(heading: str, ends: str) -> None:
    lines = first_block(heading).splitlines()
    assert len(lines) == 1
    assert lines[0].endswith(ends)


def test_ci_calls_the_command_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "README.md" in script and "$test_command" in script


def test_what_the_readme_quotes_of_the_code_is_what_the_code_says() -> None:
    assert readme.refreshed(README) == README, "write it anew with: python tests/readme.py"


@pytest.mark.parametrize("heading", ["Example", "Masks and scores in Python", "A prompt shared by many"])
def test_the_examples_of_the_readme_run(heading: str) -> None:
    example = first_block(heading, "python")
    assert len(example.splitlines()) <= 12
    exec(compile(example, "README.md", "exec"), {})
