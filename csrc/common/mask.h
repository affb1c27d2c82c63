// The one mask abstraction. A kernel asks three things and knows nothing else about masks:
//   which key blocks a query tile meets (and which query tiles a key block meets, in backward),
//   whether a block needs an element test,
//   and the element rule: row i sees the keys of [row_limits(i)) whose bit is set.
// Causal, windows, padding, caches and packed documents are all such a range of keys, whose ends do not decrease with
// the row; that is what makes the block question a matter of four numbers.
#pragma once

#include "common/seqlen.h"
#include "params.h"

namespace hfp {

struct Range {
  int begin;
  int end;
  __device__ bool empty() const { return begin >= end; }
};

// Keys met by a tile of rows: some row sees a key only inside `any`; every row sees every key inside `all`.
struct TileSpan {
  Range any;
  Range all;
};

// Which element tests a block needs.
enum Hidden : unsigned { kBeforeRange = 1, kPastRange = 2, kByBits = 4 };

// Blocks of keys that a tile may meet, lists aside: `first` to `block`.
struct BlockCursor {
  int block;
  int first;
  __device__ bool valid() const { return block >= first; }
};

// Entries [begin, end) of a list of blocks.
struct EntryRange {
  int begin;
  int end;
  __device__ bool empty() const { return begin >= end; }
};
// Entries of row r, or column r, of a list.
__device__ __forceinline__ EntryRange entries_of(const int* offsets, int list, int count, int r) {
  if (r >= count) return {0, 0};
  const int* at = offsets + int64_t{list} * (count + 1) + r;
  return {at[0], at[1]};
}
// The first entry of `range` whose block is not below `block`, range.end if none.
__device__ __forceinline__ int lower_bound(const BlockEntry* entries, EntryRange range, int block) {
  while (range.begin < range.end) {
    const int middle = range.begin + (range.end - range.begin) / 2;
    if (entries[middle].block < block) {
      range.begin = middle + 1;
    } else {
      range.end = middle;
    }
  }
  return range.begin;
}

class Mask {
 public:
  __device__ Mask(const MaskParams& p, const Sequence& seq)
      : p_(&p), sequence_(seq.batch), rows_(seq.seqlen_q), shift_(seq.seqlen_k - seq.seqlen_q), keys_{0, seq.seqlen_k} {
    if (p.key_range) {
      keys_.begin = max(p.key_range[2 * seq.batch], 0);
      keys_.end = min(p.key_range[2 * seq.batch + 1], seq.seqlen_k);
    }
    docs_ = p.doc_range ? p.doc_range + 2 * static_cast<int64_t>(seq.batch) * p.seqlen_q : nullptr;
    has_bits_ = p.key_bits != nullptr;
  }

  __device__ const BlockLists& lists() const { return p_->lists; }
  // Which list a query head reads.
  __device__ int list_of(int head) const {
    return sequence_ * p_->lists.lists_per_sequence + head / p_->lists.heads_per_list;
  }

  // Forgets the bits if all of these keys are real: where padding has no holes, a few loads a tile instead of a few a
  // block. For whole warps.
  __device__ __forceinline__ void look_for_holes(const Range& keys) {
    if (!has_bits_) return;
    uint32_t every = 0xffffffffu;
    for (int i = max(keys.begin, 0) / 32 + threadIdx.x % 32; 32 * i < min(keys.end, keys_.end); i += 32) {
      every &= bits()[i];
    }
    has_bits_ = !__all_sync(0xffffffffu, every == 0xffffffffu);
  }

  // How far the diagonal lies to the right of the main diagonal: row i is at key position i + shift().
  __device__ int shift() const { return shift_; }

  // Keys that row i may see, bits aside.
  __device__ Range row_limits(int i) const {
    Range r = keys_;
    if (p_->window_left >= 0) r.begin = max(r.begin, i + shift_ - p_->window_left);
    if (p_->window_right >= 0) r.end = min(r.end, i + shift_ + p_->window_right + 1);
    if (docs_) {
      const int row = min(i, rows_ - 1);
      r.begin = max(r.begin, docs_[2 * row]);
      r.end = min(r.end, docs_[2 * row + 1]);
    }
    return r;
  }

  // Rows [begin, end) of the sequence, end > begin.
  __device__ TileSpan tile_span(int begin, int end) const {
    const Range first = row_limits(begin);
    const Range last = row_limits(min(end, rows_) - 1);
    return {{first.begin, last.end}, {last.begin, first.end}};
  }

  template <int kBlockK>
  __device__ BlockCursor key_blocks(const TileSpan& span) const {
    const int begin = max(span.any.begin, 0);
    const int end = min(span.any.end, rows_ + shift_);
    if (begin >= end) return {-1, 0};
    return {(end - 1) / kBlockK, begin / kBlockK};
  }

  // Why some pair of a block may be hidden although its tile meets it, as a set of Hidden. Uniform over the tile; 0
  // means that every row of the tile sees every key of the block.
  template <int kBlockK>
  __device__ unsigned hidden(const TileSpan& span, int block) const {
    const int begin = block * kBlockK;
    unsigned why = 0;
    if (begin < span.all.begin) why |= kBeforeRange;
    if (begin + kBlockK > span.all.end) why |= kPastRange;
    if (has_bits_) {
      uint32_t every = 0xffffffffu;
      constexpr int kWords = kBlockK % 32 == 0 ? kBlockK / 32 : (kBlockK + 46) / 32;  // that the block can touch
#pragma unroll
      for (int i = 0; i < kWords; ++i) every &= key_word((begin & ~31) + 32 * i);
      if (every != 0xffffffffu) why |= kByBits;
    }
    return why;
  }

  // The query tiles that meet keys [begin, end), as a range of rows. Documents only narrow the range where they are
  // square, so the key's own document is also the range of rows that see it.
  __device__ Range rows_meeting(int begin, int end) const {
    Range keys{max(begin, keys_.begin), min(end, keys_.end)};
    if (keys.empty()) return {0, 0};
    Range rows{0, rows_};
    if (p_->window_right >= 0) rows.begin = max(rows.begin, keys.begin - shift_ - p_->window_right);
    if (p_->window_left >= 0) rows.end = min(rows.end, keys.end - 1 - shift_ + p_->window_left + 1);
    if (docs_) {
      rows.begin = max(rows.begin, docs_[2 * keys.begin]);
      rows.end = min(rows.end, docs_[2 * (keys.end - 1) + 1]);
    }
    return rows;
  }

  // Rows that see key j, bits included: row_limits from the other side, for accumulators that hold keys as rows. Where
  // nobody does, every row is both before the range and past it.
  __device__ Range rows_seeing(int j) const {
    constexpr int kFar = 1 << 30;
    if (j < keys_.begin || j >= keys_.end || (has_bits_ && !(key_word(j & ~31) >> (j & 31) & 1u))) return {kFar, -kFar};
    Range rows{0, rows_};
    if (p_->window_right >= 0) rows.begin = max(rows.begin, j - shift_ - p_->window_right);
    if (p_->window_left >= 0) rows.end = min(rows.end, j - shift_ + p_->window_left + 1);
    if (docs_) {
      rows.begin = max(rows.begin, docs_[2 * j]);
      rows.end = min(rows.end, docs_[2 * j + 1]);
    }
    return rows;
  }

  // Bits of keys [begin, begin + 32), begin a multiple of 32, where there are bits.
  __device__ uint32_t key_word(int begin) const { return begin < p_->seqlen_k ? bits()[begin / 32] : 0u; }

 private:
  __device__ const uint32_t* bits() const { return p_->key_bits + sequence_ * p_->key_bits_stride; }

  const MaskParams* p_;
  int sequence_;
  int rows_;
  int shift_;
  Range keys_;
  const int* docs_;
  bool has_bits_;
};

}  // namespace hfp
