"""A call of a framework that compiles programs: it knows shapes when it traces a call, and memory when it runs one."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import frameworks
from ..array import TensorView
from ..trace.expr import Mods
from ..trace.tracer import Bound
from .arguments import LENGTHS, Backward
from .device_checks import check_indices
from .length_checks import check_lengths
from .mods import fold_in
from .prepare import Prepared, prepare
from .run import Call
from .views import lengths_view


def prepare_traced(
    framework: Any,
    views: dict[str, TensorView],
    *,
    backend: str,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    scale: float | None,
    window_size: tuple[int, int],
    softcap: float,
    dropout_p: float,
    aux: tuple[str, ...],
    deterministic: bool,
    grads: tuple[str, ...],
    mods: Mods | None,
    split_size: int | None,
) -> Prepared:
    """Checks and plans a call (with `dout` among the views: its backward) by views without memory, aligned to 16."""
    backward = Backward({}, {}, deterministic, grads) if "dout" in views else None
    if mods is not None:
        mods, _, softcap = fold_in(Bound(mods), views, softcap)
    return prepare(
        framework, views, (), 0, scale, False, window_size, softcap, max_seqlen_q, max_seqlen_k, aux, mods,
        dropout_p, (), backward, backend, split_size,
    )  # fmt: skip


def execute_traced(
    framework: Any, views: dict[str, TensorView], prepared: Prepared, scalars: tuple[int | float, ...]
) -> None:
    """Runs it. The views hold results, and workspace on a GPU, too."""
    if prepared.device[0] == "cpu":
        check_lengths(views, {name: x.as_numpy() for name, x in views.items() if name in LENGTHS})
    Call(framework, views, uploads={}, prepared=prepared, targets={}, scalars=scalars, random={}).execute()


def known_lengths(views: dict[str, TensorView], given: dict[str, Any]) -> dict[str, np.ndarray]:
    """Checks lengths whose values are known beside q and k, which need no memory -> NumPy arrays."""
    known = {name: lengths_view(frameworks.numpy, x, name).as_numpy() for name, x in given.items()}
    if all(x.ndim == 1 and x.size and x.dtype == np.int32 for x in known.values()):  # else `prepare` refuses them
        check_lengths(views, known)
    return known


def check_known(
    bound: Bound,
    views: dict[str, TensorView],
    arrays: dict[str, np.ndarray],
    scale: float | None,
    window_size: tuple[int, int],
    softcap: float,
) -> None:
    """`check_indices` of a call whose arrays are at hand; its views need no memory."""
    mods, scalars, _ = fold_in(bound, views, softcap)
    lengths = {name: arrays[name] for name in LENGTHS if name in arrays}
    check_indices(mods, scalars, views, lengths, lambda names: {n: arrays[n] for n in names}, window_size, scale)
