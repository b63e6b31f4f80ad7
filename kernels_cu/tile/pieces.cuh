// How decode_sm80.cu shares out its work. A key head's queries, of all heads that share it, are cut into row tiles of
// kTileRows; the key tiles that a row tile sees are cut into pieces, each computed by one block; combine.cu puts the
// pieces of a row together. Two ways to cut:
//
//   fixed   piece s has the keys [s split_size, (s + 1) split_size): its result depends on nothing else in the batch
//   even    a row tile counts as many units as causal, window and length let it see key tiles; what a mask_mod leaves of
//           them is not asked here, a tile that it leaves nothing of counts and costs nothing. The units of all row tiles, end to end in the order of
//           sequence, key head, row and key, are cut into one share a block, all alike but for one unit: a block has
//           whole row tiles and, at either end, a piece of one. decode_plan.cu counts units, on the device
//
// What a row's first piece gives is kept in a line of its own, what later ones give in lines of their piece: with even
// shares a block has at most one such, the first in its share.
#pragma once
#include <base.cuh>
#include <hw/device.cuh>
#include <hw/math.cuh>
#include <hw/warp.cuh>
#include <tile/mask.cuh>
#include <tile/sequence.cuh>

constexpr i32 kTileRows = 64;

template <class Params>
HW_DEVICE i32 rows_of(const Params& p, const Sequence& seq) {
  return seq.q_len * p.head_group;
}

// Keys of the row tile that begins at row `first`.
template <class Params>
HW_DEVICE TileInterval keys_of_rows(const Params& p, const Sequence& seq, i32 first) {
  const i32 last = min_of(first + kTileRows, rows_of(p, seq)) - 1;
  return interval_of_tile(seq.diagonal() + first / p.head_group, seq.diagonal() + last / p.head_group, p.window_left,
                          p.window_right, seq.k_len);
}

// Units that each row tile of a sequence counts: the key tiles it sees, exactly where there is one row tile; where there
// are more, as many as any of them may see, so that a unit's row tile is found by a division.
template <class Params>
HW_DEVICE i32 units_of_rows(const Params& p, const Sequence& seq) {
  const i32 rows = rows_of(p, seq);
  if (rows <= 0 || seq.k_len <= 0) return 0;
  if (rows <= kTileRows) {
    const Interval keys = keys_of_rows(p, seq, 0).any;
    return keys.begin < keys.end ? ceil_div(keys.end, p.block_k) - keys.begin / p.block_k : 0;
  }
  const i32 queries = (kTileRows - 2) / p.head_group + 2;  // that a row tile may have rows of
  const i32 keys = min_of(p.window_left, seq.k_len) + min_of(p.window_right, seq.k_len) + queries;
  return min_of(ceil_div(keys - 1, p.block_k) + 1, ceil_div(seq.k_len, p.block_k));
}

// Units of a whole sequence.
template <class Params>
HW_DEVICE i64 units_of_sequence(const Params& p, const Sequence& seq) {
  return static_cast<i64>(units_of_rows(p, seq)) * ceil_div(rows_of(p, seq), kTileRows) * p.heads_kv;
}

// The even shares: share i has the units from begin(i) to begin(i + 1), at least one.
struct Shares {
  i64 units, count;

  HW_DEVICE i64 begin(i64 share) const { return share * units / count; }
  HW_DEVICE i32 share_of(i64 unit) const { return static_cast<i32>(((unit + 1) * count - 1) / units); }
};

template <class Params>
HW_DEVICE Shares read_shares(const Params& p) {
  const i64 units = hw::load_global(p.unit_begin + p.batch);
  return {units, min_of(static_cast<i64>(p.blocks), units)};
}

// The sequence that a unit is of. Every warp finds it for itself, 32 probes a step.
template <class Params>
HW_DEVICE i32 sequence_of_unit(const Params& p, i64 unit) {
  i32 low = 0, high = p.batch;  // unit_begin[low] <= unit < unit_begin[high]
  while (high - low > 1) {
    const i32 step = ceil_div(high - low, 33);
    const i32 probe = low + (hw::lane_idx() + 1) * step;
    const bool at_or_before = probe < high && hw::load_global(p.unit_begin + probe) <= unit;
    const i32 passed = hw::popcount(hw::ballot(at_or_before));
    high = min_of(high, low + (passed + 1) * step);
    low += passed * step;
  }
  return low;
}

// The line of piece 0 of a row in partial_out, partial_sum and partial_max.
template <class Params>
HW_DEVICE i64 line_of_row(const Params& p, const Sequence& seq, i32 head, i32 query) {
  return head * p.partial_rows + seq.dense_idx * static_cast<i64>(p.q_len) + seq.q_begin + query;
}

// What one block computes at a time.
struct Piece {
  i32 sequence, head_kv;
  i32 first;                 // row
  i32 tile_begin, tile_end;  // key tiles, of which its rows may see some
  i64 lines;                 // lines before its first
  bool by_row;               // whether they are counted as those of piece 0, or from the row tile's first row
};

// The next piece of this block; false: there is none. `done`: 0 at first; what of its share the block has gone through.
template <class Params>
HW_DEVICE bool next_piece(const Params& p, i32& done, Piece& piece) {
  if (p.split_size > 0) {
    const i32 part = hw::block_idx_x() % p.splits;
    piece.sequence = hw::block_idx_z();
    piece.head_kv = hw::block_idx_y();
    piece.first = (hw::block_idx_x() + done) / p.splits * kTileRows;
    done += hw::grid_dim_x();
    piece.tile_begin = part * (p.split_size / p.block_k);
    piece.tile_end = piece.tile_begin + p.split_size / p.block_k;
    piece.lines = static_cast<i64>(part) * p.heads_kv * p.head_group * p.partial_rows;
    piece.by_row = true;
    const Sequence seq = read_sequence<true>(p, piece.sequence);
    return piece.first < rows_of(p, seq) && part * p.split_size < seq.k_len;
  }
  const Shares shares = read_shares(p);
  if (hw::block_idx_x() >= shares.count) return false;
  const i64 unit = shares.begin(hw::block_idx_x()) + done;
  const i64 left = shares.begin(hw::block_idx_x() + 1) - unit;
  if (left <= 0) return false;
  piece.sequence = sequence_of_unit(p, unit);
  const Sequence seq = read_sequence<true>(p, piece.sequence);
  const i32 each = units_of_rows(p, seq);
  const i64 in_sequence = unit - hw::load_global(p.unit_begin + piece.sequence);
  const i32 tile = static_cast<i32>(in_sequence / each), skip = static_cast<i32>(in_sequence % each);
  const i32 tiles = ceil_div(rows_of(p, seq), kTileRows);
  piece.head_kv = tile / tiles;
  piece.first = tile % tiles * kTileRows;
  piece.tile_begin = keys_of_rows(p, seq, piece.first).any.begin / p.block_k + skip;
  piece.tile_end = piece.tile_begin + static_cast<i32>(min_of(static_cast<i64>(each - skip), left));
  done += piece.tile_end - piece.tile_begin;
  piece.by_row = skip == 0;
  const i64 rows = static_cast<i64>(p.heads_kv) * p.head_group * p.partial_rows;
  piece.lines = piece.by_row ? 0 : rows + static_cast<i64>(hw::block_idx_x()) * kTileRows;
  return true;
}

// The pieces of one row: piece 0 in the line `own`, piece s in line base + s step.
struct RowPieces {
  i32 count = 0;
  i64 own = 0, base = 0, step = 0;
};

template <class Params>
HW_DEVICE RowPieces pieces_of_row(const Params& p, i32 sequence, const Sequence& seq, i32 head, i32 query) {
  RowPieces pieces;
  const i64 lines = static_cast<i64>(p.heads_kv) * p.head_group * p.partial_rows;
  pieces.own = line_of_row(p, seq, head, query);
  if (p.split_size > 0) {
    pieces.count = ceil_div(seq.k_len, p.split_size);
    pieces.base = pieces.own;
    pieces.step = lines;
    return pieces;
  }
  const i32 each = units_of_rows(p, seq);
  if (each == 0) return pieces;
  const i32 row = query * p.head_group + head % p.head_group;
  const i32 tile = head / p.head_group * ceil_div(rows_of(p, seq), kTileRows) + row / kTileRows;
  const i64 unit = hw::load_global(p.unit_begin + sequence) + static_cast<i64>(tile) * each;
  const Shares shares = read_shares(p);
  const i32 share = shares.share_of(unit);
  pieces.count = shares.share_of(unit + each - 1) - share + 1;
  pieces.base = lines + static_cast<i64>(share) * kTileRows + row % kTileRows;
  pieces.step = kTileRows;
  return pieces;
}
