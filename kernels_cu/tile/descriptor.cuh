// Tiles of 16-bit elements as wgmma reads them and tensor copies write them: chunks of kBytes a row, swizzled.
//
// A chunk has rows of kBytes (128, 64, 32: kElements elements), one after the other, from an address that is a multiple
// of 8 kBytes; 16-byte units are exchanged within a row by the row's number. A tile wider than a chunk is several, one
// complete after the other. One box of a tensor copy with that swizzle writes one chunk.
//   K-major   the rows are those of a (columns of b), the elements of a row lie along k
//   MN-major  the rows are those of k, the elements of a row lie across it: v [keys, d] as b
// (PTX ISA, "Matrix Descriptor Format" and "Swizzling Modes")
#pragma once
#include <base.cuh>
#include <hw/wgmma.cuh>

template <i32 kSwizzleBytes>
struct Chunk {
  static_assert(kSwizzleBytes == 128 || kSwizzleBytes == 64 || kSwizzleBytes == 32, "a swizzle: 128, 64 or 32 bytes");
  static constexpr i32 kBytes = kSwizzleBytes, kElements = kBytes / 2, kUnits = kBytes / 16;
  static constexpr i32 kAlignment = 8 * kBytes;
  // The upper word of a descriptor: bytes from 8 rows to the next 8, and the mode. A constant: the lower one changes.
  static constexpr u32 kHigh = (kAlignment >> 4) | (kBytes == 128 ? 1u : kBytes == 64 ? 2u : 3u) << 30;

  // Where 16-byte unit `unit` of row `row` lies, from the chunk's beginning.
  HW_DEVICE static u32 unit_at(i32 row, i32 unit) {
    return static_cast<u32>(row * kBytes + ((unit ^ (row * kBytes >> 7)) & (kUnits - 1)) * 16);
  }

  // 16 elements of k from element `k` of the rows from `address` on (a multiple of 8 rows into the chunk).
  HW_DEVICE static u64 k_major(u32 address, i32 k) {
    return hw::wgmma_descriptor(((address + static_cast<u32>(k) * 2) >> 4) | 1u << 16, kHigh);
  }

  // 16 rows of k from row `k` on; `rows` is how many a chunk has: the next chunk, across, lies behind them.
  HW_DEVICE static u64 mn_major(u32 address, i32 k, i32 rows) {
    const u32 begin = address + static_cast<u32>(k * kBytes);
    return hw::wgmma_descriptor((begin >> 4) | static_cast<u32>(rows * kBytes >> 4) << 16, kHigh);
  }
};
