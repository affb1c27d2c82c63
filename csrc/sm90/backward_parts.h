// What surrounds the products of the Hopper backward: shapes, the order of the work, and the copies.
#pragma once

#include "common/divide.h"
#include "common/logits.h"
#include "common/query_tiles.h"
#include "common/scratch.h"
#include "launch.h"
#include "sm80/backward_edges.h"
#include "sm90/schedule.h"
#include "sm90/store.h"
#include "sm90/tensor_map.h"
#include "sm90/tile.h"

namespace hfp::sm90 {

template <typename Element_, int kHeadDim_, Variant kVariant_, bool kOwns_ = false>
struct Backward {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr Variant kVariant = kVariant_;
  static constexpr bool kOwns = kOwns_;  // whole groups of heads that share keys, see backward_owned.h
  static constexpr int kConsumers = 2;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

  // Up to 128 columns each consumer has 64 keys of its own, which is what registers hold of dK and dV. With more, both
  // have the same 64 keys, half of the queries of S and half of the columns of dK and dV.
  static constexpr bool kWide = kHeadDim > 128;
  static constexpr int kBlockK = kWide ? 64 : 128;
  // 128 queries where they leave registers enough; with 64 columns they do only if dV of one step is waited for before
  // S of the next is asked for, and the tile's logits are plain.
  static constexpr int kBlockQ = kHeadDim <= 32 || (kHeadDim == 64 && kVariant != Variant::kGeneral) ? 128 : 64;
  static constexpr bool kOverlapsDv = kHeadDim != 128 && (kHeadDim != 64 || kBlockQ == 64);
  // Of K and V, as operands of S and dP, so many sixteens of columns stay in registers, as many as there are left: from
  // shared memory, which is what a step waits for, each consumer would read its 64 keys at every step. 64 columns with
  // 128 queries a step have room for K and one of V, and gain nothing.
  static constexpr int kHeldK = kHeadDim == 32 ? 2 : kHeadDim == 96 ? 6 : kHeadDim == 128 ? 4 : 0;
  static constexpr int kHeldV = kHeadDim == 32 ? 2 : kHeadDim == 96 ? 3 : kHeadDim == 128 ? 1 : 0;
  static constexpr int kStagesQ = kWide ? 2 : 3;  // Q is read until dK, which runs a step behind
  static constexpr int kStagesDo = kWide ? 1 : 2;
  static constexpr int kStagesS = kWide ? 1 : 2;  // of dS

  // What a consumer holds: of S^T and dP^T its first key and query and so many queries, of dK and dV its first column
  // and so many columns.
  static constexpr int kQueries = kWide ? kBlockQ / 2 : kBlockQ;
  static constexpr int kColumns = kWide ? kHeadDim / 2 : kHeadDim;
  __device__ static constexpr int first_key(int group) { return kWide ? 0 : 64 * group; }
  __device__ static constexpr int first_query(int group) { return kWide ? kQueries * group : 0; }
  __device__ static constexpr int first_column(int group) { return kWide ? kColumns * group : 0; }

  // How the consumers share dQ: 64 rows each of 128, or columns. 96 columns are no two equal parts that start on
  // panels; both compute 64 then, and the second keeps the last 32.
  static constexpr bool kByRows = kBlockQ == 128;
  static constexpr int kDqColumns = kByRows ? kHeadDim : kHeadDim == 96 ? 64 : kHeadDim / 2;
  static constexpr int kDqRounds = kWide ? 2 : 1;  // in which it goes through shared memory
  static constexpr int kDqTileBytes = kBlockQ * kHeadDim * 4;
  // Where a consumer's part of the tile begins, in bytes, and the first column that it computes.
  __device__ static constexpr int dq_offset(int group) {
    return group == kConsumers ? kDqTileBytes : group * 64 * kDqColumns * 4;
  }
  __device__ static constexpr int dq_column(int group) {
    return kByRows ? 0 : group * kHeadDim / (kHeadDim == 96 ? 3 : 2);
  }

  using TileQ = Tile<kBlockQ, kHeadDim>;
  using TileK = Tile<kBlockK, kHeadDim>;
  using TileS = Tile<kBlockK, kBlockQ>;  // dS and P, transposed
  using TileOut = Tile<64, kColumns>;    // a consumer's dK or dV, rounded
  struct Step {                          // of the loop over query tiles, as the consumers see it
    int row0, head, bits;
    unsigned flags;  // Hidden, and:
  };
  static constexpr unsigned kFirst = 16, kLast = 32;  // of the key block
  static constexpr unsigned kNothing = 64;            // the key block has no step
  static constexpr unsigned kExit = 128;
  static constexpr unsigned kOpens = 256, kCloses = 512;  // the tile of dQ, if groups are owned
  static constexpr int kOwnQ = 16, kOwnK = 24;  // from these bits on: how many rows of the tile are the sequence's
  // As the loader and the adder see it.
  struct Plan : Step {
    int row, batch;  // coordinates of the query tile in Q and dO
    int key_row, head_k;
    int turn;         // how many key blocks add to the tile before this one
    int group;        // of heads that share keys, over all sequences
    int group_tiles;  // of queries
    int64_t scratch;  // first row of the tile in what is kept per row
    int64_t accum;    // and in a thread block's accumulator of dQ, if groups are owned
  };
  static constexpr int kPlans = 4;
  struct Barriers {
    float lse[kStagesQ][kBlockQ], delta[kStagesDo][kBlockQ];
    int2 seen[kBlockK];  // rows that see each key
    uint64_t k_full, k_empty, v_full, v_empty;
    uint64_t q_full[kStagesQ], q_empty[kStagesQ], do_full[kStagesDo], do_empty[kStagesDo];
    uint64_t dq_full[kConsumers], dq_empty[kConsumers], dq_loaded[kConsumers], left, landed;
    uint64_t plan_full[kPlans], plan_empty[kPlans], tile_full, tile_empty, round_full[1 + 4 * kConsumers];
    Plan plan[kPlans];
    Step step[kStagesQ];
    int tile, first_item;
  };
  static constexpr int kAtK = 0;  // places of the tiles in shared memory
  static constexpr int kAtV = kAtK + TileK::kBytes;
  static constexpr int kAtQ = kAtV + TileK::kBytes;
  static constexpr int kAtDo = kAtQ + kStagesQ * TileQ::kBytes;
  static constexpr int kAtDs = kAtDo + kStagesDo * TileQ::kBytes;
  static constexpr int kAtP = kAtDs + kStagesS * TileS::kBytes;  // wide only: P is no operand in registers
  static constexpr int kAtDq = kAtP + (kWide ? TileS::kBytes : 0);
  static constexpr int kAtRound = kAtDq + kDqTileBytes / kDqRounds;
  static constexpr int kRoundBytes = 64 * 32 * 4;
  static constexpr int kAtZeros = kAtRound + kRoundBytes;
  static constexpr int kZeroBytes = 4096;
  static constexpr int kTileBytes = kAtZeros + kZeroBytes;
  // Where a panel of a consumer's dV (0) or dK (1) leaves from: what it alone writes, so that neither waits for the
  // other: its keys' rows of dS, and its part of dQ where those do not suffice; wide: where V and K were.
  static constexpr int kOwnRows = 64 * TileS::kRowBytes, kOwnDs = kStagesS * TileS::kPanels * kOwnRows;
  static constexpr bool kLeavesThroughDq = !kWide && 2 * TileOut::kBytes > kOwnDs;
  static_assert(kWide || 2 * TileOut::kBytes <= kOwnDs + dq_offset(2) - dq_offset(1));
  __device__ static constexpr int out_place(int group, int i, int panel) {
    const int at = (i * TileOut::kPanels + panel) * TileOut::kPanelBytes;
    if (kWide) return (i == 0 ? kAtV : kAtK) + group * TileOut::kBytes + panel * TileOut::kPanelBytes;
    if (at < kOwnDs) return kAtDs + at / kOwnRows * TileS::kPanelBytes + group * kOwnRows + at % kOwnRows;
    return kAtDq + dq_offset(group) + at - kOwnDs;
  }
  static constexpr int kSharedBytes = kTileBytes + sizeof(Barriers) + 1024;  // tiles start on the swizzle's 1024 bytes
  static_assert(kSharedBytes <= 227 * 1024);
};

struct Counters {
  int next_item, next_clear, next_round;
};

struct BackwardArguments {
  CUtensorMap q, dout, k, v, dk, dv;
  sm80::BackwardArguments p;
  Counters* counters;     // followed by
  int* cleared;           // [batch, num_heads_k] tiles of dQ that are
  int* added;             // [batch, num_heads_k] key blocks that have added to dQ
  int64_t num_counters;   // all of them
  int groups;             // of heads that share keys, over all slots
  int total_tiles;        // of queries
  Divisor tiles;          // of a head in a slot
  Divisor group_tiles;    // of a group
  int blocks;             // of keys in a slot
  int total;              // of all key heads and slots
  int accum_rows;         // of dQ's accumulator, a thread block's, if groups are owned
  Divisor section_items;  // a section is a few heads whose blocks are interleaved, so that the longest of all run first
  Divisor section_heads;
  Divisor num_heads_k;
};

// A block of keys, the same for whoever asks. Within a section the first keys come first: under a causal mask they take
// longest.
template <class B>
struct KeyBlock {
  int block, head_k;
  Sequence seq;
  Mask mask;

  __device__ KeyBlock(const BackwardArguments& a, int item)
      : block(0), head_k(0), seq(a.p.mask, locate(a, item)), mask(a.p.mask, seq) {}
  __device__ int key0() const { return block * B::kBlockK; }
  __device__ bool exists() const { return key0() < seq.stored_k; }

 private:
  // Sets block and head_k, returns the sequence.
  __device__ int locate(const BackwardArguments& a, int item) {
    uint32_t rest, in_section, head;
    const uint32_t section = a.section_items.divide(item, rest);
    const uint32_t in_slot = a.section_heads.divide(rest, in_section);
    const uint32_t slot = a.num_heads_k.divide(section * a.section_heads.divisor() + in_section, head);
    const SequenceTile at =
        find_tile<B::kBlockK>(a.p.mask.cu_seqlens_k, a.p.batch, static_cast<int>(slot), static_cast<int>(in_slot));
    block = at.tile;
    head_k = static_cast<int>(head);
    return at.sequence;
  }
};

template <class B>
__device__ TileQueue<typename B::Barriers> items_of(const BackwardArguments& a, typename B::Barriers* bars) {
  if constexpr (B::kOwns) return {&a.counters->next_item, a.total, bars, a.blocks};
  return {&a.counters->next_item, a.total, bars, bars->first_item, /*begin=*/0, /*run=*/1};
}

// One thread that fetches the block's work and lays out its steps. It alone knows masks: in 24 registers, the loader
// and the adder would be too slow for that.
template <class B>
class Planner {
 public:
  __device__ Planner(const BackwardArguments& a, typename B::Barriers* bars) : a_(a), bars_(bars) {}

  __device__ void run() {
    const BackwardParams& p = a_.p;
#pragma unroll 1
    for (auto queue = items_of<B>(a_, bars_); queue.valid(); queue.claim(), queue.announce(), queue.next(false)) {
      const KeyBlock<B> work(a_, queue.tile());
      if (!work.exists()) continue;
      QueryTiles<B> at(work.mask, work.block, work.head_k * p.heads_per_group, p.heads_per_group, a_.p.dq_turn);
      const bool ends_inside = keys_end_inside(p.mask);
      const unsigned own_k = ends_inside ? min(work.seq.seqlen_k - work.key0(), B::kBlockK) : B::kBlockK;
      unsigned flags = B::kFirst;
      const int group = work.seq.batch * p.num_heads_k + work.head_k;
      if (!at.valid()) {
        typename B::Plan& plan = place();
        plan.flags = B::kNothing;
        plan.group = group;
        send();
      }
      while (at.valid()) {
        typename B::Plan& plan = place();
        const int row0 = at.tile * B::kBlockQ, head = work.head_k * p.heads_per_group + at.head;
        plan.row0 = row0;
        plan.head = head;
        plan.bits = at.bits;
        plan.row = static_cast<int>(work.seq.offset_q) + row0;
        plan.batch = p.mask.cu_seqlens_q ? 0 : work.seq.batch;
        plan.key_row = static_cast<int>(work.seq.offset_k) + work.key0();
        plan.head_k = work.head_k;
        plan.turn = at.turn;
        plan.group = group;
        plan.group_tiles = p.heads_per_group * ((work.seq.seqlen_q + B::kBlockQ - 1) / B::kBlockQ);
        plan.scratch = head * p.scratch_rows + work.seq.scratch_row(p.mask) + row0;
        flags |= at.hidden;
        if constexpr (B::kOwns) {
          plan.accum = int64_t{blockIdx.x} * a_.accum_rows + at.head * a_.tiles.divisor() * B::kBlockQ + row0;
          flags |= (at.turn == 0 ? B::kOpens : 0) | (at.closes ? B::kCloses : 0);
        }
        at.next();
        const unsigned own_q = p.mask.cu_seqlens_q ? min(work.seq.seqlen_q - row0, B::kBlockQ) : B::kBlockQ;
        flags |= own_q << B::kOwnQ | own_k << B::kOwnK;
        plan.flags = at.valid() ? flags : flags | B::kLast;
        flags = 0;
        send();
      }
    }
    place().flags = B::kExit;
    send();
  }

 private:
  __device__ __forceinline__ typename B::Plan& place() {
    barrier_wait(smem_address(bars_->plan_empty + plans_.index), plans_.parity);
    return bars_->plan[plans_.index];
  }
  __device__ __forceinline__ void send() {
    barrier_arrive(smem_address(bars_->plan_full + plans_.index));
    plans_.next();
  }

  const BackwardArguments& a_;
  typename B::Barriers* bars_;
  Stage<B::kPlans> plans_{1};
};

// Reads plans one after the other, for one thread.
template <class B>
class PlanReader {
 public:
  __device__ explicit PlanReader(typename B::Barriers* bars) : bars_(bars) {}
  // Stays until `pass`.
  __device__ __forceinline__ const typename B::Plan& await() {
    barrier_wait(smem_address(bars_->plan_full + plans_.index), plans_.parity);
    return bars_->plan[plans_.index];
  }
  __device__ __forceinline__ void pass() {
    barrier_arrive(smem_address(bars_->plan_empty + plans_.index));
    plans_.next();
  }
  __device__ __forceinline__ typename B::Plan next() {
    const typename B::Plan plan = await();
    pass();
    return plan;
  }

 private:
  typename B::Barriers* bars_;
  Stage<B::kPlans> plans_{0};
};

// One thread that copies tiles to shared memory, and tells the consumers of every step.
template <class B>
class Loader {
 public:
  __device__ Loader(const BackwardArguments& a, typename B::Barriers* bars, uint32_t base)
      : a_(a), bars_(bars), base_(base), arrivals_(&bars->landed) {}

  __device__ void run() {
    PlanReader<B> plans(bars_);
#pragma unroll 1
    for (;;) {
      const typename B::Plan& plan = plans.await();
      if (plan.flags & B::kExit) return;
      barrier_wait(smem_address(bars_->q_empty + q_.index), q_.parity);
      bars_->step[q_.index] = plan;
      if (plan.flags & B::kNothing) {
        barrier_arrive(smem_address(bars_->q_full + q_.index));
      } else {
        load(plan);
        do_.next();
      }
      q_.next();
      plans.pass();
    }
  }

 private:
  __device__ __forceinline__ void load(const typename B::Plan& plan) {
    constexpr int kTerms = B::kBlockQ * 4;
    const bool first = plan.flags & B::kFirst;
    const int own_q = plan.flags >> B::kOwnQ & 255, own_k = plan.flags >> B::kOwnK;
    const Arrival q{base_ + B::kAtQ + q_.index * TileQ::kBytes, smem_address(bars_->q_full + q_.index), own_q, kTerms};
    const Arrival dout{base_ + B::kAtDo + do_.index * TileQ::kBytes, smem_address(bars_->do_full + do_.index), own_q,
                       kTerms};
    const Arrival k{base_ + B::kAtK, smem_address(&bars_->k_full), own_k};
    const Arrival v{base_ + B::kAtV, smem_address(&bars_->v_full), own_k};
    arrivals_.template send<TileQ>(q, &a_.q, plan.row, plan.head, plan.batch);
    bulk_load(smem_address(bars_->lse[q_.index]), a_.p.lse_log2 + plan.scratch, kTerms, q.full);
    if (first) {
      barrier_wait(smem_address(&bars_->k_empty), keys_parity_);
      arrivals_.template send<TileK>(k, &a_.k, plan.key_row, plan.head_k, plan.batch);
    }
    barrier_wait(smem_address(bars_->do_empty + do_.index), do_.parity);
    arrivals_.template send<TileQ>(dout, &a_.dout, plan.row, plan.head, plan.batch);
    bulk_load(smem_address(bars_->delta[do_.index]), a_.p.delta + plan.scratch, kTerms, dout.full);
    if (first) {
      barrier_wait(smem_address(&bars_->v_empty), keys_parity_);
      arrivals_.template send<TileK>(v, &a_.v, plan.key_row, plan.head_k, plan.batch);
      keys_parity_ ^= 1;
    }
    // All are under way before the first is waited for.
    if (!arrivals_.await()) return;
    arrivals_.template complete<TileQ>(q);
    arrivals_.template complete<TileQ>(dout);
    if (first) {
      arrivals_.template complete<TileK>(k);
      arrivals_.template complete<TileK>(v);
    }
  }

  using TileQ = typename B::TileQ;
  using TileK = typename B::TileK;

  const BackwardArguments& a_;
  typename B::Barriers* bars_;
  const uint32_t base_;
  Arrivals arrivals_;
  Stage<B::kStagesQ> q_{1};
  Stage<B::kStagesDo> do_{1};
  uint32_t keys_parity_ = 1;
};

}  // namespace hfp::sm90
