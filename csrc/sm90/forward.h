// Forward on Hopper. A block of warpgroups owns tiles of 64 rows a consumer: one producer thread copies Q, K and V
// through the tensor memory accelerator into a ring of stages, the consumers multiply with wgmma. Two overlaps hide the
// softmax behind the tensor cores: within a warpgroup, S(n) = Q K(n)^T is issued before O += P(n + 1) V(n + 1) and both
// run while the softmax waits only for the first; between warpgroups, named barriers make them take turns at issuing
// (ping-pong). What limits the products is shared memory: each reads K or V once a warpgroup, at half of what it
// delivers; Q from there as well would take three quarters or more, so it stays in registers where there are enough.
#pragma once

#include "common/key_blocks.h"
#include "common/logits.h"
#include "common/softmax.h"
#include "launch.h"
#include "sm90/schedule.h"
#include "sm90/store.h"
#include "sm90/tensor_map.h"
#include "sm90/tile.h"

namespace hfp::sm90 {

// What spills: per tile, its description; per block, in the general variant, the numbers of softcap and ALiBi.
// ptxas-spill-ok(sm9014forward_kernel, 500): nothing that a product waits for

// Keys of a block. Where Q is in shared memory, the fewer the more often it is read: 64 rows by 64 keys take all that
// shared memory delivers. 96 columns and three consumers leave registers for 96 keys, 256 columns leave shared memory
// for 80, which divides no block of a list and is no number of words of dropout's bits.
constexpr int keys_of_block(int head_dim, Variant variant, int consumers) {
  if (head_dim > 128) return variant == Variant::kPlain ? 80 : 64;
  return head_dim == 96 && consumers == 3 ? 96 : 128;
}

template <int kHeadDim, Variant kVariant, int kConsumers_>
struct ForwardTraits {  // registers of a consumer thread, d128: O 64, S 64, P 32, Q 32
  static constexpr int kConsumers = kConsumers_;
  static constexpr int kBlockK = keys_of_block(kHeadDim, kVariant, kConsumers_);
  static constexpr int kStages = 2;
  static constexpr bool kQInRegisters = kHeadDim <= 128 && kConsumers == 2;
  // 2: the next tile's Q arrives while this one is worked on.
  static constexpr int kStagesQ = kHeadDim <= 128 && !kQInRegisters ? 2 : 1;
  static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 40;
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 232;
};

template <typename Element_, int kHeadDim_, Variant kVariant_, int kConsumers_>
struct Forward : ForwardTraits<kHeadDim_, kVariant_, kConsumers_> {
  using Traits = ForwardTraits<kHeadDim_, kVariant_, kConsumers_>;
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr Variant kVariant = kVariant_;
  static constexpr int kBlockQ = 64 * Traits::kConsumers;
  static constexpr int kThreads = 128 * (Traits::kConsumers + 1);

  using TileQ = Tile<64, kHeadDim>;  // of one consumer
  using TileK = Tile<Traits::kBlockK, kHeadDim>;
  // Block lists are read by the producer alone, which has the time to wait for them: it leaves a note with each block.
  static constexpr bool kTold = reads_lists(kVariant) && Traits::kConsumers == 2;
  struct Note {
    int block;  // -1: the tile sees nothing
    int bits;
    int is_last;  // of the tile
  };
  struct Barriers {
    uint64_t q_full[Traits::kStagesQ * Traits::kConsumers], q_empty[Traits::kStagesQ * Traits::kConsumers];
    uint64_t k_full[Traits::kStages], k_empty[Traits::kStages], v_full[Traits::kStages], v_empty[Traits::kStages];
    uint64_t tile_full, tile_empty;
    int tile;
    Note note[Traits::kStages];  // with K
  };
  static constexpr int kTileBytes =
      2 * Traits::kStages * TileK::kBytes + Traits::kStagesQ * Traits::kConsumers * TileQ::kBytes;
  static constexpr int kSharedBytes = kTileBytes + sizeof(Barriers) + 1024;  // tiles start on the swizzle's 1024 bytes
};

template <class F>
__device__ TileQueue<typename F::Barriers> tiles_of(const ForwardArguments& a, typename F::Barriers* bars) {
  return {a.p.tile_counter, a.total, bars};
}

template <class F>
__device__ __forceinline__ void produce(const ForwardArguments& a, typename F::Barriers* bars, uint32_t tile_q,
                                        uint32_t tile_k, uint32_t tile_v) {
  using TileQ = typename F::TileQ;
  using TileK = typename F::TileK;
  Stage<F::kStages> k(1), v(1);
  Stage<F::kStagesQ> q(1);
  const auto copy = [&](Stage<F::kStages>& stage, uint64_t* full, uint32_t tile, const CUtensorMap* map, int row,
                        int head, int batch) {
    const uint32_t bar = smem_address(full + stage.index);
    barrier_expect(bar, TileK::kBytes);
    TileK::load(tile + stage.index * TileK::kBytes, map, bar, row, head, batch);
    stage.next();
  };
#pragma unroll 1
  for (auto queue = tiles_of<F>(a, bars); queue.valid(); queue.next(false)) {
    const Work<F> work(a, queue.tile());
    if (!work.exists()) continue;
    const int batch = a.p.mask.cu_seqlens_q ? 0 : work.seq.batch, head_k = a.heads_per_group.divide(work.head);
    const int key0 = static_cast<int>(work.seq.offset_k), query0 = static_cast<int>(work.seq.offset_q) + work.row0;
    KeyBlocks<F::kBlockK, F::kTold> blocks(work.mask, work.span, work.row0, work.head);
    if (!blocks.valid()) {
      if constexpr (F::kTold) {
        barrier_wait(smem_address(bars->k_empty + k.index), k.parity);
        bars->note[k.index].block = -1;
        barrier_arrive(smem_address(bars->k_full + k.index));
        k.next();
      }
      continue;
    }
    const auto load_k = [&] {  // returns which block
      const typename F::Note note{blocks.block, blocks.bits};
      blocks.next();
      barrier_wait(smem_address(bars->k_empty + k.index), k.parity);
      if (F::kTold) bars->note[k.index] = {note.block, note.bits, !blocks.valid()};
      copy(k, bars->k_full, tile_k, &a.k, key0 + note.block * F::kBlockK, head_k, batch);
      return note.block;
    };
    int n = load_k();
#pragma unroll
    for (int w = 0; w < F::kConsumers; ++w) {
      const int at = q.index * F::kConsumers + w;
      barrier_wait(smem_address(bars->q_empty + at), q.parity);
      const uint32_t bar = smem_address(bars->q_full + at);
      barrier_expect(bar, TileQ::kBytes);
      TileQ::load(tile_q + at * TileQ::kBytes, &a.q, bar, query0 + 64 * w, work.head, batch);
    }
    q.next();
#pragma unroll 1
    for (bool more = true; more;) {
      const int before = n;
      more = blocks.valid();
      if (more) n = load_k();
      barrier_wait(smem_address(bars->v_empty + v.index), v.parity);
      copy(v, bars->v_full, tile_v, &a.v, key0 + before * F::kBlockK, head_k, batch);
    }
  }
}

// One warpgroup of consumers.
template <class F>
class Consumer {
  using Element = typename F::Element;
  using TileQ = typename F::TileQ;
  using TileK = typename F::TileK;
  static constexpr int kNS = F::kBlockK / 8, kNO = F::kHeadDim / 8;
  using AccumulatorS = float (&)[4 * kNS];
  using AccumulatorO = float (&)[4 * kNO];

 public:
  __device__ Consumer(const ForwardArguments& a, typename F::Barriers* bars, uint32_t tile_q, uint32_t tile_k,
                      uint32_t tile_v)
      : a_(a),
        bars_(bars),
        group_(uniform(threadIdx.x / 128) - 1),
        lane_(threadIdx.x % 32),
        warp_(threadIdx.x / 32 % 4),
        tile_q_(tile_q + group_ * TileQ::kBytes),
        desc_k_(TileK::along(tile_k)),
        desc_v_(TileK::down(tile_v)) {}

  // Tile after tile. The first product of a tile is issued together with the last of the one before, so that the tensor
  // cores have work while one tile's output leaves and the next one's softmax begins.
  __device__ __forceinline__ void run() {
    if (group_ == F::kConsumers - 1) named_arrive(1, 256);
    auto queue = tiles_of<F>(a_, bars_);
    Work<F> work(a_, queue.tile());
    if (!settle(queue, work)) return;
    float s[1][kNS][4], o[1][kNO][4], shrink[1][2];
    uint32_t prob[F::kBlockK / 16][4];
    Softmax<1> softmax;
    await_first();
    take_turn();
    issue_qk(s);
    pass_turn();
    wgmma_wait<0>();
    pin(reinterpret_cast<AccumulatorS>(s));
    release(k_, bars_->k_empty);
    probabilities(work, softmax, s, shrink);
    round_to(prob, work, s);
#pragma unroll 1
    for (;;) {
      int accumulate = 0;
#pragma unroll 1
      while (goes_on()) {
        await_k();
        take_turn();
        issue_qk(s);
        barrier_wait(smem_address(bars_->v_full + v_.index), v_.parity);
        issue_pv(o, prob, accumulate);
        accumulate = 1;
        pass_turn();
        wgmma_wait<1>();
        pin(reinterpret_cast<AccumulatorS>(s));
        release(k_, bars_->k_empty);
        probabilities(work, softmax, s, shrink);
        wgmma_wait<0>();
        pin(reinterpret_cast<AccumulatorO>(o));
        pin(reinterpret_cast<uint32_t (&)[F::kBlockK / 4]>(prob));
        release(v_, bars_->v_empty);
        round_to(prob, work, s);
        scale_rows(o, shrink);
      }
      if (!F::kQInRegisters) release_q();
      queue.next(true);
      const Work<F> done = work;
      if (!settle(queue, work)) {
        barrier_wait(smem_address(bars_->v_full + v_.index), v_.parity);
        issue_pv(o, prob, accumulate);
        wgmma_wait<0>();
        pin(reinterpret_cast<AccumulatorO>(o));
        finish(done, softmax, o);
        return;
      }
      Softmax<1> sums = softmax;
      softmax = Softmax<1>();
      await_first();
      take_turn();
      issue_qk(s);
      barrier_wait(smem_address(bars_->v_full + v_.index), v_.parity);
      issue_pv(o, prob, accumulate);
      pass_turn();
      wgmma_wait<1>();
      pin(reinterpret_cast<AccumulatorS>(s));
      release(k_, bars_->k_empty);
      probabilities(work, softmax, s, shrink);
      wgmma_wait<0>();
      pin(reinterpret_cast<AccumulatorO>(o));
      pin(reinterpret_cast<uint32_t (&)[F::kBlockK / 4]>(prob));
      release(v_, bars_->v_empty);
      finish(done, sums, o);
      round_to(prob, work, s);
    }
  }

 private:
  // Goes on to a tile that sees something; one that sees nothing gets zeros here.
  __device__ __forceinline__ bool settle(TileQueue<typename F::Barriers>& queue, Work<F>& work) {
    for (; queue.valid(); queue.next(true)) {
      work = Work<F>(a_, queue.tile());
      if (!uniform(work.exists())) continue;
      if (begins(work)) return true;
      Softmax<1> nothing;
      float o[1][kNO][4];
      sm80::clear(o);
      finish(work, nothing, o);
    }
    return false;
  }

  // The first block of a tile, if it sees any.
  __device__ __forceinline__ bool begins(const Work<F>& work) {
    if constexpr (F::kTold) {
      await_k();
      if (blocks_.block < 0) release(k_, bars_->k_empty);
      return blocks_.block >= 0;
    } else {
      blocks_ = {work.mask, work.span, work.row0, work.head};
      blocks_.make_uniform(uniform);
      return blocks_.valid();
    }
  }
  // Whether there is another.
  __device__ __forceinline__ bool goes_on() {
    if constexpr (F::kTold) {
      return !blocks_.is_last;
    } else {
      blocks_.next();
      return blocks_.valid();
    }
  }
  __device__ __forceinline__ void await_k() {
    barrier_wait(smem_address(bars_->k_full + k_.index), k_.parity);
    if constexpr (F::kTold) {
      const typename F::Note note = bars_->note[k_.index];
      blocks_ = {uniform(note.block), uniform(note.bits), uniform(note.is_last)};
    }
  }

  // Q of a tile and its first K.
  __device__ __forceinline__ void await_first() {
    barrier_wait(smem_address(bars_->q_full + q_.index * F::kConsumers + group_), q_.parity);
    if constexpr (F::kQInRegisters) {
      const uint32_t from = tile_q_ + TileQ::offset(16 * warp_ + lane_ % 16, lane_ / 16);
#pragma unroll
      for (int i = 0; i < F::kHeadDim / 16; ++i) sm80::ldmatrix4(fragments_q_[i], TileQ::step(from, 2 * i));
      __syncwarp();
      release_q();
    }
    barrier_wait(smem_address(bars_->k_full + k_.index), k_.parity);
  }
  __device__ __forceinline__ void release_q() {
    if (lane_ == 0) barrier_arrive(smem_address(bars_->q_empty + q_.index * F::kConsumers + group_));
    q_.next();
  }
  __device__ __forceinline__ void take_turn() { named_sync(1 + group_, 256); }
  __device__ __forceinline__ void pass_turn() { named_arrive(1 + (group_ + 1) % F::kConsumers, 256); }
  __device__ int first_row(const Work<F>& work) const { return work.row0 + 64 * group_ + 16 * warp_; }

  __device__ __forceinline__ void issue_qk(float (&s)[1][kNS][4]) {
    const uint64_t q = TileQ::along(tile_q_ + q_.index * F::kConsumers * TileQ::kBytes);
    const uint64_t k = desc_k_ + k_.index * (TileK::kBytes >> 4);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < F::kHeadDim / 16; ++i) {
      using Product = Wgmma<F::kBlockK, Element>;
      const uint64_t k_i = k + TileK::along_step(i);
      if constexpr (F::kQInRegisters) {
        Product::template rs<0>(reinterpret_cast<AccumulatorS>(s), fragments_q_[i], k_i, i > 0);
      } else {
        Product::template ss<0, 0>(reinterpret_cast<AccumulatorS>(s), q + TileQ::along_step(i), k_i, i > 0);
      }
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void issue_pv(float (&o)[1][kNO][4], uint32_t (&prob)[F::kBlockK / 16][4],
                                           int accumulate) {
    const uint64_t v = desc_v_ + v_.index * (TileK::kBytes >> 4);
    pin(reinterpret_cast<AccumulatorO>(o));
    pin(reinterpret_cast<uint32_t (&)[F::kBlockK / 4]>(prob));
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < F::kBlockK / 16; ++i) {
      Wgmma<F::kHeadDim, Element>::template rs<1>(reinterpret_cast<AccumulatorO>(o), prob[i], v + TileK::down_step(i),
                                                  i > 0 ? 1 : accumulate);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void release(Stage<F::kStages>& stage, uint64_t* empty) {
    if (lane_ == 0) barrier_arrive(smem_address(empty + stage.index));
    stage.next();
  }

  __device__ __forceinline__ void probabilities(const Work<F>& work, Softmax<1>& softmax, float (&s)[1][kNS][4],
                                                float (&shrink)[1][2]) {
    const int n = blocks_.block, row = first_row(work) + lane_ / 4, key0 = n * F::kBlockK;
    if constexpr (F::kVariant == Variant::kGeneral) {
      const LogitBias bias(a_.p, work.seq.batch, work.head);
      bias_elements(bias, s, row, key0 + 2 * (lane_ % 4), work.mask.shift());
    }
    if (const unsigned why = work.mask.template hidden<F::kBlockK>(work.span, n)) {
      mask_elements(work.mask, why, s, sm80::not_hoisted(row), key0, lane_);
    }
    if (F::kTold && blocks_.bits != kFullTile) {
      mask_by_tile(a_.p.mask.lists, blocks_.bits, s, sm80::not_hoisted(row), key0, lane_);
    }
    softmax.update(s, shrink, a_.p.exp2_scale, exp2_approx);
  }

  // The accumulator of S is, rounded and without what dropout drops, the A operand of the next product.
  __device__ __forceinline__ void round_to(uint32_t (&prob)[F::kBlockK / 16][4], const Work<F>& work,
                                           float (&s)[1][kNS][4]) {
    if constexpr (F::kVariant != Variant::kPlain) {
      if (drops<F::kVariant>(a_.p.dropout)) {
        const Dropout dropout(a_.p.dropout, work.seq.batch * a_.p.num_heads + work.head);
        uint32_t keep[1][kNS / 4];
        keep_elements<1, kNS>(dropout, keep, first_row(work), blocks_.block * F::kBlockK, lane_);
#pragma unroll
        for (int j = 0; j < kNS; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) s[0][j][e] = kept(keep[0][j / 4], j, e) ? s[0][j][e] : 0.f;
      }
    }
#pragma unroll
    for (int j = 0; j < F::kBlockK / 16; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float (&c)[4] = s[0][2 * j + e / 2];
        prob[j][e] = pack<Element>(c[2 * (e % 2)], c[2 * (e % 2) + 1]);
      }
  }

  // Writes lse and O. Four lanes hold two columns each of 8; they trade so that each writes 16 bytes of one row.
  __device__ __forceinline__ void finish(const Work<F>& work, Softmax<1>& softmax, float (&o)[1][kNO][4]) {
    const AttentionParams& p = a_.p;
    const int lane_col = lane_ % 4;
    float* lse = p.lse + work.seq.batch * p.lse_batch_stride + work.head * p.lse_head_stride + work.seq.offset_q;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first_row(work) + lane_ / 4 + 8 * h;
      const float row_lse = softmax.finish(0, h, p.exp2_scale);
      if (lane_col == 0 && row < work.seq.seqlen_q) lse[row] = row_lse;
      float scale = softmax.row_sum[0][h] > 0.f ? __fdividef(1.f, softmax.row_sum[0][h]) : 0.f;
      if constexpr (F::kVariant != Variant::kPlain) scale *= p.dropout.rescale;
      Element* out = row_pointer<Element>(p.out, work.seq.batch, work.seq.offset_q + row, work.head);
      store_row<Element>(out, row < work.seq.seqlen_q, o[0], h, scale, p.head_dim, lane_col);
    }
  }

  const ForwardArguments& a_;
  typename F::Barriers* bars_;
  const int group_, lane_, warp_;
  const uint32_t tile_q_;
  const uint64_t desc_k_, desc_v_;
  uint32_t fragments_q_[F::kQInRegisters ? F::kHeadDim / 16 : 1][4];
  std::conditional_t<F::kTold, typename F::Note, KeyBlocks<F::kBlockK, false>> blocks_;  // where this tile is
  Stage<F::kStages> k_{0}, v_{0};
  Stage<F::kStagesQ> q_{0};
};

template <class F>
__global__ void __launch_bounds__(F::kThreads, 1) forward_kernel(const __grid_constant__ ForwardArguments a) {
  extern __shared__ unsigned char shared[];
  const uint32_t base = (smem_address(shared) + 1023) & ~1023u;
  unsigned char* aligned = shared + (base - smem_address(shared));
  auto* bars = reinterpret_cast<typename F::Barriers*>(aligned + F::kTileBytes);
  const uint32_t tile_k = base, tile_v = tile_k + F::kStages * F::TileK::kBytes;
  const uint32_t tile_q = tile_v + F::kStages * F::TileK::kBytes;
  if (threadIdx.x == 0) {
    barrier_init(smem_address(&bars->tile_full), 1);
    barrier_init(smem_address(&bars->tile_empty), 4 * F::kConsumers + 1);
    for (int i = 0; i < F::kStagesQ * F::kConsumers; ++i) {
      barrier_init(smem_address(bars->q_full + i), 1);
      barrier_init(smem_address(bars->q_empty + i), 4);
    }
    for (int i = 0; i < F::kStages; ++i) {
      barrier_init(smem_address(bars->k_full + i), 1);
      barrier_init(smem_address(bars->v_full + i), 1);
      barrier_init(smem_address(bars->k_empty + i), 4 * F::kConsumers);
      barrier_init(smem_address(bars->v_empty + i), 4 * F::kConsumers);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (__shfl_sync(0xffffffffu, threadIdx.x / 128, 0) == 0) {
    give_registers<F::kProducerRegisters>();
    if (threadIdx.x == 0) produce<F>(a, bars, tile_q, tile_k, tile_v);
    if (threadIdx.x == 32) {
      auto queue = tiles_of<F>(a, bars);
      while (queue.fetch()) {
      }
    }
  } else {
    take_registers<F::kConsumerRegisters>();
    Consumer<F>(a, bars, tile_q, tile_k, tile_v).run();
  }
}

template <typename Element, int kHeadDim, Variant kVariant, int kConsumers>
void launch_forward(const AttentionParams& p, cudaStream_t stream) {
  using F = Forward<Element, kHeadDim, kVariant, kConsumers>;
  constexpr bool kBf16 = std::is_same_v<Element, bf16>;
  const int batch = p.mask.cu_seqlens_q ? 1 : p.batch;
  ForwardArguments a;
  a.p = p;
  a.q = tensor_map(p.q, p.head_dim, p.rows_q, p.num_heads, batch, F::TileQ::kPanel, 64, kBf16);
  a.k = tensor_map(p.k, p.head_dim, p.rows_k, p.num_heads_k, batch, F::TileK::kPanel, F::kBlockK, kBf16);
  a.v = tensor_map(p.v, p.head_dim, p.rows_k, p.num_heads_k, batch, F::TileK::kPanel, F::kBlockK, kBf16);
  a.tiles = (p.mask.seqlen_q + F::kBlockQ - 1) / F::kBlockQ;
  const int64_t total = int64_t{a.tiles} * p.num_heads * p.batch;
  if (total > 0x7fffffff) throw std::runtime_error("hf_flash_patch: forward: more than 2^31 - 1 tiles");
  a.total = static_cast<int>(total);
  const int blocks = std::min(a.total, multiprocessors());
  int section = 1;
  if (blocks == a.total) {
    a.p.tile_counter = nullptr;  // a tile each: nothing to hand out, and 2 us saved on a memset
  } else if (a.p.tile_counter) {
    check(cudaMemsetAsync(a.p.tile_counter, 0, sizeof(int), stream), "forward");
    // K and V of a section stay in the L2 cache.
    section = section_size(p.num_heads * p.batch, 4 * int64_t{p.mask.seqlen_k} * p.head_dim);
  }
  a.section_tiles = Divisor(section * a.tiles);
  a.section_heads = Divisor(section);
  a.num_heads = Divisor(p.num_heads);
  a.heads_per_group = Divisor(p.heads_per_group);
  launch<forward_kernel<F>>(
      {.name = "forward", .blocks = blocks, .threads = F::kThreads, .shared_bytes = F::kSharedBytes, .stream = stream},
      a);
}

// A third consumer, where registers allow it, shares keys among more rows: 5 to 20% faster where rows see many keys.
// But tall tiles meet more of the mask's edge, and more rows past the end: behind a causal mask, 64 columns, 512 keys
// cost a fifth and 2048 are even. With 96 columns Q has no room in registers then, which pays from 2048 rows on only
// where there is no edge.
template <int kHeadDim>
bool pays_tall(const MaskParams& m) {
  if (m.lists.row_offsets) return false;  // whose blocks have 128 rows
  if (m.window_left < 0 && m.window_right < 0) return kHeadDim <= 64 || m.seqlen_q >= 2048;
  const int64_t before = m.window_left < 0 ? m.seqlen_k : m.window_left;
  const int64_t after = m.window_right < 0 ? m.seqlen_k : m.window_right;
  return kHeadDim <= 64 && std::min<int64_t>(m.seqlen_k, before + after + 1) > 2048;
}

template <typename Element, int kHeadDim, Variant kVariant>
void choose_forward(const AttentionParams& p, cudaStream_t stream) {
  if constexpr (kHeadDim <= 96 && kVariant != Variant::kGeneral) {
    if (pays_tall<kHeadDim>(p.mask)) return launch_forward<Element, kHeadDim, kVariant, 3>(p, stream);
  }
  launch_forward<Element, kHeadDim, kVariant, 2>(p, stream);
}

template <typename Element, int kHeadDim>
void run_forward(const AttentionParams& p, cudaStream_t stream) {
  with_variant(p, [&](auto variant) { choose_forward<Element, kHeadDim, variant>(p, stream); });
}

}  // namespace hfp::sm90

#define HFP_INSTANTIATE(arch, dtype, head_dim)                                                \
  namespace hfp {                                                                             \
  void forward_##arch##_##dtype##_##head_dim(const AttentionParams& p, cudaStream_t stream) { \
    sm90::run_forward<sm90::dtype, head_dim>(p, stream);                                      \
  }                                                                                           \
  }
