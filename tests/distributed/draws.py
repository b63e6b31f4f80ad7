"""Drawn problems of a packed batch over ranks, and what they give on ranks and in one process."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

MASKS = ("causal", "window", "document", "prefix", "natten", "full")


@dataclasses.dataclass(frozen=True)
class Problem:
    """`lengths` of documents, and attention's arguments by name. score: a mod whose captured array gets a gradient."""

    lengths: tuple[int, ...]
    mask: str
    dtype: str = "float32"
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 32
    sink: bool = False
    score: bool = False
    balance: str = "area"
    chunk: int = 32
    seed: int = 0


def draw(count: int, seed: int, dtype: str = "float32", masks: tuple[str, ...] = MASKS) -> list[Problem]:
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        lengths = [int(x) for x in rng.choice([0, 1, 2, 37, 61, 64, 97, 128], size=rng.integers(1, 6))]
        if rng.random() < 0.5:
            lengths[rng.integers(len(lengths))] = int(rng.integers(200, 420))
        found.append(
            Problem(
                tuple(lengths), masks[i % len(masks)], dtype, [(4, 2), (2, 2), (3, 1)][rng.integers(3)],
                sink=bool(rng.random() < 0.4), score=i % 4 == 3,
                balance=("area", "area", "contiguous", "zigzag")[rng.integers(4)], chunk=int(rng.choice([32, 64, 128])),
                seed=int(rng.integers(1 << 30)),
            )
        )  # fmt: skip
    return found


def _prefix(b: Any, h: Any, q_idx: Any, kv_idx: Any, q_len: Any) -> Any:
    return (kv_idx <= q_idx) | (kv_idx < q_len // 4)


def _natten(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    near_rows = (q_idx // 8 - kv_idx // 8 <= 2) & (kv_idx // 8 - q_idx // 8 <= 2)
    return near_rows & (q_idx % 8 - kv_idx % 8 <= 3) & (kv_idx % 8 - q_idx % 8 <= 3)


class Inputs:
    """A problem's tensors, the whole batch; the same on every rank."""

    def __init__(self, problem: Problem) -> None:
        import torch

        self.problem = problem
        rng = np.random.default_rng(problem.seed)
        self.starts = [0, *np.cumsum(problem.lengths).tolist()]
        total, (heads, heads_kv) = self.starts[-1], problem.heads

        def tensor(*shape: int) -> Any:
            return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).to(getattr(torch, problem.dtype))

        self.q = tensor(total, heads, problem.head_dim).requires_grad_()
        self.k, self.v = (tensor(total, heads_kv, problem.head_dim).requires_grad_() for _ in range(2))
        self.dout = tensor(total, heads, problem.head_dim)
        self.sink = tensor(heads).float().requires_grad_() if problem.sink else None
        self.table = (tensor(heads, 9).float() / 4).requires_grad_() if problem.score else None
        ids = np.sort(rng.integers(0, 4, max(total, 1))).astype(np.int32)
        self.ids = torch.from_numpy(ids)

    def mask(self) -> dict[str, Any]:
        """The keywords that a plan counts with and attention computes."""
        import torch

        kind = self.problem.mask
        if kind == "causal":
            return {"causal": True}
        if kind == "window":
            return {"window_size": (40, 9)}
        if kind == "full":
            return {}
        if kind == "document":
            ids, starts = self.ids, torch.tensor(self.starts[:-1], dtype=torch.int32)

            def document(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
                return (ids[starts[b] + q_idx] == ids[starts[b] + kv_idx]) & (kv_idx <= q_idx)

            return {"mask_mod": document}
        return {"mask_mod": _prefix if kind == "prefix" else _natten}

    def keywords(self) -> dict[str, Any]:
        table = self.table
        found = self.mask() | {"deterministic": True, "aux": ("lse",)}
        if table is not None:

            def biased(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
                return score + table[h, (kv_idx - q_idx).clip(-4, 4) + 4]

            found["score_mod"] = biased
        if self.sink is not None:
            found["sink"] = self.sink
        return found

    @property
    def parameters(self) -> list[Any]:
        return [x for x in (self.sink, self.table) if x is not None]


def whole(inputs: Inputs) -> list[np.ndarray]:
    """out, lse, dq, dk, dv and the gradients of sink and table, in one process."""
    import torch

    import cuflash

    starts = torch.tensor(inputs.starts, dtype=torch.int32)
    result = cuflash.attention(
        inputs.q, inputs.k, inputs.v, cu_seqlens_q=starts, cu_seqlens_k=starts, **inputs.keywords()
    )
    wanted = [inputs.q, inputs.k, inputs.v, *inputs.parameters]
    grads = torch.autograd.grad((result.out.float() * inputs.dout.float()).sum(), wanted)
    return [_array(x) for x in (result.out, result.lse, *grads)]


def over_ranks(inputs: Inputs) -> list[np.ndarray]:
    """The same of the group, each rank's part put where it belongs: on rank 0 the whole, elsewhere too."""
    import torch
    import torch.distributed as dist

    import cuflash

    problem = inputs.problem
    plan = cuflash.distributed.plan(inputs.starts, None, balance=problem.balance, chunk=problem.chunk, **inputs.mask())
    local = [plan.shard(x.detach()).requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    result = cuflash.distributed.attention(*local, plan, **inputs.keywords())
    dout = plan.shard(inputs.dout)
    wanted = [*local, *inputs.parameters]
    grads = list(torch.autograd.grad((result.out.float() * dout.float()).sum(), wanted))
    for i in range(3, len(grads)):
        dist.all_reduce(grads[i])
    rows = (result.out.detach(), result.lse.detach().T.contiguous(), *grads[:3])
    out, lse, *gradients = (plan.unshard(x) for x in rows)
    return [_array(x) for x in (out, lse.T, *gradients, *grads[3:])]


def both(problems: list[Problem], repeats: int = 1) -> list[tuple[list[list[np.ndarray]], list[np.ndarray]]]:
    """For each problem its results over the ranks, `repeats` times, and in one process."""
    found = []
    for problem in problems:
        inputs = Inputs(problem)
        found.append(([over_ranks(inputs) for _ in range(repeats)], whole(inputs)))
    return found


def _array(x: Any) -> np.ndarray:
    return x.detach().float().numpy()
