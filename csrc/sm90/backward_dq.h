// dQ is summed in fp32 in memory, over key blocks that run on different multiprocessors: cleared a little before it is
// needed and rounded as soon as it is complete, by a warp that has nothing else to do, so that neither costs a pass
// over memory of its own and most of it happens in the L2 cache.
#pragma once

#include "sm90/backward_parts.h"

namespace hfp::sm90 {

// One tile of dQ of one head. Tiles come in the order of the work, group by group of heads that share keys: `order`.
// What is counted is counted by sequence.
template <class B>
struct DqTile {
  int order, group, head, row0;
  Sequence seq;

  __device__ DqTile(const BackwardArguments& a, int index)
      : order(0), group(0), head(0), row0(0), seq(a.p.mask, locate(a, index)) {}
  __device__ bool exists() const { return row0 < seq.seqlen_q; }
  __device__ float* accumulator(const BackwardArguments& a) const {
    return a.p.dq_accum + (head * a.p.scratch_rows + seq.scratch_row(a.p.mask) + row0) * B::kHeadDim;
  }
  // What there is of the group in its sequence: tiles to be cleared, key blocks that add to them.
  __device__ int tiles(const BackwardArguments& a) const {
    return a.p.heads_per_group * ((seq.seqlen_q + B::kBlockQ - 1) / B::kBlockQ);
  }
  __device__ int key_blocks() const { return (seq.stored_k + B::kBlockK - 1) / B::kBlockK; }

 private:
  // Sets everything but the sequence, returns that.
  __device__ int locate(const BackwardArguments& a, int index) {
    uint32_t rest, tile, head_k;
    order = static_cast<int>(a.group_tiles.divide(index, rest));
    const int in_group = static_cast<int>(a.tiles.divide(rest, tile));
    const int slot = static_cast<int>(a.num_heads_k.divide(order, head_k));
    const SequenceTile at = find_tile<B::kBlockQ>(a.p.mask.cu_seqlens_q, a.p.batch, slot, static_cast<int>(tile));
    group = at.sequence * a.p.num_heads_k + static_cast<int>(head_k);
    head = static_cast<int>(head_k) * a.p.heads_per_group + in_group;
    row0 = at.tile * B::kBlockQ;
    return at.sequence;
  }
};

// One warp that rounds tiles, through a buffer and a barrier of its own.
template <class B>
class Rounder {
 public:
  __device__ Rounder(const BackwardArguments& a, uint32_t buffer, uint64_t* full)
      : a_(a), buffer_(buffer), full_(smem_address(full)), lane_(threadIdx.x % 32) {
    take();
  }
  __device__ bool done() const { return next_ >= a_.total_tiles; }

  // Rounds the next tile if it is complete; returns whether it was.
  __device__ bool step() {
    const DqTile<B> tile(a_, next_);
    if (tile.exists()) {
      if (!complete(tile)) return false;
      round(tile);
    }
    take();
    return true;
  }

 private:
  __device__ void take() { next_ = uniform(lane_ == 0 ? atomicAdd(&a_.counters->next_round, 1) : 0); }

  __device__ bool complete(const DqTile<B>& tile) {
    if (tile.group == complete_group_) return true;
    int is = 0;
    if (lane_ == 0) {
      is = load_acquire(a_.added + tile.group) == tile.key_blocks() &&
           load_acquire(a_.cleared + tile.group) == tile.tiles(a_);
      async_fence_global();
    }
    if (!uniform(is)) return false;
    complete_group_ = tile.group;
    return true;
  }

  // dQ = accumulated * softmax_scale, rounded, in its place: 64 rows by 32 columns at a time, 8 KB in the order in
  // which a consumer's threads held them.
  __device__ void round(const DqTile<B>& tile) {
    using Element = typename B::Element;
    const float* accumulator = tile.accumulator(a_);
#pragma unroll 1
    for (int i = 0; i < B::kDqTileBytes / kBytes; ++i) {
      __syncwarp();
      if (lane_ == 0) {
        async_fence_shared();  // the buffer has been read
        barrier_expect(full_, kBytes);
        bulk_load(buffer_, accumulator + i * (kBytes / 4), kBytes, full_);
      }
      barrier_wait(full_, parity_);
      parity_ ^= 1;
      const int col = 32 * i % B::kHeadDim + lane_ % 4 * 8, row0 = tile.row0 + 32 * i / B::kHeadDim * 64 + lane_ / 4;
#pragma unroll 1
      for (int strip = 0; strip < 8; ++strip) {  // rows g of 8 and 8
        const uint32_t from = buffer_ + strip / 2 * 512 + strip % 2 * 8 + lane_ * 16;
        const int row = row0 + 8 * strip;
        uint32_t x[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float2 v = load_shared_float2(from + 2048 * j);
          x[j] = pack<Element>(v.x * a_.p.softmax_scale, v.y * a_.p.softmax_scale);
        }
        transpose_quad(x, lane_ % 4);
        if (row < tile.seq.seqlen_q && col < a_.p.head_dim) {
          Element* to = row_pointer<Element>(a_.p.dq, tile.seq.batch, tile.seq.offset_q + row, tile.head) + col;
          *reinterpret_cast<uint4*>(to) = make_uint4(x[0], x[1], x[2], x[3]);
        }
      }
    }
  }

  static constexpr int kBytes = B::kRoundBytes;
  const BackwardArguments& a_;
  const uint32_t buffer_, full_;
  const int lane_;
  int next_, complete_group_ = -1;
  uint32_t parity_ = 0;
};

// One warp that clears tiles ahead of the key blocks that add to them, and rounds those that are complete.
template <class B>
class Tidier {
 public:
  __device__ Tidier(const BackwardArguments& a, typename B::Barriers* bars, uint32_t base)
      : a_(a), zeros_(base + B::kAtZeros), lane_(threadIdx.x % 32), rounder_(a, base + B::kAtRound, bars->round_full) {}

  __device__ void run() {
    for (int i = 16 * lane_; i < B::kZeroBytes; i += 16 * 32) store_shared_float4(zeros_ + i, {0.f, 0.f, 0.f, 0.f});
    async_fence_shared();
    __syncwarp();
    take();
#pragma unroll 1
    while (next_ < a_.total_tiles || !rounder_.done()) {
      if (clear()) continue;
      if (!rounder_.done() && rounder_.step()) continue;
      __nanosleep(200);
    }
  }

 private:
  __device__ void take() { next_ = uniform(lane_ == 0 ? atomicAdd(&a_.counters->next_clear, 1) : 0); }

  // Clears the next tile if it is wanted soon; returns whether it was.
  __device__ bool clear() {
    if (next_ >= a_.total_tiles) return false;
    const DqTile<B> tile(a_, next_);
    if (tile.order >= groups_wanted_) {
      groups_wanted_ = groups_wanted();
      if (tile.order >= groups_wanted_) return false;
    }
    if (tile.exists() && lane_ == 0) {
      float* to = tile.accumulator(a_);
#pragma unroll 1
      for (int i = 0; i < B::kDqTileBytes / B::kZeroBytes; ++i)
        bulk_store(to + i * (B::kZeroBytes / 4), zeros_, B::kZeroBytes);
      bulk_commit();
      bulk_wait<0>();
      async_fence_global();
      add_release(a_.cleared + tile.group, 1);
    }
    take();
    return true;
  }

  // Those of the key blocks that have been handed out, and of as many as run at once after them.
  __device__ int groups_wanted() const {
    const int ahead = load_acquire(&a_.counters->next_item) + static_cast<int>(gridDim.x);
    if (ahead >= a_.total) return a_.groups;
    return static_cast<int>((a_.section_items.divide(ahead) + 1) * a_.section_heads.divisor());
  }

  const BackwardArguments& a_;
  const uint32_t zeros_;
  const int lane_;
  int next_ = 0, groups_wanted_ = 0;
  Rounder<B> rounder_;
};

// To each consumer its part of dQ's tile, as soon as what it left there has been read.
template <class B>
__device__ __forceinline__ void give_dq_back(typename B::Barriers* bars) {
  bulk_wait_read<1>();
  barrier_arrive(smem_address(bars->dq_empty));
  bulk_wait_read<0>();
  barrier_arrive(smem_address(bars->dq_empty + 1));
}

// One thread that adds what the consumers leave in shared memory to dQ's accumulator.
template <class B>
class Adder {
 public:
  __device__ Adder(const BackwardArguments& a, typename B::Barriers* bars, uint32_t base)
      : a_(a), bars_(bars), tile_(base + B::kAtDq) {}

  __device__ void run() {
    PlanReader<B> plans(bars_);
    int added_to = -1;  // the group of the key block before, of which not all additions may be complete
#pragma unroll 1
    for (;;) {
      const typename B::Plan plan = plans.next();
      if (plan.flags & (B::kFirst | B::kExit | B::kNothing)) {
        if (added_to >= 0) {
          bulk_wait<0>();
          async_fence_global();
          add_release(a_.added + added_to, 1);
        }
        added_to = plan.group;
        if (plan.flags & B::kExit) return;
        if (plan.flags & B::kNothing) continue;
        while (load_acquire(a_.cleared + plan.group) != plan.group_tiles) __nanosleep(20);
        async_fence_global();
      }
      add(plan);
    }
  }

 private:
  __device__ __forceinline__ void add(const typename B::Plan& plan) {
    int* turn = a_.p.dq_turn ? a_.p.dq_turn + plan.scratch / B::kBlockQ : nullptr;
    float* to = a_.p.dq_accum + plan.scratch * B::kHeadDim;
    if (turn) {
      while (load_acquire(turn) != plan.turn) __nanosleep(20);
      async_fence_global();
    }
#pragma unroll
    for (int round = 0; round < B::kDqRounds; ++round) {
#pragma unroll
      for (int w = 0; w < B::kConsumers; ++w) {
        const int bytes = (B::dq_offset(w + 1) - B::dq_offset(w)) / B::kDqRounds;
        barrier_wait(smem_address(bars_->dq_full + w), parity_);
        bulk_add(to + (B::dq_offset(w) + round * bytes) / 4, tile_ + B::dq_offset(w) / B::kDqRounds, bytes);
        bulk_commit();
      }
      give_dq_back<B>(bars_);
      parity_ ^= 1;
    }
    if (turn) {
      bulk_wait<0>();
      async_fence_global();
      add_release(turn, 1);
    }
  }

  const BackwardArguments& a_;
  typename B::Barriers* bars_;
  const uint32_t tile_;
  uint32_t parity_ = 0;
};

// What the main kernel reads: the row terms, and counters at zero.
template <class B>
__global__ void __launch_bounds__(sm80::kEdgeThreads)
    backward_begin_kernel(const __grid_constant__ BackwardArguments a) {
  sm80::let_next_kernel_start();
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < a.num_counters;
       i += int64_t{gridDim.x} * blockDim.x)
    reinterpret_cast<int*>(a.counters)[i] = 0;
  if (a.total_tiles == 0) return;
  const sm80::RowTile<B> at(a.p);
  const Sequence seq(a.p.mask, at.batch);
  const int row0 = at.tile * B::kBlockQ;
  if (row0 >= seq.seqlen_q) return;
  const int64_t scratch = at.head * a.p.scratch_rows + seq.scratch_row(a.p.mask) + row0;
  sm80::write_row_terms<B>(a.p, at, seq, scratch);
  if (a.p.dq_turn && threadIdx.x == 0) a.p.dq_turn[scratch / B::kBlockQ] = 0;
}

}  // namespace hfp::sm90
