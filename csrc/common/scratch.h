// Scratch memory of a call: one allocation, carved by the architecture that uses it.
#pragma once

#include <cstdint>

#include "params.h"

namespace hfp {

// Hands out arrays, each on 256 bytes. Without an allocation its pointers mean nothing, but it measures all the same.
class Carver {
 public:
  explicit Carver(void* base) : base_(reinterpret_cast<uintptr_t>(base)) {}
  template <typename T>
  T* take(int64_t count) {
    T* array = reinterpret_cast<T*>(base_ + bytes_);
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return array;
  }
  int64_t bytes() const { return bytes_; }

 private:
  uintptr_t base_;
  int64_t bytes_ = 0;
};

// What every architecture's backward keeps per row: see BackwardParams.
inline void carve_row_terms(BackwardParams& p, Carver& carver) {
  const int64_t rows = p.mask.cu_seqlens_q ? p.rows_q + int64_t{p.batch} * kScratchTile
                                           : int64_t{p.batch} * round_up(p.mask.seqlen_q, kScratchTile);
  p.scratch_rows = round_up(rows, kScratchTile);
  p.lse_log2 = carver.take<float>(p.scratch_rows * p.num_heads);
  p.delta = carver.take<float>(p.scratch_rows * p.num_heads);
}

}  // namespace hfp
