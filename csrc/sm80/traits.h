// Tile shapes. sm80 has 163 KB of shared memory a block; sm86 stands for the GPUs with 99 KB (8.6, 8.9, 12.x), where it
// needs other shapes. Registers decide the rest: a thread holds 255.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace hfp::sm80 {

// What spills in the main loops is a handful of loop-invariant scalars beside 192 accumulators, some 15 local accesses
// among 1600 instructions a step. FlashAttention-2's kernels, with the same tiles, spill half as much again
// (docs/kernel-notes.md). Bytes beyond these limits fail the build.
// ptxas-spill-ok(sm8014forward_kernel, 260): loop invariants only
// ptxas-spill-ok(sm8015backward_kernel, 400): loop invariants only
// ptxas-spill-ok(sm8013decode_kernel, 40): once a tile, none in the main loop

struct sm80 {};
struct sm86 {};
using bf16 = __nv_bfloat16;
using fp16 = __half;

template <class Arch, int kHeadDim>
struct ForwardTraits {
  // Accumulators of a warp with 32 rows: S 32 x kBlockK and O 32 x kHeadDim, together 192 registers a thread. Two
  // blocks of four warps fill an SM's registers.
  static constexpr int kBlockQ = 128;
  static constexpr int kBlockK = kHeadDim <= 64 ? 128 : 64;
  static constexpr int kWarps = 4;
  static constexpr int kBlocksPerSM = 2;
};
template <>
struct ForwardTraits<sm80, 256> {  // O alone is 128 registers for 16 rows; 128 KB
  static constexpr int kBlockQ = 128;
  static constexpr int kBlockK = 64;
  static constexpr int kWarps = 8;
  static constexpr int kBlocksPerSM = 1;
};
template <>
struct ForwardTraits<sm86, 256> {  // 96 KB
  static constexpr int kBlockQ = 64;
  static constexpr int kBlockK = 64;
  static constexpr int kWarps = 4;
  static constexpr int kBlocksPerSM = 1;
};

// Decode: kWarpsQ x kWarpsK warps share kM * kWarpsQ * 16 rows and kBlockK keys. K and V of a step are 32 KB, less for
// 32 and 96; a thread block keeps as many steps on their way as its shared memory holds. With many rows a warp has 32
// where it can, because it reads all its keys from shared memory for them.
template <int kHeadDim, bool kManyRows>
struct DecodeTraits {
  static constexpr int kBlockK = kHeadDim <= 64 ? 128 : kHeadDim <= 128 ? 64 : 32;
  static constexpr int kM = kManyRows && kHeadDim <= 128 ? 2 : 1;
  static constexpr int kWarpsQ = kManyRows ? 2 : 1;
  static constexpr int kWarpsK = kManyRows || kHeadDim > 128 ? 2 : 4;
};

// Eight warps: S and dP are split kWarpsQ x (8 / kWarpsQ) over rows and keys, dK and dV kWarpsK x (8 / kWarpsK) over
// keys and columns, dQ kWarpsDq x (8 / kWarpsDq) over rows and columns.
template <int kBlockQ_, int kBlockK_, int kWarps_, int kWarpsQ_, int kWarpsK_, int kWarpsDq_, int kStages_>
struct BackwardShape {
  static constexpr int kBlockQ = kBlockQ_;
  static constexpr int kBlockK = kBlockK_;
  static constexpr int kWarps = kWarps_;
  static constexpr int kWarpsQ = kWarpsQ_;
  static constexpr int kWarpsK = kWarpsK_;
  static constexpr int kWarpsDq = kWarpsDq_;
  static constexpr int kStages = kStages_;  // 2: the next Q and dO are loaded a whole step ahead
};
template <class Arch, int kHeadDim>
struct BackwardTraits;
template <>
struct BackwardTraits<sm80, 32> : BackwardShape<128, 128, 8, 4, 8, 8, 2> {};
template <>
struct BackwardTraits<sm80, 64> : BackwardShape<128, 128, 8, 4, 4, 4, 2> {};
template <>
struct BackwardTraits<sm80, 96> : BackwardShape<64, 128, 8, 2, 8, 4, 2> {};
template <>
struct BackwardTraits<sm80, 128> : BackwardShape<64, 128, 8, 2, 4, 2, 2> {};
template <>
struct BackwardTraits<sm80, 256> : BackwardShape<64, 64, 8, 4, 2, 4, 1> {};
template <>
struct BackwardTraits<sm86, 32> : BackwardShape<64, 128, 8, 2, 8, 4, 2> {};
template <>
struct BackwardTraits<sm86, 64> : BackwardShape<64, 128, 8, 2, 4, 4, 2> {};
template <>
struct BackwardTraits<sm86, 96> : BackwardShape<64, 64, 4, 2, 4, 4, 2> {};
template <>
struct BackwardTraits<sm86, 128> : BackwardShape<64, 64, 8, 2, 4, 2, 2> {};
template <>
struct BackwardTraits<sm86, 256> : BackwardShape<32, 32, 4, 2, 1, 2, 1> {};

}  // namespace hfp::sm80
