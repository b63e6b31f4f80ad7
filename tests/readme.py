"""The parts of README.md that the code itself writes. `python tests/readme.py` writes them anew; a test compares."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from cuflash.arch import ARCHES
from cuflash.cli.explain import made_up_call
from cuflash.dtypes import ALL
from cuflash.questions import FEATURES, explain, supports
from cuflash.settings import config

README = Path(__file__).resolve().parents[1] / "README.md"
_HEAD_DIMS = range(1, 513)
_USUAL: dict[str, Any] = {"dtype": "bfloat16", "head_dim": 128}


def supports_table() -> str:
    """Markdown: a line of what works, then a row for everything that does not, with the reason.

    >>> print(supports_table().splitlines()[0])
    | works | |
    """
    dtypes = [t.name for t in ALL if t.is_float]
    asked: dict[str, dict[str, dict[str, Any]]] = {
        "dtypes": {name: _USUAL | {"dtype": name} for name in dtypes},
        "head dims": _ranges({d: _USUAL | {"head_dim": d} for d in _HEAD_DIMS}),
        "value head dim unlike that of q and k": {"64 beside 128": _USUAL | {"head_dim_v": 64}},
        "GPUs": {name: _USUAL | {"arch": name} for name in ARCHES},
        "arguments and outputs": {name: _USUAL | {name: True} for name in FEATURES},
        "directions": {"forward": _USUAL, "backward": _USUAL | {"backward": True}},
    }
    works, not_yet = ["| works | |", "|---|---|"], ["| does not | |", "|---|---|"]
    for what, calls in asked.items():
        answers = {name: supports(**call) for name, call in calls.items()}
        if good := [f"`{name}`" for name, answer in answers.items() if answer]:
            works.append(f"| {what} | {', '.join(good)} |")
        not_yet += [f"| `{name}` | {_cell(answer.reason)} |" for name, answer in answers.items() if not answer]
    return "\n".join([*works, "", *not_yet])


def _ranges(calls: dict[int, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Neighbours with one answer as one entry, "1 to 256", standing for the last of them."""
    runs = [list(run) for _, run in itertools.groupby(calls, key=lambda d: bool(supports(**calls[d])))]
    return {f"{run[0]} to {run[-1]}": calls[run[-1]] for run in runs}


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def explanation() -> str:
    """What `explain` prints for the call that the README shows, without the number of lines of a text that changes."""
    (q, k, v), keywords = made_up_call("float16", 8, 2, 64, 64, [5, 17, 300])
    before = config.backend, config.arch
    try:
        config.backend, config.arch = "emulator", "sm_80"
        text = str(explain(q, k, v, causal=True, **keywords))
    finally:
        config.backend, config.arch = before
    return "\n".join(["```", *(line for line in text.splitlines() if not line.startswith("source")), "```"])


PARTS = {"supports": supports_table, "explain": explanation}


def refreshed(text: str) -> str:
    """`text` with each part written anew between its two marks."""
    for name, make in PARTS.items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        assert found and closed, f"README.md must hold {begin!r} and behind it {end!r}"
        text = f"{before}{begin}{make()}\n{end}{after}"
    return text


if __name__ == "__main__":
    README.write_text(refreshed(README.read_text(encoding="utf-8")), encoding="utf-8")
