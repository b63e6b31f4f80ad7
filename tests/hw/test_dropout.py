"""tile/dropout.cuh: Philox4x32-10 as published, and fragments whose rows are queries or keys."""

from __future__ import annotations

import numpy as np
import pytest
from hw_toys import BACKENDS

from cuflash import philox

INCLUDES = ("base.cuh", "hw/device.cuh", "hw/math.cuh", "tile/dropout.cuh", "tile/fragment.cuh")

# The known answers of philox4x32-10 in the Random123 distribution: counter, key -> result.
KNOWN = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


@pytest.mark.parametrize("counter, key, answer", KNOWN)
def test_known_answers_in_numpy(counter, key, answer):
    assert tuple(philox.philox4x32(counter, key)) == answer


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_answers_and_random_counters_in_the_kernel(backend, toy, rng):
    inputs = rng.integers(0, 2**32, (32, 6), dtype=np.uint32)
    inputs[:3] = [(*counter, *key) for counter, key, _ in KNOWN]
    kernel = toy(
        """
        u32 x[4];
        for (i32 i = 0; i < 4; ++i) x[i] = hw::load_global(a<u32>() + 6 * lane + i);
        philox4x32(x, hw::load_global(a<u32>() + 6 * lane + 4), hw::load_global(a<u32>() + 6 * lane + 5));
        for (i32 i = 0; i < 4; ++i) hw::store_global(out<u32>() + 4 * lane + i, x[i]);
        """,
        includes=INCLUDES,
    )
    found = kernel.run(backend, a=inputs, out=np.zeros((32, 4), np.uint32))
    assert [tuple(row) for row in found[:3]] == [answer for _, _, answer in KNOWN]
    expected = np.stack([philox.philox4x32(row[:4], row[4:]) for row in inputs])
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row_tiles, col_tiles", [(1, 2), (1, 4), (2, 8), (1, 16), (4, 2)])
@pytest.mark.parametrize("transposed", [False, True], ids=["rows are queries", "rows are keys"])
def test_every_weight_of_a_fragment_has_its_byte(backend, toy, row_tiles, col_tiles, transposed):
    """Each thread writes what it decides on where the weight stands; a fragment begins at multiples of 16."""
    visit = "visit_dropout_transposed" if transposed else "visit_dropout"
    kernel = toy(
        f"""
        using S = Fragment<{row_tiles}, {col_tiles}>;
        const Dropout d = {{0x89abcdefu, 0x01234567u, 5u, 11u, 100u}};
        S s;
        {visit}(d, s, n, m, [](float& x, bool kept) {{ x = kept ? 1.0f : 0.0f; }});
        s.for_each([&](float& x, i32 row, i32 column) {{
          hw::store_global(out<float>() + S::row_of(row) * S::kColTiles * 8 + S::first_col() + column, x);
        }});
        """,
        includes=INCLUDES,
    )
    step = 32 if (row_tiles if transposed else col_tiles) >= (2 if transposed else 4) else 16
    for query, key in ((0, 0), (48, step), (16, 3 * step)):
        shape = 16 * row_tiles, 8 * col_tiles
        found = kernel.run(backend, out=np.full(shape, np.nan, np.float32), n=query, m=key)
        queries, keys = np.arange(shape[transposed]) + query, np.arange(shape[1 - transposed]) + key
        seed, p = 0x0123456789ABCDEF, 1 - 100 / 256
        expected = philox.dropout_keep(2, 3, queries[:, None], keys, seed, 5, p, heads_q=4)
        np.testing.assert_array_equal(found, (expected.T if transposed else expected).astype(np.float32))
