// What the host tells captured_gradient.cu.
#pragma once
#include <base.cuh>

struct CapturedGradientParams {
  void* sums;  // [size] float, or FixedSum where Variant::kFixed is set
  void* out;   // [size] of the array's dtype; null where sums are cleared
  i64 size;
};
