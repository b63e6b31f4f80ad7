// Puts the parts of decode_sm80.cu together:
//
//   out = sum of 2^(lse_s - lse) out_s,   2^lse = sum of 2^lse_s (and 2^sink)
//
//   grid    (rows, query head, sequence); one more sequence where queries are packed: the rows behind the last
//   roles   a warp has one row, its lanes the parts first, then the columns. Parts are added in their order.
#include <base.cuh>
#include <hw/device.cuh>
#include <hw/math.cuh>
#include <hw/warp.cuh>
#include <params/decode.cuh>
#include <tile/score.cuh>
#include <tile/sequence.cuh>
#include <variant.cuh>

template <class Element>
HW_DEVICE void store_element(u8* to, float x) {
  if constexpr (sizeof(Element) == 4) {
    hw::store_global(reinterpret_cast<float*>(to), x);
  } else {
    hw::store_global(reinterpret_cast<u16*>(to), static_cast<u16>(hw::pack2<Element>(x, 0.0f)));
  }
}

template <class V>
HW_DEVICE void combine_row(const DecodeParams& p, const Sequence& seq, i32 row) {
  using Element = typename V::Element;
  const i32 head = hw::block_idx_y(), lane = hw::lane_idx();
  const i32 parts = row < seq.q_len ? ceil_div(seq.k_len, p.split_size) : 0;
  const i64 step = static_cast<i64>(hw::grid_dim_y()) * p.partial_rows;  // lines from part to part
  const i64 line = head * p.partial_rows + seq.dense_idx * static_cast<i64>(p.q_len) + seq.q_begin + row;

  const float sink = row < seq.q_len ? read_sink<Element>(p, head) : -kInfinity;
  float top = sink;
  for (i32 s = lane; s < parts; s += 32) top = hw::max(top, hw::load_global(p.partial_lse + s * step + line));
  HW_UNROLL
  for (i32 mask = 1; mask < 32; mask *= 2) top = hw::max(top, hw::shfl_xor(top, mask));
  const float safe = top == -kInfinity ? 0.0f : top;
  float sum = 0.0f;
  for (i32 s = lane; s < parts; s += 32) {
    sum += hw::exp2_approx(hw::load_global(p.partial_lse + s * step + line) - safe);
  }
  HW_UNROLL
  for (i32 mask = 1; mask < 32; mask *= 2) sum += hw::shfl_xor(sum, mask);
  sum += hw::exp2_approx(sink - safe);
  const float scale = sum == 0.0f ? 0.0f : hw::rcp_approx(sum);

  u8* out = at_row(p.out, seq, p.out_stride_batch, seq.q_begin + row, p.out_stride_row) + head * p.out_stride_head;
  for (i32 column = lane; column < p.head_dim_v; column += 32) {
    float x = 0.0f;
    for (i32 s = 0; s < parts; ++s) {
      // A part of which the row sees nothing has nothing in partial_out.
      const float lse = hw::load_global(p.partial_lse + s * step + line);
      if (lse == -kInfinity) continue;
      const float part = hw::load_global(p.partial_out + (s * step + line) * p.head_dim_v + column);
      x = hw::fma(hw::exp2_approx(lse - safe), part, x);
    }
    store_element<Element>(out + column * static_cast<i32>(sizeof(Element)), x * scale);
  }
  if (p.lse != nullptr && lane == 0) {
    const i64 at = row_offset(seq, p.lse_stride_batch, seq.q_begin + row, 1) + head * p.lse_stride_head;
    hw::store_global(p.lse + at, sum == 0.0f ? -kInfinity : (safe + hw::log2_approx(sum)) * kLn2);
  }
}

HW_KERNEL(Variant::kThreads) cuflash_combine(HW_GRID_CONSTANT DecodeParams p) {
  constexpr i32 kWarps = Variant::kThreads / 32;
  const Sequence seq = read_sequence<true>(p, hw::block_idx_z());
  for (i32 row = hw::block_idx_x() * kWarps + hw::warp_idx(); row < seq.q_rows; row += hw::grid_dim_x() * kWarps) {
    combine_row<Variant>(p, seq, row);
  }
}
