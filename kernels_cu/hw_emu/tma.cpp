// Part of runtime.cpp: tensor copies between global and shared memory.

namespace {

const MapBytes& read_map(Fiber* f, const void* map, i32 rank, const char* what, Site site) {
  step(f, site);
  const MapBytes& bytes = *static_cast<const MapBytes*>(map);
  if (UNLIKELY(reinterpret_cast<u64>(map) % 64))
    fail(f->block, format("misaligned: %s by ", what) + who(f) + " at " + place(site) +
                       ": a tensor map lies at a multiple of 64 bytes (alignas(64) in the params struct)");
  if (UNLIKELY(bytes.magic != kMapMagic))
    fail_protocol(f, site,
                  format("%s: the pointer leads to no tensor map of the emulator (cuflash/jit/tensor_map.py)", what));
  if (UNLIKELY(bytes.rank != rank))
    fail_protocol(f, site, format("%s: %d coordinates for a tensor map of %d axes", what, rank, bytes.rank));
  return bytes;
}

u32 box_bytes(const MapBytes& map) {
  u32 bytes = map.element_bytes;
  for (i32 i = 0; i < map.rank; i++) bytes *= map.box[i];
  return bytes;
}

// visit(row, address, from, to): each row of the box; its elements [from, to) of `box[0]` lie in the tensor, the first
// element of the row at `address` (which may lie before the tensor).
template <class Visit>
void for_each_row(const MapBytes& map, const i32 (&at)[5], Visit visit) {
  const i64 begin = at[0], axis = static_cast<i64>(map.last[0]) + 1;
  const u32 from = static_cast<u32>(std::min<i64>(std::max<i64>(-begin, 0), map.box[0]));
  const u32 to = static_cast<u32>(std::max<i64>(std::min<i64>(axis - begin, map.box[0]), from));
  u32 row = 0;
  u32 i[5] = {};
  for (;;) {
    u64 address = map.address + static_cast<u64>(begin * map.element_bytes);
    bool inside = true;
    for (i32 d = 1; d < map.rank; d++) {
      const i64 index = static_cast<i64>(at[d]) + i[d];
      inside &= index >= 0 && index <= static_cast<i64>(map.last[d]);
      address += static_cast<u64>(index) * map.strides[d - 1];
    }
    visit(row++, address, inside ? from : 0, inside ? to : 0);
    i32 d = 1;
    while (d < map.rank && ++i[d] == map.box[d]) i[d++] = 0;
    if (d == map.rank) return;
  }
}

// Where byte `byte` of the box lies, `base` being the box's offset in shared memory.
ALWAYS_INLINE u32 box_place(const MapBytes& map, u32 base, u32 byte) {
  if (map.swizzle == 0) return base + byte;
  return swizzled(emu::kSharedBase + base + byte, 1u << map.swizzle) - emu::kSharedBase;
}

// The offset in Block::memory of a box at this address of the thread's own block.
u32 box_offset(Fiber* f, const MapBytes& map, u32 address, const char* what, Site site) {
  const u32 alignment = map.swizzle ? 128u << map.swizzle : 128u;
  if (UNLIKELY(address % alignment != 0))
    fail(f->block, format("misaligned: %s by ", what) + who(f) + " at " + place(site) +
                       format(": the shared address %u is no multiple of %u", address, alignment) +
                       (map.swizzle ? ", over which the pattern of the map's swizzle runs" : ""));
  const u32 bytes = box_bytes(map), size = f->block->launch->smem_bytes, offset = address - f->shared;
  if (UNLIKELY(offset >= size || size - offset < bytes)) fail_shared_address(f, address, bytes, what, site);
  return f->base + offset;
}

void land_load(Block* b, Mbarrier* m, const TensorLoad& load) {
  const MapBytes& map = load.map;
  const u32 row_bytes = map.box[0] * map.element_bytes;
  for_each_row(map, load.at, [&](u32 row, u64 address, u32 from, u32 to) {
    u8 bytes[1024];
    memset(bytes, 0, row_bytes);
    const u32 e = map.element_bytes;
    if (to > from) memcpy(bytes + from * e, reinterpret_cast<const u8*>(address) + from * e, (to - from) * e);
    for (u32 i = 0; i < row_bytes; i += 16)
      memcpy(b->memory + box_place(map, load.destination, row * row_bytes + i), bytes + i, 16);
  });
  const u32 tag = (m->completed + 1) << kAgentBits | m->agent;
  clocked_write(b, load.destination, load.bytes, tag, load.trace);
  m->bytes -= load.bytes;
  if (load.own) m->flying -= load.bytes;
}

void count_tensor(Fiber* f, const MapBytes& map, const i32 (&at)[5], bool write, const char* what, Site site) {
  Block* b = f->block;
  for_each_row(map, at, [&](u32, u64 address, u32 from, u32 to) {
    if (from < to)
      check_global(f, address + from * map.element_bytes, (to - from) * map.element_bytes, map.element_bytes, write,
                   what, site);
  });
  if (UNLIKELY(b->launch->counting)) b->counters.others[{"moves", what}]++;
}

// What of the tensor the box holds, from its first byte to behind its last.
Copied extent(Block* b, const MapBytes& map, const i32 (&at)[5]) {
  Copied all = {~0ull, 0};
  if (LIKELY(b->launch->event_limit == 0)) return all;
  for_each_row(map, at, [&](u32, u64 address, u32 from, u32 to) {
    if (from == to) return;
    all.begin = std::min(all.begin, address + from * map.element_bytes);
    all.end = std::max(all.end, address + to * map.element_bytes);
  });
  return all;
}

// To the block of that rank in the cluster; -1: the thread's own.
void load_to(Fiber* f, u32 destination, const MapBytes& map, u32 mbarrier, i32 to, const i32 (&at)[5], Site site) {
  Block* b = f->block;
  Mbarrier* m = find_mbarrier(f, mbarrier, "tma_load", site, to);
  if (UNLIKELY(!m->visible))
    fail(b, "proxy: the tma_load of " + who(f) + " at " + place(site) + " uses " + name_of(b, m) +
                ": the thread that made it must call fence_mbarrier_init before the barrier that orders them");
  TensorLoad load = {map, {}, 0, box_bytes(map), trace_of(b, site) | static_cast<u32>(f->index), true};
  memcpy(load.at, at, sizeof(load.at));
  const i32 rank = to < 0 ? f->rank : to;
  load.destination = box_offset(f, map, destination, "tma_load", site) +
                     static_cast<u32>(rank - f->rank) * shared_stride(*b->launch);
  note_lane(f, "tma_load", site, static_cast<i32>(m->offset), static_cast<i32>(m->completed), false,
            extent(b, map, load.at));
  clocked_check_write(f, load.destination, load.bytes, Use::kAsyncWrite, "tma_load", site);
  // What another block sends may come before it is announced: the phase waits for the announcement.
  load.own = rank == f->rank;
  if (load.own) m->flying += load.bytes;
  if (UNLIKELY(load.own && m->pending && m->flying > m->bytes))
    fail_protocol(f, site, format("tma_load: its %u bytes have not been announced to ", load.bytes) + name_of(b, m) +
                               ": mbarrier_arrive_expect_tx comes first");
  if (b->launch->early_landing) {
    land_load(b, m, load);
    try_complete(f, m, false, site);
    return;
  }
  clocked_write(b, load.destination, load.bytes, kCopyInFlight, load.trace);
  m->loads.push_back(load);
  if (!m->waiting.empty()) try_complete(f, m, true, site);
}

void run_store(Block* b, const BulkStore& store) {
  const MapBytes& map = store.map;
  const u32 row_bytes = map.box[0] * map.element_bytes, e = map.element_bytes;
  for_each_row(map, store.at, [&](u32 row, u64 address, u32 from, u32 to) {
    if (from == to) return;
    u8 bytes[1024];
    for (u32 i = 0; i < row_bytes; i += 16)
      memcpy(bytes + i, b->memory + box_place(map, store.source, row * row_bytes + i), 16);
    memcpy(reinterpret_cast<u8*>(address) + from * e, bytes + from * e, (to - from) * e);
  });
}

void wait_stores(Fiber* f, u32 pending) {
  Block* b = f->block;
  BulkStores& bulk = b->sm90->bulk[static_cast<size_t>(f->index)];
  const Clock& now = b->clocks->now[warp_of(f)];
  size_t done = 0;
  for (BulkStore& store : bulk.stores) {
    if (store.group + pending >= bulk.group) break;
    if (!b->launch->early_landing) run_store(b, store);
    b->clocks->groups[store.reads].waited = now.at[warp_of(f)];
    done++;
  }
  bulk.stores.erase(bulk.stores.begin(), bulk.stores.begin() + static_cast<std::ptrdiff_t>(done));
}

}  // namespace

// ---- What kernels call ----

extern "C" {

void cuflash_emu_tma_load(u32 destination, const void* map_pointer, u32 mbarrier, u32 blocks, i32 rank,
                          const i32* coordinates, Site site) {
  Fiber* f = this_fiber();
  const MapBytes& map = read_map(f, map_pointer, rank, "tma_load", site);
  i32 at[5] = {};
  for (i32 i = 0; i < rank; i++) at[i] = coordinates[i];
  count_tensor(f, map, at, false, "tma_load", site);
  if (blocks == 0) return load_to(f, destination, map, mbarrier, -1, at, site);
  if (UNLIKELY(blocks >> f->block->launch->cluster))
    fail_protocol(f, site, format("tma_load_to: the blocks 0x%x of a cluster of %d", blocks, f->block->launch->cluster));
  for (i32 to = 0; to < f->block->launch->cluster; to++)
    if (blocks >> to & 1) load_to(f, destination, map, mbarrier, to, at, site);
}

void cuflash_emu_tma_store(const void* map_pointer, u32 source, i32 rank, const i32* coordinates, Site site) {
  Fiber* f = this_fiber();
  Block* b = f->block;
  const MapBytes& map = read_map(f, map_pointer, rank, "tma_store", site);
  BulkStores& bulk = b->sm90->bulk[static_cast<size_t>(f->index)];
  BulkStore store = {map, {}, 0, bulk.group, new_reads(f, "tma_store", site), site};
  for (i32 i = 0; i < rank; i++) store.at[i] = coordinates[i];
  store.source = box_offset(f, map, source, "tma_store", site);
  count_tensor(f, map, store.at, true, "tma_store", site);
  note_lane(f, "tma_store", site, -1, static_cast<i32>(bulk.group), false, extent(b, map, store.at));
  const u32 row_bytes = map.box[0] * map.element_bytes;
  u32 good = 0;
  for_each_row(map, store.at, [&](u32 row, u64, u32 from, u32 to) {
    for (u32 i = from * map.element_bytes / 16 * 16; from < to && i < to * map.element_bytes; i += 16)
      clocked_async_read(f, box_place(map, store.source, row * row_bytes + i), store.reads, good, "tma_store", site);
  });
  if (b->launch->early_landing) run_store(b, store);
  bulk.stores.push_back(store);
}

void cuflash_emu_bulk_commit(Site site) {
  Fiber* f = this_fiber();
  step(f, site);
  BulkStores& bulk = f->block->sm90->bulk[static_cast<size_t>(f->index)];
  note_lane(f, "bulk_commit", site, -1, static_cast<i32>(bulk.group));
  bulk.group++;
}

void cuflash_emu_bulk_wait(i32 pending, Site site) {
  Fiber* f = this_fiber();
  step(f, site);
  note_lane(f, "bulk_wait", site, -1,
            static_cast<i32>(f->block->sm90->bulk[static_cast<size_t>(f->index)].group) - 1 - pending);
  wait_stores(f, static_cast<u32>(pending));
}

void cuflash_emu_prefetch_tensor_map(const void* map, Site site) {
  Fiber* f = this_fiber();
  read_map(f, map, static_cast<const MapBytes*>(map)->rank, "prefetch_tensor_map", site);
}

}  // extern "C"
