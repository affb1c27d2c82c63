// Counter-based dropout: the byte of (row, column, head, batch) is a pure function of (seed, offset), so forward,
// backward, recomputation and the Python engine agree whatever their tiles. Philox4x32 (Salmon et al., SC'11) with 7
// rounds, the fewest that pass BigCrush; one call serves 16 elements, 8 bits each, and a probability is therefore a
// multiple of 1/256.
//
// Its 16 elements are, of a tile of 16 x 16, rows {2a, 2a + 1} + {0, 8} and columns {2b, 2b + 1} + {0, 8}: what two
// lanes hold of an accumulator, be it transposed or not. They hold the same of the neighbouring tile; each lane makes
// one of the two calls, and they trade. Word = 2 * (row % 2) + row half, byte = 2 * (column % 2) + column half.
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

// Each of the four digits of `which` names a byte of b:a; plus 8, its top bit repeated.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b, unsigned which) {
  uint32_t r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(which));
  return r;
}

// What a thread drops of its share of a 16 x 16 tile, x[j][2 * h + e] of two groups j of 8 columns: the top bit of byte
// 2 * e + j of word h; transposed, of byte 2 * e + h of word j.
template <bool kTransposed>
struct Dropped {
  uint32_t word[2];

  // All ones in the halves of a register that hold what is dropped of the pair x[j][2 * h], x[j][2 * h + 1].
  __device__ __forceinline__ uint32_t pair(int j, int h) const {
    const unsigned first = kTransposed ? h : j, signs = 0x8888;  // the top bit for all eight of a byte
    return permute_bytes(word[kTransposed ? j : h], 0, signs + 0x1111 * first + 0x2200);
  }
  // All ones if x[j][e] is dropped.
  __device__ __forceinline__ uint32_t element(int j, int e) const {
    const unsigned byte = 2 * (e % 2) + (kTransposed ? e / 2 : j), signs = 0x8888;
    return permute_bytes(word[kTransposed ? j : e / 2], 0, signs + 0x1111 * byte);
  }
};

class Dropout {
 public:
  __device__ explicit Dropout(const DropoutParams& p)
      : to_carry_(p.keep < 256 ? (128 - p.keep % 128) * 0x01010101u : 0u), either_(p.keep < 128 ? ~0u : 0u) {
    if (!p.rng_state) return;
    const uint64_t seed = static_cast<uint64_t>(p.rng_state[0]);
    key_ = make_uint2(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    offset_ = static_cast<uint32_t>(p.rng_state[1]);
  }

  // Of two tiles side by side from (row, column) on, both multiples of 16; transposed, one below the other. The second
  // may be of no interest, which saves the trade. `head` counts batch * num_heads + head. For whole warps.
  template <bool kTransposed>
  __device__ __forceinline__ void tiles(Dropped<kTransposed> (&of)[2], int head, int row, int column, int lane,
                                        bool both) const {
    const int high = lane / 4, low = lane % 4;  // where in an accumulator: rows high and high + 8, columns 2 * low, ...
    const bool odd = high % 2;
    const int own = both && odd;  // which tile this lane makes the call for
    const int y = 4 * (row / 16 + (kTransposed ? own : 0)) + (kTransposed ? low : high / 2);
    const int x = 4 * (column / 16 + (kTransposed ? 0 : own)) + (kTransposed ? high / 2 : low);
    uint4 r = philox7(make_uint4(x, y, head, offset_), key_);
    r = make_uint4(flags(r.x), flags(r.y), flags(r.z), flags(r.w));
    // Two words for this lane, two for its neighbour.
    uint32_t mine[2], theirs[2];
    if (kTransposed) {
      const unsigned from = odd ? 0x7632 : 0x5410, other = odd ? 0x5410 : 0x7632;
      mine[0] = permute_bytes(r.x, r.z, from), theirs[0] = permute_bytes(r.x, r.z, other);
      mine[1] = permute_bytes(r.y, r.w, from), theirs[1] = permute_bytes(r.y, r.w, other);
    } else {
      mine[0] = odd ? r.z : r.x, theirs[0] = odd ? r.x : r.z;
      mine[1] = odd ? r.w : r.y, theirs[1] = odd ? r.y : r.w;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (both) theirs[i] = __shfl_xor_sync(0xffffffffu, theirs[i], 4);
      of[0].word[i] = both && odd ? theirs[i] : mine[i];
      of[1].word[i] = both && odd ? mine[i] : theirs[i];
    }
  }

 private:
  // The top bit of each byte: whether it is `keep` or more. A carry into it says whether its lower seven bits are as
  // many as keep's, and then it takes both, or with a keep below 128 either.
  __device__ __forceinline__ uint32_t flags(uint32_t x) const {
    const uint32_t sum = (x & 0x7f7f7f7fu) + to_carry_;
    return (x & sum) | (either_ & (x | sum));
  }

  uint2 key_{};
  uint32_t offset_ = 0;
  uint32_t to_carry_, either_;
};

}  // namespace hfp
