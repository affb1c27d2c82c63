// Counter-based dropout: the byte of (row, column, head, batch) is a pure function of (seed, offset), so forward,
// backward, recomputation and the Python engine agree whatever their tiles. Philox4x32 (Salmon et al., SC'11) with 7
// rounds, the fewest that pass BigCrush; one call serves 16 elements, 8 bits each, and a probability is therefore a
// multiple of 1/256.
//
// Its 16 elements are rows {g, g + 8} and columns {c, c + 1} + {0, 8, 16, 24}: what one thread holds of a 16 x 32
// accumulator. The two rows and the columns 8 apart share a word, so that a transposed accumulator finds its elements
// in whole words as well.
#pragma once

#include <cuda_runtime.h>

#include "params.h"

namespace hfp {

__device__ inline uint4 philox7(uint4 ctr, uint2 key) {
#pragma unroll
  for (int i = 0; i < 7; ++i) {
    const uint64_t a = static_cast<uint64_t>(ctr.x) * 0xD2511F53u;
    const uint64_t b = static_cast<uint64_t>(ctr.z) * 0xCD9E8D57u;
    ctr = make_uint4(static_cast<uint32_t>(b >> 32) ^ ctr.y ^ key.x, static_cast<uint32_t>(b),
                     static_cast<uint32_t>(a >> 32) ^ ctr.w ^ key.y, static_cast<uint32_t>(a));
    key.x += 0x9E3779B9u;
    key.y += 0xBB67AE85u;
  }
  return ctr;
}

class Dropout {
 public:
  __device__ Dropout(const DropoutParams& p, int head_index) : head_(head_index), keep_(p.keep) {
    if (!p.rng_state) return;
    const uint64_t seed = static_cast<uint64_t>(p.rng_state[0]);
    key_ = make_uint2(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    offset_ = static_cast<uint32_t>(p.rng_state[1]);
  }

  // Keep bits of one thread's share of the 16 x 32 tile at (row, col), both multiples of 16 and 32; lane_row = 0..7 and
  // lane_col = 0..3 place the thread in an accumulator. Bit 4 * j + e is element e (columns c, c + 1 of row g, then of
  // row g + 8) of the j-th group of 8 columns.
  __device__ uint32_t keep_bits(int row, int col, int lane_row, int lane_col) const {
    const uint4 r = philox7(make_uint4(col / 32 * 4 + lane_col, row / 16 * 8 + lane_row, head_, offset_), key_);
    const uint32_t word[4] = {r.x, r.y, r.z, r.w};
    uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const uint32_t byte = word[(j / 2) * 2 + e % 2] >> (8 * ((e / 2) * 2 + j % 2)) & 0xffu;
        bits |= (byte < keep_ ? 1u : 0u) << (4 * j + e);
      }
    }
    return bits;
  }

  // Keep bits of a transposed accumulator's 16 keys by 16 rows at (row, key), both multiples of 16: bit 4 * j + 2 * h +
  // e is key lane_row + 8 * h, row 2 * lane_col + 8 * j + e. The even and the odd row of a thread are two calls; the
  // lane that holds the neighbouring key needs the same two, so each makes one and they trade. For whole warps.
  __device__ uint32_t keep_bits_transposed(int row, int key, int lane_row, int lane_col) const {
    const bool odd = lane_row & 1;
    const uint4 r =
        philox7(make_uint4(key / 32 * 4 + lane_row / 2, row / 16 * 8 + 2 * lane_col + odd, head_, offset_), key_);
    const bool upper = key & 16;
    const uint32_t even_word = upper ? r.z : r.x, odd_word = upper ? r.w : r.y;
    const uint32_t own = odd ? odd_word : even_word;
    const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? even_word : odd_word, 4);
    const uint32_t word[2] = {odd ? other : own, odd ? own : other};
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t byte = word[i % 2] >> (8 * (i / 2)) & 0xffu;
      bits |= (byte < keep_ ? 1u : 0u) << i;
    }
    return bits;
  }

 private:
  uint2 key_{};
  uint32_t offset_ = 0;
  uint32_t head_;
  uint32_t keep_;
};

}  // namespace hfp
