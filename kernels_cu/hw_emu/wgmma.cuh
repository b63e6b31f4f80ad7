// Twin of hw_cuda/wgmma.cuh. A warp computes its 16 rows in the wait that covers the product, the last moment the
// instruction allows; under landing="early", when it is issued. Until the wait the accumulators hold signalling NaNs.
#pragma once
#include <base.cuh>
#include <hw/barrier.cuh>
#include <hw/device.cuh>
#include <hw/math.cuh>

namespace hw {

enum class Major { kK, kMn };

HW_DEVICE u64 wgmma_descriptor(u32 low, u32 high) { return static_cast<u64>(high) << 32 | low; }

template <i32 kCount>
HW_DEVICE void wgmma_pin(float (&registers)[kCount]) {}
template <i32 kRows, i32 kCount>
HW_DEVICE void wgmma_pin(u32 (&registers)[kRows][kCount]) {}

HW_DEVICE void wgmma_fence(Site site = Site::here()) { cuflash_emu_wgmma_fence(site); }

HW_DEVICE void wgmma_commit(Site site = Site::here()) { cuflash_emu_wgmma_commit(site); }

template <i32 kPending>
HW_DEVICE void wgmma_wait(Site site = Site::here()) {
  cuflash_emu_wgmma_wait(kPending, site);
}

template <class Element, Major kMajorA, Major kMajorB, i32 kCount>
HW_DEVICE void wgmma_ss(float (&d)[kCount], u64 a, u64 b, bool accumulate, Site site = Site::here()) {
  static_assert(kCount % 4 == 0 && kCount >= 4 && kCount <= 128, "N is a multiple of 8, at most 256");
  const u32 flags = (__is_same(Element, Half) ? emu::kWgmmaHalf : 0) |
                    (kMajorA == Major::kMn ? emu::kWgmmaTransposeA : 0) |
                    (kMajorB == Major::kMn ? emu::kWgmmaTransposeB : 0) | (accumulate ? emu::kWgmmaAccumulate : 0);
  cuflash_emu_wgmma(d, 2 * kCount, nullptr, a, b, flags, site);
}

template <class Element, Major kMajorB, i32 kCount>
HW_DEVICE void wgmma_rs(float (&d)[kCount], const u32 (&a)[4], u64 b, bool accumulate, Site site = Site::here()) {
  static_assert(kCount % 4 == 0 && kCount >= 4 && kCount <= 128, "N is a multiple of 8, at most 256");
  const u32 flags = emu::kWgmmaFromRegisters | (__is_same(Element, Half) ? emu::kWgmmaHalf : 0) |
                    (kMajorB == Major::kMn ? emu::kWgmmaTransposeB : 0) | (accumulate ? emu::kWgmmaAccumulate : 0);
  cuflash_emu_wgmma(d, 2 * kCount, a, 0, b, flags, site);
}

}  // namespace hw
