// Part of runtime.cpp: a launch: its blocks, in an order drawn from the seed, spread over OS threads.

namespace {

struct Run {
  const CuflashEmuLaunch* launch;
  Files files;
  u64 blocks, stride, start;
  std::atomic<u64> next{0};
  std::atomic<u64> failed{~0ull};  // the earliest place in the order at which a block failed
  std::mutex mutex;
  std::string report;
  Counters counters;
  std::vector<CuflashEmuEvent> events;
  u64 dropped = 0;

  void worker() {
    Arena* arena = take_arena();
    Block* b = &arena->block;
    b->launch = launch;
    b->files = &files;
    b->recent_file = nullptr;
    b->counters = Counters();
    b->counters.read.assign(static_cast<size_t>(launch->buffer_count), 0);
    b->counters.written = b->counters.read;
    if (!arena->reserve(launch->threads * launch->cluster, shared_stride(*launch) * static_cast<u32>(launch->cluster))) {
      std::lock_guard<std::mutex> lock(mutex);
      report = "fault: the machine has no memory for the block's stacks";
      failed = 0;
    } else {
      SignalStack signal_stack(arena);
      b->memory = arena->shared;
      b->shadow = arena->shadow;
      for (;;) {
        const u64 place = next++;
        if (place >= blocks || place > failed || launch->control->stop) break;
        run_block(arena, (place * stride + start) % blocks);
        launch->control->done++;
        if (launch->event_limit) {
          const std::vector<CuflashEmuEvent> ordered = b->events->ordered();
          std::lock_guard<std::mutex> lock(mutex);
          events.insert(events.end(), ordered.begin(), ordered.end());
          dropped += b->events->dropped;
        }
        if (b->error.empty()) continue;
        std::lock_guard<std::mutex> lock(mutex);
        if (place < failed) {
          failed = place;
          report = b->error + format("\n  in block (%d, %d, %d)", b->index[0], b->index[1], b->index[2]);
        }
      }
      std::lock_guard<std::mutex> lock(mutex);
      counters.add(b->counters);
    }
    give_arena(arena);
  }
};

u64 gcd(u64 a, u64 b) { return b ? gcd(b, a % b) : a; }

std::string counters_text(Run& run) {
  Counters& c = run.counters;
  std::string out;
  const auto line = [&](const char* group, const std::string& name, u64 n) {
    out += format("%s\t%s\t%llu\n", group, name.c_str(), n);
  };
  const auto site = [&](Trace trace) {
    return format("%s:%u", run.files.names[trace >> 24], trace >> 10 & 0x3fff);
  };
  line("moves", "ldmatrix_x4", c.ldmatrix);
  line("moves", "stmatrix_x4", c.stmatrix);
  line("matrix", "mma_m16n8k16_f16", c.mma_f16);
  line("matrix", "mma_m16n8k16_bf16", c.mma_bf16);
  line("matrix", "mma_m16n8k8_tf32", c.mma_tf32);
  line("total", "barriers", c.barriers);
  line("total", "shared_bytes", c.shared_bytes);
  line("total", "global_sectors", c.sectors);
  for (i32 i = 0; i < run.launch->buffer_count; i++) {
    line("read", run.launch->buffers[i].name, c.read[static_cast<size_t>(i)]);
    line("written", run.launch->buffers[i].name, c.written[static_cast<size_t>(i)]);
  }
  for (auto& [name, n] : c.others) line(name.first.c_str(), name.second, n);
  for (auto& [trace, n] : c.shared) {
    line("shared_passes", site(trace), n.taken);
    line("bank_conflicts", site(trace), n.beyond);
  }
  for (auto& [trace, n] : c.global) {
    line("sectors", site(trace), n.taken);
    line("uncoalesced", site(trace), n.beyond);
  }
  return out;
}

}  // namespace

// ---- What Python calls ----

extern "C" {

// Runs a launch. The texts in `result` belong to the caller (cuflash_emu_free).
void cuflash_emu_launch(const CuflashEmuLaunch* launch, CuflashEmuResult* result) {
  SignalGuard signals;
  Run run;
  run.launch = launch;
  run.counters.read.assign(static_cast<size_t>(launch->buffer_count), 0);
  run.counters.written = run.counters.read;
  run.blocks = 1;
  for (i32 blocks : launch->grid) run.blocks *= static_cast<u64>(blocks);
  run.blocks /= static_cast<u64>(launch->cluster);
  // Every block once, in an order of the seed's: steps of a stride that shares no divisor with their number.
  Random random{mix(launch->seed)};
  run.start = random.next() % run.blocks;
  do run.stride = 1 + random.next() % run.blocks % 0x7fffffff;
  while (gcd(run.stride, run.blocks) != 1);

  const u64 workers = std::min<u64>(static_cast<u64>(std::max(launch->os_threads, 1)), run.blocks);
  std::vector<std::thread> others;
  for (u64 i = 1; i < workers; i++) {
    try {
      others.emplace_back([&run] { run.worker(); });
    } catch (...) {
      break;  // the system gives no more threads: fewer do
    }
  }
  run.worker();
  for (auto& other : others) other.join();
  result->report = run.report.empty() ? nullptr : strdup(run.report.c_str());
  result->counters = launch->counting ? strdup(counters_text(run).c_str()) : nullptr;
  result->events = nullptr;
  result->event_count = run.events.size();
  result->dropped = run.dropped;
  if (!launch->event_limit) return;
  // A block's events came in one piece: only the pieces' order depends on the threads.
  std::stable_sort(run.events.begin(), run.events.end(), [](auto& x, auto& y) { return x.block < y.block; });
  const size_t bytes = run.events.size() * sizeof(CuflashEmuEvent);
  result->events = static_cast<CuflashEmuEvent*>(malloc(std::max<size_t>(bytes, 1)));
  if (bytes) memcpy(result->events, run.events.data(), bytes);
}

void cuflash_emu_free(CuflashEmuResult* result) {
  free(result->report);
  free(result->counters);
  free(result->events);
}

}  // extern "C"
