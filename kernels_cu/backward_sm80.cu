// Attention backward for compute capability 8.0 and later, by recomputation: P is made again from q, k and lse.
//
//   P  = 2^(score(q k^T) - lse)    dP = dout v^T    dS = P (dP - delta)
//   dq = scale dS k                dk = scale dS^T q                dv = P^T dout
//
// Scores go through the user's mods (tile/mods.cuh): dS is then multiplied by the slope of score_mod, and the gradients of
// what it captured are added up by the kernel that holds the keys.
//
// With dropout Z (0, or 1 / (1 - p) where kept): dv = (Z P)^T dout, dS = P (Z dP - delta).
//
// lse is of float32: P is right to half an ulp of it, and so are the gradients. Where that is more than little, P is held
// to at most 1, as every weight is, so that no gradient is wildly too large.
// A row that keeps nothing (lse_base2 is +inf) has P = 0 whatever its dout, NaN included.
//
// One text, three kernels. A block holds the tiles of one side and moves over the other side's:
//   kKeysHeld      holds k and v, moves over q and dout     S^T, dP^T: rows are keys      gives dk and dv
//   else           holds q and dout, moves over k and v     S, dP: rows are queries       gives dq
// These two together are deterministic. Each gradient is summed in registers by the one block that owns its rows, in an
// order that depends on nothing else: no atomics, the same bits every time. Scores are computed in both kernels, seven
// products in all; nothing of their size leaves registers.
//   kAccumulateDq  with the keys held, alone: also what its keys add to dq, dS k, which needs dS^T of all warps and so
//                  passes through shared memory. It goes to dq_accum by atomics, in no order: five products, and bits
//                  that differ from run to run. backward_cast.cu makes dq of it
//
//   grid    (tile, head, sequence) or (slot, head) of the held side: tile/schedule.cuh. Keys: one key head, whose query
//           heads follow each other in the loop; wide heads have kSlices blocks a tile, each for a part of the columns of
//           dk and dv
//   roles   every warp holds 16 kRowTiles rows; all warps copy
//
//   shared  name         rows     row          bytes for d = 128, 16 bits, 128 held and 32 moved
//           held         kHeld    kHeadDim     32 KB    k or q; the gradient is gathered here at the end
//           held_v       kHeld    kHeadDimV    32 KB    v or dout; likewise
//           moved[2]     kMoved   kHeadDim     8 KB each: q or k
//           moved_v      kMoved   kHeadDimV    8 KB     dout or v
//           rows[2]      kMoved   2 floats     lse_base2 and delta of the moved queries
//           ds           kHeld    kMoved       8 KB     dS^T, where dq is accumulated
//           terms[2]     kMoved   words                 what mods need of the moved rows, where it is dear (tile/mods.cuh)
//
//   barrier, per moved tile   what it separates
//   moved landed              every thread's copies of this tile | the reads of S
//                             the reads of the previous tile     | the copies of moved_v and of the next tile
//   moved_v landed            every thread's copies of moved_v   | the reads of dP
//                             the reads of ds for dq             | the next tile's ds
//   ds written                every warp's rows of ds            | the reads of dq
#include <base.cuh>
#include <hw/async_copy.cuh>
#include <hw/device.cuh>
#include <hw/math.cuh>
#include <params/backward.cuh>
#include <tile/dropout.cuh>
#include <tile/fragment.cuh>
#include <tile/mask.cuh>
#include <tile/matmul.cuh>
#include <tile/mods.cuh>
#include <tile/schedule.cuh>
#include <tile/score.cuh>
#include <tile/sequence.cuh>
#include <tile/shared_tile.cuh>
#include <tile/store.cuh>
#include <tile/weight.cuh>
#include <variant.cuh>

template <class V>
struct BackwardPlan {
  using Element = typename V::Element;
  static constexpr i32 kBytes = static_cast<i32>(sizeof(Element));
  static constexpr i32 kThreads = V::kThreads;
  static constexpr i32 kRowTiles = V::kHeld / (kThreads / 2);
  static_assert(kRowTiles * (kThreads / 2) == V::kHeld, "every warp has whole row tiles");

  using Tile = SharedTile<V::kHeadDim * kBytes>;    // rows of q and k
  using TileV = SharedTile<V::kHeadDimV * kBytes>;  // rows of v and dout

  // Bytes of a gradient's row that one block computes. Where columns are too few to share, the first slice has them all.
  static constexpr i32 slice_bytes(i32 whole) {
    return whole >= 192 * kBytes && whole / V::kSlices % 128 == 0 ? whole / V::kSlices : whole;
  }
  static constexpr i32 kSliceBytes = slice_bytes(Tile::kRowBytes);
  static constexpr i32 kSliceVBytes = slice_bytes(TileV::kRowBytes);

  static constexpr i32 kHeldBytes = V::kHeld * Tile::kRowBytes;
  static constexpr i32 kHeldVBytes = V::kHeld * TileV::kRowBytes;
  static constexpr i32 kMovedBytes = V::kMoved * Tile::kRowBytes;
  static constexpr i32 kMovedVBytes = V::kMoved * TileV::kRowBytes;
  static constexpr i32 kRowsBytes = V::kKeysHeld ? V::kMoved * 8 : 0;

  // dS^T. Rows no shorter than what is exchanged without bank conflicts: of float32, all of the banks.
  using DsTile = SharedTile<max_of(V::kMoved * kBytes, kBytes == 2 ? 64 : 128)>;
  static constexpr i32 kDsBytes = V::kAccumulateDq ? V::kHeld * DsTile::kRowBytes : 0;

  // dq of a moved tile is shared out among the warps: 16 rows and so many columns to each, at most 64 bytes of them, for
  // registers are few.
  static constexpr i32 kWarps = kThreads / 32;
  static constexpr i32 kDqRowTiles = V::kMoved / 16;
  static constexpr i32 dq_columns(i32 columns) {
    const i32 whole = kSliceBytes / kBytes;
    const bool enough = kDqRowTiles * (whole / columns) <= kWarps;
    return enough || columns * kBytes == 64 || whole % (2 * columns) != 0 ? columns : dq_columns(2 * columns);
  }
  static constexpr i32 kDqColumns = dq_columns(16);
  static constexpr i32 kDqParts = kDqRowTiles * (kSliceBytes / kBytes / kDqColumns);

  static constexpr i32 kTermsBytes = staged_bytes<Mods, !V::kKeysHeld, V::kMoved>();

  static_assert(kHeldBytes + kHeldVBytes + 2 * kMovedBytes + kMovedVBytes + 2 * kRowsBytes + kDsBytes +
                        2 * kTermsBytes <=
                    V::kSharedBytes,
                "the host asks for as much shared memory as is used");
};

// Zeros in the moved rows of dout that keep nothing, for 0 times what lies there may be NaN. Each thread clears what it
// has copied, and waited for. rows_smem: lse_base2 of each.
template <class V>
HW_DEVICE void clear_rows_of_none(u32 moved_v_smem, u32 rows_smem) {
  using Tile = typename BackwardPlan<V>::TileV;
  using Loader = RowLoader<Tile, V::kMoved, V::kThreads, V::kLoadBytes>;
  HW_NO_UNROLL
  for (i32 row = Loader::first_row(); row < V::kMoved; row += Loader::kRowStep) {
    if (hw::load_shared<float>(rows_smem + static_cast<u32>(4 * row)) != kInfinity) continue;
    HW_NO_UNROLL
    for (i32 unit = Loader::first_unit(); unit < Tile::kUnits; unit += Loader::kGroup) {
      hw::store_shared(Tile::address(moved_v_smem, row, unit), u32x4{{0, 0, 0, 0}});
    }
  }
}

// Adds what the held keys contribute to dq of the moved tile at row `first` of q_len: dS k, from dS^T of all warps.
// column: the first one of k_smem.
template <class V>
HW_DEVICE void accumulate_dq(const BackwardParams& p, u32 ds_smem, u32 k_smem, i32 sequence, i32 head, i32 first,
                             i32 q_len, i32 column) {
  using Plan = BackwardPlan<V>;
  using Dq = Fragment<1, Plan::kDqColumns / 8>;
  HW_NO_UNROLL
  for (i32 part = hw::warp_idx(); part < Plan::kDqParts; part += Plan::kWarps) {
    const i32 row = part % Plan::kDqRowTiles * 16;
    const i32 part_column = part / Plan::kDqRowTiles * Plan::kDqColumns;
    if (first + row >= q_len) continue;
    Dq dq;
    dq.fill(0.0f);
    multiply_ptv<typename V::Element, V::kHeld, typename Plan::DsTile, typename Plan::Tile>(dq, ds_smem, row, k_smem,
                                                                                            part_column);
    const i64 line = head * p.dq_blocks + slot_begin(p.cu_seqlens_q, p.q_len, sequence, 16) + (first + row) / 16;
    float* to = p.dq_accum + (line * (V::kHeadDim / 8) + (column + part_column) / 8) * 128 + hw::lane_idx();
    HW_UNROLL
    for (i32 c = 0; c < Dq::kColTiles; ++c) {
      HW_UNROLL
      for (i32 i = 0; i < 4; ++i) hw::atomic_add(to + 128 * c + 32 * i, dq.x[0][c][i]);
    }
  }
}

// The sequence's tile number `from_end` of the held side, counted from its end.
template <class V, class M>
HW_DEVICE void backward_tile(const BackwardParams& p, i32 sequence, i32 from_end) {
  using Plan = BackwardPlan<V>;
  using Element = typename V::Element;
  using S = Fragment<Plan::kRowTiles, V::kMoved / 8>;
  using Gradient = Fragment<Plan::kRowTiles, Plan::kSliceBytes / Plan::kBytes / 8>;    // of k or q
  using GradientV = Fragment<Plan::kRowTiles, Plan::kSliceVBytes / Plan::kBytes / 8>;  // of v
  constexpr bool kKeysHeld = V::kKeysHeld;
  constexpr bool kAccumulateDq = V::kAccumulateDq;
  static_assert(kKeysHeld || !kAccumulateDq, "the blocks that hold queries own their dq");

  // Roles
  const i32 lane = hw::lane_idx();
  const i32 warp_row = hw::warp_idx() * 16 * Plan::kRowTiles;
  const i32 part = head_of_block(p);  // of kSlices of a head
  const i32 slice = part % V::kSlices;
  const bool has_gradient = slice == 0 || Plan::kSliceBytes < Plan::Tile::kRowBytes;
  const bool has_gradient_v = slice == 0 || Plan::kSliceVBytes < Plan::TileV::kRowBytes;
  const u32 slice_k = static_cast<u32>(has_gradient ? slice * Plan::kSliceBytes : 0);
  const u32 slice_v = static_cast<u32>(has_gradient_v ? slice * Plan::kSliceVBytes : 0);

  // Shared memory
  const u32 held_smem = hw::smem_base();
  const u32 held_v_smem = held_smem + Plan::kHeldBytes;
  const u32 moved_smem = held_v_smem + Plan::kHeldVBytes;
  const u32 moved_v_smem = moved_smem + 2 * Plan::kMovedBytes;
  const u32 rows_smem = moved_v_smem + Plan::kMovedVBytes;
  const u32 ds_smem = rows_smem + 2 * Plan::kRowsBytes;
  const u32 terms_smem = ds_smem + Plan::kDsBytes;

  // This tile
  const Sequence seq = read_sequence(p, sequence);
  const i32 grid_head = part / V::kSlices;
  const i32 head_kv = kKeysHeld ? grid_head : grid_head / p.head_group;
  const i32 first_head = kKeysHeld ? grid_head * p.head_group : grid_head;  // the first query head
  const i32 from_head = kKeysHeld ? 0 : first_head;  // of what has query heads; where they are moved over, `head` adds its own
  const u8* q = at_row(p.q, seq, p.q_stride_batch, seq.q_begin, p.q_stride_row) + from_head * p.q_stride_head;
  const u8* k = at_row(p.k, seq, p.k_stride_batch, seq.k_begin, p.k_stride_row) + head_kv * p.k_stride_head;
  const u8* v = at_row(p.v, seq, p.v_stride_batch, seq.k_begin, p.v_stride_row) + head_kv * p.v_stride_head;
  const u8* dout =
      at_row(p.dout, seq, p.dout_stride_batch, seq.q_begin, p.dout_stride_row) + from_head * p.dout_stride_head;
  const i64 stat_line = row_offset(seq, p.lse_stride_batch, seq.q_begin, 1) + from_head * p.lse_stride_head;
  // The same, for what happens rarely.
  // NOTE: where queries are held in 16 bits it is worked out anew: kept through the loop it costs registers, and spills.
  const auto line_of_lse = [&] {
    if constexpr (kKeysHeld || sizeof(Element) != 2) return stat_line;
    const Sequence own = read_sequence(p, sequence);
    return row_offset(own, p.lse_stride_batch, own.q_begin, 1) + from_head * p.lse_stride_head;
  };
  const i32 row_bytes = p.head_dim * Plan::kBytes;
  const i32 row_bytes_v = p.head_dim_v * Plan::kBytes;
  const i32 held_len = kKeysHeld ? seq.k_len : seq.q_len;
  const i32 moved_len = kKeysHeld ? seq.q_len : seq.k_len;
  const i32 held_first = (ceil_div(kKeysHeld ? seq.k_rows : seq.q_rows, V::kHeld) - 1 - from_end) * V::kHeld;

  // The moved side's interval: tile/mask.cuh has why the sides of the window change with the side that is held.
  const i32 left = kKeysHeld ? p.window_right : p.window_left;
  const i32 right = kKeysHeld ? p.window_left : p.window_right;
  const i32 diagonal = held_first + (kKeysHeld ? -seq.diagonal() : seq.diagonal());
  const i32 last_row = min_of(V::kHeld, held_len - held_first) - 1;
  const TileInterval moved = interval_of_tile(diagonal, diagonal + last_row, left, right, moved_len);
  const i32 first_tile = moved.any.begin / V::kMoved;
  const bool meets_any = last_row >= 0 && moved.any.begin < moved.any.end;
  const i32 tiles = meets_any ? ceil_div(moved.any.end, V::kMoved) - first_tile : 0;
  const i32 heads = kKeysHeld ? p.head_group : 1;
  i32 steps = tiles * heads;
  const auto is_last = [&](i32 head) { return !kKeysHeld || (head + 1) % p.head_group == 0; };

  // Where mask_mod may leave nothing of a tile: the first from tile n of a head on that it leaves
  // something of; false if there is none.
  TileWalk<1> walk(first_tile);
  const auto find_tile = [&](i32& n, i32& head) {
    if constexpr (M::kMask) {
      const i32 end = first_tile + tiles;
      HW_NO_UNROLL
      while (true) {
        const typename M::Tile t = M::tile(p, sequence, head, seq.q_len, seq.k_len);
        n = walk.find(n, end, [&](i32 tile) {
          const i32 first = tile * V::kMoved;
          const i32 last = min_of(first + V::kMoved, moved_len) - 1, held_last = held_first + last_row;
          if constexpr (kKeysHeld) return M::classify(p, t, first, last, held_first, held_last);
          return M::classify(p, t, held_first, held_last, first, last);
        });
        if (n < end || is_last(head)) return n < end;
        ++head;
        n = first_tile;
        walk = TileWalk<1>(first_tile);
      }
    }
    return true;
  };
  i32 n = first_tile, head = first_head;
  if constexpr (M::kMask) {
    if (steps > 0 && !find_tile(n, head)) steps = 0;
  }

  const i64 moved_stride = kKeysHeld ? p.q_stride_row : p.k_stride_row;
  const i64 moved_v_stride = kKeysHeld ? p.dout_stride_row : p.v_stride_row;
  const RowLoader<typename Plan::Tile, V::kMoved, Plan::kThreads, V::kLoadBytes> moved_loader(
      moved_smem, kKeysHeld ? q : k, moved_stride);
  const RowLoader<typename Plan::TileV, V::kMoved, Plan::kThreads, V::kLoadBytes> moved_v_loader(
      moved_v_smem, kKeysHeld ? dout : v, moved_v_stride);
  // Tile n of the moved side, of a query head.
  const auto load_moved = [&](i32 n, i32 head, i32 stage) {
    moved_loader.load(n * V::kMoved, moved_len, row_bytes, moved_stride, static_cast<u32>(stage * Plan::kMovedBytes),
                      kKeysHeld ? head * p.q_stride_head : 0);
    if constexpr (Plan::kTermsBytes > 0) {
      stage_terms<M, !kKeysHeld, V::kMoved, Plan::kThreads>(
          p, M::tile(p, sequence, head, seq.q_len, seq.k_len),
          terms_smem + static_cast<u32>(stage * Plan::kTermsBytes), n * V::kMoved);
    }
    if constexpr (kKeysHeld) {
      for (i32 i = hw::thread_idx(); i < V::kMoved; i += Plan::kThreads) {
        const i32 query = n * V::kMoved + i;
        const i64 at = stat_line + head * p.lse_stride_head + query;
        const u32 to = rows_smem + static_cast<u32>(stage * Plan::kRowsBytes + 4 * i);
        const i32 bytes = query < moved_len ? 4 : 0;
        hw::cp_async_4(to, p.lse_base2 + at, bytes);
        hw::cp_async_4(to + 4 * V::kMoved, p.delta + at, bytes);
      }
    }
  };

  const LaneRows<typename Plan::Tile> held_rows(held_smem, warp_row + lane % 16, lane / 16);
  const LaneRows<typename Plan::TileV> held_v_rows(held_v_smem, warp_row + lane % 16, lane / 16);
  const LaneRows<typename Plan::TileV> moved_v_rows(moved_v_smem, lane % 8 + 8 * (lane / 16), lane / 8 % 2);

  // What the held queries need of themselves.
  float lse_base2[S::kRows], delta[S::kRows];
  if constexpr (!kKeysHeld) {
    HW_UNROLL
    for (i32 i = 0; i < S::kRows; ++i) {
      const i32 query = held_first + warp_row + S::row_of(i);
      lse_base2[i] = query < seq.q_len ? hw::load_global(p.lse_base2 + stat_line + query) : kInfinity;
      delta[i] = query < seq.q_len ? hw::load_global(p.delta + stat_line + query) : 0.0f;
    }
  }

  Gradient gradient;
  GradientV gradient_v;
  gradient.fill(0.0f);
  gradient_v.fill(0.0f);
  float slope_sum = 0.0f;  // of this thread: dS times the distance that ALiBi's slope is multiplied by

  // Held
  if (steps > 0) {
    const i64 held_stride = kKeysHeld ? p.k_stride_row : p.q_stride_row;
    const i64 held_v_stride = kKeysHeld ? p.v_stride_row : p.dout_stride_row;
    const RowLoader<typename Plan::Tile, V::kHeld, Plan::kThreads, V::kLoadBytes> held_loader(
        held_smem, kKeysHeld ? k : q, held_stride);
    const RowLoader<typename Plan::TileV, V::kHeld, Plan::kThreads, V::kLoadBytes> held_v_loader(
        held_v_smem, kKeysHeld ? v : dout, held_v_stride);
    held_loader.load(held_first, held_len, row_bytes, held_stride);
    held_v_loader.load(held_first, held_len, row_bytes_v, held_v_stride);
    load_moved(n, head, 0);
    hw::cp_async_commit();
  }

  // Loop over the moved side
  HW_NO_UNROLL
  for (i32 step = 0; step < steps; ++step) {
    const i32 stage = step % 2;
    i32 next_n = n + 1 < first_tile + tiles ? n + 1 : first_tile;
    i32 next_head = next_n == first_tile ? head + 1 : head;
    bool unmasked = true;
    if constexpr (M::kMask) {
      unmasked = walk.is_full(n);
      next_n = n + 1;
      next_head = head;
      if (!find_tile(next_n, next_head)) steps = step + 1;
    }
    // wait   moved landed <- own copies of this tile and, the first time, of the held ones
    hw::cp_async_wait<0>();
    // sync   moved landed <-> all warps: the tile is whole; nobody reads the previous one any more
    hw::sync_threads();
    moved_v_loader.load(n * V::kMoved, moved_len, row_bytes_v, moved_v_stride, 0,
                        kKeysHeld ? head * p.dout_stride_head : 0);
    hw::cp_async_commit();
    if (step + 1 < steps) load_moved(next_n, next_head, 1 - stage);
    hw::cp_async_commit();

    // S = held moved^T
    const u32 moved_stage = moved_smem + static_cast<u32>(stage * Plan::kMovedBytes);
    const u32 terms_stage = terms_smem + static_cast<u32>(stage * Plan::kTermsBytes);
    const LaneRows<typename Plan::Tile> moved_rows(moved_stage, lane % 8 + 8 * (lane / 16), lane / 8 % 2);
    S s;
    s.fill(0.0f);
    multiply_qk<Element, V::kHeadDim>(s, held_rows, moved_rows);
    const i32 moved_first = n * V::kMoved;
    const i32 center = diagonal + warp_row - moved_first;  // the moved column on the diagonal of this warp's row 0
    const i32 row_first = held_first + warp_row;
    S before;  // the scores that score_mod gets
    if constexpr (M::kScore) {
      s.for_each([&](float& x, i32, i32) { x *= p.score_scale; });
      before = s;
      score_by_mod<M, !kKeysHeld>(p, M::tile(p, sequence, head, seq.q_len, seq.k_len), s, row_first, moved_first,
                                  terms_stage);
    } else {
      score(p, sequence, head, s, center);
    }
    const bool mixed = moved_first < moved.all.begin || moved_first + V::kMoved > moved.all.end;
    if constexpr (M::kMask) {
      if (mixed | !unmasked) {
        const typename M::Tile t = M::tile(p, sequence, head, seq.q_len, seq.k_len);
        mask_by_mod<M, !kKeysHeld>(p, t, s, row_first, moved_first, terms_stage, [&](i32 i) {
          const i32 row = S::row_of(i);
          return bounds_of_row<M, !kKeysHeld>(p, t, row_first + row, center + moved_first + row, left, right);
        });
      }
    } else if (mixed) {
      mask_scores(s, center, left, right, moved_len - moved_first);
    }
    if constexpr (kAccumulateDq || (kKeysHeld && M::kGradients > 0)) {
      // Of keys past the end dk and dv are not stored, but dq adds up all rows, and so do the gradients of what mods
      // captured. How many there are is read anew: kept
      // through the loop it would cost a register.
      if (from_end == 0 || p.seqused_k != nullptr) {
        const i32 used = read_sequence(p, sequence).k_len - held_first - warp_row;
        s.for_each([&](float& x, i32 row, i32) { x = S::row_of(row) < used ? x : -kInfinity; });
      }
    }

    // P = 2^(S - lse)
    const u32 rows_first = rows_smem + static_cast<u32>(stage * Plan::kRowsBytes);
    const u32 rows_stage = rows_first + static_cast<u32>(4 * S::first_col());
    const auto lse_base2_of = [&](i32 row, i32 column) {
      if constexpr (kKeysHeld) return hw::load_shared<float>(rows_stage + static_cast<u32>(4 * column));
      return lse_base2[kKeysHeld ? 0 : row];
    };
    bool special = false;
    if constexpr (kKeysHeld) {
      HW_UNROLL
      for (i32 i = lane; i < V::kMoved; i += 32) {
        special |= is_special(hw::load_shared<float>(rows_first + static_cast<u32>(4 * i)));
      }
    } else {
      HW_UNROLL
      for (i32 i = 0; i < S::kRows; ++i) special |= is_special(lse_base2[i]);
    }
    special = hw::any(special);
    if (special) {
      const float* lse = p.lse + line_of_lse() + (kKeysHeld ? head * p.lse_stride_head : 0);
      s.for_each([&](float& x, i32 row, i32 column) {
        const float base2 = lse_base2_of(row, column);
        const i32 query = kKeysHeld ? moved_first + S::first_col() + column : held_first + warp_row + S::row_of(row);
        if (base2 == kInfinity) {
          x = 0.0f;
        } else if (is_special(base2)) {
          x = special_weight(x, p.softmax_scale * kLn2, hw::load_global(lse + query));
        } else {
          x = hw::exp2_approx(hw::fma(x, p.softmax_scale, -base2));
        }
      });
    } else {
      s.for_each([&](float& x, i32 row, i32 column) {
        x = hw::exp2_approx(hw::fma(x, p.softmax_scale, -lse_base2_of(row, column)));
      });
    }

    if constexpr (V::kDropout) {
      // A dropped weight is remembered by its sign.
      const Dropout dropout = read_dropout(p, sequence, head, p.heads_q);
      const auto mark = [](float& x, bool kept) { x = kept ? x : -x; };
      if constexpr (kKeysHeld) {
        visit_dropout_transposed(dropout, s, moved_first, held_first + warp_row, mark);
      } else {
        visit_dropout(dropout, s, held_first + warp_row, moved_first, mark);
      }
    }

    // wait   moved_v landed <- own copies of it; those of the next tile may still be on their way
    hw::cp_async_wait<1>();
    if constexpr (kKeysHeld) {
      if (special) clear_rows_of_none<V>(moved_v_smem, rows_first);
    }
    // sync   moved_v landed <-> all warps: it is whole
    hw::sync_threads();

    // dP = held_v moved_v^T; dS = P (dP - delta)
    S ds;
    ds.fill(0.0f);
    multiply_qk<Element, V::kHeadDimV>(ds, held_v_rows, moved_v_rows);
    HW_UNROLL
    for (i32 r = 0; r < S::kRowTiles; ++r) {
      HW_UNROLL
      for (i32 c = 0; c < S::kColTiles; ++c) {
        HW_UNROLL
        for (i32 i = 0; i < 4; ++i) {
          float own;
          if constexpr (kKeysHeld) {
            own = hw::load_shared<float>(rows_stage + static_cast<u32>(4 * (V::kMoved + 8 * c + i % 2)));
          } else {
            own = delta[2 * r + i / 2];
          }
          const float weight = s.x[r][c][i];
          if constexpr (V::kDropout) {
            const float kept = weight > 0.0f ? weight * p.keep_scale : 0.0f;
            ds.x[r][c][i] = hw::fma(kept, ds.x[r][c][i], -hw::abs(weight) * own);
          } else {
            ds.x[r][c][i] = weight * (ds.x[r][c][i] - own);
          }
        }
      }
    }
    if (special) {
      ds.for_each([&](float& x, i32 row, i32 column) { x = lse_base2_of(row, column) == kInfinity ? 0.0f : x; });
    }
    if constexpr (M::kScore) {
      const typename M::Tile t = M::tile(p, sequence, head, seq.q_len, seq.k_len);
      if constexpr (kKeysHeld) {
        if (slice == 0) add_gradients<M, false, V::kFixedSums>(p, t, before, ds, row_first, moved_first, terms_stage);
      }
      if constexpr (M::kSlope) {
        visit_terms<M, !kKeysHeld>(
            p, t, before, row_first, moved_first, terms_stage,
            [&](float& x, i32 row, i32 column, const typename M::QTerms& q, const typename M::KTerms& k) {
              float& d = ds.at(row, column);
              d = d == 0.0f ? 0.0f : d * M::slope(p, t, q, k, x);
            });
      }
    } else if (!p.raw_scores) {
      const float slope = p.alibi_slopes != nullptr ? read_slope(p, sequence, head) : 0.0f;
      HW_UNROLL
      for (i32 r = 0; r < S::kRowTiles; ++r) {
        HW_UNROLL
        for (i32 c = 0; c < S::kColTiles; ++c) {
          HW_UNROLL
          for (i32 i = 0; i < 4; ++i) {
            const i32 row = 2 * r + i / 2, column = 8 * c + i % 2;
            const float distance = hw::abs(static_cast<float>(center + S::row_of(row) - S::first_col() - column));
            if (p.slope_partials != nullptr) slope_sum = hw::fma(-distance, ds.x[r][c][i], slope_sum);
            if (p.score_cap != 0.0f) {
              ds.x[r][c][i] *= cap_derivative(hw::abs(s.x[r][c][i]), lse_base2_of(row, column), -slope * distance,
                                              p.score_cap);
            }
          }
        }
      }
    }

    // Gradients
    if constexpr (kAccumulateDq) {
      const u32 own_rows = ds_smem + static_cast<u32>(warp_row * Plan::DsTile::kRowBytes);
      if (has_gradient) store_fragment<Element, typename Plan::DsTile>(ds, own_rows);
    }
    if constexpr (kKeysHeld) {
      if constexpr (V::kDropout) {
        s.for_each([&](float& x, i32, i32) { x = x > 0.0f ? x * p.keep_scale : 0.0f; });
      }
      if (has_gradient_v) multiply_pv<Element, GradientV, S, typename Plan::TileV>(gradient_v, s, moved_v_smem + slice_v);
    }
    if constexpr (kAccumulateDq) {
      // NOTE: dq before dk. The additions are on their way meanwhile, and after it registers spill.
      if (has_gradient) {
        // sync   ds written <-> all warps: it is whole
        hw::sync_threads();
        accumulate_dq<V>(p, ds_smem, held_smem + slice_k, sequence, head, moved_first, moved_len,
                         static_cast<i32>(slice_k) / Plan::kBytes);
      }
    }
    if (has_gradient) multiply_pv<Element, Gradient, S, typename Plan::Tile>(gradient, ds, moved_stage + slice_k);
    n = next_n;
    head = next_head;
  }

  // Finish
  if constexpr (kAccumulateDq) {
    // sync   held free <-> all warps: nobody reads k for dq any more; gradients are gathered there
    hw::sync_threads();
  }
  gradient.for_each([&](float& x, i32, i32) { x *= p.scale; });

  // Store. What it needs is read anew: kept through the loop it would cost registers there.
  const Sequence owner = read_sequence(p, sequence);
  const i32 owner_head = kAccumulateDq ? head_of_block(p) / V::kSlices : grid_head;
  const i32 warp_first = held_first + warp_row;
  const i32 used = (kKeysHeld ? owner.k_len : owner.q_len) - warp_first;
  const i32 owned = (kKeysHeld ? owner.k_rows : owner.q_rows) - warp_first;
  const u32 warp_tile = held_smem + static_cast<u32>(warp_row * Plan::Tile::kRowBytes);
  if constexpr (kKeysHeld) {
    if (has_gradient) {
      u8* dk = at_row(p.dk, owner, p.dk_stride_batch, owner.k_begin + warp_first, p.dk_stride_row) +
               owner_head * p.dk_stride_head + slice_k;
      store_rows<Element, typename Plan::Tile, V::kLoadBytes>(gradient, warp_tile, dk, p.dk_stride_row, used, owned,
                                                              row_bytes - static_cast<i32>(slice_k));
    }
    if (has_gradient_v) {
      const u32 warp_tile_v = held_v_smem + static_cast<u32>(warp_row * Plan::TileV::kRowBytes);
      u8* dv = at_row(p.dv, owner, p.dv_stride_batch, owner.k_begin + warp_first, p.dv_stride_row) +
               owner_head * p.dv_stride_head + slice_v;
      store_rows<Element, typename Plan::TileV, V::kLoadBytes>(gradient_v, warp_tile_v, dv, p.dv_stride_row, used, owned,
                                                               row_bytes_v - static_cast<i32>(slice_v));
    }
  } else {
    u8* dq = at_row(p.dq, owner, p.dq_stride_batch, owner.q_begin + warp_first, p.dq_stride_row) +
             owner_head * p.dq_stride_head;
    store_rows<Element, typename Plan::Tile, V::kLoadBytes>(gradient, warp_tile, dq, p.dq_stride_row, used, owned,
                                                            row_bytes);

    // One partial sum a warp: backward_sum.cu adds them up.
    float sink_sum = 0.0f;
    if (p.sink_partials != nullptr && lane % 4 == 0) {
      const float sink = read_sink<Element>(p, owner_head);
      const float* lse = p.lse + line_of_lse();
      HW_UNROLL
      for (i32 i = 0; i < S::kRows; ++i) {
        const i32 query = held_first + warp_row + S::row_of(i);
        if (query < owner.q_len) {
          sink_sum = hw::fma(-sink_weight(sink, hw::load_global(lse + query)), delta[i], sink_sum);
        }
      }
    }
    HW_UNROLL
    for (i32 mask = 1; mask < 32; mask *= 2) {
      slope_sum += hw::shfl_xor(slope_sum, mask);
      sink_sum += hw::shfl_xor(sink_sum, mask);
    }
    if (lane == 0) {
      const i64 slot = slot_begin(p.cu_seqlens_q, p.q_len, sequence, V::kHeld) + held_first / V::kHeld;
      const i64 at = owner_head * p.partials + slot * (V::kThreads / 32) + hw::warp_idx();
      if (p.sink_partials != nullptr) hw::store_global(p.sink_partials + at, sink_sum);
      if (p.slope_partials != nullptr) hw::store_global(p.slope_partials + at, slope_sum);
    }
  }
}

HW_KERNEL(Variant::kThreads) cuflash_backward_sm80(HW_GRID_CONSTANT BackwardParams p) {
  using V = Variant;
  const i32* cu_seqlens = V::kKeysHeld ? p.cu_seqlens_k : p.cu_seqlens_q;
  const i32 rows = V::kKeysHeld ? p.k_len : p.q_len;
  const TileRange range = tiles_of_block(p, cu_seqlens, rows, V::kHeld);
  const auto tiles = [&] {
    const Sequence seq = read_sequence(p, range.sequence);
    return ceil_div(V::kKeysHeld ? seq.k_rows : seq.q_rows, V::kHeld);
  };
  // sync   shared memory <-> all warps: the next tile may replace this one
  for_each_tile_of(p, range.first, tiles, [] { hw::sync_threads(); },
                   [&](i32 from_end) { backward_tile<V, Mods>(p, range.sequence, from_end); });
}
