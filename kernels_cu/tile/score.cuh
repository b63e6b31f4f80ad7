// From q.k to the score the softmax sees, in base 2:  scale -> softcap -> ALiBi.
// With neither softcap nor ALiBi and a positive scale nothing is done here: the scale is folded into the exponential.
// All branches are uniform and stand outside the element loops.
#pragma once
#include <base.cuh>
#include <hw/device.cuh>
#include <hw/math.cuh>
#include <tile/sequence.cuh>

// tanh to float32's accuracy: by exponential where it does not cancel, else by its series
// x (1 - x^2/3 + 2 x^4/15 - 17 x^6/315 + 62 x^8/2835 - 1382 x^10/155925), whose next term is below 2^-25 for |x| < 0.25.
HW_DEVICE float tanh_accurate(float x) {
  const float magnitude = hw::abs(x);
  const float e = hw::exp2_approx(magnitude * (2.0f * kLog2e));
  const float large = 1.0f - 2.0f * hw::rcp_approx(e + 1.0f);
  const float x2 = x * x;
  float series = -1382.0f / 155925.0f;
  series = hw::fma(series, x2, 62.0f / 2835.0f);
  series = hw::fma(series, x2, -17.0f / 315.0f);
  series = hw::fma(series, x2, 2.0f / 15.0f);
  series = hw::fma(series, x2, -1.0f / 3.0f);
  series = hw::fma(series * x2, x, x);
  return magnitude < 0.25f ? series : (x < 0.0f ? -large : large);
}

// The slope of a head, times log2 e; 0: none.
template <class Params>
HW_DEVICE float read_slope(const Params& p, i32 sequence, i32 head) {
  if (p.alibi_slopes == nullptr || sequence == p.batch) return 0.0f;
  return hw::load_global(p.alibi_slopes + sequence * p.alibi_stride_batch + head) * kLog2e;
}

// query: that of the warp's row 0; key: that of the tile's column 0.
template <class Element, class Params, class S>
HW_DEVICE void score(const Params& p, const Sequence& seq, float slope, S& s, i32 query, i32 key) {
  if (p.raw_scores) return;
  if (p.score_cap != 0.0f) {
    s.for_each([&](float& x, i32, i32) {
      if constexpr (sizeof(Element) == 2) {
        x = p.score_cap * hw::tanh_approx(x * p.score_scale);
      } else {
        x = p.score_cap * tanh_accurate(x * p.score_scale);
      }
    });
  } else {
    s.for_each([&](float& x, i32, i32) { x *= p.score_scale; });
  }
  if (slope != 0.0f) {
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
