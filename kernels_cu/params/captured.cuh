// What a call's mods captured, eight bytes each: addresses, strides in elements and extents of arrays, numbers, addresses
// of gradients. Which word holds what is written into the generated text (cuflash/trace/emit_c.py).
#pragma once
#include <base.cuh>

constexpr i32 kCapturedWords = 64;

struct Captured {
  u64 words[kCapturedWords];
};
