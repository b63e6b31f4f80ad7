// The end of a forward tile: O divided by the sum, lse and the largest score, written to global memory.
#pragma once
#include <base.cuh>
#include <hw/device.cuh>
#include <tile/score.cuh>
#include <tile/sequence.cuh>
#include <tile/softmax.cuh>
#include <tile/store.cuh>

// q_first: the tile's first query in the sequence; warp_row: the warp's first row in the tile. warp_tile: shared memory of
// the warp's rows, through which O goes out in whole units; OutTile: how they lie there. Rows at or past q_len that the
// sequence owns get out 0 and lse -inf.
// NOTE: the two are added up here: their sum would be kept through the KV loop, where float32 of head dim 192 spills then.
template <class V, class OutTile, bool kPaged, class Params, i32 kRows, class O>
HW_DEVICE void finish_rows(const Params& p, i32 sequence, i32 head, i32 q_first, i32 warp_row,
                           const OnlineSoftmax<kRows>& softmax, O& o, u32 warp_tile) {
  using Element = typename V::Element;
  const float sink = read_sink<Element>(p, head);
  FinishedRow finished[kRows];
  HW_UNROLL
  for (i32 i = 0; i < kRows; ++i) {
    finished[i] = softmax.finish(i, sink);
    if constexpr (V::kDropout) finished[i].out_scale *= p.keep_scale;
  }
  o.for_each([&](float& x, i32 row, i32) { x *= finished[row].out_scale; });

  // NOTE: read anew, and not before it is needed: kept through the KV loop it would cost registers there.
  const Sequence owner = read_sequence<kPaged>(p, sequence);
  const i32 used = owner.q_len - q_first - warp_row;    // of this warp's rows, those that are queries
  const i32 owned = owner.q_rows - q_first - warp_row;  // and those to write
  u8* out = at_row(p.out, owner, p.out_stride_batch, owner.q_begin + q_first + warp_row, p.out_stride_row) +
            head * p.out_stride_head;
  store_rows<Element, OutTile, V::kLoadBytes>(o, warp_tile, out, p.out_stride_row, used, owned,
                                              p.head_dim_v * static_cast<i32>(sizeof(Element)));
  if (hw::lane_idx() % 4 == 0) {
    const i64 line = row_offset(owner, p.lse_stride_batch, owner.q_begin + q_first + warp_row, 1) + head * p.lse_stride_head;
    HW_UNROLL
    for (i32 i = 0; i < kRows; ++i) {
      const i32 row = O::row_of(i);
      if (row < owned) {
        if (p.lse != nullptr) hw::store_global(p.lse + line + row, row < used ? finished[i].lse : -kInfinity);
        if (p.max_logit != nullptr) {
          hw::store_global(p.max_logit + line + row, row < used ? finished[i].max_logit : -kInfinity);
        }
      }
    }
  }
}

// The same where rows are queries of several heads: head_of(row), query_of(row) of the warp's row, -1: of none.
template <class V, class OutTile, bool kPaged, class Params, i32 kRows, class O, class HeadOf, class QueryOf>
HW_DEVICE void finish_heads(const Params& p, i32 sequence, const HeadOf& head_of, const QueryOf& query_of,
                            const OnlineSoftmax<kRows>& softmax, O& o, u32 warp_tile) {
  using Element = typename V::Element;
  FinishedRow finished[kRows];
  HW_UNROLL
  for (i32 i = 0; i < kRows; ++i) {
    finished[i] = softmax.finish(i, read_sink<Element>(p, head_of(O::row_of(i))));
    if constexpr (V::kDropout) finished[i].out_scale *= p.keep_scale;
  }
  o.for_each([&](float& x, i32 row, i32) { x *= finished[row].out_scale; });

  const Sequence owner = read_sequence<kPaged>(p, sequence);
  u8* out = at_row(p.out, owner, p.out_stride_batch, owner.q_begin, p.out_stride_row);
  store_rows_at<Element, OutTile, V::kLoadBytes>(
      o, warp_tile, p.head_dim_v * static_cast<i32>(sizeof(Element)), [&](i32 row, const auto& write) {
        const i32 query = query_of(row);
        if (query >= 0 && query < owner.q_rows) {
          write(out + query * p.out_stride_row + head_of(row) * p.out_stride_head, query >= owner.q_len);
        }
      });
  if (hw::lane_idx() % 4 == 0) {
    HW_UNROLL
    for (i32 i = 0; i < kRows; ++i) {
      const i32 row = O::row_of(i), query = query_of(row);
      if (query >= 0 && query < owner.q_rows) {
        const i64 line = row_offset(owner, p.lse_stride_batch, owner.q_begin + query, 1) + head_of(row) * p.lse_stride_head;
        const bool used = query < owner.q_len;
        if (p.lse != nullptr) hw::store_global(p.lse + line, used ? finished[i].lse : -kInfinity);
        if (p.max_logit != nullptr) hw::store_global(p.max_logit + line, used ? finished[i].max_logit : -kInfinity);
      }
    }
  }
}
