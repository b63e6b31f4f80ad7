// Part of runtime.cpp: what a thread waits for, and what may not be left at the end of a block.

namespace {

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
