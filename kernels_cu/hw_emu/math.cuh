// Twin of hw_cuda/math.cuh. Results are at least as accurate as the instructions'; tanh_approx alone is far enough from
// float accuracy to be rounded to what the instruction gives. Denormals are flushed where the instruction flushes them.
#pragma once
#include <base.cuh>
#include <hw/device.cuh>

namespace emu {

// A denormal becomes a zero of its sign.
HW_DEVICE float flush_denormal(float x) {
  const u32 bits = __builtin_bit_cast(u32, x);
  return (bits & 0x7f800000u) == 0 ? __builtin_bit_cast(float, bits & 0x80000000u) : x;
}

HW_DEVICE u32 bfloat16_bits(float x) {
  if (x != x) return 0x7fffu;
  const u32 bits = __builtin_bit_cast(u32, x);
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

}  // namespace emu

namespace hw {

struct Half {
  u16 bits;
};
struct Bfloat16 {
  u16 bits;
};

HW_DEVICE i32 popcount(u32 x) { return __builtin_popcount(x); }
HW_DEVICE i32 lowest_bit(u32 x) { return __builtin_ctz(x); }
HW_DEVICE u32 float_bits(float x) { return __builtin_bit_cast(u32, x); }
HW_DEVICE float bits_float(u32 x) { return __builtin_bit_cast(float, x); }

HW_DEVICE float exp2_approx(float x) { return emu::flush_denormal(__builtin_exp2f(x)); }
HW_DEVICE float log2_approx(float x) { return __builtin_log2f(emu::flush_denormal(x)); }
HW_DEVICE float rcp_approx(float x) { return emu::flush_denormal(1.0f / emu::flush_denormal(x)); }

HW_DEVICE float sqrt_approx(float x) { return emu::flush_denormal(__builtin_sqrtf(emu::flush_denormal(x))); }
HW_DEVICE float rsqrt_approx(float x) { return emu::flush_denormal(1.0f / __builtin_sqrtf(emu::flush_denormal(x))); }
HW_DEVICE float sin_approx(float x) { return emu::flush_denormal(__builtin_sinf(x)); }
HW_DEVICE float cos_approx(float x) { return emu::flush_denormal(__builtin_cosf(x)); }
HW_DEVICE float erf(float x) { return __builtin_erff(x); }
HW_DEVICE float expm1(float x) { return __builtin_expm1f(x); }
HW_DEVICE float log1p(float x) { return __builtin_log1pf(x); }
HW_DEVICE float atan(float x) { return __builtin_atanf(x); }
HW_DEVICE float atan2(float y, float x) { return __builtin_atan2f(y, x); }
HW_DEVICE float floor(float x) { return __builtin_floorf(x); }
HW_DEVICE float ceil(float x) { return __builtin_ceilf(x); }
HW_DEVICE i32 to_int(float x) {
  if (x != x) return 0;
  return x >= 2147483648.0f ? 2147483647 : x < -2147483648.0f ? -2147483647 - 1 : static_cast<i32>(x);
}

HW_DEVICE i64 to_long(float x) { return __builtin_llrintf(x); }

HW_DEVICE float tanh_approx(float x) {
  const float y = __builtin_tanhf(x);
  return y != y ? y : bits_float((float_bits(y) + 0x1000u) & 0xffffe000u);
}

// +0 is larger than -0.
HW_DEVICE float max(float a, float b) {
  return a > b || b != b ? a : a == b ? bits_float(float_bits(a) & float_bits(b)) : b;
}
HW_DEVICE float min(float a, float b) {
  return a < b || b != b ? a : a == b ? bits_float(float_bits(a) | float_bits(b)) : b;
}
HW_DEVICE float abs(float x) { return bits_float(float_bits(x) & 0x7fffffffu); }
HW_DEVICE float mul(float a, float b) { return a * b; }
HW_DEVICE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

HW_DEVICE u32 round_tf32(float x) {
  if (x != x) return 0x7fffffffu;
  if (abs(x) == kInfinity) return float_bits(x);
  return (float_bits(x) + 0x1000u) & 0xffffe000u;
}

template <class Element>
HW_DEVICE u32 pack2(float low, float high);

template <>
HW_DEVICE u32 pack2<Half>(float low, float high) {
  return cuflash_emu_half_bits(low) | cuflash_emu_half_bits(high) << 16;
}

template <>
HW_DEVICE u32 pack2<Bfloat16>(float low, float high) {
  return emu::bfloat16_bits(low) | emu::bfloat16_bits(high) << 16;
}

HW_DEVICE float to_float(Half x) { return cuflash_emu_half_value(x.bits); }
HW_DEVICE float to_float(Bfloat16 x) { return bits_float(static_cast<u32>(x.bits) << 16); }
HW_DEVICE float to_float(float x) { return x; }

}  // namespace hw
