"""The emulator's counters on patterns whose cost is known."""

from __future__ import annotations

import numpy as np
import pytest
from hw_toys import aligned

from cuflash import emulator


def count(kernel, **arrays):
    with emulator.counting() as counters:
        kernel.run("emulator", **arrays)
    return counters


@pytest.mark.parametrize(
    "access, passes",
    [
        # One word for each lane: as many passes as lanes want different words of one bank.
        ("hw::store_shared(smem + 4 * lane, 1u)", 0),
        ("hw::store_shared(smem + 8 * lane, 1u)", 1),
        ("hw::store_shared(smem + 16 * lane, 1u)", 3),
        ("hw::store_shared(smem + 128 * lane, 1u)", 31),
        ("hw::store_shared(smem + 132 * lane, 1u)", 0),
        ("hw::store_shared(smem + 4 * (lane ^ 5), 1u)", 0),
        # Halves of one word, and one word for all, are one access.
        ("hw::store_shared(smem + 2 * lane, static_cast<u16>(1))", 0),
        ("hw::store_shared(smem + 64 * lane, static_cast<u16>(1))", 15),
        # 16 bytes: eight lanes at a time, four phases.
        ("hw::store_shared(smem + 16 * lane, u32x4{})", 0),
        ("hw::store_shared(smem + 128 * lane, u32x4{})", 4 * 7),
        ("hw::store_shared(smem + 128 * (lane / 8) + 16 * ((lane ^ lane / 8) % 8), u32x4{})", 0),
        ("hw::store_shared(smem + 32 * lane, u32x4{})", 4 * 1),
        ("if (lane % 8 == 0) hw::store_shared(smem + 128 * lane, u32x4{})", 0),
        ("hw::cp_async_16(smem + 128 * lane, a<u8>() + 16 * lane, 16)", 4 * 7),
        ("hw::cp_async_16(smem + 128 * lane + 16 * (lane % 8), a<u8>() + 16 * lane, 16)", 0),
        ("hw::cp_async_4(smem + 8 * lane, a<u8>() + 4 * lane, 4)", 1),
        # Eight rows of 16 bytes in one pass, if they lie in different banks.
        ("u32 r[4] = {}; hw::stmatrix_x4(smem + 128 * lane, r)", 4 * 7),
        ("u32 r[4] = {}; hw::stmatrix_x4(smem + 128 * lane + 16 * (lane % 8), r)", 0),
        ("u32 r[4] = {}; hw::stmatrix_x4(smem + 64 * lane, r)", 4 * 3),
    ],
)
def test_bank_conflicts_of_writes(toy, access, passes):
    kernel = toy(f"        {access};  // access\n", smem_bytes=8192)
    counters = count(kernel, a=aligned(1024, np.uint32))
    assert counters.bank_conflicts == ({kernel.line("access"): passes} if passes else {})


@pytest.mark.parametrize(
    "access, passes",
    [
        ("hw::load_shared<u32>(smem + 4 * lane)", 0),
        ("hw::load_shared<u32>(smem)", 0),
        ("hw::load_shared<u32>(smem + 128 * (lane % 4))", 3),
        ("hw::load_shared<u16>(smem + 2 * lane)", 0),
        ("hw::load_shared<u32x4>(smem + 16 * lane)", 0),
        ("hw::load_shared<u32x4>(smem + 64 * lane)", 4 * 3),
        ("u32 r[4]; hw::ldmatrix_x4(r, smem + 64 * lane)", 4 * 3),
        ("u32 r[4]; hw::ldmatrix_x4_trans(r, smem + 16 * lane)", 0),
        ("u32 r[4]; hw::ldmatrix_x4(r, smem + 64 * lane + 16 * (lane / 2 % 4))", 0),
    ],
)
def test_bank_conflicts_of_reads(toy, access, passes):
    body = f"""
        for (i32 i = lane; i < 256; i += 32) hw::store_shared(smem + 16 * i, u32x4{{}});
        hw::sync_warp();
        {access};  // access
    """
    kernel = toy(body, smem_bytes=4096)
    counters = count(kernel)
    assert counters.bank_conflicts == ({kernel.line("access"): passes} if passes else {})


def test_accesses_of_a_loop_are_told_apart(toy):
    """The n-th access of each lane belongs together, also where lanes take turns one loop at a time."""
    body = "for (i32 i = 0; i < 6; ++i) hw::store_shared(smem + (i % 2 ? 128 : 4) * lane, 1u);  // access\n"
    kernel = toy("        " + body, smem_bytes=4096)
    assert count(kernel).bank_conflicts == {kernel.line("access"): 3 * 31}


@pytest.mark.parametrize(
    "index, sectors, ideal",
    [("lane", 4, 4), ("2 * lane", 8, 4), ("8 * lane", 32, 4), ("lane + 1", 5, 4), ("0", 1, 1), ("31 - lane", 4, 4)],
)
def test_sectors(toy, index, sectors, ideal):
    kernel = toy(f"        hw::load_global(a<u32>() + {index});  // access\n")
    counters = count(kernel, a=aligned(256, np.uint32))
    assert counters.global_sectors == sectors
    assert counters.uncoalesced == ({kernel.line("access"): sectors - ideal} if sectors > ideal else {})


def test_bytes_instructions_and_barriers(toy):
    body = """
        const u32 x = hw::load_global(a<u32>() + thread);
        hw::store_shared(smem + 4 * thread, x);
        hw::cp_async_16(smem + 1024 + 16 * thread, b<u8>() + 16 * thread, thread < 10 ? 16 : 0);
        hw::cp_async_commit();
        hw::cp_async_wait<0>();
        hw::sync_threads();
        u32 r[4];
        hw::ldmatrix_x4(r, smem + 1024 + 16 * thread);
        float d[4] = {};
        for (i32 i = 0; i < n; ++i) {
          hw::mma_m16n8k16(hw::Half{}, d, r, r[0], r[1]);
          hw::mma_m16n8k16(hw::Bfloat16{}, d, r, r[0], r[1]);
          hw::mma_m16n8k16(hw::Bfloat16{}, d, r, r[0], r[1]);
          hw::mma_m16n8k8_tf32(d, r, r[0], r[1]);
        }
        hw::sync_threads();
        hw::store_global(out<u16>() + thread, static_cast<u16>(hw::load_shared<u16>(smem + 2 * thread)));
        hw::atomic_add(out<float>() + 32, 1.0f);
    """
    kernel = toy(body, threads=64, smem_bytes=4096)
    arrays = {"a": aligned(64, np.uint32), "b": aligned(256, np.uint32), "out": aligned(66, np.uint16)}
    counters = count(kernel, **arrays, n=3, grid=(2, 1, 1))
    assert counters.launches == 1
    assert counters.matrix_instructions == {"mma_m16n8k16_f16": 12, "mma_m16n8k16_bf16": 24, "mma_m16n8k8_tf32": 12}
    assert counters.total_matrix_instructions == 48
    assert counters.matrix_moves == {"ldmatrix_x4": 4}
    assert counters.barriers == 4
    assert counters.global_bytes_read == {"a": 2 * 256, "b": 2 * 160}
    assert counters.global_bytes_written == {"out": 2 * (128 + 64 * 4)}
    assert counters.shared_bytes == 2 * (256 + 64 * 16 + 64 * 16 + 128)


def test_counts_do_not_depend_on_the_order(toy):
    body = """
        for (i32 i = 0; i < thread % 5; ++i) hw::store_shared(smem + 128 * thread + 4 * i, 1u);
        hw::sync_threads();
        for (i32 i = thread; i < 200; i += 64) hw::store_global(out<u32>() + i, hw::load_global(a<u32>() + i * 2));
    """
    kernel = toy(body, threads=64, smem_bytes=8192)
    found = set()
    for seed in range(5):
        for os_threads in (1, 3):
            with emulator.schedule(seed=seed, os_threads=os_threads):
                arrays = {"a": aligned(400, np.uint32), "out": aligned(200, np.uint32)}
                found.add(str(count(kernel, **arrays, grid=(5, 1, 1))))
    assert len(found) == 1


def test_each_access_has_its_passes_and_sectors(toy):
    """Those of conflicts and of scattered lanes are a part of what their line took in all."""
    body = """
        const u32 x = hw::load_global(a<u32>() + 8 * lane);  // scattered
        hw::store_shared(smem + 128 * lane, x);  // conflicting
        hw::store_shared(smem + 4 * lane, x);  // plain
        const u32 y = hw::shfl_xor(hw::load_shared<u32>(smem + 4 * lane), 1);  // read
        hw::store_global(out<u32>() + lane, y + hw::ballot(x == 0));  // write
        hw::sync_warp();
        const f32x2 pair = hw::load_shared<f32x2>(smem + 8 * (lane / 2));  // pair
        const float four[4] = {pair.x[0], pair.x[1], pair.x[1], pair.x[0]};
        hw::atomic_add4(out<float>() + 4 * lane, four);  // four
    """
    kernel = toy(body, smem_bytes=4096)
    counters = count(kernel, a=aligned(256, np.uint32), out=aligned(128, np.uint32))
    line = kernel.line
    assert counters.sectors == {line("scattered"): 32, line("write"): 4, line("four"): 16}
    assert counters.uncoalesced == {line("scattered"): 28}
    assert counters.shared_passes == {line("conflicting"): 32, line("plain"): 1, line("read"): 1, line("pair"): 2}
    assert counters.bank_conflicts == {line("conflicting"): 31}
    assert counters.exchanges == {"shfl_xor": 1, "ballot": 1}
