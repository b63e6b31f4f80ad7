"""Binding a call: its arrays are viewed, and what it needs is found by its metadata, or prepared where that is new.

Nothing about the values of device arrays is looked at, unless `config.check` asks for it.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np

from .. import frameworks
from ..errors import ArgumentError
from ..frameworks import Framework
from ..settings import config
from ..trace.expr import Mods
from ..trace.tracer import Bound
from . import checks, number_checks
from .arguments import Arguments, Backward, options_of
from .device_checks import check_indices, download, read_back
from .length_checks import check_lengths, longest
from .mods import captured_uploads, captured_views, fold_in
from .prepare import PREPARED_LIMIT, Prepared, prepare
from .run import Call
from .views import lengths_view, views_of

Array = Any

PREPARED: dict[tuple[Any, ...], Prepared] = {}


def bind(
    q: Array, k: Array, v: Array, arguments: Arguments, bound: Bound | None = None, backward: Backward | None = None
) -> Call:
    """Views the arrays of a call, finds or makes what its metadata needs, checks what the host knows of its values.

    `bound`: what `bind_mods` made of the mods among the arguments.
    """
    (
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k, page_table, scale, causal,
        window_size, softcap, alibi_slopes, sink, _, _, _, dropout_p, seed, offset, _, split_size, kernel_options, out,
        aux,
    ) = arguments  # fmt: skip
    options = options_of(kernel_options)
    split_size = number_checks.split_size(split_size)
    if not (max_seqlen_q is max_seqlen_k is None):  # arrays of one number enter the key below by their value
        max_seqlen_q = number_checks.hint("max_seqlen_q", max_seqlen_q)
        max_seqlen_k = number_checks.hint("max_seqlen_k", max_seqlen_k)
    framework = frameworks.of(q)
    floats = {"q": q, "k": k, "v": v}
    if alibi_slopes is not None:
        floats["alibi_slopes"] = alibi_slopes
    if sink is not None:
        floats["sink"] = sink
    targets: dict[str, Array] = {}
    if backward is not None:
        targets = backward.targets
        floats |= backward.given
    elif out is not None:
        targets["out"] = out
    floats |= targets
    views = views_of(framework, floats)
    mods: Mods | None = None
    scalars: tuple[int | float, ...] = ()
    if bound is not None:
        if bound.arrays:
            views |= captured_views(framework, bound)
        if type(softcap) is not float or softcap:
            softcap = number_checks.softcap(softcap)
        mods, scalars, softcap = fold_in(bound, views, softcap)
        if backward is not None:
            named = zip(bound.mods.arrays, bound.arrays, strict=True)
            floats |= {slot.name: x for slot, x in named if frameworks.of(x) is framework}
    if backward is not None:
        framework.refuse_transformed(floats)

    host_values: dict[str, np.ndarray] = {}  # lengths whose values the host knows
    plain: list[str] = []  # those given as a list, tuple or NumPy array, which may lie beside device arrays
    if not (cu_seqlens_q is cu_seqlens_k is seqused_q is seqused_k is page_table is None):
        for name, x in (
            ("cu_seqlens_q", cu_seqlens_q),
            ("cu_seqlens_k", cu_seqlens_k),
            ("seqused_q", seqused_q),
            ("seqused_k", seqused_k),
            ("page_table", page_table),
        ):
            if x is not None:
                same = name == "cu_seqlens_k" and x is cu_seqlens_q
                view = views[name] = views["cu_seqlens_q"] if same else lengths_view(framework, x, name)
                if view.device[0] == "cpu":
                    host_values[name] = host_values["cu_seqlens_q"] if same else view.as_numpy()
                if isinstance(x, (list, tuple, np.ndarray)):
                    plain.append(name)
        if max_seqlen_q is None and "cu_seqlens_q" in host_values:
            max_seqlen_q = longest(host_values["cu_seqlens_q"])
        if backward is not None and max_seqlen_k is None and "cu_seqlens_k" in host_values:
            max_seqlen_k = longest(host_values["cu_seqlens_k"])

    random: dict[str, int] = {}
    if type(dropout_p) is not float:
        dropout_p = number_checks.dropout_p(dropout_p)
    if dropout_p:
        dropout_p = number_checks.dropout_p(dropout_p)
        if seed is None:
            if backward is not None:
                raise ArgumentError("seed is None: pass the seed and offset that attention had, or was given")
            seed, offset = framework.draw_seed(views["q"].device)
        seed = framework.seed(seed)
        for name, x in (("seed", seed), ("offset", offset)):
            value = _random_number(name, x, framework)
            if value is None:
                views |= views_of(framework, {name: x})
            else:
                random[name] = value

    vq, vk, vv = views["q"], views["k"], views["v"]
    alignment = vq.ptr | vk.ptr | vv.ptr
    for name in targets:
        alignment |= views[name].ptr
    if backward is not None:
        alignment |= views["dout"].ptr | views["out"].ptr
    alignment &= 15
    if type(causal) is not bool:  # to the key below 1 is True, and the rules tell them apart
        window_size, causal = number_checks.window(window_size, causal), False
    if isinstance(window_size, list):
        window_size = tuple(window_size)
    if type(aux) is not tuple:
        aux = number_checks.aux_names(aux)
    if (
        aux
        and max_seqlen_k is None
        and "cu_seqlens_k" in host_values
        and "dropout_mask" in number_checks.aux_names(aux)
    ):
        max_seqlen_k = longest(host_values["cu_seqlens_k"])
    key = (
        framework.NAME, config.version, alignment,
        vq.shape, vq.strides, vq.dtype.name, vq.device,
        vk.shape, vk.strides, vk.dtype.name, vk.device,
        vv.shape, vv.strides, vv.dtype.name, vv.device,
        scale, causal, window_size, softcap, max_seqlen_q, max_seqlen_k, aux, dropout_p, split_size, mods, options,
    )  # fmt: skip
    if len(views) > 3:
        others = islice(views.items(), 3, None)  # behind q, k and v
        key += (*plain, *[(n, x.shape, x.strides, x.dtype.name, x.device, x.readonly) for n, x in others])
    if backward is not None:
        key += (backward.deterministic, backward.captured_grads)
    try:
        prepared = PREPARED.get(key)
    except TypeError:  # something no key can hold, such as an array for the scale: the checks will name it
        prepared, key = None, None
    if prepared is None:
        prepared = prepare(
            framework, views, plain, alignment, scale, causal, window_size, softcap, max_seqlen_q,
            max_seqlen_k, aux, mods, dropout_p, (*targets,), backward, split_size=split_size, options=options,
        )  # fmt: skip
        if key is not None:
            if len(PREPARED) >= PREPARED_LIMIT:
                PREPARED.clear()
            PREPARED[key] = prepared
    elif targets:
        checks.no_overlap(views, targets)

    uploads: dict[str, np.ndarray] = {}
    on_device = prepared.device[0] == "cuda"
    # Reading back waits for the device, which nothing may under capture.
    checking = config.check and on_device and not framework.capturing(prepared.device[1])
    if checking:
        host_values = {**read_back(framework, views, prepared.device), **host_values}
    if host_values:
        check_lengths(views, host_values)
        if on_device:
            uploads = {n: x for n, x in host_values.items() if views[n].device[0] == "cpu"}
            if uploads and framework.capturing(prepared.device[1]):
                raise ArgumentError(
                    f"{', '.join(uploads)} in host memory cannot enter a CUDA graph, which would replay these very "
                    f"values: copy to the device before the capture and pass that array"
                )
    if on_device and bound is not None and bound.mods.has_single_numbers:
        uploads |= captured_uploads(framework, bound, views, prepared.device)
    if checking and prepared.mods is not None:
        check_indices(
            prepared.mods, scalars, views, host_values, lambda names: download(framework, views, names),
            prepared.window, prepared.scale,
        )  # fmt: skip
    return Call(framework, views, uploads, prepared, targets, scalars, random)


def _random_number(name: str, x: Any, framework: Framework) -> int | None:
    """The value of a seed or offset that the host knows, None for an array of the framework's."""
    if isinstance(x, np.ndarray) and x.size == 1 and x.dtype.kind in "iu" and frameworks.of(x) is not framework:
        x = x.item()
    if isinstance(x, (int, np.integer)):
        return int(x)
    if x is None or isinstance(x, (float, list, tuple, str)):
        raise ArgumentError(f"{name}={x!r} must be an int, or an integer array of one element: pass int({name})")
    return None
