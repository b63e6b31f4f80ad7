// Names every other file uses. Includes nothing: the text compiles where no CUDA header is installed.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;

struct alignas(16) u32x4 {
  u32 x[4];
};

struct alignas(8) f32x2 {
  float x[2];
};

// A CUtensorMap: what a tensor copy knows of a tensor in global memory (cuflash/jit/tensor_map.py).
struct alignas(64) TensorMap {
  u64 words[16];
};

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000u);

template <class T>
constexpr T min_of(T a, T b) {
  return a < b ? a : b;
}

template <class T>
constexpr T max_of(T a, T b) {
  return a > b ? a : b;
}

// For a >= 0, b > 0.
constexpr i32 ceil_div(i32 a, i32 b) { return (a + b - 1) / b; }
