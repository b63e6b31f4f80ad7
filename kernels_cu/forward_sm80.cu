// Attention forward for compute capability 8.0 and later: out = softmax(score(q k^T)) v, by tiles, in one pass.
//
//   S = scale Q K^T    [kBlockQ, kBlockK]    never leaves registers; through the user's mods (tile/mods.cuh)
//   m, l, O            online softmax in base 2 (tile/softmax.cuh)
//   P = dropout(P)     after the sum, where V::kDropout (tile/dropout.cuh)
//   out = O / l        lse = ln(l) + m
//
//   grid    (query block, head, sequence) or (slot, head): tile/schedule.cuh. A block computes whole query tiles of one
//           sequence and head; its rows begin at cu_seqlens_q[sequence].
//   keys    rows of one array, or pages that a table names: V::kPaged, tile/paged.cuh
//   roles   every warp computes 16 kRowTiles query rows against all keys; all warps copy.
//
//   shared  name   rows      row            bytes for d = 128, 16 bits, 128 x 128
//           q      kBlockQ   kHeadDim       32 KB    out is gathered here at the end
//           k      kBlockK   kHeadDim       32 KB
//           v      kBlockK   kHeadDimV      32 KB
//           terms  kBlockK   M::kStagedK words      what mods need of each key, where it is dear (tile/mods.cuh)
//           bounds kBlockQ   2 words                the keys each query has to do with, where there is a mask_mod
//
//   barrier, per key tile    what it separates
//   K landed                 every thread's copies of K (and Q) | the reads of S = Q K^T; of the terms likewise
//                            the reads of the previous V        | the copy of this V
//   V landed                 every thread's copies of V         | the reads of O += P V
//                            the reads of K                     | the copy of the next K
//
// The copy of V runs under Q K^T, the copy of the next K under the softmax and P V. Two blocks on one multiprocessor
// fill each other's waits. Key tiles go from the last to the first, so that a causal tile masks early and then runs free.
#include <base.cuh>
#include <hw/async_copy.cuh>
#include <hw/device.cuh>
#include <hw/math.cuh>
#include <params/forward.cuh>
#include <tile/dropout.cuh>
#include <tile/finish.cuh>
#include <tile/fragment.cuh>
#include <tile/mask.cuh>
#include <tile/matmul.cuh>
#include <tile/mods.cuh>
#include <tile/paged.cuh>
#include <tile/schedule.cuh>
#include <tile/score.cuh>
#include <tile/sequence.cuh>
#include <tile/shared_tile.cuh>
#include <tile/softmax.cuh>
#include <variant.cuh>

template <class V>
struct ForwardPlan {
  using Element = typename V::Element;
  static constexpr i32 kBytes = static_cast<i32>(sizeof(Element));
  static constexpr i32 kThreads = V::kThreads;
  static constexpr i32 kWarps = kThreads / 32;
  static constexpr i32 kRowTiles = V::kBlockQ / (16 * kWarps);
  static_assert(kRowTiles * 16 * kWarps == V::kBlockQ, "every warp has whole row tiles");

  using QTile = SharedTile<V::kHeadDim * kBytes>;
  using KTile = SharedTile<V::kHeadDim * kBytes>;
  using VTile = SharedTile<V::kHeadDimV * kBytes>;
  using OutTile = SharedTile<V::kHeadDimV * kBytes>;

  static constexpr i32 kQBytes = V::kBlockQ * max_of(V::kHeadDim, V::kHeadDimV) * kBytes;
  static constexpr i32 kKBytes = V::kBlockK * V::kHeadDim * kBytes;
  static constexpr i32 kVBytes = V::kBlockK * V::kHeadDimV * kBytes;
  static constexpr i32 kTermsBytes = staged_bytes<Mods, true, V::kBlockK>();
  static constexpr i32 kBoundsBytes = bounds_bytes<Mods, V::kBlockQ>();
  static_assert(kQBytes + kKBytes + kVBytes + kTermsBytes + kBoundsBytes <= V::kSharedBytes,
                "the host asks for as much shared memory as is used");
};

// Where registers are all in use, the host gives no order: finding a block's place in it would spill.
constexpr bool kOrdered = sizeof(Variant::Element) == 2 || Variant::kHeadDim < 256;

// The sequence's query tile number `from_end`, counted from its end.
template <class V, class M>
HW_DEVICE void forward_tile(const ForwardParams& p, i32 sequence, i32 from_end) {
  using Plan = ForwardPlan<V>;
  using Element = typename V::Element;
  using S = Fragment<Plan::kRowTiles, V::kBlockK / 8>;
  using O = Fragment<Plan::kRowTiles, V::kHeadDimV / 8>;

  // Roles
  const i32 lane = hw::lane_idx();
  const i32 warp_row = hw::warp_idx() * 16 * Plan::kRowTiles;

  // Shared memory
  const u32 q_smem = hw::smem_base();
  const u32 k_smem = q_smem + Plan::kQBytes;
  const u32 v_smem = k_smem + Plan::kKBytes;
  const u32 terms_smem = v_smem + Plan::kVBytes;
  const u32 bounds_smem = terms_smem + Plan::kTermsBytes;

  // This tile
  const Sequence seq = read_sequence<V::kPaged>(p, sequence);
  const i32 head = head_of_block<kOrdered>(p);
  const i32 head_kv = head / p.head_group;
  const i32 q_first = (ceil_div(seq.q_rows, V::kBlockQ) - 1 - from_end) * V::kBlockQ;
  const u8* q = at_row(p.q, seq, p.q_stride_batch, seq.q_begin, p.q_stride_row) + head * p.q_stride_head;
  const i32 row_bytes = p.head_dim * Plan::kBytes;
  const i32 row_bytes_v = p.head_dim_v * Plan::kBytes;
  const auto k_loader = key_loader<V, typename Plan::KTile>(p, seq, sequence, k_smem, p.k, p.k_stride_batch,
                                                            p.k_stride_row, head_kv * p.k_stride_head);
  const auto v_loader = key_loader<V, typename Plan::VTile>(p, seq, sequence, v_smem, p.v, p.v_stride_batch,
                                                            p.v_stride_row, head_kv * p.v_stride_head);

  const i32 diagonal = seq.diagonal() + q_first;  // the key that this tile's row 0 stands on
  const i32 last_row = min_of(V::kBlockQ, seq.q_len - q_first) - 1;
  TileInterval keys = interval_of_tile(diagonal, diagonal + last_row, p.window_left, p.window_right, seq.k_len);
  if constexpr (M::kMask) {
    if (last_row >= 0) {
      keys = stage_bounds<M, V::kBlockQ, Plan::kThreads>(p, M::tile(p, sequence, head, seq.q_len, seq.k_len),
                                                         bounds_smem, q_first, diagonal, p.window_left, p.window_right);
    }
  }
  const i32 first_k_tile = keys.any.begin / V::kBlockK;
  const bool sees_keys = last_row >= 0 && keys.any.begin < keys.any.end;
  const i32 k_tiles_end = sees_keys ? ceil_div(keys.any.end, V::kBlockK) : first_k_tile;
  // From the last to the first; of these, those that mask_mod leaves something of. Bounds have said all there is to say
  // of a mask that has nothing else.
  constexpr bool kWalk = M::kMask && M::kKeepQ;
  TileWalk<-1> walk(k_tiles_end - 1);
  const auto find_tile = [&](i32 n) {
    if constexpr (kWalk) {
      return walk.find(n, first_k_tile - 1, [&](i32 tile) {
        const i32 first = tile * V::kBlockK, end = first + V::kBlockK;
        const Interval all = interval_of_tile(diagonal, diagonal + last_row, p.window_left, p.window_right, seq.k_len).all;
        const i32 kind = M::classify(p, M::tile(p, sequence, head, seq.q_len, seq.k_len), q_first, q_first + last_row,
                                     first, min_of(end, seq.k_len) - 1);
        return first < all.begin || end > all.end ? min_of(kind, kTileMixed) : kind;
      });
    }
    return n;
  };
  i32 n = find_tile(k_tiles_end - 1);
  const auto stage = [&](i32 tile) {
    if constexpr (M::kStagedK > 0) {
      stage_terms<M, true, V::kBlockK, Plan::kThreads>(p, M::tile(p, sequence, head, seq.q_len, seq.k_len), terms_smem,
                                                       tile * V::kBlockK);
    }
  };
  const LaneRows<typename Plan::QTile> q_rows(q_smem, warp_row + lane % 16, lane / 16);
  const LaneRows<typename Plan::KTile> k_rows(k_smem, lane % 8 + 8 * (lane / 16), lane / 8 % 2);

  OnlineSoftmax<S::kRows> softmax(p.softmax_scale);
  O o;
  o.fill(0.0f);

  // Q
  if (n >= first_k_tile) {
    const RowLoader<typename Plan::QTile, V::kBlockQ, Plan::kThreads, V::kLoadBytes> q_loader(q_smem, q, p.q_stride_row);
    q_loader.load(q_first, seq.q_len, row_bytes, p.q_stride_row);
    k_loader.load(n * V::kBlockK, seq.k_len, row_bytes, p.k_stride_row);
    hw::cp_async_commit();
    stage(n);
  }

  // KV loop
  HW_NO_UNROLL
  while (n >= first_k_tile) {
    // wait   K landed <- own copies of K and, the first time, Q
    hw::cp_async_wait<0>();
    // sync   K landed <-> all warps: K is whole; nobody reads the previous V any more
    hw::sync_threads();
    v_loader.load(n * V::kBlockK, seq.k_len, row_bytes_v, p.v_stride_row);
    hw::cp_async_commit();

    // S = Q K^T
    S s;
    s.fill(0.0f);
    multiply_qk<Element, V::kHeadDim>(s, q_rows, k_rows);

    const i32 k_first = n * V::kBlockK;
    const i32 center = diagonal + warp_row - k_first;
    bool mixed = k_first < keys.all.begin || k_first + V::kBlockK > keys.all.end;
    if constexpr (M::kScore) {
      s.for_each([&](float& x, i32, i32) { x *= p.score_scale; });
      score_by_mod<M, true>(p, M::tile(p, sequence, head, seq.q_len, seq.k_len), s, q_first + warp_row, k_first,
                            terms_smem);
    } else {
      score(p, sequence, head, s, center);
    }
    if constexpr (kWalk) mixed = !walk.is_full(n);
    if (mixed) {
      if constexpr (M::kMask) {
        const u32 bounds = bounds_smem + static_cast<u32>(4 * warp_row);
        mask_by_mod<M, true>(p, M::tile(p, sequence, head, seq.q_len, seq.k_len), s, q_first + warp_row, k_first,
                             terms_smem, [&](i32 i) { return staged_bounds<V::kBlockQ>(bounds, S::row_of(i)); });
      } else {
        mask_scores(s, center, p.window_left, p.window_right, seq.k_len - k_first);
      }
    }

    // wait   V landed <- own copies of V
    hw::cp_async_wait<0>();
    // sync   V landed <-> all warps: V is whole; nobody reads K any more
    hw::sync_threads();
    n = find_tile(n - 1);
    if (n >= first_k_tile) {
      k_loader.load(n * V::kBlockK, seq.k_len, row_bytes, p.k_stride_row);
      hw::cp_async_commit();
      stage(n);
    }

    // P = exp(S - m); O += P V
    softmax.update(s, o);
    if constexpr (V::kDropout) {
      // After the sum, so that lse is of all weights. NOTE: read anew each time: kept, seed and offset cost registers here.
      visit_dropout(read_dropout(p, sequence, head, heads_of_grid()), s, q_first + warp_row, k_first,
                    [](float& x, bool kept) { x = kept ? x : 0.0f; });
    }
    multiply_pv<Element, O, S, typename Plan::VTile>(o, s, v_smem);
  }

  // Finish and store
  finish_rows<V, typename Plan::OutTile, V::kPaged>(p, sequence, head, q_first, warp_row, softmax, o,
                                                    q_smem + static_cast<u32>(warp_row * Plan::OutTile::kRowBytes));
}

HW_KERNEL(Variant::kThreads) cuflash_forward_sm80(HW_GRID_CONSTANT ForwardParams p) {
  constexpr i32 kBlockQ = Variant::kBlockQ;
  const TileRange range = tiles_of_block<kOrdered>(p, p.cu_seqlens_q, p.q_len, kBlockQ);
  for_each_tile_of<kOrdered>(
      p, range.first, [&] { return ceil_div(read_sequence<Variant::kPaged>(p, range.sequence).q_rows, kBlockQ); },
      // sync   shared memory <-> all warps: the next tile's Q may replace this one
      [] { hw::sync_threads(); }, [&](i32 from_end) { forward_tile<Variant, Mods>(p, range.sequence, from_end); });
}
