// Part of runtime.cpp: lanes take turns, and meet at collectives.

namespace {

// Lets another lane of the warp run, or, where none can, another warp.
ALWAYS_INLINE void leave(Fiber* f) {
  Warp* w = f->warp;
  u32 lane = w->next[f->lane];
  while (UNLIKELY(w->state[lane] != kRunning)) {
    if (lane == f->lane) return switch_to_scheduler(f);
    lane = w->next[lane];
  }
  switch_fiber(f, w->fibers[lane]);
}

[[noreturn]] NEVER_INLINE void fail_diverged(Fiber* f, const char* what, Site site) {
  Warp* w = f->warp;
  f->what = what, f->site = site;
  w->state[f->lane] = kParted;
  fail(f->block, format("divergence: lanes of warp %d meet at different instructions: lane %u is at %s (%s), "
                        "lane %u at %s (%s)",
                        f->index / 32, w->first, w->what, place(w->site).c_str(), f->lane, what, place(site).c_str()) +
                     positions(f->block));
}

ALWAYS_INLINE bool same(Site x, Site y) {
  return x.line == y.line && (x.file == y.file || !strcmp(x.file, y.file));
}

// A lane comes to a collective. True for the last of the 32: it does the work of all and runs on; the others return
// false, later, when the work is done.
ALWAYS_INLINE bool meet(Fiber* f, const char* what, Site site) {
  Warp* w = f->warp;
  if (w->arrived == 0) {
    w->before = w->site;
    w->what = what, w->site = site, w->first = f->lane;
  } else if (UNLIKELY(w->what != what || !same(w->site, site))) {
    fail_diverged(f, what, site);
  }
  if (++w->arrived == 32) {
    w->arrived = 0;
    memset(w->state, kRunning, 32);
    step(f, site);
    warp_met(w);
    return true;
  }
  w->state[f->lane] = kAtCollective;
  leave(f);
  return false;
}

void end_of_block(Block* b, Fiber* f);

void thread_end(Fiber* f) {
  Block* b = f->block;
  f->warp->state[f->lane] = kExited;
  b->alive--;
  if (--b->alive_of[f->rank] == 0 && b->launch->cluster > 1 && b->sm90) end_of_block(b, f);
  leave(f);
  abort();  // nobody resumes a thread that has exited
}

#ifndef CUFLASH_EMU_UCONTEXT
}  // namespace
extern "C" void cuflash_emu_thread_main() {
#else
void cuflash_emu_thread_main() {
#endif
  Fiber* f = this_fiber();
  f->block->launch->entry(f->block->launch->params);
  note_lane(f, "exit", {"", 0});
  thread_end(f);
}
#ifndef CUFLASH_EMU_UCONTEXT
namespace {
#endif

}  // namespace
