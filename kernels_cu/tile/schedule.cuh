// Which query tiles a block computes. Two grids:
//   (query block, head, sequence)  block x starts at tile x and strides by gridDim.x, so that no hint of the longest
//                                  length can lose a row; packed arrays have one more slice in z for the rows behind
//                                  the last sequence
//   (slot, head)                   sequence b owns the slots from slot_begin(b) = cu_seqlens_q[b] / kBlockQ + b: a
//                                  monotone function of b that leaves each sequence at least as many slots as it has
//                                  tiles, so a block finds its own by searching cu_seqlens_q, and the host needs only
//                                  the total to know the grid
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

template <i32 kBlockQ, class Params>
HW_DEVICE i32 tiles_of_sequence(const Params& p, i32 sequence) {
  return ceil_div(read_sequence(p, sequence).q_rows, kBlockQ);
}

// From one of a block's tiles to its next. A slot is one tile.
template <class Params>
HW_DEVICE i32 tile_step(const Params& p) {
  return p.packed_grid ? 1 << 30 : hw::grid_dim_x();
}

// The largest b in [0, batch] with slot_begin(b) <= slot. Every warp of the block finds it for itself, 32 probes a step.
template <i32 kBlockQ>
HW_DEVICE i32 find_sequence(const i32* cu_seqlens, i32 batch, i32 slot) {
  i32 low = 0, high = batch;
  while (low < high) {
    const i32 step = ceil_div(high - low, 32);
    const i32 probe = low + (hw::lane_idx() + 1) * step;
    bool at_or_before = false;
    if (probe <= high) at_or_before = hw::load_global(cu_seqlens + probe) / kBlockQ + probe <= slot;
    const i32 passed = hw::popcount(hw::ballot(at_or_before));
    low += passed * step;
    high = min_of(high, low + step - 1);
  }
  return low;
}

template <i32 kBlockQ, class Params>
HW_DEVICE TileRange tiles_of_block(const Params& p) {
  TileRange range;
  if (!p.packed_grid) {
    range.sequence = hw::block_idx_z();
    range.first = hw::block_idx_x();
    return range;
  }
  const i32 slot = hw::block_idx_x();
  if (p.cu_seqlens_q != nullptr) {
    range.sequence = find_sequence<kBlockQ>(p.cu_seqlens_q, p.batch, slot);
    range.first = slot - (hw::load_global(p.cu_seqlens_q + range.sequence) / kBlockQ + range.sequence);
  } else {
    const i32 tiles = ceil_div(p.q_len, kBlockQ);
    range.sequence = slot / tiles;
    range.first = slot - range.sequence * tiles;
  }
  return range;
}
