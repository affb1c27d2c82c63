// Backward on Hopper. A block of threads owns 128 keys of one key head, 64 a consumer warpgroup, keeps their dK and dV
// in registers and walks the query tiles that meet them. Everything is computed transposed, keys as rows,
//   S^T = K Q^T, P^T = exp2(S^T - lse), dP^T = V dO^T, dS^T = P^T (dP^T - delta),
//   dV += P^T dO, dK += dS^T Q, dQ = dS K,
// so that P^T is the A operand of dV as it lies in registers. dS^T goes through shared memory: dQ needs that of both
// consumers. dK runs a step behind, so that the tensor cores have it to do while the softmax of the next step waits.
#pragma once

#include "sm90/backward_parts.h"

namespace hfp::sm90 {

// ptxas-spill-ok(sm9015backward_kernel, 900): the loader and the adder live in 24 registers

// One warpgroup of consumers.
template <class B>
class BackwardConsumer {
  using Element = typename B::Element;
  using TileQ = typename B::TileQ;
  using TileK = typename B::TileK;
  using TileS = typename B::TileS;
  static constexpr int kNS = B::kBlockQ / 8, kND = B::kHeadDim / 8, kNQ = B::kDqColumns / 8;
  template <int kN>
  using Flat = float (&)[4 * kN];

 public:
  __device__ BackwardConsumer(const BackwardArguments& a, typename B::Barriers* bars, uint32_t base)
      : a_(a),
        bars_(bars),
        group_(uniform(threadIdx.x / 128) - 1),
        lane_(threadIdx.x % 32),
        warp_(threadIdx.x / 32 % 4),
        base_(base) {}

  __device__ __forceinline__ void run() {
#pragma unroll 1
    for (auto queue = items_of<B>(a_, bars_); queue.valid(); queue.next(true)) {
      const KeyBlock<B> work(a_, queue.tile());
      if (!uniform(work.exists())) continue;
      float dk[kND][4], dv[kND][4];
#pragma unroll
      for (int j = 0; j < kND; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) dk[j][e] = dv[j][e] = 0.f;
      pin(reinterpret_cast<Flat<kND>>(dk));
      pin(reinterpret_cast<Flat<kND>>(dv));
      typename B::Step step = await_q();
      const bool had_keys = !(step.flags & B::kNothing);
      if (!had_keys) {
        release(bars_->q_empty + q_.index);
        q_.next();
      } else {
        if (lane_ < 16) {
          const int key = 64 * group_ + 16 * warp_ + lane_;
          const Range seen = work.mask.rows_seeing(work.key0() + key);
          bars_->seen[key] = make_int2(seen.begin, seen.end);
        }
        __syncwarp();
        walk(work, step, dk, dv);
      }
      // The block of keys is made anew: kept, it would take ten registers.
      store(KeyBlock<B>(a_, sm80::not_hoisted(queue.tile())), dk, dv, had_keys);
    }
  }

 private:
  // All query tiles of a block of keys. What is written between a product and the wait for it is done while the tensor
  // cores work; a wait for all but n products is one for the oldest.
  __device__ __forceinline__ void walk(const KeyBlock<B>& work, typename B::Step step, float (&dk)[kND][4],
                                       float (&dv)[kND][4]) {
    uint32_t prob[kNS / 2][4], keep[kNS / 8];
    {
      float p[kNS][4], dp[kNS][4];
      barrier_wait(smem_address(&bars_->k_full), keys_parity_);
      issue_s(p);
      barrier_wait(smem_address(bars_->do_full + do_.index), do_.parity);
      barrier_wait(smem_address(&bars_->v_full), keys_parity_);
      issue_dp(dp);
      keys_parity_ ^= 1;
      wgmma_wait<1>();  // S
      pin(reinterpret_cast<Flat<kNS>>(p));
      probabilities(work, step, p, prob, keep);
      wgmma_wait<0>();  // dP
      finish_step(work, step, p, dp, prob, keep, dv, [] {});
    }
#pragma unroll 1
    while (!(step.flags & B::kLast)) {
      float p[kNS][4], dp[kNS][4];
      const int q_before = q_.index, do_before = do_.index;
      q_.next();
      do_.next();
      step = await_q();
      const auto release_do = [&] {
        pin(reinterpret_cast<uint32_t (&)[2 * kNS]>(prob));
        release(bars_->do_empty + do_before);
      };
      if constexpr (!B::kOverlapsDv) {
        wgmma_wait<0>();  // dV of the step before
        release_do();
      }
      issue_s(p);
      barrier_wait(smem_address(bars_->do_full + do_.index), do_.parity);
      issue_dp(dp);
      issue_dk(dk, q_before);
      publish_dq();
      wgmma_wait<2>();  // S, and with it dV
      if constexpr (B::kOverlapsDv) release_do();
      pin(reinterpret_cast<Flat<kNS>>(p));
      probabilities(work, step, p, prob, keep);
      wgmma_wait<1>();  // dP
      ds_buffer_ ^= 1;
      finish_step(work, step, p, dp, prob, keep, dv, [&] {
        wgmma_wait<2>();  // dK of the step before
        release(bars_->q_empty + q_before);
      });
    }
    issue_dk(dk, q_.index);
    publish_dq();
    wgmma_wait<0>();
    pin(reinterpret_cast<Flat<kND>>(dk));
    pin(reinterpret_cast<Flat<kND>>(dv));
    pin(reinterpret_cast<uint32_t (&)[2 * kNS]>(prob));
    release(bars_->q_empty + q_.index);
    release(bars_->do_empty + do_.index);
    q_.next();
    do_.next();
    ds_buffer_ ^= 1;
  }

  // From dP on. Leaves dV to be waited for.
  template <class AfterDk>
  __device__ __forceinline__ void finish_step(const KeyBlock<B>& work, const typename B::Step& step,
                                              const float (&p)[kNS][4], float (&dp)[kNS][4],
                                              uint32_t (&prob)[kNS / 2][4], const uint32_t (&keep)[kNS / 8],
                                              float (&dv)[kND][4], AfterDk after_dk) {
    pin(reinterpret_cast<Flat<kNS>>(dp));
    store_ds(work, step, p, dp, keep);
    async_fence_shared();
    named_sync(1, 128 * B::kConsumers);  // dS of both consumers is there
    float dq[kNQ][4];
    issue_dq(dq);
    issue_dv(dv, prob);
    after_dk();
    wgmma_wait<1>();
    pin(reinterpret_cast<Flat<kNQ>>(dq));
    store_dq(dq);
  }

  __device__ __forceinline__ typename B::Step await_q() {
    barrier_wait(smem_address(bars_->q_full + q_.index), q_.parity);
    const typename B::Step step = bars_->step[q_.index];
    return {uniform(step.row0), uniform(step.head), static_cast<unsigned>(uniform(step.flags))};
  }
  __device__ __forceinline__ void release(uint64_t* bar) {
    __syncwarp();
    if (lane_ == 0) barrier_arrive(smem_address(bar));
  }

  // Addresses are made where they are used: kept, they would take more registers, uniform ones too, than there are.
  __device__ __forceinline__ uint32_t at(int tile, int index = 0, int bytes = 0) const {
    return sm80::not_hoisted(base_) + tile + index * bytes;
  }

  __device__ __forceinline__ void issue_s(float (&s)[kNS][4]) {
    multiply_along(s, at(B::kAtK), at(B::kAtQ, q_.index, TileQ::kBytes));
  }
  __device__ __forceinline__ void issue_dp(float (&dp)[kNS][4]) {
    multiply_along(dp, at(B::kAtV), at(B::kAtDo, do_.index, TileQ::kBytes));
  }
  // Keys x queries, over the columns of both.
  __device__ __forceinline__ void multiply_along(float (&c)[kNS][4], uint32_t tile_k, uint32_t tile_q) {
    const uint64_t keys = TileK::along(tile_k + group_ * 64 * TileK::kRowBytes), rows = TileQ::along(tile_q);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < B::kHeadDim / 16; ++i) {
      Wgmma<B::kBlockQ, Element>::template ss<0, 0>(reinterpret_cast<Flat<kNS>>(c), keys + TileK::along_step(i),
                                                    rows + TileQ::along_step(i), i > 0);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void issue_dv(float (&dv)[kND][4], uint32_t (&prob)[kNS / 2][4]) {
    const uint64_t dout = TileQ::down(at(B::kAtDo, do_.index, TileQ::kBytes));
    pin(reinterpret_cast<uint32_t (&)[2 * kNS]>(prob));
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < B::kBlockQ / 16; ++i) {
      Wgmma<B::kHeadDim, Element>::template rs<1>(reinterpret_cast<Flat<kND>>(dv), prob[i], dout + TileQ::down_step(i),
                                                  1);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void issue_dk(float (&dk)[kND][4], int q_stage) {
    const uint64_t ds = TileS::along(at(B::kAtDs, ds_buffer_, TileS::kBytes) + group_ * 64 * TileS::kRowBytes);
    const uint64_t q = TileQ::down(at(B::kAtQ, q_stage, TileQ::kBytes));
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < B::kBlockQ / 16; ++i) {
      Wgmma<B::kHeadDim, Element>::template ss<0, 1>(reinterpret_cast<Flat<kND>>(dk), ds + TileS::along_step(i),
                                                     q + TileQ::down_step(i), 1);
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
      Wgmma<B::kDqColumns, Element>::template ss<1, 1>(reinterpret_cast<Flat<kNQ>>(dq), ds + TileS::down_step(i),
                                                       k + TileK::down_step(i), i > 0);
    }
    wgmma_commit();
  }

  // From S^T: P^T in p, for dS, and rounded, without what dropout drops, in prob.
  __device__ __forceinline__ void probabilities(const KeyBlock<B>& work, const typename B::Step& step,
                                                float (&p)[kNS][4], uint32_t (&prob)[kNS / 2][4],
                                                uint32_t (&keep)[kNS / 8]) {
    const int key = 64 * group_ + 16 * warp_ + lane_ / 4, row = step.row0 + 2 * (lane_ % 4);
    if constexpr (B::kVariant == Variant::kGeneral) {
      const LogitBias bias(a_.p, work.seq.batch, step.head);
      each(p, [&](float& x, int j, int h, int e) { x = bias.apply(x, distance(work, key, row, j, h, e)); });
    }
    if (const unsigned why = step.flags & (kBeforeRange | kPastRange | kByBits)) {
      const int2 lo = bars_->seen[key], hi = bars_->seen[key + 8];
      const Range seen[2] = {{lo.x, lo.y}, {hi.x, hi.y}};
      mask_transposed(why, p, seen, row);
    }
    const uint32_t lse = smem_address(bars_->lse[q_.index]) + 8 * (lane_ % 4);
#pragma unroll
    for (int j = 0; j < kNS; ++j) {
      const float2 l = load_shared_float2(lse + 32 * j);
#pragma unroll
      for (int e = 0; e < 4; ++e) p[j][e] = exp2_approx(fmaf(p[j][e], a_.p.exp2_scale, e % 2 ? -l.y : -l.x));
    }
    if (dropping()) {
      const Dropout dropout(a_.p.dropout, work.seq.batch * a_.p.num_heads + step.head);
#pragma unroll
      for (int i = 0; i < kNS / 2; ++i) {
        const uint32_t bits =
            dropout.keep_bits_transposed(step.row0 + 16 * i, work.key0() + key - lane_ / 4, lane_ / 4, lane_ % 4);
        keep[i / 4] = i % 4 ? keep[i / 4] | bits << (8 * (i % 4)) : bits;
      }
    }
#pragma unroll
    for (int j = 0; j < kNS; ++j) {
      float x[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) x[e] = !dropping() || is_kept(keep, j, e) ? p[j][e] : 0.f;
      prob[j / 2][j % 2 * 2] = pack<Element>(x[0], x[1]);
      prob[j / 2][j % 2 * 2 + 1] = pack<Element>(x[2], x[3]);
    }
  }
  __device__ static bool is_kept(const uint32_t (&keep)[kNS / 8], int j, int e) {
    return keep[j / 8] >> (4 * (j % 8) + e) & 1u;
  }

  // dS^T = P^T (dP^T - delta), rounded, to shared memory.
  __device__ __forceinline__ void store_ds(const KeyBlock<B>& work, const typename B::Step& step,
                                           const float (&p)[kNS][4], const float (&dp)[kNS][4],
                                           const uint32_t (&keep)[kNS / 8]) {
    const uint32_t delta = smem_address(bars_->delta[do_.index]) + 8 * (lane_ % 4);
    const uint32_t to =
        at(B::kAtDs, ds_buffer_, TileS::kBytes) + TileS::offset(64 * group_ + 16 * warp_ + lane_ % 16, lane_ / 16);
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
          float y = dp[j][e];
          if (dropping()) y = is_kept(keep, j, e) ? y * a_.p.dropout.rescale : 0.f;
          ds[e] = p[j][e] * (y - (e % 2 ? d.y : d.x));
        }
        if constexpr (B::kVariant == Variant::kGeneral) {
          const LogitBias bias(a_.p, work.seq.batch, step.head);
          const float2 l = load_shared_float2(smem_address(bars_->lse[q_.index]) + 8 * (lane_ % 4) + 32 * j);
          const int key = 64 * group_ + 16 * warp_ + lane_ / 4, row = step.row0 + 2 * (lane_ % 4);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            ds[e] *= bias.derivative(p[j][e], e % 2 ? l.y : l.x, distance(work, key, row, j, e / 2, e % 2));
          }
        }
        x[2 * k] = pack<Element>(ds[0], ds[1]);
        x[2 * k + 1] = pack<Element>(ds[2], ds[3]);
      }
      store_matrix4(TileS::step(to, 2 * i), x[0], x[1], x[2], x[3]);
    }
  }

  // Waits until the tile of the step before has left.
  __device__ __forceinline__ void store_dq(const float (&dq)[kNQ][4]) {
    barrier_wait(smem_address(bars_->dq_empty + group_), dq_parity_ ^ 1);
    const uint32_t to = at(B::kAtDq) + B::dq_offset(group_) + threadIdx.x % 128 * 16;
    const int skipped = B::kHeadDim == 96 && group_ == 1 ? 4 : 0;  // what the first consumer has
#pragma unroll
    for (int j = 0; j < kNQ; ++j) {
      if (j < 4 && skipped) continue;
      store_shared_float4(to + (j - skipped) * 2048, dq[j]);
    }
  }
  // Tells the adder. Not at once after storing: the fence waits for the stores, the tensor cores would for the fence.
  __device__ __forceinline__ void publish_dq() {
    async_fence_shared();
    release(bars_->dq_full + group_);
    dq_parity_ ^= 1;
  }

  // Through the tiles of K and V, which nobody reads any more, and the copy engine; straight to memory if the last rows
  // are not this sequence's.
  __device__ __forceinline__ void store(const KeyBlock<B>& work, const float (&dk)[kND][4], const float (&dv)[kND][4],
                                        bool had_keys) {
    const BackwardParams& p = a_.p;
    const float scale_v = B::kVariant == Variant::kPlain ? 1.f : p.dropout.rescale;
    const int key0 = work.key0() + 64 * group_;
    if (had_keys) named_sync(1, 128 * B::kConsumers);  // dQ reads all of K
    if (had_keys && key0 + 64 <= work.seq.stored_k) {
      const int tile = group_ * 64 * TileK::kRowBytes;
      store_tile(at(B::kAtV) + tile, dv, scale_v);
      store_tile(at(B::kAtK) + tile, dk, p.softmax_scale);
      async_fence_shared();
      named_sync(2 + group_, 128);
      if (threadIdx.x % 128 == 0) {
        const int row = static_cast<int>(work.seq.offset_k) + key0, batch = p.mask.cu_seqlens_q ? 0 : work.seq.batch;
#pragma unroll
        for (int i = 0; i < TileK::kPanels; ++i) {
          const int from = tile + i * TileK::kPanelBytes, col = i * TileK::kPanel;
          tma_store(&a_.dv, at(B::kAtV) + from, col, row, work.head_k, batch);
          tma_store(&a_.dk, at(B::kAtK) + from, col, row, work.head_k, batch);
        }
        bulk_commit();
        bulk_wait_read<0>();
      }
    } else {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int key = key0 + 16 * warp_ + lane_ / 4 + 8 * h;
        const bool exists = key < work.seq.stored_k;
        store_row<Element>(row_pointer<Element>(p.dv, work.seq.batch, work.seq.offset_k + key, work.head_k), exists, dv,
                           h, scale_v, p.head_dim, lane_ % 4);
        store_row<Element>(row_pointer<Element>(p.dk, work.seq.batch, work.seq.offset_k + key, work.head_k), exists, dk,
                           h, p.softmax_scale, p.head_dim, lane_ % 4);
      }
    }
    if (had_keys && threadIdx.x % 128 == 0) {
      barrier_arrive(smem_address(&bars_->k_empty));
      barrier_arrive(smem_address(&bars_->v_empty));
    }
  }
  __device__ __forceinline__ void store_tile(uint32_t to, const float (&x)[kND][4], float scale) {
    to += TileK::offset(16 * warp_ + lane_ % 16, lane_ / 16);
#pragma unroll
    for (int j = 0; j < kND; j += 2) {
      store_matrix4(TileK::step(to, j), pack<Element>(x[j][0] * scale, x[j][1] * scale),
                    pack<Element>(x[j][2] * scale, x[j][3] * scale),
                    pack<Element>(x[j + 1][0] * scale, x[j + 1][1] * scale),
                    pack<Element>(x[j + 1][2] * scale, x[j + 1][3] * scale));
    }
  }

  __device__ bool dropping() const {
    return B::kVariant == Variant::kDropout || (B::kVariant == Variant::kGeneral && a_.p.dropout.rng_state);
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
  const int group_, lane_, warp_;
  const uint32_t base_;
  Stage<B::kStagesQ> q_{0};
  Stage<B::kStagesDo> do_{0};
  uint32_t keys_parity_ = 0, dq_parity_ = 0;
  int ds_buffer_ = 0;
};

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
    BackwardConsumer<B>(a, bars, base).run();
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
