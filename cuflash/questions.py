"""The questions one may ask of a call: `explain`, `supports`, and `warmup`, which compiles what such calls need."""

from __future__ import annotations

import html
import numbers
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from . import arch as arch_table
from . import dtypes, frameworks, philox
from .api import attention
from .arch import Arch
from .array import TensorView, contiguous_strides
from .call import checks, number_checks
from .call.arguments import LENGTHS, MODS, Arguments, Backward
from .call.bind import bind
from .call.length_checks import longest
from .call.mods import bind_mods
from .call.prepare import Prepared, prepare, widest_load
from .call.refusals import PAGES_WITHOUT_GRADIENTS, UNSUPPORTED
from .call.run import Call
from .dtypes import DType
from .errors import ArgumentError, UnsupportedError, require
from .keywords import with_suggestions
from .settings import config
from .trace.expr import Mods
from .trace.fold import fold
from .trace.tracer import Bound

Array = Any


@dataclass(frozen=True)
class Explanation:
    """What a call would do, and why. Prints as text; notebooks show a table.

    backend          "cuda", "emulator" or "reference"
    kernel           its name, e.g. "forward_sm80"
    why              reasons for the choices made, a sentence each
    grid             blocks launched, (x, y, z)
    variant          the compile-time choices, in one line
    source           the CUDA C text: `cupy.RawModule(code=source, options=options)` compiles it too, with -ftz=true
                     added by CuPy: denormal floats that a mod compares or rounds are 0 then
    options          of NVRTC
    shared_bytes     shared memory of a block
    workspace_bytes  device memory needed besides the arrays
    captured         what scores and masks are made with beside q and k: "name dtype[shape]" of each array, those that
                     mods captured in the order they were met, then alibi_slopes; "name" of each number
    fallback         why no kernel runs; "" where one does
    """

    backend: str
    kernel: str
    why: tuple[str, ...] = ()
    grid: tuple[int, int, int] = (0, 0, 0)
    variant: str = ""
    source: str = ""
    options: tuple[str, ...] = ()
    shared_bytes: int = 0
    workspace_bytes: int = 0
    captured: tuple[str, ...] = ()
    fallback: str = ""

    def _rows(self) -> list[tuple[str, str]]:
        rows = [("backend", self.backend), ("kernel", self.kernel)]
        if not self.fallback:
            x, y, z = self.grid
            rows += [
                ("grid", f"{x} x {y} x {z} blocks"),
                ("variant", self.variant),
                ("source", f"{self.source.count(chr(10))} lines"),
                ("options", " ".join(self.options)),
                ("shared memory", f"{self.shared_bytes:,} bytes a block"),
                ("workspace", f"{self.workspace_bytes:,} bytes"),
            ]
        if self.captured:
            rows.append(("captured", ", ".join(self.captured)))
        if self.fallback:
            rows.append(("fallback", self.fallback))
        return rows + [("why", reason) for reason in self.why]

    def __str__(self) -> str:
        return "\n".join(f"{name:<14}{value}" for name, value in self._rows())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        left = "style='text-align:left'"
        rows = "".join(
            f"<tr><th {left}>{html.escape(n)}</th><td {left}>{html.escape(v)}</td></tr>" for n, v in self._rows()
        )
        if not self.source:
            return f"<table>{rows}</table>"
        source = f"<pre>{html.escape(self.source)}</pre>"
        return f"<table>{rows}</table><details><summary>source</summary>{source}</details>"


@with_suggestions(attention)
def explain(q: Array, k: Array, v: Array, *, backward: bool = False, **keywords: Any) -> Explanation:
    """What `attention` would do with the same arguments, without doing it: nothing is compiled, launched or written.

    With `backward`, what `attention_backward` would do, for contiguous dout and out; `captured_grads` may be given too.
    Several kernels run then: grid, variant and source are those of the one that computes dk and dv, `why` has them all.

    Raises what the call would raise.

    >>> import numpy as np
    >>> q = np.zeros((1, 4, 2, 64), np.float16)
    >>> explain(q, q, q, causal=True).backend
    'reference'
    """
    backward = number_checks.flag("backward", backward)
    captured_grads = backward and number_checks.flag("captured_grads", keywords.pop("captured_grads", False))
    arguments = Arguments(**keywords)
    deterministic = number_checks.flag("deterministic", arguments.deterministic)
    if arguments.seed is None and frameworks.of(q) is frameworks.torch:
        arguments = arguments._replace(seed=0)  # any will do: a draw would move the generator on
    traced = None
    if arguments.has_mods:
        traced = bind_mods(q, k, arguments.score_mod, arguments.mask_mod, arguments.block_mask)
    call = bind(q, k, v, arguments, traced)
    captured, notes = _described_mods(call.views, traced), () if traced is None else traced.notes
    prepared = call.prepared
    if backward:
        prepared = _prepare_backward_of(call, arguments, Backward({}, {}, deterministic, captured_grads))
    plan = prepared.plan
    if plan is None:
        return Explanation(
            backend="reference",
            kernel="reference",
            why=notes,
            captured=captured,
            fallback="arrays in host memory run in NumPy; cuflash.config.backend = 'emulator' runs the kernel on them, "
            "arrays on a GPU run it there",
        )
    from .jit import nvrtc, variant

    spec, grid, why = plan.described()
    return Explanation(
        backend=prepared.backend,
        kernel=spec.source.removesuffix(".cu"),
        why=(*why, *_reasons(plan.problem), *notes, *_where(prepared)),
        grid=grid,
        variant=variant.describe(spec.variant),
        source=spec.text("cuda"),
        options=nvrtc.options(),
        shared_bytes=spec.smem_bytes,
        workspace_bytes=plan.workspace_bytes,
        captured=captured,
    )


def _described_mods(views: dict[str, TensorView], bound: Bound | None) -> tuple[str, ...]:
    """For `Explanation.captured`."""
    named = [] if bound is None else [(slot.name, views[f"captured{i}"]) for i, slot in enumerate(bound.mods.arrays)]
    if "alibi_slopes" in views:
        named.append(("alibi_slopes", views["alibi_slopes"]))
    arrays = [f"{name} {x.dtype}{list(x.shape)}" for name, x in named]
    return (*arrays, *(() if bound is None else (slot.name for slot in bound.mods.scalars)))


def _prepare_backward_of(call: Call, arguments: Arguments, gradients: Backward) -> Prepared:
    """The backward of a bound forward call with these arguments."""
    views = {name: view for name, view in call.views.items() if name != "out"}
    q, v = views["q"], views["v"]
    out = (*q.shape[:-1], v.shape[-1])
    lse = (*q.shape[:-3], q.shape[-2], q.shape[-3])
    for name, shape, dtype in (("dout", out, q.dtype), ("out", out, q.dtype), ("lse", lse, dtypes.float32)):
        views[name] = TensorView(0, shape, contiguous_strides(shape), dtype, q.device, False, None)
    hints: dict[str, int | None] = {"q": arguments.max_seqlen_q, "k": arguments.max_seqlen_k}
    for side in "qk":
        starts = views.get(f"cu_seqlens_{side}")
        if hints[side] is None and starts is not None and starts.device[0] == "cpu":
            hints[side] = longest(starts.as_numpy())
    return prepare(
        call.framework, views, LENGTHS, (q.ptr | views["k"].ptr | v.ptr) & 15, arguments.scale, arguments.causal,
        arguments.window_size, call.prepared.softcap, hints["q"], hints["k"], (), call.prepared.mods,
        arguments.dropout_p, (), gradients,
    )  # fmt: skip


def _where(prepared: Prepared) -> list[str]:
    """The GPU that a call would run on, as its driver calls it."""
    if prepared.backend != "cuda":
        return []
    index = prepared.device[1]
    return [f"runs on GPU {index}: {frameworks.cupy.device_name(index)}"]


def _reasons(problem: Any) -> list[str]:
    """What else is worth knowing of a problem, forward or backward."""
    reasons = []
    p = problem.dropout_p
    if p:
        kept = philox.keep_threshold(p)
        reasons.append(
            f"dropout: {kept} of 256 weights are kept, dropout_p={p} rounded to {1 - kept / 256:.6g}; those kept are "
            f"multiplied by 1 / (1 - {p})"
        )
    width = problem.load_bytes
    if width < 16:
        reasons.append(
            f"loads of {width} bytes: an address, stride or row of q, k, v or out is no multiple of 16; head dims "
            "that are multiples of 8 (float32: 4) in contiguous arrays load faster"
        )
    return reasons


@dataclass(frozen=True)
class Support:
    """True or false, and why not.

    >>> bool(Support("")), bool(Support("no"))
    (True, False)
    """

    reason: str

    def __bool__(self) -> bool:
        return not self.reason

    def __repr__(self) -> str:
        return f"Support(False, reason={self.reason!r})" if self.reason else "Support(True)"


# Keywords and outputs of `attention` that every kernel serves.
_SERVED = (
    "cu_seqlens", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "seqused_q", "seqused_k", "scale",
    "causal", "window_size", "softcap", "alibi_slopes", "sink", "dropout_p", "seed", "offset", "deterministic", "out",
    "lse", "max_logit", "dropout_mask", "page_table", "split_size", *MODS,
)  # fmt: skip

# Every feature `supports` knows, served or not.
FEATURES = (*_SERVED, *UNSUPPORTED)


def supports(
    *,
    dtype: Any,
    head_dim: int,
    head_dim_v: int | None = None,
    arch: str | Arch | None = None,
    backward: bool = False,
    **features: Any,
) -> Support:
    """Whether kernels serve such a call (with `backward`: and its gradients), and if not, what to use instead.

    `dtype` by name or as any framework's; `arch` such as "sm_90a" (None: every GPU from sm_80); features are the
    keywords and outputs of `attention`, each true where it is used.

    >>> supports(dtype="bfloat16", head_dim=128, causal=True, lse=True)
    Support(True)
    >>> supports(dtype="bfloat16", head_dim=512).reason
    'head_dim=512: head dims go from 1 to 256'
    """
    for name, value in (("head_dim", head_dim), ("head_dim_v", head_dim if head_dim_v is None else head_dim_v)):
        plain = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        require(plain and value > 0, f"{name}={value!r} must be a positive int")
        if value > checks.MAX_HEAD_DIM:
            return Support(f"{name}={value}: head dims go from 1 to {checks.MAX_HEAD_DIM}")
    element = _dtype_named(dtype)
    if element not in dtypes.KERNEL:
        return Support(
            f"dtype={element}: kernels compute in {', '.join(t.name for t in dtypes.KERNEL)}"
            + ("; float64 runs on the NumPy reference, for host arrays" if element is dtypes.float64 else "")
        )
    if arch is not None and not isinstance(arch, Arch):
        try:
            arch_table.named(arch)
        except UnsupportedError as error:
            return Support(str(error))
    used = {name for name, x in features.items() if _is_used(x)}
    backward = number_checks.flag("backward", backward)
    for name in features:
        if name in _SERVED and not (backward and name == "page_table"):
            continue
        require(
            name in FEATURES,
            f"feature {name!r} is not a keyword or output of attention: use one of {', '.join(FEATURES)}",
        )
        if name in used:
            return Support(f"{name}: {UNSUPPORTED.get(name, PAGES_WITHOUT_GRADIENTS)}")
    if "split_size" in used:
        from .ops import decode

        if "dropout_p" in used:
            return Support(f"split_size: {decode.NO_DROPOUT}")
        if used & {"cu_seqlens", "cu_seqlens_k"} and "page_table" not in used:
            return Support(f"split_size: {decode.NO_PACKED_KEYS}")
    return Support("")


def _is_used(feature: Any) -> bool:
    """Whether a keyword of `supports` and `warmup` says that calls use it: a number or flag by its value, and arrays,
    functions and the like by being there."""
    return not (feature is None or (isinstance(feature, (numbers.Number, np.bool_)) and not feature))


def warmup(
    *,
    dtype: Any,
    head_dim: int,
    head_dim_v: int | None = None,
    arch: str | Arch | None = None,
    backward: bool = False,
    device: int | None = None,
    **features: Any,
) -> None:
    """Compile and load the kernels such calls need, so that none of them waits: the keywords of `supports`.

    Shapes, lengths, head counts and numbers are no part of it; arrays are taken as contiguous (others may load in
    narrower steps, by a kernel of their own). On a GPU the kernel is loaded on `device` (None: the
    current one). With `arch` the kernel is only compiled, which needs no GPU. Under `config.backend = "emulator"` the
    emulator's is compiled. score_mod, mask_mod and block_mask are given as to `attention`: their code is part of a
    kernel, what they capture is not, but for which of it requires a gradient.

    Raises `UnsupportedError` with the reason of `supports`, or that no GPU is there.
    """
    support = supports(dtype=dtype, head_dim=head_dim, head_dim_v=head_dim_v, arch=arch, backward=backward, **features)
    if not support:
        raise UnsupportedError(support.reason)
    if config.backend == "reference":
        return
    if device is not None:
        device = number_checks.count("device", device, least=0)
    element, head_dim = _dtype_named(dtype), int(head_dim)
    head_dim_v = head_dim if head_dim_v is None else int(head_dim_v)
    load_bytes = widest_load(0, element.itemsize, [], [head_dim, head_dim_v])
    rows, values = (head_dim, head_dim, head_dim), (head_dim_v, head_dim_v, head_dim_v)
    mods, wanted = mods_of_features(features)
    fields: dict[str, Any] = dict(
        dtype=element,
        batch=1,
        packed=False,
        q_rows=1,
        k_rows=1,
        max_seqlen_q=None,
        heads_q=1,
        heads_kv=1,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        q_strides=rows,
        k_strides=rows,
        v_strides=values,
        out_strides=values,
        load_bytes=load_bytes,
        scale=1.0,
        dropout_p=0.5 if _is_used(features.get("dropout_p")) else 0.0,
        mods=mods,
    )
    from .ops import backward as ops_backward
    from .ops import decode, forward

    paged = _is_used(features.get("page_table"))
    splits = _is_used(features.get("split_size"))
    plan_forward: Any = forward.plan
    if splits:
        plan_forward = partial(decode.DecodePlan, split_size=64)  # any size will do
    problems: list[tuple[Any, Any]] = [(plan_forward, forward.ForwardProblem(**fields, page_size=int(paged)))]
    if backward:
        gradients: dict[str, Any] = dict(dout_strides=values, dq_strides=rows, dk_strides=rows, dv_strides=values)
        sums: dict[str, Any] = dict(max_seqlen_k=None, dsink=_is_used(features.get("sink")), dcaptured=wanted)
        sums["dslopes"] = _is_used(features.get("alibi_slopes")) and (mods is None or mods.score is None)
        problems.append((ops_backward.plan, ops_backward.BackwardProblem(**fields, **gradients, **sums)))
    from .jit import module

    if config.backend == "emulator":
        where, target, index = "emulator", arch_table.named(config.arch), None
    elif arch is not None:
        where, target, index = "", arch if isinstance(arch, Arch) else arch_table.named(arch), None
    else:
        index = frameworks.cupy.current_device() if device is None else device
        where, target = "cuda", frameworks.cupy.arch_of(index)
    for make, problem in problems:
        for spec in make(problem, target).specs:
            if where:
                module.load(spec, target, where, index).prepare()
            else:
                module.compile(spec, target)


def mods_of_features(features: dict[str, Any]) -> tuple[Mods | None, tuple[tuple[int, int], ...]]:
    """The mods among the features of `warmup`, with what is folded into a score_mod, and (slot, size) of the arrays
    that want a gradient: slopes, and tensors that require one."""
    given = [mod if _is_used(mod) else None for mod in map(features.get, MODS)]
    if all(mod is None for mod in given):
        return None, ()
    for name, mod in zip(MODS, given, strict=True):
        require(mod is not True, f"{name}=True: a kernel is made for one function; pass the function itself")
    bound = bind_mods(None, None, *given)
    mods = bound.mods
    if mods.score is None:
        return mods, ()
    wanted = tuple((i, 1) for i, x in enumerate(bound.arrays) if getattr(x, "requires_grad", False))
    slopes = features.get("alibi_slopes")
    by_sequence = len(getattr(slopes, "shape", ())) == 2
    alibi = None if not _is_used(slopes) else "batch" if by_sequence else "head"
    if alibi is not None:
        wanted += ((len(mods.arrays), 1),)
    return fold(mods, _is_used(features.get("softcap")), alibi), wanted


def _dtype_named(dtype: Any) -> DType:
    """A DType from a name or from any framework's dtype object."""
    if isinstance(dtype, DType):
        return dtype
    name = dtype if isinstance(dtype, str) else str(dtype).rpartition(".")[2]
    found = dtypes.BY_NAME.get(name)
    if found is None:
        try:
            found = None if isinstance(dtype, np.generic) else dtypes.BY_NUMPY.get(np.dtype(dtype))
        except Exception:  # NumPy has several for what is no dtype
            found = None
    if found is None:
        raise ArgumentError(f"dtype={dtype!r} must be one of {', '.join(dtypes.BY_NAME)}")
    return found
