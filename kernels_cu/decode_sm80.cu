// Attention of few queries to many keys, for compute capability 8.0 and later: each piece of the keys by itself.
//
//   S = scale Q K^T, m, l, O    as forward_sm80.cu, over the piece's keys alone; through the user's mods likewise
//   partial_out, partial_sum, partial_max = O, l, m     in float32; combine.cu puts the pieces together
//
//   grid    of a fixed split_size, (piece and row tile, key head, sequence): what a piece's result is made of does not
//           depend on the grid, the batch or other lengths, so a sequence has the same bits in any batch. Else one block
//           a share, which has as much work as any other: tile/pieces.cuh
//   rows    the queries of all heads that share a key head: row r is query r / head_group of head r % head_group, so
//           that keys and values are read once for all of them
//   roles   every warp computes 16 rows, those that have none only copy.
//
//   shared  name   rows      row            bytes for d = 128, 16 bits
//           q      kBlockQ   kHeadDim       16 KB
//           and kStages times
//           k      kBlockK   kHeadDim       16 KB
//           v      kBlockK   kHeadDimV      16 KB
//           terms  kBlockK   M::kStagedK words      what mods need of each key, where it is dear (tile/mods.cuh)
//
//   barrier, per key tile    what it separates
//   K landed                 every thread's copies of K (and Q) | the reads of S = Q K^T; of the terms likewise
//                            the reads of the previous V        | the copy of a V to its stage
//   V landed                 every thread's copies of V         | the reads of O += P V
//                            the reads of K                     | the copy of a K to its stage
//   and, per piece           the reads of the last V            | the copies of the next piece's first
//
// Memory is what this waits for, so copies run kStages tiles ahead: K and V in turn, a group each, of which the last
// 2 kStages - 2 are still on their way when one is waited for.
#include <base.cuh>
#include <hw/async_copy.cuh>
#include <hw/device.cuh>
#include <hw/math.cuh>
#include <params/decode.cuh>
#include <tile/fragment.cuh>
#include <tile/mask.cuh>
#include <tile/matmul.cuh>
#include <tile/mods.cuh>
#include <tile/paged.cuh>
#include <tile/pieces.cuh>
#include <tile/score.cuh>
#include <tile/sequence.cuh>
#include <tile/shared_tile.cuh>
#include <tile/softmax.cuh>
#include <variant.cuh>

template <class V, class M>
HW_DEVICE void decode_piece(const DecodeParams& p, const Piece& piece) {
  using Element = typename V::Element;
  constexpr i32 kBytes = static_cast<i32>(sizeof(Element));
  using QTile = SharedTile<V::kHeadDim * kBytes>;
  using KTile = SharedTile<V::kHeadDim * kBytes>;
  using VTile = SharedTile<V::kHeadDimV * kBytes>;
  using S = Fragment<1, V::kBlockK / 8>;
  using O = Fragment<1, V::kHeadDimV / 8>;
  using QRows = RowLoader<QTile, V::kBlockQ, V::kThreads, V::kLoadBytes>;
  static_assert(V::kBlockQ == V::kThreads / 2, "every warp has 16 rows");
  static_assert(V::kBlockQ == kTileRows, "pieces are of tiles of as many rows");

  // Roles
  const i32 lane = hw::lane_idx();
  const i32 warp_row = hw::warp_idx() * 16;

  // Shared memory
  const u32 q_smem = hw::smem_base();
  const u32 k_smem = q_smem + static_cast<u32>(V::kBlockQ * V::kHeadDim * kBytes);
  const u32 v_smem = k_smem + static_cast<u32>(V::kBlockK * V::kHeadDim * kBytes);
  const u32 terms_smem = v_smem + static_cast<u32>(V::kBlockK * V::kHeadDimV * kBytes);
  constexpr i32 kStages = V::kStages;
  constexpr i32 kTermBytes = ceil_div(staged_bytes<M, true, V::kBlockK>(), 128) * 128;
  constexpr u32 kStageBytes = V::kBlockK * (V::kHeadDim + V::kHeadDimV) * kBytes + kTermBytes;
  static_assert(V::kBlockQ * V::kHeadDim * kBytes + kStages * kStageBytes == V::kSharedBytes, "what the host asks for");

  // This piece
  const i32 sequence = piece.sequence, head_kv = piece.head_kv, first = piece.first;
  const Sequence seq = read_sequence<true>(p, sequence);
  const i32 last = min_of(first + V::kBlockQ, rows_of(p, seq)) - 1;
  const i32 row_bytes = p.head_dim * kBytes, row_bytes_v = p.head_dim_v * kBytes;
  // Rolled, for float32 of head dim 192 and 256 spills otherwise on compute capability 10.0.
  const auto k_loader = key_loader<V, KTile, KTile::kRowBytes >= 768>(
      p, seq, sequence, k_smem, p.k, p.k_stride_batch, p.k_stride_row, head_kv * p.k_stride_head);
  const auto v_loader = key_loader<V, VTile, VTile::kRowBytes >= 768>(
      p, seq, sequence, v_smem, p.v, p.v_stride_batch, p.v_stride_row, head_kv * p.v_stride_head);
  const TileInterval seen = keys_of_rows(p, seq, first);
  const i32 tiles_begin = max_of(seen.any.begin / V::kBlockK, piece.tile_begin);
  const i32 tiles_end = seen.any.begin < seen.any.end ? min_of(ceil_div(seen.any.end, V::kBlockK), piece.tile_end) : 0;
  const bool has_rows = first + warp_row <= last;
  // Of the key tiles, those that mask_mod leaves something of for any head. Where copies run ahead, so does the search:
  // to_come[i] is the i-th tile after the one computed, and bit i of `full` whether nothing of it is masked.
  constexpr bool kAhead = M::kMask && kStages > 1;
  TileWalk<1> walk(tiles_begin);
  i32 to_come[kAhead ? kStages : 1] = {};
  u32 full = 0;
  const auto find_tile = [&](i32 n) {
    if constexpr (M::kMask) {
      return walk.find(n, tiles_end, [&](i32 tile) {
        const i32 key = tile * V::kBlockK;
        return classify_heads<M>(p, sequence, seq, head_kv, first / p.head_group, last / p.head_group, key,
                                 min_of(key + V::kBlockK, seq.k_len) - 1);
      });
    }
    return n;
  };
  i32 n = find_tile(tiles_begin);
  const bool sees_keys = n < tiles_end;
  const auto tile_at = [&](i32 i) { return kAhead ? to_come[kAhead ? i : 0] : n + i; };
  const auto come = [&](i32 i, i32 tile) {
    if constexpr (kAhead) {
      if (tile < tiles_end) full |= static_cast<u32>(walk.is_full(tile)) << i;
      if (i < kStages) to_come[i] = tile;
    }
  };

  // Of this thread's row i: the key its query stands on, and its head. NOTE: kept through the loop they cost registers.
  // A row behind the last counts as one more query: what is computed of it is never stored.
  const auto row_of = [&](i32 i) { return first + warp_row + S::row_of(i); };
  const auto center_of = [&](i32 i) { return seq.diagonal() + row_of(i) / p.head_group; };
  const auto head_of = [&](i32 i) { return head_kv * p.head_group + row_of(i) % p.head_group; };
  const auto tile_of = [&](i32 i) {
    if constexpr (M::kScore || M::kMask) return M::tile(p, sequence, head_of(i), seq.q_len, seq.k_len);
  };
  const auto query_of = [&](i32 i) { return inside(row_of(i) / p.head_group, seq.q_len); };
  // `stage`: bytes from the first one.
  const auto copy_k = [&](i32 tile, u32 stage) {
    if (tile < tiles_end) {
      k_loader.load(tile * V::kBlockK, seq.k_len, row_bytes, p.k_stride_row, stage);
      if constexpr (M::kStagedK > 0 && !M::kHead) {
        stage_terms<M, true, V::kBlockK, V::kThreads>(p, tile_of(0), terms_smem + stage, tile * V::kBlockK);
      }
    }
    hw::cp_async_commit();
  };
  const auto copy_v = [&](i32 tile, u32 stage) {
    if (tile < tiles_end) v_loader.load(tile * V::kBlockK, seq.k_len, row_bytes_v, p.v_stride_row, stage);
    hw::cp_async_commit();
  };
  const LaneRows<QTile> q_rows(q_smem, warp_row + lane % 16, lane / 16);
  OnlineSoftmax<S::kRows> softmax(p.softmax_scale);
  O o;
  o.fill(0.0f);

  // Q, and the first tiles
  if (sees_keys) {
    const u8* q = at_row(p.q, seq, p.q_stride_batch, seq.q_begin, p.q_stride_row);
    HW_NO_UNROLL
    for (i32 at = QRows::first_row(); at < V::kBlockQ; at += QRows::kRowStep) {
      const i32 row = min_of(first + at, last);
      const u8* from = q + row / p.head_group * p.q_stride_row +
                       (head_kv * p.head_group + row % p.head_group) * p.q_stride_head;
      HW_UNROLL
      for (i32 unit = QRows::first_unit(); unit < QTile::kUnits; unit += QRows::kGroup) {
        const i32 left = first + at <= last ? row_bytes - unit * 16 : 0;
        QRows::copy_unit(QTile::address(q_smem, at, unit), from + unit * 16, left);
      }
    }
    come(0, n);
    copy_k(n, 0);
    HW_UNROLL
    for (i32 i = 1; i < kStages; ++i) {
      copy_v(tile_at(i - 1), (i - 1) * kStageBytes);
      come(i, find_tile(tile_at(i - 1) + 1));
      copy_k(tile_at(i), i * kStageBytes);
    }
  }
  u32 stage = 0;

  // KV loop
  HW_NO_UNROLL
  while (n < tiles_end) {
    // wait   K landed <- own copies of K and, the first time, Q
    hw::cp_async_wait<2 * kStages - 2>();
    // sync   K landed <-> all warps: K is whole; nobody reads the previous V any more
    hw::sync_threads();
    copy_v(tile_at(kStages - 1), (stage == 0 ? kStages * kStageBytes : stage) - kStageBytes);
    const i32 k_first = n * V::kBlockK;

    S s;
    s.fill(0.0f);
    if (has_rows) {
      const LaneRows<KTile> k_rows(k_smem + stage, lane % 8 + 8 * (lane / 16), lane / 8 % 2);
      multiply_qk<Element, V::kHeadDim>(s, q_rows, k_rows);
      if constexpr (M::kScore) {
        s.for_each([&](float& x, i32, i32) { x *= p.score_scale; });
        visit_head_terms<M>(p, tile_of, query_of, s, k_first, terms_smem + stage,
                            [&](float& x, const typename M::Tile& t, i32, i32, const typename M::QTerms& q,
                                const typename M::KTerms& k) { x = M::score(p, t, q, k, x); });
      } else {
        score_of(p, sequence, head_of, s, [&](i32 i) { return center_of(i) - k_first; });
      }
      bool mixed = k_first < seen.all.begin || k_first + V::kBlockK > seen.all.end;
      if constexpr (M::kMask) mixed |= kAhead ? (full & 1u) == 0 : !walk.is_full(n);
      if (mixed) {
        i32 begin[S::kRows], end[S::kRows];
        HW_UNROLL
        for (i32 i = 0; i < S::kRows; ++i) {
          Interval own = interval_of_row(center_of(i), p.window_left, p.window_right, seq.k_len);
          if constexpr (M::kMask) {
            const Interval bounds = M::bounds_q(p, tile_of(i), query_of(i));
            own = {max_of(own.begin, bounds.begin), min_of(own.end, bounds.end)};
          }
          begin[i] = own.begin - k_first - S::first_col();
          end[i] = own.end - k_first - S::first_col();
        }
        if constexpr (M::kMask && M::kKeepQ) {
          visit_head_terms<M>(p, tile_of, query_of, s, k_first, terms_smem + stage,
                              [&](float& x, const typename M::Tile& t, i32 row, i32 column, const typename M::QTerms& q,
                                  const typename M::KTerms& k) {
                                const bool keep = (column >= begin[row]) & (column < end[row]) & M::keep_q(p, t, q, k);
                                x = keep ? x : -kInfinity;
                              });
        } else {
          s.for_each([&](float& x, i32 row, i32 column) {
            const bool keep = (column >= begin[row]) & (column < end[row]);
            x = keep ? x : -kInfinity;
          });
        }
      }
    }

    // wait   V landed <- own copies of V
    hw::cp_async_wait<2 * kStages - 2>();
    // sync   V landed <-> all warps: V is whole; nobody reads K any more
    hw::sync_threads();
    const i32 last_tile = find_tile(tile_at(kStages - 1) + 1);
    copy_k(last_tile, stage);
    if (has_rows) {
      softmax.update(s, o);
      multiply_pv<Element, O, S, VTile>(o, s, v_smem + stage);
    }
    if constexpr (kAhead) {
      come(kStages, last_tile);
      full >>= 1;
      HW_UNROLL
      for (i32 i = 1; i < kStages; ++i) to_come[i - 1] = to_come[i];
      to_come[kStages - 1] = last_tile;
      n = to_come[0];
    } else {
      n = kStages == 1 ? last_tile : n + 1;
    }
    stage = stage + kStageBytes == kStages * kStageBytes ? 0 : stage + kStageBytes;
  }

  // Store. What it needs is read anew: kept through the loop it would cost registers there.
  if (!has_rows) return;
  const Sequence owner = read_sequence<true>(p, sequence);
  HW_UNROLL
  for (i32 i = 0; i < S::kRows; ++i) {
    const float sum = quad_sum(softmax.sum[i]);
    const i32 row = row_of(i);
    if (row < rows_of(p, owner)) {
      const i64 line =
          piece.lines + (piece.by_row ? line_of_row(p, owner, head_of(i), row / p.head_group) : row - first);
      if (lane % 4 == 0) {
        hw::store_global(p.partial_sum + line, sum);
        hw::store_global(p.partial_max + line, softmax.maximum[i]);
      }
      float* out = p.partial_out + line * p.head_dim_v;
      HW_UNROLL
      for (i32 c = 0; c < O::kColTiles; ++c) {
        HW_UNROLL
        for (i32 j = 0; j < 2; ++j) {
          const i32 column = 8 * c + O::first_col() + j;
          if (column < p.head_dim_v && sees_keys) hw::store_global(out + column, o.x[0][c][2 * i + j]);
        }
      }
    }
  }
}

HW_KERNEL(Variant::kThreads) cuflash_decode_sm80(HW_GRID_CONSTANT DecodeParams p) {
  i32 done = 0;
  Piece piece;
  while (next_piece(p, done, piece)) {
    decode_piece<Variant, Mods>(p, piece);
    // sync   shared memory <-> all warps: the next piece's tiles may replace this one's
    hw::sync_threads();
  }
}
