// What happens to an accumulator of S between the two products, the same in both directions and on every architecture:
// softcap and ALiBi, the element test of the mask, dropout. An accumulator tile is 16 x 8 per [i][j]; this thread's
// first element is at (row + 16 i, col + 8 j).
#pragma once

#include <type_traits>

#include "common/dropout.h"
#include "common/mask.h"

namespace hfp {

// What a kernel is compiled for. Masks are always there and cost nothing in full blocks; what changes every logit or
// every probability has its own instance.
enum class Variant {
  kPlain,
  kBlocks,   // block lists
  kDropout,  // with or without block lists
  kGeneral,  // softcap, ALiBi, any scale, with or without block lists and dropout
};
constexpr bool reads_lists(Variant v) { return v != Variant::kPlain; }

// Calls run(std::integral_constant<Variant, ...>) with what a call needs.
template <class Run>
auto with_variant(const AttentionParams& p, Run run) {
  if (p.is_general()) return run(std::integral_constant<Variant, Variant::kGeneral>());
  if (p.dropout.rng_state) return run(std::integral_constant<Variant, Variant::kDropout>());
  if (p.mask.lists.row_offsets) return run(std::integral_constant<Variant, Variant::kBlocks>());
  return run(std::integral_constant<Variant, Variant::kPlain>());
}

constexpr bool can_drop(Variant v) { return v == Variant::kDropout || v == Variant::kGeneral; }

// Whether a call of a kernel of the variant does.
template <Variant kVariant>
__device__ __forceinline__ bool drops(const DropoutParams& p) {
  return kVariant == Variant::kDropout || (kVariant == Variant::kGeneral && p.rng_state);
}

// tanh without the library's branches: absolute error 1e-7, which softcap multiplies by some 30.
__device__ __forceinline__ float tanh_exp(float x) { return 1.f - __fdividef(2.f, 1.f + __expf(2.f * x)); }

// Softcap and ALiBi.
class LogitBias {
 public:
  __device__ LogitBias(const AttentionParams& p, int batch, int head)
      : scale_(p.logit_scale),
        softcap_(p.softcap),
        inv_softcap_(p.softcap > 0.f ? 1.f / p.softcap : 0.f),
        slope_(p.alibi_slopes ? p.alibi_slopes[batch * p.alibi_batch_stride + head] : 0.f) {}

  // `distance` is query position minus key position.
  __device__ float apply(float s, int distance) const {
    s *= scale_;
    if (softcap_ > 0.f) s = softcap_ * tanh_exp(s * inv_softcap_);
    return fmaf(-slope_, fabsf(static_cast<float>(distance)), s);
  }
  // d softcap(x) / dx where the logit got probability p = 2^(logit * exp2_scale - lse_log2). Reading the logit back
  // from p saves a register an element; where p has underflowed the result is multiplied by 0 and only has to be
  // finite.
  __device__ float derivative(float p, float lse_log2, int distance) const {
    if (softcap_ <= 0.f) return 1.f;
    constexpr float kLn2 = 0.69314718055994531f;
    const float capped = fmaf(slope_, fabsf(static_cast<float>(distance)), (__log2f(p) + lse_log2) * kLn2);
    const float t = fminf(fmaxf(capped * inv_softcap_, -1.f), 1.f);
    return 1.f - t * t;
  }

 private:
  float scale_, softcap_, inv_softcap_, slope_;
};

// The words of row i of a tile of bits from column j on; both count from the sequence's start.
__device__ __forceinline__ const uint32_t* tile_row(const uint32_t* tiles, int tile, int i, int j) {
  return tiles + ((int64_t{tile} * kListBlock + i % kListBlock) * kListBlock + j % kListBlock) / 32;
}

// Hides what the mask hides, element by element, with the tests that the block needs (`why`, see Mask::hidden). `start`
// is the warp's first column: a multiple of 32, or of 16 if the warp's columns are no whole words.
template <int kM, int kN, class M>
__device__ __forceinline__ void mask_elements(const M& mask, unsigned why, float (&s)[kM][kN][4], int row, int start,
                                              int lane) {
  const int lane_col = 2 * (lane & 3);
  const auto hide_where = [&](auto hidden) {
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const Range r = mask.row_limits(row + 16 * i + 8 * h);
        const int begin = r.begin - start - lane_col, end = r.end - start - lane_col;
#pragma unroll
        for (int j = 0; j < kN; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (hidden(8 * j + e, begin, end)) s[i][j][2 * h + e] = -INFINITY;
          }
      }
  };
  if (why & kPastRange) hide_where([](int c, int, int end) { return c >= end; });
  if (why & kBeforeRange) hide_where([](int c, int begin, int) { return c < begin; });
  if (why & kByBits) {
    uint32_t words[(kN + 3) / 4];
#pragma unroll
    for (int w = 0; w < (kN + 3) / 4; ++w) {
      const int first = (start + 32 * w) & ~31;
      uint32_t word = mask.key_word(first);
      if (kN % 4 == 0 || kN <= 2) {
        word >>= start & 31;
      } else {
        word = __funnelshift_r(word, mask.key_word(first + 32), start & 31);
      }
      words[w] = word >> lane_col;
    }
    hide_where([&](int c, int, int) { return !(words[c / 32] >> (c % 32) & 1u); });
  }
}

// Hides what a tile of bits hides, in the same accumulator.
template <int kM, int kN>
__device__ __forceinline__ void mask_by_tile(const BlockLists& lists, int bits, float (&s)[kM][kN][4], int row,
                                             int start, int lane) {
#pragma unroll
  for (int i = 0; i < kM; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t* from = tile_row(lists.tiles, bits, row + 16 * i + 8 * h, start);
#pragma unroll
      for (int w = 0; w < (kN + 3) / 4; ++w) {
        const uint32_t word = from[w] >> ((start & 31) + 2 * (lane & 3));
#pragma unroll
        for (int c = 0; c < 8 && 8 * w + c < 2 * kN; ++c) {
          const int j = 4 * w + c / 2;
          if (!(word >> (8 * (j % 4) + c % 2) & 1u)) s[i][j][2 * h + c % 2] = -INFINITY;
        }
      }
    }
}

// The same on a transposed accumulator, 16 keys by 8 rows a [j]: this thread's keys g and g + 8 are seen by the rows
// `seen`, its first element belongs to row `row`.
template <int kN>
__device__ __forceinline__ void mask_transposed(unsigned why, float (&s)[kN][4], const Range (&seen)[2], int row) {
  const auto hide_where = [&](auto hidden) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int begin = seen[h].begin - row, end = seen[h].end - row;
#pragma unroll
      for (int j = 0; j < kN; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (hidden(8 * j + e, begin, end)) s[j][2 * h + e] = -INFINITY;
        }
    }
  };
  if (why & kPastRange) hide_where([](int r, int begin, int) { return r < begin; });
  if (why & (kBeforeRange | kByBits)) hide_where([](int r, int, int end) { return r >= end; });
}

// Hides what a tile of bits hides in a transposed accumulator whose first element belongs to `key` and `row`.
template <int kN>
__device__ __forceinline__ void mask_transposed_by_tile(const BlockLists& lists, int bits, float (&s)[kN][4], int key,
                                                        int row) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint32_t* from = tile_row(lists.tiles_t, bits, key + 8 * h, row);
#pragma unroll
    for (int w = 0; w < kN / 4; ++w) {
      const uint32_t word = from[w] >> (row & 31);
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        const int j = 4 * w + c / 2;
        if (!(word >> (8 * (j % 4) + c % 2) & 1u)) s[j][2 * h + c % 2] = -INFINITY;
      }
    }
  }
}

// Softcap and ALiBi on every element.
template <int kM, int kN>
__device__ __forceinline__ void bias_elements(const LogitBias& bias, float (&s)[kM][kN][4], int row, int col,
                                              int shift) {
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int j = 0; j < kN; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int distance = row + 16 * i + 8 * (e / 2) + shift - (col + 8 * j + e % 2);
        s[i][j][e] = bias.apply(s[i][j][e], distance);
      }
    }
  }
}

// What follows is about a thread's share of probabilities that a warp holds: 16 rows by 8 columns an [j], or
// transposed. `head` counts batch * num_heads + head; row and column, of the warp's first element, are multiples of 16.

// Drops from packed pairs, the A operand of a product: [t][2 * j + h] is row half h of group j of the t-th 16 columns.
template <int kT>
__device__ __forceinline__ void drop_pairs(const Dropout& dropout, int head, uint32_t (&prob)[kT][4], int row,
                                           int column, int lane) {
#pragma unroll
  for (int t = 0; t < kT; t += 2) {
    Dropped<false> dropped[2];
    dropout.tiles(dropped, head, row, column + 16 * t, lane, t + 1 < kT);
#pragma unroll
    for (int k = 0; k < 2 && t + k < kT; ++k)
#pragma unroll
      for (int e = 0; e < 4; ++e) prob[t + k][e] &= ~dropped[k].pair(e / 2, e % 2);
  }
}

// Makes negative what is dropped, for there is no other use of a probability's sign.
template <bool kTransposed, int kN>
__device__ __forceinline__ void mark_dropped(const Dropout& dropout, int head, float (&p)[kN][4], int row, int column,
                                             int lane) {
#pragma unroll
  for (int t = 0; t < kN / 2; t += 2) {
    Dropped<kTransposed> dropped[2];
    dropout.tiles(dropped, head, row + (kTransposed ? 16 * t : 0), column + (kTransposed ? 0 : 16 * t), lane,
                  t + 1 < kN / 2);
#pragma unroll
    for (int j = 0; j < 4 && 2 * t + j < kN; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const uint32_t sign = dropped[j / 2].element(j % 2, e) & 0x80000000u;
        p[2 * t + j][e] = __uint_as_float(__float_as_uint(p[2 * t + j][e]) | sign);
      }
  }
}
__device__ __forceinline__ bool is_dropped(float p) { return __float_as_int(p) < 0; }

}  // namespace hfp
