// From q.k to the score the softmax sees, in base 2:  scale -> softcap -> ALiBi.
// With neither softcap nor ALiBi and a positive scale nothing is done here: the scale is folded into the exponential.
// All branches are uniform and stand outside the element loops.
#pragma once
#include <base.cuh>
#include <hw/device.cuh>
#include <hw/math.cuh>
#include <tile/sequence.cuh>

// cap tanh(x), to the accuracy of the element type. Not by tanh.approx: its relative error of 2^-11 is, at a score of 30,
// more than rounding that score to float16 costs.
// tanh x = 1 - 2 / (e^2x + 1) is right to about 2^-21 of 1. For float32 that is not enough near 0, where its series stands
// in: x (1 - x^2/3 + 2 x^4/15 - 17 x^6/315 + 62 x^8/2835 - 1382 x^10/155925), the next term below 2^-25 for |x| < 0.25.
template <class Element>
HW_DEVICE float cap_score(float x, float cap) {
  const float e = hw::exp2_approx(x * (2.0f * kLog2e));
  const float far = hw::fma(-2.0f * cap, hw::rcp_approx(e + 1.0f), cap);
  if constexpr (sizeof(Element) == 2) return far;
  const float x2 = x * x;
  float series = -1382.0f / 155925.0f;
  series = hw::fma(series, x2, 62.0f / 2835.0f);
  series = hw::fma(series, x2, -17.0f / 315.0f);
  series = hw::fma(series, x2, 2.0f / 15.0f);
  series = hw::fma(series, x2, -1.0f / 3.0f);
  return hw::abs(x) < 0.25f ? cap * hw::fma(series * x2, x, x) : far;
}

// query: that of the warp's row 0; key: that of the tile's column 0.
template <class Element, class Params, class S>
HW_DEVICE void score(const Params& p, const Sequence& seq, i32 sequence, i32 head, S& s, i32 query, i32 key) {
  if (p.raw_scores) return;
  if (p.score_cap != 0.0f) {
    s.for_each([&](float& x, i32, i32) { x = cap_score<Element>(x * p.score_scale, p.score_cap); });
  } else {
    s.for_each([&](float& x, i32, i32) { x *= p.score_scale; });
  }
  if (p.alibi_slopes != nullptr) {
    const float slope = hw::load_global(p.alibi_slopes + sequence * p.alibi_stride_batch + head) * kLog2e;
    float center[S::kRows];  // the key this row stands on, counted from this thread's column 0
    HW_UNROLL
    for (i32 i = 0; i < S::kRows; ++i) {
      center[i] = static_cast<float>(query + S::row_of(i) + seq.diagonal() - key - S::first_col());
    }
    s.for_each([&](float& x, i32 row, i32 column) {
      x = hw::fma(-slope, hw::abs(center[row] - static_cast<float>(column)), x);
    });
  }
}
