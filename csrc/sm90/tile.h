// A tile that the tensor memory accelerator writes and wgmma reads: panels of 64 columns (32 where 64 does not divide
// the columns), [panel][row][column], in the hardware's 128-byte (64-byte) swizzle: the 16-byte chunks of a row are
// permuted by the row, as in sm80/tile.h, so that code for one reads the other.
#pragma once

#include "sm80/tile.h"
#include "sm90/ptx.h"

namespace hfp::sm90 {

template <int kRows_, int kCols_>
struct Tile : sm80::Tile<kRows_, kCols_> {
  using Base = sm80::Tile<kRows_, kCols_>;
  using Base::kCols;
  using Base::kPanel;
  using Base::kPanelBytes;
  using Base::kRowBytes;
  using Base::kRows;
  static constexpr int kPanels = kCols / kPanel;
  static constexpr uint64_t kSwizzle = kPanel == 64 ? 1 : 2;

  // Matrix descriptor of the tile as an operand whose reduction dimension runs along the rows of memory (K-major).
  __device__ static uint64_t along(uint32_t addr) { return descriptor(addr, 16); }
  // ... and down them (MN-major, the operand transposed): the leading offset leads to the next panel of columns.
  __device__ static uint64_t down(uint32_t addr) { return descriptor(addr, kPanelBytes); }

  // What to add to a descriptor for the k-th 16 of the reduction.
  __device__ static constexpr int along_step(int k) {
    return ((16 * k / kPanel) * kPanelBytes + (16 * k % kPanel) * 2) >> 4;
  }
  __device__ static constexpr int down_step(int k) { return (16 * k * kRowBytes) >> 4; }

  // One copy a panel. Rows and columns outside of the tensor become zeros.
  __device__ __forceinline__ static void load(uint32_t tile, const CUtensorMap* map, uint32_t bar, int row, int head,
                                              int batch) {
#pragma unroll
    for (int i = 0; i < kPanels; ++i) tma_load(tile + i * kPanelBytes, map, bar, i * kPanel, row, head, batch);
  }
  // From row `from` of the tile on, as many rows as the map's boxes have, to columns [col, ...).
  __device__ __forceinline__ static void store(uint32_t tile, int from, const CUtensorMap* map, int col, int row,
                                               int head, int batch) {
#pragma unroll
    for (int i = 0; i < kPanels; ++i) {
      tma_store(map, tile + i * kPanelBytes + from * kRowBytes, col + i * kPanel, row, head, batch);
    }
  }
  // Zeros to rows [first, end), by one warpgroup, for the products that follow: the copy engine writes zeros only past
  // the tensor, not past the sequence, and 0 times NaN is NaN. `barrier` is the warpgroup's own.
  __device__ __forceinline__ static void clear_rows(uint32_t tile, int first, int end, int barrier) {
    constexpr int kChunks = kRowBytes / 16;
    const int chunks = (end - first) * kChunks;
    for (int i = threadIdx.x % 128; i < chunks * kPanels; i += 128) {
      store_shared_float4(tile + i / chunks * kPanelBytes + first * kRowBytes + i % chunks * 16, {0.f, 0.f, 0.f, 0.f});
    }
    async_fence_shared();
    named_sync(barrier, 128);
  }

 private:
  __device__ static uint64_t descriptor(uint32_t addr, uint32_t leading) {
    return static_cast<uint64_t>((addr & 0x3ffff) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
           static_cast<uint64_t>(8 * kRowBytes >> 4) << 32 | kSwizzle << 62;
  }
};

}  // namespace hfp::sm90
