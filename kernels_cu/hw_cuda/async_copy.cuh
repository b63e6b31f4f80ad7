// cp.async: global to shared memory without passing through registers. (PTX ISA, "cp.async")
// A copy lands no later than the cp_async_wait that covers its group; only the thread that issued it is told, so a
// block that shares the data meets at a barrier after that wait.
#pragma once
#include <base.cuh>
#include <hw/device.cuh>

namespace hw {

// Copies source_bytes (0..16) and fills the rest of the 16 with zeros; with 0 the source is not read.
// Both addresses are multiples of 16.
HW_DEVICE void cp_async_16(u32 destination, const void* source, i32 source_bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(destination), "l"(source),
               "r"(source_bytes)
               : "memory");
}

// The same for 4 bytes (source_bytes 0..4), multiples of 4.
HW_DEVICE void cp_async_4(u32 destination, const void* source, i32 source_bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(destination), "l"(source), "r"(source_bytes)
               : "memory");
}

// Closes a group: all copies this thread issued since the last commit.
HW_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's newest groups are still on their way.
template <i32 kPending>
HW_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace hw
