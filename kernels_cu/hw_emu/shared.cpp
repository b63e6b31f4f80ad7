// Part of runtime.cpp: access to shared memory, which its shadow checks.

namespace {

[[noreturn]] NEVER_INLINE void fail_shared(Fiber* f, u32 offset, u32 bytes, bool write, const char* what, Site site) {
  Block* b = f->block;
  f->site = site;
  const u32 warp = static_cast<u32>(f->index) / 32;
  const std::string me = format("%s of ", what) + shared_place(offset, bytes) + " by " + who(f) + " at " + place(site);
  const int16_t mine = static_cast<int16_t>(b->interval_tag | static_cast<int16_t>(warp));
  for (u32 at = offset / 2; at < (offset + bytes + 1) / 2; at++) {
    const Chunk& chunk = b->shadow[at / 8];
    const int16_t written = chunk.write[at % 8], read = chunk.read[at % 8];
    const Trace writer = chunk.writer[at % 8 / 2];
    const std::string byte = format("byte %u of shared memory", at * 2);
    // A trace is kept for 4 bytes; where their halves have different writers it may be the other's.
    const auto other = [&](Trace trace, int16_t tag) {
      return (trace & 1023) / 32 == static_cast<u32>(tag & 63) ? who(trace & 1023) + " at " + place(b, trace)
                                                               : format("warp %d", tag & 63);
    };
    if (written == kInFlight) {
      const u32 issuer = writer & 1023;
      fail(b, "race: " + me + "\n  meets an asynchronous copy to " + byte + " that is still in flight, issued by " +
                  (issuer == static_cast<u32>(f->index) ? "the same thread" : who(issuer)) + " at " + place(b, writer) +
                  "\n  The issuing thread must wait for its group first (cp_async_wait)" +
                  (issuer / 32 == warp ? "" : ", then all meet at a barrier") + ".");
    }
    if (written >= b->interval_tag && written != mine)
      fail(b, "race: " + me + "\n  and the write of " + byte + " by " + other(writer, written) +
                  " have no block barrier between them");
    if (write && read >= b->interval_tag && read != mine)
      fail(b, "race: " + me + "\n  and the read of " + byte + " by " + other(chunk.reader[at % 8 / 2], read) +
                  " have no block barrier between them");
    if (!write && written == 0)
      fail(b, "uninitialised: " + me + ", but nobody has written " + byte +
                  " in this block; who writes it later must be waited for at a barrier");
  }
  fail(b, "race: " + me);
}

[[noreturn]] NEVER_INLINE void fail_shared_address(Fiber* f, u32 address, u32 bytes, const char* what, Site site) {
  Block* b = f->block;
  f->site = site;
  const u32 size = b->launch->smem_bytes;
  const std::string me = format("%s of %u bytes by ", what, bytes) + who(f) + " at " + place(site);
  if (address % bytes)
    fail(b, "misaligned: " + me + format(": the shared address %u is no multiple of %u", address, bytes));
  if (address < f->shared)
    fail(b, "out of bounds: " + me + format(": the address %u lies before smem_base()", address));
  fail(b, "out of bounds: " + me + format(": smem_base() + %u, but the block has %u bytes of shared memory",
                                          address - f->shared, size));
}

// The offset in Block::memory of a checked address.
ALWAYS_INLINE u32 shared_offset(Fiber* f, u32 address, u32 bytes, const char* what, Site site) {
  const u32 offset = address - f->shared;
  const u32 size = f->block->launch->smem_bytes;
  if (UNLIKELY(address % bytes != 0 || offset >= size || size - offset < bytes))
    fail_shared_address(f, address, bytes, what, site);
  return f->base + offset;
}

ALWAYS_INLINE int16_t tag_of(const Fiber* f) {
  return static_cast<int16_t>(f->block->interval_tag | static_cast<int16_t>(f->index >> 5));
}

// The first read of an interval is kept.
ALWAYS_INLINE void keep_read(Block* b, u32 offset, u32 bytes, int16_t tag, Trace trace) {
  for (u32 at = offset / 2; at < (offset + bytes) / 2; at++) {
    Chunk& chunk = b->shadow[at / 8];
    if (chunk.read[at % 8] >= b->interval_tag) continue;
    chunk.read[at % 8] = tag;
    chunk.reader[at % 8 / 2] = trace;
  }
}

ALWAYS_INLINE void shadow_read16(Fiber* f, u32 offset, Trace trace, const char* what, Site site) {
  Block* b = f->block;
  if (UNLIKELY(b->clocks != nullptr)) return clocked_read(f, offset, 16, trace, what, site);
  Chunk& chunk = b->shadow[offset / 16];
  const vi16x8 tag = splat16(tag_of(f)), now = splat16(b->interval_tag);
  const vi16x8 written = *reinterpret_cast<vi16x8*>(chunk.write), read = *reinterpret_cast<vi16x8*>(chunk.read);
  if (UNLIKELY(any_set(((written >= now) & (written != tag)) | (written == splat16(0)))))
    fail_shared(f, offset, 16, false, what, site);
  if (!any_set(read >= now)) {
    *reinterpret_cast<vi16x8*>(chunk.read) = tag;
    *reinterpret_cast<vu32x4*>(chunk.reader) = splat32(trace);
  } else if (any_set(read < now)) {
    keep_read(b, offset, 16, tag_of(f), trace);
  }
}

ALWAYS_INLINE void check_write16(Fiber* f, u32 offset, const char* what, Site site) {
  Block* b = f->block;
  if (UNLIKELY(b->clocks != nullptr)) return clocked_check_write(f, offset, 16, Use::kWrite, what, site);
  const Chunk& chunk = b->shadow[offset / 16];
  const vi16x8 tag = splat16(tag_of(f)), now = splat16(b->interval_tag);
  const vi16x8 written = *reinterpret_cast<const vi16x8*>(chunk.write);
  const vi16x8 read = *reinterpret_cast<const vi16x8*>(chunk.read);
  if (UNLIKELY(any_set(((written >= now) & (written != tag)) | ((read >= now) & (read != tag)))))
    fail_shared(f, offset, 16, true, what, site);
}

// The bytes are the fiber's warp's now, or on their way.
ALWAYS_INLINE void shadow_write(Fiber* f, u32 offset, u32 bytes, bool in_flight, Trace trace) {
  Block* b = f->block;
  if (UNLIKELY(b->clocks != nullptr))
    return clocked_write(b, offset, bytes, in_flight ? kCopyInFlight : clocked_tag(f), trace);
  const int16_t tag = in_flight ? kInFlight : tag_of(f);
  if (bytes == 16) {
    Chunk& chunk = b->shadow[offset / 16];
    *reinterpret_cast<vi16x8*>(chunk.write) = splat16(tag);
    *reinterpret_cast<vu32x4*>(chunk.writer) = splat32(trace);
  } else {
    for (u32 at = offset / 2; at < (offset + bytes) / 2; at++) {
      b->shadow[at / 8].write[at % 8] = tag;
      b->shadow[at / 8].writer[at % 8 / 2] = trace;
    }
  }
  if (offset + bytes > b->used) b->used = offset + bytes;
}

ALWAYS_INLINE void check_write(Fiber* f, u32 offset, u32 bytes, const char* what, Site site) {
  if (bytes == 16) return check_write16(f, offset, what, site);
  Block* b = f->block;
  if (UNLIKELY(b->clocks != nullptr)) return clocked_check_write(f, offset, bytes, Use::kWrite, what, site);
  const int16_t tag = tag_of(f), now = b->interval_tag;
  for (u32 at = offset / 2; at < (offset + bytes) / 2; at++) {
    const int16_t written = b->shadow[at / 8].write[at % 8], read = b->shadow[at / 8].read[at % 8];
    if (UNLIKELY((written >= now && written != tag) || (read >= now && read != tag)))
      fail_shared(f, offset, bytes, true, what, site);
  }
}

ALWAYS_INLINE void shadow_read(Fiber* f, u32 offset, u32 bytes, Trace trace, const char* what, Site site) {
  if (bytes == 16) return shadow_read16(f, offset, trace, what, site);
  Block* b = f->block;
  if (UNLIKELY(b->clocks != nullptr)) return clocked_read(f, offset, bytes, trace, what, site);
  const int16_t tag = tag_of(f), now = b->interval_tag;
  for (u32 at = offset / 2; at < (offset + bytes) / 2; at++) {
    const int16_t written = b->shadow[at / 8].write[at % 8];
    if (UNLIKELY((written >= now && written != tag) || written == 0)) fail_shared(f, offset, bytes, false, what, site);
  }
  keep_read(b, offset, bytes, tag, trace);
}

}  // namespace
