// Attention forward for compute capability 9.0a: the same as forward_sm80.cu, by wgmma and tensor copies, in two roles.
//
//   S = scale Q K^T    [kBlockQ, kBlockK]    never leaves registers; through the user's mods (tile/mods.cuh)
//   m, l, O            online softmax in base 2 (tile/softmax.cuh)
//   out = O / l        lse = ln(l) + m
//
//   rows    queries of one head, or of all heads that share a key head (group_heads of them), so that few queries fill a
//           tile and keys are loaded once for those heads: row r of a warpgroup is query r / group_heads of its queries
//   grid    (query block, group of heads, sequence) or (slot, group): tile/schedule.cuh, as forward_sm80.cu; or, where the
//           tiles of a dense batch are alike, a block for each multiprocessor, which goes over all of them in steps
//   keys    rows of one array, or pages that a table names: V::kPaged, tile/paged.cuh. Pages come by tensor copies where
//           parts of them are parts of a key tile, in multiples of the swizzle's 8 rows; else they are gathered row by row
//   cluster V::kCluster 2: two blocks with neighbouring query tiles of one head, which see the same keys. Each brings half of
//           every key tile, to both
//   roles   warpgroup 0, warp 0   producer: finds the tiles, says which are masked, issues all copies
//           warpgroup 0, warps 1  loaders: K, and V, of keys in pages, instead of the producer
//             and 2
//           warpgroups 1..        consumers: 64 query rows each against all keys
//
//   shared  name      rows      row            bytes for d = 128, 128 x 128
//           q[1..2]   kBlockQ   kHeadDim       32 KB each, a warpgroup's rows apart: its out is gathered there at the end
//           k[2]      kBlockK   kHeadDim       32 KB each
//           v[2]      kBlockK   kHeadDimV      32 KB each
//           terms[2]  kBlockK   words          what mods need of each key, where it is dear (tile/mods.cuh)
//           bounds[1..2] kBlockQ 2 words       the keys each query has to do with, where there is a mask_mod
//           words[2]            1 word         of the tile in k: its number, whether it is masked, whether it is the last
//           tiles[1..2]         4 words        of the tile in q: which it is, and whether it has to do with any keys
//           pins                a word a thread
//           barriers
//   Tiles of 16-bit elements lie in chunks as tensor copies write and wgmma reads them (tile/descriptor.cuh).
//
//   mbarrier      arrivals                          who waits
//   k_full[s]     producer or loader, K's bytes     consumers: S = Q K^T, the tile's word, terms
//   k_empty[s]    every consumer warp, S is there   producer: the next K, word and terms of this stage
//                 (of the whole cluster: v_empty too)
//   v_full[s]     producer or loader, V's bytes     consumers: O += P V
//   v_empty[s]    every consumer warp, O is there   producer: the next V of this stage
//   q_full[s]     producer, and Q's bytes           consumers: S = Q K^T, bounds, the tile's words
//   q_empty[s]    every consumer warp, after store  producer: the next Q, bounds and words of this stage
//
//   named barrier 1        all consumers, where the last keys' V has been cleared behind them
//                 2 + w    kTurns: turn of warpgroup w to issue its products; the others' softmax runs under them
//                 5 + w    warpgroup w: all of it has read Q
//                 8        producer and loaders: a tile's words are written, and those of the one before read
//
// A warpgroup issues S of the next tile and O += P V of this one together, and computes the softmax of the next tile while
// the latter runs. Key tiles go from the last to the first, so that masked ones come first.
#include <base.cuh>
#include <hw/barrier.cuh>
#include <hw/cluster.cuh>
#include <hw/device.cuh>
#include <hw/math.cuh>
#include <hw/tma.cuh>
#include <hw/warp.cuh>
#include <hw/wgmma.cuh>
#include <params/forward_sm90.cuh>
#include <tile/descriptor.cuh>
#include <tile/dropout.cuh>
#include <tile/finish.cuh>
#include <tile/fragment.cuh>
#include <tile/mask.cuh>
#include <tile/matmul_sm90.cuh>
#include <tile/mods.cuh>
#include <tile/paged.cuh>
#include <tile/schedule.cuh>
#include <tile/score.cuh>
#include <tile/sequence.cuh>
#include <tile/softmax.cuh>
#include <tile/tensor_rows.cuh>
#include <variant.cuh>

template <class V>
struct ForwardPlan {
  using Element = typename V::Element;
  static constexpr i32 kBytes = 2;
  static constexpr i32 kConsumers = V::kBlockQ / 64;
  static constexpr i32 kConsumerWarps = 4 * kConsumers;
  static constexpr u32 kStages = 2;
  static constexpr u32 kQStages = V::kQStages;  // 2, where they fit: Q of the next tile lands while this one is computed
  static constexpr bool kSharesTiles = !(Mods::kScore || Mods::kMask || V::kDropout);  // else a tile is of one head
  static_assert(V::kCluster == 1 || !(Mods::kMask || V::kPaged), "the blocks of a cluster see the same keys");
  static_assert(64 * kConsumers == V::kBlockQ && V::kThreads == 128 * (kConsumers + 1) && sizeof(Element) == kBytes,
                "a warpgroup has 64 rows of 16-bit elements, and one more produces");

  using QkChunk = Chunk<V::kHeadDim % 64 == 0 ? 128 : 64>;
  using VChunk = Chunk<V::kHeadDimV % 64 == 0 ? 128 : 64>;
  using OutTile = SharedTile<V::kHeadDimV * kBytes>;

  // Of shared memory, from its beginning.
  static constexpr i32 kOwnQBytes = 64 * max_of(V::kHeadDim, V::kHeadDimV) * kBytes;  // of a warpgroup
  static constexpr i32 kQBytes = kConsumers * kOwnQBytes;
  static constexpr i32 kKBytes = V::kBlockK * V::kHeadDim * kBytes;
  static constexpr i32 kVBytes = V::kBlockK * V::kHeadDimV * kBytes;
  static constexpr i32 kTermsBytes = staged_bytes<Mods, true, V::kBlockK>();
  static constexpr i32 kBoundsBytes = bounds_bytes<Mods, V::kBlockQ>();
  static constexpr i32 kK = i32{kQStages} * kQBytes;
  static constexpr i32 kV = kK + i32{kStages} * kKBytes;
  static constexpr i32 kTerms = kV + kStages * kVBytes;
  static constexpr i32 kBounds = kTerms + kStages * kTermsBytes;
  static constexpr i32 kTiles = kBounds + i32{kQStages} * kBoundsBytes;
  static constexpr i32 kWords = kTiles + 16 * kQStages;
  static constexpr i32 kPins = kWords + 4 * kStages;
  static constexpr i32 kBarriers = kPins + 4 * V::kThreads;
  static constexpr i32 kEnd = kBarriers + 8 * (4 * kStages + 2 * kQStages);
  static_assert(kEnd <= V::kSharedBytes, "the host asks for as much shared memory as is used");
  static_assert(kK % 1024 == 0 && kKBytes % 1024 == 0 && kVBytes % 1024 == 0, "swizzles count from a multiple of 1024");
  static_assert(kTiles % 16 == 0 && kBarriers % 8 == 0, "aligned");
};

// Where a role stands: how many query tiles and how many key tiles came before, of all that the block has. The n-th key
// tile is in stage n % kStages, and completes the phase n / kStages of its barriers; query tiles likewise, with kQStages.
struct Progress {
  u32 q_tiles = 0, k_tiles = 0;
};

// What the producer says of the tile in a K stage: its number and these.
constexpr u32 kMasked = 1u << 31;
constexpr u32 kLast = 1u << 30;

// What it says of the tile in a Q stage: sequence, group of heads, number from the end of the sequence, and one of these.
constexpr i32 kSeesNothing = 0;
constexpr i32 kSeesKeys = 1;
constexpr i32 kNoTile = 2;  // no tile: the block is done

template <class V>
struct Barriers {
  using Plan = ForwardPlan<V>;
  u32 base;

  HW_DEVICE explicit Barriers(u32 smem) : base(smem + Plan::kBarriers) {}
  HW_DEVICE u32 k_full(u32 stage) const { return base + 8 * stage; }
  HW_DEVICE u32 k_empty(u32 stage) const { return k_full(stage) + 8 * Plan::kStages; }
  HW_DEVICE u32 v_full(u32 stage) const { return k_full(stage) + 16 * Plan::kStages; }
  HW_DEVICE u32 v_empty(u32 stage) const { return k_full(stage) + 24 * Plan::kStages; }
  HW_DEVICE u32 q_full(u32 stage) const { return base + 32 * Plan::kStages + 8 * stage; }
  HW_DEVICE u32 q_empty(u32 stage) const { return q_full(stage) + 8 * Plan::kQStages; }

  static HW_DEVICE u32 stage(u32 tile) { return tile % Plan::kStages; }
  static HW_DEVICE u32 parity(u32 tile) { return tile / Plan::kStages % 2; }
  static HW_DEVICE u32 q_stage(u32 tile) { return tile % Plan::kQStages; }
  static HW_DEVICE u32 q_parity(u32 tile) { return tile / Plan::kQStages % 2; }

  // By one thread, before anyone uses them.
  template <class M>
  HW_DEVICE void init() const {
    for (u32 i = 0; i < Plan::kStages; ++i) {
      hw::mbarrier_init(k_full(i), M::kStagedK > 0 ? 2 : 1);
      hw::mbarrier_init(k_empty(i), V::kCluster * Plan::kConsumerWarps);
      hw::mbarrier_init(v_full(i), 1);
      hw::mbarrier_init(v_empty(i), V::kCluster * Plan::kConsumerWarps);
    }
    for (u32 i = 0; i < Plan::kQStages; ++i) {
      hw::mbarrier_init(q_full(i), 1);
      hw::mbarrier_init(q_empty(i), Plan::kConsumerWarps);
    }
    hw::fence_mbarrier_init();
  }
};

// A key tile; the caller announces all of it. In a cluster its blocks bring a part each, to all of them.
template <class V, class Chunk, i32 kHeadDim>
HW_DEVICE void load_keys(u32 to, const TensorMap& map, u32 mbarrier, i32 head, i32 row, i32 batch) {
  if constexpr (V::kCluster == 1) {
    load_rows<Chunk, kHeadDim, V::kBlockK>(to, map, mbarrier, hw::CachePolicy::kEvictLast, head, row, batch);
  } else {
    constexpr i32 kRows = V::kBlockK / V::kCluster;
    static_assert(kRows % 8 == 0, "a part begins where the swizzle's pattern does");
    const i32 part = hw::cluster_rank() * kRows;
    HW_UNROLL
    for (i32 column = 0; column < kHeadDim; column += Chunk::kElements) {
      hw::tma_load_to((1u << V::kCluster) - 1, to + static_cast<u32>(column * V::kBlockK * 2 + part * Chunk::kBytes), map,
                      mbarrier, hw::CachePolicy::kEvictLast, column, head, row + part, batch);
    }
  }
}

// Queries of a tile, of each of its heads.
template <class V>
HW_DEVICE i32 queries_of_tile(const ForwardSm90Params& p) {
  return ForwardPlan<V>::kSharesTiles ? V::kBlockQ / 64 * p.group_queries : V::kBlockQ;
}

// Which queries the tile number `from_end` of a sequence has, counted from its end, and where they stand.
template <class V>
struct QueryTile {
  i32 first;     // the first one
  i32 last_row;  // how many follow it; -1: it is none either
  i32 diagonal;  // the key that the first one stands on

  HW_DEVICE QueryTile(const ForwardSm90Params& p, const Sequence& seq, i32 from_end)
      : first((ceil_div(seq.q_rows, queries_of_tile<V>(p)) - 1 - from_end) * queries_of_tile<V>(p)),
        last_row(min_of(queries_of_tile<V>(p), seq.q_len - first) - 1), diagonal(seq.diagonal() + first) {}

  // By causal, window and length.
  HW_DEVICE TileInterval keys(const ForwardParams& p, i32 k_len) const {
    return interval_of_tile(diagonal, diagonal + last_row, p.window_left, p.window_right, k_len);
  }
};

// Which query of its tile, and which of the tile's heads, a row is of. A warpgroup has the rows of whole queries; those of
// its 64 that are left are of none.
template <class V>
struct TileRow {
  i32 query, head;
  bool exists;

  HW_DEVICE TileRow(const ForwardSm90Params& p, i32 row) : query(row), head(0), exists(true) {
    if constexpr (ForwardPlan<V>::kSharesTiles) {
      const i32 own = row % 64, in_group = static_cast<i32>(static_cast<u32>(own) * p.group_multiplier >> 12);
      query = row / 64 * p.group_queries + in_group;
      head = own - in_group * p.group_heads;
      exists = in_group < p.group_queries;
    }
  }
};

// What a block computes, tile by tile: use(sequence, group of heads, number from the end of the sequence).
template <class V, class Use>
HW_DEVICE void for_each_tile(const ForwardSm90Params& p, const Use& use) {
  constexpr bool kOrdered = V::kCluster == 1;
  const bool persistent = !V::kPaged && p.persistent_tiles > 0;
  const TileRange range = persistent ? TileRange{0, hw::block_idx_x()}
                                     : tiles_of_block<kOrdered>(p, p.cu_seqlens_q, p.q_len, queries_of_tile<V>(p));
  const auto tiles = [&] { return ceil_div(read_sequence<V::kPaged>(p, range.sequence).q_rows, queries_of_tile<V>(p)); };
  const auto end = [&] { return persistent ? p.persistent_tiles : tiles(); };
  HW_NO_UNROLL
  for (i32 i = range.first; i < end(); i += persistent ? hw::grid_dim_x() : tile_step(p.packed_grid)) {
    if (persistent) {
      const i32 tiles = ceil_div(p.q_len, queries_of_tile<V>(p)), line = i / tiles;
      const BlockPlace place = place_in_order(p.order, static_cast<u32>(i - line * tiles), static_cast<u32>(line),
                                              static_cast<u32>(tiles), static_cast<u32>(p.groups));
      use(place.sequence, place.head, from_end<kOrdered>(p.order, place.tile, tiles));
    } else {
      use(range.sequence, head_of_block<kOrdered>(p), from_end<kOrdered>(p.order, i, tiles()));
    }
  }
}

template <class V>
HW_DEVICE void say_tile(u32 smem, u32 q_stage, i32 sequence, i32 group, i32 from_end, i32 what) {
  hw::store_shared(smem + ForwardPlan<V>::kTiles + 16 * q_stage,
                   u32x4{{static_cast<u32>(sequence), static_cast<u32>(group), static_cast<u32>(from_end),
                          static_cast<u32>(what)}});
}

// The producer, and the loaders of keys in pages.
HW_DEVICE void meet_loaders() { hw::named_sync(8, 96); }

// Producer: the copies of the sequence's query tile number `from_end` and of its keys. It has few registers: what is
// needed once in 32 tiles is worked out anew.
template <class V, class M>
HW_DEVICE void produce_tile(const ForwardSm90Params& p, u32 smem, i32 sequence, i32 group, i32 from_end,
                            Progress& progress) {
  using Plan = ForwardPlan<V>;
  const Barriers<V> barriers(smem);
  const Sequence seq = read_sequence<V::kPaged>(p, sequence);
  const QueryTile<V> q_tile(p, seq, from_end);
  const i32 head_kv = group * p.group_heads / p.head_group;
  // Mods ask for it, where a group is one head.
  const i32 head = group;
  const bool leader = hw::elect_one();

  const u32 q_stage = barriers.q_stage(progress.q_tiles), q_full = barriers.q_full(q_stage);
  // wait   q empty <- every consumer warp: it has stored the tile that was here
  hw::mbarrier_wait(barriers.q_empty(q_stage), barriers.q_parity(progress.q_tiles++) ^ 1);

  TileInterval keys = q_tile.keys(p, seq.k_len);
  if constexpr (M::kMask) {
    if (q_tile.last_row >= 0) {
      keys = stage_bounds<M, V::kBlockQ, 32>(p, M::tile(p, sequence, head, seq.q_len, seq.k_len),
                                             smem + Plan::kBounds + q_stage * Plan::kBoundsBytes, q_tile.first,
                                             q_tile.diagonal, p.window_left, p.window_right);
    }
  }
  const i32 first_k_tile = keys.any.begin / V::kBlockK;
  const bool sees_keys = q_tile.last_row >= 0 && keys.any.begin < keys.any.end;
  const i32 k_tiles_end = sees_keys ? ceil_div(keys.any.end, V::kBlockK) : first_k_tile;
  constexpr bool kWalk = M::kMask && M::kKeepQ;
  TileWalk<-1> walk(k_tiles_end - 1);
  const auto find_tile = [&](i32 n) {
    if constexpr (kWalk) {
      return walk.find(n, first_k_tile - 1, [&](i32 tile) {
        const Sequence again = read_sequence<V::kPaged>(p, sequence);
        const QueryTile<V> rows(p, again, from_end);
        const Interval all = rows.keys(p, again.k_len).all;
        const i32 first = tile * V::kBlockK, end = first + V::kBlockK;
        const i32 kind = M::classify(p, M::tile(p, sequence, head, again.q_len, again.k_len), rows.first,
                                     rows.first + rows.last_row, first, min_of(end, again.k_len) - 1);
        return first < all.begin || end > all.end ? min_of(kind, kTileMixed) : kind;
      });
    }
    return n;
  };
  const auto is_masked = [&](i32 n) {
    if constexpr (kWalk) return !walk.is_full(n);
    return n * V::kBlockK < keys.all.begin || (n + 1) * V::kBlockK > keys.all.end;
  };
  const i32 k_row = static_cast<i32>(seq.k_begin);
  const auto load_v = [&](i32 n, u32 tile) {
    if constexpr (V::kPaged) return;
    const u32 stage = barriers.stage(tile);
    // wait   v empty <- every consumer warp: O of the tile that was here is there
    hw::mbarrier_wait(barriers.v_empty(stage), barriers.parity(tile) ^ 1);
    if (leader) {
      hw::mbarrier_arrive_expect_tx(barriers.v_full(stage), Plan::kVBytes);
      load_keys<V, typename Plan::VChunk, V::kHeadDimV>(smem + Plan::kV + stage * Plan::kVBytes, p.v_map,
                                                        barriers.v_full(stage), head_kv, k_row + n * V::kBlockK,
                                                        seq.dense_idx);
    }
  };

  i32 n = find_tile(k_tiles_end - 1);
  // Q, or that there is nothing to do
  if (leader) {
    say_tile<V>(smem, q_stage, sequence, group, from_end, n >= first_k_tile ? kSeesKeys : kSeesNothing);
    if (n >= first_k_tile) {
      const i32 queries = queries_of_tile<V>(p) / Plan::kConsumers;  // of a warpgroup
      const i32 rows = queries * p.group_heads;
      hw::mbarrier_arrive_expect_tx(q_full, static_cast<u32>(Plan::kConsumers * rows * V::kHeadDim * Plan::kBytes));
      HW_NO_UNROLL
      for (i32 i = 0; i < Plan::kConsumers; ++i) {
        load_rows<typename Plan::QkChunk, V::kHeadDim, 64>(
            smem + q_stage * Plan::kQBytes + static_cast<u32>(i * Plan::kOwnQBytes), p.q_map, q_full,
            hw::CachePolicy::kEvictFirst, group * p.group_heads,
            static_cast<i32>(seq.q_begin) + q_tile.first + queries * i, seq.dense_idx);
      }
    } else {
      hw::mbarrier_arrive(q_full);
    }
  }
  // sync   the query tile's words <-> loaders
  if constexpr (V::kPaged) meet_loaders();

  // KV loop: K of a tile, then V of the tile before.
  i32 before = -1;
  HW_NO_UNROLL
  while (n >= first_k_tile) {
    const bool masked = is_masked(n);
    const i32 next = find_tile(n - 1);
    const u32 stage = barriers.stage(progress.k_tiles), k_full = barriers.k_full(stage);
    // wait   k empty <- every consumer warp: S of the tile that was here is there
    hw::mbarrier_wait(barriers.k_empty(stage), barriers.parity(progress.k_tiles) ^ 1);
    if (leader) {
      const u32 word = static_cast<u32>(n) | (masked ? kMasked : 0) | (next < first_k_tile ? kLast : 0);
      hw::store_shared(smem + Plan::kWords + 4 * stage, word);
      if constexpr (!V::kPaged) {
        hw::mbarrier_arrive_expect_tx(k_full, Plan::kKBytes);
        load_keys<V, typename Plan::QkChunk, V::kHeadDim>(smem + Plan::kK + stage * Plan::kKBytes, p.k_map, k_full,
                                                          head_kv, k_row + n * V::kBlockK, seq.dense_idx);
      }
    }
    // sync   the key tile's word <-> loaders
    if constexpr (V::kPaged) meet_loaders();
    if constexpr (M::kStagedK > 0) {
      stage_terms<M, true, V::kBlockK, 32>(p, M::tile(p, sequence, head, seq.q_len, seq.k_len),
                                           smem + Plan::kTerms + stage * Plan::kTermsBytes, n * V::kBlockK);
      hw::sync_warp();
      if (leader) hw::mbarrier_arrive(k_full);
    }
    if (before >= 0) load_v(before, progress.k_tiles - 1);
    before = n;
    n = next;
    ++progress.k_tiles;
  }
  if (before >= 0) load_v(before, progress.k_tiles - 1);
  // sync   no more key tiles <-> loaders
  if constexpr (V::kPaged) meet_loaders();
}

// Loader of keys in pages: K, or V, of the producer's next query tile; whether there was one.
template <class V, class Chunk, i32 kHeadDim, bool kValues>
HW_DEVICE bool load_tile(const ForwardSm90Params& p, u32 smem, Progress& progress) {
  using Plan = ForwardPlan<V>;
  const Barriers<V> barriers(smem);
  const auto said = [&](u32 at) { return hw::shfl(hw::load_shared<u32>(smem + at), 0); };
  // sync   the query tile's words <-> producer
  meet_loaders();
  const u32 words = Plan::kTiles + 16 * barriers.q_stage(progress.q_tiles++);
  const i32 sequence = static_cast<i32>(said(words));
  const i32 sees = static_cast<i32>(said(words + 12));
  if (sees == kNoTile) return false;
  const auto load = [&](u32 word, u32 tile) {
    const i32 key = static_cast<i32>(word & (kLast - 1)) * V::kBlockK;
    const i32 k_len = read_sequence<true>(p, sequence).k_len;
    const i32 head_kv = static_cast<i32>(said(words + 4)) * p.group_heads / p.head_group;
    const u32 stage = barriers.stage(tile), full = kValues ? barriers.v_full(stage) : barriers.k_full(stage);
    const u32 to = smem + (kValues ? Plan::kV + stage * Plan::kVBytes : Plan::kK + stage * Plan::kKBytes);
    // wait   v empty <- every consumer warp: O of the tile that was here is there. (For K the producer has waited.)
    if constexpr (kValues) hw::mbarrier_wait(barriers.v_empty(stage), barriers.parity(tile) ^ 1);
    // Padding before the first key leaves no part of a page at a multiple of 8 rows of a tile.
    if (p.page_rows > 0 && p.cache_leftpad == nullptr) {
      if (hw::elect_one()) hw::mbarrier_arrive_expect_tx(full, V::kBlockK * kHeadDim * Plan::kBytes);
      // All lanes copy what one has announced.
      hw::sync_warp();
      for_each_page<V::kBlockK>(p, sequence, key, k_len, [&](i32 row, i32 page, i32 from) {
        load_rows<Chunk, kHeadDim, V::kBlockK>(to + static_cast<u32>(row * Chunk::kBytes), kValues ? p.v_map : p.k_map,
                                               full, hw::CachePolicy::kEvictLast, head_kv, from, page);
      });
    } else {
      gather_rows<Chunk, kHeadDim, V::kBlockK>(
          p, sequence, to,
          static_cast<const u8*>(kValues ? p.v : p.k) + head_kv * (kValues ? p.v_stride_head : p.k_stride_head),
          kValues ? p.v_stride_batch : p.k_stride_batch, kValues ? p.v_stride_row : p.k_stride_row,
          (kValues ? p.head_dim_v : p.head_dim) * Plan::kBytes, key, k_len);
      hw::cp_async_commit();
      // wait   rows landed <- own copies. wgmma does not read them the way they were written: each lane fences its own,
      // before one lane arrives for all.
      hw::cp_async_wait<0>();
      hw::fence_proxy_async();
      hw::sync_warp();
      // arrive   k full, or v full -> consumers
      if (hw::lane_idx() == 0) hw::mbarrier_arrive(full);
    }
  };
  // sync   the first key tile's word <-> producer; or that there is none
  meet_loaders();
  if (sees == kSeesNothing) return true;
  u32 word;
  do {
    const u32 tile = progress.k_tiles++;
    word = said(Plan::kWords + 4 * barriers.stage(tile));
    if constexpr (!kValues) load(word, tile);
    // sync   the next key tile's word <-> producer; or that there is none
    meet_loaders();
    // NOTE: V behind K of the next tile, as elsewhere the producer has them: K is needed sooner.
    if constexpr (kValues) load(word, tile);
  } while ((word & kLast) == 0);
  return true;
}

// Zeros in place of a V tile's rows from `first` on, by all consumers.
template <class V>
HW_DEVICE void clear_rows(u32 v, i32 first) {
  using Chunk = typename ForwardPlan<V>::VChunk;
  constexpr i32 kUnits = V::kHeadDimV / 8;
  for (i32 i = hw::thread_idx() - 128; i < (V::kBlockK - first) * kUnits; i += V::kThreads - 128) {
    const i32 unit = i % kUnits, chunk = unit / Chunk::kUnits * V::kBlockK * Chunk::kBytes;
    hw::store_shared(v + static_cast<u32>(chunk) + Chunk::unit_at(first + i / kUnits, unit % Chunk::kUnits),
                     u32x4{{0, 0, 0, 0}});
  }
}

// Zeros in Q's rows that no copy brings, which products read all the same. By all threads, before the copies.
template <class V>
HW_DEVICE void clear_rows_of_none(const ForwardSm90Params& p, u32 smem) {
  using Plan = ForwardPlan<V>;
  using Chunk = typename Plan::QkChunk;
  constexpr i32 kChunkBytes = 64 * Chunk::kBytes;  // of a warpgroup's rows
  const i32 first = p.group_queries * p.group_heads * Chunk::kBytes;
  if (first == kChunkBytes) return;
  for (i32 part = 0; part < i32{Plan::kQStages} * Plan::kConsumers; ++part) {
    for (i32 chunk = 0; chunk < V::kHeadDim / Chunk::kElements; ++chunk) {
      const u32 to = smem + static_cast<u32>(part * Plan::kOwnQBytes + chunk * kChunkBytes);
      for (i32 at = first + 16 * hw::thread_idx(); at < kChunkBytes; at += 16 * V::kThreads) {
        hw::store_shared(to + static_cast<u32>(at), u32x4{{0, 0, 0, 0}});
      }
    }
  }
  hw::fence_proxy_async();
}

// Consumer: that tile's rows of one warpgroup; whether there was a tile.
template <class V, class M>
HW_DEVICE bool consume_tile(const ForwardSm90Params& p, u32 smem, i32 consumer, Progress& progress) {
  using Plan = ForwardPlan<V>;
  using Element = typename V::Element;
  using S = Fragment<1, V::kBlockK / 8>;
  using O = Fragment<1, V::kHeadDimV / 8>;
  // Between the end of O's products and the next ones' issue nothing should stand. A wide O is rescaled under S of the next
  // tile; a narrow one in its warpgroup's idle time, for that would keep the others' products waiting.
  constexpr bool kRescaleUnderS = V::kHeadDimV > 128;
  // Where exponentials take about as long as products, O of the tile before is awaited between the rows' maxima and the
  // exponentials, under which the other warpgroups' products run: so weights are rounded as they come. Where they take less,
  // or dropout stands behind them, or a tile has few keys, they run under the warpgroup's own products.
  constexpr bool kWaitsEarly = V::kHeadDimV <= 128 && V::kBlockK >= 128 && !V::kDropout;
  const Barriers<V> barriers(smem);
  const i32 lane = hw::lane_idx();
  const i32 warp_row = 64 * consumer + 16 * (hw::warp_idx() % 4);
  const u32 q_stage = barriers.q_stage(progress.q_tiles);
  const u32 own_q = smem + q_stage * Plan::kQBytes + static_cast<u32>(consumer * Plan::kOwnQBytes);

  // wait   q full <- the producer: Q, bounds, and which tile it is
  hw::mbarrier_wait(barriers.q_full(q_stage), barriers.q_parity(progress.q_tiles++));
  const auto said = [&](i32 word) {
    return hw::shfl(hw::load_shared<i32>(smem + static_cast<u32>(Plan::kTiles + 4 * word) + 16 * q_stage), 0);
  };
  const i32 sequence = said(0), head = said(1), from_end = said(2), sees = said(3);
  if (sees == kNoTile) return false;
  const Sequence seq = read_sequence<V::kPaged>(p, sequence);
  const QueryTile<V> q_tile(p, seq, from_end);
  const i32 q_first = q_tile.first, diagonal = q_tile.diagonal;

  OnlineSoftmax<S::kRows> softmax(p.softmax_scale);
  O o;
  o.fill(0.0f);

  const auto arrive = [&](u32 mbarrier) {
    if (lane == 0) hw::mbarrier_arrive(mbarrier);
  };
  // Of a stage of keys, to whoever fills it.
  const auto give_back = [&](u32 mbarrier) {
    if constexpr (V::kCluster == 1) {
      arrive(mbarrier);
    } else if (lane < V::kCluster) {
      hw::mbarrier_arrive_at(mbarrier, lane);
    }
  };
  // Of key tile number `tile` of the block: the word, once K has landed; products.
  const auto read_word = [&](u32 tile) {
    return hw::shfl(hw::load_shared<u32>(smem + Plan::kWords + 4 * barriers.stage(tile)), 0);
  };
  const auto issue_scores = [&](S& s, u32 tile) {
    issue_qk<Element, typename Plan::QkChunk, V::kHeadDim, 64, V::kBlockK>(
        s, own_q, smem + Plan::kK + barriers.stage(tile) * Plan::kKBytes);
    hw::wgmma_commit();
  };
  const auto issue_out = [&](const Weights<Element, S>& weights, u32 tile) {
    issue_pv<Element, typename Plan::VChunk>(o, weights, smem + Plan::kV + barriers.stage(tile) * Plan::kVBytes);
    hw::wgmma_commit();
  };
  const auto rescale_out = [&](const float (&rescale)[S::kRows]) {
    o.for_each([&](float& x, i32 row, i32) { x *= rescale[row]; });
  };
  // From q.k of the tile to its scores, -inf where masked; gives K's stage back as soon as nothing of it is read.
  const auto score_tile = [&](S& s, u32 word, u32 tile) {
    // arrive   k empty -> the producer
    if constexpr (M::kStagedK == 0) give_back(barriers.k_empty(barriers.stage(tile)));
    const i32 k_first = static_cast<i32>(word & (kLast - 1)) * V::kBlockK;
    const auto center_of = [&](i32 i) { return diagonal - k_first + TileRow<V>(p, warp_row + S::row_of(i)).query; };
    const auto head_of = [&](i32 i) { return head * p.group_heads + TileRow<V>(p, warp_row + S::row_of(i)).head; };
    const u32 terms = smem + Plan::kTerms + barriers.stage(tile) * Plan::kTermsBytes;
    if constexpr (M::kScore) {
      s.for_each([&](float& x, i32, i32) { x *= p.score_scale; });
      score_by_mod<M, true>(p, M::tile(p, sequence, head, seq.q_len, seq.k_len), s, q_first + warp_row, k_first, terms);
    } else {
      score_of(p, sequence, head_of, s, center_of);
    }
    if (word & kMasked) {
      if constexpr (M::kMask) {
        const u32 bounds = smem + Plan::kBounds + q_stage * Plan::kBoundsBytes + static_cast<u32>(4 * warp_row);
        mask_by_mod<M, true>(p, M::tile(p, sequence, head, seq.q_len, seq.k_len), s, q_first + warp_row, k_first, terms,
                             [&](i32 i) { return staged_bounds<V::kBlockQ>(bounds, S::row_of(i)); });
      } else {
        mask_scores_of(s, center_of, p.window_left, p.window_right, seq.k_len - k_first);
      }
    }
    if constexpr (M::kStagedK > 0) {
      // All lanes have read the terms when one of them says so. (That they have read the word its shuffle sees to.)
      hw::sync_warp();
      // arrive   k empty -> the producer
      give_back(barriers.k_empty(barriers.stage(tile)));
    }
  };
  const auto drop = [&](S& s, u32 word) {
    if constexpr (V::kDropout) {
      visit_dropout(read_dropout(p, sequence, head, p.groups), s, q_first + warp_row,
                    static_cast<i32>(word & (kLast - 1)) * V::kBlockK, [](float& x, bool kept) { x = kept ? x : 0.0f; });
    }
  };

  if (sees == kSeesKeys) {
    Weights<Element, S> weights;
    float rescale[S::kRows];
    u32 tile = progress.k_tiles;
    // wait   k full <- the producer: K and the tile's word
    hw::mbarrier_wait(barriers.k_full(barriers.stage(tile)), barriers.parity(tile));
    u32 word = read_word(tile);
    {
      S s;
      hw::wgmma_fence();
      issue_scores(s, tile);
      hw::wgmma_wait<0>();
      hw::wgmma_pin(accumulators(s));
      score_tile(s, word, tile);
      softmax.weigh(s, rescale);
      drop(s, word);
      weights.round(s);
    }
    // V's rows behind the last key belong to no one: a weight of 0 times what lies there may be NaN.
    const i32 used = seq.k_len - static_cast<i32>(word & (kLast - 1)) * V::kBlockK;
    if (used < V::kBlockK) {
      // wait   v full <- the producer
      hw::mbarrier_wait(barriers.v_full(barriers.stage(tile)), barriers.parity(tile));
      clear_rows<V>(smem + Plan::kV + barriers.stage(tile) * Plan::kVBytes, used);
      hw::fence_proxy_async();
      // sync   V cleared <-> all consumers
      hw::named_sync(1, 128 * Plan::kConsumers);
    }

    // KV loop: S of a tile, O of the tile before.
    HW_NO_UNROLL
    while ((word & kLast) == 0) {
      const u32 before = tile++;
      // wait   k full <- the producer: K and the tile's word
      hw::mbarrier_wait(barriers.k_full(barriers.stage(tile)), barriers.parity(tile));
      word = read_word(tile);
      const auto wait_for_values = [&] {
        // wait   v full <- the producer
        hw::mbarrier_wait(barriers.v_full(barriers.stage(before)), barriers.parity(before));
      };
      // NOTE: a wait behind S has the compiler move the rescaling behind it, where S is nearly there.
      if constexpr (kRescaleUnderS) wait_for_values();
      // sync   turn <- the warpgroup before: its products are issued
      if constexpr (V::kTurns) hw::named_sync(2 + consumer, 256);
      S s;
      hw::wgmma_fence();
      issue_scores(s, tile);
      if constexpr (kRescaleUnderS) {
        rescale_out(rescale);
      } else {
        wait_for_values();
      }
      hw::wgmma_pin(accumulators(o));
      hw::wgmma_pin(weights.x);
      hw::wgmma_fence();
      issue_out(weights, before);
      // arrive   turn -> the warpgroup after
      if constexpr (V::kTurns) hw::named_arrive(2 + (consumer + 1) % Plan::kConsumers, 256);
      hw::wgmma_wait<1>();
      hw::wgmma_pin(accumulators(s));
      score_tile(s, word, tile);
      const auto finish_out = [&] {
        hw::wgmma_wait<0>();
        hw::wgmma_pin(accumulators(o));
        // arrive   v empty -> the producer
        give_back(barriers.v_empty(barriers.stage(before)));
      };
      if constexpr (kWaitsEarly) {
        softmax.weigh(s, rescale, finish_out);
      } else {
        softmax.weigh(s, rescale);
        drop(s, word);
        // NOTE: the compiler would move the exponentials behind the wait, where no product runs any more. It does not move
        // a store to shared memory, and the sums need all weights.
        hw::store_shared(smem + static_cast<u32>(Plan::kPins + 8 * warp_row + 4 * lane), softmax.sum[0] + softmax.sum[1]);
        finish_out();
      }
      weights.round(s);
      if constexpr (!kRescaleUnderS) rescale_out(rescale);
    }

    // The last tile's values
    if constexpr (kRescaleUnderS) rescale_out(rescale);
    // wait   v full <- the producer
    hw::mbarrier_wait(barriers.v_full(barriers.stage(tile)), barriers.parity(tile));
    hw::wgmma_pin(accumulators(o));
    hw::wgmma_pin(weights.x);
    hw::wgmma_fence();
    issue_out(weights, tile);
    hw::wgmma_wait<0>();
    hw::wgmma_pin(accumulators(o));
    // arrive   v empty -> the producer
    give_back(barriers.v_empty(barriers.stage(tile)));
    progress.k_tiles = tile + 1;
  }

  // sync   Q read <-> the warpgroup: out may be gathered in its place
  hw::named_sync(5 + consumer, 128);
  // NOTE: which tile it is is read again: kept through the KV loop it would cost registers there.
  const u32 own_out = own_q + static_cast<u32>((warp_row - 64 * consumer) * Plan::OutTile::kRowBytes);
  const i32 first_head = said(1) * p.group_heads;
  finish_heads<V, typename Plan::OutTile, V::kPaged>(
      p, said(0), [&](i32 row) { return first_head + TileRow<V>(p, warp_row + row).head; },
      [&](i32 row) {
        const TileRow<V> found(p, warp_row + row);
        return found.exists ? q_first + found.query : -1;
      },
      softmax, o, own_out);
  hw::fence_proxy_async();
  hw::sync_warp();
  // arrive   q empty -> the producer
  arrive(barriers.q_empty(q_stage));
  return true;
}

// The tensor maps that its copies will use; where rows of pages are gathered there are none of k and v.
template <class V>
HW_DEVICE void prefetch_maps(const ForwardSm90Params& p) {
  hw::prefetch_tensor_map(p.q_map);
  if (!V::kPaged || p.page_rows > 0) {
    hw::prefetch_tensor_map(p.k_map);
    hw::prefetch_tensor_map(p.v_map);
  }
}

// All of a block's tiles, in its roles.
template <class V>
HW_DEVICE void compute_tiles(const ForwardSm90Params& p) {
  using Plan = ForwardPlan<V>;
  const u32 smem = hw::smem_base();
  const i32 warpgroup = hw::shfl(hw::warp_idx() / 4, 0);
  if (hw::thread_idx() == 0) {
    prefetch_maps<V>(p);
    Barriers<V>(smem).template init<Mods>();
  }
  if constexpr (Plan::kSharesTiles) clear_rows_of_none<V>(p, smem);
  // sync   barriers made <-> all warps, of the cluster too
  if constexpr (V::kCluster == 1) {
    hw::sync_threads();
  } else {
    hw::cluster_sync();
  }

  Progress progress;
  if (warpgroup == 0) {
    hw::register_dealloc<V::kProducerRegisters>();
    if (hw::warp_idx() == 0) {
      for_each_tile<V>(p, [&](i32 sequence, i32 group, i32 from_end) {
        produce_tile<V, Mods>(p, smem, sequence, group, from_end, progress);
      });
      const Barriers<V> barriers(smem);
      const u32 q_stage = barriers.q_stage(progress.q_tiles);
      // wait   q empty <- every consumer warp
      hw::mbarrier_wait(barriers.q_empty(q_stage), barriers.q_parity(progress.q_tiles) ^ 1);
      if (hw::elect_one()) {
        say_tile<V>(smem, q_stage, 0, 0, 0, kNoTile);
        hw::mbarrier_arrive(barriers.q_full(q_stage));
      }
      // sync   that there are no more query tiles <-> loaders
      if constexpr (V::kPaged) meet_loaders();
    } else if constexpr (V::kPaged) {
      if (hw::warp_idx() == 1) {
        while (load_tile<V, typename Plan::QkChunk, V::kHeadDim, false>(p, smem, progress)) {
        }
      } else if (hw::warp_idx() == 2) {
        while (load_tile<V, typename Plan::VChunk, V::kHeadDimV, true>(p, smem, progress)) {
        }
      }
    }
  } else {
    hw::register_alloc<V::kConsumerRegisters>();
    // The first turn is the first warpgroup's.
    if (V::kTurns && warpgroup == Plan::kConsumers) hw::named_arrive(2, 256);
    HW_NO_UNROLL
    while (consume_tile<V, Mods>(p, smem, warpgroup - 1, progress)) {
    }
  }
  // sync   no more copies and arrivals <-> the cluster
  if constexpr (V::kCluster > 1) hw::cluster_sync();
}

// One of the two has a body.
HW_KERNEL(Variant::kThreads) cuflash_forward_sm90(HW_GRID_CONSTANT ForwardSm90Params p) {
  if constexpr (Variant::kCluster == 1) compute_tiles<Variant>(p);
}

HW_CLUSTER_KERNEL(Variant::kThreads, 2) cuflash_forward_sm90_pair(HW_GRID_CONSTANT ForwardSm90Params p) {
  if constexpr (Variant::kCluster == 2) compute_tiles<Variant>(p);
}
