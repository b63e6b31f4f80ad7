// Keys in pages: slot j of sequence b is row j % page_size of page page_table[b, j / page_size], and its key i is in slot
// i, or cache_leftpad[b] + i. A tile's rows may lie in as many pages as it has rows, so every thread looks up the page of
// each row it copies. (Kwon et al. 2023, "Efficient
// Memory Management for Large Language Model Serving with PagedAttention")
#pragma once
#include <base.cuh>
#include <hw/async_copy.cuh>
#include <hw/device.cuh>
#include <hw/math.cuh>
#include <hw/warp.cuh>
#include <tile/arithmetic.cuh>
#include <tile/sequence.cuh>
#include <tile/shared_tile.cuh>

// row / page_size.
HW_DEVICE i32 page_of_row(i32 row, u32 multiplier, i32 shift) {
  return static_cast<i32>(quotient(static_cast<u32>(row), multiplier, shift));
}

// The slot of a sequence's first key. NOTE: asked for at every tile: kept, it would cost a register.
template <class Params>
HW_DEVICE i32 leftpad(const Params& p, i32 sequence) {
  return p.cache_leftpad == nullptr ? 0 : hw::load_global(p.cache_leftpad + sequence);
}

// The page of a slot, of `slots` in use; -1 for those behind, of which no entry is read.
template <class Params>
HW_DEVICE i32 look_up_page(const Params& p, i32 sequence, i32 slot, i32 slots) {
  const i32* table = p.page_table + sequence * p.page_table_stride;
  return slot < slots ? hw::load_global(table + page_of_row(slot, p.page_multiplier, p.page_shift)) : -1;
}

// Where it lies in that page.
template <class Params>
HW_DEVICE i32 row_in_page(const Params& p, i32 slot) {
  return slot - page_of_row(slot, p.page_multiplier, p.page_shift) * p.page_size;
}

// A RowLoader whose rows are found by the page table of one sequence; `load` is called alike. What is not a thread's own
// stays in the params, which cost no register.
template <class Params, class Tile, i32 kRows, i32 kThreads, i32 kLoadBytes, bool kWhole>
struct PagedRowLoader {
  using Rows = RowLoader<Tile, kRows, kThreads, kLoadBytes, false, kWhole>;
  static constexpr i32 kSteps = kRows / Rows::kRowStep;
  static_assert(Rows::kRowStep % 8 == 0, "a thread's rows have the same key");

  const Params& p;
  i32 sequence;
  const u8* source;  // this thread's first unit of page 0's row 0
  u32 address;       // where its unit of the tile's row 0 goes
  i64 page_stride;

  HW_DEVICE PagedRowLoader(const Params& params, i32 sequence_, u32 tile, const u8* first, i64 page_stride_)
      : p(params), sequence(sequence_), source(first + Rows::first_unit() * 16),
        address(Tile::address(tile, Rows::first_row(), Rows::first_unit())), page_stride(page_stride_) {}

  // Entries of the table past the page of key `rows - 1` are not read.
  HW_DEVICE void load(i32 begin, i32 rows, i32 row_bytes, i64 stride, u32 stage = 0) const {
    if (kThreads / Rows::kGroup > kRows && Rows::first_row() >= kRows) return;
    const i32 pad = leftpad(p, sequence), slots = rows + pad;
    const auto slot_of = [&](i32 step) { return begin + pad + Rows::first_row() + step * Rows::kRowStep; };
    const auto look_up = [&](i32 slot) { return look_up_page(p, sequence, slot, slots); };
    const auto copy_row = [&](i32 step, i32 page) {
      const i32 slot = slot_of(step);
      const u8* from = source + page * page_stride + row_in_page(p, slot) * stride;
      const auto copy_group = [&](i32 group) {
        const i32 left = slot < slots ? row_bytes - (Rows::first_unit() + group * Rows::kGroup) * 16 : 0;
        const u32 to = address + stage + static_cast<u32>(step * Rows::kRowStep * Tile::kRowBytes + group * Rows::kGroup * 16);
        Rows::copy_unit(to, from + group * Rows::kGroup * 16, left);
      };
      if constexpr (Tile::kRowBytes < 1024) {
        HW_UNROLL
        for (i32 group = 0; group < Tile::kUnits / Rows::kGroup; ++group) copy_group(group);
      } else {
        // NOTE: unrolled, float32 with head dim 256 spills on compute capability 10.0.
        HW_NO_UNROLL
        for (i32 group = 0; group < Tile::kUnits / Rows::kGroup; ++group) copy_group(group);
      }
    };
    if constexpr (kLoadBytes == 16) {
      // All pages before any copy: nothing moves across a copy, and one look-up at a time would be waited for.
      i32 pages[kSteps];
      HW_UNROLL
      for (i32 step = 0; step < kSteps; ++step) pages[step] = look_up(slot_of(step));
      HW_UNROLL
      for (i32 step = 0; step < kSteps; ++step) copy_row(step, pages[step]);
    } else {
      HW_NO_UNROLL
      for (i32 step = 0; step < kSteps; ++step) copy_row(step, look_up(slot_of(step)));
    }
  }
};

// By a warp, for the tile of kRows keys from `begin` on, of `keys` in all, whose rows lie in pages p.page_rows at a time:
// copy(row of the tile, page, row of the page) by one lane for each of them; the page is -1 where no key is left.
template <i32 kRows, class Params, class Copy>
HW_DEVICE void for_each_page(const Params& p, i32 sequence, i32 begin, i32 keys, const Copy& copy) {
  const i32 row = hw::lane_idx() * p.page_rows, slot = begin + row;
  if (row >= kRows) return;
  copy(row, look_up_page(p, sequence, slot, keys), row_in_page(p, slot));
}

// By a warp, of such a tile every row on its own, by cp.async (the caller commits and waits), into chunks of kRows rows
// (tile/descriptor.cuh). source: page 0's row 0; row_bytes: of a row, a multiple of 16, at most kHeadDim elements. Rows behind the last key
// become zeros. NOTE: unrolled, it needs more registers than its warp has in forward_sm90.cu, and where that warp spills the
// compiler finds other registers for the consumers, too, who then spill as well.
template <class Chunk, i32 kHeadDim, i32 kRows, class Params>
HW_DEVICE void gather_rows(const Params& p, i32 sequence, u32 to, const u8* source, i64 page_stride, i64 row_stride,
                           i32 row_bytes, i32 begin, i32 keys) {
  const i32 lane = hw::lane_idx(), unit = lane % Chunk::kUnits;
  const i32 pad = leftpad(p, sequence), slots = min_of(keys, begin + kRows) + pad;
  HW_NO_UNROLL
  for (i32 first = 0; first < kRows; first += 32) {
    // Each lane looks up the page of a row.
    const i32 slot = begin + pad + first + lane;
    const i32 page = look_up_page(p, sequence, slot, slots);
    const i32 in_page = row_in_page(p, slot);
    HW_NO_UNROLL
    for (i32 i = 0; i < (kRows % 32 == 0 ? 32 : min_of(32, kRows - first)); i += 32 / Chunk::kUnits) {
      const i32 own = i + lane / Chunk::kUnits;
      const i32 found = hw::shfl(page, own);
      const u64 of = static_cast<u32>(found), at = static_cast<u32>(hw::shfl(in_page, own));
      const u8* from = source + of * static_cast<u64>(page_stride) + at * static_cast<u64>(row_stride) + unit * 16;
      HW_UNROLL
      for (i32 chunk = 0; chunk < kHeadDim / Chunk::kElements; ++chunk) {
        const i32 left = found < 0 ? 0 : row_bytes - chunk * Chunk::kBytes - unit * 16;
        hw::cp_async_16(to + static_cast<u32>(chunk * kRows * Chunk::kBytes) + Chunk::unit_at(first + own, unit),
                        from + chunk * Chunk::kBytes, left > 0 ? 16 : 0);
      }
    }
  }
}

// What copies tiles of a sequence's keys, or values, of one head: array, and a stride in bytes from page to page where
// there are pages, from sequence to sequence where there are none (0 in the packed layout). kRolled: see RowLoader.
template <class V, class Tile, bool kRolled = false, class Params>
HW_DEVICE auto key_loader(const Params& p, const Sequence& seq, i32 sequence, u32 tile, const void* array,
                          i64 stride_batch, i64 stride_row, i64 head_offset) {
  const u8* head = static_cast<const u8*>(array) + head_offset;
  constexpr bool kWhole = Tile::kRowBytes < 768;  // wider tiles spill on compute capability 10.0
  if constexpr (V::kPaged) {
    return PagedRowLoader<Params, Tile, V::kBlockK, V::kThreads, V::kLoadBytes, kWhole>(p, sequence, tile, head,
                                                                                                stride_batch);
  } else {
    return RowLoader<Tile, V::kBlockK, V::kThreads, V::kLoadBytes, kRolled, kWhole>(
        tile, at_row(head, seq, stride_batch, seq.k_begin, stride_row), stride_row);
  }
}
