"""A whole pipeline of compute capability 9.0 (pipeline.cu): its result, the bugs it can have, its machine code."""

from __future__ import annotations

import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hw_toys import aligned
from needs import needs_nvdisasm, needs_nvrtc
from recorded import recording

from cuflash import arch, emulator
from cuflash.errors import EmulatorError
from cuflash.jit import layout, module, sass, source, tensor_map

FILE = Path(__file__).with_name("pipeline.cu")
DIM, ROWS, KEYS = 128, 256, 488  # 8 tiles, the last of 40 keys; 3 stages
SMEM_BYTES = 128 * DIM * 2 + 3 * 64 * DIM * 2 + 2 * 64 * 64 * 2 + 16 + 8 * 7
bfloat16 = np.dtype(ml_dtypes.bfloat16)


def spec(*edits: tuple[str, str]) -> module.KernelSpec:
    changes = tuple(source.Edit(FILE.name, old, new) for old, new in edits)
    return module.KernelSpec(str(FILE), "cuflash_pipeline", "PipelineParams", None, 384, SMEM_BYTES, changes)


def params(text: str, backend: str, pointers: dict[str, int], swizzles: dict[str, int]) -> bytes:
    def rows(name: str, count: int, width: int, box: int) -> bytes:
        arguments = ("bfloat16", (width, count), (2 * width,), (64, box), swizzles.get(name, 128))
        return tensor_map.encode(backend, pointers[name], *arguments)

    maps = {"q": rows("q", ROWS, DIM, 128), "k": rows("k", KEYS, DIM, 64), "s": rows("s", ROWS, KEYS, 64)}
    return layout.parse(text, "PipelineParams").pack(**maps, tiles=-(-KEYS // 64))


def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q, k of small integers, and their products, which 16 bits hold exactly."""
    rng = np.random.default_rng(5)
    q, k = aligned((ROWS, DIM), bfloat16), aligned((KEYS, DIM), bfloat16)
    q[...], k[...] = rng.integers(-1, 2, q.shape), rng.integers(-1, 2, k.shape)
    expected = q.astype(np.float32) @ k.astype(np.float32).T
    assert abs(expected).max() < 256
    return q, k, expected


def run(kernel_spec: module.KernelSpec, swizzles: dict[str, int] | None = None, **how) -> None:
    """On the emulator. Fails unless s is right, everywhere."""
    q, k, expected = inputs()
    s = aligned((ROWS, KEYS), bfloat16)
    s[...] = np.nan
    kernel = module.load(kernel_spec, arch.named("sm_90a"), "emulator")
    arrays = {"q": q, "k": k, "s": s}
    buffers = [module.Buffer(name, x.ctypes.data, x.nbytes, name == "s") for name, x in arrays.items()]
    with emulator.schedule(**how):
        kernel.launch(
            (ROWS // 128, 1, 1),
            params(kernel.text, "emulator", {name: x.ctypes.data for name, x in arrays.items()}, swizzles or {}),
            buffers=buffers,
        )
    np.testing.assert_array_equal(s.astype(np.float32), expected)


@pytest.mark.parametrize("landing", emulator.LANDINGS)
def test_it_multiplies_in_any_order(landing):
    for seed in range(10):
        run(spec(), seed=seed, landing=landing)


@pytest.mark.gpu
def test_it_multiplies_on_a_gpu():
    import cupy

    q, k, expected = inputs()
    device = cupy.cuda.Device()
    kernel = module.load(spec(), arch.named("sm_90a"), "cuda", device.id)
    there = {"q": cupy.asarray(q.view(np.uint16)), "k": cupy.asarray(k.view(np.uint16))}
    there["s"] = cupy.zeros((ROWS, KEYS), np.uint16)
    pointers = {name: x.data.ptr for name, x in there.items()}
    kernel.launch((ROWS // 128, 1, 1), params(kernel.text, "cuda", pointers, {}))
    np.testing.assert_array_equal(there["s"].get().view(bfloat16).astype(np.float32), expected)


@needs_nvrtc
def test_a_recorded_launch_with_maps_runs_on_the_emulator():
    """Maps made for a GPU's addresses, in the bytes that would have gone to the driver."""
    q, k, expected = inputs()
    s = aligned((ROWS, KEYS), bfloat16)
    with recording() as recorder:
        kernel = module.load(spec(), arch.named("sm_90a"), "cuda", 0)
        pointers = {name: recorder.address(x) for name, x in (("q", q), ("k", k), ("s", s))}
        kernel.launch((ROWS // 128, 1, 1), params(kernel.text, "cuda", pointers, {}))
        recorder.replay()
    np.testing.assert_array_equal(s.astype(np.float32), expected)


def test_what_it_costs():
    with emulator.counting() as counters:
        run(spec())
    blocks, tiles = ROWS // 128, -(-KEYS // 64)
    assert counters.matrix_instructions == {"wgmma_m64n64k16_bf16": blocks * tiles * 2 * (DIM // 16)}
    assert counters.matrix_moves["tma_load"] == blocks * (2 + 2 * tiles)
    assert counters.matrix_moves["tma_store"] == blocks * 2 * tiles
    assert counters.global_bytes_read == {"q": ROWS * DIM * 2, "k": blocks * KEYS * DIM * 2}
    assert counters.global_bytes_written == {"s": ROWS * KEYS * 2}
    assert not counters.bank_conflicts


WRONG = "wrong result"
BUGS = {
    "the producer waits for the wrong phase": (
        "deadlock", "at.phase ^ 1);  // consumers", "at.phase);  // consumers"),
    "the consumers wait for the wrong phase": (
        "race|deadlock|uninitialised|protocol", "at.phase);  // producer: K", "at.phase ^ 1);  // producer: K"),
    "the phase never turns": ("deadlock|race|protocol", "stage = 0, phase ^= 1;", "stage = 0;"),
    "a consumer does not arrive": (
        "deadlock", "if (lane == 0) hw::mbarrier_arrive(", "if (lane == 0 && thread > 0) hw::mbarrier_arrive("),
    "one warpgroup is not waited for": (
        "race|protocol|deadlock", "kKeyEmpty + 8 * i, 8);", "kKeyEmpty + 8 * i, 4);"),
    "a stage is filled before it is read": (
        "race|protocol", "hw::mbarrier_wait(smem + kKeyEmpty + 8 * at.stage, at.phase ^ 1);", ""),
    "K is not waited for": (
        "race|uninitialised", "hw::mbarrier_wait(smem + kKeyFull + 8 * at.stage, at.phase);", ""),
    "Q is not waited for": (
        "race|uninitialised", "hw::mbarrier_wait(smem + kQueryFull, 0);", ""),
    "a stage is given back before the products are done": (
        "race",
        """    hw::wgmma_wait<0>();
    if (lane == 0) hw::mbarrier_arrive(smem + kKeyEmpty + 8 * at.stage);  // to the producer
""",
        """    if (lane == 0) hw::mbarrier_arrive(smem + kKeyEmpty + 8 * at.stage);  // to the producer
    hw::wgmma_wait<0>();
"""),
    "the products are not waited for": (f"race|{WRONG}", "    hw::wgmma_wait<0>();\n", ""),
    "the products do not begin with a fence": ("protocol", "    hw::wgmma_fence();\n", ""),
    "a box's bytes are not announced": ("race|protocol", "(full, kKeyBytes);", "(full, kKeyBytes / 2);"),
    "an operand has another swizzle than its map": (
        f"{WRONG}|protocol",
        "Rows::descriptor(key + Rows::k_step(k, 64))", "Chunk<64>::descriptor(key + Chunk<64>::k_step(k, 64))"),
    "the second chunk is taken for the first": (
        f"{WRONG}|race", "key + Rows::k_step(k, 64)", "key + Rows::k_step(k, 32)"),
    "scores are stored without the swizzle": (
        WRONG, "score + Rows::unit_at(16 * warp + (lane & 15), 2 * j + (lane >> 4))",
        "score + (16 * warp + (lane & 15)) * Rows::kBytes + (2 * j + (lane >> 4)) * 16"),
    "scores are stored without a fence": ("proxy", "    hw::fence_proxy_async();\n", ""),
    "scores are stored before all are written": (
        "race|uninitialised|proxy", "    hw::named_sync(1 + group, 128);  // the warpgroup", "    // the warpgroup"),
    "scores are overwritten while they are stored": (
        "race", "    if (warp == 0 && hw::elect_one()) hw::bulk_wait_read<0>();\n    hw::named", "    hw::named"),
    "scores are overwritten by warps that do not wait": (
        "race", "    hw::named_sync(1 + group, 128);  // the thread", "    // the thread"),
    "the last store is not waited for": (
        "protocol", "  }\n  if (warp == 0 && hw::elect_one()) hw::bulk_wait_read<0>();\n}", "  }\n}"),
    "mbarriers are used before they are made": ("race|protocol", "  hw::sync_threads();\n", ""),
    "mbarriers are not made known to copies": ("proxy", "    hw::fence_mbarrier_init();\n", ""),
    "both warpgroups write one tile of scores": (
        "race|protocol", "score = smem + kScore + group * kScoreBytes", "score = smem + kScore"),
    "registers that are not there": ("deadlock", "hw::register_alloc<232>()", "hw::register_alloc<240>()"),
}  # fmt: skip


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught(name):
    kinds, old, new = BUGS[name]
    for landing in emulator.LANDINGS:
        for seed in range(2):
            try:
                run(spec((old, new)), seed=seed, landing=landing)
                found = "nothing"
            except EmulatorError as error:
                found = str(error)
            except AssertionError:
                found = f"{WRONG}: "
            assert re.match(f"({kinds}): ", found), found
    print(found)


@pytest.mark.parametrize("name", ["q", "k", "s"])
def test_a_map_without_the_swizzle_is_caught(name):
    with pytest.raises(AssertionError, match="Arrays are not equal"):
        run(spec(), {name: 0})


@needs_nvrtc
@needs_nvdisasm
def test_its_machine_code():
    compiled = module.compile(spec(), arch.named("sm_90a"))
    assert "(C75" not in compiled.cubin.log and not compiled.cubin.warnings
    assert (compiled.resources.spill_stores, compiled.resources.stack_bytes) == (0, 0)
    assert compiled.resources.registers == 168  # at entry; register_alloc and register_dealloc change them
    function = sass.functions(sass.disassemble(compiled.path))["cuflash_pipeline"]
    counts, (loop,) = function.counts, function.loops
    assert counts["HGMMA"] == DIM // 16 and counts["HMMA"] == 0
    assert counts["UTMALDG"] >= 4 and counts["UTMASTG"] == 1
    assert counts["SYNCS"] >= 8 and counts["STSM"] == 4
    assert counts["LDL"] == counts["STL"] == 0
    moved = sum(sass.opcode(instruction).startswith("R2UR") for instruction in loop.instructions)
    assert moved <= 4, "descriptors are computed in uniform registers"
