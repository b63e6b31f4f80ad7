// New keys and values written into a cache, in place, behind those that are there; before attention reads it. What else
// that attention needs and only the device knows: the queries rotated, and how many keys each sequence has then.
//
//   cache[before + i] = new[i]      slot n of sequence b is row n % page_size of page page_table[b, n / page_size]
//   seqused_k = before + new - leftpad
//   rotated = (a cos - b sin, a sin + b cos)      for each pair (a, b) of a new key's, or query's, first rotary_dim
//                                                 elements: in float32, each product rounded, then once to Element
//
//   grid    (rows, part, sequence): part 0 appends keys, 1 values, 2 rotates queries. Blocks stride over rows
//   roles   threads have units of 16 bytes of a row's heads
#include <base.cuh>
#include <hw/device.cuh>
#include <hw/math.cuh>
#include <params/append_kv.cuh>
#include <tile/shared_tile.cuh>
#include <tile/store.cuh>
#include <variant.cuh>

constexpr i32 kKeys = 0, kQueries = 2;

// The rows of a sequence: the first one in a packed array, or which sequence of a dense one.
struct Rows {
  i32 dense_idx;
  i32 begin;
  i32 count;
};

HW_DEVICE Rows rows_of(const i32* cu_seqlens, i32 dense_count, i32 sequence) {
  if (cu_seqlens == nullptr) return Rows{sequence, 0, dense_count};
  const i32 begin = hw::load_global(cu_seqlens + sequence);
  return Rows{0, begin, hw::load_global(cu_seqlens + sequence + 1) - begin};
}

// Element j of a unit.
template <class Element>
HW_DEVICE float element_of(u32x4 unit, i32 j) {
  if constexpr (sizeof(Element) == 4) {
    return hw::bits_float(unit.x[j]);
  } else {
    return hw::to_float(Element{static_cast<u16>(unit.x[j / 2] >> 16 * (j % 2))});
  }
}

// Element j of a row of cos or sin.
template <class Element>
HW_DEVICE float read_table(const AppendParams& p, const u8* row, i32 j) {
  return p.tables_are_element ? hw::to_float(hw::load_global(reinterpret_cast<const Element*>(row) + j))
                              : hw::load_global(reinterpret_cast<const float*>(row) + j);
}

// The unit whose first element is element `first` of a row, rotated to a position.
template <class Element>
HW_DEVICE u32x4 rotate(const AppendParams& p, u32x4 unit, const u8* row, i32 first, i32 position) {
  constexpr i32 kElements = 16 / static_cast<i32>(sizeof(Element));
  const i32 half = p.rotary_dim / 2;
  const u8* cos_row = static_cast<const u8*>(p.rotary_cos) + position * p.cos_stride;
  const u8* sin_row = static_cast<const u8*>(p.rotary_sin) + position * p.sin_stride;
  float rotated[kElements];
  HW_UNROLL
  for (i32 j = 0; j < kElements; ++j) {
    const i32 e = first + j;
    const float x = element_of<Element>(unit, j);
    rotated[j] = x;
    if (e < p.rotary_dim) {
      const bool is_a = p.interleaved ? j % 2 == 0 : e < half;
      const i32 pair = p.interleaved ? e / 2 : is_a ? e : e - half;
      const i32 other = is_a ? e + half : e - half;
      const float y = p.interleaved ? element_of<Element>(unit, j ^ 1)
                                    : hw::to_float(hw::load_global(reinterpret_cast<const Element*>(row) + other));
      const float xc = hw::mul(x, read_table<Element>(p, cos_row, pair));
      const float ys = hw::mul(y, read_table<Element>(p, sin_row, pair));
      rotated[j] = is_a ? xc - ys : xc + ys;
    }
  }
  HW_UNROLL
  for (i32 i = 0; i < 4; ++i) {
    if constexpr (sizeof(Element) == 4) {
      unit.x[i] = hw::float_bits(rotated[i]);
    } else {
      unit.x[i] = hw::pack2<Element>(rotated[2 * i], rotated[2 * i + 1]);
    }
  }
  return unit;
}

// One row, all its heads. position: to rotate to; below 0: the row is copied.
template <class V>
HW_DEVICE void move_row(const AppendParams& p, const u8* from, i64 from_stride_head, u8* to, i64 to_stride_head,
                        i32 heads, i32 dim, i32 position) {
  using Element = typename V::Element;
  const i32 row_bytes = dim * static_cast<i32>(sizeof(Element)), units = ceil_div(row_bytes, 16);
  for (i32 i = hw::thread_idx(); i < heads * units; i += V::kThreads) {
    const i32 head = i / units, at = (i - head * units) * 16;
    const u8* row = from + head * from_stride_head;
    u32x4 unit = read_unit<V::kLoadBytes>(row + at, row_bytes - at);
    const i32 first = at / static_cast<i32>(sizeof(Element));
    if (position >= 0 && first < p.rotary_dim) unit = rotate<Element>(p, unit, row, first, position);
    store_unit<V::kLoadBytes>(to + head * to_stride_head + at, unit, row_bytes - at);
  }
}

template <class V>
HW_DEVICE void append_rows(const AppendParams& p, i32 sequence, bool keys, const Rows& rows, i32 before, i32 start) {
  const void* array = keys ? p.k : p.v;
  const i64 stride_batch = keys ? p.k_stride_batch : p.v_stride_batch;
  const i64 stride_row = keys ? p.k_stride_row : p.v_stride_row;
  const i64 stride_page = keys ? p.k_cache_stride_batch : p.v_cache_stride_batch;
  const i64 stride_slot = keys ? p.k_cache_stride_row : p.v_cache_stride_row;
  const u8* from = static_cast<const u8*>(array) + rows.dense_idx * stride_batch + rows.begin * stride_row;
  u8* cache = static_cast<u8*>(keys ? p.k_cache : p.v_cache);
  const bool rotated = keys && p.rotary_cos != nullptr;
  for (i32 i = hw::block_idx_x(); i < rows.count; i += hw::grid_dim_x()) {
    const i32 slot = before + i;
    if (slot < 0 || slot >= p.capacity) continue;  // a wrong length writes to nobody's memory
    const i32 column = slot / p.page_size;
    i32 page = sequence;
    if (p.page_table != nullptr) page = hw::load_global(p.page_table + sequence * p.page_table_stride + column);
    u8* to = cache + page * stride_page + (slot - column * p.page_size) * stride_slot;
    move_row<V>(p, from + i * stride_row, keys ? p.k_stride_head : p.v_stride_head, to,
                keys ? p.k_cache_stride_head : p.v_cache_stride_head, p.heads_kv, keys ? p.head_dim : p.head_dim_v,
                rotated ? start + i : -1);
  }
}

template <class V>
HW_DEVICE void rotate_queries(const AppendParams& p, const Rows& rows, i32 start) {
  const u8* from = static_cast<const u8*>(p.q) + rows.dense_idx * p.q_stride_batch + rows.begin * p.q_stride_row;
  u8* to = static_cast<u8*>(p.q_rotated) + rows.dense_idx * p.q_rotated_stride_batch +
           rows.begin * p.q_rotated_stride_row;
  for (i32 i = hw::block_idx_x(); i < rows.count; i += hw::grid_dim_x()) {
    move_row<V>(p, from + i * p.q_stride_row, p.q_stride_head, to + i * p.q_rotated_stride_row, p.q_rotated_stride_head,
                p.heads_q, p.head_dim, start + i * p.advance);
  }
}

HW_KERNEL(Variant::kThreads) cuflash_append_kv(HW_GRID_CONSTANT AppendParams p) {
  const i32 part = hw::block_idx_y(), sequence = hw::block_idx_z();
  const i32 before =
      p.cache_seqlens == nullptr ? p.cache_seqlens_value : hw::load_global(p.cache_seqlens + sequence);
  const i32 start = p.rotary_seqlens == nullptr ? before : hw::load_global(p.rotary_seqlens + sequence);
  if (part == kQueries) {
    rotate_queries<Variant>(p, rows_of(p.cu_seqlens_q, p.q_len, sequence), start);
    return;
  }
  const Rows fresh = rows_of(p.cu_seqlens_k_new, p.new_len, sequence);
  if (p.k != nullptr) append_rows<Variant>(p, sequence, part == kKeys, fresh, before, start);
  if (part == kKeys && hw::block_idx_x() == 0 && hw::thread_idx() == 0) {
    const i32 pad = p.cache_leftpad == nullptr ? 0 : hw::load_global(p.cache_leftpad + sequence);
    if (p.seqused_k != nullptr) {
      hw::store_global(p.seqused_k + sequence, max_of(0, min_of(before + fresh.count, p.capacity) - pad));
    }
    if (p.pages != nullptr) hw::store_global(p.pages + sequence, sequence);
  }
}
