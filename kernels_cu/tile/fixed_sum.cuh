// A sum that does not depend on the order of what is added, for results that are the same bits every time.
#pragma once
#include <base.cuh>
#include <hw/device.cuh>
#include <hw/math.cuh>

// A 64-bit integer at 2^20 and one at 2^56, for what the first leaves. What neither holds, or is no number, goes to a
// float beside them.
struct FixedSum {
  u64 high, low;
  float beyond, unused;
};

HW_DEVICE void add_fixed(FixedSum* to, float value) {
  if (!(hw::abs(value) < 1.0995116e12f)) {
    hw::atomic_add(&to->beyond, value);
    return;
  }
  const i64 high = hw::to_long(value * 1048576.0f);
  const float rest = value - static_cast<float>(high) * 9.5367432e-7f;
  const i64 low = hw::to_long(rest * 7.2057594e16f);
  if (high != 0) hw::atomic_add(&to->high, static_cast<u64>(high));
  if (low != 0) hw::atomic_add(&to->low, static_cast<u64>(low));
}

HW_DEVICE float value_of(i64 high, i64 low, float beyond) {
  const double total = static_cast<double>(high) * 9.5367431640625e-07 +
                       static_cast<double>(low) * 1.3877787807814457e-17;
  return static_cast<float>(total) + beyond;
}
