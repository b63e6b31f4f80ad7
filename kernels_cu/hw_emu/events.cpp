// Part of runtime.cpp: what a launch that is traced records (cuflash.emulator.tracing). Off, it costs a branch.
//
// An event is an instruction of a warp at which warps meet, wait or hand something to the hardware. One at which a warp
// may have to wait has two: it comes there, and it goes on. What lanes do one by one is one event: the n-th of each lane
// that does the same at the same place. A warp's events stand in the order of its program: where one lane alone does
// something between what all do, and comes last, that goes in between.

namespace {

extern "C" {
struct CuflashEmuEvent {
  u64 tick;        // steps the block had taken, when the first lane did it
  u64 begin, end;  // of a copy: the addresses in global memory, of a matrix of rows from the first to behind the last
  const char* what;
  const char* file;
  i32 line;
  i32 block;   // x + grid.x * (y + grid.y * z)
  i32 warp;
  i32 lanes;
  i32 object;  // offset of an mbarrier in shared memory, number of a named barrier; -1: none
  i32 phase;   // of the mbarrier or barrier: how many were complete before; of wgmma: the group, the last one waited for
  i32 passed;  // 1: it goes on
};
}

struct EventKey {
  Trace site;
  const char* what;
  i32 object, phase, passed;
  u32 who, n;  // a thread and how often it has; a warp and the n-th

  bool operator<(const EventKey& o) const {
    return std::tie(site, what, object, phase, passed, who, n) <
           std::tie(o.site, o.what, o.object, o.phase, o.passed, o.who, o.n);
  }
};

constexpr size_t kNoEvent = ~size_t{0};

// Of a block.
struct Events {
  std::vector<CuflashEmuEvent> all;
  std::vector<size_t> next;        // of the same warp, by its program
  std::map<EventKey, u32> times;   // of a thread
  std::map<EventKey, size_t> nth;  // of a warp: an index into `all`
  size_t first[32], last[32];      // of a warp
  size_t reached[1024];            // a thread's last
  u64 dropped = 0;

  void clear() {
    all.clear(), next.clear(), times.clear(), nth.clear();
    std::fill_n(first, 32, kNoEvent), std::fill_n(last, 32, kNoEvent), std::fill_n(reached, 1024, kNoEvent);
    dropped = 0;
  }

  // A new event of a warp, behind another of it or (kNoEvent) before all.
  void append(const CuflashEmuEvent& event, size_t behind) {
    const u32 warp = static_cast<u32>(event.warp);
    const size_t me = all.size();
    all.push_back(event);
    next.push_back(behind == kNoEvent ? first[warp] : next[behind]);
    (behind == kNoEvent ? first[warp] : next[behind]) = me;
    if (last[warp] == behind) last[warp] = me;
  }

  // As they happened, each no earlier than what its warp does before it.
  std::vector<CuflashEmuEvent> ordered() const {
    std::vector<std::pair<size_t, size_t>> order;  // when, which
    for (size_t event : first)
      for (size_t when = 0; event != kNoEvent; event = next[event]) {
        when = std::max(when, event);
        order.push_back({when, event});
      }
    std::stable_sort(order.begin(), order.end(), [](auto& x, auto& y) { return x.first < y.first; });
    std::vector<CuflashEmuEvent> out;
    for (auto& [when, event] : order) {
      out.push_back(all[event]);
      out.back().tick = all[when].tick;
    }
    return out;
  }
};

struct Copied {
  u64 begin = 0, end = 0;
};

NEVER_INLINE void add_event(Fiber* f, const char* what, Site site, i32 object, i32 phase, bool passed, i32 lanes,
                            Copied copied) {
  Block* b = f->block;
  Events& events = *b->events;
  const u32 warp = static_cast<u32>(f->index) / 32;
  EventKey key = {trace_of(b, site), what, object, phase, passed, static_cast<u32>(f->index), 0};
  if (lanes == 1) {
    const u32 n = events.times[key]++;
    key.who = warp, key.n = n;
    const auto found = events.nth.find(key);
    if (found != events.nth.end()) {
      CuflashEmuEvent& event = events.all[found->second];
      events.reached[f->index] = found->second;
      event.lanes++;
      event.begin = std::min(event.begin, copied.begin), event.end = std::max(event.end, copied.end);
      return;
    }
  }
  if (events.all.size() >= b->launch->event_limit) {
    events.dropped++;
    return;
  }
  const size_t me = events.all.size(), behind = lanes == 1 ? events.reached[f->index] : events.last[warp];
  if (lanes == 1) events.nth[key] = me;
  const u64 gx = static_cast<u64>(b->launch->grid[0]), gy = static_cast<u64>(b->launch->grid[1]);
  const u64 block = static_cast<u64>(b->index[0]) + gx * (static_cast<u64>(b->index[1]) + gy * static_cast<u64>(b->index[2]));
  events.append({steps_taken(b), copied.begin, copied.end, what, site.file, site.line,
                 static_cast<i32>(block), static_cast<i32>(warp), lanes, object, phase, passed},
                behind);
  if (lanes == 1) events.reached[f->index] = me;
  for (u32 lane = 0; lane < 32 && lanes == 32; lane++) events.reached[warp * 32 + lane] = me;
}

// By a lane; by the whole warp, whose last lane this is.
ALWAYS_INLINE void note_lane(Fiber* f, const char* what, Site site, i32 object = -1, i32 phase = -1,
                             bool passed = false, Copied copied = {}) {
  if (UNLIKELY(f->block->launch->event_limit != 0)) add_event(f, what, site, object, phase, passed, 1, copied);
}

ALWAYS_INLINE void note_warp(Fiber* f, const char* what, Site site, i32 object = -1, i32 phase = -1,
                             bool passed = false, Copied copied = {}) {
  if (UNLIKELY(f->block->launch->event_limit != 0)) add_event(f, what, site, object, phase, passed, 32, copied);
}

}  // namespace
