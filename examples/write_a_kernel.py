"""Write a kernel in CUDA C: run it, check it, count what it moves, make it better. On the emulator, without a GPU.

The sums of the rows of a matrix, a warp each. The first version is right, and reads memory in the wrong order.
"""

import numpy as np

from cuflash import workbench

TEXT = """
struct Params {
  const float* x;  // [rows, 256]
  float* sums;     // [rows]
};

HW_KERNEL(128) row_sums(HW_GRID_CONSTANT Params p) {
  const i32 row = 4 * hw::block_idx_x() + hw::warp_idx(), lane = hw::lane_idx();
  float sum = 0.0f;
  for (i32 i = 0; i < 8; ++i) {
    const i32 column = 8 * lane + i;
    sum += hw::load_global(p.x + 256 * row + column);
  }
  for (i32 step = 16; step > 0; step /= 2) sum += hw::shfl_xor(sum, step);
  if (lane == 0) hw::store_global(p.sums + row, sum);
}
"""

x = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
first = workbench.kernel(
    TEXT, {"x": x, "sums": np.zeros(64, np.float32)}, grid=16, reference=lambda x, sums: x.astype(np.float64).sum(1)
)
print("first:", first.check())
print(first.counters())

# Lanes that read neighbours share sectors of 32 bytes.
better = first.edit("row_sums.cu", "8 * lane + i", "32 * i + lane")
print("better:", better.check())
print(better.diff(first))
assert first.check() and better.check()
