// Puts the pieces of decode_sm80.cu together:
//
//   m = max of m_s,   w_s = 2^(c m_s - c m),   l = sum of w_s l_s,   O = sum of w_s O_s
//
// and O / l at last, as if the row had been in one piece. m and l stay apart: their lse is rounded as a large score is.
//
//   grid    (rows, query head, sequence); one more sequence where queries are packed: the rows behind the last
//   roles   a warp has one row, its lanes the pieces first, then the columns. Pieces are added in their order.
#include <base.cuh>
#include <hw/device.cuh>
#include <hw/math.cuh>
#include <hw/warp.cuh>
#include <params/decode.cuh>
#include <tile/pieces.cuh>
#include <tile/score.cuh>
#include <tile/sequence.cuh>
#include <tile/softmax.cuh>
#include <variant.cuh>

template <class Element>
HW_DEVICE void store_element(u8* to, float x) {
  if constexpr (sizeof(Element) == 4) {
    hw::store_global(reinterpret_cast<float*>(to), x);
  } else {
    hw::store_global(reinterpret_cast<u16*>(to), static_cast<u16>(hw::pack2<Element>(x, 0.0f)));
  }
}

constexpr i32 kColumns = 256 / 32;  // that a lane may have

HW_DEVICE float warp_max(float x) {
  HW_UNROLL
  for (i32 mask = 1; mask < 32; mask *= 2) x = hw::max(x, hw::shfl_xor(x, mask));
  return x;
}

template <class V>
HW_DEVICE void combine_row(const DecodeParams& p, i32 sequence, const Sequence& seq, i32 row) {
  using Element = typename V::Element;
  const i32 head = hw::block_idx_y(), lane = hw::lane_idx();
  RowPieces pieces;
  if (row < seq.q_len) pieces = pieces_of_row(p, sequence, seq, head, row);
  const auto line_of = [&](i32 s) { return s == 0 ? pieces.own : pieces.base + s * pieces.step; };

  const float sink = row < seq.q_len ? read_sink<Element>(p, head) : -kInfinity;
  float maximum = -kInfinity;
  for (i32 s = lane; s < pieces.count; s += 32) {
    maximum = hw::max(maximum, hw::load_global(p.partial_max + line_of(s)));
  }
  maximum = warp_max(maximum);
  const auto weight_of = [&](float own) { return hw::exp2_approx(fall_of(own, maximum, p.softmax_scale)); };
  float sum = 0.0f;
  for (i32 s = lane; s < pieces.count; s += 32) {
    const float weight = weight_of(hw::load_global(p.partial_max + line_of(s)));
    sum = hw::fma(weight, hw::load_global(p.partial_sum + line_of(s)), sum);
  }
  HW_UNROLL
  for (i32 mask = 1; mask < 32; mask *= 2) sum += hw::shfl_xor(sum, mask);
  const FinishedRow finished = finish_row(maximum, sum, p.softmax_scale, sink);

  u8* out = at_row(p.out, seq, p.out_stride_batch, seq.q_begin + row, p.out_stride_row) + head * p.out_stride_head;
  float x[kColumns];  // of the columns lane, lane + 32, ...
  HW_UNROLL
  for (i32 c = 0; c < kColumns; ++c) x[c] = 0.0f;
  HW_NO_UNROLL
  for (i32 s = 0; s < pieces.count; ++s) {
    // A piece of which the row sees nothing has nothing in partial_out.
    const i64 line = line_of(s);
    const float own = hw::load_global(p.partial_max + line);
    if (own == -kInfinity) continue;
    const float weight = weight_of(own);
    HW_UNROLL
    for (i32 c = 0; c < kColumns; ++c) {
      const i32 column = lane + 32 * c;
      if (column < p.head_dim_v) {
        const float part = hw::load_global(p.partial_out + line * p.head_dim_v + column);
        x[c] = hw::fma(weight, part, x[c]);
      }
    }
  }
  HW_UNROLL
  for (i32 c = 0; c < kColumns; ++c) {
    const i32 column = lane + 32 * c;
    if (column < p.head_dim_v) {
      store_element<Element>(out + column * static_cast<i32>(sizeof(Element)), x[c] * finished.out_scale);
    }
  }
  const i64 at = row_offset(seq, p.lse_stride_batch, seq.q_begin + row, 1) + head * p.lse_stride_head;
  if (p.lse != nullptr && lane == 0) hw::store_global(p.lse + at, finished.lse);
  if (p.max_logit != nullptr && lane == 0) hw::store_global(p.max_logit + at, finished.max_logit);
}

HW_KERNEL(Variant::kThreads) cuflash_combine(HW_GRID_CONSTANT DecodeParams p) {
  constexpr i32 kWarps = Variant::kThreads / 32;
  const i32 sequence = hw::block_idx_z();
  const Sequence seq = read_sequence<true>(p, sequence);
  for (i32 row = hw::block_idx_x() * kWarps + hw::warp_idx(); row < seq.q_rows; row += hw::grid_dim_x() * kWarps) {
    combine_row<Variant>(p, sequence, seq, row);
  }
}
