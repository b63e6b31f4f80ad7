// Where a thread is, the block's barrier, and plain access to shared and global memory.
// Shared memory is named by 32-bit addresses, as the instructions name it; global memory by pointers.
#pragma once
#include <base.cuh>

#define HW_DEVICE __device__ __forceinline__
#define HW_KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads, 1)
// A kernel whose blocks run in clusters of so many along x (hw/cluster.cuh); the grid is a multiple of that.
#define HW_CLUSTER_KERNEL(threads, blocks) \
  extern "C" __global__ void __cluster_dims__(blocks, 1, 1) __launch_bounds__(threads, 1)
#define HW_GRID_CONSTANT const __grid_constant__
#define HW_UNROLL _Pragma("unroll")
#define HW_NO_UNROLL _Pragma("unroll 1")

namespace hw {

extern __shared__ __align__(1024) u8 dynamic_shared_memory[];

HW_DEVICE i32 thread_idx() { return static_cast<i32>(threadIdx.x); }
HW_DEVICE i32 lane_idx() { return static_cast<i32>(threadIdx.x) & 31; }
HW_DEVICE i32 warp_idx() { return static_cast<i32>(threadIdx.x) >> 5; }
HW_DEVICE i32 block_idx_x() { return static_cast<i32>(blockIdx.x); }
HW_DEVICE i32 block_idx_y() { return static_cast<i32>(blockIdx.y); }
HW_DEVICE i32 block_idx_z() { return static_cast<i32>(blockIdx.z); }
HW_DEVICE i32 grid_dim_x() { return static_cast<i32>(gridDim.x); }
HW_DEVICE i32 grid_dim_y() { return static_cast<i32>(gridDim.y); }
HW_DEVICE i32 grid_dim_z() { return static_cast<i32>(gridDim.z); }

// x, of which the compiler does not know that it was had before: what is worked out of it is worked out again, not kept.
HW_DEVICE i32 anew(i32 x) {
  asm volatile("" : "+r"(x));
  return x;
}

// All threads of the block meet; what any wrote before is seen by all after.
HW_DEVICE void sync_threads() { __syncthreads(); }
// All lanes of the warp meet, likewise.
HW_DEVICE void sync_warp() { __syncwarp(); }

// The address of the block's dynamic shared memory, a multiple of 1,024.
HW_DEVICE u32 smem_base() { return static_cast<u32>(__cvta_generic_to_shared(dynamic_shared_memory)); }

// T: a trivially copyable type of 2, 4, 8 or 16 bytes. The address is a multiple of its size.
template <class T>
HW_DEVICE T load_shared(u32 address) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16,
                "load_shared moves 2, 4, 8 or 16 bytes");
  T value;
  if constexpr (sizeof(T) == 2) {
    u16 bits;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(bits) : "r"(address) : "memory");
    value = __builtin_bit_cast(T, bits);
  } else if constexpr (sizeof(T) == 4) {
    u32 bits;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(bits) : "r"(address) : "memory");
    value = __builtin_bit_cast(T, bits);
  } else if constexpr (sizeof(T) == 8) {
    u64 bits;
    asm volatile("ld.shared.u64 %0, [%1];" : "=l"(bits) : "r"(address) : "memory");
    value = __builtin_bit_cast(T, bits);
  } else {
    u32x4 bits;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(bits.x[0]), "=r"(bits.x[1]), "=r"(bits.x[2]), "=r"(bits.x[3])
                 : "r"(address)
                 : "memory");
    value = __builtin_bit_cast(T, bits);
  }
  return value;
}

// T: of 2, 4 or 16 bytes.
template <class T>
HW_DEVICE void store_shared(u32 address, T value) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 16, "store_shared moves 2, 4 or 16 bytes");
  if constexpr (sizeof(T) == 2) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(__builtin_bit_cast(u16, value)) : "memory");
  } else if constexpr (sizeof(T) == 4) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(__builtin_bit_cast(u32, value)) : "memory");
  } else {
    const u32x4 bits = __builtin_bit_cast(u32x4, value);
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(bits.x[0]), "r"(bits.x[1]),
                 "r"(bits.x[2]), "r"(bits.x[3])
                 : "memory");
  }
}

// T: a trivially copyable type of 1, 2, 4, 8 or 16 bytes. The pointer is aligned to its size.
template <class T>
HW_DEVICE T load_global(const T* pointer) {
  return *pointer;
}

template <class T>
HW_DEVICE void store_global(T* pointer, T value) {
  *pointer = value;
}

// An index into an axis of `size` elements (at least 1), from Python code that nobody has checked: one that is outside is
// brought inside, and the emulator reports it.
HW_DEVICE i32 checked_index(i32 index, i32 size) {
  return static_cast<i32>(min_of(static_cast<u32>(index), static_cast<u32>(size) - 1u));
}

// *pointer += value, one of many that do so at a time, in no order. Denormals are flushed. (PTX ISA, "red")
HW_DEVICE void atomic_add(float* pointer, float value) {
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(pointer), "f"(value) : "memory");
}
// The same of four neighbours, at a multiple of 16 bytes; each is added by itself. Compute capability 9.0 and later.
HW_DEVICE void atomic_add4(float* pointer, const float (&values)[4]) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(pointer), "f"(values[0]), "f"(values[1]),
               "f"(values[2]), "f"(values[3])
               : "memory");
}
HW_DEVICE void atomic_add(u64* pointer, u64 value) {
  asm volatile("red.global.add.u64 [%0], %1;" ::"l"(pointer), "l"(value) : "memory");
}

}  // namespace hw
