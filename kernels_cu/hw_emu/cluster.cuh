// Twin of hw_cuda/cluster.cuh.
#pragma once
#include <base.cuh>
#include <hw/device.cuh>
#include <hw/tma.cuh>

namespace hw {

HW_DEVICE i32 cluster_rank() { return emu::this_thread()->rank; }
HW_DEVICE void cluster_sync(Site site = Site::here()) { cuflash_emu_cluster_sync(site); }
HW_DEVICE void mbarrier_arrive_at(u32 mbarrier, i32 rank, Site site = Site::here()) {
  cuflash_emu_mbarrier_arrive_at(mbarrier, rank, site);
}

HW_DEVICE void tma_load_to(u32 blocks, u32 destination, const TensorMap& map, u32 mbarrier, CachePolicy policy, i32 c0,
                           i32 c1, i32 c2, i32 c3, Site site = Site::here()) {
  (void)policy;
  const i32 at[] = {c0, c1, c2, c3};
  cuflash_emu_tma_load(destination, &map, mbarrier, blocks, 4, at, site);
}

}  // namespace hw
