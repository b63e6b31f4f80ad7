// Part of runtime.cpp: asynchronous copies, each in flight until its thread waits for it.

namespace {

void move_bytes(Block* b, const Copy& copy) {
  u8* to = b->memory + copy.destination;
  if (LIKELY(copy.source_bytes == 16)) {
    memcpy(to, copy.source, 16);
  } else {
    memset(to, 0, copy.bytes);
    memcpy(to, copy.source, copy.source_bytes);
  }
}

ALWAYS_INLINE void land(Fiber* f, const Copy& copy) {
  Block* b = f->block;
  if (!b->launch->early_landing) move_bytes(b, copy);
  // The bytes are this warp's write, of now; who issued it stays on record.
  if (UNLIKELY(b->clocks != nullptr))
    return clocked_write(b, copy.destination, copy.bytes, clocked_tag(f),
                         b->shadow[copy.destination / 16].writer[copy.destination % 16 / 4]);
  const int16_t tag = tag_of(f);
  Chunk& chunk = b->shadow[copy.destination / 16];
  if (copy.bytes == 16) {
    *reinterpret_cast<vi16x8*>(chunk.write) = splat16(tag);
  } else {
    chunk.write[copy.destination % 16 / 2] = chunk.write[copy.destination % 16 / 2 + 1] = tag;
  }
}

}  // namespace

// ---- What kernels call ----

extern "C" {

void cuflash_emu_cp_async(u32 destination, const void* source, u32 bytes, i32 source_bytes, Site site) {
  Fiber* f = this_fiber();
  Block* b = f->block;
  const char* what = bytes == 16 ? "cp_async_16" : "cp_async_4";
  step(f, site);
  const u32 offset = shared_offset(f, destination, bytes, what, site);
  if (UNLIKELY(static_cast<u32>(source_bytes) > bytes)) {
    f->site = site;
    fail(b, format("out of bounds: %s by ", what) + who(f) + " at " + place(site) +
                format(": source_bytes is %d, of 0 to %u", source_bytes, bytes));
  }
  if (LIKELY(source_bytes != 0)) {
    check_global(f, reinterpret_cast<u64>(source), static_cast<u32>(source_bytes), bytes, false, what, site);
  } else if (UNLIKELY(reinterpret_cast<u64>(source) % bytes != 0)) {
    fail_global_alignment(f, reinterpret_cast<u64>(source), bytes, what, site);
  }
  const Trace trace = trace_of(b, site);
  check_write(f, offset, bytes, what, site);
  shadow_write(f, offset, bytes, true, trace | static_cast<u32>(f->index));
  note_access(f, destination, bytes, true, trace);
  const Copy copy = {static_cast<const u8*>(source), offset, f->copies.group, static_cast<u8>(bytes),
                     static_cast<u8>(source_bytes)};
  if (b->launch->early_landing) move_bytes(b, copy);
  const u64 from = reinterpret_cast<u64>(source);
  note_lane(f, what, site, -1, static_cast<i32>(f->copies.group), false,
            source_bytes ? Copied{from, from + static_cast<u32>(source_bytes)} : Copied{~0ull, 0});
  f->copies.items.push_back(copy);
}

void cuflash_emu_cp_async_commit(Site site) {
  Fiber* f = this_fiber();
  step(f, site);
  note_lane(f, "cp_async_commit", site, -1, static_cast<i32>(f->copies.group));
  f->copies.group++;
}

void cuflash_emu_cp_async_wait(i32 pending, Site site) {
  Fiber* f = this_fiber();
  step(f, site);
  CopyQueue& queue = f->copies;
  note_lane(f, "cp_async_wait", site, -1, static_cast<i32>(queue.group) - 1 - pending);
  while (queue.head < queue.items.size() && static_cast<i64>(queue.items[queue.head].group) + pending < queue.group)
    land(f, queue.items[queue.head++]);
  if (queue.head == queue.items.size()) {
    queue.items.clear();
    queue.head = 0;
  }
}

}  // extern "C"
