// Keys and values of tokens written to the places of a cache that the caller names, in place.
//
//   k_cache[s / page_size, s % page_size] = k[i]      s = slot_mapping[i]; likewise v. A negative s, and one behind the
//                                                     cache's end, is nobody's: that token is not written
//
//   grid    (token, part): part 0 writes keys, 1 values. Blocks stride over tokens
//   roles   threads have units of 16 bytes of a token's heads
#include <base.cuh>
#include <hw/device.cuh>
#include <hw/math.cuh>
#include <params/write_kv.cuh>
#include <tile/shared_tile.cuh>
#include <tile/store.cuh>
#include <variant.cuh>

HW_DEVICE i64 slot_of(const WriteKvParams& p, i64 token) {
  return p.slots_are_i64 ? hw::load_global(static_cast<const i64*>(p.slot_mapping) + token)
                         : static_cast<i64>(hw::load_global(static_cast<const i32*>(p.slot_mapping) + token));
}

HW_KERNEL(Variant::kThreads) cuflash_write_kv(HW_GRID_CONSTANT WriteKvParams p) {
  using Element = Variant::Element;
  const bool keys = hw::block_idx_y() == 0;
  const u8* from = static_cast<const u8*>(keys ? p.k : p.v);
  u8* cache = static_cast<u8*>(keys ? p.k_cache : p.v_cache);
  const i64 from_row = keys ? p.k_stride_row : p.v_stride_row, from_head = keys ? p.k_stride_head : p.v_stride_head;
  const i64 to_page = keys ? p.k_cache_stride_page : p.v_cache_stride_page;
  const i64 to_row = keys ? p.k_cache_stride_row : p.v_cache_stride_row;
  const i64 to_head = keys ? p.k_cache_stride_head : p.v_cache_stride_head;
  const i32 row_bytes = (keys ? p.head_dim : p.head_dim_v) * static_cast<i32>(sizeof(Element));
  const i32 units = ceil_div(row_bytes, 16);
  for (i64 token = hw::block_idx_x(); token < p.slots; token += hw::grid_dim_x()) {
    const i64 slot = slot_of(p, token);
    if (slot < 0 || slot >= p.capacity) continue;  // a wrong slot writes to nobody's memory
    const i64 page = slot / p.page_size;
    const u8* row = from + token * from_row;
    u8* place = cache + page * to_page + (slot - page * p.page_size) * to_row;
    for (i32 i = hw::thread_idx(); i < p.heads_kv * units; i += Variant::kThreads) {
      const i32 head = i / units, at = (i - head * units) * 16;
      const u32x4 unit = read_unit<Variant::kLoadBytes>(row + head * from_head + at, row_bytes - at);
      store_unit<Variant::kLoadBytes>(place + head * to_head + at, unit, row_bytes - at);
    }
  }
}
