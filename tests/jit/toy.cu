// A kernel small enough to read: scales a row, and runs each instruction class the tests look for once.
#include <base.cuh>
#include <hw/async_copy.cuh>
#include <hw/device.cuh>
#include <hw/math.cuh>
#include <hw/matrix.cuh>
#include <hw/warp.cuh>
#include <variant.cuh>

struct ToyParams {
  const float* x;  // [n]
  float* y;        // [n]
  i32 n;
  float factor;
};

HW_KERNEL(Variant::kThreads) cuflash_toy_scale(HW_GRID_CONSTANT ToyParams params) {
  const i32 i = hw::block_idx_x() * Variant::kThreads + hw::thread_idx();
  if (i < params.n) {
    const float x = hw::load_global(params.x + i) * static_cast<float>(Variant::kFactor);
    hw::store_global(params.y + i, x * params.factor);
  }
}

// One product of 16x16 tiles a step, staged through shared memory.
HW_KERNEL(Variant::kThreads) cuflash_toy_matrix(HW_GRID_CONSTANT ToyParams params) {
  float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  const u32 slot = hw::smem_base() + static_cast<u32>(hw::lane_idx()) * 16;
  HW_NO_UNROLL
  for (i32 step = 0; step < params.n; ++step) {
    hw::cp_async_16(slot, params.x + step * 128 + hw::lane_idx() * 4, 16);
    hw::cp_async_commit();
    hw::cp_async_wait<0>();
    hw::sync_threads();
    u32 tile[4];
    hw::ldmatrix_x4(tile, slot);
    hw::mma_m16n8k16(Variant::Element{}, sum, tile, tile[0], tile[1]);
    hw::sync_threads();
  }
  hw::store_global(params.y + hw::thread_idx(), hw::exp2_approx(sum[0] + sum[1] + sum[2] + sum[3]));
}
