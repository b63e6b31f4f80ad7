// From a warp's fragment to rows of global memory.
#pragma once
#include <base.cuh>
#include <hw/device.cuh>
#include <hw/math.cuh>
#include <tile/shared_tile.cuh>

// kLoadBytes is what `to` and the rows' distance are aligned to; `left` bytes of the unit exist.
template <i32 kLoadBytes>
HW_DEVICE void store_unit(u8* to, u32x4 bits, i32 left) {
  if (kLoadBytes == 16 && left >= 16) {
    hw::store_global(reinterpret_cast<u32x4*>(to), bits);
    return;
  }
  HW_UNROLL
  for (i32 i = 0; i < 4; ++i) {
    if (kLoadBytes >= 4 && left >= 4 * i + 4) {
      hw::store_global(reinterpret_cast<u32*>(to) + i, bits.x[i]);
    } else {
      u16* half = reinterpret_cast<u16*>(to) + 2 * i;
      if (left >= 4 * i + 2) hw::store_global(half, static_cast<u16>(bits.x[i]));
      if (left >= 4 * i + 4) hw::store_global(half + 1, static_cast<u16>(bits.x[i] >> 16));
    }
  }
}

// Stores kRows rows of kUnits 16-byte units that a warp's lanes have gathered in a tile of shared memory, which no other warp
// touches. place(row, write) calls write(where the row goes, whether it is zeros instead), or does not. row_bytes are left
// of a row from its first unit.
template <class Tile, i32 kLoadBytes, i32 kRows, i32 kUnits, class Place>
HW_DEVICE void store_gathered_at(u32 warp_tile, i32 row_bytes, const Place& place) {
  hw::sync_warp();
  constexpr i32 kGroup = Tile::kPeriod;  // lanes that share a row
  const i32 first_row = hw::lane_idx() / kGroup, first_unit = hw::lane_idx() % kGroup;
  HW_UNROLL
  for (i32 step = 0; step < kRows * kGroup / 32; ++step) {
    const i32 row = first_row + step * (32 / kGroup);
    place(row, [&](u8* out, bool zeros) {
      HW_UNROLL
      for (i32 group = 0; group < kUnits / kGroup; ++group) {
        const i32 unit = first_unit + group * kGroup;
        u32x4 bits = hw::load_shared<u32x4>(Tile::address(warp_tile, row, unit));
        if (zeros) bits = u32x4{{0, 0, 0, 0}};
        store_unit<kLoadBytes>(out + unit * 16, bits, row_bytes - unit * 16);
      }
    });
  }
}

// Rounds the fragment to Element and stores its rows, likewise: gathered first, so that whole units leave. The fragment has
// as many columns as it has.
template <class Element, class Tile, i32 kLoadBytes, class O, class Place>
HW_DEVICE void store_rows_at(const O& o, u32 warp_tile, i32 row_bytes, const Place& place) {
  store_fragment<Element, Tile>(o, warp_tile);
  store_gathered_at<Tile, kLoadBytes, 16 * O::kRowTiles, 8 * O::kColTiles * static_cast<i32>(sizeof(Element)) / 16>(
      warp_tile, row_bytes, place);
}

// Rows one after the other: those at or past `used` are written as zeros, those at or past `owned` not at all.
template <class Element, class Tile, i32 kLoadBytes, class O>
HW_DEVICE void store_rows(const O& o, u32 warp_tile, u8* out, i64 stride, i32 used, i32 owned, i32 row_bytes) {
  store_rows_at<Element, Tile, kLoadBytes>(o, warp_tile, row_bytes, [&](i32 row, const auto& write) {
    if (row < owned) write(out + row * stride, row >= used);
  });
}
