"""Which weights dropout keeps: the definition, written once more by hand, and its statistics."""

from __future__ import annotations

import numpy as np
import pytest

from cuflash import philox


def keep_by_hand(b: int, h: int, i: int, j: int, seed: int, offset: int, p: float, heads_q: int) -> bool:
    """In integers of Python, a weight at a time."""
    x = [i & ~8, j & ~25, b * heads_q + h, offset % 2**32]
    low, high = seed % 2**32, seed // 2**32 % 2**32
    for _ in range(10):
        a, c = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [c // 2**32 ^ x[1] ^ low, c % 2**32, a // 2**32 ^ x[3] ^ high, a % 2**32]
        low, high = (low + 0x9E3779B9) % 2**32, (high + 0xBB67AE85) % 2**32
    q3, k4, k3, k0 = i >> 3 & 1, j >> 4 & 1, j >> 3 & 1, j & 1
    byte = 8 * q3 + 4 * k4 + 2 * k3 + k0
    return (b"".join(word.to_bytes(4, "little") for word in x))[byte] < round(256 * (1 - p))


@pytest.mark.parametrize("key, offset", [(0, 0), (2**64 - 1, 2**32 - 1), (-7, -1), (2**40 + 3, 2**32 + 5)])
def test_the_definition(key, offset, rng):
    places = rng.integers(0, [[3], [4], [70], [90]], (4, 60)).T.tolist()
    for p in (0.01, 0.17, 0.5, 0.999):
        found = [bool(philox.dropout_keep(b, h, i, j, key, offset, p, 4)) for b, h, i, j in places]
        assert found == [keep_by_hand(b, h, i, j, key, offset, p, 4) for b, h, i, j in places]


def test_indices_broadcast(rng):
    grid = philox.dropout_keep(1, np.arange(3)[:, None, None], np.arange(40)[:, None], np.arange(50), 9, 2, 0.3, 3)
    assert grid.shape == (3, 40, 50)
    h, i, j = (rng.integers(0, n, 200) for n in (3, 40, 50))
    np.testing.assert_array_equal(philox.dropout_keep(1, h, i, j, 9, 2, 0.3, 3), grid[h, i, j])


@pytest.mark.parametrize("p", [0.01, 0.17, 0.5])
def test_keep_rate_by_row_column_head_and_sequence(p, seed):
    """Within 4 sigma of the stated rate: any one of some 2,000 means leaves that once in 16,000 draws, so what is
    tested is the largest of them against the bound that fits their number, and each whole group against 4 sigma."""
    shape = 2, 3, 512, 768
    mask = philox.dropout_mask(shape, [512, 512], [768, 768], seed, 1, p)
    rate = philox.keep_threshold(p) / 256
    sigma = np.sqrt(rate * (1 - rate))
    for axes, allowed in (((1, 2, 3), 4), ((0, 2, 3), 4), ((0, 1, 2, 3), 4), ((0, 1, 3), 5), ((0, 1, 2), 5)):
        means = mask.mean(axis=axes)
        count = mask.size / np.size(means)
        deviation = np.abs(means - rate) / (sigma / np.sqrt(count))
        assert deviation.max() < allowed, f"over axes {axes}"
        if np.size(means) > 100:
            assert (deviation > 4).sum() <= 2
            assert 0.9 < np.sqrt((deviation**2).mean()) < 1.1, "the means scatter as independent draws do"
    # Bits that stand for neighbours are independent: by bit 3 of the query and bits 0, 3 and 4 of the key.
    centered = mask.astype(np.float64) - rate
    for axis, step in ((2, 8), (3, 1), (3, 8), (3, 16), (2, 1), (3, 2), (1, 1), (0, 1)):
        a, b = np.split(centered, [step], axis)[1], np.flip(np.split(np.flip(centered, axis), [step], axis)[1], axis)
        assert abs((a * b).mean()) < 4 * sigma**2 / np.sqrt(a.size), f"axis {axis}, {step} apart"


def test_seed_and_offset_change_the_mask_and_nothing_else_does():
    def mask(seed, offset, b=1, rows=64):
        return philox.dropout_mask((b, 2, rows, 64), [rows] * b, [64] * b, seed, offset, 0.5)

    assert (mask(1, 0) == mask(1, 2**32)).all() and (mask(1, 0) == mask(2**64 + 1, 0)).all()
    assert (mask(1, 0)[0] == mask(1, 0, b=3)[0]).all() and (mask(1, 0) == mask(1, 0, rows=80)[:, :, :64]).all()
    for other in (mask(2, 0), mask(1 + 2**32, 0), mask(1, 1)):
        assert 0.4 < (mask(1, 0) == other).mean() < 0.6
