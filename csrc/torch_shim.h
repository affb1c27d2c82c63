// What this project needs of torch, on its stable ABI: one binary serves every torch from 2.10 on and every Python
// from 3.10.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <vector>

// Lives in the CUDA half of torch. Weak, so that the extension also loads, and lists what it holds, under a CPU torch.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace hfp {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using IntArray = torch::headeronly::IntHeaderOnlyArrayRef;
using OptionalTensor = std::optional<Tensor>;

inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Uninitialised and contiguous, on the device of `like`. torch::stable::new_empty goes through the dispatcher, which
// looks the operator up by name: a microsecond more.
inline Tensor empty(const Tensor& like, IntArray size, ScalarType dtype) {
  std::vector<int64_t> stride(size.size(), 1);
  for (size_t i = size.size(); i-- > 1;) stride[i - 1] = stride[i] * std::max<int64_t>(size[i], 1);
  const auto dtype_code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(size.size(), size.data(), stride.data(), dtype_code, device_type,
                                                  like.get_device_index(), &handle));
  return Tensor(handle);
}

template <typename T>
T* data_or_null(const OptionalTensor& t) {
  return t ? static_cast<T*>(t->data_ptr()) : nullptr;
}

}  // namespace hfp
