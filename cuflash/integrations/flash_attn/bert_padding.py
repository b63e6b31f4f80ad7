"""`flash_attn.bert_padding`: between padded and packed batches of PyTorch tensors, over `cuflash.packing`.

Gradients flow through every function. Masks are bool or integer, nonzero where a row is kept; `cuflash.packing` says
why floats are refused.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from ... import packing
from ...errors import require
from .tensors import require_tensors

Tensor = Any

torch: Any = importlib.import_module("torch")

# Code imports this name from here. PyTorch brings the same function along for those who lack einops.
rearrange = importlib.import_module("einops" if importlib.util.find_spec("einops") else "functorch.einops").rearrange


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Rows `indices [n]` (int32 or int64) of input [rows, ...] -> [n, ...]."""
    require_tensors(input=input, indices=indices)
    _check_indices(indices, len(input))
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Zeros [first_axis_dim, ...] whose rows `indices [n]` are those of values [n, ...]."""
    require_tensors(values=values, indices=indices)
    _check_indices(indices, first_axis_dim)
    require(
        len(indices) == len(values),
        f"indices.shape={tuple(indices.shape)} must be ({len(values)},), one place for each row of values: pass the "
        "indices that unpad_input returned with them",
    )
    return values.new_zeros((first_axis_dim, *values.shape[1:])).index_copy(0, indices.long(), values)


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """`index_first_axis(input, indices)`, and input itself, whose gradients add up."""
    return index_first_axis(input, indices), input


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The rows of hidden_states [batch, seqlen, ...] that attention_mask [batch, seqlen] keeps, packed.

    Returns (rows [total, ...], indices [total] int64, cu_seqlens [batch + 1] int32, max_seqlen, seqused [batch]
    int32). Rows of unused_mask [batch, seqlen] get a place too, and are not counted in seqused. Waits for the device.
    """
    return packing.unpad_input(hidden_states, attention_mask, unused_mask)


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Rows of hidden_states [batch, seqlen, ...] in which several sequences stand end to end, then padding, packed.

    attention_mask_in_length [batch, seqlen], integer: each row begins with the lengths of its sequences; 0 is none.
    Returns (rows [total, ...], indices [total] int64, cu_seqlens [sequences + 1] int32, max_seqlen). Waits for the
    device.
    """
    given = attention_mask_in_length
    require_tensors(hidden_states=hidden_states, attention_mask_in_length=given)
    require(
        given.ndim == 2 and not given.is_floating_point() and given.dtype != torch.bool,
        f"attention_mask_in_length is {given.dtype} of shape {tuple(given.shape)}: it must be [batch, seqlen] of "
        "integers, the lengths of the sequences in each row; for a mask of ones and zeros call unpad_input",
    )
    lengths, seqlen = given[given != 0], given.shape[1]
    kept = torch.arange(seqlen, device=given.device) < given.sum(1, keepdim=True)
    rows, indices, _, _, _ = packing.unpad_input(hidden_states, kept)
    total, longest = torch.stack([lengths.sum(), lengths.max()]).tolist() if len(lengths) else (0, 0)
    require(
        total == len(rows),
        f"attention_mask_in_length counts {total} tokens, and its rows of seqlen={seqlen} hold {len(rows)} of them: "
        "the lengths in a row must be positive and add up to seqlen at most",
    )
    return rows, indices, packing.cu_seqlens_from(lengths=lengths), longest


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Packed rows [total, ...] back at their `indices [total]` of [batch, seqlen, ...], zero elsewhere."""
    return packing.pad_input(hidden_states, indices, batch, seqlen)


def _check_indices(indices: Tensor, count: int) -> None:
    """Indices [n] from 0 to count - 1; their values are looked at on the host alone."""
    require(
        indices.ndim == 1 and indices.dtype in (torch.int32, torch.int64),
        f"indices are {indices.dtype} of shape {tuple(indices.shape)}: they must be int32 or int64 of one dimension, "
        "as unpad_input returns them",
    )
    if indices.device.type == "cpu" and len(indices) and not torch.compiler.is_compiling():
        low, high = int(indices.min()), int(indices.max())
        require(
            0 <= low and high < count,
            f"indices go from {low} to {high}: they must be from 0 to {count - 1}, rows of batch * seqlen; pass those "
            "that unpad_input returned",
        )
