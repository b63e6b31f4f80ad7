// One sequence of the batch, read once: where its rows begin and how many there are.
#pragma once
#include <base.cuh>
#include <hw/device.cuh>

struct Sequence {
  i32 dense_idx;  // what batch strides are multiplied by: 0 in the packed layout
  i64 q_begin;  // first row of q, out and lse: 0 in the dense layout, where batch strides lead to a sequence
  i64 k_begin;  // first row of k and v
  i32 q_rows;   // rows this sequence owns in q and out
  i32 k_rows;   // and in k and v
  i32 q_len;    // of those, in use: queries i < q_len
  i32 k_len;    // keys j < k_len

  // Query i stands on key i + diagonal(): the last query on the last key, whatever the lengths.
  HW_DEVICE i32 diagonal() const { return k_len - q_len; }
};

// index: in the batch; index == batch names the rows behind the last sequence of a packed array.
// Params: any struct with batch, q_len, k_len, cu_seqlens_*, seqused_* as ForwardParams has them.
// kPagedKeys: keys are rows of pages, the same number for every sequence, also where queries are packed.
template <bool kPagedKeys = false, class Params>
HW_DEVICE Sequence read_sequence(const Params& p, i32 index) {
  Sequence s;
  s.dense_idx = p.cu_seqlens_q == nullptr ? index : 0;
  if (p.cu_seqlens_q == nullptr) {
    s.q_begin = 0;
    s.k_begin = 0;
    s.q_rows = p.q_len;
    s.k_rows = p.k_len;
  } else {
    s.q_begin = hw::load_global(p.cu_seqlens_q + index);
    if (index == p.batch) {
      // Rows that no sequence owns: nothing to attend to, written as zeros.
      s.k_begin = kPagedKeys ? p.k_len : hw::load_global(p.cu_seqlens_k + index);
      s.q_rows = static_cast<i32>(p.q_len - s.q_begin);
      s.k_rows = static_cast<i32>(p.k_len - s.k_begin);
      s.q_len = 0;
      s.k_len = 0;
      return s;
    }
    s.q_rows = static_cast<i32>(hw::load_global(p.cu_seqlens_q + index + 1) - s.q_begin);
    if constexpr (kPagedKeys) {
      s.k_begin = 0;
      s.k_rows = p.k_len;
    } else {
      s.k_begin = hw::load_global(p.cu_seqlens_k + index);
      s.k_rows = static_cast<i32>(hw::load_global(p.cu_seqlens_k + index + 1) - s.k_begin);
    }
  }
  s.q_len = s.q_rows;
  s.k_len = s.k_rows;
  if (p.seqused_q != nullptr) s.q_len = max_of(0, min_of(s.q_rows, hw::load_global(p.seqused_q + index)));
  if (p.seqused_k != nullptr) s.k_len = max_of(0, min_of(s.k_len, hw::load_global(p.seqused_k + index)));
  return s;
}

// Bytes (or elements, as the strides count) from an array's beginning to row `row` of the packed layout's array, or of
// the sequence in the dense one.
HW_DEVICE i64 row_offset(const Sequence& seq, i64 stride_batch, i64 row, i64 stride_row) {
  return seq.dense_idx * stride_batch + row * stride_row;
}

// The address of that row in an array whose strides count bytes.
HW_DEVICE const u8* at_row(const void* array, const Sequence& seq, i64 stride_batch, i64 row, i64 stride_row) {
  return static_cast<const u8*>(array) + row_offset(seq, stride_batch, row, stride_row);
}
HW_DEVICE u8* at_row(void* array, const Sequence& seq, i64 stride_batch, i64 row, i64 stride_row) {
  return static_cast<u8*>(array) + row_offset(seq, stride_batch, row, stride_row);
}
