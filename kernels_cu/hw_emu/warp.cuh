// Twin of hw_cuda/warp.cuh.
#pragma once
#include <base.cuh>
#include <hw/device.cuh>

namespace hw {

template <class T>
HW_DEVICE T shfl_xor(T value, i32 mask, Site site = Site::here()) {
  static_assert(sizeof(T) == 4, "shfl_xor moves 4 bytes");
  const u32 bits = __builtin_bit_cast(u32, value);
  return __builtin_bit_cast(T, cuflash_emu_shuffle(bits, lane_idx() ^ (mask & 31), "shfl_xor", site));
}

template <class T>
HW_DEVICE T shfl(T value, i32 source, Site site = Site::here()) {
  static_assert(sizeof(T) == 4, "shfl moves 4 bytes");
  const u32 bits = __builtin_bit_cast(u32, value);
  return __builtin_bit_cast(T, cuflash_emu_shuffle(bits, source & 31, "shfl", site));
}

template <class T>
HW_DEVICE T shfl_up(T value, i32 delta, Site site = Site::here()) {
  static_assert(sizeof(T) == 4, "shfl_up moves 4 bytes");
  const i32 lane = lane_idx();
  const i32 source = lane < (delta & 31) ? lane : lane - (delta & 31);
  return __builtin_bit_cast(T, cuflash_emu_shuffle(__builtin_bit_cast(u32, value), source, "shfl_up", site));
}

HW_DEVICE u32 ballot(bool predicate, Site site = Site::here()) {
  return cuflash_emu_ballot(predicate, "ballot", site);
}
HW_DEVICE bool any(bool predicate, Site site = Site::here()) {
  return cuflash_emu_ballot(predicate, "any", site) != 0;
}
HW_DEVICE bool all(bool predicate, Site site = Site::here()) {
  return cuflash_emu_ballot(predicate, "all", site) == 0xffffffffu;
}

HW_DEVICE i32 reduce_min(i32 value, Site site = Site::here()) {
  for (i32 mask = 1; mask < 32; mask *= 2) {
    const u32 other = cuflash_emu_shuffle(static_cast<u32>(value), lane_idx() ^ mask, "reduce_min", site);
    value = min_of(value, static_cast<i32>(other));
  }
  return value;
}
HW_DEVICE i32 reduce_max(i32 value, Site site = Site::here()) {
  for (i32 mask = 1; mask < 32; mask *= 2) {
    const u32 other = cuflash_emu_shuffle(static_cast<u32>(value), lane_idx() ^ mask, "reduce_max", site);
    value = max_of(value, static_cast<i32>(other));
  }
  return value;
}

HW_DEVICE bool elect_one(Site site = Site::here()) { return cuflash_emu_elect_one(site); }

}  // namespace hw
