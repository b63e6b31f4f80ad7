"""Forward cases drawn from a seed, and arrays in which every byte that a kernel must not touch is a trap.

    for case in draw(300, seed):
        inputs = case.inputs()
        ... attention(inputs.q, inputs.k, inputs.v, **inputs.keywords) ...

A case prints itself as the line that makes it again. Compiling is what costs most, so the compile-time choices (dtype,
head-dim classes, load width) are drawn from PALETTE; all else is free. Running on the emulator costs per matrix
instruction, so large heads get shorter sequences: `Case.cost` counts, `draw` keeps the sum within bounds.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest

from cuflash import dtypes

CLASSES = (32, 64, 96, 128, 192, 256)
# (rows, keys) of a tile, by head-dim class: what the cost of a case is reckoned by.
TILES = {32: (128, 64), 64: (128, 64), 96: (128, 64), 128: (128, 128), 192: (128, 64), 256: (128, 32)}
# Lengths at which tiles, fragments and warps begin and end.
EDGES = (0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257, 300)
MAX_LENGTH = 300
FEATURES = ("causal", "window", "softcap", "alibi", "sink", "seqused", "strided", "scale")


class Entry(NamedTuple):
    """The compile-time choices of a case."""

    dtype: str
    dim_class: int
    dim_v_class: int
    load_bytes: int  # one load of global memory: 16, 4 or 2 bytes


PALETTE = (
    *(Entry(dtype, c, c, 16) for dtype in ("float16", "bfloat16") for c in CLASSES),
    *(Entry("bfloat16" if i % 2 else "float16", c, c, 4) for i, c in enumerate(CLASSES)),
    *(Entry("float16" if i % 2 else "bfloat16", c, c, 2) for i, c in enumerate(CLASSES)),
    Entry("bfloat16", 192, 128, 16),
    Entry("float16", 64, 128, 16),
    Entry("bfloat16", 128, 64, 16),
    Entry("float16", 256, 32, 16),
    Entry("bfloat16", 96, 64, 4),
    Entry("float16", 32, 256, 2),
    *(Entry("float32", c, c, 16) for c in (32, 64, 128, 256)),
    *(Entry("float32", c, c, 4) for c in (32, 96, 192)),
    Entry("float32", 64, 32, 16),
)


@dataclass(frozen=True, repr=False)
class Case:
    """One forward problem. `repr` is the call that makes it again; `seed` draws the numbers in the arrays.

    >>> Case("float16", (3, 0), (5, 1), 4, 1, 64, 32, causal=True)
    Case(dtype='float16', lengths_q=(3, 0), lengths_k=(5, 1), heads_q=4, heads_kv=1, head_dim=64, head_dim_v=32,
         causal=True)
    """

    dtype: str
    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    heads_q: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    packed: bool = True
    seqused_q: tuple[int, ...] | None = None
    seqused_k: tuple[int, ...] | None = None
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    scale: float | None = None
    alibi: str | None = None  # "head": [heads_q], "batch": [batch, heads_q]
    sink: str | None = None  # "float32", or "element": the dtype of q
    layout: str = "contiguous"  # or "gaps" between heads and rows, or "heads_first" in memory
    offset: int = 0  # elements between a 16-byte boundary and each array
    max_seqlen_q: int | None = None  # a hint, right or wrong
    dropout: tuple[float, int, int] | None = None  # p, seed, offset
    seed: int = 0

    def __repr__(self) -> str:
        told = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return f"Case({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in told)})"

    @property
    def batch(self) -> int:
        return len(self.lengths_q)

    @property
    def features(self) -> tuple[str, ...]:
        """Those of FEATURES that this case has."""
        has = {
            "causal": self.causal,
            "window": self.window_size != (-1, -1),
            "softcap": self.softcap > 0,
            "alibi": self.alibi is not None,
            "sink": self.sink is not None,
            "seqused": self.seqused_q is not None or self.seqused_k is not None,
            "strided": self.layout != "contiguous",
            "scale": self.scale is not None,
        }
        return tuple(f for f in FEATURES if has[f])

    @property
    def entry(self) -> Entry:
        """The compile-time choices this case comes down to."""
        itemsize = dtypes.BY_NAME[self.dtype].itemsize
        steps = self.head_dim, self.head_dim_v, self.offset
        load = next(b for b in (16, 4, 2) if all(s * itemsize % b == 0 for s in steps))
        return Entry(self.dtype, class_of(self.head_dim), class_of(self.head_dim_v), load)

    @property
    def cost(self) -> int:
        """Matrix instructions (m16n8k16, or for float32 m16n8k8 in three passes), every tile in the band counted."""
        d, d_v = class_of(self.head_dim), class_of(self.head_dim_v)
        rows, keys = TILES[max(d, d_v)]
        per_tile = (rows // 16) * (keys // 8) * (d // 16) + (rows // 16) * (d_v // 8) * (keys // 16)
        left, right = (10**9 if w < 0 else w for w in self.window_size)
        right = min(right, 0) if self.causal else right
        tiles = 0
        used_q, used_k = self.seqused_q or self.lengths_q, self.seqused_k or self.lengths_k
        for m, n in zip(used_q, used_k, strict=True):
            for row in range(0, m, rows):
                first = max(0, row + n - m - left) // keys
                last = min(n, min(row + rows, m) + n - m + right)
                tiles += max(0, -(-last // keys) - first)
        return tiles * per_tile * self.heads_q * (6 if self.dtype == "float32" else 1)

    def inputs(self) -> Inputs:
        """The arrays of this case, every byte that no sequence owns NaN."""
        rng = np.random.default_rng(self.seed)
        np_dtype = dtypes.BY_NAME[self.dtype].numpy
        keywords: dict[str, Any] = {}
        arrays = {}
        for name, lengths, used, heads, dim in (
            ("q", self.lengths_q, self.seqused_q, self.heads_q, self.head_dim),
            ("k", self.lengths_k, self.seqused_k, self.heads_kv, self.head_dim),
            ("v", self.lengths_k, self.seqused_k, self.heads_kv, self.head_dim_v),
            ("out", self.lengths_q, None, self.heads_q, self.head_dim_v),
        ):
            # A packed array has a few rows more than its sequences own.
            rows = (sum(lengths) + 3,) if self.packed else (self.batch, max(lengths, default=0))
            guarded = poisoned((*rows, heads, dim), np_dtype, layout=self.layout, offset=self.offset)
            arrays[name] = guarded
            if name != "out":
                begin = 0
                for b, length in enumerate(lengths):
                    count = length if used is None else used[b]
                    at = slice(begin, begin + count) if self.packed else (b, slice(0, count))
                    guarded.array[at] = rng.standard_normal((count, heads, dim)).astype(np_dtype)
                    begin += length
        if self.packed:
            keywords["cu_seqlens_q"] = np.cumsum([0, *self.lengths_q], dtype=np.int32)
            keywords["cu_seqlens_k"] = np.cumsum([0, *self.lengths_k], dtype=np.int32)
        for name in ("seqused_q", "seqused_k"):
            if getattr(self, name) is not None:
                keywords[name] = np.array(getattr(self, name), np.int32)
        keywords |= {"causal": self.causal, "window_size": self.window_size}
        keywords |= {"softcap": self.softcap, "scale": self.scale}
        if self.dropout is not None:
            keywords |= dict(zip(("dropout_p", "seed", "offset"), self.dropout, strict=True))
        if self.alibi is not None:
            shape = (self.heads_q,) if self.alibi == "head" else (self.batch, self.heads_q)
            keywords["alibi_slopes"] = rng.uniform(0.01, 0.5, shape).astype(np.float32)
        if self.sink is not None:
            sink = rng.normal(1.0, 2.0, self.heads_q)
            keywords["sink"] = sink.astype(np.float32 if self.sink == "float32" else np_dtype)
        return Inputs(arrays, keywords, {name: arrays[name].digest() for name in ("q", "k", "v")})

    def gradients(self) -> Gradients:
        """What a backward pass of this case gets beside `inputs()`: every number that no sequence owns NaN.

        dlse is there in half of the cases; dq, dk, dv wait full of NaN, laid out like q, k and v.
        """
        rng = np.random.default_rng([self.seed, 1])
        np_dtype = dtypes.BY_NAME[self.dtype].numpy
        rows_q, rows_k = ((sum(n) + 3,) if self.packed else (self.batch, max(n, default=0)) for n in (
            self.lengths_q, self.lengths_k
        ))  # fmt: skip
        guards = {
            name: poisoned((*rows, heads, dim), np_dtype, layout=self.layout, offset=self.offset)
            for name, rows, heads, dim in (
                ("dout", rows_q, self.heads_q, self.head_dim_v),
                ("dq", rows_q, self.heads_q, self.head_dim),
                ("dk", rows_k, self.heads_kv, self.head_dim),
                ("dv", rows_k, self.heads_kv, self.head_dim_v),
            )
        }
        dlse = np.full((*rows_q[:-1], self.heads_q, rows_q[-1]), np.nan, np.float32)
        begin = 0
        for b, length in enumerate(self.lengths_q):
            count = length if self.seqused_q is None else self.seqused_q[b]
            rows = slice(begin, begin + count) if self.packed else slice(0, count)
            at = (rows,) if self.packed else (b, rows)
            guards["dout"].array[at] = rng.standard_normal((count, self.heads_q, self.head_dim_v)).astype(np_dtype)
            dlse[(*at[:-1], slice(None), rows)] = rng.standard_normal((self.heads_q, count))
            begin += length
        return Gradients(guards, dlse if self.seed % 2 else None, guards["dout"].digest())


@dataclass(frozen=True)
class Gradients:
    """The arrays of a case's backward pass."""

    guards: dict[str, Poisoned]
    dlse: np.ndarray | None
    digest: int

    @property
    def dout(self) -> np.ndarray:
        return self.guards["dout"].array

    @property
    def targets(self) -> dict[str, np.ndarray]:
        """dq, dk and dv, to be written to."""
        return {name: self.guards[name].array for name in ("dq", "dk", "dv")}

    def check_guards(self) -> None:
        """Assert that nothing was written but the elements of dq, dk and dv."""
        assert self.guards["dout"].digest() == self.digest, "dout was written to: inputs are read only"
        for name in self.targets:
            self.guards[name].check(name)


@dataclass(frozen=True)
class Inputs:
    """The arrays of a case. `out` waits full of NaN; `keywords` are those of `reference.attention`."""

    guards: dict[str, Poisoned]
    keywords: dict[str, Any]
    digests: dict[str, int]

    @property
    def q(self) -> np.ndarray:
        return self.guards["q"].array

    @property
    def k(self) -> np.ndarray:
        return self.guards["k"].array

    @property
    def v(self) -> np.ndarray:
        return self.guards["v"].array

    @property
    def out(self) -> np.ndarray:
        return self.guards["out"].array

    def check_guards(self) -> None:
        """Assert that nothing was written but the elements of `out`."""
        for name, digest in self.digests.items():
            assert self.guards[name].digest() == digest, f"{name} was written to: inputs are read only"
        self.guards["out"].check("out")


# Traps. --------------------------------------------------------------------------------------------------------------

POISON = 0xFF  # repeated it is NaN in every float dtype, and -1 as an integer
_GUARD = 256  # bytes of poison at least, before and behind


@dataclass(frozen=True)
class Poisoned:
    """An array inside a larger buffer, all of it poison until the array is written."""

    array: np.ndarray
    buffer: np.ndarray  # uint8

    def check(self, name: str) -> None:
        """Assert that the bytes before, behind and between the elements are still poison."""
        outside = np.ones(self.buffer.size, bool)
        begin = self.array.ctypes.data - self.buffer.ctypes.data
        if self.array.size:
            strides = (*self.array.strides, 1)
            np.ndarray((*self.array.shape, self.array.itemsize), np.bool_, outside.data, begin, strides)[...] = False
        touched = np.flatnonzero(outside & (self.buffer != POISON))
        assert not touched.size, (
            f"{name}: {touched.size} bytes written that belong to no element, the first {touched[0] - begin} bytes "
            f"from the begin of the array (shape {self.array.shape}, strides {self.array.strides})"
        )

    def digest(self) -> int:
        """A checksum of every byte, those outside the array included."""
        return zlib.crc32(self.buffer.data)


def poisoned(shape: tuple[int, ...], dtype: Any, *, layout: str = "contiguous", offset: int = 0) -> Poisoned:
    """An array `[..., rows, heads, dim]` of NaN in a buffer of NaN, `offset` elements behind a 128-byte boundary.

    layout "gaps" leaves 16 bytes between heads and 32 between rows; "heads_first" is [..., heads, rows, dim] in memory.
    """
    dtype = np.dtype(dtype)
    *lead, rows, heads, dim = shape
    gap = 16 // dtype.itemsize if layout == "gaps" else 0
    head, row = dim + gap, heads * (dim + gap) + 2 * gap
    block = rows * row
    if layout == "heads_first":
        head, row = rows * dim, dim
    steps = [1, head, row]
    for n in reversed(lead):
        steps.append(block)
        block *= n
    strides = tuple(s * dtype.itemsize for s in reversed(steps))
    size = 2 * _GUARD + (block + offset) * dtype.itemsize
    memory = np.full(size + 127, POISON, np.uint8)
    aligned = -memory.ctypes.data % 128
    buffer = memory[aligned : aligned + size]  # so that a copy on a device is aligned alike
    begin = _GUARD + offset * dtype.itemsize
    return Poisoned(np.ndarray(shape, dtype, buffer.data, begin, strides), buffer)


# Drawing. ------------------------------------------------------------------------------------------------------------


def class_of(dim: int) -> int:
    """The head-dim class a dim is padded to.

    >>> class_of(1), class_of(64), class_of(65)
    (32, 64, 96)
    """
    return next(c for c in CLASSES if dim <= c)


def draw(count: int, seed: int, *, cost: int = 13_000_000) -> list[Case]:
    """`count` cases from `seed` whose costs sum to at most `cost`.

    One in eight is in float32, one in three has three or more of FEATURES.

    >>> draw(3, seed=1) == draw(3, seed=1) != draw(3, seed=2)
    True
    """
    rng = np.random.default_rng(seed)
    float32 = _shuffled([e for e in PALETTE if e.dtype == "float32"], rng)
    float16 = _shuffled([e for e in PALETTE if e.dtype != "float32"], rng)
    cases: list[Case] = []
    left = cost
    for i in range(count):
        share = cost / count * rng.choice([0.5, 1.0, 2.0, 6.0])
        features = rng.integers(3, 7) if i % 3 == 0 else rng.integers(0, 3)
        case = draw_one(next(float32 if i % 8 == 7 else float16), rng, features=features, cost=int(min(share, left)))
        left -= case.cost
        cases.append(case)
    return cases


def chunks(count: int, size: int) -> list[Any]:
    """Numbers of the chunks of `size` that `count` cases come in: as many as meet the palette four times are for every
    run, the others for -m slow."""
    usual = 4 * len(PALETTE) // size
    return [pytest.param(i, marks=() if i < usual else pytest.mark.slow) for i in range(count // size)]


def draw_one(entry: Entry, rng: np.random.Generator, *, features: int, cost: int) -> Case:
    """A case of these compile-time choices, with that many of FEATURES, that costs at most `cost`."""
    itemsize = dtypes.BY_NAME[entry.dtype].itemsize
    # A load narrower than 16 bytes comes from one of the three: that one is drawn misaligned, the others any way.
    step = entry.load_bytes // itemsize
    wider = {2: 4, 4: 16, 16: 16}[entry.load_bytes] // itemsize
    breaker = None if entry.load_bytes == 16 else _pick(rng, "head_dim", "head_dim_v", "offset")
    fields: dict[str, Any] = {"dtype": entry.dtype, "seed": int(rng.integers(2**31))}
    for name, dim_class in (("head_dim", entry.dim_class), ("head_dim_v", entry.dim_v_class)):
        fields[name] = _dim(rng, dim_class, step, wider if name == breaker else None)
    if breaker == "offset":
        fields["offset"] = step

    chosen = set(rng.choice(FEATURES, size=features, replace=False))
    if "causal" in chosen:
        fields["causal"] = True
    if "window" in chosen:
        fields["window_size"] = _pick(rng, (0, 0), (-1, 16), (63, -1), (64, 0), (17, 5), (1, 100), (100, 100), (-1, 0))
    if "softcap" in chosen:
        fields["softcap"] = _pick(rng, 1.0, 5.0, 30.0, 50.0)
    if "alibi" in chosen:
        fields["alibi"] = _pick(rng, "head", "batch")
    if "sink" in chosen:
        fields["sink"] = _pick(rng, "float32", "element")
    if "scale" in chosen:
        fields["scale"] = _pick(rng, 0.0, -0.125, 0.02, 0.5, 1.0)
    if "strided" in chosen:
        fields["layout"] = _pick(rng, "gaps", "heads_first")

    packed = bool(rng.random() < 0.75)
    batch, heads_kv, group = int(rng.integers(1, 6)), _pick(rng, 1, 1, 2, 3), _pick(rng, 1, 4, 8)
    lengths_q = [_length(rng, MAX_LENGTH) for _ in range(batch if packed else 1)]
    lengths_k = [n if rng.random() < 0.45 else _length(rng, MAX_LENGTH) for n in lengths_q]

    def build() -> Case:
        repeat = 1 if packed else batch
        return Case(
            lengths_q=tuple(lengths_q) * repeat,
            lengths_k=tuple(lengths_k) * repeat,
            heads_q=heads_kv * group,
            heads_kv=heads_kv,
            packed=packed,
            **fields,
        )

    while (case := build()).cost > cost:  # fewer heads, fewer sequences or shorter ones
        cut = _pick(rng, "heads", "batch", "length", "length")
        if cut == "heads" and heads_kv > 1:
            heads_kv -= 1
        elif cut == "batch" and batch > 1:
            batch -= 1
            if packed:
                lengths_q.pop(), lengths_k.pop()
        else:
            lengths = lengths_q if max(lengths_q) >= max(lengths_k) else lengths_k
            longest = max(range(len(lengths)), key=lengths.__getitem__)
            same = lengths_q[longest] == lengths_k[longest]
            lengths[longest] = _length(rng, lengths[longest] * 2 // 3)
            if same:
                lengths_q[longest] = lengths_k[longest] = lengths[longest]

    if "seqused" in chosen:
        used: dict[str, tuple[int, ...]] = {}
        for name in _pick(rng, ("seqused_q",), ("seqused_k",), ("seqused_k",), ("seqused_q", "seqused_k")):
            lengths = case.lengths_q if name == "seqused_q" else case.lengths_k
            used[name] = tuple(n if rng.random() < 0.2 else _length(rng, n) for n in lengths)
        shorter = dataclasses.replace(case, **used)
        # Causal and windows may let more tiles through where one side alone is shorter.
        case = shorter if shorter.cost <= cost else dataclasses.replace(case, seqused_k=case.lengths_k)
    if packed and rng.random() < 0.6:
        longest = max(case.lengths_q)
        case = dataclasses.replace(case, max_seqlen_q=_pick(rng, 1, max(longest, 1), 10 * longest + 1))
    return case


def _shuffled(entries: list[Entry], rng: np.random.Generator) -> Iterator[Entry]:
    """All entries in a random order, again and again."""
    while True:
        for i in rng.permutation(len(entries)):
            yield entries[i]


def _pick(rng: np.random.Generator, *options: Any) -> Any:
    return options[rng.integers(len(options))]


def _length(rng: np.random.Generator, at_most: int) -> int:
    """A length up to `at_most`: at an edge two times in three, else any."""
    edges = [n for n in EDGES if n <= at_most]
    return int(rng.choice(edges)) if rng.random() < 2 / 3 else int(rng.integers(0, at_most + 1))


def _dim(rng: np.random.Generator, dim_class: int, step: int, not_multiple_of: int | None) -> int:
    """A head dim of this class that is a multiple of `step`: the class itself half of the time it may be."""
    smallest = ([0, *CLASSES])[CLASSES.index(dim_class)] + 1
    dims = [n for n in range(smallest, dim_class + 1) if n % step == 0]
    if not_multiple_of is not None:
        dims = [n for n in dims if n % not_multiple_of != 0]
    elif rng.random() < 0.5:
        return dim_class
    return int(rng.choice(dims))
