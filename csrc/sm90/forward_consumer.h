// A warpgroup of the Hopper forward: products, softmax, output.
#pragma once

#include "common/softmax.h"
#include "sm90/forward_parts.h"
#include "sm90/store.h"

namespace hfp::sm90 {

// One warpgroup of consumers.
template <class F>
class Consumer {
  using Element = typename F::Element;
  using TileQ = typename F::TileQ;
  using TileK = typename F::TileK;
  static constexpr int kNS = F::kBlockK / 8, kNO = F::kHeadDim / 8;
  using AccumulatorS = float (&)[4 * kNS];
  using AccumulatorO = float (&)[4 * kNO];

 public:
  __device__ Consumer(const ForwardArguments& a, typename F::Barriers* bars, uint32_t tile_q, uint32_t tile_k,
                      uint32_t tile_v, uint32_t tile_o)
      : a_(a),
        bars_(bars),
        dropout_(a.p.dropout),
        group_(uniform(threadIdx.x / 128) - 1),
        lane_(threadIdx.x % 32),
        warp_(threadIdx.x / 32 % 4),
        tile_q_(tile_q + group_ * TileQ::kBytes),
        tile_o_(tile_o + group_ * TileQ::kBytes),
        desc_k_(TileK::along(tile_k)),
        desc_v_(TileK::down(tile_v)) {}

  // Tile after tile. The first product of a tile is issued together with the last of the one before, so that the tensor
  // cores have work while one tile's output leaves and the next one's softmax begins.
  __device__ __forceinline__ void run() {
    if (group_ == F::kConsumers - 1) named_arrive(1, 256);
    auto queue = tiles_of<F>(a_, bars_);
    Work<F> work(a_, queue.tile());
    if (!settle(queue, work)) return await_left();
    float s[1][kNS][4], o[1][kNO][4], shrink[1][2];
    uint32_t prob[F::kBlockK / 16][4];
    Softmax<1> softmax, sums;
    Work<F> done = work;
    int accumulate = 0;
    // S of a tile's first block, and what is left of the tile before.
    const auto begin = [&](auto has_before) __attribute__((always_inline)) {
      await_first();
      take_turn();
      issue_qk(s);
      release_registers_q();
      if (has_before) {
        await_v();
        issue_pv(o, prob, accumulate);
      } else {
        wgmma_fence();
        wgmma_commit();  // an empty group: what is waited for below is counted
      }
      pass_turn();
      wgmma_wait<1>();
      pin(reinterpret_cast<AccumulatorS>(s));
      release(k_, bars_->k_empty);
      first_probabilities(work, softmax, s, shrink);
      wgmma_wait<0>();
      if (has_before) {
        pin(reinterpret_cast<AccumulatorO>(o));
        pin(reinterpret_cast<uint32_t (&)[F::kBlockK / 4]>(prob));
        release(v_, bars_->v_empty);
        finish(done, sums, o);
      }
      round_to(prob, work, s);
      accumulate = 0;
    };
    if constexpr (!F::kOneBeginning) begin(std::false_type());
    bool has_before = false;
#pragma unroll 1
    for (;;) {
      if constexpr (F::kOneBeginning) begin(has_before);
      has_before = true;
#pragma unroll 1
      while (goes_on()) {
        await_k();
        take_turn();
        issue_qk(s);
        await_v();
        issue_pv(o, prob, accumulate);
        accumulate = 1;
        pass_turn();
        wgmma_wait<1>();
        pin(reinterpret_cast<AccumulatorS>(s));
        release(k_, bars_->k_empty);
        const bool shrinks = later_probabilities(work, softmax, s, shrink);
        wgmma_wait<0>();
        pin(reinterpret_cast<AccumulatorO>(o));
        pin(reinterpret_cast<uint32_t (&)[F::kBlockK / 4]>(prob));
        release(v_, bars_->v_empty);
        round_to(prob, work, s);
        if (shrinks) scale_rows(o, shrink);
      }
      if (!F::kQInRegisters) release_q();
      queue.next(true);
      done = work;
      sums = softmax;
      softmax = Softmax<1>();
      if (!settle(queue, work)) {
        await_v();
        issue_pv(o, prob, accumulate);
        wgmma_wait<0>();
        pin(reinterpret_cast<AccumulatorO>(o));
        finish(done, sums, o);
        break;
      }
      if constexpr (!F::kOneBeginning) begin(std::true_type());
    }
    await_left();
  }

 private:
  // Goes on to a tile that sees something; one that sees nothing gets zeros here.
  __device__ __forceinline__ bool settle(TileQueue<typename F::Barriers>& queue, Work<F>& work) {
    for (; queue.valid(); queue.next(true)) {
      work = Work<F>(a_, queue.tile());
      if (!uniform(work.exists())) continue;
      work.mask.look_for_holes(work.span.any);
      if (begins(work)) return true;
      Softmax<1> nothing;
      float o[1][kNO][4];
      sm80::clear(o);
      finish(work, nothing, o);
    }
    return false;
  }

  // The first block of a tile, if it sees any.
  __device__ __forceinline__ bool begins(const Work<F>& work) {
    if constexpr (F::kTold) {
      await_k();
      if (blocks_.block < 0) release(k_, bars_->k_empty);
      return blocks_.block >= 0;
    } else {
      blocks_ = {work.mask, work.span, work.row0, work.head};
      blocks_.make_uniform(uniform);
      return blocks_.valid();
    }
  }
  // Whether there is another.
  __device__ __forceinline__ bool goes_on() {
    if constexpr (F::kTold) {
      return !blocks_.is_last;
    } else {
      blocks_.next();
      return blocks_.valid();
    }
  }
  __device__ __forceinline__ void await_k() {
    barrier_wait(smem_address(bars_->k_full + k_.index), k_.parity);
    if constexpr (F::kTold) {
      const typename F::Note note = bars_->note[k_.index];
      blocks_ = {uniform(note.block), uniform(note.bits), uniform(note.is_last)};
    }
  }

  __device__ __forceinline__ void await_v() { barrier_wait(smem_address(bars_->v_full + v_.index), v_.parity); }

  // Q of a tile and its first K.
  __device__ __forceinline__ void await_first() {
    barrier_wait(smem_address(bars_->q_full + q_.index * F::kConsumers + group_), q_.parity);
    if constexpr (F::kQInRegisters) {
      const uint32_t from = tile_q_ + TileQ::offset(16 * warp_ + lane_ % 16, lane_ / 16);
#pragma unroll
      for (int i = 0; i < F::kHeadDim / 16; ++i) sm80::ldmatrix4(fragments_q_[i], TileQ::step(from, 2 * i));
    }
    barrier_wait(smem_address(bars_->k_full + k_.index), k_.parity);
  }
  __device__ __forceinline__ void release_q() {
    if (lane_ == 0) barrier_arrive(smem_address(bars_->q_empty + q_.index * F::kConsumers + group_));
    q_.next();
  }
  // Behind the first product, which waits for the registers. An arrival waits for no load: right behind the loads it
  // let the next Q overwrite rows that were still to be read (128 columns, one block of keys a tile: 1 output in 200).
  __device__ __forceinline__ void release_registers_q() {
    if constexpr (F::kQInRegisters) {
      __syncwarp();
      release_q();
    }
  }
  __device__ __forceinline__ void take_turn() { named_sync(1 + group_, 256); }
  __device__ __forceinline__ void pass_turn() { named_arrive(1 + (group_ + 1) % F::kConsumers, 256); }
  __device__ int first_row(const Work<F>& work) const { return work.row0 + 64 * group_ + 16 * warp_; }

  __device__ __forceinline__ void issue_qk(float (&s)[1][kNS][4]) {
    const uint64_t q = TileQ::along(tile_q_ + q_.index * F::kConsumers * TileQ::kBytes);
    const uint64_t k = desc_k_ + k_.index * (TileK::kBytes >> 4);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < F::kHeadDim / 16; ++i) {
      using Product = Wgmma<F::kBlockK, Element>;
      const uint64_t k_i = k + TileK::along_step(i);
      if constexpr (F::kQInRegisters) {
        Product::template rs<0>(reinterpret_cast<AccumulatorS>(s), fragments_q_[i], k_i, i > 0);
      } else {
        Product::template ss<0, 0>(reinterpret_cast<AccumulatorS>(s), q + TileQ::along_step(i), k_i, i > 0);
      }
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void issue_pv(float (&o)[1][kNO][4], uint32_t (&prob)[F::kBlockK / 16][4],
                                           int accumulate) {
    const uint64_t v = desc_v_ + v_.index * (TileK::kBytes >> 4);
    pin(reinterpret_cast<AccumulatorO>(o));
    pin(reinterpret_cast<uint32_t (&)[F::kBlockK / 4]>(prob));
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < F::kBlockK / 16; ++i) {
      Wgmma<F::kHeadDim, Element>::template rs<1>(reinterpret_cast<AccumulatorO>(o), prob[i], v + TileK::down_step(i),
                                                  i > 0 ? 1 : accumulate);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void release(Stage<F::kStages>& stage, uint64_t* empty) {
    if (lane_ == 0) barrier_arrive(smem_address(empty + stage.index));
    stage.next();
  }

  __device__ __forceinline__ void first_probabilities(const Work<F>& work, Softmax<1>& softmax, float (&s)[1][kNS][4],
                                                      float (&shrink)[1][2]) {
    complete_logits(work, s);
    softmax.template update<true>(s, shrink, a_.p.exp2_scale, exp2_approx);
    if constexpr (F::kKeepsReference) all_seen_ = softmax.all_seen();
  }
  // Returns whether what was summed before has to shrink.
  __device__ __forceinline__ bool later_probabilities(const Work<F>& work, Softmax<1>& softmax, float (&s)[1][kNS][4],
                                                      float (&shrink)[1][2]) {
    complete_logits(work, s);
    if constexpr (F::kKeepsReference) {
      if (all_seen_) {
        const auto kept = softmax.keep(s, shrink, a_.p.exp2_scale, exp2_approx);
        if (kept != Softmax<1>::Kept::kLost) return kept == Softmax<1>::Kept::kShrunk;
        multiply_again(work, s);
        complete_logits(work, s);
      }
    }
    const bool shrinks = softmax.template update<false>(s, shrink, a_.p.exp2_scale, exp2_approx);
    if constexpr (F::kKeepsReference) all_seen_ = softmax.all_seen();
    return shrinks;
  }
  // S = Q K^T once more, by this warp alone and from memory: wgmma would need all four warps, and K's tile has been
  // given back, which is what keeps the copies ahead. Rarely: the code is to be short.
  __device__ __forceinline__ void multiply_again(const Work<F>& work, float (&s)[1][kNS][4]) const {
    const int row = first_row(work) + lane_ / 4, key = blocks_.block * F::kBlockK + lane_ / 4;
    const int head_k = a_.heads_per_group.divide(work.head);
#pragma unroll 1
    for (int j = 0; j < kNS; ++j) {
      const int64_t row_k = work.seq.offset_k + min(sm80::not_hoisted(key) + 8 * j, work.seq.seqlen_k - 1);
      float sum[4] = {};
#pragma unroll 1
      for (int column = 2 * (lane_ % 4); column < a_.p.head_dim; column += 16) {
        uint32_t q[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int64_t row_q = work.seq.offset_q + min(sm80::not_hoisted(row) + 8 * (e % 2), work.seq.seqlen_q - 1);
          q[e] = pair(a_.p.q, work.seq.batch, row_q, work.head, column + 8 * (e / 2));
        }
        sm80::mma<Element>(sum, q, pair(a_.p.k, work.seq.batch, row_k, head_k, column),
                           pair(a_.p.k, work.seq.batch, row_k, head_k, column + 8));
      }
#pragma unroll
      for (int i = 0; i < kNS; ++i)  // registers have no addresses
#pragma unroll
        for (int e = 0; e < 4; ++e) s[0][i][e] = i == j ? sum[e] : s[0][i][e];
    }
  }
  // Two elements of a row, zeros behind its end.
  __device__ uint32_t pair(const TensorView& t, int batch, int64_t row, int head, int column) const {
    return column < a_.p.head_dim
               ? *reinterpret_cast<const uint32_t*>(row_pointer<Element>(t, batch, row, head) + column)
               : 0;
  }
  // Softcap and ALiBi, masks.
  __device__ __forceinline__ void complete_logits(const Work<F>& work, float (&s)[1][kNS][4]) const {
    const int n = blocks_.block, row = first_row(work) + lane_ / 4, key0 = n * F::kBlockK;
    if constexpr (F::kVariant == Variant::kGeneral) {
      const LogitBias bias(a_.p, work.seq.batch, work.head);
      bias_elements(bias, s, row, key0 + 2 * (lane_ % 4), work.mask.shift());
    }
    if (const unsigned why = work.mask.template hidden<F::kBlockK>(work.span, n)) {
      mask_elements(work.mask, why, s, sm80::not_hoisted(row), key0, lane_);
    }
    if (F::kTold && blocks_.bits != kFullTile) {
      mask_by_tile(a_.p.mask.lists, blocks_.bits, s, sm80::not_hoisted(row), key0, lane_);
    }
  }

  // The accumulator of S is, rounded and without what dropout drops, the A operand of the next product.
  __device__ __forceinline__ void round_to(uint32_t (&prob)[F::kBlockK / 16][4], const Work<F>& work,
                                           const float (&s)[1][kNS][4]) {
#pragma unroll
    for (int j = 0; j < F::kBlockK / 16; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float (&c)[4] = s[0][2 * j + e / 2];
        prob[j][e] = pack<Element>(c[2 * (e % 2)], c[2 * (e % 2) + 1]);
      }
    if (drops<F::kVariant>(a_.p.dropout)) {
      drop_pairs(dropout_, work.seq.batch * a_.p.num_heads + work.head, prob, first_row(work),
                 blocks_.block * F::kBlockK, lane_);
    }
  }

  // Writes lse and O, whose 16 rows of a warp are copied while the next tile is worked on. A box past the end of a
  // sequence would cover rows of the next.
  __device__ __forceinline__ void finish(const Work<F>& work, Softmax<1>& softmax, float (&o)[1][kNO][4]) {
    const AttentionParams& p = a_.p;
    const int row0 = first_row(work), row = row0 + lane_ / 4;
    float* lse = p.lse + work.seq.batch * p.lse_batch_stride + work.head * p.lse_head_stride + work.seq.offset_q;
    float scale[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float row_lse = softmax.finish(0, h);
      if (lane_ % 4 == 0 && row + 8 * h < work.seq.seqlen_q) lse[row + 8 * h] = row_lse;
      scale[h] = softmax.normalizer(0, h);
      if constexpr (can_drop(F::kVariant)) scale[h] *= p.dropout.rescale;
    }
    if (F::kOutInTiles && uniform(row0 + 16 <= work.seq.seqlen_q)) {
      await_left();
      store_to_tile<TileQ, Element>(tile_o_, 16 * warp_, o[0], scale, lane_);
      async_fence_shared();
      __syncwarp();
      if (lane_ == 0) {
        TileQ::store(tile_o_, 16 * warp_, &a_.out, 0, static_cast<int>(work.seq.offset_q) + row0, work.head,
                     p.mask.cu_seqlens_q ? 0 : work.seq.batch);
        bulk_commit();
      }
    } else {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        Element* out = row_pointer<Element>(p.out, work.seq.batch, work.seq.offset_q + row + 8 * h, work.head);
        store_row<Element>(out, row + 8 * h < work.seq.seqlen_q, o[0], h, scale[h], p.head_dim, lane_ % 4);
      }
    }
  }
  // Until this warp's last rows have left their tile.
  __device__ __forceinline__ void await_left() {
    if (lane_ == 0) bulk_wait_read<0>();
    __syncwarp();
  }

  const ForwardArguments& a_;
  typename F::Barriers* bars_;
  const Dropout dropout_;
  const int group_, lane_, warp_;
  const uint32_t tile_q_, tile_o_;
  const uint64_t desc_k_, desc_v_;
  uint32_t fragments_q_[F::kQInRegisters ? F::kHeadDim / 16 : 1][4];
  std::conditional_t<F::kTold, typename F::Note, KeyBlocks<F::kBlockK, false>> blocks_;  // where this tile is
  Stage<F::kStages> k_{0}, v_{0};
  Stage<F::kStagesQ> q_{0};
  bool all_seen_ = false;  // by the rows of this warp
};

}  // namespace hfp::sm90
