# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Write your own kernel
#
# A cell of CUDA C is compiled, run, checked and counted; the next one is better. First one tile of attention,
# S = Q Kᵀ, from loops to matrix instructions to a pipeline of copies; then the softmax of the kernel that
# `cuflash.attention` runs, broken, mended and made cheaper. All of it runs on the emulator: it needs a C++ compiler and
# no GPU.
#
# `%%cuflash_kernel` makes a kernel of a cell, `%%cuflash_mod` a version of one with a function or a file replaced. What
# is compiled and run is so in a child process: a kernel that hangs or crashes is a message.

# %%
import numpy as np

from cuflash import workbench
from cuflash.errors import CompileError, UnsupportedError

# %load_ext cuflash.workbench

rng = np.random.default_rng(0)
q = rng.standard_normal((64, 64)).astype(np.float16)  # 64 queries, head dim 64: a row has 128 bytes
k = rng.standard_normal((128, 64)).astype(np.float16)
problem = {"q": q, "k": k, "s": np.zeros((64, 128), np.float32)}


def right(q, k, s):
    return q.astype(np.float32) @ k.T.astype(np.float32)


# %% [markdown]
# ## 1. Loops
#
# A thread has a key, and goes through the queries. Memory is touched through `hw::`, which is where the emulator looks
# on: a `load_global` on a GPU is a plain load.

# %% active="ipynb"
# %%cuflash_kernel loops --arguments problem --reference right --smem 24*1024
# struct Params {
#   const u8* q;  // [64, 64] float16
#   const u8* k;  // [128, 64] float16
#   float* s;     // [64, 128]
# };
#
# HW_KERNEL(128) scores(HW_GRID_CONSTANT Params p) {
#   const auto* q = reinterpret_cast<const hw::Half*>(p.q);
#   const auto* k = reinterpret_cast<const hw::Half*>(p.k);
#   const i32 j = hw::thread_idx();
#   for (i32 i = 0; i < 64; ++i) {
#     float sum = 0.0f;
#     for (i32 d = 0; d < 64; ++d) {
#       const float x = hw::to_float(hw::load_global(q + 64 * i + d));
#       const float y = hw::to_float(hw::load_global(k + 64 * j + d));
#       sum = hw::fma(x, y, sum);
#     }
#     hw::store_global(p.s + 128 * i + j, sum);
#   }
# }

# %% [markdown]
# It is right, and reads each of q and k many times over. Most wasteful is the line that reads k: the 32 lanes of a warp
# read 32 rows, 2 bytes from each, and every one takes a sector of 32 bytes. Lanes that read neighbours share sectors
# ("coalesced").

# %%
loops.counters().plot()

# %% [markdown]
# ## 2. A tile in shared memory
#
# The block copies both arrays once, in units of 16 bytes, neighbours by neighbours, and reads them from shared memory.

# %% active="ipynb"
# %%cuflash_mod staged loops scores
# HW_KERNEL(128) scores(HW_GRID_CONSTANT Params p) {
#   const i32 j = hw::thread_idx();
#   const u32 q_smem = hw::smem_base(), k_smem = q_smem + 64 * 128;
#   for (i32 u = j; u < 8 * (64 + 128); u += 128) {  // a row has 8 units
#     const u8* from = u < 8 * 64 ? p.q + 16 * u : p.k + 16 * (u - 8 * 64);
#     hw::store_shared(q_smem + 16 * u, hw::load_global(reinterpret_cast<const u32x4*>(from)));
#   }
#   hw::sync_threads();
#   for (i32 i = 0; i < 64; ++i) {
#     float sum = 0.0f;
#     for (i32 d = 0; d < 64; ++d) {
#       const i32 e = d;
#       const float x = hw::to_float(hw::load_shared<hw::Half>(q_smem + 128 * i + 2 * e));
#       const float y = hw::to_float(hw::load_shared<hw::Half>(k_smem + 128 * j + 2 * e));
#       sum = hw::fma(x, y, sum);
#     }
#     hw::store_global(p.s + 128 * i + j, sum);
#   }
# }

# %% [markdown]
# Global memory is read once. But shared memory has 32 banks of 4 bytes, and rows of 128 bytes put one column of 32 rows
# into one bank: each read of k takes 32 passes. If every lane begins at another column, they meet in none:

# %%
turned = staged.edit("scores.cu", "const i32 e = d;", "const i32 e = (d + 2 * j) % 64;")
assert turned.check()
turned.diff(staged)

# %% [markdown]
# ## 3. Matrix instructions
#
# A warp takes 16 queries. `ldmatrix` brings pieces of rows into the registers that `mma` wants them in, and one `mma`
# multiplies 16 x 16 by 16 x 8: 2,048 products at once. `place` says where a unit of a row lies.

# %% active="ipynb"
# %%cuflash_mod matrix turned scores
# HW_DEVICE u32 place(i32 row, i32 unit) { return static_cast<u32>(128 * row + 16 * unit); }
#
# struct Pair {
#   float x[2];
# };
#
# // S of 16 queries and 16 keys from `column` on.
# HW_DEVICE void multiply(const Params& p, u32 q_smem, u32 k_smem, i32 column) {
#   const i32 lane = hw::lane_idx(), row = 16 * hw::warp_idx();
#   float s[2][4] = {};
#   HW_UNROLL
#   for (i32 unit = 0; unit < 8; unit += 2) {
#     u32 a[4], b[4];
#     hw::ldmatrix_x4(a, q_smem + place(row + lane % 16, unit + lane / 16));
#     hw::ldmatrix_x4(b, k_smem + place(lane % 8 + 8 * (lane / 16), unit + lane / 8 % 2));
#     hw::mma_m16n8k16(hw::Half{}, s[0], a, b[0], b[1]);
#     hw::mma_m16n8k16(hw::Half{}, s[1], a, b[2], b[3]);
#   }
#   HW_UNROLL
#   for (i32 i = 0; i < 4; ++i) {  // a lane has two neighbours in each of two rows, eight apart
#     const i32 at = 128 * (row + lane / 4 + 8 * (i / 2)) + column + 8 * (i % 2) + 2 * (lane % 4);
#     hw::store_global(reinterpret_cast<Pair*>(p.s + at), Pair{{s[i % 2][2 * (i / 2)], s[i % 2][2 * (i / 2) + 1]}});
#   }
# }
#
# HW_KERNEL(128) scores(HW_GRID_CONSTANT Params p) {
#   const u32 q_smem = hw::smem_base(), k_smem = q_smem + 64 * 128;
#   for (i32 u = hw::thread_idx(); u < 8 * (64 + 128); u += 128) {
#     const u8* from = u < 8 * 64 ? p.q + 16 * u : p.k + 16 * (u - 8 * 64);
#     hw::store_shared(q_smem + place(u / 8, u % 8), hw::load_global(reinterpret_cast<const u32x4*>(from)));
#   }
#   hw::sync_threads();
#   for (i32 c = 0; c < 128; c += 16) multiply(p, q_smem, k_smem + place(c, 0), c);
# }

# %% [markdown]
# Each `ldmatrix` reads 16 bytes of eight rows at a time, which lie in the same banks: eight passes where one would do.
# So the units of a row change places, by its number. One function changes, and with it every access:

# %% active="ipynb"
# %%cuflash_mod swizzled matrix place
# HW_DEVICE u32 place(i32 row, i32 unit) { return static_cast<u32>(128 * row + 16 * (unit ^ row % 8)); }

# %% [markdown]
# ## 4. A pipeline
#
# Nothing is multiplied before all has come. With `cp.async` the next 32 keys are on their way while these are
# multiplied; two stages of shared memory take turns. A first try:

# %% active="ipynb" tags=["raises-exception"]
# %%cuflash_mod eager swizzled scores
# HW_KERNEL(128) scores(HW_GRID_CONSTANT Params p) {
#   const u32 q_smem = hw::smem_base(), k_smem = q_smem + 64 * 128;
#   const auto copy = [&](u32 to, const u8* from, i32 rows) {
#     for (i32 u = hw::thread_idx(); u < 8 * rows; u += 128) {
#       hw::cp_async_16(to + place(u / 8, u % 8), from + 16 * u, 16);
#     }
#     hw::cp_async_commit();
#   };
#   copy(q_smem, p.q, 64);
#   copy(k_smem, p.k, 32);
#   for (i32 n = 0; n < 4; ++n) {
#     hw::cp_async_wait<0>();
#     if (n < 3) copy(k_smem + 32 * 128 * ((n + 1) % 2), p.k + 32 * 128 * (n + 1), 32);
#     hw::sync_threads();
#     for (i32 c = 0; c < 32; c += 16) multiply(p, q_smem, k_smem + 32 * 128 * (n % 2) + place(c, 0), 32 * n + c);
#   }
# }

# %% [markdown]
# On a GPU this may be right a thousand times. The emulator says who meets whom: a warp that has gone on copies into the
# stage that another still multiplies from. A thread may overwrite a stage when all have left it, that is, behind the
# barrier:

# %%
copy_next = "    if (n < 3) copy(k_smem + 32 * 128 * ((n + 1) % 2), p.k + 32 * 128 * (n + 1), 32);\n"
barrier = "    hw::sync_threads();\n"
pipeline = eager.edit("scores.cu", copy_next + barrier, barrier + copy_next)
assert pipeline.check()
pipeline.diff(swizzled)

# %% [markdown]
# Counters see what moves, not when. `trace` keeps what the warps did in which order, and the picture makes up the time
# from who waited for whom: while a tile is multiplied the next is on its way.

# %%
workbench.plot_timeline(pipeline.trace(), rows=["warp 0", "copies of warp 0", "warp 1", "copies of warp 1"])

# %% [markdown]
# What it uses on a chip, NVRTC knows, on any machine:

# %%
try:
    print(pipeline.resources("sm_80"))
except CompileError as error:  # no NVRTC here
    print(error)

# %% [markdown]
# ## 5. The softmax of the real kernel
#
# `load` takes a kernel and the call that runs it, and compares with `attention` in float64. This is the function that
# turns scores into weights and keeps the running maximum m and the running sum l of each row:

# %%
shape = (1, 100, 1, 32), (1, 300, 1, 32), (1, 300, 1, 32)
base = workbench.load("forward_sm80", *(rng.standard_normal(x).astype(np.float16) for x in shape), aux=("lse",))
print(base.function("OnlineSoftmax::weigh"))
base.check()

# %% [markdown]
# Four lanes share a row. Here `sum` is of a lane's own columns, and the four are added up once, in `finish`. As
# textbooks have it, the sum of a tile is complete before it is added to l:

# %% active="ipynb"
# %%cuflash_mod textbook base OnlineSoftmax::weigh
# template <class S>
# HW_DEVICE void weigh(S& s, float (&rescale)[kRows]) {
#   float tile_maximum[kRows], tile_sum[kRows], subtract[kRows];
#   for (i32 i = 0; i < kRows; ++i) {
#     tile_maximum[i] = maximum[i];
#     tile_sum[i] = 0.0f;
#   }
#   s.for_each([&](float& x, i32 row, i32) { tile_maximum[row] = hw::max(tile_maximum[row], x); });
#   for (i32 i = 0; i < kRows; ++i) {
#     const float before = hw::mul(maximum[i], scale);
#     maximum[i] = quad_max(tile_maximum[i]);
#     subtract[i] = maximum[i] == -kInfinity ? 0.0f : hw::mul(maximum[i], scale);
#     rescale[i] = hw::exp2_approx(before - subtract[i]);
#   }
#   s.for_each([&](float& x, i32 row, i32) {
#     x = hw::exp2_approx(hw::fma(x, scale, -subtract[row]));
#     tile_sum[row] += x;
#   });
#   for (i32 i = 0; i < kRows; ++i) {
#     float all = tile_sum[i];
#     all += hw::shfl_xor(all, 1);
#     all += hw::shfl_xor(all, 2);
#     sum[i] = sum[i] * rescale[i] + all;
#   }
# }

# %% [markdown]
# Wrong, and the worst elements say how: out is a quarter of what it should be, and lse too large by ln 4 = 1.386.
# `finish` adds up four lanes that all have the whole sum by now. So only one of the four may keep it:

# %% active="ipynb" tags=["raises-exception"]
# %%cuflash_mod hasty textbook OnlineSoftmax::weigh
# template <class S>
# HW_DEVICE void weigh(S& s, float (&rescale)[kRows]) {
#   float tile_maximum[kRows], tile_sum[kRows], subtract[kRows];
#   for (i32 i = 0; i < kRows; ++i) {
#     tile_maximum[i] = maximum[i];
#     tile_sum[i] = 0.0f;
#   }
#   s.for_each([&](float& x, i32 row, i32) { tile_maximum[row] = hw::max(tile_maximum[row], x); });
#   for (i32 i = 0; i < kRows; ++i) {
#     const float before = hw::mul(maximum[i], scale);
#     maximum[i] = quad_max(tile_maximum[i]);
#     subtract[i] = maximum[i] == -kInfinity ? 0.0f : hw::mul(maximum[i], scale);
#     rescale[i] = hw::exp2_approx(before - subtract[i]);
#   }
#   s.for_each([&](float& x, i32 row, i32) {
#     x = hw::exp2_approx(hw::fma(x, scale, -subtract[row]));
#     tile_sum[row] += x;
#   });
#   for (i32 i = 0; i < kRows; ++i) {
#     if (hw::lane_idx() % 4 == 0) {
#       float all = tile_sum[i];
#       all += hw::shfl_xor(all, 1);
#       all += hw::shfl_xor(all, 2);
#       sum[i] = sum[i] * rescale[i] + all;
#     }
#   }
# }

# %% [markdown]
# A shuffle needs all lanes of the warp, and three of four stay away: on a GPU that is undefined, and here it is a
# report with the line. All lanes exchange, one keeps. A function that was replaced is edited like any other text:

# %%
careful = textbook.edit(
    "tile/softmax.cuh", "sum[i] * rescale[i] + all;", "sum[i] * rescale[i] + (hw::lane_idx() % 4 == 0 ? all : 0.0f);"
)
print(careful.check())
careful.diff(base)

# %% [markdown]
# Right, and dearer: two exchanges more for every row and tile. They need not be made in every tile, for the four sums
# add up as well at the end, which is where `finish` does it:

# %%
once = textbook.edit("tile/softmax.cuh", "    all += hw::shfl_xor(all, 1);\n    all += hw::shfl_xor(all, 2);\n", "")
print(once.check())
once.diff(careful)

# %% [markdown]
# The exchanges are those of the shipped kernel again. Where there is a GPU, `bench` tells the time of a version:

# %%
try:
    print(once.bench(), careful.bench(), sep="\n")
except UnsupportedError as error:
    print(error)
