// Part of runtime.cpp: matrix products of a warpgroup.

namespace {

constexpr u32 kPoison = 0x7fa0dead;  // a signalling NaN: any arithmetic on it changes its bits

struct Operand {
  u32 start, leading, stride, units;  // units: 16-byte units in a row of the swizzle, 1 for none
};

// A descriptor has 18 bits of an address of the block's own shared memory, which begins at `shared`.
Operand operand_of(u64 bits, u32 shared) {
  const u32 mode = static_cast<u32>(bits >> 62);  // 1: 128 bytes, 2: 64, 3: 32
  const u32 start = shared + (((static_cast<u32>(bits & 0x3fff) << 4) - shared) & 0x3ffff);
  return {start, static_cast<u32>(bits >> 16 & 0x3fff) << 4,
          static_cast<u32>(bits >> 32 & 0x3fff) << 4, mode ? 16u >> mode : 1};
}

[[noreturn]] NEVER_INLINE void fail_descriptor(Fiber* f, u64 bits, char name, Site site, const std::string& what) {
  fail_protocol(f, site, format("wgmma: descriptor %c = 0x%016llx ", name, bits) + what);
}

Operand read_descriptor(Fiber* f, u64 bits, bool transposed, char name, Site site) {
  const Operand o = operand_of(bits, f->shared);
  if (UNLIKELY(bits & 0x3ff1c000c000c000ull)) fail_descriptor(f, bits, name, site, "has bits set that mean nothing");
  if (UNLIKELY(bits >> 49 & 7))
    fail_descriptor(f, bits, name, site, "has a base offset: operands begin where their swizzle's pattern does");
  const u32 row = o.units * 16, within = o.start % (8 * row);
  if (UNLIKELY(bits >> 62 && (transposed ? within != 0 : within + 32 > row)))
    fail_descriptor(f, bits, name, site,
                    format("starts %u bytes into the %u of its swizzle's pattern; ", within, 8 * row) +
                        (transposed ? "it must start with the pattern"
                                    : format("16 elements must fit its first row of %u bytes", row)));
  return o;
}

// The shared address of 16 bytes: K-major, of row `i`, elements k = 8 j ..; MN-major, of k = j, elements i = 8 i ...
ALWAYS_INLINE u32 unit_address(const Operand& o, bool transposed, u32 i, u32 j) {
  if (o.units == 1) {
    if (!transposed) return o.start + i / 8 * o.stride + j * o.leading + i % 8 * 16;
    return o.start + i * o.stride + j / 8 * o.leading + j % 8 * 16;
  }
  const u32 row = o.units * 16, shift = static_cast<u32>(__builtin_ctz(o.units));
  const u32 address =
      transposed ? o.start + (i >> shift) * o.leading + j / 8 * o.stride + j % 8 * row + (i & (o.units - 1)) * 16
                 : o.start + i / 8 * o.stride + i % 8 * row + j * 16;
  return swizzled(address, o.units);
}

typedef u16 vu16x8 __attribute__((vector_size(16), may_alias));

// Eight neighbours as floats.
template <class Decode>
ALWAYS_INLINE void decode16(const u8* from, float* to) {
  vu16x8 halves;
  memcpy(&halves, from, 16);
  *reinterpret_cast<f32x8*>(to) = Decode::value(__builtin_convertvector(halves, vu32x8));
}

const u8* unit_at(const Fiber* f, u32 address) { return f->block->memory + f->base + (address - f->shared); }

// As many columns of c [16][n] as a vector has. (A template forgets a vector type's alignment: hence memcpy.)
template <i32 kColumns>
ALWAYS_INLINE void multiply_columns(const float (&a)[16][16], const float (&b)[16][256], float* c, u32 n, u32 col) {
  typedef float Vector __attribute__((vector_size(4 * kColumns)));
  for (u32 r = 0; r < 16; r += 4) {
    Vector sum[4], row;
    for (u32 i = 0; i < 4; i++) memcpy(&sum[i], c + (r + i) * n + col, sizeof(Vector));
    for (i32 k = 0; k < 16; k++) {
      memcpy(&row, &b[k][col], sizeof(Vector));
      for (u32 i = 0; i < 4; i++) sum[i] += a[r + i][k] * row;
    }
    for (u32 i = 0; i < 4; i++) memcpy(c + (r + i) * n + col, &sum[i], sizeof(Vector));
  }
}

// This warp's 16 rows of the product.
template <class Decode>
void multiply_product(Block* b, u32 warp, const Product& p, float* c) {
  const Fiber* f = b->warp[warp].fibers[0];
  const Operand oa = operand_of(p.a, f->shared), ob = operand_of(p.b, f->shared);
  const u32 n = static_cast<u32>(p.n), first = warp % 4 * 16;
  alignas(32) float a[16][16];
  alignas(32) float bk[16][256];
  if (p.from_registers) {
    for (i32 r = 0; r < 16; r++) {
      const vu32x8 words = *reinterpret_cast<const vu32x8*>(p.a_words[r]);
      const f32x8 even = Decode::low(words), odd = Decode::high(words);
      for (i32 i = 0; i < 8; i++) a[r][2 * i] = even[i], a[r][2 * i + 1] = odd[i];
    }
  } else if (!p.a_transposed) {
    for (u32 r = 0; r < 16; r++)
      for (u32 j = 0; j < 2; j++) {
        decode16<Decode>(unit_at(f, unit_address(oa, false, first + r, j)), &a[r][8 * j]);
      }
  } else {
    for (u32 k = 0; k < 16; k++)
      for (u32 j = 0; j < 2; j++) {
        float row[8];
        decode16<Decode>(unit_at(f, unit_address(oa, true, first / 8 + j, k)), row);
        for (u32 i = 0; i < 8; i++) a[8 * j + i][k] = row[i];
      }
  }
  if (!p.b_transposed) {
    for (u32 col = 0; col < n; col += 8)
      for (u32 j = 0; j < 2; j++) {
        vu32x4 r[8];
        for (u32 i = 0; i < 8; i++) memcpy(&r[i], unit_at(f, unit_address(ob, false, col + i, j)), 16);
        transpose4(r[0], r[1], r[2], r[3]);
        transpose4(r[4], r[5], r[6], r[7]);
        for (u32 i = 0; i < 4; i++) {
          vu32x8 words;
          memcpy(&words, &r[i], 16);
          memcpy(reinterpret_cast<u8*>(&words) + 16, &r[4 + i], 16);
          *reinterpret_cast<f32x8*>(&bk[8 * j + 2 * i][col]) = Decode::low(words);
          *reinterpret_cast<f32x8*>(&bk[8 * j + 2 * i + 1][col]) = Decode::high(words);
        }
      }
  } else {
    for (u32 k = 0; k < 16; k++)
      for (u32 i = 0; i < n / 8; i++) {
        decode16<Decode>(unit_at(f, unit_address(ob, true, i, k)), &bk[k][8 * i]);
      }
  }
  if (!p.accumulate) memset(c, 0, 16 * n * sizeof(float));
  u32 col = 0;
  for (; col + 16 <= n; col += 16) multiply_columns<16>(a, bk, c, n, col);
  if (col < n) multiply_columns<8>(a, bk, c, n, col);
}

void run_product(Block* b, u32 warp, const Product& p, float* c) {
  if (p.half)
    multiply_product<DecodeF16>(b, warp, p, c);
  else
    multiply_product<DecodeBf16>(b, warp, p, c);
}

// move(element of the lane, element of c) for all of a warp's accumulators.
template <class Move>
ALWAYS_INLINE void for_each_accumulator(Accumulator& acc, Move move) {
  for (i32 lane = 0; lane < 32; lane++) {
    const i32 g = lane / 4, t = lane % 4;
    for (i32 j = 0; j < acc.n / 8; j++)
      for (i32 i = 0; i < 4; i++)
        move(acc.lanes[lane][4 * j + i], acc.c[static_cast<size_t>((g + i / 2 * 8) * acc.n + 8 * j + 2 * t + i % 2)]);
  }
}

Accumulator* find_accumulator(WarpProducts& products, float* lane0) {
  for (Accumulator& acc : products.accumulators)
    if (acc.lanes[0] == lane0) return &acc;
  return nullptr;
}

// Marks what the product reads of shared memory for this warp.
void mark_operand(Fiber* f, const Operand& o, bool transposed, u32 first, u32 rows, u32 group, Site site) {
  u32 good = 0;
  if (o.units > 1 && !transposed) {  // the swizzle leaves the two units of a row beside each other
    for (u32 i = first; i < first + rows; i++) {
      const u32 offset = shared_offset(f, unit_address(o, false, i, 0) & ~31u, 32, "wgmma", site);
      clocked_async_read_run<2>(f, offset, group, good, "wgmma", site);
    }
    return;
  }
  if (o.units == 8 && first % 64 == 0 && rows % 64 == 0) {  // whole rows
    for (u32 i = first / 64; i < (first + rows) / 64; i++)
      for (u32 k = 0; k < 16; k++) {
        const u32 address = o.start + i * o.leading + k / 8 * o.stride + k % 8 * 128;
        clocked_async_read_run<8>(f, shared_offset(f, address, 128, "wgmma", site), group, good, "wgmma", site);
      }
    return;
  }
  const u32 outer = transposed ? rows / 8 : rows, inner = transposed ? 16 : 2, begin = transposed ? first / 8 : first;
  for (u32 i = 0; i < outer; i++)
    for (u32 j = 0; j < inner; j++) {
      const u32 address = unit_address(o, transposed, begin + i, j);
      clocked_async_read(f, shared_offset(f, address, 16, "wgmma", site), group, good, "wgmma", site);
    }
}

void issue_product(Fiber* f, Product& p, Site site) {
  Block* b = f->block;
  Warp* w = f->warp;
  const u32 warp = warp_of(f);
  WarpProducts& products = b->sm90->products[warp];
  warpgroup_step(f, "wgmma", site, p.from_registers ? 0 : p.a, p.b);
  p.accumulator = static_cast<float*>(w->d[0]);
  p.group = products.group;

  Accumulator* acc = find_accumulator(products, p.accumulator);
  if (!acc) {
    if (UNLIKELY(!products.fenced))
      fail_protocol(f, site,
                    "wgmma: wgmma_fence must come between it and what the warp last did to its accumulators "
                    "and registers, here the last wgmma_wait or the beginning");
    products.accumulators.push_back({});
    acc = &products.accumulators.back();
    for (i32 lane = 0; lane < 32; lane++) acc->lanes[lane] = static_cast<float*>(w->d[lane]);
    acc->n = p.n;
    acc->c.resize(static_cast<size_t>(16 * p.n));
    const float poison = __builtin_bit_cast(float, kPoison);
    for_each_accumulator(*acc, [&](float& lane, float& c) {
      c = lane;
      memcpy(&lane, &poison, 4);
    });
  } else if (UNLIKELY(acc->n != p.n)) {
    fail_protocol(f, site, format("wgmma: n = %d into accumulators that another of n = %d still writes", p.n, acc->n));
  }
  acc->group = p.group;
  note_warp(f, "wgmma", site, -1, static_cast<i32>(p.group));

  if (!products.reads) {
    products.reads = new_reads(f, "wgmma", site);
    products.group_reads.push_back({p.group, products.reads});
  }
  const Operand ob = read_descriptor(f, p.b, p.b_transposed, 'b', site);
  mark_operand(f, ob, p.b_transposed, 0, static_cast<u32>(p.n), products.reads, site);
  if (!p.from_registers) {
    const Operand oa = read_descriptor(f, p.a, p.a_transposed, 'a', site);
    mark_operand(f, oa, p.a_transposed, warp % 4 * 16, 16, products.reads, site);
  }
  if (UNLIKELY(b->launch->counting) && warp % 4 == 0)
    b->counters.others[{"matrix", format("wgmma_m64n%dk16_%s", p.n, p.half ? "f16" : "bf16")}]++;
  if (b->launch->early_landing)
    run_product(b, warp, p, acc->c.data());
  else
    products.pending.push_back(p);
}

void wait_products(Fiber* f, u32 pending, Site site) {
  Block* b = f->block;
  const u32 warp = warp_of(f);
  WarpProducts& products = b->sm90->products[warp];
  products.fenced = false;
  const auto waited = [&](u32 group) { return group + pending < products.group; };
  size_t done = 0;
  while (done < products.pending.size() && waited(products.pending[done].group)) {
    const Product& p = products.pending[done++];
    run_product(b, warp, p, find_accumulator(products, p.accumulator)->c.data());
  }
  products.pending.erase(products.pending.begin(), products.pending.begin() + static_cast<std::ptrdiff_t>(done));
  size_t closed = 0;
  while (closed < products.group_reads.size() && waited(products.group_reads[closed].first))
    b->clocks->groups[products.group_reads[closed++].second].waited = b->clocks->now[warp].at[warp];
  products.group_reads.erase(products.group_reads.begin(),
                             products.group_reads.begin() + static_cast<std::ptrdiff_t>(closed));
  std::vector<Accumulator>& accumulators = products.accumulators;
  for (size_t i = 0; i < accumulators.size();) {
    Accumulator& acc = accumulators[i];
    if (!waited(acc.group)) {
      i++;
      continue;
    }
    bool touched = false;
    for_each_accumulator(acc, [&](float& lane, float& c) {
      u32 bits;
      memcpy(&bits, &lane, 4);
      touched |= bits != kPoison;
      memcpy(&lane, &c, 4);
    });
    if (UNLIKELY(touched))
      fail(b, "race: accumulators of warp " + format("%u", warp) +
                  " have changed between a wgmma into them and the wait at " + place(site) + " that covers it");
    accumulators.erase(accumulators.begin() + static_cast<std::ptrdiff_t>(i));
  }
}

}  // namespace

// ---- What kernels call ----

extern "C" {

void cuflash_emu_wgmma(float* d, i32 n, const u32* a_registers, u64 a, u64 b, u32 flags, Site site) {
  Fiber* f = this_fiber();
  Warp* w = f->warp;
  w->d[f->lane] = d;
  w->a[f->lane] = a_registers;
  // Descriptors must be the same in all lanes.
  w->value[f->lane] = static_cast<u32>((a * 0x9e3779b97f4a7c15ull + b) * 0xbf58476d1ce4e5b9ull >> 32) + flags;
  if (!meet(f, "wgmma", site)) return;
  for (u32 lane = 0; lane < 32; lane++)
    if (UNLIKELY(w->value[lane] != w->value[0]))
      fail_protocol(w->fibers[lane], site, "wgmma: the descriptors and flags of lane 0 are others");
  Product p;
  p.n = n;
  p.half = flags & emu::kWgmmaHalf;
  p.from_registers = flags & emu::kWgmmaFromRegisters;
  p.a_transposed = flags & emu::kWgmmaTransposeA;
  p.b_transposed = flags & emu::kWgmmaTransposeB;
  p.accumulate = flags & emu::kWgmmaAccumulate;
  p.a = a, p.b = b;
  if (p.from_registers) gather_a(w, p.a_words);
  issue_product(f, p, site);
}

void cuflash_emu_wgmma_fence(Site site) {
  Fiber* f = this_fiber();
  if (!meet(f, "wgmma_fence", site)) return;
  f->block->sm90->products[warp_of(f)].fenced = true;
}

void cuflash_emu_wgmma_commit(Site site) {
  Fiber* f = this_fiber();
  if (!meet(f, "wgmma_commit", site)) return;
  warpgroup_step(f, "wgmma_commit", site);
  WarpProducts& products = f->block->sm90->products[warp_of(f)];
  note_warp(f, "wgmma_commit", site, -1, static_cast<i32>(products.group));
  products.group++;
  products.reads = 0;
}

void cuflash_emu_wgmma_wait(i32 pending, Site site) {
  Fiber* f = this_fiber();
  if (!meet(f, "wgmma_wait", site)) return;
  warpgroup_step(f, "wgmma_wait", site);
  note_warp(f, "wgmma_wait", site, -1, static_cast<i32>(f->block->sm90->products[warp_of(f)].group) - 1 - pending);
  wait_products(f, static_cast<u32>(pending), site);
}

}  // extern "C"
