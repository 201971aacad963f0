#pragma once
// Tensor maps for the copy engine, made on the host. Driver API: cuTensorMapEncodeTiled, found through the runtime, so
// that nothing links against libcuda.
#include <cuda.h>
#include <cuda_runtime.h>

#include "api.h"

namespace fastattn::sm90 {

// A map of a (batch, heads, rows, head_dim) tensor of 16-bit elements, in boxes of 64 columns and `box_rows` rows.
inline cudaError_t make_map(CUtensorMap* map, DType dtype, const HeadTensor& t, int64_t batch, int64_t heads,
                            int64_t rows, int64_t head_dim, int box_rows) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found == cudaDriverEntryPointSuccess ? function
                                                                                                    : nullptr);
  }();
  if (encode == nullptr) {
    return cudaErrorCallRequiresNewerDriver;
  }
  const auto bytes = [&](int64_t size, int64_t stride) {  // the stride of a dimension of size 1 is never used
    return static_cast<cuuint64_t>(2 * (size <= 1 ? head_dim : stride));
  };
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(head_dim), static_cast<cuuint64_t>(rows),
                              static_cast<cuuint64_t>(heads), static_cast<cuuint64_t>(batch)};
  const cuuint64_t strides[] = {bytes(rows, t.row), bytes(heads, t.head), bytes(batch, t.batch)};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(box_rows), 1, 1};
  const cuuint32_t steps[] = {1, 1, 1, 1};
  const CUresult result =
      encode(map, dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
             t.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace fastattn::sm90
