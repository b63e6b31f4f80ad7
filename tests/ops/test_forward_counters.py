"""What the forward costs, counted on the emulator: matrix instructions, bytes of global memory, bank conflicts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from backends import using

import cuflash
from cuflash import arch, dtypes
from cuflash.ops import forward


def count(length: int, heads: int, d: int, dtype: str = "float16", **keywords):
    """The counters of one dense call, and its variant."""
    rng = np.random.default_rng(0)
    element = dtypes.BY_NAME[dtype]
    q, k, v = (rng.standard_normal((1, length, heads, d)).astype(element.numpy) for _ in range(3))
    with using("emulator", "sm_80"), cuflash.emulator.counting() as counters:
        cuflash.attention(q, k, v, **keywords)
    return counters, forward.choose_variant(element, d, d, 16, arch.named("sm_80"))


def tiles(length: int, variant, causal: bool = False) -> int:
    """(query tile, key tile) pairs that hold a kept score."""
    block_q, block_k = variant.tile.block_q, variant.tile.block_k
    last = lambda row: min(length, row + block_q) if causal else length  # noqa: E731
    return sum(math.ceil(last(row) / block_k) for row in range(0, length, block_q))


def instructions(variant) -> int:
    """Matrix instructions of one pair."""
    depth, passes = (16, 1) if variant.element.itemsize == 2 else (8, 3)
    rows, keys = variant.tile.block_q // 16, variant.tile.block_k
    return passes * rows * ((keys // 8) * (variant.head_dim // depth) + (variant.head_dim_v // 8) * (keys // depth))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [64, 200, 256, 1024])
@pytest.mark.parametrize("dtype, d", [("float16", 64), ("bfloat16", 128), ("float32", 32)])
def test_matrix_instructions_equal_the_formula(dtype, d, length, causal):
    counters, variant = count(length, 1, d, dtype, causal=causal)
    assert counters.total_matrix_instructions == tiles(length, variant, causal) * instructions(variant)


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("length", [64, 256, 512, 1024])
def test_global_bytes_follow_the_tiled_formula(length, d):
    """Q and O once, K and V once for every query tile, and nothing that grows with the square of the length."""
    counters, variant = count(length, 2, d)
    whole = 2 * length * d * 2  # heads, rows, dims, bytes
    query_tiles = math.ceil(length / variant.tile.block_q)
    expected_read = whole + 2 * whole * query_tiles
    read = sum(counters.global_bytes_read.values())
    written = sum(counters.global_bytes_written.values())
    assert abs(read - expected_read) <= 0.05 * expected_read
    assert abs(written - whole) <= 0.05 * whole
    assert set(counters.global_bytes_read) <= {"q", "k", "v"}
    assert set(counters.global_bytes_written) <= {"out"}


def test_a_causal_mask_reads_no_key_it_excludes():
    full, variant = count(1024, 1, 64)
    causal, _ = count(1024, 1, 64, causal=True)
    share = tiles(1024, variant, causal=True) / tiles(1024, variant)
    for name in "kv":
        assert causal.global_bytes_read[name] == pytest.approx(share * full.global_bytes_read[name], rel=0.01)


def test_a_window_reads_no_key_it_excludes():
    counters, variant = count(1024, 1, 64, window_size=(0, 0))
    per_row_tile = variant.tile.block_q  # a window of one key: as many keys as queries
    assert counters.global_bytes_read["k"] == 1024 // variant.tile.block_q * per_row_tile * 64 * 2


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("d", forward.HEAD_DIM_CLASSES)
def test_no_bank_conflict_in_the_main_loop(dtype, d):
    counters, _ = count(160, 1, d, dtype, causal=True)
    loop = {site: n for site, n in counters.bank_conflicts.items() if n and "tile/store.cuh" not in site}
    assert not loop, "extra passes over shared memory: " + ", ".join(f"{site}: {n}" for site, n in loop.items())
