// Online softmax of the rows that one thread shares in: kM tiles of 16 rows, of which it holds rows g and g + 8, a
// quarter of the columns each. Base 2 throughout, the scale folded into the exponent.
#pragma once

#include <cmath>

namespace hfp {

template <int kM>
class Softmax {
 public:
  __device__ Softmax() {
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        base_[i][h] = row_sum_[i][h] = 0.f;
        limit_[i][h] = -INFINITY;
      }
  }

  // Turns logits into probabilities relative to the reference. Returns whether what was summed before, the output too,
  // has then to shrink by the factors given, for some row of the warp. kFirst: nothing was, and nothing has. exp2 is
  // the architecture's exponential.
  template <bool kFirst, int kN, class Exp2>
  __device__ __forceinline__ bool update(float (&s)[kM][kN][4], float (&shrink)[kM][2], float scale, Exp2 exp2) {
    float top[kM][2];  // of this thread's columns
    bool passes = false;
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        top[i][h] = fmaxf(s[i][0][2 * h], s[i][0][2 * h + 1]);
#pragma unroll
        for (int j = 1; j < kN; ++j) top[i][h] = fmaxf(top[i][h], fmaxf(s[i][j][2 * h], s[i][j][2 * h + 1]));
        passes |= top[i][h] > limit_[i][h];
      }
    // Few blocks get here after the first: the others save the shuffles, which wait for each other.
    if (kFirst || (passes = __any_sync(0xffffffffu, passes))) {
#pragma unroll
      for (int i = 0; i < kM; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) follow<kFirst>(i, h, top[i][h], shrink[i][h], scale, exp2);
    }
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float sum = exponentials(s, i, h, scale, exp2);
        row_sum_[i][h] = kFirst ? sum : row_sum_[i][h] + sum;
      }
    return !kFirst && passes;
  }

  // The same without looking for a maximum, where all rows of the warp have a reference: relative to that as it is. The
  // sum, which is needed anyway, says whether it may stay; if not, all shrinks, these probabilities too. kLost where
  // they are beyond a float: the logits have to be made again, for update(), and nothing has changed.
  enum class Kept { kAll, kShrunk, kLost };
  template <int kN, class Exp2>
  __device__ __forceinline__ Kept keep(float (&s)[kM][kN][4], float (&shrink)[kM][2], float scale, Exp2 exp2) {
    float sums[kM][2];
    bool stays = true;
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sums[i][h] = exponentials(s, i, h, scale, exp2);
        stays &= sums[i][h] <= kMost;
      }
    stays = __all_sync(0xffffffffu, stays);
    if (!stays && !lower(s, sums, shrink, scale)) return Kept::kLost;
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) row_sum_[i][h] += sums[i][h];
    return stays ? Kept::kAll : Kept::kShrunk;
  }

  // Whether every row of the warp has a reference; an infinite one would lose every block.
  __device__ bool all_seen() const {
    bool seen = true;
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) seen &= fabsf(limit_[i][h]) < INFINITY;
    return __all_sync(0xffffffffu, seen);
  }

  // What exponents of row (i, h) are taken from, -inf where it saw nothing.
  __device__ float reference(int i, int h) const { return limit_[i][h] == -INFINITY ? -INFINITY : base_[i][h]; }

  // Completes the sum of row (i, h).
  __device__ float complete(int i, int h) {
    float sum = row_sum_[i][h];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    return row_sum_[i][h] = sum;
  }

  // Completes the sum; returns the natural-log sum of exponentials of row (i, h), -inf where it saw nothing.
  __device__ float finish(int i, int h) {
    const float sum = complete(i, h);
    constexpr float kLn2 = 0.69314718055994531f;
    return sum > 0.f ? kLn2 * (base_[i][h] + __log2f(sum)) : -INFINITY;
  }
  // Of a complete sum, 0 where the row saw nothing.
  __device__ float normalizer(int i, int h) const {
    return row_sum_[i][h] > 0.f ? __fdividef(1.f, row_sum_[i][h]) : 0.f;
  }

 private:
  // The reference may lie below the row's maximum by kSlack in base 2. After the first few blocks it hardly ever has to
  // follow then, and what was summed before need not shrink. Probabilities reach 2^kSlack, which every dtype holds with
  // the same relative precision as 1.
  static constexpr float kSlack = 8.f;
  static constexpr float kMost = 256.f;  // of a thread's sum over a block: 2^kSlack

  // Of this thread's columns, the sum.
  template <int kN, class Exp2>
  __device__ __forceinline__ float exponentials(float (&s)[kM][kN][4], int i, int h, float scale, Exp2 exp2) const {
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < kN; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s[i][j][2 * h + e];
        x = exp2(fmaf(x, scale, -base_[i][h]));
        sum += x;
      }
    return sum;
  }

  // Where a sum is too large, moves the reference up by a power of two until probabilities are at most 4. False where a
  // sum is infinite.
  template <int kN>
  __device__ __forceinline__ bool lower(float (&s)[kM][kN][4], float (&sums)[kM][2], float (&shrink)[kM][2],
                                        float scale) {
    bool finite = true;
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) finite &= sums[i][h] < INFINITY;
    if (!__all_sync(0xffffffffu, finite)) return false;
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float top = 1.f;
#pragma unroll
        for (int j = 0; j < kN; ++j) top = fmaxf(top, fmaxf(s[i][j][2 * h], s[i][j][2 * h + 1]));
        top = row_max(top);
        if (row_max(sums[i][h]) <= kMost) top = 1.f;  // a row's result is not the others' affair
        // Up to 2^126, whose inverse is still normal.
        const int exponent = min(__float_as_int(top) >> 23, 253) - 127;
        shrink[i][h] = __int_as_float((127 - exponent) << 23);
        base_[i][h] += exponent;
        limit_[i][h] = __fdividef(base_[i][h] + kSlack, scale);
        row_sum_[i][h] *= shrink[i][h];
        sums[i][h] *= shrink[i][h];
#pragma unroll
        for (int j = 0; j < kN; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) s[i][j][2 * h + e] *= shrink[i][h];
      }
    return true;
  }

  // The reference goes up to the row's maximum if that passes the limit; `top` is of this thread's columns.
  template <bool kFirst, class Exp2>
  __device__ __forceinline__ void follow(int i, int h, float top, float& shrink, float scale, Exp2 exp2) {
    top = row_max(top);
    const bool follows = top > limit_[i][h];  // not if both are -inf
    const float base = follows ? top * scale : base_[i][h];
    if constexpr (!kFirst) {
      // A row that had seen nothing has nothing to shrink, whatever its reference was.
      shrink = limit_[i][h] == -INFINITY ? 1.f : exp2(base_[i][h] - base);
      row_sum_[i][h] *= shrink;
    }
    base_[i][h] = base;
    if (follows) limit_[i][h] = top + __fdividef(kSlack, scale);
  }

  __device__ static float row_max(float top) {
    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
    return fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
  }

  float base_[kM][2];     // the reference; 0 until the row has seen a key, because -inf - -inf is NaN
  float limit_[kM][2];    // a logit above it makes update() follow; -inf until the row has seen a key
  float row_sum_[kM][2];  // this thread's columns only; reduced at the end
};

template <int kM, int kN>
__device__ __forceinline__ void scale_rows(float (&o)[kM][kN][4], const float (&factor)[kM][2]) {
#pragma unroll
  for (int i = 0; i < kM; ++i)
#pragma unroll
    for (int j = 0; j < kN; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) o[i][j][e] *= factor[i][e / 2];
}

}  // namespace hfp
