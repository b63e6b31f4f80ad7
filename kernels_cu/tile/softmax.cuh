// Softmax over keys that arrive tile by tile ("online": Milakov and Gimelshein, arXiv 1805.02867), in base 2.
//   m = running maximum of the scores, l = running sum of 2^(c s - c m), O = running sum of 2^(c s - c m) v
// A tile of which a row sees nothing leaves its m, l and O exactly as they were.
//
// What the exponent subtracts is round(c m): its round-off is a factor that l and O share, and cancels. It is at most 1/2
// below |c m| = 2^24, the row is `near`. A row beyond is `far`: round-off would overflow the sums, and c m itself may be
// past the largest float. There scores are taken relative to m first, and the sums stand at c m itself. A row that has
// seen nothing, c m = -inf, goes that way too: a tile pays nothing for it elsewhere.
#pragma once
#include <base.cuh>
#include <hw/device.cuh>
#include <hw/math.cuh>
#include <hw/warp.cuh>
#include <tile/fragment.cuh>

constexpr float kFar = 16777216.0f;  // 2^24
HW_DEVICE bool is_far(float scaled) { return hw::abs(scaled) >= kFar; }

// c m of what sums stand at; 0 where nothing was seen, since -inf - -inf is no number.
HW_DEVICE float reference_of(float maximum, float scale) {
  return maximum == -kInfinity ? 0.0f : hw::mul(maximum, scale);
}

// log2 of what sums that stand at the maximum `from` are to be multiplied by, that they stand at the maximum `to` >= from.
HW_DEVICE float fall_of(float from, float to, float scale) {
  const float left = hw::mul(from, scale), reached = reference_of(to, scale);
  const bool from_far = is_far(left), to_far = is_far(reached);
  const float within = from_far ? (from - to) * scale : hw::fma(-to, scale, left);
  return to_far ? within : from_far ? hw::fma(from, scale, -reached) : left - reached;
}

struct FinishedRow {
  float out_scale;  // what the row of O is multiplied by: 1 / l
  float lse;        // natural log of the sum of e^score; -inf where nothing was kept
  float max_logit;  // the largest score, in natural units; -inf where nothing was kept
};

// sum: l of the whole row. sink: a score in natural units that no value goes with, in the denominator alone; -inf: none.
// A sum that is NaN stays NaN: what a sequence owns is not hidden. A row that saw nothing has the sink's very bits in lse.
// NOTE: by selections. A branch here costs ptxas the uniformity of the KV loop around: R2UR at each of its products.
HW_DEVICE FinishedRow finish_row(float maximum, float sum, float scale, float sink) {
  const float seen = hw::mul(maximum, scale), sink_base2 = hw::mul(sink, kLog2e);
  const bool far = hw::max(hw::abs(seen), sink_base2) >= kFar;
  const float natural = far ? maximum * (scale * kLn2) : seen * kLn2;
  const float between = far ? (sink - natural) * kLog2e : sink_base2 - seen;
  const float above = sink == -kInfinity ? -kInfinity : between;  // how far the sink is above the maximum
  const float rescale = hw::exp2_approx(above > 0.0f ? -above : 0.0f);
  const float total = hw::fma(sum, rescale, hw::exp2_approx(above > 0.0f ? 0.0f : above));
  const float log = hw::log2_approx(total);
  FinishedRow row;
  row.out_scale = total == 0.0f ? 0.0f : rescale * hw::rcp_approx(total);
  row.lse = far ? hw::max(natural, sink) + log * kLn2 : (hw::max(seen, sink_base2) + log) * kLn2;
  row.max_logit = natural;
  return row;
}

struct Nothing {
  HW_DEVICE void operator()() const {}
};

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

  // For the rows that are far, or come from there: scores less m, nothing to subtract from the exponent; of a row that has
  // seen nothing, scores as they are. Of the others not a bit changes, whichever rows are in the warp.
  template <class S>
  HW_DEVICE void center_far_rows(S& s, const float (&before)[kRows], float (&subtract)[kRows],
                                 float (&rescale)[kRows]) const {
    float shift[kRows];
    HW_UNROLL
    for (i32 i = 0; i < kRows; ++i) {
      const bool far = is_far(subtract[i]);
      rescale[i] = hw::exp2_approx(fall_of(before[i], maximum[i], scale));
      shift[i] = far && maximum[i] != -kInfinity ? maximum[i] : 0.0f;
      subtract[i] = far ? 0.0f : subtract[i];
    }
    s.for_each([&](float& x, i32 row, i32) { x -= shift[row]; });
  }

  // S: scores in, 2^(c s - c m) out. What O is to be multiplied by, row by row, is left in `rescale`.
  // between(): called when the maxima are known, before the exponentials. The branch on them keeps the compiler from moving
  // either across.
  template <class S, class Between = Nothing>
  HW_DEVICE void weigh(S& s, float (&rescale)[kRows], const Between& between = Between{}) {
    // A row that leaves the far ones for a maximum still below this comes from so far away that nothing of it is left.
    constexpr float kNearlyFar = kFar - 256.0f;
    float tile_maximum[kRows];
    HW_UNROLL
    for (i32 i = 0; i < kRows; ++i) tile_maximum[i] = maximum[i];
    s.for_each([&](float& x, i32 row, i32) { tile_maximum[row] = hw::max(tile_maximum[row], x); });
    float before[kRows], subtract[kRows];
    bool far = false;
    HW_UNROLL
    for (i32 i = 0; i < kRows; ++i) {
      before[i] = maximum[i];
      maximum[i] = quad_max(tile_maximum[i]);
      subtract[i] = hw::mul(maximum[i], scale);
      far |= hw::abs(subtract[i]) >= kNearlyFar;
      rescale[i] = hw::exp2_approx(hw::mul(before[i], scale) - subtract[i]);
    }
    if (hw::any(far)) center_far_rows(s, before, subtract, rescale);
    between();
    HW_UNROLL
    for (i32 i = 0; i < kRows; ++i) sum[i] *= rescale[i];
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

  HW_DEVICE FinishedRow finish(i32 row, float sink) const {
    return finish_row(maximum[row], quad_sum(sum[row]), scale, sink);
  }
};
