"""The table of what works today, as Markdown, from `cuflash.supports`.

`python -m cuflash.cli.support_table README.md` rewrites it where it stands between the two marks.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..api import FEATURES, supports
from ..arch import ARCHES
from ..dtypes import ALL
from ..errors import require

BEGIN, END = "<!-- supports: begin -->", "<!-- supports: end -->"
HEAD_DIMS = (1, 32, 64, 80, 96, 128, 160, 192, 256, 512)
_USUAL: dict[str, Any] = {"dtype": "bfloat16", "head_dim": 128}


def table() -> str:
    """Markdown: a line of what works, then a row for everything that does not, with the reason.

    >>> print(table().splitlines()[0])
    | works | |
    """
    dtypes = [t.name for t in ALL if t.is_float]
    asked: dict[str, dict[str, dict[str, Any]]] = {
        "dtypes": {name: _USUAL | {"dtype": name} for name in dtypes},
        "head dims": {str(d): _USUAL | {"head_dim": d} for d in HEAD_DIMS},
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
    return "\n".join([*works, "", *not_yet]) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def refresh(text: str) -> str:
    """`text` with the table written anew between its marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    require(bool(begin and end), f"the text must hold {BEGIN} and behind it {END}: put them where the table belongs")
    return f"{before}{BEGIN}\n{table()}{END}{after}"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        file = Path(name)
        file.write_text(refresh(file.read_text(encoding="utf-8")), encoding="utf-8")
