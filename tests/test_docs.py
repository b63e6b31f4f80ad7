"""The site: it builds without a warning, every public name has its entry, links lead somewhere, and examples run."""

from __future__ import annotations

import doctest
import pkgutil
import re
import shlex
import subprocess
import sys
import types
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")

# Where links lead out of the site. They are not followed here: `sphinx-build -b linkcheck -c docs . build/links` does.
ELSEWHERE = {
    "cupy.dev",
    "github.com",
    "huggingface.co",
    "keepachangelog.com",
    "pradyunsg.me",  # the theme's, and the generator's
    "semver.org",
    "www.sphinx-doc.org",
}


@pytest.fixture
def prose(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    monkeypatch.syspath_prepend(DOCS)
    return __import__("prose")


def test_the_site(prose: types.ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("myst_nb", reason="Sphinx and MyST-NB are not installed")
    (command,) = re.findall(r"^\.venv/bin/(sphinx-build .*) build/site$", README, re.MULTILINE)
    assert "-W" in command
    site = tmp_path / "site"
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", *shlex.split(command)[1:], "--keep-going", "-q", str(site)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr

    from sphinx.util.inventory import InventoryFile

    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="")
    entries = {name for kind, names in inventory.data.items() if kind.startswith("py:") for name in names}
    without_entry = set(prose.public_names()) - entries
    assert not without_entry

    pages = {path: Page(path) for path in site.rglob("*.html")}
    assert pages[site / "docs" / "index.html"].links
    broken = [f"{path.relative_to(site)}: {link}" for path, page in pages.items() for link in page.broken(pages)]
    assert not broken
    outward = {urlsplit(link).netloc for page in pages.values() for link in page.links if "://" in link}
    assert outward <= ELSEWHERE


class Page(HTMLParser):
    """The links of an HTML file, and the places in it that links can lead to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.links, self.places = path, set[str](), {"", "top"}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.places.add(given.get("id") or "")
        if tag == "a" and given.get("href"):
            self.links.add(str(given["href"]))

    def broken(self, pages: dict[Path, Page]) -> list[str]:
        """Links to files that are not there, or to places that they do not have."""
        found = []
        for link in sorted(self.links):
            where = urlsplit(link)
            if where.scheme:
                continue
            target = (self.path.parent / unquote(where.path)).resolve() if where.path else self.path
            lacks_place = target in pages and unquote(where.fragment) not in pages[target].places
            if not target.is_file() or lacks_place:
                found.append(link)
        return found


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "one.html").write_text("<a href='two.html#here'>x</a><a href='two.html#there'>x</a><a href='no.html'>")
    (tmp_path / "two.html").write_text("<p id='here'><a href='https://cupy.dev'>x</a>")
    pages = {path: Page(path) for path in tmp_path.iterdir()}
    assert pages[tmp_path / "one.html"].broken(pages) == ["no.html", "two.html#there"]
    assert pages[tmp_path / "two.html"].broken(pages) == []


def test_docstrings_become_restructured_text(prose: types.ModuleType) -> None:
    failed, tried = doctest.testmod(prose)
    assert tried and not failed


def examples(page: Path) -> str:
    """The blocks of `pycon` of a page, each line where it stands, and nothing else."""
    inside, lines = False, []
    for line in page.read_text(encoding="utf-8").splitlines():
        fence = line.strip().startswith("```")
        inside = line.strip() == "```pycon" if fence else inside
        lines.append("" if fence or not inside else line)
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda path: path.stem)
def test_the_examples_of_a_page_run(page: Path) -> None:
    text = examples(page)
    if "import torch" in text:
        pytest.importorskip("torch", reason="PyTorch is not installed")
    test = doctest.DocTestParser().get_doctest(text, {}, page.name, str(page), 0)
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    failed, _ = runner.run(test, out=said.append)
    assert not failed, "".join(said)


def test_the_lines_of_the_doctor_are_explained() -> None:
    doctor = (ROOT / "cuflash" / "cli" / "doctor.py").read_text(encoding="utf-8")
    lines = {name.strip() for name in re.findall(r'\bLine\(\s*f?"([^"{]+)', doctor)}
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    assert lines == set(re.findall(r"^\| ([\w+ -]+) \| (?!---)", page.split("## Errors")[0], re.MULTILINE)) - {"line"}


def test_the_walk_of_a_call_names_what_there_is() -> None:
    text = (DOCS / "how_a_call_runs.md").read_text(encoding="utf-8")
    names = set(re.findall(r"`(cuflash\.[\w.]+)`", text))
    assert len(names) > 25
    if find_spec("torch") is None or find_spec("jax") is None:  # whose operators cannot be imported
        names = {name for name in names if not name.startswith("cuflash.autograd.")}
    for name in sorted(names):
        pkgutil.resolve_name(name)
