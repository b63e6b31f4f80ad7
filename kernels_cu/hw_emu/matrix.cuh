// Twin of hw_cuda/matrix.cuh. The last lane to arrive does the whole warp's work (runtime.cpp).
#pragma once
#include <base.cuh>
#include <hw/device.cuh>
#include <hw/math.cuh>

namespace hw {

HW_DEVICE void ldmatrix_x4(u32 (&r)[4], u32 address, Site site = Site::here()) {
  cuflash_emu_ldmatrix_x4(r, address, site);
}

HW_DEVICE void ldmatrix_x4_trans(u32 (&r)[4], u32 address, Site site = Site::here()) {
  cuflash_emu_ldmatrix_x4_trans(r, address, site);
}

HW_DEVICE void stmatrix_x4(u32 address, const u32 (&r)[4], Site site = Site::here()) {
  cuflash_emu_stmatrix_x4(r, address, site);
}

HW_DEVICE void mma_m16n8k16(Half, float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, Site site = Site::here()) {
  cuflash_emu_mma_m16n8k16_f16(d, a, b0, b1, site);
}

HW_DEVICE void mma_m16n8k16(Bfloat16, float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, Site site = Site::here()) {
  cuflash_emu_mma_m16n8k16_bf16(d, a, b0, b1, site);
}

HW_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, Site site = Site::here()) {
  cuflash_emu_mma_m16n8k8_tf32(d, a, b0, b1, site);
}

}  // namespace hw
