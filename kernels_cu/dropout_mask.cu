// Which weights dropout keeps, written out: mask[b, h, i, j] is 1 where the weight of query i and key j is kept, 0 where
// it is dropped or the sequence has no such query or key. For looking at and for tests: attention never reads it.
//
//   grid    (sequence and row of the mask, head)
//   roles   thread t computes the keys t, t + kThreads, ..
#include <base.cuh>
#include <hw/device.cuh>
#include <params/dropout_mask.cuh>
#include <tile/dropout.cuh>
#include <tile/sequence.cuh>

constexpr i32 kThreads = 128;

HW_KERNEL(kThreads) cuflash_dropout_mask(HW_GRID_CONSTANT DropoutMaskParams p) {
  const i32 sequence = hw::block_idx_x() / p.rows;
  const i32 query = hw::block_idx_x() - sequence * p.rows;
  const i32 head = hw::block_idx_y(), heads_q = hw::grid_dim_y();
  const Sequence seq = p.cu_seqlens_k == nullptr ? read_sequence<true>(p, sequence) : read_sequence(p, sequence);
  const Dropout dropout = read_dropout(p, sequence, head, heads_q);
  u8* row = p.dropout_mask + ((static_cast<i64>(sequence) * heads_q + head) * p.rows + query) * p.keys;
  for (i32 key = hw::thread_idx(); key < p.keys; key += kThreads) {
    u32 words[4];
    dropout_words(dropout, query & ~8, key & ~25, words);
    const u32 low = (key & 16) == 0 ? words[0] : words[1], high = (key & 16) == 0 ? words[2] : words[3];
    const bool kept = is_kept(dropout, (query & 8) == 0 ? low : high, (key >> 3 & 1) * 2 + (key & 1));
    hw::store_global(row + key, static_cast<u8>(kept && query < seq.q_len && key < seq.k_len));
  }
}
