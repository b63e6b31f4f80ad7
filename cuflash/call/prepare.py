"""What one kind of call needs, whatever its pointers and values: checked, its backend chosen, its kernels planned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .. import arch as arch_table
from .. import dtypes, frameworks
from ..arch import Arch
from ..array import Device, TensorView, contiguous_strides
from ..dtypes import DType
from ..errors import ArgumentError, UnsupportedError
from ..frameworks import Framework
from ..settings import config
from ..trace.derive import gradients
from ..trace.expr import Mods, walk
from . import checks, number_checks
from .arguments import Backward
from .mods import captured_names
from .refusals import PAGES_WITHOUT_GRADIENTS


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """What one kind of call needs, whatever its pointers: checked once, then found by the call's metadata."""

    backend: str  # "cuda", "emulator" or "reference"
    device: Device
    plan: Any  # ops.forward.ForwardPlan or ops.backward.BackwardPlan; None on the reference
    results: tuple[tuple[str, tuple[int, ...], DType], ...]  # (name, shape, dtype)
    aux: tuple[str, ...]
    scale: float
    window: tuple[int, int]  # causal folded in
    softcap: float
    dropout_p: float
    mods: Mods | None  # softcap and ALiBi folded in where there is a score_mod
    slopes_folded: bool
    dcaptured: tuple[str, ...]  # in the order of `AttentionGrads.dcaptured` names of results, if there is one

    def workspace(self) -> dict[str, tuple[tuple[int, ...], DType]]:
        """Scratch arrays that a run on a GPU needs: (shape, dtype) by name."""
        return getattr(self.plan, "workspace", {})

    def compile(self) -> None:
        """Before the first launch of several: what does not compile or load refuses a call that has written nothing."""
        if self in _compiled:
            return
        from ..jit import module

        index = self.device[1] if self.device[0] == "cuda" else None
        specs = list(self.plan.specs)
        if "dropout_mask" in self.aux:
            from ..ops import dropout_mask

            specs.append(dropout_mask.spec(next(shape for name, shape, _ in self.results if name == "dropout_mask")))
        for spec in specs:
            module.load(spec, self.plan.arch, "emulator" if index is None else "cuda", index).prepare()
        if len(_compiled) >= PREPARED_LIMIT:
            _compiled.clear()
        _compiled.add(self)

    def load(self, device: int) -> None:
        """Compiles and loads the kernels on a GPU."""
        from ..jit import module

        for spec in self.plan.specs:
            module.load(spec, self.plan.arch, "cuda", device).prepare()


_compiled: set[Prepared] = set()
PREPARED_LIMIT = 4096  # of a table; then it starts afresh: preparing again costs microseconds and compiles nothing


def prepare(
    framework: Framework,
    views: dict[str, TensorView],
    plain: Sequence[str],
    alignment: int,
    scale: Any,
    causal: Any,
    window_size: Any,
    softcap: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    aux: tuple[str, ...],
    mods: Mods | None,
    dropout_p: float,
    targets: Sequence[str],
    backward: Backward | None,
    backend: str | None = None,
    split_size: int | None = None,
    options: tuple[tuple[str, Any], ...] = (),
) -> Prepared:
    """Check everything that does not depend on pointers and values, choose the backend, describe the problem."""
    q, k, v = views["q"], views["k"], views["v"]
    if "page_table" in views:
        _refuse_pages(backward is not None)
    packed = checks.layout(views)
    checks.same_device(views, plain)
    backend = backend_of(q.device, framework, backend or config.backend)
    checks.element_types(views, backend, framework)
    checks.shapes(views, packed)
    checks.strides(views, framework)
    batch = checks.index_arrays(views, packed, framework)
    checks.head_arrays(views, batch, framework)
    checks.random_numbers(views, framework)

    head_dim, head_dim_v = q.shape[-1], v.shape[-1]
    heads_q, heads_kv, q_rows, k_rows = q.shape[-2], k.shape[-2], q.shape[-3], k.shape[-3]
    if "page_table" in views:
        k_rows *= views["page_table"].shape[1]  # what a sequence has room for
    scale = head_dim**-0.5 if scale is None else number_checks.number("scale", scale)
    softcap = number_checks.softcap(softcap)
    left, right = number_checks.window(window_size, causal)
    max_seqlen_q = number_checks.hint("max_seqlen_q", max_seqlen_q)
    max_seqlen_k = number_checks.hint("max_seqlen_k", max_seqlen_k)
    dropout_p = number_checks.dropout_p(dropout_p)
    aux = number_checks.aux_names(aux)
    if mods is not None:
        checks.captured([views[name] for name in captured_names(mods, views)], mods, q.device, backend, framework)

    dcaptured: dict[str, TensorView | None] = {}
    out_shape = (*q.shape[:-1], head_dim_v)
    lse_shape = (heads_q, q_rows) if packed else (batch, heads_q, q_rows)
    if backward is None:
        results = [("out", out_shape, q.dtype)]
        results += [(name, lse_shape, dtypes.float32) for name in ("lse", "max_logit") if name in aux]
        if "dropout_mask" in aux:
            rows, keys = (max_seqlen_q, max_seqlen_k) if packed else (q_rows, k_rows)
            keys = k_rows if "page_table" in views else keys
            if rows is None or keys is None:
                raise ArgumentError(
                    "dropout_mask of packed arrays is [batch, heads_q, max_seqlen_q, max_seqlen_k], and "
                    f"max_seqlen_q={rows}, max_seqlen_k={keys}: pass both as ints"
                )
            results.append(("dropout_mask", (batch, heads_q, rows, keys), dtypes.bool_))
    else:
        checks.gradients(views, out_shape, lse_shape, framework)
        results = [("dq", q.shape, q.dtype), ("dk", k.shape, q.dtype), ("dv", v.shape, q.dtype)]
        if "sink" in views:
            results.append(("dsink", (heads_q,), views["sink"].dtype))
        dcaptured = _captured_gradients(views, mods, backward.captured_grads)
        results += [(name, x.shape, x.dtype) for name, x in dcaptured.items() if x is not None]
    checks.outputs(views, {name: shape for name, shape, _ in results if name in targets}, framework)

    plan = None
    if backend != "reference":
        if backend == "cuda":
            arch = frameworks.cupy.arch_of(q.device[1], framework.cuda_version())
        else:
            arch = arch_table.named(config.arch)
        plan = _plan(views, results, arch, alignment, dict(
            dtype=q.dtype,
            batch=batch,
            packed=packed,
            q_rows=q_rows,
            k_rows=k_rows,
            max_seqlen_q=max_seqlen_q if packed else None,
            heads_q=heads_q,
            heads_kv=heads_kv,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            scale=scale,
            window=(left, right),
            softcap=softcap,
            dropout_p=dropout_p,
        ), max_seqlen_k, backward, mods, split_size, options)  # fmt: skip
    folded = mods is not None and "alibi_slopes" in captured_names(mods, views)
    return Prepared(
        backend, q.device, plan, tuple(results), aux, scale, (left, right), softcap, dropout_p, mods, folded,
        (*dcaptured,),
    )  # fmt: skip


def _refuse_pages(backward: bool) -> None:
    """The one place that says where keys in pages are not served."""
    if backward:
        raise UnsupportedError(f"page_table: {PAGES_WITHOUT_GRADIENTS}")


def _captured_gradients(
    views: dict[str, TensorView], mods: Mods | None, wanted: bool | tuple[str, ...]
) -> dict[str, TensorView | None]:
    """The results that hold gradients of arrays beside q, k, v and sink, by name: the array each is for, or None where
    scores are not made with it."""
    if wanted is False:
        return {}
    read = set() if mods is None or mods.score is None else {
        slot for x in walk(mods.score) if x.op in ("load", "dot") and x.kind == "float"
        for slot in ((x.value,) if x.op == "load" else x.value[:2])
    }  # fmt: skip
    names = [] if mods is None else captured_names(mods, views)
    found: dict[str, TensorView | None] = {}
    for slot, name in enumerate(names):
        if views[name].dtype.is_float and (wanted is True or name in wanted):
            found[f"dcaptured{slot}"] = views[name] if slot in read else None
    if "alibi_slopes" in views and "alibi_slopes" not in names and (wanted is True or "alibi_slopes" in wanted):
        found["dslopes"] = views["alibi_slopes"]
    if mods is not None and mods.score is not None:  # what has no derivative is refused here
        gradients(mods.score, [slot for slot in range(len(names)) if found.get(f"dcaptured{slot}") is not None])
    return found


def _plan(
    views: dict[str, TensorView],
    results: Sequence[tuple[str, tuple[int, ...], DType]],
    arch: Arch,
    alignment: int,
    fields: dict[str, Any],
    max_seqlen_k: int | None,
    backward: Backward | None,
    mods: Mods | None,
    split_size: int | None,
    options: tuple[tuple[str, Any], ...],
) -> Any:
    """The plan of a checked call: `fields` are those of both problems that do not follow from the views."""
    names = ["q", "k", "v", "out"] + ([] if backward is None else ["dout", "dq", "dk", "dv"])
    shapes = {name: shape for name, shape, _ in results}
    strides = {n: views[n].strides if n in views else contiguous_strides(shapes[n]) for n in names}
    packed, itemsize = fields["packed"], views["q"].dtype.itemsize
    slopes, sink = views.get("alibi_slopes"), views.get("sink")
    if mods is not None:
        slopes = None if "alibi_slopes" in captured_names(mods, views) else slopes
        fields["mods"] = mods
    pages = views.get("page_table")
    fields |= {
        f"{name}_strides": problem_strides(steps, packed and (pages is None or name not in "kv"))
        for name, steps in strides.items()
    }
    fields |= {
        "load_bytes": widest_load(alignment, itemsize, [*strides.values()], [views[n].shape[-1] for n in "qv"]),
        "seqused_q": "seqused_q" in views,
        "seqused_k": "seqused_k" in views,
        "alibi": None if slopes is None else ("head" if slopes.ndim == 1 else "batch"),
        "sink": None if sink is None else ("float32" if sink.dtype is dtypes.float32 else "element"),
        "seed": views["seed"].dtype if "seed" in views else None,
    }
    if backward is None:
        from ..ops import decode, forward

        if pages is not None:
            num_pages, page_size = views["k"].shape[:2]
            fields |= {"page_size": page_size, "num_pages": num_pages, "max_pages": pages.shape[1]}
            fields["page_table_stride"] = pages.strides[0]
        fields["options"] = forward.Options(**dict(options))
        problem = forward.ForwardProblem(**fields, lse="lse" in shapes, max_logit="max_logit" in shapes)
        return forward.plan(problem, arch) if split_size is None else decode.DecodePlan(problem, arch, split_size)
    from ..ops import backward as ops

    fields |= {name: name in shapes for name in ("dsink", "dslopes")}
    fields |= {"max_seqlen_k": max_seqlen_k if packed else None, "dlse": "dlse" in views}
    dcaptured = [(int(n.removeprefix("dcaptured")), math.prod(s)) for n, s in shapes.items() if "dcaptured" in n]
    fields["dcaptured"] = tuple(dcaptured)
    return ops.plan(ops.BackwardProblem(**fields, deterministic=backward.deterministic), arch)


def backend_of(device: Device, framework: Framework, wanted: str) -> str:
    """The backend for arrays on `device` where `config.backend` is `wanted`."""
    host = device[0] == "cpu"
    if wanted == "auto":
        return "reference" if host else "cuda"
    if host and wanted == "cuda":
        raise ArgumentError(
            f"q is in host memory and config.backend='cuda' runs on a GPU: pass {framework.advise('device', 'q')} "
            "(k and v likewise), or set config.backend='auto'"
        )
    if not host and wanted != "cuda":
        raise ArgumentError(
            f"q is on {device[0]}:{device[1]} and config.backend={wanted!r} runs on the host: copy the arrays there, "
            "or set config.backend='auto'"
        )
    return wanted


def problem_strides(strides: tuple[int, ...], packed: bool) -> tuple[int, int, int]:
    """(batch, row, head) in elements."""
    return (0, strides[0], strides[1]) if packed else (strides[0], strides[1], strides[2])


def widest_load(alignment: int, itemsize: int, strides: Sequence[tuple[int, ...]], head_dims: Sequence[int]) -> int:
    """The widest load, 16, 4 or 2 bytes, that every row of every array is aligned to, and a whole number of.

    `alignment` has the low bits of the pointers or-ed together; `strides` and `head_dims` are in elements.
    """
    bits = alignment
    for step in (*head_dims, *(step for steps in strides for step in steps[:-1])):
        bits |= step * itemsize
    return 16 if bits % 16 == 0 else 4 if bits % 4 == 0 else 2
