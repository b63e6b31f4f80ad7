// From q.k to the score the softmax sees, in natural units:  scale -> softcap -> ALiBi.
// With neither softcap nor ALiBi and a positive scale nothing is done here: the scale is folded into the exponential.
// All branches are uniform and stand outside the element loops.
#pragma once
#include <base.cuh>
#include <hw/device.cuh>
#include <hw/math.cuh>
#include <tile/arithmetic.cuh>

// The slope of a head. Only where there are slopes.
template <class Params>
HW_DEVICE float read_slope(const Params& p, i32 sequence, i32 head) {
  return hw::load_global(p.alibi_slopes + sequence * p.alibi_stride_batch + head);
}

// Of a thread's row i: head_of(i), and center_of(i), the column on its diagonal, counted from the tile's column 0, whose
// distance is what ALiBi takes.
template <class Params, class S, class HeadOf, class CenterOf>
HW_DEVICE void score_of(const Params& p, i32 sequence, const HeadOf& head_of, S& s, const CenterOf& center_of) {
  if (p.raw_scores) return;
  if (p.score_cap != 0.0f) {
    s.for_each([&](float& x, i32, i32) { x = p.score_cap * tanh_of(x * p.score_scale); });
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
template <class Params, class S>
HW_DEVICE void score(const Params& p, i32 sequence, i32 head, S& s, i32 center) {
  score_of(p, sequence, [&](i32) { return head; }, s, [&](i32 i) { return center + S::row_of(i); });
}

// The weight of a sink among scores whose lse this is.
HW_DEVICE float sink_weight(float sink, float lse) {
  const float exponent = (sink - lse) * kLog2e;
  return sink == -kInfinity ? 0.0f : hw::exp2_approx(exponent > 0.0f ? 0.0f : exponent);
}

// The learnable sink of a head; -inf: none.
template <class Element, class Params>
HW_DEVICE float read_sink(const Params& p, i32 head) {
  if (p.sink == nullptr) return -kInfinity;
  if (p.sink_is_element) return hw::to_float(hw::load_global(static_cast<const Element*>(p.sink) + head));
  return hw::load_global(static_cast<const float*>(p.sink) + head);
}
