// Twin of hw_cuda/barrier.cuh. In a kernel that includes it, clocks order accesses to shared memory (clocks.cpp).
#pragma once
#include <base.cuh>
#include <hw/device.cuh>

namespace hw {

HW_DEVICE void mbarrier_init(u32 mbarrier, u32 count, Site site = Site::here()) {
  cuflash_emu_mbarrier_init(mbarrier, count, site);
}

HW_DEVICE void fence_mbarrier_init(Site site = Site::here()) { cuflash_emu_fence_mbarrier_init(site); }

HW_DEVICE void mbarrier_arrive(u32 mbarrier, Site site = Site::here()) { cuflash_emu_mbarrier_arrive(mbarrier, site); }

HW_DEVICE void mbarrier_arrive_expect_tx(u32 mbarrier, u32 bytes, Site site = Site::here()) {
  cuflash_emu_mbarrier_arrive_expect_tx(mbarrier, bytes, site);
}

HW_DEVICE void mbarrier_wait(u32 mbarrier, u32 parity, Site site = Site::here()) {
  cuflash_emu_mbarrier_wait(mbarrier, parity, site);
}

HW_DEVICE void named_sync(i32 id, i32 threads, Site site = Site::here()) { cuflash_emu_named_sync(id, threads, site); }
HW_DEVICE void named_arrive(i32 id, i32 threads, Site site = Site::here()) {
  cuflash_emu_named_arrive(id, threads, site);
}

HW_DEVICE void fence_proxy_async(Site site = Site::here()) { cuflash_emu_fence_proxy_async(site); }

template <i32 kRegisters>
HW_DEVICE void register_dealloc(Site site = Site::here()) {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "24 to 256, a multiple of 8");
  cuflash_emu_set_registers(kRegisters, false, site);
}
template <i32 kRegisters>
HW_DEVICE void register_alloc(Site site = Site::here()) {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "24 to 256, a multiple of 8");
  cuflash_emu_set_registers(kRegisters, true, site);
}

}  // namespace hw
