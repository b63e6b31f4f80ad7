// Part of runtime.cpp: what accesses cost: bank conflicts, sectors.

namespace {

void count_bank_conflicts(Block* b, Trace site, const u32* addresses, const u8* words, i32 count) {
  // One pass serves one word from each of 32 banks of 4 bytes; lanes that want the same word share it.
  u32 wanted[32][32];
  u32 depth[32] = {};
  u32 passes = 0;
  for (i32 i = 0; i < count; i++)
    for (u32 k = 0; k < words[i]; k++) {
      const u32 word = addresses[i] / 4 + k, bank = word % 32;
      u32 at = 0;
      while (at < depth[bank] && wanted[bank][at] != word) at++;
      if (at == depth[bank] && at < 32) wanted[bank][depth[bank]++] = word;
      passes = std::max(passes, depth[bank]);
    }
  Counters::Access& access = b->counters.shared[site];
  access.taken += passes;
  access.beyond += passes > 1 ? passes - 1 : 0;
}

// The lanes' accesses since the warp last met: the n-th of each lane at one site are one instruction of the warp.
NEVER_INLINE void count_accesses(Warp* w) {
  Block* b = w->fibers[0]->block;
  std::map<std::pair<u64, u32>, std::vector<const Access*>> instructions;
  std::map<std::pair<u64, u8>, u32> occurrences;
  for (const Access& access : w->accesses) {
    const u64 site = static_cast<u64>(access.site) << 1 | access.shared;
    instructions[{site, occurrences[{site, access.lane}]++}].push_back(&access);
  }
  for (auto& [key, lanes] : instructions) {
    std::sort(lanes.begin(), lanes.end(), [](auto* x, auto* y) { return x->lane < y->lane; });
    const u32 bytes = lanes[0]->bytes;
    if (lanes[0]->shared) {
      const u32 phase = bytes > 4 ? 128 / bytes : 32;  // lanes served together: 128 bytes
      u32 addresses[32];
      u8 words[32];
      i32 count = 0;
      for (size_t i = 0; i < lanes.size(); i++) {
        addresses[count] = static_cast<u32>(lanes[i]->address);
        words[count++] = static_cast<u8>((bytes + 3) / 4);
        if (i + 1 == lanes.size() || lanes[i + 1]->lane / phase != lanes[i]->lane / phase) {
          count_bank_conflicts(b, lanes[0]->site, addresses, words, count);
          count = 0;
        }
      }
    } else {
      std::vector<u64> sectors, atoms;  // of 32 bytes; the distinct bytes, in units of the smallest access
      u32 unit = bytes;
      for (auto* lane : lanes) unit = std::min<u32>(unit, lane->bytes);
      for (auto* lane : lanes) {
        for (u64 s = lane->address / 32; s <= (lane->address + lane->bytes - 1) / 32; s++) sectors.push_back(s);
        for (u64 a = lane->address; a < lane->address + lane->bytes; a += unit) atoms.push_back(a);
      }
      for (auto* list : {&sectors, &atoms}) {
        std::sort(list->begin(), list->end());
        list->erase(std::unique(list->begin(), list->end()), list->end());
      }
      const u64 ideal = (atoms.size() * unit + 31) / 32;
      b->counters.sectors += sectors.size();
      Counters::Access& access = b->counters.global[lanes[0]->site];
      access.taken += sectors.size();
      access.beyond += sectors.size() > ideal ? sectors.size() - ideal : 0;
    }
  }
  w->accesses.clear();
}

ALWAYS_INLINE void note_access(Fiber* f, u64 address, u32 bytes, bool shared, Trace site) {
  if (LIKELY(!f->block->launch->counting)) return;
  if (shared) f->block->counters.shared_bytes += bytes;
  f->warp->accesses.push_back({address, site, static_cast<u8>(f->lane), static_cast<u8>(bytes), shared});
}

ALWAYS_INLINE void warp_met(Warp* w) {
  if (UNLIKELY(!w->accesses.empty())) count_accesses(w);
}

// Four 8x8 matrices, a row of 16 bytes at each lane's address: one pass each.
void count_matrix_rows(Block* b, Warp* w, Site site) {
  u8 words[8];
  memset(words, 4, 8);
  b->counters.shared_bytes += 512;
  for (i32 i = 0; i < 4; i++) count_bank_conflicts(b, trace_of(b, site), w->address + 8 * i, words, 8);
}

}  // namespace
