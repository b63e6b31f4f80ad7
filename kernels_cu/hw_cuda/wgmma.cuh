// Matrix products of a warpgroup: wgmma, m64nNk16 of 16-bit floats, summed in float32. Compute capability 9.0a.
// All four warps come, converged. (PTX ISA, "wgmma.mma_async")
//
//   hw::wgmma_pin(d);                                             // where the products add to it
//   hw::wgmma_fence();                                            // accumulators and registers are ready
//   hw::wgmma_ss<Element, hw::Major::kK, hw::Major::kK>(d, a, b, false);   // d = a b, and more of them
//   hw::wgmma_commit();                                           // they are a group
//   hw::wgmma_wait<0>();                                          // the operands' memory may be overwritten
//   hw::wgmma_pin(d);                                             // d may be used
//
// d: the 64 x N accumulators, N / 2 a thread, N = 8, 16, ... 256; thread 32 w + 4 g + t of the warpgroup holds
//   d[4 j], d[4 j + 1] = D[16 w + g][8 j + 2 t], D[..][8 j + 2 t + 1]    d[4 j + 2], d[4 j + 3] = the same of row + 8
// Nobody may touch d between the first product into it and the wait: pass the array itself, not a copy.
//
// An operand in shared memory is named by a descriptor (PTX ISA, "Matrix Descriptor Format"); see tile/descriptor.cuh.
// Whoever waits may only tell others that it has read: each warp for itself.
#pragma once
#include <base.cuh>
#include <hw/device.cuh>
#include <hw/math.cuh>

namespace hw {

// How an operand lies in shared memory: kK: a row (of a) or column (of b) at a time, along k; kMn: across it.
enum class Major { kK, kMn };

// The asm text below holds every accumulator that an instruction can have; N of them count. After the last one of these
// the text `/*` (kWgmmaStop) begins a comment that ends behind the 128th.
template <bool kStop>
constexpr char kWgmmaStop[] = "";
template <>
constexpr char kWgmmaStop<true>[] = "/*";

template <i32 kDigit, bool kShown>
constexpr char kWgmmaDigit[] = {static_cast<char>('0' + kDigit), 0};
template <i32 kDigit>
constexpr char kWgmmaDigit<kDigit, false>[] = "";

template <class Element>
constexpr char kWgmmaType[] = "";
template <>
constexpr char kWgmmaType<Half>[] = "f16";
template <>
constexpr char kWgmmaType<Bfloat16>[] = "bf16";

#define WGMMA_ACCUMULATORS                                                                                             \
  "%0, %1, %2, %3 %132 " ", %4, %5, %6, %7 %133 "                                                                      \
  ", %8, %9, %10, %11 %134 " ", %12, %13, %14, %15 %135 "                                                              \
  ", %16, %17, %18, %19 %136 " ", %20, %21, %22, %23 %137 "                                                            \
  ", %24, %25, %26, %27 %138 " ", %28, %29, %30, %31 %139 "                                                            \
  ", %32, %33, %34, %35 %140 " ", %36, %37, %38, %39 %141 "                                                            \
  ", %40, %41, %42, %43 %142 " ", %44, %45, %46, %47 %143 "                                                            \
  ", %48, %49, %50, %51 %144 " ", %52, %53, %54, %55 %145 "                                                            \
  ", %56, %57, %58, %59 %146 " ", %60, %61, %62, %63 %147 "                                                            \
  ", %64, %65, %66, %67 %148 " ", %68, %69, %70, %71 %149 "                                                            \
  ", %72, %73, %74, %75 %150 " ", %76, %77, %78, %79 %151 "                                                            \
  ", %80, %81, %82, %83 %152 " ", %84, %85, %86, %87 %153 "                                                            \
  ", %88, %89, %90, %91 %154 " ", %92, %93, %94, %95 %155 "                                                            \
  ", %96, %97, %98, %99 %156 " ", %100, %101, %102, %103 %157 "                                                        \
  ", %104, %105, %106, %107 %158 " ", %108, %109, %110, %111 %159 "                                                    \
  ", %112, %113, %114, %115 %160 " ", %116, %117, %118, %119 %161 "                                                    \
  ", %120, %121, %122, %123 %162 " ", %124, %125, %126, %127 %163 "
#define WGMMA_OUTPUT(i) "+f"(*((i) < kCount ? d + (i) : &none))
#define WGMMA_OUTPUTS_4(i) WGMMA_OUTPUT(i), WGMMA_OUTPUT(i + 1), WGMMA_OUTPUT(i + 2), WGMMA_OUTPUT(i + 3)
#define WGMMA_OUTPUTS_16(i) WGMMA_OUTPUTS_4(i), WGMMA_OUTPUTS_4(i + 4), WGMMA_OUTPUTS_4(i + 8), WGMMA_OUTPUTS_4(i + 12)
#define WGMMA_OUTPUTS_64(i) \
  WGMMA_OUTPUTS_16(i), WGMMA_OUTPUTS_16(i + 16), WGMMA_OUTPUTS_16(i + 32), WGMMA_OUTPUTS_16(i + 48)
#define WGMMA_OUTPUTS WGMMA_OUTPUTS_64(0), WGMMA_OUTPUTS_64(64)
#define WGMMA_STOP(i) "C"(kWgmmaStop<n == 8 * (i)>)
#define WGMMA_STOPS_4(i) WGMMA_STOP(i), WGMMA_STOP(i + 1), WGMMA_STOP(i + 2), WGMMA_STOP(i + 3)
#define WGMMA_STOPS_16(i) WGMMA_STOPS_4(i), WGMMA_STOPS_4(i + 4), WGMMA_STOPS_4(i + 8), WGMMA_STOPS_4(i + 12)
#define WGMMA_STOPS WGMMA_STOPS_16(1), WGMMA_STOPS_16(17)
#define WGMMA_SHAPE "wgmma.mma_async.sync.aligned.m64n%129%130%131k16.f32.%128.%128 "
#define WGMMA_NUMBERS                                                                                                  \
  "C"(kWgmmaType<Element>), "C"(kWgmmaDigit<n / 100, (n >= 100)>), "C"(kWgmmaDigit<n / 10 % 10, (n >= 10)>),          \
      "C"(kWgmmaDigit<n % 10, true>)

// A descriptor of its words: let `high` be a constant.
HW_DEVICE u64 wgmma_descriptor(u32 low, u32 high) {
  u64 descriptor;
  asm("mov.b64 %0, {%1, %2};" : "=l"(descriptor) : "r"(low), "r"(high));
  return descriptor;
}

// Of registers that threads touch before a wgmma_fence and a product uses behind it, or behind a wgmma_wait after a product:
// what stands before this in the text is done before it, what stands behind it after it. Fence and wait alone order
// memory; the compiler may move arithmetic across them. It is no instruction.
template <i32 kCount>
HW_DEVICE void wgmma_pin(float (&registers)[kCount]) {
  HW_UNROLL
  for (i32 i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <i32 kRows, i32 kCount>
HW_DEVICE void wgmma_pin(u32 (&registers)[kRows][kCount]) {
  HW_UNROLL
  for (i32 i = 0; i < kRows * kCount; ++i) asm volatile("" : "+r"(registers[i / kCount][i % kCount])::"memory");
}

// Before the first product, and after threads have touched accumulators or registers that a product then uses, which
// they pin (wgmma_pin).
HW_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes a group: all products since the last commit.
HW_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending of the warp's newest groups are still under way.
template <i32 kPending>
HW_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// d = a b, or d += a b; a [64, 16] and b [16, N] in shared memory.
template <class Element, Major kMajorA, Major kMajorB, i32 kCount>
HW_DEVICE void wgmma_ss(float (&d)[kCount], u64 a, u64 b, bool accumulate) {
  constexpr i32 n = 2 * kCount;
  static_assert(n % 8 == 0 && n >= 8 && n <= 256, "N is a multiple of 8, at most 256");
  float none;
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %164, 0;\n" WGMMA_SHAPE "{" WGMMA_ACCUMULATORS
               "/**/}, %166, %167, p, 1, 1, %168, %165;\n}"
               : WGMMA_OUTPUTS
               : WGMMA_NUMBERS, WGMMA_STOPS, "r"(static_cast<u32>(accumulate)), "n"(static_cast<i32>(kMajorB)), "l"(a),
                 "l"(b), "n"(static_cast<i32>(kMajorA))
               : "memory");
}

// The same with a in registers: of the warp's 16 rows, as mma_m16n8k16 has it (hw/matrix.cuh).
template <class Element, Major kMajorB, i32 kCount>
HW_DEVICE void wgmma_rs(float (&d)[kCount], const u32 (&a)[4], u64 b, bool accumulate) {
  constexpr i32 n = 2 * kCount;
  static_assert(n % 8 == 0 && n >= 8 && n <= 256, "N is a multiple of 8, at most 256");
  float none;
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %164, 0;\n" WGMMA_SHAPE "{" WGMMA_ACCUMULATORS
               "/**/}, {%166, %167, %168, %169}, %170, p, 1, 1, %165;\n}"
               : WGMMA_OUTPUTS
               : WGMMA_NUMBERS, WGMMA_STOPS, "r"(static_cast<u32>(accumulate)), "n"(static_cast<i32>(kMajorB)),
                 "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
               : "memory");
}

}  // namespace hw
