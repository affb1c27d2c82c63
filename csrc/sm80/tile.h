// A tile of 16-bit elements in shared memory, and the products of two of them on tensor cores.
//
// A tile of kRows x kCols lies in panels of 64 columns (32 where 64 does not divide kCols), [panel][row][column], and
// the 16-byte chunks of a row are permuted by the row, so that the 8 rows an ldmatrix reads never share a bank. For a
// fixed lane the permutation is an exclusive or with lane bits only, so stepping along a row is one more exclusive or
// with a constant and stepping down a column a constant offset.
#pragma once

#include "params.h"
#include "sm80/ptx.h"

namespace hfp::sm80 {

template <int kRows_, int kCols_>
struct Tile {
  static constexpr int kRows = kRows_;
  static constexpr int kCols = kCols_;
  static constexpr int kPanel = kCols % 64 == 0 ? 64 : 32;
  static constexpr int kChunks = kPanel / 8;  // 16-byte chunks in a row of a panel
  static constexpr int kRowBytes = kPanel * 2;
  static constexpr int kPanelBytes = kRows * kRowBytes;
  static constexpr int kBytes = kRows * kCols * 2;
  static_assert(kCols % kPanel == 0 && kRows % 8 == 0);

  __device__ static constexpr int permute(int row) { return kPanel == 64 ? row & 7 : (row >> 1) & 3; }

  // Byte offset of a 16-byte chunk.
  __device__ static constexpr int offset(int row, int chunk) {
    return (chunk / kChunks) * kPanelBytes + row * kRowBytes + (((chunk % kChunks) ^ permute(row)) << 4);
  }
  // From offset(row, c) to offset(row, c + step), where the bits of step are clear in c: the panel moves the address,
  // the chunk within it toggles bits.
  __device__ static constexpr uint32_t step(uint32_t addr, int chunks) {
    return (addr ^ ((chunks % kChunks) << 4)) + (chunks / kChunks) * kPanelBytes;
  }
  // From offset(r, c) to offset(r + rows, c), where the low three bits of rows are clear in r.
  __device__ static constexpr uint32_t step_rows(uint32_t addr, int rows) {
    return (addr ^ (permute(rows) << 4)) + rows * kRowBytes;
  }
};

// Lanes of an ldmatrix.x4, which reads four 8 x 8 matrices: where lane l points.
struct Lane {
  int row8, second, fourth;  // row in its matrix; whether it is matrix 1 or 3; whether it is matrix 2 or 3
  __device__ explicit Lane(int lane) : row8(lane & 7), second((lane >> 3) & 1), fourth((lane >> 4) & 1) {}
};

// Fragments of an operand whose reduction dimension runs along the rows of memory ("kAlong") or down them. Offsets are
// of the first fragment; the gemms below step from there. A, 16 x 16: matrices (m0, k0), (m8, k0), (m0, k8), (m8, k8).
template <class T>
__device__ inline uint32_t a_along(uint32_t base, int row, int lane) {
  const Lane l(lane);
  return base + T::offset(row + l.second * 8 + l.row8, l.fourth);
}
template <class T>
__device__ inline uint32_t a_down(uint32_t base, int col_chunk, int lane) {
  const Lane l(lane);
  return base + T::offset(l.fourth * 8 + l.row8, col_chunk + l.second);
}
// B, 16 x 16 as two 16 x 8: matrices (n0, k0), (n0, k8), (n8, k0), (n8, k8).
template <class T>
__device__ inline uint32_t b_along(uint32_t base, int row, int lane) {
  const Lane l(lane);
  return base + T::offset(row + l.fourth * 8 + l.row8, l.second);
}
template <class T>
__device__ inline uint32_t b_down(uint32_t base, int col_chunk, int lane) {
  const Lane l(lane);
  return base + T::offset(l.second * 8 + l.row8, col_chunk + l.fourth);
}

// acc[i][j]: 16 x 8 tiles. S = A B^T with both operands along memory rows: A rows a_row.., B rows b_row.. are baked
// into the addresses; tiles of B follow one another every kStrideN rows.
template <typename Element, class TileA, class TileB, int kM, int kN, int kK>
__device__ __forceinline__ void gemm_along(float (&acc)[kM][2 * kN][4], uint32_t a, uint32_t b) {
#pragma unroll
  for (int k = 0; k < kK; ++k) {
    uint32_t fa[kM][4];
#pragma unroll
    for (int i = 0; i < kM; ++i) ldmatrix4(fa[i], TileA::step(a, 2 * k) + i * 16 * TileA::kRowBytes);
    uint32_t fb[2][4];
    ldmatrix4(fb[0], TileB::step(b, 2 * k));
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      if (j + 1 < kN) ldmatrix4(fb[(j + 1) % 2], TileB::step(b, 2 * k) + (j + 1) * 16 * TileB::kRowBytes);
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        mma<Element>(acc[i][2 * j], fa[i], fb[j % 2][0], fb[j % 2][1]);
        mma<Element>(acc[i][2 * j + 1], fa[i], fb[j % 2][2], fb[j % 2][3]);
      }
    }
  }
}

// acc += A B with B down memory rows. Tiles of B stand every 16 * kStrideN columns, kStrideN a power of two: that is
// how warps that share the columns take turns. A comes from registers (kARegisters: a is an array of fragments), from
// memory rows, or (kADown) down them.
enum class OperandA { kRegisters, kAlong, kDown };

template <typename Element, OperandA kA, class TileA, class TileB, int kM, int kN, int kK, int kStrideN, class A>
__device__ __forceinline__ void gemm_down(float (&acc)[kM][2 * kN][4], const A& a, uint32_t b) {
#pragma unroll
  for (int k = 0; k < kK; ++k) {
    uint32_t fa[kM][4];
    if constexpr (kA != OperandA::kRegisters) {
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        if constexpr (kA == OperandA::kAlong) {
          ldmatrix4(fa[i], TileA::step(a, 2 * k) + i * 16 * TileA::kRowBytes);
        } else {
          ldmatrix4_trans(fa[i], TileA::step(a, 2 * i) + k * 16 * TileA::kRowBytes);
        }
      }
    }
    uint32_t fb[2][4];
    ldmatrix4_trans(fb[0], b + k * 16 * TileB::kRowBytes);
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      if (j + 1 < kN)
        ldmatrix4_trans(fb[(j + 1) % 2], TileB::step(b, 2 * kStrideN * (j + 1)) + k * 16 * TileB::kRowBytes);
      const uint32_t (&f)[4] = fb[j % 2];
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        if constexpr (kA == OperandA::kRegisters) {
          mma<Element>(acc[i][2 * j], a[i][k], f[0], f[1]);
          mma<Element>(acc[i][2 * j + 1], a[i][k], f[2], f[3]);
        } else {
          mma<Element>(acc[i][2 * j], fa[i], f[0], f[1]);
          mma<Element>(acc[i][2 * j + 1], fa[i], f[2], f[3]);
        }
      }
    }
  }
}

template <int kM, int kN>
__device__ __forceinline__ void clear(float (&acc)[kM][kN][4]) {
#pragma unroll
  for (int i = 0; i < kM; ++i)
#pragma unroll
    for (int j = 0; j < kN; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[i][j][e] = 0.f;
}

// Copies rows of one head into tiles. Rows at or past row_end and columns at or past head_dim become zeros. Tensors
// whose rows do not start on 16 bytes are read element by element: right, and slower.
template <class T, int kThreads, typename Element>
class RowLoader {
 public:
  // `head` points at row 0 of the head.
  __device__ RowLoader(const TensorView& view, const Element* head, int head_dim, int thread)
      : view_(view), head_(head), head_dim_(head_dim), thread_(thread) {
    if constexpr (kInStep) {
      const unsigned row = thread_ / kRowChunks, chunk = thread_ % kRowChunks;
      head_ += row * view.row_stride + chunk * 8;
      first_ = T::offset(row, chunk);
      bytes_ = piece_bytes(chunk);
    }
  }

  // `offset` elements on from the head: a neighbouring head.
  __device__ __forceinline__ void load(uint32_t tile, int row, int row_end, int64_t offset = 0) const {
    if (!view_.aligned) return load_elements(tile, row, row_end, offset);
    const int64_t row_stride = not_hoisted(view_.row_stride);
    const Element* from = head_ + row * row_stride + offset;
    const int rows = row_end - row - (kInStep ? thread_ / kRowChunks : 0);
#pragma unroll
    for (unsigned p = 0; p < (kPieces + kThreads - 1) / kThreads; ++p) {
      if constexpr (kInStep) {
        cp_async16(T::step_rows(tile + first_, p * kStep), from, static_cast<int>(p * kStep) < rows ? bytes_ : 0);
        from += kStep * row_stride;
      } else {
        const unsigned i = p * kThreads + thread_;
        if (kPieces % kThreads != 0 && i >= kPieces) break;
        const unsigned r = i / kRowChunks, chunk = i % kRowChunks;
        cp_async16(tile + T::offset(r, chunk), from + r * row_stride + chunk * 8,
                   static_cast<int>(r) < rows ? piece_bytes(chunk) : 0);
      }
    }
  }

 private:
  static constexpr unsigned kRowChunks = T::kCols / 8;
  static constexpr unsigned kPieces = T::kRows * kRowChunks;
  // Where the block of threads covers a multiple of 8 whole rows at a time, or 1, 2 or 4, a thread keeps its column and
  // only steps down: its state is one pointer, one offset and one count.
  static constexpr unsigned kStep = kThreads / kRowChunks;
  static constexpr bool kInStep =
      kThreads % kRowChunks == 0 && (kStep % 8 == 0 || 8 % kStep == 0) && kPieces % kThreads == 0;

  __device__ int piece_bytes(int chunk) const { return 2 * min(max(head_dim_ - chunk * 8, 0), 8); }

  __device__ __forceinline__ void load_elements(uint32_t tile, int row, int row_end, int64_t offset) const {
    const Element* head = head_ + offset;
    if constexpr (kInStep) head -= thread_ / kRowChunks * view_.row_stride + thread_ % kRowChunks * 8;
#pragma unroll 1
    for (int i = thread_; i < T::kRows * T::kCols; i += kThreads) {
      const int r = i / T::kCols, c = i % T::kCols;
      uint16_t bits = 0;
      if (row + r < row_end && c < head_dim_) {
        bits = reinterpret_cast<const uint16_t*>(head)[(row + r) * view_.row_stride + c];
      }
      store_shared2(tile + T::offset(r, c / 8) + c % 8 * 2, bits);
    }
  }

  const TensorView& view_;
  const Element* head_;
  int head_dim_;
  unsigned thread_;
  int bytes_ = 0;
  uint32_t first_ = 0;
};

// Copies a tile to rows [row, row + kRows) of one head, of which row_end and head_dim may cut a part off.
template <class T, int kThreads, typename Element>
__device__ __forceinline__ void store_rows(uint32_t tile, const TensorView& view, Element* head, int row, int row_end,
                                           int head_dim, int thread) {
  if (!view.aligned || head_dim % 8 != 0) {
#pragma unroll 1
    for (int i = thread; i < T::kRows * T::kCols; i += kThreads) {
      const int r = i / T::kCols, c = i % T::kCols;
      if (row + r >= row_end || c >= head_dim) continue;
      reinterpret_cast<uint16_t*>(head)[(row + r) * view.row_stride + c] =
          load_shared2(tile + T::offset(r, c / 8) + c % 8 * 2);
    }
    return;
  }
  constexpr unsigned kRowChunks = T::kCols / 8;
#pragma unroll 4
  for (unsigned i = thread; i < T::kRows * kRowChunks; i += kThreads) {
    const int r = i / kRowChunks, chunk = i % kRowChunks;
    if (row + r >= row_end || chunk * 8 >= head_dim) continue;
    *reinterpret_cast<uint4*>(head + (row + r) * view.row_stride + chunk * 8) =
        load_shared16(tile + T::offset(r, chunk));
  }
}

}  // namespace hfp::sm80
