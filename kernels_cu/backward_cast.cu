// After a backward that added up dq by atomics: dq = scale dq_accum, rounded to its type. Also what dsink needs of each
// query row.
//
//   grid    (tile, head, sequence) or (slot, head) of the queries: tile/schedule.cuh
//   roles   every warp has 16 rows
//
//   shared  name   rows    row         bytes for d = 128, 16 bits
//           rows   kRows   kHeadDim    16 KB    dq is gathered here, each warp in its own rows
#include <base.cuh>
#include <hw/device.cuh>
#include <hw/math.cuh>
#include <hw/warp.cuh>
#include <params/backward.cuh>
#include <tile/fragment.cuh>
#include <tile/schedule.cuh>
#include <tile/score.cuh>
#include <tile/sequence.cuh>
#include <tile/shared_tile.cuh>
#include <tile/store.cuh>
#include <variant.cuh>

// How dq_accum has 16 rows (params/backward.cuh).
constexpr i32 kApart = 0;       // [d / 8, 4, 32]
constexpr i32 kSideBySide = 1;  // [d / 8, 32, 4]
constexpr i32 kTransposed = 2;  // [d / 16, 2, 32, 4]: blocks of 16 columns, as rows, and 8 queries

// Rounds the transposed sums and writes them where they belong in a tile of rows: two of 16 columns and 8 queries each make
// what a fragment has of two column tiles.
template <class Element, class Tile, class Dq>
HW_DEVICE void gather_transposed(Dq& dq, u32 tile) {
  static_assert(sizeof(Element) == 2, "of 16-bit elements");
  HW_UNROLL
  for (i32 c = 0; c < Dq::kColTiles; ++c) {
    HW_UNROLL
    for (i32 i = 0; i < 2; ++i) {
      const i32 unit = c / 2 * 2 + i, place = 2 * (hw::lane_idx() / 4);
      const i32 row = 8 * (c % 2) + Dq::first_col();
      const u32 pair = hw::pack2<Element>(dq.x[0][c][2 * i], dq.x[0][c][2 * i + 1]);
      hw::store_shared(Tile::address(tile, row, unit) + static_cast<u32>(place), static_cast<u16>(pair));
      hw::store_shared(Tile::address(tile, row + 1, unit) + static_cast<u32>(place), static_cast<u16>(pair >> 16));
    }
  }
}

template <class V>
HW_DEVICE void cast_tile(const BackwardParams& p, i32 sequence, i32 from_end) {
  using Element = typename V::Element;
  using Tile = SharedTile<V::kHeadDim * static_cast<i32>(sizeof(Element))>;
  using Dq = Fragment<1, V::kHeadDim / 8>;
  const i32 lane = hw::lane_idx(), warp = hw::warp_idx(), head = head_of_block(p);
  const Sequence seq = read_sequence(p, sequence);
  const i32 tile = ceil_div(seq.q_rows, V::kRows) - 1 - from_end;
  const i32 first = tile * V::kRows + 16 * warp;

  Dq dq;
  dq.fill(0.0f);
  if (first < seq.q_len) {
    const i64 block = head * p.dq_blocks + slot_begin(p.cu_seqlens_q, p.q_len, sequence, 16) + first / 16;
    const float* from = p.dq_accum + block * (V::kHeadDim / 8) * 128 + (V::kDqOrder == kApart ? lane : 4 * lane);
    HW_UNROLL
    for (i32 c = 0; c < Dq::kColTiles; ++c) {
      if constexpr (V::kDqOrder != kApart) {
        const u32x4 four = hw::load_global(reinterpret_cast<const u32x4*>(from + 128 * c));
        HW_UNROLL
        for (i32 i = 0; i < 4; ++i) dq.x[0][c][i] = hw::bits_float(four.x[i]);
      } else {
        HW_UNROLL
        for (i32 i = 0; i < 4; ++i) dq.x[0][c][i] = hw::load_global(from + 128 * c + 32 * i);
      }
    }
  }
  dq.for_each([&](float& x, i32, i32) { x *= p.scale; });
  u8* to = at_row(p.dq, seq, p.dq_stride_batch, seq.q_begin + first, p.dq_stride_row) + head * p.dq_stride_head;
  const u32 warp_tile = hw::smem_base() + static_cast<u32>(16 * warp * Tile::kRowBytes);
  const i32 used = seq.q_len - first, owned = seq.q_rows - first, row_bytes = p.head_dim * static_cast<i32>(sizeof(Element));
  if constexpr (V::kDqOrder == kTransposed) {
    gather_transposed<Element, Tile>(dq, warp_tile);
    store_gathered_at<Tile, V::kLoadBytes, 16, Tile::kUnits>(warp_tile, row_bytes, [&](i32 row, const auto& write) {
      if (row < owned) write(to + row * p.dq_stride_row, row >= used);
    });
  } else {
    store_rows<Element, Tile, V::kLoadBytes>(dq, warp_tile, to, p.dq_stride_row, used, owned, row_bytes);
  }

  // One partial sum a warp: backward_sum.cu adds them up.
  if (p.sink_partials == nullptr) return;
  float sink_sum = 0.0f;
  if (lane < 16 && first + lane < seq.q_len) {
    const i64 at = row_offset(seq, p.lse_stride_batch, seq.q_begin + first + lane, 1) + head * p.lse_stride_head;
    const float weight = sink_weight(read_sink<Element>(p, head), hw::load_global(p.lse + at));
    sink_sum = -weight * hw::load_global(p.delta + at);
  }
  HW_UNROLL
  for (i32 mask = 1; mask < 32; mask *= 2) sink_sum += hw::shfl_xor(sink_sum, mask);
  if (lane == 0) {
    const i64 slot = slot_begin(p.cu_seqlens_q, p.q_len, sequence, V::kRows) + tile;
    hw::store_global(p.sink_partials + head * p.partials + slot * (V::kThreads / 32) + warp, sink_sum);
  }
}

HW_KERNEL(Variant::kThreads) cuflash_backward_cast(HW_GRID_CONSTANT BackwardParams p) {
  using V = Variant;
  static_assert(V::kRows == V::kThreads / 2, "every warp has 16 rows");
  const TileRange range = tiles_of_block(p, p.cu_seqlens_q, p.q_len, V::kRows);
  for_each_tile_of(
      p, range.first, [&] { return ceil_div(read_sequence(p, range.sequence).q_rows, V::kRows); },
      // sync   rows free <-> this warp's lanes: the next tile may replace this one
      [] { hw::sync_warp(); }, [&](i32 from_end) { cast_tile<V>(p, range.sequence, from_end); });
}
