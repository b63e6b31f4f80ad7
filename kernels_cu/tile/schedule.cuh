// Which tiles a block computes: tiles of query rows, or, where keys are held, of keys. Two grids:
//   (tile, head, sequence)  block x starts at tile x and strides by gridDim.x, so that no hint of the longest length can
//                           lose a row; packed arrays have one more slice in z for the rows behind the last sequence
//   (slot, head)            sequence b owns the slots from slot_begin(b) = cu_seqlens[b] / block + b: a monotone
//                           function of b that leaves each sequence at least as many slots as it has tiles, so a block
//                           finds its own by searching cu_seqlens, and the host needs only the total to know the grid
#pragma once
#include <base.cuh>
#include <hw/device.cuh>
#include <hw/math.cuh>
#include <hw/warp.cuh>
#include <tile/sequence.cuh>

struct TileRange {
  i32 sequence;  // 0..batch
  i32 first;     // first tile, counted from the end of the sequence: under a causal mask the long ones go first
};

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

// block: rows of a tile.
HW_DEVICE TileRange tiles_of_block(const i32* cu_seqlens, i32 rows, i32 batch, bool packed_grid, i32 block) {
  if (!packed_grid) return {hw::block_idx_z(), hw::block_idx_x()};
  const i32 slot = hw::block_idx_x();
  TileRange range;
  range.sequence =
      cu_seqlens == nullptr ? slot / ceil_div(rows, block) : find_sequence(cu_seqlens, batch, slot, block);
  range.first = slot - slot_begin(cu_seqlens, rows, range.sequence, block);
  return range;
}

// From one of a block's tiles to its next. A slot is one tile.
HW_DEVICE i32 tile_step(bool packed_grid) { return packed_grid ? 1 << 30 : hw::grid_dim_x(); }
