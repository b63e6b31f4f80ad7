// A tile of floats spread over a warp's registers, as mma.sync leaves it: kRowTiles x kColTiles blocks of 16 x 8.
// With g = lane / 4 and t = lane % 4, x[r][c][i] is row 16 r + g + 8 (i / 2), column 8 c + 2 t + i % 2.
// A thread therefore holds 2 kRowTiles rows; they are numbered 0 .. kRows - 1, and row_of(i) is where row i stands.
#pragma once
#include <base.cuh>
#include <hw/device.cuh>
#include <hw/warp.cuh>

template <i32 kRowTiles_, i32 kColTiles_>
struct Fragment {
  static constexpr i32 kRowTiles = kRowTiles_;
  static constexpr i32 kColTiles = kColTiles_;
  static constexpr i32 kRows = 2 * kRowTiles;

  float x[kRowTiles][kColTiles][4];

  // The tile's row that holds a thread's row i, and the first column of a thread.
  HW_DEVICE static i32 row_of(i32 i) { return 16 * (i / 2) + 8 * (i % 2) + hw::lane_idx() / 4; }
  HW_DEVICE static i32 first_col() { return 2 * (hw::lane_idx() % 4); }

  HW_DEVICE void fill(float value) {
    HW_UNROLL
    for (i32 r = 0; r < kRowTiles; ++r) {
      HW_UNROLL
      for (i32 c = 0; c < kColTiles; ++c) {
        HW_UNROLL
        for (i32 i = 0; i < 4; ++i) x[r][c][i] = value;
      }
    }
  }

  // The element that visits name (row, column).
  HW_DEVICE float& at(i32 row, i32 column) { return x[row / 2][column / 8][2 * (row % 2) + column % 2]; }

  // visit(value, row, column) for every element of this thread: row in 0 .. kRows - 1, column a constant to be added
  // to first_col().
  template <class Visit>
  HW_DEVICE void for_each(const Visit& visit) {
    HW_UNROLL
    for (i32 r = 0; r < kRowTiles; ++r) {
      HW_UNROLL
      for (i32 c = 0; c < kColTiles; ++c) {
        HW_UNROLL
        for (i32 i = 0; i < 4; ++i) visit(x[r][c][i], 2 * r + i / 2, 8 * c + i % 2);
      }
    }
  }

  // The same column by column: visit(value, row, column, own), own = terms(column).
  template <class Terms, class Visit>
  HW_DEVICE void for_each_column(const Terms& terms, const Visit& visit) {
    HW_UNROLL
    for (i32 c = 0; c < kColTiles; ++c) {
      HW_UNROLL
      for (i32 i = 0; i < 2; ++i) {
        const auto own = terms(8 * c + i);
        HW_UNROLL
        for (i32 row = 0; row < kRows; ++row) visit(x[row / 2][c][2 * (row % 2) + i], row, 8 * c + i, own);
      }
    }
  }
};

// Over the four lanes that share a row.
HW_DEVICE float quad_max(float value) {
  value = hw::max(value, hw::shfl_xor(value, 1));
  return hw::max(value, hw::shfl_xor(value, 2));
}

HW_DEVICE float quad_sum(float value) {
  value += hw::shfl_xor(value, 1);
  return value + hw::shfl_xor(value, 2);
}
