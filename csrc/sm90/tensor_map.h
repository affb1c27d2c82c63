// Tensor maps, encoded on the host for one launch and passed to the kernel by value.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>

#include <stdexcept>
#include <string>

#include "launch.h"
#include "params.h"

namespace hfp::sm90 {

// (head_dim, rows, heads, batch) of a tensor, read in boxes of `box_rows` rows of one head, a panel of columns at a
// time. The driver's function is looked up at run time: linking libcuda would keep the library from loading without a
// GPU.
inline CUtensorMap tensor_map(const TensorView& t, int head_dim, int64_t rows, int heads, int batch, int panel,
                              int box_rows, bool is_bf16) {
  static const PFN_cuTensorMapEncodeTiled_v12000 encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
          "cuTensorMapEncodeTiled");
    if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("hf_flash_patch: the driver is older than 12.0");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  // The stride of a dimension of size 1 does not matter, but has to be one that the driver accepts.
  const auto stride = [](int64_t elements, int64_t size) { return size > 1 ? uint64_t(elements) * 2 : uint64_t{16}; };
  const cuuint64_t sizes[4] = {cuuint64_t(head_dim), cuuint64_t(rows), cuuint64_t(heads), cuuint64_t(batch)};
  const cuuint64_t strides[3] = {stride(t.row_stride, rows), stride(t.head_stride, heads),
                                 stride(t.batch_stride, batch)};
  const cuuint32_t box[4] = {cuuint32_t(panel), cuuint32_t(box_rows), 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  CUtensorMap map;
  const auto try_encode = [&] {
    return encode(&map, is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4, t.data, sizes,
                  strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                  panel == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult result = try_encode();
  if (result == CUDA_ERROR_INVALID_CONTEXT) {  // a thread that has not used the runtime yet, such as autograd's
    int device = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice");
    result = try_encode();
  }
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("hf_flash_patch: cuTensorMapEncodeTiled failed with " + std::to_string(result));
  }
  return map;
}

}  // namespace hfp::sm90
