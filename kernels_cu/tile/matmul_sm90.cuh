// Products of a warpgroup's 64 rows by wgmma: issued here, awaited by the caller. Operands in shared memory are chunks
// (tile/descriptor.cuh).
#pragma once
#include <base.cuh>
#include <hw/math.cuh>
#include <hw/wgmma.cuh>
#include <tile/descriptor.cuh>
#include <tile/fragment.cuh>

// A fragment of 16 rows a warp is a warpgroup's accumulators, in the same order.
template <class S>
HW_DEVICE auto accumulators(S& s) -> float (&)[4 * S::kColTiles] {
  static_assert(S::kRowTiles == 1, "a warp has 16 of the warpgroup's 64 rows");
  return reinterpret_cast<float(&)[4 * S::kColTiles]>(s.x[0]);
}

// s = a b^T over kDepth elements. a: the warpgroup's first row, of chunks of kRowsA rows; b: chunks of kRowsB rows.
template <class Element, class Chunk, i32 kDepth, i32 kRowsA, i32 kRowsB, class S>
HW_DEVICE void issue_qk(S& s, u32 a, u32 b) {
  static_assert(8 * S::kColTiles == kRowsB, "all rows of b are columns of s");
  const u32 low_a = Chunk::k_major(a), low_b = Chunk::k_major(b);
  HW_UNROLL
  for (i32 k = 0; k < kDepth; k += 16) {
    hw::wgmma_ss<Element, hw::Major::kK, hw::Major::kK>(accumulators(s), Chunk::descriptor(low_a + Chunk::k_step(k, kRowsA)),
                                                        Chunk::descriptor(low_b + Chunk::k_step(k, kRowsB)), k > 0);
  }
}

// Weights as the left operand of the product with v: two 16-bit values a register.
template <class Element, class S>
struct Weights {
  static constexpr i32 kSteps = S::kColTiles / 2;
  static_assert(S::kColTiles % 2 == 0, "wgmma takes 16 keys at a time");
  u32 x[kSteps][4];

  HW_DEVICE void round(const S& s) {
    HW_UNROLL
    for (i32 k = 0; k < kSteps; ++k) {
      HW_UNROLL
      for (i32 i = 0; i < 4; ++i) {
        const float* from = &s.x[0][2 * k + i / 2][2 * (i % 2)];
        x[k][i] = hw::pack2<Element>(from[0], from[1]);
      }
    }
  }

  // All of them or-ed.
  HW_DEVICE u32 bits() const {
    u32 all = 0;
    HW_UNROLL
    for (i32 k = 0; k < kSteps; ++k) all |= x[k][0] | x[k][1] | x[k][2] | x[k][3];
    return all;
  }

  // What became of the fragment's x[0][c][i].
  HW_DEVICE float at(i32 c, i32 i) const {
    const u32 pair = x[c / 2][2 * (c % 2) + i / 2];
    return hw::to_float(Element{static_cast<u16>(i % 2 != 0 ? pair >> 16 : pair)});
  }
};

// o += p v; v: chunks of as many rows as p has columns.
template <class Element, class Chunk, class O, class P>
HW_DEVICE void issue_pv(O& o, const P& p, u32 v) {
  const u32 low = Chunk::mn_major(v, 16 * P::kSteps);
  HW_UNROLL
  for (i32 k = 0; k < P::kSteps; ++k) {
    hw::wgmma_rs<Element, hw::Major::kMn>(accumulators(o), p.x[k], Chunk::descriptor(low + Chunk::mn_step(16 * k)), true);
  }
}
