"""A plan: which rank of a group holds which rows of a packed batch, and what that costs."""

from __future__ import annotations

import functools
import hashlib
import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import ArgumentError, UnsupportedError, require
from . import sharding
from .sharding import Chunk

KV = ("gather",)  # how keys and values reach the ranks


@dataclass(frozen=True, eq=False)
class Plan:
    """Who holds what. Made by `cuflash.distributed.plan`; the same on every rank.

    lengths      of the documents of the whole batch
    chunks       for each rank the rows it holds, in the order of documents and positions
    tiles        for each rank how many tiles of 128 queries by 128 keys the mask leaves it
    group        torch's ProcessGroup, or the name of an axis of JAX's mesh; None for a plan that is only looked at
    rank         of this process in the group; None where there is none, or where JAX's ranks run one program

    NumPy arrays of this rank's rows, for position embeddings, labels and losses (of another rank: `of(rank)`):

    positions    int32 [rows]: a row's position in its document
    sequence     int32 [rows]: the document it belongs to
    cu_seqlens   int32 [documents + 1]: where each document's rows begin on this rank; one without rows is empty
    index        int64 [rows]: a row's place in the whole packed batch
    """

    lengths: tuple[int, ...]
    chunks: tuple[tuple[Chunk, ...], ...]
    tiles: tuple[int, ...]
    balance: str
    kv: str
    causal: bool
    window_size: tuple[int, int]
    masked: bool  # whether a mask_mod was counted with
    group: Any = None
    rank: int | None = None
    pad_rows: int | None = None
    max_documents: int | None = None
    on_devices: dict[Any, Any] = field(default_factory=dict, repr=False)  # PyTorch's: this plan's arrays by device
    done: set[str] = field(default_factory=set, repr=False)  # what is said or asked once

    @property
    def ranks(self) -> int:
        return len(self.chunks)

    @property
    def total(self) -> int:
        """Rows of the whole batch."""
        return sum(self.lengths)

    @functools.cached_property
    def rows(self) -> tuple[int, ...]:
        """How many rows each rank holds."""
        return tuple(sum(chunk.rows for chunk in part) for part in self.chunks)

    @functools.cached_property
    def whole_cu_seqlens(self) -> np.ndarray:
        """int32 [documents + 1] of the whole batch."""
        return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int32)

    def of(self, rank: int) -> Rows:
        """The rows of a rank."""
        require(0 <= rank < self.ranks, f"rank={rank} must be from 0 to {self.ranks - 1}, the ranks of the plan")
        return self._of[rank]

    @functools.cached_property
    def _of(self) -> tuple[Rows, ...]:
        return tuple(Rows.of_chunks(part, self.whole_cu_seqlens) for part in self.chunks)

    @property
    def positions(self) -> np.ndarray:
        return self._own.positions

    @property
    def sequence(self) -> np.ndarray:
        return self._own.sequence

    @property
    def cu_seqlens(self) -> np.ndarray:
        return self._own.cu_seqlens

    @property
    def index(self) -> np.ndarray:
        return self._own.index

    @property
    def _own(self) -> Rows:
        if self.rank is None:
            raise ArgumentError("this plan is of no one rank: pass the rank you mean, plan.of(rank)")
        return self.of(self.rank)

    @functools.cached_property
    def digest(self) -> int:
        """63 bits that differ between plans that differ: ranks compare them before they exchange anything."""
        said = repr((self.lengths, self.chunks, self.kv)).encode()
        return int.from_bytes(hashlib.sha256(said).digest()[:8], "big") >> 1

    def shard(self, x: Any) -> Any:
        """This rank's rows of `x` [total, ...], an array of the group's framework. Gradients flow back to `x`."""
        return _framework(self, x).shard(self, x)

    def unshard(self, x: Any) -> Any:
        """Every rank's rows `x` [rows, ...] as the whole [total, ...], on every rank: one all-gather.

        The gradient is summed over the ranks, as the loss is taken to be: divide where each rank computes the same.
        """
        return _framework(self, x).unshard(self, x)

    @functools.cached_property
    def arrays(self) -> Any:
        """JAX: this plan as an argument of a compiled function, see `on_jax.Arrays`."""
        return self._jax.arrays(self)

    @property
    def specs(self) -> Any:
        """JAX: how shard_map splits `arrays`, a tree of PartitionSpecs."""
        return self._jax.specs(self)

    @property
    def _jax(self) -> Any:
        if not isinstance(self.group, str):
            raise ArgumentError("this plan is not of JAX: make it with the name of a mesh axis and ranks=")
        from . import on_jax

        return on_jax

    def explain(self) -> Report:
        """Rows, tiles and bytes of each rank."""
        return Report(self)


@dataclass(frozen=True)
class Rows:
    """The rows of a rank: see Plan."""

    positions: np.ndarray
    sequence: np.ndarray
    cu_seqlens: np.ndarray
    index: np.ndarray

    @classmethod
    def of_chunks(cls, chunks: Sequence[Chunk], starts: np.ndarray) -> Rows:
        none = [np.zeros(0, np.int32)]
        positions = np.concatenate([np.arange(c.begin, c.end, dtype=np.int32) for c in chunks] or none)
        sequence = np.concatenate([np.full(c.rows, c.document, np.int32) for c in chunks] or none)
        held = np.bincount(sequence, minlength=len(starts) - 1)
        cu_seqlens = np.concatenate([[0], np.cumsum(held)]).astype(np.int32)
        return cls(positions, sequence, cu_seqlens, starts[sequence].astype(np.int64) + positions)


class Report:
    """What a plan gives each rank, printed as a table.

    rows, tiles   for each rank
    imbalance     the slowest rank's tiles over an even share of them: 1.0 is the best there is
    received      rows of keys and values that a rank is sent in the forward
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.rows, self.tiles = plan.rows, plan.tiles
        even = sum(plan.tiles) / plan.ranks
        self.imbalance = max(plan.tiles) / even if even else 1.0
        longest = max(plan.rows, default=0)
        self.received = tuple(longest * (plan.ranks - 1) for _ in range(plan.ranks))

    def bytes_received(self, heads_kv: int, head_dim: int, head_dim_v: int | None = None, itemsize: int = 2) -> int:
        """Bytes of keys and values that a rank is sent in one forward; the backward sends as many twice.

        >>> from cuflash.distributed import plan
        >>> plan([0, 512], 2, causal=True).explain().bytes_received(heads_kv=8, head_dim=128)
        1048576
        """
        row = heads_kv * (head_dim + (head_dim if head_dim_v is None else head_dim_v)) * itemsize
        return max(self.received) * row

    def __str__(self) -> str:
        plan = self.plan
        mask = ["causal"] * plan.causal + [f"window {plan.window_size}"] * (plan.window_size != (-1, -1))
        mask += ["mask_mod"] * plan.masked
        lines = [
            f"{len(plan.lengths)} documents, {plan.total} rows on {plan.ranks} ranks by {plan.balance}; "
            f"tiles counted with {', '.join(mask) or 'no mask'}",
            f"slowest rank: {self.imbalance:.3f} of an even share; keys and values: {plan.kv}",
            "rank      rows     tiles  rows received",
        ]
        lines += [
            f"{rank:>4}{rows:>10}{tiles:>10}{received:>15}"
            for rank, (rows, tiles, received) in enumerate(zip(self.rows, self.tiles, self.received, strict=True))
        ]
        return "\n".join(lines)

    __repr__ = __str__


def plan(
    cu_seqlens: Any,
    group: Any = None,
    *,
    mask_mod: Callable[..., Any] | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    balance: str = "area",
    chunk: int = 256,
    kv: str = "gather",
    ranks: int | None = None,
    pad_rows: int | None = None,
    max_documents: int | None = None,
) -> Plan:
    """Deal the rows of a packed batch to the ranks of a group, so that each has as much to compute.

    cu_seqlens   [documents + 1] on the host: a list, tuple, NumPy array or CPU tensor. Every rank passes the same.
    group        PyTorch: a ProcessGroup, a DeviceMesh of one dimension, or None for the default group. JAX: the name of
                 a mesh axis, with `ranks` devices. An int: that many ranks, for a plan that is only looked at.
    mask_mod     and causal, window_size: what tiles are counted with; `attention` takes its own, and computes those.
                 A mask_mod counts for head 0, and sees positions in its document.
    balance      "area": chunks of about `chunk` rows, dealt out by counted tiles; "contiguous": equal runs of rows;
                 "zigzag": parts r and -r of each document
    kv           "gather": each rank gathers the keys and values of all
    pad_rows     JAX: rows of each device that `shard` and `arrays` pad to, and max_documents, documents: other lengths
                 then compile nothing anew; default: what this plan needs

    >>> plan([0, 300, 337, 1024], 2, causal=True).explain()
    3 documents, 1024 rows on 2 ranks by area; tiles counted with causal
    slowest rank: 1.000 of an even share; keys and values: gather
    rank      rows     tiles  rows received
       0       431        14            593
       1       593        14            593
    """
    lengths = _lengths(cu_seqlens)
    count, rank, group = _members(group, ranks)
    size = _int("chunk", chunk)
    require(size >= 1, f"chunk={chunk} must be at least 1: the rows that stay together, 256 for instance")
    if kv not in KV:
        raise UnsupportedError(f"kv={kv!r} is not available: pass kv='gather', which serves every mask")
    left, right = (-1 if side is None else _int("window_size", side) for side in window_size)
    require(min(left, right) >= -1, f"window_size={tuple(window_size)} must hold -1, None or lengths: -1 is unlimited")
    counted = sharding.tiles_of_documents(lengths, mask_mod, bool(causal), (left, right))
    chunks = sharding.dealt(balance, lengths, counted, count, size)
    tiles = tuple(sum(sharding.tiles_of(chunk, counted) for chunk in part) for part in chunks)
    return Plan(
        tuple(lengths), tuple(map(tuple, chunks)), tiles, balance, kv, bool(causal), (left, right),
        mask_mod is not None, group, rank, _size("pad_rows", pad_rows), _size("max_documents", max_documents),
    )  # fmt: skip


def _lengths(cu_seqlens: Any) -> list[int]:
    where = getattr(getattr(cu_seqlens, "device", None), "type", "cpu")
    if where not in ("cpu",) or type(cu_seqlens).__module__.split(".")[0] in ("cupy", "jaxlib", "jax"):
        raise ArgumentError(
            "cu_seqlens must be on the host, where every rank plans from it: pass cu_seqlens.tolist(), or the list it "
            "was made from"
        )
    try:
        bounds = [operator.index(x) for x in (cu_seqlens.tolist() if hasattr(cu_seqlens, "tolist") else cu_seqlens)]
    except TypeError:
        raise ArgumentError(
            f"cu_seqlens={cu_seqlens!r} must be integers, [0, first length, ..., total]: pass a list"
        ) from None
    require(
        len(bounds) > 0 and bounds[0] == 0 and bounds == sorted(bounds),
        f"cu_seqlens={bounds} must begin with 0 and never fall: it says where each document begins",
    )
    return [b - a for a, b in itertools.pairwise(bounds)]


def _int(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ArgumentError(f"{name}={value!r} must be an integer") from None


def _size(name: str, value: Any) -> int | None:
    if value is None:
        return None
    size = _int(name, value)
    require(size >= 1, f"{name}={value} must be at least 1")
    return size


def _members(group: Any, ranks: int | None) -> tuple[int, int | None, Any]:
    """(how many ranks, this one, the group)."""
    if isinstance(group, str):
        require(ranks is not None, f"group={group!r} is a mesh axis of JAX: pass ranks=, its size")
        count = _int("ranks", ranks)
        require(count >= 1, f"ranks={ranks} must be at least 1")
        return count, None, group
    require(ranks is None, f"ranks={ranks} is for a mesh axis of JAX: a group knows its size")
    if isinstance(group, (int, np.integer)) and not isinstance(group, bool):
        require(bool(group >= 1), f"group={group} must be at least 1 rank")
        return int(group), None, None
    from . import on_torch

    return on_torch.members(group)


def _framework(plan: Plan, x: Any) -> Any:
    if plan.group is None:
        raise ArgumentError("this plan has no group, and can only be looked at: make it with the group of the ranks")
    if isinstance(plan.group, str):
        from . import on_jax

        return on_jax
    from . import on_torch

    return on_torch
