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
# # Reading the Hopper kernel
#
# `kernels_cu/forward_sm90.cu` is written for one architecture: compute capability 9.0a, Hopper. One warp copies, two or
# three groups of four warps compute, and they tell each other by barriers what is ready. This notebook reads it from
# four sides: its text, what its warps do on the emulator, the sums of registers and shared memory, and the machine
# code. It needs a C++ compiler, and for the last side NVRTC; no GPU. Nothing here was timed.

# %%
from collections import defaultdict

import numpy as np

import cuflash
from cuflash import arch, dtypes, workbench
from cuflash.cli.bench import benchmarks
from cuflash.cli.compile import report
from cuflash.errors import CuflashError
from cuflash.jit import module, sass, source
from cuflash.ops import forward

# %% [markdown]
# ## 1. Its header
#
# The file begins with what it computes, who does what, what lies in shared memory, and which barriers there are: name,
# who arrives, who waits.

# %%
text = source.read(source.folder() / "forward_sm90.cu")
print(text[text.index("//   roles") : text.index("#include")])

# %% [markdown]
# ## 2. Who arrives and who waits
#
# One head of dim 128, 256 queries, 768 keys. The emulator runs the same text and records each arrival, copy and wait.
# The table is made from that record, the names from the lines on which the kernel makes its barriers. Warp 0 produces,
# warps 4 to 11 consume.

# %%
rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((1, n, 1, 128)).astype(np.float16) for n in (256, 768, 768))
with cuflash.emulator.tracing() as trace:
    visits = workbench.visits(q, k, v, arch="sm_90a")

block = trace.events[0].block
events = [e for e in trace.events if e.block == block]
names = {}
for e in events:
    if e.what == "mbarrier_init":
        name = e.code.split("(")[1]
        names[e.object] = f"{name}[{sum(other.startswith(name) for other in names.values())}]"
roles = ["producer" if warp == 0 else f"consumer {warp // 4}" for warp in range(12)]
arrive, wait, phases = defaultdict(set), defaultdict(set), defaultdict(set)
for e in events:
    if e.object in names and e.what.startswith(("mbarrier_arrive", "tma_load")):
        arrive[e.object].add(roles[e.warp] + (f": bytes of {e.buffer.upper()}" if e.buffer else ""))
        phases[e.object].add(e.phase)
    if e.object in names and e.what == "mbarrier_wait":
        wait[e.object].add(roles[e.warp])
print(f"{'':10} {'phases':>6}  {'arrive':46} wait")
for place, name in sorted(names.items()):
    print(f"{name:10} {len(phases[place]):6}  {', '.join(sorted(arrive[place])):46} {', '.join(sorted(wait[place]))}")

# %% [markdown]
# There are two stages of each. A consumer says "empty" once for each of its warps; the producer says "full" once, and
# the bytes of its copies must have landed as well. `q_full[1]` brings no bytes: the block has one tile of queries, and
# is told that there is no other. Its tiles of keys, from the last to the first:

# %%
print([keys for visit in visits if visit.block == block for keys in visit.keys])

# %% [markdown]
# ## 3. The timeline
#
# Each warp at its own pace, and waits where it waits for others. Lengths are the drawing's, given in ticks; the order
# is the kernel's, and it is the same for every order in which the emulator may run the warps. Of each group of four
# warps the first is drawn.
#
# - **warp 0** runs two tiles ahead, then waits for a stage to be given back: red arrows.
# - **warps 4 and 8** issue S of a tile and O of the tile before together (`issue_qk`, `issue_pv`), in turns: barriers 2
#   and 3.
# - While a group's products run (below it), its softmax, and the other group's, run beside them.

# %%
timeline = workbench.timeline(trace)
workbench.plot_timeline(timeline)

# %% [markdown]
# What would slow copies do? Then the consumers wait for keys, and the producer, two tiles ahead, waits for the
# consumers. Such questions are what a timeline is for; how long copies take, only a GPU tells.

# %%
print(f"{'copies take':12}{'the producer waits':>20}{'a consumer waits for keys and values':>40}")
for ticks in (24, 100, 400):
    slow = workbench.timeline(trace, copy_ticks=ticks)
    keys = sum(n for name, n in slow.waited("warp 4").items() if name.startswith(("k_full", "v_full")))
    print(f"{ticks:6} ticks{sum(slow.waited('warp 0').values()):20}{keys:40}")

# %% [markdown]
# And what if a consumer waited for both of its products before the softmax? One edit of the kernel, by the workbench:
# it is as right as before, but only the other group's products run beside a softmax now. That is enough while the
# softmax is short: products take 48 ticks a tile, and the other group's as many.

# %%
kernel = workbench.load("forward_sm90", q, k, v)
waiting = kernel.edit("forward_sm90.cu", "hw::wgmma_wait<1>();", "hw::wgmma_wait<0>();")
assert waiting.check()
traces = {"as it is": kernel.trace(), "waiting for both": waiting.trace()}
print("a softmax takes ", *(f"{4 * ticks:6} ticks" for ticks in (6, 12, 24)))
for name, found in traces.items():
    ends = [max(bar.end for bar in workbench.timeline(found, shuffle_ticks=n).bars) for n in (6, 12, 24)]
    print(f"{name:16}", *(f"{end:6} ticks" for end in ends))
rows = [f"{row}warp {warp}" for warp in (4, 8) for row in ("", "products of ")]
workbench.plot_timeline(traces["waiting for both"], rows=rows, shuffle_ticks=12)

# %% [markdown]
# ## 4. The budget of registers
#
# A multiprocessor has 65,536 registers, and a block of so many threads gets an equal share for each. The producer needs
# few: it gives up what the consumers then take (`setmaxnreg`). A consumer's thread holds a 128th of a group's 64 rows:
# S in float32, P in 16 bits, and O in float32. The rest is for rows' maxima and sums, addresses and masks. These are
# cuflash's own tables:

# %%
dims = [(64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)]
variants = {d: forward.choose_sm90_variant(dtypes.float16, *d) for d in dims}
print("  d, d_v      tile  at first  producer  consumer    S    P    O  left   of 65,536")
for (d, d_v), variant in variants.items():
    tile, (producer, consumer) = variant.tile, variant.registers
    groups = tile.warps // 4
    share = 65536 // (128 * groups) // 8 * 8
    held = tile.block_k // 2, tile.block_k // 4, d_v // 2  # S, P, O
    used = 128 * (producer + (groups - 1) * consumer)
    assert used <= 65536 and consumer <= 255
    numbers = share, producer, consumer, *held, consumer - sum(held)
    columns = [f"{n:{width}}" for n, width in zip(numbers, (9, 10, 10, 5, 5, 5, 6), strict=True)]
    print(f"{d:3}, {d_v:3}  {tile.block_q:3} x {tile.block_k:3} {''.join(columns)}{used:12,}")

# %% [markdown]
# ## 5. The budget of shared memory
#
# Two stages of K and of V, and of Q two where they fit, so that the next tile's queries land while this one is
# computed. A block has 227 KB. O leaves through Q's place.

# %%
print("d, d_v        Q         K         V         all, KB of 227")
for (d, d_v), variant in variants.items():
    tile, size = variant.tile, variant.element.itemsize / 1024
    rows = tile.block_q * max(d, d_v) * size, tile.block_k * d * size, tile.block_k * d_v * size
    parts = [f"{n} x {part:.0f}" for n, part in zip((variant.q_stages, 2, 2), rows, strict=True)]
    assert variant.smem_bytes <= 227 * 1024
    print(f"{d:3}, {d_v:3}  {parts[0]:>8}  {parts[1]:>8}  {parts[2]:>8}  {variant.smem_bytes / 1024:8.1f}")

# %% [markdown]
# ## 6. The machine code
#
# NVRTC compiles the text to what the chip executes, on any machine; `cuflash compile --json` prints these facts for
# every kernel. A spill is a register written to memory for want of room: a consumer must have none. The exponentials
# must stand between the two waits for products, where O is computed meanwhile. The share of time that the tensor cores
# can be busy is a model's, from this code: a prediction.

# %%
spec = forward.kernel_spec(variants[128, 128])
code = None
try:
    compiled = module.compile(spec, arch.named("sm_90a"))
    code = sass.functions(sass.disassemble(compiled.path))[spec.entry]
except CuflashError as error:  # no NVRTC here, or no disassembler
    print(error)
if code is not None:
    facts = report(spec, arch.named("sm_90a"))
    for fact in ("registers", "consumer_spills", "producer_spills", "loop_instructions", "ex2_in_window", "tensor_use"):
        print(f"{fact:18} {facts[fact]}")

# %% [markdown]
# `registers` is the equal share at the beginning, `ex2_in_window` the exponentials between the waits, and of how many.
# The main loop of a consumer, what meets others or multiplies, in its order: the same that the timeline shows.

# %%
STEPS = {
    "HGMMA": "multiply (S or O)",
    "WARPGROUP.DEPBAR": "wait for products",
    "BAR.SYNC": "wait for the turn",
    "BAR.ARV": "give the turn",
    "SYNCS.PHASECHK": "look at an mbarrier",
    "SYNCS.ARRIVE": "arrive at an mbarrier",
    "MUFU.EX2": "exponential",
}
steps = []
for instruction in code.loops[0].path if code is not None else ():
    step = next((text for name, text in STEPS.items() if name in instruction), None)
    if step and steps and steps[-1][0] == step:
        steps[-1][1] += 1
    elif step:
        steps.append([step, 1])
for step, times in steps:
    print(f"{times:4} x {step}")

# %% [markdown]
# ## 7. And how fast?
#
# From the newest file in `benchmarks/results` that a Hopper GPU has written:

# %%
schema = benchmarks("schema")
measured = [r for _, r in schema.read_all(schema.RESULTS) if r.on_gpu and (r.capability or [0])[0] == 9]
if not measured:
    print("not yet measured: cuflash bench, on a machine with such a GPU, writes such a file")
for row in measured[-1].rows if measured else ():
    if row.op.startswith("forward") and row.ms is not None:
        print(f"{measured[-1].gpu}  {row.case:40} {row.impl:20} {row.ms:8.3f} ms  {row.tflops or 0:6.0f} TFLOP/s")

# %% [markdown]
# What was tried and lost, and why the kernel is as it is, is in `kernels_cu/forward_sm90.md`.
