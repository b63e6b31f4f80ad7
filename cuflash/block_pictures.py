"""What a block mask looks like, in characters and drawn."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from .block_kinds import Grid
from .errors import ArgumentError, require

_MOST_CHARACTERS = 1 << 21


def text_of(
    shape: tuple[int, int],
    blocks: tuple[int, int],
    cells: Callable[[int, int, tuple[int, int]], np.ndarray],
    grid_size: Any,
    limit: Any,
) -> str:
    """A section for each (b, h) of `shape`, a character pair for each cell of blocks.

    cells   (b, h, blocks of a cell as (rows, columns)) -> how much of each cell is not empty
    """
    grid_size = grid_size if isinstance(grid_size, (tuple, list)) else (grid_size, grid_size)
    require(
        len(grid_size) == 2 and all(isinstance(n, (int, np.integer)) for n in (*grid_size, limit)),
        f"grid_size={grid_size} and limit={limit!r} must be ints: (rows, columns), and a number of masks",
    )
    grid_size, limit = tuple(map(int, grid_size)), int(limit)
    rows, columns = (max(1, -(-n // most)) if most > 0 else 1 for n, most in zip(blocks, grid_size, strict=True))
    characters = 2 * -(-blocks[0] // rows) * -(-blocks[1] // columns)
    require(
        characters * min(shape[0] * shape[1], max(limit, 1)) <= _MOST_CHARACTERS,
        f"to_string(grid_size={grid_size}, limit={limit}) of {blocks[0]} x {blocks[1]} blocks would have {characters} "
        f"characters a mask, and {_MOST_CHARACTERS} is the most in all: pass a smaller grid_size or limit",
    )
    sections = []
    for i, (b, h) in enumerate(itertools.product(*map(range, shape))):
        if i == limit:
            sections.append(
                f"... {shape[0] * shape[1] - limit} more: to_string(limit=) shows more of them, block_mask[b, h] one\n"
            )
            break
        lines = [f"({b}, {h})"]
        for line in cells(b, h, (rows, columns)).tolist():
            lines.append("".join(("█" if x == 1 else "░" if x else " ") * 2 for x in line))
        sections.append("\n".join(lines) + "\n")
    return "\n".join(sections)


def means(seen: np.ndarray, steps: tuple[int, int]) -> np.ndarray:
    """The part of blocks that are seen, of each cell of steps[0] x steps[1] of them."""
    if not seen.size:
        return np.zeros((-(-seen.shape[0] // steps[0]), 0))
    count, area = seen.astype(np.int64), np.ones(seen.shape, np.int64)
    for axis, step in enumerate(steps):
        begins = np.arange(0, seen.shape[axis], step)
        count, area = np.add.reduceat(count, begins, axis), np.add.reduceat(area, begins, axis)
    return count / area


def draw(kinds: np.ndarray, keys: np.ndarray | None, grid: Grid, title: str, ax: Any) -> Any:
    """Kinds of blocks [rows, columns], and over them the keys that are seen [q_len, kv_len], with matplotlib."""
    try:
        import matplotlib.pyplot as plt
        from matplotlib.colors import ListedColormap
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ArgumentError("plot draws with matplotlib: pip install matplotlib, or print(block_mask)") from error
    q_len, kv_len = grid.lengths
    ax = plt.subplots(figsize=(5, 5), layout="constrained")[1] if ax is None else ax
    colors = ["#f4f4f4", "#f2b880", "#7fb3d5"]
    edges = 0, kinds.shape[1] * grid.size[1], kinds.shape[0] * grid.size[0], 0
    ax.imshow(kinds, cmap=ListedColormap(colors), vmin=0, vmax=2, extent=edges, interpolation="none")
    if keys is not None:
        shade = np.zeros((q_len, kv_len, 4))
        shade[..., 3] = 0.45 * keys
        ax.imshow(shade, extent=(0, kv_len, q_len, 0), interpolation="none")
    ax.set(xlim=(0, kv_len), ylim=(q_len, 0), xlabel="kv_idx", ylabel="q_idx", title=title)
    names = ("empty", "partly seen", "full")
    ax.legend(
        handles=[
            Patch(facecolor=color, edgecolor="gray", label=f"{name}: {np.sum(kinds == kind)}")
            for kind, (color, name) in enumerate(zip(colors, names, strict=True))
        ],
        loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3, fontsize="small", frameon=False, columnspacing=0.8,
        handlelength=1, handletextpad=0.4,
    )  # fmt: skip
    return ax
