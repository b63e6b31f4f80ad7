// Attention of few queries to many keys, for compute capability 8.0 and later: each part of the keys by itself.
//
//   part s of a sequence: keys [s split_size, (s + 1) split_size)
//   S = scale Q K^T, m, l, O    as forward_sm80.cu, over the part's keys alone
//   partial_out = O / l         float32
//   partial_lse = log2(l) + m   combine.cu puts the parts together by it
//
//   grid    (part and row tile, key head, sequence). What a part's result is made of does not depend on the grid, the
//           batch or other lengths: with split_size fixed a sequence has the same bits in any batch
//   rows    the queries of all heads that share a key head: row r is query r / head_group of head r % head_group, so
//           that keys and values are read once for all of them
//   roles   every warp computes 16 rows, those that have none only copy.
//
//   shared  name   rows      row            bytes for d = 128, 16 bits
//           q      kBlockQ   kHeadDim       16 KB
//           k      kBlockK   kHeadDim       16 KB
//           v      kBlockK   kHeadDimV      16 KB
//
//   barrier, per key tile    what it separates
//   K landed                 every thread's copies of K (and Q) | the reads of S = Q K^T
//                            the reads of the previous V        | the copy of this V
//   V landed                 every thread's copies of V         | the reads of O += P V
//                            the reads of K                     | the copy of the next K
#include <base.cuh>
#include <hw/async_copy.cuh>
#include <hw/device.cuh>
#include <hw/math.cuh>
#include <params/decode.cuh>
#include <tile/fragment.cuh>
#include <tile/mask.cuh>
#include <tile/matmul.cuh>
#include <tile/paged.cuh>
#include <tile/score.cuh>
#include <tile/sequence.cuh>
#include <tile/shared_tile.cuh>
#include <tile/softmax.cuh>
#include <variant.cuh>

// The row tile that begins at row `first` against part `part` of the keys.
template <class V>
HW_DEVICE void decode_tile(const DecodeParams& p, i32 sequence, i32 part, i32 first) {
  using Element = typename V::Element;
  constexpr i32 kBytes = static_cast<i32>(sizeof(Element));
  using QTile = SharedTile<V::kHeadDim * kBytes>;
  using KTile = SharedTile<V::kHeadDim * kBytes>;
  using VTile = SharedTile<V::kHeadDimV * kBytes>;
  using S = Fragment<1, V::kBlockK / 8>;
  using O = Fragment<1, V::kHeadDimV / 8>;
  using QRows = RowLoader<QTile, V::kBlockQ, V::kThreads, V::kLoadBytes>;
  static_assert(V::kBlockQ == V::kThreads / 2, "every warp has 16 rows");

  // Roles
  const i32 lane = hw::lane_idx();
  const i32 warp_row = hw::warp_idx() * 16;

  // Shared memory
  const u32 q_smem = hw::smem_base();
  const u32 k_smem = q_smem + static_cast<u32>(V::kBlockQ * V::kHeadDim * kBytes);
  const u32 v_smem = k_smem + static_cast<u32>(V::kBlockK * V::kHeadDim * kBytes);

  // This tile
  const Sequence seq = read_sequence<true>(p, sequence);
  const i32 head_kv = hw::block_idx_y();
  const i32 rows = seq.q_len * p.head_group;
  const i32 last = min_of(first + V::kBlockQ, rows) - 1;
  const i32 row_bytes = p.head_dim * kBytes, row_bytes_v = p.head_dim_v * kBytes;
  // Rolled, for float32 of head dim 192 and 256 spills otherwise on compute capability 10.0.
  const auto k_loader = key_loader<V, KTile, KTile::kRowBytes >= 768>(
      p, seq, sequence, k_smem, p.k, p.k_stride_batch, p.k_stride_row, head_kv * p.k_stride_head);
  const auto v_loader = key_loader<V, VTile, VTile::kRowBytes >= 768>(
      p, seq, sequence, v_smem, p.v, p.v_stride_batch, p.v_stride_row, head_kv * p.v_stride_head);
  const TileInterval seen =
      interval_of_tile(seq.diagonal() + first / p.head_group, seq.diagonal() + last / p.head_group, p.window_left,
                       p.window_right, seq.k_len);
  const i32 keys_begin = max_of(seen.any.begin, part * p.split_size);
  const i32 keys_end = min_of(seen.any.end, (part + 1) * p.split_size);
  const bool sees_keys = keys_begin < keys_end;
  const i32 tiles_end = sees_keys ? ceil_div(keys_end, V::kBlockK) : 0;
  const bool has_rows = first + warp_row <= last;
  i32 n = sees_keys ? keys_begin / V::kBlockK : 0;

  // Of this thread's row i: the key its query stands on, and its head. NOTE: kept through the loop they cost registers.
  // A row behind the last counts as one more query: what is computed of it is never stored.
  const auto row_of = [&](i32 i) { return first + warp_row + S::row_of(i); };
  const auto center_of = [&](i32 i) { return seq.diagonal() + row_of(i) / p.head_group; };
  const auto head_of = [&](i32 i) { return head_kv * p.head_group + row_of(i) % p.head_group; };
  const LaneRows<QTile> q_rows(q_smem, warp_row + lane % 16, lane / 16);
  const LaneRows<KTile> k_rows(k_smem, lane % 8 + 8 * (lane / 16), lane / 8 % 2);
  OnlineSoftmax<S::kRows> softmax(p.softmax_scale);
  O o;
  o.fill(0.0f);

  // Q
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
    k_loader.load(n * V::kBlockK, seq.k_len, row_bytes, p.k_stride_row);
    hw::cp_async_commit();
  }

  // KV loop
  HW_NO_UNROLL
  while (n < tiles_end) {
    // wait   K landed <- own copies of K and, the first time, Q
    hw::cp_async_wait<0>();
    // sync   K landed <-> all warps: K is whole; nobody reads the previous V any more
    hw::sync_threads();
    const i32 k_first = n * V::kBlockK;
    v_loader.load(k_first, seq.k_len, row_bytes_v, p.v_stride_row);
    hw::cp_async_commit();

    S s;
    s.fill(0.0f);
    if (has_rows) {
      multiply_qk<Element, V::kHeadDim>(s, q_rows, k_rows);
      if (!p.raw_scores) {
        if (p.score_cap != 0.0f) {
          s.for_each([&](float& x, i32, i32) { x = cap_score<Element>(x * p.score_scale, p.score_cap); });
        } else {
          s.for_each([&](float& x, i32, i32) { x *= p.score_scale; });
        }
        if (p.alibi_slopes != nullptr) {
          float slope[S::kRows], from_first[S::kRows];
          HW_UNROLL
          for (i32 i = 0; i < S::kRows; ++i) {
            slope[i] = read_slope(p, sequence, head_of(i));
            from_first[i] = static_cast<float>(center_of(i) - k_first - S::first_col());
          }
          s.for_each([&](float& x, i32 row, i32 column) {
            x = hw::fma(-slope[row], hw::abs(from_first[row] - static_cast<float>(column)), x);
          });
        }
      }
      if (k_first < seen.all.begin || k_first + V::kBlockK > seen.all.end) {
        i32 begin[S::kRows], end[S::kRows];
        HW_UNROLL
        for (i32 i = 0; i < S::kRows; ++i) {
          const Interval own = interval_of_row(center_of(i), p.window_left, p.window_right, seq.k_len);
          begin[i] = own.begin - k_first - S::first_col();
          end[i] = own.end - k_first - S::first_col();
        }
        s.for_each([&](float& x, i32 row, i32 column) {
          const bool keep = (column >= begin[row]) & (column < end[row]);
          x = keep ? x : -kInfinity;
        });
      }
    }

    // wait   V landed <- own copies of V
    hw::cp_async_wait<0>();
    // sync   V landed <-> all warps: V is whole; nobody reads K any more
    hw::sync_threads();
    if (++n < tiles_end) {
      k_loader.load(n * V::kBlockK, seq.k_len, row_bytes, p.k_stride_row);
      hw::cp_async_commit();
    }
    if (has_rows) {
      softmax.update(s, o);
      multiply_pv<Element, O, S, VTile>(o, s, v_smem);
    }
  }

  // Store. What it needs is read anew: kept through the loop it would cost registers there.
  if (!has_rows) return;
  const Sequence owner = read_sequence<true>(p, sequence);
  HW_UNROLL
  for (i32 i = 0; i < S::kRows; ++i) {
    const typename OnlineSoftmax<S::kRows>::Row finished = softmax.finish(i, -kInfinity);
    const i32 row = row_of(i);
    if (row < owner.q_len * p.head_group) {
      const i64 line = (static_cast<i64>(part) * hw::grid_dim_y() * p.head_group + head_of(i)) * p.partial_rows +
                       owner.dense_idx * static_cast<i64>(p.q_len) + owner.q_begin + row / p.head_group;
      if (lane % 4 == 0) hw::store_global(p.partial_lse + line, finished.lse * kLog2e);
      float* out = p.partial_out + line * p.head_dim_v;
      HW_UNROLL
      for (i32 c = 0; c < O::kColTiles; ++c) {
        HW_UNROLL
        for (i32 j = 0; j < 2; ++j) {
          const i32 column = 8 * c + O::first_col() + j;
          if (column < p.head_dim_v && sees_keys) {
            hw::store_global(out + column, o.x[0][c][2 * i + j] * finished.out_scale);
          }
        }
      }
    }
  }
}

HW_KERNEL(Variant::kThreads) cuflash_decode_sm80(HW_GRID_CONSTANT DecodeParams p) {
  const i32 sequence = hw::block_idx_z();
  const i32 part = hw::block_idx_x() % p.splits;
  if (part * p.split_size >= read_sequence<true>(p, sequence).k_len) return;
  // NOTE: how many rows there are is asked again each time: kept, it would cost a register in the KV loop.
  const auto rows = [&] { return read_sequence<true>(p, sequence).q_len * p.head_group; };
  const i32 step = hw::grid_dim_x() / p.splits * Variant::kBlockQ;
  // Nobody reads Q or K any more where a tile's last V has landed, so the next tile's may come at once.
  for (i32 first = hw::block_idx_x() / p.splits * Variant::kBlockQ; first < rows(); first += step) {
    decode_tile<Variant>(p, sequence, part, first);
  }
}
