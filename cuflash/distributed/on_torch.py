"""Context parallelism on torch.distributed: rows gathered by one collective, gradients summed in the order of ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .. import api
from ..errors import ArgumentError, DistributedError, UnsupportedError, require
from ..settings import config
from . import globally

Plan = Any  # of plans.py, which calls this

_NAMES = ("plan", "rows", "heads of q", "heads of k", "head dim", "head dim of v", "dtype")


def members(group: Any) -> tuple[int, int, Any]:
    """(how many ranks, this one, the ProcessGroup) of a ProcessGroup, a DeviceMesh of one dimension, or None: all."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        raise ArgumentError(
            "there is no process group: call torch.distributed.init_process_group first, pass the name of a mesh axis "
            "of JAX with ranks=, or an int for a plan that is only looked at"
        )
    if hasattr(group, "mesh_dim_names"):
        if group.ndim != 1:
            raise UnsupportedError(
                f"a DeviceMesh of {group.ndim} dimensions is not served: pass one of them, mesh['cp']"
            )
        group = group.get_group()
    if group is None:
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise ArgumentError(
            f"group is a {type(group).__name__} and must be a ProcessGroup, a DeviceMesh, a name or an int"
        )
    rank = dist.get_rank(group)
    require(rank >= 0, "this process is not a member of the group: only its ranks may plan with it")
    return dist.get_world_size(group), rank, group


class _Arrays:
    """A plan's arrays on one device."""

    def __init__(self, plan: Plan, device: Any) -> None:
        import torch

        def there(x: np.ndarray) -> Any:
            return torch.from_numpy(np.ascontiguousarray(x)).to(device)

        longest = max(plan.rows, default=0)
        held = [plan.of(rank) for rank in range(plan.ranks)]
        place = np.zeros(plan.total, np.int64)  # a row of the batch -> its row among those gathered, each rank's padded
        for rank, own in enumerate(held):
            place[own.index] = rank * longest + np.arange(len(own.index))
        self.place = there(place)
        self.by_rank = there(np.concatenate([own.index for own in held]))
        own = plan.of(plan.rank or 0)
        self.index, self.positions = there(own.index), there(own.positions)
        self.starts, self.cu_seqlens = there(own.cu_seqlens[:-1]), there(own.cu_seqlens)
        self.whole = there(plan.whole_cu_seqlens)
        self.longest = longest
        self.longest_q = int(np.diff(own.cu_seqlens).max(initial=0))
        self.longest_k = max(plan.lengths, default=0)


def _arrays(plan: Plan, device: Any) -> _Arrays:
    if device not in plan.on_devices:
        plan.on_devices[device] = _Arrays(plan, device)
    return plan.on_devices[device]


def _collective(what: str, plan: Plan, call: Callable[[], Any]) -> Any:
    """What `call` returns; where the group fails, that said with the step."""
    try:
        return call()
    except (RuntimeError, ValueError) as error:
        raise DistributedError(
            f"rank {plan.rank} of {plan.ranks}: {what} failed: {error}. Every rank of the group must make the same "
            "calls with the same plan; look at what the other ranks raised"
        ) from error


def _all_gather(everyone: Any, mine: Any, plan: Plan) -> None:
    import torch.distributed as dist

    # PyTorch 2.13 renamed it.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(everyone, mine, group=plan.group)


def _gathered(x: Any, plan: Plan) -> Any:
    """x [rows, ...] of every rank -> [total, ...] in the batch's order."""
    import torch

    arrays = _arrays(plan, x.device)
    padded = x.new_zeros(arrays.longest, *x.shape[1:])
    padded[: len(x)] = x
    everyone = x.new_empty(plan.ranks * arrays.longest, *x.shape[1:])
    _collective("gathering rows", plan, lambda: _all_gather(everyone, padded, plan))
    return torch.index_select(everyone, 0, arrays.place)


def _summed(d: Any, plan: Plan) -> Any:
    """Each rank's d [total, ...] -> the sum over ranks of this rank's rows, added in float32 in the order of ranks."""
    import torch
    import torch.distributed as dist

    arrays, own = _arrays(plan, d.device), plan.rows[plan.rank or 0]
    sent = torch.index_select(d, 0, arrays.by_rank)
    received = d.new_empty(plan.ranks * own, *d.shape[1:])
    sizes = [own] * plan.ranks, list(plan.rows)
    _collective("adding gradients", plan, lambda: dist.all_to_all_single(received, sent, *sizes, group=plan.group))
    wide = torch.promote_types(d.dtype, torch.float32)
    total = torch.zeros(own, *d.shape[1:], dtype=wide, device=d.device)
    for rank in range(plan.ranks):
        total += received[rank * own : (rank + 1) * own]
    return total.to(d.dtype)


def _functions() -> Any:
    """Gather, as autograd sees it: its gradient is the sum over ranks."""
    import torch

    global _Gather
    if _Gather is None:

        class Gather(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Any, plan: Plan) -> Any:
                ctx.plan = plan
                return _gathered(x, plan)

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                return _summed(grads[0].contiguous(), ctx.plan), None

        _Gather = Gather
    return _Gather


_Gather: Any = None


def shard(plan: Plan, x: Any) -> Any:
    import torch

    _require_tensor("x", x)
    require(
        x.ndim > 0 and x.shape[0] == plan.total,
        f"x.shape={tuple(x.shape)} must begin with {plan.total}, the rows of the whole packed batch: its documents end "
        "to end",
    )
    return torch.index_select(x, 0, _arrays(plan, x.device).index)


def unshard(plan: Plan, x: Any) -> Any:
    _require_tensor("x", x)
    _require_rows("x", x, plan)
    return _functions().apply(x, plan)


def _require_tensor(name: str, x: Any) -> None:
    import torch

    if not isinstance(x, torch.Tensor):
        raise ArgumentError(f"{name} is a {type(x).__name__} and must be a torch tensor: the plan's group is PyTorch's")


def _require_rows(name: str, x: Any, plan: Plan) -> None:
    own = plan.rows[plan.rank or 0]
    require(
        x.ndim > 0 and x.shape[0] == own,
        f"{name}.shape={tuple(x.shape)} must begin with {own}, the rows that rank {plan.rank} holds of this plan: pass "
        f"plan.shard({name})",
    )


def attention(q: Any, k: Any, v: Any, plan: Plan, keywords: dict[str, Any]) -> Any:
    for name, x in (("q", q), ("k", k), ("v", v)):
        _require_tensor(name, x)
        require(x.ndim == 3, f"{name}.shape={tuple(x.shape)} must be [rows, heads, head dim]: batches are packed here")
    if "compared" not in plan.done or config.check:
        _compare(plan, q, k, v)
        plan.done.add("compared")
    for name, x in (("q", q), ("k", k), ("v", v)):
        _require_rows(name, x, plan)
    arrays = _arrays(plan, q.device)
    gather = _functions().apply
    causal, window_size = keywords.pop("causal"), keywords.pop("window_size")
    mask = globally.mask_of(arrays.positions, arrays.starts, causal, window_size, keywords.pop("mask_mod"))
    slopes, score_mod = keywords.pop("alibi_slopes"), keywords.pop("score_mod")
    score = globally.score_of(arrays.positions, arrays.starts, slopes, score_mod)
    return api.attention(
        q, gather(k, plan), gather(v, plan), cu_seqlens_q=arrays.cu_seqlens, cu_seqlens_k=arrays.whole,
        max_seqlen_q=arrays.longest_q, max_seqlen_k=arrays.longest_k, mask_mod=mask, score_mod=score, **keywords,
    )  # fmt: skip


def _compare(plan: Plan, q: Any, k: Any, v: Any) -> None:
    """Raise on every rank if plans differ, or what the arrays are, or if one has rows that are not its plan's."""
    import torch

    own = plan.rows[plan.rank or 0]
    fits = all(x.shape[0] == own for x in (q, k, v))
    dtype = int.from_bytes(str(q.dtype).encode()[-7:], "big")
    facts = [plan.digest, 0 if fits else 1, q.shape[1], k.shape[1], q.shape[2], v.shape[2], dtype]
    mine = torch.tensor(facts, dtype=torch.int64, device=q.device)
    everyone = torch.empty(plan.ranks * len(facts), dtype=torch.int64, device=q.device)
    _collective("comparing plans", plan, lambda: _all_gather(everyone, mine, plan))
    table = everyone.view(plan.ranks, len(facts)).tolist()
    for at, name in enumerate(_NAMES):
        column = [row[at] for row in table]
        usual = 0 if name == "rows" else max(set(column), key=lambda x: (column.count(x), -column.index(x)))
        other = [rank for rank, x in enumerate(column) if x != usual]
        if other and name == "rows":
            raise ArgumentError(
                f"ranks {other} passed q, k or v with rows that are not those of their plan: pass plan.shard(x)"
            )
        if other:
            raise ArgumentError(
                f"{name} of ranks {other} differs from that of the others: every rank must plan from the same lengths, "
                "and pass arrays of the same heads, head dims and dtype"
            )
