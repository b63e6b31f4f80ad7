// A small attention forward, to measure the emulator with: head dim 64, bfloat16, 64 queries and 4 warps a block.
//
//   out = softmax(scale q k^T) v    q, out [64 grid.x, 64]    k, v [k_len, 64], k_len a multiple of 64
//
//   shared    q, k, v    64 rows of 128 bytes each, 16-byte units exchanged by row: unit ^= row % 8
#include <base.cuh>
#include <hw/async_copy.cuh>
#include <hw/device.cuh>
#include <hw/math.cuh>
#include <hw/matrix.cuh>
#include <hw/warp.cuh>

struct SpeedParams {
  const void* q;     // [rows, 64]
  const void* k;     // [k_len, 64]
  const void* v;     // [k_len, 64]
  void* out;         // [rows, 64]
  i32 k_len;
  float scale_log2;  // scale * log2(e)
};

constexpr i32 kRowBytes = 128, kTileBytes = 64 * kRowBytes;

HW_DEVICE u32 at(u32 tile, i32 row, i32 unit) {
  return tile + static_cast<u32>(row * kRowBytes + (unit ^ (row & 7)) * 16);
}

HW_DEVICE void copy_tile(u32 tile, const void* from) {
  for (i32 i = hw::thread_idx(); i < kTileBytes / 16; i += 128)
    hw::cp_async_16(at(tile, i / 8, i % 8), static_cast<const u8*>(from) + i * 16, 16);
  hw::cp_async_commit();
}

HW_KERNEL(128) cuflash_emu_speed(HW_GRID_CONSTANT SpeedParams params) {
  const u32 q = hw::smem_base(), k = q + kTileBytes, v = k + kTileBytes;
  const i32 lane = hw::lane_idx(), row = hw::warp_idx() * 16;
  const i64 tile_offset = static_cast<i64>(hw::block_idx_x()) * kTileBytes;

  copy_tile(q, static_cast<const u8*>(params.q) + tile_offset);
  copy_tile(k, params.k);
  hw::cp_async_wait<0>();
  hw::sync_threads();
  u32 a[4][4];
  for (i32 d = 0; d < 4; ++d) hw::ldmatrix_x4(a[d], at(q, row + (lane & 15), 2 * d + (lane >> 4)));

  float o[8][4] = {}, most[2] = {-kInfinity, -kInfinity}, sum[2] = {};
  for (i32 begin = 0; begin < params.k_len; begin += 64) {
    copy_tile(v, static_cast<const u8*>(params.v) + begin * kRowBytes);

    // S = Q K^T    [16, 64] a warp
    float s[8][4] = {};
    for (i32 d = 0; d < 4; ++d)
      for (i32 n = 0; n < 4; ++n) {
        u32 b[4];
        hw::ldmatrix_x4(b, at(k, 16 * n + (lane & 7) + 8 * (lane >> 4), 2 * d + (lane >> 3 & 1)));
        hw::mma_m16n8k16(hw::Bfloat16{}, s[2 * n], a[d], b[0], b[1]);
        hw::mma_m16n8k16(hw::Bfloat16{}, s[2 * n + 1], a[d], b[2], b[3]);
      }

    for (i32 half = 0; half < 2; ++half) {
      float m = most[half];
      for (i32 n = 0; n < 8; ++n) m = hw::max(m, hw::max(s[n][2 * half], s[n][2 * half + 1]));
      m = hw::max(m, hw::shfl_xor(m, 1));
      m = hw::max(m, hw::shfl_xor(m, 2));
      const float alpha = hw::exp2_approx((most[half] - m) * params.scale_log2);
      most[half] = m;
      sum[half] *= alpha;
      for (i32 n = 0; n < 8; ++n)
        for (i32 i = 2 * half; i < 2 * half + 2; ++i) {
          s[n][i] = hw::exp2_approx((s[n][i] - m) * params.scale_log2);
          sum[half] += s[n][i];
          o[n][i] *= alpha;
        }
    }

    // Every thread's copies of V have landed; everyone has read K.
    hw::cp_async_wait<0>();
    hw::sync_threads();
    if (begin + 64 < params.k_len) copy_tile(k, static_cast<const u8*>(params.k) + (begin + 64) * kRowBytes);

    // O += P V    [16, 64] a warp
    for (i32 j = 0; j < 4; ++j) {
      const u32 p[4] = {hw::pack2<hw::Bfloat16>(s[2 * j][0], s[2 * j][1]),
                        hw::pack2<hw::Bfloat16>(s[2 * j][2], s[2 * j][3]),
                        hw::pack2<hw::Bfloat16>(s[2 * j + 1][0], s[2 * j + 1][1]),
                        hw::pack2<hw::Bfloat16>(s[2 * j + 1][2], s[2 * j + 1][3])};
      for (i32 n = 0; n < 4; ++n) {
        u32 b[4];
        hw::ldmatrix_x4_trans(b, at(v, 16 * j + (lane & 15), 2 * n + (lane >> 4)));
        hw::mma_m16n8k16(hw::Bfloat16{}, o[2 * n], p, b[0], b[1]);
        hw::mma_m16n8k16(hw::Bfloat16{}, o[2 * n + 1], p, b[2], b[3]);
      }
    }

    // Every thread's copies of the next K have landed; everyone has read V.
    hw::cp_async_wait<0>();
    hw::sync_threads();
  }

  for (i32 half = 0; half < 2; ++half) {
    float total = sum[half];
    total += hw::shfl_xor(total, 1);
    total += hw::shfl_xor(total, 2);
    const float inverse = hw::rcp_approx(total);
    u8* out = static_cast<u8*>(params.out) + tile_offset + (row + (lane >> 2) + 8 * half) * kRowBytes + (lane & 3) * 4;
    for (i32 n = 0; n < 8; ++n)
      hw::store_global(reinterpret_cast<u32*>(out + 16 * n),
                       hw::pack2<hw::Bfloat16>(o[n][2 * half] * inverse, o[n][2 * half + 1] * inverse));
  }
}
