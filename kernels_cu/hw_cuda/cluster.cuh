// Blocks that run at the same time on neighbouring multiprocessors and reach each other's shared memory: a cluster.
// Compute capability 9.0 and later. Its blocks neighbour along x of the grid. (PTX ISA, "Cluster of Cooperative Thread
// Arrays")
#pragma once
#include <base.cuh>
#include <hw/device.cuh>
#include <hw/tma.cuh>

namespace hw {

// Which block of its cluster this is: 0, 1, ...
HW_DEVICE i32 cluster_rank() {
  i32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of the cluster that have not ended meet; what any wrote before, all see. Before the
// first access to another block's mbarrier, so that it is made, and before a block ends whom others may still reach.
HW_DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// One arrival at the mbarrier that has this address in the block of that rank. Behind it lie the thread's reads: memory
// that it has read may be filled again. What it has written, the other block need not see.
// NOTE: with .release.cluster, under which it would, the compiler makes all memory wait (MEMBAR.ALL.GPU).
HW_DEVICE void mbarrier_arrive_at(u32 mbarrier, i32 rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}" ::"r"(mbarrier),
      "r"(rank)
      : "memory");
}

// A tensor copy to several blocks: bit r of `blocks` is the one of rank r. In each, the box lands at the same address, and
// its bytes count on the mbarrier of the same address.
HW_DEVICE void tma_load_to(u32 blocks, u32 destination, const TensorMap& map, u32 mbarrier, CachePolicy policy, i32 c0,
                           i32 c1, i32 c2, i32 c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7, %8;" ::"r"(destination),
      "l"(&map), "r"(mbarrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "h"(static_cast<u16>(blocks)),
      "l"(static_cast<u64>(policy))
      : "memory");
}

}  // namespace hw
