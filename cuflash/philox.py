"""Which weights dropout keeps: Philox4x32-10 of a weight's position, so that every tiling and backend agrees.

Philox (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a counter of four
32-bit words and a key of two into four random words; there is no state. Here

    key      seed (64 bits, low word first)
    counter  (q_idx without bit 3, kv_idx without bits 0, 3 and 4, b * heads_q + h, offset mod 2^32)
             "without": those bits are 0
    byte     8 q3 + 4 k4 + 2 k3 + k0, where q3 is bit 3 of q_idx and so on; byte n begins at bit 8 (n % 4) of word n / 4
    kept     iff byte < round(256 (1 - p)); kept weights are multiplied by 1 / (1 - p)

One call thus serves 2 query rows and 8 keys: the 16 weights that one thread of a matrix instruction holds, see
kernels_cu/tile/dropout.cuh.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85  # added to the key words after each round
_LOW = np.uint64(0xFFFFFFFF)


def philox4x32(counter: Sequence[Any], key: Sequence[int]) -> np.ndarray:
    """Philox4x32-10 -> uint32 [..., 4]. counter: four arrays that broadcast, of 32-bit words; key: two words.

    >>> [f"{word:08x}" for word in philox4x32((0, 0, 0, 0), (0, 0))]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    c0, c1, c2, c3 = (np.asarray(word).astype(np.uint64) & _LOW for word in np.broadcast_arrays(*counter))
    k0, k1 = (int(word) for word in key)
    for _ in range(10):
        a, b = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c2 = (b >> np.uint64(32)) ^ c1 ^ np.uint64(k0), (a >> np.uint64(32)) ^ c3 ^ np.uint64(k1)
        c1, c3 = b & _LOW, a & _LOW
        k0, k1 = (k0 + _WEYL[0]) % 2**32, (k1 + _WEYL[1]) % 2**32
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def keep_threshold(p: float) -> int:
    """A weight is kept iff its byte is below this: round(256 (1 - p)), from 0 to 256.

    >>> keep_threshold(0.5), keep_threshold(0.17), keep_threshold(0.001)
    (128, 212, 256)
    """
    return round(256 * (1 - p))


def dropout_keep(b: Any, h: Any, q_idx: Any, kv_idx: Any, seed: int, offset: int, p: float, heads_q: int) -> np.ndarray:
    """Whether the weight of query q_idx and key kv_idx in head h of sequence b is kept -> bool, of the common shape.

    Indices are integer arrays that broadcast, local to the sequence. seed, offset: any ints, taken mod 2^64 and 2^32.
    Costs a Philox call for each distinct (head, q_idx without bit 3, kv_idx without bits 0, 3 and 4), all against all.

    >>> keep = dropout_keep(0, 1, np.arange(300)[:, None], np.arange(400), seed=7, offset=0, p=0.25, heads_q=4)
    >>> keep.shape, round(float(keep.mean()), 2)
    ((300, 400), 0.75)
    """
    q_idx, kv_idx = np.asarray(q_idx, np.int64), np.asarray(kv_idx, np.int64)
    heads, at_head = _distinct(np.asarray(b, np.int64) * heads_q + np.asarray(h, np.int64))
    rows, at_row = _distinct(q_idx & ~0b1000)
    keys, at_key = _distinct(kv_idx & ~0b11001)
    counter = rows[:, None], keys, heads[:, None, None], int(offset) % 2**32
    words = philox4x32(counter, (int(seed) % 2**32, int(seed) // 2**32 % 2**32))
    kept = words.astype("<u4").view(np.uint8) < keep_threshold(p)  # [heads, rows, keys, 16]
    byte = 8 * (q_idx >> 3 & 1) + (4 * (kv_idx >> 4 & 1) + 2 * (kv_idx >> 3 & 1) + (kv_idx & 1))
    return kept[at_head, at_row, at_key, byte]


def dropout_mask(
    shape: tuple[int, int, int, int],
    lengths_q: Sequence[int],
    lengths_k: Sequence[int],
    seed: int,
    offset: int,
    p: float,
) -> np.ndarray:
    """`dropout_keep` of whole sequences -> bool [batch, heads_q, rows, keys], False past their lengths [batch]."""
    mask = np.zeros(shape, bool)
    heads = np.arange(shape[1])[:, None, None]
    for b, (rows, keys) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        at = mask[b, :, :rows, :keys]
        at[...] = dropout_keep(
            b, heads, np.arange(at.shape[1])[:, None], np.arange(at.shape[2]), seed, offset, p, shape[1]
        )
    return mask


def _distinct(index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct values, and for each element which of them it is."""
    values, at = np.unique(index, return_inverse=True)
    return values, at.reshape(index.shape)  # NumPy 2.0 shaped the inverse otherwise
