// What surrounds the products of the Hopper forward: shapes, and the copies that feed them.
#pragma once

#include "common/key_blocks.h"
#include "common/logits.h"
#include "sm90/schedule.h"
#include "sm90/tensor_map.h"
#include "sm90/tile.h"

namespace hfp::sm90 {

// Keys of a block. Where Q is in shared memory, the fewer the more often it is read: 64 rows by 64 keys take all that
// shared memory delivers. 96 columns and three consumers leave registers for 96 keys, 256 columns leave shared memory
// for 80, which divides no block of a list.
constexpr int keys_of_block(int head_dim, Variant variant, int consumers) {
  if (head_dim > 128) return variant == Variant::kPlain ? 80 : 64;
  return head_dim == 96 && consumers == 3 ? 96 : 128;
}

template <int kHeadDim, Variant kVariant, int kConsumers_>
struct ForwardTraits {  // registers of a consumer thread, d128: O 64, S 64, P 32, Q 32
  static constexpr int kConsumers = kConsumers_;
  static constexpr int kBlockK = keys_of_block(kHeadDim, kVariant, kConsumers_);
  static constexpr int kStages = 2;
  // Dropout takes the registers of 128 columns of Q, and the time that reading them from shared memory costs.
  static constexpr bool kQInRegisters = kHeadDim <= (can_drop(kVariant) ? 96 : 128) && kConsumers == 2;
  // 2: the next tile's Q arrives while this one is worked on.
  static constexpr int kStagesQ = kHeadDim <= 128 && !kQInRegisters ? 2 : 1;
  // O leaves through tiles of its own. 256 columns leave no room for them; 64 are so few that they are stored sooner.
  static constexpr bool kOutInTiles = kHeadDim == 96 || kHeadDim == 128;
  static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 40;
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 232;
};

template <typename Element_, int kHeadDim_, Variant kVariant_, int kConsumers_, bool kKeepsReference_>
struct Forward : ForwardTraits<kHeadDim_, kVariant_, kConsumers_> {
  using Traits = ForwardTraits<kHeadDim_, kVariant_, kConsumers_>;
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr Variant kVariant = kVariant_;
  static constexpr bool kKeepsReference = kKeepsReference_;
  // One copy of how a tile begins, after another or as the first, is 800 instructions less: 2 to 4% where the softmax
  // is short, but slower where rows see few keys, and 96 columns with three consumers spill for it.
  static constexpr bool kOneBeginning = kKeepsReference_ && !(kHeadDim_ == 96 && kConsumers_ == 3);
  static constexpr int kBlockQ = 64 * Traits::kConsumers;
  static constexpr int kThreads = 128 * (Traits::kConsumers + 1);

  using TileQ = Tile<64, kHeadDim>;  // of one consumer
  using TileK = Tile<Traits::kBlockK, kHeadDim>;
  // Block lists are read by the producer alone, which has the time to wait for them: it leaves a note with each block.
  static constexpr bool kTold = reads_lists(kVariant) && Traits::kConsumers == 2;
  struct Note {
    int block;  // -1: the tile sees nothing
    int bits;
    int is_last;  // of the tile
  };
  struct Barriers {
    uint64_t q_full[Traits::kStagesQ * Traits::kConsumers], q_empty[Traits::kStagesQ * Traits::kConsumers];
    uint64_t k_full[Traits::kStages], k_empty[Traits::kStages], v_full[Traits::kStages], v_empty[Traits::kStages];
    uint64_t landed, tile_full, tile_empty;
    int tile;
    Note note[Traits::kStages];  // with K
  };
  static constexpr int kTileBytes = 2 * Traits::kStages * TileK::kBytes +
                                    (Traits::kStagesQ + Traits::kOutInTiles) * Traits::kConsumers * TileQ::kBytes;
  static constexpr int kSharedBytes = kTileBytes + sizeof(Barriers) + 1024;  // tiles start on the swizzle's 1024 bytes
};

template <class F>
__device__ TileQueue<typename F::Barriers> tiles_of(const ForwardArguments& a, typename F::Barriers* bars) {
  return {a.p.tile_counter, a.total, bars};
}

template <class F>
__device__ __forceinline__ void produce(const ForwardArguments& a, typename F::Barriers* bars, uint32_t tile_q,
                                        uint32_t tile_k, uint32_t tile_v) {
  using TileQ = typename F::TileQ;
  using TileK = typename F::TileK;
  Stage<F::kStages> k(1), v(1);
  Stage<F::kStagesQ> q(1);
  Arrivals arrivals(&bars->landed);
  const bool ends_inside = keys_end_inside(a.p.mask);
  struct Block {
    int row, own, head_k, batch;
  } before = {};  // the block that K was sent for last
  bool is_any = false;
  const auto send_v = [&] {
    barrier_wait(smem_address(bars->v_empty + v.index), v.parity);
    // Of K such rows need nothing: their logits are masked.
    const Arrival to{tile_v + v.index * TileK::kBytes, smem_address(bars->v_full + v.index), before.own};
    arrivals.send<TileK>(to, &a.v, before.row, before.head_k, before.batch);
    if (arrivals.await()) arrivals.complete<TileK>(to);
    v.next();
  };
#pragma unroll 1
  for (auto queue = tiles_of<F>(a, bars); queue.valid(); queue.announce(), queue.next(false)) {
    const Work<F> work(a, queue.tile());
    if (!work.exists()) {
      queue.claim();
      continue;
    }
    const int batch = a.p.mask.cu_seqlens_q ? 0 : work.seq.batch, head_k = a.heads_per_group.divide(work.head);
    const int key0 = static_cast<int>(work.seq.offset_k), query0 = static_cast<int>(work.seq.offset_q) + work.row0;
    KeyBlocks<F::kBlockK, F::kTold> blocks(work.mask, work.span, work.row0, work.head);
    if (!blocks.valid()) {
      queue.claim();
      if constexpr (F::kTold) {
        barrier_wait(smem_address(bars->k_empty + k.index), k.parity);
        bars->note[k.index].block = -1;
        barrier_arrive(smem_address(bars->k_full + k.index));
        k.next();
      }
      continue;
    }
    // As the consumers ask for them, also from tile to tile: K, V of the block before, Q.
#pragma unroll 1
    for (bool is_first = true; blocks.valid(); is_first = false) {
      const int block = blocks.block, bits = blocks.bits;
      blocks.next();
      if (!blocks.valid()) queue.claim();
      barrier_wait(smem_address(bars->k_empty + k.index), k.parity);
      if (F::kTold) bars->note[k.index] = {block, bits, !blocks.valid()};
      const uint32_t bar = smem_address(bars->k_full + k.index);
      barrier_expect(bar, TileK::kBytes);
      const int row = key0 + block * F::kBlockK;
      TileK::load(tile_k + k.index * TileK::kBytes, &a.k, bar, row, head_k, batch);
      k.next();
      if (is_any) send_v();
      is_any = true;
      before = {row, ends_inside ? work.seq.seqlen_k - block * F::kBlockK : F::kBlockK, head_k, batch};
      if (!is_first) continue;
#pragma unroll
      for (int w = 0; w < F::kConsumers; ++w) {
        const int at = q.index * F::kConsumers + w;
        barrier_wait(smem_address(bars->q_empty + at), q.parity);
        const uint32_t bar_q = smem_address(bars->q_full + at);
        barrier_expect(bar_q, TileQ::kBytes);
        TileQ::load(tile_q + at * TileQ::kBytes, &a.q, bar_q, query0 + 64 * w, work.head, batch);
      }
      q.next();
    }
  }
  if (is_any) send_v();
}

}  // namespace hfp::sm90
