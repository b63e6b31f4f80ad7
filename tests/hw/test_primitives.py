"""Each hardware wrapper against NumPy, on the emulator and, where there is one, on a GPU."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hw_toys import BACKENDS, Toy, aligned, at_aligned
from needs import needs_nvrtc

from cuflash import arch
from cuflash.errors import EmulatorError
from cuflash.jit import nvrtc

bfloat16 = np.dtype(ml_dtypes.bfloat16)
each_backend = pytest.mark.parametrize("backend", BACKENDS)

# name -> (body, threads, shared bytes)
BODIES = {
    "where": ("""
      i32* to = out<i32>() + ((hw::block_idx_z() * hw::grid_dim_y() + hw::block_idx_y()) * hw::grid_dim_x() +
                              hw::block_idx_x()) * 64 * 9 + thread * 9;
      const i32 values[9] = {hw::anew(thread), lane, hw::warp_idx(), hw::block_idx_x(), hw::block_idx_y(),
                             hw::block_idx_z(), hw::grid_dim_x(), hw::grid_dim_y(), hw::grid_dim_z()};
      for (i32 i = 0; i < 9; ++i) hw::store_global(to + i, values[i]);
    """, 64, 0),
    "shfl_xor": ("hw::store_global(out<u32>() + lane, hw::shfl_xor(hw::load_global(a<u32>() + lane), n));", 32, 0),
    "shfl": (
        "hw::store_global(out<u32>() + lane, hw::shfl(hw::load_global(a<u32>() + lane), "
        "hw::load_global(b<i32>() + lane)));", 32, 0),
    "shfl_up": ("hw::store_global(out<u32>() + lane, hw::shfl_up(hw::load_global(a<u32>() + lane), n));", 32, 0),
    "reduce": ("""
      hw::store_global(out<i32>() + lane, hw::reduce_min(hw::load_global(a<i32>() + lane)));
      hw::store_global(out<i32>() + 32 + lane, hw::reduce_max(hw::load_global(a<i32>() + lane)));
    """, 32, 0),
    "vote": ("""
      const bool mine = hw::load_global(a<u32>() + lane) != 0;
      hw::store_global(out<u32>() + lane, hw::ballot(mine));
      hw::store_global(out<u32>() + 32 + lane, hw::any(mine) ? 1u : 0u);
      hw::store_global(out<u32>() + 64 + lane, hw::all(mine) ? 1u : 0u);
    """, 32, 0),
    "shared": ("""
      hw::store_shared(smem + 16 * thread, hw::load_global(a<u32x4>() + thread));
      hw::sync_threads();
      const i32 other = 63 - thread;
      hw::store_global(out<u32x4>() + thread, hw::load_shared<u32x4>(smem + 16 * other));
      hw::store_global(out<u32>() + 256 + thread, hw::load_shared<u32>(smem + 16 * other + 4));
      hw::store_global(out<u16>() + 640 + thread, hw::load_shared<u16>(smem + 16 * other + 14));
      hw::sync_threads();
      hw::store_shared(smem + 4 * thread, static_cast<u32>(thread) * 3);
      hw::store_shared(smem + 256 + 2 * thread, static_cast<u16>(thread * 5));
      hw::sync_threads();
      hw::store_global(out<u32>() + 352 + thread, hw::load_shared<u32>(smem + 4 * other));
      hw::store_global(out<u16>() + 832 + thread, hw::load_shared<u16>(smem + 256 + 2 * other));
    """, 64, 1024),
    "global": ("""
      hw::store_global(out<u8>() + thread, hw::load_global(a<u8>() + thread));
      hw::store_global(out<u16>() + 16 + thread, hw::load_global(a<u16>() + 16 + thread));
      hw::store_global(out<u32>() + 32 + thread, hw::load_global(a<u32>() + 32 + thread));
      hw::store_global(out<u64>() + 64 + thread, hw::load_global(a<u64>() + 64 + thread));
      hw::store_global(out<u32x4>() + 64 + thread, hw::load_global(a<u32x4>() + 64 + thread));
    """, 32, 0),
    "atomic_add": ("""
      // Every thread of every block adds to one of n sums; neighbours to neighbours.
      const float mine = hw::load_global(a<float>() + hw::block_idx_x() * 64 + thread);
      hw::atomic_add(out<float>() + thread % n, mine);
    """, 64, 0),
    "atomic_add4": ("""
      // Lanes pass what they add through shared memory, in pairs.
      hw::store_shared(smem + 16 * thread, hw::load_global(a<u32x4>() + hw::block_idx_x() * 64 + thread));
      hw::sync_threads();
      const f32x2 low = hw::load_shared<f32x2>(smem + 16 * (63 - thread));
      const f32x2 high = hw::load_shared<f32x2>(smem + 16 * (63 - thread) + 8);
      const float mine[4] = {low.x[0], low.x[1], high.x[0], high.x[1]};
      hw::atomic_add4(out<float>() + 4 * (thread % n), mine);
    """, 64, 1024),
    "sync_warp": ("""
      hw::store_shared(smem + 4 * lane, static_cast<u32>(lane * lane));
      hw::sync_warp();
      hw::store_global(out<u32>() + lane, hw::load_shared<u32>(smem + 4 * (31 - lane)));
    """, 32, 128),
    "cp_async": ("""
      // Lane l brings l bytes of unit l (16 and more: all 16), and then, of words, l % 5.
      hw::cp_async_16(smem + 16 * lane, a<u8>() + 16 * lane, lane < 16 ? lane : 16);
      hw::cp_async_commit();
      hw::cp_async_4(smem + 512 + 4 * lane, lane % 5 == 0 ? a<u8>() : a<u8>() + 4 * lane, lane % 5);
      hw::cp_async_commit();
      hw::cp_async_wait<1>();
      hw::store_global(out<u32x4>() + lane, hw::load_shared<u32x4>(smem + 16 * lane));
      hw::cp_async_wait<0>();
      hw::store_global(out<u32>() + 128 + lane, hw::load_shared<u32>(smem + 512 + 4 * lane));
    """, 32, 1024),
    "ldmatrix": ("""
      hw::store_shared(smem + 16 * thread, hw::load_global(a<u32x4>() + thread));
      hw::sync_warp();
      u32 r[4];
      hw::ldmatrix_x4(r, smem + 16 * hw::load_global(b<u32>() + lane));
      for (i32 i = 0; i < 4; ++i) hw::store_global(out<u32>() + 4 * lane + i, r[i]);
      hw::ldmatrix_x4_trans(r, smem + 16 * hw::load_global(b<u32>() + lane));
      for (i32 i = 0; i < 4; ++i) hw::store_global(out<u32>() + 128 + 4 * lane + i, r[i]);
    """, 32, 512),
    "stmatrix": ("""
      u32 r[4];
      for (i32 i = 0; i < 4; ++i) r[i] = hw::load_global(a<u32>() + 4 * lane + i);
      hw::stmatrix_x4(smem + 16 * hw::load_global(b<u32>() + lane), r);
      hw::sync_warp();
      hw::store_global(out<u32x4>() + lane, hw::load_shared<u32x4>(smem + 16 * lane));
    """, 32, 512),
    "round_tf32": (
        "hw::store_global(out<u32>() + thread, hw::round_tf32(hw::load_global(a<float>() + thread)));", 1024, 0),
    "pack2_half": ("""
      const float low = hw::load_global(a<float>() + thread), high = hw::load_global(b<float>() + thread);
      hw::store_global(out<u32>() + thread, hw::pack2<hw::Half>(low, high));
    """, 1024, 0),
    "pack2_bfloat16": ("""
      const float low = hw::load_global(a<float>() + thread), high = hw::load_global(b<float>() + thread);
      hw::store_global(out<u32>() + thread, hw::pack2<hw::Bfloat16>(low, high));
    """, 1024, 0),
    "to_float": ("""
      for (i32 i = thread; i < 65536; i += 1024) {
        hw::store_global(out<float>() + i, hw::to_float(hw::Half{static_cast<u16>(i)}));
        hw::store_global(out<float>() + 65536 + i, hw::to_float(hw::Bfloat16{static_cast<u16>(i)}));
      }
    """, 1024, 0),
    "float_ops": ("""
      const float x = hw::load_global(a<float>() + thread), y = hw::load_global(b<float>() + thread);
      const float results[6] = {hw::max(x, y), hw::min(x, y), hw::abs(x), hw::fma(x, y, 0.1f), hw::to_float(x),
                                hw::mul(x, y)};
      for (i32 i = 0; i < 6; ++i) hw::store_global(out<u32>() + 128 * i + thread, hw::float_bits(results[i]));
      hw::store_global(out<u32>() + 768 + thread, hw::float_bits(hw::bits_float(hw::float_bits(x))));
    """, 128, 0),
}  # fmt: skip

MMA = """
      float d[4];
      u32 r[4];
      const u32 b0 = hw::load_global(b<u32>() + 2 * lane), b1 = hw::load_global(b<u32>() + 2 * lane + 1);
      for (i32 i = 0; i < 4; ++i) {
        r[i] = hw::load_global(a<u32>() + 4 * lane + i);
        d[i] = hw::load_global(out<float>() + 4 * lane + i);
      }
      INSTRUCTION;
      for (i32 i = 0; i < 4; ++i) hw::store_global(out<float>() + 4 * lane + i, d[i]);
"""
BODIES["popcount"] = (
    "hw::store_global(out<i32>() + thread, hw::popcount(hw::load_global(a<u32>() + thread)));", 1024, 0
)  # fmt: skip
BODIES["lowest_bit"] = (
    "hw::store_global(out<i32>() + thread, hw::lowest_bit(hw::load_global(a<u32>() + thread)));", 1024, 0
)  # fmt: skip
BODIES["to_int"] = (
    "hw::store_global(out<i32>() + thread, hw::to_int(hw::load_global(a<float>() + thread)));", 1024, 0
)  # fmt: skip
BODIES["to_long"] = (
    "hw::store_global(out<i64>() + thread, hw::to_long(hw::load_global(a<float>() + thread)));", 1024, 0
)  # fmt: skip
BODIES["atomic_add_u64"] = ("hw::atomic_add(out<u64>() + thread % 2, hw::load_global(a<u64>() + thread));", 64, 0)
BODIES["checked_index"] = (
    "hw::store_global(out<i32>() + thread, hw::checked_index(hw::load_global(a<i32>() + thread), n));", 32, 0
)  # fmt: skip
for function in (
    "hw::exp2_approx", "hw::log2_approx", "hw::rcp_approx", "hw::tanh_approx", "hw::sqrt_approx", "hw::rsqrt_approx",
    "hw::sin_approx", "hw::cos_approx", "hw::floor", "hw::ceil", "hw::erf", "hw::expm1", "hw::log1p", "hw::atan",
):  # fmt: skip
    call = f"hw::store_global(out<float>() + thread, {function}(hw::load_global(a<float>() + thread)));"
    BODIES[function.removeprefix("hw::")] = (call, 1024, 0)
BODIES["atan2"] = (
    "hw::store_global(out<float>() + thread, hw::atan2(hw::load_global(a<float>() + thread), "
    "hw::load_global(b<float>() + thread)));",
    1024, 0,
)  # fmt: skip
for kind, call in {
    "float16": "hw::mma_m16n8k16(hw::Half{}, d, r, b0, b1)",
    "bfloat16": "hw::mma_m16n8k16(hw::Bfloat16{}, d, r, b0, b1)",
    "tf32": "hw::mma_m16n8k8_tf32(d, r, b0, b1)",
}.items():
    BODIES[f"mma_{kind}"] = (MMA.replace("INSTRUCTION", call), 32, 0)


@pytest.fixture
def run(toy):
    def run(name: str, backend: str, **arguments) -> np.ndarray:
        body, threads, smem_bytes = BODIES[name]
        arguments = {k: at_aligned(v) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}
        return toy(body, threads=threads, smem_bytes=smem_bytes).run(backend, **arguments)

    return run


def bits_of(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.uint32)


SPECIAL = np.array(
    [0, 1, -1, 0.5, np.inf, np.nan, 1e-38, 1e-39, 1e-45, 3e38, 126, 127.5, 128, 149, 65504, 65519.996, 65520, 1e5,
     6.1035156e-5, 6.0975552e-5, 5.9604645e-8, 2.9802322e-8, 2.9802326e-8, 1e-9, 1.0004883, 1.0014648, 1 + 2**-8,
     1 + 3 * 2**-8, 3.3895314e38, 3.4028235e38, 1 + 2**-11, 1 + 3 * 2**-11],
    np.float32,
)  # fmt: skip


def floats(rng: np.random.Generator, count: int, largest: float = 100) -> np.ndarray:
    """Draws, with the numbers where rules change, of either sign."""
    draws = rng.uniform(-largest, largest, count - 2 * len(SPECIAL))
    return np.concatenate([SPECIAL, -SPECIAL, draws]).astype(np.float32)


@each_backend
def test_where_a_thread_is(run, backend):
    grid = (3, 2, 2)
    found = run("where", backend, out=np.zeros((2, 2, 3, 64, 9), np.int32), grid=grid)
    z, y, x, thread = np.indices((2, 2, 3, 64))
    expected = np.stack(np.broadcast_arrays(thread, thread % 32, thread // 32, x, y, z, *grid), axis=-1)
    np.testing.assert_array_equal(found, expected)


@each_backend
@pytest.mark.parametrize("mask", [1, 2, 16, 31, 0])
def test_shfl_xor(run, rng, backend, mask):
    x = rng.integers(2**32, size=32, dtype=np.uint32)
    found = run("shfl_xor", backend, a=x, out=np.zeros(32, np.uint32), n=mask)
    np.testing.assert_array_equal(found, x[np.arange(32) ^ mask])


@each_backend
def test_shfl(run, rng, backend):
    x, source = rng.integers(2**32, size=32, dtype=np.uint32), rng.integers(32, size=32, dtype=np.int32)
    found = run("shfl", backend, a=x, b=source, out=np.zeros(32, np.uint32))
    np.testing.assert_array_equal(found, x[source])


@each_backend
@pytest.mark.parametrize("delta", [0, 1, 16, 31])
def test_shfl_up(run, rng, backend, delta):
    x = rng.integers(2**32, size=32, dtype=np.uint32)
    lanes = np.arange(32)
    found = run("shfl_up", backend, a=x, out=np.zeros(32, np.uint32), n=delta)
    np.testing.assert_array_equal(found, x[np.where(lanes < delta, lanes, lanes - delta)])


@each_backend
def test_reduce(run, rng, backend):
    x = rng.integers(-(2**31), 2**31, size=32).astype(np.int32)
    least, greatest = run("reduce", backend, a=x, out=np.zeros((2, 32), np.int32))
    assert set(least.tolist()) == {x.min()}
    assert set(greatest.tolist()) == {x.max()}


@each_backend
@pytest.mark.parametrize("kind", ["some", "none", "all"])
def test_votes(run, rng, backend, kind):
    x = {"some": rng.integers(2, size=32), "none": np.zeros(32), "all": np.ones(32)}[kind].astype(np.uint32)
    ballot, any_, all_ = run("vote", backend, a=x, out=np.zeros((3, 32), np.uint32))
    assert set(ballot.tolist()) == {int((x.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum())}
    assert set(any_.tolist()) == {int(x.any())}
    assert set(all_.tolist()) == {int(x.all())}


@each_backend
def test_shared_memory(run, rng, backend):
    x = rng.integers(2**32, size=(64, 4), dtype=np.uint32)
    found = run("shared", backend, a=x, out=np.zeros(448, np.uint32))
    halves, other = found.view(np.uint16), np.arange(64)[::-1]
    np.testing.assert_array_equal(found[:256].reshape(64, 4), x[::-1])
    np.testing.assert_array_equal(found[256:320], x[::-1, 1])
    np.testing.assert_array_equal(halves[640:704], x[::-1, 3] >> 16)
    np.testing.assert_array_equal(found[352:416], other * 3)
    np.testing.assert_array_equal(halves[832:896], other * 5)


@each_backend
def test_global_memory(run, rng, backend):
    x = rng.integers(256, size=1536, dtype=np.uint8)
    found = run("global", backend, a=x, out=np.zeros_like(x))
    moved = np.zeros(1536, bool)
    for begin, size in ((0, 1), (32, 2), (128, 4), (512, 8), (1024, 16)):
        moved[begin : begin + 32 * size] = True
    np.testing.assert_array_equal(found, np.where(moved, x, 0))


@each_backend
@pytest.mark.parametrize("sums", [1, 8, 64])
def test_atomic_add(run, rng, backend, sums):
    """No addition is lost. Small integers: any order gives the same sum."""
    x = rng.integers(-50, 50, (300, 64)).astype(np.float32)
    before = rng.integers(-50, 50, sums).astype(np.float32)
    found = run("atomic_add", backend, a=x, out=before, n=sums, grid=(300, 1, 1))
    np.testing.assert_array_equal(found, before + x.reshape(-1, sums).sum(axis=0))


@each_backend
def test_atomic_add_keeps_infinity_and_nan(run, backend):
    x = np.zeros((1, 64), np.float32)
    x[0, :3] = np.inf, -np.inf, np.nan
    found = run("atomic_add", backend, a=x, out=np.ones(64, np.float32), n=64)
    np.testing.assert_array_equal(found[:4], np.array([np.inf, -np.inf, np.nan, 1], np.float32))


@each_backend
def test_sync_warp(run, backend):
    np.testing.assert_array_equal(run("sync_warp", backend, out=np.zeros(32, np.uint32)), np.arange(32)[::-1] ** 2)


@each_backend
def test_cp_async_brings_some_bytes_and_fills_the_rest_with_zeros(run, rng, backend):
    x = rng.integers(1, 256, size=512, dtype=np.uint8)
    found = run("cp_async", backend, a=x, out=np.zeros(640, np.uint8))
    lanes = np.arange(32)
    units = np.where(np.arange(16) < np.minimum(lanes, 16)[:, None], x.reshape(32, 16), 0)
    words = np.where(np.arange(4) < (lanes % 5)[:, None], x[:128].reshape(32, 4), 0)
    np.testing.assert_array_equal(found[:512].reshape(32, 16), units)
    np.testing.assert_array_equal(found[512:].reshape(32, 4), words)


@each_backend
def test_ldmatrix(run, rng, backend):
    rows, order = rng.integers(2**16, size=(32, 8), dtype=np.uint16), rng.permutation(32).astype(np.uint32)
    plain, transposed = (
        run("ldmatrix", backend, a=rows, b=order, out=np.zeros((2, 32, 4), np.uint32))
        .view(np.uint16)
        .reshape(2, 32, 4, 2)
    )
    matrices = rows[order].reshape(4, 8, 8)
    lane, i, half = np.indices((32, 4, 2))
    np.testing.assert_array_equal(plain, matrices[i, lane // 4, lane % 4 * 2 + half])
    np.testing.assert_array_equal(transposed, matrices[i, lane % 4 * 2 + half, lane // 4])


@each_backend
def test_stmatrix_is_the_reverse_of_ldmatrix(run, rng, backend):
    r, order = rng.integers(2**32, size=(32, 4), dtype=np.uint32), rng.permutation(32).astype(np.uint32)
    found = run("stmatrix", backend, a=r, b=order, out=np.zeros((32, 8), np.uint16))
    lane, i, half = np.indices((32, 4, 2))
    expected = np.zeros((4, 8, 8), np.uint16)
    expected[i, lane // 4, lane % 4 * 2 + half] = r.view(np.uint16).reshape(32, 4, 2)
    np.testing.assert_array_equal(found[order], expected.reshape(32, 8))


def to_float16_bits(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        return x.astype(np.float16).view(np.uint16)


@each_backend
@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_pack2_rounds_to_nearest_even(run, rng, backend, kind):
    low, high = floats(rng, 1024, 70000), floats(rng, 1024, 1e-4)
    found = run(f"pack2_{'half' if kind == 'float16' else kind}", backend, a=low, b=high, out=np.zeros(1024, np.uint32))
    for x, bits in ((low, found & 0xFFFF), (high, found >> 16)):
        expected = to_float16_bits(x) if kind == "float16" else x.astype(bfloat16).view(np.uint16)
        np.testing.assert_array_equal(bits, np.where(np.isnan(x), 0x7FFF, expected))


@each_backend
def test_16_bit_floats_become_floats(run, backend):
    half, brain = run("to_float", backend, out=np.zeros((2, 65536), np.float32))
    bits = np.arange(65536, dtype=np.uint16)
    np.testing.assert_array_equal(half, bits.view(np.float16).astype(np.float32))
    np.testing.assert_array_equal(brain, bits.view(bfloat16).astype(np.float32))


@each_backend
def test_popcount(run, rng, backend):
    x = rng.integers(2**32, size=1024, dtype=np.uint32)
    x[:2] = 0, 2**32 - 1
    np.testing.assert_array_equal(run("popcount", backend, a=x, out=np.zeros(1024, np.int32)), np.bitwise_count(x))


@each_backend
def test_max_min_abs_fma_mul(run, rng, backend):
    x, y = floats(rng, 128), rng.permutation(floats(rng, 128))
    y[:4], x[:4] = (np.nan, 1, np.nan, 0.0), (1, np.nan, np.nan, -0.0)
    out = run("float_ops", backend, a=x, b=y, out=np.zeros((7, 128), np.float32))
    most, least, size, fused, same, product, bits = out
    np.testing.assert_array_equal(most, np.fmax(x, y))
    np.testing.assert_array_equal(least, np.fmin(x, y))
    assert not np.signbit(most[3]) and np.signbit(least[3])  # +0 is larger than -0
    np.testing.assert_array_equal(size, np.abs(x))
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        exact = (x.astype(np.longdouble) * y + np.float32(0.1)).astype(np.float32)
        np.testing.assert_array_equal(product, x * y)
    np.testing.assert_array_equal(fused, exact)
    np.testing.assert_array_equal(bits_of(same), bits_of(x))
    np.testing.assert_array_equal(bits_of(bits), bits_of(x))


def flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


@each_backend
def test_exp2_approx(run, rng, backend):
    x = floats(rng, 1024, 140)
    found = run("exp2_approx", backend, a=x, out=np.zeros(1024, np.float32))
    with np.errstate(over="ignore", under="ignore"):
        expected = flushed(np.exp2(x.astype(np.float64)).astype(np.float32))
    np.testing.assert_allclose(found, expected, rtol=2.0**-22)


@each_backend
def test_log2_approx(run, rng, backend):
    x = np.abs(floats(rng, 1024))
    found = run("log2_approx", backend, a=x, out=np.zeros(1024, np.float32))
    with np.errstate(divide="ignore"):
        expected = np.log2(flushed(x).astype(np.float64))
    np.testing.assert_allclose(found, expected, rtol=2.0**-22, atol=2.0**-22)


@each_backend
def test_rcp_approx(run, rng, backend):
    x = floats(rng, 1024)
    found = run("rcp_approx", backend, a=x, out=np.zeros(1024, np.float32))
    with np.errstate(divide="ignore"):
        expected = flushed((1 / flushed(x).astype(np.float64)).astype(np.float32))
    np.testing.assert_allclose(found, expected, rtol=2.0**-23)


@each_backend
def test_tanh_approx(run, rng, backend):
    x = floats(rng, 1024, 3)
    found = run("tanh_approx", backend, a=x, out=np.zeros(1024, np.float32))
    np.testing.assert_allclose(found, np.tanh(x.astype(np.float64)), rtol=2.0**-10.987, atol=2.0**-126)
    if backend == "emulator":  # no better than the instruction
        assert not (bits_of(found[~np.isnan(found)]) & 0x1FFF).any()


@each_backend
def test_sqrt_and_rsqrt_approx(run, rng, backend):
    x = np.abs(floats(rng, 1024))
    exact = np.sqrt(flushed(x).astype(np.float64))
    found = run("sqrt_approx", backend, a=x, out=np.zeros(1024, np.float32))
    np.testing.assert_allclose(found, exact, rtol=2.0**-22)
    found = run("rsqrt_approx", backend, a=x, out=np.zeros(1024, np.float32))
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(found, 1 / exact, rtol=2.0**-22)


@each_backend
@pytest.mark.parametrize("name", ["sin", "cos"])
def test_sin_and_cos_approx_within_a_turn(run, rng, backend, name):
    x = rng.uniform(-np.pi, np.pi, 1024).astype(np.float32)
    found = run(f"{name}_approx", backend, a=x, out=np.zeros(1024, np.float32))
    np.testing.assert_allclose(found, getattr(np, name)(x.astype(np.float64)), rtol=0, atol=2.0**-20)


# CUDA's programming guide has their errors, at most 2 units in the last place of float32, of which 4 are allowed here.
@each_backend
@pytest.mark.parametrize("name", ["erf", "expm1", "log1p", "atan"])
def test_functions_of_the_compiler(run, rng, backend, name):
    exact = {"erf": np.vectorize(math.erf), "expm1": np.expm1, "log1p": np.log1p, "atan": np.arctan}[name]
    x = np.concatenate([floats(rng, 512, 3), rng.uniform(-0.9, 5, 512)]).astype(np.float32)
    found = run(name, backend, a=x, out=np.zeros(1024, np.float32))
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(found, exact(x.astype(np.float64)).astype(np.float32), rtol=2.0**-21)


@each_backend
def test_atan2(run, rng, backend):
    y, x = floats(rng, 1024, 3), floats(rng, 1024, 3)
    found = run("atan2", backend, a=y, b=x, out=np.zeros(1024, np.float32))
    np.testing.assert_allclose(found, np.arctan2(y.astype(np.float64), x.astype(np.float64)), rtol=2.0**-21)


@each_backend
@pytest.mark.parametrize("name", ["floor", "ceil"])
def test_floor_and_ceil(run, rng, backend, name):
    x = floats(rng, 1024, 5)
    found = run(name, backend, a=x, out=np.zeros(1024, np.float32))
    np.testing.assert_array_equal(found, getattr(np, name)(x))


@each_backend
def test_to_int_goes_towards_0_and_saturates(run, rng, backend):
    x = floats(rng, 1024, 5)
    found = run("to_int", backend, a=x, out=np.zeros(1024, np.int32))
    wide = np.trunc(np.nan_to_num(x.astype(np.float64), nan=0.0, posinf=1e30, neginf=-1e30))
    np.testing.assert_array_equal(found, np.clip(wide, -(2**31), 2**31 - 1))


@each_backend
def test_to_long_rounds_to_the_nearest(run, rng, backend):
    x = (rng.uniform(-1, 1, 1024) * 2.0 ** rng.integers(0, 62, 1024)).astype(np.float32)
    x[:4] = 0.5, 1.5, -2.5, 2.0**61
    found = run("to_long", backend, a=x, out=np.zeros(1024, np.int64))
    np.testing.assert_array_equal(found, np.rint(x.astype(np.float64)).astype(np.int64))


@each_backend
@pytest.mark.parametrize("sums", [1, 8, 64])
def test_atomic_add_of_four(run, rng, backend, sums):
    x = rng.integers(-50, 50, (300, 64, 4)).astype(np.float32)
    before = rng.integers(-50, 50, (sums, 4)).astype(np.float32)
    found = run("atomic_add4", backend, a=x, out=before.ravel(), n=sums, grid=(300, 1, 1))
    np.testing.assert_array_equal(found.reshape(sums, 4), before + x[:, ::-1].reshape(-1, sums, 4).sum(axis=0))


@each_backend
def test_atomic_add_of_64_bits(run, rng, backend):
    x = rng.integers(-(2**62), 2**62, 64)
    found = run("atomic_add_u64", backend, a=x.view(np.uint64), out=np.zeros(2, np.uint64))
    np.testing.assert_array_equal(found.view(np.int64), x.reshape(32, 2).sum(0))


@each_backend
def test_lowest_bit(run, rng, backend):
    x = rng.integers(1, 2**32, size=1024, dtype=np.uint32) << rng.integers(0, 20, 1024).astype(np.uint32)
    x[x == 0] = 2**31
    found = run("lowest_bit", backend, a=x, out=np.zeros(1024, np.int32))
    np.testing.assert_array_equal(1 << found.astype(np.int64), x.astype(np.int64) & -x.astype(np.int64))


@each_backend
def test_checked_index(run, backend):
    inside = np.arange(32, dtype=np.int32)
    out = np.zeros(32, np.int32)
    np.testing.assert_array_equal(run("checked_index", backend, a=inside, out=out, n=32), inside)
    outside = inside - 1
    if backend == "emulator":
        with pytest.raises(EmulatorError, match="an axis of 31 elements"):
            run("checked_index", backend, a=outside, out=out, n=31)
    else:
        found = run("checked_index", backend, a=outside, out=out, n=31)
        np.testing.assert_array_equal(found, [30, *range(31)])


@each_backend
def test_round_tf32(run, rng, backend):
    x = floats(rng, 1024)
    found = run("round_tf32", backend, a=x, out=np.zeros(1024, np.uint32))
    finite = np.isfinite(x)
    expected = (bits_of(x).astype(np.uint64) + 0x1000 & 0xFFFFE000).astype(np.uint32)  # ties away from zero
    np.testing.assert_array_equal(found[finite], expected[finite])
    np.testing.assert_array_equal(found.view(np.float32)[~finite], x[~finite])


@each_backend
@pytest.mark.parametrize("kind", ["float16", "bfloat16", "tf32"])
def test_mma(run, rng, backend, kind):
    """Small integers, whose sums are exact in any order, and then draws."""
    depth = 8 if kind == "tf32" else 16
    dtype = {"float16": np.dtype(np.float16), "bfloat16": bfloat16, "tf32": np.dtype(np.float32)}[kind]
    per_word = 4 // dtype.itemsize
    lane, i, e = np.indices((32, 4, per_word))
    g, t = lane // 4, lane % 4
    row, col = g + 8 * (i % 2), per_word * t + e + depth // 2 * (i // 2)
    lane_b, i_b, e_b = np.indices((32, 2, per_word))
    k_b, col_b = per_word * (lane_b % 4) + e_b + depth // 2 * i_b, lane_b // 4
    lane_d, i_d = np.indices((32, 4))
    row_d, col_d = lane_d // 4 + 8 * (i_d // 2), 2 * (lane_d % 4) + i_d % 2
    for exact in (True, False):
        draw = (lambda *s: rng.integers(-8, 9, s)) if exact else (lambda *s: rng.standard_normal(s))
        a, b, d = draw(16, depth).astype(dtype), draw(depth, 8).astype(dtype), draw(16, 8).astype(np.float32)
        out = run(f"mma_{kind}", backend, a=a[row, col], b=b[k_b, col_b], out=d[row_d, col_d])
        if kind == "tf32":  # the low 13 bits are not looked at
            a, b = ((x.view(np.uint32) & 0xFFFFE000).view(np.float32) for x in (a, b))
        expected = (d + a.astype(np.float64) @ b.astype(np.float64))[row_d, col_d]
        np.testing.assert_allclose(out, expected, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-5)


@each_backend
@pytest.mark.parametrize("kind", ["float16", "bfloat16", "tf32"])
def test_mma_keeps_infinity_and_nan(run, backend, kind):
    dtype = {"float16": np.dtype(np.float16), "bfloat16": bfloat16, "tf32": np.dtype(np.float32)}[kind]
    a, b = np.ones((32, 4, 4 // dtype.itemsize), dtype), np.ones((32, 2, 4 // dtype.itemsize), dtype)
    a[0, 0, 0], a[4, 0, 0] = np.inf, np.nan  # rows 0 and 1
    found = run(f"mma_{kind}", backend, a=a, b=b, out=np.zeros((32, 4), np.float32))
    assert np.isposinf(found[:4, :2]).all() and np.isnan(found[4:8, :2]).all()
    assert (found[:, 2:] == (8 if kind == "tf32" else 16)).all()


@needs_nvrtc
def test_every_toy_compiles_for_a_gpu(tmp_path):
    """Without one, so that nothing here waits for a GPU to be found wrong."""
    everything = "".join(f"if (n == {i}) {{ {body} }}\n" for i, (body, _, _) in enumerate(BODIES.values()))
    text = Toy(tmp_path, everything).spec.text("cuda")
    nvrtc.compile(text, arch.named("sm_90a"), "toy.cu")


def test_aligned_memory():
    assert aligned((3, 5), np.float16).ctypes.data % 128 == 0
