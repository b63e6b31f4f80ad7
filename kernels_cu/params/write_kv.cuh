// What the host tells write_kv.cu. Read by Python as params/forward.cuh is; strides count bytes.
#pragma once
#include <base.cuh>

struct WriteKvParams {
  const void* k;             // [tokens, heads_kv, head_dim]
  const void* v;             // [tokens, heads_kv, head_dim_v]
  void* k_cache;             // [pages, page_size, heads_kv, head_dim]
  void* v_cache;             // [pages, page_size, heads_kv, head_dim_v]
  const void* slot_mapping;  // [slots]: i64, or i32

  i64 k_stride_row;
  i64 k_stride_head;
  i64 v_stride_row;
  i64 v_stride_head;
  i64 k_cache_stride_page;
  i64 k_cache_stride_row;
  i64 k_cache_stride_head;
  i64 v_cache_stride_page;
  i64 v_cache_stride_row;
  i64 v_cache_stride_head;
  i64 slots;     // entries of slot_mapping: token i goes to slot_mapping[i]
  i64 capacity;  // pages * page_size
  i32 page_size;
  i32 heads_kv;
  i32 head_dim;
  i32 head_dim_v;
  i32 slots_are_i64;
};
