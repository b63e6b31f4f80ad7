"""Each notebook is kept twice, for people (.ipynb, which pytest executes) and for reviews (.py): both say the same."""

from __future__ import annotations

from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_and_its_script_agree(notebook: Path) -> None:
    jupytext = pytest.importorskip("jupytext")
    cells = [[(c.cell_type, c.source) for c in jupytext.read(notebook.with_suffix(e)).cells] for e in (".ipynb", ".py")]
    assert cells[0] == cells[1], f"bring them together with: jupytext --sync notebooks/{notebook.name}"


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS
