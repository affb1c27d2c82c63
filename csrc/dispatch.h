// From run-time values to one compiled instance: the sole source of "not compiled".
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "params.h"

namespace hfp {

enum class Dtype { bf16, fp16 };

// Run on the current device. Throw std::runtime_error if nothing compiled serves the device or head_dim.
void forward(const AttentionParams& p, Dtype dtype, cudaStream_t stream);
// Forward of few queries against many keys. Returns the bytes of scratch that it needs, 0 where the call is for
// forward; without p.scratch that is all it does.
int64_t decode(const DecodeParams& p, Dtype dtype, cudaStream_t stream);
// Returns the bytes of scratch that it needs; without p.scratch that is all it does.
int64_t backward(const BackwardParams& p, Dtype dtype, cudaStream_t stream);

// "sm80 forward bf16 64; ..." of everything compiled.
std::string compiled_instances();

}  // namespace hfp
