// Part of runtime.cpp: mbarriers.

namespace {

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

}  // extern "C"
