"""What is measured: problems, the work they are, and the lists of them.

A `Problem` says which queries see which keys, and in which layout the arrays lie; a `Case` is a problem and what to do
with it. Lists begin with what matters most: where time runs out, cases are left off from the end.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

GROUPS = ("forward", "backward", "both", "varlen", "masks", "decode", "latency", "memory", "accuracy")
RADIUS = 128  # of relative_bias: distances beyond it share the ends of the table


@dataclasses.dataclass(frozen=True)
class Mask:
    """Which keys a query sees, and what is added to scores, by name. `size` is the one number that some have:

    none; causal; window: causal, `size` keys; prefix: causal behind the first `size` keys; document: causal within
    documents of lengths drawn once; natten: an image of rows * rows tokens, each seeing size * size around it;
    softcap: causal, size * tanh(score / size); alibi: causal, with the slopes of the paper; relative: a bias for each
    head and distance.
    """

    kind: str = "none"
    size: int = 0

    def __str__(self) -> str:
        return {"none": "", "natten": f"natten {self.size} x {self.size}"}.get(
            self.kind, f"{self.kind} {self.size}" if self.size else self.kind
        )

    @property
    def causal(self) -> bool:
        """Whether keys behind the query are all unseen."""
        return self.kind in ("causal", "window", "document", "softcap", "alibi")

    def seen(self, q_len: int, k_len: int) -> int:
        """How many pairs of a query and a key see one another: what the FLOP of a case count.

        >>> Mask("causal").seen(3, 3), Mask("causal").seen(1, 9), Mask("window", 2).seen(3, 3)
        (6, 9, 5)
        """
        place = np.arange(q_len, dtype=np.int64) + (k_len - q_len)
        upto = np.clip(place + 1, 0, k_len)  # keys up to the diagonal
        if self.kind == "window":
            return int(np.minimum(upto, self.size).sum())
        if self.kind == "prefix":
            return int(np.maximum(upto, min(self.size, k_len)).sum())
        if self.kind == "document":
            return int(sum(n * (n + 1) // 2 for n in np.bincount(documents(q_len))))
        if self.kind == "natten":
            return q_len * self.size**2
        return int(upto.sum()) if self.causal else q_len * k_len

    def keep(self, xp: Any, i: Any, j: Any, q_len: int, k_len: int) -> Any:
        """Which of queries i [rows, 1] and keys j [1, columns] see one another: the definition."""
        place = i + (k_len - q_len)
        everything = (i >= 0) & (j >= 0)
        if self.kind == "window":
            return (j <= place) & (j > place - self.size)
        if self.kind == "prefix":
            return (j <= place) | (j < self.size)
        if self.kind == "document":
            ids = xp.asarray(documents(q_len))
            return (ids[i] == ids[j]) & (j <= place)
        if self.kind == "natten":
            rows = math.isqrt(q_len)
            first_y = xp.clip(i // rows - self.size // 2, 0, rows - self.size)
            first_x = xp.clip(i % rows - self.size // 2, 0, rows - self.size)
            y, x = j // rows, j % rows
            inside_y = (y >= first_y) & (y < first_y + self.size)
            return inside_y & (x >= first_x) & (x < first_x + self.size)
        return (j <= place) & everything if self.causal else everything

    def bias(self, xp: Any, h: int, heads: int, i: Any, j: Any, q_len: int, k_len: int) -> Any:
        """What is added to the scores of head h, [rows, columns] or 0."""
        distance = j - (i + (k_len - q_len))
        if self.kind == "alibi":
            return -float(slopes(heads)[h]) * abs(distance)
        if self.kind == "relative":
            return xp.asarray(table(heads)[h], dtype=xp.float64)[xp.clip(distance, -RADIUS, RADIUS) + RADIUS]
        return 0.0


def documents(length: int) -> np.ndarray:
    """The document of each of `length` tokens, int32: documents of lengths as they come, a few long and many short.

    >>> documents(4096).shape, bool((np.diff(documents(4096)) >= 0).all())
    ((4096,), True)
    """
    lengths = skewed(length, longest=max(1, length // 2), seed=1)
    return np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)


def slopes(heads: int) -> np.ndarray:
    return (2.0 ** (-8.0 * np.arange(1, heads + 1) / heads)).astype(np.float32)


def table(heads: int) -> np.ndarray:
    return np.random.default_rng(2).standard_normal((heads, 2 * RADIUS + 1), np.float32)


# --- lengths ----------------------------------------------------------------------------------------------------------


def skewed(total: int, longest: int, seed: int = 0) -> tuple[int, ...]:
    """Lengths that sum to `total`, log-normal, as of documents: half are below a twentieth of the longest allowed.

    >>> n = skewed(16384, 4096); sum(n), max(n) <= 4096, sorted(n)[len(n) // 2] < 820
    (16384, True, True)
    """
    draw = np.random.default_rng(seed)
    lengths: list[int] = []
    while (left := total - sum(lengths)) > 0:
        drawn = int(longest / 20 * math.exp(draw.standard_normal() * 1.6)) + 1
        lengths.append(min(drawn, longest, left))
    return tuple(lengths)


def uniform(total: int, longest: int, seed: int = 0) -> tuple[int, ...]:
    """Lengths that sum to `total`, evenly spread from 1 to `longest`."""
    draw = np.random.default_rng(seed)
    lengths: list[int] = []
    while (left := total - sum(lengths)) > 0:
        lengths.append(min(int(draw.integers(1, longest + 1)), left))
    return tuple(lengths)


# --- problems ---------------------------------------------------------------------------------------------------------

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sequences of q_lens queries and k_lens keys.

    layout   dense: q, k, v [batch, len, heads, d]; packed: [total, heads, d] with cu_seqlens; cache: q dense, k and v
             [batch, room, heads, d] of which k_lens are used; pages: the same in pages of page_size keys, shuffled
    """

    q_lens: tuple[int, ...]
    k_lens: tuple[int, ...]
    heads: int
    heads_kv: int
    head_dim: int
    mask: Mask = Mask()
    dtype: str = "bfloat16"
    layout: str = "dense"
    page_size: int = 0

    @property
    def batch(self) -> int:
        return len(self.q_lens)

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def pairs(self) -> int:
        return sum(self.mask.seen(m, n) for m, n in zip(self.q_lens, self.k_lens, strict=True))

    @property
    def q_shape(self) -> tuple[int, ...]:
        rows = (sum(self.q_lens),) if self.layout == "packed" else (self.batch, self.q_lens[0])
        return (*rows, self.heads, self.head_dim)

    @property
    def k_shape(self) -> tuple[int, ...]:
        if self.layout == "packed":
            rows: tuple[int, ...] = (sum(self.k_lens),)
        elif self.layout == "pages":
            rows = (sum(self.pages), self.page_size)
        else:
            rows = (self.batch, max(self.k_lens))
        return (*rows, self.heads_kv, self.head_dim)

    @property
    def pages(self) -> list[int]:
        """How many pages each sequence has."""
        return [-(-n // self.page_size) for n in self.k_lens]

    @property
    def kv_bytes(self) -> int:
        """Of the keys and values that are used."""
        return 2 * sum(self.k_lens) * self.heads_kv * self.head_dim * ITEMSIZE[self.dtype]

    @property
    def q_bytes(self) -> int:
        return sum(self.q_lens) * self.heads * self.head_dim * ITEMSIZE[self.dtype]

    @property
    def name(self) -> str:
        n, b = self.q_lens[0], self.batch
        if self.layout in ("cache", "pages"):
            spread = f"{min(self.k_lens)} to {max(self.k_lens)}" if len(set(self.k_lens)) > 1 else f"{self.k_lens[0]}"
            lengths = f"{b} x {spread} keys, {n} quer{'y' if n == 1 else 'ies'}"
            lengths += f", pages of {self.page_size}" if self.layout == "pages" else ""
        elif self.layout == "packed":
            lengths = f"{b} of {min(self.q_lens)} to {max(self.q_lens)}"
        else:
            lengths = f"{b} x {n}"
        groups = "" if self.heads == self.heads_kv else f"/{self.heads_kv}"
        words = [lengths, f"heads {self.heads}{groups} x {self.head_dim}"]
        words += [str(self.mask)] if str(self.mask) and self.layout in ("dense", "packed") else []
        words += [self.dtype] if self.dtype != "bfloat16" else []
        return ", ".join(words)


_PRODUCTS = {"forward": 2, "backward": 5, "both": 7}  # matrix products, each 2 d FLOP a pair and head


@dataclasses.dataclass(frozen=True)
class Case:
    """A problem and what is done with it.

    direction  forward; backward: gradients from what a forward left; both: one after the other
    label      which lengths these are, put before the problem's name
    variant    of cuflash, which alone is measured then: see `peers.VARIANTS`
    rank       0 matters most; --quick runs rank 0 only
    everyone   whether peers that take seconds to get ready, because they compile, are measured too
    """

    group: str
    problem: Problem
    direction: str = "forward"
    label: str = ""
    variant: str = ""
    rank: int = 1
    everyone: bool = True

    @property
    def op(self) -> str:
        """The group's name, and the direction where a group has two."""
        own = self.group in ("forward", "backward", "both", "accuracy") or self.direction == "forward"
        return self.group if own else f"{self.group} {self.direction}"

    @property
    def name(self) -> str:
        label = f"{self.label}: " if self.label else ""
        return f"{label}{self.problem.name}{f' [{self.variant}]' if self.variant else ''}"

    @property
    def flops(self) -> int:
        """Of the matrix products over pairs that see one another: padding and masked tiles count nothing."""
        return _PRODUCTS[self.direction] * 2 * self.problem.head_dim * self.problem.heads * self.problem.pairs

    @property
    def bytes(self) -> int:
        """Of what has to be read and written once: q, k, v and out; for gradients as much again, and dout."""
        p = self.problem
        forward = 2 * p.q_bytes + p.kv_bytes
        backward = 3 * p.q_bytes + p.kv_bytes + p.q_bytes + p.kv_bytes
        return {"forward": forward, "backward": backward, "both": forward + backward}[self.direction]

    @property
    def by_bytes(self) -> bool:
        """Whether memory is what bounds it, so that GB/s are told and not TFLOP/s."""
        return self.problem.layout in ("cache", "pages")


def dense(
    length: int,
    d: int,
    mask: Mask = Mask(),
    heads: int = 0,
    heads_kv: int = 0,
    tokens: int = 16384,
    dtype: str = "bfloat16",
) -> Problem:
    """Self-attention over `tokens` tokens in sequences of `length`, of model width 2048 unless heads are given."""
    lens = (length,) * max(1, tokens // length)
    heads = heads or max(1, 2048 // d)
    return Problem(lens, lens, heads, heads_kv or heads, d, mask, dtype)


def packed(lengths: Sequence[int], d: int, mask: Mask = Mask(), heads: int = 0, heads_kv: int = 0) -> Problem:
    heads = heads or max(1, 2048 // d)
    return Problem(tuple(lengths), tuple(lengths), heads, heads_kv or heads, d, mask, layout="packed")


def cache(
    lengths: Sequence[int], d: int = 128, heads: int = 32, heads_kv: int = 8, queries: int = 1, page_size: int = 0
) -> Problem:
    """One step of generation, with caches that hold `lengths` keys. Aligned at the end: the last query sees all."""
    layout = "pages" if page_size else "cache"
    q_lens = (queries,) * len(lengths)
    return Problem(q_lens, tuple(lengths), heads, heads_kv, d, Mask("causal"), layout=layout, page_size=page_size)


NONE, CAUSAL = Mask(), Mask("causal")


def _dense_cases(group: str) -> list[Case]:
    cases = []
    for d in (128, 64, 256):
        for length in (8192, 16384, 4096, 2048, 1024, 512, 32768):
            for mask in (CAUSAL, NONE):
                rank = 0 if (d, length) in ((128, 8192), (128, 16384), (64, 8192)) else 1
                rank = 2 if length in (512, 2048) or (d == 256 and length != 8192) else rank
                rank += group == "both" and (d, length) != (128, 8192)
                cases.append(Case(group, dense(length, d, mask), group, rank=rank))
    more = [
        Case(group, dense(8192, 128, CAUSAL, heads_kv=2), group, rank=1),
        Case(group, dense(8192, 128, CAUSAL, dtype="float16"), group, rank=2),
        Case(group, dense(8192, 96, CAUSAL, heads=16), group, rank=2),
        Case(group, dense(8192, 192, CAUSAL, heads=8), group, rank=2),
        Case(group, dense(4096, 64, CAUSAL, dtype="float32"), group, rank=3),
    ]
    variant = {"forward": "sm_80 kernel", "backward": "deterministic", "both": "PyTorch autograd"}[group]
    more += [Case(group, dense(8192, d, CAUSAL), group, variant=variant, rank=1) for d in (64, 128)]
    return cases + more


def _varlen_cases() -> list[Case]:
    total, d = 16384, 128
    lengths = {
        "skewed": skewed(total, 4096),
        "uniform": uniform(total, 2048),
        "many short": uniform(total, 128, seed=3),
        "one long": (8192, *uniform(total - 8192, 256, seed=4)),
        "equal": (1024,) * 16,
    }
    cases = []
    for label, lens in lengths.items():
        for mask in (CAUSAL, NONE):
            for direction in ("forward", "both"):
                rank = 0 if label in ("skewed", "many short") and mask == CAUSAL else 1
                cases.append(Case("varlen", packed(lens, d, mask), direction, label, rank=rank))
        cases.append(Case("varlen", packed(lens, d, CAUSAL), "forward", label, variant="padded", rank=1))
    cases.append(Case("varlen", packed(lengths["skewed"], d, CAUSAL, 32, 8), "forward", "skewed", rank=1))
    cases.append(Case("varlen", packed(lengths["skewed"], 64, CAUSAL), "forward", "skewed", rank=2))
    return cases


def _mask_cases() -> list[Case]:
    masks = [
        (CAUSAL, 8192), (Mask("window", 1024), 16384), (Mask("document"), 16384), (Mask("prefix", 2048), 8192),
        (Mask("natten", 13), 16384), (Mask("softcap", 30), 8192), (Mask("alibi"), 8192), (Mask("relative"), 8192),
        (Mask("window", 128), 16384),
    ]  # fmt: skip
    cases = [Case("masks", dense(length, 128, mask), rank=0) for mask, length in masks]
    cases.append(Case("masks", dense(8192, 128, CAUSAL), variant="mask_mod", rank=0))
    cases += [Case("masks", dense(length, 128, mask), "both", rank=1) for mask, length in masks]
    cases += [Case("masks", dense(length, 64, mask), rank=2) for mask, length in masks]
    return cases


def _decode_cases() -> list[Case]:
    cases = []
    for length, batch in ((8192, 16), (32768, 8), (131072, 4), (1024, 64), (1024, 8), (8192, 1), (131072, 1)):
        rank = 0 if (length, batch) in ((8192, 16), (32768, 8)) else 1
        cases.append(Case("decode", cache((length,) * batch), rank=rank))
        cases.append(Case("decode", cache((length,) * batch, page_size=64), rank=rank + (length == 32768)))
    ragged = tuple(int(n) for n in np.random.default_rng(5).integers(512, 32768, 16))
    cases += [
        Case("decode", cache(ragged, page_size=64), label="ragged", rank=0),
        Case("decode", cache((8192,) * 16, heads=32, heads_kv=32), label="no groups", rank=1),
        Case("decode", cache((8192,) * 32, heads=16, heads_kv=1), label="one key head", rank=1),
        Case("decode", cache((8192,) * 16, queries=4), label="speculative", rank=1),
        Case("decode", cache((8192,) * 16, d=64), rank=2),
        Case("decode", cache((8192,) * 16, d=256, heads=16, heads_kv=4), rank=2),
        Case("decode", cache((8192,) * 16, page_size=16), rank=2),
        Case("decode", cache((8192,) * 16), variant="split_size 1024", rank=1),
    ]
    return cases


def _accuracy_cases() -> list[Case]:
    def small(d: int, mask: Mask, dtype: str = "bfloat16") -> Problem:
        return dense(2048, d, mask, tokens=4096, dtype=dtype)

    return [
        Case("accuracy", small(128, CAUSAL), "both", rank=0),
        Case("accuracy", small(64, NONE), "both", rank=1),
        Case("accuracy", small(128, CAUSAL, "float16"), "both", rank=1),
        Case("accuracy", small(64, CAUSAL, "float32"), "both", rank=2),
        Case("accuracy", small(128, Mask("softcap", 30)), "forward", rank=1),
        Case("accuracy", packed(skewed(4096, 1024), 128, CAUSAL), "both", rank=1),
    ]


def _memory_cases() -> list[Case]:
    return [
        *(
            Case("memory", dense(length, 128, CAUSAL, tokens=length), direction, rank=rank)
            for length, rank in ((16384, 0), (4096, 1))
            for direction in ("forward", "both")
        ),
        Case("memory", dense(4096, 128, CAUSAL, tokens=4096), variant="mask_mod", rank=1),
        Case("memory", dense(4096, 128, Mask("document"), tokens=4096), rank=1),
    ]


def _latency_cases() -> list[Case]:
    """Small ones, in which the host is all there is to see."""
    small = Problem((64,), (64,), 4, 4, 64, CAUSAL, "float16")
    mod = dataclasses.replace(small, mask=Mask("prefix", 16))
    ragged = Problem((5, 17, 42), (5, 17, 42), 4, 4, 64, CAUSAL, "float16", "packed")
    return [
        Case("latency", small, rank=0), Case("latency", mod, rank=0), Case("latency", ragged, rank=1),
        Case("latency", small, variant="PyTorch", rank=0), Case("latency", mod, variant="PyTorch", rank=1),
        Case("latency", small, "both", variant="PyTorch autograd", rank=1),
    ]  # fmt: skip


def cases(groups: Sequence[str] = GROUPS, quick: bool = False) -> list[Case]:
    """The cases of `groups`, those that matter most first, groups taking turns.

    With `quick` those of rank 0 alone, first with the peers that are ready at once; then the first of each group, and
    the masks, once more with everyone.
    """
    lists = {
        "varlen": _varlen_cases, "masks": _mask_cases, "decode": _decode_cases, "accuracy": _accuracy_cases,
        "memory": _memory_cases, "latency": _latency_cases,
    }  # fmt: skip
    chosen: list[tuple[tuple[int, int], Case]] = []
    for group in dict.fromkeys(groups):
        of_group = sorted(lists[group]() if group in lists else _dense_cases(group), key=lambda case: case.rank)
        first = {rank: [case.rank for case in of_group].index(rank) for rank in {case.rank for case in of_group}}
        chosen += [((case.rank, n - first[case.rank]), case) for n, case in enumerate(of_group)]
    chosen.sort(key=lambda pair: pair[0])
    if not quick:
        return [case for _, case in chosen]
    best = [case for _, case in chosen if case.rank == 0]
    lead = {group: next((case for case in best if case.group == group), None) for group in GROUPS[:6]}
    again = [case for case in best if case is lead.get(case.group) or (case.group == "masks" and not case.variant)]
    return [dataclasses.replace(case, everyone=False) for case in best] + again


def tiny() -> list[Case]:
    """One case of every kind that a CPU does in no time: what the harness is tested with."""

    def problem(lens: tuple[int, ...], mask: Mask, layout: str = "dense", heads_kv: int = 2) -> Problem:
        return Problem(lens, lens, 4, heads_kv, 32, mask, "float32", layout)

    masks = (Mask("window", 7), Mask("prefix", 9), Mask("document"), Mask("natten", 3), Mask("softcap", 3))
    small = problem((36, 36), CAUSAL)
    return [
        Case("forward", small), Case("backward", small, "backward"), Case("both", problem((36,), NONE), "both"),
        Case("backward", small, "backward", variant="deterministic"),
        Case("varlen", problem((5, 30, 1), CAUSAL, "packed"), label="skewed"),
        Case("varlen", problem((5, 30, 1), NONE, "packed"), "both", label="skewed"),
        Case("varlen", problem((5, 30, 1), CAUSAL, "packed"), label="skewed", variant="padded"),
        *(Case("masks", problem((36,), mask)) for mask in masks),
        Case("masks", problem((36,), Mask("alibi"), heads_kv=4), "both"),
        Case("masks", problem((36,), Mask("relative"), heads_kv=4), "both"),
        Case("masks", small, variant="mask_mod"),
        Case("decode", dataclasses.replace(cache((33, 20), 32, 4, 2), dtype="float32")),
        Case("decode", dataclasses.replace(cache((33, 20), 32, 4, 2, 2, page_size=8), dtype="float32")),
        Case("latency", small), Case("memory", small), Case("accuracy", small, "both"),
    ]  # fmt: skip
