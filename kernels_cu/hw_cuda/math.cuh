// Arithmetic: the element types, their conversions, and the special-function unit.
// Approximate forms are spelled as PTX so that results do not depend on compiler flags.
#pragma once
#include <base.cuh>
#include <hw/device.cuh>

namespace hw {

// 16-bit floats as storage; arithmetic is in float.
struct Half {
  u16 bits;
};
struct Bfloat16 {
  u16 bits;
};

// 2^x, relative error 2^-22; 2^-inf = 0. (PTX ISA, "ex2")
HW_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2 x, error 2^-22; log2 0 = -inf. (PTX ISA, "lg2")
HW_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x, at most 1 ulp. (PTX ISA, "rcp")
HW_DEVICE float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// tanh x, relative error 2^-11. (PTX ISA, "tanh")
HW_DEVICE float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// sqrt x, 1 / sqrt x: at most 1 ulp and 2^-22.4. (PTX ISA, "sqrt", "rsqrt")
HW_DEVICE float sqrt_approx(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

HW_DEVICE float rsqrt_approx(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// sin x, cos x for |x| <= pi, error 2^-20.5. (PTX ISA, "sin", "cos")
HW_DEVICE float sin_approx(float x) {
  float y;
  asm("sin.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

HW_DEVICE float cos_approx(float x) {
  float y;
  asm("cos.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The compiler's own, within 2 ulp or so.
HW_DEVICE float erf(float x) { return erff(x); }
HW_DEVICE float expm1(float x) { return expm1f(x); }
HW_DEVICE float log1p(float x) { return log1pf(x); }
HW_DEVICE float atan(float x) { return atanf(x); }
HW_DEVICE float atan2(float y, float x) { return atan2f(y, x); }

// To the next whole number below, above; to an int towards 0, out of range to its nearest end, NaN to 0.
HW_DEVICE float floor(float x) { return floorf(x); }
HW_DEVICE float ceil(float x) { return ceilf(x); }
HW_DEVICE i32 to_int(float x) { return __float2int_rz(x); }
// The nearest whole number of 64 bits; |x| < 2^63.
HW_DEVICE i64 to_long(float x) { return __float2ll_rn(x); }

// The larger; a NaN loses against a number.
HW_DEVICE float max(float a, float b) { return fmaxf(a, b); }
HW_DEVICE float min(float a, float b) { return fminf(a, b); }
HW_DEVICE float abs(float x) { return fabsf(x); }
// a * b, rounded: never contracted with an addition.
HW_DEVICE float mul(float a, float b) { return __fmul_rn(a, b); }
// a * b + c, rounded once.
HW_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }

// How many bits are set.
HW_DEVICE i32 popcount(u32 x) { return __popc(x); }
// The place of the lowest bit that is set, from 0; x is not 0.
HW_DEVICE i32 lowest_bit(u32 x) { return __ffs(static_cast<i32>(x)) - 1; }

HW_DEVICE u32 float_bits(float x) { return __float_as_uint(x); }
HW_DEVICE float bits_float(u32 x) { return __uint_as_float(x); }

// x rounded to the 11 significant bits of tf32, ties away from zero, as float bits. (PTX ISA, "cvt.rna.tf32")
HW_DEVICE u32 round_tf32(float x) {
  u32 y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// Two floats rounded to nearest even and packed, `low` in the low half.
template <class Element>
HW_DEVICE u32 pack2(float low, float high);

template <>
HW_DEVICE u32 pack2<Half>(float low, float high) {
  u32 y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

template <>
HW_DEVICE u32 pack2<Bfloat16>(float low, float high) {
  u32 y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

HW_DEVICE float to_float(Half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
HW_DEVICE float to_float(Bfloat16 x) { return __uint_as_float(static_cast<u32>(x.bits) << 16); }
HW_DEVICE float to_float(float x) { return x; }

}  // namespace hw
