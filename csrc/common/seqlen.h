// Where one sequence of the batch lies, whether lengths vary or not.
#pragma once

#include "params.h"

namespace hfp {

// Where the tiles of sequence b begin in the slot of all of them, see AttentionParams::slots.
template <int kHeight>
__device__ __forceinline__ int first_tile(const int* cu_seqlens, int b) {
  return cu_seqlens[b] / kHeight + b;
}

struct SequenceTile {
  int sequence;
  int tile;  // may be past the sequence's last
};
// Whose a slot's tile is. Variable lengths take a search, a few loads from the L1 cache.
template <int kHeight>
__device__ __forceinline__ SequenceTile find_tile(const int* cu_seqlens, int batch, int slot, int tile) {
  if (!cu_seqlens) return {slot, tile};
  int sequence = 0;
#pragma unroll 1
  for (int end = batch; end - sequence > 1;) {
    const int middle = (sequence + end) / 2;
    if (first_tile<kHeight>(cu_seqlens, middle) <= tile) {
      sequence = middle;
    } else {
      end = middle;
    }
  }
  return {sequence, tile - first_tile<kHeight>(cu_seqlens, sequence)};
}

struct Sequence {
  int batch;
  int64_t offset_q;  // first row in a variable-length tensor, else 0
  int64_t offset_k;
  int seqlen_q;
  int seqlen_k;  // keys in use
  int stored_k;  // keys in memory

  __device__ Sequence(const MaskParams& p, int b)
      : batch(b), offset_q(0), offset_k(0), seqlen_q(p.seqlen_q), seqlen_k(p.seqlen_k), stored_k(p.seqlen_k) {
    if (p.cu_seqlens_q) {
      offset_q = p.cu_seqlens_q[b];
      offset_k = p.cu_seqlens_k[b];
      seqlen_q = p.cu_seqlens_q[b + 1] - static_cast<int>(offset_q);
      seqlen_k = stored_k = p.cu_seqlens_k[b + 1] - static_cast<int>(offset_k);
    }
    if (p.seqused_k) seqlen_k = min(max(p.seqused_k[b], 0), p.seqlen_k);
  }

  // First scratch row of this sequence, a multiple of kScratchTile.
  __device__ int64_t scratch_row(const MaskParams& p) const {
    if (p.cu_seqlens_q) return int64_t{first_tile<kScratchTile>(p.cu_seqlens_q, batch)} * kScratchTile;
    return static_cast<int64_t>(batch) * ((p.seqlen_q + kScratchTile - 1) / kScratchTile) * kScratchTile;
  }
};

// Whether a sequence's keys may end where the tensor goes on.
__device__ inline bool keys_end_inside(const MaskParams& p) { return p.cu_seqlens_k || p.seqused_k; }

template <typename T>
__device__ T* row_pointer(const TensorView& t, int64_t batch, int64_t row, int64_t head) {
  return static_cast<T*>(t.data) + batch * t.batch_stride + row * t.row_stride + head * t.head_stride;
}

}  // namespace hfp
