// What the host tells the dropout mask's kernel. Read by Python as params/forward.cuh is; fields of the same name mean
// the same.
#pragma once
#include <base.cuh>

struct DropoutMaskParams {
  u8* dropout_mask;         // [batch, heads_q, rows, keys]
  const i32* cu_seqlens_q;  // [batch + 1]; null: dense
  const i32* cu_seqlens_k;  // [batch + 1]; null: dense
  const i32* seqused_q;     // [batch]; null: all of each sequence
  const i32* seqused_k;     // [batch]; null: all of each sequence
  const u32* seed;          // one integer as seed_format says; null: seed_value
  const u32* offset;        // one integer whose low word counts; null: offset_value

  i32 batch;
  i32 q_len;
  i32 k_len;
  i32 rows;  // of the mask: what lies behind a sequence's queries and keys is 0
  i32 keys;
  u32 keep_threshold;
  float keep_scale;  // not read here
  u32 offset_value;
  i32 seed_format;
  u64 seed_value;
};
