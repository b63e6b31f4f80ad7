// Part of runtime.cpp: who did what where, and how a fault leaves the block; steps, after which it may have to.

namespace {

std::string format(const char* text, ...) __attribute__((format(printf, 1, 2)));
std::string format(const char* text, ...) {
  va_list arguments, again;
  va_start(arguments, text);
  va_copy(again, arguments);
  const int length = vsnprintf(nullptr, 0, text, arguments);
  va_end(arguments);
  std::string out(static_cast<size_t>(length) + 1, '\0');
  vsnprintf(out.data(), out.size(), text, again);
  va_end(again);
  out.pop_back();
  return out;
}

[[noreturn]] NEVER_INLINE void fail(Block* b, std::string text) {
  b->error = std::move(text);
  longjmp(b->escape, 1);
}

std::string place(Site site) { return site.file ? format("%s:%d", site.file, site.line) : "the beginning"; }

std::string place(Block* b, Trace trace) {
  const u32 file = trace >> 24;
  const char* name = file < b->files->names.size() ? b->files->names[file] : "?";
  return format("%s:%u", name, trace >> 10 & 0x3fff);
}

std::string who(u32 thread) {
  const u32 threads = static_cast<u32>(this_block->launch->threads), own = thread % threads;
  const std::string text = format("thread %u (warp %u, lane %u)", own, own / 32, own % 32);
  return this_block->launch->cluster > 1 ? text + format(" of the cluster's block %u", thread / threads) : text;
}
std::string who(const Fiber* f) { return who(static_cast<u32>(f->index)); }

NEVER_INLINE u32 new_file(Block* b, const char* file) {
  b->recent_file = file;
  return b->recent_file_bits = b->files->index(file) << 24;
}

// Without the thread.
ALWAYS_INLINE Trace trace_of(Block* b, Site site) {
  const u32 file = LIKELY(site.file == b->recent_file) ? b->recent_file_bits : new_file(b, site.file);
  return file | static_cast<u32>(site.line < 0x3fff ? site.line : 0x3fff) << 10;
}

// "0-31, 40": sorted numbers.
std::string ranges(const std::vector<i32>& numbers) {
  std::string out;
  for (size_t i = 0; i < numbers.size();) {
    size_t j = i;
    while (j + 1 < numbers.size() && numbers[j + 1] == numbers[j] + 1) j++;
    if (!out.empty()) out += ", ";
    out += i == j ? format("%d", numbers[i]) : format("%d-%d", numbers[i], numbers[j]);
    i = j + 1;
  }
  return out;
}

// Where the warp's lanes that run have met last.
Site last_seen(const Warp* w) { return w->arrived ? w->before : w->site; }

// What a thread waits for that stands at an mbarrier, a named barrier or register_alloc.
std::string waits_for(Block* b, const Fiber* f);

// Every thread's position, threads at the same one on one line.
std::string positions(Block* b) {
  std::vector<std::pair<std::string, std::vector<i32>>> groups;
  for (i32 w = 0; w < b->warps; w++)
    for (i32 lane = 0; lane < 32; lane++) {
      const Warp& warp = b->warp[w];
      const Fiber* f = warp.fibers[lane];
      const u8 state = warp.state[lane];
      std::string text = state == kExited     ? "have exited"
                         : state == kAtBarrier    ? "wait at sync_threads, " + place(f->site)
                         : state == kAtCluster    ? "wait at cluster_sync, " + place(f->site)
                         : state == kAtCollective ? format("wait at %s, ", warp.what) + place(warp.site)
                         : state == kParted       ? format("came to %s, ", f->what) + place(f->site)
                         : state >= kAtMbarrier   ? waits_for(b, f)
                                                  : "can run, last seen at " + place(last_seen(&warp));
      auto group = std::find_if(groups.begin(), groups.end(), [&](auto& g) { return g.first == text; });
      if (group == groups.end()) group = groups.insert(groups.end(), {text, {}});
      group->second.push_back(f->index);
    }
  std::string out;
  for (auto& [text, threads] : groups) out += "\n  threads " + ranges(threads) + " " + text;
  return out;
}

// No thread of the block can run, and not all have exited.
[[noreturn]] NEVER_INLINE void fail_stuck(Block* b) {
  for (i32 w = 0; w < b->warps; w++) {
    Warp& warp = b->warp[w];
    if (!warp.arrived) continue;
    std::vector<i32> exited, barred;
    for (i32 lane = 0; lane < 32; lane++) {
      if (warp.state[lane] == kExited) exited.push_back(lane);
      if (warp.state[lane] == kAtBarrier || warp.state[lane] == kAtCluster) barred.push_back(lane);
    }
    if (exited.empty() && barred.empty()) continue;
    const std::string head = format("%s at %s needs all 32 lanes of warp %d", warp.what, place(warp.site).c_str(), w);
    if (barred.empty())
      fail(b, "collective: " + head + ", but lanes " + ranges(exited) + " have exited" + positions(b));
    fail(b, "deadlock: " + head + ", but lanes " + ranges(barred) + " wait at sync_threads, " +
                place(warp.fibers[barred[0]]->site) + positions(b));
  }
  fail(b, "deadlock: no thread of the block can run" + positions(b));
}

constexpr u64 kStepsBetweenLooks = 1 << 18;  // milliseconds

void allow_steps(Block* b, u64 limit) {
  b->steps_left = std::min(limit, kStepsBetweenLooks);
  b->steps_beyond = limit - b->steps_left;
}

u64 steps_taken(const Block* b) { return b->launch->step_limit - b->steps_left - b->steps_beyond; }

// The steps that were allowed are taken: goes on with further ones, unless the launch is to stop or none are left.
NEVER_INLINE void look_around(Fiber* f, Site site) {
  Block* b = f->block;
  if (b->launch->control->stop) fail(b, "stopped");
  if (b->steps_beyond == 0) {
    f->site = site;
    fail(b, format("runaway: the block took more than %llu steps; ", b->launch->step_limit) + who(f) + " is at " +
                place(site) + positions(b));
  }
  allow_steps(b, b->steps_beyond);
}

ALWAYS_INLINE void step(Fiber* f, Site site) {
  if (UNLIKELY(--f->block->steps_left == 0)) look_around(f, site);
}

}  // namespace
