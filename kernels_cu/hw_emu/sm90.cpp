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

u32 new_reads(Fiber* f, const char* what, Site site) {
  Block* b = f->block;
  const Trace trace = trace_of(b, site) | static_cast<u32>(f->index);
  b->clocks->groups.push_back({warp_of(f), trace, what, 0});
  return static_cast<u32>(b->clocks->groups.size() - 1);
}

}  // namespace
