// Tensor copies: one thread moves a box of a tensor in global memory, which a tensor map describes, to or from shared
// memory. Compute capability 9.0 and later. (PTX ISA, "cp.async.bulk.tensor")
//
// Coordinates are those of the box's first element, innermost axis first. They may be negative or past the end: a load
// fills what is outside of the tensor with zeros, a store leaves it out. In shared memory the box is dense, its first
// axis innermost, at a multiple of 128 bytes, with a swizzle of 32, 64, 128 bytes at one of 256, 512, 1024.
// The map lies in the kernel's params, which are HW_GRID_CONSTANT.
#pragma once
#include <base.cuh>
#include <hw/barrier.cuh>
#include <hw/device.cuh>

namespace hw {

// How long the second-level cache should keep what a load brings.
enum class CachePolicy : u64 {
  kNormal = 0x1000000000000000ull,
  kEvictFirst = 0x12f0000000000000ull,
  kEvictLast = 0x14f0000000000000ull,
};

// Fetches the map itself, ahead of its first use.
HW_DEVICE void prefetch_tensor_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Lands at `destination` and then counts the box's bytes on the mbarrier, where mbarrier_arrive_expect_tx has announced
// them.
HW_DEVICE void tma_load(u32 destination, const TensorMap& map, u32 mbarrier, CachePolicy policy, i32 c0, i32 c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(destination),
      "l"(&map), "r"(mbarrier), "r"(c0), "r"(c1), "l"(static_cast<u64>(policy))
      : "memory");
}
HW_DEVICE void tma_load(u32 destination, const TensorMap& map, u32 mbarrier, CachePolicy policy, i32 c0, i32 c1,
                        i32 c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(destination),
      "l"(&map), "r"(mbarrier), "r"(c0), "r"(c1), "r"(c2), "l"(static_cast<u64>(policy))
      : "memory");
}
HW_DEVICE void tma_load(u32 destination, const TensorMap& map, u32 mbarrier, CachePolicy policy, i32 c0, i32 c1, i32 c2,
                        i32 c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(destination),
      "l"(&map), "r"(mbarrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "l"(static_cast<u64>(policy))
      : "memory");
}
HW_DEVICE void tma_load(u32 destination, const TensorMap& map, u32 mbarrier, CachePolicy policy, i32 c0, i32 c1, i32 c2,
                        i32 c3, i32 c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(destination),
      "l"(&map), "r"(mbarrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "l"(static_cast<u64>(policy))
      : "memory");
}

// Stores a box. What threads wrote there they have fenced (fence_proxy_async) before they met this one. The thread that
// stores commits, and waits before the box is overwritten or the kernel ends.
HW_DEVICE void tma_store(const TensorMap& map, u32 source, i32 c0, i32 c1) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map), "r"(source),
               "r"(c0), "r"(c1)
               : "memory");
}
HW_DEVICE void tma_store(const TensorMap& map, u32 source, i32 c0, i32 c1, i32 c2) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
               "r"(source), "r"(c0), "r"(c1), "r"(c2)
               : "memory");
}
HW_DEVICE void tma_store(const TensorMap& map, u32 source, i32 c0, i32 c1, i32 c2, i32 c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
               "r"(source), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}
HW_DEVICE void tma_store(const TensorMap& map, u32 source, i32 c0, i32 c1, i32 c2, i32 c3, i32 c4) {
  asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(&map),
               "r"(source), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
               : "memory");
}

// Closes a group: all stores this thread issued since the last commit.
HW_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's newest groups may still read shared memory.
template <i32 kPending>
HW_DEVICE void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

}  // namespace hw
