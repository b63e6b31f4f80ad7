// Keys in pages: slot j of sequence b is row j % page_size of page page_table[b, j / page_size], and its key i is in slot
// i, or cache_leftpad[b] + i. A tile's rows may lie in as many pages as it has rows, so every thread looks up the page of
// each row it copies. (Kwon et al. 2023, "Efficient
// Memory Management for Large Language Model Serving with PagedAttention")
#pragma once
#include <base.cuh>
#include <hw/device.cuh>
#include <tile/sequence.cuh>
#include <tile/shared_tile.cuh>

// row / page_size for 0 <= row < 2^31, by the multiplier ceil(2^(31 + shift) / page_size) of the host, shift being
// ceil(log2 page_size): the error, below 2^-shift and so below 1 / page_size, never reaches the next whole number.
HW_DEVICE i32 page_of_row(i32 row, u32 multiplier, i32 shift) {
  return static_cast<i32>(static_cast<u32>((static_cast<u64>(static_cast<u32>(row) * 2) * multiplier) >> 32) >> shift);
}

// A RowLoader whose rows are found by the page table of one sequence; `load` is called alike. What is not a thread's own
// stays in the params, which cost no register.
template <class Params, class Tile, i32 kRows, i32 kThreads, i32 kLoadBytes>
struct PagedRowLoader {
  using Rows = RowLoader<Tile, kRows, kThreads, kLoadBytes>;
  static constexpr i32 kSteps = kRows / Rows::kRowStep;
  static_assert(Rows::kRowStep % 8 == 0, "a thread's rows have the same key");

  const Params& p;
  i32 sequence;
  const u8* source;  // this thread's first unit of page 0's row 0
  u32 address;       // where its unit of the tile's row 0 goes
  i64 page_stride;

  // The slot of the sequence's first key. NOTE: asked for at every tile: kept, it would cost a register.
  HW_DEVICE i32 leftpad() const { return p.cache_leftpad == nullptr ? 0 : hw::load_global(p.cache_leftpad + sequence); }

  HW_DEVICE PagedRowLoader(const Params& params, i32 sequence_, u32 tile, const u8* first, i64 page_stride_)
      : p(params), sequence(sequence_), source(first + Rows::first_unit() * 16),
        address(Tile::address(tile, Rows::first_row(), Rows::first_unit())), page_stride(page_stride_) {}

  // Entries of the table past the page of key `rows - 1` are not read.
  HW_DEVICE void load(i32 begin, i32 rows, i32 row_bytes, i64 stride, u32 stage = 0) const {
    if (kThreads / Rows::kGroup > kRows && Rows::first_row() >= kRows) return;
    const i32* table = p.page_table + sequence * p.page_table_stride;
    const i32 pad = leftpad(), slots = rows + pad;
    const auto slot_of = [&](i32 step) { return begin + pad + Rows::first_row() + step * Rows::kRowStep; };
    const auto look_up = [&](i32 slot) {
      return slot < slots ? hw::load_global(table + page_of_row(slot, p.page_multiplier, p.page_shift)) : 0;
    };
    const auto copy_row = [&](i32 step, i32 page) {
      const i32 slot = slot_of(step);
      const i32 in_page = slot - page_of_row(slot, p.page_multiplier, p.page_shift) * p.page_size;
      const u8* from = source + page * page_stride + in_page * stride;
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

// What copies tiles of a sequence's keys, or values, of one head: array, and a stride in bytes from page to page where
// there are pages, from sequence to sequence where there are none (0 in the packed layout). kRolled: see RowLoader.
template <class V, class Tile, bool kRolled = false, class Params>
HW_DEVICE auto key_loader(const Params& p, const Sequence& seq, i32 sequence, u32 tile, const void* array,
                          i64 stride_batch, i64 stride_row, i64 head_offset) {
  const u8* head = static_cast<const u8*>(array) + head_offset;
  if constexpr (V::kPaged) {
    return PagedRowLoader<Params, Tile, V::kBlockK, V::kThreads, V::kLoadBytes>(p, sequence, tile, head, stride_batch);
  } else {
    return RowLoader<Tile, V::kBlockK, V::kThreads, V::kLoadBytes, kRolled>(
        tile, at_row(head, seq, stride_batch, seq.k_begin, stride_row), stride_row);
  }
}
