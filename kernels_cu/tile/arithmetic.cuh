// Division by a number that the host knows; and the arithmetic of Python and NumPy that C lacks: what generated code
// (cuflash/trace/emit_c.py) calls by name.
#pragma once
#include <base.cuh>
#include <hw/device.cuh>
#include <hw/math.cuh>

// a // b and a % b for b > 0. With s = -1 for a negative a, else 0, floor(a / b) = ((a ^ s) / b) ^ s, for ~a = -a - 1.
HW_DEVICE i32 floor_div_positive(i32 a, i32 b) {
  const i32 sign = a >> 31;
  return static_cast<i32>(static_cast<u32>(a ^ sign) / static_cast<u32>(b)) ^ sign;
}
HW_DEVICE i32 floor_mod_positive(i32 a, i32 b) {
  return static_cast<i32>(static_cast<u32>(a) - static_cast<u32>(floor_div_positive(a, b)) * static_cast<u32>(b));
}

// For any b; by 0: 0. Magnitudes are divided, for they always fit; a quotient below 0 is rounded away from it.
HW_DEVICE u32 magnitude(i32 a) { return a < 0 ? 0u - static_cast<u32>(a) : static_cast<u32>(a); }
HW_DEVICE i32 floor_div(i32 a, i32 b) {
  if (b == 0) return 0;
  const u32 quotient = magnitude(a) / magnitude(b);
  const bool whole = quotient * magnitude(b) == magnitude(a);
  return static_cast<i32>((a < 0) != (b < 0) ? 0u - quotient - (whole ? 0u : 1u) : quotient);
}
HW_DEVICE i32 floor_mod(i32 a, i32 b) {
  if (b == 0) return 0;
  return static_cast<i32>(static_cast<u32>(a) - static_cast<u32>(floor_div(a, b)) * static_cast<u32>(b));
}

// x / d for 0 <= x < 2^31, by the host's multiplier ceil(2^(31 + shift) / d), shift being ceil(log2 d): the error, below
// 2^-shift and so below 1 / d, never reaches the next whole number.
HW_DEVICE u32 quotient(u32 x, u32 multiplier, i32 shift) {
  return static_cast<u32>((static_cast<u64>(2 * x) * multiplier) >> 32) >> shift;
}

// a << n and a >> n for any n: beyond the word nothing is left but the sign.
HW_DEVICE i32 shift_left(i32 a, i32 n) {
  return static_cast<u32>(n) < 32u ? static_cast<i32>(static_cast<u32>(a) << n) : 0;
}
HW_DEVICE i32 shift_right(i32 a, i32 n) { return a >> (static_cast<u32>(n) < 32u ? n : 31); }

// a / b, rounded once but for rare ties: the reciprocal's quotient and a step of Newton's. Where a step has no meaning (by
// 0, by or of infinity) the first is right already. r: 1 / b.
HW_DEVICE float float_div_by(float a, float b, float r) {
  const float quotient = a * r;
  const float better = hw::fma(hw::fma(-quotient, b, a), r, quotient);
  return (hw::abs(quotient) < kInfinity) & (r != 0.0f) ? better : quotient;
}
HW_DEVICE float float_div(float a, float b) { return float_div_by(a, b, hw::rcp_approx(b)); }

// The smaller, the larger; NaN of what is NaN.
HW_DEVICE float float_min(float a, float b) { return (a < b) | (a != a) ? a : b; }
HW_DEVICE float float_max(float a, float b) { return (a > b) | (a != a) ? a : b; }
HW_DEVICE float float_floordiv(float a, float b) { return hw::floor(float_div(a, b)); }
HW_DEVICE float float_mod(float a, float b) { return hw::fma(-float_floordiv(a, b), b, a); }
HW_DEVICE float exp_of(float x) { return hw::exp2_approx(x * kLog2e); }
HW_DEVICE float log_of(float x) { return hw::log2_approx(x) * kLn2; }
HW_DEVICE float sigmoid_of(float x) { return hw::rcp_approx(1.0f + hw::exp2_approx(-x * kLog2e)); }

// Whether the sign is set, that of -0 too.
HW_DEVICE bool sign_bit(float x) { return (hw::float_bits(x) >> 31) != 0u; }
// What a 16-bit float has of x.
template <class Element>
HW_DEVICE float rounded_to(float x) {
  return hw::to_float(Element{static_cast<u16>(hw::pack2<Element>(x, 0.0f))});
}

// tanh x to 2^-22 of itself, for what it is multiplied by may be large: 1 - 2 / (e^2x + 1), and near 0, where that would
// lose digits, x + x^3 p(x^2), whose p was fitted for |x| <= 0.55 to 2^-29 of tanh x. Not by tanh.approx: its 2^-11 is, at
// a score of 30, more than rounding that score to float16 costs.
HW_DEVICE float tanh_of(float x) {
  const float x2 = x * x;
  float series = -6.27435e-3f;
  series = hw::fma(series, x2, 2.107175e-2f);
  series = hw::fma(series, x2, -5.385233e-2f);
  series = hw::fma(series, x2, 0.13332586f);
  series = hw::fma(series, x2, -0.33333318f);
  const float rest = hw::rcp_approx(hw::exp2_approx(x * (2.0f * kLog2e)) + 1.0f);
  return hw::abs(x) < 0.55f ? hw::fma(series * x2, x, x) : hw::fma(-2.0f, rest, 1.0f);
}

// x^y. A negative x has a power where y is whole.
HW_DEVICE float power_of(float x, float y) {
  const float size = hw::exp2_approx(y * hw::log2_approx(hw::abs(x)));
  if (y == 0.0f) return 1.0f;
  if (x >= 0.0f) return size;
  if (hw::floor(y) != y) return hw::bits_float(0x7fffffffu);
  return hw::floor(y * 0.5f) * 2.0f == y ? size : -size;
}

// sin and cos: x less its whole turns, 2 pi in two parts so that little is lost where there are many.
HW_DEVICE float within_turn(float x) {
  const float turns = hw::floor(hw::fma(x, 0.15915494f, 0.5f));
  return hw::fma(-turns, -1.7484555e-7f, hw::fma(-turns, 6.2831855f, x));
}
HW_DEVICE float sin_of(float x) { return hw::sin_approx(within_turn(x)); }
HW_DEVICE float cos_of(float x) { return hw::cos_approx(within_turn(x)); }
