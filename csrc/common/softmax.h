// Online softmax of the rows that one thread shares in: kM tiles of 16 rows, of which it holds rows g and g + 8, a
// quarter of the columns each. Base 2 throughout, the scale folded into the exponent.
#pragma once

#include <cmath>

namespace hfp {

template <int kM>
struct Softmax {
  // The maximum that exponents are taken from may lie below the row's by kSlack in base 2. After the first few blocks
  // it hardly ever has to follow then, and what was summed before need not shrink. Probabilities reach 2^kSlack, which
  // every dtype holds with the same relative precision as 1.
  static constexpr float kSlack = 8.f;
  float row_max[kM][2];
  float row_sum[kM][2];  // this thread's columns only; reduced at the end

  __device__ Softmax() {
#pragma unroll
    for (int i = 0; i < kM; ++i) {
      row_max[i][0] = row_max[i][1] = -INFINITY;
      row_sum[i][0] = row_sum[i][1] = 0.f;
    }
  }

  // Turns logits into probabilities relative to the running maximum. Returns whether what was summed before, the output
  // too, has then to shrink by the factors given, for some row of the warp. exp2 is the architecture's exponential.
  template <int kN, class Exp2>
  __device__ __forceinline__ bool update(float (&s)[kM][kN][4], float (&shrink)[kM][2], float scale, Exp2 exp2) {
    bool grows = false;
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float m = row_max[i][h];
#pragma unroll
        for (int j = 0; j < kN; ++j) m = fmaxf(m, fmaxf(s[i][j][2 * h], s[i][j][2 * h + 1]));
        m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 1));
        m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 2));
        const bool follows = (m - row_max[i][h]) * scale > kSlack;  // not if both are -inf
        m = follows ? m : row_max[i][h];
        // A row that has seen nothing has maximum -inf; exponents are taken from 0 then, because -inf - -inf is NaN.
        const float base = m == -INFINITY ? 0.f : m * scale;
        shrink[i][h] = follows ? exp2(fmaf(row_max[i][h], scale, -base)) : 1.f;
        row_max[i][h] = m;
        grows |= follows;
        float sum = 0.f;
#pragma unroll
        for (int j = 0; j < kN; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            s[i][j][2 * h + e] = exp2(fmaf(s[i][j][2 * h + e], scale, -base));
            sum += s[i][j][2 * h + e];
          }
        }
        row_sum[i][h] = fmaf(row_sum[i][h], shrink[i][h], sum);
      }
    }
    return __any_sync(0xffffffffu, grows);
  }

  // Completes the sum of row (i, h).
  __device__ float complete(int i, int h) {
    float sum = row_sum[i][h];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    return row_sum[i][h] = sum;
  }

  // Completes the sum; returns the natural-log sum of exponentials of row (i, h), -inf where it saw nothing.
  __device__ float finish(int i, int h, float scale) {
    const float sum = complete(i, h);
    constexpr float kLn2 = 0.69314718055994531f;
    return sum > 0.f ? kLn2 * fmaf(row_max[i][h], scale, __log2f(sum)) : -INFINITY;
  }
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
