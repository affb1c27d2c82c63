// Which tile of the forward's work comes when, and rings of stages.
#pragma once

#include <algorithm>

#include "common/divide.h"
#include "common/logits.h"
#include "launch.h"
#include "sm90/ptx.h"

namespace hfp::sm90 {

using bf16 = __nv_bfloat16;
using fp16 = __half;

inline int multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "multiprocessors");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "multiprocessors");
  return count;
}

// How many of `all` heads, a divisor of it, to work on at once: so many that what they share stays in the L2 cache, 32
// MB of whose 50 are what the other traffic leaves, but no fewer than have a tile for nine multiprocessors of ten, and
// at most `waves` times as many. With fewer the longest tiles of the last heads begin when there is little else left:
// backward, causal, 16 query heads on 4, 8k keys, a schedule of 1.24 times the ideal becomes one of 1.01.
inline int section_size(int all, int64_t bytes_each, int64_t tiles_each, int64_t waves) {
  const int64_t fits = (32 << 20) / std::max<int64_t>(bytes_each, 1);
  const int64_t busy = (multiprocessors() * 9 / 10 + tiles_each - 1) / std::max<int64_t>(tiles_each, 1);
  int64_t size = std::clamp<int64_t>(std::min(fits, waves * busy), 1, std::max(all, 1));
  while (all % size != 0) --size;
  if (size < busy) {
    size = std::clamp<int64_t>(busy, 1, std::max(all, 1));
    while (all % size != 0) ++size;
  }
  return static_cast<int>(size);
}

struct ForwardArguments {
  CUtensorMap q, k, v, out;
  AttentionParams p;
  int tiles;              // of a head in a slot
  int total;              // of all heads and sequences
  Divisor section_tiles;  // a section is a few heads whose tiles are interleaved, so that the longest of all run first
  Divisor section_heads;
  Divisor num_heads;
  Divisor heads_per_group;
};

// A place in a ring of stages, and the parity that its barrier shows when it is one's turn.
template <int kStages>
struct Stage {
  int index = 0;
  uint32_t parity;
  __device__ explicit Stage(uint32_t first_parity) : parity(first_parity) {}
  __device__ void next() {
    if (++index == kStages) {
      index = 0;
      parity ^= 1;
    }
  }
};

// One tile of work, the same for whoever asks. Within a section, which shares keys in the L2 cache, the last rows come
// first: under a causal mask they take longest.
template <class F>
struct Work {
  int row0, head;
  Sequence seq;
  Mask mask;
  TileSpan span;

  __device__ Work(const ForwardArguments& a, int tile)
      : row0(0), head(0), seq(a.p.mask, locate(a, tile)), mask(a.p.mask, seq), span() {
    if (exists()) span = mask.tile_span(row0, row0 + F::kBlockQ);
  }
  __device__ bool exists() const { return row0 < seq.seqlen_q; }

 private:
  // Sets row0 and head, returns the sequence.
  __device__ int locate(const ForwardArguments& a, int tile) {
    uint32_t rest, in_section, head_index;
    const uint32_t section = a.section_tiles.divide(tile, rest);
    const uint32_t from_end = a.section_heads.divide(rest, in_section);
    const uint32_t slot = a.num_heads.divide(section * a.section_heads.divisor() + in_section, head_index);
    const SequenceTile at = find_tile<F::kBlockQ>(a.p.mask.cu_seqlens_q, a.p.batch, static_cast<int>(slot),
                                                  a.tiles - 1 - static_cast<int>(from_end));
    row0 = at.tile * F::kBlockQ;
    head = static_cast<int>(head_index);
    return at.sequence;
  }
};

// Hands out tiles, a run of them at a time: by turns, or, where their costs differ, to whoever is free. Then the thread
// that feeds the others claims them from a counter in global memory and tells the others through shared memory.
template <class Barriers>
class TileQueue {
 public:
  // The first run of each thread block is its own, and the counter starts behind those.
  __device__ TileQueue(int* counter, int total, Barriers* bars, int run = 1)
      : TileQueue(counter, total, bars, run * static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x), run) {}
  // Tile `first` comes first, whoever said so; runs below `begin` are not the counter's.
  __device__ TileQueue(int* counter, int total, Barriers* bars, int first, int begin, int run)
      : counter_(counter), total_(total), begin_(begin), run_(run), bars_(bars), tile_(first) {}

  __device__ bool valid() const { return tile_ < total_; }
  __device__ int tile() const { return tile_; }

  // For whole warps, or for one thread that stands for its warp.
  __device__ void next(bool whole_warp) {
    if (!counter_) {
      tile_ += gridDim.x;
      return;
    }
    barrier_wait(smem_address(&bars_->tile_full), parity_);
    tile_ = *static_cast<volatile int*>(&bars_->tile);
    if (whole_warp) tile_ = uniform(tile_);
    if (!whole_warp || threadIdx.x % 32 == 0) barrier_arrive(smem_address(&bars_->tile_empty));
    parity_ ^= 1;
  }

  // What the feeding thread does, once a tile and before `next`: it claims the next one, late, because who claims ahead
  // keeps a long tile waiting while others run out of work (two ahead, causal, 256 columns, 8k keys: a schedule of 1.16
  // times the ideal instead of 1.00), but a little before it is wanted, because the counter is a microsecond away;
  __device__ void claim() {
    if (!counter_) return;
    if (run_ == 1 || ++claimed_ == run_end_) {
      claimed_ = run_ * (begin_ + atomicAdd(counter_, 1));
      run_end_ = claimed_ + run_;
    }
  }
  // and announces it as soon as the one before is everyone's.
  __device__ void announce() {
    if (!counter_) return;
    barrier_wait(smem_address(&bars_->tile_empty), announce_parity_);
    *static_cast<volatile int*>(&bars_->tile) = claimed_;
    barrier_arrive(smem_address(&bars_->tile_full));
    announce_parity_ ^= 1;
  }

 private:
  int* counter_;
  int total_, begin_, run_;
  Barriers* bars_;
  int tile_;
  int claimed_ = tile_, run_end_ = tile_ + run_;
  uint32_t parity_ = 0, announce_parity_ = 1;
};

}  // namespace hfp::sm90
