// Backward: a block owns kBlockK keys of one key head, keeps dK and dV in registers, and walks the query tiles that
// meet them, of every query head that shares the key head. So dK and dV need no accumulation across blocks; dQ does, in
// fp32.
//   S = Q K^T, P = exp2(S - lse), dP = dO V^T, dS = P (dP - delta), dV += P^T dO, dQ += dS K, dK += dS^T Q
#pragma once

#include "common/logits.h"
#include "common/query_tiles.h"
#include "launch.h"
#include "sm80/backward_edges.h"
#include "sm80/tile.h"
#include "sm80/traits.h"

namespace hfp::sm80 {

template <class Arch_, typename Element_, int kHeadDim_, Variant kVariant_>
struct Backward {
  using Traits = BackwardTraits<Arch_, kHeadDim_>;
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr Variant kVariant = kVariant_;
  static constexpr int kBlockQ = Traits::kBlockQ;
  static constexpr int kBlockK = Traits::kBlockK;
  static constexpr int kStages = Traits::kStages;
  static constexpr int kWarps = Traits::kWarps;
  static constexpr int kThreads = kWarps * 32;
  static_assert(kScratchTile % kBlockQ == 0);

  // How the warps share each product: kWarps* along the first dimension, the rest along the second.
  static constexpr int kWarpsQ = Traits::kWarpsQ, kWarpsKeys = kWarps / kWarpsQ;    // S, dP: rows x keys
  static constexpr int kWarpsK = Traits::kWarpsK, kWarpsDkv = kWarps / kWarpsK;     // dK, dV: keys x columns
  static constexpr int kWarpsDq = Traits::kWarpsDq, kWarpsDqD = kWarps / kWarpsDq;  // dQ: rows x columns
  static constexpr int kMS = kBlockQ / kWarpsQ / 16, kNS = kBlockK / kWarpsKeys / 8;
  static constexpr int kMK = kBlockK / kWarpsK / 16, kNK = kHeadDim / kWarpsDkv / 8;
  static constexpr int kMQ = kBlockQ / kWarpsDq / 16, kNQ = kHeadDim / kWarpsDqD / 8;

  using TileQ = Tile<kBlockQ, kHeadDim>;
  using TileK = Tile<kBlockK, kHeadDim>;
  using TileS = Tile<kBlockQ, kBlockK>;
  static constexpr int kSharedBytes = 2 * TileK::kBytes + 2 * kStages * TileQ::kBytes + 2 * TileS::kBytes;
};

// Of rows g and g + 8 of each 16, from a vector over the rows.
template <int kM>
__device__ __forceinline__ void load_per_row(float (&x)[kM][2], const float* from) {
#pragma unroll
  for (int i = 0; i < kM; ++i) {
    x[i][0] = from[16 * i];
    x[i][1] = from[16 * i + 8];
  }
}

template <class B>
__global__ void __launch_bounds__(B::kThreads, 1) backward_kernel(const __grid_constant__ BackwardArguments p) {
  using Element = typename B::Element;
  using TileQ = typename B::TileQ;
  using TileK = typename B::TileK;
  using TileS = typename B::TileS;
  constexpr int kBlockQ = B::kBlockQ, kBlockK = B::kBlockK, kMS = B::kMS, kNS = B::kNS;

  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t tile_k = smem_address(shared), tile_v = tile_k + TileK::kBytes, tile_q = tile_v + TileK::kBytes;
  const uint32_t tile_do = tile_q + B::kStages * TileQ::kBytes;
  const uint32_t tile_p = tile_do + B::kStages * TileQ::kBytes, tile_ds = tile_p + TileS::kBytes;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;

  // First keys first: under a causal mask they are seen by most rows.
  const int blocks = static_cast<int>(p.key_tiles(kBlockK)), head_k = blockIdx.x / blocks % p.num_heads_k;
  const auto [sequence, block] =
      find_tile<kBlockK>(p.mask.cu_seqlens_k, p.batch, blockIdx.x / blocks / p.num_heads_k, blockIdx.x % blocks);
  const Sequence seq(p.mask, sequence);
  const int key0 = block * kBlockK;
  if (key0 >= seq.stored_k) return;
  const Mask mask(p.mask, seq);
  const bool ordered = p.dq_turn != nullptr;
  QueryTiles<B> at(mask, block, head_k * p.heads_per_group, p.heads_per_group, ordered);

  using LoaderQ = RowLoader<TileQ, B::kThreads, Element>;
  using LoaderK = RowLoader<TileK, B::kThreads, Element>;
  const int head0 = head_k * p.heads_per_group;
  const LoaderQ q(p.q, row_pointer<Element>(p.q, seq.batch, seq.offset_q, head0), p.head_dim, thread);
  const LoaderQ dout(p.dout, row_pointer<Element>(p.dout, seq.batch, seq.offset_q, head0), p.head_dim, thread);
  const int64_t scratch_row = seq.scratch_row(p.mask);

  // Where this warp reads and writes.
  const int s_row = warp % B::kWarpsQ * kMS * 16, s_col = warp / B::kWarpsQ * kNS * 8;
  const int k_row = warp % B::kWarpsK * B::kMK * 16, k_col = warp / B::kWarpsK * 2;
  const int q_row = warp % B::kWarpsDq * B::kMQ * 16, q_col = warp / B::kWarpsDq * 2;
  const uint32_t s_from_q = a_along<TileQ>(0, s_row, lane), s_from_k = b_along<TileK>(0, s_col, lane);
  const uint32_t k_from_s = a_down<TileS>(0, k_row / 8, lane), k_from_q = b_down<TileQ>(0, k_col, lane);
  const uint32_t q_from_s = a_along<TileS>(0, q_row, lane), q_from_k = b_down<TileK>(0, q_col, lane);
  const uint32_t s_to = TileS::offset(s_row + lane / 4, s_col / 8) + 4 * (lane % 4);
  const int lane_col = 2 * (lane % 4);

  float dk[B::kMK][B::kNK][4], dv[B::kMK][B::kNK][4];
  clear(dk);
  clear(dv);

  int stage = 0;
  if (at.valid()) {
    const LoaderK k(p.k, row_pointer<Element>(p.k, seq.batch, seq.offset_k, head_k), p.head_dim, thread);
    const LoaderK v(p.v, row_pointer<Element>(p.v, seq.batch, seq.offset_k, head_k), p.head_dim, thread);
    k.load(tile_k, key0, seq.seqlen_k);
    v.load(tile_v, key0, seq.seqlen_k);
    q.load(tile_q, at.tile * kBlockQ, seq.seqlen_q, at.head * p.q.head_stride);
    dout.load(tile_do, at.tile * kBlockQ, seq.seqlen_q, at.head * p.dout.head_stride);
    cp_async_commit();
  }
#pragma unroll 1
  while (at.valid()) {
    const int row0 = at.tile * kBlockQ, head = head0 + at.head;
    const unsigned hidden = at.hidden;
    const int turn = at.turn, bits = at.bits;
    const int64_t scratch = head * p.scratch_rows + scratch_row + row0;
    const uint32_t q_now = tile_q + stage * TileQ::kBytes, do_now = tile_do + stage * TileQ::kBytes;
    cp_async_wait<0>();
    __syncthreads();  // Q and dO have arrived; nobody reads the other Q, P or dS any more
    at.next();
    const bool more = at.valid();
    if constexpr (B::kStages == 2) {
      stage ^= 1;
      if (more) {
        q.load(tile_q + stage * TileQ::kBytes, at.tile * kBlockQ, seq.seqlen_q, at.head * p.q.head_stride);
        dout.load(tile_do + stage * TileQ::kBytes, at.tile * kBlockQ, seq.seqlen_q, at.head * p.dout.head_stride);
      }
      cp_async_commit();
    }

    float lse[kMS][2], delta[kMS][2];
    load_per_row<kMS>(lse, p.lse_log2 + scratch + s_row + lane / 4);

    // P, in registers for dS and, without what dropout drops, in memory for dV.
    float s[kMS][kNS][4];
    clear(s);
    gemm_along<Element, TileQ, TileK, kMS, kNS / 2, B::kHeadDim / 16>(s, not_hoisted(s_from_q) + q_now,
                                                                      not_hoisted(s_from_k) + tile_k);
    const int row = not_hoisted(row0 + s_row + lane / 4);
    const LogitBias bias(p, seq.batch, head);
    if constexpr (B::kVariant == Variant::kGeneral) bias_elements(bias, s, row, key0 + s_col + lane_col, mask.shift());
    if (hidden) mask_elements(mask, hidden, s, row, key0 + s_col, lane);
    if (reads_lists(B::kVariant) && bits != kFullTile) {
      mask_by_tile(p.mask.lists, bits, s, row, key0 + s_col, lane);
    }
#pragma unroll
    for (int i = 0; i < kMS; ++i)
#pragma unroll
      for (int j = 0; j < kNS; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[i][j][e] = exp2_approx(fmaf(s[i][j][e], p.exp2_scale, -lse[i][e / 2]));

    if (drops<B::kVariant>(p.dropout)) {
      const Dropout dropout(p.dropout);
#pragma unroll
      for (int i = 0; i < kMS; ++i) {
        mark_dropped<false>(dropout, seq.batch * p.num_heads + head, s[i], row0 + s_row + 16 * i, key0 + s_col, lane);
      }
    }
    const uint32_t p_at = tile_p + not_hoisted(s_to);
#pragma unroll
    for (int i = 0; i < kMS; ++i)
#pragma unroll
      for (int j = 0; j < kNS; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float a = s[i][j][2 * h], b = s[i][j][2 * h + 1];
          store_shared(TileS::step(p_at, j) + (16 * i + 8 * h) * TileS::kRowBytes,
                       can_drop(B::kVariant) ? pack_positive<Element>(a, b) : pack<Element>(a, b));
        }

    load_per_row<kMS>(delta, p.delta + scratch + s_row + lane / 4);
    float dp[kMS][kNS][4];
    clear(dp);
    gemm_along<Element, TileQ, TileK, kMS, kNS / 2, B::kHeadDim / 16>(dp, not_hoisted(s_from_q) + do_now,
                                                                      not_hoisted(s_from_k) + tile_v);
#pragma unroll
    for (int i = 0; i < kMS; ++i)
#pragma unroll
      for (int j = 0; j < kNS; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float prob = fabsf(s[i][j][e]), delta_row = delta[i][e / 2];
          float ds = prob * (dp[i][j][e] - delta_row);
          if constexpr (can_drop(B::kVariant)) {
            const float y = is_dropped(s[i][j][e]) ? 0.f : dp[i][j][e];
            ds = prob * (y * p.dropout.rescale - delta_row);
          }
          if constexpr (B::kVariant == Variant::kGeneral) {
            const int distance = row + 16 * i + 8 * (e / 2) + mask.shift() - (key0 + s_col + lane_col + 8 * j + e % 2);
            ds *= bias.derivative(prob, lse[i][e / 2], distance);
          }
          dp[i][j][e] = ds;
        }
    const uint32_t ds_at = tile_ds + not_hoisted(s_to);
#pragma unroll
    for (int i = 0; i < kMS; ++i)
#pragma unroll
      for (int j = 0; j < kNS; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          store_shared(TileS::step(ds_at, j) + (16 * i + 8 * h) * TileS::kRowBytes,
                       pack<Element>(dp[i][j][2 * h], dp[i][j][2 * h + 1]));
        }
    __syncthreads();  // P and dS are complete

    gemm_down<Element, OperandA::kDown, TileS, TileQ, B::kMK, B::kNK / 2, kBlockQ / 16, B::kWarpsDkv>(
        dv, not_hoisted(k_from_s) + tile_p, not_hoisted(k_from_q) + do_now);
    if constexpr (B::kStages == 1) {
      __syncthreads();  // nobody reads dO any more
      if (more) dout.load(tile_do, at.tile * kBlockQ, seq.seqlen_q, at.head * p.dout.head_stride);
      cp_async_commit();
    }

    float dq[B::kMQ][B::kNQ][4];
    clear(dq);
    gemm_down<Element, OperandA::kAlong, TileS, TileK, B::kMQ, B::kNQ / 2, kBlockK / 16, B::kWarpsDqD>(
        dq, not_hoisted(q_from_s) + tile_ds, not_hoisted(q_from_k) + tile_k);
    DqTurn order(ordered ? p.dq_turn + scratch / kBlockQ : nullptr, turn);
    order.wait();
    add_dq<B>(p.dq_accum + scratch * B::kHeadDim, dq, thread);
    order.pass();

    gemm_down<Element, OperandA::kDown, TileS, TileQ, B::kMK, B::kNK / 2, kBlockQ / 16, B::kWarpsDkv>(
        dk, not_hoisted(k_from_s) + tile_ds, not_hoisted(k_from_q) + q_now);
    if constexpr (B::kStages == 1) {
      __syncthreads();  // nobody reads Q any more
      if (more) q.load(tile_q, at.tile * kBlockQ, seq.seqlen_q, at.head * p.q.head_stride);
      cp_async_commit();
    }
  }

  // dK and dV go out through the tiles of K and V.
  cp_async_wait<0>();
  __syncthreads();
#pragma unroll
  for (int i = 0; i < B::kMK; ++i)
#pragma unroll
    for (int j = 0; j < B::kNK; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int chunk = j / 2 * 2 * B::kWarpsDkv + k_col + j % 2;
        const uint32_t at_row = TileK::offset(k_row + 16 * i + 8 * h + lane / 4, chunk) + 4 * (lane % 4);
        const float scale_v = B::kVariant == Variant::kPlain ? 1.f : p.dropout.rescale;
        store_shared(tile_k + at_row,
                     pack<Element>(dk[i][j][2 * h] * p.softmax_scale, dk[i][j][2 * h + 1] * p.softmax_scale));
        store_shared(tile_v + at_row, pack<Element>(dv[i][j][2 * h] * scale_v, dv[i][j][2 * h + 1] * scale_v));
      }
  __syncthreads();
  store_rows<TileK, B::kThreads>(tile_k, p.dk, row_pointer<Element>(p.dk, seq.batch, seq.offset_k, head_k), key0,
                                 seq.stored_k, p.head_dim, thread);
  store_rows<TileK, B::kThreads>(tile_v, p.dv, row_pointer<Element>(p.dv, seq.batch, seq.offset_k, head_k), key0,
                                 seq.stored_k, p.head_dim, thread);
}

template <class Arch, typename Element, int kHeadDim, Variant kVariant>
int64_t launch_backward(const BackwardParams& params, cudaStream_t stream) {
  using B = Backward<Arch, Element, kHeadDim, kVariant>;
  BackwardArguments p{params};
  Carver carver(p.scratch);
  carve_row_terms(p, carver);
  carve_dq<B>(p, carver);
  if (!p.scratch) return carver.bytes();
  const int64_t tiles = p.query_tiles(B::kBlockQ) * p.num_heads * p.slots();
  const int64_t blocks = p.key_tiles(B::kBlockK) * p.num_heads_k * p.slots();
  launch<backward_begin_kernel<B>>(
      {.name = "backward_begin", .blocks = tiles, .threads = kEdgeThreads, .shared_bytes = 0, .stream = stream}, p);
  launch<backward_kernel<B>>(
      {.name = "backward", .blocks = blocks, .threads = B::kThreads, .shared_bytes = B::kSharedBytes, .stream = stream},
      p);
  launch<backward_end_kernel<B>>({.name = "backward_end",
                                  .blocks = tiles,
                                  .threads = B::kThreads,
                                  .shared_bytes = B::TileQ::kBytes,
                                  .stream = stream},
                                 p);
  return carver.bytes();
}

template <class Arch, typename Element, int kHeadDim>
int64_t run_backward(const BackwardParams& p, cudaStream_t stream) {
  return with_variant(p, [&](auto variant) { return launch_backward<Arch, Element, kHeadDim, variant>(p, stream); });
}

}  // namespace hfp::sm80

#define HFP_INSTANTIATE(arch, dtype, head_dim)                                                   \
  namespace hfp {                                                                                \
  int64_t backward_##arch##_##dtype##_##head_dim(const BackwardParams& p, cudaStream_t stream) { \
    return sm80::run_backward<sm80::arch, sm80::dtype, head_dim>(p, stream);                     \
  }                                                                                              \
  }
