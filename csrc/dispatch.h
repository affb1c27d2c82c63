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

// Forward of few queries against many keys, where that is what a call is.
struct Decoding {
  int blocks = 0;    // DecodeParams::blocks; 0: the call is for forward
  int64_t rows = 0;  // rows of scratch
  int head_dim = 0;  // that they are padded to
  bool starts_early = false;
};
Decoding decoding(const AttentionParams& p, Dtype dtype);
void decode(const DecodeParams& p, Dtype dtype, cudaStream_t stream);

// The head_dim that backward's dQ scratch is padded to.
int backward_head_dim(const AttentionParams& p, Dtype dtype);

// "sm80 forward bf16 64; ..." of everything compiled.
std::string compiled_instances();

}  // namespace hfp
