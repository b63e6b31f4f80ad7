"""A call planned once, in the caller's hand: `Plan.run` compares what arrays look like, and runs."""

from __future__ import annotations

from typing import Any, NamedTuple

from .. import frameworks
from ..array import TensorView, canonical_strides, contiguous_strides
from ..dtypes import DType
from ..errors import ArgumentError, UnsupportedError, require
from ..frameworks import Framework
from ..settings import config
from ..trace.tracer import Bound
from . import number_checks, runner
from .arguments import Arguments
from .bind import bind
from .mods import bind_mods
from .views import views_of

Array = Any


class Likeness(NamedTuple):
    """What an array must be for a plan."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: DType
    device: tuple[str, int]

    @classmethod
    def of(cls, view: TensorView) -> Likeness:
        return cls(view.shape, view.strides, view.dtype, view.device)


class _Warm(NamedTuple):
    """What a run takes where nothing has changed since another went the full way."""

    runner: runner.Runner
    version: int  # of the settings
    type: type
    low: int  # low bits of addresses
    raw: tuple[Any, ...]
    at: dict[str, runner.At]  # arrays among the keywords


_ARRAYS = ("q", "k", "v", "out")


def _raw(q: Array, k: Array, v: Array, out: Array) -> tuple[Any, ...]:
    """What CuPy arrays say of themselves."""
    return (
        q.shape, q.strides, q.dtype, q.data.device_id, k.shape, k.strides, k.dtype, k.data.device_id,
        v.shape, v.strides, v.dtype, v.data.device_id, out.shape, out.strides, out.dtype, out.data.device_id,
    )  # fmt: skip


class Plan:
    """One kind of call: `run` is `attention` of other arrays that look like those it was made for.

    Made by `cuflash.plan`. Threads may share it. It holds the arrays among the keywords (lengths, pages, slopes, sink,
    what mods captured), which are read anew at each run, and none of q, k and v.
    """

    def __init__(self, q: Array, k: Array, v: Array, arguments: Arguments) -> None:
        framework = frameworks.of(q)
        if arguments.out is not None or number_checks.aux_names(arguments.aux):
            raise ArgumentError("out= and aux= are not taken by plan: run(q, k, v, out) writes out, and nothing else")
        if framework is frameworks.jax:
            raise UnsupportedError("JAX arrays are immutable, and a plan writes to out: call attention under jax.jit")
        number_checks.flag("deterministic", arguments.deterministic)
        self._framework: Framework = framework
        self._warm: _Warm | None = None
        self._arguments = arguments
        self._refuse_watched(q, k, v)
        bound = self._bind_mods(q, k)
        call = bind(q, k, v, arguments, bound)
        if call.prepared.plan is not None:
            call.prepared.compile()
        self._likeness = {name: Likeness.of(call.views[name]) for name in "qkv"}
        ((_, shape, dtype),) = call.prepared.results
        strides = canonical_strides(shape, contiguous_strides(shape))
        self._likeness["out"] = Likeness(shape, strides, dtype, call.prepared.device)

    def __repr__(self) -> str:
        arrays = ", ".join(f"{name} {x.dtype}{list(x.shape)}" for name, x in self._likeness.items())
        return f"Plan({arrays})"

    def run(self, q: Array, k: Array, v: Array, out: Array) -> Array:
        """Computes out, an array of the result's shape and dtype, contiguous, and returns it.

        Raises `ArgumentError` where an array's shape, strides, dtype or device is another than the plan's.
        """
        warm = self._warm
        if (
            warm is not None
            and warm.version == config.version
            and type(q) is type(k) is type(v) is type(out) is warm.type
        ):
            at = {name: runner.At(x.data.ptr) for name, x in zip(_ARRAYS, (q, k, v, out), strict=True)}
            low = (at["q"].ptr | at["k"].ptr | at["v"].ptr | at["out"].ptr) & 15
            if low == warm.low and _raw(q, k, v, out) == warm.raw:
                at |= warm.at
                if not warm.runner.overlaps(at):
                    return warm.runner.run(at, out)
        self._refuse_watched(q, k, v, out)
        self._compare({"q": q, "k": k, "v": v, "out": out})
        given = self._arguments._replace(out=out)
        call = bind(q, k, v, given, self._bind_mods(q, k))
        call.run()
        if self._framework is frameworks.cupy and (usual := runner.warm(q, k, v, given)) is not None:
            runner.keep(usual, call)
            self._keep(usual, runner.found(usual), q, k, v, out)
        return out

    def _keep(self, usual: runner.Warm, found: runner.Runner | None, q: Array, k: Array, v: Array, out: Array) -> None:
        """The runner that the next run takes."""
        if found is None:
            return
        low = (usual.at["q"].ptr | usual.at["k"].ptr | usual.at["v"].ptr | usual.at["out"].ptr) & 15
        fixed = {name: x for name, x in usual.at.items() if name not in _ARRAYS}
        self._warm = _Warm(found, config.version, type(q), low, _raw(q, k, v, out), fixed)

    def _bind_mods(self, q: Array, k: Array) -> Bound | None:
        given = self._arguments
        return bind_mods(q, k, given.score_mod, given.mask_mod, given.block_mask) if given.has_mods else None

    def _refuse_watched(self, *arrays: Array) -> None:
        given = self._arguments
        if self._framework.looks_on(*arrays, given.alibi_slopes, given.sink, *given.lengths):
            raise UnsupportedError(
                "a plan has no gradient, and nothing may trace or compile it: make it and run it under "
                "torch.no_grad(), or call attention"
            )

    def _compare(self, arrays: dict[str, Array]) -> None:
        for name, view in views_of(self._framework, arrays).items():
            wanted = self._likeness[name]
            for what, is_one, must in zip(Likeness._fields, Likeness.of(view), wanted, strict=True):
                require(
                    is_one == must,
                    f"{name}.{what}={is_one} must be {must}, as when the plan was made: make another with cuflash.plan "
                    "for such arrays, or call attention, which takes any",
                )
