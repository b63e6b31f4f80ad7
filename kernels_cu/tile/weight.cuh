// Weights of scores whose lse is known, as the backward makes them again, where 2^(c s - lse_base2) is not enough; and the
// derivative of a soft cap by them.
#pragma once
#include <base.cuh>
#include <hw/device.cuh>
#include <hw/math.cuh>

// d(score) / d(q.k), less the scale, where scores are capped: 1 - tanh^2. The capped score is had from P again, whose
// logarithm it is; where P is 0 so is the gradient.
// Never below 0, however lse is rounded.
HW_DEVICE float cap_derivative(float weight, float lse_base2, float bias, float cap) {
  const float t = hw::fma(hw::log2_approx(weight) + lse_base2, kLn2, -bias) * hw::rcp_approx(cap);
  return weight == 0.0f ? 0.0f : hw::max(hw::fma(-t, t, 1.0f), 0.0f);
}

// Whether a row's weights need more than 2^(c s - lse_base2): lse is so large that its round-off shows, or it keeps nothing.
HW_DEVICE bool is_special(float lse_base2) { return hw::abs(lse_base2) >= 16384.0f; }

// The weight of a score of such a row. lse: in natural units, in which it is rounded once; scale: leads from scores to them.
HW_DEVICE float special_weight(float score, float scale, float lse) {
  const float exponent = hw::fma(score, scale, -lse) * kLog2e;
  return hw::exp2_approx(exponent > 0.0f ? 0.0f : exponent);
}
