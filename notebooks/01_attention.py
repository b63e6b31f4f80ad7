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
# # How flash attention works
#
# Attention compares every query with every key. Computed as it is written, it spends its time carrying a matrix of
# scores to memory and back. FlashAttention computes the same numbers and never writes that matrix down. This notebook
# counts what is carried, on an emulator that runs the kernels' own text; it needs a C++ compiler and no GPU.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import cuflash
from cuflash import workbench

rng = np.random.default_rng(0)

# %% [markdown]
# ## 1. Where numbers live
#
# Each memory of a GPU is slower than the one above it, and from SRAM on far larger. A kernel is fast if what it needs
# often is up there. Of the registers each of an A100's 108 multiprocessors has 256 KB, of the SRAM 192 KB, which the L1
# cache shares. Beside the A100, with figures as published, stands the GPU at hand, if there is one.

# %%
# Sizes and GB/s of an A100 of 40 GB (that of 80 GB: 2,000 GB/s). SRAM, HBM and host: figure 1 of the FlashAttention
# paper (Dao et al. 2022); registers, which have no published rate: NVIDIA's white paper.
published = {
    "registers": (27e6, None),
    "SRAM (shared memory)": (20e6, 19_000),
    "HBM (global memory)": (40e9, 1_500),
    "host memory": (1e12, 12.8),
}


def gpu_at_hand():
    """Its name and the sizes of its memories, or why there are none."""
    try:
        import cupy

        device = cupy.cuda.Device()
        properties = cupy.cuda.runtime.getDeviceProperties(device.id)
    except Exception:  # no CuPy, no driver, no device
        return "no GPU here", {}
    count = properties["multiProcessorCount"]
    sizes = (4 * properties["regsPerMultiprocessor"] * count, properties["sharedMemPerMultiprocessor"] * count)
    return properties["name"].decode(), dict(zip(published, (*sizes, properties["totalGlobalMem"]), strict=False))


def readable(size):
    return f"{size / 1e6:,.0f} MB" if size < 1e9 else f"{size / 1e9:,.0f} GB"


name, sizes = gpu_at_hand()
print(f"{'':22}{'A100':>10}{'GB/s':>10}   {name}")
for memory, (size, rate) in published.items():
    own = readable(sizes[memory]) if memory in sizes else ""
    print(f"{memory:22}{readable(size):>10}{'-' if rate is None else f'{rate:,}':>10}   {own}")

# %% [markdown]
# The matrix units of an A100 multiply 312 TFLOP a second, and HBM brings 1.5 TB: some 200 operations for each byte, or
# the units wait. Softmax does a handful for each score.
#
# ## 2. Three kernels
#
# The plain way: a kernel for each line of the formula. A whole matrix leaves the chip after each.
#
# | kernel | reads | writes |
# |---|---|---|
# | S = scale Q Kᵀ | Q, K | **S** |
# | P = softmax(S) | **S** | **P** |
# | O = P V | **P**, V | O |
#
# They are in `workbench/naive.cu`. This is the second, a row for each warp of 32 threads, and what all three move for
# one head of 512 queries and keys:

# %%
text = (Path(workbench.__file__).parent / "naive.cu").read_text()
print(
    text[
        text.index("HW_KERNEL(kThreads) cuflash_naive_weights") : text.index("HW_KERNEL(kThreads) cuflash_naive_output")
    ]
)

(naive,) = workbench.bytes_moved([512], ["three kernels"])
for array, size in naive.arrays.items():
    print(f"{array:>4} {size / 1024:7.0f} KB", "of 512 x 512 float16, written and read back" if array in "sp" else "")
print(f"     {naive.total / 1024:7.0f} KB, of it S and P {(naive.arrays['s'] + naive.arrays['p']) / naive.total:.0%}")

# %% [markdown]
# ## 3. A softmax that needs no whole row
#
# A softmax divides by a sum over the whole row, and subtracts its maximum so that nothing overflows. So it seems to
# need all scores of the row at once. It does not: keep two numbers for each row, and mend them with each tile of keys.
#
# - `m`: the **running maximum**, the largest score so far;
# - `l`: the **running sum** of `exp(score - m)` so far, relative to *today's* m.
#
# When a tile brings a larger score, what was summed relative to the old maximum is too large by exp(new - old): `l`,
# and the output gathered so far, are multiplied by exp(old - new). That is all.


# %%
def attention_by_tiles(q, k, v, tile=64):
    """One head, not causal: q [rows, d], k and v [keys, d] -> out [rows, d], and the m and l behind each tile."""
    m = np.full(len(q), -np.inf)
    l = np.zeros(len(q))  # noqa: E741  its name in the papers
    acc = np.zeros((len(q), v.shape[1]))
    history = []
    for begin in range(0, len(k), tile):
        scores = q @ k[begin : begin + tile].T / q.shape[1] ** 0.5
        larger = np.maximum(m, scores.max(axis=1))
        weights = np.exp(scores - larger[:, None])
        shrink = np.exp(m - larger)
        l = l * shrink + weights.sum(axis=1)  # noqa: E741
        acc = acc * shrink[:, None] + weights @ v[begin : begin + tile]
        m = larger
        history.append((m, l))
    return acc / l[:, None], np.array(history)


q, k, v = rng.standard_normal((3, 512, 64)).astype(np.float16)
wide = [x.astype(np.float64) for x in (q, k, v)]
by_tiles, history = attention_by_tiles(*wide)

scores = wide[0] @ wide[1].T / 8
at_once = np.exp(scores - scores.max(axis=1, keepdims=True))
at_once = at_once / at_once.sum(axis=1, keepdims=True) @ wide[2]
print("largest difference from the whole softmax:", np.abs(by_tiles - at_once).max())

row = 5
figure, axes = plt.subplots(figsize=(6, 2.8), layout="constrained")
axes.plot(np.arange(1, 9) * 64, history[:, 0, row], "o-", label="m, running maximum")
axes.plot(np.arange(1, 9) * 64, np.log(history[:, 1, row]), "s-", label="log l, of the running sum: falls when m rises")
axes.plot(
    np.arange(1, 9) * 64, history[:, 0, row] + np.log(history[:, 1, row]), "k:", label="m + log l, in the end lse"
)
axes.set(xlabel="keys seen", title=f"row {row}")
axes.legend(fontsize="small")
plt.show()

# %% [markdown]
# `m + log l` is the logarithm of the sum of exp(score), whatever the m: cuflash returns it as `lse`. It is all that the
# backward needs of the scores, and what puts two parts of attention together (`merge_states`).
#
# ## 4. Two loops, in two orders
#
# A tile of queries must meet all tiles of keys, so there are two loops. Which goes outside?
#
# - **Keys outside** (the first FlashAttention paper). A tile of K and V is read once and stays on the chip while all
#   queries come by. But a row then meets the keys at times far apart: its O, l and m wait in HBM, and are read and
#   written for every tile of keys. `workbench/keys_outside.cu` has these loops.
# - **Queries outside** (FlashAttention-2, and cuflash). A tile of queries stays, with its O, l and m in registers,
#   until all keys have come by. K and V are read once for each tile of queries. And every tile of queries is a block of
#   its own, which needs nothing of the others: far more blocks to fill a GPU with.
#
# Counted, with 128 queries a tile and 64 keys; with keys outside 128 keys, for the more of them stay on the chip, the
# less often O goes there and back:

# %%
moved = workbench.bytes_moved([128, 256, 512])
for way in moved[-3:]:
    print(f"{way.way:16}{way.total / 1024:7.0f} KB", {name: f"{size / 1024:.0f}" for name, size in way.arrays.items()})
workbench.plot_bytes(moved)

# %% [markdown]
# All three grow with the square of the length, but not alike. For each pair of a query and a key, S and P take 8 bytes,
# there and back. With keys outside, O in float32 takes 4, there and back for every 128 keys, and Q, read again, one.
# With queries outside, K and V, read again for every 128 queries, take 2, and most of those can come from the L2 cache,
# for blocks that run at the same time read the same keys.
#
# ## 5. The kernel itself
#
# cuflash's own kernel on the emulator: every thread is a fiber, the order is drawn from a seed, and a missing barrier
# would be reported as a race by file and line. The bits are the same in any order.

# %%
arrays = [x[None, :, None] for x in (q, k, v)]
cuflash.config.backend = "emulator"
out = cuflash.attention(*arrays)
print("largest difference from the NumPy tiles:", np.abs(out[0, :, 0] - by_tiles).max())
for seed, landing in [(1, "early"), (2, "late")]:
    with cuflash.emulator.schedule(seed=seed, landing=landing):
        assert np.array_equal(cuflash.attention(*arrays), out)
print("another order of threads and copies: the same bits")
cuflash.config.backend = "auto"

# %% [markdown]
# Under a causal mask most tiles of keys are empty or full. Empty ones are skipped, full ones need no mask; only the
# mixed ones are looked at key by key.

# %%
workbench.plot_mask(512, causal=True, tile=(128, 64))

# %% [markdown]
# And what the kernel does with that, as the emulator has recorded it: in each tile its turn, for each block of queries.
# The last keys come first, for those are masked.

# %%
workbench.plot_visits(*arrays, causal=True)

# %% [markdown]
# ## 6. The backward computes the weights again
#
# The gradients need the weights P, which nobody has kept. They are cheap to make again: `exp(score - lse)`, tile by
# tile, from Q, K and one number a row. Five products instead of the four that a kept P would take, and no matrix in
# memory.


# %%
def backward_by_tiles(dout, q, k, v, out, lse, tile=64):
    scale = q.shape[1] ** -0.5
    delta = (dout * out).sum(axis=1, keepdims=True)  # what the softmax's own derivative takes off each row
    dq, dk, dv = (np.zeros_like(x) for x in (q, k, v))
    for begin in range(0, len(k), tile):
        keys = slice(begin, begin + tile)
        p = np.exp(q @ k[keys].T * scale - lse[:, None])  # again
        ds = p * (dout @ v[keys].T - delta) * scale
        dv[keys] = p.T @ dout
        dk[keys] = ds.T @ q
        dq += ds @ k[keys]
    return dq, dk, dv


dout = rng.standard_normal(out[0, :, 0].shape)
lse = history[-1, 0] + np.log(history[-1, 1])
ours = backward_by_tiles(dout, *wide, by_tiles, lse)

whole = [x[None, :, None] for x in wide]
result = cuflash.attention(*whole, aux=("lse",))
theirs = cuflash.attention_backward(dout[None, :, None], *whole, result.out, result.lse)
for name, mine, grad in zip(("dq", "dk", "dv"), ours, theirs[:3], strict=True):
    print(f"{name}: largest difference from cuflash.attention_backward {np.abs(mine - grad[0, :, 0]).max():.1e}")
print(f"kept for the backward: {lse.size * 4} bytes of lse instead of {2 * scores.size} of weights in float16")

# %% [markdown]
# ## 7. One call, any arrays
#
# `attention` takes arrays of NumPy, CuPy, PyTorch or JAX and answers in kind. Arrays on a GPU run the kernel there,
# others the NumPy reference, unless the emulator is asked for. `explain` says what a call would do.

# %%
cuflash.config.backend = "emulator"
print(cuflash.explain(*arrays, causal=True))
cuflash.config.backend = "auto"


def same_call(name, array):
    answer = cuflash.attention(*(array(x) for x in arrays), causal=True)
    print(f"{name:8} {type(answer).__module__.split('.')[0]:8} {tuple(answer.shape)}")


same_call("NumPy", np.asarray)
try:
    import torch

    same_call("PyTorch", lambda a: torch.from_numpy(a).to("cuda" if torch.cuda.is_available() else "cpu"))
except ImportError:
    print("PyTorch  is not installed")
try:
    import jax

    same_call("JAX", jax.numpy.asarray)
except ImportError:
    print("JAX      is not installed")
try:
    import cupy

    if cupy.is_available():
        same_call("CuPy", cupy.asarray)
    else:
        print("CuPy     sees no GPU")
except ImportError:
    print("CuPy     is not installed")

# %% [markdown]
# And how fast is it? What a GPU measured, from the newest file in `benchmarks/results`:

# %%
from cuflash.cli.bench import benchmarks  # noqa: E402

schema = benchmarks("schema")
on_gpus = [results for _, results in schema.read_all(schema.RESULTS) if results.on_gpu]
if not on_gpus:
    print("not yet measured: cuflash bench, on a machine with a GPU, writes such a file")
for r in on_gpus[-1].rows if on_gpus else ():
    if r.op.startswith("forward") and r.ms is not None:
        print(f"{on_gpus[-1].gpu}  {r.case:40} {r.impl:20} {r.ms:8.3f} ms  {r.tflops or 0:6.0f} TFLOP/s")
