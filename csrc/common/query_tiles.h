// The way of a backward block through the queries.
#pragma once

#include "common/mask.h"

namespace hfp {

// The query tiles that meet a block of keys, head by head of its group.
template <class B>
class QueryTiles {
 public:
  __device__ QueryTiles(const Mask& mask, int block, int heads) : mask_(mask), block_(block), heads_(heads) {
    const Range rows = mask.rows_meeting(block * B::kBlockK, (block + 1) * B::kBlockK);
    first_ = rows.begin / B::kBlockQ;
    end_ = rows.empty() ? first_ : (rows.end + B::kBlockQ - 1) / B::kBlockQ;
    tile = first_;
    if (first_ >= end_) head = heads_;
    settle();
  }
  __device__ bool valid() const { return head < heads_; }
  __device__ void next() {
    ++tile;
    settle();
  }

  int tile = 0;
  int head = 0;     // in its group
  int turn;         // how many key blocks before this one meet the tile
  int turns;        // how many meet it in all
  unsigned hidden;  // why some pair of the two may be, see Mask::hidden

 private:
  // Goes on to the next tile that meets the block. What the kernel wants to know of it is kept instead of its span,
  // which would hold registers for a whole step.
  __device__ void settle() {
    for (;;) {
      if (tile >= end_) {
        tile = first_;
        ++head;
      }
      if (head >= heads_) return;
      const TileSpan span = mask_.tile_span(tile * B::kBlockQ, (tile + 1) * B::kBlockQ);
      const BlockCursor cursor = mask_.template key_blocks<B::kBlockK>(span);
      turn = block_ - cursor.first;
      turns = cursor.block - cursor.first + 1;
      hidden = mask_.template hidden<B::kBlockK>(span, block_);
      if (turn >= 0 && block_ <= cursor.block) return;
      ++tile;
    }
  }

  const Mask& mask_;
  int block_, heads_, first_, end_;
};

}  // namespace hfp
