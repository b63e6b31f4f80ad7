"""One attention over many ranks: context parallelism on torch.distributed and on a mesh of JAX.

The rows of a packed batch are dealt to the ranks of a group, so that each has as many tiles to compute; every rank
gathers the keys and values, and computes its rows. Any mask, any lengths, and ranks without rows are served, and out,
lse and dq have the bits of one process.

    plan = cuflash.distributed.plan(cu_seqlens, group, causal=True)
    q, k, v = (plan.shard(x) for x in (q, k, v))        # or project from plan.shard(hidden)
    out = cuflash.distributed.attention(q, k, v, plan, causal=True)
"""

from __future__ import annotations

from .attend import attention
from .plans import Plan, Report, Rows, plan

__all__ = ["Plan", "Report", "Rows", "attention", "plan"]
