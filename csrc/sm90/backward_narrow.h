// Up to 128 columns: each consumer has 64 of 128 keys. So P^T is the A operand of dV as it lies in registers; dS^T goes
// through shared memory, because dQ needs that of both. dK runs a step behind, so that the tensor cores have it to do
// while the softmax of the next step waits.
#pragma once

#include "sm90/backward_consumer.h"

namespace hfp::sm90 {

template <class B>
class NarrowConsumer : BackwardConsumer<B> {
  using Base = BackwardConsumer<B>;
  using Base::a_, Base::bars_, Base::group_, Base::q_, Base::do_, Base::keys_parity_, Base::ds_buffer_;
  using Base::at, Base::await_q, Base::kND, Base::kNQ, Base::kNS, Base::release;
  using typename Base::Element;
  using typename Base::TileK;
  using typename Base::TileQ;
  using typename Base::TileS;

 public:
  __device__ NarrowConsumer(const BackwardArguments& a, typename B::Barriers* bars, uint32_t base)
      : Base(a, bars, base) {}
  __device__ __forceinline__ void run() {
    Base::run([this](auto&... arguments) { walk(arguments...); });
  }

 private:
  // All query tiles of a block of keys. What is written between a product and the wait for it is done while the tensor
  // cores work; a wait for all but n products is one for the oldest.
  __device__ __forceinline__ void walk(const KeyBlock<B>& work, typename B::Step step, float (&dk)[kND][4],
                                       float (&dv)[kND][4]) {
    uint32_t prob[kNS / 2][4];
    Held<B::kHeldK> keys;
    Held<B::kHeldV> values;
    {
      float p[kNS][4], dp[kNS][4];
      barrier_wait(smem_address(&bars_->k_full), keys_parity_);
      hold(keys, B::kAtK);
      issue_s(p, keys);
      barrier_wait(smem_address(bars_->do_full + do_.index), do_.parity);
      barrier_wait(smem_address(&bars_->v_full), keys_parity_);
      hold(values, B::kAtV);
      issue_dp(dp, values);
      keys_parity_ ^= 1;
      this->await_left();
      wgmma_wait<1>();  // S
      pin(flat(p));
      this->probabilities(work, step, p);
      round(prob, p);
      wgmma_wait<0>();  // dP
      finish_step(work, step, p, dp, prob, dv, [] {});
    }
#pragma unroll 1
    while (!(step.flags & B::kLast)) {
      float p[kNS][4], dp[kNS][4];
      const int q_before = q_.index, do_before = do_.index;
      q_.next();
      do_.next();
      step = await_q();
      const auto release_do = [&] {
        pin(flat(prob));
        release(bars_->do_empty + do_before);
      };
      if constexpr (!B::kOverlapsDv) {
        wgmma_wait<0>();  // dV of the step before
        release_do();
      }
      issue_s(p, keys);
      barrier_wait(smem_address(bars_->do_full + do_.index), do_.parity);
      issue_dp(dp, values);
      issue_dk(dk, q_before);
      this->publish_dq();
      wgmma_wait<2>();  // S, and with it dV
      if constexpr (B::kOverlapsDv) release_do();
      pin(flat(p));
      this->probabilities(work, step, p);
      round(prob, p);
      wgmma_wait<1>();  // dP
      ds_buffer_ ^= 1;
      finish_step(work, step, p, dp, prob, dv, [&] {
        wgmma_wait<2>();  // dK of the step before
        release(bars_->q_empty + q_before);
      });
    }
    issue_dk(dk, q_.index);
    this->publish_dq();
    wgmma_wait<0>();
    pin(flat(dk));
    pin(flat(dv));
    pin(flat(prob));
    release(bars_->q_empty + q_.index);
    release(bars_->do_empty + do_.index);
    q_.next();
    do_.next();
    ds_buffer_ ^= 1;
  }

  __device__ __forceinline__ void round(uint32_t (&prob)[kNS / 2][4], const float (&p)[kNS][4]) const {
#pragma unroll
    for (int j = 0; j < kNS; ++j) {
      uint32_t x[2];
      this->round_p(x, p[j]);
      prob[j / 2][j % 2 * 2] = x[0];
      prob[j / 2][j % 2 * 2 + 1] = x[1];
    }
  }

  // From dP on. Leaves dV to be waited for.
  template <class AfterDk>
  __device__ __forceinline__ void finish_step(const KeyBlock<B>& work, const typename B::Step& step,
                                              const float (&p)[kNS][4], float (&dp)[kNS][4],
                                              uint32_t (&prob)[kNS / 2][4], float (&dv)[kND][4], AfterDk after_dk) {
    pin(flat(dp));
    this->store_ds(work, step, p, dp);
    async_fence_shared();
    named_sync(1, 128 * B::kConsumers);  // dS of both consumers is there
    float dq[kNQ][4];
    issue_dq(dq);
    issue_dv(dv, prob);
    after_dk();
    wgmma_wait<1>();
    pin(flat(dq));
    if (B::kOwns && (step.flags & B::kCloses)) {
      this->finish_dq(work, step, dq);
    } else {
      this->template store_dq<kNQ>(dq, 0);
    }
  }

  // The first columns of this consumer's keys, as A operands.
  template <int kSteps>
  struct Held {
    static constexpr int kCount = kSteps;
    uint32_t x[kSteps > 0 ? kSteps : 1][4];
  };
  template <class Columns>
  __device__ __forceinline__ void hold(Columns& columns, int tile) const {
    const int row = B::first_key(group_) + 16 * this->warp_ + this->lane_ % 16;
    const uint32_t from = at(tile) + TileK::offset(row, this->lane_ / 16);
#pragma unroll
    for (int i = 0; i < Columns::kCount; ++i) sm80::ldmatrix4(columns.x[i], TileK::step(from, 2 * i));
  }

  __device__ __forceinline__ void issue_s(float (&s)[kNS][4], const Held<B::kHeldK>& keys) {
    multiply_along(s, keys, at(B::kAtK), at(B::kAtQ, q_.index, TileQ::kBytes));
  }
  __device__ __forceinline__ void issue_dp(float (&dp)[kNS][4], const Held<B::kHeldV>& values) {
    multiply_along(dp, values, at(B::kAtV), at(B::kAtDo, do_.index, TileQ::kBytes));
  }
  // Keys x queries, over the columns of both.
  template <class Columns>
  __device__ __forceinline__ void multiply_along(float (&c)[kNS][4], const Columns& held, uint32_t tile_k,
                                                 uint32_t tile_q) {
    using Product = Wgmma<B::kBlockQ, Element>;
    const uint64_t keys = TileK::along(tile_k + B::first_key(group_) * TileK::kRowBytes), rows = TileQ::along(tile_q);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < B::kHeadDim / 16; ++i) {
      if (i < Columns::kCount) {
        Product::template rs<0>(flat(c), held.x[i < Columns::kCount ? i : 0], rows + TileQ::along_step(i), i > 0);
      } else {
        Product::template ss<0, 0>(flat(c), keys + TileK::along_step(i), rows + TileQ::along_step(i), i > 0);
      }
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void issue_dv(float (&dv)[kND][4], uint32_t (&prob)[kNS / 2][4]) {
    const uint64_t dout = TileQ::down(at(B::kAtDo, do_.index, TileQ::kBytes));
    pin(flat(prob));
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < B::kBlockQ / 16; ++i) {
      Wgmma<B::kHeadDim, Element>::template rs<1>(flat(dv), prob[i], dout + TileQ::down_step(i), 1);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void issue_dk(float (&dk)[kND][4], int q_stage) {
    const uint64_t ds = TileS::along(at(B::kAtDs, ds_buffer_, TileS::kBytes) + B::first_key(group_) * TileS::kRowBytes);
    const uint64_t q = TileQ::down(at(B::kAtQ, q_stage, TileQ::kBytes));
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < B::kBlockQ / 16; ++i) {
      Wgmma<B::kHeadDim, Element>::template ss<0, 1>(flat(dk), ds + TileS::along_step(i), q + TileQ::down_step(i), 1);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void issue_dq(float (&dq)[kNQ][4]) {
    const uint64_t ds =
        TileS::down(at(B::kAtDs, ds_buffer_, TileS::kBytes) + (B::kByRows ? group_ * TileS::kPanelBytes : 0));
    const int column = B::dq_column(group_);
    const uint64_t k =
        TileK::down(at(B::kAtK) + column / TileK::kPanel * TileK::kPanelBytes + column % TileK::kPanel * 2);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < B::kBlockK / 16; ++i) {
      Wgmma<B::kDqColumns, Element>::template ss<1, 1>(flat(dq), ds + TileS::down_step(i), k + TileK::down_step(i),
                                                       i > 0);
    }
    wgmma_commit();
  }
};

}  // namespace hfp::sm90
