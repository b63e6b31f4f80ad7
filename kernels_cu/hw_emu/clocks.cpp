// Part of runtime.cpp: who may touch shared memory in a kernel whose warps go at their own pace, meeting at mbarriers
// and named barriers. (Where warps meet at block barriers only, the intervals of runtime.cpp say the same, faster.)
//
// An agent is a warp, or the asynchronous copies that complete on one mbarrier. Every warp has a clock: of each agent,
// the latest epoch that lies before the warp's now. To arrive at a barrier is to give it one's clock and to begin an
// epoch; a wait that returns takes over what the barrier was given. Two accesses are ordered if the clock of the later
// one's warp has reached the epoch of the earlier.
//
//   writes   in the chunk, a tag for every 2 bytes: epoch << 7 | agent
//   reads    a plane a warp: for every 2 bytes the epoch of its last read, and for every 16 bytes the last group of
//            matrix products or bulk stores that reads them, which lasts until the warp has waited for that group
//
// A write by a thread and a read or write by the asynchronous proxy (wgmma, tma) also need the writer's
// fence_proxy_async between them, before the release that orders them.

namespace {

std::string shared_place(u32 offset, u32 bytes) { return format("%u bytes at shared + %u", bytes, offset); }

constexpr u32 kAgentBits = 7;
constexpr u32 kAgents = 1 << kAgentBits;
constexpr u32 kMaxMbarriers = kAgents - 32;
constexpr u32 kCopyInFlight = 0xffffffff;  // as tags; no clock reaches them
constexpr u32 kMbarrierObject = 0xfffffffe;

struct Clock {
  u32 at[kAgents] = {};

  void join(const Clock& o) {
    for (u32 i = 0; i < kAgents; i++) at[i] = std::max(at[i], o.at[i]);
  }
};

ALWAYS_INLINE bool ordered(const Clock& now, u32 tag) { return tag >> kAgentBits <= now.at[tag & (kAgents - 1)]; }

// Reads of shared memory by wgmma or a bulk store, one commit group of one warp.
struct AsyncReads {
  u32 warp;
  Trace trace;  // of the first, with the thread
  const char* what;
  u32 waited;  // the warp's epoch when it had waited for the group; 0: not yet
};

struct Plane {
  std::vector<u32> reads;   // for every 2 bytes, an epoch
  std::vector<u32> groups;  // for every 16 bytes, an index into Clocks::groups
};

struct Clocks {
  Clock now[32];
  Plane planes[32];
  // For every kilobyte, the warps whose planes have something there.
  static constexpr u32 kRegions = 256 * kMaxCluster;  // of 1 KB
  u32 readers[kRegions] = {}, groupers[kRegions] = {};
  std::vector<u32> landed;  // for every 16 bytes, the tag of the copy that wrote them; 0: others have since
  std::vector<AsyncReads> groups;
  // Epochs at which each thread executed fence_proxy_async. Each fence begins an epoch of its warp.
  std::vector<u32> fences[1024];

  void begin(u32 shared_bytes, i32 warps) {
    for (u32 i = 0; i < kRegions; i++) {
      for (u32 w = 0; w < 32; w++) {
        if (readers[i] >> w & 1) std::fill_n(planes[w].reads.begin() + i * 512, 512, 0);
        if (groupers[i] >> w & 1) std::fill_n(planes[w].groups.begin() + i * 64, 64, 0);
      }
      readers[i] = groupers[i] = 0;
    }
    for (auto& epochs : fences) epochs.clear();
    const size_t bytes = std::max<size_t>((shared_bytes + 1023) & ~1023u, 1024);
    for (i32 w = 0; w < warps; w++) {
      now[w] = Clock();
      now[w].at[w] = 1;
      if (planes[w].reads.size() < bytes / 2) planes[w].reads.resize(bytes / 2, 0);
      if (planes[w].groups.size() < bytes / 16) planes[w].groups.resize(bytes / 16, 0);
    }
    landed.assign(bytes / 16 + 1, 0);
    groups.assign(1, AsyncReads{});
  }

  // What the warp has done so far lies before whoever takes the clock up.
  void release(u32 warp, Clock& to) {
    to.join(now[warp]);
    now[warp].at[warp]++;
  }

  // All that a thread wrote up to `epoch` is fenced, and `reader` knows it.
  bool fenced(u32 thread, u32 epoch, const Clock& reader) const {
    const std::vector<u32>& epochs = fences[thread];
    const auto at = std::lower_bound(epochs.begin(), epochs.end(), epoch);
    return at != epochs.end() && *at <= reader.at[thread / 32];
  }
};

enum class Use { kRead, kWrite, kAsyncRead, kAsyncWrite };

// Why an access is wrong that the checks below refuse; they have decided that it is.
[[noreturn]] NEVER_INLINE void fail_clocked(Fiber* f, u32 offset, u32 bytes, Use use, const char* what, Site site) {
  Block* b = f->block;
  const Clocks& clocks = *b->clocks;
  f->site = site;
  const u32 warp = static_cast<u32>(f->index) / 32;
  const Clock& now = clocks.now[warp];
  const bool write = use == Use::kWrite || use == Use::kAsyncWrite, async = use >= Use::kAsyncRead;
  const std::string me = format("%s of ", what) + shared_place(offset, bytes) + " by " + who(f) + " at " + place(site);
  const char* unordered = "; no barrier orders them";
  for (u32 at = offset / 2; at < (offset + bytes + 1) / 2; at++) {
    const Chunk& chunk = b->shadow[at / 8];
    const u32 tag = chunk.tag[at % 8];
    const Trace writer = chunk.writer[at % 8 / 2];
    const u32 agent = tag & (kAgents - 1);
    const std::string byte = format("byte %u of shared memory", at * 2);
    if (tag == kCopyInFlight)
      fail(b,
           "race: " + me + "\n  meets an asynchronous copy to " + byte + " that is still in flight, issued by " +
               who(writer & 1023) + " at " + place(b, writer) +
               "\n  Wait for it first: for the phase of its mbarrier (mbarrier_wait), or its group (cp_async_wait).");
    if (tag == kMbarrierObject)
      fail(b, "race: " + me + "\n  meets an mbarrier at " + byte + ", made by " + who(writer & 1023) + " at " +
                  place(b, writer) + ": only mbarrier functions may touch it");
    if (!ordered(now, tag) && agent >= 32)
      fail(b, "race: " + me + "\n  and the asynchronous copy to " + byte + " that " + who(writer & 1023) +
                  " issued at " + place(b, writer) + format("; warp %u has not waited for its mbarrier's phase", warp));
    if (!ordered(now, tag))
      fail(b, "race: " + me + "\n  and the write of " + byte + " by " +
                  ((writer & 1023) / 32 == agent ? who(writer & 1023) + " at " + place(b, writer)
                                                 : format("warp %u", agent)) +
                  unordered);
    if (async && tag && agent < 32 && !clocks.fenced(writer & 1023, tag >> kAgentBits, now))
      fail(b,
           "proxy: " + me + "\n  goes through the asynchronous proxy, the write of " + byte + " by " +
               who(writer & 1023) + " at " + place(b, writer) +
               " did not.\n  The writing thread must call fence_proxy_async, and then the barrier that orders them.");
    if (!write && tag == 0)
      fail(b, "uninitialised: " + me + ", but nobody has written " + byte +
                  " in this block; who writes it later must be waited for at a barrier");
    for (i32 u = 0; write && u < b->warps; u++) {
      const Plane& plane = clocks.planes[u];
      const u32 read = plane.reads[at], group = plane.groups[at / 8];
      const Trace reader = chunk.reader[at % 8 / 2];
      if (static_cast<u32>(u) != warp && read > now.at[u])
        fail(b, "race: " + me + "\n  and the read of " + byte + " by " +
                    ((reader & 1023) / 32 == static_cast<u32>(u) ? who(reader & 1023) + " at " + place(b, reader)
                                                                 : format("warp %d", u)) +
                    unordered);
      const AsyncReads& reads = clocks.groups[group];
      if (group && (reads.waited == 0 || reads.waited > now.at[u]))
        fail(b, "race: " + me + "\n  and the read of " + byte +
                    format(" by the %s of warp %d, issued at ", reads.what, u) + place(b, reads.trace) +
                    (reads.waited == 0 ? ", which that warp has not waited for" : std::string(unordered)));
    }
  }
  fail(b, "race: " + me);
}

ALWAYS_INLINE u32 clocked_tag(const Fiber* f) {
  const u32 warp = static_cast<u32>(f->index) >> 5;
  return f->block->clocks->now[warp].at[warp] << kAgentBits | warp;
}

NEVER_INLINE void clocked_read(Fiber* f, u32 offset, u32 bytes, Trace trace, const char* what, Site site) {
  Block* b = f->block;
  Clocks& clocks = *b->clocks;
  const u32 warp = static_cast<u32>(f->index) >> 5;
  const Clock& now = clocks.now[warp];
  Plane& plane = clocks.planes[warp];
  u32 good = 0;
  for (u32 at = offset / 2; at < (offset + bytes) / 2; at++) {
    const u32 tag = b->shadow[at / 8].tag[at % 8];
    if (tag == good && tag != 0) continue;
    if (UNLIKELY(tag == 0 || !ordered(now, tag))) fail_clocked(f, offset, bytes, Use::kRead, what, site);
    good = tag;
  }
  for (u32 at = offset / 2; at < (offset + bytes) / 2; at++) {
    plane.reads[at] = now.at[warp];
    b->shadow[at / 8].reader[at % 8 / 2] = trace;
  }
  clocks.readers[offset >> 10] |= 1u << warp;
}

// For a write by a thread (kWrite) or by a copy it issues (kAsyncWrite).
NEVER_INLINE void clocked_check_write(Fiber* f, u32 offset, u32 bytes, Use use, const char* what, Site site) {
  Block* b = f->block;
  Clocks& clocks = *b->clocks;
  const u32 warp = static_cast<u32>(f->index) >> 5;
  const Clock& now = clocks.now[warp];
  u32 good = 0;
  Trace good_writer = 0;
  for (u32 at = offset / 2; at < (offset + bytes) / 2; at++) {
    if (at % 8 == 0 && good && clocks.landed[at / 8] == good) {
      at += 7;  // 16 bytes of the same copy
      continue;
    }
    const Chunk& chunk = b->shadow[at / 8];
    const u32 tag = chunk.tag[at % 8];
    const Trace writer = chunk.writer[at % 8 / 2];
    if (tag == 0 || (tag == good && writer == good_writer)) continue;
    if (UNLIKELY(!ordered(now, tag) || (use == Use::kAsyncWrite && (tag & (kAgents - 1)) < 32 &&
                                        !clocks.fenced(writer & 1023, tag >> kAgentBits, now))))
      fail_clocked(f, offset, bytes, use, what, site);
    good = tag, good_writer = writer;
  }
  for (u32 begin = offset; begin < offset + bytes; begin = (begin | 1023) + 1) {  // a kilobyte at a time
    const u32 end = std::min((begin | 1023) + 1, offset + bytes);
    for (u32 others = clocks.readers[begin >> 10] & ~(1u << warp); others; others &= others - 1) {
      const u32 u = static_cast<u32>(__builtin_ctz(others));
      for (u32 at = begin / 2; at < end / 2; at++)
        if (UNLIKELY(clocks.planes[u].reads[at] > now.at[u])) fail_clocked(f, offset, bytes, use, what, site);
    }
    for (u32 others = clocks.groupers[begin >> 10]; others; others &= others - 1) {
      const u32 u = static_cast<u32>(__builtin_ctz(others));
      u32 done = 0;
      for (u32 at = begin / 16; at < (end + 15) / 16; at++) {
        const u32 group = clocks.planes[u].groups[at];
        if (group == done) continue;
        const AsyncReads& reads = clocks.groups[group];
        if (UNLIKELY(group && (reads.waited == 0 || reads.waited > now.at[u])))
          fail_clocked(f, offset, bytes, use, what, site);
        done = group;
      }
    }
  }
}

ALWAYS_INLINE void clocked_write(Block* b, u32 offset, u32 bytes, u32 tag, Trace trace) {
  u32 at = offset / 2;
  const u32 end = (offset + bytes) / 2;
  while (at < end) {
    Chunk& chunk = b->shadow[at / 8];
    if (at % 8 == 0 && end - at >= 8) {
      *reinterpret_cast<vu32x8*>(chunk.tag) = vu32x8{} + tag;
      *reinterpret_cast<vu32x4*>(chunk.writer) = splat32(trace);
      at += 8;
    } else {
      chunk.tag[at % 8] = tag;
      chunk.writer[at % 8 / 2] = trace;
      at++;
    }
  }
  const u32 landed = (tag & (kAgents - 1)) >= 32 && tag < kMbarrierObject ? tag : 0;
  std::fill(&b->clocks->landed[offset / 16], &b->clocks->landed[(offset + bytes + 15) / 16], landed);
  if (offset + bytes > b->used) b->used = offset + bytes;
}

// 16 bytes that wgmma or a bulk store reads for the fiber's warp, as part of `group`.
ALWAYS_INLINE void clocked_async_read(Fiber* f, u32 offset, u32 group, u32& good, const char* what, Site site) {
  Block* b = f->block;
  Clocks& clocks = *b->clocks;
  const u32 warp = static_cast<u32>(f->index) >> 5;
  const Clock& now = clocks.now[warp];
  if (UNLIKELY(good == 0 || clocks.landed[offset / 16] != good)) {
    const Chunk& chunk = b->shadow[offset / 16];
    for (u32 i = 0; i < 8; i++) {
      const u32 tag = chunk.tag[i];
      if (i && tag == chunk.tag[i - 1] && chunk.writer[i / 2] == chunk.writer[(i - 1) / 2]) continue;
      if (tag == 0 || !ordered(now, tag) ||
          ((tag & (kAgents - 1)) < 32 && !clocks.fenced(chunk.writer[i / 2] & 1023, tag >> kAgentBits, now)))
        fail_clocked(f, offset, 16, Use::kAsyncRead, what, site);
    }
    good = clocks.landed[offset / 16];  // what threads have written is looked at each time: each must have fenced
  }
  clocks.planes[warp].groups[offset / 16] = group;
  clocks.groupers[offset >> 10] |= 1u << warp;
}

// The same for `kUnits` times 16 bytes, one after the other within a kilobyte.
template <u32 kUnits>
ALWAYS_INLINE void clocked_async_read_run(Fiber* f, u32 offset, u32 group, u32& good, const char* what, Site site) {
  Clocks& clocks = *f->block->clocks;
  const u32* landed = &clocks.landed[offset / 16];
  u32 others = 0;
  for (u32 i = 0; i < kUnits; i++) others |= landed[i] ^ good;
  if (UNLIKELY(good == 0 || others != 0)) {
    for (u32 i = 0; i < kUnits; i++) clocked_async_read(f, offset + 16 * i, group, good, what, site);
    return;
  }
  const u32 warp = static_cast<u32>(f->index) >> 5;
  u32* groups = &clocks.planes[warp].groups[offset / 16];
  for (u32 i = 0; i < kUnits; i++) groups[i] = group;
  clocks.groupers[offset >> 10] |= 1u << warp;
}

}  // namespace
