// Memory: host memory at addresses of its own, an unmapped hole behind every allocation, and never zero by luck.
#include <sys/mman.h>

#include "state.hpp"

static constexpr std::size_t kGranule = 2 << 20;
static constexpr Address kFirst = 0x200000000000;
static constexpr int kHostSlot = 15;
static constexpr unsigned char kPoison = 0xA5;

static std::map<Address, Block> blocks;

static std::size_t whole(std::size_t bytes) { return (bytes + kGranule - 1) / kGranule * kGranule; }

Block* block_at(Address address) {
  auto next = blocks.upper_bound(address);
  if (next == blocks.begin()) return nullptr;
  Block& block = std::prev(next)->second;
  return address < block.begin + block.bytes ? &block : nullptr;
}

std::vector<Block> device_blocks() {
  Lock lock(tables);
  std::vector<Block> found;
  for (auto& [begin, block] : blocks)
    if (!block.on_host) found.push_back(block);
  return found;
}

static Status allocate(Address* result, std::size_t bytes, int device, bool on_host) {
  static Address next[kHostSlot + 1];
  Lock lock(tables);
  Address& place = next[on_host ? kHostSlot : device];
  if (!place) place = kFirst + (static_cast<Address>(on_host ? kHostSlot : device) << 40);
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE | MAP_NORESERVE;
  void* memory = mmap(reinterpret_cast<void*>(place), whole(bytes), PROT_READ | PROT_WRITE, flags, -1, 0);
  if (memory == MAP_FAILED) return kOutOfMemory;
  *result = place;
  blocks[place] = Block{place, bytes, device, on_host};
  place += whole(bytes) + kGranule;
  // [driver] cuMemAlloc "The memory is not cleared."
  if (bytes <= 64 << 20) memset(memory, kPoison, bytes);
  return kSuccess;
}

static Status release(Address address) {
  Lock lock(tables);
  auto block = blocks.find(address);
  if (block == blocks.end()) return refuse(kInvalidValue, "freed memory that was not allocated, or in its middle");
  munmap(reinterpret_cast<void*>(address), whole(block->second.bytes));
  blocks.erase(block);
  return kSuccess;
}

API int cuMemGetInfo_v2(std::size_t* free, std::size_t* total) {
  REQUIRE(in_context());
  *free = 79ull << 30;
  *total = 80ull << 30;
  return kSuccess;
}

API int cuMemAlloc_v2(Address* result, std::size_t bytes) {
  REQUIRE(in_context());
  REQUIRE(unsafe("cuMemAlloc"));
  // [driver] cuMemAlloc "If bytesize is 0, cuMemAlloc() returns CUDA_ERROR_INVALID_VALUE."
  if (!bytes) return refuse(kInvalidValue, "cuMemAlloc of no bytes");
  if (!settings.allocations) return refuse(kOutOfMemory, "no memory is left");
  if (settings.allocations > 0) settings.allocations--;
  note("malloc %zu", bytes);
  return allocate(result, bytes, current()->device, false);
}

// [driver] cuMemFree, of memory that cuMemAlloc gave: "this API may perform implicit synchronization." All drivers do,
// and CuPy's pool relies on it: whatever may still use the memory runs first.
API int cuMemFree_v2(Address address) {
  REQUIRE(ready());
  if (!address) return kSuccess;
  REQUIRE(unsafe("cuMemFree"));
  run_all();
  note("free %#llx", static_cast<unsigned long long>(address));
  return release(address);
}

API int cuMemHostAlloc(void** result, std::size_t bytes, unsigned) {
  REQUIRE(in_context());
  REQUIRE(unsafe("cuMemHostAlloc"));
  return allocate(reinterpret_cast<Address*>(result), bytes ? bytes : 1, 0, true);
}

API int cuMemFreeHost(void* address) {
  REQUIRE(ready());
  run_all();
  return release(reinterpret_cast<Address>(address));
}

static Status inside(const Block* block, Address begin, std::size_t bytes, const char* beyond) {
  return block && begin + bytes > block->begin + block->bytes ? refuse(kInvalidValue, beyond) : kSuccess;
}

static void move(Address to, Address from, std::size_t bytes) {
  memmove(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes);
}

Status copy(StreamRef stream, Address to, Address from, std::size_t bytes, bool waits) {
  if (!stream) return refuse(kInvalidHandle, "copy on a stream that is none");
  bool from_pageable, to_pageable;
  {
    Lock lock(tables);
    Block *target = block_at(to), *origin = block_at(from);
    REQUIRE(inside(target, to, bytes, "copy beyond the end of its destination"));
    REQUIRE(inside(origin, from, bytes, "copy beyond the end of its source"));
    from_pageable = !origin;
    to_pageable = !target;
  }
  // [guide] Prohibited and Unhandled Operations "Synchronous APIs, such as cudaMemcpy(), enqueue work to the legacy
  // stream and synchronize it before returning." They are invalid during a capture.
  if (waits) REQUIRE(unsafe("a synchronous copy"));
  Work work = [=] {
    move(to, from, bytes);
    return kSuccess;
  };
  // [driver] API synchronization behavior: "If pageable memory must first be staged to pinned memory, the driver may
  // synchronize with the stream and stage the copy into pinned memory." Here it stages and does not synchronize. A
  // graph keeps the address instead.
  if (from_pageable && !stream->capture) {
    auto staged = std::make_shared<std::string>(reinterpret_cast<const char*>(from), bytes);
    work = [=] {
      memcpy(reinterpret_cast<void*>(to), staged->data(), bytes);
      return kSuccess;
    };
  }
  REQUIRE(push(stream, work));
  // [driver] API synchronization behavior, of CUDA 11.1: "For transfers from device memory to pageable host memory, the
  // function will return only once the copy has completed."
  return !stream->capture && (waits || to_pageable) ? run_until(stream, stream->pushed) : kSuccess;
}

API int cuMemcpyAsync(Address to, Address from, std::size_t bytes, Handle stream) {
  REQUIRE(in_context());
  return copy(stream_of(stream), to, from, bytes, false);
}

API int cuMemcpy(Address to, Address from, std::size_t bytes) {
  REQUIRE(in_context());
  return copy(stream_of(0), to, from, bytes, true);
}

API int cuMemsetD8Async(Address to, unsigned char value, std::size_t bytes, Handle handle) {
  REQUIRE(in_context());
  StreamRef stream = stream_of(handle);
  if (!stream) return refuse(kInvalidHandle, "memset on a stream that is none");
  {
    Lock lock(tables);
    Block* target = block_at(to);
    if (!target) return refuse(kInvalidValue, "memset of memory that is not the device's");
    REQUIRE(inside(target, to, bytes, "memset beyond the end of its destination"));
  }
  return push(stream, [=] {
    memset(reinterpret_cast<void*>(to), value, bytes);
    return kSuccess;
  });
}
