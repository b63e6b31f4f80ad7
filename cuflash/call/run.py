"""Running a call that is bound: allocate results and workspace, launch, or compute in NumPy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import reference
from ..array import Device, TensorView
from ..dtypes import DType
from ..errors import DeviceMemoryError
from ..frameworks import Framework
from ..trace.host import HostMods
from .mods import captured_names
from .prepare import Prepared
from .results import AttentionGrads, AttentionOutput

Array = Any


@dataclass(slots=True)
class Call:
    """One call, bound: its arrays and what was prepared for their metadata."""

    framework: Framework
    views: dict[str, TensorView]
    uploads: dict[str, np.ndarray]  # host values a device kernel needs
    prepared: Prepared
    targets: dict[str, Array]  # arrays of the caller's that results are written to, by name
    scalars: tuple[int | float, ...]  # numbers that mods captured
    random: dict[str, Any]  # ints: seed and offset of dropout, where `views` has no arrays for them

    def run(self) -> Any:
        """attention"""
        self.execute()
        out, aux = self._result("out"), self.prepared.aux
        if not aux:
            return out
        named: dict[str, Any] = {name: self._result(name) for name in aux}
        return AttentionOutput(out, **named)

    def gradients(self) -> AttentionGrads:
        """attention_backward"""
        self.execute()
        found = {name: self._result(name) for name, _, _ in self.prepared.results}
        dcaptured = tuple(found.pop(name, None) for name in self.prepared.dcaptured)
        return AttentionGrads(**found, dcaptured=dcaptured)

    def _result(self, name: str) -> Array:
        x = self.targets.get(name)
        if x is None:
            return self.framework.wrap(self.views[name])
        self.framework.written(x)
        return x

    def execute(self) -> None:
        prepared, framework, views = self.prepared, self.framework, self.views
        device = prepared.device
        upload_all(framework, self.uploads, views, device)
        take_results(framework, prepared.results, views, device)
        take_workspace(framework, prepared.workspace(), views, device)
        plan = prepared.plan
        if plan is None:
            self._run_reference()
            return
        numbers = self.random
        if prepared.mods is not None:
            if prepared.slopes_folded:
                views[f"captured{len(prepared.mods.arrays) - 1}"] = views.pop("alibi_slopes")
            numbers = {**numbers, "scalars": self.scalars}
        prepared.compile()
        on_device = device[0] == "cuda"
        where: dict[str, Any] = {"backend": "emulator"}
        if on_device:
            where = {"backend": "cuda", "device": device[1], "stream": framework.stream(device[1])}
        plan.launch(views, **where, **numbers)
        if "dropout_mask" in prepared.aux:
            from ..ops import dropout_mask

            dropout_mask.run(plan.problem, views, **{"arch": plan.arch, **where, **self.random})
        if on_device:
            framework.retain(views.values(), device[1])

    def _run_reference(self) -> None:
        arrays: dict[str, Any] = {name: view.as_numpy() for name, view in self.views.items()}
        targets = {name: arrays.pop(name) for name, _, _ in self.prepared.results}
        prepared = self.prepared
        arrays |= {"scale": prepared.scale, "window_size": prepared.window, "softcap": prepared.softcap}
        arrays |= {"dropout_p": prepared.dropout_p, **self.random}
        mods = None
        if prepared.mods is not None:
            captured = [arrays.pop(name) for name in captured_names(prepared.mods, arrays)]
            wanted = [i for i in range(len(captured)) if f"dcaptured{i}" in targets]
            mods = HostMods(prepared.mods, captured, self.scalars, wanted)
            arrays |= mods.functions
        arrays |= {name: int(arrays[name].item()) for name in ("seed", "offset") if name in self.views}
        mask = targets.pop("dropout_mask", None)
        if mask is not None:
            reference.dropout_mask(mask, **arrays)
        if "dout" in arrays:
            results = [*zip(_GRADIENTS, reference.attention_backward(**arrays), strict=True)]
            if mods is not None:
                results += [(f"dcaptured{slot}", values) for slot, values in mods.gradients.items()]
        else:
            results = [*zip(("out", "lse", "max_logit"), reference.attention(**arrays), strict=True)]
        with np.errstate(all="ignore"):  # what overflows in a 16-bit result is infinite there
            for name, values in results:
                if name in targets:
                    targets[name][...] = values


def upload_all(
    framework: Framework, uploads: dict[str, np.ndarray], views: dict[str, TensorView], device: Device
) -> None:
    """Copies host values to the device, one that goes by several names once."""
    copies: dict[int, TensorView] = {}
    for name, values in uploads.items():
        if id(values) not in copies:
            try:
                copies[id(values)] = framework.upload(values, device)
            except DeviceMemoryError as error:
                raise DeviceMemoryError(f"{name} in host memory is copied to the GPU: {error}") from error
        views[name] = copies[id(values)]


def take_results(
    framework: Framework, results: Iterable[tuple[str, tuple[int, ...], DType]], views: dict[str, TensorView],
    device: Device,
) -> None:  # fmt: skip
    """Allocates the results that are not written into an array of the caller's."""
    for name, shape, dtype in results:
        if name not in views:
            views[name] = framework.empty(shape, dtype, device)


def take_workspace(
    framework: Framework, workspace: Mapping[str, tuple[tuple[int, ...], DType]], views: dict[str, TensorView],
    device: Device,
) -> None:  # fmt: skip
    """Allocates what kernels need beside arguments and results: (shape, dtype) by name."""
    missing = [(name, *what) for name, what in workspace.items() if name not in views]
    taken = {name: framework.empty(shape, dtype, device) for name, shape, dtype in missing}
    if taken:
        views |= taken
        if device[0] == "cuda":
            framework.keep_recorded(taken.values(), device[1])


_GRADIENTS = ("dq", "dk", "dv", "dsink", "dslopes")  # as reference.attention_backward returns them
