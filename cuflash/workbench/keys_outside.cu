// The loops of the first FlashAttention paper (Algorithm 1): keys and values outside, queries inside. No score leaves the
// chip, but a row meets the keys at times far apart, so its O, l and m wait in global memory in between.
//
//   for each tile of K and V:                      read once
//     for each tile of Q, O, l, m:                 read, and O, l, m written, once for each tile of keys
//       S = scale Q K^T
//       m' = max(m, rowmax(S))                     the running maximum
//       P = exp(S - m')
//       l' = exp(m - m') l + rowsum(P)             the running sum of weights
//       O' = (l exp(m - m') O + P V) / l'          always divided by the sum so far
//
// One head of head dim 64, one block; q, k, v float16, O, l, m float32; len is a multiple of 128.
#include <base.cuh>
#include <hw/async_copy.cuh>
#include <hw/device.cuh>
#include <hw/math.cuh>
#include <hw/matrix.cuh>
#include <hw/warp.cuh>
#include <tile/fragment.cuh>
#include <tile/matmul.cuh>
#include <tile/shared_tile.cuh>

struct KeysOutsideParams {
  const void* q;  // [len, 64]
  const void* k;  // [len, 64]
  const void* v;  // [len, 64]
  float* out;     // [len, 64], zeros at first
  float* l;       // [len], zeros at first
  float* m;       // [len], -inf at first
  i32 len;
  float scale;
};

constexpr i32 kRows = 128, kKeys = 128, kThreads = 256;
using Element = hw::Half;
using Rows = SharedTile<128>;           // 64 elements a row
using Scores = Fragment<1, kKeys / 8>;  // 16 rows of a warp, and their keys
using Product = Fragment<1, 8>;         // 16 rows of a warp, 64 columns of O

struct alignas(8) Pair {
  float x[2];
};

template <i32 kCount>
HW_DEVICE void copy_rows(u32 to, const void* from, i32 first, i32 len) {
  RowLoader<Rows, kCount, kThreads, 16>(to, static_cast<const u8*>(from), 128).load(first, len, 128, 128);
}

HW_DEVICE void all_landed() {
  hw::cp_async_commit();
  hw::cp_async_wait<0>();
  hw::sync_threads();
}

// One number of a row, read by the first of its four lanes.
HW_DEVICE float read_row(const float* from) {
  float x = 0.0f;
  if (hw::lane_idx() % 4 == 0) x = hw::load_global(from);
  return hw::shfl(x, hw::lane_idx() / 4 * 4);
}

HW_KERNEL(kThreads) cuflash_keys_outside(HW_GRID_CONSTANT KeysOutsideParams p) {
  const u32 q = hw::smem_base(), k = q + kRows * Rows::kRowBytes, v = k + kKeys * Rows::kRowBytes;
  const i32 lane = hw::lane_idx(), warp_row = 16 * hw::warp_idx();
  for (i32 key = 0; key < p.len; key += kKeys) {
    copy_rows<kKeys>(k, p.k, key, p.len);
    copy_rows<kKeys>(v, p.v, key, p.len);
    for (i32 first = 0; first < p.len; first += kRows) {
      copy_rows<kRows>(q, p.q, first, p.len);
      all_landed();
      Scores s;
      Product o;
      s.fill(0.0f);
      multiply_qk<Element, 64>(s, LaneRows<Rows>(q, warp_row + lane % 16, lane / 16),
                               LaneRows<Rows>(k, lane % 8 + 8 * (lane / 16), lane / 8 % 2));
      for (i32 i = 0; i < Product::kRows; ++i) {
        const i32 row = first + warp_row + Product::row_of(i);
        const float m = read_row(p.m + row), l = read_row(p.l + row);
        float most = m, sum = 0.0f;
        for (i32 c = 0; c < Scores::kColTiles; ++c)
          for (i32 j = 2 * i; j < 2 * i + 2; ++j) most = hw::max(most, s.x[0][c][j] * p.scale);
        most = quad_max(most);
        for (i32 c = 0; c < Scores::kColTiles; ++c)
          for (i32 j = 2 * i; j < 2 * i + 2; ++j) {
            s.x[0][c][j] = hw::exp2_approx((s.x[0][c][j] * p.scale - most) * kLog2e);
            sum += s.x[0][c][j];
          }
        const float before = l * hw::exp2_approx((m - most) * kLog2e), total = before + quad_sum(sum);
        for (i32 c = 0; c < 8; ++c) {
          const float* partial = p.out + row * 64 + 8 * c + Product::first_col();
          const Pair pair = hw::load_global(reinterpret_cast<const Pair*>(partial));
          for (i32 j = 0; j < 2; ++j) o.x[0][c][2 * i + j] = pair.x[j] * before * hw::rcp_approx(total);
        }
        for (i32 c = 0; c < Scores::kColTiles; ++c)
          for (i32 j = 2 * i; j < 2 * i + 2; ++j) s.x[0][c][j] *= hw::rcp_approx(total);
        if (lane % 4 == 0) {
          hw::store_global(p.m + row, most);
          hw::store_global(p.l + row, total);
        }
      }
      multiply_pv<Element, Product, Scores, Rows>(o, s, v);
      for (i32 i = 0; i < Product::kRows; ++i)
        for (i32 c = 0; c < 8; ++c) {
          float* partial = p.out + (first + warp_row + Product::row_of(i)) * 64 + 8 * c + Product::first_col();
          hw::store_global(reinterpret_cast<Pair*>(partial), Pair{{o.x[0][c][2 * i], o.x[0][c][2 * i + 1]}});
        }
      hw::sync_threads();  // Q has been read, and behind the last query tile K and V
    }
  }
}
