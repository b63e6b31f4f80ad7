// Twin of hw_cuda/device.cuh.
#pragma once
#include <base.cuh>
#include <hw/runtime.cuh>

#define HW_DEVICE inline __attribute__((always_inline))
#define HW_KERNEL(threads) extern "C" void
#define HW_CLUSTER_KERNEL(threads, blocks) extern "C" void
#define HW_GRID_CONSTANT const
#define HW_UNROLL
#define HW_NO_UNROLL

namespace hw {

HW_DEVICE i32 thread_idx() { return emu::this_thread()->index - emu::this_thread()->first; }
HW_DEVICE i32 lane_idx() { return emu::this_thread()->index & 31; }
HW_DEVICE i32 warp_idx() { return thread_idx() >> 5; }
HW_DEVICE i32 block_idx_x() { return emu::this_thread()->block_idx[0]; }
HW_DEVICE i32 block_idx_y() { return emu::this_thread()->block_idx[1]; }
HW_DEVICE i32 block_idx_z() { return emu::this_thread()->block_idx[2]; }
HW_DEVICE i32 grid_dim_x() { return emu::this_thread()->grid_dim[0]; }
HW_DEVICE i32 grid_dim_y() { return emu::this_thread()->grid_dim[1]; }
HW_DEVICE i32 grid_dim_z() { return emu::this_thread()->grid_dim[2]; }

HW_DEVICE i32 anew(i32 x) { return x; }

HW_DEVICE void sync_threads(Site site = Site::here()) { cuflash_emu_sync_threads(site); }
HW_DEVICE void sync_warp(Site site = Site::here()) { cuflash_emu_sync_warp(site); }

HW_DEVICE u32 smem_base() { return emu::this_thread()->shared; }

template <class T>
HW_DEVICE T load_shared(u32 address, Site site = Site::here()) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16,
                "load_shared moves 2, 4, 8 or 16 bytes");
  T value;
  cuflash_emu_load_shared(&value, address, sizeof(T), site);
  return value;
}

template <class T>
HW_DEVICE void store_shared(u32 address, T value, Site site = Site::here()) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 16, "store_shared moves 2, 4 or 16 bytes");
  cuflash_emu_store_shared(&value, address, sizeof(T), site);
}

template <class T>
HW_DEVICE T load_global(const T* pointer, Site site = Site::here()) {
  T value;
  cuflash_emu_load_global(&value, pointer, sizeof(T), site);
  return value;
}

template <class T>
HW_DEVICE void store_global(T* pointer, T value, Site site = Site::here()) {
  cuflash_emu_store_global(&value, pointer, sizeof(T), site);
}

HW_DEVICE i32 checked_index(i32 index, i32 size, Site site = Site::here()) {
  if (index < 0 || index >= size) cuflash_emu_bad_index(index, size, site);
  return index;
}

HW_DEVICE void atomic_add(float* pointer, float value, Site site = Site::here()) {
  cuflash_emu_atomic_add(pointer, value, site);
}
HW_DEVICE void atomic_add4(float* pointer, const float (&values)[4], Site site = Site::here()) {
  cuflash_emu_atomic_add4(pointer, values, site);
}
HW_DEVICE void atomic_add(u64* pointer, u64 value, Site site = Site::here()) {
  cuflash_emu_atomic_add_u64(pointer, value, site);
}

}  // namespace hw
