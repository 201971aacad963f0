#pragma once
// Tensor maps for the copy engine, encoded on the host. cuTensorMapEncodeTiled of the driver API is looked up through
// the runtime, so nothing links to libcuda.
#include <array>

#include <cuda.h>
#include <cuda_runtime.h>

#include "api.h"
#include "cuda/sm90/swizzle.cuh"

namespace fastattn::sm90 {

// Encodes a map of a (batch, heads, rows, head_dim) tensor of 16-bit elements, in boxes of `box_rows` rows of a panel.
inline cudaError_t encode_map(CUtensorMap* map, DType dtype, const HeadTensor& t, int64_t batch, int64_t heads,
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
  // The stride of a dimension of size 1 is never used.
  const auto bytes = [&](int64_t size, int64_t stride) {
    return static_cast<cuuint64_t>(2 * (size <= 1 ? head_dim : stride));
  };
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(head_dim), static_cast<cuuint64_t>(rows),
                              static_cast<cuuint64_t>(heads), static_cast<cuuint64_t>(batch)};
  const cuuint64_t strides[] = {bytes(rows, t.row), bytes(heads, t.head), bytes(batch, t.batch)};
  const int cols = panel_cols(static_cast<int>(head_dim));
  const cuuint32_t box[] = {static_cast<cuuint32_t>(cols), static_cast<cuuint32_t>(box_rows), 1, 1};
  const cuuint32_t steps[] = {1, 1, 1, 1};
  const CUresult result =
      encode(map, dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
             t.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             cols == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Returns a map that this thread has encoded before with the same arguments, or encodes a new one. A map describes
// where memory is, not its content, so it is never stale.
inline cudaError_t make_map(CUtensorMap* map, DType dtype, const HeadTensor& t, int64_t batch, int64_t heads,
                            int64_t rows, int64_t head_dim, int box_rows) {
  using Key = std::array<int64_t, 10>;
  struct Entry {
    Key key{};  // matches no map, because no map has address 0
    CUtensorMap map;
  };
  constexpr int kBits = 6;
  static thread_local Entry entries[1 << kBits];
  const Key key{reinterpret_cast<int64_t>(t.data), t.batch, t.head, t.row, batch, heads, rows, head_dim, box_rows,
                static_cast<int64_t>(dtype)};
  uint64_t hash = 0;
  for (const int64_t word : key) {
    hash = (hash ^ static_cast<uint64_t>(word)) * 0x9e3779b97f4a7c15u;
    hash ^= hash >> 32;
  }
  Entry& entry = entries[hash >> (64 - kBits)];
  if (entry.key != key) {
    if (const cudaError_t error = encode_map(&entry.map, dtype, t, batch, heads, rows, head_dim, box_rows)) {
      entry.key = {};
      return error;
    }
    entry.key = key;
  }
  *map = entry.map;
  return cudaSuccess;
}

}  // namespace fastattn::sm90
