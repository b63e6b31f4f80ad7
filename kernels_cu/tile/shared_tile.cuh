// A tile of rows in shared memory, in units of 16 bytes that are exchanged within a row ("swizzled") so that the eight
// rows an ldmatrix reads at one unit, and the eight units a warp copies along one row, each cover all 32 banks.
#pragma once
#include <base.cuh>
#include <hw/async_copy.cuh>
#include <hw/device.cuh>
#include <hw/math.cuh>

// A row has kRowBytes, a multiple of 64. Unit u of a row stands at place u ^ (row % 8); where rows are an odd multiple of
// 64 bytes, two of them share the banks' 128 bytes and u ^ (row / 2 % 4) does. It also serves the 4-byte reads of tf32
// operands by column: there lane (g, t) reads rows 2 t and 2 t + 1, whose keys differ in whole pairs of units.
template <i32 kRowBytes_>
struct SharedTile {
  static constexpr i32 kRowBytes = kRowBytes_;
  static constexpr i32 kUnits = kRowBytes / 16;
  static_assert(kRowBytes % 64 == 0, "a row is a multiple of 64 bytes");

  // Units that change places among themselves: a key is below this.
  static constexpr i32 kPeriod = kRowBytes % 128 == 0 ? 8 : 4;

  // The same for rows that differ by a multiple of 8.
  HW_DEVICE static u32 key(i32 row) {
    if constexpr (kRowBytes % 128 == 0) return static_cast<u32>(row & 7);
    return static_cast<u32>((row >> 1) & 3);
  }

  HW_DEVICE static u32 address(u32 tile, i32 row, i32 unit) {
    return tile + static_cast<u32>(row * kRowBytes) + offset(unit, key(row));
  }

  // Of a unit within its row. NOTE: written so that a constant unit leaves few different values of the exchanged part;
  // one value a unit would be hoisted out of the key loop, a register each, and head dim 256 spills.
  HW_DEVICE static u32 offset(i32 unit, u32 flip) {
    constexpr i32 kInside = kPeriod - 1;
    return static_cast<u32>((unit & ~kInside) * 16) + ((static_cast<u32>(unit & kInside) ^ flip) << 4);
  }
};

// Addresses one lane gives to ldmatrix: its own row and unit are folded in once, then whole steps are constants.
template <class Tile>
struct LaneRows {
  u32 base;  // of the lane's row
  u32 flip;  // its unit offset and key

  // lane_row, lane_unit (0 or 1): what this lane adds to every block's row and unit.
  HW_DEVICE LaneRows(u32 tile, i32 lane_row, i32 lane_unit)
      : base(tile + static_cast<u32>(lane_row * Tile::kRowBytes)), flip(Tile::key(lane_row) ^ static_cast<u32>(lane_unit)) {}

  // row: a multiple of 8. unit: even.
  HW_DEVICE u32 at(i32 row, i32 unit) const {
    return base + static_cast<u32>(row * Tile::kRowBytes) + Tile::offset(unit, flip);
  }
};

// A warp's fragment, rounded to Element, into the tile's first rows and columns.
template <class Element, class Tile, class S>
HW_DEVICE void store_fragment(const S& s, u32 tile) {
  const i32 lane = hw::lane_idx();
  const LaneRows<Tile> rows(tile + static_cast<u32>(4 * (lane % 4)), lane / 4, 0);
  HW_UNROLL
  for (i32 i = 0; i < S::kRows; ++i) {
    HW_UNROLL
    for (i32 c = 0; c < S::kColTiles; ++c) {
      const float low = s.x[i / 2][c][2 * (i % 2)], high = s.x[i / 2][c][2 * (i % 2) + 1];
      if constexpr (sizeof(Element) == 2) {
        hw::store_shared(rows.at(8 * i, c), hw::pack2<Element>(low, high));
      } else {
        // Two neighbouring words of every lane: rows whose lanes meet in a unit take turns with them.
        const LaneRows<Tile> words(tile + static_cast<u32>(8 * (lane % 2)), lane / 4, lane / 2 % 2);
        const u32 at = words.at(8 * i, 2 * c);
        const u32 turn = 4 * (Tile::key(lane / 4) & 1);
        hw::store_shared(at + turn, turn == 0 ? low : high);
        hw::store_shared(at + (turn ^ 4), turn == 0 ? high : low);
      }
    }
  }
}

// 16 bytes of global memory through registers: those from `left` on are zeros and are not read.
template <i32 kLoadBytes>
HW_DEVICE u32x4 read_unit(const u8* from, i32 left) {
  if (kLoadBytes == 16 && left >= 16) return hw::load_global(reinterpret_cast<const u32x4*>(from));
  u32x4 unit;
  HW_UNROLL
  for (i32 i = 0; i < 4; ++i) {
    unit.x[i] = 0;
    if (kLoadBytes >= 4 && left >= 4 * i + 4) {
      unit.x[i] = hw::load_global(reinterpret_cast<const u32*>(from) + i);
    } else {
      const u16* half = reinterpret_cast<const u16*>(from) + 2 * i;
      if (left >= 4 * i + 2) unit.x[i] = hw::load_global(half);
      if (left >= 4 * i + 4) unit.x[i] |= static_cast<u32>(hw::load_global(half + 1)) << 16;
    }
  }
  return unit;
}

// Copies tiles of kRows rows from global memory: one thread's share of it, its place worked out once. Rows past the end
// and bytes past a row's end become zeros and are not read. kLoadBytes divides source, stride and the bytes of a row: 16 and
// 4 go by cp.async (the caller commits and waits), 2 through registers. kRolled: a row's units one after the other, which
// takes fewer registers. kWhole: what is copied at once is there or not, not in part; the address then stands as it is, where
// the compiler else works it out anew for each copy, but a few more registers are needed.
template <class Tile, i32 kRows, i32 kThreads, i32 kLoadBytes, bool kRolled = false, bool kWhole = false>
struct RowLoader {
  static constexpr i32 kGroup = Tile::kPeriod;  // threads that share a row
  static constexpr i32 kRowStep = min_of(kThreads / kGroup, kRows);  // where rows are few, threads are left over
  static_assert(kRows % kRowStep == 0, "rows divide among the threads");

  const u8* source;  // this thread's first unit of row 0's tile
  u32 address;       // where it goes

  HW_DEVICE static i32 first_row() { return hw::thread_idx() / kGroup; }
  HW_DEVICE static i32 first_unit() { return hw::thread_idx() % kGroup; }

  HW_DEVICE RowLoader(u32 tile, const u8* first, i64 stride)
      : source(first + first_row() * stride + first_unit() * 16), address(Tile::address(tile, first_row(), first_unit())) {}

  // The tile whose row 0 is row `begin`, of `rows` rows in all, row_bytes bytes each, `stride` bytes apart. It goes `stage`
  // bytes behind the tile, and comes from `skip` bytes behind the first row.
  HW_DEVICE void load(i32 begin, i32 rows, i32 row_bytes, i64 stride, u32 stage = 0, i64 skip = 0) const {
    if (kThreads / kGroup > kRows && first_row() >= kRows) return;
    const u8* row_source = source + skip + begin * stride;
    const auto copy_row = [&](i32 step) {
      const bool inside = begin + first_row() + step * kRowStep < rows;
      const auto copy_group = [&](i32 group) {
        const i32 left = inside ? row_bytes - (first_unit() + group * kGroup) * 16 : 0;
        u32 to = address + stage + static_cast<u32>(step * kRowStep * Tile::kRowBytes + group * kGroup * 16);
        if constexpr (kRowStep % 8 != 0) to = key_of_step(step, to);
        copy_unit(to, row_source + group * kGroup * 16, left);
      };
      if constexpr (kRolled || (kLoadBytes < 16 && Tile::kRowBytes >= 1024)) {
        HW_NO_UNROLL
        for (i32 group = 0; group < Tile::kUnits / kGroup; ++group) copy_group(group);
      } else {
        HW_UNROLL
        for (i32 group = 0; group < Tile::kUnits / kGroup; ++group) copy_group(group);
      }
      row_source += kRowStep * stride;
    };
    if constexpr (kLoadBytes == 16) {
      HW_UNROLL
      for (i32 step = 0; step < kRows / kRowStep; ++step) copy_row(step);
    } else {
      // NOTE: unrolled, the narrow loads of head dim 256 keep so much in flight that they spill.
      HW_NO_UNROLL
      for (i32 step = 0; step < kRows / kRowStep; ++step) copy_row(step);
    }
  }

  // The address with the key of the step's row; where steps are multiples of 8 rows every step has the first row's.
  HW_DEVICE static u32 key_of_step(i32 step, u32 to) {
    return to ^ (Tile::key(first_row()) ^ Tile::key(first_row() + step * kRowStep)) << 4;
  }

  HW_DEVICE static i32 bytes_of(i32 left, i32 all) { return kWhole ? (left > 0 ? all : 0) : max_of(0, min_of(left, all)); }

  HW_DEVICE static void copy_unit(u32 to, const u8* from, i32 left) {
    if constexpr (kLoadBytes == 16) {
      hw::cp_async_16(to, from, bytes_of(left, 16));
    } else if constexpr (kLoadBytes == 4) {
      HW_UNROLL
      for (i32 i = 0; i < 4; ++i) hw::cp_async_4(to + 4 * i, from + 4 * i, bytes_of(left - 4 * i, 4));
    } else {
      hw::store_shared(to, read_unit<kLoadBytes>(from, left));
    }
  }
};
