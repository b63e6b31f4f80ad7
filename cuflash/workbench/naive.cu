// Attention in three kernels. Each leaves its whole result in global memory, where the next one reads it.
//
//   scores    S = scale Q K^T    [len, len]    written
//   weights   P = softmax(S)     [len, len]    S read, P written
//   output    O = P V            [len, 64]     P read
//
// One head of head dim 64, float16; len is a multiple of 128. A block of a product has 128 rows, and takes 64 keys at a
// time; a warp of the softmax has a row.
#include <base.cuh>
#include <hw/async_copy.cuh>
#include <hw/device.cuh>
#include <hw/math.cuh>
#include <hw/matrix.cuh>
#include <hw/warp.cuh>
#include <tile/fragment.cuh>
#include <tile/matmul.cuh>
#include <tile/shared_tile.cuh>

struct NaiveParams {
  const void* q;  // [len, 64]
  const void* k;  // [len, 64]
  const void* v;  // [len, 64]
  u32* s;         // [len, len / 2] pairs
  u32* p;         // [len, len / 2] pairs
  u32* out;       // [len, 32] pairs
  i32 len;
  float scale;
};

constexpr i32 kRows = 128, kKeys = 64, kThreads = 256;
using Element = hw::Half;
using Rows = SharedTile<128>;    // 64 elements a row
using Product = Fragment<1, 8>;  // 16 rows of a warp, 64 columns

// kCount rows of an array, from `first` on, on their way into shared memory.
template <i32 kCount>
HW_DEVICE void copy_rows(u32 to, const void* from, i32 first, i32 len) {
  RowLoader<Rows, kCount, kThreads, 16>(to, static_cast<const u8*>(from), 128).load(first, len, 128, 128);
}

HW_DEVICE void all_landed() {
  hw::cp_async_commit();
  hw::cp_async_wait<0>();
  hw::sync_threads();
}

HW_DEVICE float first_of(u32 pair) { return hw::to_float(hw::Half{static_cast<u16>(pair & 0xffff)}); }
HW_DEVICE float second_of(u32 pair) { return hw::to_float(hw::Half{static_cast<u16>(pair >> 16)}); }

// visit(i, c, where) for each pair of a warp's product, `where` its place in an array of `row_pairs` pairs a row.
template <class Visit>
HW_DEVICE void for_each_pair(i32 first_row, i32 first_column, i32 row_pairs, const Visit& visit) {
  for (i32 i = 0; i < Product::kRows; ++i)
    for (i32 c = 0; c < Product::kColTiles; ++c)
      visit(i, c, (first_row + Product::row_of(i)) * row_pairs + (first_column + 8 * c + Product::first_col()) / 2);
}

HW_KERNEL(kThreads) cuflash_naive_scores(HW_GRID_CONSTANT NaiveParams p) {
  const u32 q = hw::smem_base(), k = q + kRows * Rows::kRowBytes;
  const i32 lane = hw::lane_idx(), warp_row = 16 * hw::warp_idx(), first_row = kRows * hw::block_idx_x();
  copy_rows<kRows>(q, p.q, first_row, p.len);
  for (i32 key = 0; key < p.len; key += kKeys) {
    copy_rows<kKeys>(k, p.k, key, p.len);
    all_landed();
    Product s;
    s.fill(0.0f);
    multiply_qk<Element, 64>(s, LaneRows<Rows>(q, warp_row + lane % 16, lane / 16),
                             LaneRows<Rows>(k, lane % 8 + 8 * (lane / 16), lane / 8 % 2));
    for_each_pair(first_row + warp_row, key, p.len / 2, [&](i32 i, i32 c, i32 where) {
      const float* pair = &s.x[0][c][2 * i];
      hw::store_global(p.s + where, hw::pack2<Element>(pair[0] * p.scale, pair[1] * p.scale));
    });
    hw::sync_threads();  // K has been read
  }
}

HW_KERNEL(kThreads) cuflash_naive_weights(HW_GRID_CONSTANT NaiveParams p) {
  const i32 pairs = p.len / 2, row = 8 * hw::block_idx_x() + hw::warp_idx();
  const u32 scores = hw::smem_base() + static_cast<u32>(4 * pairs * hw::warp_idx());
  float most = -kInfinity, sum = 0.0f;
  for (i32 i = hw::lane_idx(); i < pairs; i += 32) {
    const u32 pair = hw::load_global(p.s + row * pairs + i);
    hw::store_shared(scores + 4 * i, pair);
    most = hw::max(most, hw::max(first_of(pair), second_of(pair)));
  }
  for (i32 mask = 1; mask < 32; mask *= 2) most = hw::max(most, hw::shfl_xor(most, mask));
  const auto weight = [&](float score) { return hw::exp2_approx((score - most) * kLog2e); };
  for (i32 i = hw::lane_idx(); i < pairs; i += 32) {
    const u32 pair = hw::load_shared<u32>(scores + 4 * i);
    sum += weight(first_of(pair)) + weight(second_of(pair));
  }
  for (i32 mask = 1; mask < 32; mask *= 2) sum += hw::shfl_xor(sum, mask);
  for (i32 i = hw::lane_idx(); i < pairs; i += 32) {
    const u32 pair = hw::load_shared<u32>(scores + 4 * i);
    const float share = hw::rcp_approx(sum);
    hw::store_global(p.p + row * pairs + i,
                     hw::pack2<Element>(weight(first_of(pair)) * share, weight(second_of(pair)) * share));
  }
}

HW_KERNEL(kThreads) cuflash_naive_output(HW_GRID_CONSTANT NaiveParams p) {
  const u32 v = hw::smem_base();
  const i32 first_row = kRows * hw::block_idx_x() + 16 * hw::warp_idx();
  Product o;
  o.fill(0.0f);
  for (i32 key = 0; key < p.len; key += kKeys) {
    copy_rows<kKeys>(v, p.v, key, p.len);
    Product weights;
    for_each_pair(first_row, key, p.len / 2, [&](i32 i, i32 c, i32 where) {
      const u32 pair = hw::load_global(p.p + where);
      weights.x[0][c][2 * i] = first_of(pair);
      weights.x[0][c][2 * i + 1] = second_of(pair);
    });
    all_landed();
    multiply_pv<Element, Product, Product, Rows>(o, weights, v);
    hw::sync_threads();  // V has been read
  }
  for_each_pair(first_row, 0, 32, [&](i32 i, i32 c, i32 where) {
    hw::store_global(p.out + where, hw::pack2<Element>(o.x[0][c][2 * i], o.x[0][c][2 * i + 1]));
  });
}
