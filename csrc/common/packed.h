// Decode's rows and its division of labour.
//
// Rows: the query heads that share a key head read the same keys, so they are rows of one tile. Packed row r is query
// r / heads_per_group of head r % heads_per_group of the group.
//
// Labour: for every tile of packed rows, for every key head, come the key blocks that the tile meets. Of all these
// blocks in a row every thread block takes an equal share, wherever a tile begins or ends. Lengths that only the device
// knows thus cost neither balance nor a sync.
#pragma once

#include "common/divide.h"
#include "common/mask.h"

namespace hfp {

struct DecodeArguments {
  DecodeParams p;
  int tiles;                  // of a key head, in the whole batch
  Divisor tiles_of_sequence;  // of a key head
  Divisor heads_per_group;
  Divisor blocks;  // thread blocks

  DecodeArguments(const DecodeParams& params, int tile_rows) : p(params), heads_per_group(params.heads_per_group) {
    const int of_sequence = (p.mask.seqlen_q * p.heads_per_group + tile_rows - 1) / tile_rows;
    tiles = p.batch * of_sequence;
    tiles_of_sequence = Divisor(of_sequence);
    // Where there are fewer tiles than thread blocks, as many for each, if that leaves few without work: none then has
    // the end of one and the start of the next.
    const int64_t all = int64_t{tiles} * p.num_heads_k;
    if (p.blocks % all <= p.blocks / 8) p.blocks -= static_cast<int>(p.blocks % all);
    blocks = Divisor(p.blocks);
  }
};

// A tile of packed rows. Every key head of the sequence has it.
template <int kRows, int kBlockK>
struct PackedTile {
  int row0;
  Sequence seq;
  int rows;  // of the sequence
  Mask mask;
  TileSpan span;
  Range blocks;  // of keys, that the tile meets

  __device__ PackedTile(const DecodeArguments& a, int tile)
      : row0(0),
        seq(a.p.mask, locate(a, tile)),
        rows(seq.seqlen_q * a.p.heads_per_group),
        mask(a.p.mask, seq),
        span(),
        blocks{0, 0} {
    if (row0 >= rows) return;
    span = mask.tile_span(a.heads_per_group.divide(row0), a.heads_per_group.divide(min(row0 + kRows, rows) - 1) + 1);
    const BlockCursor cursor = mask.template key_blocks<kBlockK>(span);
    blocks = {cursor.first, cursor.block + 1};
  }
  __device__ int length() const { return blocks.end - blocks.begin; }
  __device__ int rows_here() const { return min(rows - row0, kRows); }

 private:
  // Sets row0, returns the sequence.
  __device__ int locate(const DecodeArguments& a, int tile) {
    uint32_t in_sequence;
    const uint32_t batch = a.tiles_of_sequence.divide(tile, in_sequence);
    row0 = in_sequence * kRows;
    return batch;
  }
};

// The element test of packed rows.
class PackedMask : public Mask {
 public:
  __device__ PackedMask(const Mask& mask, const Divisor& heads_per_group, int rows)
      : Mask(mask), heads_per_group_(&heads_per_group), rows_(rows) {}
  __device__ Range row_limits(int row) const { return Mask::row_limits(heads_per_group_->divide(min(row, rows_ - 1))); }

 private:
  const Divisor* heads_per_group_;
  int rows_;
};

// Thread block i takes key blocks [first(i), first(i + 1)) of `total`: one at least, as far as they go, and i <
// blocks().
class Shares {
 public:
  __device__ Shares(const DecodeArguments& a, uint32_t total) : divisor_(&a.blocks), total_(total) {
    whole_ = a.blocks.divide(total, rest_);
    if (whole_ == 0) whole_ = 1, rest_ = 0;
  }
  __device__ int total() const { return total_; }
  __device__ int blocks() const { return min(total_, divisor_->divisor()); }
  // i * total / blocks(), which puts the bounds of shares on those of equal tiles.
  __device__ int first(int i) const { return i * whole_ + divisor_->divide(i * rest_); }
  // The thread block that takes key block n.
  __device__ int owner(int n) const {
    int i = static_cast<int>(__fdividef(static_cast<float>(n) * blocks(), static_cast<float>(total_)));
    while (first(i) > n) --i;
    while (first(i + 1) <= n) ++i;
    return i;
  }

 private:
  const Divisor* divisor_;
  uint32_t total_, whole_, rest_;
};

// A key head of a tile: blocks [begin, begin + length) of the list of all.
struct PackedHead {
  int head_k;
  int begin, length;
};

// For the key heads of tiles that thread block `me` has a share of, from the first on: visit(tile, head, at, last,
// shares), where `at` is where the share begins or the head does, and `last` where the share ends; returns where to go
// on. All threads of the block call it.
template <int kThreads, class Tile, class Visit>
__device__ __forceinline__ void walk_share(const DecodeArguments& a, int me, Visit visit) {
  __shared__ int sums[kThreads / 32];
  __shared__ int found[2];
  int i = 0, before = 0, total = 0;  // a tile, the blocks of those below it, of all
  if (a.tiles > 1) {
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int each = (a.tiles + kThreads - 1) / kThreads;
    const int first = min(thread * each, a.tiles), last = min(first + each, a.tiles);
    int own = 0;
#pragma unroll 1
    for (int j = first; j < last; ++j) own += Tile(a, j).length() * a.p.num_heads_k;
    before = own;  // of this thread and those below it in the warp
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, before, step);
      if (lane >= step) before += other;
    }
    if (lane == 31) sums[warp] = before;
    __syncthreads();
    before -= own;
#pragma unroll
    for (int w = 0; w < kThreads / 32; ++w) {
      if (w < warp) before += sums[w];
      total += sums[w];
    }
    const int start = Shares(a, total).first(me);
    if (before <= start && start < before + own) {
      found[0] = first;
      found[1] = before;
    }
    __syncthreads();
    if (start >= total) return;
    i = found[0];
    before = found[1];
  }
  int at = -1;
#pragma unroll 1
  while (true) {
    const Tile tile(a, i);
    const int length = tile.length(), after = before + length * a.p.num_heads_k;
    const Shares shares(a, max(total, after));  // of the only tile nobody has counted
    const int last = shares.first(me + 1);
    if (at < 0) at = shares.first(me);
    if (at >= shares.total()) return;
#pragma unroll 1
    while (at < min(last, after)) {
      const int head_k = static_cast<unsigned>(at - before) / static_cast<unsigned>(length);
      at = visit(tile, PackedHead{head_k, before + head_k * length, length}, at, last, shares);
    }
    if (at >= last) return;
    before = after;
    ++i;
  }
}

}  // namespace hfp
