// Decode: few queries against many keys, a matter of reading K and V once, at the speed of memory. Thread blocks take
// equal shares of all key blocks (common/packed.h). What they find of a tile that several of them share goes to
// scratch, and a second kernel, whose start overlaps the end of the first, puts it together.
#pragma once

#include <algorithm>

#include "common/logits.h"
#include "common/packed.h"
#include "common/scratch.h"
#include "common/softmax.h"
#include "launch.h"
#include "sm80/combine.h"
#include "sm80/tile.h"
#include "sm80/traits.h"

namespace hfp::sm80 {

template <typename Element_, int kHeadDim_, bool kManyRows, Variant kVariant_>
struct Decode {
  using Traits = DecodeTraits<kHeadDim_, kManyRows>;
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr Variant kVariant = kVariant_;
  static constexpr int kBlockK = Traits::kBlockK;
  static constexpr int kM = Traits::kM;  // 16-row tiles of a warp
  static constexpr int kWarpsQ = Traits::kWarpsQ;
  static constexpr int kWarpsK = Traits::kWarpsK;
  static constexpr int kThreads = kWarpsQ * kWarpsK * 32;
  static constexpr int kRows = kWarpsQ * kM * 16;
  static constexpr int kKeys = kBlockK / kWarpsK;  // of a warp
  using TileQ = Tile<kRows, kHeadDim>;
  using TileK = Tile<kBlockK, kHeadDim>;
  using PackedTile = hfp::PackedTile<kRows, kBlockK>;
  using Combiner = Decode<Element, kHeadDim, kManyRows, Variant::kPlain>;  // one for every variant

  // Shared memory: stages of K and V, then Q. Afterwards, in their place, what the warps exchange: rows of fp32 that
  // step by 8 banks, and sums. Where there is room for both at a time, and a second Q, copies go on from head to head.
  static constexpr int kStageBytes = 2 * TileK::kBytes;
  static constexpr int kPitch = kHeadDim + 8;
  static constexpr int kExchangeBytes = kWarpsK * kRows * (kPitch + 2) * 4;
  static constexpr int kMaxStages = 6;
  static constexpr int shared_bytes(int stages, bool flows = false) {
    if (flows) return stages * kStageBytes + 2 * TileQ::kBytes + kExchangeBytes;
    return std::max(stages * kStageBytes + TileQ::kBytes, kExchangeBytes);
  }
  static_assert(kRows <= (kManyRows ? kDecodeRows : kDecodeFewRows) && shared_bytes(2) <= kDecodeBytes);
};

// The ring of stages, as one piece of work leaves it to the next.
struct Flow {
  int num_stages;
  bool flows;         // copies for the next piece may begin before this one ends
  bool primed;        // those of this piece's first blocks have
  uint32_t stage;     // of block i, and of block i + num_stages after it
  uint32_t q;         // where Q is, and
  uint32_t q_next;    // will be
  uint32_t exchange;  // and what the warps exchange
};

// Copies packed rows [row0, row0 + kRows) to a tile; `group` points at row 0 of the group's first head.
template <class T, int kThreads, typename Element>
__device__ __forceinline__ void load_packed(uint32_t tile, const DecodeArguments& a, const Element* group, int row0,
                                            int rows, int thread) {
  constexpr unsigned kRowChunks = T::kCols / 8;
  const TensorView& q = a.p.q;
#pragma unroll 1
  for (unsigned i = not_hoisted(thread); i < T::kRows * kRowChunks; i += kThreads) {
    const int r = i / kRowChunks, chunk = i % kRowChunks;
    uint32_t head;
    const uint32_t query = a.heads_per_group.divide(row0 + r, head);
    const Element* from = group + query * q.row_stride + head * q.head_stride + chunk * 8;
    const int columns = row0 + r < rows ? min(max(a.p.head_dim - chunk * 8, 0), 8) : 0;
    const uint32_t to = tile + T::offset(r, chunk);
    if (q.aligned) {
      cp_async16(to, from, 2 * columns);
      continue;
    }
#pragma unroll 1
    for (int e = 0; e < 8; ++e) {
      store_shared2(to + 2 * e, e < columns ? reinterpret_cast<const uint16_t*>(from)[e] : 0);
    }
  }
}

// Some consecutive key blocks of one tile and key head: what a thread block works on at a time.
struct Piece {
  int block, count;  // the first key block, and how many
  bool whole;        // all that the tile meets
  bool first;        // of the thread block's pieces
  bool primes;       // the next head's first blocks, of the same tile, of which it has enough
};

template <class D>
__device__ __forceinline__ void decode_piece(const DecodeArguments& a, const typename D::PackedTile& tile, int head_k,
                                             const Piece& piece, unsigned char* shared, Flow& flow) {
  using Element = typename D::Element;
  using TileQ = typename D::TileQ;
  using TileK = typename D::TileK;
  constexpr int kM = D::kM, kNS = D::kKeys / 8, kNO = D::kHeadDim / 8, kRows = D::kRows, kPitch = D::kPitch;
  const DecodeParams& p = a.p;

  const int num_stages = flow.num_stages;
  const uint32_t stages = smem_address(shared), tile_q = stages + flow.q;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int warp_row = warp % D::kWarpsQ * kM * 16, warp_k = warp / D::kWarpsQ;
  const int row = tile.row0 + warp_row + lane / 4, rows = tile.rows;
  const Sequence& seq = tile.seq;
  const PackedMask mask(tile.mask, a.heads_per_group, rows);

  using LoaderK = RowLoader<TileK, D::kThreads, Element>;
  const LoaderK k(p.k, row_pointer<Element>(p.k, seq.batch, seq.offset_k, head_k), p.head_dim, thread);
  const LoaderK v(p.v, row_pointer<Element>(p.v, seq.batch, seq.offset_k, head_k), p.head_dim, thread);
  const uint32_t frag_q = a_along<TileQ>(tile_q, warp_row, lane);
  const uint32_t frag_k = b_along<TileK>(stages, warp_k * D::kKeys, lane);
  const uint32_t frag_v = b_down<TileK>(stages + TileK::kBytes, 0, lane) + warp_k * D::kKeys * TileK::kRowBytes;

  float o[kM][kNO][4];
  clear(o);
  Softmax<kM> softmax;
  // The first steps only load: the instructions that do are then there once, and a short kernel is mostly the first
  // fetch of its instructions.
  uint32_t stage = flow.stage;
#pragma unroll 1
  for (int i = flow.primed ? 0 : -num_stages; i < piece.count; ++i) {
    if (i >= 0) {
      const int n = piece.block + i, start = n * D::kBlockK + warp_k * D::kKeys;
      cp_async_wait_all_but(num_stages - 1);
      __syncthreads();  // K(n) and V(n) have arrived

      float s[kM][kNS][4];
      clear(s);
      gemm_along<Element, TileQ, TileK, kM, kNS / 2, D::kHeadDim / 16>(s, not_hoisted(frag_q),
                                                                       not_hoisted(frag_k) + stage);
      if constexpr (D::kVariant == Variant::kGeneral) {
#pragma unroll
        for (int r = 0; r < 2 * kM; ++r) {
          uint32_t in_group;
          const int query = a.heads_per_group.divide(min(row + 8 * r, rows - 1), in_group);
          const LogitBias bias(p, seq.batch, head_k * p.heads_per_group + in_group);
          const int distance = query + mask.shift() - start - 2 * (lane % 4);
#pragma unroll
          for (int j = 0; j < kNS; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              float& x = s[r / 2][j][2 * (r % 2) + e];
              x = bias.apply(x, distance - 8 * j - e);
            }
        }
      }
      if (const unsigned why = mask.template hidden<D::kBlockK>(tile.span, n)) {
        mask_elements(mask, why, s, row, start, lane);
      }
      float shrink[kM][2];
      if (softmax.template update<false>(s, shrink, p.exp2_scale, exp2_approx)) scale_rows(o, shrink);

      uint32_t prob[kM][D::kKeys / 16][4];
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int j = 0; j < D::kKeys / 16; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float (&c)[4] = s[m][2 * j + e / 2];
            prob[m][j][e] = pack<Element>(c[2 * (e % 2)], c[2 * (e % 2) + 1]);
          }
      gemm_down<Element, OperandA::kRegisters, TileQ, TileK, kM, kNO / 2, D::kKeys / 16, 1>(
          o, prob, not_hoisted(frag_v) + stage);
      __syncthreads();  // nobody reads them any more
    }
    const int next = i + num_stages;
    const bool of_next = next >= piece.count;  // head
    if (!of_next || piece.primes) {
      const int start = (of_next ? tile.blocks.begin + next - piece.count : piece.block + next) * D::kBlockK;
      k.load(stages + stage, start, seq.seqlen_k, of_next ? p.k.head_stride : 0);
      v.load(stages + stage + TileK::kBytes, start, seq.seqlen_k, of_next ? p.v.head_stride : 0);
    }
    const bool primes_q = piece.primes && next == piece.count;
    if (i == -num_stages || primes_q) {
      const int head = (head_k + primes_q) * p.heads_per_group;
      load_packed<TileQ, D::kThreads>(stages + (primes_q ? flow.q_next : flow.q), a,
                                      row_pointer<Element>(p.q, seq.batch, seq.offset_q, head), tile.row0, rows,
                                      thread);
    }
    stage = stage + D::kStageBytes == num_stages * D::kStageBytes ? 0 : stage + D::kStageBytes;
    cp_async_commit();
  }

  // Add up the warps' keys. No address in here is worth a register in the loop.
  float* results = reinterpret_cast<float*>(shared + flow.exchange);  // [kWarpsK][kRows][kPitch]
  float2* sums = reinterpret_cast<float2*>(results + D::kWarpsK * kRows * kPitch);
  const int mine = not_hoisted(warp_k * kRows + warp_row + lane / 4);
#pragma unroll
  for (int r = 0; r < 2 * kM; ++r) {
    const float sum = softmax.complete(r / 2, r % 2);
    if (row + 8 * r >= rows) continue;
    if (lane % 4 == 0) sums[mine + 8 * r] = make_float2(softmax.reference(r / 2, r % 2), sum);
    float* to = results + (mine + 8 * r) * kPitch + 2 * (lane % 4);
#pragma unroll
    for (int j = 0; j < kNO; ++j) {
      const float (&c)[4] = o[r / 2][j];
      *reinterpret_cast<float2*>(to + 8 * j) = make_float2(c[2 * (r % 2)], c[2 * (r % 2) + 1]);
    }
  }
  __syncthreads();
  constexpr int kQuads = D::kHeadDim / 4;
#pragma unroll 1
  for (int i = thread; i < tile.rows_here() * kQuads; i += D::kThreads) {
    const int r = i / kQuads, col = i % kQuads * 4;
    Partial of_warps[D::kWarpsK], result;
#pragma unroll
    for (int w = 0; w < D::kWarpsK; ++w) {
      const int from = w * kRows + r;
      of_warps[w].top = sums[from].x;
      of_warps[w].sum = sums[from].y;
      of_warps[w].x = *reinterpret_cast<const float4*>(results + from * kPitch + col);
    }
    result.add(of_warps);
    if (piece.whole) {
      write_row<Element>(a, seq, head_k, tile.row0 + r, col, result);
    } else {
      const int64_t to = scratch_row(p, blockIdx.x, !piece.first, r);
      if (col == 0) reinterpret_cast<float2*>(p.partial_sums)[to] = make_float2(result.top, result.sum);
      *reinterpret_cast<float4*>(p.partial_out + to * D::kHeadDim + col) = result.x;
    }
  }
  __syncthreads();  // nobody reads the results any more
  flow.primed = piece.primes;
  flow.stage = stage;
  if (piece.primes) {
    const uint32_t before = flow.q;
    flow.q = flow.q_next;
    flow.q_next = before;
  }
}

template <class D>
__global__ void __launch_bounds__(D::kThreads, 2)
    decode_kernel(const __grid_constant__ DecodeArguments a, const int num_stages, const bool flows) {
  extern __shared__ __align__(128) unsigned char shared[];
  let_next_kernel_start();
  bool first = true;
  const uint32_t q = num_stages * D::kStageBytes, q_next = q + D::TileQ::kBytes;
  Flow flow{.num_stages = num_stages,
            .flows = flows,
            .primed = false,
            .stage = 0,
            .q = q,
            .q_next = q_next,
            .exchange = flows ? q_next + D::TileQ::kBytes : 0};
  walk_share<D::kThreads, typename D::PackedTile>(
      a, blockIdx.x, [&](const typename D::PackedTile& tile, const PackedHead& head, int at, int last, const Shares&) {
        const int done = at - head.begin, count = min(head.length - done, last - at);
        const int of_next = head.head_k + 1 < a.p.num_heads_k ? min(head.length, last - at - count) : 0;
        decode_piece<D>(a, tile, head.head_k,
                        {.block = tile.blocks.begin + done,
                         .count = count,
                         .whole = count == head.length,
                         .first = first,
                         .primes = flow.flows && of_next >= flow.num_stages},
                        shared, flow);
        first = false;
        return at + count;
      });
}

template <class D>
int64_t launch_decode(const DecodeParams& params, cudaStream_t stream) {
  if (params.batch == 0 || params.mask.seqlen_q == 0) return 0;
  DecodeArguments a(params, D::kRows);
  DecodeParams& p = a.p;
  Carver carver(p.scratch);
  const int64_t rows = scratch_row(p, p.blocks, false, 0);
  p.partial_out = carver.take<float>(rows * D::kHeadDim);
  p.partial_sums = carver.take<float>(rows * 2);
  if (!p.scratch) return carver.bytes();
  // Between two heads memory would idle: 2 to 3% of the time with caches of up to 67 MB. Those of 268 and 537 MB are
  // 1% slower for it.
  const int beside = (p.shared_bytes - D::shared_bytes(0, /*flows=*/true)) / D::kStageBytes;
  const bool flows = beside >= 4;
  const int stages = std::min(flows ? beside : (p.shared_bytes - D::TileQ::kBytes) / D::kStageBytes, D::kMaxStages);
  launch<decode_kernel<D>>({.name = "decode",
                            .blocks = p.blocks,
                            .threads = D::kThreads,
                            .shared_bytes = D::shared_bytes(stages, flows),
                            .stream = stream},
                           a, stages, flows);
  using C = typename D::Combiner;
  launch<combine_kernel<C>>({.name = "combine",
                             .blocks = p.blocks,
                             .threads = Combine<C>::kThreads,
                             .shared_bytes = 0,
                             .stream = stream,
                             .starts_early = p.starts_early},
                            a);
  return carver.bytes();
}

template <typename Element, int kHeadDim>
int64_t run_decode(const DecodeParams& p, cudaStream_t stream) {
  if (p.is_general()) {
    if (p.few_rows()) return launch_decode<Decode<Element, kHeadDim, false, Variant::kGeneral>>(p, stream);
    return launch_decode<Decode<Element, kHeadDim, true, Variant::kGeneral>>(p, stream);
  }
  if (p.few_rows()) return launch_decode<Decode<Element, kHeadDim, false, Variant::kPlain>>(p, stream);
  return launch_decode<Decode<Element, kHeadDim, true, Variant::kPlain>>(p, stream);
}

}  // namespace hfp::sm80

#define HFP_INSTANTIATE(arch, dtype, head_dim)                                               \
  namespace hfp {                                                                            \
  int64_t decode_##arch##_##dtype##_##head_dim(const DecodeParams& p, cudaStream_t stream) { \
    return sm80::run_decode<sm80::dtype, head_dim>(p, stream);                               \
  }                                                                                          \
  }
