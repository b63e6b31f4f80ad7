// The products of attention for one warp, operands in shared memory or registers, by mma.sync.
// 16-bit elements take m16n8k16. float32 takes tf32 m16n8k8 three times, each operand split into a rounded tf32 and the
// remainder: high*low + low*high + high*high keeps about 22 bits of each product, float32's accuracy.
#pragma once
#include <base.cuh>
#include <hw/device.cuh>
#include <hw/math.cuh>
#include <hw/matrix.cuh>
#include <tile/fragment.cuh>
#include <tile/shared_tile.cuh>

// A float32 operand as two tf32: x = high + low to 22 bits.
struct SplitTf32 {
  u32 high, low;
  HW_DEVICE explicit SplitTf32(float x) : high(hw::round_tf32(x)), low(hw::round_tf32(x - hw::bits_float(high))) {}
};

HW_DEVICE void mma_3xtf32(float (&d)[4], const u32 (&a_high)[4], const u32 (&a_low)[4], SplitTf32 b0, SplitTf32 b1) {
  hw::mma_m16n8k8_tf32(d, a_low, b0.high, b1.high);
  hw::mma_m16n8k8_tf32(d, a_high, b0.low, b1.low);
  hw::mma_m16n8k8_tf32(d, a_high, b0.high, b1.high);
}

template <i32 kCount>
HW_DEVICE void split_tf32(const u32 (&x)[kCount], u32 (&high)[kCount], u32 (&low)[kCount]) {
  HW_UNROLL
  for (i32 i = 0; i < kCount; ++i) {
    const SplitTf32 s(hw::bits_float(x[i]));
    high[i] = s.high;
    low[i] = s.low;
  }
}

// S = Q K^T    S [16 kRowTiles, 8 kColTiles], both operands with kHeadDim elements a row.
// a: this warp's rows of Q, lane row l % 16, unit l / 16. b: K, lane row l % 8 + 8 (l / 16), unit l / 8 % 2.
// One 16-byte unit holds half the depth of an mma of either element size, so both read the same addresses.
template <class Element, i32 kHeadDim, class S, class ATile, class BTile>
HW_DEVICE void multiply_qk(S& s, const LaneRows<ATile>& a, const LaneRows<BTile>& b) {
  if constexpr (sizeof(Element) == 2) {
    HW_UNROLL
    for (i32 step = 0; step < kHeadDim / 16; ++step) {
      u32 q[S::kRowTiles][4];
      HW_UNROLL
      for (i32 r = 0; r < S::kRowTiles; ++r) hw::ldmatrix_x4(q[r], a.at(16 * r, 2 * step));
      HW_UNROLL
      for (i32 c = 0; c < S::kColTiles; c += 2) {
        u32 k[4];
        hw::ldmatrix_x4(k, b.at(8 * c, 2 * step));
        HW_UNROLL
        for (i32 r = 0; r < S::kRowTiles; ++r) {
          hw::mma_m16n8k16(Element{}, s.x[r][c], q[r], k[0], k[1]);
          hw::mma_m16n8k16(Element{}, s.x[r][c + 1], q[r], k[2], k[3]);
        }
      }
    }
  } else {
    // NOTE: unrolled, ptxas keeps so many split operands in flight that they spill, and compiles twice as long.
    HW_NO_UNROLL
    for (i32 step = 0; step < kHeadDim / 8; ++step) {
      u32 q_high[S::kRowTiles][4], q_low[S::kRowTiles][4];
      HW_UNROLL
      for (i32 r = 0; r < S::kRowTiles; ++r) {
        u32 q[4];
        hw::ldmatrix_x4(q, a.at(16 * r, 2 * step));
        split_tf32(q, q_high[r], q_low[r]);
      }
      HW_UNROLL
      for (i32 c = 0; c < S::kColTiles; c += 2) {
        u32 k[4];
        hw::ldmatrix_x4(k, b.at(8 * c, 2 * step));
        HW_UNROLL
        for (i32 i = 0; i < 2; ++i) {
          const SplitTf32 b0(hw::bits_float(k[2 * i])), b1(hw::bits_float(k[2 * i + 1]));
          HW_UNROLL
          for (i32 r = 0; r < S::kRowTiles; ++r) mma_3xtf32(s.x[r][c + i], q_high[r], q_low[r], b0, b1);
        }
      }
    }
  }
}

// O += P V     P [16 kRowTiles, 8 P::kColTiles] in registers, V [8 P::kColTiles, ..] at `tile`: as many of its columns as O
// has. (`tile` may be moved by a multiple of 128 bytes, to take later columns.)
// The accumulators of P are already laid out as an A operand: for 16-bit elements two column tiles make one (PTX ISA
// fragments c0..c3 and a0..a3); for tf32 one column tile does if the depth index runs over keys 0 2 4 6 1 3 5 7, and V's
// rows are read in that order.
template <class Element, class O, class P, class VTile>
HW_DEVICE void multiply_pv(O& o, const P& p, u32 tile) {
  const i32 lane = hw::lane_idx();
  if constexpr (sizeof(Element) == 2) {
    const LaneRows<VTile> v_rows(tile, lane % 16, lane / 16);
    HW_UNROLL
    for (i32 step = 0; step < P::kColTiles / 2; ++step) {
      u32 a[P::kRowTiles][4];
      HW_UNROLL
      for (i32 r = 0; r < P::kRowTiles; ++r) {
        HW_UNROLL
        for (i32 i = 0; i < 4; ++i) {
          const auto& pair = p.x[r][2 * step + i / 2];
          a[r][i] = hw::pack2<Element>(pair[2 * (i % 2)], pair[2 * (i % 2) + 1]);
        }
      }
      HW_UNROLL
      for (i32 c = 0; c < O::kColTiles; c += 2) {
        u32 v[4];
        hw::ldmatrix_x4_trans(v, v_rows.at(16 * step, c));
        HW_UNROLL
        for (i32 r = 0; r < P::kRowTiles; ++r) {
          hw::mma_m16n8k16(Element{}, o.x[r][c], a[r], v[0], v[1]);
          hw::mma_m16n8k16(Element{}, o.x[r][c + 1], a[r], v[2], v[3]);
        }
      }
    }
  } else {
    const i32 g = lane / 4, t = lane % 4;
    HW_UNROLL
    for (i32 step = 0; step < P::kColTiles; ++step) {
      u32 a_high[P::kRowTiles][4], a_low[P::kRowTiles][4];
      HW_UNROLL
      for (i32 r = 0; r < P::kRowTiles; ++r) {
        const float* x = p.x[r][step];
        const u32 a[4] = {hw::float_bits(x[0]), hw::float_bits(x[2]), hw::float_bits(x[1]), hw::float_bits(x[3])};
        split_tf32(a, a_high[r], a_low[r]);
      }
      HW_UNROLL
      for (i32 c = 0; c < O::kColTiles; ++c) {
        const u32 at = VTile::address(tile, 8 * step + 2 * t, 2 * c + g / 4) + static_cast<u32>(4 * (g % 4));
        // The row below has the other key of the pair: its unit is the neighbour of this one.
        const u32 below = (at ^ 16u) + static_cast<u32>(VTile::kRowBytes);
        const SplitTf32 b0(hw::load_shared<float>(at)), b1(hw::load_shared<float>(below));
        HW_UNROLL
        for (i32 r = 0; r < P::kRowTiles; ++r) mma_3xtf32(o.x[r][c], a_high[r], a_low[r], b0, b1);
      }
    }
  }
}

// O += P^T V    P [kDepth, ..] and V [kDepth, ..] both in shared memory. O [16, 8 kColTiles] takes the columns of P from
// first_row on, a multiple of 16 within the 128 bytes of a row of P, and those of V from first_column on, a multiple of
// O's columns: a power of two of them, 128 bytes at most. The depth index of tf32 as in multiply_pv.
template <class Element, i32 kDepth, class PTile, class VTile, class O>
HW_DEVICE void multiply_ptv(O& o, u32 p_tile, i32 first_row, u32 v_tile, i32 first_column) {
  static_assert(O::kRowTiles == 1 && PTile::kRowBytes <= 128, "one row tile, and rows of P that exchange all units");
  constexpr i32 kUnit = 16 / static_cast<i32>(sizeof(Element));  // elements
  constexpr i32 kColumns = 8 * O::kColTiles;
  static_assert((kColumns & (kColumns - 1)) == 0 && kColumns / kUnit <= VTile::kPeriod, "columns exchanged together");
  const i32 lane = hw::lane_idx();
  const i32 p_unit = first_row / kUnit;
  // A group of columns begins at whole periods of V's units, and some units on, whose bits no column of O has.
  const i32 v_unit = first_column / kUnit;
  const i32 v_inside = v_unit % VTile::kPeriod;
  const u32 v_group = v_tile + static_cast<u32>((v_unit - v_inside) * 16);
  if constexpr (sizeof(Element) == 2) {
    const LaneRows<PTile> p_rows(p_tile, lane % 8 + 8 * (lane / 16), p_unit | lane / 8 % 2);
    const LaneRows<VTile> v_rows(v_group, lane % 16, v_inside | lane / 16);
    HW_UNROLL
    for (i32 step = 0; step < kDepth / 16; ++step) {
      u32 a[4];
      hw::ldmatrix_x4_trans(a, p_rows.at(16 * step, 0));
      HW_UNROLL
      for (i32 c = 0; c < O::kColTiles; c += 2) {
        u32 v[4];
        hw::ldmatrix_x4_trans(v, v_rows.at(16 * step, c));
        hw::mma_m16n8k16(Element{}, o.x[0][c], a, v[0], v[1]);
        hw::mma_m16n8k16(Element{}, o.x[0][c + 1], a, v[2], v[3]);
      }
    }
  } else {
    static_assert(PTile::kPeriod == 8 && VTile::kPeriod == 8, "of two rows, the lower one has the neighbouring unit");
    const i32 g = lane / 4, t = lane % 4;
    const LaneRows<PTile> p_rows(p_tile + static_cast<u32>(4 * (g % 4)), 2 * t, p_unit | g / 4);
    const LaneRows<VTile> v_rows(v_group + static_cast<u32>(4 * (g % 4)), 2 * t, v_inside | g / 4);
    HW_NO_UNROLL
    for (i32 step = 0; step < kDepth / 8; ++step) {
      u32 a[4], a_high[4], a_low[4];
      HW_UNROLL
      for (i32 i = 0; i < 2; ++i) {
        const u32 at = p_rows.at(8 * step, 2 * i);
        a[i] = hw::load_shared<u32>(at);
        a[2 + i] = hw::load_shared<u32>((at ^ 16u) + static_cast<u32>(PTile::kRowBytes));
      }
      split_tf32(a, a_high, a_low);
      HW_UNROLL
      for (i32 c = 0; c < O::kColTiles; ++c) {
        const u32 at = v_rows.at(8 * step, 2 * c);
        const u32 below = (at ^ 16u) + static_cast<u32>(VTile::kRowBytes);
        const SplitTf32 b0(hw::load_shared<float>(at)), b1(hw::load_shared<float>(below));
        mma_3xtf32(o.x[0][c], a_high, a_low, b0, b1);
      }
    }
  }
}
