// Twin of hw_cuda/tma.cuh. A load lands in the wait for its mbarrier that needs it, the last moment the instruction
// allows, and a store is done in the wait for its group; under landing="early", both when they are issued.
#pragma once
#include <base.cuh>
#include <hw/barrier.cuh>
#include <hw/device.cuh>

namespace hw {

enum class CachePolicy : u64 {
  kNormal = 0x1000000000000000ull,
  kEvictFirst = 0x12f0000000000000ull,
  kEvictLast = 0x14f0000000000000ull,
};

HW_DEVICE void prefetch_tensor_map(const TensorMap& map, Site site = Site::here()) {
  cuflash_emu_prefetch_tensor_map(&map, site);
}

HW_DEVICE void tma_load(u32 destination, const TensorMap& map, u32 mbarrier, CachePolicy policy, i32 c0, i32 c1,
                        Site site = Site::here()) {
  const i32 at[] = {c0, c1};
  cuflash_emu_tma_load(destination, &map, mbarrier, 0, 2, at, site);
}
HW_DEVICE void tma_load(u32 destination, const TensorMap& map, u32 mbarrier, CachePolicy policy, i32 c0, i32 c1, i32 c2,
                        Site site = Site::here()) {
  const i32 at[] = {c0, c1, c2};
  cuflash_emu_tma_load(destination, &map, mbarrier, 0, 3, at, site);
}
HW_DEVICE void tma_load(u32 destination, const TensorMap& map, u32 mbarrier, CachePolicy policy, i32 c0, i32 c1, i32 c2,
                        i32 c3, Site site = Site::here()) {
  const i32 at[] = {c0, c1, c2, c3};
  cuflash_emu_tma_load(destination, &map, mbarrier, 0, 4, at, site);
}
HW_DEVICE void tma_load(u32 destination, const TensorMap& map, u32 mbarrier, CachePolicy policy, i32 c0, i32 c1, i32 c2,
                        i32 c3, i32 c4, Site site = Site::here()) {
  const i32 at[] = {c0, c1, c2, c3, c4};
  cuflash_emu_tma_load(destination, &map, mbarrier, 0, 5, at, site);
}

HW_DEVICE void tma_store(const TensorMap& map, u32 source, i32 c0, i32 c1, Site site = Site::here()) {
  const i32 at[] = {c0, c1};
  cuflash_emu_tma_store(&map, source, 2, at, site);
}
HW_DEVICE void tma_store(const TensorMap& map, u32 source, i32 c0, i32 c1, i32 c2, Site site = Site::here()) {
  const i32 at[] = {c0, c1, c2};
  cuflash_emu_tma_store(&map, source, 3, at, site);
}
HW_DEVICE void tma_store(const TensorMap& map, u32 source, i32 c0, i32 c1, i32 c2, i32 c3, Site site = Site::here()) {
  const i32 at[] = {c0, c1, c2, c3};
  cuflash_emu_tma_store(&map, source, 4, at, site);
}
HW_DEVICE void tma_store(const TensorMap& map, u32 source, i32 c0, i32 c1, i32 c2, i32 c3, i32 c4,
                         Site site = Site::here()) {
  const i32 at[] = {c0, c1, c2, c3, c4};
  cuflash_emu_tma_store(&map, source, 5, at, site);
}

HW_DEVICE void bulk_commit(Site site = Site::here()) { cuflash_emu_bulk_commit(site); }

template <i32 kPending>
HW_DEVICE void bulk_wait_read(Site site = Site::here()) {
  cuflash_emu_bulk_wait(kPending, site);
}

}  // namespace hw
