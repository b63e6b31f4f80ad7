// The emulator: runs the blocks of a launch on this machine, and is stricter than the hardware.
//
//   thread      a fiber: a stack and a saved stack pointer (Fiber); switching is a few lines of assembly
//   warp        its lanes run one after another until each meets the others: a collective is executed for all lanes by
//               the last one to arrive, which then runs on; nobody goes through a scheduler on that path
//   block       its warps run one after another until all threads wait at the block barrier; one OS thread
//   launch      blocks in an order drawn from the seed, spread over OS threads
//
// Shared memory carries a shadow (Chunk): for every 2 bytes, who wrote and who read them in which barrier interval, or,
// where warps meet at mbarriers and named barriers too, in which epoch of which warp (clocks.cpp, sm90.cpp).
// A fault writes a report and leaves the block by longjmp; its fibers are abandoned, nothing in them needs unwinding.
// Everything a report or a result depends on is a function of the launch and its seed.
#include "runtime.cuh"

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#if !defined(__x86_64__) && !defined(__aarch64__)
#define CUFLASH_EMU_UCONTEXT
#endif
#if defined(__linux__) || defined(CUFLASH_EMU_UCONTEXT)
#include <ucontext.h>
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))
#define NEVER_INLINE __attribute__((noinline))
#define LIKELY(x) __builtin_expect(!!(x), 1)
#define UNLIKELY(x) __builtin_expect(!!(x), 0)

using hw::Site;

namespace {

// ---- Vectors: GCC's and Clang's extension, any instruction set ----

typedef float f32x8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef u32 vu32x8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef u32 vu32x4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef u64 vu64x2 __attribute__((vector_size(16), aligned(4), may_alias));
typedef int16_t vi16x8 __attribute__((vector_size(16), may_alias));

#ifdef __clang__
#define SHUFFLE4(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define SHUFFLE4(a, b, i, j, k, l) __builtin_shuffle(a, b, (vu32x4){i, j, k, l})
#endif

ALWAYS_INLINE bool any_set(vi16x8 mask) {
  const vu64x2 m = (vu64x2)mask;
  return (m[0] | m[1]) != 0;
}

ALWAYS_INLINE vi16x8 splat16(int16_t x) { return vi16x8{x, x, x, x, x, x, x, x}; }
ALWAYS_INLINE vu32x4 splat32(u32 x) { return vu32x4{x, x, x, x}; }

// Rows become columns.
ALWAYS_INLINE void transpose4(vu32x4& r0, vu32x4& r1, vu32x4& r2, vu32x4& r3) {
  const vu32x4 a = SHUFFLE4(r0, r1, 0, 4, 1, 5), b = SHUFFLE4(r0, r1, 2, 6, 3, 7);
  const vu32x4 c = SHUFFLE4(r2, r3, 0, 4, 1, 5), d = SHUFFLE4(r2, r3, 2, 6, 3, 7);
  r0 = SHUFFLE4(a, c, 0, 1, 4, 5);
  r1 = SHUFFLE4(a, c, 2, 3, 6, 7);
  r2 = SHUFFLE4(b, d, 0, 1, 4, 5);
  r3 = SHUFFLE4(b, d, 2, 3, 6, 7);
}

// ---- Random numbers: splitmix64 ----

ALWAYS_INLINE u64 mix(u64 z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

struct Random {
  u64 state;
  u64 next() { return mix(state += 0x9e3779b97f4a7c15ull); }
  u32 below(u32 n) { return static_cast<u32>((next() >> 32) * n >> 32); }
};

// ---- What a launch is (the same structs in cuflash/emulator.py) ----

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

// ---- Shared memory's shadow ----
// A tag is (interval << 6 | warp); the interval counts block barriers. 0: never. Signed 16 bits, so that eight are
// compared at once; when intervals run out (forget_intervals) the past is folded into one.
// Of the reads in an interval the first is enough: a warp runs from barrier to barrier in one go, so when one writes,
// a read by another warp was either before all of its own, and then the first is another's, or comes after the write.

constexpr int16_t kInFlight = 0x7fff;  // as a write tag: a copy was issued and is not waited for
constexpr int16_t kFirstInterval = 2;
constexpr int16_t kPast = 1 << 6;
constexpr int16_t kLastInterval = 510;

// An access in 32 bits: file (8), line (14), thread (10).
using Trace = u32;

struct alignas(64) Chunk {  // 16 bytes of shared memory
  union {
    struct {
      int16_t write[8];
      int16_t read[8];  // the first of its interval
    };
    u32 tag[8];  // of the writes, see clocks.cpp
  };
  Trace writer[4];  // for each 4 bytes
  Trace reader[4];
};

enum State : u8 {
  kRunning, kAtCollective, kAtBarrier, kAtCluster, kExited, kParted, kAtMbarrier, kAtNamed, kAtRegisters
};

struct Block;
struct Warp;
struct Clocks;
struct Sm90;
struct Events;

struct Copy {
  const u8* source;
  u32 destination;
  u32 group;
  u8 bytes;
  u8 source_bytes;
};

// Copies issued and not landed, oldest first.
struct CopyQueue {
  std::vector<Copy> items;
  size_t head = 0;
  u32 group = 0;  // the one being filled
};

struct Fiber : emu::Thread {
  void* sp;
  Warp* warp;
  Block* block;
  u32 lane;
  u32 base;          // of its block's shared memory in Block::memory
  Site site;         // of the barrier it waits at, or of its fault
  const char* what;  // the instruction there
  CopyQueue copies;
#ifdef CUFLASH_EMU_UCONTEXT
  ucontext_t context;
#endif
};
static_assert(sizeof(Fiber) <= emu::kColourBytes, "a thread's record must fit its colour");

// One lane's access to memory, kept until the warp next meets (counting only).
struct Access {
  u64 address;
  Trace site;
  u8 lane;
  u8 bytes;
  bool shared;
};

struct Warp {
  Fiber* fibers[32];
  u8 next[32];  // the order of the lanes, a ring
  u8 state[32];
  u32 arrived;  // lanes waiting at the collective
  u32 first;    // the first of them
  const char* what;
  Site site;    // its place, or that of the last meeting if nobody waits
  Site before;  // that of the meeting before
  // What the lanes bring to a collective, and what they take from it.
  u32 value[32];
  u32 source[32];
  u32 result[32];
  u32 ballot, ballot_result;
  u32 address[32];
  void* d[32];
  const u32* a[32];
  u32 b[8][8];  // b[t][g], b[4 + t][g]: b0 and b1 of lane 4 g + t
  std::vector<Access> accesses;
};

struct Counters {
  u64 ldmatrix = 0, stmatrix = 0, mma_f16 = 0, mma_bf16 = 0, mma_tf32 = 0;
  u64 barriers = 0, shared_bytes = 0;
  std::vector<u64> read, written;  // bytes of each buffer
  u64 sectors = 0;
  std::map<std::pair<std::string, std::string>, u64> others;  // by group and name
  struct Access {
    u64 taken = 0, beyond = 0;  // passes, or sectors: in all, and those that a better place of the bytes would save
  };
  std::map<Trace, Access> shared, global;  // by site

  void add(const Counters& o) {
    ldmatrix += o.ldmatrix, stmatrix += o.stmatrix;
    mma_f16 += o.mma_f16, mma_bf16 += o.mma_bf16, mma_tf32 += o.mma_tf32;
    barriers += o.barriers, shared_bytes += o.shared_bytes, sectors += o.sectors;
    for (size_t i = 0; i < o.read.size(); i++) read[i] += o.read[i], written[i] += o.written[i];
    for (auto& [name, n] : o.others) others[name] += n;
    for (auto& [site, n] : o.shared) shared[site].taken += n.taken, shared[site].beyond += n.beyond;
    for (auto& [site, n] : o.global) global[site].taken += n.taken, global[site].beyond += n.beyond;
  }
};

// The file names met in a launch. A Trace holds an index; the names live in the kernel's library.
struct Files {
  std::mutex mutex;
  std::vector<const char*> names;

  u32 index(const char* name) {
    std::lock_guard<std::mutex> lock(mutex);
    for (size_t i = 0; i < names.size(); i++)
      if (names[i] == name || !strcmp(names[i], name)) return static_cast<u32>(i);
    if (names.size() == 255) return 254;
    names.push_back(name);
    return static_cast<u32>(names.size() - 1);
  }
};

constexpr i32 kMaxCluster = 2;

// Where all threads of a block, or of a cluster, meet.
struct Meeting {
  i32 come, met;
  Fiber* first;
  Site site;
};

// A block, or the blocks of a cluster, which run as one: their threads and their shared memories one after the other.
struct Block {
  const CuflashEmuLaunch* launch;
  Files* files;
  jmp_buf escape;
  void* scheduler_sp;
#ifdef CUFLASH_EMU_UCONTEXT
  ucontext_t scheduler_context;
#endif
  i32 index[3];
  Random random;
  std::string error;
  void* fault_address;
  Fiber* fault_fiber;
  int fault_signal;

  u8* memory;  // shared
  Chunk* shadow;
  u32 used;              // bytes of shared memory written so far
  i32 interval;
  int16_t interval_tag;

  i32 warps;
  i32 alive;
  i32 alive_of[kMaxCluster];      // of each of its blocks
  Meeting at_barrier[kMaxCluster];  // likewise
  Meeting at_cluster;
  u64 steps_left, steps_beyond;  // until the block looks whether it is to stop, and of the limit behind that

  const CuflashEmuBuffer* recent_buffer;
  const char* recent_file;
  u32 recent_file_bits;
  Counters counters;
  Clocks* clocks;  // null: intervals
  Sm90* sm90;      // likewise
  Events* events;
  Warp warp[32];
};

thread_local Block* this_block = nullptr;

ALWAYS_INLINE Fiber* this_fiber() { return static_cast<Fiber*>(emu::this_thread()); }

// ---- Switching ----

#ifndef CUFLASH_EMU_UCONTEXT

extern "C" void cuflash_emu_switch(void** save, void* load) __asm__("cuflash_emu_switch");
extern "C" __attribute__((used)) void cuflash_emu_thread_main() __asm__("cuflash_emu_thread_main");

#if defined(__x86_64__)
__asm__(R"(
.text
.p2align 4
cuflash_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
constexpr i32 kSavedWords = 6;  // then the return address

void* fresh_stack(u8* top) {
  void** sp = reinterpret_cast<void**>(top);  // a multiple of 16
  *--sp = nullptr;                            // the ABI's alignment at a function's entry, and an end for debuggers
  *--sp = reinterpret_cast<void*>(&cuflash_emu_thread_main);
  for (i32 i = 0; i < kSavedWords; i++) *--sp = nullptr;
  return sp;
}
#else
__asm__(R"(
.text
.p2align 4
cuflash_emu_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");

void* fresh_stack(u8* top) {
  void** sp = reinterpret_cast<void**>(top - 160);
  memset(sp, 0, 160);
  sp[11] = reinterpret_cast<void*>(&cuflash_emu_thread_main);  // x30
  return sp;
}
#endif

ALWAYS_INLINE void switch_fiber(Fiber* from, Fiber* to) { cuflash_emu_switch(&from->sp, to->sp); }
ALWAYS_INLINE void switch_to_scheduler(Fiber* from) { cuflash_emu_switch(&from->sp, from->block->scheduler_sp); }
ALWAYS_INLINE void switch_from_scheduler(Block* b, Fiber* to) { cuflash_emu_switch(&b->scheduler_sp, to->sp); }
void prepare(Fiber* f, u8*, u8* top) { f->sp = fresh_stack(top); }

#else

void cuflash_emu_thread_main();

void switch_fiber(Fiber* from, Fiber* to) { swapcontext(&from->context, &to->context); }
void switch_to_scheduler(Fiber* from) { swapcontext(&from->context, &from->block->scheduler_context); }
void switch_from_scheduler(Block* b, Fiber* to) { swapcontext(&b->scheduler_context, &to->context); }
void prepare(Fiber* f, u8* low, u8* top) {
  getcontext(&f->context);
  f->context.uc_stack.ss_sp = low;
  f->context.uc_stack.ss_size = static_cast<size_t>(top - low);
  f->context.uc_link = nullptr;
  makecontext(&f->context, cuflash_emu_thread_main, 0);
}

#endif

// ---- Stacks and shared memory of one OS thread; kept between launches ----

constexpr u64 kGuardBegin = 128 * 1024, kGuardEnd = 192 * 1024;
static_assert(emu::kColours * emu::kColourBytes <= kGuardBegin, "records lie below the guard");

struct Arena {
  u8* mapping = nullptr;
  u8* stacks = nullptr;
  i32 threads = 0;
  u8* shared = nullptr;
  Chunk* shadow = nullptr;
  u32 shared_bytes = 0;
  void* signal_stack = nullptr;
  Clocks* clocks = nullptr;
  Sm90* sm90 = nullptr;
  Events* events = nullptr;
  Block block;

  Fiber* fiber(i32 i) {
    u8* base = stacks + static_cast<u64>(i) * emu::kStackBytes;
    const u64 colour = reinterpret_cast<u64>(base) / emu::kStackBytes % emu::kColours;
    return reinterpret_cast<Fiber*>(base + colour * emu::kColourBytes);
  }

  u8* stack_low(i32 i) { return stacks + static_cast<u64>(i) * emu::kStackBytes + kGuardEnd; }
  u8* stack_top(i32 i) {
    u8* base = stacks + static_cast<u64>(i) * emu::kStackBytes;
    const u64 colour = reinterpret_cast<u64>(base) / emu::kStackBytes % emu::kColours;
    return base + emu::kStackBytes - 64 - colour * emu::kColourBytes / 16 * 16;
  }

  bool reserve(i32 count, u32 bytes) {
    if (count > threads) {
      for (i32 i = 0; i < threads; i++) fiber(i)->~Fiber();
      if (mapping) munmap(mapping, (static_cast<u64>(threads) + 1) * emu::kStackBytes);
      mapping = nullptr, threads = 0;
      const u64 size = (static_cast<u64>(count) + 1) * emu::kStackBytes;
#ifdef MAP_NORESERVE
      const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
#else
      const int flags = MAP_PRIVATE | MAP_ANON;
#endif
      void* fresh = mmap(nullptr, size, PROT_READ | PROT_WRITE, flags, -1, 0);
      if (fresh == MAP_FAILED) return false;
      mapping = static_cast<u8*>(fresh);
      const u64 aligned = (reinterpret_cast<u64>(mapping) + emu::kStackBytes - 1) & ~(emu::kStackBytes - 1);
      stacks = reinterpret_cast<u8*>(aligned);
      for (i32 i = 0; i < count; i++) {
        mprotect(stacks + static_cast<u64>(i) * emu::kStackBytes + kGuardBegin, kGuardEnd - kGuardBegin, PROT_NONE);
        new (fiber(i)) Fiber();
      }
      threads = count;
    }
    if (bytes > shared_bytes || !shared) {
      free(shared), free(shadow);
      shared_bytes = std::max((bytes + 1023) & ~1023u, 1024u);
      const u64 chunks = shared_bytes / 16;
      void *p = nullptr, *q = nullptr;
      if (posix_memalign(&p, 1024, shared_bytes) || posix_memalign(&q, 64, chunks * sizeof(Chunk))) return false;
      shared = static_cast<u8*>(p), shadow = static_cast<Chunk*>(q);
      memset(static_cast<void*>(shadow), 0, chunks * sizeof(Chunk));
      memset(shared, 0xff, shared_bytes);
    }
    return true;
  }
};

std::mutex arenas_mutex;
std::vector<Arena*> arenas;

Arena* take_arena() {
  std::lock_guard<std::mutex> lock(arenas_mutex);
  if (arenas.empty()) return new Arena();
  Arena* arena = arenas.back();
  arenas.pop_back();
  return arena;
}

void give_arena(Arena* arena) {
  std::lock_guard<std::mutex> lock(arenas_mutex);
  arenas.push_back(arena);
}

// ---- Reports ----

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

#include "events.cpp"

// ---- Counting ----

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

// ---- Lanes take turns ----

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

// ---- Access to shared memory ----

std::string shared_place(u32 offset, u32 bytes) { return format("%u bytes at shared + %u", bytes, offset); }

#include "clocks.cpp"

// Why an access that conflicts is wrong. `f` and `site` are the access; tags are those of the chunk before it.
[[noreturn]] NEVER_INLINE void fail_shared(Fiber* f, u32 offset, u32 bytes, bool write, const char* what, Site site) {
  Block* b = f->block;
  f->site = site;
  const u32 warp = static_cast<u32>(f->index) / 32;
  const std::string me = format("%s of ", what) + shared_place(offset, bytes) + " by " + who(f) + " at " + place(site);
  const int16_t mine = static_cast<int16_t>(b->interval_tag | static_cast<int16_t>(warp));
  for (u32 at = offset / 2; at < (offset + bytes + 1) / 2; at++) {
    const Chunk& chunk = b->shadow[at / 8];
    const int16_t written = chunk.write[at % 8], read = chunk.read[at % 8];
    const Trace writer = chunk.writer[at % 8 / 2];
    const std::string byte = format("byte %u of shared memory", at * 2);
    // A trace is kept for 4 bytes; where their halves have different writers it may be the other's.
    const auto other = [&](Trace trace, int16_t tag) {
      return (trace & 1023) / 32 == static_cast<u32>(tag & 63) ? who(trace & 1023) + " at " + place(b, trace)
                                                               : format("warp %d", tag & 63);
    };
    if (written == kInFlight) {
      const u32 issuer = writer & 1023;
      fail(b, "race: " + me + "\n  meets an asynchronous copy to " + byte + " that is still in flight, issued by " +
                  (issuer == static_cast<u32>(f->index) ? "the same thread" : who(issuer)) + " at " + place(b, writer) +
                  "\n  The issuing thread must wait for its group first (cp_async_wait)" +
                  (issuer / 32 == warp ? "" : ", then all meet at a barrier") + ".");
    }
    if (written >= b->interval_tag && written != mine)
      fail(b, "race: " + me + "\n  and the write of " + byte + " by " + other(writer, written) +
                  " have no block barrier between them");
    if (write && read >= b->interval_tag && read != mine)
      fail(b, "race: " + me + "\n  and the read of " + byte + " by " + other(chunk.reader[at % 8 / 2], read) +
                  " have no block barrier between them");
    if (!write && written == 0)
      fail(b, "uninitialised: " + me + ", but nobody has written " + byte +
                  " in this block; who writes it later must be waited for at a barrier");
  }
  fail(b, "race: " + me);
}

[[noreturn]] NEVER_INLINE void fail_shared_address(Fiber* f, u32 address, u32 bytes, const char* what, Site site) {
  Block* b = f->block;
  f->site = site;
  const u32 size = b->launch->smem_bytes;
  const std::string me = format("%s of %u bytes by ", what, bytes) + who(f) + " at " + place(site);
  if (address % bytes)
    fail(b, "misaligned: " + me + format(": the shared address %u is no multiple of %u", address, bytes));
  if (address < f->shared)
    fail(b, "out of bounds: " + me + format(": the address %u lies before smem_base()", address));
  fail(b, "out of bounds: " + me + format(": smem_base() + %u, but the block has %u bytes of shared memory",
                                          address - f->shared, size));
}

// The offset in Block::memory of a checked address.
ALWAYS_INLINE u32 shared_offset(Fiber* f, u32 address, u32 bytes, const char* what, Site site) {
  const u32 offset = address - f->shared;
  const u32 size = f->block->launch->smem_bytes;
  if (UNLIKELY(address % bytes != 0 || offset >= size || size - offset < bytes))
    fail_shared_address(f, address, bytes, what, site);
  return f->base + offset;
}

ALWAYS_INLINE int16_t tag_of(const Fiber* f) {
  return static_cast<int16_t>(f->block->interval_tag | static_cast<int16_t>(f->index >> 5));
}

// The first read of an interval is kept.
ALWAYS_INLINE void keep_read(Block* b, u32 offset, u32 bytes, int16_t tag, Trace trace) {
  for (u32 at = offset / 2; at < (offset + bytes) / 2; at++) {
    Chunk& chunk = b->shadow[at / 8];
    if (chunk.read[at % 8] >= b->interval_tag) continue;
    chunk.read[at % 8] = tag;
    chunk.reader[at % 8 / 2] = trace;
  }
}

ALWAYS_INLINE void shadow_read16(Fiber* f, u32 offset, Trace trace, const char* what, Site site) {
  Block* b = f->block;
  if (UNLIKELY(b->clocks != nullptr)) return clocked_read(f, offset, 16, trace, what, site);
  Chunk& chunk = b->shadow[offset / 16];
  const vi16x8 tag = splat16(tag_of(f)), now = splat16(b->interval_tag);
  const vi16x8 written = *reinterpret_cast<vi16x8*>(chunk.write), read = *reinterpret_cast<vi16x8*>(chunk.read);
  if (UNLIKELY(any_set(((written >= now) & (written != tag)) | (written == splat16(0)))))
    fail_shared(f, offset, 16, false, what, site);
  if (!any_set(read >= now)) {
    *reinterpret_cast<vi16x8*>(chunk.read) = tag;
    *reinterpret_cast<vu32x4*>(chunk.reader) = splat32(trace);
  } else if (any_set(read < now)) {
    keep_read(b, offset, 16, tag_of(f), trace);
  }
}

ALWAYS_INLINE void check_write16(Fiber* f, u32 offset, const char* what, Site site) {
  Block* b = f->block;
  if (UNLIKELY(b->clocks != nullptr)) return clocked_check_write(f, offset, 16, Use::kWrite, what, site);
  const Chunk& chunk = b->shadow[offset / 16];
  const vi16x8 tag = splat16(tag_of(f)), now = splat16(b->interval_tag);
  const vi16x8 written = *reinterpret_cast<const vi16x8*>(chunk.write);
  const vi16x8 read = *reinterpret_cast<const vi16x8*>(chunk.read);
  if (UNLIKELY(any_set(((written >= now) & (written != tag)) | ((read >= now) & (read != tag)))))
    fail_shared(f, offset, 16, true, what, site);
}

// The bytes are the fiber's warp's now, or on their way.
ALWAYS_INLINE void shadow_write(Fiber* f, u32 offset, u32 bytes, bool in_flight, Trace trace) {
  Block* b = f->block;
  if (UNLIKELY(b->clocks != nullptr))
    return clocked_write(b, offset, bytes, in_flight ? kCopyInFlight : clocked_tag(f), trace);
  const int16_t tag = in_flight ? kInFlight : tag_of(f);
  if (bytes == 16) {
    Chunk& chunk = b->shadow[offset / 16];
    *reinterpret_cast<vi16x8*>(chunk.write) = splat16(tag);
    *reinterpret_cast<vu32x4*>(chunk.writer) = splat32(trace);
  } else {
    for (u32 at = offset / 2; at < (offset + bytes) / 2; at++) {
      b->shadow[at / 8].write[at % 8] = tag;
      b->shadow[at / 8].writer[at % 8 / 2] = trace;
    }
  }
  if (offset + bytes > b->used) b->used = offset + bytes;
}

ALWAYS_INLINE void check_write(Fiber* f, u32 offset, u32 bytes, const char* what, Site site) {
  if (bytes == 16) return check_write16(f, offset, what, site);
  Block* b = f->block;
  if (UNLIKELY(b->clocks != nullptr)) return clocked_check_write(f, offset, bytes, Use::kWrite, what, site);
  const int16_t tag = tag_of(f), now = b->interval_tag;
  for (u32 at = offset / 2; at < (offset + bytes) / 2; at++) {
    const int16_t written = b->shadow[at / 8].write[at % 8], read = b->shadow[at / 8].read[at % 8];
    if (UNLIKELY((written >= now && written != tag) || (read >= now && read != tag)))
      fail_shared(f, offset, bytes, true, what, site);
  }
}

ALWAYS_INLINE void shadow_read(Fiber* f, u32 offset, u32 bytes, Trace trace, const char* what, Site site) {
  if (bytes == 16) return shadow_read16(f, offset, trace, what, site);
  Block* b = f->block;
  if (UNLIKELY(b->clocks != nullptr)) return clocked_read(f, offset, bytes, trace, what, site);
  const int16_t tag = tag_of(f), now = b->interval_tag;
  for (u32 at = offset / 2; at < (offset + bytes) / 2; at++) {
    const int16_t written = b->shadow[at / 8].write[at % 8];
    if (UNLIKELY((written >= now && written != tag) || written == 0)) fail_shared(f, offset, bytes, false, what, site);
  }
  keep_read(b, offset, bytes, tag, trace);
}

// ---- Access to global memory ----

[[noreturn]] NEVER_INLINE void fail_global(Fiber* f, u64 address, u32 bytes, bool write, const char* what, Site site) {
  Block* b = f->block;
  const CuflashEmuLaunch& launch = *b->launch;
  f->site = site;
  const std::string me =
      format("%s: %s %u bytes by ", what, write ? "write of" : "read of", bytes) + who(f) + " at " + place(site);
  const CuflashEmuBuffer* nearest = nullptr;
  u64 distance = ~0ull;
  for (i32 i = 0; i < launch.buffer_count; i++) {
    const CuflashEmuBuffer& buffer = launch.buffers[i];
    const u64 end = buffer.begin + buffer.bytes;
    if (address >= buffer.begin && address + bytes <= end)  // only a write to a read-only buffer comes here
      fail(b, "out of bounds: " + me + format(": %s is read-only", buffer.name));
    const u64 d = address < buffer.begin ? buffer.begin - address : address >= end ? address - end : 0;
    if (d < distance) distance = d, nearest = &buffer;
  }
  if (address < 4096)
    fail(b, "out of bounds: " + me + format(" through a null pointer (address %llu)", address));
  if (!nearest) fail(b, "out of bounds: " + me + ": the launch names no buffer");
  const u64 end = nearest->begin + nearest->bytes;
  const std::string name = format("%s, which has %llu bytes", nearest->name, nearest->bytes);
  const std::string where = address < nearest->begin ? format("%llu bytes before the beginning of ", distance)
                            : address >= end         ? format("%llu bytes past the end of ", distance)
                                                     : format("the last %llu past the end of ", address + bytes - end);
  fail(b, "out of bounds: " + me + ", " + where + name);
}

NEVER_INLINE const CuflashEmuBuffer* find_buffer(Fiber* f, u64 address, u32 bytes, bool write, const char* what,
                                                 Site site) {
  const CuflashEmuLaunch& launch = *f->block->launch;
  for (i32 i = 0; i < launch.buffer_count; i++) {
    const CuflashEmuBuffer& buffer = launch.buffers[i];
    if (address >= buffer.begin && address + bytes <= buffer.begin + buffer.bytes && (!write || buffer.writable))
      return f->block->recent_buffer = &buffer;
  }
  fail_global(f, address, bytes, write, what, site);
}

[[noreturn]] NEVER_INLINE void fail_global_alignment(Fiber* f, u64 address, u32 bytes, const char* what, Site site) {
  f->site = site;
  fail(f->block, format("misaligned: %s of %u bytes by ", what, bytes) + who(f) + " at " + place(site) +
                     format(": the address is %u past a multiple of %u", static_cast<u32>(address % bytes), bytes));
}

// `size` bytes at `address`, which must be a multiple of `alignment`.
ALWAYS_INLINE void check_global(Fiber* f, u64 address, u32 size, u32 alignment, bool write, const char* what,
                                Site site) {
  Block* b = f->block;
  if (UNLIKELY(address % alignment != 0)) fail_global_alignment(f, address, alignment, what, site);
  const CuflashEmuBuffer* buffer = b->recent_buffer;
  if (UNLIKELY(!buffer || address < buffer->begin || address + size > buffer->begin + buffer->bytes ||
               (write && !buffer->writable)))
    buffer = find_buffer(f, address, size, write, what, site);
  if (UNLIKELY(b->launch->counting)) {
    (write ? b->counters.written : b->counters.read)[static_cast<size_t>(buffer - b->launch->buffers)] += size;
    note_access(f, address, size, false, trace_of(b, site));
  }
}

// A denormal becomes a zero of its sign.
ALWAYS_INLINE float flush_denormal(float x) {
  const u32 bits = __builtin_bit_cast(u32, x);
  return (bits & 0x7f800000u) == 0 ? __builtin_bit_cast(float, bits & 0x80000000u) : x;
}

// ---- Asynchronous copies ----

void move_bytes(Block* b, const Copy& copy) {
  u8* to = b->memory + copy.destination;
  if (LIKELY(copy.source_bytes == 16)) {
    memcpy(to, copy.source, 16);
  } else {
    memset(to, 0, copy.bytes);
    memcpy(to, copy.source, copy.source_bytes);
  }
}

ALWAYS_INLINE void land(Fiber* f, const Copy& copy) {
  Block* b = f->block;
  if (!b->launch->early_landing) move_bytes(b, copy);
  // The bytes are this warp's write, of now; who issued it stays on record.
  if (UNLIKELY(b->clocks != nullptr))
    return clocked_write(b, copy.destination, copy.bytes, clocked_tag(f),
                         b->shadow[copy.destination / 16].writer[copy.destination % 16 / 4]);
  const int16_t tag = tag_of(f);
  Chunk& chunk = b->shadow[copy.destination / 16];
  if (copy.bytes == 16) {
    *reinterpret_cast<vi16x8*>(chunk.write) = splat16(tag);
  } else {
    chunk.write[copy.destination % 16 / 2] = chunk.write[copy.destination % 16 / 2 + 1] = tag;
  }
}

// ---- Matrix instructions ----

// The lanes' operand a as rows of words: rows[g] = a[0] of lanes 4 g .. 4 g + 3, then their a[2]; rows[g + 8] = their
// a[1], then their a[3].
ALWAYS_INLINE void gather_a(const Warp* w, u32 (&rows)[16][8]) {
  for (i32 g = 0; g < 8; g++) {
    const u32* const* a = &w->a[4 * g];
    vu32x4 r0 = *reinterpret_cast<const vu32x4*>(a[0]), r1 = *reinterpret_cast<const vu32x4*>(a[1]);
    vu32x4 r2 = *reinterpret_cast<const vu32x4*>(a[2]), r3 = *reinterpret_cast<const vu32x4*>(a[3]);
    transpose4(r0, r1, r2, r3);
    *reinterpret_cast<vu32x4*>(&rows[g][0]) = r0;
    *reinterpret_cast<vu32x4*>(&rows[g + 8][0]) = r1;
    *reinterpret_cast<vu32x4*>(&rows[g][4]) = r2;
    *reinterpret_cast<vu32x4*>(&rows[g + 8][4]) = r3;
  }
}

// 16-bit halves as floats. The two halves of a word are neighbours along k; all low halves come first here, in a and b
// alike, for the order of a sum's terms is free.
struct DecodeBf16 {
  static ALWAYS_INLINE f32x8 value(vu32x8 half) { return (f32x8)(half << 16); }
  static ALWAYS_INLINE f32x8 low(vu32x8 x) { return (f32x8)(x << 16); }
  static ALWAYS_INLINE f32x8 high(vu32x8 x) { return (f32x8)(x & 0xffff0000u); }
};

struct DecodeF16 {
  static ALWAYS_INLINE f32x8 value(vu32x8 half) {
    const vu32x8 magnitude = (half & 0x7fffu) << 13;
    const vu32x8 special = (vu32x8)(magnitude >= 0x0f800000u) & 0x7f800000u;  // infinity and NaN
    const vu32x8 scaled = (vu32x8)((f32x8)magnitude * 0x1p112f);
    return (f32x8)(scaled | special | (half & 0x8000u) << 16);
  }
  static ALWAYS_INLINE f32x8 low(vu32x8 x) { return value(x & 0xffffu); }
  static ALWAYS_INLINE f32x8 high(vu32x8 x) { return value(x >> 16); }
};

// d += a b with a [16][kDepth] and b [kDepth][8]; d from and to the lanes.
template <i32 kDepth>
ALWAYS_INLINE void multiply(Warp* w, const float (*a)[16], const f32x8* b) {
  for (i32 g = 0; g < 8; g += 4) {
    // Eight rows at once: g .. g + 3 and the same + 8, each eight columns from four lanes.
    f32x8 upper[4], lower[4];
    for (i32 i = 0; i < 4; i++) {
      float* const* d = reinterpret_cast<float* const*>(&w->d[4 * (g + i)]);
      const vu32x4 x0 = *reinterpret_cast<vu32x4*>(d[0]), x1 = *reinterpret_cast<vu32x4*>(d[1]);
      const vu32x4 x2 = *reinterpret_cast<vu32x4*>(d[2]), x3 = *reinterpret_cast<vu32x4*>(d[3]);
      vu32x4 pair[2] = {SHUFFLE4(x0, x1, 0, 1, 4, 5), SHUFFLE4(x2, x3, 0, 1, 4, 5)};
      memcpy(&upper[i], pair, 32);
      vu32x4 pair2[2] = {SHUFFLE4(x0, x1, 2, 3, 6, 7), SHUFFLE4(x2, x3, 2, 3, 6, 7)};
      memcpy(&lower[i], pair2, 32);
    }
    for (i32 k = 0; k < kDepth; k++)
      for (i32 i = 0; i < 4; i++) {
        upper[i] += a[g + i][k] * b[k];
        lower[i] += a[g + i + 8][k] * b[k];
      }
    for (i32 i = 0; i < 4; i++) {
      float* const* d = reinterpret_cast<float* const*>(&w->d[4 * (g + i)]);
      vu32x4 u[2], l[2];
      memcpy(u, &upper[i], 32);
      memcpy(l, &lower[i], 32);
      *reinterpret_cast<vu32x4*>(d[0]) = SHUFFLE4(u[0], l[0], 0, 1, 4, 5);
      *reinterpret_cast<vu32x4*>(d[1]) = SHUFFLE4(u[0], l[0], 2, 3, 6, 7);
      *reinterpret_cast<vu32x4*>(d[2]) = SHUFFLE4(u[1], l[1], 0, 1, 4, 5);
      *reinterpret_cast<vu32x4*>(d[3]) = SHUFFLE4(u[1], l[1], 2, 3, 6, 7);
    }
  }
}

template <class Decode>
void execute_mma_16(Warp* w) {
  u32 rows[16][8];
  gather_a(w, rows);
  float a[16][16];
  f32x8 b[16];
  for (i32 i = 0; i < 16; i++) {
    const vu32x8 words = *reinterpret_cast<vu32x8*>(rows[i]);
    *reinterpret_cast<f32x8*>(&a[i][0]) = Decode::low(words);
    *reinterpret_cast<f32x8*>(&a[i][8]) = Decode::high(words);
  }
  for (i32 i = 0; i < 8; i++) {
    const vu32x8 words = *reinterpret_cast<vu32x8*>(w->b[i]);
    b[i] = Decode::low(words);
    b[8 + i] = Decode::high(words);
  }
  multiply<16>(w, a, b);
}

void execute_mma_tf32(Warp* w) {
  u32 rows[16][8];
  gather_a(w, rows);
  float a[16][16];
  f32x8 b[8];
  for (i32 i = 0; i < 16; i++)
    *reinterpret_cast<f32x8*>(&a[i][0]) = (f32x8)(*reinterpret_cast<vu32x8*>(rows[i]) & 0xffffe000u);
  for (i32 i = 0; i < 8; i++) b[i] = (f32x8)(*reinterpret_cast<vu32x8*>(w->b[i]) & 0xffffe000u);
  multiply<8>(w, a, b);
}

ALWAYS_INLINE void post_mma(Warp* w, u32 lane, float* d, const u32* a, u32 b0, u32 b1) {
  w->d[lane] = d;
  w->a[lane] = a;
  w->b[lane % 4][lane / 4] = b0;
  w->b[4 + lane % 4][lane / 4] = b1;
}

// Checks the rows' addresses and gives them.
ALWAYS_INLINE void matrix_rows(Warp* w, bool write, const char* what, Site site, u8* (&rows)[32]) {
  Block* b = w->fibers[0]->block;
  const Trace trace = trace_of(b, site);
  for (u32 lane = 0; lane < 32; lane++) {
    Fiber* f = w->fibers[lane];
    const u32 offset = shared_offset(f, w->address[lane], 16, what, site);
    rows[lane] = b->memory + offset;
    const Trace mine = trace | static_cast<u32>(f->index);
    if (write) {
      check_write16(f, offset, what, site);
      shadow_write(f, offset, 16, false, mine);
    } else {
      shadow_read16(f, offset, mine, what, site);
    }
  }
  if (UNLIKELY(b->launch->counting)) count_matrix_rows(b, w, site);
}

void execute_ldmatrix(Warp* w, Site site) {
  u8* rows[32];
  matrix_rows(w, false, "ldmatrix_x4", site, rows);
  for (i32 g = 0; g < 8; g++) {
    vu32x4 r0 = *reinterpret_cast<vu32x4*>(rows[g]), r1 = *reinterpret_cast<vu32x4*>(rows[8 + g]);
    vu32x4 r2 = *reinterpret_cast<vu32x4*>(rows[16 + g]), r3 = *reinterpret_cast<vu32x4*>(rows[24 + g]);
    transpose4(r0, r1, r2, r3);
    *static_cast<vu32x4*>(w->d[4 * g]) = r0;
    *static_cast<vu32x4*>(w->d[4 * g + 1]) = r1;
    *static_cast<vu32x4*>(w->d[4 * g + 2]) = r2;
    *static_cast<vu32x4*>(w->d[4 * g + 3]) = r3;
  }
}

void execute_ldmatrix_trans(Warp* w, Site site) {
  u8* rows[32];
  matrix_rows(w, false, "ldmatrix_x4_trans", site, rows);
  // words[t][i][g]: what lane 4 g + t receives as r[i], rows 2 t and 2 t + 1 of column g.
  alignas(32) u32 words[4][4][8];
  for (i32 i = 0; i < 4; i++)
    for (i32 t = 0; t < 4; t++) {
      u16 even[8], odd[8];
      memcpy(even, rows[8 * i + 2 * t], 16);
      memcpy(odd, rows[8 * i + 2 * t + 1], 16);
      for (i32 g = 0; g < 8; g++) words[t][i][g] = even[g] | static_cast<u32>(odd[g]) << 16;
    }
  for (i32 t = 0; t < 4; t++)
    for (i32 half = 0; half < 8; half += 4) {
      vu32x4 r0 = *reinterpret_cast<vu32x4*>(&words[t][0][half]), r1 = *reinterpret_cast<vu32x4*>(&words[t][1][half]);
      vu32x4 r2 = *reinterpret_cast<vu32x4*>(&words[t][2][half]), r3 = *reinterpret_cast<vu32x4*>(&words[t][3][half]);
      transpose4(r0, r1, r2, r3);
      *static_cast<vu32x4*>(w->d[4 * half + t]) = r0;
      *static_cast<vu32x4*>(w->d[4 * (half + 1) + t]) = r1;
      *static_cast<vu32x4*>(w->d[4 * (half + 2) + t]) = r2;
      *static_cast<vu32x4*>(w->d[4 * (half + 3) + t]) = r3;
    }
}

void execute_stmatrix(Warp* w, Site site) {
  u8* rows[32];
  matrix_rows(w, true, "stmatrix_x4", site, rows);
  for (i32 lane = 0; lane < 32; lane++)
    for (i32 i = 0; i < 4; i++) memcpy(rows[8 * i + lane / 4] + lane % 4 * 4, &w->a[lane][i], 4);
}

// ---- A block ----

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

// ---- Signals: a kernel's wild pointer becomes a report ----

const int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE};
std::mutex signals_mutex;
i32 signals_users = 0;
struct sigaction signals_before[3];

void on_signal(int signal, siginfo_t* info, void* context) {
  Block* b = this_block;
  if (!b) {  // not ours: as if we had never been here
    for (i32 i = 0; i < 3; i++)
      if (kSignals[i] == signal) sigaction(signal, &signals_before[i], nullptr);
    return;
  }
  b->fault_signal = signal;
  b->fault_address = info->si_addr;
  b->fault_fiber = nullptr;
  u64 sp = 0;
#if defined(__linux__) && defined(__x86_64__)
  sp = static_cast<u64>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RSP]);
#elif defined(__linux__) && defined(__aarch64__)
  sp = static_cast<ucontext_t*>(context)->uc_mcontext.sp;
#else
  (void)context;
#endif
  for (i32 w = 0; w < b->warps; w++)
    for (Fiber* f : b->warp[w].fibers)
      if ((reinterpret_cast<u64>(f) & ~(emu::kStackBytes - 1)) == (sp & ~(emu::kStackBytes - 1))) b->fault_fiber = f;
  _longjmp(b->escape, 2);
}

struct SignalGuard {
  SignalGuard() {
    std::lock_guard<std::mutex> lock(signals_mutex);
    if (signals_users++) return;
    struct sigaction action;
    memset(&action, 0, sizeof(action));
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigemptyset(&action.sa_mask);
    for (i32 i = 0; i < 3; i++) sigaction(kSignals[i], &action, &signals_before[i]);
  }
  ~SignalGuard() {
    std::lock_guard<std::mutex> lock(signals_mutex);
    if (--signals_users) return;
    for (i32 i = 0; i < 3; i++) sigaction(kSignals[i], &signals_before[i], nullptr);
  }
};

// The stack on which a signal of this OS thread is handled.
struct SignalStack {
  stack_t before;
  explicit SignalStack(Arena* arena) {
    constexpr size_t kBytes = 64 * 1024;
    if (!arena->signal_stack) arena->signal_stack = malloc(kBytes);
    stack_t stack;
    memset(&stack, 0, sizeof(stack));
    stack.ss_sp = arena->signal_stack;
    stack.ss_size = kBytes;
    sigaltstack(&stack, &before);
  }
  ~SignalStack() { sigaltstack(&before, nullptr); }
};

// ---- A launch ----

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

// ---- What kernels call ----

extern "C" {

void cuflash_emu_sync_threads(Site site) {
  Fiber* f = this_fiber();
  come_to(f, f->block->at_barrier[f->rank], kAtBarrier, "sync_threads", site);
}

void cuflash_emu_cluster_sync(Site site) {
  Fiber* f = this_fiber();
  come_to(f, f->block->at_cluster, kAtCluster, "cluster_sync", site);
}

void cuflash_emu_sync_warp(Site site) { meet(this_fiber(), "sync_warp", site); }

u32 cuflash_emu_shuffle(u32 value, i32 source, const char* name, Site site) {
  Fiber* f = this_fiber();
  Warp* w = f->warp;
  const u32 lane = f->lane;
  w->value[lane] = value;
  w->source[lane] = static_cast<u32>(source) & 31;
  if (meet(f, name, site)) {
    note_warp(f, name, site);
    for (i32 i = 0; i < 32; i++) w->result[i] = w->value[w->source[i]];
    if (UNLIKELY(f->block->launch->counting)) f->block->counters.others[{"exchanges", name}]++;
  }
  return w->result[lane];
}

u32 cuflash_emu_ballot(bool predicate, const char* name, Site site) {
  Fiber* f = this_fiber();
  Warp* w = f->warp;
  w->ballot |= static_cast<u32>(predicate) << f->lane;
  if (meet(f, name, site)) {
    w->ballot_result = w->ballot;
    w->ballot = 0;
    if (UNLIKELY(f->block->launch->counting)) f->block->counters.others[{"exchanges", name}]++;
  }
  return w->ballot_result;
}

void cuflash_emu_load_shared(void* value, u32 address, u32 bytes, Site site) {
  Fiber* f = this_fiber();
  Block* b = f->block;
  step(f, site);
  const u32 offset = shared_offset(f, address, bytes, "load_shared", site);
  const Trace trace = trace_of(b, site);
  shadow_read(f, offset, bytes, trace | static_cast<u32>(f->index), "load_shared", site);
  note_access(f, address, bytes, true, trace);
  memcpy(value, b->memory + offset, bytes);
}

void cuflash_emu_store_shared(const void* value, u32 address, u32 bytes, Site site) {
  Fiber* f = this_fiber();
  Block* b = f->block;
  step(f, site);
  const u32 offset = shared_offset(f, address, bytes, "store_shared", site);
  const Trace trace = trace_of(b, site);
  check_write(f, offset, bytes, "store_shared", site);
  shadow_write(f, offset, bytes, false, trace | static_cast<u32>(f->index));
  note_access(f, address, bytes, true, trace);
  memcpy(b->memory + offset, value, bytes);
}

void cuflash_emu_load_global(void* value, const void* pointer, u32 bytes, Site site) {
  Fiber* f = this_fiber();
  step(f, site);
  check_global(f, reinterpret_cast<u64>(pointer), bytes, bytes, false, "load_global", site);
  memcpy(value, pointer, bytes);
}

void cuflash_emu_store_global(const void* value, void* pointer, u32 bytes, Site site) {
  Fiber* f = this_fiber();
  step(f, site);
  check_global(f, reinterpret_cast<u64>(pointer), bytes, bytes, true, "store_global", site);
  memcpy(pointer, value, bytes);
}

// Atomic for this machine's threads, too, over which the blocks are spread.
static void add_to(float* pointer, float value) {
  u32* word = reinterpret_cast<u32*>(pointer);
  u32 before = __atomic_load_n(word, __ATOMIC_RELAXED), after;
  do {
    const float sum = flush_denormal(__builtin_bit_cast(float, before)) + flush_denormal(value);
    after = __builtin_bit_cast(u32, flush_denormal(sum));
  } while (!__atomic_compare_exchange_n(word, &before, after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
}

void cuflash_emu_atomic_add(float* pointer, float value, Site site) {
  Fiber* f = this_fiber();
  step(f, site);
  check_global(f, reinterpret_cast<u64>(pointer), 4, 4, true, "atomic_add", site);
  add_to(pointer, value);
}

void cuflash_emu_atomic_add4(float* pointer, const float* values, Site site) {
  Fiber* f = this_fiber();
  step(f, site);
  check_global(f, reinterpret_cast<u64>(pointer), 16, 16, true, "atomic_add4", site);
  for (i32 i = 0; i < 4; i++) add_to(pointer + i, values[i]);
}

void cuflash_emu_bad_index(i32 index, i32 size, Site site) {
  Fiber* f = this_fiber();
  f->site = site;
  fail(f->block, "out of bounds: an index of " + who(f) + " at " + place(site) +
                     format(": %d, of an axis of %d elements", index, size));
}

void cuflash_emu_atomic_add_u64(u64* pointer, u64 value, Site site) {
  Fiber* f = this_fiber();
  step(f, site);
  check_global(f, reinterpret_cast<u64>(pointer), 8, 8, true, "atomic_add", site);
  __atomic_fetch_add(pointer, value, __ATOMIC_RELAXED);
}

void cuflash_emu_cp_async(u32 destination, const void* source, u32 bytes, i32 source_bytes, Site site) {
  Fiber* f = this_fiber();
  Block* b = f->block;
  const char* what = bytes == 16 ? "cp_async_16" : "cp_async_4";
  step(f, site);
  const u32 offset = shared_offset(f, destination, bytes, what, site);
  if (UNLIKELY(static_cast<u32>(source_bytes) > bytes)) {
    f->site = site;
    fail(b, format("out of bounds: %s by ", what) + who(f) + " at " + place(site) +
                format(": source_bytes is %d, of 0 to %u", source_bytes, bytes));
  }
  if (LIKELY(source_bytes != 0)) {
    check_global(f, reinterpret_cast<u64>(source), static_cast<u32>(source_bytes), bytes, false, what, site);
  } else if (UNLIKELY(reinterpret_cast<u64>(source) % bytes != 0)) {
    fail_global_alignment(f, reinterpret_cast<u64>(source), bytes, what, site);
  }
  const Trace trace = trace_of(b, site);
  check_write(f, offset, bytes, what, site);
  shadow_write(f, offset, bytes, true, trace | static_cast<u32>(f->index));
  note_access(f, destination, bytes, true, trace);
  const Copy copy = {static_cast<const u8*>(source), offset, f->copies.group, static_cast<u8>(bytes),
                     static_cast<u8>(source_bytes)};
  if (b->launch->early_landing) move_bytes(b, copy);
  const u64 from = reinterpret_cast<u64>(source);
  note_lane(f, what, site, -1, static_cast<i32>(f->copies.group), false,
            source_bytes ? Copied{from, from + static_cast<u32>(source_bytes)} : Copied{~0ull, 0});
  f->copies.items.push_back(copy);
}

void cuflash_emu_cp_async_commit(Site site) {
  Fiber* f = this_fiber();
  step(f, site);
  note_lane(f, "cp_async_commit", site, -1, static_cast<i32>(f->copies.group));
  f->copies.group++;
}

void cuflash_emu_cp_async_wait(i32 pending, Site site) {
  Fiber* f = this_fiber();
  step(f, site);
  CopyQueue& queue = f->copies;
  note_lane(f, "cp_async_wait", site, -1, static_cast<i32>(queue.group) - 1 - pending);
  while (queue.head < queue.items.size() && static_cast<i64>(queue.items[queue.head].group) + pending < queue.group)
    land(f, queue.items[queue.head++]);
  if (queue.head == queue.items.size()) {
    queue.items.clear();
    queue.head = 0;
  }
}

void cuflash_emu_ldmatrix_x4(u32* r, u32 address, Site site) {
  Fiber* f = this_fiber();
  Warp* w = f->warp;
  w->d[f->lane] = r;
  w->address[f->lane] = address;
  if (!meet(f, "ldmatrix_x4", site)) return;
  f->block->counters.ldmatrix++;
  execute_ldmatrix(w, site);
}

void cuflash_emu_ldmatrix_x4_trans(u32* r, u32 address, Site site) {
  Fiber* f = this_fiber();
  Warp* w = f->warp;
  w->d[f->lane] = r;
  w->address[f->lane] = address;
  if (!meet(f, "ldmatrix_x4_trans", site)) return;
  f->block->counters.ldmatrix++;
  execute_ldmatrix_trans(w, site);
}

void cuflash_emu_stmatrix_x4(const u32* r, u32 address, Site site) {
  Fiber* f = this_fiber();
  Warp* w = f->warp;
  w->a[f->lane] = r;
  w->address[f->lane] = address;
  if (!meet(f, "stmatrix_x4", site)) return;
  f->block->counters.stmatrix++;
  execute_stmatrix(w, site);
}

void cuflash_emu_mma_m16n8k16_f16(float* d, const u32* a, u32 b0, u32 b1, Site site) {
  Fiber* f = this_fiber();
  post_mma(f->warp, f->lane, d, a, b0, b1);
  if (!meet(f, "mma_m16n8k16", site)) return;
  f->block->counters.mma_f16++;
  note_warp(f, "mma_m16n8k16", site);
  execute_mma_16<DecodeF16>(f->warp);
}

void cuflash_emu_mma_m16n8k16_bf16(float* d, const u32* a, u32 b0, u32 b1, Site site) {
  Fiber* f = this_fiber();
  post_mma(f->warp, f->lane, d, a, b0, b1);
  if (!meet(f, "mma_m16n8k16", site)) return;
  f->block->counters.mma_bf16++;
  note_warp(f, "mma_m16n8k16", site);
  execute_mma_16<DecodeBf16>(f->warp);
}

void cuflash_emu_mma_m16n8k8_tf32(float* d, const u32* a, u32 b0, u32 b1, Site site) {
  Fiber* f = this_fiber();
  post_mma(f->warp, f->lane, d, a, b0, b1);
  if (!meet(f, "mma_m16n8k8_tf32", site)) return;
  f->block->counters.mma_tf32++;
  note_warp(f, "mma_m16n8k8_tf32", site);
  execute_mma_tf32(f->warp);
}

// Round to nearest even; overflow gives infinity; any NaN becomes 0x7fff.
u32 cuflash_emu_half_bits(float x) {
  if (x != x) return 0x7fff;
  const u32 bits = __builtin_bit_cast(u32, x), sign = bits >> 16 & 0x8000;
  const float magnitude = __builtin_bit_cast(float, bits & 0x7fffffff);
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  if (magnitude < 0x1p-14f)  // adding 1/2 leaves multiples of 2^-24, half's denormals, in the low bits
    return sign | (__builtin_bit_cast(u32, magnitude + 0.5f) - 0x3f000000u);
  const u32 rounded = (bits & 0x7fffffff) + 0xfff + (bits >> 13 & 1);
  return sign | (rounded - 0x38000000u) >> 13;
}

float cuflash_emu_half_value(u32 bits) {
  const float magnitude = __builtin_bit_cast(float, (bits & 0x7fffu) << 13) * 0x1p112f;
  u32 result = __builtin_bit_cast(u32, magnitude) | (bits & 0x8000u) << 16;
  if ((bits & 0x7c00u) == 0x7c00u) result |= 0x7f800000u;
  return __builtin_bit_cast(float, result);
}

// ---- What Python calls ----

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

#include "sm90.cpp"
