// What a kernel is told: plain pointers, strides and numbers. No torch, no CUDA runtime.
//
// Conventions, everywhere: layout (batch, seqlen, num_heads, head_dim) with head_dim contiguous; variable length
// (total, num_heads, head_dim); lse fp32, natural logarithm; causal and windows aligned bottom-right; a row that sees
// nothing has out = 0, lse = -inf and no gradient.
#pragma once

#include <cstdint>

namespace hfp {

// A (batch, seqlen, num_heads, head_dim) tensor. Strides count elements; a variable-length tensor has batch stride 0.
struct TensorView {
  void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t row_stride = 0;
  int64_t head_stride = 0;
  bool aligned = false;  // every row starts on 16 bytes, so that rows may be copied in 16-byte pieces
};

// A mask as lists of blocks of kListBlock queries and as many keys, by row of blocks and, for backward, by column;
// rising within a list. A block that is in no list hides all its pairs, one that has no tile of bits shows them all.
constexpr int kListBlock = 128;
constexpr int kFullTile = -1;
struct BlockEntry {
  int block;  // of keys, or of queries in a column
  int bits;   // number of its tile, or kFullTile
};
struct BlockLists {
  const int* row_offsets = nullptr;  // [lists, rows + 1] list l of row r is row_entries [r] to [r + 1]; null: no lists
  const BlockEntry* row_entries = nullptr;
  const int* column_offsets = nullptr;  // [lists, columns + 1]
  const BlockEntry* column_entries = nullptr;
  const uint32_t* tiles = nullptr;    // [tiles, kListBlock, kListBlock / 32] bit j % 32 of word [i, j / 32]: i sees j
  const uint32_t* tiles_t = nullptr;  // the same transposed
  int rows = 0;
  int columns = 0;
  int heads_per_list = 1;      // query heads that share a list
  int lists_per_sequence = 0;  // 0: all sequences share theirs
};

// Which (query, key) pairs see each other. Everything that depends on data lives on the device: nothing here costs a
// sync.
struct MaskParams {
  const int* cu_seqlens_q = nullptr;   // [batch + 1]; set for variable length
  const int* cu_seqlens_k = nullptr;   // [batch + 1]
  const int* seqused_k = nullptr;      // [batch] keys in use; replaces seqlen_k, also in the alignment
  const int* key_range = nullptr;      // [batch, 2] first visible key and one past the last; leaves the alignment alone
  const uint32_t* key_bits = nullptr;  // [batch, key_bits_stride] bit j % 32 of word j / 32: key j is real
  int64_t key_bits_stride = 0;         // words
  const int* doc_range = nullptr;      // [batch, seqlen, 2] first key and one past the last of the row's own document
  int seqlen_q = 0;                    // the longest sequence, if lengths vary
  int seqlen_k = 0;
  int window_left = -1;   // keys to the left of the diagonal; negative: no limit
  int window_right = -1;  // causal is window_right = 0
  BlockLists lists;

  // Whether tiles may see different numbers of keys.
  bool uneven() const {
    return window_left >= 0 || window_right >= 0 || cu_seqlens_q || seqused_k || key_range || doc_range ||
           lists.row_offsets;
  }
};

struct DropoutParams {
  const int64_t* rng_state = nullptr;  // [2] seed, offset, on the device
  uint32_t keep = 256;                 // a byte below this keeps its probability
  float rescale = 1.f;                 // 256 / keep, 0 if nothing is kept
};

struct AttentionParams {
  TensorView q, k, v, out;
  float* lse =
      nullptr;  // row i of head h of sequence b: b * lse_batch_stride + h * lse_head_stride + i (+ cu_seqlens_q[b])
  int64_t lse_batch_stride = 0;
  int64_t lse_head_stride = 0;
  int* tile_counter = nullptr;  // [1] scratch of a forward that hands out uneven tiles as blocks become free

  int64_t rows_q = 0;  // rows of q and of k in memory: seqlen, or the total
  int64_t rows_k = 0;
  int batch = 0;
  int num_heads = 0;
  int num_heads_k = 0;
  int heads_per_group = 1;  // num_heads / num_heads_k
  int head_dim = 0;

  MaskParams mask;
  DropoutParams dropout;

  float softmax_scale = 1.f;            // applied to dK and dQ
  float logit_scale = 1.f;              // applied to q.k before softcap and ALiBi; 1 where neither is used
  float exp2_scale = 1.f;               // turns what is then left into a base-2 exponent
  float softcap = 0.f;                  // 0: none
  const float* alibi_slopes = nullptr;  // [num_heads], or [batch, num_heads] with alibi_batch_stride = num_heads
  int alibi_batch_stride = 0;

  // Work is laid out as tiles of `height` rows or keys, the same number for each of so many slots: a sequence each, or
  // one for all sequences of variable length, where each has room for a tile more than its rows fill at most, so that
  // the host knows the number without their lengths. As many as the longest needs for each would be mostly empty:
  // documents of 400 tokens, one of 4096, 32 tiles instead of 4. find_tile says whose a tile is.
  constexpr int slots() const { return mask.cu_seqlens_q ? 1 : batch; }
  constexpr int64_t query_tiles(int height) const {
    return mask.cu_seqlens_q ? rows_q / height + batch : (mask.seqlen_q + height - 1) / height;
  }
  constexpr int64_t key_tiles(int height) const {
    return mask.cu_seqlens_q ? rows_k / height + batch : (mask.seqlen_k + height - 1) / height;
  }

  // Whether logits are more than q.k times a positive number, so that they cannot be left to the exponent.
  bool is_general() const { return softcap > 0.f || alibi_slopes || !(softmax_scale > 0.f); }
};

// Backward keeps scratch per row. Each sequence starts on a multiple of this many rows, which every tile height
// divides, so that no tile holds rows of two sequences.
constexpr int kScratchTile = 128;

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

struct BackwardParams : AttentionParams {
  TensorView dout, dq, dk, dv;
  const float* dlse = nullptr;  // laid out as lse; may be null
  bool deterministic = false;
  void* scratch = nullptr;  // as large as the instance asks for, on 256 bytes; it carves what follows from it
  float* lse_log2 =
      nullptr;               // [num_heads, scratch_rows] lse in base 2; +inf where a row sees nothing or does not exist
  float* delta = nullptr;    // [num_heads, scratch_rows] rowsum(dout * out) - dlse
  int64_t scratch_rows = 0;  // rows per head over the whole batch
};

// Rows of a tile of decode at most, and where they are few: the shape of its thread blocks depends on it.
constexpr int kDecodeRows = 64;
constexpr int kDecodeFewRows = 16;
constexpr int kDecodeBytes = 82 * 1024;  // shared memory that every shape can do with

struct DecodeParams : AttentionParams {
  int blocks = 0;             // thread blocks, no more than run at once
  int shared_bytes = 0;       // that each of them may have
  bool starts_early = false;  // whether the second kernel may start before the first has ended
  void* scratch = nullptr;    // as large as the instance asks for, on 256 bytes; it carves what follows from it
  // Of the first and the last tile of each thread block, which may be incomplete: [2 * blocks, packed rows of a tile,
  // ...]
  float* partial_out = nullptr;   // [..., padded head_dim] sums of 2^(logit - top) v
  float* partial_sums = nullptr;  // [..., 2] top, sum of 2^(logit - top), in base 2

  // Rows of the query heads that share a key head.
  int64_t packed_rows() const { return int64_t{mask.seqlen_q} * heads_per_group; }
  bool few_rows() const { return packed_rows() <= kDecodeFewRows; }
  int64_t tiles() const { return int64_t{batch} * num_heads_k * ((packed_rows() + kDecodeRows - 1) / kDecodeRows); }
};

}  // namespace hfp
