// More than 128 columns: the consumers share 64 keys. Each makes half of the queries of P^T and dS^T and leaves them in
// shared memory, then multiplies all of them with half of the columns.
#pragma once

#include "sm90/backward_consumer.h"

namespace hfp::sm90 {

template <class B>
class WideConsumer : BackwardConsumer<B> {
  using Base = BackwardConsumer<B>;
  using Base::at, Base::await_q, Base::kND, Base::kNQ, Base::kNS, Base::release;
  using Base::bars_, Base::group_, Base::q_, Base::do_, Base::keys_parity_;
  using typename Base::Element;
  using typename Base::TileK;
  using typename Base::TileQ;
  using typename Base::TileS;

 public:
  __device__ WideConsumer(const BackwardArguments& a, typename B::Barriers* bars, uint32_t base)
      : Base(a, bars, base) {}
  __device__ __forceinline__ void run() {
    Base::run([this](auto&... arguments) { walk(arguments...); });
  }

 private:
  // All query tiles of a block of keys. S of the next step is asked for before dQ of this one leaves.
  __device__ __forceinline__ void walk(const KeyBlock<B>& work, typename B::Step step, float (&dk)[kND][4],
                                       float (&dv)[kND][4]) {
    float p[kNS][4];
    barrier_wait(smem_address(&bars_->k_full), keys_parity_);
    barrier_wait(smem_address(&bars_->v_full), keys_parity_);
    keys_parity_ ^= 1;
    issue_s(p);
#pragma unroll 1
    for (;;) {
      {
        float dp[kNS][4];
        barrier_wait(smem_address(bars_->do_full + do_.index), do_.parity);
        issue_dp(dp);
        wgmma_wait<1>();  // S
        pin(flat(p));
        this->probabilities(work, step, p);
        wgmma_wait<0>();  // dP
        pin(flat(dp));
        named_sync(1, 128 * B::kConsumers);  // nobody reads the P and dS of the step before any more
        store_p(p);
        this->store_ds(work, step, p, dp);
        async_fence_shared();
        named_sync(1, 128 * B::kConsumers);  // P and dS are complete
      }
      if (step.flags & B::kLast) break;
      float dq[kNQ][4];
      const int q_before = q_.index;
      issue_products(dv, dq, dk);
      q_.next();
      step = await_q();
      issue_s(p);
      wgmma_wait<2>();  // dQ
      leave(dq);
      wgmma_wait<1>();  // dK
      release(bars_->q_empty + q_before);
    }
    float dq[kNQ][4];
    issue_products(dv, dq, dk);
    wgmma_wait<1>();  // dQ
    leave(dq);
    wgmma_wait<0>();
    pin(flat(dk));
    pin(flat(dv));
    release(bars_->q_empty + q_.index);
    q_.next();
  }

  // Of a step whose P and dS are complete. Leaves dQ and dK to be waited for.
  __device__ __forceinline__ void issue_products(float (&dv)[kND][4], float (&dq)[kNQ][4], float (&dk)[kND][4]) {
    multiply_down(dv, B::kAtP, at(B::kAtDo, do_.index, TileQ::kBytes));
    issue_dq(dq);
    multiply_down(dk, B::kAtDs, at(B::kAtQ, q_.index, TileQ::kBytes));
    wgmma_wait<2>();  // dV
    release(bars_->do_empty + do_.index);
    do_.next();
  }
  __device__ __forceinline__ void leave(float (&dq)[kNQ][4]) {
    pin(flat(dq));
#pragma unroll
    for (int i = 0; i < B::kDqRounds; ++i) {
      this->template store_dq<kNQ / B::kDqRounds>(dq, i * kNQ / B::kDqRounds);
      this->publish_dq();
    }
  }

  __device__ __forceinline__ void issue_s(float (&s)[kNS][4]) {
    multiply_along(s, at(B::kAtK), at(B::kAtQ, q_.index, TileQ::kBytes));
  }
  __device__ __forceinline__ void issue_dp(float (&dp)[kNS][4]) {
    multiply_along(dp, at(B::kAtV), at(B::kAtDo, do_.index, TileQ::kBytes));
  }
  // All keys x this consumer's queries, over the columns of both.
  __device__ __forceinline__ void multiply_along(float (&c)[kNS][4], uint32_t tile_k, uint32_t tile_q) {
    const uint64_t keys = TileK::along(tile_k);
    const uint64_t rows = TileQ::along(tile_q + B::first_query(group_) * TileQ::kRowBytes);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < B::kHeadDim / 16; ++i) {
      Wgmma<B::kQueries, Element>::template ss<0, 0>(flat(c), keys + TileK::along_step(i), rows + TileQ::along_step(i),
                                                     i > 0);
    }
    wgmma_commit();
  }
  // dV += P^T dO, dK += dS^T Q: all keys x this consumer's columns.
  __device__ __forceinline__ void multiply_down(float (&c)[kND][4], int tile_s, uint32_t tile_q) {
    const uint64_t s = TileS::along(at(tile_s));
    const uint64_t q = TileQ::down(tile_q + B::first_column(group_) / TileQ::kPanel * TileQ::kPanelBytes);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < B::kBlockQ / 16; ++i) {
      Wgmma<B::kColumns, Element>::template ss<0, 1>(flat(c), s + TileS::along_step(i), q + TileQ::down_step(i), 1);
    }
    wgmma_commit();
  }
  __device__ __forceinline__ void issue_dq(float (&dq)[kNQ][4]) {
    const uint64_t ds = TileS::down(at(B::kAtDs));
    const uint64_t k = TileK::down(at(B::kAtK) + B::first_column(group_) / TileK::kPanel * TileK::kPanelBytes);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < B::kBlockK / 16; ++i) {
      Wgmma<B::kDqColumns, Element>::template ss<1, 1>(flat(dq), ds + TileS::down_step(i), k + TileK::down_step(i),
                                                       i > 0);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void store_p(const float (&p)[kNS][4]) {
    const uint32_t to = at(B::kAtP) + this->place_in_s();
#pragma unroll
    for (int j = 0; j < kNS; j += 2) {
      uint32_t x[2], y[2];
      this->round_p(x, p[j]);
      this->round_p(y, p[j + 1]);
      store_matrix4(TileS::step(to, j), x[0], x[1], y[0], y[1]);
    }
  }
};

}  // namespace hfp::sm90
