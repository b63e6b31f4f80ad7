// What the host tells decode_sm80.cu, decode_plan.cu and combine.cu. Names and units are those of params/forward.cuh.
#pragma once
#include <base.cuh>
#include <params/captured.cuh>

struct DecodeParams {
  const void* q;              // [batch, q_len, heads_q, head_dim] or [total_q, heads_q, head_dim]
  const void* k;              // [batch, k_len, heads_kv, head_dim] or [pages, page_size, heads_kv, head_dim]
  const void* v;              // likewise, head_dim_v
  void* out;                  // [batch, q_len, heads_q, head_dim_v] or [total_q, heads_q, head_dim_v]
  float* lse;                 // [batch, heads_q, q_len] or [heads_q, total_q]; null: not wanted
  float* max_logit;           // as lse; null: not wanted
  float* partial_out;         // [lines, head_dim_v]: O of tile/softmax.cuh; lines: tile/pieces.cuh
  float* partial_sum;         // [lines]: l
  float* partial_max;         // [lines]: m
  i64* unit_begin;            // [batch + 1]: units before each sequence, and of all; null: a fixed split_size
  const i32* cu_seqlens_q;    // [batch + 1]; null: dense
  const i32* cu_seqlens_k;    // null: keys are never packed
  const i32* seqused_q;       // [batch]; null: all of each sequence
  const i32* seqused_k;       // [batch]; null: all of each sequence
  const i32* page_table;      // [batch, max_pages]; read where Variant::kPaged is set
  const i32* cache_leftpad;   // [batch], likewise: slots of a sequence's pages before its first key; null: none
  const float* alibi_slopes;  // [heads_q] or [batch, heads_q]; null: none
  const void* sink;           // [heads_q] float32 or the element type; null: none

  i64 q_stride_batch;
  i64 q_stride_row;
  i64 q_stride_head;
  i64 k_stride_batch;  // paged: from page to page
  i64 k_stride_row;
  i64 k_stride_head;
  i64 v_stride_batch;
  i64 v_stride_row;
  i64 v_stride_head;
  i64 out_stride_batch;
  i64 out_stride_row;
  i64 out_stride_head;
  i64 lse_stride_batch;
  i64 lse_stride_head;
  i64 alibi_stride_batch;
  i64 page_table_stride;
  i64 partial_rows;  // batch * q_len or total_q

  i32 batch;
  i32 q_len;  // dense: rows of q in each sequence; packed: rows of q in all
  i32 k_len;  // keys that each sequence has room for
  i32 heads_kv;
  i32 head_group;
  i32 head_dim;
  i32 head_dim_v;
  i32 window_left;
  i32 window_right;
  i32 sink_is_element;
  i32 block_k;     // keys of a tile
  i32 split_size;  // keys of a piece, a multiple of block_k; 0: even shares
  i32 splits;      // pieces that k_len has, of that size
  i32 blocks;      // at most as many even shares

  i32 page_size;
  u32 page_multiplier;
  i32 page_shift;

  float score_scale;
  float score_cap;
  float softmax_scale;
  i32 raw_scores;

  Captured captured;  // what the mods captured; read where there are any
};
