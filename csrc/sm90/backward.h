// Backward on Hopper. A block of threads owns a block of keys of one key head, keeps their dK and dV in registers and
// walks the query tiles that meet them. Everything is computed transposed, keys as rows,
//   S^T = K Q^T, P^T = exp2(S^T - lse), dP^T = V dO^T, dS^T = P^T (dP^T - delta),
//   dV += P^T dO, dK += dS^T Q, dQ = dS K.
#pragma once

#include "sm90/backward_dq.h"
#include "sm90/backward_narrow.h"
#include "sm90/backward_owned.h"
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
    init(&bars->k_empty, kWarps);
    init(&bars->v_empty, kWarps);
    for (int i = 0; i < B::kStagesQ; ++i) init(bars->q_full + i, 1), init(bars->q_empty + i, kWarps);
    for (int i = 0; i < B::kStagesDo; ++i) init(bars->do_full + i, 1), init(bars->do_empty + i, kWarps);
    for (int i = 0; i < B::kConsumers; ++i) {
      init(bars->dq_full + i, 4);
      init(bars->dq_empty + i, 1);
      init(bars->dq_loaded + i, 1);
    }
    init(&bars->landed, 1);
    init(&bars->left, B::kConsumers);
    for (uint64_t& bar : bars->round_full) init(&bar, 1);
    init(&bars->tile_full, 1);
    init(&bars->tile_empty, kWarps + 1);
    for (int i = 0; i < B::kPlans; ++i) init(bars->plan_full + i, 1), init(bars->plan_empty + i, 2);
    barrier_init_fence();
  }
  sm80::wait_for_previous_kernel();
  // The first block of keys too is whoever's comes first: thread blocks wait for each other's dQ, and some may start
  // when others have ended, where another kernel holds multiprocessors.
  if (!B::kOwns && threadIdx.x == 0) bars->first_item = atomicAdd(&a.counters->next_item, 1);
  __syncthreads();
  if (__shfl_sync(0xffffffffu, threadIdx.x / 128, 0) == 0) {
    give_registers<B::kProducerRegisters>();
    if (threadIdx.x == 0) Loader<B>(a, bars, base).run();
    if (threadIdx.x == 32) std::conditional_t<B::kOwns, OwnedAdder<B>, Adder<B>>(a, bars, base).run();
    if (threadIdx.x == 64) Planner<B>(a, bars).run();
    if (threadIdx.x >= 96) {
      if constexpr (B::kOwns) {
        clear_unseen<B>(a);
      } else {
        Tidier<B>(a, bars, base).run();
      }
    }
  } else {
    take_registers<B::kConsumerRegisters>();
    std::conditional_t<B::kWide, WideConsumer<B>, NarrowConsumer<B>>(a, bars, base).run();
    if constexpr (B::kOwns) return;
    named_sync(1, 128 * B::kConsumers);  // the tiles have no use any more
    const int warp = uniform(threadIdx.x / 32) - 4;
    Rounder<B> rounder(a, base + warp * B::kRoundBytes, bars->round_full + 1 + warp);
    while (!rounder.done())
      if (!rounder.step()) __nanosleep(100);
  }
}

template <class B>
int64_t launch_backward(const BackwardParams& params, cudaStream_t stream) {
  using Element = typename B::Element;
  constexpr bool kBf16 = std::is_same_v<Element, bf16>;
  BackwardArguments a;
  a.p = {params};
  sm80::BackwardArguments& p = a.p;
  const MaskParams& m = p.mask;
  const int64_t groups = int64_t{p.slots()} * p.num_heads_k, counted = int64_t{p.batch} * p.num_heads_k;
  const int64_t blocks = p.key_tiles(B::kBlockK), total = blocks * groups;
  const int64_t tiles = p.query_tiles(B::kBlockQ), group_tiles = p.heads_per_group * tiles;
  a.accum_rows = static_cast<int>(group_tiles * B::kBlockQ);
  Carver carver(p.scratch);
  carve_row_terms(p, carver);
  if constexpr (B::kOwns) {
    p.dq_accum = carver.take<float>(std::min<int64_t>(groups, multiprocessors()) * a.accum_rows * B::kHeadDim);
  } else {
    sm80::carve_dq<B>(p, carver);
  }
  constexpr int kCounters = sizeof(Counters) / sizeof(int);
  a.num_counters = kCounters + 2 * counted;
  int* counters = carver.take<int>(a.num_counters);
  if (!p.scratch) return carver.bytes();
  a.counters = reinterpret_cast<Counters*>(counters);
  a.cleared = counters + kCounters;
  a.added = a.cleared + counted;

  if (std::max(total, groups * group_tiles) > 0x7fffffff)
    throw std::runtime_error("hf_flash_patch: backward: more than 2^31 - 1 blocks of keys or tiles of queries");
  a.blocks = static_cast<int>(blocks);
  a.total = static_cast<int>(total);
  a.groups = static_cast<int>(groups);
  a.total_tiles = static_cast<int>(groups * group_tiles);
  a.tiles = Divisor(std::max<int64_t>(tiles, 1));
  a.group_tiles = Divisor(std::max<int64_t>(group_tiles, 1));
  // Q, dO and the accumulator of a section stay in the L2 cache. dQ is complete only when a section ends, so that long
  // ones leave much to round when everything else is done: two waves (causal, 512 and 1k: 2 to 5%).
  const int64_t head_bytes = int64_t{p.heads_per_group} * m.seqlen_q * B::kHeadDim * 8;
  const int section = m.uneven() && !B::kOwns ? section_size(a.groups, head_bytes, blocks, /*waves=*/2) : 1;
  a.section_items = Divisor(section * std::max<int64_t>(blocks, 1));
  a.section_heads = Divisor(section);
  a.num_heads_k = Divisor(p.num_heads_k);

  const int batch = p.slots();
  a.q = tensor_map(p.q, p.head_dim, p.rows_q, p.num_heads, batch, B::TileQ::kPanel, B::kBlockQ, kBf16);
  a.dout = tensor_map(p.dout, p.head_dim, p.rows_q, p.num_heads, batch, B::TileQ::kPanel, B::kBlockQ, kBf16);
  a.k = tensor_map(p.k, p.head_dim, p.rows_k, p.num_heads_k, batch, B::TileK::kPanel, B::kBlockK, kBf16);
  a.v = tensor_map(p.v, p.head_dim, p.rows_k, p.num_heads_k, batch, B::TileK::kPanel, B::kBlockK, kBf16);
  a.dk = tensor_map(p.dk, p.head_dim, p.rows_k, p.num_heads_k, batch, B::TileK::kPanel, 64, kBf16);
  a.dv = tensor_map(p.dv, p.head_dim, p.rows_k, p.num_heads_k, batch, B::TileK::kPanel, 64, kBf16);
  launch<backward_begin_kernel<B>>({.name = "backward_begin",
                                    .blocks = std::max(a.total_tiles, 1),
                                    .threads = sm80::kEdgeThreads,
                                    .shared_bytes = 0,
                                    .stream = stream},
                                   a);
  launch<backward_kernel<B>>({.name = "backward",
                              .blocks = std::min(std::max(a.total, a.total_tiles), multiprocessors()),
                              .threads = B::kThreads,
                              .shared_bytes = B::kSharedBytes,
                              .stream = stream,
                              .starts_early = true},
                             a);
  return carver.bytes();
}

// Whether thread blocks take whole groups of heads: if that is as good a schedule, and what all of them have at work,
// Q, dO and dQ's accumulator, stays in the L2 cache, or is not read often where it does not. 512 tokens: 64 columns 6%,
// causal 17%, 128 columns causal 13% faster; but 128 columns full, 69 MB, 12% slower, 64 columns 1k a quarter.
template <class B>
bool pays_owning(const BackwardParams& p) {
  const MaskParams& m = p.mask;
  if (m.cu_seqlens_q || m.lists.row_offsets || m.seqlen_k > 4 * B::kBlockK) return false;
  const int64_t processors = multiprocessors(), groups = int64_t{p.batch} * p.num_heads_k;
  const int64_t blocks = (m.seqlen_k + B::kBlockK - 1) / B::kBlockK;
  const auto rounds = [&](int64_t items) { return (items + processors - 1) / processors; };
  if (10 * rounds(groups) * blocks > 11 * rounds(groups * blocks)) return false;
  const int64_t kept = std::min(groups, processors) * p.heads_per_group * m.seqlen_q * B::kHeadDim * 8;
  return (m.window_right == 0 ? kept / 2 : kept) <= 40 << 20;
}

template <typename Element, int kHeadDim, Variant kVariant>
int64_t choose_backward(const BackwardParams& p, cudaStream_t stream) {
  using Shared = Backward<Element, kHeadDim, kVariant>;
  if constexpr (!Shared::kWide && kVariant != Variant::kBlocks) {
    using Owned = Backward<Element, kHeadDim, kVariant, true>;
    if (pays_owning<Owned>(p)) return launch_backward<Owned>(p, stream);
  }
  return launch_backward<Shared>(p, stream);
}

template <typename Element, int kHeadDim>
int64_t run_backward(const BackwardParams& p, cudaStream_t stream) {
  return with_variant(p, [&](auto variant) { return choose_backward<Element, kHeadDim, variant>(p, stream); });
}

}  // namespace hfp::sm90

#define HFP_INSTANTIATE(arch, dtype, head_dim)                                                   \
  namespace hfp {                                                                                \
  int64_t backward_##arch##_##dtype##_##head_dim(const BackwardParams& p, cudaStream_t stream) { \
    return sm90::run_backward<sm90::dtype, head_dim>(p, stream);                                 \
  }                                                                                              \
  }
