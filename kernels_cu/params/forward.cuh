// What the host tells a forward kernel. Python reads this layout from this text (cuflash/jit/layout.py): one field a
// line, pointers with their shape. Strides of q, k, v and out count bytes, the others elements. In the packed layout a
// sequence begins at the row cu_seqlens names (stride_batch 0); in the dense one (cu_seqlens null) stride_batch apart.
#pragma once
#include <base.cuh>
#include <params/captured.cuh>
#include <params/order.cuh>

struct ForwardParams {
  const void* q;              // [batch, q_len, heads_q, head_dim] or [total_q, heads_q, head_dim]
  const void* k;              // [batch, k_len, heads_kv, head_dim] or [total_k, ..], or [pages, page_size, ..]
  const void* v;              // [batch, k_len, heads_kv, head_dim_v] or [total_k, ..], or [pages, page_size, ..]
  void* out;                  // [batch, q_len, heads_q, head_dim_v] or [total_q, heads_q, head_dim_v]
  float* lse;                 // [batch, heads_q, q_len] or [heads_q, total_q]; null: not wanted
  float* max_logit;           // as lse; null: not wanted
  const i32* cu_seqlens_q;    // [batch + 1]; null: dense
  const i32* cu_seqlens_k;    // [batch + 1]; null: dense or paged
  const i32* seqused_q;       // [batch]; null: all of each sequence
  const i32* seqused_k;       // [batch]; null: all of each sequence
  const i32* page_table;      // [batch, max_pages]; read where Variant::kPaged is set
  const i32* cache_leftpad;   // [batch], likewise: slots of a sequence's pages before its first key; null: none
  const float* alibi_slopes;  // [heads_q] or [batch, heads_q]; null: none
  const void* sink;           // [heads_q] float32 or the element type; null: none
  const u32* seed;            // dropout's, one integer as seed_format says; null: seed_value
  const u32* offset;          // dropout's, one integer whose low word counts; null: offset_value

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
  i64 lse_stride_batch;    // of lse and max_logit, both [.., rows] with unit stride
  i64 lse_stride_head;
  i64 alibi_stride_batch;  // 0: the same slopes for every sequence
  i64 page_table_stride;

  i32 batch;
  i32 q_len;       // dense: rows of q in each sequence; packed: rows of q in all
  i32 k_len;       // likewise of k; paged: keys that a row of the table has room for
  i32 head_group;  // query heads that share one key head
  i32 head_dim;
  i32 head_dim_v;
  i32 window_left;   // keys further left than this of the diagonal are masked; 2^30: none
  i32 window_right;  // likewise right; causal is 0
  i32 packed_grid;   // 1: grid.x counts (query block, sequence) slots; 0: grid is (query block, head, sequence)
  Order order;
  i32 sink_is_element;  // 1: sink has the element type; 0: float32

  float score_scale;    // multiplies q.k where raw_scores is 0: scale, or scale / softcap
  float score_cap;      // softcap; 0: none
  float softmax_scale;  // > 0, multiplies scores inside exp2: log2(e), and the scale where scores stay raw
  i32 raw_scores;       // 1: no softcap, no ALiBi, scale > 0: q.k goes to the softmax untouched

  // Pages (tile/paged.cuh); read where Variant::kPaged is set.
  i32 page_size;
  u32 page_multiplier;
  i32 page_shift;

  // Dropout (tile/dropout.cuh); read where Variant::kDropout is set.
  float keep_scale;    // 1 / (1 - p)
  u32 keep_threshold;  // a weight is kept iff its byte is below this: round(256 (1 - p))
  u32 offset_value;
  i32 seed_format;  // of the integer at seed: 0 u32, 1 i32, 2 of 64 bits
  u64 seed_value;

  Captured captured;  // what the mods captured; read where there are any
};
