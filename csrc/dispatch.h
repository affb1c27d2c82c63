// From run-time values to one compiled instance: the sole source of "not compiled".
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "params.h"

namespace hfp {

enum class Dtype { bf16, fp16 };

// Run on the current device. Throw std::runtime_error if nothing compiled serves the device or head_dim.
void forward(const AttentionParams& p, Dtype dtype, cudaStream_t stream);
void backward(const BackwardParams& p, Dtype dtype, cudaStream_t stream);

// The head_dim that backward's dQ scratch is padded to.
int backward_head_dim(const AttentionParams& p, Dtype dtype);

// "sm80 forward bf16 64; ..." of everything compiled.
std::string compiled_instances();

}  // namespace hfp
