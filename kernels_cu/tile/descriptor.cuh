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

  // From the address of unit `unit` of a row to that of unit `unit ^ other`: one instruction, and no register to keep.
  HW_DEVICE static u32 other_unit(u32 address, i32 other) { return address ^ static_cast<u32>(16 * other); }

  // The part of a shared address that a descriptor has: 18 bits. In a cluster a block's memory begins at its rank << 24.
  // NOTE: what stands in the upper bits is added to it and not or-ed: shifted and added is one instruction.
  HW_DEVICE static u32 start(u32 address) { return (address & 0x3ffff) >> 4; }

  // The lower word of the descriptor of a tile at `address` (a multiple of 8 rows into it), K-major; and how much more
  // it is for the 16 elements from `k` on, where each chunk has `rows` rows: one addition of a constant a product. Pass
  // an address that changes at run time through hw::shfl, or every product moves its descriptors between registers.
  HW_DEVICE static u32 k_major(u32 address) { return start(address) + (1u << 16); }
  static constexpr u32 k_step(i32 k, i32 rows) {
    return static_cast<u32>(k / kElements * rows * kBytes + k % kElements * 2) >> 4;
  }

  // The same, MN-major: each chunk has `rows` rows of k; the 16 from row `k` on.
  HW_DEVICE static u32 mn_major(u32 address, i32 rows) {
    return start(address) + (static_cast<u32>(rows * kBytes >> 4) << 16);
  }
  static constexpr u32 mn_step(i32 k) { return static_cast<u32>(k * kBytes) >> 4; }

  HW_DEVICE static u64 descriptor(u32 low) { return hw::wgmma_descriptor(low, kHigh); }
};
