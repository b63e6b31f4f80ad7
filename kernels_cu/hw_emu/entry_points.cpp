// Part of runtime.cpp: what kernels call to meet, to touch memory, and to convert. The rest stands with its subject:
// copies.cpp, matrix.cpp, mbarrier.cpp, tma.cpp, groups.cpp, wgmma.cpp.

extern "C" {

void cuflash_emu_sync_threads(Site site) {
  Fiber* f = this_fiber();
  come_to(f, f->block->at_barrier[f->rank], kAtBarrier, "sync_threads", site);
}

void cuflash_emu_cluster_sync(Site site) {
  Fiber* f = this_fiber();
  come_to(f, f->block->at_cluster, kAtCluster, "cluster_sync", site);
}

void cuflash_emu_sync_warp(Site site) { meet(this_fiber(), "sync_warp", site); }

u32 cuflash_emu_shuffle(u32 value, i32 source, const char* name, Site site) {
  Fiber* f = this_fiber();
  Warp* w = f->warp;
  const u32 lane = f->lane;
  w->value[lane] = value;
  w->source[lane] = static_cast<u32>(source) & 31;
  if (meet(f, name, site)) {
    note_warp(f, name, site);
    for (i32 i = 0; i < 32; i++) w->result[i] = w->value[w->source[i]];
    if (UNLIKELY(f->block->launch->counting)) f->block->counters.others[{"exchanges", name}]++;
  }
  return w->result[lane];
}

u32 cuflash_emu_ballot(bool predicate, const char* name, Site site) {
  Fiber* f = this_fiber();
  Warp* w = f->warp;
  w->ballot |= static_cast<u32>(predicate) << f->lane;
  if (meet(f, name, site)) {
    w->ballot_result = w->ballot;
    w->ballot = 0;
    if (UNLIKELY(f->block->launch->counting)) f->block->counters.others[{"exchanges", name}]++;
  }
  return w->ballot_result;
}

void cuflash_emu_load_shared(void* value, u32 address, u32 bytes, Site site) {
  Fiber* f = this_fiber();
  Block* b = f->block;
  step(f, site);
  const u32 offset = shared_offset(f, address, bytes, "load_shared", site);
  const Trace trace = trace_of(b, site);
  shadow_read(f, offset, bytes, trace | static_cast<u32>(f->index), "load_shared", site);
  note_access(f, address, bytes, true, trace);
  memcpy(value, b->memory + offset, bytes);
}

void cuflash_emu_store_shared(const void* value, u32 address, u32 bytes, Site site) {
  Fiber* f = this_fiber();
  Block* b = f->block;
  step(f, site);
  const u32 offset = shared_offset(f, address, bytes, "store_shared", site);
  const Trace trace = trace_of(b, site);
  check_write(f, offset, bytes, "store_shared", site);
  shadow_write(f, offset, bytes, false, trace | static_cast<u32>(f->index));
  note_access(f, address, bytes, true, trace);
  memcpy(b->memory + offset, value, bytes);
}

void cuflash_emu_load_global(void* value, const void* pointer, u32 bytes, Site site) {
  Fiber* f = this_fiber();
  step(f, site);
  check_global(f, reinterpret_cast<u64>(pointer), bytes, bytes, false, "load_global", site);
  memcpy(value, pointer, bytes);
}

void cuflash_emu_store_global(const void* value, void* pointer, u32 bytes, Site site) {
  Fiber* f = this_fiber();
  step(f, site);
  check_global(f, reinterpret_cast<u64>(pointer), bytes, bytes, true, "store_global", site);
  memcpy(pointer, value, bytes);
}

// Atomic for this machine's threads, too, over which the blocks are spread.
static void add_to(float* pointer, float value) {
  u32* word = reinterpret_cast<u32*>(pointer);
  u32 before = __atomic_load_n(word, __ATOMIC_RELAXED), after;
  do {
    const float sum = flush_denormal(__builtin_bit_cast(float, before)) + flush_denormal(value);
    after = __builtin_bit_cast(u32, flush_denormal(sum));
  } while (!__atomic_compare_exchange_n(word, &before, after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
}

void cuflash_emu_atomic_add(float* pointer, float value, Site site) {
  Fiber* f = this_fiber();
  step(f, site);
  check_global(f, reinterpret_cast<u64>(pointer), 4, 4, true, "atomic_add", site);
  add_to(pointer, value);
}

void cuflash_emu_atomic_add4(float* pointer, const float* values, Site site) {
  Fiber* f = this_fiber();
  step(f, site);
  check_global(f, reinterpret_cast<u64>(pointer), 16, 16, true, "atomic_add4", site);
  for (i32 i = 0; i < 4; i++) add_to(pointer + i, values[i]);
}

void cuflash_emu_bad_index(i32 index, i32 size, Site site) {
  Fiber* f = this_fiber();
  f->site = site;
  fail(f->block, "out of bounds: an index of " + who(f) + " at " + place(site) +
                     format(": %d, of an axis of %d elements", index, size));
}

void cuflash_emu_atomic_add_u64(u64* pointer, u64 value, Site site) {
  Fiber* f = this_fiber();
  step(f, site);
  check_global(f, reinterpret_cast<u64>(pointer), 8, 8, true, "atomic_add", site);
  __atomic_fetch_add(pointer, value, __ATOMIC_RELAXED);
}

// Round to nearest even; overflow gives infinity; any NaN becomes 0x7fff.
u32 cuflash_emu_half_bits(float x) {
  if (x != x) return 0x7fff;
  const u32 bits = __builtin_bit_cast(u32, x), sign = bits >> 16 & 0x8000;
  const float magnitude = __builtin_bit_cast(float, bits & 0x7fffffff);
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  if (magnitude < 0x1p-14f)  // adding 1/2 leaves multiples of 2^-24, half's denormals, in the low bits
    return sign | (__builtin_bit_cast(u32, magnitude + 0.5f) - 0x3f000000u);
  const u32 rounded = (bits & 0x7fffffff) + 0xfff + (bits >> 13 & 1);
  return sign | (rounded - 0x38000000u) >> 13;
}

float cuflash_emu_half_value(u32 bits) {
  const float magnitude = __builtin_bit_cast(float, (bits & 0x7fffu) << 13) * 0x1p112f;
  u32 result = __builtin_bit_cast(u32, magnitude) | (bits & 0x8000u) << 16;
  if ((bits & 0x7c00u) == 0x7c00u) result |= 0x7f800000u;
  return __builtin_bit_cast(float, result);
}

}  // extern "C"
