// Which keys a query sees. Causal, window and length are one interval [begin, end) of keys for each query; both ends
// grow with the query, so a tile's first and last row bound what the tile as a whole sees.
#pragma once
#include <base.cuh>
#include <hw/device.cuh>
#include <tile/sequence.cuh>

struct KeyInterval {
  i32 begin, end;
};

// Lengths stay below 2^30 and an unlimited window is 2^30 (the host sees to both), so no sum leaves an i32.
template <class Params>
HW_DEVICE KeyInterval keys_of_query(const Params& p, const Sequence& s, i32 query) {
  const i32 center = query + s.diagonal();
  const i32 begin = min_of(max_of(center - p.window_left, 0), s.k_len);
  return {begin, max_of(min_of(center + p.window_right + 1, s.k_len), begin)};
}

// What the rows [first, last] of a tile see together (`any`), and what every one of them sees (`all`).
struct TileKeys {
  KeyInterval any, all;
};

template <class Params>
HW_DEVICE TileKeys keys_of_tile(const Params& p, const Sequence& s, i32 first_query, i32 last_query) {
  const KeyInterval first = keys_of_query(p, s, first_query), last = keys_of_query(p, s, last_query);
  return {{first.begin, last.end}, {last.begin, first.end}};
}

// -inf where a thread's row does not see the column. query: that of the warp's row 0; key: that of the tile's column 0.
template <class Params, class S>
HW_DEVICE void mask_scores(const Params& p, const Sequence& seq, S& s, i32 query, i32 key) {
  const i32 first_key = key + S::first_col();
  i32 begin[S::kRows], end[S::kRows];
  HW_UNROLL
  for (i32 i = 0; i < S::kRows; ++i) {
    const i32 center = query + S::row_of(i) + seq.diagonal();
    begin[i] = center - p.window_left - first_key;
    end[i] = min_of(center + p.window_right + 1, seq.k_len) - first_key;
  }
  s.for_each([&](float& x, i32 row, i32 column) {
    const bool keep = (column >= begin[row]) & (column < end[row]);
    x = keep ? x : -kInfinity;
  });
}
