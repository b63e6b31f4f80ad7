// Which weights dropout keeps: Philox4x32-10 of a weight's position (Salmon and others, SC 2011; cuflash/philox.py has
// the definition in NumPy), so that forward, backward and every tiling agree.
//
//   key      seed
//   counter  (query without bit 3, key without bits 0, 3 and 4, b * heads_q + h, offset)     "without": those bits are 0
//   byte     8 q3 + 4 k4 + 2 k3 + k0 of the 16 that come out; kept iff it is below keep_threshold
//
// Of a Fragment whose rows are queries a thread holds, in 32 columns, exactly the 16 weights of one call.
#pragma once
#include <base.cuh>
#include <hw/device.cuh>
#include <hw/warp.cuh>

struct Dropout {
  u32 seed_low, seed_high;
  u32 offset;
  u32 head;       // b * heads_q + h
  u32 threshold;  // 0..256
};

// Philox4x32-10: x from counter to random words.
HW_DEVICE void philox4x32(u32 (&x)[4], u32 key_low, u32 key_high) {
  HW_UNROLL
  for (i32 round = 0; round < 10; ++round) {
    const u64 a = static_cast<u64>(x[0]) * 0xd2511f53u;
    const u64 b = static_cast<u64>(x[2]) * 0xcd9e8d57u;
    x[0] = static_cast<u32>(b >> 32) ^ x[1] ^ key_low;
    x[1] = static_cast<u32>(b);
    x[2] = static_cast<u32>(a >> 32) ^ x[3] ^ key_high;
    x[3] = static_cast<u32>(a);
    key_low += 0x9e3779b9u;
    key_high += 0xbb67ae85u;
  }
}

// Params: any struct with the dropout fields of ForwardParams. heads_q: query heads of the call.
template <class Params>
HW_DEVICE Dropout read_dropout(const Params& p, i32 sequence, i32 head, i32 heads_q) {
  Dropout d;
  d.seed_low = static_cast<u32>(p.seed_value);
  d.seed_high = static_cast<u32>(p.seed_value >> 32);
  if (p.seed != nullptr) {
    d.seed_low = hw::load_global(p.seed);
    d.seed_high = p.seed_format == 1 && static_cast<i32>(d.seed_low) < 0 ? 0xffffffffu : 0u;
    if (p.seed_format == 2) d.seed_high = hw::load_global(p.seed + 1);
  }
  d.offset = p.offset == nullptr ? p.offset_value : hw::load_global(p.offset);
  d.head = static_cast<u32>(sequence * heads_q + head);
  d.threshold = p.keep_threshold;
  return d;
}

// The 16 bytes that decide on queries query, query + 8 and keys key + {0, 1} + {0, 8} + {0, 16}.
// query has no bit 3, key none of bits 0, 3 and 4.
HW_DEVICE void dropout_words(const Dropout& d, i32 query, i32 key, u32 (&words)[4]) {
  words[0] = static_cast<u32>(query);
  words[1] = static_cast<u32>(key);
  words[2] = d.head;
  words[3] = d.offset;
  philox4x32(words, d.seed_low, d.seed_high);
}

HW_DEVICE bool is_kept(const Dropout& d, u32 word, i32 byte) { return (word >> (8 * byte) & 0xffu) < d.threshold; }

// visit(x, kept) for every weight of a fragment whose rows are queries and columns keys. query: that of the fragment's
// row 0, key: that of column 0; both multiples of 16, key of 32 where the fragment has more than 16 columns.
template <class S, class Visit>
HW_DEVICE void visit_dropout(const Dropout& d, S& s, i32 query, i32 key, const Visit& visit) {
  constexpr i32 kGroup = min_of(S::kColTiles, 4);
  static_assert(kGroup == 4 ? S::kColTiles % 4 == 0 : S::kColTiles == 2, "whole calls, or half of each");
  HW_UNROLL
  for (i32 r = 0; r < S::kRowTiles; ++r) {
    HW_UNROLL
    for (i32 first = 0; first < S::kColTiles; first += kGroup) {
      u32 words[4];
      const i32 column = key + 8 * first;
      dropout_words(d, query + S::row_of(2 * r), (kGroup == 4 ? column : column & ~16) + S::first_col(), words);
      HW_UNROLL
      for (i32 i = 0; i < 4; ++i) {
        const i32 q3 = i / 2;
        u32 pair[2] = {words[2 * q3], words[2 * q3 + 1]};  // by bit 4 of the key
        if (kGroup == 2 && (column & 16) != 0) pair[0] = pair[1];
        HW_UNROLL
        for (i32 c = 0; c < kGroup; ++c) visit(s.x[r][first + c][i], is_kept(d, pair[c / 2], 2 * (c % 2) + i % 2));
      }
    }
  }
}

// The same where rows are keys and columns queries, as backward computes S^T. A call's bit 0 of the key is then the lane
// below or above: of two such lanes one calls for the even queries, one for the odd, and they exchange what came out.
// All lanes of the warp take part.
template <class S, class Visit>
HW_DEVICE void visit_dropout_transposed(const Dropout& d, S& s, i32 query, i32 key, const Visit& visit) {
  static_assert(S::kColTiles % 2 == 0, "whole calls");
  constexpr i32 kGroup = min_of(S::kRowTiles, 2);
  static_assert(S::kRowTiles % kGroup == 0, "whole calls, or half of each");
  const i32 k0 = hw::lane_idx() / 4 % 2;
  HW_UNROLL
  for (i32 first = 0; first < S::kRowTiles; first += kGroup) {
    HW_UNROLL
    for (i32 c = 0; c < S::kColTiles; c += 2) {
      u32 own[4];
      const i32 row = key + S::row_of(2 * first) - k0;
      dropout_words(d, query + 8 * c + S::first_col() + k0, kGroup == 2 ? row : row & ~16, own);
      HW_UNROLL
      for (i32 q3 = 0; q3 < 2; ++q3) {
        u32 words[2][2];  // by bit 0 of the query, by bit 4 of the key from the first row tile's on
        HW_UNROLL
        for (i32 k4 = 0; k4 < kGroup; ++k4) {
          u32 mine = own[2 * q3 + k4];
          if (kGroup == 1 && (row & 16) != 0) mine = own[2 * q3 + 1];
          const u32 other = hw::shfl_xor(mine, 4);
          words[0][k4] = k0 == 0 ? mine : other;
          words[1][k4] = k0 == 0 ? other : mine;
        }
        HW_UNROLL
        for (i32 r = 0; r < kGroup; ++r) {
          HW_UNROLL
          for (i32 i = 0; i < 4; ++i) {
            visit(s.x[first + r][c + q3][i], is_kept(d, words[i % 2][r] >> (8 * k0), 2 * (i / 2)));
          }
        }
      }
    }
  }
}
