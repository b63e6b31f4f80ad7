// Part of runtime.cpp: vectors (GCC's and Clang's extension, any instruction set) and random numbers.

namespace {

typedef float f32x8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef u32 vu32x8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef u32 vu32x4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef u64 vu64x2 __attribute__((vector_size(16), aligned(4), may_alias));
typedef int16_t vi16x8 __attribute__((vector_size(16), may_alias));

#ifdef __clang__
#define SHUFFLE4(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define SHUFFLE4(a, b, i, j, k, l) __builtin_shuffle(a, b, (vu32x4){i, j, k, l})
#endif

ALWAYS_INLINE bool any_set(vi16x8 mask) {
  const vu64x2 m = (vu64x2)mask;
  return (m[0] | m[1]) != 0;
}

ALWAYS_INLINE vi16x8 splat16(int16_t x) { return vi16x8{x, x, x, x, x, x, x, x}; }
ALWAYS_INLINE vu32x4 splat32(u32 x) { return vu32x4{x, x, x, x}; }

// Rows become columns.
ALWAYS_INLINE void transpose4(vu32x4& r0, vu32x4& r1, vu32x4& r2, vu32x4& r3) {
  const vu32x4 a = SHUFFLE4(r0, r1, 0, 4, 1, 5), b = SHUFFLE4(r0, r1, 2, 6, 3, 7);
  const vu32x4 c = SHUFFLE4(r2, r3, 0, 4, 1, 5), d = SHUFFLE4(r2, r3, 2, 6, 3, 7);
  r0 = SHUFFLE4(a, c, 0, 1, 4, 5);
  r1 = SHUFFLE4(a, c, 2, 3, 6, 7);
  r2 = SHUFFLE4(b, d, 0, 1, 4, 5);
  r3 = SHUFFLE4(b, d, 2, 3, 6, 7);
}

// ---- Random numbers: splitmix64 ----

ALWAYS_INLINE u64 mix(u64 z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

struct Random {
  u64 state;
  u64 next() { return mix(state += 0x9e3779b97f4a7c15ull); }
  u32 below(u32 n) { return static_cast<u32>((next() >> 32) * n >> 32); }
};

}  // namespace
