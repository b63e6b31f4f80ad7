// S = Q K^T by tensor copies and warpgroup products: a producer and two consumers around a ring of stages. For tests.
//
//   q [rows, 128]    k [keys, 128]    s [rows, keys], all of 16 bits; a block: 128 rows, all keys, 64 at a time
//
// Roles        warp 0 (of warpgroup 0) loads; warpgroup 1, 2: rows 0 .. 63, 64 .. 127 of the block's
// Shared       Q [2 chunks][128 rows], K [stages][2 chunks][64 keys], S [2 warpgroups][64 rows], words, mbarriers
// mbarriers    q_full, k_full[stage]: 1 arrival and the boxes' bytes    k_empty[stage]: 8 arrivals, one a consumer warp
// Named        1 + warpgroup, 128 threads: the warpgroup has written its S, or may write it again
#include <base.cuh>
#include <hw/barrier.cuh>
#include <hw/device.cuh>
#include <hw/math.cuh>
#include <hw/matrix.cuh>
#include <hw/tma.cuh>
#include <hw/warp.cuh>
#include <hw/wgmma.cuh>
#include <tile/descriptor.cuh>

struct PipelineParams {
  TensorMap q;  // box 128 rows of 64
  TensorMap k;  // box 64 rows of 64
  TensorMap s;  // box 64 rows of 64
  i32 tiles;    // of 64 keys
};

using Element = hw::Bfloat16;
using Rows = Chunk<128>;
constexpr i32 kStages = 3, kDim = 128, kChunks = kDim / Rows::kElements;
constexpr i32 kQueryBytes = 128 * kDim * 2, kKeyBytes = 64 * kDim * 2, kScoreBytes = 64 * 64 * 2;
constexpr u32 kQuery = 0, kKey = kQuery + kQueryBytes, kScore = kKey + kStages * kKeyBytes;
constexpr u32 kWords = kScore + 2 * kScoreBytes, kQueryFull = kWords + 16, kKeyFull = kQueryFull + 8;
constexpr u32 kKeyEmpty = kKeyFull + 8 * kStages, kSharedBytes = kKeyEmpty + 8 * kStages;

// A place in the ring: `phase` is the parity of the pass over the stages.
struct Place {
  i32 stage = 0;
  u32 phase = 0;
  HW_DEVICE void advance() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

HW_DEVICE void produce(const PipelineParams& params, u32 smem) {
  // The consumers' first products need Q and the first K; both are on their way before anything is waited for.
  hw::mbarrier_arrive_expect_tx(smem + kQueryFull, kQueryBytes);
  for (i32 c = 0; c < kChunks; ++c)
    hw::tma_load(smem + kQuery + c * 128 * Rows::kBytes, params.q, smem + kQueryFull, hw::CachePolicy::kEvictFirst,
                 c * Rows::kElements, hw::block_idx_x() * 128);
  Place at;
  for (i32 i = params.tiles - 1; i >= 0; --i) {
    const u32 full = smem + kKeyFull + 8 * at.stage, key = smem + kKey + at.stage * kKeyBytes;
    hw::mbarrier_wait(smem + kKeyEmpty + 8 * at.stage, at.phase ^ 1);  // consumers: have read the stage
    hw::store_shared(smem + kWords + 4 * at.stage, i);
    hw::mbarrier_arrive_expect_tx(full, kKeyBytes);  // to the consumers
    for (i32 c = 0; c < kChunks; ++c)
      hw::tma_load(key + c * 64 * Rows::kBytes, params.k, full, hw::CachePolicy::kEvictLast, c * Rows::kElements,
                   i * 64);
    at.advance();
  }
}

HW_DEVICE void consume(const PipelineParams& params, u32 smem, i32 group) {
  const i32 thread = hw::thread_idx() % 128, lane = hw::lane_idx(), warp = thread / 32;
  const u32 query = Rows::k_major(smem + kQuery + group * 64 * Rows::kBytes);
  const u32 score = smem + kScore + group * kScoreBytes;
  hw::mbarrier_wait(smem + kQueryFull, 0);  // producer: Q has landed
  Place at;
  for (i32 i = 0; i < params.tiles; ++i) {
    // Through shfl: the compiler then knows it to be one for the warp, and keeps descriptors in uniform registers.
    const u32 key = hw::shfl(Rows::k_major(smem + kKey + at.stage * kKeyBytes), 0);
    hw::mbarrier_wait(smem + kKeyFull + 8 * at.stage, at.phase);  // producer: K and the word have landed
    const i32 tile = hw::load_shared<i32>(smem + kWords + 4 * at.stage);

    float s[32];
    hw::wgmma_fence();
    HW_UNROLL
    for (i32 k = 0; k < kDim; k += 16)
      hw::wgmma_ss<Element, hw::Major::kK, hw::Major::kK>(s, Rows::descriptor(query + Rows::k_step(k, 128)),
                                                          Rows::descriptor(key + Rows::k_step(k, 64)), k > 0);
    hw::wgmma_commit();
    hw::wgmma_wait<0>();
    if (lane == 0) hw::mbarrier_arrive(smem + kKeyEmpty + 8 * at.stage);  // to the producer
    at.advance();

    if (warp == 0 && hw::elect_one()) hw::bulk_wait_read<0>();
    hw::named_sync(1 + group, 128);  // the thread that stores: the last S has been read
    HW_UNROLL
    for (i32 j = 0; j < 4; ++j) {
      u32 r[4];
      HW_UNROLL
      for (i32 e = 0; e < 4; ++e) r[e] = hw::pack2<Element>(s[8 * j + 2 * e], s[8 * j + 2 * e + 1]);
      hw::stmatrix_x4(score + Rows::unit_at(16 * warp + (lane & 15), 2 * j + (lane >> 4)), r);
    }
    hw::fence_proxy_async();
    hw::named_sync(1 + group, 128);  // the warpgroup: all of S is written
    if (warp == 0 && hw::elect_one()) {
      hw::tma_store(params.s, score, tile * 64, hw::block_idx_x() * 128 + group * 64);
      hw::bulk_commit();
    }
  }
  if (warp == 0 && hw::elect_one()) hw::bulk_wait_read<0>();
}

HW_KERNEL(384) cuflash_pipeline(HW_GRID_CONSTANT PipelineParams params) {
  const u32 smem = hw::smem_base();
  if (hw::thread_idx() == 0) {
    hw::mbarrier_init(smem + kQueryFull, 1);
    for (i32 i = 0; i < kStages; ++i) {
      hw::mbarrier_init(smem + kKeyFull + 8 * i, 1);
      hw::mbarrier_init(smem + kKeyEmpty + 8 * i, 8);
    }
    hw::fence_mbarrier_init();
    hw::prefetch_tensor_map(params.q);
    hw::prefetch_tensor_map(params.k);
  }
  hw::sync_threads();
  const i32 group = hw::shfl(hw::warp_idx() / 4, 0);  // the compiler then knows it is one for the warp
  if (group == 0) {
    hw::register_dealloc<40>();
    if (hw::warp_idx() == 0 && hw::elect_one()) produce(params, smem);
  } else {
    hw::register_alloc<232>();
    consume(params, smem, group - 1);
  }
}
