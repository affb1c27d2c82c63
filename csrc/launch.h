// The only place that launches a kernel.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <stdexcept>
#include <string>

namespace hfp {

struct Launch {
  const char* name;
  int64_t blocks;
  int threads;
  int shared_bytes;
  cudaStream_t stream;
  bool starts_early = false;  // may start before the kernel in front of it has ended, and waits for it itself
};

inline void check(cudaError_t status, const char* name) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("hf_flash_patch: ") + name + ": " + cudaGetErrorString(status));
}

// Nothing is launched for zero blocks.
template <auto kKernel, class... Params>
void launch(const Launch& l, const Params&... params) {
  if (l.blocks == 0) return;
  if (l.blocks > 0x7fffffff)
    throw std::runtime_error(std::string("hf_flash_patch: ") + l.name + ": more than 2^31 - 1 tiles");
  if (l.shared_bytes > 48 * 1024) {  // once a device: the call costs about a microsecond
    static std::atomic<uint64_t> allowed{0};
    int device = 0;
    check(cudaGetDevice(&device), l.name);
    const uint64_t bit = uint64_t{1} << (device & 63);
    if (!(allowed.load(std::memory_order_relaxed) & bit)) {
      check(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, l.shared_bytes), l.name);
      allowed.fetch_or(bit, std::memory_order_relaxed);
    }
  }
  cudaLaunchAttribute early{.id = cudaLaunchAttributeProgrammaticStreamSerialization};
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{.gridDim = static_cast<unsigned>(l.blocks),
                            .blockDim = static_cast<unsigned>(l.threads),
                            .dynamicSmemBytes = static_cast<size_t>(l.shared_bytes),
                            .stream = l.stream,
                            .attrs = &early,
                            .numAttrs = l.starts_early ? 1u : 0u};
  check(cudaLaunchKernelEx(&config, kKernel, params...), l.name);
}

}  // namespace hfp
