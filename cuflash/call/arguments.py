"""The one record of a call's keywords. Faces make it; binding, `explain`, the frameworks' operations take it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..errors import ArgumentError, UnsupportedError
from . import number_checks
from .refusals import UNSUPPORTED

Array = Any  # of NumPy, CuPy, PyTorch, JAX or any other producer of DLPack
IndexArray = Any  # int32 [n] of the same framework, or a list, tuple or NumPy array

MODS = ("score_mod", "mask_mod", "block_mask")
LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")


class Arguments(NamedTuple):
    """The keywords of `attention`, in its signature's order and with its defaults; its docstring says what they are."""

    cu_seqlens_q: IndexArray | None = None
    cu_seqlens_k: IndexArray | None = None
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None
    seqused_q: IndexArray | None = None
    seqused_k: IndexArray | None = None
    page_table: IndexArray | None = None
    scale: float | None = None
    causal: bool = False
    window_size: tuple[int | None, int | None] = (-1, -1)
    softcap: float = 0.0
    alibi_slopes: Array | None = None
    sink: Array | None = None
    score_mod: Callable[..., Any] | None = None
    mask_mod: Callable[..., Any] | None = None
    block_mask: Any = None
    dropout_p: float = 0.0
    seed: Any = None
    offset: Any = 0
    deterministic: bool = False
    split_size: int | None = None
    kernel_options: dict[str, Any] | None = None
    out: Array | None = None
    aux: Sequence[str] = ()

    @property
    def has_mods(self) -> bool:
        return not (self.score_mod is self.mask_mod is self.block_mask is None)

    @property
    def lengths(self) -> tuple[Any, ...]:
        """What says where sequences lie, as given."""
        return self.cu_seqlens_q, self.cu_seqlens_k, self.seqused_q, self.seqused_k, self.page_table


def normalised(arguments: Arguments) -> Arguments:
    """Plain values checked and in one form, causal folded into the window, as operations of frameworks take them."""
    return arguments._replace(
        max_seqlen_q=number_checks.hint("max_seqlen_q", arguments.max_seqlen_q),
        max_seqlen_k=number_checks.hint("max_seqlen_k", arguments.max_seqlen_k),
        scale=None if arguments.scale is None else number_checks.number("scale", arguments.scale),
        causal=False,
        window_size=number_checks.window(arguments.window_size, arguments.causal),
        softcap=number_checks.number("softcap", arguments.softcap),
        dropout_p=number_checks.dropout_p(arguments.dropout_p),
        deterministic=number_checks.flag("deterministic", arguments.deterministic),
        split_size=number_checks.split_size(arguments.split_size),
        aux=number_checks.aux_names(arguments.aux),
    )


@dataclass(frozen=True, slots=True)
class Backward:
    """What a call to `attention_backward` has beside the arguments of `attention`."""

    given: dict[str, Array]  # dout, out, lse, dlse
    targets: dict[str, Array]  # of dq, dk and dv those that the caller has memory for
    deterministic: bool
    captured_grads: bool | tuple[str, ...]  # whether of all, or of which: views' names


def options_of(kernel_options: Any) -> tuple[tuple[str, Any], ...]:
    """Checked, and as part of a key."""
    if kernel_options is None:
        return ()
    if not isinstance(kernel_options, dict):
        raise ArgumentError(f"kernel_options is a {type(kernel_options).__qualname__} and must be a dict, or None")
    either = (None, True, False)
    allowed = {"kernel": (None, "sm_80"), "persistent": either, "pack_heads": either, "cluster": (None, 1, 2)}
    allowed["order"] = (None, "long", "position")
    plain = all(value is None or isinstance(value, (str, int, np.bool_)) for value in kernel_options.values())
    if not plain or not all(name in allowed and value in allowed[name] for name, value in kernel_options.items()):
        raise UnsupportedError(f"kernel_options={kernel_options!r}: {UNSUPPORTED['kernel_options']}")
    return tuple(sorted(kernel_options.items()))
