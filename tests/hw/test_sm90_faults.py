"""Faults planted around mbarriers, named barriers, tensor copies and matrix products of a warpgroup: each is reported
with its kind and lines; mended, it runs without a report, in several orders, with copies that land early or late."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pytest
from hw_toys import Toy, aligned

from cuflash import emulator
from cuflash.errors import EmulatorError


@dataclass(frozen=True)
class Fault:
    """Text in which `right` is false for the fault and true for what is meant.

    kinds  the report begins with one of them
    says   the report contains these words, and the lines whose comments are `// @name`
    """

    kinds: str
    body: str
    says: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()
    threads: int = 64


# `make(at, count)` is an mbarrier, `chunk` 1,024 bytes that a box of map 0 fills, `bar` an mbarrier's address.
PRELUDE = """
        const bool right = n != 0;
        const i32 warp = thread / 32;
        const u32 bar = smem, chunk = smem + 1024;
        const auto make = [&](u32 at, u32 count) {
          if (thread == 0) hw::mbarrier_init(at, count);
          if (thread == 0) hw::fence_mbarrier_init();
        };
        const auto load = [&](u32 to, u32 on, hw::Site site) {
          hw::tma_load(to, p.maps[0], on, hw::CachePolicy::kNormal, 0, 0, site);
        };
        // The operands of a 64 x 8 x 16 product, written by threads.
        const auto operand = [&](u32 address) { return Chunk<32>::descriptor(Chunk<32>::k_major(address)); };
        const u64 da = operand(smem + 2048), db = operand(smem + 4096);
        const auto operands = [&] {
          hw::store_shared(smem + 2048 + 16 * thread, u32x4{});
          if (thread < 16) hw::store_shared(smem + 4096 + 16 * thread, u32x4{});
        };
        float d[4] = {};
        const auto product = [&](hw::Site site) {
          hw::wgmma_ss<hw::Half, hw::Major::kK, hw::Major::kK>(d, da, db, true, site);
        };
        (void)warp, (void)bar, (void)chunk, (void)da, (void)db;
"""

FAULTS = {
    "a read before the wait that orders it": Fault(
        "race",
        """
        make(bar, 32);
        hw::store_shared(chunk + 4 * thread, 1u);
        hw::sync_threads();
        if (warp == 0) {
          hw::store_shared(chunk + 4 * lane, 2u);  // @write
          hw::mbarrier_arrive(bar);
        } else {
          if (right) hw::mbarrier_wait(bar, 0);
          hw::load_shared<u32>(chunk + 4 * lane);  // @read
        }
        """,
        ("no barrier orders them",), ("write", "read"),
    ),
    "a wait with the other parity": Fault(
        "race|deadlock",
        """
        make(bar, 32);
        hw::store_shared(chunk + 4 * thread, 1u);
        hw::sync_threads();
        if (warp == 0) {
          hw::store_shared(chunk + 4 * lane, 2u);  // @write
          hw::mbarrier_arrive(bar);
        } else {
          hw::mbarrier_wait(bar, right ? 0 : 1);
          hw::load_shared<u32>(chunk + 4 * lane);  // @read
        }
        """,
        (), ("read",),
    ),
    "an arrival before the read it is for": Fault(
        "race",
        """
        make(bar, 1);
        hw::store_shared(chunk + 4 * thread, 1u);
        hw::sync_threads();
        if (warp == 1) {
          if (!right && lane == 0) hw::mbarrier_arrive(bar);
          hw::load_shared<u32>(chunk + 4 * lane);  // @read
          hw::sync_warp();
          if (right && lane == 0) hw::mbarrier_arrive(bar);
        } else {
          hw::mbarrier_wait(bar, 0);
          hw::store_shared(chunk + 4 * lane, 2u);  // @write
        }
        """,
        ("no barrier orders them",), ("write", "read"),
    ),
    "one of two readers is not waited for": Fault(
        "race",
        """
        make(bar, right ? 2 : 1);
        if (thread < 32) hw::store_shared(chunk + 4 * lane, 1u);
        hw::sync_threads();
        if (warp > 0) {
          hw::load_shared<u32>(chunk + 4 * lane);  // @read
          hw::sync_warp();
          if (lane == 0 && (right || warp == 1)) hw::mbarrier_arrive(bar);
        } else {
          hw::mbarrier_wait(bar, 0);
          hw::store_shared(chunk + 4 * lane, 2u);  // @write
        }
        """,
        (), ("write", "read"), 96,
    ),
    "an arrival too few": Fault(
        "deadlock",
        """
        make(bar, 32);  // @make
        hw::sync_threads();
        if (warp == 0) {
          if (right || lane != 7) hw::mbarrier_arrive(bar);
        } else {
          hw::mbarrier_wait(bar, 0);  // @wait
        }
        """,
        ("threads 32-63 wait at mbarrier_wait", "phase 0: 1 of 32 arrivals are missing", "threads 0-31 have exited"),
        ("wait",),
    ),
    "a producer that waits for the parity of the first phase": Fault(
        "deadlock",
        """
        make(bar, 1);
        hw::sync_threads();
        if (warp == 0) hw::mbarrier_wait(bar, right ? 1 : 0);  // @wait
        """,
        ("with parity 0 for the mbarrier at smem_base() + 0",), ("wait",),
    ),
    "a phase that a waiter may miss": Fault(
        "protocol|deadlock",
        """
        make(bar, 1), make(bar + 8, 32);
        hw::sync_threads();
        if (thread == 0) {
          hw::mbarrier_arrive(bar);
          if (right) hw::mbarrier_wait(bar + 8, 0);
          hw::mbarrier_arrive(bar);
        }
        if (warp == 1) {
          hw::mbarrier_wait(bar, 0);
          hw::mbarrier_arrive(bar + 8);
        }
        """,
    ),
    "an mbarrier used before the block has met": Fault(
        "race|protocol",
        """
        if (thread == 0) hw::mbarrier_init(bar, 64);  // @make
        if (right) hw::sync_threads();
        hw::mbarrier_arrive(bar);  // @arrive
        """,
        (), ("arrive",),
    ),
    "an mbarrier nobody has made": Fault(
        "protocol",
        """
        make(bar, 64);
        hw::sync_threads();
        hw::mbarrier_arrive(right ? bar : bar + 8);  // @arrive
        """,
        ("no mbarrier_init", "there are: 0"), ("arrive",),
    ),
    "an mbarrier made twice": Fault(
        "protocol",
        """
        if (thread < (right ? 1 : 2)) hw::mbarrier_init(bar, 64);  // @make
        """,
        ("there is the mbarrier at smem_base() + 0",), ("make",),
    ),
    "a store over an mbarrier": Fault(
        "race",
        """
        make(bar, 64);
        hw::sync_threads();
        if (thread == 0) hw::store_shared(right ? bar + 8 : bar, 0u);  // @store
        """,
        ("meets an mbarrier",), ("store",),
    ),
    "no named barrier between": Fault(
        "race|uninitialised",
        """
        hw::store_shared(chunk + 4 * thread, 1u);  // @write
        if (right) hw::named_sync(3, 64);
        hw::load_shared<u32>(chunk + 4 * (63 - thread));  // @read
        """,
        (), ("read",),
    ),
    "a named barrier of two counts": Fault(
        "protocol",
        """
        if (warp == 0)
          hw::named_sync(3, 64);  // @one
        else if (warp == 1)
          hw::named_arrive(3, right ? 64 : 96);  // @other
        """,
        ("threads at barrier 3",), ("one", "other"), 96,
    ),
    "a named barrier that one of two comes to": Fault(
        "deadlock",
        """
        if (warp == 0) hw::named_sync(5, 64);  // @wait
        if (warp == 1 && right) hw::named_arrive(5, 64);
        """,
        ("for barrier 5: 32 of 64 threads have come",), ("wait",),
    ),
    "a named barrier that some lanes come to": Fault(
        "collective",
        """
        if (right || lane < 16) hw::named_sync(5, 64);  // @wait
        """,
        ("named_sync",), ("wait",),
    ),
    "a tensor copy on an mbarrier without a fence": Fault(
        "proxy",
        """
        if (thread == 0) hw::mbarrier_init(bar, 1);  // @make
        if (thread == 0 && right) hw::fence_mbarrier_init();
        hw::sync_threads();
        if (thread == 32) {
          hw::mbarrier_arrive_expect_tx(bar, 1024);
          load(chunk, bar, hw::Site::here());  // @load
          hw::mbarrier_wait(bar, 0);
        }
        """,
        ("fence_mbarrier_init",), ("make", "load"),
    ),
    "a box that is not waited for": Fault(
        "race|uninitialised",
        """
        make(bar, 1);
        hw::sync_threads();
        if (thread == 0) {
          hw::mbarrier_arrive_expect_tx(bar, 1024);
          load(chunk, bar, hw::Site::here());  // @load
        }
        if (thread == 0) {
          if (right) hw::mbarrier_wait(bar, 0);
          hw::load_shared<u32>(chunk);  // @read
        }
        """,
        ("asynchronous copy",), ("load", "read"),
    ),
    "a wait for another box's mbarrier": Fault(
        "race",
        """
        make(bar, 1), make(bar + 8, 1);
        hw::sync_threads();
        if (thread == 0) {
          hw::mbarrier_arrive_expect_tx(bar, 1024);
          load(chunk, bar, hw::Site::here());
          hw::mbarrier_arrive_expect_tx(bar + 8, 1024);
          load(chunk + 1024, bar + 8, hw::Site::here());  // @load
          hw::mbarrier_wait(bar, 0);
          if (right) hw::mbarrier_wait(bar + 8, 0);
          hw::load_shared<u32>(chunk + 1024);  // @read
        }
        """,
        (), ("load", "read"),
    ),
    "fewer bytes announced than a box has": Fault(
        "protocol",
        """
        make(bar, 1);
        hw::sync_threads();
        if (thread == 0) {
          hw::mbarrier_arrive_expect_tx(bar, right ? 1024 : 512);
          load(chunk, bar, hw::Site::here());  // @load
          hw::mbarrier_wait(bar, 0);
        }
        """,
        ("512 bytes more land",),
    ),
    "bytes not announced": Fault(
        "race|protocol",
        """
        make(bar, 1);
        hw::sync_threads();
        if (thread == 0) {
          if (right)
            hw::mbarrier_arrive_expect_tx(bar, 1024);
          else
            hw::mbarrier_arrive(bar);
          load(chunk, bar, hw::Site::here());  // @load
          hw::mbarrier_wait(bar, 0);
          hw::load_shared<u32>(chunk);  // @read
        }
        """,
    ),
    "a box before its bytes are announced": Fault(
        "protocol",
        """
        make(bar, 1);
        hw::sync_threads();
        if (thread == 0) {
          if (right) hw::mbarrier_arrive_expect_tx(bar, 1024);
          load(chunk, bar, hw::Site::here());  // @load
          if (!right) hw::mbarrier_arrive_expect_tx(bar, 1024);
          hw::mbarrier_wait(bar, 0);
        }
        """,
        ("mbarrier_arrive_expect_tx comes first",), ("load",),
    ),
    "more bytes announced than come": Fault(
        "deadlock",
        """
        make(bar, 1);
        hw::sync_threads();
        if (thread == 0) {
          hw::mbarrier_arrive_expect_tx(bar, right ? 1024 : 2048);
          load(chunk, bar, hw::Site::here());
          hw::mbarrier_wait(bar, 0);  // @wait
        }
        """,
        ("0 of 1 arrivals and 1024 bytes are missing",), ("wait",),
    ),
    "a stage filled again before its readers have left it": Fault(
        "race|deadlock|protocol",
        """
        make(bar, 1), make(bar + 8, 1);
        hw::sync_threads();
        if (thread == 0)
          for (i32 i = 0; i < 2; ++i) {
            if (right) hw::mbarrier_wait(bar + 8, (i & 1) ^ 1);
            hw::mbarrier_arrive_expect_tx(bar, 1024);
            load(chunk, bar, hw::Site::here());  // @load
            if (!right) hw::mbarrier_wait(bar, i);
          }
        if (warp == 1)
          for (i32 i = 0; i < (right ? 2 : 1); ++i) {
            hw::mbarrier_wait(bar, i & 1);
            hw::load_shared<u32>(chunk + 4 * lane);  // @read
            hw::sync_warp();
            if (lane == 0) hw::mbarrier_arrive(bar + 8);
          }
        """,
        
    ),
    "a box over what threads wrote, without a fence": Fault(
        "proxy",
        """
        make(bar, 1);
        hw::store_shared(chunk + 4 * thread, 1u);  // @write
        if (right) hw::fence_proxy_async();
        hw::sync_threads();
        if (thread == 0) {
          hw::mbarrier_arrive_expect_tx(bar, 1024);
          load(chunk, bar, hw::Site::here());  // @load
          hw::mbarrier_wait(bar, 0);
        }
        """,
        (), ("write", "load"),
    ),
    "a box at an address its swizzle does not allow": Fault(
        "misaligned",
        """
        make(bar, 1);
        hw::sync_threads();
        if (thread == 0) {
          hw::mbarrier_arrive_expect_tx(bar, 1024);
          load(right ? chunk : chunk + 128, bar, hw::Site::here());  // @load
          hw::mbarrier_wait(bar, 0);
        }
        """,
        ("no multiple of 1024",), ("load",),
    ),
    "a map that is none": Fault(
        "protocol",
        "hw::prefetch_tensor_map(p.maps[right ? 0 : 3]);  // @map\n",
        ("no tensor map",), ("map",),
    ),
    "a map of other axes": Fault(
        "protocol",
        """
        make(bar, 1);
        hw::sync_threads();
        if (thread == 0) {
          hw::mbarrier_arrive_expect_tx(bar, 1024);
          if (right)
            load(chunk, bar, hw::Site::here());
          else
            hw::tma_load(chunk, p.maps[0], bar, hw::CachePolicy::kNormal, 0, 0, 0);  // @load
          hw::mbarrier_wait(bar, 0);
        }
        """,
        ("3 coordinates for a tensor map of 2 axes",), ("load",),
    ),
    "a map of more rows than the array has": Fault(
        "out of bounds",
        """
        make(bar, 1);
        hw::sync_threads();
        if (thread == 0) {
          hw::mbarrier_arrive_expect_tx(bar, 1024);
          hw::tma_load(chunk, p.maps[2], bar, hw::CachePolicy::kNormal, 0, right ? 56 : 60);  // @load
          hw::mbarrier_wait(bar, 0);
        }
        """,
        ("0 bytes past the end of a",), ("load",),
    ),
    "a copy still on its way at the end": Fault(
        "protocol",
        """
        make(bar, 1);
        hw::sync_threads();
        if (thread == 0) {
          hw::mbarrier_arrive_expect_tx(bar, right ? 1024 : 2048);
          load(chunk, bar, hw::Site::here());  // @load
          if (right) hw::mbarrier_wait(bar, 0);
        }
        """,
        ("the block ends",),
    ),
    "a store of what threads wrote, without a fence": Fault(
        "proxy",
        """
        hw::store_shared(chunk + 16 * thread, u32x4{});  // @write
        if (right) hw::fence_proxy_async();
        hw::sync_threads();
        if (thread == 0) {
          hw::tma_store(p.maps[1], chunk, 0, 0);  // @store
          hw::bulk_commit();
          hw::bulk_wait_read<0>();
        }
        """,
        ("fence_proxy_async",), ("write", "store"),
    ),
    "a fence by one thread for all": Fault(
        "proxy",
        """
        hw::store_shared(chunk + 16 * thread, u32x4{});  // @write
        if (right || thread == 0) hw::fence_proxy_async();
        hw::sync_threads();
        if (thread == 0) {
          hw::tma_store(p.maps[1], chunk, 0, 0);  // @store
          hw::bulk_commit();
          hw::bulk_wait_read<0>();
        }
        """,
        (), ("write", "store"),
    ),
    "a fence behind the barrier": Fault(
        "proxy",
        """
        if (warp == 1)
          for (i32 i = 0; i < 2; ++i) hw::store_shared(chunk + 512 * i + 16 * lane, u32x4{});  // @write
        if (right) hw::fence_proxy_async();
        hw::sync_threads();
        if (warp == 1) hw::fence_proxy_async();
        if (thread == 0) {
          hw::tma_store(p.maps[1], chunk, 0, 0);  // @store
          hw::bulk_commit();
          hw::bulk_wait_read<0>();
        }
        """,
        (), ("write", "store"),
    ),
    "a store that is not waited for before its source changes": Fault(
        "race",
        """
        hw::store_shared(chunk + 16 * thread, u32x4{});
        hw::fence_proxy_async();
        hw::sync_threads();
        if (thread == 0) {
          hw::tma_store(p.maps[1], chunk, 0, 0);  // @store
          hw::bulk_commit();
          if (right) hw::bulk_wait_read<0>();
          hw::store_shared(chunk, 1u);  // @write
          hw::bulk_wait_read<0>();
        }
        """,
        ("has not waited for",), ("write", "store"),
    ),
    "a store that is not committed": Fault(
        "protocol",
        """
        hw::store_shared(chunk + 16 * thread, u32x4{});
        hw::fence_proxy_async();
        hw::sync_threads();
        if (thread == 0) {
          hw::tma_store(p.maps[1], chunk, 0, 0);  // @store
          if (right) hw::bulk_commit();
          hw::bulk_wait_read<0>();
        }
        """,
        ("the block ends",), ("store",),
    ),
    "operands written by threads, without a fence": Fault(
        "proxy",
        """
        operands();
        if (right) hw::fence_proxy_async();
        hw::sync_threads();
        hw::wgmma_fence();
        product(hw::Site::here());  // @product
        hw::wgmma_commit();
        hw::wgmma_wait<0>();
        """,
        (), ("product",), 128,
    ),
    "operands brought by cp.async, without a fence": Fault(
        "proxy",
        """
        make(bar, 128);
        for (i32 i = 0; i < 2; ++i)
          hw::cp_async_16(smem + 2048 + 2048 * i + 16 * thread, a<u8>() + 16 * thread, 16);
        hw::cp_async_commit();
        hw::cp_async_wait<0>();
        if (right) hw::fence_proxy_async();
        hw::sync_threads();
        hw::mbarrier_arrive(bar);
        hw::mbarrier_wait(bar, 0);
        hw::wgmma_fence();
        product(hw::Site::here());  // @product
        hw::wgmma_commit();
        hw::wgmma_wait<0>();
        """,
        ("fence_proxy_async",), ("product",), 128,
    ),
    "operands nobody has written": Fault(
        "uninitialised",
        """
        operands();
        hw::fence_proxy_async();
        hw::sync_threads();
        hw::wgmma_fence();
        const u64 other = operand(right ? smem + 4096 : smem + 4096 + 256);
        hw::wgmma_ss<hw::Half, hw::Major::kK, hw::Major::kK>(d, da, other, true);  // @product
        hw::wgmma_commit();
        hw::wgmma_wait<0>();
        """,
        (), ("product",), 128,
    ),
    "no fence before a product": Fault(
        "protocol",
        """
        operands();
        hw::fence_proxy_async();
        hw::sync_threads();
        if (right) hw::wgmma_fence();
        product(hw::Site::here());  // @product
        hw::wgmma_commit();
        hw::wgmma_wait<0>();
        """,
        ("wgmma_fence",), ("product",), 128,
    ),
    "accumulators touched before the wait": Fault(
        "race",
        """
        operands();
        hw::fence_proxy_async();
        hw::sync_threads();
        hw::wgmma_fence();
        product(hw::Site::here());
        hw::wgmma_commit();
        if (right) hw::wgmma_wait<0>();
        d[0] *= 2.0f;
        hw::wgmma_wait<0>();  // @wait
        """,
        ("accumulators of warp",), ("wait",), 128,
    ),
    "a wait that leaves the group out": Fault(
        "race",
        """
        operands();
        hw::fence_proxy_async();
        hw::sync_threads();
        hw::wgmma_fence();
        product(hw::Site::here());  // @product
        hw::wgmma_commit();
        if (right)
          hw::wgmma_wait<0>();
        else
          hw::wgmma_wait<1>();
        if (thread == 0) hw::store_shared(smem + 2048, 1u);  // @write
        hw::wgmma_wait<0>();
        """,
        ("has not waited for",), ("write", "product"), 128,
    ),
    "an operand overwritten when one warp of four has waited": Fault(
        "race",
        """
        operands();
        hw::fence_proxy_async();
        hw::sync_threads();
        hw::wgmma_fence();
        product(hw::Site::here());  // @product
        hw::wgmma_commit();
        hw::wgmma_wait<0>();
        if (right) hw::sync_threads();
        if (thread == 0) hw::store_shared(smem + 4096, 1u);  // @write
        """,
        (), ("write", "product"), 128,
    ),
    "a stage given back before the products that read it are done": Fault(
        "race",
        """
        make(bar, 4);
        if (thread < 128) operands();
        hw::fence_proxy_async();
        hw::sync_threads();
        if (thread < 128) {
          hw::wgmma_fence();
          product(hw::Site::here());  // @product
          hw::wgmma_commit();
          if (right) hw::wgmma_wait<0>();
          if (lane == 0) hw::mbarrier_arrive(bar);
          hw::sync_warp();
          hw::wgmma_wait<0>();
        } else {
          hw::mbarrier_wait(bar, 0);
          if (lane == 0) hw::store_shared(smem + 4096, 1u);  // @write
        }
        """,
        (), ("write", "product"), 160,
    ),
    "warps of a warpgroup that part": Fault(
        "divergence",
        """
        operands();
        hw::fence_proxy_async();
        hw::sync_threads();
        hw::wgmma_fence();
        if (right || warp != 2) product(hw::Site::here());  // @product
        hw::wgmma_commit();
        hw::wgmma_wait<0>();
        """,
        ("the warps of warpgroup 0 part",), ("product",), 128,
    ),
    "a warp with another descriptor": Fault(
        "divergence",
        """
        operands();
        hw::fence_proxy_async();
        hw::sync_threads();
        hw::wgmma_fence();
        const u64 mine = da + (right || warp != 2 ? 0 : 16);
        hw::wgmma_ss<hw::Half, hw::Major::kK, hw::Major::kK>(d, mine, db, true);  // @product
        hw::wgmma_commit();
        hw::wgmma_wait<0>();
        """,
        ("with other operands",), ("product",), 128,
    ),
    "a product without a wait": Fault(
        "protocol",
        """
        operands();
        hw::fence_proxy_async();
        hw::sync_threads();
        hw::wgmma_fence();
        product(hw::Site::here());
        if (right) hw::wgmma_commit();
        hw::wgmma_wait<0>();
        """,
        ("the block ends",), (), 128,
    ),
    "a descriptor that begins within its swizzle's pattern": Fault(
        "protocol",
        """
        operands();
        hw::fence_proxy_async();
        hw::sync_threads();
        hw::wgmma_fence();
        hw::wgmma_ss<hw::Half, hw::Major::kK, hw::Major::kK>(d, da, right ? db : db + 1, true);  // @product
        hw::wgmma_commit();
        hw::wgmma_wait<0>();
        """,
        ("descriptor b", "16 bytes into"), ("product",), 128,
    ),
    "more registers than there are": Fault(
        "deadlock",
        """
        if (thread < 128) {
          hw::register_dealloc<40>();
        } else if (right) {
          hw::register_alloc<232>();
        } else {
          hw::register_alloc<240>();  // @alloc
        }
        """,
        ("wait at register_alloc",), ("alloc",), 384,
    ),
    "registers taken by giving": Fault(
        "protocol",
        """
        if (right)
          hw::register_dealloc<40>();
        else
          hw::register_dealloc<176>();  // @dealloc
        """,
        ("the warp has 168 registers",), ("dealloc",), 384,
    ),
}  # fmt: skip
NAMES = list(FAULTS)
WORDS = 2048  # of `a`: 64 rows of 128 bytes


def text() -> str:
    """One kernel with all of them: m chooses."""
    bodies = [
        f"        if (m == {i}) {{\n{fault.body.rstrip()}\n        }}\n".replace("// @", f"// {i} ")
        for i, fault in enumerate(FAULTS.values())
    ]
    return PRELUDE + "".join(bodies)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """By threads of a block; compiled once, for their text is one."""
    made = {}
    for threads in {fault.threads for fault in FAULTS.values()}:
        made[threads] = Toy(tmp_path_factory.mktemp("toy"), text(), threads=threads, smem_bytes=8192, sm90=True)
    return made


def run(kernels, name: str, right: bool) -> Toy:
    kernel = kernels[FAULTS[name].threads]
    rows = ((128,), (64, 8), 128)
    maps = [(name, 0, "float16", (64, count), *rows) for name, count in (("a", 64), ("out", 64), ("a", 128))]
    arrays = {"a": aligned(WORDS, np.uint32), "out": aligned(WORDS, np.uint32)}
    kernel.run("emulator", **arrays, n=int(right), m=NAMES.index(name), maps=maps)
    return kernel


@pytest.mark.parametrize("landing", emulator.LANDINGS)
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_reported(kernels, name, landing):
    fault = FAULTS[name]
    found = set()
    for seed in range(4):
        with emulator.schedule(seed=seed, landing=landing), pytest.raises(EmulatorError) as raised:
            run(kernels, name, right=False)
        report = str(raised.value)
        found.add(report)
        assert re.match(rf"({fault.kinds}): ", report), report
    print(report)
    for mark in fault.marks:
        line = kernels[fault.threads].line(f"{NAMES.index(name)} {mark}")
        assert any(re.search(re.escape(line) + r"\b", report) for report in found), f"{mark} is at {line}"
    for words in fault.says:
        assert words in report


@pytest.mark.parametrize("name", FAULTS)
def test_the_mended_kernel_is_not(kernels, name):
    for seed in range(5):
        for landing in emulator.LANDINGS:
            with emulator.schedule(seed=seed, landing=landing):
                run(kernels, name, right=True)
