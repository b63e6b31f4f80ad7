// From q.k to the score the softmax sees, in base 2:  scale -> softcap -> ALiBi.
// With neither softcap nor ALiBi and a positive scale nothing is done here: the scale is folded into the exponential.
// All branches are uniform and stand outside the element loops.
#pragma once
#include <base.cuh>
#include <hw/device.cuh>
#include <hw/math.cuh>

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

// The slope of a head, times log2 e. Only where there are slopes.
template <class Params>
HW_DEVICE float read_slope(const Params& p, i32 sequence, i32 head) {
  return hw::load_global(p.alibi_slopes + sequence * p.alibi_stride_batch + head) * kLog2e;
}

// Of a thread's row i: head_of(i), and center_of(i), the column on its diagonal, counted from the tile's column 0, whose
// distance is what ALiBi takes.
template <class Element, class Params, class S, class HeadOf, class CenterOf>
HW_DEVICE void score_of(const Params& p, i32 sequence, const HeadOf& head_of, S& s, const CenterOf& center_of) {
  if (p.raw_scores) return;
  if (p.score_cap != 0.0f) {
    s.for_each([&](float& x, i32, i32) { x = cap_score<Element>(x * p.score_scale, p.score_cap); });
  } else {
    s.for_each([&](float& x, i32, i32) { x *= p.score_scale; });
  }
  if (p.alibi_slopes != nullptr) {
    float slope[S::kRows], from_first[S::kRows];
    HW_UNROLL
    for (i32 i = 0; i < S::kRows; ++i) {
      slope[i] = read_slope(p, sequence, head_of(i));
      from_first[i] = static_cast<float>(center_of(i) - S::first_col());
    }
    s.for_each([&](float& x, i32 row, i32 column) {
      x = hw::fma(-slope[row], hw::abs(from_first[row] - static_cast<float>(column)), x);
    });
  }
}

// The same of one head's rows, one after the other; center: of the warp's row 0. Rows may be queries or keys.
template <class Element, class Params, class S>
HW_DEVICE void score(const Params& p, i32 sequence, i32 head, S& s, i32 center) {
  score_of<Element>(p, sequence, [&](i32) { return head; }, s, [&](i32 i) { return center + S::row_of(i); });
}

// The learnable sink of a head, in base 2; -inf: none.
template <class Element, class Params>
HW_DEVICE float read_sink(const Params& p, i32 head) {
  if (p.sink == nullptr) return -kInfinity;
  if (p.sink_is_element) return hw::to_float(hw::load_global(static_cast<const Element*>(p.sink) + head)) * kLog2e;
  return hw::load_global(static_cast<const float*>(p.sink) + head) * kLog2e;
}
