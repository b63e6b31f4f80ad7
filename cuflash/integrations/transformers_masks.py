"""The masks of Hugging Face Transformers: read as rules over positions, handed to a model's layers as a tensor.

Transformers describes a mask by a function of positions and by the padding. `prepare` reads both and returns a
`Mask`: a tensor of the shape that any attention of Transformers would get, so that models and `generate` hand it on,
but one that keeps the rule instead of the elements. A description that is none of the rules below is written out in
full, and so served as well.

Importing this module imports PyTorch; only `transformers.py` does so, inside its functions.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from .. import mods
from ..api import attention
from ..errors import UnsupportedError
from ..packing import cu_seqlens_from

torch: Any = importlib.import_module("torch")


class Packed(NamedTuple):
    """The same attention over sequences end to end, without the tokens that are padding.

    starts_q   int32 [sequences + 1] where the sequences of queries begin
    starts_k   likewise for keys
    places_q   [total_q] which rows of [batch * q_len] the queries are; None: all, in order
    places_k   likewise for keys, of [batch * keys]
    """

    starts_q: Any
    starts_k: Any
    places_q: Any = None
    places_k: Any = None


class Rule(NamedTuple):
    """Which keys a query sees: all that every line here allows.

    causal   none behind its own position; the last query stands at the last of `keys`
    window   (before, after): how many keys on either side of its position; -1: all
    keys     how many of the cache's rows are looked at, from the first; None: all
    kept     bool [batch, keys]: those that are no padding
    ids_q    int32 [batch, q_len] and
    ids_k    int32 [batch, keys]: those of its own document or chunk, which have the same number
    written  bool [batch or 1, heads or 1, q_len, keys]: those marked
    bias     floats of that shape, added to the scores
    packed   the rule in another form, where there is one that costs less
    """

    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    keys: int | None = None
    kept: Any = None
    ids_q: Any = None
    ids_k: Any = None
    written: Any = None
    bias: Any = None
    packed: Packed | None = None

    def attention(self, q: Any, k: Any, v: Any, position_bias: Any = None, **arguments: Any) -> Any:
        """`attention` over dense queries and keys, of which each sees what the rule says.

        position_bias   floats [batch or 1, heads or 1, q_len, k_len] that a layer adds to its scores; None: none
        """
        if self.keys is not None:
            k, v = k[:, : self.keys], v[:, : self.keys]
        arguments |= {"causal": self.causal, "window_size": self.window}
        biases = [x for x in (position_bias, self.bias) if x is not None]
        if not biases and self.kept is self.ids_k is self.written is None:
            return attention(q, k, v, **arguments)
        return self._with_mods(q, k, v, biases, arguments)

    @torch.compiler.disable  # compiled graphs have mods that were traced outside of them, and these are made anew
    def _with_mods(self, q: Any, k: Any, v: Any, biases: list[Any], arguments: dict[str, Any]) -> Any:
        score_mod = mods.compose(*[mods.bias(x) for x in biases]) if biases else None
        return attention(q, k, v, mask_mod=self._mask_mod(), score_mod=score_mod, **arguments)

    def _mask_mod(self) -> Any:
        parts = []
        if self.kept is not None:
            parts.append(_of_keys(self.kept))
        if self.ids_k is not None:
            parts.append(mods.document(self.ids_q, kv_ids=self.ids_k))
        if self.written is not None:
            parts.append(_of_pairs(self.written))
        return None if not parts else parts[0] if len(parts) == 1 else mods.and_masks(*parts)


def _of_keys(kept: Any) -> Any:
    def kept_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return kept[b, kv_idx]

    return kept_mask


def _of_pairs(written: Any) -> Any:
    for_all_b, for_all_h = (n == 1 for n in written.shape[:2])

    def written_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return written[0 if for_all_b else b, 0 if for_all_h else h, q_idx, kv_idx]

    return written_mask


class Mask(torch.Tensor):
    """A mask of bools, [batch, 1, q_len, k_len], that has a `rule` in place of elements.

    It can be handed on and moved between devices. Whatever would read an element raises: a model that does so computes
    attention by itself.
    """

    rule: Rule

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], device: Any, rule: Rule) -> Mask:
        mask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        mask.rule = rule
        return mask

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        aten = torch.ops.aten
        if function in (aten.detach.default, aten.alias.default, aten.clone.default):
            return Mask(args[0].shape, args[0].device, args[0].rule)
        if function is aten._to_copy.default and kwargs.get("dtype") in (None, torch.bool):
            device = kwargs.get("device") or args[0].device
            moved = torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.to(device), args[0].rule)
            return Mask(args[0].shape, device, moved)
        raise UnsupportedError(
            f"{function} of a mask that attn_implementation='cuflash' prepared: the model computes with its mask "
            "instead of handing it to an attention function, so none can be put in place of its own; use "
            "attn_implementation='eager'"
        )

    def __repr__(self, **unused: Any) -> str:
        return f"Mask({tuple(self.shape)}, {self.rule})"


class _Pattern(NamedTuple):
    """A mask function of Transformers, read: see `_pattern`."""

    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    chunk: tuple[int, Any] | None = None  # its size, and [batch] how many columns of padding stand before the first
    sequences: Any = None  # [batch, len] which sequence a token is of
    positions: Any = None  # [batch, len] positions that take the columns' place


@torch.compiler.disable
def prepare(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any,
    kv_offset: int,
    mask_function: Any,
    padding: Any,
    use_vmap: bool,
    device: Any,
) -> Mask:
    """The mask for `q_length` queries from position `q_offset` and `kv_length` keys from `kv_offset`.

    padding   bool [batch, positions], False at what is none of the batch's tokens; None: all are tokens

    It waits for the device to learn whether there is padding, so torch.compile leaves its graph here.
    """
    shape = batch_size, 1, q_length, kv_length
    q_offset = int(q_offset)  # of a static cache a tensor
    first = q_offset - kv_offset  # the queries' first column
    pattern = _pattern(mask_function)
    if pattern is None or not _aligned(pattern, first, q_length, kv_length):
        write = importlib.import_module("transformers.masking_utils").sdpa_mask
        written = write(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
            mask_function=mask_function, attention_mask=padding, allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False, use_vmap=use_vmap, device=device,
        )  # fmt: skip
        return Mask(shape, device, Rule(written=written.contiguous()))
    keys = first + q_length if pattern.causal else kv_length  # a static cache has rows after the queries' own
    queries = slice(first, first + q_length)
    kept = None if padding is None else _columns(padding, kv_offset, keys)
    whole, gapless = (True, True) if kept is None else _read(kept)
    ids = _ids(pattern, kv_offset, keys, device)
    rule = Rule(pattern.causal, pattern.window, keys, None if whole else kept)
    if ids is not None:
        ids = ids.expand(batch_size, -1).contiguous()
        rule = rule._replace(ids_q=ids[:, queries].contiguous(), ids_k=ids)
    if not pattern.causal or q_length == 1:
        # Without causality the queries may be of another sequence than the columns, and then none of them is padding.
        return Mask(shape, device, rule)
    if whole and ids is not None and q_length == keys:
        rule = rule._replace(packed=_runs(ids))
    elif rule.kept is not None and ids is None and torch.is_grad_enabled() and (gapless or pattern.window == (-1, -1)):
        rule = rule._replace(packed=_unpadded(rule.kept, rule.kept[:, queries]))
    return Mask(shape, device, rule)


def _unpadded(kept: Any, kept_q: Any) -> Packed:
    """Sequences of the tokens that `kept`, bool [batch, keys], and `kept_q`, bool [batch, q_len], mark.

    For training alone: a query that is padding gets 0, which no loss reads, but `generate` reads the last query even
    where it is padding.
    """
    places_q, places_k = (x.flatten().nonzero().flatten() for x in (kept_q, kept))
    return Packed(cu_seqlens_from(mask=kept_q), cu_seqlens_from(mask=kept), places_q, places_k)


def _runs(ids: Any) -> Packed:
    """Sequences of the tokens that stand together in a row and have the same of `ids`, [batch, len]."""
    starts = _changes(ids).flatten().nonzero().flatten()
    starts = torch.cat([starts, starts.new_tensor([ids.numel()])]).to(torch.int32)
    return Packed(starts, starts)


def _changes(x: Any) -> Any:
    """bool [rows, len]: where a row's value is another than before, its first included."""
    first = torch.ones_like(x, dtype=torch.bool)
    first[:, 1:] = x[:, 1:] != x[:, :-1]
    return first


def _aligned(pattern: _Pattern, first: int, q_length: int, kv_length: int) -> bool:
    """Whether the last query can be taken to stand at the last key, as `attention` does."""
    last = first + q_length
    if pattern.causal:
        return first >= 0 and last <= kv_length
    diagonal = pattern.window != (-1, -1) or pattern.chunk is not None or pattern.sequences is not None
    return not diagonal or (first >= 0 and last == kv_length)


def _columns(padding: Any, offset: int, keys: int) -> Any:
    """bool [batch, keys]: the padding of the columns from `offset`, those it does not reach being no tokens."""
    kept = padding[:, offset : offset + keys].to(torch.bool)
    return torch.nn.functional.pad(kept, (0, keys - kept.shape[1])).contiguous()


def _read(kept: Any) -> tuple[bool, bool]:
    """(whether all are kept, whether each row's stand together). Waits for the device."""
    together = (kept[:, 1:] & ~kept[:, :-1]).sum(1) + kept[:, 0] <= 1
    whole, gapless = torch.stack([kept.all(), together.all()]).tolist()
    return whole, gapless


def _ids(pattern: _Pattern, offset: int, keys: int, device: Any) -> Any:
    """int32 [batch or 1, keys], the same in columns of one sequence and chunk; None: there are none of either."""
    positions = pattern.positions
    if positions is None:
        positions = torch.arange(offset, offset + keys, device=device)[None]
    changes = []
    if pattern.sequences is not None:
        changes.append(_changes(pattern.sequences))
    if pattern.chunk is not None:
        size, padding = pattern.chunk
        changes.append(_changes((positions - padding.to(positions.device)[:, None]).div(size, rounding_mode="floor")))
    return None if not changes else torch.stack(torch.broadcast_tensors(*changes)).any(0).cumsum(1, dtype=torch.int32)


# Mask functions -------------------------------------------------------------------------------------------------------


def _pattern(function: Any) -> _Pattern | None:
    """What a mask function of Transformers says; None: something a `_Pattern` has no words for."""
    pattern = _Pattern(causal=function is None)
    for rule, positions in _rules(function, None) if function is not None else ():
        name = getattr(rule, "__qualname__", "").partition(".")[0]
        cells = _cells(rule)
        if getattr(rule, "__module__", "") != "transformers.masking_utils":
            return None
        if positions is not None:
            pattern = pattern._replace(positions=positions)
        if name == "causal_mask_function":
            pattern = pattern._replace(causal=True)
        elif name == "sliding_window_overlay" and cells["sliding_window"] > 0:
            pattern = pattern._replace(window=(cells["sliding_window"] - 1, pattern.window[1]))
        elif name == "sliding_window_bidirectional_overlay" and cells["sliding_window"] >= 0:
            pattern = pattern._replace(window=(cells["sliding_window"],) * 2)
        elif name == "chunked_overlay":
            pattern = pattern._replace(chunk=(cells["chunk_size"], cells["left_padding"]))
        elif name == "packed_sequence_mask_function":
            pattern = pattern._replace(sequences=cells["packed_sequence_mask"])
        elif name != "bidirectional_mask_function":
            return None
    return pattern


def _rules(function: Any, positions: Any) -> Iterator[tuple[Any, Any]]:
    """The functions that `function` is the conjunction of, each with the positions that it is asked about."""
    name = getattr(function, "__qualname__", "")
    if getattr(function, "__module__", "") != "transformers.masking_utils":
        yield function, positions
    elif name.startswith("and_masks."):
        for part in _cells(function)["mask_functions"]:
            yield from _rules(part, positions)
    elif name.startswith("remap_positions_for_packed_sequence."):
        cells = _cells(function)
        yield from _rules(cells["mask_function"], cells["position_ids"])
    else:
        yield function, positions


def _cells(function: Any) -> dict[str, Any]:
    """What a function captured, by name."""
    cells = getattr(function, "__closure__", None) or ()
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells, strict=True)}
