// What the host tells forward_sm90.cu: what every forward kernel is told, and how tensor copies find q, k and v.
#pragma once
#include <base.cuh>
#include <params/forward.cuh>

struct ForwardSm90Params : ForwardParams {
  TensorMap q_map;  // axes: head_dim, heads_q, rows, batch; the packed layout has one batch of all rows
  TensorMap k_map;  // likewise
  TensorMap v_map;  // likewise

  i32 heads_q;
  i32 persistent_tiles;  // query tiles of all heads and sequences, alike, which blocks go over in steps; 0: as packed_grid says
};
