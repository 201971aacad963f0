#pragma once
// Which tensors the Hopper kernels read directly: those of supported sizes that the copy engine can read. Host code.
#include "host.h"

namespace fastattn {

// For tensors of 16-bit elements. True if the tensor is 16-byte aligned, has no expanded dimension, and all strides are
// multiples of 16 bytes and below 2^40 bytes.
inline bool is_mappable(const Tensor& t) {
  bool fits = t.stride(3) == 1 && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int64_t d = 0; d < 3; ++d) {
    fits = fits && (t.size(d) <= 1 || (t.stride(d) > 0 && t.stride(d) % 8 == 0 && t.stride(d) < int64_t{1} << 39));
  }
  return fits;
}

// Returns the tensor itself if the copy engine can read it, otherwise a contiguous copy.
inline Tensor mappable(const Tensor& t) {
  if (is_mappable(t)) {
    return t;
  }
  data_of(t);  // raises if the storage was freed
  const Tensor copy = empty_beside(t, t.sizes(), t.scalar_type());
  torch::stable::copy_(const_cast<Tensor&>(copy), t);
  return copy;
}

inline void check_tiles(const char* op, DType dtype, int64_t head_dim, int64_t head_dim_v) {
  bool has_tiles = false;
  for (const int64_t size : {64, 96, 128, 192, 256}) {
    has_tiles = has_tiles || head_dim == size;
  }
  STD_TORCH_CHECK(dtype != DType::kFloat32 && has_tiles && head_dim_v == head_dim, op,
                  ": the CUDA kernel supports half precision and head dims 64, 96, 128, 192 and 256, got ", head_dim,
                  " and ", head_dim_v);
}

}  // namespace fastattn
