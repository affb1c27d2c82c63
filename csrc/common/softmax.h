// Online softmax of the rows that one thread shares in: kM tiles of 16 rows, of which it holds rows g and g + 8, a
// quarter of the columns each. Base 2 throughout, the scale folded into the exponent.
#pragma once

#include <cmath>

namespace hfp {

template <int kM>
struct Softmax {
  float row_max[kM][2];
  float row_sum[kM][2];  // this thread's columns only; reduced at the end

  __device__ Softmax() {
#pragma unroll
    for (int i = 0; i < kM; ++i) {
      row_max[i][0] = row_max[i][1] = -INFINITY;
      row_sum[i][0] = row_sum[i][1] = 0.f;
    }
  }

  // Turns logits into probabilities relative to the running maximum. What was summed before, the output too, has then
  // to shrink by the factors returned. exp2 is the architecture's exponential.
  template <int kN, class Exp2>
  __device__ __forceinline__ void update(float (&s)[kM][kN][4], float (&shrink)[kM][2], float scale, Exp2 exp2) {
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float m = row_max[i][h];
#pragma unroll
        for (int j = 0; j < kN; ++j) m = fmaxf(m, fmaxf(s[i][j][2 * h], s[i][j][2 * h + 1]));
        m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 1));
        m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 2));
        // A row that has seen nothing has maximum -inf; exponents are taken from 0 then, because -inf - -inf is NaN.
        const float base = m == -INFINITY ? 0.f : m * scale;
        shrink[i][h] = exp2(fmaf(row_max[i][h], scale, -base));
        row_max[i][h] = m;
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
