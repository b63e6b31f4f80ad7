"""hw/cluster.cuh: two blocks that run together, copies to both, arrivals at each other's mbarriers; what each does
in its own memory, which begins at another address."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from hw_toys import BACKENDS, aligned, at_aligned

from cuflash import emulator
from cuflash.errors import EmulatorError
from cuflash.jit import module
from cuflash.jit.source import Edit

# Each block brings every other 8 rows of `a`, to both: 16 rows a round, through one stage. Warp 0 loads, warp 1 reads.
BODY = """
    const i32 rank = hw::cluster_rank();
    const u32 full = smem, empty = smem + 8, box = smem + 1024;
    if (thread == 0) {
      hw::mbarrier_init(full, 1);
      hw::mbarrier_init(empty, 2);
      hw::fence_mbarrier_init();
    }
    hw::cluster_sync();  // begin
    for (i32 round = 0; round < n; ++round) {
      if (thread < 32) {
        hw::mbarrier_wait(empty, (round & 1) ^ 1);  // wait
        if (hw::elect_one()) {
          hw::mbarrier_arrive_expect_tx(full, 2048);
          const i32 row = 16 * round + 8 * rank;
          hw::tma_load_to(3, box + 1024 * rank, p.maps[0], full, hw::CachePolicy::kNormal, 0, 0, row, 0);
        }
      } else {
        hw::mbarrier_wait(full, round & 1);
        u32x4* to = out<u32x4>() + (hw::block_idx_x() * n + round) * 128;
        for (i32 i = lane; i < 128; i += 32) hw::store_global(to + i, hw::load_shared<u32x4>(box + 16 * i));
        hw::sync_warp();
        if (lane < 2) hw::mbarrier_arrive_at(empty, lane);  // give back
      }
    }
    hw::cluster_sync();  // end
"""
ROUNDS = 5


def run(toy, backend: str, body: str = BODY, clusters: int = 2) -> tuple[np.ndarray, np.ndarray]:
    kernel = toy(body, threads=64, smem_bytes=3072, sm90=True, cluster=2, includes=("hw/cluster.cuh",))
    a = at_aligned(np.arange(ROUNDS * 16 * 64, dtype=np.uint16).reshape(ROUNDS * 16, 64))
    out = aligned((2 * clusters, ROUNDS, 16, 64), np.uint16)
    describe = ("float16", (64, 1, ROUNDS * 16, 1), (128, 128, 16), (64, 1, 8, 1), 0)
    kernel.run(backend, a=a, out=out, n=ROUNDS, grid=(2 * clusters, 1, 1), maps=[("a", 0, *describe)])
    return a, out


@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_to_both_blocks(toy, backend):
    a, out = run(toy, backend)
    for block in out:
        np.testing.assert_array_equal(block, a.reshape(ROUNDS, 16, 64))


@pytest.mark.parametrize("landing", ["late", "early"])
def test_the_same_under_any_schedule_and_read_once(toy, landing):
    for seed in range(6):
        with emulator.schedule(seed=seed, landing=landing), emulator.counting() as counters:
            a, out = run(toy, "emulator", clusters=1)
        np.testing.assert_array_equal(out[0], out[1])
        assert counters.global_bytes_read["a"] == a.nbytes


FAULTS = {
    "nobody meets before the first arrival": (
        "    hw::cluster_sync();  // begin\n", "hw::sync_threads();", "race|no mbarrier_init"),
    "a block ends while the other arrives": ("    hw::cluster_sync();  // end\n", "", "cluster_sync before"),
    "the other block's stage is not given back": (
        "if (lane < 2) hw::mbarrier_arrive_at(empty, lane);", "if (lane < 2) hw::mbarrier_arrive_at(empty, rank);",
        "deadlock|race|protocol"),
    "the stage is filled before both have read it": (
        "        hw::mbarrier_wait(empty, (round & 1) ^ 1);  // wait\n", "", "race|protocol"),
    "a block that the cluster does not have": (
        "hw::tma_load_to(3,", "hw::tma_load_to(7,", "blocks 0x7 of a cluster of 2"),
    "an arrival there": (
        "hw::mbarrier_arrive_at(empty, lane)", "hw::mbarrier_arrive_at(empty, lane + 1)", "block 2 of a cluster of 2"),
    "half of the bytes announced": (
        "hw::mbarrier_arrive_expect_tx(full, 2048)", "hw::mbarrier_arrive_expect_tx(full, 1024)", "protocol"),
    "the other block's memory read as its own": (
        "hw::load_shared<u32x4>(box + 16 * i)", "hw::load_shared<u32x4>(box + 3072 * (1 - rank) + 16 * i)",
        "out of bounds"),
    "lanes part at the cluster's barrier": (
        "    hw::cluster_sync();  // end\n", "if (lane < 16) hw::cluster_sync(); else hw::sync_threads();", "deadlock"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_reported(toy, name):
    old, new, says = FAULTS[name]
    assert BODY.count(old) == 1
    with pytest.raises(EmulatorError) as caught:
        for seed in range(6):
            with emulator.schedule(seed=seed, landing="early" if seed % 2 else "late"):
                run(toy, "emulator", BODY.replace(old, new))
    assert re.search(says, str(caught.value))


def test_clusters_fill_the_grid(toy):
    kernel = toy("hw::cluster_sync();", threads=64, sm90=True, cluster=2, includes=("hw/cluster.cuh",))
    with pytest.raises(EmulatorError, match="clusters of 2 blocks must divide"):
        kernel.run("emulator", grid=(3, 1, 1))


# In each block the product of its own a [64, 16] and b [16, 32], which lies in two chunks; and a, by a tensor copy.
PRODUCT = """
    using Rows = Chunk<32>;
    const u32 from_b = smem + 2048;
    const i32 block = hw::block_idx_x();
    for (i32 i = thread; i < 128; i += 128)
      hw::store_shared(smem + Rows::unit_at(i / 2, i % 2), hw::load_global(a<u32x4>() + 128 * block + i));
    for (i32 i = thread; i < 64; i += 128)
      hw::store_shared(from_b + 512 * (i % 4 / 2) + Rows::unit_at(i / 4, i % 2),
                       hw::load_global(b<u32x4>() + 64 * block + i));
    hw::fence_proxy_async();
    hw::sync_threads();
    float d[16];
    hw::wgmma_fence();
    hw::wgmma_ss<hw::Half, hw::Major::kK, hw::Major::kMn>(
        d, Rows::descriptor(Rows::k_major(smem)), Rows::descriptor(Rows::mn_major(from_b, 16)), false);
    hw::wgmma_commit();
    hw::wgmma_wait<0>();
    hw::wgmma_pin(d);
    for (i32 i = 0; i < 16; ++i) hw::store_global(out<float>() + 16 * (128 * block + thread) + i, d[i]);
    if (thread == 0) {
      hw::tma_store(p.maps[0], smem, 0, 64 * block);
      hw::bulk_commit();
      hw::bulk_wait_read<0>();
    }
"""


def run_product(toy, backend: str, rng) -> None:
    kernel = toy(PRODUCT, threads=128, smem_bytes=3072, sm90=True, cluster=2, includes=("hw/cluster.cuh",))
    a, b = (at_aligned(rng.integers(-8, 9, shape).astype(np.float16)) for shape in ((2, 64, 16), (2, 16, 32)))
    out = aligned(2 * 64 * 32 + 64 * 16, np.float32)
    describe = ("float16", (16, 128), (32,), (16, 64), 32)
    kernel.run(backend, a=a, b=b, out=out, grid=(2, 1, 1), maps=[("out", 2 * 64 * 32 * 4, *describe)])
    thread, i = np.indices((128, 16))
    row, column = thread // 32 * 16 + thread % 32 // 4 + i % 4 // 2 * 8, i // 4 * 8 + thread % 4 * 2 + i % 2
    np.testing.assert_array_equal(out[: 2 * 64 * 32].reshape(2, 128, 16), (a.astype(np.float32) @ b)[:, row, column])
    np.testing.assert_array_equal(out[2 * 64 * 32 :].view(np.float16).reshape(a.shape), a)


@pytest.mark.parametrize("backend", BACKENDS)
def test_products_and_stores_of_each_blocks_own_memory(toy, rng, backend):
    run_product(toy, backend, rng)


def test_shared_memory_begins_where_it_does_on_the_hardware(toy):
    """At the rank << 24, of which a descriptor has no bit."""
    kernel = toy(
        "if (thread == 0) hw::store_global(out<u32>() + hw::block_idx_x(), smem);",
        threads=64, smem_bytes=1024, sm90=True, cluster=2, includes=("hw/cluster.cuh",),
    )  # fmt: skip
    found = kernel.run("emulator", out=np.zeros(4, np.uint32), grid=(4, 1, 1))
    np.testing.assert_array_equal(found, [1024, 1024 + (1 << 24)] * 2)


def test_a_descriptor_with_bits_of_the_blocks_place_is_caught(toy, rng):
    """They would stand where the distance of b's chunks does."""
    edit = Edit("tile/descriptor.cuh", "return start(address) + (static_cast", "return (address >> 4) | (static_cast")
    with module.editing(lambda spec: dataclasses.replace(spec, edits=(edit,))):
        with pytest.raises((EmulatorError, AssertionError)):
            run_product(toy, "emulator", rng)
