"""What the functions under flash-attn's names ask of their arguments, before PyTorch's own operations get them."""

from __future__ import annotations

import importlib
from typing import Any

from ...errors import ArgumentError

torch: Any = importlib.import_module("torch")


def require_tensors(optional: dict[str, Any] | None = None, /, **tensors: Any) -> None:
    """Raise `ArgumentError` unless all are tensors on the device of the first; those of `optional` may be None."""
    first = next(iter(tensors))
    for name, x in (tensors | {name: x for name, x in (optional or {}).items() if x is not None}).items():
        if not isinstance(x, torch.Tensor):
            raise ArgumentError(
                f"{name} is a {type(x).__qualname__}: it must be a torch.Tensor; convert an array by torch.from_dlpack"
            )
        if x.device != tensors[first].device:
            raise ArgumentError(
                f"{name} is on {x.device} and {first} on {tensors[first].device}: all tensors must be on one device; "
                f"pass {name}.to({first}.device)"
            )
