#pragma once
// Tensors of shape (batch, heads, seqlen, head_dim) in any memory order, and the vectors that go with them.
#include <algorithm>
#include <array>
#include <tuple>
#include <utility>

#include "check.h"

namespace fastattn {

template <typename T>
const T* vector_data(const OptionalTensor& t, ScalarType dtype, int64_t size, const char* name) {
  if (!t) {
    return nullptr;
  }
  STD_TORCH_CHECK(t->scalar_type() == dtype && t->numel() == size && t->is_contiguous(), name, " must be contiguous ",
                  torch::headeronly::toString(dtype), " of ", size, " elements, got ",
                  torch::headeronly::toString(t->scalar_type()), " of ", t->numel());
  return static_cast<const T*>(data_of(*t));
}

template <size_t N>
Tensor empty_strided(const Tensor& like, const std::array<int64_t, N>& sizes, const std::array<int64_t, N>& strides,
                     ScalarType dtype) {
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      N, sizes.data(), strides.data(), torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

// Returns an uninitialised tensor (batch, heads, seqlen, last) whose first three dimensions have the memory order of
// `like`. The fake implementation has the same layout.
inline Tensor empty_in_layout(const Tensor& like, int64_t last) {
  std::array<int, 3> order{0, 1, 2};
  if (like.stride(0) && like.stride(1) && like.stride(2)) {
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return like.stride(a) > like.stride(b); });
  }
  std::array<int64_t, 4> sizes{like.size(0), like.size(1), like.size(2), last}, strides{0, 0, 0, 1};
  int64_t stride = std::max<int64_t>(1, last);
  for (int n = 2; n >= 0; --n) {
    strides[order[n]] = stride;
    stride *= std::max<int64_t>(1, sizes[order[n]]);
  }
  return empty_strided(like, sizes, strides, like.scalar_type());
}

inline Tensor inner_contiguous(const Tensor& t) {
  return t.size(3) <= 1 || t.stride(3) == 1 ? t : contiguous_copy(t);
}

inline HeadTensor heads(const Tensor& t, bool packed = false) {
  return {const_cast<void*>(data_of(t)), packed ? 0 : t.stride(0), t.stride(1), t.stride(2)};
}

// Sets the ALiBi slopes: (n_heads) or (batch, n_heads), contiguous.
template <typename Args>
void set_alibi(Args& args, const OptionalTensor& slopes) {
  if (slopes) {
    args.alibi_batch = slopes->dim() == 2 ? args.n_heads : 0;
    args.alibi_slopes = vector_data<float>(slopes, ScalarType::Float,
                                           args.n_heads * (args.alibi_batch ? args.batch : 1), "alibi_slopes");
  }
}

}  // namespace fastattn
