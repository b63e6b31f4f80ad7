// After the backward: dsink and the gradient of ALiBi's slopes, from one partial sum for each warp of each query tile.
// They are added in an order of their own, so that the result is the same bits every time.
//
//   grid    (head, sequence); one sequence where the slopes are the same for all
//   roles   one warp
#include <base.cuh>
#include <hw/device.cuh>
#include <hw/math.cuh>
#include <hw/warp.cuh>
#include <params/backward.cuh>
#include <tile/schedule.cuh>
#include <variant.cuh>

HW_DEVICE float sum_of(const float* partials, i64 begin, i64 end) {
  float sum = 0.0f;
  for (i64 i = begin + hw::lane_idx(); i < end; i += 32) sum += hw::load_global(partials + i);
  HW_UNROLL
  for (i32 mask = 16; mask > 0; mask /= 2) sum += hw::shfl_xor(sum, mask);
  return sum;
}

HW_KERNEL(32) cuflash_backward_sum(HW_GRID_CONSTANT BackwardParams p) {
  using V = Variant;
  const i32 head = hw::block_idx_x(), sequence = hw::block_idx_y();
  if (p.dsink != nullptr && sequence == 0) {
    const float sum = sum_of(p.sink_partials + head * p.partials, 0, p.partials);
    if (hw::lane_idx() == 0) {
      if (p.sink_is_element && sizeof(V::Element) == 2) {
        hw::store_global(static_cast<u16*>(p.dsink) + head, static_cast<u16>(hw::pack2<V::Packed>(sum, 0.0f)));
      } else {
        hw::store_global(static_cast<float*>(p.dsink) + head, sum);
      }
    }
  }
  if (p.dslopes == nullptr) return;
  if (p.alibi_stride_batch == 0) {
    const float sum = sum_of(p.slope_partials + head * p.partials, 0, p.partials);
    if (hw::lane_idx() == 0) hw::store_global(p.dslopes + head, sum);
    return;
  }
  for (i32 b = sequence; b < p.batch; b += hw::grid_dim_y()) {
    const i64 begin = static_cast<i64>(slot_begin(p.cu_seqlens_q, p.q_len, b, V::kHeld)) * V::kWarps;
    const i64 end = static_cast<i64>(slot_begin(p.cu_seqlens_q, p.q_len, b + 1, V::kHeld)) * V::kWarps;
    const float sum = sum_of(p.slope_partials + head * p.partials, begin, end);
    if (hw::lane_idx() == 0) hw::store_global(p.dslopes + b * p.alibi_stride_batch + head, sum);
  }
}
