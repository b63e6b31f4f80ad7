// Tiles in chunks (tile/descriptor.cuh) in shared memory: rows brought by tensor copies, and rows cleared.
#pragma once
#include <base.cuh>
#include <hw/device.cuh>
#include <hw/tma.cuh>

// Rows of a tensor, chunk by chunk; the caller announces kRows x kHeadDim elements.
template <class Chunk, i32 kHeadDim, i32 kRows>
HW_DEVICE void load_rows(u32 to, const TensorMap& map, u32 mbarrier, hw::CachePolicy policy, i32 head, i32 row,
                         i32 batch) {
  HW_UNROLL
  for (i32 column = 0; column < kHeadDim; column += Chunk::kElements) {
    hw::tma_load(to + static_cast<u32>(column * kRows * 2), map, mbarrier, policy, column, head, row, batch);
  }
}

// Zeros in those of a tile's rows from `first` on that `is_wanted` says, by threads 0 <= thread < kThreads.
template <class Chunk, i32 kHeadDim, i32 kRows, i32 kThreads, class IsWanted>
HW_DEVICE void clear_rows_if(u32 tile, i32 first, i32 thread, const IsWanted& is_wanted) {
  constexpr i32 kUnits = kHeadDim / 8;
  for (i32 i = thread; i < (kRows - first) * kUnits; i += kThreads) {
    const i32 row = first + i / kUnits, unit = i % kUnits, chunk = unit / Chunk::kUnits * kRows * Chunk::kBytes;
    if (is_wanted(row)) {
      hw::store_shared(tile + static_cast<u32>(chunk) + Chunk::unit_at(row, unit % Chunk::kUnits), u32x4{{0, 0, 0, 0}});
    }
  }
}

// In all of them.
template <class Chunk, i32 kHeadDim, i32 kRows, i32 kThreads>
HW_DEVICE void clear_rows(u32 tile, i32 first, i32 thread) {
  clear_rows_if<Chunk, kHeadDim, kRows, kThreads>(tile, first, thread, [](i32) { return true; });
}
