// What the host tells backward_sm90.cu: what every backward kernel is told, and how tensor copies find its operands.
#pragma once
#include <base.cuh>
#include <params/backward.cuh>

struct BackwardSm90Params : BackwardParams {
  TensorMap q_map;     // axes: head_dim, heads_q, rows, batch; the packed layout has one batch of all rows
  TensorMap k_map;     // likewise
  TensorMap v_map;     // likewise
  TensorMap dout_map;  // likewise

  float natural_scale;  // softmax_scale, for an exponential of base e
};
