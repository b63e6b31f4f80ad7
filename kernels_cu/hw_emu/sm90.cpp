// Part of runtime.cpp: what warps of compute capability 9.0 meet at and hand to the asynchronous proxy.
//
//   mbarrier        arrivals and bytes of a phase are counted; a wait lets other warps run until its phase is complete
//   tma             a copy lands when a wait for its mbarrier needs it, or, under landing="early", when it is issued
//   wgmma           a warp computes its 16 rows when it waits for the group, or, under "early", when it is issued; the
//                   accumulators hold a signalling NaN in between
//   named barrier, elect, setmaxnreg
//
// Everything is done by warps: a lane's arrival is its warp's.

namespace {

// ---- Tensor maps: the 128 bytes that cuflash/jit/tensor_map.py writes ----

struct MapBytes {
  u32 magic;
  u8 rank, element_bytes, swizzle, zero;  // swizzle: 0 none, 1, 2, 3: 32, 64, 128 bytes
  u64 address;
  u32 last[5];  // length of each axis less 1, innermost first
  u16 box[5];
  u16 zeros;
  u64 strides[4];  // bytes, from the second axis on
  u8 rest[48];
};
static_assert(sizeof(MapBytes) == 128, "a tensor map has 128 bytes");
constexpr u32 kMapMagic = 0x50414d54;  // "TMAP"

// The swizzle of addresses: 16-byte units are exchanged among `units` of them by the number of the 128 bytes they are
// in.
ALWAYS_INLINE u32 swizzled(u32 address, u32 units) { return address ^ ((address >> 7 & (units - 1)) << 4); }

// ---- What waits ----

struct TensorLoad {
  MapBytes map;
  i32 at[5];
  u32 destination, bytes;
  Trace trace;
  bool own;  // of the mbarrier's block
};

struct Mbarrier {
  u32 offset, agent;
  i32 count, pending;
  i64 bytes = 0;      // expected and not landed
  i64 flying = 0;     // of copies that its own block has issued and that have not landed
  u32 completed = 0;  // phases
  Clock arriving, done;
  Trace made;
  u32 made_tag;
  bool visible = false;  // to the asynchronous proxy
  std::vector<TensorLoad> loads;
  size_t landed = 0;  // of `loads`
  std::vector<Fiber*> waiting;
  i32 woken = 0;  // threads that were told of the last phase and have not run since
};

struct NamedBarrier {
  i32 threads = 0, arrived = 0;
  i32 phase = 0;
  Clock clock;
  Site first;
  std::vector<Warp*> waiting;
};

struct BulkStore {
  MapBytes map;
  i32 at[5];
  u32 source, group, reads;
  Site site;
};

struct BulkStores {  // of a thread
  std::vector<BulkStore> stores;
  u32 group = 0;
};

struct Waiting {  // of a thread
  Mbarrier* mbarrier;
  u32 parity;
};

struct Accumulator {
  float* lanes[32];
  i32 n;
  u32 group;             // of the last product into it
  std::vector<float> c;  // [16][n], this warp's rows
};

struct Product {
  float* accumulator;
  i32 n;
  bool half, from_registers, a_transposed, b_transposed, accumulate;
  u64 a, b;
  u32 a_words[16][8];
  u32 group;
};

struct WarpProducts {
  std::vector<Accumulator> accumulators;
  std::vector<Product> pending;
  u32 group = 0;
  u32 reads = 0;                                 // of the open group: an index into Clocks::groups
  std::vector<std::pair<u32, u32>> group_reads;  // group, index
  bool fenced = false;
};

struct GroupStep {
  const char* what;
  Site site;
  u64 a, b;
};

struct Sm90 {
  std::vector<Mbarrier*> mbarriers;
  std::vector<u8> mbarrier_at;  // by offset / 8: an index + 1
  NamedBarrier named[16 * kMaxCluster];
  std::vector<BulkStores> bulk;
  std::vector<Waiting> waits;
  WarpProducts products[32];
  std::vector<GroupStep> steps[8];  // of a warpgroup, as its first warp met them
  u32 steps_done[32];
  i32 registers[32];
  i32 free_registers[kMaxCluster];
  std::vector<std::pair<u32, Trace>> arrivals[kMaxCluster];  // from other blocks: the tag of each, and whose it is
  std::vector<std::pair<Warp*, i32>> wants_registers;
  u8 elected[32];

  ~Sm90() { clear(); }
  void clear() {
    for (Mbarrier* m : mbarriers) delete m;
    mbarriers.clear();
  }
};

u32 warp_of(const Fiber* f) { return static_cast<u32>(f->index) >> 5; }

void begin_sm90(Arena* arena) {
  Block* b = &arena->block;
  if (!arena->clocks) arena->clocks = new Clocks(), arena->sm90 = new Sm90();
  b->clocks = arena->clocks;
  b->sm90 = arena->sm90;
  const u32 shared = shared_stride(*b->launch) * static_cast<u32>(b->launch->cluster);
  const size_t threads = static_cast<size_t>(b->warps) * 32;
  b->clocks->begin(shared, b->warps);
  Sm90& s = *b->sm90;
  s.clear();
  s.mbarrier_at.assign(shared / 8 + 1, 0);
  for (NamedBarrier& named : s.named) named = NamedBarrier();
  s.bulk.assign(threads, BulkStores());
  s.waits.assign(threads, Waiting{});
  for (auto& steps : s.steps) steps.clear();
  const i32 entry = std::min(256, 65536 / b->launch->threads / 8 * 8);
  for (i32& free : s.free_registers) free = 0;
  for (auto& arrivals : s.arrivals) arrivals.clear();
  s.wants_registers.clear();
  for (i32 w = 0; w < b->warps; w++) {
    s.products[w] = WarpProducts();
    s.steps_done[w] = 0;
    s.registers[w] = entry;
    s.elected[w] = static_cast<u8>(b->random.below(32));
  }
}

// All threads that are left of these warps meet: what any did lies before what any will do.
void meet_sm90(Block* b, i32 first, i32 end) {
  Clock all;
  for (i32 w = first; w < end; w++) b->clocks->release(static_cast<u32>(w), all);
  for (i32 w = first; w < end; w++) b->clocks->now[w].join(all);
}

[[noreturn]] NEVER_INLINE void fail_protocol(Fiber* f, Site site, const std::string& what) {
  f->site = site;
  fail(f->block, "protocol: " + who(f) + " at " + place(site) + ": " + what);
}

// ---- mbarriers ----

std::string name_of(Block* b, const Mbarrier* m) {
  const u32 offset = m->offset % shared_stride(*b->launch), rank = m->offset / shared_stride(*b->launch);
  const std::string whose = b->launch->cluster > 1 ? format(" of the cluster's block %u", rank) : "";
  return format("the mbarrier at smem_base() + %u", offset) + whose + " (made at " + place(b, m->made) + ")";
}

std::string missing_of(const Mbarrier* m) {
  std::string text = format("phase %u: %d of %d arrivals", m->completed, m->pending, m->count);
  if (m->bytes) text += format(" and %lld bytes", static_cast<long long>(m->bytes));
  return text + " are missing";
}

// rank: of the cluster's block whose it is, where `address` is one of the thread's own; -1: the own block.
Mbarrier* find_mbarrier(Fiber* f, u32 address, const char* what, Site site, i32 rank = -1) {
  Block* b = f->block;
  Sm90& s = *b->sm90;
  step(f, site);
  u32 offset = shared_offset(f, address, 8, what, site);
  if (rank >= 0) {
    if (UNLIKELY(rank >= b->launch->cluster))
      fail_protocol(f, site, format("%s: block %d of a cluster of %d", what, rank, b->launch->cluster));
    if (UNLIKELY(b->alive_of[rank] == 0))
      fail_protocol(f, site, format("%s: the cluster's block %d has ended: cluster_sync before its end", what, rank));
    offset += static_cast<u32>(rank - f->rank) * shared_stride(*b->launch);
  }
  const u8 index = s.mbarrier_at[offset / 8];
  if (UNLIKELY(!index)) {
    std::string known;
    for (const Mbarrier* m : s.mbarriers) known += (known.empty() ? "; there are: " : ", ") + format("%u", m->offset);
    fail_protocol(f, site,
                  format("%s of smem_base() + %u, where no mbarrier_init has made an mbarrier", what, offset) + known);
  }
  Mbarrier* m = s.mbarriers[index - 1u];
  if (UNLIKELY(!ordered(b->clocks->now[warp_of(f)], m->made_tag)))
    fail(b, "race: " + format("%s by ", what) + who(f) + " at " + place(site) + "\n  and mbarrier_init of " +
                name_of(b, m) + " have no barrier between them");
  return m;
}

void land_load(Block* b, Mbarrier* m, const TensorLoad& load);

void complete_phase(Block* b, Mbarrier* m) {
  if (m->woken)
    fail(b, "protocol: " + name_of(b, m) +
                format(" completes phase %u while %d threads that waited for the phase before have not run since: they "
                       "may miss it. Whoever waits must be waited for before the next phase can complete",
                       m->completed, m->woken) +
                positions(b));
  m->completed++;
  m->pending = m->count;
  m->done.join(m->arriving);
  m->done.at[m->agent] = m->completed;
  std::vector<Fiber*> left;
  for (Fiber* f : m->waiting) {
    if ((m->completed & 1) == (b->sm90->waits[static_cast<size_t>(f->index)].parity & 1)) {
      left.push_back(f);
      continue;
    }
    f->warp->state[f->lane] = kRunning;
    m->woken++;
  }
  m->waiting.swap(left);
}

// Completes the phase if nothing is missing; lands copies for it if somebody waits.
void try_complete(Fiber* f, Mbarrier* m, bool wanted, Site site) {
  Block* b = f->block;
  if (m->pending) return;
  while (wanted && m->bytes > 0 && m->landed < m->loads.size()) land_load(b, m, m->loads[m->landed++]);
  if (m->landed == m->loads.size()) m->loads.clear(), m->landed = 0;
  if (UNLIKELY(m->bytes < 0))
    fail_protocol(f, site,
                  format("%lld bytes more land on ", static_cast<long long>(-m->bytes)) + name_of(b, m) +
                      " than its phase expects (mbarrier_arrive_expect_tx)");
  if (m->bytes == 0) complete_phase(b, m);
}

void arrive(Fiber* f, u32 address, u32 bytes, const char* what, Site site, i32 rank = -1) {
  Block* b = f->block;
  Mbarrier* m = find_mbarrier(f, address, what, site, rank);
  if (UNLIKELY(m->pending == 0))
    fail_protocol(f, site,
                  format("%s: one arrival more than the %d of ", what, m->count) + name_of(b, m) +
                      ", whose bytes have not all landed");
  note_lane(f, what, site, static_cast<i32>(m->offset), static_cast<i32>(m->completed));
  if (rank >= 0 && rank != f->rank)
    b->sm90->arrivals[rank].push_back({clocked_tag(f), trace_of(b, site) | static_cast<u32>(f->index)});
  b->clocks->release(warp_of(f), m->arriving);
  m->bytes += bytes;
  m->pending--;
  try_complete(f, m, !m->waiting.empty(), site);
}

// ---- tma ----

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

u32 new_reads(Fiber* f, const char* what, Site site) {
  Block* b = f->block;
  const Trace trace = trace_of(b, site) | static_cast<u32>(f->index);
  b->clocks->groups.push_back({warp_of(f), trace, what, 0});
  return static_cast<u32>(b->clocks->groups.size() - 1);
}

// ---- A warp comes to a barrier or an instruction of its warpgroup ----

// The warp whose last lane this is waits.
void park(Fiber* f, State state, const char* what, Site site) {
  Warp* w = f->warp;
  for (i32 lane = 0; lane < 32; lane++) {
    w->state[lane] = state;
    w->fibers[lane]->what = what;
    w->fibers[lane]->site = site;
  }
  switch_to_scheduler(f);
}

void named_barrier(Fiber* f, i32 id, i32 threads, bool sync, const char* what, Site site) {
  Block* b = f->block;
  Warp* w = f->warp;
  w->value[f->lane] = static_cast<u32>(id);
  w->source[f->lane] = static_cast<u32>(threads);
  if (!meet(f, what, site)) return;
  for (u32 lane = 0; lane < 32; lane++)
    if (w->value[lane] != w->value[0] || w->source[lane] != w->source[0])
      fail_protocol(w->fibers[lane], site, format("%s: the lanes of a warp name one barrier and one count", what));
  if (id < 1 || id > 15)
    fail_protocol(f, site, format("%s: the barrier %d is not one of 1 to 15 (0 is sync_threads')", what, id));
  if (threads <= 0 || threads % 32 || threads > b->launch->threads)
    fail_protocol(
        f, site,
        format("%s: %d threads are no whole warps of the block's %d threads", what, threads, b->launch->threads));
  NamedBarrier& named = b->sm90->named[16 * f->rank + id];
  if (named.arrived && named.threads != threads)
    fail_protocol(f, site,
                  format("%s: %d threads at barrier %d, but %d at ", what, threads, id, named.threads) +
                      place(named.first) + ", which has come there first");
  if (!named.arrived) named.threads = threads, named.first = site;
  named.arrived += 32;
  note_warp(f, what, site, id, named.phase);
  b->clocks->release(warp_of(f), named.clock);
  b->counters.barriers += sync && named.arrived == threads;
  if (named.arrived < threads) {
    if (!sync) return;
    named.waiting.push_back(w);
    for (i32 lane = 0; lane < 32; lane++)
      b->sm90->waits[static_cast<size_t>(w->fibers[lane]->index)].parity = static_cast<u32>(id);
    return park(f, kAtNamed, what, site);
  }
  if (sync) named.waiting.push_back(w);
  for (Warp* waiting : named.waiting) {
    b->clocks->now[warp_of(waiting->fibers[0])].join(named.clock);
    memset(waiting->state, kRunning, 32);
    note_warp(waiting->fibers[0], "named_sync", waiting->site, id, named.phase, true);
  }
  const i32 met = named.phase + 1;
  named = NamedBarrier();
  named.phase = met;
}

// All warps of a warpgroup execute the same instructions of this kind, in the same order.
void warpgroup_step(Fiber* f, const char* what, Site site, u64 x = 0, u64 y = 0) {
  Sm90& s = *f->block->sm90;
  const u32 warp = warp_of(f);
  std::vector<GroupStep>& steps = s.steps[warp / 4];
  const u32 n = s.steps_done[warp]++;
  if (n == steps.size()) {
    steps.push_back({what, site, x, y});
    return;
  }
  const GroupStep& other = steps[n];
  if (other.what == what && same(other.site, site) && other.a == x && other.b == y) return;
  f->what = what, f->site = site;
  fail(f->block, format("divergence: the warps of warpgroup %u part: its instruction %u is %s (%s) in one, %s (%s) in "
                        "warp %u",
                        warp / 4, n, other.what, place(other.site).c_str(), what, place(site).c_str(), warp) +
                     (other.what == what && same(other.site, site) ? ", with other operands" : ""));
}

bool take_registers(Block* b, u32 warp, i32 count) {
  Sm90& s = *b->sm90;
  i32& free = s.free_registers[b->warp[warp].fibers[0]->rank];
  if (free < count - s.registers[warp]) return false;
  free -= count - s.registers[warp];
  s.registers[warp] = count;
  return true;
}

// ---- wgmma ----

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

// ---- The end of a block ----

std::string waits_for(Block* b, const Fiber* f) {
  const State state = static_cast<State>(f->warp->state[f->lane]);
  const Waiting& waiting = b->sm90->waits[static_cast<size_t>(f->index)];
  const std::string at = place(f->site);
  if (state == kAtMbarrier)
    return "wait at mbarrier_wait, " + at + format(", with parity %u for ", waiting.parity) +
           name_of(b, waiting.mbarrier) + ", " + missing_of(waiting.mbarrier);
  if (state == kAtNamed) {
    const NamedBarrier& named = b->sm90->named[16 * f->rank + static_cast<i32>(waiting.parity)];
    return "wait at named_sync, " + at +
           format(", for barrier %u: %d of %d threads have come", waiting.parity, named.arrived, named.threads);
  }
  return "wait at register_alloc, " + at + format(" (%d registers a thread are free)", b->sm90->free_registers[f->rank]);
}

// The last thread of a cluster's block ends.
void end_of_block(Block* b, Fiber* f) {
  Clock all;
  const i32 warps = b->launch->threads / 32;
  for (i32 w = f->rank * warps; w < (f->rank + 1) * warps; w++) all.join(b->clocks->now[w]);
  for (const auto& [tag, trace] : b->sm90->arrivals[f->rank])
    if (!ordered(all, tag))
      fail(b, format("protocol: block %d of the cluster ends, and nothing orders before that the mbarrier_arrive_at of ",
                     f->rank) +
                  who(trace & 1023) + " at " + place(b, trace) + ", which needs it: cluster_sync before the end");
}

void end_sm90(Block* b) {
  Sm90& s = *b->sm90;
  for (const Mbarrier* m : s.mbarriers) {
    if (!m->loads.empty()) {
      const Trace trace = m->loads[m->landed].trace;
      fail(b, "protocol: the block ends while the tma_load of " + who(trace & 1023) + " at " + place(b, trace) +
                  " is in flight, on " + name_of(b, m) + ": wait for it");
    }
    if (m->bytes)
      fail(b, "protocol: the block ends, but for " + name_of(b, m) + ", " + missing_of(m) +
                  ": bytes expected and bytes copied differ");
  }
  for (size_t i = 0; i < s.bulk.size(); i++)
    if (!s.bulk[i].stores.empty())
      fail(b, "protocol: the block ends while the tma_store of " + who(static_cast<u32>(i)) + " at " +
                  place(s.bulk[i].stores[0].site) +
                  " may still read shared memory: bulk_commit, then bulk_wait_read<0>");
  for (i32 w = 0; w < b->warps; w++) {
    const WarpProducts& products = s.products[w];
    if (!products.accumulators.empty())
      fail(b, format("protocol: the block ends while a wgmma of warp %d is in flight: wgmma_commit, then wgmma_wait<0>",
                     w));
    if (s.steps_done[w] != s.steps[w / 4].size())
      fail(
          b,
          format("divergence: warp %d has executed %u instructions of its warpgroup %d, another warp %zu; the next is ",
                 w, s.steps_done[w], w / 4, s.steps[w / 4].size()) +
              s.steps[w / 4][s.steps_done[w]].what + ", " + place(s.steps[w / 4][s.steps_done[w]].site));
  }
}

}  // namespace

// ---- What kernels call ----

extern "C" {

void cuflash_emu_mbarrier_init(u32 address, u32 count, Site site) {
  Fiber* f = this_fiber();
  Block* b = f->block;
  Sm90& s = *b->sm90;
  step(f, site);
  const u32 offset = shared_offset(f, address, 8, "mbarrier_init", site);
  if (count < 1 || count >= 1 << 20)
    fail_protocol(f, site, format("mbarrier_init: %u arrivals, of 1 to 1048575", count));
  if (s.mbarrier_at[offset / 8])
    fail_protocol(f, site, "mbarrier_init: there is " + name_of(b, s.mbarriers[s.mbarrier_at[offset / 8] - 1u]));
  if (s.mbarriers.size() == kMaxMbarriers)
    fail_protocol(f, site, format("mbarrier_init: the emulator keeps %u mbarriers a block", kMaxMbarriers));
  clocked_check_write(f, offset, 8, Use::kWrite, "mbarrier_init", site);
  Mbarrier* m = new Mbarrier();
  m->offset = offset;
  m->agent = 32 + static_cast<u32>(s.mbarriers.size());
  m->count = m->pending = static_cast<i32>(count);
  m->made = trace_of(b, site) | static_cast<u32>(f->index);
  m->made_tag = clocked_tag(f);
  s.mbarriers.push_back(m);
  s.mbarrier_at[offset / 8] = static_cast<u8>(s.mbarriers.size());
  note_lane(f, "mbarrier_init", site, static_cast<i32>(offset), 0);
  clocked_write(b, offset, 8, kMbarrierObject, m->made);
}

void cuflash_emu_fence_mbarrier_init(Site site) {
  Fiber* f = this_fiber();
  step(f, site);
  for (Mbarrier* m : f->block->sm90->mbarriers)
    if ((m->made & 1023) == static_cast<u32>(f->index)) m->visible = true;
}

void cuflash_emu_mbarrier_arrive(u32 address, Site site) { arrive(this_fiber(), address, 0, "mbarrier_arrive", site); }

void cuflash_emu_mbarrier_arrive_at(u32 address, i32 rank, Site site) {
  Fiber* f = this_fiber();
  if (rank < 0) fail_protocol(f, site, format("mbarrier_arrive_at: %d is no block of the cluster", rank));
  arrive(f, address, 0, "mbarrier_arrive_at", site, rank);
}

void cuflash_emu_mbarrier_arrive_expect_tx(u32 address, u32 bytes, Site site) {
  arrive(this_fiber(), address, bytes, "mbarrier_arrive_expect_tx", site);
}

void cuflash_emu_mbarrier_wait(u32 address, u32 parity, Site site) {
  Fiber* f = this_fiber();
  Block* b = f->block;
  Mbarrier* m = find_mbarrier(f, address, "mbarrier_wait", site);
  if (UNLIKELY(parity > 1)) fail_protocol(f, site, format("mbarrier_wait: the parity %u is neither 0 nor 1", parity));
  // The phase that must be complete; -1: the one before the first, which always is.
  const i32 phase = static_cast<i32>(m->completed) - ((m->completed & 1) == parity ? 0 : 1);
  note_lane(f, "mbarrier_wait", site, static_cast<i32>(m->offset), phase);
  if ((m->completed & 1) == parity) try_complete(f, m, true, site);
  if ((m->completed & 1) == parity) {
    b->sm90->waits[static_cast<size_t>(f->index)] = {m, parity};
    f->what = "mbarrier_wait", f->site = site;
    m->waiting.push_back(f);
    f->warp->state[f->lane] = kAtMbarrier;
    leave(f);
    m->woken--;
  }
  note_lane(f, "mbarrier_wait", site, static_cast<i32>(m->offset), phase, true);
  b->clocks->now[warp_of(f)].join(m->done);
}

void cuflash_emu_fence_proxy_async(Site site) {
  Fiber* f = this_fiber();
  Clocks& clocks = *f->block->clocks;
  step(f, site);
  u32& epoch = clocks.now[warp_of(f)].at[warp_of(f)];
  clocks.fences[f->index].push_back(epoch++);
  cuflash_emu_fence_mbarrier_init(site);
}

void cuflash_emu_named_sync(i32 id, i32 threads, Site site) {
  named_barrier(this_fiber(), id, threads, true, "named_sync", site);
}

void cuflash_emu_named_arrive(i32 id, i32 threads, Site site) {
  named_barrier(this_fiber(), id, threads, false, "named_arrive", site);
}

bool cuflash_emu_elect_one(Site site) {
  Fiber* f = this_fiber();
  meet(f, "elect_one", site);
  return f->lane == (f->block->sm90 ? f->block->sm90->elected[warp_of(f)] : 0u);
}

void cuflash_emu_set_registers(i32 count, bool more, Site site) {
  Fiber* f = this_fiber();
  Block* b = f->block;
  Sm90& s = *b->sm90;
  const char* what = more ? "register_alloc" : "register_dealloc";
  if (!meet(f, what, site)) return;
  const u32 warp = warp_of(f);
  note_warp(f, what, site);
  warpgroup_step(f, what, site, static_cast<u64>(count));
  if (more ? count < s.registers[warp] : count > s.registers[warp])
    fail_protocol(f, site, format("%s<%d>: the warp has %d registers a thread", what, count, s.registers[warp]));
  if (!take_registers(b, warp, count)) {
    s.wants_registers.push_back({f->warp, count});
    return park(f, kAtRegisters, what, site);
  }
  auto& wants = s.wants_registers;
  for (size_t i = 0; i < wants.size();) {
    if (!take_registers(b, warp_of(wants[i].first->fibers[0]), wants[i].second)) {
      i++;
      continue;
    }
    memset(wants[i].first->state, kRunning, 32);
    wants.erase(wants.begin() + static_cast<std::ptrdiff_t>(i));
  }
}

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
