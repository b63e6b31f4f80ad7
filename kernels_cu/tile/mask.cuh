// Which keys a query sees, and which queries see a key. Causal, window and length are one interval for each row of a
// tile, whichever side the rows are; both its ends grow with the row, so a tile's first and last row bound what the tile
// as a whole has to do with.
//
// A query i sees the key j iff  center - left <= j <= center + right, center = i + k_len - q_len. Read the other way, the
// key j is seen by the queries from j - (k_len - q_len) - right to j - (k_len - q_len) + left: the same with the sides
// exchanged. Lengths stay below 2^30 and an unlimited side is 2^30 (the host sees to both), so no sum leaves an i32.
#pragma once
#include <base.cuh>
#include <hw/device.cuh>
#include <tile/sequence.cuh>

struct Interval {
  i32 begin, end;
};

// What the rows [first, last] of a tile have to do with together (`any`), and what each of them has (`all`).
struct TileInterval {
  Interval any, all;
};

// [center - left, center + right] within [0, length).
HW_DEVICE Interval interval_of_row(i32 center, i32 left, i32 right, i32 length) {
  const i32 begin = min_of(max_of(center - left, 0), length);
  return {begin, max_of(min_of(center + right + 1, length), begin)};
}

// first_center, last_center: those of the tile's first and last row.
HW_DEVICE TileInterval interval_of_tile(i32 first_center, i32 last_center, i32 left, i32 right, i32 length) {
  const Interval first = interval_of_row(first_center, left, right, length);
  const Interval last = interval_of_row(last_center, left, right, length);
  return {{first.begin, last.end}, {last.begin, first.end}};
}

// -inf where a row has nothing to do with a column. Counted from the tile's column 0: center_of(i) of a thread's row i,
// and where the columns' side ends.
template <class S, class CenterOf>
HW_DEVICE void mask_scores_of(S& s, const CenterOf& center_of, i32 left, i32 right, i32 length) {
  i32 begin[S::kRows], end[S::kRows];
  HW_UNROLL
  for (i32 i = 0; i < S::kRows; ++i) {
    const i32 from_first = center_of(i) - S::first_col();
    begin[i] = from_first - left;
    end[i] = min_of(from_first + right + 1, length - S::first_col());
  }
  s.for_each([&](float& x, i32 row, i32 column) {
    const bool keep = (column >= begin[row]) & (column < end[row]);
    x = keep ? x : -kInfinity;
  });
}

// The same where rows are one after the other; center: of the warp's row 0.
template <class S>
HW_DEVICE void mask_scores(S& s, i32 center, i32 left, i32 right, i32 length) {
  mask_scores_of(s, [&](i32 i) { return center + S::row_of(i); }, left, right, length);
}
