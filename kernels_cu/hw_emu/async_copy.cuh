// Twin of hw_cuda/async_copy.cuh. A copy lands in the wait that covers its group, the last moment the instruction
// allows; under landing="early", when it is issued. Its source is read when it lands.
#pragma once
#include <base.cuh>
#include <hw/device.cuh>

namespace hw {

HW_DEVICE void cp_async_16(u32 destination, const void* source, i32 source_bytes, Site site = Site::here()) {
  cuflash_emu_cp_async(destination, source, 16, source_bytes, site);
}

HW_DEVICE void cp_async_4(u32 destination, const void* source, i32 source_bytes, Site site = Site::here()) {
  cuflash_emu_cp_async(destination, source, 4, source_bytes, site);
}

HW_DEVICE void cp_async_commit(Site site = Site::here()) { cuflash_emu_cp_async_commit(site); }

template <i32 kPending>
HW_DEVICE void cp_async_wait(Site site = Site::here()) {
  cuflash_emu_cp_async_wait(kPending, site);
}

}  // namespace hw
