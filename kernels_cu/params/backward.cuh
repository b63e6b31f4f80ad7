// What the host tells the backward kernels; one struct for all of them. As params/forward.cuh: one field a line, strides
// of the arrays with head dims count bytes, the others elements.
#pragma once
#include <base.cuh>
#include <params/captured.cuh>
#include <params/order.cuh>

struct BackwardParams {
  const void* q;              // [batch, q_len, heads_q, head_dim] or [total_q, heads_q, head_dim]
  const void* k;              // [batch, k_len, heads_kv, head_dim] or [total_k, heads_kv, head_dim]
  const void* v;              // [batch, k_len, heads_kv, head_dim_v] or [total_k, heads_kv, head_dim_v]
  const void* out;            // as forward gave it: q's shape with head_dim_v
  const void* dout;           // its gradient
  const float* lse;           // [batch, heads_q, q_len] or [heads_q, total_q], as forward gave it
  const float* dlse;          // its gradient; null: 0
  void* dq;                   // q's shape
  void* dk;                   // k's shape
  void* dv;                   // v's shape
  void* dsink;                // [heads_q] of sink's type; null: not wanted
  float* dslopes;             // alibi_slopes' shape; null: not wanted
  float* lse_base2;           // [batch, heads_q, q_len] or [heads_q, total_q]: lse log2(e); +inf: the row keeps nothing
  float* delta;               // likewise: sum of dout out, less dlse; of a row that keeps nothing -dlse, or 0
  float* dq_accum;            // [heads_q, dq_blocks, class of head_dim / 8, 4, 32]: sums of dq, before scale, as mma.sync
                              // leaves 16 rows and 8 columns in 4 registers of 32 lanes. Or [.., / 8, 32, 4]; or
                              // [.., / 16, 2, 32, 4]: 16 columns and 8 rows, likewise; null: no atomics
  float* sink_partials;       // [heads_q, partials]; null where dsink is
  float* slope_partials;      // [heads_q, partials]; null where dslopes is
  const i32* cu_seqlens_q;    // [batch + 1]; null: dense
  const i32* cu_seqlens_k;    // [batch + 1]; null: dense
  const i32* seqused_q;       // [batch]; null: all of each sequence
  const i32* seqused_k;       // [batch]; null: all of each sequence
  const float* alibi_slopes;  // [heads_q] or [batch, heads_q]; null: none
  const void* sink;           // [heads_q] float32 or the element type; null: none
  const u32* seed;            // dropout's, one integer as seed_format says; null: seed_value
  const u32* offset;          // dropout's, one integer whose low word counts; null: offset_value

  i64 q_stride_batch;
  i64 q_stride_row;
  i64 q_stride_head;
  i64 k_stride_batch;
  i64 k_stride_row;
  i64 k_stride_head;
  i64 v_stride_batch;
  i64 v_stride_row;
  i64 v_stride_head;
  i64 out_stride_batch;
  i64 out_stride_row;
  i64 out_stride_head;
  i64 dout_stride_batch;
  i64 dout_stride_row;
  i64 dout_stride_head;
  i64 dq_stride_batch;
  i64 dq_stride_row;
  i64 dq_stride_head;
  i64 dk_stride_batch;
  i64 dk_stride_row;
  i64 dk_stride_head;
  i64 dv_stride_batch;
  i64 dv_stride_row;
  i64 dv_stride_head;
  i64 lse_stride_batch;    // of lse, dlse, lse_base2 and delta, all [.., rows] with unit stride
  i64 lse_stride_head;
  i64 alibi_stride_batch;  // 0: the same slopes for every sequence
  i64 partials;            // of one head
  i64 dq_blocks;           // of 16 queries, of one head: those of a sequence begin at slot_begin<16>
  i64 dq_accum_units;      // dq_accum's size in units of 16 bytes

  i32 batch;
  i32 q_len;       // dense: rows of q in each sequence; packed: rows of q in all
  i32 k_len;       // likewise of k
  i32 heads_q;
  i32 head_group;  // query heads that share one key head
  i32 head_dim;
  i32 head_dim_v;
  i32 window_left;      // keys further left than this of the diagonal are masked; 2^30: none
  i32 window_right;     // likewise right; causal is 0
  i32 packed_grid;      // 1: grid.x counts (tile, sequence) slots; 0: grid is (tile, head, sequence)
  Order order;
  i32 sink_is_element;  // 1: sink and dsink have the element type; 0: float32

  float scale;          // of q.k, as the caller gave it: multiplies dq and dk
  float score_scale;    // as in ForwardParams
  float score_cap;
  float softmax_scale;
  i32 raw_scores;

  float keep_scale;  // dropout, as in ForwardParams
  u32 keep_threshold;
  u32 offset_value;
  i32 seed_format;
  u64 seed_value;

  Captured captured;  // what the mods captured; read where there are any
};
