// The user's mods at a tile: scores through score_mod, and which tiles and elements mask_mod leaves. `Mods` is generated
// (cuflash/trace/emit_c.py); it asks for coordinates inside the sequence, so those of rows and columns behind its end are
// brought to the last one: what is computed there is never stored.
#pragma once
#include <base.cuh>
#include <hw/device.cuh>
#include <hw/math.cuh>
#include <hw/warp.cuh>
#include <tile/arithmetic.cuh>
#include <tile/mask.cuh>
#include <tile/score.cuh>
#include <tile/sequence.cuh>
#include <variant.cuh>

// Elements from a captured array's beginning to an index of one axis: what generated code adds up.
HW_DEVICE i64 axis_offset(i32 index, u64 extent, u64 stride) {
  return static_cast<i64>(hw::checked_index(index, static_cast<i32>(extent))) * static_cast<i64>(stride);
}

#include <mods.cuh>

// What `Mods::classify` says of a tile.
constexpr i32 kTileEmpty = 0;
constexpr i32 kTileMixed = 1;
constexpr i32 kTileFull = 2;

HW_DEVICE i32 inside(i32 index, i32 length) { return max_of(min_of(index, length - 1), 0); }

// visit(x, row, column, q, k) for every element of a fragment, with the terms of its query and key. row_first,
// column_first: where row 0 and column 0 of the fragment stand in the sequence.
template <class M, bool kRowsAreQueries, class Params, class S, class Visit>
HW_DEVICE void visit_terms(const Params& p, const typename M::Tile& t, S& s, i32 row_first, i32 column_first,
                           const Visit& visit) {
  if constexpr (kRowsAreQueries) {
    typename M::QTerms q[S::kRows];
    HW_UNROLL
    for (i32 i = 0; i < S::kRows; ++i) q[i] = M::q_terms(p, t, inside(row_first + S::row_of(i), t.q_len));
    s.for_each_column([&](i32 column) {
      return M::k_terms(p, t, inside(column_first + S::first_col() + column, t.kv_len));
    }, [&](float& x, i32 row, i32 column, const typename M::KTerms& k) { visit(x, row, column, q[row], k); });
  } else {
    typename M::KTerms k[S::kRows];
    HW_UNROLL
    for (i32 i = 0; i < S::kRows; ++i) k[i] = M::k_terms(p, t, inside(row_first + S::row_of(i), t.kv_len));
    s.for_each_column([&](i32 column) {
      return M::q_terms(p, t, inside(column_first + S::first_col() + column, t.q_len));
    }, [&](float& x, i32 row, i32 column, const typename M::QTerms& q) { visit(x, row, column, q, k[row]); });
  }
}

// Scores in natural units, scale applied, become what score_mod makes of them.
template <class M, bool kRowsAreQueries, class Params, class S>
HW_DEVICE void score_by_mod(const Params& p, const typename M::Tile& t, S& s, i32 row_first, i32 column_first) {
  visit_terms<M, kRowsAreQueries>(p, t, s, row_first, column_first,
                               [&](float& x, i32, i32, const typename M::QTerms& q, const typename M::KTerms& k) {
                                 x = M::score(p, t, q, k, x);
                               });
}

// -inf where mask_mod says so, or causal, window and length: as `mask_scores`, with its arguments.
template <class M, bool kRowsAreQueries, class Params, class S>
HW_DEVICE void mask_by_mod(const Params& p, const typename M::Tile& t, S& s, i32 row_first, i32 column_first, i32 center,
                           i32 left, i32 right, i32 length) {
  i32 begin[S::kRows], end[S::kRows];
  HW_UNROLL
  for (i32 i = 0; i < S::kRows; ++i) {
    const i32 row = inside(row_first + S::row_of(i), kRowsAreQueries ? t.q_len : t.kv_len);
    Interval bounds;
    if constexpr (kRowsAreQueries) {
      bounds = M::bounds_q(p, t, row);
    } else {
      bounds = M::bounds_k(p, t, row);
    }
    const i32 from_first = center + S::row_of(i) - S::first_col();
    const i32 first = column_first + S::first_col();
    begin[i] = max_of(from_first - left, bounds.begin - first);
    end[i] = min_of(min_of(from_first + right + 1, length - S::first_col()), bounds.end - first);
  }
  if constexpr (kRowsAreQueries ? M::kKeepQ : M::kKeepK) {
    visit_terms<M, kRowsAreQueries>(
        p, t, s, row_first, column_first,
        [&](float& x, i32 row, i32 column, const typename M::QTerms& q, const typename M::KTerms& k) {
          bool keep = (column >= begin[row]) & (column < end[row]);
          if constexpr (kRowsAreQueries) {
            keep &= M::keep_q(p, t, q, k);
          } else {
            keep &= M::keep_k(p, t, q, k);
          }
          x = keep ? x : -kInfinity;
        });
  } else {
    s.for_each([&](float& x, i32 row, i32 column) {
      const bool keep = (column >= begin[row]) & (column < end[row]);
      x = keep ? x : -kInfinity;
    });
  }
}

// The tiles of the side a block moves over that mask_mod leaves something of, in steps of kStep (1 or -1). A warp
// classifies 32 at a time; every warp of the block finds the same.
template <i32 kStep>
struct TileWalk {
  i32 base;        // the tile of bit 0
  u32 live, full;  // tiles with something to compute, tiles that nothing is masked of

  HW_DEVICE explicit TileWalk(i32 first) : base(first - 32 * kStep), live(0), full(0) {}

  // The first tile from n on that is not empty, or `end` if none before it is. classify(n): of a tile.
  template <class Classify>
  HW_DEVICE i32 find(i32 n, i32 end, const Classify& classify) {
    HW_NO_UNROLL
    while ((end - n) * kStep > 0) {
      i32 passed = (n - base) * kStep;
      if (passed >= 32) {
        const i32 tile = n + hw::lane_idx() * kStep;
        const i32 kind = (end - tile) * kStep > 0 ? classify(tile) : kTileEmpty;
        live = hw::ballot(kind != kTileEmpty);
        full = hw::ballot(kind == kTileFull);
        base = n;
        passed = 0;
      }
      const u32 rest = live >> passed;
      if (rest != 0) return n + hw::lowest_bit(rest) * kStep;
      n = base + 32 * kStep;
    }
    return end;
  }

  // Of the tile `find` gave, until it is asked again.
  HW_DEVICE bool is_full(i32 n) const { return (full >> ((n - base) * kStep) & 1u) != 0; }
};
