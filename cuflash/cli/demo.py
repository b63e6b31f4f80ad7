"""`cuflash demo`: sentences of unequal length through a real encoder, packed, their attention by our kernel.

The embeddings and the six layers of all-MiniLM-L6-v2 run in NumPy, but each layer's attention is one call of
`cuflash.attention` on packed float16 arrays: on the GPU if there is one, else on the emulator, else (no C++ compiler)
on the NumPy reference. Every layer is compared with padded dense attention in float64.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from .. import packing
from ..api import attention
from ..errors import ArgumentError, UnsupportedError, require
from ..jit.module import CompileEvent
from ..questions import explain
from ..settings import config
from . import encoder as minilm
from . import machine, terminal

DTYPE = np.dtype(np.float16)
_SHOWS = """\
Sentences of unequal length go through a text encoder as one packed batch: no padding is computed.
The attention of each of its six layers is one call of cuflash.attention, on the GPU or on an emulator of it.
Every layer is compared with padded dense attention in float64. Last come the sentences nearest in meaning.
"""
_MOST_CHARACTERS = 2**20  # of a file: some 10,000 sentences
_EPSILON = 1e-5  # about the spacing of float16 where attention's outputs lie, so that a lucky dense result fails nobody


@dataclass(frozen=True)
class Pair:
    """Two sentences and the cosine of the angle between their embeddings."""

    similarity: float
    a: str
    b: str


@dataclass
class Report:
    """What a run of the demo found; the keys of `--json`."""

    backend: str = ""
    kernel: str = ""
    launches: int = 0
    input: str = ""
    sentences: int = 0
    longest: int = 0
    tokens: int = 0
    lengths: list[int] = field(default_factory=list)  # tokens of each sentence
    padding_avoided: int = 0  # tokens that a padded batch would have held more
    max_difference: float = 0.0
    tolerance: float = 0.0
    within_tolerance: bool = True
    pairs: list[Pair] = field(default_factory=list)
    compile_seconds: float = 0.0
    attention_seconds: float = 0.0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


def demo(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Text files whose sentences to embed; without any, a sample.",
            exists=True,
            dir_okay=False,
            readable=True,
        ),
    ] = None,
    sentences: Annotated[int, typer.Option(help="Use at most this many sentences of the files.", min=2)] = 32,
    seed: Annotated[int, typer.Option(help="Seed of the random arrays used when the encoder cannot be had.")] = 0,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the tokens computed and the padding avoided into this file (.png, .svg).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Embed sentences with a real encoder whose attention cuflash computes, and compare it with dense attention."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    if plot is not None:
        _require_matplotlib(plot)
    if not as_json:
        print(_SHOWS)
    progress = Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(),
        console=Console(stderr=True), transient=True, disable=as_json,
    )  # fmt: skip
    with progress:
        task = progress.add_task("starting", total=minilm.LAYERS + 1)
        report = run(
            read_sentences(files, sentences) if files else sample()[:sentences],
            seed=seed,
            on_step=lambda text, done: progress.update(task, description=text, advance=done),
        )
    if as_json:
        print(json.dumps(asdict(report)))
    else:
        _print(report)
    if plot is not None:
        draw(report, plot)
        print(f"drawn into {plot}", file=sys.stderr if as_json else sys.stdout)
    raise typer.Exit(0 if report.within_tolerance else 1)


def run(
    sentences: Sequence[str], *, seed: int = 0, on_step: Callable[[str, int], None] = lambda text, done: None
) -> Report:
    """The whole demo, without printing. `on_step(text, done)` hears what happens and how many steps were done since."""
    began = time.perf_counter()
    report = Report()
    try:
        on_step("reading the encoder (the first time: fetching its 83 MB)", 0)
        network = minilm.Encoder.load()
    except minilm.WeightsUnavailable as error:
        network = None
        report.input = f"random q, k, v, seed {seed}"
        report.notes.append(f"The encoder cannot be had, so random q, k, v stand in for it: {error}.")
    else:
        report.input = "all-MiniLM-L6-v2"

    rng = np.random.default_rng(seed)
    ids = network.tokenize(sentences) if network else [np.zeros(n, np.int64) for n in rng.integers(4, 64, size=26)]
    packed = packing.pack(ids)
    report.sentences, report.longest, report.tokens = len(ids), packed.max_seqlen, len(packed.data)
    report.lengths = [len(x) for x in ids]
    report.padding_avoided = report.sentences * report.longest - report.tokens

    with _backend(report) as (backend, to_device, to_host):
        attend = _ComparedAttention(packed.cu_seqlens, to_device, to_host)
        on_step(f"layer 1 on backend {backend!r} (the first time: compiling its kernel)", 1)
        steps = iter(range(2, minilm.LAYERS + 1))

        def on_layer() -> None:
            on_step(f"layer {next(steps, minilm.LAYERS)} on backend {backend!r}", 1)

        if network:
            embeddings = network(packed.data, packed.cu_seqlens, attend, on_layer)
            report.pairs = nearest_pairs(sentences, embeddings)
        else:
            for _ in range(minilm.LAYERS):
                attend(*rng.standard_normal((3, report.tokens, minilm.HEADS, minilm.HEAD_DIM), np.float32))
                on_layer()

    report.backend, report.kernel = attend.explanation.backend, attend.explanation.kernel
    report.launches = 0 if attend.explanation.fallback else len(attend.compared)  # a call is a launch
    worst = max(attend.compared, key=lambda c: c.difference / c.tolerance)
    report.max_difference, report.tolerance = worst.difference, worst.tolerance
    report.within_tolerance = worst.difference <= worst.tolerance
    report.attention_seconds = attend.seconds - report.compile_seconds
    report.seconds = time.perf_counter() - began
    return report


# --- the attention of a layer, and what it is compared with -----------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """One layer: the largest difference from dense attention in float64, and what the rule allows."""

    difference: float
    tolerance: float


class _ComparedAttention:
    """The `attend` of an encoder: `cuflash.attention` in float16 on packed arrays, each call compared with dense."""

    def __init__(self, cu_seqlens: np.ndarray, to_device: Callable[..., Any], to_host: Callable[..., Any]) -> None:
        self.compared: list[Comparison] = []
        self.seconds = 0.0
        self._cu_seqlens, self._to_device, self._to_host = cu_seqlens, to_device, to_host
        self._cu_seqlens_there = to_device(cu_seqlens)

    def __call__(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        q, k, v = (x.astype(DTYPE) for x in (q, k, v))
        there = [self._to_device(x) for x in (q, k, v)]
        lengths = {"cu_seqlens_q": self._cu_seqlens_there, "cu_seqlens_k": self._cu_seqlens_there}
        if not self.compared:
            self.explanation = explain(*there, **lengths)
        began = time.perf_counter()
        out = self._to_host(attention(*there, **lengths))
        self.seconds += time.perf_counter() - began
        self.compared.append(compare(out, q, k, v, self._cu_seqlens))
        return out


def compare(out: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray, cu_seqlens: np.ndarray) -> Comparison:
    """Packed `out` [total, heads, d] beside padded dense attention of the same q, k, v.

    The rule is that of flash-attn's own tests: an error of at most twice the error that the same maths makes when
    every step is rounded to the working dtype, plus an epsilon.
    """
    exact = padded_dense_attention(q, k, v, cu_seqlens, np.float64, np.float64)
    naive = padded_dense_attention(q, k, v, cu_seqlens, np.float32, q.dtype)
    tolerance = 2 * float(np.abs(naive - exact).max(initial=0)) + _EPSILON
    return Comparison(float(np.abs(out - exact).max(initial=0)), tolerance)


def padded_dense_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, cu_seqlens: np.ndarray, compute: Any, keep: Any
) -> np.ndarray:
    """What people do without a packed kernel: fill up to a rectangle [batch, longest], attend, drop the filling.

    Computed in the dtype `compute`, each intermediate array rounded to the dtype `keep`. Packed [total, heads, d].

    >>> x = np.ones((3, 1, 2))
    >>> padded_dense_attention(x, x, 7 * x, np.array([0, 2, 3]), np.float64, np.float64).ravel()
    array([7., 7., 7., 7., 7., 7.])
    """
    lengths = np.diff(cu_seqlens)
    real = np.arange(lengths.max(initial=0)) < lengths[:, None]  # [batch, longest]

    def padded(x: np.ndarray) -> np.ndarray:  # [total, heads, d] -> [batch, heads, longest, d]
        rectangle = np.zeros((*real.shape, *x.shape[1:]), compute)
        rectangle[real] = x
        return rectangle.swapaxes(1, 2)

    def rounded(x: np.ndarray) -> np.ndarray:
        return x.astype(keep).astype(compute)

    scores = rounded(padded(q) @ padded(k).swapaxes(2, 3)) * compute(q.shape[-1] ** -0.5)
    scores = np.where(real[:, None, None, :], rounded(scores), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True, initial=-1e30))
    weights = rounded(weights / weights.sum(-1, keepdims=True))
    return rounded(weights @ padded(v)).swapaxes(1, 2)[real]


@contextmanager
def _backend(report: Report) -> Iterator[tuple[str, Callable[..., Any], Callable[..., Any]]]:
    """Set the backend the demo runs on; yields its name and the functions that move an array there and back."""
    before = config.backend, config.on_compile
    backend = config.backend if config.backend != "auto" else choose_backend(report.notes)

    def on_compile(event: CompileEvent) -> None:
        report.compile_seconds += event.seconds

    to_device, to_host = np.asarray, np.asarray
    if backend == "cuda":
        import cupy

        to_device, to_host = cupy.asarray, cupy.asnumpy
    try:
        config.backend = backend
        if config.on_compile == "quiet":
            config.on_compile = on_compile
        yield backend, to_device, to_host
    finally:
        config.backend, config.on_compile = before


def choose_backend(notes: list[str]) -> str:
    """The GPU if there is one and CuPy to reach it, else the emulator, else the reference. `notes` hears why not."""
    usable = [gpu for gpu in machine.gpus() if gpu.supported]
    for gpu in machine.gpus():
        if not gpu.supported:
            major, minor = gpu.capability
            notes.append(f"{gpu.name} has compute capability {major}.{minor}; the kernels begin with 8.0.")
    if usable and not machine.cupy_wheels():
        install = machine.pip_install_extra(f"cuda{machine.wanted_cuda_major()}")
        notes.append(f"{usable[0].name} stands idle, for CuPy is not installed; install it with: {install}")
    elif usable:
        return "cuda"
    if machine.cxx_compiler() is None:
        notes.append(
            "No GPU to use and no C++ compiler for the emulator, so attention is computed by the NumPy reference and "
            "no kernel runs; install g++ or clang++ (or: " + machine.pip_install("ziglang") + ")."
        )
        return "reference"
    return "emulator"


# --- sentences --------------------------------------------------------------------------------------------------------


def sample() -> list[str]:
    """The sentences that come with the package."""
    return (Path(__file__).parent / "sample.txt").read_text(encoding="utf-8").splitlines()


def read_sentences(files: Sequence[Path], most: int) -> list[str]:
    """The first `most` sentences of text files: cut behind full stops, question and exclamation marks.

    Of each file the first 2**20 characters are read, for it may be endless.
    """
    found: list[str] = []
    for file in files:
        if len(found) >= most:
            break
        with file.open(encoding="utf-8", errors="replace") as opened:
            text = " ".join(opened.read(_MOST_CHARACTERS).replace("\0", " ").split())
        found += [s for s in re.split(r"(?<=[.!?])\s+", text) if s]
    require(
        len(found) >= 2,
        f"{len(found)} sentences in the first {_MOST_CHARACTERS:,} characters of {', '.join(map(str, files))}: at "
        "least 2 must be given; pass a text",
    )
    return found[:most]


def nearest_pairs(sentences: Sequence[str], embeddings: np.ndarray, most: int = 5) -> list[Pair]:
    """The sentences whose unit-length embeddings [batch, width] lie nearest to each other, each sentence once.

    >>> nearest_pairs(["a", "b", "c"], np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]))
    [Pair(similarity=0.8, a='b', b='c')]
    """
    similarity = embeddings @ embeddings.T
    pairs: list[Pair] = []
    paired: set[int] = set()
    a, b = np.triu_indices(len(sentences), 1)
    for at in np.argsort(-similarity[a, b]):
        i, j = int(a[at]), int(b[at])
        if len(pairs) < most and not {i, j} & paired:
            paired |= {i, j}
            pairs.append(Pair(float(similarity[i, j]), sentences[i], sentences[j]))
    return pairs


# --- printing ---------------------------------------------------------------------------------------------------------


def _print(report: Report) -> None:
    from rich.markup import escape
    from rich.table import Table

    console = terminal.console()
    for note in report.notes:
        console.print(f"[yellow]note[/] {escape(note)}", soft_wrap=True)
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    padded = report.tokens + report.padding_avoided
    share = report.padding_avoided / padded if padded else 0.0
    verdict = "[green]within[/]" if report.within_tolerance else "[red]outside[/]"
    for name, value in (
        ("input", f"{report.input}: {report.sentences} sentences, the longest of {report.longest} tokens"),
        ("backend", report.backend),
        ("kernel", f"{report.kernel}, {report.launches} launches, float16"),
        ("tokens", f"{report.tokens} packed; padded it would be {padded}: {share:.0%} of that is padding avoided"),
        (
            "against dense",
            f"largest difference {report.max_difference:.2e}, {verdict} the rule's {report.tolerance:.2e} "
            "(twice the error of float16 dense attention)",
        ),
        (
            "time",
            f"{report.seconds:.1f} s, of which compiling {report.compile_seconds:.1f} s, "
            f"attention {report.attention_seconds:.1f} s",
        ),
    ):
        facts.add_row(name, value)
    console.print(facts)
    if report.pairs:
        console.print("\n[bold]nearest pairs[/]")
    for pair in report.pairs:
        for column, text in ((f"{pair.similarity:.2f}", pair.a), ("", pair.b)):
            console.print(f"{column:>6}  {escape(text)}", highlight=False, no_wrap=True, overflow="ellipsis")


# --- the picture ------------------------------------------------------------------------------------------------------


def _require_matplotlib(path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError(f"--plot needs matplotlib ({error}): {machine.pip_install_extra('bench')}") from None
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:] not in known or not path.parent.is_dir():
        raise ArgumentError(f"--plot {path} must be in a folder that exists, and end in one of .{', .'.join(known)}")


def draw(report: Report, path: Path) -> None:
    """A bar for each sentence: its tokens, and the padding that a padded batch would compute beside them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, max(3, 1 + 0.15 * len(report.lengths))), layout="constrained")
    axes = figure.subplots()
    lengths = np.sort(report.lengths)[::-1]
    rows = np.arange(len(lengths))
    axes.barh(rows, lengths, color="#2a7f62", label=f"computed: {lengths.sum()} tokens")
    padding = lengths.max(initial=0) - lengths
    axes.barh(rows, padding, left=lengths, color="#d9d9d9", label=f"padding avoided: {padding.sum()} tokens")
    axes.set(xlabel="tokens", ylabel="sentences", yticks=[], title="One packed batch beside a padded one")
    axes.invert_yaxis()
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)
