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
//
// One library, compiled as one text, so that what runs at every access is inlined; a chapter a file.
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

// Each chapter uses those before it: what there is,
#include "vectors.cpp"
#include "interface.cpp"
#include "state.cpp"
// threads and what becomes of them,
#include "fibers.cpp"
#include "reports.cpp"
#include "events.cpp"
#include "counters.cpp"
#include "turns.cpp"
// what they do to memory,
#include "clocks.cpp"
#include "shared.cpp"
#include "global.cpp"
#include "copies.cpp"
#include "matrix.cpp"
// a launch from its blocks to what Python calls,
#include "block.cpp"
#include "signals.cpp"
#include "launch.cpp"
#include "entry_points.cpp"
// and what only kernels for compute capability 9.0 use.
#include "sm90.cpp"
#include "mbarrier.cpp"
#include "tma.cpp"
#include "groups.cpp"
#include "wgmma.cpp"
#include "end_sm90.cpp"
