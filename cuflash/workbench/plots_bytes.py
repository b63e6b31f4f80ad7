"""The bytes that kernels move."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import api, arch, emulator
from ..errors import require
from ..jit import layout, module
from .figures import on_emulator, subplots

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Traffic:
    """Bytes that a way to compute attention asks of global memory, by array.

    way       "three kernels", "keys outside" or "queries outside"
    length    queries, and keys
    read, written   array -> bytes
    error     the largest difference of its result from the reference's
    """

    way: str
    length: int
    read: dict[str, int]
    written: dict[str, int]
    error: float

    @property
    def total(self) -> int:
        return sum(self.read.values()) + sum(self.written.values())

    @property
    def arrays(self) -> dict[str, int]:
        """Array -> bytes read and written."""
        return dict(Counter(self.read) + Counter(self.written))


WAYS = ("three kernels", "keys outside", "queries outside")


def bytes_moved(lengths: Sequence[int] = (128, 256, 512), ways: Sequence[str] = WAYS) -> list[Traffic]:
    """What one head of attention moves, head dim 64, float16: each way is run on the emulator, which counts.

    three kernels    S = Q K^T, P = softmax(S), O = P V: S and P are written and read back (workbench/naive.cu)
    keys outside     the loops of the first FlashAttention paper: O, l and m are written and read back for each tile of
                     keys (workbench/keys_outside.cu)
    queries outside  the loops of FlashAttention-2, and cuflash's own kernel: a row's O, l and m stay in registers

    All take 128 queries at a time; keys 64 at a time, with keys outside 128, for there a larger tile is read and
    written less often. lengths: multiples of 128, at most 2048.

    >>> [(moved.way, moved.total) for moved in bytes_moved([128])]
    [('three kernels', 196608), ('keys outside', 116736), ('queries outside', 65536)]
    """
    for length in lengths:
        require(
            0 < length <= 2048 and length % 128 == 0, f"lengths has {length}, must be multiples of 128, at most 2048"
        )
    for way in ways:
        require(way in WAYS, f"ways has {way!r}, must be among {', '.join(WAYS)}")
    return [_moved(way, length) for length in lengths for way in ways]


def _moved(way: str, length: int) -> Traffic:
    rng = np.random.default_rng(length)
    q, k, v = (rng.standard_normal((length, 64)).astype(np.float16) for _ in range(3))
    given = {"q": q, "k": k, "v": v}
    numbers = {"len": length, "scale": 0.125}
    with emulator.counting() as counters:
        if way == "three kernels":
            s, p = np.zeros((2, length, length), np.float16)
            arrays = {**given, "s": s, "p": p, "out": np.zeros_like(q)}
            blocks = length // 128
            for name, grid, smem in (
                ("scores", blocks, 24576),
                ("weights", length // 8, 16 * length),
                ("output", blocks, 8192),
            ):
                _run("naive.cu", f"cuflash_naive_{name}", "NaiveParams", grid, smem, arrays, numbers)
            out = arrays["out"]
        elif way == "keys outside":
            rows = {"out": np.zeros((length, 64), np.float32), "l": np.zeros(length, np.float32)}
            arrays = {**given, **rows, "m": np.full(length, -np.inf, np.float32)}
            _run("keys_outside.cu", "cuflash_keys_outside", "KeysOutsideParams", 1, 3 * 16384, arrays, numbers)
            out = arrays["out"]
        else:
            with on_emulator("sm_80"):
                out = api.attention(*(x[None, :, None] for x in given.values()))[0, :, 0]
    right = api.attention(*(x[None, :, None].astype(np.float64) for x in given.values()))[0, :, 0]
    read, written = dict(counters.global_bytes_read), dict(counters.global_bytes_written)
    return Traffic(way, length, read, written, float(np.abs(out - right).max()))


def _run(
    file: str,
    entry: str,
    params: str,
    grid: int,
    smem_bytes: int,
    arrays: dict[str, np.ndarray],
    numbers: dict[str, Any],
) -> None:
    spec = module.KernelSpec(str(Path(__file__).parent / file), entry, params, None, 256, smem_bytes)
    kernel = module.load(spec, arch.named("sm_80"), "emulator")
    pointers = {name: x.ctypes.data for name, x in arrays.items()}
    buffers = [module.Buffer(name, x.ctypes.data, x.nbytes, name not in "qkv") for name, x in arrays.items()]
    packed = layout.parse(kernel.text, params).pack(**pointers, **numbers)
    kernel.launch((grid, 1, 1), packed, buffers=buffers)


_ARRAY_COLORS = {
    "q": "#c6dbef", "k": "#9ecae1", "v": "#6baed6", "s": "#fc9272", "p": "#de2d26", "l": "#74c476", "m": "#31a354",
    "out": "#fdd0a2",
}  # fmt: skip


def plot_bytes(moved: Sequence[Traffic] | None = None) -> Figure:
    """Draws `bytes_moved`: a stack of arrays for each way and length.

    >>> figure = plot_bytes(bytes_moved([128, 256]))
    >>> [text.get_text() for text in figure.axes[0].get_xticklabels()]
    ['128', '256']
    """
    moved = bytes_moved() if moved is None else moved
    require(bool(moved), "moved is empty: pass what bytes_moved returns")
    ways, lengths = (list(dict.fromkeys(getattr(x, name) for x in moved)) for name in ("way", "length"))
    _, figure, axes = subplots(1.5 + 1.2 * len(lengths) * len(ways) ** 0.5, 4)
    width = 0.8 / len(ways)
    for x in moved:
        place, bottom = lengths.index(x.length) + width * (ways.index(x.way) - (len(ways) - 1) / 2), 0.0
        for name, color in _ARRAY_COLORS.items():
            if size := x.arrays.get(name, 0) / 1024:
                axes.bar(place, size, 0.9 * width, bottom, color=color, edgecolor="white", linewidth=0.3, label=name)
                bottom += size
        axes.text(place, bottom, x.way.replace(" ", "\n"), ha="center", va="bottom", fontsize=6)
    axes.margins(y=0.14)  # for the labels of the highest
    handles, labels = axes.get_legend_handles_labels()
    known = dict(zip(labels, handles, strict=True))
    names = [name for name in _ARRAY_COLORS if name in known]
    axes.legend([known[name] for name in names], names, fontsize="small", loc="upper left")
    axes.set(xticks=range(len(lengths)), xticklabels=lengths, xlabel="queries and keys", ylabel="KB of global memory")
    axes.set_title("bytes read and written, one head of dim 64, counted")
    return figure
