// Which tiles a block computes: tiles of query rows, or, where keys are held, of keys. Sequence and head of a block, and
// how many heads there are, are said here alone. Two grids:
//   (tile, head, sequence)  block x starts at tile x and strides by gridDim.x, so that no hint of the longest length can
//                           lose a row; packed arrays have one more slice in z for the rows behind the last sequence
//   (slot, head)            sequence b owns the slots from slot_begin(b) = cu_seqlens[b] / block + b: a monotone
//                           function of b that leaves each sequence at least as many slots as it has tiles, so a block
//                           finds its own by searching cu_seqlens, and the host needs only the total to know the grid
//
// Blocks start in the grid's order, x first. Where tiles differ in length the long ones go first, so that the short ones
// fill the end: of each group of (sequence, head) pairs, whose keys and values stay in the second-level cache, all first
// tiles, then all second ones. So a block takes the place that its rank has in that order (params/order.cuh).
#pragma once
#include <base.cuh>
#include <hw/device.cuh>
#include <hw/math.cuh>
#include <hw/warp.cuh>
#include <params/order.cuh>
#include <tile/arithmetic.cuh>
#include <tile/sequence.cuh>

struct TileRange {
  i32 sequence;  // 0..batch
  i32 first;     // the first tile's number: `from_end` has where it lies
};

struct BlockPlace {
  i32 tile, head, sequence;
};

// The place in order of the block that comes `line` * tiles + `tile`-th, of a grid of `tiles` for each of so many heads.
HW_DEVICE BlockPlace place_in_order(const Order& order, u32 tile, u32 line, u32 tiles, u32 heads) {
  if (order.pairs > 0) {
    // As many lines as pairs: a group of pairs has the blocks of its lines.
    const bool full = line < static_cast<u32>(order.full);
    const u32 pairs = static_cast<u32>(full ? order.pairs : order.rest);
    const u32 multiplier = full ? order.pairs_multiplier : order.rest_multiplier;
    const i32 shift = full ? order.pairs_shift : order.rest_shift;
    const u32 before = full ? 0 : static_cast<u32>(order.full);
    const u32 group = before + quotient(line - before, multiplier, shift) * pairs;
    const u32 rank = (line - group) * tiles + tile;
    tile = quotient(rank, multiplier, shift);
    line = group + rank - tile * pairs;
  }
  const u32 sequence = quotient(line, order.heads_multiplier, order.heads_shift);
  return {static_cast<i32>(tile), static_cast<i32>(line - sequence * heads), static_cast<i32>(sequence)};
}

// Heads, or what else of them the grid counts in y.
HW_DEVICE i32 heads_of_grid() { return hw::grid_dim_y(); }

// kOrdered: false where the host never gives an order, as for clusters.
// NOTE: worked out at each call: what is called for again behind a loop is not kept through it.
template <bool kOrdered = true>
HW_DEVICE BlockPlace place_of_block(const Order& order) {
  const i32 x = hw::anew(hw::block_idx_x()), y = hw::block_idx_y(), z = hw::block_idx_z();
  if (!kOrdered || order.pairs == 0) return {x, y, z};
  return place_in_order(order, static_cast<u32>(x), static_cast<u32>(z * heads_of_grid() + y),
                        static_cast<u32>(hw::grid_dim_x()), static_cast<u32>(heads_of_grid()));
}

// What y of the grid counts, of this block.
template <bool kOrdered = true, class Params>
HW_DEVICE i32 head_of_block(const Params& p) {
  return place_of_block<kOrdered>(p.order).head;
}

// Where a sequence's tile number i of so many lies, counted from its end.
template <bool kOrdered = true>
HW_DEVICE i32 from_end(const Order& order, i32 i, i32 tiles) {
  return kOrdered && order.from_begin ? tiles - 1 - i : i;
}

// The largest b in [0, batch] with slot_begin(b) <= slot. Every warp of the block finds it for itself, 32 probes a step.
HW_DEVICE i32 find_sequence(const i32* cu_seqlens, i32 batch, i32 slot, i32 block) {
  i32 low = 0, high = batch;
  while (low < high) {
    const i32 step = ceil_div(high - low, 32);
    const i32 probe = low + (hw::lane_idx() + 1) * step;
    bool at_or_before = false;
    if (probe <= high) at_or_before = hw::load_global(cu_seqlens + probe) / block + probe <= slot;
    const i32 passed = hw::popcount(hw::ballot(at_or_before));
    low += passed * step;
    high = min_of(high, low + step - 1);
  }
  return low;
}

// The first slot of a sequence. rows: of each sequence, in the dense layout.
HW_DEVICE i32 slot_begin(const i32* cu_seqlens, i32 rows, i32 sequence, i32 block) {
  if (cu_seqlens == nullptr) return sequence * ceil_div(rows, block);
  return hw::load_global(cu_seqlens + sequence) / block + sequence;
}

// block: rows of a tile. cu_seqlens, rows: of the side that tiles are of.
template <bool kOrdered = true, class Params>
HW_DEVICE TileRange tiles_of_block(const Params& p, const i32* cu_seqlens, i32 rows, i32 block) {
  const BlockPlace place = place_of_block<kOrdered>(p.order);
  if (!p.packed_grid) return {place.sequence, place.tile};
  const i32 slot = place.tile;
  TileRange range;
  range.sequence =
      cu_seqlens == nullptr ? slot / ceil_div(rows, block) : find_sequence(cu_seqlens, p.batch, slot, block);
  range.first = slot - slot_begin(cu_seqlens, rows, range.sequence, block);
  return range;
}

// From one of a block's tiles to its next. A slot is one tile.
HW_DEVICE i32 tile_step(bool packed_grid) { return packed_grid ? 1 << 30 : hw::grid_dim_x(); }

// Every tile of a block: use(its number counted from the end of the sequence), and between two of them `between`. tiles():
// how many the sequence has.
// NOTE: they are asked for again each time: kept, they would cost a register in the loops of `use`.
template <bool kOrdered = true, class Params, class Tiles, class Between, class Use>
HW_DEVICE void for_each_tile_of(const Params& p, i32 first, const Tiles& tiles, const Between& between, const Use& use) {
  for (i32 i = first; i < tiles(); i += tile_step(p.packed_grid)) {
    if (i > first) between();
    use(from_end<kOrdered>(p.order, i, tiles()));
  }
}
