// Exchange between the 32 lanes of a warp. Every lane takes part.
#pragma once
#include <base.cuh>
#include <hw/device.cuh>

namespace hw {

// T: a 4-byte type. The value of lane (lane ^ mask).
template <class T>
HW_DEVICE T shfl_xor(T value, i32 mask) {
  static_assert(sizeof(T) == 4, "shfl_xor moves 4 bytes");
  return __builtin_bit_cast(T, __shfl_xor_sync(0xffffffffu, __builtin_bit_cast(u32, value), mask));
}

// The value of lane `source`.
template <class T>
HW_DEVICE T shfl(T value, i32 source) {
  static_assert(sizeof(T) == 4, "shfl moves 4 bytes");
  return __builtin_bit_cast(T, __shfl_sync(0xffffffffu, __builtin_bit_cast(u32, value), source));
}

// The value of lane (lane - delta); lanes below delta keep their own.
template <class T>
HW_DEVICE T shfl_up(T value, i32 delta) {
  static_assert(sizeof(T) == 4, "shfl_up moves 4 bytes");
  return __builtin_bit_cast(T, __shfl_up_sync(0xffffffffu, __builtin_bit_cast(u32, value), delta));
}

// Bit l is lane l's predicate.
HW_DEVICE u32 ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }
HW_DEVICE bool any(bool predicate) { return __any_sync(0xffffffffu, predicate) != 0; }
HW_DEVICE bool all(bool predicate) { return __all_sync(0xffffffffu, predicate) != 0; }

// The least and the greatest of the lanes' values: one instruction, whose result the compiler knows to be the same in all.
HW_DEVICE i32 reduce_min(i32 value) { return __reduce_min_sync(0xffffffffu, value); }
HW_DEVICE i32 reduce_max(i32 value) { return __reduce_max_sync(0xffffffffu, value); }

// True for one lane of the warp, always the same; which is not said. Compute capability 9.0 and later. Choose with this
// the lane that issues copies: the compiler then knows that it is one. (PTX ISA, "elect.sync")
HW_DEVICE bool elect_one() {
  u32 chosen;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(chosen));
  return chosen != 0;
}

}  // namespace hw
