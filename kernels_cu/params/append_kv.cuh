// What the host tells append_kv.cu. Read by Python as params/forward.cuh is; strides count bytes.
#pragma once
#include <base.cuh>

struct AppendParams {
  const void* k;                 // [batch, new_len, heads_kv, head_dim] or [total, heads_kv, head_dim]; null: none
  const void* v;                 // likewise, head_dim_v
  void* k_cache;                 // [pages, page_size, heads_kv, head_dim]; a cache in one piece: its sequences
  void* v_cache;                 // likewise, head_dim_v
  const void* q;                 // [batch, q_len, heads_q, head_dim] or [total_q, heads_q, head_dim]
  void* q_rotated;               // likewise, contiguous
  const void* rotary_cos;        // [positions, rotary_dim / 2] float32 or the element type; null: nothing is rotated
  const void* rotary_sin;        // likewise
  const i32* cache_seqlens;      // [batch]; null: cache_seqlens_value
  const i32* rotary_seqlens;     // [batch]; null: cache_seqlens
  const i32* cu_seqlens_q;       // [batch + 1]; null: dense
  const i32* cu_seqlens_k_new;   // [batch + 1]; null: dense
  const i32* page_table;         // [batch, max_pages]; null: page b is sequence b's
  const i32* cache_leftpad;      // [batch]; null: none
  i32* seqused_k;                // [batch], written: keys to attend to; null: not wanted
  i32* pages;                    // [batch], written: 0, 1, ..; null: not wanted

  i64 k_stride_batch;
  i64 k_stride_row;
  i64 k_stride_head;
  i64 v_stride_batch;
  i64 v_stride_row;
  i64 v_stride_head;
  i64 k_cache_stride_batch;  // from page to page
  i64 k_cache_stride_row;
  i64 k_cache_stride_head;
  i64 v_cache_stride_batch;
  i64 v_cache_stride_row;
  i64 v_cache_stride_head;
  i64 q_stride_batch;
  i64 q_stride_row;
  i64 q_stride_head;
  i64 q_rotated_stride_batch;
  i64 q_rotated_stride_row;
  i64 q_rotated_stride_head;
  i64 cos_stride;
  i64 sin_stride;
  i64 page_table_stride;  // in elements

  i32 new_len;  // dense: new keys of every sequence
  i32 q_len;    // dense: queries of every sequence
  i32 heads_kv;
  i32 heads_q;
  i32 head_dim;
  i32 head_dim_v;
  i32 page_size;
  i32 capacity;  // keys that each sequence has room for
  i32 cache_seqlens_value;

  i32 rotary_dim;
  i32 interleaved;        // 1: pairs are elements 2 j and 2 j + 1; 0: j and rotary_dim / 2 + j
  i32 tables_are_element; // 1: cos and sin have the element type; 0: float32
  i32 advance;            // 1: query i is rotated to its start + i; 0: all to the start
};
