"""The path of notebooks/04_write_your_own, cell by cell: what a reader is told to see is there to be seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cuflash.errors import EmulatorError

pytest.importorskip("IPython")
jupytext = pytest.importorskip("jupytext")
pytest.importorskip("matplotlib").use("agg")

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "04_write_your_own.ipynb"


def test_the_path_of_the_notebook() -> None:
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    results: dict[str, Any] = {}  # by the kernel that a cell makes
    for cell in jupytext.read(NOTEBOOK).cells:
        if cell.cell_type == "code":
            done = shell.run_cell(cell.source)
            name = cell.source.split()[1] if cell.source.startswith("%%") else ""
            assert done.error_before_exec is None
            expected_to_fail = "raises-exception" in cell.metadata.get("tags", ())
            assert (done.error_in_exec is not None) == expected_to_fail, done.error_in_exec
            results[name] = done.error_in_exec or done.result
    kernels = shell.user_ns
    totals = {name: kernels[name].counters().totals for name in ("staged", "turned", "matrix", "swizzled")}

    loops = results["loops"]
    assert loops.check and loops.counts.accesses[0][:2] == ("cell loops:16", "global")
    assert loops.counts.accesses[0][3] == 64 * 64 * 4 * (32 - 2)  # sectors beyond two, of each warp's each read of k
    assert results["staged"].check and totals["staged"]["global bytes read"] == (64 + 128) * 128
    assert totals["staged"]["bank conflicts"] == 64 * 64 * 4 * 31 and totals["turned"]["bank conflicts"] == 0
    assert results["matrix"].check and totals["matrix"]["mma_m16n8k16_f16"] == 4 * 16 * 4
    assert totals["matrix"]["bank conflicts"] == 256 * 4 * 7
    assert results["swizzled"].check and totals["swizzled"]["bank conflicts"] == 0
    assert isinstance(results["eager"], EmulatorError)
    assert str(results["eager"]).startswith("race: ") and "  >    6 |       hw::cp_async_16(" in str(results["eager"])
    assert kernels["pipeline"].check()

    out, lse = results["textbook"].check.results
    assert out.wrong > 0.9 * out.count and out.got == pytest.approx(out.expected / 4, rel=0.01)
    assert lse.got - lse.expected == pytest.approx(1.386, abs=0.001)
    hasty = str(results["hasty"])
    assert isinstance(results["hasty"], EmulatorError)
    assert hasty.startswith("divergence: ") and "  >   23 |       all += hw::shfl_xor(all, 1);" in hasty
    exchanges = {name: kernels[name].counters().totals["shfl_xor"] for name in ("base", "careful", "once")}
    assert kernels["careful"].check() and exchanges["careful"] > 1.5 * exchanges["base"]
    assert kernels["once"].check() and exchanges["once"] == exchanges["base"]
