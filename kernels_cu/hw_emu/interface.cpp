// Part of runtime.cpp: what a launch is, as Python says it (the same structs in cuflash/jit/native.py).

namespace {

extern "C" {
// What a launch and the thread that waits for it tell each other meanwhile.
struct CuflashEmuControl {
  std::atomic<i32> stop;  // not 0: the launch is to end; it looks every kStepsBetweenLooks
  std::atomic<u64> done;  // blocks that have ended
};

struct CuflashEmuBuffer {
  u64 begin;
  u64 bytes;
  const char* name;
  i32 writable;
};

struct CuflashEmuLaunch {
  void (*entry)(const void* params);
  const void* params;
  i32 grid[3];
  i32 threads;
  u32 smem_bytes;
  i32 buffer_count;
  const CuflashEmuBuffer* buffers;
  u64 seed;
  u64 step_limit;    // of one block
  i32 early_landing;
  i32 counting;
  i32 os_threads;
  i32 clocked;      // warps meet at mbarriers or named barriers
  u64 event_limit;  // of one block; 0: events are not recorded
  i32 cluster;      // blocks that run as one
  CuflashEmuControl* control;
};

struct CuflashEmuEvent;

struct CuflashEmuResult {
  char* report;             // null: no fault
  char* counters;           // lines "group<tab>name<tab>number"; null unless counting
  CuflashEmuEvent* events;  // a block's one after the other; null unless asked for
  u64 event_count;
  u64 dropped;  // events beyond the limit
};
}

// From one block's shared memory in a cluster to the next one's, in Block::memory. (Addresses differ by kClusterStride.)
u32 shared_stride(const CuflashEmuLaunch& launch) { return (launch.smem_bytes + 1023) & ~1023u; }

}  // namespace
