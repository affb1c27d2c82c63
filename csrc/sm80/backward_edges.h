// What comes before and after the main kernel of backward, and the accumulation of dQ between them. A tile of dQ is
// kept in fp32 in the order in which the threads hold it, so that every access is 128 contiguous bytes a warp.
#pragma once

#include "common/mask.h"
#include "common/scratch.h"
#include "sm80/tile.h"

namespace hfp::sm80 {

constexpr int kEdgeThreads = 256;

struct BackwardArguments : BackwardParams {
  float* dq_accum = nullptr;  // [num_heads, scratch_rows, padded head_dim] fp32, each tile in accumulator order
  int* dq_turn = nullptr;     // [num_heads, scratch_rows / kBlockQ] deterministic only: how many key blocks have added
                              // to the tile
};

// One tile of rows of one head: which, and whether it exists.
template <class B>
struct RowTile {
  int tile, head, batch;
  __device__ explicit RowTile(const BackwardParams& p) {
    const int tiles = static_cast<int>(p.query_tiles(B::kBlockQ));
    head = blockIdx.x / tiles % p.num_heads;
    const SequenceTile at =
        find_tile<B::kBlockQ>(p.mask.cu_seqlens_q, p.batch, blockIdx.x / tiles / p.num_heads, blockIdx.x % tiles);
    tile = at.tile;
    batch = at.sequence;
  }
};

// Carves dQ's accumulator, and what orders the additions to it.
template <class B>
void carve_dq(BackwardArguments& p, Carver& carver) {
  p.dq_accum = carver.take<float>(p.scratch_rows * p.num_heads * B::kHeadDim);
  if (p.deterministic) p.dq_turn = carver.take<int>(p.scratch_rows * p.num_heads / B::kBlockQ);
}

// lse in base 2 and delta = rowsum(dout * out) - dlse of a tile, by kEdgeThreads threads. A row that sees nothing has
// no gradient, whatever its dlse.
template <class B>
__device__ __forceinline__ void write_row_terms(const BackwardParams& p, const RowTile<B>& at, const Sequence& seq,
                                                int64_t scratch) {
  using Element = typename B::Element;
  constexpr int kLanes = B::kHeadDim <= 32    ? 4
                         : B::kHeadDim <= 64  ? 8
                         : B::kHeadDim <= 128 ? 16
                                              : 32;  // 8 columns each
  constexpr float kLog2e = 1.4426950408889634f;
  const int row0 = at.tile * B::kBlockQ;
  const Element* out = row_pointer<Element>(p.out, at.batch, seq.offset_q, at.head);
  const Element* dout = row_pointer<Element>(p.dout, at.batch, seq.offset_q, at.head);
  const int64_t lse0 = at.batch * p.lse_batch_stride + at.head * p.lse_head_stride + seq.offset_q;
  const int col = threadIdx.x % kLanes * 8;
  const bool vector = p.out.aligned && p.dout.aligned && col + 8 <= p.head_dim;

#pragma unroll
  for (int i = 0; i < B::kBlockQ * kLanes / kEdgeThreads; ++i) {
    const int r = threadIdx.x / kLanes + i * (kEdgeThreads / kLanes), row = row0 + r;
    float sum = 0.f;
    if (row < seq.seqlen_q) {
      const Element* a = out + row * p.out.row_stride + col;
      const Element* b = dout + row * p.dout.row_stride + col;
      if (vector) {
        const uint4 x = *reinterpret_cast<const uint4*>(a), y = *reinterpret_cast<const uint4*>(b);
        const uint32_t u[4] = {x.x, x.y, x.z, x.w}, v[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float2 f = unpack<Element>(u[k]), g = unpack<Element>(v[k]);
          sum = fmaf(f.x, g.x, fmaf(f.y, g.y, sum));
        }
      } else {
        for (int c = 0; c < min(8, p.head_dim - col); ++c)
          sum = fmaf(static_cast<float>(a[c]), static_cast<float>(b[c]), sum);
      }
    }
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (threadIdx.x % kLanes == 0) {
      const float lse = row < seq.seqlen_q ? p.lse[lse0 + row] : -INFINITY;
      const bool sees = lse != -INFINITY;
      p.lse_log2[scratch + r] = sees ? lse * kLog2e : INFINITY;
      p.delta[scratch + r] = sees ? sum - (p.dlse ? p.dlse[lse0 + row] : 0.f) : 0.f;
    }
  }
}

// What the main kernel reads: the row terms, and a zeroed tile of dQ.
template <class B>
__global__ void __launch_bounds__(kEdgeThreads) backward_begin_kernel(const __grid_constant__ BackwardArguments p) {
  const RowTile<B> at(p);
  const Sequence seq(p.mask, at.batch);
  const int row0 = at.tile * B::kBlockQ;
  if (row0 >= seq.seqlen_q) return;
  const int64_t scratch = at.head * p.scratch_rows + seq.scratch_row(p.mask) + row0;
  write_row_terms<B>(p, at, seq, scratch);
  float4* accum = reinterpret_cast<float4*>(p.dq_accum + scratch * B::kHeadDim);
  for (int i = threadIdx.x; i < B::kBlockQ * B::kHeadDim / 4; i += kEdgeThreads)
    accum[i] = make_float4(0.f, 0.f, 0.f, 0.f);
  if (p.dq_turn && threadIdx.x == 0) p.dq_turn[scratch / B::kBlockQ] = 0;
}

template <class B>
__device__ __forceinline__ void add_dq(float* accum, const float (&dq)[B::kMQ][B::kNQ][4], int thread) {
#pragma unroll
  for (int i = 0; i < B::kMQ; ++i)
#pragma unroll
    for (int j = 0; j < B::kNQ; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) add_global(accum + ((i * B::kNQ + j) * 4 + e) * B::kThreads + thread, dq[i][j][e]);
}

// dQ = accumulated * softmax_scale, rounded, in its place.
template <class B>
__global__ void __launch_bounds__(B::kThreads) backward_end_kernel(const __grid_constant__ BackwardArguments p) {
  using Element = typename B::Element;
  using TileQ = typename B::TileQ;
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t tile = smem_address(shared);
  const RowTile<B> at(p);
  const Sequence seq(p.mask, at.batch);
  const int row0 = at.tile * B::kBlockQ;
  if (row0 >= seq.seqlen_q) return;
  const int64_t scratch = at.head * p.scratch_rows + seq.scratch_row(p.mask) + row0;
  const float* accum = p.dq_accum + scratch * B::kHeadDim + threadIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = warp % B::kWarpsDq * B::kMQ * 16 + lane / 4, col = warp / B::kWarpsDq * 2;
#pragma unroll
  for (int i = 0; i < B::kMQ; ++i)
#pragma unroll
    for (int j = 0; j < B::kNQ; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float* from = accum + ((i * B::kNQ + j) * 4 + 2 * h) * B::kThreads;
        const int chunk = j / 2 * 2 * B::kWarpsDqD + col + j % 2;
        store_shared(tile + TileQ::offset(row + 16 * i + 8 * h, chunk) + 4 * (lane % 4),
                     pack<Element>(from[0] * p.softmax_scale, from[B::kThreads] * p.softmax_scale));
      }
  __syncthreads();
  store_rows<TileQ, B::kThreads>(tile, p.dq, row_pointer<Element>(p.dq, at.batch, seq.offset_q, at.head), row0,
                                 seq.seqlen_q, p.head_dim, threadIdx.x);
}

// In deterministic mode the key blocks that meet a tile add to it in ascending order: a block waits until those before
// it have. Blocks start in ascending order, so whoever is waited for is running or done.
class DqTurn {
 public:
  __device__ DqTurn(int* counter, int turn) : counter_(counter), turn_(turn) {}
  __device__ void wait() const {
    if (!counter_) return;
    if (threadIdx.x == 0) {
      while (*static_cast<volatile int*>(counter_) != turn_) __nanosleep(20);
      __threadfence();
    }
    __syncthreads();
  }
  __device__ void pass() const {
    if (!counter_) return;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) atomicExch(counter_, turn_ + 1);
  }

 private:
  int* counter_;
  int turn_;
};

}  // namespace hfp::sm80
