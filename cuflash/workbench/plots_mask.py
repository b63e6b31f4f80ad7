"""A mask and its tiles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import mods
from ..block_kinds import Seen, mask_of
from ..block_mask import require_mask
from ..block_parts import mask_at
from ..call import number_checks
from ..errors import require
from .figures import SHADE, subplots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EMPTY, MIXED, FULL = 0, 1, 2
_ANY = -(2**63)  # whether lengths are at least 1 is said of all together
_KIND_COLORS = ("#f4f4f4", "#f2b880", "#7fb3d5")


def _lengths(name: str, given: Any) -> list[int]:
    """A length as a list of one, or a list of them, each an int."""
    if not isinstance(given, (tuple, list, np.ndarray)) or np.ndim(given) == 0:
        return [number_checks.count(name, given, least=_ANY)]
    return [number_checks.count(f"{name}[{i}]", n, least=_ANY) for i, n in enumerate(given)]


def _mask_of(mask_mod: Any, causal: bool, window_size: tuple[int | None, int | None]) -> Any:
    """One mask_mod for all of them."""
    left, right = (None if side < 0 else side for side in number_checks.window(window_size, causal))
    if mask_mod is not None:
        require_mask("mask_mod", mask_mod)
    found = [] if mask_mod is None else [mask_mod]
    if left is not None or right is not None:
        found.append(mods.sliding_window(left, right))
    return mods.and_masks(*found) if found else mods.noop_mask


def _kinds(seen: np.ndarray, tile: tuple[int, int]) -> np.ndarray:
    """What each tile of `seen` [queries, keys] is. As in the kernels, one whose keys end inside needs a mask."""
    rows, columns = np.arange(0, seen.shape[0], tile[0]), np.arange(0, seen.shape[1], tile[1])
    count = np.add.reduceat(np.add.reduceat(seen, rows, 0, np.int64), columns, 1)
    whole = np.diff([*rows, seen.shape[0]])[:, None] * tile[1]
    return np.where(count == 0, EMPTY, np.where(count == whole, FULL, MIXED))


def plot_mask(
    q_len: int | Sequence[int],
    k_len: int | Sequence[int] | None = None,
    *,
    mask_mod: Any = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    tile: tuple[int, int] = (128, 64),
    h: int = 0,
) -> Figure:
    """Which keys each query sees, and what that makes of the tiles: empty ones are skipped, full ones need no mask.

    q_len, k_len  a length, or one of each sequence of a packed batch; k_len None: as q_len
    mask_mod, causal, window_size  as for `attention`; b is the sequence, and indices count within it
    tile          queries and keys of one; pairs are counted, where a kernel may find too little to tell a tile full or
                  empty, and take it for mixed
    h             the query head to look at

    The axes hold, for each sequence, an image of its tiles (0 empty, 1 mixed, 2 full) and one of the pairs seen.

    >>> figure = plot_mask([100, 300], causal=True, tile=(64, 64))
    >>> figure.axes[0].get_title()
    '11 full, 7 mixed and 11 empty tiles of 64 x 64'
    """
    q_lens = _lengths("q_len", q_len)
    k_lens = q_lens if k_len is None else _lengths("k_len", k_len)
    h = number_checks.count("h", h, least=0)
    require(
        len(q_lens) == len(k_lens) and min([*q_lens, *k_lens], default=0) > 0,
        f"q_len={q_len!r}, k_len={k_len!r} must be as many lengths, each at least 1",
    )
    require(
        max(sum(q_lens), sum(k_lens)) <= 4096,
        f"q_len={q_len!r}, k_len={k_len!r} must come to at most 4096 queries and keys: pairs are drawn one by one",
    )
    require(
        isinstance(tile, (tuple, list)) and len(tile) == 2,
        f"tile={tile!r} must be queries and keys of one, each at least 1",
    )
    rows, columns = (number_checks.count(f"tile[{i}]", n, least=_ANY) for i, n in enumerate(tile))
    require(min(rows, columns) > 0, f"tile={tile!r} must be queries and keys of one, each at least 1")
    tile = rows, columns
    mask = _mask_of(mask_mod, causal, window_size)
    shape = sum(q_lens) / sum(k_lens)
    plt, figure, axes = subplots(5, 5 * min(2.0, max(0.5, shape)))
    from matplotlib.colors import ListedColormap, to_rgb
    from matplotlib.patches import Patch

    count: Counter[int] = Counter()
    q_begin = k_begin = 0
    for b, (q, k) in enumerate(zip(q_lens, k_lens, strict=True)):
        seen = mask_of(Seen(mask_at(mask, b, h), (q, k)), (1, 1, q, k))[0, 0]
        kinds = _kinds(seen, tile)
        count.update(kinds.ravel().tolist())
        rows, columns = kinds.shape
        right, bottom = k_begin + columns * tile[1], q_begin + rows * tile[0]
        colors = ListedColormap(_KIND_COLORS)
        whole = axes.imshow(kinds, cmap=colors, vmin=0, vmax=2, extent=(k_begin, right, bottom, q_begin), zorder=1)
        clip = plt.Rectangle((k_begin, q_begin), k, q, transform=axes.transData, fill=False, color="gray", zorder=3)
        axes.add_patch(clip)
        whole.set_clip_path(clip)
        shade = np.zeros((q, k, 4))
        shade[..., 3] = SHADE * seen
        axes.imshow(shade, extent=(k_begin, k_begin + k, q_begin + q, q_begin), interpolation="none", zorder=2)
        lines = {"colors": "white", "linewidth": 0.6, "zorder": 3}
        axes.vlines(k_begin + np.arange(tile[1], k, tile[1]), q_begin, q_begin + q, **lines)
        axes.hlines(q_begin + np.arange(tile[0], q, tile[0]), k_begin, k_begin + k, **lines)
        q_begin, k_begin = q_begin + q, k_begin + k
    axes.set(xlim=(0, k_begin), ylim=(q_begin, 0), xlabel="key", ylabel="query")
    axes.set_aspect("equal" if 0.25 <= shape <= 4 else "auto")
    title = f"{count[FULL]} full, {count[MIXED]} mixed and {count[EMPTY]} empty tiles of {tile[0]} x {tile[1]}"
    axes.set_title(title)
    dark = [tuple((1 - SHADE) * x for x in to_rgb(color)) for color in _KIND_COLORS]
    shown = (
        (_KIND_COLORS[0], "empty"),
        (_KIND_COLORS[1], "mixed: not seen"),
        (dark[1], "mixed: seen"),
        (dark[2], "full"),
    )
    handles = [Patch(facecolor=color, edgecolor="gray", label=name) for color, name in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    return figure
