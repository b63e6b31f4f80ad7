// In which order the blocks of a grid compute tiles (tile/schedule.cuh), as the host has chosen it (cuflash/ops/order.py).
#pragma once
#include <base.cuh>

// A divisor's multiplier and shift: `quotient` of tile/arithmetic.cuh.
struct Order {
  i32 pairs;             // (sequence, head) pairs of a full group; 0: no groups, tiles are computed as the grid counts them
  u32 pairs_multiplier;
  i32 pairs_shift;
  i32 full;              // pairs of all full groups
  i32 rest;              // pairs of a group behind those
  u32 rest_multiplier;
  i32 rest_shift;
  u32 heads_multiplier;  // of the heads, or groups of heads, of a sequence
  i32 heads_shift;
  i32 from_begin;        // 1: a sequence's tiles are computed from the first to the last; 0: from the last to the first
};
