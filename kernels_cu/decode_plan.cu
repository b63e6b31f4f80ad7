// Counts the units of work of a decoding step (tile/pieces.cuh), so that decode_sm80.cu shares them out evenly:
//
//   unit_begin[b] = units of the sequences before b,   unit_begin[batch] = of all
//
// Lengths are read here, on the device, at every launch: the host never knows them.
//
//   grid    one block
//   roles   a thread counts one sequence of kThreads at a time, whose sums go from lane to lane and from warp to warp
//
//   shared  a word of 16 bytes a warp: its units, then those of the warps before it are added up from there
#include <base.cuh>
#include <hw/device.cuh>
#include <hw/warp.cuh>
#include <params/decode.cuh>
#include <tile/pieces.cuh>
#include <tile/sequence.cuh>
#include <variant.cuh>

HW_DEVICE i64 join(u32 low, u32 high) { return static_cast<i64>(static_cast<u64>(high) << 32 | low); }

// The sum of the lanes up to this one.
HW_DEVICE i64 sum_of_lanes(i64 value) {
  HW_UNROLL
  for (i32 delta = 1; delta < 32; delta *= 2) {
    const u64 bits = static_cast<u64>(value);
    const u32 low = hw::shfl_up(static_cast<u32>(bits), delta), high = hw::shfl_up(static_cast<u32>(bits >> 32), delta);
    if (hw::lane_idx() >= delta) value += join(low, high);
  }
  return value;
}

HW_KERNEL(Variant::kThreads) cuflash_decode_plan(HW_GRID_CONSTANT DecodeParams p) {
  constexpr i32 kWarps = Variant::kThreads / 32;
  const u32 smem = hw::smem_base();
  const i32 warp = hw::warp_idx();
  i64 before = 0;  // units of the sequences of earlier rounds
  if (hw::thread_idx() == 0) hw::store_global(p.unit_begin, before);
  HW_NO_UNROLL
  for (i32 first = 0; first < p.batch; first += Variant::kThreads) {
    const i32 sequence = first + hw::thread_idx();
    const i64 own = sequence < p.batch ? units_of_sequence(p, read_sequence<true>(p, sequence)) : 0;
    i64 sum = sum_of_lanes(own);
    if (hw::lane_idx() == 31) {
      const u64 bits = static_cast<u64>(sum);
      hw::store_shared(smem + static_cast<u32>(16 * warp),
                       u32x4{{static_cast<u32>(bits), static_cast<u32>(bits >> 32), 0, 0}});
    }
    // sync   sums of warps <-> all warps: they are there
    hw::sync_threads();
    sum += before;
    HW_NO_UNROLL
    for (i32 w = 0; w < kWarps; ++w) {
      const u32x4 bits = hw::load_shared<u32x4>(smem + static_cast<u32>(16 * w));
      const i64 units = join(bits.x[0], bits.x[1]);
      if (w < warp) sum += units;
      before += units;
    }
    if (sequence < p.batch) hw::store_global(p.unit_begin + sequence + 1, sum);
    // sync   sums of warps <-> all warps: nobody reads them any more
    hw::sync_threads();
  }
}
