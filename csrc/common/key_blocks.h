// The way of a forward tile through the keys.
#pragma once

#include "common/mask.h"

namespace hfp {

// The blocks of keys that a tile of rows meets, from the last to the first, so that the partial blocks of a causal mask
// come first. kLists: also asks block lists, where there are any.
template <int kBlockK, bool kLists>
class KeyBlocks {
 public:
  int block = -1;
  int bits = kFullTile;  // which tile of bits the block has, see BlockLists

  KeyBlocks() = default;
  // Rows [row0, ...) of query head `head`, of no more than one block of the lists.
  __device__ KeyBlocks(const Mask& mask, const TileSpan& span, int row0, int head) {
    const BlockCursor cursor = mask.template key_blocks<kBlockK>(span);
    block = cursor.block;
    first_ = cursor.first;
    if constexpr (kLists) {
      lists_ = mask.lists().row_offsets != nullptr;
      if (!lists_ || !cursor.valid()) return;
      const BlockLists& lists = mask.lists();
      const EntryRange range = entries_of(lists.row_offsets, mask.list_of(head), lists.rows, row0 / kListBlock);
      entries_ = lists.row_entries;
      begin_ = range.begin;
      last_ = cursor.block;
      // Lists seldom go past what the mask allows; a search is four to six loads, each of which waits for the one
      // before.
      const int allowed = cursor.block / kPerEntry;
      const bool goes_past = !range.empty() && entries_[range.end - 1].block > allowed;
      at_ = goes_past ? lower_bound(entries_, range, allowed + 1) : range.end;
      fetch();
    }
  }

  __device__ bool valid() const { return block >= first_; }
  __device__ void next() {
    if constexpr (kLists) {
      if (lists_ && block <= stop_) return fetch();
    }
    --block;
  }
  // The same in every lane, and known to be.
  template <class Uniform>
  __device__ void make_uniform(Uniform uniform) {
    block = uniform(block);
    first_ = uniform(first_);
    if constexpr (kLists) {
      bits = uniform(bits);
      stop_ = uniform(stop_);
    }
  }

 private:
  static constexpr int kPerEntry = kListBlock / kBlockK;
  static_assert(!kLists || kListBlock % kBlockK == 0);

  // Goes on to the entry before, of which only blocks between first_ and last_ count.
  __device__ void fetch() {
    block = first_ - 1;
    if (at_ <= begin_) return;
    const BlockEntry entry = entries_[--at_];
    bits = entry.bits;
    stop_ = max(first_, entry.block * kPerEntry);
    block = min(last_, (entry.block + 1) * kPerEntry - 1);  // below first_: past the end, as are all entries before
  }

  int first_ = 0;
  // Of lists only: entries [begin_, at_) are still to come, of the present one the blocks down to stop_.
  bool lists_ = false;
  const BlockEntry* entries_ = nullptr;
  int at_ = 0, begin_ = 0, stop_ = 0, last_ = 0;
};

}  // namespace hfp
