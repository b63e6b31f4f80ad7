// What the twins and a compiled kernel know of the emulator: a call for each instruction that meets other threads or
// touches memory. The definitions are in runtime.cpp, compiled once; this header stays small because every kernel
// compiles it.
#pragma once
#include <base.cuh>

namespace hw {

// Where in the kernel an instruction stands. As a default argument it is the place of the call.
struct Site {
  const char* file;
  i32 line;

  static constexpr Site here(const char* file = __builtin_FILE(), i32 line = __builtin_LINE()) { return {file, line}; }
};

}  // namespace hw

namespace emu {

// The part of a thread's record that kernels read.
struct Thread {
  i32 index;  // in the block; the blocks of a cluster run as one, whose threads are theirs one after the other
  i32 rank;   // of its block in the cluster
  i32 first;  // its block's first thread
  u32 shared;  // where its block's shared memory begins
  i32 block_idx[3];
  i32 grid_dim[3];
};

// Each thread has a stack of kStackBytes at a multiple of kStackBytes; its record lies near the stack's low end, so the
// stack pointer alone finds it. Records and stack tops are shifted by a colour: at equal offsets, all threads of a
// block would compete for the same few sets of the cache.
constexpr u64 kStackBytes = 512 * 1024;
constexpr u64 kColours = 64;
constexpr u64 kColourBytes = 1216;

inline __attribute__((always_inline)) Thread* this_thread() {
  const u64 here = reinterpret_cast<u64>(__builtin_frame_address(0));
  return reinterpret_cast<Thread*>((here & ~(kStackBytes - 1)) + (here / kStackBytes % kColours) * kColourBytes);
}

// The first address of dynamic shared memory, and how far from it that of the next block in a cluster is: as on the
// hardware, where an address has more bits in a cluster than a matrix descriptor has place for.
constexpr u32 kSharedBase = 1024, kClusterStride = 1 << 24;

// Flags of cuflash_emu_wgmma.
constexpr u32 kWgmmaHalf = 1, kWgmmaFromRegisters = 2, kWgmmaTransposeA = 4, kWgmmaTransposeB = 8;
constexpr u32 kWgmmaAccumulate = 16;

}  // namespace emu

extern "C" {
void cuflash_emu_sync_threads(hw::Site site);
void cuflash_emu_sync_warp(hw::Site site);
void cuflash_emu_cluster_sync(hw::Site site);

// The value of lane `source` (0..31) of those that met here; `name` is the instruction's, for reports.
u32 cuflash_emu_shuffle(u32 value, i32 source, const char* name, hw::Site site);
u32 cuflash_emu_ballot(bool predicate, const char* name, hw::Site site);

void cuflash_emu_load_shared(void* value, u32 address, u32 bytes, hw::Site site);
void cuflash_emu_store_shared(const void* value, u32 address, u32 bytes, hw::Site site);
void cuflash_emu_load_global(void* value, const void* pointer, u32 bytes, hw::Site site);
void cuflash_emu_store_global(const void* value, void* pointer, u32 bytes, hw::Site site);
void cuflash_emu_atomic_add(float* pointer, float value, hw::Site site);
void cuflash_emu_atomic_add4(float* pointer, const float* values, hw::Site site);
void cuflash_emu_atomic_add_u64(u64* pointer, u64 value, hw::Site site);

void cuflash_emu_bad_index(i32 index, i32 size, hw::Site site);

void cuflash_emu_cp_async(u32 destination, const void* source, u32 bytes, i32 source_bytes, hw::Site site);
void cuflash_emu_cp_async_commit(hw::Site site);
void cuflash_emu_cp_async_wait(i32 pending, hw::Site site);

void cuflash_emu_ldmatrix_x4(u32* r, u32 address, hw::Site site);
void cuflash_emu_ldmatrix_x4_trans(u32* r, u32 address, hw::Site site);
void cuflash_emu_stmatrix_x4(const u32* r, u32 address, hw::Site site);
void cuflash_emu_mma_m16n8k16_f16(float* d, const u32* a, u32 b0, u32 b1, hw::Site site);
void cuflash_emu_mma_m16n8k16_bf16(float* d, const u32* a, u32 b0, u32 b1, hw::Site site);
void cuflash_emu_mma_m16n8k8_tf32(float* d, const u32* a, u32 b0, u32 b1, hw::Site site);

void cuflash_emu_mbarrier_init(u32 address, u32 count, hw::Site site);
void cuflash_emu_fence_mbarrier_init(hw::Site site);
void cuflash_emu_mbarrier_arrive(u32 address, hw::Site site);
void cuflash_emu_mbarrier_arrive_at(u32 address, i32 rank, hw::Site site);
void cuflash_emu_mbarrier_arrive_expect_tx(u32 address, u32 bytes, hw::Site site);
void cuflash_emu_mbarrier_wait(u32 address, u32 parity, hw::Site site);
void cuflash_emu_named_sync(i32 id, i32 threads, hw::Site site);
void cuflash_emu_named_arrive(i32 id, i32 threads, hw::Site site);
void cuflash_emu_fence_proxy_async(hw::Site site);
bool cuflash_emu_elect_one(hw::Site site);
void cuflash_emu_set_registers(i32 count, bool more, hw::Site site);

// blocks: bit r is the block of rank r in the cluster; 0: the thread's own.
void cuflash_emu_tma_load(u32 destination, const void* map, u32 mbarrier, u32 blocks, i32 rank, const i32* coordinates,
                          hw::Site site);
void cuflash_emu_tma_store(const void* map, u32 source, i32 rank, const i32* coordinates, hw::Site site);
void cuflash_emu_bulk_commit(hw::Site site);
void cuflash_emu_bulk_wait(i32 pending, hw::Site site);
void cuflash_emu_prefetch_tensor_map(const void* map, hw::Site site);

void cuflash_emu_wgmma(float* d, i32 n, const u32* a_registers, u64 a, u64 b, u32 flags, hw::Site site);
void cuflash_emu_wgmma_fence(hw::Site site);
void cuflash_emu_wgmma_commit(hw::Site site);
void cuflash_emu_wgmma_wait(i32 pending, hw::Site site);

u32 cuflash_emu_half_bits(float x);
float cuflash_emu_half_value(u32 bits);
}
