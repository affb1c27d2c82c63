// What both ways of sharing a step between the consumers have in common: what happens to the elements of S^T and dP^T,
// where this thread's lie, and how dQ, dK and dV leave.
#pragma once

#include "sm90/backward_parts.h"

namespace hfp::sm90 {

// One warpgroup of consumers. A warp holds 16 keys by kQueries queries of S^T; which, says B.
template <class B>
class BackwardConsumer {
 protected:
  using Element = typename B::Element;
  using TileQ = typename B::TileQ;
  using TileK = typename B::TileK;
  using TileS = typename B::TileS;
  using TileOut = typename B::TileOut;
  static constexpr int kNS = B::kQueries / 8, kND = B::kColumns / 8, kNQ = B::kDqColumns / 8;

  __device__ BackwardConsumer(const BackwardArguments& a, typename B::Barriers* bars, uint32_t base)
      : a_(a),
        bars_(bars),
        dropout_(a.p.dropout),
        group_(uniform(threadIdx.x / 128) - 1),
        lane_(threadIdx.x % 32),
        warp_(threadIdx.x / 32 % 4),
        base_(base) {}

  // Block after block; `walk` sums dK and dV over its query tiles.
  template <class Walk>
  __device__ __forceinline__ void run(Walk walk) {
#pragma unroll 1
    for (auto queue = items_of<B>(a_, bars_); queue.valid(); queue.next(true)) {
      const KeyBlock<B> work(a_, queue.tile());
      if (!uniform(work.exists())) continue;
      float dk[kND][4], dv[kND][4];
#pragma unroll
      for (int j = 0; j < kND; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) dk[j][e] = dv[j][e] = 0.f;
      pin(flat(dk));
      pin(flat(dv));
      typename B::Step step = await_q();
      const bool had_keys = !(step.flags & B::kNothing);
      if (!had_keys) {
        release(bars_->q_empty + q_.index);
        q_.next();
      } else {
        if (lane_ < 16) {
          const int key = B::first_key(group_) + 16 * warp_ + lane_;
          const Range seen = work.mask.rows_seeing(work.key0() + key);
          bars_->seen[key] = make_int2(seen.begin, seen.end);
        }
        __syncwarp();
        walk(work, step, dk, dv);
      }
      // The block of keys is made anew: kept, it would take ten registers.
      store(KeyBlock<B>(a_, sm80::not_hoisted(queue.tile())), dk, dv, had_keys);
    }
    await_left();
  }

  __device__ __forceinline__ typename B::Step await_q() {
    barrier_wait(smem_address(bars_->q_full + q_.index), q_.parity);
    const typename B::Step step = bars_->step[q_.index];
    return {uniform(step.row0), uniform(step.head), reads_lists(B::kVariant) ? uniform(step.bits) : kFullTile,
            static_cast<unsigned>(uniform(step.flags))};
  }
  __device__ __forceinline__ void release(uint64_t* bar) {
    __syncwarp();
    if (lane_ == 0) barrier_arrive(smem_address(bar));
  }

  // Addresses are made where they are used: kept, they would take more registers, uniform ones too, than there are.
  __device__ __forceinline__ uint32_t at(int tile, int index = 0, int bytes = 0) const {
    return sm80::not_hoisted(base_) + tile + index * bytes;
  }

  // This thread's first key in the block, and its first query in the tile.
  __device__ int first_key() const { return B::first_key(group_) + 16 * warp_ + lane_ / 4; }
  __device__ int first_query() const { return B::first_query(group_) + 2 * (lane_ % 4); }
  // Of its first query, in a vector over the queries of a tile.
  __device__ uint32_t first_of(const float* vector) const { return smem_address(vector) + 4 * first_query(); }

  // From S^T: P^T, negative where dropout drops it.
  __device__ __forceinline__ void probabilities(const KeyBlock<B>& work, const typename B::Step& step,
                                                float (&p)[kNS][4]) {
    const int key = first_key(), row = step.row0 + first_query();
    if constexpr (B::kVariant == Variant::kGeneral) {
      const LogitBias bias(a_.p, work.seq.batch, step.head);
      each(p, [&](float& x, int j, int h, int e) { x = bias.apply(x, distance(work, key, row, j, h, e)); });
    }
    if (const unsigned why = step.flags & (kBeforeRange | kPastRange | kByBits)) {
      const int2 lo = bars_->seen[key], hi = bars_->seen[key + 8];
      const Range seen[2] = {{lo.x, lo.y}, {hi.x, hi.y}};
      mask_transposed(why, p, seen, row);
    }
    if (reads_lists(B::kVariant) && step.bits != kFullTile) {
      mask_transposed_by_tile(a_.p.mask.lists, step.bits, p, work.key0() + key, row);
    }
    const uint32_t lse = first_of(bars_->lse[q_.index]);
#pragma unroll
    for (int j = 0; j < kNS; ++j) {
      const float2 l = load_shared_float2(lse + 32 * j);
#pragma unroll
      for (int e = 0; e < 4; ++e) p[j][e] = exp2_approx(fmaf(p[j][e], a_.p.exp2_scale, e % 2 ? -l.y : -l.x));
    }
    if (drops<B::kVariant>(a_.p.dropout)) {
      mark_dropped<true>(dropout_, work.seq.batch * a_.p.num_heads + step.head, p, step.row0 + B::first_query(group_),
                         work.key0() + B::first_key(group_) + 16 * warp_, lane_);
    }
  }
  // Rounded, without what dropout drops: 16 keys by 8 queries.
  __device__ __forceinline__ void round_p(uint32_t (&x)[2], const float (&p)[4]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float a = p[2 * h], b = p[2 * h + 1];
      x[h] = can_drop(B::kVariant) ? pack_positive<Element>(a, b) : pack<Element>(a, b);
    }
  }

  // Where this lane's row of an stmatrix lies in a tile of S^T's shape.
  __device__ uint32_t place_in_s() const {
    return TileS::offset(B::first_key(group_) + 16 * warp_ + lane_ % 16, B::first_query(group_) / 8 + lane_ / 16);
  }

  // dS^T = P^T (dP^T - delta), rounded, to shared memory.
  __device__ __forceinline__ void store_ds(const KeyBlock<B>& work, const typename B::Step& step,
                                           const float (&p)[kNS][4], const float (&dp)[kNS][4]) {
    const uint32_t delta = first_of(bars_->delta[do_.index]);
    const uint32_t to = at(B::kAtDs, ds_buffer_, TileS::kBytes) + place_in_s();
#pragma unroll
    for (int i = 0; i < kNS / 2; ++i) {
      uint32_t x[4];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int j = 2 * i + k;
        const float2 d = load_shared_float2(delta + 32 * j);
        float ds[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float d_row = e % 2 ? d.y : d.x;
          if constexpr (can_drop(B::kVariant)) {
            const float y = is_dropped(p[j][e]) ? 0.f : dp[j][e];
            ds[e] = fabsf(p[j][e]) * (y * a_.p.dropout.rescale - d_row);
          } else {
            ds[e] = p[j][e] * (dp[j][e] - d_row);
          }
        }
        if constexpr (B::kVariant == Variant::kGeneral) {
          const LogitBias bias(a_.p, work.seq.batch, step.head);
          const float2 l = load_shared_float2(first_of(bars_->lse[q_.index]) + 32 * j);
          const int key = first_key(), row = step.row0 + first_query();
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            ds[e] *= bias.derivative(fabsf(p[j][e]), e % 2 ? l.y : l.x, distance(work, key, row, j, e / 2, e % 2));
          }
        }
        x[2 * k] = pack<Element>(ds[0], ds[1]);
        x[2 * k + 1] = pack<Element>(ds[2], ds[3]);
      }
      store_matrix4(TileS::step(to, 2 * i), x[0], x[1], x[2], x[3]);
    }
  }

  // How many eights of columns of this consumer's dQ the first has as well.
  __device__ int skipped_dq() const { return B::kHeadDim == 96 && group_ == 1 ? 4 : 0; }
  // Columns [first, first + kN) of this consumer's dQ. Waits until what was there has left.
  template <int kN>
  __device__ __forceinline__ void store_dq(const float (&dq)[kNQ][4], int first) {
    barrier_wait(smem_address(bars_->dq_empty + group_), dq_parity_ ^ 1);
    const uint32_t to = at(B::kAtDq) + B::dq_offset(group_) / B::kDqRounds + threadIdx.x % 128 * 16;
    const int skipped = skipped_dq();
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      if (j < 4 && skipped) continue;
      store_shared_float4(to + (j - skipped) * 2048, dq[first + j]);
    }
  }
  // The last of this consumer's part of a tile, if groups are owned: added to what came before, rounded, to its place.
  __device__ __forceinline__ void finish_dq(const KeyBlock<B>& work, const typename B::Step& step,
                                            const float (&dq)[kNQ][4]) {
    barrier_wait(smem_address(bars_->dq_loaded + group_), dq_parity_);
    const int skipped = skipped_dq();
    const uint32_t from = at(B::kAtDq) + B::dq_offset(group_) + threadIdx.x % 128 * 16;
    const int row = step.row0 + (B::kByRows ? 64 * group_ : 0) + 16 * warp_ + lane_ / 4, column = B::dq_column(group_);
    Element* to = row_pointer<Element>(a_.p.dq, work.seq.batch, row, step.head) + column;
#pragma unroll
    for (int j = 0; j < kNQ; j += 4) {
      if (j < 4 && skipped) continue;
      float sum[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float4 before = make_float4(0.f, 0.f, 0.f, 0.f);
        if (!(step.flags & B::kOpens)) before = load_shared_float4(from + (j + i - skipped) * 2048);
        const float x[4] = {before.x, before.y, before.z, before.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[i][e] = dq[j + i][e] + x[e];
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        store_row<Element>(to + 8 * j + 8 * h * a_.p.dq.row_stride, row + 8 * h < work.seq.seqlen_q, sum, h,
                           a_.p.softmax_scale, a_.p.head_dim - column - 8 * j, lane_ % 4);
      }
    }
  }
  // Tells the adder. Not at once after storing: the fence waits for the stores, the tensor cores would for the fence.
  __device__ __forceinline__ void publish_dq() {
    async_fence_shared();
    release(bars_->dq_full + group_);
    dq_parity_ ^= 1;
  }

  // Through shared memory and the copy engine; straight to memory if the last rows are not this sequence's. The tiles
  // of K and V are given back first, if they are not what the gradients leave through: the next ones arrive meanwhile.
  // Otherwise await_left() has to come before the tiles of dS and dQ are written again.
  __device__ __forceinline__ void store(const KeyBlock<B>& work, const float (&dk)[kND][4], const float (&dv)[kND][4],
                                        bool had_keys) {
    const BackwardParams& p = a_.p;
    const float scale_v = B::kVariant == Variant::kPlain ? 1.f : p.dropout.rescale;
    const int key0 = work.key0() + B::first_key(group_), column = B::first_column(group_);
    if (had_keys) {
      if (!B::kWide) release_keys();
      named_sync(1, 128 * B::kConsumers);  // dQ reads all of dS and K
    }
    if (had_keys && key0 + 64 <= work.seq.stored_k) {
      if constexpr (B::kLeavesThroughDq) {  // once the adder has read the last dQ
        barrier_wait(smem_address(bars_->dq_empty + group_), dq_parity_ ^ 1);
      }
      to_tiles(0, dv, scale_v);
      to_tiles(1, dk, p.softmax_scale);
      async_fence_shared();
      named_sync(2 + group_, 128);
      if (threadIdx.x % 128 == 0) {
        const int row = static_cast<int>(work.seq.offset_k) + key0, batch = p.mask.cu_seqlens_q ? 0 : work.seq.batch;
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int panel = 0; panel < TileOut::kPanels; ++panel) {
            tma_store(i == 0 ? &a_.dv : &a_.dk, at(B::out_place(group_, i, panel)), column + panel * TileOut::kPanel,
                      row, work.head_k, batch);
          }
        bulk_commit();
      }
      if (B::kWide) await_left();
    } else {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int key = key0 + 16 * warp_ + lane_ / 4 + 8 * h;
        const bool exists = key < work.seq.stored_k;
        store_row<Element>(row_pointer<Element>(p.dv, work.seq.batch, work.seq.offset_k + key, work.head_k) + column,
                           exists, dv, h, scale_v, p.head_dim - column, lane_ % 4);
        store_row<Element>(row_pointer<Element>(p.dk, work.seq.batch, work.seq.offset_k + key, work.head_k) + column,
                           exists, dk, h, p.softmax_scale, p.head_dim - column, lane_ % 4);
      }
    }
    if (had_keys && B::kWide) release_keys();
  }
  __device__ __forceinline__ void release_keys() {
    release(&bars_->k_empty);
    release(&bars_->v_empty);
  }
  // dV (0) or dK (1), rounded, to where it leaves from.
  __device__ __forceinline__ void to_tiles(int i, const float (&x)[kND][4], float scale) const {
    constexpr int kN = TileOut::kPanel / 8;
#pragma unroll
    for (int panel = 0; panel < TileOut::kPanels; ++panel) {
      store_to_tile<Tile<64, TileOut::kPanel>, Element>(at(B::out_place(group_, i, panel)), 16 * warp_,
                                                        reinterpret_cast<const float (&)[kN][4]>(x[kN * panel]),
                                                        {scale, scale}, lane_);
    }
  }
  // Until this consumer's dK and dV have been read; the adder may be waiting for that as well.
  __device__ __forceinline__ void await_left() {
    if (threadIdx.x % 128 == 0) {
      bulk_wait_read<0>();
      if (B::kOwns && B::kLeavesThroughDq) barrier_arrive(smem_address(&bars_->left));
    }
    named_sync(2 + group_, 128);
  }

  __device__ static int distance(const KeyBlock<B>& work, int key, int row, int j, int h, int e) {
    return row + 8 * j + e + work.mask.shift() - (work.key0() + key + 8 * h);
  }
  template <class Change>
  __device__ static __forceinline__ void each(float (&x)[kNS][4], Change change) {
#pragma unroll
    for (int j = 0; j < kNS; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) change(x[j][e], j, e / 2, e % 2);
  }

  const BackwardArguments& a_;
  typename B::Barriers* bars_;
  const Dropout dropout_;
  const int group_, lane_, warp_;
  const uint32_t base_;
  Stage<B::kStagesQ> q_{0};
  Stage<B::kStagesDo> do_{0};
  uint32_t keys_parity_ = 0, dq_parity_ = 0;
  int ds_buffer_ = 0;
};

}  // namespace hfp::sm90
