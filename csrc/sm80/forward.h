// Forward: a block owns kBlockQ rows of one head and walks the key blocks that meet them. The order of one step, so
// that each load has a product to hide behind:
//   V(n) is on its way while S = Q K(n)^T is computed, K(n - 1) while the softmax and O += P V(n) are.
#pragma once

#include "common/key_blocks.h"
#include "common/logits.h"
#include "common/softmax.h"
#include "launch.h"
#include "sm80/tile.h"
#include "sm80/traits.h"

namespace hfp::sm80 {

template <class Arch_, typename Element_, int kHeadDim_, Variant kVariant_>
struct Forward {
  using Traits = ForwardTraits<Arch_, kHeadDim_>;
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr Variant kVariant = kVariant_;
  static constexpr int kBlockQ = Traits::kBlockQ;
  static constexpr int kBlockK = Traits::kBlockK;
  static constexpr int kThreads = Traits::kWarps * 32;
  static constexpr int kBlocksPerSM = Traits::kBlocksPerSM;

  static constexpr int kM = kBlockQ / Traits::kWarps / 16;  // 16-row tiles of a warp
  using TileQ = Tile<kBlockQ, kHeadDim>;
  using TileK = Tile<kBlockK, kHeadDim>;
  static constexpr int kSharedBytes = TileQ::kBytes + 2 * TileK::kBytes;
};

template <class F>
__global__ void __launch_bounds__(F::kThreads, F::kBlocksPerSM)
    forward_kernel(const __grid_constant__ AttentionParams p) {
  using Element = typename F::Element;
  using TileQ = typename F::TileQ;
  using TileK = typename F::TileK;
  constexpr int kM = F::kM, kBlockQ = F::kBlockQ, kBlockK = F::kBlockK;
  constexpr int kNS = kBlockK / 8, kNO = F::kHeadDim / 8;

  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t tile_q = smem_address(shared), tile_k = tile_q + TileQ::kBytes, tile_v = tile_k + TileK::kBytes;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;

  // Last rows first: under a causal mask they take longest. The tiles of a head are neighbours, and so are the heads
  // that share keys.
  const int tiles = static_cast<int>(p.query_tiles(kBlockQ));
  const int block = blockIdx.x / tiles, head = block % p.num_heads;
  const auto [batch, tile] =
      find_tile<kBlockQ>(p.mask.cu_seqlens_q, p.batch, block / p.num_heads, tiles - 1 - blockIdx.x % tiles);
  const int row0 = tile * kBlockQ;
  const Sequence seq(p.mask, batch);
  if (row0 >= seq.seqlen_q) return;

  Mask mask(p.mask, seq);
  const TileSpan span = mask.tile_span(row0, row0 + kBlockQ);
  mask.look_for_holes(span.any);
  KeyBlocks<kBlockK, reads_lists(F::kVariant)> cursor(mask, span, row0, head);

  using LoaderQ = RowLoader<TileQ, F::kThreads, Element>;
  using LoaderK = RowLoader<TileK, F::kThreads, Element>;
  const int head_k = head / p.heads_per_group;
  const LoaderK k(p.k, row_pointer<Element>(p.k, batch, seq.offset_k, head_k), p.head_dim, thread);
  const LoaderK v(p.v, row_pointer<Element>(p.v, batch, seq.offset_k, head_k), p.head_dim, thread);

  const int warp_row = row0 + warp * kM * 16;
  const int row = warp_row + lane / 4, lane_col = 2 * (lane % 4);
  const uint32_t frag_q = a_along<TileQ>(tile_q, warp * kM * 16, lane);
  const uint32_t frag_k = b_along<TileK>(tile_k, 0, lane);
  const uint32_t frag_v = b_down<TileK>(tile_v, 0, lane);
  const Dropout dropout(p.dropout);
  const LogitBias bias(p, batch, head);

  float o[kM][kNO][4];
  clear(o);
  Softmax<kM> softmax;

  if (cursor.valid()) {
    const LoaderQ q(p.q, row_pointer<Element>(p.q, batch, seq.offset_q, head), p.head_dim, thread);
    q.load(tile_q, row0, seq.seqlen_q);
    k.load(tile_k, cursor.block * kBlockK, seq.seqlen_k);
    cp_async_commit();
  }
#pragma unroll 1
  while (cursor.valid()) {
    const int n = cursor.block, bits = cursor.bits;
    cp_async_wait<0>();
    __syncthreads();  // K(n) has arrived; nobody reads V(n + 1) any more
    v.load(tile_v, n * kBlockK, seq.seqlen_k);
    cp_async_commit();

    float s[kM][kNS][4];
    clear(s);
    gemm_along<Element, TileQ, TileK, kM, kNS / 2, F::kHeadDim / 16>(s, not_hoisted(frag_q), not_hoisted(frag_k));

    cp_async_wait<0>();
    __syncthreads();  // V(n) has arrived; nobody reads K(n) any more
    cursor.next();
    if (cursor.valid()) k.load(tile_k, cursor.block * kBlockK, seq.seqlen_k);
    cp_async_commit();

    if constexpr (F::kVariant == Variant::kGeneral) bias_elements(bias, s, row, n * kBlockK + lane_col, mask.shift());
    if (const unsigned why = mask.template hidden<kBlockK>(span, n)) {
      mask_elements(mask, why, s, not_hoisted(row), n * kBlockK, lane);
    }
    if (reads_lists(F::kVariant) && bits != kFullTile) {
      mask_by_tile(p.mask.lists, bits, s, not_hoisted(row), n * kBlockK, lane);
    }
    float shrink[kM][2];
    if (softmax.template update<false>(s, shrink, p.exp2_scale, exp2_approx)) scale_rows(o, shrink);

    // The accumulator of S is, rounded, the A operand of the next product.
    uint32_t prob[kM][kBlockK / 16][4];
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int j = 0; j < kBlockK / 16; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float (&c)[4] = s[i][2 * j + e / 2];
          prob[i][j][e] = pack<Element>(c[2 * (e % 2)], c[2 * (e % 2) + 1]);
        }
    if (drops<F::kVariant>(p.dropout)) {
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        drop_pairs(dropout, batch * p.num_heads + head, prob[i], warp_row + 16 * i, n * kBlockK, lane);
      }
    }
    gemm_down<Element, OperandA::kRegisters, TileQ, TileK, kM, kNO / 2, kBlockK / 16, 1>(o, prob, not_hoisted(frag_v));
  }

  // O goes out through the warp's own rows of Q's tile, so that rows leave in 16-byte pieces.
  float* lse = p.lse + batch * p.lse_batch_stride + head * p.lse_head_stride + seq.offset_q;
  cp_async_wait<0>();
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float row_lse = softmax.finish(i, h);
      const int r = row + 16 * i + 8 * h;
      if (lane % 4 == 0 && r < seq.seqlen_q) lse[r] = row_lse;
      float scale = softmax.normalizer(i, h);
      if constexpr (F::kVariant != Variant::kPlain) scale *= p.dropout.rescale;
#pragma unroll
      for (int j = 0; j < kNO; ++j) {
        store_shared(tile_q + TileQ::offset(r - row0, j) + 4 * (lane % 4),
                     pack<Element>(o[i][j][2 * h] * scale, o[i][j][2 * h + 1] * scale));
      }
    }
  }
  __syncthreads();
  store_rows<TileQ, F::kThreads>(tile_q, p.out, row_pointer<Element>(p.out, batch, seq.offset_q, head), row0,
                                 seq.seqlen_q, p.head_dim, thread);
}

template <class Arch, typename Element, int kHeadDim, Variant kVariant>
void launch_forward(const AttentionParams& p, cudaStream_t stream) {
  using F = Forward<Arch, Element, kHeadDim, kVariant>;
  launch<forward_kernel<F>>({.name = "forward",
                             .blocks = p.query_tiles(F::kBlockQ) * p.num_heads * p.slots(),
                             .threads = F::kThreads,
                             .shared_bytes = F::kSharedBytes,
                             .stream = stream},
                            p);
}

template <class Arch, typename Element, int kHeadDim>
void run_forward(const AttentionParams& p, cudaStream_t stream) {
  with_variant(p, [&](auto variant) { launch_forward<Arch, Element, kHeadDim, variant>(p, stream); });
}

}  // namespace hfp::sm80

#define HFP_INSTANTIATE(arch, dtype, head_dim)                                                \
  namespace hfp {                                                                             \
  void forward_##arch##_##dtype##_##head_dim(const AttentionParams& p, cudaStream_t stream) { \
    sm80::run_forward<sm80::arch, sm80::dtype, head_dim>(p, stream);                          \
  }                                                                                           \
  }
