// The second kernel of decode: puts together the rows whose keys several thread blocks shared.
#pragma once

#include "common/packed.h"
#include "sm80/ptx.h"

namespace hfp::sm80 {

// A row's result over some keys: sums of 2^(logit - top) and of as much times v.
struct Partial {
  float top = -INFINITY;
  float sum = 0.f;
  float4 x = {0.f, 0.f, 0.f, 0.f};

  // Adds what was found for other keys.
  template <int kCount>
  __device__ __forceinline__ void add(const Partial (&others)[kCount]) {
    const float before = top;
#pragma unroll
    for (int i = 0; i < kCount; ++i) top = fmaxf(top, others[i].top);
    const float base = top == -INFINITY ? 0.f : top, shrink = exp2_approx(before - base);
    sum *= shrink;
    x = make_float4(x.x * shrink, x.y * shrink, x.z * shrink, x.w * shrink);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Partial& o = others[i];
      const float weight = exp2_approx(o.top - base);
      sum = fmaf(o.sum, weight, sum);
      x.x = fmaf(o.x.x, weight, x.x);
      x.y = fmaf(o.x.y, weight, x.y);
      x.z = fmaf(o.x.z, weight, x.z);
      x.w = fmaf(o.x.w, weight, x.w);
    }
  }
};

// The place of row `row` of a thread block's first or last tile in scratch.
__host__ __device__ __forceinline__ int64_t scratch_row(const DecodeParams& p, int block, bool last, int row) {
  const int rows = p.mask.seqlen_q * p.heads_per_group;  // packed, of a tile
  return (2 * int64_t{block} + last) * (rows < kDecodeRows ? rows : kDecodeRows) + row;
}

// Columns [col, col + 4) of a finished row and, from whoever has column 0, its lse.
template <typename Element>
__device__ __forceinline__ void write_row(const DecodeArguments& a, const Sequence& seq, int head_k, int packed_row,
                                          int col, const Partial& result) {
  const DecodeParams& p = a.p;
  uint32_t in_group;
  const uint32_t query = a.heads_per_group.divide(packed_row, in_group), head = head_k * p.heads_per_group + in_group;
  if (col == 0) {
    constexpr float kLn2 = 0.69314718055994531f;
    p.lse[seq.batch * p.lse_batch_stride + head * p.lse_head_stride + seq.offset_q + query] =
        result.sum > 0.f ? fmaf(result.top, kLn2, logf(result.sum)) : -INFINITY;
  }
  Element* to = row_pointer<Element>(p.out, seq.batch, seq.offset_q + query, head) + col;
  const float scale = result.sum > 0.f ? __fdividef(1.f, result.sum) : 0.f;
  const uint2 bits = {pack<Element>(result.x.x * scale, result.x.y * scale),
                      pack<Element>(result.x.z * scale, result.x.w * scale)};
  if (p.out.aligned && p.head_dim % 4 == 0) {
    if (col < p.head_dim) *reinterpret_cast<uint2*>(to) = bits;
    return;
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    if (col + e < p.head_dim) {
      reinterpret_cast<uint16_t*>(to)[e] = static_cast<uint16_t>((e < 2 ? bits.x : bits.y) >> 16 * (e % 2));
    }
  }
}

// Finishes the tiles that several thread blocks shared: where the share of a thread block begins within a tile, the one
// with its number here does a part of it.
template <class D>
struct Combine {
  static constexpr int kThreads = 256;
  static constexpr int kLanes = 8;  // that have 4 columns each
  static constexpr int kColumns = D::kHeadDim / (4 * kLanes);
  static constexpr int kLogGroups = 5;
  static_assert(kThreads == kLanes << kLogGroups);
  static constexpr int kAtOnce = 4;
};

// Rows of tiles that meet no key are nobody's.
template <class D>
__device__ __forceinline__ void clear_empty_tiles(const DecodeArguments& a) {
#pragma unroll 1
  for (int i = blockIdx.x; i < a.tiles; i += a.p.blocks) {
    const typename D::PackedTile tile(a, i);
    if (!tile.blocks.empty()) continue;
    constexpr int kQuads = D::kHeadDim / 4;
#pragma unroll 1
    for (int head_k = 0; head_k < a.p.num_heads_k; ++head_k) {
#pragma unroll 1
      for (int j = threadIdx.x; j < tile.rows_here() * kQuads; j += Combine<D>::kThreads) {
        write_row<typename D::Element>(a, tile.seq, head_k, tile.row0 + j / kQuads, j % kQuads * 4, Partial());
      }
    }
  }
}

// `at`, where the share of thread block `me` begins, is within the blocks of a tile and head.
template <class D>
__device__ __forceinline__ void combine_head(const DecodeArguments& a, const typename D::PackedTile& tile,
                                             const PackedHead& head, const Shares& shares, int me) {
  using C = Combine<D>;
  const DecodeParams& p = a.p;
  // Thread blocks [first, last] have pieces of the tile; all but the first begin within it and are helpers here. A unit
  // of work is 32 columns of a row. Some groups of threads share the pieces of one, four or more each.
  const int first = shares.owner(head.begin), last = shares.owner(head.begin + head.length - 1);
  const int helpers = last - first, helper = me - first - 1;
  const bool first_continues = shares.first(first) < head.begin;
  const int units = tile.rows_here() * C::kColumns;
  const int log_sharing = min(32 - __clz(helpers / C::kAtOnce), C::kLogGroups), sharing = 1 << log_sharing;
  const int group = threadIdx.x / C::kLanes, lane = threadIdx.x % C::kLanes;
  constexpr int kWarps = C::kThreads / 32;
  __shared__ Partial of_warps[kWarps][C::kLanes];
  wait_for_previous_kernel();

#pragma unroll 1
  for (int base = helper; base < units; base += helpers << (C::kLogGroups - log_sharing)) {
    const int unit = base + (group >> log_sharing) * helpers, row = min(unit, units - 1) / C::kColumns;
    const int col = (unit % C::kColumns * C::kLanes + lane) * 4;
    Partial result;
#pragma unroll 1
    for (int block = first + group % sharing; block <= last; block += C::kAtOnce << log_sharing) {
      Partial pieces[C::kAtOnce];
#pragma unroll
      for (int i = 0; i < C::kAtOnce; ++i) {
        const int wanted = block + (i << log_sharing), from = min(wanted, last);
        const int64_t at = scratch_row(p, from, from == first && first_continues, row);
        const float2 sums = reinterpret_cast<const float2*>(p.partial_sums)[at];
        pieces[i] = {wanted <= last ? sums.x : -INFINITY, sums.y,
                     *reinterpret_cast<const float4*>(p.partial_out + at * D::kHeadDim + col)};
      }
      result.add(pieces);
    }
    // Groups of a warp, then warps.
#pragma unroll 1
    for (int step = C::kLanes; step < min(32, C::kLanes << log_sharing); step *= 2) {
      const auto other = [&](float x) { return __shfl_xor_sync(0xffffffffu, x, step); };
      const Partial others[1] = {{other(result.top),
                                  other(result.sum),
                                  {other(result.x.x), other(result.x.y), other(result.x.z), other(result.x.w)}}};
      result.add(others);
    }
    if (const int warps = sharing * C::kLanes / 32; warps > 1) {
      const int warp = threadIdx.x / 32;
      if (threadIdx.x % 32 < C::kLanes) of_warps[warp][lane] = result;
      __syncthreads();
      Partial all[kWarps];
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        all[w] = of_warps[(warp + w) % kWarps][lane];
        if (w >= warps) all[w].top = -INFINITY;
      }
      result = Partial();
      result.add(all);
      __syncthreads();
    }
    if (group % sharing == 0 && unit < units) {
      write_row<typename D::Element>(a, tile.seq, head.head_k, tile.row0 + row, col, result);
    }
  }
}

template <class D>
__global__ void __launch_bounds__(Combine<D>::kThreads) combine_kernel(const __grid_constant__ DecodeArguments a) {
  clear_empty_tiles<D>(a);
  walk_share<Combine<D>::kThreads, typename D::PackedTile>(
      a, blockIdx.x,
      [&](const typename D::PackedTile& tile, const PackedHead& head, int at, int last, const Shares& shares) {
        if (at > head.begin) combine_head<D>(a, tile, head, shares, blockIdx.x);
        return last;
      });
  // The next kernel may start when this one has ended, and relies on both.
  wait_for_previous_kernel();
}

}  // namespace hfp::sm80
