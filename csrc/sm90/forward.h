// Forward on Hopper. A block of warpgroups owns tiles of 64 rows a consumer: one producer thread copies Q, K and V
// through the tensor memory accelerator into a ring of stages, the consumers multiply with wgmma. Two overlaps hide the
// softmax behind the tensor cores: within a warpgroup, S(n) = Q K(n)^T is issued before O += P(n + 1) V(n + 1) and both
// run while the softmax waits only for the first; between warpgroups, named barriers make them take turns at issuing
// (ping-pong). What limits the products is shared memory: each reads K or V once a warpgroup, at half of what it
// delivers; Q from there as well would take three quarters or more, so it stays in registers where there are enough.
#pragma once

#include "launch.h"
#include "sm90/forward_consumer.h"

namespace hfp::sm90 {

// What spills: per tile, its description; without a search for the maximum also, per block, a barrier's number and a
// sum, and what a block whose logits are made again needs.
// ptxas-spill-ok(sm9014forward_kernel, 130): in the loop one load, in front of a turn

template <class F>
__global__ void __launch_bounds__(F::kThreads, 1) forward_kernel(const __grid_constant__ ForwardArguments a) {
  extern __shared__ unsigned char shared[];
  const uint32_t base = (smem_address(shared) + 1023) & ~1023u;
  unsigned char* aligned = shared + (base - smem_address(shared));
  auto* bars = reinterpret_cast<typename F::Barriers*>(aligned + F::kTileBytes);
  const uint32_t tile_k = base, tile_v = tile_k + F::kStages * F::TileK::kBytes;
  const uint32_t tile_q = tile_v + F::kStages * F::TileK::kBytes;
  const uint32_t tile_o = tile_q + F::kStagesQ * F::kConsumers * F::TileQ::kBytes;
  if (threadIdx.x == 0) {
    barrier_init(smem_address(&bars->landed), 1);
    barrier_init(smem_address(&bars->tile_full), 1);
    barrier_init(smem_address(&bars->tile_empty), 4 * F::kConsumers + 1);
    for (int i = 0; i < F::kStagesQ * F::kConsumers; ++i) {
      barrier_init(smem_address(bars->q_full + i), 1);
      barrier_init(smem_address(bars->q_empty + i), 4);
    }
    for (int i = 0; i < F::kStages; ++i) {
      barrier_init(smem_address(bars->k_full + i), 1);
      barrier_init(smem_address(bars->v_full + i), 1);
      barrier_init(smem_address(bars->k_empty + i), 4 * F::kConsumers);
      barrier_init(smem_address(bars->v_empty + i), 4 * F::kConsumers);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (__shfl_sync(0xffffffffu, threadIdx.x / 128, 0) == 0) {
    give_registers<F::kProducerRegisters>();
    if (threadIdx.x == 0) produce<F>(a, bars, tile_q, tile_k, tile_v);
  } else {
    take_registers<F::kConsumerRegisters>();
    Consumer<F>(a, bars, tile_q, tile_k, tile_v, tile_o).run();
  }
}

template <typename Element, int kHeadDim, Variant kVariant, int kConsumers, bool kKeepsReference>
void launch_forward(const AttentionParams& p, cudaStream_t stream) {
  using F = Forward<Element, kHeadDim, kVariant, kConsumers, kKeepsReference>;
  constexpr bool kBf16 = std::is_same_v<Element, bf16>;
  const int batch = p.slots(), heads = p.num_heads * batch;
  ForwardArguments a;
  a.p = p;
  a.q = tensor_map(p.q, p.head_dim, p.rows_q, p.num_heads, batch, F::TileQ::kPanel, 64, kBf16);
  a.k = tensor_map(p.k, p.head_dim, p.rows_k, p.num_heads_k, batch, F::TileK::kPanel, F::kBlockK, kBf16);
  a.v = tensor_map(p.v, p.head_dim, p.rows_k, p.num_heads_k, batch, F::TileK::kPanel, F::kBlockK, kBf16);
  const int64_t tiles = p.query_tiles(F::kBlockQ);
  a.out = tensor_map(p.out, p.head_dim, p.rows_q, p.num_heads, batch, F::TileQ::kPanel, 16, kBf16);
  if (tiles * heads > 0x7fffffff) throw std::runtime_error("hf_flash_patch: forward: more than 2^31 - 1 tiles");
  a.tiles = static_cast<int>(tiles);
  a.total = a.tiles * heads;
  const int blocks = std::min(a.total, multiprocessors());
  int section = 1;
  if (blocks == a.total) {
    a.p.tile_counter = nullptr;  // a tile each: nothing to hand out, and 2 us saved on a memset
  } else if (a.p.tile_counter) {
    check(cudaMemsetAsync(a.p.tile_counter, 0, sizeof(int), stream), "forward");
    // K and V of a section stay in the L2 cache.
    section = section_size(heads, 4 * int64_t{p.mask.seqlen_k} * p.head_dim, a.tiles, /*waves=*/heads);
  }
  a.section_tiles = Divisor(section * a.tiles);
  a.section_heads = Divisor(section);
  a.num_heads = Divisor(p.num_heads);
  a.heads_per_group = Divisor(p.heads_per_group);
  launch<forward_kernel<F>>(
      {.name = "forward", .blocks = blocks, .threads = F::kThreads, .shared_bytes = F::kSharedBytes, .stream = stream},
      a);
}

inline bool has_edge(const MaskParams& m) { return m.window_left >= 0 || m.window_right >= 0; }
// Whether rows of sequences with so many keys see enough of them to pay for what a tile then costs at its ends.
inline bool sees_many(const MaskParams& m, int64_t keys) {
  if (!has_edge(m)) return keys >= 2048;
  const int64_t before = m.window_left < 0 ? keys : m.window_left;
  const int64_t after = m.window_right < 0 ? keys : m.window_right;
  return std::min<int64_t>(keys, before + after + 1) > 2048;
}

// A third consumer, where registers allow it, shares keys among more rows: 5 to 20% faster where rows see many keys.
// But tall tiles meet more of the mask's edge, and more rows past the end: behind a causal mask, 64 columns, 512 keys
// cost a fifth and 2048 are even. With 96 columns Q has no room in registers then, which pays from 2048 rows on only
// where there is no edge.
template <int kHeadDim>
bool pays_tall(const AttentionParams& p) {
  const MaskParams& m = p.mask;
  if (m.lists.row_offsets) return false;  // whose blocks have 128 rows
  if (kHeadDim > 64) return !has_edge(m) && m.seqlen_q >= 2048;
  // Of packed sequences the longest says little where most are short: by the mean, causal documents of 64 columns are
  // 5% faster.
  const int64_t keys = m.cu_seqlens_k ? p.rows_k / std::max(p.batch, 1) : m.seqlen_k;
  return !has_edge(m) || sees_many(m, keys);
}

// Without a search for the maximum 64 and 96 columns are 1 to 4% faster where rows see many keys, 128 up to 2%, and all
// up to 10% slower at 1024 and below. 32 and 256 columns do not notice; other variants have no registers for it, or
// rows that see few blocks.
constexpr bool may_keep_reference(int head_dim, Variant variant, int consumers) {
  return variant == Variant::kPlain && (head_dim == 64 ? consumers == 3 : head_dim == 96 || head_dim == 128);
}

template <typename Element, int kHeadDim, Variant kVariant, int kConsumers>
void choose_softmax(const AttentionParams& p, cudaStream_t stream) {
  if constexpr (may_keep_reference(kHeadDim, kVariant, kConsumers)) {
    if (sees_many(p.mask, p.mask.seqlen_k))
      return launch_forward<Element, kHeadDim, kVariant, kConsumers, true>(p, stream);
  }
  launch_forward<Element, kHeadDim, kVariant, kConsumers, false>(p, stream);
}

template <typename Element, int kHeadDim, Variant kVariant>
void choose_forward(const AttentionParams& p, cudaStream_t stream) {
  if constexpr (kHeadDim <= 96 && !can_drop(kVariant)) {
    if (pays_tall<kHeadDim>(p)) return choose_softmax<Element, kHeadDim, kVariant, 3>(p, stream);
  }
  choose_softmax<Element, kHeadDim, kVariant, 2>(p, stream);
}

template <typename Element, int kHeadDim>
void run_forward(const AttentionParams& p, cudaStream_t stream) {
  with_variant(p, [&](auto variant) { choose_forward<Element, kHeadDim, variant>(p, stream); });
}

}  // namespace hfp::sm90

#define HFP_INSTANTIATE(arch, dtype, head_dim)                                                \
  namespace hfp {                                                                             \
  void forward_##arch##_##dtype##_##head_dim(const AttentionParams& p, cudaStream_t stream) { \
    sm90::run_forward<sm90::dtype, head_dim>(p, stream);                                      \
  }                                                                                           \
  }
