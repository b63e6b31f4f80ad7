"""`attention` of the rows that one rank holds."""

from __future__ import annotations

import warnings
from typing import Any

from ..errors import ArgumentError, UnsupportedError, require
from .plans import Plan

_ELSEWHERE = {
    "cu_seqlens_q": "the plan knows the documents",
    "cu_seqlens_k": "the plan knows the documents",
    "max_seqlen_q": "the plan knows the documents",
    "max_seqlen_k": "the plan knows the documents",
    "seqused_q": "leave the rows that are not used out of the plan's lengths",
    "seqused_k": "leave the rows that are not used out of the plan's lengths",
    "page_table": "a cache belongs to one process",
    "block_mask": "pass the mask_mod that it was made from",
    "out": "the result is new",
    "split_size": "rows of a rank are many",
}
_TAKEN = ("scale", "softcap", "sink", "deterministic", "kernel_options", "aux")


def attention(
    q: Any,
    k: Any,
    v: Any,
    plan: Any,
    *,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    alibi_slopes: Any = None,
    score_mod: Any = None,
    mask_mod: Any = None,
    **keywords: Any,
) -> Any:
    """`cuflash.attention` of the rows that this rank holds, with the keys and values of all ranks.

    q [rows, heads_q, d], k [rows, heads_kv, d], v [rows, heads_kv, d_v]: this rank's rows of the packed batch, as
    `plan.shard` gives them. The other keywords are those of `cuflash.attention`: scale, causal, window_size, softcap,
    alibi_slopes, sink, score_mod, mask_mod, deterministic, kernel_options and aux. Mods see a row where it is in its
    document, and b is the document's index in the whole batch. ALiBi slopes work as a score mod.

    out [rows, heads_q, d_v]; with `aux=("lse",)` an AttentionOutput with lse [heads_q, rows]. With
    `deterministic=True`, out, lse and dq have the bits of one process; dk and dv are summed in float32 in the order of
    ranks. Gradients of the sink, of slopes and of captured arrays are this rank's part, as those of a model's other
    parameters are: sum them over the group.

    Every rank of the group must call it, a rank without rows too. Raises ArgumentError on every rank where plans, heads
    or dtypes differ, DistributedError where the group fails.
    """
    for name in keywords:
        if name == "dropout_p" and not keywords[name]:
            continue
        if name in ("dropout_p", "seed", "offset"):
            if keywords.get("dropout_p"):
                raise UnsupportedError(
                    "dropout_p is not available over ranks: its random numbers count rows from a sequence's beginning, "
                    "and a rank may hold its middle; drop out elsewhere in the model"
                )
            continue
        if name in _ELSEWHERE:
            raise ArgumentError(f"{name} is no keyword here: {_ELSEWHERE[name]}")
        require(name in _TAKEN, f"{name} is no keyword of attention: it has {', '.join(_TAKEN)} and the masks")
    for name in ("dropout_p", "seed", "offset"):
        keywords.pop(name, None)
    window = tuple(-1 if side is None else side for side in window_size)
    require(
        len(window) == 2 and all(isinstance(side, int) and side >= -1 for side in window),
        f"window_size={window_size!r} must be two lengths (left, right): -1 or None is unlimited",
    )
    keywords |= {
        "causal": bool(causal), "window_size": window, "alibi_slopes": alibi_slopes, "score_mod": score_mod,
        "mask_mod": mask_mod,
    }  # fmt: skip
    if not isinstance(plan, Plan):
        if type(plan).__module__ != f"{__package__}.on_jax":
            raise ArgumentError(
                f"plan={type(plan).__name__} must be what cuflash.distributed.plan returned; in JAX its arrays"
            )
        from . import on_jax

        return on_jax.attention(q, k, v, plan, keywords)
    if plan.group is None:
        raise ArgumentError("this plan has no group, and can only be looked at: make it with the group of the ranks")
    if isinstance(plan.group, str):
        raise ArgumentError("plan is of JAX: pass plan.arrays through shard_map, with plan.specs")
    _warn_if_unlike(plan, keywords)
    from . import on_torch

    return on_torch.attention(q, k, v, plan, keywords)


def _warn_if_unlike(plan: Plan, keywords: dict[str, Any]) -> None:
    counted = plan.causal, plan.window_size, plan.masked
    asked = keywords["causal"], keywords["window_size"], keywords["mask_mod"] is not None
    if counted != asked and "warned" not in plan.done:
        plan.done.add("warned")
        warnings.warn(
            f"the plan counted tiles with (causal, window_size, mask_mod given) = {counted}, and attention is called "
            f"with {asked}: results are right, but ranks may have unequal work",
            stacklevel=3,
        )
