// torch.ops.hf_flash_patch.cuda_[block_]forward and cuda_[block_]backward: tensors to params.h. The schemas, and what a
// caller is told of bad input, are in hf_flash_patch/ops; here only what would otherwise read out of bounds is checked
// again.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "dispatch.h"
#include "torch_shim.h"

namespace hfp {
namespace {

void require(bool ok, const char* what) {
  if (!ok) throw std::runtime_error(std::string("hf_flash_patch: ") + what);
}

Dtype dtype_of(const Tensor& t) {
  if (t.scalar_type() == ScalarType::BFloat16) return Dtype::bf16;
  require(t.scalar_type() == ScalarType::Half,
          "the compiled kernels take bfloat16 and float16; use backend=\"torch\" for others");
  return Dtype::fp16;
}

// (batch, seqlen, num_heads, head_dim), or (total, num_heads, head_dim) with batch stride 0.
TensorView view(const Tensor& t) {
  const int rows = static_cast<int>(t.dim()) - 3;
  require(t.stride(rows + 2) == 1 || t.size(rows + 2) == 1, "head_dim has to be contiguous");
  TensorView v;
  v.data = t.data_ptr();
  v.batch_stride = rows == 1 ? t.stride(0) : 0;
  v.row_stride = t.stride(rows);
  v.head_stride = t.stride(rows + 1);
  v.aligned = reinterpret_cast<uintptr_t>(v.data) % 16 == 0 && v.batch_stride % 8 == 0 && v.row_stride % 8 == 0 &&
              v.head_stride % 8 == 0;
  return v;
}

// Everything about a call but its tensors of numbers.
struct Call {
  OptionalTensor cu_seqlens_q, cu_seqlens_k;
  int64_t max_seqlen_q, max_seqlen_k;
  OptionalTensor seqused_k, key_range, key_bits, doc_range, alibi_slopes, rng_state;
  double softmax_scale;
  bool causal;
  int64_t window_left, window_right;
  double softcap, dropout_p;

  bool varlen() const { return cu_seqlens_q.has_value(); }
};

// A BlockMask's tensors, see hf_flash_patch/masks/block_mask.py.
struct ListTensors {
  Tensor row_offsets, row_entries, column_offsets, column_entries, tiles, tiles_t;
};

void check_i32(const OptionalTensor& t, int64_t numel, const char* what) {
  if (t) require(t->scalar_type() == ScalarType::Int && t->is_contiguous() && t->numel() == numel, what);
}

void fill(AttentionParams& p, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
          const Call& c) {
  const int rows = c.varlen() ? 0 : 1;
  require(q.dim() == rows + 3 && k.dim() == rows + 3 && v.dim() == rows + 3, "q, k and v have the wrong rank");
  p.batch = static_cast<int>(c.varlen() ? c.cu_seqlens_q->size(0) - 1 : q.size(0));
  p.num_heads = static_cast<int>(q.size(rows + 1));
  p.num_heads_k = static_cast<int>(k.size(rows + 1));
  p.head_dim = static_cast<int>(q.size(rows + 2));
  require(p.num_heads_k > 0 && p.num_heads > 0 && p.num_heads % p.num_heads_k == 0,
          "num_heads is no positive multiple of num_heads_k");
  require(k.size(rows + 2) == p.head_dim && v.size(rows + 2) == p.head_dim, "q, k and v differ in head_dim");
  require(v.size(rows) == k.size(rows) && v.size(rows + 1) == k.size(rows + 1), "k and v differ in shape");
  p.heads_per_group = p.num_heads / p.num_heads_k;
  p.rows_q = q.size(rows);
  p.rows_k = k.size(rows);
  p.q = view(q);
  p.k = view(k);
  p.v = view(v);
  p.out = view(out);
  p.lse = static_cast<float*>(lse.data_ptr());
  p.lse_head_stride = q.size(rows);
  p.lse_batch_stride = c.varlen() ? 0 : p.num_heads * p.lse_head_stride;

  MaskParams& m = p.mask;
  m.seqlen_q = static_cast<int>(c.varlen() ? c.max_seqlen_q : q.size(1));
  m.seqlen_k = static_cast<int>(c.varlen() ? c.max_seqlen_k : k.size(1));
  check_i32(c.cu_seqlens_q, p.batch + 1, "cu_seqlens_q has to be int32, contiguous, (batch + 1,)");
  check_i32(c.cu_seqlens_k, p.batch + 1, "cu_seqlens_k has to be int32, contiguous, (batch + 1,)");
  check_i32(c.seqused_k, p.batch, "seqused_k has to be int32, contiguous, (batch,)");
  check_i32(c.key_range, 2 * p.batch, "key_range has to be int32, contiguous, (batch, 2)");
  check_i32(c.key_bits, int64_t{p.batch} * ((m.seqlen_k + 31) / 32),
            "key_bits has to be int32, contiguous, (batch, ceil(seqlen_k / 32))");
  check_i32(c.doc_range, 2 * int64_t{p.batch} * m.seqlen_q,
            "doc_range has to be int32, contiguous, (batch, seqlen, 2)");
  require(!c.doc_range || m.seqlen_q == m.seqlen_k, "doc_range needs seqlen_q == seqlen_k");
  m.cu_seqlens_q = data_or_null<const int>(c.cu_seqlens_q);
  m.cu_seqlens_k = data_or_null<const int>(c.cu_seqlens_k);
  m.seqused_k = data_or_null<const int>(c.seqused_k);
  m.key_range = data_or_null<const int>(c.key_range);
  m.key_bits = data_or_null<const uint32_t>(c.key_bits);
  m.key_bits_stride = (m.seqlen_k + 31) / 32;
  m.doc_range = data_or_null<const int>(c.doc_range);
  // A window wider than any distance is none; this also keeps the kernel's sums of positions within 32 bits.
  const int64_t span = int64_t{m.seqlen_q} + m.seqlen_k;
  m.window_left = static_cast<int>(c.window_left >= span ? -1 : std::max<int64_t>(c.window_left, -1));
  m.window_right = static_cast<int>(c.window_right >= span ? -1 : std::max<int64_t>(c.window_right, -1));
  if (c.causal) m.window_right = 0;

  if (c.rng_state) {
    require(c.rng_state->scalar_type() == ScalarType::Long && c.rng_state->numel() == 2,
            "rng_state has to be int64, (2,)");
    p.dropout.rng_state = data_or_null<const int64_t>(c.rng_state);
    p.dropout.keep = static_cast<uint32_t>(std::floor((1.0 - c.dropout_p) * 256.0 + 0.5));
    p.dropout.rescale = p.dropout.keep ? 256.f / static_cast<float>(p.dropout.keep) : 0.f;
  }

  constexpr double kLog2e = 1.4426950408889634;
  p.softmax_scale = static_cast<float>(c.softmax_scale);
  p.softcap = static_cast<float>(c.softcap);
  if (c.alibi_slopes) {
    require(c.alibi_slopes->scalar_type() == ScalarType::Float && c.alibi_slopes->is_contiguous(),
            "alibi_slopes has to be fp32, contiguous");
    require(c.alibi_slopes->numel() == p.num_heads * (c.alibi_slopes->dim() == 2 ? p.batch : 1),
            "alibi_slopes has to be (num_heads,) or (batch, num_heads)");
    p.alibi_slopes = data_or_null<const float>(c.alibi_slopes);
    p.alibi_batch_stride = c.alibi_slopes->dim() == 2 ? p.num_heads : 0;
  }
  p.logit_scale = p.is_general() ? p.softmax_scale : 1.f;
  p.exp2_scale = static_cast<float>(p.is_general() ? kLog2e : c.softmax_scale * kLog2e);
}

void fill_lists(AttentionParams& p, const ListTensors& t) {
  for (const Tensor* x : {&t.row_offsets, &t.row_entries, &t.column_offsets, &t.column_entries, &t.tiles, &t.tiles_t}) {
    require(x->scalar_type() == ScalarType::Int && x->is_contiguous(), "block lists have to be int32, contiguous");
  }
  const auto blocks = [](int seqlen) { return (int64_t{seqlen} + kListBlock - 1) / kListBlock; };
  require(t.row_offsets.dim() == 3 && t.column_offsets.dim() == 3, "offsets have to be (batch, heads, blocks + 1)");
  const int64_t batch = t.row_offsets.size(0), heads = t.row_offsets.size(1);
  require(t.column_offsets.size(0) == batch && t.column_offsets.size(1) == heads, "offsets differ in batch or heads");
  require((batch == 1 || batch == p.batch) && heads > 0 && p.num_heads % heads == 0,
          "block lists are for another batch or number of heads");
  require(t.row_offsets.size(2) > blocks(p.mask.seqlen_q) && t.column_offsets.size(2) > blocks(p.mask.seqlen_k),
          "block lists are for shorter sequences");
  for (const Tensor* x : {&t.row_entries, &t.column_entries})
    require(x->dim() == 2 && x->size(1) == 2, "entries have to be (n, 2)");
  for (const Tensor* x : {&t.tiles, &t.tiles_t}) {
    require(x->dim() == 3 && x->size(1) == kListBlock && x->size(2) == kListBlock / 32,
            "tiles have to be (n, 128, 4): the compiled kernels read blocks of 128");
  }
  BlockLists& l = p.mask.lists;
  l.row_offsets = static_cast<const int*>(t.row_offsets.data_ptr());
  l.row_entries = static_cast<const BlockEntry*>(t.row_entries.data_ptr());
  l.column_offsets = static_cast<const int*>(t.column_offsets.data_ptr());
  l.column_entries = static_cast<const BlockEntry*>(t.column_entries.data_ptr());
  l.tiles = static_cast<const uint32_t*>(t.tiles.data_ptr());
  l.tiles_t = static_cast<const uint32_t*>(t.tiles_t.data_ptr());
  l.rows = static_cast<int>(t.row_offsets.size(2)) - 1;
  l.columns = static_cast<int>(t.column_offsets.size(2)) - 1;
  l.heads_per_list = p.num_heads / static_cast<int>(heads);
  l.lists_per_sequence = batch == 1 ? 0 : static_cast<int>(heads);
}

std::tuple<Tensor, Tensor> run_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Call& call,
                                       const ListTensors* lists) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const int rows = call.varlen() ? 0 : 1;
  const Dtype dtype = dtype_of(q);
  Tensor out = empty(q, q.sizes(), q.scalar_type());
  const int64_t lse_size[] = {q.size(0), q.size(rows + 1), q.size(rows)};  // variable length has no batch
  Tensor lse = empty(q, {lse_size + 1 - rows, size_t(2 + rows)}, ScalarType::Float);
  DecodeParams p;
  fill(p, q, k, v, out, lse, call);
  if (lists) fill_lists(p, *lists);
  if (p.batch == 0) return {out, lse};
  OptionalTensor scratch;
  if (const int64_t bytes = decode(p, dtype, nullptr)) {
    scratch = empty(q, {bytes}, ScalarType::Byte);
    p.scratch = scratch->data_ptr();
    decode(p, dtype, current_stream(q));
    return {out, lse};
  }
  if (p.mask.uneven()) {
    scratch = empty(q, {1}, ScalarType::Int);
    p.tile_counter = data_or_null<int>(scratch);
  }
  forward(p, dtype, current_stream(q));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> run_backward(Tensor dout, OptionalTensor dlse, const Tensor& q, const Tensor& k,
                                                const Tensor& v, const Tensor& out, const Tensor& lse, const Call& call,
                                                const ListTensors* lists, bool deterministic) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const Dtype dtype = dtype_of(q);
  const auto like = [](const Tensor& t) { return empty(t, t.sizes(), t.scalar_type()); };
  Tensor dq = like(q), dk = like(k), dv = like(v);
  if (dout.stride(dout.dim() - 1) != 1) dout = torch::stable::contiguous(dout);
  if (dlse && !dlse->is_contiguous()) dlse = torch::stable::contiguous(*dlse);

  BackwardParams p;
  fill(p, q, k, v, out, lse, call);
  if (lists) fill_lists(p, *lists);
  if (p.batch == 0) return {dq, dk, dv};
  p.dout = view(dout);
  p.dq = view(dq);
  p.dk = view(dk);
  p.dv = view(dv);
  p.dlse = data_or_null<const float>(dlse);

  p.deterministic = deterministic;
  // At least a byte: an empty tensor has no address, which would ask for the size once more.
  Tensor scratch = empty(q, {std::max<int64_t>(backward(p, dtype, nullptr), 1)}, ScalarType::Byte);
  p.scratch = scratch.data_ptr();
  backward(p, dtype, current_stream(q));
  return {dq, dk, dv};
}

std::tuple<Tensor, Tensor> cuda_forward(Tensor q, Tensor k, Tensor v, OptionalTensor cu_seqlens_q,
                                        OptionalTensor cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                                        OptionalTensor seqused_k, OptionalTensor key_range, OptionalTensor key_bits,
                                        OptionalTensor doc_range, OptionalTensor alibi_slopes, OptionalTensor rng_state,
                                        double softmax_scale, bool causal, int64_t window_left, int64_t window_right,
                                        double softcap, double dropout_p) {
  const Call call{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k,     key_range,
                  key_bits,     doc_range,    alibi_slopes, rng_state,    softmax_scale, causal,
                  window_left,  window_right, softcap,      dropout_p};
  return run_forward(q, k, v, call, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> cuda_backward(
    Tensor dout, OptionalTensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, OptionalTensor cu_seqlens_q,
    OptionalTensor cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k, OptionalTensor seqused_k,
    OptionalTensor key_range, OptionalTensor key_bits, OptionalTensor doc_range, OptionalTensor alibi_slopes,
    OptionalTensor rng_state, double softmax_scale, bool causal, int64_t window_left, int64_t window_right,
    double softcap, double dropout_p, bool deterministic) {
  const Call call{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k,     key_range,
                  key_bits,     doc_range,    alibi_slopes, rng_state,    softmax_scale, causal,
                  window_left,  window_right, softcap,      dropout_p};
  return run_backward(dout, dlse, q, k, v, out, lse, call, nullptr, deterministic);
}

// The same under block lists. Operators of their own: six more arguments would cost every call a microsecond.
std::tuple<Tensor, Tensor> cuda_block_forward(
    Tensor q, Tensor k, Tensor v, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, int64_t max_seqlen_q,
    int64_t max_seqlen_k, OptionalTensor seqused_k, OptionalTensor key_range, OptionalTensor key_bits,
    OptionalTensor doc_range, OptionalTensor alibi_slopes, OptionalTensor rng_state, Tensor row_offsets,
    Tensor row_entries, Tensor column_offsets, Tensor column_entries, Tensor tiles, Tensor tiles_t,
    double softmax_scale, bool causal, int64_t window_left, int64_t window_right, double softcap, double dropout_p) {
  const Call call{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k,     key_range,
                  key_bits,     doc_range,    alibi_slopes, rng_state,    softmax_scale, causal,
                  window_left,  window_right, softcap,      dropout_p};
  const ListTensors lists{row_offsets, row_entries, column_offsets, column_entries, tiles, tiles_t};
  return run_forward(q, k, v, call, &lists);
}

std::tuple<Tensor, Tensor, Tensor> cuda_block_backward(
    Tensor dout, OptionalTensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, OptionalTensor cu_seqlens_q,
    OptionalTensor cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k, OptionalTensor seqused_k,
    OptionalTensor key_range, OptionalTensor key_bits, OptionalTensor doc_range, OptionalTensor alibi_slopes,
    OptionalTensor rng_state, Tensor row_offsets, Tensor row_entries, Tensor column_offsets, Tensor column_entries,
    Tensor tiles, Tensor tiles_t, double softmax_scale, bool causal, int64_t window_left, int64_t window_right,
    double softcap, double dropout_p, bool deterministic) {
  const Call call{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k,     key_range,
                  key_bits,     doc_range,    alibi_slopes, rng_state,    softmax_scale, causal,
                  window_left,  window_right, softcap,      dropout_p};
  const ListTensors lists{row_offsets, row_entries, column_offsets, column_entries, tiles, tiles_t};
  return run_backward(dout, dlse, q, k, v, out, lse, call, &lists, deterministic);
}

std::string cuda_instances() { return compiled_instances(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hf_flash_patch, CUDA, m) {
  m.impl("cuda_forward", TORCH_BOX(&cuda_forward));
  m.impl("cuda_backward", TORCH_BOX(&cuda_backward));
  m.impl("cuda_block_forward", TORCH_BOX(&cuda_block_forward));
  m.impl("cuda_block_backward", TORCH_BOX(&cuda_block_backward));
}
STABLE_TORCH_LIBRARY_IMPL(hf_flash_patch, CompositeExplicitAutograd, m) {
  m.impl("cuda_instances", TORCH_BOX(&cuda_instances));
}

}  // namespace hfp
