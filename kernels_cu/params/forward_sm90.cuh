// What the host tells forward_sm90.cu: what every forward kernel is told, and how tensor copies find q, k and v.
#pragma once
#include <base.cuh>
#include <params/forward.cuh>

struct ForwardSm90Params : ForwardParams {
  TensorMap q_map;  // axes: head_dim, heads_q, rows, batch; the packed layout has one batch of all rows
  TensorMap k_map;  // likewise; paged: head_dim, heads_kv, page_size, pages; not used where page_rows is 0
  TensorMap v_map;  // likewise

  i32 group_heads;       // query heads whose rows share a tile: 1, or head_group
  i32 group_queries;     // queries of a warpgroup: 64 / group_heads
  u32 group_multiplier;  // x / group_heads = x * group_multiplier >> 12 for x < 64
  i32 groups;            // of query heads
  i32 persistent_tiles;  // query tiles of all heads and sequences, which blocks go over in steps; 0: as packed_grid says
  i32 page_rows;  // paged: rows of a page, and of a key tile, that one copy brings; 0: rows are gathered one by one
};
