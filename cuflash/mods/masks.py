"""Ready-made masks and scores, to pass as `mask_mod` and `score_mod`, or to build others from.

A mask says which keys a query sees, `f(b, h, q_idx, kv_idx) -> bool`; a score mod changes a score,
`f(score, b, h, q_idx, kv_idx) -> score`. Both may also name `q_len` and `kv_len`, the lengths of the sequence. They are
ordinary Python functions, and so are those below: made of operators alone, they mean the same on the symbols they are
traced with and on arrays.

With unequal lengths, masks here are aligned at the ends, as `causal=True` and `window_size` are: query i stands at key
position

    p(i) = i + kv_len - q_len

so that the last query sees the last key. Numbers and the contents of arrays are read at every call, so that new ones
compile nothing; arrays must be of the framework and on the device of q.

>>> import numpy as np, cuflash
>>> q = np.ones((1, 6, 2, 32), np.float32)
>>> mask = and_masks(causal(), sliding_window(2, 0))
>>> cuflash.attention(q, q, q, mask_mod=mask, score_mod=softcap(30.0)).shape
(1, 6, 2, 32)
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from .errors import ArgumentError, require
from .trace.symbols import call, traced
from .trace.tracer import Mod, static
from .trace.tracer import mod as _mod
from .trace.uncompiled import outside_of_compilers

__all__ = [
    "alibi",
    "and_masks",
    "bias",
    "causal",
    "chunked",
    "compose",
    "dilated_window",
    "document",
    "image_spans",
    "natten_1d",
    "natten_2d",
    "noop_mask",
    "not_mask",
    "or_masks",
    "prefix_lm",
    "relative_bias",
    "sliding_window",
    "softcap",
    "tree",
    "visible",
]

Array = Any  # of NumPy, CuPy, PyTorch or JAX; or a number where the text says so
Mask = Callable[..., Any]  # f(b, h, q_idx, kv_idx[, q_len, kv_len]) -> bool
Score = Callable[..., Any]  # f(score, b, h, q_idx, kv_idx[, q_len, kv_len]) -> score

Maker = TypeVar("Maker", bound=Callable[..., Any])


def _ready_made(make: Maker) -> Maker:
    """A function that makes mods. They are pickled as its name and its arguments; compilers do not look into it."""

    @functools.wraps(make)
    def wrapper(*args: Any, **keywords: Any) -> Any:
        made = make(*args, **keywords)
        if isinstance(made, Mod):
            made.made_by = wrapper, args, keywords
        return made

    wrapper = outside_of_compilers(wrapper)
    return wrapper  # type: ignore[return-value]


# Masks ----------------------------------------------------------------------------------------------------------------


@_ready_made
def causal() -> Mask:
    """A query sees the keys up to its own position: kv_idx <= p(q_idx).

    >>> visible(causal(), 3, 5)
    111..
    1111.
    11111
    """

    def causal_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any, q_len: Any, kv_len: Any) -> Any:
        return kv_idx <= q_idx + (kv_len - q_len)

    return _mod(causal_mask)


@_ready_made
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

    return _mod(sliding_window_mask)


def _side(name: str, x: Any) -> int:
    """How far a window reaches to one side; -1: without limit, as further than any key is, too."""
    if x is None:
        return -1
    require(
        isinstance(x, (int, np.integer)) and not isinstance(x, bool) and int(x) >= -1,
        f"{name}={x!r} must be an int from 0, or -1 or None for no limit",
    )
    return int(x) if int(x) <= _MOST else -1


@_ready_made
def prefix_lm(prefix_length: Array) -> Mask:
    """Every query sees the prefix; behind it attention is causal: (kv_idx < prefix_length) | (kv_idx <= p).

    prefix_length   an int, an integer array [batch], or one of no dimensions. T5 and UniLM (Raffel et al. 2020).

    >>> visible(prefix_lm(2), 3, 3)
    11.
    11.
    111
    """
    prefix_length = _from_list("prefix_length", prefix_length, "[batch] or no dimensions")
    if _is_array(prefix_length):
        _require_integers("prefix_length", prefix_length, (0, 1), "[batch] or no dimensions")
    else:
        prefix_length = _require_int("prefix_length", prefix_length, 0)
    by_batch = _is_array(prefix_length) and len(prefix_length.shape) == 1

    def prefix_lm_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any, q_len: Any, kv_len: Any) -> Any:
        prefix = prefix_length[b] if by_batch else prefix_length
        return (kv_idx < prefix) | (kv_idx <= q_idx + (kv_len - q_len))

    return _mod(prefix_lm_mask)


@_ready_made
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
        starts, ends = _documents_of_offsets(_integers("cu_seqlens", cu_seqlens, (1,), "[documents + 1]"), total)
        return _within(starts, ends, mask_mod)
    require(total is None, "total beside ids: the ids say how many tokens there are; leave it away")
    ids = _integers("ids", ids, (1, 2), "[len] or [batch, len]")
    if kv_ids is None:
        return _same_document(ids, ids) if mask_mod is None else _within(*_documents_of_ids(ids), mask_mod)
    require(mask_mod is None, "mask_mod beside kv_ids: pass it beside, with and_masks, where it gets plain indices")
    kv_ids = _integers("kv_ids", kv_ids, (1, 2), "[len] or [batch, len]")
    return _same_document(ids, kv_ids)


def _same_document(ids: Array, kv_ids: Array) -> Mask:
    q_batched, kv_batched = len(ids.shape) == 2, len(kv_ids.shape) == 2

    def document_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        of_key = kv_ids[b, kv_idx] if kv_batched else kv_ids[kv_idx]
        return (ids[b, q_idx] if q_batched else ids[q_idx]) == of_key

    return _mod(document_mask)


def _within(starts: Array, ends: Array, mask_mod: Mask | None) -> Mask:
    """The keys from starts[q_idx] to ends[q_idx], which are the same for all tokens of a document."""
    batched = len(starts.shape) == 2
    inner = None if mask_mod is None else _with_lengths("mask_mod", mask_mod)

    def document_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        start = starts[b, q_idx] if batched else starts[q_idx]
        end = ends[b, q_idx] if batched else ends[q_idx]
        same = (kv_idx >= start) & (kv_idx < end)
        if inner is None:
            return same
        length = end - start
        return same & inner(b, h, q_idx - start, kv_idx - start, length, length)

    return _mod(document_mask)


@_ready_made
def chunked(size: int) -> Mask:
    """The keys of the query's own chunk of `size` tokens: kv_idx // size == p // size. With causal(), that of Llama 4.

    >>> visible(and_masks(chunked(2), causal()), 4, 4)
    1...
    11..
    ..1.
    ..11
    """
    size = _require_int("size", size, 1)

    def chunked_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any, q_len: Any, kv_len: Any) -> Any:
        start = (q_idx + (kv_len - q_len)) // size * size
        return (kv_idx >= start) & (kv_idx < start + size)

    return _mod(chunked_mask)


@_ready_made
def dilated_window(window: int, dilation: int) -> Mask:
    """Every `dilation`-th key up to `window` away: |p - kv_idx| <= window, and a multiple of dilation. Longformer.

    >>> visible(dilated_window(2, 2), 4, 4)
    1.1.
    .1.1
    1.1.
    .1.1
    """
    window, dilation = _require_int("window", window, 0), _require_int("dilation", dilation, 1)

    def dilated_window_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any, q_len: Any, kv_len: Any) -> Any:
        distance = q_idx + (kv_len - q_len) - kv_idx
        return (distance <= window) & (distance >= -window) & (distance % dilation == 0)

    return _mod(dilated_window_mask)


@_ready_made
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
    kernel = _require_int("kernel", kernel, 1)
    half = kernel // 2

    def natten_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any, q_len: Any, kv_len: Any) -> Any:
        first = (q_idx - half).clip(0, None).clip(None, kv_len - kernel)
        return (kv_idx >= first) & (kv_idx < first + kernel)

    return _mod(natten_mask)


@_ready_made
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
    height, width = _require_int("height", height, 1), _require_int("width", width, 1)
    kernel_h, kernel_w = _pair("kernel", kernel)
    require(
        kernel_h <= height and kernel_w <= width,
        f"kernel=({kernel_h}, {kernel_w}) must fit the image, ({height}, {width}): make it smaller",
    )
    last_y, last_x = height - kernel_h, width - kernel_w
    half_h, half_w = kernel_h // 2, kernel_w // 2
    tiled = tile is not None
    tile_h, tile_w = _pair("tile", tile) if tile is not None else (1, 1)
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

    return _mod(natten_mask)


@_ready_made
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
    ranges = _integers("ranges", ranges, (2, 3), "[q_len, 2] or [batch, q_len, 2]")
    require(
        ranges.shape[-1] == 2,
        f"ranges.shape={tuple(ranges.shape)} must be [q_len, 2] or [batch, q_len, 2]: one range for each query",
    )
    batched = len(ranges.shape) == 3
    firsts, behinds = ranges[..., 0], ranges[..., 1]  # along whose last axis queries go: so tiles are told apart
    other = _with_lengths("mask_mod", causal() if mask_mod is None else mask_mod)

    def image_spans_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any, q_len: Any, kv_len: Any) -> Any:
        first = firsts[b, q_idx] if batched else firsts[q_idx]
        behind = behinds[b, q_idx] if batched else behinds[q_idx]
        return other(b, h, q_idx, kv_idx, q_len, kv_len) | ((kv_idx >= first) & (kv_idx < behind))

    return _mod(image_spans_mask)


@_ready_made
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
    bits = _integers("bits", bits, (2, 3), "[nodes, words] or [batch, nodes, words]", ("uint8", "int32"))
    batched = len(bits.shape) == 3
    word = static(8 if "uint8" in str(bits.dtype) else 32)

    def tree_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any, q_len: Any, kv_len: Any) -> Any:
        node = kv_idx - (kv_len - q_len)
        place = node.clip(None, q_len - 1).clip(0, None)
        words = bits[b, q_idx, place // word] if batched else bits[q_idx, place // word]
        return (node < 0) | ((words >> place % word) & 1 != 0)

    return _mod(tree_mask)


def noop_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    """Every query sees every key."""
    return kv_idx >= 0


@_ready_made
def and_masks(*mask_mods: Mask) -> Mask:
    """The keys that all of the masks show; of none: every key.

    >>> visible(and_masks(causal(), not_mask(lambda b, h, q_idx, kv_idx: kv_idx == 1)), 3, 3)
    1..
    1..
    1.1
    """
    if not mask_mods:
        return noop_mask
    first, *others = _all_with_lengths(mask_mods)

    def and_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any, q_len: Any = None, kv_len: Any = None) -> Any:
        seen = first(b, h, q_idx, kv_idx, q_len, kv_len)
        for mask in others:
            seen = seen & mask(b, h, q_idx, kv_idx, q_len, kv_len)
        return seen

    return _named_as_needed(and_mask, mask_mods)


@_ready_made
def or_masks(*mask_mods: Mask) -> Mask:
    """The keys that any of the masks shows; of none: no key.

    >>> visible(or_masks(sliding_window(0, 0), lambda b, h, q_idx, kv_idx: kv_idx < 1), 3, 3)
    1..
    11.
    1.1
    """
    if not mask_mods:
        return not_mask(noop_mask)
    first, *others = _all_with_lengths(mask_mods)

    def or_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any, q_len: Any = None, kv_len: Any = None) -> Any:
        seen = first(b, h, q_idx, kv_idx, q_len, kv_len)
        for mask in others:
            seen = seen | mask(b, h, q_idx, kv_idx, q_len, kv_len)
        return seen

    return _named_as_needed(or_mask, mask_mods)


@_ready_made
def not_mask(mask_mod: Mask) -> Mask:
    """The keys that the mask hides."""
    (inner,) = _all_with_lengths((mask_mod,))

    def inverted_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any, q_len: Any = None, kv_len: Any = None) -> Any:
        return ~inner(b, h, q_idx, kv_idx, q_len, kv_len)

    return _named_as_needed(inverted_mask, (mask_mod,))


# Scores ---------------------------------------------------------------------------------------------------------------


@_ready_made
def alibi(slopes: Array) -> Score:
    """score - slope * |p(q_idx) - kv_idx|: attention with linear biases, Press et al. 2022.

    slopes   floats [heads] or [batch, heads], which may receive a gradient; or the number of heads: then the paper's,
             2 ** (-8 * (h + 1) / heads)

    >>> alibi(np.array([1.0, 0.5]))(0.0, 0, np.array([0, 1]), 2, 0, 3, 3)
    array([-2., -1.])
    """
    if not _is_array(slopes):
        require(
            isinstance(slopes, (int, np.integer)),
            f"slopes={slopes!r} must be an array, [heads] or [batch, heads], or the number of heads",
        )
        heads = _require_int("slopes", slopes, 1)

        def alibi_of_heads(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any, q_len: Any, kv_len: Any) -> Any:
            return score - 2.0 ** (-8.0 * (h + 1) / heads) * abs(q_idx + (kv_len - q_len) - kv_idx)

        return _mod(alibi_of_heads)
    _require_ndim("slopes", slopes, (1, 2), "[heads] or [batch, heads]")
    batched = len(slopes.shape) == 2

    def alibi_score(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any, q_len: Any, kv_len: Any) -> Any:
        slope = slopes[b, h] if batched else slopes[h]
        return score - slope * abs(q_idx + (kv_len - q_len) - kv_idx)

    return _mod(alibi_score)


@_ready_made
def softcap(cap: Array, approximate: bool = False) -> Score:
    """cap * tanh(score / cap): scores stay between -cap and cap, as in Gemma 2.

    cap           a number or an array of no dimensions, which may receive a gradient
    approximate   by the tanh of the hardware, with a relative error of about 2 ** -11, on GPUs

    >>> softcap(2.0)(np.array([0.0, 100.0]), 0, 0, 0, 0)
    array([0., 2.])
    """
    if _is_array(cap):
        _require_ndim("cap", cap, (0,), "no dimensions: one number")
    else:
        require(
            isinstance(cap, (int, float, np.integer, np.floating)) and bool(0 < cap <= _LARGEST),
            f"cap={cap!r} must be a positive number, at most {_LARGEST:.4g}; for no cap leave the mod away",
        )
    require(
        isinstance(approximate, (bool, np.bool_)),
        f"approximate is a {type(approximate).__qualname__} and must be True or False: pass bool(approximate)",
    )

    def softcap_score(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return cap * _tanh(score / cap, approximate)

    return _mod(softcap_score)


@_ready_made
def relative_bias(table: Array) -> Score:
    """score + table[h, clip(kv_idx - p, -R, R) + R]: a bias learned for each distance, Shaw et al. 2018.

    table   floats [heads, 2 R + 1] or [2 R + 1], which may receive a gradient; distances beyond R share the ends

    >>> score = relative_bias(np.array([10.0, 20.0, 30.0]))
    >>> score(1.0, 0, 0, np.array([0, 1, 2]), np.array([2, 1, 0]), 3, 3)
    array([31., 21., 11.])
    """
    _require_ndim("table", table, (1, 2), "[heads, 2 R + 1] or [2 R + 1]")
    entries = int(table.shape[-1])
    require(
        entries % 2 == 1,
        f"table.shape={tuple(table.shape)} must end in an odd number, 2 R + 1: a bias for each distance from -R to R",
    )
    furthest = entries // 2
    by_head = len(table.shape) == 2

    def relative_score(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any, q_len: Any, kv_len: Any) -> Any:
        # In this order, so that the index is seen to be no negative one.
        distance = (kv_idx - (q_idx + (kv_len - q_len)) + furthest).clip(None, 2 * furthest).clip(0, None)
        return score + (table[h, distance] if by_head else table[distance])

    return _mod(relative_score)


@_ready_made
def bias(values: Array) -> Score:
    """score + values[b, h, q_idx, kv_idx], of floats that may receive a gradient.

    values   [q_len, kv_len], [heads, q_len, kv_len] or [batch, heads, q_len, kv_len]; where an axis has one element, it
             serves all

    >>> score = bias(np.arange(4.0).reshape(1, 4))  # one row for all queries
    >>> score(np.zeros(4), 0, 0, 7, np.arange(4))
    array([0., 1., 2., 3.])
    """
    _require_ndim("values", values, (2, 3, 4), "[[[batch,] heads,] q_len, kv_len]")
    shape = (1,) * (4 - len(values.shape)) + tuple(values.shape)
    for_all_b, for_all_h, for_all_q, for_all_k = (n == 1 for n in shape)
    ndim_is_2, ndim_is_3 = len(values.shape) == 2, len(values.shape) == 3

    def bias_score(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        b, h = 0 if for_all_b else b, 0 if for_all_h else h
        q_idx, kv_idx = 0 if for_all_q else q_idx, 0 if for_all_k else kv_idx
        if ndim_is_2:
            return score + values[q_idx, kv_idx]
        return score + (values[h, q_idx, kv_idx] if ndim_is_3 else values[b, h, q_idx, kv_idx])

    return _mod(bias_score)


@_ready_made
def compose(*score_mods: Score) -> Score:
    """One score mod after the other, the first first.

    >>> double = lambda score, b, h, q_idx, kv_idx: 2 * score
    >>> compose(double, softcap(1.0))(np.array([50.0]), 0, 0, 0, 0)
    array([1.])
    """
    steps = _all_with_lengths(score_mods)

    def composed_score(
        score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any, q_len: Any = None, kv_len: Any = None
    ) -> Any:
        for step in steps:
            score = step(score, b, h, q_idx, kv_idx, q_len, kv_len)
        return score

    return _named_as_needed(composed_score, score_mods)


def visible(mask_mod: Mask, q_len: int, kv_len: int, b: int = 0, h: int = 0) -> None:
    """Prints which keys each query sees: a line for each query, 1 for each key that it sees.

    Raises `ArgumentError` for more than 2**22 characters.

    >>> visible(sliding_window(1), 2, 3)
    11.
    .11
    """
    given = (("q_len", q_len), ("kv_len", kv_len), ("b", b), ("h", h))
    q_len, kv_len, b, h = (_require_int(name, n, 0) for name, n in given)
    require(
        max(q_len, 1) * max(kv_len, 1) <= _MOST_PRINTED,
        f"visible prints a character for each of q_len={q_len} x kv_len={kv_len} pairs, and {_MOST_PRINTED} is the "
        "most: pass smaller lengths, or print(create_block_mask(...)), whose characters are blocks",
    )
    q_idx, kv_idx = np.arange(q_len, dtype=np.int32)[:, None], np.arange(kv_len, dtype=np.int32)
    try:
        seen = _with_lengths("mask_mod", mask_mod)(np.int32(b), np.int32(h), q_idx, kv_idx, q_len, kv_len)
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


# Parts ----------------------------------------------------------------------------------------------------------------


def _parameters(f: Any) -> tuple[str, ...]:
    f = getattr(f, "function", f)
    try:
        return tuple(inspect.signature(f).parameters)
    except (TypeError, ValueError):  # of C: those have no names to look at
        return ()


def _with_lengths(name: str, f: Any) -> Any:
    """`f` that takes q_len and kv_len behind its other arguments, whether it wants them or not."""
    if not callable(f):
        raise ArgumentError(f"{name}={f!r} must be a function")
    names = _parameters(f)
    wants_q, wants_k = "q_len" in names, "kv_len" in names

    def call(*arguments: Any) -> Any:
        *places, q_len, kv_len = arguments
        if wants_q and wants_k:
            return f(*places, q_len=q_len, kv_len=kv_len)
        if wants_q:
            return f(*places, q_len=q_len)
        return f(*places, kv_len=kv_len) if wants_k else f(*places)

    return call


def _all_with_lengths(mods: tuple[Any, ...]) -> list[Any]:
    return [_with_lengths(f"mods[{i}]", f) for i, f in enumerate(mods)]


def _named_as_needed(f: Any, mods: tuple[Any, ...]) -> Any:
    """`f`, whose last two parameters are q_len and kv_len, without them if no mod that it calls names either."""
    if any(not {"q_len", "kv_len"}.isdisjoint(_parameters(g)) for g in mods):
        return _mod(f)

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return f(b, h, q_idx, kv_idx)

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return f(score, b, h, q_idx, kv_idx)

    return _mod(score_mod if _parameters(f)[0] == "score" else mask)


def _tanh(x: Any, approximate: bool) -> Any:
    if approximate and traced(x):
        return call("tanh_approx", (x,), {}, "tanh")
    return x.tanh() if hasattr(x, "tanh") else np.tanh(x)


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype") and not isinstance(x, (type, np.generic))


_MOST = 2**31 - 1  # tokens, and elements of an axis: kernels count in 32 bits
_LARGEST = float(np.finfo(np.float32).max)
_MOST_PRINTED = 2**22
_MOST_TOKENS = 2**28  # of which a document mask keeps two numbers each


def _require_int(name: str, x: Any, least: int) -> int:
    require(
        isinstance(x, (int, np.integer)) and not isinstance(x, bool) and least <= int(x) <= _MOST,
        f"{name}={x!r} must be an int of at least {least}, and at most {_MOST}",
    )
    return int(x)


def _require_ndim(name: str, x: Any, ndims: tuple[int, ...], shape: str) -> None:
    if not _is_array(x):
        raise ArgumentError(f"{name} is a {type(x).__qualname__}: pass an array, {shape}")
    require(len(x.shape) in ndims, f"{name}.shape={tuple(x.shape)} must be {shape}: reshape it")
    require(
        all(n <= _MOST for n in x.shape),
        f"{name}.shape={tuple(x.shape)}: no dimension may exceed {_MOST}; pass a smaller array",
    )


def _require_integers(name: str, x: Any, ndims: tuple[int, ...], shape: str, only: tuple[str, ...] = ()) -> None:
    _require_ndim(name, x, ndims, shape)
    dtype = str(x.dtype).rpartition(".")[2]
    require(
        dtype in only if only else "int" in dtype,
        f"{name}.dtype={x.dtype} must be {' or '.join(only) or 'an integer'}: cast it",
    )


def _integers(name: str, x: Any, ndims: tuple[int, ...], shape: str, only: tuple[str, ...] = ()) -> Any:
    """A checked integer array; of a list or tuple a NumPy array."""
    x = _from_list(name, x, shape)
    _require_integers(name, x, ndims, shape, only)
    return x


def _from_list(name: str, x: Any, shape: str) -> Any:
    """Of a list or tuple an int32 array; anything else as it is."""
    if not isinstance(x, (list, tuple)):
        return x
    try:
        array = np.asarray(x)
    except ValueError:  # rows of several lengths
        array = np.asarray(None)
    if array.dtype.kind not in "iu" and array.size:
        raise ArgumentError(f"{name}={x!r} must be ints, {shape}")
    require(
        not array.size or bool(-(2**31) <= array.min() and array.max() < 2**31), f"{name}={x!r} must fit int32: {shape}"
    )
    return array.astype(np.int32)


def _pair(name: str, x: Any) -> tuple[int, int]:
    pair = x if isinstance(x, (tuple, list)) else (x, x)
    require(len(pair) == 2, f"{name}={x!r} must be an int, or two of them: (high, wide)")
    first, second = (_require_int(f"{name}[{i}]", n, 1) for i, n in enumerate(pair))
    return first, second


# Where the document of each token begins and ends, by the array's own functions ---------------------------------------

_NAMESPACES = {"numpy": "numpy", "cupy": "cupy", "torch": "torch", "jax": "jax.numpy", "jaxlib": "jax.numpy"}


def _namespace(x: Any) -> Any:
    for cls in type(x).__mro__:
        module = _NAMESPACES.get(cls.__module__.partition(".")[0])
        if module is not None:
            return importlib.import_module(module)
    raise ArgumentError(f"a {type(x).__qualname__} is no array of NumPy, CuPy, PyTorch or JAX: convert it to one")


def _arange(xp: Any, n: int, like: Any) -> Any:
    if xp.__name__ == "torch":
        return xp.arange(n, dtype=xp.int32, device=like.device)
    if xp.__name__ == "cupy":
        with like.device:
            return xp.arange(n, dtype=xp.int32)
    return xp.arange(n, dtype=xp.int32)


def _documents_of_offsets(offsets: Any, total: int | None) -> tuple[Any, Any]:
    """int32 [total] each; a token behind the last document has an empty one."""
    require(offsets.shape[0] > 0, f"cu_seqlens.shape={tuple(offsets.shape)} must be [documents + 1]: it begins with 0")
    if total is None:
        total = int(offsets[-1])
    total = _require_int("total", total, 0)
    require(
        total <= _MOST_TOKENS,
        f"total={total}: arrays of so many tokens are made, and {_MOST_TOKENS} is the most; pass how many there are",
    )
    xp = _namespace(offsets)
    offsets = offsets.to(xp.int32) if xp.__name__ == "torch" else offsets.astype(xp.int32)
    tokens = _arange(xp, total, offsets)
    bounds = xp.concatenate([offsets, offsets[-1:]])
    own = xp.searchsorted(offsets[1:], tokens, side="right")
    return bounds[own], bounds[own + 1]


def _documents_of_ids(ids: Any) -> tuple[Any, Any]:
    """int32, of the shape of ids."""
    xp, n = _namespace(ids), ids.shape[-1]
    tokens = _arange(xp, n, ids)
    changes = ids[..., 1:] != ids[..., :-1]
    edge = xp.ones_like(ids[..., :1] == ids[..., :1])
    starts = _running_max(xp, xp.where(xp.concatenate([edge, changes], -1), tokens, 0 * tokens))
    backwards = xp.where(xp.concatenate([changes, edge], -1), -1 - tokens, 0 * tokens - n)
    ends = -xp.flip(_running_max(xp, xp.flip(backwards, (-1,))), (-1,))
    return starts, ends


def _running_max(xp: Any, x: Any) -> Any:
    if xp.__name__ == "torch":
        return xp.cummax(x, -1).values
    if xp.__name__ == "jax.numpy":
        import jax

        return jax.lax.cummax(x, axis=x.ndim - 1)
    return xp.maximum.accumulate(x, axis=-1)
