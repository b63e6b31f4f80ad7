// Part of runtime.cpp: matrix instructions of a warp, done by its last lane to arrive.

namespace {

// The lanes' operand a as rows of words: rows[g] = a[0] of lanes 4 g .. 4 g + 3, then their a[2]; rows[g + 8] = their
// a[1], then their a[3].
ALWAYS_INLINE void gather_a(const Warp* w, u32 (&rows)[16][8]) {
  for (i32 g = 0; g < 8; g++) {
    const u32* const* a = &w->a[4 * g];
    vu32x4 r0 = *reinterpret_cast<const vu32x4*>(a[0]), r1 = *reinterpret_cast<const vu32x4*>(a[1]);
    vu32x4 r2 = *reinterpret_cast<const vu32x4*>(a[2]), r3 = *reinterpret_cast<const vu32x4*>(a[3]);
    transpose4(r0, r1, r2, r3);
    *reinterpret_cast<vu32x4*>(&rows[g][0]) = r0;
    *reinterpret_cast<vu32x4*>(&rows[g + 8][0]) = r1;
    *reinterpret_cast<vu32x4*>(&rows[g][4]) = r2;
    *reinterpret_cast<vu32x4*>(&rows[g + 8][4]) = r3;
  }
}

// 16-bit halves as floats. The two halves of a word are neighbours along k; all low halves come first here, in a and b
// alike, for the order of a sum's terms is free.
struct DecodeBf16 {
  static ALWAYS_INLINE f32x8 value(vu32x8 half) { return (f32x8)(half << 16); }
  static ALWAYS_INLINE f32x8 low(vu32x8 x) { return (f32x8)(x << 16); }
  static ALWAYS_INLINE f32x8 high(vu32x8 x) { return (f32x8)(x & 0xffff0000u); }
};

struct DecodeF16 {
  static ALWAYS_INLINE f32x8 value(vu32x8 half) {
    const vu32x8 magnitude = (half & 0x7fffu) << 13;
    const vu32x8 special = (vu32x8)(magnitude >= 0x0f800000u) & 0x7f800000u;  // infinity and NaN
    const vu32x8 scaled = (vu32x8)((f32x8)magnitude * 0x1p112f);
    return (f32x8)(scaled | special | (half & 0x8000u) << 16);
  }
  static ALWAYS_INLINE f32x8 low(vu32x8 x) { return value(x & 0xffffu); }
  static ALWAYS_INLINE f32x8 high(vu32x8 x) { return value(x >> 16); }
};

// d += a b with a [16][kDepth] and b [kDepth][8]; d from and to the lanes.
template <i32 kDepth>
ALWAYS_INLINE void multiply(Warp* w, const float (*a)[16], const f32x8* b) {
  for (i32 g = 0; g < 8; g += 4) {
    // Eight rows at once: g .. g + 3 and the same + 8, each eight columns from four lanes.
    f32x8 upper[4], lower[4];
    for (i32 i = 0; i < 4; i++) {
      float* const* d = reinterpret_cast<float* const*>(&w->d[4 * (g + i)]);
      const vu32x4 x0 = *reinterpret_cast<vu32x4*>(d[0]), x1 = *reinterpret_cast<vu32x4*>(d[1]);
      const vu32x4 x2 = *reinterpret_cast<vu32x4*>(d[2]), x3 = *reinterpret_cast<vu32x4*>(d[3]);
      vu32x4 pair[2] = {SHUFFLE4(x0, x1, 0, 1, 4, 5), SHUFFLE4(x2, x3, 0, 1, 4, 5)};
      memcpy(&upper[i], pair, 32);
      vu32x4 pair2[2] = {SHUFFLE4(x0, x1, 2, 3, 6, 7), SHUFFLE4(x2, x3, 2, 3, 6, 7)};
      memcpy(&lower[i], pair2, 32);
    }
    for (i32 k = 0; k < kDepth; k++)
      for (i32 i = 0; i < 4; i++) {
        upper[i] += a[g + i][k] * b[k];
        lower[i] += a[g + i + 8][k] * b[k];
      }
    for (i32 i = 0; i < 4; i++) {
      float* const* d = reinterpret_cast<float* const*>(&w->d[4 * (g + i)]);
      vu32x4 u[2], l[2];
      memcpy(u, &upper[i], 32);
      memcpy(l, &lower[i], 32);
      *reinterpret_cast<vu32x4*>(d[0]) = SHUFFLE4(u[0], l[0], 0, 1, 4, 5);
      *reinterpret_cast<vu32x4*>(d[1]) = SHUFFLE4(u[0], l[0], 2, 3, 6, 7);
      *reinterpret_cast<vu32x4*>(d[2]) = SHUFFLE4(u[1], l[1], 0, 1, 4, 5);
      *reinterpret_cast<vu32x4*>(d[3]) = SHUFFLE4(u[1], l[1], 2, 3, 6, 7);
    }
  }
}

template <class Decode>
void execute_mma_16(Warp* w) {
  u32 rows[16][8];
  gather_a(w, rows);
  float a[16][16];
  f32x8 b[16];
  for (i32 i = 0; i < 16; i++) {
    const vu32x8 words = *reinterpret_cast<vu32x8*>(rows[i]);
    *reinterpret_cast<f32x8*>(&a[i][0]) = Decode::low(words);
    *reinterpret_cast<f32x8*>(&a[i][8]) = Decode::high(words);
  }
  for (i32 i = 0; i < 8; i++) {
    const vu32x8 words = *reinterpret_cast<vu32x8*>(w->b[i]);
    b[i] = Decode::low(words);
    b[8 + i] = Decode::high(words);
  }
  multiply<16>(w, a, b);
}

void execute_mma_tf32(Warp* w) {
  u32 rows[16][8];
  gather_a(w, rows);
  float a[16][16];
  f32x8 b[8];
  for (i32 i = 0; i < 16; i++)
    *reinterpret_cast<f32x8*>(&a[i][0]) = (f32x8)(*reinterpret_cast<vu32x8*>(rows[i]) & 0xffffe000u);
  for (i32 i = 0; i < 8; i++) b[i] = (f32x8)(*reinterpret_cast<vu32x8*>(w->b[i]) & 0xffffe000u);
  multiply<8>(w, a, b);
}

ALWAYS_INLINE void post_mma(Warp* w, u32 lane, float* d, const u32* a, u32 b0, u32 b1) {
  w->d[lane] = d;
  w->a[lane] = a;
  w->b[lane % 4][lane / 4] = b0;
  w->b[4 + lane % 4][lane / 4] = b1;
}

// Checks the rows' addresses and gives them.
ALWAYS_INLINE void matrix_rows(Warp* w, bool write, const char* what, Site site, u8* (&rows)[32]) {
  Block* b = w->fibers[0]->block;
  const Trace trace = trace_of(b, site);
  for (u32 lane = 0; lane < 32; lane++) {
    Fiber* f = w->fibers[lane];
    const u32 offset = shared_offset(f, w->address[lane], 16, what, site);
    rows[lane] = b->memory + offset;
    const Trace mine = trace | static_cast<u32>(f->index);
    if (write) {
      check_write16(f, offset, what, site);
      shadow_write(f, offset, 16, false, mine);
    } else {
      shadow_read16(f, offset, mine, what, site);
    }
  }
  if (UNLIKELY(b->launch->counting)) count_matrix_rows(b, w, site);
}

void execute_ldmatrix(Warp* w, Site site) {
  u8* rows[32];
  matrix_rows(w, false, "ldmatrix_x4", site, rows);
  for (i32 g = 0; g < 8; g++) {
    vu32x4 r0 = *reinterpret_cast<vu32x4*>(rows[g]), r1 = *reinterpret_cast<vu32x4*>(rows[8 + g]);
    vu32x4 r2 = *reinterpret_cast<vu32x4*>(rows[16 + g]), r3 = *reinterpret_cast<vu32x4*>(rows[24 + g]);
    transpose4(r0, r1, r2, r3);
    *static_cast<vu32x4*>(w->d[4 * g]) = r0;
    *static_cast<vu32x4*>(w->d[4 * g + 1]) = r1;
    *static_cast<vu32x4*>(w->d[4 * g + 2]) = r2;
    *static_cast<vu32x4*>(w->d[4 * g + 3]) = r3;
  }
}

void execute_ldmatrix_trans(Warp* w, Site site) {
  u8* rows[32];
  matrix_rows(w, false, "ldmatrix_x4_trans", site, rows);
  // words[t][i][g]: what lane 4 g + t receives as r[i], rows 2 t and 2 t + 1 of column g.
  alignas(32) u32 words[4][4][8];
  for (i32 i = 0; i < 4; i++)
    for (i32 t = 0; t < 4; t++) {
      u16 even[8], odd[8];
      memcpy(even, rows[8 * i + 2 * t], 16);
      memcpy(odd, rows[8 * i + 2 * t + 1], 16);
      for (i32 g = 0; g < 8; g++) words[t][i][g] = even[g] | static_cast<u32>(odd[g]) << 16;
    }
  for (i32 t = 0; t < 4; t++)
    for (i32 half = 0; half < 8; half += 4) {
      vu32x4 r0 = *reinterpret_cast<vu32x4*>(&words[t][0][half]), r1 = *reinterpret_cast<vu32x4*>(&words[t][1][half]);
      vu32x4 r2 = *reinterpret_cast<vu32x4*>(&words[t][2][half]), r3 = *reinterpret_cast<vu32x4*>(&words[t][3][half]);
      transpose4(r0, r1, r2, r3);
      *static_cast<vu32x4*>(w->d[4 * half + t]) = r0;
      *static_cast<vu32x4*>(w->d[4 * (half + 1) + t]) = r1;
      *static_cast<vu32x4*>(w->d[4 * (half + 2) + t]) = r2;
      *static_cast<vu32x4*>(w->d[4 * (half + 3) + t]) = r3;
    }
}

void execute_stmatrix(Warp* w, Site site) {
  u8* rows[32];
  matrix_rows(w, true, "stmatrix_x4", site, rows);
  for (i32 lane = 0; lane < 32; lane++)
    for (i32 i = 0; i < 4; i++) memcpy(rows[8 * i + lane / 4] + lane % 4 * 4, &w->a[lane][i], 4);
}

}  // namespace

// ---- What kernels call ----

extern "C" {

void cuflash_emu_ldmatrix_x4(u32* r, u32 address, Site site) {
  Fiber* f = this_fiber();
  Warp* w = f->warp;
  w->d[f->lane] = r;
  w->address[f->lane] = address;
  if (!meet(f, "ldmatrix_x4", site)) return;
  f->block->counters.ldmatrix++;
  execute_ldmatrix(w, site);
}

void cuflash_emu_ldmatrix_x4_trans(u32* r, u32 address, Site site) {
  Fiber* f = this_fiber();
  Warp* w = f->warp;
  w->d[f->lane] = r;
  w->address[f->lane] = address;
  if (!meet(f, "ldmatrix_x4_trans", site)) return;
  f->block->counters.ldmatrix++;
  execute_ldmatrix_trans(w, site);
}

void cuflash_emu_stmatrix_x4(const u32* r, u32 address, Site site) {
  Fiber* f = this_fiber();
  Warp* w = f->warp;
  w->a[f->lane] = r;
  w->address[f->lane] = address;
  if (!meet(f, "stmatrix_x4", site)) return;
  f->block->counters.stmatrix++;
  execute_stmatrix(w, site);
}

void cuflash_emu_mma_m16n8k16_f16(float* d, const u32* a, u32 b0, u32 b1, Site site) {
  Fiber* f = this_fiber();
  post_mma(f->warp, f->lane, d, a, b0, b1);
  if (!meet(f, "mma_m16n8k16", site)) return;
  f->block->counters.mma_f16++;
  note_warp(f, "mma_m16n8k16", site);
  execute_mma_16<DecodeF16>(f->warp);
}

void cuflash_emu_mma_m16n8k16_bf16(float* d, const u32* a, u32 b0, u32 b1, Site site) {
  Fiber* f = this_fiber();
  post_mma(f->warp, f->lane, d, a, b0, b1);
  if (!meet(f, "mma_m16n8k16", site)) return;
  f->block->counters.mma_bf16++;
  note_warp(f, "mma_m16n8k16", site);
  execute_mma_16<DecodeBf16>(f->warp);
}

void cuflash_emu_mma_m16n8k8_tf32(float* d, const u32* a, u32 b0, u32 b1, Site site) {
  Fiber* f = this_fiber();
  post_mma(f->warp, f->lane, d, a, b0, b1);
  if (!meet(f, "mma_m16n8k8_tf32", site)) return;
  f->block->counters.mma_tf32++;
  note_warp(f, "mma_m16n8k8_tf32", site);
  execute_mma_tf32(f->warp);
}

}  // extern "C"
