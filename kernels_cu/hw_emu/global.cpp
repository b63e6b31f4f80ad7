// Part of runtime.cpp: access to global memory, which must be to the arrays of the launch.

namespace {

[[noreturn]] NEVER_INLINE void fail_global(Fiber* f, u64 address, u32 bytes, bool write, const char* what, Site site) {
  Block* b = f->block;
  const CuflashEmuLaunch& launch = *b->launch;
  f->site = site;
  const std::string me =
      format("%s: %s %u bytes by ", what, write ? "write of" : "read of", bytes) + who(f) + " at " + place(site);
  const CuflashEmuBuffer* nearest = nullptr;
  u64 distance = ~0ull;
  for (i32 i = 0; i < launch.buffer_count; i++) {
    const CuflashEmuBuffer& buffer = launch.buffers[i];
    const u64 end = buffer.begin + buffer.bytes;
    if (address >= buffer.begin && address + bytes <= end)  // only a write to a read-only buffer comes here
      fail(b, "out of bounds: " + me + format(": %s is read-only", buffer.name));
    const u64 d = address < buffer.begin ? buffer.begin - address : address >= end ? address - end : 0;
    if (d < distance) distance = d, nearest = &buffer;
  }
  if (address < 4096)
    fail(b, "out of bounds: " + me + format(" through a null pointer (address %llu)", address));
  if (!nearest) fail(b, "out of bounds: " + me + ": the launch names no buffer");
  const u64 end = nearest->begin + nearest->bytes;
  const std::string name = format("%s, which has %llu bytes", nearest->name, nearest->bytes);
  const std::string where = address < nearest->begin ? format("%llu bytes before the beginning of ", distance)
                            : address >= end         ? format("%llu bytes past the end of ", distance)
                                                     : format("the last %llu past the end of ", address + bytes - end);
  fail(b, "out of bounds: " + me + ", " + where + name);
}

NEVER_INLINE const CuflashEmuBuffer* find_buffer(Fiber* f, u64 address, u32 bytes, bool write, const char* what,
                                                 Site site) {
  const CuflashEmuLaunch& launch = *f->block->launch;
  for (i32 i = 0; i < launch.buffer_count; i++) {
    const CuflashEmuBuffer& buffer = launch.buffers[i];
    if (address >= buffer.begin && address + bytes <= buffer.begin + buffer.bytes && (!write || buffer.writable))
      return f->block->recent_buffer = &buffer;
  }
  fail_global(f, address, bytes, write, what, site);
}

[[noreturn]] NEVER_INLINE void fail_global_alignment(Fiber* f, u64 address, u32 bytes, const char* what, Site site) {
  f->site = site;
  fail(f->block, format("misaligned: %s of %u bytes by ", what, bytes) + who(f) + " at " + place(site) +
                     format(": the address is %u past a multiple of %u", static_cast<u32>(address % bytes), bytes));
}

// `size` bytes at `address`, which must be a multiple of `alignment`.
ALWAYS_INLINE void check_global(Fiber* f, u64 address, u32 size, u32 alignment, bool write, const char* what,
                                Site site) {
  Block* b = f->block;
  if (UNLIKELY(address % alignment != 0)) fail_global_alignment(f, address, alignment, what, site);
  const CuflashEmuBuffer* buffer = b->recent_buffer;
  if (UNLIKELY(!buffer || address < buffer->begin || address + size > buffer->begin + buffer->bytes ||
               (write && !buffer->writable)))
    buffer = find_buffer(f, address, size, write, what, site);
  if (UNLIKELY(b->launch->counting)) {
    (write ? b->counters.written : b->counters.read)[static_cast<size_t>(buffer - b->launch->buffers)] += size;
    note_access(f, address, size, false, trace_of(b, site));
  }
}

// A denormal becomes a zero of its sign.
ALWAYS_INLINE float flush_denormal(float x) {
  const u32 bits = __builtin_bit_cast(u32, x);
  return (bits & 0x7f800000u) == 0 ? __builtin_bit_cast(float, bits & 0x80000000u) : x;
}

}  // namespace
