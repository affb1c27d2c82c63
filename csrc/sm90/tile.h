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

 private:
  __device__ static uint64_t descriptor(uint32_t addr, uint32_t leading) {
    return static_cast<uint64_t>((addr & 0x3ffff) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
           static_cast<uint64_t>(8 * kRowBytes >> 4) << 32 | kSwizzle << 62;
  }
};

// What a panel is cleared from: up to 127 rows of 128 bytes.
static __device__ const uint4 zeros[1024] = {};

// A tile to come: where to, the barrier that waits for it, how many of its rows are the sequence's, from the first on,
// and how many bytes besides will arrive at the barrier.
struct Arrival {
  uint32_t tile, full;
  int own, more = 0;
};

// Arrivals of tiles, for the one thread that sends for them. The copy engine writes zeros past a tensor, but what lies
// past a sequence may be anything, and 0 times NaN is NaN. So a tile with rows that are not the sequence's lands at
// this thread's barrier first, which then has zeros copied over them; only those complete the tile's own barrier.
class Arrivals {
 public:
  __device__ explicit Arrivals(uint64_t* landed) : landed_(smem_address(landed)) {}

  template <class Tile>
  __device__ __forceinline__ void send(const Arrival& to, const CUtensorMap* map, int row, int head, int batch) {
    const bool whole = to.own >= Tile::kRows;
    if (whole) barrier_expect(to.full, Tile::kBytes + to.more);
    if (!whole) under_way_ += Tile::kBytes;
    Tile::load(to.tile, map, whole ? to.full : landed_, row, head, batch);
  }
  // Waits for what landed here; returns whether anything did, and has to be completed.
  __device__ __forceinline__ bool await() {
    if (under_way_ == 0) return false;
    barrier_expect(landed_, under_way_);
    barrier_wait(landed_, parity_);
    parity_ ^= 1;
    under_way_ = 0;
    return true;
  }
  template <class Tile>
  __device__ __forceinline__ void complete(const Arrival& to) const {
    if (to.own >= Tile::kRows) return;
    const int bytes = (Tile::kRows - to.own) * Tile::kRowBytes;
    barrier_expect(to.full, bytes * Tile::kPanels + to.more);
#pragma unroll
    for (int i = 0; i < Tile::kPanels; ++i) {
      bulk_load(to.tile + i * Tile::kPanelBytes + to.own * Tile::kRowBytes, zeros, bytes, to.full);
    }
  }

 private:
  const uint32_t landed_;
  int under_way_ = 0;  // bytes
  uint32_t parity_ = 0;
};

}  // namespace hfp::sm90
