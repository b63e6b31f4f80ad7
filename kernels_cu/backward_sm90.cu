// Attention backward for compute capability 9.0a: backward_sm80.cu's with dq accumulated, by wgmma and tensor copies, in
// three roles. backward_sm90.md follows one tile through it.
//
//   S^T  = K Q^T                   dP^T = V dO^T               rows are keys, 64 a warpgroup; columns are queries
//   P^T  = 2^(score(S^T) - lse)    dS^T = P^T (dP^T - delta)   in registers
//   dv  += P^T dO                  dk  += dS^T Q               their left operand comes from registers
//   dq   = dS K                    over all of the block's keys: dS^T passes through shared memory. A warpgroup has a part
//                                  of it: half of its columns or, where a tile has 128 queries, half of its rows; of 80
//                                  queries, which are no rows of a product, it has half of the columns as rows, dq^T. It
//                                  is added to dq_accum, in no order, 16 bytes a thread; backward_cast.cu makes dq of that
//
// A tile's queries are plain, or rich: their scores are capped, have ALiBi, go through mods, or are dropped (V::kRich).
//
//   grid    (key tile, key head, sequence) or (slot, key head): tile/schedule.cuh; a block has one key tile. The query heads
//           of its key head follow each other in the loop
//   roles   warpgroup 0, warp 0   copies K and V once, then Q and dO of every tile of queries
//                        warp 1   brings the rest of what is known of these: lse, delta, terms of mods, and which it is
//           warpgroups 1 and 2    consumers: 64 keys each against all queries
//
//   shared  name      rows      row          bytes for d = 128, 64 x 128
//           k         kBlockK   kHeadDim     32 KB    dk is gathered here at the end
//           v         kBlockK   kHeadDimV    32 KB    dv likewise
//           q[2]      kBlockQ   kHeadDim     16 KB each
//           dout[2]   kBlockQ   kHeadDimV    16 KB each
//           ds[2]     kBlockK   kBlockQ      16 KB each    dS^T
//           rows[2]   kBlockQ   3 floats     lse_base2, delta, lse; of rows that keep nothing or are none, lse is +inf
//           terms[2]  kBlockQ   words        what mods need of each query, where it is dear (tile/mods.cuh)
//           words[2]            2 words      of the tile in q: its number with flags, and which head of the group it is of
//           pins                a word a thread
//           barriers
//   All but rows, terms and words lie in chunks as tensor copies write and wgmma reads them (tile/descriptor.cuh).
//
//   mbarrier      arrivals                                  who waits
//   k_full        warp 0, the bytes of K and V              consumers, once
//   q_full[s]     warp 0 and Q's bytes; warp 1              consumers: S, and all that warp 1 brings
//   do_full[s]    warp 0, dO's bytes                        consumers: dP
//   empty[s]      every consumer warp, dv and dk are there  warps 0 and 1: the next of this stage
//   ds_full[s]    every consumer warp, its rows written     consumers: dq
//   Nobody waits to write ds: who writes it for the tile after the next has waited for ds_full of the next, whose warps
//   all have their dq of this one.
//
//   named barrier 1   all consumers: rows cleared, or to be cleared and read by nobody; k and v free for dk and dv
//
// Order of a tile, a warpgroup: S, dP issued | S there: P | dP there: dS, written | dv, dk issued | ds_full: dq issued |
// dv, dk there: stage given back | dq there: added. dv and dk need nothing of the other warpgroup, and run while its
// dS is awaited.
#include <base.cuh>
#include <hw/barrier.cuh>
#include <hw/device.cuh>
#include <hw/math.cuh>
#include <hw/matrix.cuh>
#include <hw/tma.cuh>
#include <hw/warp.cuh>
#include <hw/wgmma.cuh>
#include <params/backward_sm90.cuh>
#include <tile/descriptor.cuh>
#include <tile/dropout.cuh>
#include <tile/fragment.cuh>
#include <tile/mask.cuh>
#include <tile/matmul_sm90.cuh>
#include <tile/mods.cuh>
#include <tile/schedule.cuh>
#include <tile/score.cuh>
#include <tile/sequence.cuh>
#include <tile/shared_tile.cuh>
#include <tile/store.cuh>
#include <tile/tensor_rows.cuh>
#include <tile/weight.cuh>
#include <variant.cuh>

template <class V>
struct BackwardPlan {
  using Element = typename V::Element;
  static constexpr i32 kBytes = 2;
  static constexpr i32 kConsumers = 2;
  static constexpr i32 kConsumerWarps = 4 * kConsumers;
  static constexpr i32 kConsumerThreads = 32 * kConsumerWarps;
  static constexpr u32 kStages = 2;
  static_assert(V::kBlockK == 64 * kConsumers && V::kThreads == 128 * (kConsumers + 1) && sizeof(Element) == kBytes,
                "a warpgroup has 64 keys of 16-bit elements, and one more copies");

  // A warpgroup's part of dq: 64 rows, and so many columns; or 64 columns, and all rows.
  static constexpr bool kSplitsRows = V::kBlockQ == 64 * kConsumers;
  static constexpr bool kTransposesDq = V::kBlockQ % 64 != 0;
  static constexpr i32 kDqColumns = kSplitsRows ? V::kHeadDim : V::kHeadDim / kConsumers;
  static_assert(kSplitsRows || V::kBlockQ == 64 || (kTransposesDq && kDqColumns == 64 && V::kBlockQ % 16 == 0),
                "dq has 64 rows for each warpgroup, or the same 64 for both; or 64 columns for each");

  // The columns of a part begin where a chunk does.
  using QkChunk = Chunk<kDqColumns % 64 == 0 ? 128 : kDqColumns % 32 == 0 ? 64 : 32>;
  using VChunk = Chunk<V::kHeadDimV % 64 == 0 ? 128 : 64>;
  using DsChunk = Chunk<kTransposesDq ? 32 : 128>;  // of queries: a row is a key
  using DkTile = SharedTile<V::kHeadDim * kBytes>;
  using DvTile = SharedTile<V::kHeadDimV * kBytes>;

  // Of shared memory, from its beginning.
  static constexpr i32 kKBytes = V::kBlockK * V::kHeadDim * kBytes;
  static constexpr i32 kVBytes = V::kBlockK * V::kHeadDimV * kBytes;
  static constexpr i32 kQBytes = V::kBlockQ * V::kHeadDim * kBytes;
  static constexpr i32 kDoutBytes = V::kBlockQ * V::kHeadDimV * kBytes;
  static constexpr i32 kDsBytes = V::kBlockK * V::kBlockQ * kBytes;
  static constexpr i32 kRowsBytes = 12 * V::kBlockQ;
  static constexpr i32 kTermsBytes = staged_bytes<Mods, false, V::kBlockQ>();
  static constexpr i32 kV = kKBytes;
  static constexpr i32 kQ = kV + kVBytes;
  static constexpr i32 kDout = kQ + i32{kStages} * kQBytes;
  static constexpr i32 kDs = kDout + i32{kStages} * kDoutBytes;
  static constexpr i32 kRows = kDs + i32{kStages} * kDsBytes;
  static constexpr i32 kTerms = kRows + i32{kStages} * kRowsBytes;
  static constexpr i32 kWords = kTerms + i32{kStages} * kTermsBytes;
  static constexpr i32 kPins = kWords + 8 * i32{kStages};
  static constexpr i32 kBarriers = kPins + 4 * V::kThreads;
  static constexpr i32 kEnd = kBarriers + 8 * (4 * i32{kStages} + 1);
  static_assert(kEnd <= V::kSharedBytes, "the host asks for as much shared memory as is used");
  static_assert(kQBytes % 1024 == 0 && kDoutBytes % 1024 == 0 && kDsBytes % 1024 == 0, "swizzles count from a multiple of 1024");
  static_assert(kBarriers % 8 == 0, "aligned");
};

// What warp 1 says of the tile in a stage, beside its number.
constexpr u32 kMasked = 1u << 31;
constexpr u32 kLast = 1u << 30;
constexpr u32 kSpecial = 1u << 29;  // it has rows that keep nothing, or whose weights need more than 2^(c s - lse_base2)
constexpr u32 kTailNext = 1u << 28;  // the tile after it has rows behind the last query
constexpr u32 kNumber = kTailNext - 1;

template <class V>
struct Barriers {
  using Plan = BackwardPlan<V>;
  u32 base;

  HW_DEVICE explicit Barriers(u32 smem) : base(smem + Plan::kBarriers) {}
  HW_DEVICE u32 q_full(u32 stage) const { return base + 8 * stage; }
  HW_DEVICE u32 do_full(u32 stage) const { return q_full(stage) + 8 * Plan::kStages; }
  HW_DEVICE u32 ds_full(u32 stage) const { return q_full(stage) + 16 * Plan::kStages; }
  HW_DEVICE u32 empty(u32 stage) const { return q_full(stage) + 24 * Plan::kStages; }
  HW_DEVICE u32 k_full() const { return base + 32 * Plan::kStages; }

  // The n-th tile of queries is in stage n % kStages, and completes the phase n / kStages of its barriers.
  static HW_DEVICE u32 stage(u32 tile) { return tile % Plan::kStages; }
  static HW_DEVICE u32 parity(u32 tile) { return tile / Plan::kStages % 2; }

  // By one thread, before anyone uses them.
  HW_DEVICE void init() const {
    for (u32 i = 0; i < Plan::kStages; ++i) {
      hw::mbarrier_init(q_full(i), 2);
      hw::mbarrier_init(do_full(i), 1);
      hw::mbarrier_init(ds_full(i), Plan::kConsumerWarps);
      hw::mbarrier_init(empty(i), Plan::kConsumerWarps);
    }
    hw::mbarrier_init(k_full(), 1);
    hw::fence_mbarrier_init();
  }
};

// Which key tile a block has, and of which sequence and key head.
template <class V>
HW_DEVICE TileRange key_tile_of_block(const BackwardParams& p) {
  return tiles_of_block<false>(p, p.cu_seqlens_k, p.k_len, V::kBlockK);  // the host gives this kernel no order
}
HW_DEVICE i32 key_head_of_block(const BackwardParams& p) { return head_of_block<false>(p); }

// The key tile of a block, as every role works it out.
template <class V>
struct KeyTile {
  i32 sequence, head_kv;
  Sequence seq;
  i32 first;       // its first key
  i32 last_row;    // how many follow it that are in use; -1: it is not either
  i32 diagonal;    // the query that the first one stands on
  TileInterval queries;
  i32 first_tile, tiles;  // of queries, of one head

  HW_DEVICE explicit KeyTile(const BackwardParams& p)
      : KeyTile(p, key_tile_of_block<V>(p), key_head_of_block(p)) {}
  HW_DEVICE KeyTile(const BackwardParams& p, const TileRange& range, i32 head)
      : sequence(range.sequence), head_kv(head), seq(read_sequence(p, sequence)),
        first((ceil_div(seq.k_rows, V::kBlockK) - 1 - range.first) * V::kBlockK),
        last_row(min_of(V::kBlockK, seq.k_len - first) - 1), diagonal(first - seq.diagonal()),
        // tile/mask.cuh has why the sides of the window are exchanged.
        queries(interval_of_tile(diagonal, diagonal + last_row, p.window_right, p.window_left, seq.q_len)),
        first_tile(queries.any.begin / V::kBlockQ),
        tiles(last_row >= 0 && queries.any.begin < queries.any.end
                  ? ceil_div(queries.any.end, V::kBlockQ) - first_tile
                  : 0) {}

  // A sequence has slots that none of its tiles is in.
  HW_DEVICE bool exists() const { return 0 <= first && first < seq.k_rows; }

  // Whether the tile `n` of queries has rows behind the last one.
  HW_DEVICE bool is_tail(i32 n) const { return (n + 1) * V::kBlockQ > seq.q_len; }

  // Whether causal, window or lengths mask anything of it.
  HW_DEVICE bool is_mixed(i32 n) const {
    return n * V::kBlockQ < queries.all.begin || (n + 1) * V::kBlockQ > queries.all.end || last_row + 1 < V::kBlockK;
  }
};

// Goes over the tiles of queries that the keys have to do with, of one head of the group after the other.
template <class V, class M>
struct QueryTiles {
  i32 n, group;  // the tile, and whose it is
  bool found;    // there is one
  TileWalk<1> walk;

  HW_DEVICE QueryTiles(const BackwardParams& p, const KeyTile<V>& t)
      : n(t.first_tile), group(0), found(t.tiles > 0), walk(t.first_tile) {
    if constexpr (M::kMask) {
      if (found) find(p, t);
    }
  }

  HW_DEVICE void advance(const BackwardParams& p, const KeyTile<V>& t) {
    ++n;
    if constexpr (M::kMask) {
      find(p, t);
    } else if (n == t.first_tile + t.tiles) {
      n = t.first_tile;
      found = ++group < p.head_group;
    }
  }

  HW_DEVICE bool is_masked(const KeyTile<V>& t) const {
    if constexpr (M::kMask) {
      if (!walk.is_full(n)) return true;
    }
    return t.is_mixed(n);
  }

 private:
  // The first tile from n on that mask_mod leaves something of.
  HW_DEVICE void find(const BackwardParams& p, const KeyTile<V>& t) {
    const i32 end = t.first_tile + t.tiles;
    HW_NO_UNROLL
    while (true) {
      const typename M::Tile mods = M::tile(p, t.sequence, t.head_kv * p.head_group + group, t.seq.q_len, t.seq.k_len);
      n = walk.find(n, end, [&](i32 tile) {
        const i32 first = tile * V::kBlockQ;
        return M::classify(p, mods, first, min_of(first + V::kBlockQ, t.seq.q_len) - 1, t.first, t.first + t.last_row);
      });
      found = n < end;
      if (found || group + 1 == p.head_group) return;
      ++group;
      n = t.first_tile;
      walk = TileWalk<1>(n);
    }
  }
};

// Warp 0: all copies. It has few registers.
template <class V, class M>
HW_DEVICE void copy_tiles(const BackwardSm90Params& p, u32 smem, const KeyTile<V>& t) {
  using Plan = BackwardPlan<V>;
  using QkChunk = typename Plan::QkChunk;
  using VChunk = typename Plan::VChunk;
  const Barriers<V> barriers(smem);
  QueryTiles<V, M> tiles(p, t);
  if (!tiles.found) return;
  const bool leader = hw::elect_one();
  if (leader) {
    const i32 row = static_cast<i32>(t.seq.k_begin) + t.first;
    hw::mbarrier_arrive_expect_tx(barriers.k_full(), Plan::kKBytes + Plan::kVBytes);
    load_rows<QkChunk, V::kHeadDim, V::kBlockK>(smem, p.k_map, barriers.k_full(), hw::CachePolicy::kEvictFirst,
                                                t.head_kv, row, t.seq.dense_idx);
    load_rows<VChunk, V::kHeadDimV, V::kBlockK>(smem + Plan::kV, p.v_map, barriers.k_full(),
                                                hw::CachePolicy::kEvictFirst, t.head_kv, row, t.seq.dense_idx);
  }
  HW_NO_UNROLL
  for (u32 tile = 0; tiles.found; ++tile) {
    const u32 stage = barriers.stage(tile);
    const i32 row = static_cast<i32>(t.seq.q_begin) + tiles.n * V::kBlockQ;
    const i32 head = t.head_kv * p.head_group + tiles.group;
    // wait   empty <- every consumer warp: dv and dk of the tile that was here are there
    hw::mbarrier_wait(barriers.empty(stage), barriers.parity(tile) ^ 1);
    if (leader) {
      hw::mbarrier_arrive_expect_tx(barriers.q_full(stage), Plan::kQBytes);
      load_rows<QkChunk, V::kHeadDim, V::kBlockQ>(smem + Plan::kQ + stage * Plan::kQBytes, p.q_map,
                                                  barriers.q_full(stage), hw::CachePolicy::kEvictLast, head, row,
                                                  t.seq.dense_idx);
      hw::mbarrier_arrive_expect_tx(barriers.do_full(stage), Plan::kDoutBytes);
      load_rows<VChunk, V::kHeadDimV, V::kBlockQ>(smem + Plan::kDout + stage * Plan::kDoutBytes, p.dout_map,
                                                  barriers.do_full(stage), hw::CachePolicy::kEvictLast, head, row,
                                                  t.seq.dense_idx);
    }
    tiles.advance(p, t);
  }
}

// Warp 1: rows, terms and words of every tile.
template <class V, class M>
HW_DEVICE void describe_tiles(const BackwardSm90Params& p, u32 smem, const KeyTile<V>& t) {
  using Plan = BackwardPlan<V>;
  const Barriers<V> barriers(smem);
  const i64 line = row_offset(t.seq, p.lse_stride_batch, t.seq.q_begin, 1) + t.head_kv * p.head_group * p.lse_stride_head;
  QueryTiles<V, M> tiles(p, t);
  HW_NO_UNROLL
  for (u32 tile = 0; tiles.found; ++tile) {
    const u32 stage = barriers.stage(tile);
    const i32 n = tiles.n, group = tiles.group;
    const bool masked = tiles.is_masked(t);
    tiles.advance(p, t);
    // wait   empty <- every consumer warp: it reads nothing any more of the tile that was here
    hw::mbarrier_wait(barriers.empty(stage), barriers.parity(tile) ^ 1);
    const u32 rows = smem + Plan::kRows + stage * Plan::kRowsBytes;
    bool special = false;
    HW_NO_UNROLL
    for (i32 begin = 0; begin < V::kBlockQ; begin += 32) {
      const i32 i = begin + hw::lane_idx(), query = n * V::kBlockQ + i;
      const bool exists = i < V::kBlockQ && query < t.seq.q_len;
      float lse_base2 = kInfinity, delta = 0.0f, lse = kInfinity;
      if (exists) {
        const i64 at = line + group * p.lse_stride_head + query;
        lse_base2 = hw::load_global(p.lse_base2 + at);
        delta = hw::load_global(p.delta + at);
        lse = hw::load_global(p.lse + at);
      }
      special |= hw::any(exists && is_special(lse_base2));
      if (i < V::kBlockQ) {
        const u32 to = rows + static_cast<u32>(4 * i);
        hw::store_shared(to, lse_base2);
        hw::store_shared(to + 4 * V::kBlockQ, delta);
        hw::store_shared(to + 8 * V::kBlockQ, lse_base2 == kInfinity ? kInfinity : lse);
      }
    }
    if constexpr (Plan::kTermsBytes > 0) {
      stage_terms<M, false, V::kBlockQ, 32>(
          p, M::tile(p, t.sequence, t.head_kv * p.head_group + group, t.seq.q_len, t.seq.k_len),
          smem + Plan::kTerms + stage * Plan::kTermsBytes, n * V::kBlockQ);
    }
    if (hw::lane_idx() == 0) {
      const u32 to = smem + Plan::kWords + 8 * stage;
      hw::store_shared(to, static_cast<u32>(n) | (masked ? kMasked : 0u) | (special ? kSpecial : 0u) |
                               (tiles.found ? 0u : kLast) | (t.is_tail(tiles.n) ? kTailNext : 0u));
      hw::store_shared(to + 4, static_cast<u32>(group));
    }
    hw::sync_warp();
    // arrive   q full -> consumers
    if (hw::lane_idx() == 0) hw::mbarrier_arrive(barriers.q_full(stage));
  }
}

// A warpgroup's part of dq = dS K, or of its transpose. ds: a row a key, so that both operands are MN-major.
template <class V, class Dq>
HW_DEVICE void issue_dq(Dq& dq, u32 ds, u32 k, i32 consumer) {
  using Plan = BackwardPlan<V>;
  using KChunk = typename Plan::QkChunk;
  using DsChunk = typename Plan::DsChunk;
  const i32 part = Plan::kSplitsRows ? consumer * V::kBlockK * DsChunk::kBytes : 0;
  const i32 column = Plan::kSplitsRows ? 0 : consumer * Plan::kDqColumns;
  const u32 low_ds = DsChunk::mn_major(ds + static_cast<u32>(part), V::kBlockK);
  const u32 low_k = KChunk::mn_major(k + static_cast<u32>(column * V::kBlockK * Plan::kBytes), V::kBlockK);
  HW_UNROLL
  for (i32 i = 0; i < V::kBlockK; i += 16) {
    const u64 of_ds = DsChunk::descriptor(low_ds + DsChunk::mn_step(i)), of_k = KChunk::descriptor(low_k + KChunk::mn_step(i));
    hw::wgmma_ss<typename V::Element, hw::Major::kMn, hw::Major::kMn>(
        accumulators(dq), Plan::kTransposesDq ? of_k : of_ds, Plan::kTransposesDq ? of_ds : of_k, i > 0);
  }
}

// Adds it to dq_accum. tile: its 16 rows that hold the sequence's query `first`, of its head; used: so many queries are left.
template <class V, class Dq>
HW_DEVICE void add_dq(const Dq& dq, float* tile, i32 consumer, i32 used) {
  using Plan = BackwardPlan<V>;
  constexpr i32 kRowsOf16 = 16 * V::kHeadDim;
  const i32 warp = hw::warp_idx() % 4, lane = 4 * hw::lane_idx();
  if constexpr (Plan::kTransposesDq) {
    // 16 queries and 16 columns: those of 8 queries, then those of the other 8.
    float* to = tile + (4 * consumer + warp) * 256 + lane;
    HW_UNROLL
    for (i32 c = 0; c < Dq::kColTiles; ++c) {
      if (8 * c < used) hw::atomic_add4(to + c / 2 * kRowsOf16 + c % 2 * 128, dq.x[0][c]);
    }
  } else {
    const i32 row = 16 * warp + (Plan::kSplitsRows ? 64 * consumer : 0);
    const i32 column = Plan::kSplitsRows ? 0 : consumer * Plan::kDqColumns;
    if (row >= used) return;
    float* to = tile + row / 16 * kRowsOf16 + column / 8 * 128 + lane;
    HW_UNROLL
    for (i32 c = 0; c < Dq::kColTiles; ++c) hw::atomic_add4(to + 128 * c, dq.x[0][c]);
  }
}

// Consumer: 64 of the block's keys against all queries.
template <class V, class M>
HW_DEVICE void consume_tiles(const BackwardSm90Params& p, u32 smem, i32 consumer, const KeyTile<V>& t) {
  using Plan = BackwardPlan<V>;
  using Element = typename V::Element;
  using QkChunk = typename Plan::QkChunk;
  using VChunk = typename Plan::VChunk;
  using DsChunk = typename Plan::DsChunk;
  using S = Fragment<1, V::kBlockQ / 8>;
  using Dk = Fragment<1, V::kHeadDim / 8>;
  using Dv = Fragment<1, V::kHeadDimV / 8>;
  using Dq = Fragment<1, Plan::kTransposesDq ? V::kBlockQ / 8 : Plan::kDqColumns / 8>;
  using Operand = Weights<Element, S>;
  // P once more from what was rounded, where registers do not hold both.
  constexpr bool kUnpacks = !V::kRich && V::kBlockQ > 64;
  const Barriers<V> barriers(smem);
  const i32 lane = hw::lane_idx();
  const i32 warp_row = 64 * consumer + 16 * (hw::warp_idx() % 4);
  const u32 own_k = smem + static_cast<u32>(64 * consumer * QkChunk::kBytes);
  const u32 own_v = smem + Plan::kV + static_cast<u32>(64 * consumer * VChunk::kBytes);
  // What this lane gives to stmatrix: a row, and one of the two units of 16 x 16 elements.
  const u32 ds_lane = DsChunk::unit_at(warp_row + lane % 16, lane / 16);
  const u32 rows_lane = smem + Plan::kRows + 4 * static_cast<u32>(S::first_col());
  const QueryTiles<V, M> tiles(p, t);

  Dk dk;
  Dv dv;
  dk.fill(0.0f);
  dv.fill(0.0f);
  const auto arrive = [&](u32 mbarrier) {
    if (lane == 0) hw::mbarrier_arrive(mbarrier);
  };
  const auto meet = [] { hw::named_sync(1, Plan::kConsumerThreads); };
  const auto read_word = [&](u32 stage, u32 i) {
    return hw::shfl(hw::load_shared<u32>(smem + Plan::kWords + 8 * stage + 4 * i), 0);
  };
  const i32 thread = hw::thread_idx() - 128;
  // The line of dq_accum at the sequence's first query, for head 0.
  const i32 dq_begin = slot_begin(p.cu_seqlens_q, p.q_len, t.sequence, 16);

  if (tiles.found) {
    // wait   k full <- warp 0
    hw::mbarrier_wait(barriers.k_full(), 0);
    if (t.last_row + 1 < V::kBlockK) {
      // Keys behind the last one belong to no one: their dS is 0, and times what lies there may be NaN.
      clear_rows<QkChunk, V::kHeadDim, V::kBlockK, Plan::kConsumerThreads>(smem, t.last_row + 1, thread);
      clear_rows<VChunk, V::kHeadDimV, V::kBlockK, Plan::kConsumerThreads>(smem + Plan::kV, t.last_row + 1, thread);
      hw::fence_proxy_async();
      // sync   k and v cleared <-> all consumers
      meet();
    }
    // NOTE: whether a tile has a tail the word before says. A tile's own would keep S waiting, and to count tiles takes
    // registers.
    u32 word = t.is_tail(tiles.n) ? kTailNext : 0;
    u32 tile = 0;
    HW_NO_UNROLL
    do {
      const u32 stage = barriers.stage(tile), parity = barriers.parity(tile);
      const u32 q = smem + Plan::kQ + stage * Plan::kQBytes, dout = smem + Plan::kDout + stage * Plan::kDoutBytes;
      const u32 ds_tile = smem + Plan::kDs + stage * Plan::kDsBytes;
      const u32 rows = rows_lane + stage * Plan::kRowsBytes;
      const u32 terms = smem + Plan::kTerms + stage * Plan::kTermsBytes;
      // wait   q full <- warps 0 and 1
      hw::mbarrier_wait(barriers.q_full(stage), parity);
      if (word & kTailNext) {
        const i32 used = t.seq.q_len - static_cast<i32>(read_word(stage, 0) & kNumber) * V::kBlockQ;
        // wait   do full <- warp 0
        hw::mbarrier_wait(barriers.do_full(stage), parity);
        // Queries behind the last one, likewise.
        clear_rows<QkChunk, V::kHeadDim, V::kBlockQ, Plan::kConsumerThreads>(q, used, thread);
        clear_rows<VChunk, V::kHeadDimV, V::kBlockQ, Plan::kConsumerThreads>(dout, used, thread);
        hw::fence_proxy_async();
        // sync   q and dout cleared <-> all consumers
        meet();
      }

      // S, dP
      S s, ds;
      hw::wgmma_fence();
      issue_qk<Element, QkChunk, V::kHeadDim, V::kBlockK, V::kBlockQ>(s, own_k, q);
      hw::wgmma_commit();
      word = read_word(stage, 0);
      i32 head = 0;
      if constexpr (V::kRich) head = t.head_kv * p.head_group + static_cast<i32>(read_word(stage, 1));
      // wait   do full <- warp 0
      hw::mbarrier_wait(barriers.do_full(stage), parity);
      hw::wgmma_fence();
      issue_qk<Element, VChunk, V::kHeadDimV, V::kBlockK, V::kBlockQ>(ds, own_v, dout);
      hw::wgmma_commit();
      hw::wgmma_wait<1>();
      hw::wgmma_pin(accumulators(s));

      // P
      const i32 first = static_cast<i32>(word & kNumber) * V::kBlockQ, row_first = t.first + warp_row;
      const i32 center = row_first - t.seq.diagonal() - first;  // the column on the diagonal of this warp's row 0
      const auto mods = [&] {
        if constexpr (M::kScore || M::kMask) return M::tile(p, t.sequence, head, t.seq.q_len, t.seq.k_len);
      };
      S before;  // the scores that score_mod gets
      if constexpr (M::kScore) {
        s.for_each([&](float& x, i32, i32) { x *= p.score_scale; });
        before = s;
        score_by_mod<M, false>(p, mods(), s, row_first, first, terms);
      } else if constexpr (V::kRich) {
        score(p, t.sequence, head, s, center);
      }
      if (word & kMasked) {
        if constexpr (M::kMask) {
          mask_by_mod<M, false>(p, mods(), s, row_first, first, terms, [&](i32 i) {
            const i32 row = S::row_of(i);
            return bounds_of_row<M, false>(p, mods(), row_first + row, center + first + row, p.window_right,
                                           p.window_left);
          });
        } else {
          mask_scores(s, center, p.window_right, p.window_left, t.seq.q_len - first);
        }
        s.for_each([&](float& x, i32 row, i32) { x = warp_row + S::row_of(row) <= t.last_row ? x : -kInfinity; });
      }
      const auto lse_base2_of = [&](i32 column) { return hw::load_shared<float>(rows + static_cast<u32>(4 * column)); };
      if (word & kSpecial) {
        HW_UNROLL
        for (i32 c = 0; c < S::kColTiles; ++c) {
          const f32x2 lse = hw::load_shared<f32x2>(rows + static_cast<u32>(8 * V::kBlockQ + 32 * c));
          HW_UNROLL
          for (i32 i = 0; i < 4; ++i) s.x[0][c][i] = special_weight(s.x[0][c][i], p.natural_scale, lse.x[i % 2]);
        }
      } else {
        HW_UNROLL
        for (i32 c = 0; c < S::kColTiles; ++c) {
          const f32x2 lse_base2 = hw::load_shared<f32x2>(rows + static_cast<u32>(32 * c));
          HW_UNROLL
          for (i32 i = 0; i < 4; ++i) {
            s.x[0][c][i] = hw::exp2_approx(hw::fma(s.x[0][c][i], p.softmax_scale, -lse_base2.x[i % 2]));
          }
        }
      }
      Operand weights, gradients;
      if constexpr (V::kDropout) {
        // A dropped weight is remembered by its sign.
        visit_dropout_transposed(read_dropout(p, t.sequence, head, p.heads_q), s, first, row_first,
                                 [](float& x, bool kept) { x = kept ? x : -x; });
        S kept = s;
        kept.for_each([&](float& x, i32, i32) { x = x > 0.0f ? x * p.keep_scale : 0.0f; });
        weights.round(kept);
      } else {
        weights.round(s);
      }
      // NOTE: the compiler would move all of this behind the wait below, where no product runs any more. It does not move
      // a store to shared memory, and that needs all weights.
      hw::store_shared(smem + static_cast<u32>(Plan::kPins + 4 * hw::thread_idx()), weights.bits());
      hw::wgmma_wait<0>();
      hw::wgmma_pin(accumulators(ds));
      if (word & kSpecial) {
        // sync   dP there <-> all consumers: nobody reads dout
        meet();
        // Zeros in the rows of dout that keep nothing, for 0 times what lies there may be NaN.
        const u32 lse_base2 = smem + Plan::kRows + stage * Plan::kRowsBytes;
        clear_rows_if<VChunk, V::kHeadDimV, V::kBlockQ, Plan::kConsumerThreads>(dout, 0, thread, [&](i32 row) {
          return hw::load_shared<float>(lse_base2 + static_cast<u32>(4 * row)) == kInfinity;
        });
        hw::fence_proxy_async();
        // sync   dout cleared <-> all consumers
        meet();
      }

      // dS = P (dP - delta)
      HW_UNROLL
      for (i32 c = 0; c < S::kColTiles; ++c) {
        const f32x2 delta = hw::load_shared<f32x2>(rows + static_cast<u32>(4 * V::kBlockQ + 32 * c));
        HW_UNROLL
        for (i32 i = 0; i < 4; ++i) {
          const float weight = kUnpacks ? weights.at(c, i) : s.x[0][c][i];
          float& x = ds.x[0][c][i];
          if constexpr (V::kDropout) {
            const float kept = weight > 0.0f ? weight * p.keep_scale : 0.0f;
            x = hw::fma(kept, x, -hw::abs(weight) * delta.x[i % 2]);
          } else {
            x = weight * (x - delta.x[i % 2]);
          }
        }
      }
      if (word & kSpecial) {
        ds.for_each([&](float& x, i32, i32 column) { x = lse_base2_of(column) == kInfinity ? 0.0f : x; });
      }
      if constexpr (M::kScore) {
        add_gradients<M, false, false>(p, mods(), before, ds, row_first, first, terms);
        if constexpr (M::kSlope) {
          visit_terms<M, false>(
              p, mods(), before, row_first, first, terms,
              [&](float& x, i32 row, i32 column, const typename M::QTerms& q_terms, const typename M::KTerms& k_terms) {
                float& d = ds.at(row, column);
                d = d == 0.0f ? 0.0f : d * M::slope(p, mods(), q_terms, k_terms, x);
              });
        }
      } else if constexpr (V::kRich) {
        if (p.score_cap != 0.0f) {
          const float slope = p.alibi_slopes != nullptr ? read_slope(p, t.sequence, head) : 0.0f;
          ds.for_each([&](float& x, i32 row, i32 column) {
            const float distance = hw::abs(static_cast<float>(center + S::row_of(row) - S::first_col() - column));
            x *= cap_derivative(hw::abs(s.at(row, column)), lse_base2_of(column), -slope * distance, p.score_cap);
          });
        }
      }
      gradients.round(ds);
      HW_UNROLL
      for (i32 k = 0; k < Operand::kSteps; ++k) {
        const i32 chunk = 2 * k / DsChunk::kUnits * V::kBlockK * DsChunk::kBytes;
        hw::stmatrix_x4(DsChunk::other_unit(ds_tile + ds_lane, 2 * k % DsChunk::kUnits) + static_cast<u32>(chunk),
                        gradients.x[k]);
      }
      // Each lane fences its own rows, before one lane arrives for all.
      hw::fence_proxy_async();

      // dv, dk
      hw::wgmma_pin(weights.x);
      hw::wgmma_pin(gradients.x);
      hw::wgmma_pin(accumulators(dv));
      hw::wgmma_pin(accumulators(dk));
      hw::wgmma_fence();
      issue_pv<Element, VChunk>(dv, weights, dout);
      hw::sync_warp();
      // arrive   ds full -> all consumers
      arrive(barriers.ds_full(stage));
      issue_pv<Element, QkChunk>(dk, gradients, q);
      hw::wgmma_commit();

      // dq
      // wait   ds full <- all consumers
      hw::mbarrier_wait(barriers.ds_full(stage), parity);
      Dq dq;
      hw::wgmma_fence();
      issue_dq<V>(dq, ds_tile, smem, consumer);
      hw::wgmma_commit();
      if constexpr (!V::kRich) head = t.head_kv * p.head_group + static_cast<i32>(read_word(stage, 1));
      hw::wgmma_wait<1>();
      // arrive   empty -> warps 0 and 1
      arrive(barriers.empty(stage));
      hw::wgmma_wait<0>();
      hw::wgmma_pin(accumulators(dq));
      add_dq<V>(dq, p.dq_accum + (head * p.dq_blocks + dq_begin + first / 16) * (16 * V::kHeadDim), consumer,
                t.seq.q_len - first);
      ++tile;
    } while ((word & kLast) == 0);
    hw::wgmma_pin(accumulators(dv));
    hw::wgmma_pin(accumulators(dk));
  }

  dk.for_each([&](float& x, i32, i32) { x *= p.scale; });
  // sync   k and v free <-> all consumers: nobody reads them for dq any more; dk and dv are gathered there
  meet();
  // What it needs is read anew: kept through the loop it would cost registers there.
  const Sequence owner = read_sequence(p, t.sequence);
  const i32 warp_first = t.first + warp_row, head_kv = key_head_of_block(p);
  const i32 used = owner.k_len - warp_first, owned = owner.k_rows - warp_first;
  u8* to_k = at_row(p.dk, owner, p.dk_stride_batch, owner.k_begin + warp_first, p.dk_stride_row) +
             head_kv * p.dk_stride_head;
  u8* to_v = at_row(p.dv, owner, p.dv_stride_batch, owner.k_begin + warp_first, p.dv_stride_row) +
             head_kv * p.dv_stride_head;
  store_rows<Element, typename Plan::DkTile, 16>(dk, smem + static_cast<u32>(warp_row * Plan::DkTile::kRowBytes), to_k,
                                                 p.dk_stride_row, used, owned, p.head_dim * Plan::kBytes);
  store_rows<Element, typename Plan::DvTile, 16>(
      dv, smem + static_cast<u32>(Plan::kV + warp_row * Plan::DvTile::kRowBytes), to_v, p.dv_stride_row, used, owned,
      p.head_dim_v * Plan::kBytes);
}

HW_KERNEL(Variant::kThreads) cuflash_backward_sm90(HW_GRID_CONSTANT BackwardSm90Params p) {
  using V = Variant;
  const u32 smem = hw::smem_base();
  const i32 warpgroup = hw::shfl(hw::warp_idx() / 4, 0);
  const KeyTile<V> tile(p);
  if (!tile.exists()) return;
  if (hw::thread_idx() == 0) {
    hw::prefetch_tensor_map(p.k_map);
    hw::prefetch_tensor_map(p.v_map);
    hw::prefetch_tensor_map(p.q_map);
    hw::prefetch_tensor_map(p.dout_map);
    Barriers<V>(smem).init();
  }
  // sync   barriers made <-> all warps
  hw::sync_threads();
  if (warpgroup == 0) {
    hw::register_dealloc<V::kProducerRegisters>();
    if (hw::warp_idx() == 0) copy_tiles<V, Mods>(p, smem, tile);
    if (hw::warp_idx() == 1) describe_tiles<V, Mods>(p, smem, tile);
  } else {
    hw::register_alloc<V::kConsumerRegisters>();
    consume_tiles<V, Mods>(p, smem, warpgroup - 1, tile);
  }
}
