"""Ready-made masks."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import ArgumentError, require
from ..trace.tracer import mod, static
from .documents import documents_of_ids, documents_of_offsets
from .given import MOST, from_list, integers, is_array, pair, require_int, require_integers
from .parts import Array, Mask, all_with_lengths, named_as_needed, ready_made, with_lengths

_MOST_PRINTED = 2**22


@ready_made
def causal() -> Mask:
    """A query sees the keys up to its own position: kv_idx <= p(q_idx).

    >>> visible(causal(), 3, 5)
    111..
    1111.
    11111
    """

    def causal_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any, q_len: Any, kv_len: Any) -> Any:
        return kv_idx <= q_idx + (kv_len - q_len)

    return mod(causal_mask)


@ready_made
def sliding_window(left: int | None, right: int | None = 0) -> Mask:
    """The keys from `left` before to `right` after a query's position: p - left <= kv_idx <= p + right.

    -1 or None: without limit on that side. Longformer (Beltagy et al. 2020), Mistral.

    >>> visible(sliding_window(1, 1), 4, 4)
    11..
    111.
    .111
    ..11
    """
    left, right = _side("left", left), _side("right", right)
    no_left, no_right = left < 0, right < 0

    def sliding_window_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any, q_len: Any, kv_len: Any) -> Any:
        position = q_idx + (kv_len - q_len)
        if no_left:
            return kv_idx >= 0 if no_right else kv_idx <= position + right
        if no_right:
            return kv_idx >= position - left
        return (kv_idx >= position - left) & (kv_idx <= position + right)

    return mod(sliding_window_mask)


def _side(name: str, x: Any) -> int:
    """How far a window reaches to one side; -1: without limit, as further than any key is, too."""
    if x is None:
        return -1
    require(
        isinstance(x, (int, np.integer)) and not isinstance(x, bool) and int(x) >= -1,
        f"{name}={x!r} must be an int from 0, or -1 or None for no limit",
    )
    return int(x) if int(x) <= MOST else -1


@ready_made
def prefix_lm(prefix_length: Array) -> Mask:
    """Every query sees the prefix; behind it attention is causal: (kv_idx < prefix_length) | (kv_idx <= p).

    prefix_length   an int, an integer array [batch], or one of no dimensions. T5 and UniLM (Raffel et al. 2020).

    >>> visible(prefix_lm(2), 3, 3)
    11.
    11.
    111
    """
    prefix_length = from_list("prefix_length", prefix_length, "[batch] or no dimensions")
    if is_array(prefix_length):
        require_integers("prefix_length", prefix_length, (0, 1), "[batch] or no dimensions")
    else:
        prefix_length = require_int("prefix_length", prefix_length, 0)
    by_batch = is_array(prefix_length) and len(prefix_length.shape) == 1

    def prefix_lm_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any, q_len: Any, kv_len: Any) -> Any:
        prefix = prefix_length[b] if by_batch else prefix_length
        return (kv_idx < prefix) | (kv_idx <= q_idx + (kv_len - q_len))

    return mod(prefix_lm_mask)


@ready_made
def document(
    ids: Array | None = None,
    *,
    kv_ids: Array | None = None,
    cu_seqlens: Array | None = None,
    total: int | None = None,
    mask_mod: Mask | None = None,
) -> Mask:
    """A query sees the keys of its own document, of those among them that `mask_mod` shows.

    ids         integers [len] or [batch, len]: the document of each token, ids[q_idx] == ids[kv_idx]
    kv_ids      those of the keys, where they are others than the queries
    cu_seqlens  instead of ids: integers [documents + 1] from 0, document n has the tokens cu_seqlens[n] to
                cu_seqlens[n + 1]; tokens behind the last see nothing
    total       how many tokens there are, beside cu_seqlens; None: its last entry, for which a device is waited for
    mask_mod    gets indices counted from the document's beginning, and the document's length as q_len and kv_len. The
                tokens of a document must stand together then, and queries and keys be the same tokens

    ids are read at every call. Where documents begin and end is worked out here, once: with cu_seqlens or mask_mod,
    make the mask anew for other documents. (Packed arrays with `cu_seqlens_q` need no such mask.)

    >>> ids = np.array([0, 0, 1, 1, 1])
    >>> visible(document(ids, mask_mod=causal()), 5, 5)
    1....
    11...
    ..1..
    ..11.
    ..111
    >>> visible(document(cu_seqlens=np.array([0, 1, 3])), 3, 3)
    1..
    .11
    .11
    """
    require(
        (ids is None) != (cu_seqlens is None),
        "document takes either ids, the document of each token, or cu_seqlens, where each begins: pass one of them",
    )
    if cu_seqlens is not None:
        require(kv_ids is None, "kv_ids beside cu_seqlens: pass ids and kv_ids")
        starts, ends = documents_of_offsets(integers("cu_seqlens", cu_seqlens, (1,), "[documents + 1]"), total)
        return _within(starts, ends, mask_mod)
    require(total is None, "total beside ids: the ids say how many tokens there are; leave it away")
    ids = integers("ids", ids, (1, 2), "[len] or [batch, len]")
    if kv_ids is None:
        return _same_document(ids, ids) if mask_mod is None else _within(*documents_of_ids(ids), mask_mod)
    require(mask_mod is None, "mask_mod beside kv_ids: pass it beside, with and_masks, where it gets plain indices")
    kv_ids = integers("kv_ids", kv_ids, (1, 2), "[len] or [batch, len]")
    return _same_document(ids, kv_ids)


def _same_document(ids: Array, kv_ids: Array) -> Mask:
    q_batched, kv_batched = len(ids.shape) == 2, len(kv_ids.shape) == 2

    def document_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        of_key = kv_ids[b, kv_idx] if kv_batched else kv_ids[kv_idx]
        return (ids[b, q_idx] if q_batched else ids[q_idx]) == of_key

    return mod(document_mask)


def _within(starts: Array, ends: Array, mask_mod: Mask | None) -> Mask:
    """The keys from starts[q_idx] to ends[q_idx], which are the same for all tokens of a document."""
    batched = len(starts.shape) == 2
    inner = None if mask_mod is None else with_lengths("mask_mod", mask_mod)

    def document_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        start = starts[b, q_idx] if batched else starts[q_idx]
        end = ends[b, q_idx] if batched else ends[q_idx]
        same = (kv_idx >= start) & (kv_idx < end)
        if inner is None:
            return same
        length = end - start
        return same & inner(b, h, q_idx - start, kv_idx - start, length, length)

    return mod(document_mask)


@ready_made
def chunked(size: int) -> Mask:
    """The keys of the query's own chunk of `size` tokens: kv_idx // size == p // size. With causal(), that of Llama 4.

    >>> visible(and_masks(chunked(2), causal()), 4, 4)
    1...
    11..
    ..1.
    ..11
    """
    size = require_int("size", size, 1)

    def chunked_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any, q_len: Any, kv_len: Any) -> Any:
        start = (q_idx + (kv_len - q_len)) // size * size
        return (kv_idx >= start) & (kv_idx < start + size)

    return mod(chunked_mask)


@ready_made
def dilated_window(window: int, dilation: int) -> Mask:
    """Every `dilation`-th key up to `window` away: |p - kv_idx| <= window, and a multiple of dilation. Longformer.

    >>> visible(dilated_window(2, 2), 4, 4)
    1.1.
    .1.1
    1.1.
    .1.1
    """
    window, dilation = require_int("window", window, 0), require_int("dilation", dilation, 1)

    def dilated_window_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any, q_len: Any, kv_len: Any) -> Any:
        distance = q_idx + (kv_len - q_len) - kv_idx
        return (distance <= window) & (distance >= -window) & (distance % dilation == 0)

    return mod(dilated_window_mask)


@ready_made
def natten_1d(kernel: int) -> Mask:
    """The `kernel` keys around a query, moved inwards at the ends so that every query sees as many:

        first = clip(q_idx - kernel // 2, 0, kv_len - kernel),  first <= kv_idx < first + kernel

    Neighborhood attention, Hassani et al. 2023.

    >>> visible(natten_1d(3), 4, 4)
    111.
    111.
    .111
    .111
    """
    kernel = require_int("kernel", kernel, 1)
    half = kernel // 2

    def natten_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any, q_len: Any, kv_len: Any) -> Any:
        first = (q_idx - half).clip(0, None).clip(None, kv_len - kernel)
        return (kv_idx >= first) & (kv_idx < first + kernel)

    return mod(natten_mask)


@ready_made
def natten_2d(height: int, width: int, kernel: int | tuple[int, int], tile: tuple[int, int] | None = None) -> Mask:
    """`natten_1d` along both axes of an image of height * width tokens, row by row; kernel one int or (high, wide).

    tile   (high, wide): tokens are stored tile by tile, each row by row, and tiles row by row. More tiles of the kernel
           are empty then. It divides (height, width).

    >>> visible(natten_2d(2, 3, (2, 2)), 6, 6)  # each query sees two rows and two columns
    11.11.
    11.11.
    .11.11
    11.11.
    11.11.
    .11.11
    """
    height, width = require_int("height", height, 1), require_int("width", width, 1)
    kernel_h, kernel_w = pair("kernel", kernel)
    require(
        kernel_h <= height and kernel_w <= width,
        f"kernel=({kernel_h}, {kernel_w}) must fit the image, ({height}, {width}): make it smaller",
    )
    last_y, last_x = height - kernel_h, width - kernel_w
    half_h, half_w = kernel_h // 2, kernel_w // 2
    tiled = tile is not None
    tile_h, tile_w = pair("tile", tile) if tile is not None else (1, 1)
    require(
        height % tile_h == 0 and width % tile_w == 0,
        f"tile=({tile_h}, {tile_w}) must divide the image, ({height}, {width}): pad the image, or leave tile away",
    )
    tile_size, tiles_in_row = tile_h * tile_w, width // tile_w

    def place(i: Any) -> tuple[Any, Any]:
        if not tiled:
            return i // width, i % width
        tile, inside = i // tile_size, i % tile_size
        return tile // tiles_in_row * tile_h + inside // tile_w, tile % tiles_in_row * tile_w + inside % tile_w

    def natten_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        (q_y, q_x), (k_y, k_x) = place(q_idx), place(kv_idx)
        first_y, first_x = (q_y - half_h).clip(0, last_y), (q_x - half_w).clip(0, last_x)
        rows = (k_y >= first_y) & (k_y < first_y + kernel_h)
        return rows & (k_x >= first_x) & (k_x < first_x + kernel_w)

    return mod(natten_mask)


@ready_made
def image_spans(ranges: Array, mask_mod: Mask | None = None) -> Mask:
    """What `mask_mod` shows (None: causal()), and within an image everything: Gemma 3 and its like.

    ranges   integers [q_len, 2] or [batch, q_len, 2]: for each query the first key of its image and the one behind the
             last; (0, 0) for a query of text

    >>> ranges = np.zeros((4, 2), np.int32)
    >>> ranges[1:3] = 1, 3  # tokens 1 and 2 are an image
    >>> visible(image_spans(ranges), 4, 4)
    1...
    111.
    111.
    1111
    """
    ranges = integers("ranges", ranges, (2, 3), "[q_len, 2] or [batch, q_len, 2]")
    require(
        ranges.shape[-1] == 2,
        f"ranges.shape={tuple(ranges.shape)} must be [q_len, 2] or [batch, q_len, 2]: one range for each query",
    )
    batched = len(ranges.shape) == 3
    firsts, behinds = ranges[..., 0], ranges[..., 1]  # along whose last axis queries go: so tiles are told apart
    other = with_lengths("mask_mod", causal() if mask_mod is None else mask_mod)

    def image_spans_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any, q_len: Any, kv_len: Any) -> Any:
        first = firsts[b, q_idx] if batched else firsts[q_idx]
        behind = behinds[b, q_idx] if batched else behinds[q_idx]
        return other(b, h, q_idx, kv_idx, q_len, kv_len) | ((kv_idx >= first) & (kv_idx < behind))

    return mod(image_spans_mask)


@ready_made
def tree(bits: Array) -> Mask:
    """Speculative decoding: the q_len queries are nodes of a tree of drafts, and the last q_len keys are theirs. A node
    sees all keys before those, and of the nodes the ones whose bit is set.

    bits   uint8 or int32, [nodes, words] or [batch, nodes, words], lowest bit first: uint8 as
           `np.packbits(visible, axis=-1, bitorder="little")` makes them from bools [nodes, nodes]

    SpecInfer (Miao et al. 2024), Medusa (Cai et al. 2024).

    >>> parents = [-1, 0, 0, 1]
    >>> sees = np.eye(4, dtype=bool)
    >>> for node, parent in enumerate(parents[1:], 1):
    ...     sees[node] |= sees[parent]
    >>> visible(tree(np.packbits(sees, axis=-1, bitorder="little")), 4, 6)
    111...
    1111..
    111.1.
    1111.1
    """
    bits = integers("bits", bits, (2, 3), "[nodes, words] or [batch, nodes, words]", ("uint8", "int32"))
    batched = len(bits.shape) == 3
    word = static(8 if "uint8" in str(bits.dtype) else 32)

    def tree_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any, q_len: Any, kv_len: Any) -> Any:
        node = kv_idx - (kv_len - q_len)
        place = node.clip(None, q_len - 1).clip(0, None)
        words = bits[b, q_idx, place // word] if batched else bits[q_idx, place // word]
        return (node < 0) | ((words >> place % word) & 1 != 0)

    return mod(tree_mask)


def noop_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    """Every query sees every key."""
    return kv_idx >= 0


@ready_made
def and_masks(*mask_mods: Mask) -> Mask:
    """The keys that all of the masks show; of none: every key.

    >>> visible(and_masks(causal(), not_mask(lambda b, h, q_idx, kv_idx: kv_idx == 1)), 3, 3)
    1..
    1..
    1.1
    """
    if not mask_mods:
        return noop_mask
    first, *others = all_with_lengths(mask_mods)

    def and_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any, q_len: Any = None, kv_len: Any = None) -> Any:
        seen = first(b, h, q_idx, kv_idx, q_len, kv_len)
        for mask in others:
            seen = seen & mask(b, h, q_idx, kv_idx, q_len, kv_len)
        return seen

    return named_as_needed(and_mask, mask_mods)


@ready_made
def or_masks(*mask_mods: Mask) -> Mask:
    """The keys that any of the masks shows; of none: no key.

    >>> visible(or_masks(sliding_window(0, 0), lambda b, h, q_idx, kv_idx: kv_idx < 1), 3, 3)
    1..
    11.
    1.1
    """
    if not mask_mods:
        return not_mask(noop_mask)
    first, *others = all_with_lengths(mask_mods)

    def or_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any, q_len: Any = None, kv_len: Any = None) -> Any:
        seen = first(b, h, q_idx, kv_idx, q_len, kv_len)
        for mask in others:
            seen = seen | mask(b, h, q_idx, kv_idx, q_len, kv_len)
        return seen

    return named_as_needed(or_mask, mask_mods)


@ready_made
def not_mask(mask_mod: Mask) -> Mask:
    """The keys that the mask hides."""
    (inner,) = all_with_lengths((mask_mod,))

    def inverted_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any, q_len: Any = None, kv_len: Any = None) -> Any:
        return ~inner(b, h, q_idx, kv_idx, q_len, kv_len)

    return named_as_needed(inverted_mask, (mask_mod,))


def visible(mask_mod: Mask, q_len: int, kv_len: int, b: int = 0, h: int = 0) -> None:
    """Prints which keys each query sees: a line for each query, 1 for each key that it sees.

    Raises `ArgumentError` for more than 2**22 characters.

    >>> visible(sliding_window(1), 2, 3)
    11.
    .11
    """
    given = (("q_len", q_len), ("kv_len", kv_len), ("b", b), ("h", h))
    q_len, kv_len, b, h = (require_int(name, n, 0) for name, n in given)
    require(
        max(q_len, 1) * max(kv_len, 1) <= _MOST_PRINTED,
        f"visible prints a character for each of q_len={q_len} x kv_len={kv_len} pairs, and {_MOST_PRINTED} is the "
        "most: pass smaller lengths, or print(create_block_mask(...)), whose characters are blocks",
    )
    q_idx, kv_idx = np.arange(q_len, dtype=np.int32)[:, None], np.arange(kv_len, dtype=np.int32)
    try:
        seen = with_lengths("mask_mod", mask_mod)(np.int32(b), np.int32(h), q_idx, kv_idx, q_len, kv_len)
        rows = np.broadcast_to(np.asarray(seen), (q_len, kv_len))
    except ArgumentError:
        raise
    except Exception as error:  # the function's own: the user wrote it
        raise ArgumentError(
            f"mask_mod={mask_mod!r} must be a function f(b, h, q_idx, kv_idx) -> bool, and with q_len={q_len}, "
            f"kv_len={kv_len}, b={b}, h={h} it raised {type(error).__name__}: {error}"
        ) from error
    for row in rows:
        print("".join("1" if x else "." for x in row))
