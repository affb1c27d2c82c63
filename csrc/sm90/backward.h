// Backward on Hopper. A block of threads owns a block of keys of one key head, keeps their dK and dV in registers and
// walks the query tiles that meet them. Everything is computed transposed, keys as rows,
//   S^T = K Q^T, P^T = exp2(S^T - lse), dP^T = V dO^T, dS^T = P^T (dP^T - delta),
//   dV += P^T dO, dK += dS^T Q, dQ = dS K.
#pragma once

#include "sm90/backward_narrow.h"
#include "sm90/backward_wide.h"

namespace hfp::sm90 {

// ptxas-spill-ok(sm9015backward_kernel, 900): the planner lives in 24 registers

template <class B>
__global__ void __launch_bounds__(B::kThreads, 1) backward_kernel(const __grid_constant__ BackwardArguments a) {
  extern __shared__ unsigned char shared[];
  const uint32_t base = (smem_address(shared) + 1023) & ~1023u;
  auto* bars = reinterpret_cast<typename B::Barriers*>(shared + (base - smem_address(shared)) + B::kTileBytes);
  if (threadIdx.x == 0) {
    constexpr int kWarps = 4 * B::kConsumers;
    const auto init = [](uint64_t* bar, int arrivals) { barrier_init(smem_address(bar), arrivals); };
    init(&bars->k_full, 1);
    init(&bars->v_full, 1);
    init(&bars->k_empty, B::kConsumers);
    init(&bars->v_empty, B::kConsumers);
    for (int i = 0; i < B::kStagesQ; ++i) init(bars->q_full + i, 1), init(bars->q_empty + i, kWarps);
    for (int i = 0; i < B::kStagesDo; ++i) init(bars->do_full + i, 1), init(bars->do_empty + i, kWarps);
    for (int i = 0; i < B::kConsumers; ++i) init(bars->dq_full + i, 4), init(bars->dq_empty + i, 1);
    init(&bars->tile_full, 1);
    init(&bars->tile_empty, kWarps + 1);
    for (int i = 0; i < B::kPlans; ++i) init(bars->plan_full + i, 1), init(bars->plan_empty + i, 2);
    barrier_init_fence();
  }
  __syncthreads();
  if (__shfl_sync(0xffffffffu, threadIdx.x / 128, 0) == 0) {
    give_registers<B::kProducerRegisters>();
    if (threadIdx.x == 0) Loader<B>(a, bars, base).run();
    if (threadIdx.x == 32) add_dq<B>(a.p, bars, base + B::kAtDq);
    if (threadIdx.x == 64) Planner<B>(a, bars).run();
  } else {
    take_registers<B::kConsumerRegisters>();
    std::conditional_t<B::kWide, WideConsumer<B>, NarrowConsumer<B>>(a, bars, base).run();
  }
}

template <typename Element, int kHeadDim, Variant kVariant>
int64_t launch_backward(const BackwardParams& params, cudaStream_t stream) {
  using B = Backward<Element, kHeadDim, kVariant>;
  constexpr bool kBf16 = std::is_same_v<Element, bf16>;
  BackwardArguments a;
  a.p = {params};
  sm80::BackwardArguments& p = a.p;
  Carver carver(p.scratch);
  carve_row_terms(p, carver);
  sm80::carve_dq<B>(p, carver);
  p.next_item = carver.take<int>(1);
  if (!p.scratch) return carver.bytes();

  const MaskParams& m = p.mask;
  a.blocks = (m.seqlen_k + B::kBlockK - 1) / B::kBlockK;
  const int64_t heads = int64_t{p.batch} * p.num_heads_k, total = a.blocks * heads;
  const int64_t tiles = int64_t{p.batch} * p.num_heads * ((m.seqlen_q + B::kBlockQ - 1) / B::kBlockQ);
  if (total > 0x7fffffff) throw std::runtime_error("hf_flash_patch: backward: more than 2^31 - 1 blocks of keys");
  a.total = static_cast<int>(total);
  // Q, dO and the accumulator of a section stay in the L2 cache.
  const int64_t head_bytes = int64_t{p.heads_per_group} * m.seqlen_q * B::kHeadDim * 8;
  const int section = m.uneven() ? section_size(static_cast<int>(heads), head_bytes) : 1;
  a.section_items = Divisor(section * std::max(a.blocks, 1));
  a.section_heads = Divisor(section);
  a.num_heads_k = Divisor(p.num_heads_k);

  const int batch = m.cu_seqlens_q ? 1 : p.batch;
  a.q = tensor_map(p.q, p.head_dim, p.rows_q, p.num_heads, batch, B::TileQ::kPanel, B::kBlockQ, kBf16);
  a.dout = tensor_map(p.dout, p.head_dim, p.rows_q, p.num_heads, batch, B::TileQ::kPanel, B::kBlockQ, kBf16);
  a.k = tensor_map(p.k, p.head_dim, p.rows_k, p.num_heads_k, batch, B::TileK::kPanel, B::kBlockK, kBf16);
  a.v = tensor_map(p.v, p.head_dim, p.rows_k, p.num_heads_k, batch, B::TileK::kPanel, B::kBlockK, kBf16);
  a.dk = tensor_map(p.dk, p.head_dim, p.rows_k, p.num_heads_k, batch, B::TileK::kPanel, 64, kBf16);
  a.dv = tensor_map(p.dv, p.head_dim, p.rows_k, p.num_heads_k, batch, B::TileK::kPanel, 64, kBf16);
  Launch edge{
      .name = "backward_begin", .blocks = tiles, .threads = sm80::kEdgeThreads, .shared_bytes = 0, .stream = stream};
  launch<sm80::backward_begin_kernel<B>>(edge, p);
  launch<backward_kernel<B>>({.name = "backward",
                              .blocks = std::min(a.total, multiprocessors()),
                              .threads = B::kThreads,
                              .shared_bytes = B::kSharedBytes,
                              .stream = stream},
                             a);
  edge.name = "backward_end";
  launch<backward_end_kernel<B>>(edge, p);
  return carver.bytes();
}

template <typename Element, int kHeadDim>
int64_t run_backward(const BackwardParams& p, cudaStream_t stream) {
  if (p.is_general()) return launch_backward<Element, kHeadDim, Variant::kGeneral>(p, stream);
  if (p.dropout.rng_state) return launch_backward<Element, kHeadDim, Variant::kDropout>(p, stream);
  return launch_backward<Element, kHeadDim, Variant::kPlain>(p, stream);
}

}  // namespace hfp::sm90

#define HFP_INSTANTIATE(arch, dtype, head_dim)                                                   \
  namespace hfp {                                                                                \
  int64_t backward_##arch##_##dtype##_##head_dim(const BackwardParams& p, cudaStream_t stream) { \
    return sm90::run_backward<sm90::dtype, head_dim>(p, stream);                                 \
  }                                                                                              \
  }
