// Barriers between some of a block's warps: mbarriers and named barriers; and the fence between the two ways to shared
// memory. Compute capability 9.0 and later.
//
// An mbarrier is 8 bytes of shared memory, at a multiple of 8, that count phases 0, 1, 2, ... A phase is complete when
// `count` arrivals have come and all bytes that were announced have landed. A waiter names the parity of the phase it
// waits for: phase % 2. What a thread wrote before it arrived, and what copies brought, whoever waits sees.
// A new mbarrier is in phase 0; waiting for parity 1 returns at once, as if the phase before it were complete: so a
// producer finds all stages empty at the beginning.
#pragma once
#include <base.cuh>
#include <hw/device.cuh>

namespace hw {

// One thread makes an mbarrier, calls fence_mbarrier_init, and then the block meets before anyone uses it.
HW_DEVICE void mbarrier_init(u32 mbarrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(mbarrier), "r"(count) : "memory");
}

// The mbarriers this thread has made exist for asynchronous copies, too.
HW_DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// One arrival, by this thread.
HW_DEVICE void mbarrier_arrive(u32 mbarrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(mbarrier) : "memory");
}

// One arrival, which also announces `bytes` of copies to this mbarrier, before they are issued. Boxes that lie partly
// outside of their tensor count in full.
HW_DEVICE void mbarrier_arrive_expect_tx(u32 mbarrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(mbarrier), "r"(bytes) : "memory");
}

// Returns when the phase of this parity is complete. It must be the current phase or the one before.
HW_DEVICE void mbarrier_wait(u32 mbarrier, u32 parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}" ::"r"(mbarrier),
      "r"(parity)
      : "memory");
}

// Whole warps meet at barrier `id`, 1 to 15: it opens when `threads` threads, a multiple of 32, have come, to wait
// (named_sync) or only to have come (named_arrive). (PTX ISA, "barrier")
HW_DEVICE void named_sync(i32 id, i32 threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
HW_DEVICE void named_arrive(i32 id, i32 threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// What this thread has written to shared memory, wgmma and tensor copies will see: its own, and others' after they have
// met at a barrier. Each thread that has written calls it, before the barrier.
HW_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A warpgroup (4 warps, the first a multiple of 4) gives up registers, or takes what others have given up, so that each
// of its threads has kRegisters; all four warps come. Taking waits until enough are free. (PTX ISA, "setmaxnreg")
template <i32 kRegisters>
HW_DEVICE void register_dealloc() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "24 to 256, a multiple of 8");
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <i32 kRegisters>
HW_DEVICE void register_alloc() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "24 to 256, a multiple of 8");
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace hw
