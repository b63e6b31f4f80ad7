// Part of runtime.cpp: a block runs, from its first thread to its last.

namespace {

void forget_intervals(Block* b) {
  const u32 chunks = (b->used + 15) / 16;
  for (u32 i = 0; i < chunks; i++)
    for (i32 j = 0; j < 8; j++) {
      int16_t& write = b->shadow[i].write[j];
      if (write != 0 && write != kInFlight) write = kPast;
      b->shadow[i].read[j] = 0;
    }
  b->interval = kFirstInterval;
}

void next_interval(Block* b) {
  if (++b->interval > kLastInterval) forget_intervals(b);
  b->interval_tag = static_cast<int16_t>(b->interval << 6);
}

// A fresh order of the lanes of each warp.
void shuffle_lanes(Block* b) {
  for (i32 w = 0; w < b->warps; w++) {
    u8 order[32];
    for (u32 i = 0; i < 32; i++) order[i] = static_cast<u8>(i);
    for (u32 i = 31; i > 0; i--) std::swap(order[i], order[b->random.below(i + 1)]);
    for (u32 i = 0; i < 32; i++) b->warp[w].next[order[i]] = order[(i + 1) % 32];
  }
}

// Runs each warp until all its threads wait. False: none could run.
bool run_warps(Block* b) {
  bool ran = false;
  shuffle_lanes(b);
  u8 order[32];
  for (i32 i = 0; i < b->warps; i++) order[i] = static_cast<u8>(i);
  for (u32 i = static_cast<u32>(b->warps) - 1; i > 0; i--) std::swap(order[i], order[b->random.below(i + 1)]);
  for (i32 i = 0; i < b->warps; i++) {
    Warp& warp = b->warp[order[i]];
    u32 lane = b->random.below(32), tried = 0;
    while (tried < 32 && warp.state[lane] != kRunning) lane = warp.next[lane], tried++;
    if (tried < 32) switch_from_scheduler(b, warp.fibers[lane]), ran = true;
    warp_met(&warp);
  }
  return ran;
}

void come_to(Fiber* f, Meeting& meeting, State state, const char* what, Site site) {
  Block* b = f->block;
  Warp* w = f->warp;
  f->site = site;
  if (LIKELY(w->arrived == 0)) w->site = site;
  step(f, site);
  w->state[f->lane] = state;
  note_lane(f, what, site, 0, meeting.met);
  if (meeting.come++ == 0) {
    meeting.first = f;
    meeting.site = site;
  } else if (UNLIKELY(!same(meeting.site, site))) {
    const std::string is = format(" at %s (", what);
    fail(b, "divergence: threads of the block meet at different barriers: " + who(meeting.first) + " is" + is +
                place(meeting.site) + "), " + who(f) + is + place(site) + ")" + positions(b));
  }
  leave(f);
}

// The block begins, all threads of warps [first, end) meet, and all have exited.
void begin_sm90(Arena* arena);
void meet_sm90(Block* b, i32 first, i32 end);
void end_sm90(Block* b);

// Lets those go who wait at a meeting that everybody has come to: all threads of warps [first, end). False: not all have.
bool open_meeting(Block* b, Meeting& meeting, i32 alive, State state, const char* what, i32 first, i32 end) {
  if (alive == 0 || meeting.come != alive) return false;
  meeting.come = 0;
  b->counters.barriers++;
  for (i32 w = first; w < end; w++)
    for (i32 lane = 0; lane < 32; lane++) {
      if (b->warp[w].state[lane] != state) continue;
      b->warp[w].state[lane] = kRunning;
      note_lane(b->warp[w].fibers[lane], what, meeting.site, 0, meeting.met, true);
    }
  meeting.met++;
  if (b->clocks)
    meet_sm90(b, first, end);
  else
    next_interval(b);
  return true;
}

// Runs one block, or cluster; its report is in block.error, empty if there is nothing to report.
void run_block(Arena* arena, u64 linear) {
  Block* b = &arena->block;
  const CuflashEmuLaunch& launch = *b->launch;
  const u64 gx = static_cast<u64>(launch.grid[0]), gy = static_cast<u64>(launch.grid[1]);
  linear *= static_cast<u64>(launch.cluster);
  b->index[0] = static_cast<i32>(linear % gx);
  b->index[1] = static_cast<i32>(linear / gx % gy);
  b->index[2] = static_cast<i32>(linear / gx / gy);
  b->random.state = mix(launch.seed ^ mix(linear + 1));
  b->error.clear();
  b->used = 0;
  b->interval = kFirstInterval;
  b->interval_tag = static_cast<int16_t>(kFirstInterval << 6);
  const i32 threads = launch.threads * launch.cluster;
  b->warps = threads / 32;
  b->alive = threads;
  for (i32 rank = 0; rank < launch.cluster; rank++) b->alive_of[rank] = launch.threads, b->at_barrier[rank] = Meeting();
  b->at_cluster = Meeting();
  allow_steps(b, launch.step_limit);
  b->recent_buffer = nullptr;
  b->fault_signal = 0;

  for (i32 i = 0; i < threads; i++) {
    Fiber* f = arena->fiber(i);
    Warp* w = &b->warp[i / 32];
    f->index = i;
    f->rank = i / launch.threads;
    f->first = f->rank * launch.threads;
    f->shared = emu::kSharedBase + static_cast<u32>(f->rank) * emu::kClusterStride;
    f->base = static_cast<u32>(f->rank) * shared_stride(launch);
    memcpy(f->block_idx, b->index, sizeof(f->block_idx));
    f->block_idx[0] += f->rank;
    memcpy(f->grid_dim, launch.grid, sizeof(f->grid_dim));
    f->warp = w;
    f->block = b;
    f->lane = static_cast<u32>(i % 32);
    f->site = {nullptr, 0};
    f->copies.items.clear();
    f->copies.head = 0;
    f->copies.group = 0;
    w->fibers[i % 32] = f;
    w->state[i % 32] = kRunning;
    w->arrived = 0;
    w->site = w->before = {nullptr, 0};
    w->ballot = 0;
    w->accesses.clear();
    prepare(f, arena->stack_low(i), arena->stack_top(i));
  }
  if (launch.event_limit) {
    if (!arena->events) arena->events = new Events();
    arena->events->clear();
  }
  b->events = arena->events;
  if (launch.clocked) {
    begin_sm90(arena);
  } else {
    b->clocks = nullptr;
    b->sm90 = nullptr;
  }

  this_block = b;
  if (_setjmp(b->escape) == 0) {
    for (;;) {
      bool ran = run_warps(b);  // a warp may have let another run
      if (b->alive == 0) break;
      const i32 warps = launch.threads / 32;
      for (i32 rank = 0; rank < launch.cluster; rank++)
        ran |= open_meeting(b, b->at_barrier[rank], b->alive_of[rank], kAtBarrier, "sync_threads", rank * warps,
                            (rank + 1) * warps);
      ran |= open_meeting(b, b->at_cluster, b->alive, kAtCluster, "cluster_sync", 0, b->warps);
      if (!ran) fail_stuck(b);
    }
    if (b->clocks) end_sm90(b);
  } else if (b->fault_signal) {
    Fiber* f = b->fault_fiber;
    const u64 within = reinterpret_cast<u64>(b->fault_address) & (emu::kStackBytes - 1);
    const u64 apart = reinterpret_cast<u64>(f) ^ reinterpret_cast<u64>(b->fault_address);
    const bool overflow = f && apart < emu::kStackBytes && within >= kGuardBegin && within < kGuardEnd;
    b->error = overflow ? "fault: stack overflow"
               : b->fault_signal == SIGFPE
                   ? "fault: integer division by zero"
                   : format("fault: the address %p was used outside of hw::", b->fault_address);
    if (f) b->error += " by " + who(f) + ", last seen at " + place(last_seen(f->warp));
  }
  this_block = nullptr;
  // Back to what the next block expects. Reads touch no more than writes have.
  memset(b->memory, 0xff, b->used);
  memset(static_cast<void*>(b->shadow), 0, (b->used + 15) / 16 * sizeof(Chunk));
}

}  // namespace
