// Tensor maps, in the form that the emulator reads (kernels_cu/hw_emu/sm90.cpp).
#include "state.hpp"

namespace {

struct __attribute__((packed)) Map {
  std::uint32_t magic = 0x50414D54;
  std::uint8_t rank, element, swizzle, zero = 0;
  std::uint64_t address;
  std::uint32_t last[5] = {};  // index along each axis
  std::uint16_t box[5] = {}, pad = 0;
  std::uint64_t strides[4] = {};
  char rest[48] = {};
};
static_assert(sizeof(Map) == 128);

int element_bytes(int type) {
  switch (type) {  // CUtensorMapDataType
    case 6: case 9: return 2;  // float16, bfloat16
    case 7: return 4;          // float32
    default: return 0;
  }
}

}  // namespace

// [driver] cuTensorMapEncodeTiled; each rule is of its list of requirements.
API int cuTensorMapEncodeTiled(
    void* result, int type, std::uint32_t rank, void* address, const std::uint64_t* dims, const std::uint64_t* strides,
    const std::uint32_t* box, const std::uint32_t* element_strides, int interleave, int swizzle, int, int) {
  // CUDA_ERROR_INVALID_CONTEXT is among what it returns.
  REQUIRE(in_context());
  auto refused = [](const char* why) { return refuse(kInvalidValue, why); };
  const Address begin = reinterpret_cast<Address>(address);
  // "tensorMap address must be aligned to 64 bytes."
  if (reinterpret_cast<Address>(result) % 64) return refused("tensor map: its own address");
  const int element = element_bytes(type);
  if (!element) return refused("tensor map: the type");
  // "tensorRank must be non-zero and less than or equal to the maximum supported dimensionality of 5."
  if (rank < 1 || rank > 5 || interleave) return refused("tensor map: rank or interleave");
  // "globalAddress, which specifies the starting address of the memory region described, must be 16 byte aligned."
  if (begin % 16) return refused("tensor map: the address");
  if (swizzle < 0 || swizzle > 3) return refused("tensor map: the swizzle");
  Map map;
  map.rank = rank;
  map.element = element;
  map.swizzle = swizzle;
  map.address = begin;
  for (unsigned i = 0; i < rank; i++) {
    // Of globalDim: "must be non-zero and less than or equal to 2^32." Of boxDim: "must be non-zero and less than or
    // equal to 256." Of elementStrides: "must be non-zero and less than or equal to 8." Here each is 1.
    if (!dims[i] || dims[i] > 1ull << 32) return refused("tensor map: the dimensions");
    if (!box[i] || box[i] > 256) return refused("tensor map: the box");
    if (element_strides[i] != 1) return refused("tensor map: strides of elements");
    map.last[i] = static_cast<std::uint32_t>(dims[i] - 1);
    map.box[i] = box[i];
  }
  for (unsigned i = 0; i + 1 < rank; i++) {
    // Of globalStrides: "must be a multiple of 16 and less than 2^40."
    if (strides[i] % 16 || strides[i] >> 40) return refused("tensor map: the strides");
    map.strides[i] = strides[i];
  }
  // Without interleave, boxDim[0] times the size of an element "must be a multiple of 16 bytes." With a swizzle it
  // "must be less than or equal to the swizzle size."
  const unsigned row = box[0] * element;
  if (row % 16 || (swizzle && row > 16u << swizzle)) return refused("tensor map: the box's rows");
  Lock lock(tables);
  // Stricter than the manual: it begins in a device's memory. It may end behind it, as maps of ragged rows do.
  Block* block = block_at(begin);
  if (!block || block->on_host) return refused("tensor map: not of a device's memory");
  memcpy(result, &map, sizeof map);
  note("tensor map rank=%u address=%#llx dims0=%llu", rank, static_cast<unsigned long long>(begin),
       static_cast<unsigned long long>(dims[0]));
  return kSuccess;
}
