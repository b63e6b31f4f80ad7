// The user's mods at a tile: scores through score_mod, and which tiles and elements mask_mod leaves. `Mods` is generated
// (cuflash/trace/emit_c.py); it asks for coordinates inside the sequence, so those of rows and columns behind its end are
// brought to the last one: what is computed there is never stored.
#pragma once
#include <base.cuh>
#include <hw/device.cuh>
#include <hw/math.cuh>
#include <hw/warp.cuh>
#include <tile/arithmetic.cuh>
#include <tile/fixed_sum.cuh>
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

// Terms of a tile's columns that cost more than a way through shared memory: each is computed by one thread and read by
// all (M::kStagedQ, M::kStagedK fields of them; 0: each thread computes its own).
template <class M, bool kRowsAreQueries>
constexpr i32 staged_fields() {
  return kRowsAreQueries ? M::kStagedK : M::kStagedQ;
}

// Bytes of those of a tile of kColumns.
template <class M, bool kRowsAreQueries, i32 kColumns>
constexpr i32 staged_bytes() {
  return staged_fields<M, kRowsAreQueries>() * kColumns * 4;
}

// Computes them for the columns from `first` on; a barrier comes before `visit_terms` reads them.
template <class M, bool kRowsAreQueries, i32 kColumns, i32 kThreads, class Params>
HW_DEVICE void stage_terms(const Params& p, const typename M::Tile& t, u32 smem, i32 first) {
  if constexpr (staged_fields<M, kRowsAreQueries>() > 0) {
    HW_NO_UNROLL
    for (i32 i = kThreads == 32 ? hw::lane_idx() : hw::thread_idx(); i < kColumns; i += kThreads) {
      const u32 to = smem + static_cast<u32>(4 * i);
      if constexpr (kRowsAreQueries) {
        M::stage(to, 4 * kColumns, M::k_terms(p, t, inside(first + i, t.kv_len)));
      } else {
        M::stage(to, 4 * kColumns, M::q_terms(p, t, inside(first + i, t.q_len)));
      }
    }
  }
}

// visit(x, row, column, q, k) for every element of a fragment, with the terms of its query and key. row_first,
// column_first: where row 0 and column 0 of the fragment stand in the sequence; smem: what `stage_terms` filled.
template <class M, bool kRowsAreQueries, class Params, class S, class Visit>
HW_DEVICE void visit_terms(const Params& p, const typename M::Tile& t, S& s, i32 row_first, i32 column_first, u32 smem,
                           const Visit& visit) {
  constexpr u32 kStride = 32 * S::kColTiles;  // bytes of one field of all columns
  const u32 staged = smem + static_cast<u32>(4 * S::first_col());
  if constexpr (kRowsAreQueries) {
    typename M::QTerms q[S::kRows];
    HW_UNROLL
    for (i32 i = 0; i < S::kRows; ++i) q[i] = M::q_terms(p, t, inside(row_first + S::row_of(i), t.q_len));
    s.for_each_column([&](i32 column) {
      const i32 key = inside(column_first + S::first_col() + column, t.kv_len);
      if constexpr (M::kStagedK > 0) return M::staged_k(staged + static_cast<u32>(4 * column), kStride, key);
      return M::k_terms(p, t, key);
    }, [&](float& x, i32 row, i32 column, const typename M::KTerms& k) { visit(x, row, column, q[row], k); });
  } else {
    typename M::KTerms k[S::kRows];
    HW_UNROLL
    for (i32 i = 0; i < S::kRows; ++i) k[i] = M::k_terms(p, t, inside(row_first + S::row_of(i), t.kv_len));
    s.for_each_column([&](i32 column) {
      const i32 query = inside(column_first + S::first_col() + column, t.q_len);
      if constexpr (M::kStagedQ > 0) return M::staged_q(staged + static_cast<u32>(4 * column), kStride, query);
      return M::q_terms(p, t, query);
    }, [&](float& x, i32 row, i32 column, const typename M::QTerms& q) { visit(x, row, column, q, k[row]); });
  }
}

// visit(x, tile, row, column, q, k) likewise where rows are queries of several heads, each with terms of its own tile:
// tile_of(i) and query_of(i) of a thread's row i. Where no mod reads the head, one tile serves all.
template <class M, class Params, class S, class TileOf, class QueryOf, class Visit>
HW_DEVICE void visit_head_terms(const Params& p, const TileOf& tile_of, const QueryOf& query_of, S& s, i32 column_first,
                                u32 smem, const Visit& visit) {
  constexpr u32 kStride = 32 * S::kColTiles;
  const u32 staged = smem + static_cast<u32>(4 * S::first_col());
  typename M::Tile t[M::kHead ? S::kRows : 1];
  typename M::QTerms q[S::kRows];
  HW_UNROLL
  for (i32 i = 0; i < S::kRows; ++i) {
    if (M::kHead || i == 0) t[M::kHead ? i : 0] = tile_of(i);
    q[i] = M::q_terms(p, t[M::kHead ? i : 0], query_of(i));
  }
  const auto key_of = [&](i32 column) { return inside(column_first + S::first_col() + column, t[0].kv_len); };
  if constexpr (M::kHead) {
    s.for_each_column(key_of, [&](float& x, i32 row, i32 column, i32 key) {
      visit(x, t[row], row, column, q[row], M::k_terms(p, t[row], key));
    });
  } else {
    s.for_each_column([&](i32 column) {
      if constexpr (M::kStagedK > 0) return M::staged_k(staged + static_cast<u32>(4 * column), kStride, key_of(column));
      return M::k_terms(p, t[0], key_of(column));
    }, [&](float& x, i32 row, i32 column, const typename M::KTerms& k) { visit(x, t[0], row, column, q[row], k); });
  }
}

// Scores in natural units, scale applied, become what score_mod makes of them.
template <class M, bool kRowsAreQueries, class Params, class S>
HW_DEVICE void score_by_mod(const Params& p, const typename M::Tile& t, S& s, i32 row_first, i32 column_first,
                            u32 smem) {
  visit_terms<M, kRowsAreQueries>(p, t, s, row_first, column_first, smem,
                               [&](float& x, i32, i32, const typename M::QTerms& q, const typename M::KTerms& k) {
                                 x = M::score(p, t, q, k, x);
                               });
}

// The columns that a row has to do with by causal, window, length and mask_mod's bounds; center: the one it stands on.
template <class M, bool kRowsAreQueries, class Params>
HW_DEVICE Interval bounds_of_row(const Params& p, const typename M::Tile& t, i32 row, i32 center, i32 left, i32 right) {
  Interval bounds;
  if constexpr (kRowsAreQueries) {
    bounds = M::bounds_q(p, t, inside(row, t.q_len));
  } else {
    bounds = M::bounds_k(p, t, inside(row, t.kv_len));
  }
  const i32 length = kRowsAreQueries ? t.kv_len : t.q_len;
  return {max_of(center - left, bounds.begin), min_of(min_of(center + right + 1, length), bounds.end)};
}

// Those of a tile of queries, once for all of its key tiles: row i has [begin[i], end[i]), 2 kRows words of shared memory.
template <class M, i32 kRows>
constexpr i32 bounds_bytes() {
  return M::kMask ? 8 * kRows : 0;
}

// Fills it, for the tile whose row 0 is the query `first` < q_len and stands on the key `center`. Gives what the tile as a
// whole has to do with, of the rows that see anything, and what all of its rows see. The block's first kThreads threads
// come: all of them, or one warp.
template <class M, i32 kRows, i32 kThreads, class Params>
HW_DEVICE TileInterval stage_bounds(const Params& p, const typename M::Tile& t, u32 smem, i32 first, i32 center,
                                    i32 left, i32 right) {
  HW_NO_UNROLL
  for (i32 i = hw::thread_idx(); i < kRows; i += kThreads) {
    const i32 row = min_of(i, t.q_len - 1 - first);
    const Interval own = bounds_of_row<M, true>(p, t, first + row, center + row, left, right);
    const i32 begin = max_of(min_of(own.begin, t.kv_len), 0);
    hw::store_shared(smem + static_cast<u32>(4 * i), begin);
    hw::store_shared(smem + static_cast<u32>(4 * (kRows + i)), max_of(own.end, begin));
  }
  // sync   bounds written <-> all of these threads: each warp looks through all of them
  if constexpr (kThreads == 32) {
    hw::sync_warp();
  } else {
    hw::sync_threads();
  }
  Interval any{t.kv_len, 0}, all{0, t.kv_len};
  HW_NO_UNROLL
  for (i32 i = hw::lane_idx(); i < kRows; i += 32) {
    const i32 begin = hw::load_shared<i32>(smem + static_cast<u32>(4 * i));
    const i32 end = hw::load_shared<i32>(smem + static_cast<u32>(4 * (kRows + i)));
    if (begin < end) any = {min_of(any.begin, begin), max_of(any.end, end)};
    all = {max_of(all.begin, begin), min_of(all.end, end)};
  }
  return {{hw::reduce_min(any.begin), hw::reduce_max(any.end)}, {hw::reduce_max(all.begin), hw::reduce_min(all.end)}};
}

// The bounds it left for row `row` of the tile.
template <i32 kRows>
HW_DEVICE Interval staged_bounds(u32 smem, i32 row) {
  const u32 at = smem + static_cast<u32>(4 * row);
  return {hw::load_shared<i32>(at), hw::load_shared<i32>(at + 4 * kRows)};
}

// -inf where mask_mod says so, or causal, window and length: bounds(i) gives the columns that a thread's row i has to do
// with by `bounds_of_row`.
template <class M, bool kRowsAreQueries, class Params, class S, class Bounds>
HW_DEVICE void mask_by_mod(const Params& p, const typename M::Tile& t, S& s, i32 row_first, i32 column_first, u32 smem,
                           const Bounds& bounds) {
  i32 begin[S::kRows], end[S::kRows];
  HW_UNROLL
  for (i32 i = 0; i < S::kRows; ++i) {
    const Interval own = bounds(i);
    begin[i] = own.begin - column_first - S::first_col();
    end[i] = own.end - column_first - S::first_col();
  }
  if constexpr (kRowsAreQueries ? M::kKeepQ : M::kKeepK) {
    visit_terms<M, kRowsAreQueries>(
        p, t, s, row_first, column_first, smem,
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

// What is true of a tile for all query heads of key head `head_kv` together.
template <class M, class Params>
HW_DEVICE i32 classify_heads(const Params& p, i32 sequence, const Sequence& seq, i32 head_kv, i32 q_first, i32 q_last,
                             i32 k_first, i32 k_last) {
  const auto kind_of = [&](i32 i) {
    return M::classify(p, M::tile(p, sequence, head_kv * p.head_group + i, seq.q_len, seq.k_len), q_first, q_last,
                       k_first, k_last);
  };
  i32 kind = kind_of(0);
  if constexpr (M::kHead) {
    HW_NO_UNROLL
    for (i32 i = 1; i < p.head_group && kind != kTileMixed; ++i) kind = kind_of(i) == kind ? kind : kTileMixed;
  }
  return kind;
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

// Gradients of captured arrays ----------------------------------------------------------------------------------------

// What the place of an array's element changes with: what a gradient can be added up over before it goes to memory.
constexpr i32 kTileSide = 0;  // nothing in the tile
constexpr i32 kQSide = 1;     // the query
constexpr i32 kKSide = 2;     // the key

// Adds d score' / d element times ds for one place, kPlace, that score_mod reads a captured array at. scores: as score_mod
// got them; ds: the gradient of what it gave. kFixed: in sums that no order changes.
template <class M, bool kRowsAreQueries, bool kFixed, i32 kPlace, class Params, class S>
HW_DEVICE void add_gradients_of(const Params& p, const typename M::Tile& t, S& scores, S& ds, i32 row_first,
                                i32 column_first, u32 smem) {
  constexpr i32 kSide = M::gradient_side(kPlace);
  constexpr i32 kRowSide = kRowsAreQueries ? kQSide : kKSide;
  constexpr i32 kColumnSide = kRowsAreQueries ? kKSide : kQSide;
  const auto add = [&](const typename M::QTerms& q, const typename M::KTerms& k, float value) {
    if (value == 0.0f) return;
    M::template gradient_place<kPlace>(p, t, q, k, [&](i64 at, u64 array) {
      if (array == 0) return;
      if constexpr (kFixed) {
        add_fixed(reinterpret_cast<FixedSum*>(array) + at, value);
      } else {
        hw::atomic_add(reinterpret_cast<float*>(array) + at, value);
      }
    });
  };
  const auto term = [&](float s, float d, const typename M::QTerms& q, const typename M::KTerms& k) {
    return d == 0.0f ? 0.0f : d * M::template gradient_factor<kPlace>(p, t, q, k, s);
  };
  const auto terms_at = [&](i32 row, i32 column, const auto& use) {
    const i32 query = inside(kRowsAreQueries ? row : column, t.q_len), key = inside(kRowsAreQueries ? column : row, t.kv_len);
    use(M::q_terms(p, t, query), M::k_terms(p, t, key));
  };
  if constexpr (kSide == kRowSide) {
    float sums[S::kRows];
    HW_UNROLL
    for (i32 i = 0; i < S::kRows; ++i) sums[i] = 0.0f;
    visit_terms<M, kRowsAreQueries>(
        p, t, scores, row_first, column_first, smem,
        [&](float& x, i32 row, i32 column, const typename M::QTerms& q, const typename M::KTerms& k) {
          sums[row] += term(x, ds.at(row, column), q, k);
        });
    HW_UNROLL
    for (i32 i = 0; i < S::kRows; ++i) {
      const float sum = quad_sum(sums[i]);
      if (hw::lane_idx() % 4 == 0) {
        terms_at(row_first + S::row_of(i), column_first,
                 [&](const typename M::QTerms& q, const typename M::KTerms& k) { add(q, k, sum); });
      }
    }
  } else if constexpr (kSide == kColumnSide) {
    float sums[2 * S::kColTiles];
    HW_UNROLL
    for (i32 i = 0; i < 2 * S::kColTiles; ++i) sums[i] = 0.0f;
    visit_terms<M, kRowsAreQueries>(
        p, t, scores, row_first, column_first, smem,
        [&](float& x, i32 row, i32 column, const typename M::QTerms& q, const typename M::KTerms& k) {
          sums[column / 8 * 2 + column % 2] += term(x, ds.at(row, column), q, k);
        });
    HW_UNROLL
    for (i32 i = 0; i < 2 * S::kColTiles; ++i) {
      float sum = sums[i];
      HW_UNROLL
      for (i32 mask = 4; mask < 32; mask *= 2) sum += hw::shfl_xor(sum, mask);
      if (hw::lane_idx() < 4) {
        terms_at(row_first, column_first + S::first_col() + i / 2 * 8 + i % 2,
                 [&](const typename M::QTerms& q, const typename M::KTerms& k) { add(q, k, sum); });
      }
    }
  } else if constexpr (kSide == kTileSide) {
    float sum = 0.0f;
    visit_terms<M, kRowsAreQueries>(
        p, t, scores, row_first, column_first, smem,
        [&](float& x, i32 row, i32 column, const typename M::QTerms& q, const typename M::KTerms& k) {
          sum += term(x, ds.at(row, column), q, k);
        });
    HW_UNROLL
    for (i32 mask = 1; mask < 32; mask *= 2) sum += hw::shfl_xor(sum, mask);
    if (hw::lane_idx() == 0) {
      terms_at(row_first, column_first,
               [&](const typename M::QTerms& q, const typename M::KTerms& k) { add(q, k, sum); });
    }
  } else {
    visit_terms<M, kRowsAreQueries>(
        p, t, scores, row_first, column_first, smem,
        [&](float& x, i32 row, i32 column, const typename M::QTerms& q, const typename M::KTerms& k) {
          add(q, k, term(x, ds.at(row, column), q, k));
        });
  }
}

// For all of them.
template <class M, bool kRowsAreQueries, bool kFixed, i32 kPlace = 0, class Params, class S>
HW_DEVICE void add_gradients(const Params& p, const typename M::Tile& t, S& scores, S& ds, i32 row_first,
                             i32 column_first, u32 smem) {
  if constexpr (kPlace < M::kGradients) {
    add_gradients_of<M, kRowsAreQueries, kFixed, kPlace>(p, t, scores, ds, row_first, column_first, smem);
    add_gradients<M, kRowsAreQueries, kFixed, kPlace + 1>(p, t, scores, ds, row_first, column_first, smem);
  }
}
