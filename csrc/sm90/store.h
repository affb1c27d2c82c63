// From accumulators to rows of global memory: through shared memory and the copy engine, or straight.
#pragma once

#include "sm90/tile.h"

namespace hfp::sm90 {

// Among four neighbouring lanes, x[i] of lane j becomes x[j] of lane i.
__device__ __forceinline__ void transpose_quad(uint32_t (&x)[4], int lane_col) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const bool upper = lane_col & step;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      const uint32_t sent = upper ? x[i] : x[i + step];
      const uint32_t got = __shfl_xor_sync(0xffffffffu, sent, step);
      if (upper) {
        x[i] = got;
      } else {
        x[i + step] = got;
      }
    }
  }
}

// Writes row g + 8 * h of an accumulator, scaled, to `to`. Four lanes hold two columns each of 8; they trade so that
// each writes 16 bytes. For whole warps: `exists` says whether the row does. head_dim is a multiple of 8.
template <typename Element, int kN>
__device__ __forceinline__ void store_row(Element* to, bool exists, const float (&acc)[kN][4], int h, float scale,
                                          int head_dim, int lane_col) {
#pragma unroll
  for (int j = 0; j < kN; j += 4) {
    uint32_t x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = pack<Element>(acc[j + i][2 * h] * scale, acc[j + i][2 * h + 1] * scale);
    transpose_quad(x, lane_col);
    const int col = 8 * (j + lane_col);
    if (exists && col < head_dim) *reinterpret_cast<uint4*>(to + col) = make_uint4(x[0], x[1], x[2], x[3]);
  }
}

// Writes an accumulator, rows g and g + 8 scaled by scale[0] and scale[1], to rows [row, row + 16) of a tile in shared
// memory. For whole warps.
template <class Tile, typename Element, int kN>
__device__ __forceinline__ void store_to_tile(uint32_t tile, int row, const float (&acc)[kN][4],
                                              const float (&scale)[2], int lane) {
  const uint32_t to = tile + Tile::offset(row + lane % 16, lane / 16);
#pragma unroll
  for (int j = 0; j < kN; j += 2) {
    uint32_t x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float (&pair)[4] = acc[j + i / 2];
      x[i] = pack<Element>(pair[2 * (i % 2)] * scale[i % 2], pair[2 * (i % 2) + 1] * scale[i % 2]);
    }
    store_matrix4(Tile::step(to, j), x[0], x[1], x[2], x[3]);
  }
}

}  // namespace hfp::sm90
