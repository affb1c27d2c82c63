// dQ where a thread block owns a group of heads: it takes their key blocks one after the other, so it knows which of
// them meets a tile of dQ first, and which last. The first stores instead of adding, and for the last the sum comes
// back to the consumers, who add and round. Nothing has to be cleared before or rounded after, every thread block has
// an accumulator of its own, which stays in the L2 cache, and additions are always in the same order.
#pragma once

#include "sm90/backward_dq.h"

namespace hfp::sm90 {

// One thread that carries what the consumers leave in shared memory to the accumulator, and back.
template <class B>
class OwnedAdder {
 public:
  __device__ OwnedAdder(const BackwardArguments& a, typename B::Barriers* bars, uint32_t base)
      : a_(a), bars_(bars), tile_(base + B::kAtDq) {}

  __device__ void run() {
    PlanReader<B> plans(bars_);
    uint32_t left_parity = 0;
#pragma unroll 1
    for (;;) {
      const typename B::Plan plan = plans.next();
      if (plan.flags & B::kExit) return bulk_wait<0>();
      if (plan.flags & B::kNothing) continue;
      if (plan.flags & B::kFirst) {
        bulk_wait<0>();  // what earlier key blocks added is in the accumulator
        if constexpr (B::kLeavesThroughDq) {
          barrier_wait(smem_address(&bars_->left), left_parity);
          left_parity ^= 1;
        }
      }
      const bool opens = plan.flags & B::kOpens, closes = plan.flags & B::kCloses;
      float* accum = a_.p.dq_accum + plan.accum * B::kHeadDim;
      each_part([&](int w, uint32_t part, int offset, int bytes) {
        const uint32_t bar = smem_address(bars_->dq_loaded + w);
        if (!closes || opens) return barrier_arrive(bar);
        barrier_expect(bar, bytes);
        bulk_load(part, accum + offset, bytes, bar);
      });
      each_part([&](int w, uint32_t part, int offset, int bytes) {
        barrier_wait(smem_address(bars_->dq_full + w), parity_);
        if (!closes && opens) bulk_store(accum + offset, part, bytes);
        if (!closes && !opens) bulk_add(accum + offset, part, bytes);
        bulk_commit();
      });
      give_dq_back<B>(bars_);
      parity_ ^= 1;
    }
  }

 private:
  // A consumer's part of the tile in shared memory, where it is in the accumulator, and its size in bytes.
  template <class Visit>
  __device__ __forceinline__ void each_part(Visit visit) const {
#pragma unroll
    for (int w = 0; w < B::kConsumers; ++w) {
      visit(w, tile_ + B::dq_offset(w), B::dq_offset(w) / 4, B::dq_offset(w + 1) - B::dq_offset(w));
    }
  }

  const BackwardArguments& a_;
  typename B::Barriers* bars_;
  const uint32_t tile_;
  uint32_t parity_ = 0;
};

// One warp that writes zeros to tiles of dQ that no key block meets.
template <class B>
__device__ void clear_unseen(const BackwardArguments& a) {
  using Element = typename B::Element;
  const int col = threadIdx.x % 32 * 8;
#pragma unroll 1
  for (int index = blockIdx.x; index < a.total_tiles; index += gridDim.x) {
    const DqTile<B> tile(a, index);
    const Mask mask(a.p.mask, tile.seq);
    const int end = min(tile.row0 + B::kBlockQ, tile.seq.seqlen_q);
    if (mask.template key_blocks<B::kBlockK>(mask.tile_span(tile.row0, end)).valid() || col >= a.p.head_dim) continue;
#pragma unroll 1
    for (int row = tile.row0; row < end; ++row) {
      *reinterpret_cast<uint4*>(row_pointer<Element>(a.p.dq, tile.seq.batch, row, tile.head) + col) = {};
    }
  }
}

}  // namespace hfp::sm90
