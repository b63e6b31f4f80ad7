// Around the backward, for the gradient of an array that score_mod captured: clears the sums, and afterwards brings them
// to the array's dtype.
//
//   grid    (blocks); each thread strides over elements
#include <base.cuh>
#include <hw/device.cuh>
#include <hw/math.cuh>
#include <params/captured_gradient.cuh>
#include <tile/fixed_sum.cuh>
#include <variant.cuh>

HW_KERNEL(Variant::kThreads) cuflash_captured_gradient(HW_GRID_CONSTANT CapturedGradientParams p) {
  using V = Variant;
  const i64 step = static_cast<i64>(hw::grid_dim_x()) * V::kThreads;
  for (i64 i = static_cast<i64>(hw::block_idx_x()) * V::kThreads + hw::thread_idx(); i < p.size; i += step) {
    if constexpr (V::kClear) {
      constexpr i32 kWords = V::kFixed ? 6 : 1;
      for (i32 word = 0; word < kWords; ++word) hw::store_global(static_cast<u32*>(p.sums) + kWords * i + word, 0u);
    } else {
      float value;
      if constexpr (V::kFixed) {
        const FixedSum* sum = static_cast<const FixedSum*>(p.sums) + i;
        value = value_of(static_cast<i64>(hw::load_global(&sum->high)), static_cast<i64>(hw::load_global(&sum->low)),
                         hw::load_global(&sum->beyond));
      } else {
        value = hw::load_global(static_cast<const float*>(p.sums) + i);
      }
      if constexpr (sizeof(V::Element) == 2) {
        hw::store_global(static_cast<u16*>(p.out) + i, static_cast<u16>(hw::pack2<V::Packed>(value, 0.0f)));
      } else {
        hw::store_global(static_cast<float*>(p.out) + i, value);
      }
    }
  }
}
