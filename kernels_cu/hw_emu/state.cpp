// Part of runtime.cpp: a block and all it consists of. Shared memory has a shadow (Chunk).
//
// A tag is (interval << 6 | warp); the interval counts block barriers. 0: never. Signed 16 bits, so that eight are
// compared at once; when intervals run out (forget_intervals) the past is folded into one.
// Of the reads in an interval the first is enough: a warp runs from barrier to barrier in one go, so when one writes,
// a read by another warp was either before all of its own, and then the first is another's, or comes after the write.

namespace {

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

}  // namespace
