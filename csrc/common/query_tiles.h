// The way of a backward block through the queries.
#pragma once

#include "common/logits.h"

namespace hfp {

// The query tiles that meet a block of keys, head by head of its group.
template <class B>
class QueryTiles {
 public:
  // Heads [head0, head0 + heads). `ordered`: turn is asked for.
  __device__ QueryTiles(const Mask& mask, int block, int head0, int heads, bool ordered)
      : mask_(mask), block_(block), head0_(head0), heads_(heads), ordered_(ordered) {
    const Range rows = mask.rows_meeting(block * B::kBlockK, (block + 1) * B::kBlockK);
    first_ = rows.begin / B::kBlockQ;
    // Also where the range is empty: with documents its ends may lie within one tile, whose first and last rows are on
    // either side of the gap, so that the forward's KeyBlocks count the block as met.
    end_ = (rows.end + B::kBlockQ - 1) / B::kBlockQ;
    if (first_ >= end_) head = heads_;
    if (valid()) begin_head();
    settle();
  }
  __device__ bool valid() const { return head < heads_; }
  __device__ void next() {
    ++tile;
    settle();
  }

  int tile = 0;
  int head = 0;          // in its group
  int turn;              // how many key blocks before this one meet the tile
  bool closes;           // whether none after it does, lists aside
  int bits = kFullTile;  // which tile of bits the block has, see BlockLists
  unsigned hidden;       // why some pair of the two may be, see Mask::hidden

 private:
  static constexpr bool kLists = reads_lists(B::kVariant);
  static constexpr int kTilesPerEntry = kListBlock / B::kBlockQ, kBlocksPerEntry = kListBlock / B::kBlockK;
  static_assert(kListBlock % B::kBlockQ == 0 && kListBlock % B::kBlockK == 0);

  __device__ bool by_list() const { return kLists && mask_.lists().column_offsets; }
  __device__ void begin_head() {
    tile = first_;
    stop_ = end_;
    if (by_list()) {
      const BlockLists& lists = mask_.lists();
      entries_ =
          entries_of(lists.column_offsets, mask_.list_of(head0_ + head), lists.columns, block_ / kBlocksPerEntry);
      stop_ = first_;
    }
  }
  // Goes on to the next tile that meets the block. What the kernel wants to know of it is kept instead of its span,
  // which would hold registers for a whole step.
  __device__ void settle() {
    while (valid()) {
      if (tile >= stop_) {
        if (by_list() && !entries_.empty()) {
          const BlockEntry entry = mask_.lists().column_entries[entries_.begin++];
          bits = entry.bits;
          tile = max(first_, entry.block * kTilesPerEntry);
          stop_ = min(end_, (entry.block + 1) * kTilesPerEntry);
        } else if (++head < heads_) {
          begin_head();
        }
        continue;
      }
      const TileSpan span = mask_.tile_span(tile * B::kBlockQ, (tile + 1) * B::kBlockQ);
      const BlockCursor cursor = mask_.template key_blocks<B::kBlockK>(span);
      if (cursor.first <= block_ && block_ <= cursor.block) {
        closes = block_ == cursor.block;
        turn = !by_list() ? block_ - cursor.first : ordered_ ? list_turn(cursor.first) : 0;
        hidden = mask_.template hidden<B::kBlockK>(span, block_);
        return;
      }
      ++tile;
    }
  }
  // Blocks from `first` on before this one that are in the tile's list.
  __device__ int list_turn(int first) const {
    const BlockLists& lists = mask_.lists();
    const EntryRange row =
        entries_of(lists.row_offsets, mask_.list_of(head0_ + head), lists.rows, tile * B::kBlockQ / kListBlock);
    const int own = block_ / kBlocksPerEntry;
    const int from = lower_bound(lists.row_entries, row, first / kBlocksPerEntry);
    const int to = lower_bound(lists.row_entries, row, own);
    int before = (to - from) * kBlocksPerEntry + block_ % kBlocksPerEntry;
    if (lists.row_entries[from].block == first / kBlocksPerEntry) before -= first % kBlocksPerEntry;
    return before;
  }

  const Mask& mask_;
  int block_, head0_, heads_, first_, end_;
  bool ordered_;
  int stop_ = 0;              // of the present entry's tiles
  EntryRange entries_{0, 0};  // still to come
};

}  // namespace hfp
