#include "dispatch.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <stdexcept>

namespace hfp {
namespace {

enum class Arch { sm80, sm86, sm90 };
enum class Direction { forward, decode, backward };

template <Direction>
struct RunOf {
  using type = void(const AttentionParams&, cudaStream_t);
};
template <>
struct RunOf<Direction::decode> {
  using type = int64_t(const DecodeParams&, cudaStream_t);  // see dispatch.h
};
template <>
struct RunOf<Direction::backward> {
  using type = int64_t(const BackwardParams&, cudaStream_t);  // see dispatch.h
};
template <Direction kDirection>
using Run = typename RunOf<kDirection>::type;

}  // namespace

#define HFP_INSTANCE(arch, direction, dtype, head_dim) \
  Run<Direction::direction> direction##_##arch##_##dtype##_##head_dim;
#include "instances_built.h"
#undef HFP_INSTANCE

namespace {

struct Instance {
  Arch arch;
  Direction direction;
  Dtype dtype;
  int head_dim;
  Run<Direction::forward>* forward;
  Run<Direction::decode>* decode;
  Run<Direction::backward>* backward;
  const char* name;
};

template <Direction kDirection>
constexpr Instance instance(Arch arch, Dtype dtype, int head_dim, Run<kDirection>* run, const char* name) {
  if constexpr (kDirection == Direction::forward) {
    return {arch, kDirection, dtype, head_dim, run, nullptr, nullptr, name};
  } else if constexpr (kDirection == Direction::decode) {
    return {arch, kDirection, dtype, head_dim, nullptr, run, nullptr, name};
  } else {
    return {arch, kDirection, dtype, head_dim, nullptr, nullptr, run, name};
  }
}

const Instance kInstances[] = {
#define HFP_INSTANCE(arch, direction, dtype, head_dim)                                                          \
  instance<Direction::direction>(Arch::arch, Dtype::dtype, head_dim, direction##_##arch##_##dtype##_##head_dim, \
                                 #arch " " #direction " " #dtype " " #head_dim),
#include "instances_built.h"
#undef HFP_INSTANCE
};

struct Device {
  std::atomic<int> capability = 0;  // 10 * major + minor
  int shared_bytes = 0;             // of a block
  int multiprocessors = 0;
};

const Device& current_device() {
  static std::array<Device, 64> cache;
  int index = 0;
  cudaGetDevice(&index);
  Device& d = cache[index & 63];
  if (d.capability == 0) {  // racing threads write the same values, this one last
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&d.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
    cudaDeviceGetAttribute(&d.multiprocessors, cudaDevAttrMultiProcessorCount, index);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
    d.capability = 10 * major + minor;
  }
  return d;
}

// Whether the tensor memory accelerator can read a tensor.
bool has_tensor_map(const TensorView& t) {
  return t.aligned && t.row_stride > 0 && t.head_stride > 0 && t.batch_stride >= 0;
}

// Whether an architecture's kernels take these tensors as they lie.
bool takes(Arch arch, const AttentionParams& p) {
  if (arch != Arch::sm90) return true;
  // Results are contiguous: their rows start on 16 bytes too if head_dim is a multiple of 8.
  return p.head_dim % 8 == 0 && p.rows_q > 0 && p.rows_k > 0 && has_tensor_map(p.q) && has_tensor_map(p.k) &&
         has_tensor_map(p.v);
}
bool takes(Arch arch, const BackwardParams& p) {
  if (arch != Arch::sm90) return true;
  return takes(arch, static_cast<const AttentionParams&>(p)) && has_tensor_map(p.dout);
}

// Preferred architectures of a device, best first. HFP_ARCH names one to force it, for tests.
bool serves(Arch arch, const Device& d) {
  static const char* forced = std::getenv("HFP_ARCH");
  static const char* names[] = {"sm80", "sm86", "sm90"};
  if (forced && *forced) return std::strcmp(forced, names[static_cast<int>(arch)]) == 0;
  switch (arch) {
    case Arch::sm80:
      return d.capability >= 80;
    case Arch::sm86:
      return d.capability >= 80 && d.shared_bytes < 160 * 1024;
    case Arch::sm90:
      return d.capability == 90;
  }
  return false;
}

// What an instance costs: its padded head_dim, twice as much without wgmma. Among equals the architecture nearest to
// the device wins.
int cost(const Instance& i) { return i.head_dim * (i.arch == Arch::sm90 ? 1 : 2); }

// Null if nothing compiled serves the call.
template <class Params>
const Instance* look_up(Direction direction, Dtype dtype, const Params& p) {
  const int head_dim = p.head_dim;
  const Device& device = current_device();
  const Instance* best = nullptr;
  for (const Instance& i : kInstances) {
    if (i.direction != direction || i.dtype != dtype || i.head_dim < head_dim) continue;
    if (!serves(i.arch, device) || !takes(i.arch, p)) continue;
    if (!best || cost(i) < cost(*best) || (cost(i) == cost(*best) && i.arch > best->arch)) best = &i;
  }
  return best;
}

template <class Params>
const Instance& find(Direction direction, Dtype dtype, const Params& p) {
  if (const Instance* found = look_up(direction, dtype, p)) return *found;
  const Device& device = current_device();
  throw std::runtime_error(
      "hf_flash_patch: no compiled " + std::string(direction == Direction::forward ? "forward" : "backward") +
      " kernel for head_dim " + std::to_string(p.head_dim) + ", " + (dtype == Dtype::bf16 ? "bfloat16" : "float16") +
      ", compute capability " + std::to_string(device.capability / 10) + "." + std::to_string(device.capability % 10) +
      "; compiled are: " + compiled_instances() + ". Use backend=\"torch\" or rebuild with that instance.");
}

// Null if the call is for forward.
const Instance* decoder(const DecodeParams& p, Dtype dtype) {
  const MaskParams& m = p.mask;
  if (m.seqlen_q > kDecodeRows || m.seqlen_k < 256 || p.dropout.rng_state || m.lists.row_offsets) return nullptr;
  if (!p.few_rows()) {
    // Measured: forward takes as long for its tiles on each multiprocessor as decode for 0.7 of its own.
    const int64_t all = current_device().multiprocessors;
    if (m.seqlen_k < 1024 || p.tiles() > 0.7 * all * ((int64_t{p.batch} * p.num_heads + all - 1) / all)) return nullptr;
  }
  return look_up(Direction::decode, dtype, p);
}

}  // namespace

void forward(const AttentionParams& p, Dtype dtype, cudaStream_t stream) {
  find(Direction::forward, dtype, p).forward(p, stream);
}

int64_t decode(const DecodeParams& params, Dtype dtype, cudaStream_t stream) {
  const Instance* found = decoder(params, dtype);
  if (!found) return 0;
  const Device& device = current_device();
  DecodeParams p = params;
  constexpr int kReserved = 1024;  // of a block, by CUDA
  // Few rows are done sooner by one large thread block a multiprocessor, with half as many pieces to put together; of
  // those of head_dim 256, which have two warps, it takes two to keep memory busy, and of those with many rows the
  // tensor cores, unless there is little to do.
  const bool large = p.few_rows() && found->head_dim <= 128;
  const bool little = !p.few_rows() && p.tiles() * p.mask.seqlen_k <= int64_t{512} * device.multiprocessors;
  const int fit = !large && (device.shared_bytes + kReserved) / (kDecodeBytes + kReserved) > 1 ? 2 : 1;
  p.blocks = device.multiprocessors * (little ? 1 : fit);
  p.shared_bytes = (device.shared_bytes + kReserved) / fit - kReserved;
  p.starts_early = device.capability >= 90;
  return found->decode(p, stream);
}

int64_t backward(const BackwardParams& p, Dtype dtype, cudaStream_t stream) {
  return find(Direction::backward, dtype, p).backward(p, stream);
}

std::string compiled_instances() {
  std::string all;
  for (const Instance& i : kInstances) all += (all.empty() ? "" : "; ") + std::string(i.name);
  return all;
}

}  // namespace hfp
