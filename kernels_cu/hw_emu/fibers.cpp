// Part of runtime.cpp: switching between fibers; an OS thread's stacks and shared memory, kept between launches.

namespace {

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

}  // namespace
