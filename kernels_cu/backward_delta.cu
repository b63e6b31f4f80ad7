// Before the backward: what it needs of every query row, each a single number.
//
//   delta     = sum(dout out) - dlse       dS = P (dP - delta), the softmax's own derivative
//   lse_base2 = lse log2(e)                +inf where the row keeps nothing: then P = 2^(s - inf) = 0
//
// A row that keeps nothing ignores dout, and dlse but for what the sink has of it. Its lse is -inf, or with a sink the sink:
// as it is of a row that keeps next to nothing, less than 2^-24. So of rows with such an lse, and nothing but 0 in out,
// those keep nothing whose gradient would be no number.
//
//   grid    (row block, head, sequence); packed arrays are one long sequence here, for rows do not meet
//   roles   kLanes neighbouring threads share a row
#include <base.cuh>
#include <hw/device.cuh>
#include <hw/math.cuh>
#include <hw/warp.cuh>
#include <params/backward.cuh>
#include <tile/score.cuh>
#include <tile/shared_tile.cuh>
#include <variant.cuh>

// The sum of the products of two units' elements.
template <class Element>
HW_DEVICE float dot_unit(const u32x4& a, const u32x4& b) {
  float sum = 0.0f;
  HW_UNROLL
  for (i32 i = 0; i < 4; ++i) {
    if constexpr (sizeof(Element) == 2) {
      HW_UNROLL
      for (i32 half = 0; half < 2; ++half) {
        const Element x{static_cast<u16>(a.x[i] >> (16 * half))}, y{static_cast<u16>(b.x[i] >> (16 * half))};
        sum = hw::fma(hw::to_float(x), hw::to_float(y), sum);
      }
    } else {
      sum = hw::fma(hw::bits_float(a.x[i]), hw::bits_float(b.x[i]), sum);
    }
  }
  return sum;
}

// The bits of a unit's elements that are not 0; signs left out.
template <class Element>
HW_DEVICE u32 bits_of_unit(const u32x4& a) {
  return (a.x[0] | a.x[1] | a.x[2] | a.x[3]) & (sizeof(Element) == 2 ? 0x7fff7fffu : 0x7fffffffu);
}

// lse in base 2: finite where lse is, for +inf has a meaning.
HW_DEVICE float to_base2(float lse) {
  constexpr float kLargest = 3.4028234e38f;
  const float scaled = lse * kLog2e;
  return hw::abs(lse) <= kLargest ? hw::max(hw::min(scaled, kLargest), -kLargest) : scaled;
}

HW_KERNEL(Variant::kThreads) cuflash_backward_delta(HW_GRID_CONSTANT BackwardParams p) {
  using V = Variant;
  using Element = V::Element;
  constexpr i32 kBytes = static_cast<i32>(sizeof(Element));
  constexpr i32 kLanes = SharedTile<V::kHeadDimV * kBytes>::kPeriod;
  constexpr i32 kUnits = V::kHeadDimV * kBytes / 16;
  constexpr i32 kRows = V::kThreads / kLanes;

  // Blocks of the main kernel add to all of this.
  const i64 line = static_cast<i64>(hw::block_idx_z()) * hw::grid_dim_y() + hw::block_idx_y();
  const i64 block = line * hw::grid_dim_x() + hw::block_idx_x();
  const i64 threads = static_cast<i64>(hw::grid_dim_x()) * hw::grid_dim_y() * hw::grid_dim_z() * V::kThreads;
  const i64 thread = block * V::kThreads + hw::thread_idx();
  if (p.dq_accum != nullptr) {
    u32x4* units = reinterpret_cast<u32x4*>(p.dq_accum);
    for (i64 i = thread; i < p.dq_accum_units; i += threads) hw::store_global(units + i, u32x4{{0, 0, 0, 0}});
  }
  // Tiles of queries write some of these, the others stay 0.
  for (i64 i = thread; i < p.partials * p.heads_q; i += threads) {
    if (p.sink_partials != nullptr) hw::store_global(p.sink_partials + i, 0.0f);
    if (p.slope_partials != nullptr) hw::store_global(p.slope_partials + i, 0.0f);
  }

  const i32 row = hw::block_idx_x() * kRows + hw::thread_idx() / kLanes;
  const i32 lane = hw::thread_idx() % kLanes;
  const i32 head = hw::block_idx_y();
  const i32 sequences = p.cu_seqlens_q == nullptr ? p.batch : 1;
  for (i64 batch = hw::block_idx_z(); batch < sequences; batch += hw::grid_dim_z()) {
    float sum = 0.0f;
    u32 out_bits = 0;
    if (row < p.q_len) {
      const i64 at_out = batch * p.out_stride_batch + row * p.out_stride_row + head * p.out_stride_head;
      const i64 at_dout = batch * p.dout_stride_batch + row * p.dout_stride_row + head * p.dout_stride_head;
      const u8* out = static_cast<const u8*>(p.out) + at_out;
      const u8* dout = static_cast<const u8*>(p.dout) + at_dout;
      HW_UNROLL
      for (i32 unit = 0; unit < kUnits; unit += kLanes) {
        const i32 at = (unit + lane) * 16;
        const i32 left = p.head_dim_v * kBytes - at;
        const u32x4 own = read_unit<V::kLoadBytes>(out + at, left);
        sum += dot_unit<Element>(own, read_unit<V::kLoadBytes>(dout + at, left));
        out_bits |= bits_of_unit<Element>(own);
      }
    }
    HW_UNROLL
    for (i32 mask = 1; mask < kLanes; mask *= 2) {
      sum += hw::shfl_xor(sum, mask);
      out_bits |= hw::shfl_xor(out_bits, mask);
    }
    if (row < p.q_len && lane == 0) {
      const i64 at = batch * p.lse_stride_batch + head * p.lse_stride_head + row;
      const float lse = hw::load_global(p.lse + at);
      const float dlse = p.dlse != nullptr ? hw::load_global(p.dlse + at) : 0.0f;
      const float delta = sum - dlse;
      const bool only_sink = out_bits == 0 && !(hw::abs(delta) < kInfinity) && lse == read_sink<Element>(p, head);
      const bool nothing = lse == -kInfinity;
      hw::store_global(p.delta + at, nothing ? 0.0f : only_sink ? -dlse : delta);
      hw::store_global(p.lse_base2 + at, nothing || only_sink ? kInfinity : to_base2(lse));
    }
  }
}
