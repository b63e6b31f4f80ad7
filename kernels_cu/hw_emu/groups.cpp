// Part of runtime.cpp: a warp comes to a named barrier, or to an instruction of its warpgroup: these take registers.

namespace {

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

}  // namespace

// ---- What kernels call ----

extern "C" {

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

}  // extern "C"
