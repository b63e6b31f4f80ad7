"""Warm calls: what a call needs is found by the raw metadata of its arrays, and run on their addresses.

The full way views every array, and checks and plans where the call's metadata is new. A *runner* is what is left of
that where it is not: a plan, the results to allocate, and the framework to ask for memory and a stream. It serves CuPy
arrays on a GPU, whose attributes are their metadata; what is unusual (mods, dropout, host values, `kernel_options`,
`config.check`) goes the full way, and so does everything that no runner was made for.

Runners hold no array and no address, so threads share them; a CUDA graph may record what they launch, as `run` does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..array import TensorView
from ..frameworks import Framework
from ..settings import config
from .bind import PREPARED
from .prepare import PREPARED_LIMIT, Prepared
from .results import AttentionOutput
from .run import Call, take_workspace

Array = Any


class At:
    """All that a launch reads of an array."""

    __slots__ = ("ptr",)

    def __init__(self, ptr: int) -> None:
        self.ptr = ptr


class Warm(NamedTuple):
    """A call that is not unusual: what it is found by, and where its arrays lie."""

    key: tuple[Any, ...]
    at: dict[str, At]


class Runner:
    """One kind of call on one device, run again and again on other addresses."""

    __slots__ = ("aux", "extents", "framework", "index", "plan", "prepared", "workspace")

    def __init__(self, call: Call) -> None:
        prepared = call.prepared
        self.framework: Framework = call.framework
        self.prepared: Prepared = prepared
        self.plan, self.index, self.workspace = prepared.plan, prepared.device[1], prepared.workspace()
        self.aux = prepared.aux
        self.extents = {name: view.extent for name, view in call.views.items()}

    def overlaps(self, at: dict[str, At]) -> bool:
        """Whether `out`, which is given, may share memory with another array: their ranges say so."""
        before, behind = self.extents["out"]
        begin, end = at["out"].ptr - before, at["out"].ptr + behind
        for name, x in at.items():
            before, behind = self.extents[name]
            if name != "out" and begin < x.ptr + behind and x.ptr - before < end:
                return True
        return False

    def run(self, at: dict[str, At], out: Array | None = None) -> Any:
        """What `attention` returns; `out` is the array among `at`, if there is one."""
        prepared, framework = self.prepared, self.framework
        made: dict[str, TensorView] = {}
        arrays: dict[str, Any] = at
        for name, shape, dtype in prepared.results:
            if name not in at:
                arrays[name] = made[name] = framework.empty(shape, dtype, prepared.device)
        if self.workspace:
            take_workspace(framework, self.workspace, arrays, prepared.device)
        self.plan.launch(arrays, backend="cuda", device=self.index, stream=framework.stream(self.index))
        if out is None:
            out = framework.wrap(made["out"])
        else:
            framework.written(out)
        if not self.aux:
            return out
        named: dict[str, Any] = {name: framework.wrap(made[name]) for name in self.aux}
        return AttentionOutput(out, **named)


_NUMBERS, _NUMBERS_OR_NONE, _INT_OR_NONE = (float, int), (type(None), float, int), (type(None), int)

RUNNERS: dict[tuple[Any, ...], Runner] = {}


def warm(q: Array, k: Array, v: Array, given: tuple[Any, ...]) -> Warm | None:
    """The key and addresses of a call of CuPy arrays; `given`: its keywords in the order of `Arguments`. None where it
    is unusual."""
    (
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k, page_table, scale, causal,
        window_size, softcap, alibi_slopes, sink, score_mod, mask_mod, block_mask, dropout_p, _, _, deterministic,
        split_size, kernel_options, out, aux,
    ) = given  # fmt: skip
    kind = type(q)
    # By type: to a key 1, 1.0 and True are one, and the rules of a call tell them apart.
    if not (
        score_mod is mask_mod is block_mask is kernel_options is None
        and type(dropout_p) is float and dropout_p == 0.0
        and type(k) is kind and type(v) is kind and type(causal) is bool and type(deterministic) is bool
        and type(window_size) is tuple and type(aux) is tuple and type(softcap) in _NUMBERS
        and type(scale) in _NUMBERS_OR_NONE and type(split_size) in _INT_OR_NONE
        and type(max_seqlen_q) in _INT_OR_NONE and type(max_seqlen_k) in _INT_OR_NONE and hasattr(q, "data")
    ):  # fmt: skip
        return None
    data_q: Any = q.data
    data_k: Any = k.data
    data_v: Any = v.data
    at = {"q": At(data_q.ptr), "k": At(data_k.ptr), "v": At(data_v.ptr)}
    low = data_q.ptr | data_k.ptr | data_v.ptr
    key = (
        config.version, kind,
        q.shape, q.strides, q.dtype, data_q.device_id, k.shape, k.strides, k.dtype, data_k.device_id,
        v.shape, v.strides, v.dtype, data_v.device_id,
        max_seqlen_q, max_seqlen_k, scale, causal, window_size, softcap, deterministic, split_size, aux,
    )  # fmt: skip
    if out is not None or not (
        cu_seqlens_q is cu_seqlens_k is seqused_q is seqused_k is page_table is alibi_slopes is sink is None
    ):
        for name, x in (
            ("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k), ("seqused_q", seqused_q),
            ("seqused_k", seqused_k), ("page_table", page_table), ("alibi_slopes", alibi_slopes), ("sink", sink),
            ("out", out),
        ):  # fmt: skip
            if x is not None:
                if type(x) is not kind:
                    return None
                data = x.data
                at[name] = At(data.ptr)
                key += (name, x.shape, x.strides, x.dtype, data.device_id, data.ptr & 3)
        if out is not None:
            low |= at["out"].ptr
    return Warm((*key, low & 15), at)


def found(call: Warm) -> Runner | None:
    try:
        return RUNNERS.get(call.key)
    except TypeError:  # something no key can hold, such as an array for the scale: the full way will name it
        return None


def keep(call: Warm, bound: Call) -> None:
    """Makes a runner of a call that has gone the full way."""
    if bound.prepared.backend != "cuda" or bound.uploads or config.check or "dropout_mask" in bound.prepared.aux:
        return
    if len(RUNNERS) >= PREPARED_LIMIT:
        RUNNERS.clear()
    RUNNERS[call.key] = Runner(bound)


def forget() -> None:
    """Forgets every runner and what calls were prepared: the next call of each kind is planned anew."""
    RUNNERS.clear()
    PREPARED.clear()
