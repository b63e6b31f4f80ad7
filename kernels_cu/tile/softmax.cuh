// Softmax over keys that arrive tile by tile ("online": Milakov and Gimelshein, arXiv 1805.02867), in base 2.
//   m = running maximum of the scores, l = running sum of 2^(c s - c m), O = running sum of 2^(c s - c m) v
// A tile of which a row sees nothing leaves its m, l and O exactly as they were.
#pragma once
#include <base.cuh>
#include <hw/device.cuh>
#include <hw/math.cuh>
#include <tile/fragment.cuh>

template <i32 kRows>
struct OnlineSoftmax {
  float maximum[kRows];  // m, unscaled; -inf: nothing seen
  float sum[kRows];      // l of this thread's columns alone: the quad is added up once, at the end
  float scale;           // c > 0

  HW_DEVICE explicit OnlineSoftmax(float c) : scale(c) {
    HW_UNROLL
    for (i32 i = 0; i < kRows; ++i) {
      maximum[i] = -kInfinity;
      sum[i] = 0.0f;
    }
  }

  // What the exponent subtracts. 0 where nothing was seen, since -inf - -inf is no number.
  HW_DEVICE float reference(i32 row) const {
    return maximum[row] == -kInfinity ? 0.0f : hw::mul(maximum[row], scale);
  }

  // S: scores in, 2^(c s - c m) out. What O is to be multiplied by, row by row, is left in `rescale`.
  template <class S>
  HW_DEVICE void weigh(S& s, float (&rescale)[kRows]) {
    float tile_maximum[kRows];
    HW_UNROLL
    for (i32 i = 0; i < kRows; ++i) tile_maximum[i] = maximum[i];
    s.for_each([&](float& x, i32 row, i32) { tile_maximum[row] = hw::max(tile_maximum[row], x); });
    float subtract[kRows];
    HW_UNROLL
    for (i32 i = 0; i < kRows; ++i) {
      const float before = hw::mul(maximum[i], scale);
      maximum[i] = quad_max(tile_maximum[i]);
      subtract[i] = reference(i);
      rescale[i] = hw::exp2_approx(before - subtract[i]);
      sum[i] *= rescale[i];
    }
    s.for_each([&](float& x, i32 row, i32) {
      x = hw::exp2_approx(hw::fma(x, scale, -subtract[row]));
      sum[row] += x;
    });
  }

  // The same, and O rescaled to the new maximum.
  template <class S, class O>
  HW_DEVICE void update(S& s, O& o) {
    float rescale[kRows];
    weigh(s, rescale);
    o.for_each([&](float& x, i32 row, i32) { x *= rescale[row]; });
  }

  struct Row {
    float out_scale;  // what the row of O is multiplied by: 1 / l
    float lse;        // natural log of the sum of e^score; -inf where nothing was kept
    float max_logit;  // the largest score, in natural units; -inf where nothing was kept
  };

  // sink: a score (base 2, scaled) that no value goes with, in the denominator alone; -inf: none.
  // A sum that is NaN stays NaN: what a sequence owns is not hidden.
  HW_DEVICE Row finish(i32 row, float sink) const {
    const float seen = hw::mul(maximum[row], scale);
    const float top = hw::max(seen, sink);
    const float safe = top == -kInfinity ? 0.0f : top;
    const float rescale = hw::exp2_approx(seen - safe);
    const float total = hw::fma(quad_sum(sum[row]), rescale, hw::exp2_approx(sink - safe));
    Row result;
    result.out_scale = total == 0.0f ? 0.0f : rescale * hw::rcp_approx(total);
    result.lse = total == 0.0f ? -kInfinity : (safe + hw::log2_approx(total)) * kLn2;
    result.max_logit = seen * kLn2;
    return result;
  }
};
