"""mbarriers, named barriers, tensor copies and matrix products of a warpgroup against NumPy."""

from __future__ import annotations

import contextlib

import ml_dtypes
import numpy as np
import pytest
from hw_toys import BACKENDS, Toy, aligned, at_aligned
from needs import needs_nvrtc

from cuflash import arch, emulator
from cuflash.errors import ArgumentError
from cuflash.jit import driver, nvrtc, tensor_map

bfloat16 = np.dtype(ml_dtypes.bfloat16)
each_backend = pytest.mark.parametrize("backend", BACKENDS)
SPANS = (128, 64, 32)


def unit_of(row: np.ndarray, unit: np.ndarray, span: int) -> np.ndarray:
    """Which 16-byte unit of its row a unit lies in, in rows of `span` bytes: written down from the PTX ISA's tables."""
    return unit ^ {128: row % 8, 64: row // 2 % 4, 32: row // 4 % 2, 0: 0 * row}[span]


# --- Barriers -----------------------------------------------------------------------------------------------------

BARRIERS = """
        // A ring of two stages: warp 0 writes rows of 32 numbers, warps 1 and 2 read them, n in all.
        const u32 full = smem, empty = smem + 16, stage = smem + 1024;
        if (thread == 0) {
          for (i32 i = 0; i < 2; ++i) {
            hw::mbarrier_init(full + 8 * i, 32);
            hw::mbarrier_init(empty + 8 * i, 2);
          }
          hw::fence_mbarrier_init();
        }
        hw::sync_threads();
        const i32 warp = thread / 32;
        for (i32 i = 0; i < n; ++i) {
          const i32 at = i % 2;
          const u32 phase = static_cast<u32>(i / 2 & 1), word = stage + 128 * at + 4 * lane;
          if (warp == 0) {
            hw::mbarrier_wait(empty + 8 * at, phase ^ 1);
            hw::store_shared(word, hw::load_global(a<u32>() + 32 * i + lane));
            hw::mbarrier_arrive(full + 8 * at);
          } else {
            hw::mbarrier_wait(full + 8 * at, phase);
            hw::store_global(out<u32>() + 32 * (2 * i + warp - 1) + lane, hw::load_shared<u32>(word ^ 4));
            hw::sync_warp();
            if (lane == 0) hw::mbarrier_arrive(empty + 8 * at);
          }
        }
"""


@each_backend
@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_a_ring_of_stages(toy, rng, backend, n):
    x = rng.integers(2**32, size=(n, 32), dtype=np.uint32)
    kernel = toy(BARRIERS, threads=96, smem_bytes=2048, sm90=True)
    for seed in range(5):
        with emulator.schedule(seed=seed):
            out = kernel.run(backend, a=x, out=np.zeros((n, 2, 32), np.uint32), n=n)
        np.testing.assert_array_equal(out, np.repeat(x[:, None, np.arange(32) ^ 1], 2, 1))


OTHERS = """
        const i32 warp = thread / 32;
        // Ping-pong: warps 0 and 1 write in turn; warp 2 only comes to say that it may begin.
        if (warp == 2) hw::named_arrive(1, 64);
        for (i32 i = 0; i < n && warp < 2; ++i) {
          hw::named_sync(1 + warp, 64);
          const u32 word = smem + 4 * lane;
          const u32 before = i + warp == 0 ? 1 : hw::load_shared<u32>(word);
          hw::store_shared(word, before * 3 + warp);
          if (warp == 0 || i + 1 < n) hw::named_arrive(2 - warp, 64);
        }
        hw::sync_threads();
        if (warp == 0) hw::store_global(out<u32>() + lane, hw::load_shared<u32>(smem + 4 * lane));
        const bool mine = hw::elect_one(), again = hw::elect_one();
        hw::store_global(out<u32>() + 32 + thread, (mine ? 1u : 0u) + (again ? 2u : 0u));
"""


@each_backend
def test_named_barriers_and_elect_one(toy, backend):
    kernel = toy(OTHERS, threads=96, smem_bytes=128, sm90=True)
    leaders = set()
    for seed in range(8):
        with emulator.schedule(seed=seed):
            out = kernel.run(backend, out=np.zeros((4, 32), np.uint32), n=4)
        expected = 1
        for _ in range(4):
            expected = (expected * 3) * 3 + 1
        assert set(out[0].tolist()) == {expected}
        elected = out[1:]
        assert (np.sort(elected, 1) == [*[0] * 31, 3]).all(), "one lane of each warp, the same each time"
        leaders |= set(elected.argmax(1).tolist())
    assert backend == "cuda" or len(leaders) > 3  # nobody may count on lane 0


@each_backend
def test_registers_are_handed_over(toy, backend):
    body = """
        if (thread < 128) {
          hw::register_dealloc<40>();
        } else {
          hw::register_alloc<232>();
        }
        hw::store_global(out<u32>() + thread, 1u);
        const u64 joined = hw::wgmma_descriptor(static_cast<u32>(n), static_cast<u32>(m));
        if (thread == 0) hw::store_global(out<u64>() + 192, joined);
    """
    out = toy(body, threads=384, sm90=True).run(backend, out=at_aligned(np.zeros(386, np.uint32)), n=5, m=7)
    assert (out[:384] == 1).all() and out[384:].tolist() == [5, 7]


# --- Tensor copies ------------------------------------------------------------------------------------------------

COPY = """
        // Box of map 0 to shared memory, out of there as it lies, and from there by map 1 to a tensor.
        const u32 bar = smem, box = smem + 1024;
        i32 c[5];
        for (i32 i = 0; i < 5; ++i) c[i] = hw::load_global(b<i32>() + i);
        if (thread == 0) {
          hw::prefetch_tensor_map(p.maps[0]);
          hw::mbarrier_init(bar, 1);
          hw::fence_mbarrier_init();
        }
        hw::sync_threads();
        if (thread < 32 && hw::elect_one()) {
          hw::mbarrier_arrive_expect_tx(bar, m);
          LOAD;
        }
        hw::mbarrier_wait(bar, 0);
        for (i32 i = thread; i < m / 16; i += 64)
          hw::store_global(out<u32x4>() + i, hw::load_shared<u32x4>(box + 16 * i));
        if (thread < 32 && hw::elect_one()) {
          STORE;
          hw::bulk_commit();
          hw::bulk_wait_read<0>();
        }
"""


def copy_text(rank: int) -> str:
    c = ", ".join(f"c[{i}]" for i in range(rank))
    return COPY.replace("LOAD", f"hw::tma_load(box, p.maps[0], bar, hw::CachePolicy::kEvictFirst, {c})").replace(
        "STORE", f"hw::tma_store(p.maps[1], box, {c})"
    )


def box_of(x: np.ndarray, at: tuple[int, ...], box: tuple[int, ...]) -> np.ndarray:
    """x[at : at + box], outermost axis first, zeros outside of x."""
    out = np.zeros(box, x.dtype)
    inside = [np.arange(a, a + n) for a, n in zip(at, box, strict=True)]
    kept = [(i >= 0) & (i < n) for i, n in zip(inside, x.shape, strict=True)]
    out[np.ix_(*kept)] = x[np.ix_(*(i[k] for i, k in zip(inside, kept, strict=True)))]
    return out


CASES = {  # shape and box, outermost axis first; where the box begins; swizzle
    "2D": ((50, 64), (16, 64), (8, 0), 128),
    "2D, past the end": ((50, 64), (32, 64), (40, 0), 128),
    "2D, before the beginning": ((50, 64), (16, 64), (-5, 0), 64),
    "2D, past both": ((50, 72), (16, 64), (45, 64), 128),
    "2D, outside": ((50, 72), (16, 64), (60, 128), 128),
    "2D, no swizzle": ((20, 40), (7, 24), (3, 9), 0),
    "3D": ((33, 3, 96), (24, 1, 32), (20, 1, 64), 64),
    "3D, heads folded in": ((33, 4, 64), (8, 3, 64), (30, 1, 0), 128),
    "4D": ((2, 3, 20, 128), (1, 2, 12, 16), (1, 1, 13, 112), 32),
    "5D": ((2, 2, 3, 5, 64), (2, 1, 2, 4, 64), (0, 1, 2, 3, 0), 128),
}


@each_backend
@pytest.mark.parametrize("name", CASES)
def test_a_box_goes_there_and_back(toy, rng, backend, name):
    shape, box, at, swizzle = CASES[name]
    x = at_aligned(rng.integers(1, 2**15, shape).astype(np.uint16))
    box = (*box[:-1], swizzle // 2 if swizzle else box[-1])
    row, nbytes = box[-1] * 2, int(np.prod(box)) * 2
    lying = -(-nbytes // 128) * 128
    out = aligned(lying // 2 + x.size, np.uint16)
    kernel = toy(copy_text(len(shape)), threads=64, smem_bytes=1024 + lying, sm90=True)
    describe = ("float16", shape[::-1], x.strides[-2::-1], box[::-1], swizzle)
    back = out[lying // 2 :].reshape(shape)
    coordinates = np.array([*at[::-1], *[0] * (5 - len(at))], np.int32)
    for landing in emulator.LANDINGS if backend == "emulator" else ("late",):
        out[:] = 7
        with emulator.schedule(landing=landing):
            # The second map is of `out`, behind where the box is laid.
            run_copy(kernel, backend, x, coordinates, out, nbytes, describe, lying)
        expected = box_of(x, at, box)
        found = out[: nbytes // 2].reshape(-1, row // 16, 8) if swizzle else out[: nbytes // 2].reshape(box)
        if swizzle:
            rows, units = np.indices(found.shape[:2])
            found = found[rows, unit_of(rows, units, swizzle)].reshape(box)
        np.testing.assert_array_equal(found, expected)
        written = np.full(shape, 7, np.uint16)
        place = tuple(slice(max(a, 0), max(a + n, 0)) for a, n in zip(at, box, strict=True))
        written[place] = x[place]
        np.testing.assert_array_equal(back, written)


def run_copy(kernel: Toy, backend: str, x, coordinates, out, nbytes: int, describe: tuple, behind: int) -> None:
    maps = [("a", 0, *describe), ("out", behind, *describe)]
    kernel.run(backend, a=x, b=coordinates, out=out, m=nbytes, maps=maps)


@each_backend
@pytest.mark.parametrize("begin, length", [(3, 20), (40, 5), (0, 50)])
def test_a_ragged_map_ends_with_its_sequence(toy, rng, backend, begin, length):
    """Two outer axes whose strides cancel modulo 2^64: rows from `length` on are outside, wherever the sequence is."""
    x = at_aligned(rng.integers(1, 2**15, (50, 2, 64)).astype(np.uint16))
    stride = x.strides[0]
    # Coordinates: column, head, 2^30 - length + row, begin + length, 2^30.
    dims, strides = (64, 2, 2**30, 0x7FFF0000, 0x7FFF0000), (128, stride, stride, 2**35 - stride)
    describe = ("float16", dims, strides, (64, 1, 16, 1, 1), 128)
    row, head = 16, 1
    out = aligned(1024 + x.size, np.uint16)
    at = np.array([0, head, 2**30 - length + row, begin + length, 2**30], np.int32)
    run_copy(toy(copy_text(5), threads=64, smem_bytes=4096, sm90=True), backend, x, at, out, 2048, describe, 2048)
    expected = box_of(x[begin : begin + length, head], (row, 0), (16, 64))
    found = out[:1024].reshape(16, 8, 8)
    rows, units = np.indices(found.shape[:2])
    np.testing.assert_array_equal(found[rows, unit_of(rows, units, 128)].reshape(16, 64), expected)
    written = np.zeros_like(x)
    stored = slice(begin + row, begin + min(length, row + 16))
    written[stored, head] = x[stored, head]
    np.testing.assert_array_equal(out[1024:].reshape(x.shape), written)


def test_what_a_copy_costs(toy):
    x, out = aligned((50, 64), np.uint16), aligned(2048 + 3200, np.uint16)
    kernel = toy(copy_text(2), threads=64, smem_bytes=8192, sm90=True)
    describe = ("float16", (64, 50), (128,), (64, 16), 128)
    with emulator.counting() as counters:
        run_copy(kernel, "emulator", x, np.array([0, 40, 0, 0, 0], np.int32), out, 2048, describe, 4096)
    assert counters.matrix_moves == {"tma_load": 1, "tma_store": 1}
    assert counters.global_bytes_read["a"] == 10 * 128  # of 16 rows, those there are
    assert counters.global_bytes_written["out"] == 2048 + 10 * 128


# --- Tensor maps --------------------------------------------------------------------------------------------------

GOOD = {
    "address": 4096, "dtype": "bfloat16", "dims": (128, 8, 1000), "strides": (256, 2048), "box": (64, 1, 128),
    "swizzle": 128,
}  # fmt: skip


@pytest.mark.parametrize(
    "change, says",
    [
        ({"address": 4104}, "address=0x1008 must be a multiple of 16"),
        ({"dtype": "int8"}, "dtype='int8' must be one of"),
        ({"dims": (128, 8)}, "2 to 5 axes"),
        ({"dims": (128, 0, 1000)}, "from 1 to 2^32"),
        ({"strides": (250, 2048)}, "multiples of 16 below 2^40"),
        ({"strides": (256, 2**40)}, "multiples of 16 below 2^40"),
        ({"box": (64, 1, 257)}, "from 1 to 256"),
        ({"box": (64, 0, 16)}, "from 1 to 256"),
        ({"box": (60, 1, 16), "swizzle": 0}, "a row of 120 bytes must be a multiple of 16"),
        ({"box": (128, 1, 16)}, "a row of 256 bytes must be swizzle=128"),
        ({"swizzle": 16}, "swizzle=16 must be one of 0, 32, 64, 128"),
    ],
)
def test_maps_the_driver_would_refuse(change, says):
    assert len(tensor_map.encode("emulator", **GOOD)) == tensor_map.BYTES
    with pytest.raises(ArgumentError) as raised:
        tensor_map.encode("emulator", **{**GOOD, **change})
    assert says in str(raised.value)


def test_what_the_driver_is_asked(monkeypatch):
    asked = []

    def encode_tiled(place, dtype, rank, address, dims, strides, box, steps, interleave, swizzle, promotion, fill):
        assert place.value % 64 == 0
        asked.append((dtype.value, rank.value, address.value, [*dims], [*strides], [*box], [*steps], interleave.value))
        asked.append((swizzle.value, promotion.value, fill.value))
        import ctypes

        ctypes.memset(place.value, 0xAB, tensor_map.BYTES)
        return 0 if address.value == 4096 else 1

    monkeypatch.setattr(driver, "function", {"cuTensorMapEncodeTiled": encode_tiled}.__getitem__)
    monkeypatch.setattr(driver, "context", lambda device: contextlib.nullcontext())
    tensor_map.encode.cache_clear()
    assert tensor_map.encode("cuda", **GOOD) == b"\xab" * tensor_map.BYTES
    assert asked == [(9, 3, 4096, [128, 8, 1000], [256, 2048], [64, 1, 128], [1, 1, 1], 0), (3, 3, 0)]
    with pytest.raises(ArgumentError, match="cuTensorMapEncodeTiled: error 1 for address=0x2000"):
        tensor_map.encode("cuda", **{**GOOD, "address": 8192})
    tensor_map.encode.cache_clear()


# --- Matrix products ----------------------------------------------------------------------------------------------

# a [64, 32 or 16], b: both as the host has laid them out in shared memory; d += a b, twice 16 of k.
PRODUCT = """
        const u32 from_a = smem, from_b = smem + 16384;
        for (i32 i = thread; i < 1024; i += 128) hw::store_shared(from_a + 16 * i, hw::load_global(a<u32x4>() + i));
        for (i32 i = thread; i < 2048; i += 128) hw::store_shared(from_b + 16 * i, hw::load_global(b<u32x4>() + i));
        hw::fence_proxy_async();
        hw::sync_threads();
        const auto plain = [](u32 from, i32 next_k, i32 across) {
          return hw::wgmma_descriptor(from >> 4 | static_cast<u32>(next_k >> 4) << 16, static_cast<u32>(across >> 4));
        };
        (void)plain;
        u32 r[2][4];
        for (i32 k = 0; k < 2; ++k)
          for (i32 i = 0; i < 4; ++i) r[k][i] = hw::load_global(a<u32>() + 4096 + (k * 128 + thread) * 4 + i);
"""
CALL = """
        if (m == INDEX) {
          float d[COUNT];
          for (i32 i = 0; i < COUNT; ++i) d[i] = hw::load_global(out<float>() + COUNT * thread + i);
          hw::wgmma_pin(d);
          hw::wgmma_pin(r);
          hw::wgmma_fence();
          for (i32 k = 0; k < 2; ++k) PRODUCT;
          hw::wgmma_commit();
          hw::wgmma_wait<0>();
          hw::wgmma_pin(d);
          for (i32 i = 0; i < COUNT; ++i) hw::store_global(out<float>() + COUNT * thread + i, d[i]);
        }
"""
WIDTHS = (8, 24, 64, 80, 96, 112, 128, 144, 160, 176, 192, 256)


def products() -> dict[tuple, str]:
    """(element, n, span, form, major of a, major of b) -> the call."""
    made = {}
    for i, n in enumerate(WIDTHS):
        for form, major_a, major_b in (("ss", "kK", "kK"), ("rs", "", "kMn"), ("ss", "kMn", "kMn"), ("rs", "", "kK")):
            element = "Half" if (i + (form == "rs")) % 2 else "Bfloat16"
            for span in (*SPANS, 0) if n in (24, 64, 80, 128) else (128,):
                if span and "kMn" in (major_a, major_b) and (n % (span // 2) or (major_a and 64 % (span // 2))):
                    continue  # of chunks that are complete
                place = {
                    "kK": "Chunk<S>::descriptor(Chunk<S>::k_major(FROM) + Chunk<S>::k_step(16 * k, ROWS))",
                    "kMn": "Chunk<S>::descriptor(Chunk<S>::mn_major(FROM, 32) + Chunk<S>::mn_step(16 * k))",
                }
                if span == 0:  # bytes to the next 8 elements of k, and to the next 8 across
                    place = {
                        "kK": "plain(FROM + 256 * k, 128, 512)",
                        "kMn": "plain(FROM + 32 * ROWS * k, 16 * ROWS, 128)",
                    }
                place = {major: text.replace("<S>", f"<{span}>") for major, text in place.items()}
                b = place[major_b].replace("FROM", "from_b").replace("ROWS", str(n))
                if form == "ss":
                    a = place[major_a].replace("FROM", "from_a").replace("ROWS", "64")
                    majors = f"hw::Major::{major_a}, hw::Major::{major_b}"
                    call = f"hw::wgmma_ss<hw::{element}, {majors}>(d, {a}, {b}, k > 0 || n)"
                else:
                    call = f"hw::wgmma_rs<hw::{element}, hw::Major::{major_b}>(d, r[k], {b}, k > 0 || n)"
                made[element, n, span, form, major_a, major_b] = call
    return made


def laid_out(x: np.ndarray, span: int) -> np.ndarray:
    """[rows, columns] of 2 bytes as chunks of `span` bytes, swizzled; 0: as 8 x 8 matrices, of 8 rows together."""
    if span == 0:
        return x.view(np.uint16).reshape(x.shape[0] // 8, 8, -1, 8).swapaxes(1, 2).reshape(-1)
    per = span // 2
    width = -(-x.shape[1] // per) * per
    x = np.pad(x.view(np.uint16), ((0, 0), (0, width - x.shape[1])))
    chunks = x.reshape(x.shape[0], -1, span // 16, 8).transpose(1, 0, 2, 3)
    rows, units = np.indices(chunks.shape[1:3])
    out = np.empty_like(chunks)
    out[:, rows, unit_of(rows, units, span)] = chunks
    return out.reshape(-1)


def product_toy(folder, widths) -> Toy:
    calls = [
        CALL.replace("INDEX", str(i)).replace("COUNT", str(key[1] // 2)).replace("PRODUCT", call)
        for i, (key, call) in enumerate(products().items())
        if key[1] in widths
    ]
    return Toy(folder, PRODUCT + "".join(calls), threads=128, smem_bytes=49152, sm90=True)


@pytest.fixture(scope="module")
def product_kernel(tmp_path_factory):
    return product_toy(tmp_path_factory.mktemp("toy"), WIDTHS)


@each_backend
@pytest.mark.parametrize("key", products(), ids=lambda key: "-".join(map(str, key)))
def test_wgmma(product_kernel, rng, backend, key):
    """Small integers, whose sums are exact, with d added to (n = 1) and not."""
    element, n, span, form, major_a, major_b = key
    dtype = bfloat16 if element == "Bfloat16" else np.dtype(np.float16)
    a, b = (rng.integers(-8, 9, shape).astype(dtype) for shape in ((64, 32), (32, n)))
    d = rng.integers(-8, 9, (64, n)).astype(np.float32)
    memory_a, memory_b = aligned((2, 4096 * 2), np.uint16), aligned(16384, np.uint16)
    if form == "ss":
        lying = laid_out(a if major_a == "kK" else np.ascontiguousarray(a.T), span)
        memory_a.reshape(-1)[: lying.size] = lying
    else:  # thread, register, half -> row, column
        k, thread, i, half = np.indices((2, 128, 4, 2))
        row = thread // 32 * 16 + thread % 32 // 4 + i % 2 * 8
        registers = a.view(np.uint16)[row, 16 * k + thread % 4 * 2 + half + i // 2 * 8]
        memory_a.reshape(-1)[8192 : 8192 + registers.size] = registers.reshape(-1)
    lying = laid_out(np.ascontiguousarray(b.T) if major_b == "kK" else b, span)
    memory_b[: lying.size] = lying
    thread, i = np.indices((128, n // 2))
    where = thread // 32 * 16 + thread % 32 // 4 + i % 4 // 2 * 8, i // 4 * 8 + thread % 4 * 2 + i % 2
    for landing in emulator.LANDINGS if backend == "emulator" else ("late",):
        for add in (0, 1):
            with emulator.schedule(landing=landing):
                out = product_kernel.run(
                    backend, a=memory_a, b=memory_b, out=at_aligned(d[where]), n=add, m=list(products()).index(key)
                )
            expected = a.astype(np.float32) @ b.astype(np.float32) + add * d
            np.testing.assert_array_equal(out, expected[where])


@needs_nvrtc
def test_the_kernels_here_compile_for_a_gpu(tmp_path):
    texts = [copy_text(rank) for rank in (2, 3, 4, 5)]
    everything = "".join(f"if (n == {i}) {{ {text} }}\n" for i, text in enumerate((BARRIERS, OTHERS, *texts)))
    for kernel in (Toy(tmp_path, everything, sm90=True), product_toy(tmp_path, (8, 112, 256))):
        cubin = nvrtc.compile(kernel.spec.text("cuda"), arch.named("sm_90a"), "toy.cu")
        assert "(C75" not in cubin.log
