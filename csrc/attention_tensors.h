#pragma once
// The tensors of attention, (batch, heads, seqlen, head_dim) in any nesting, as the wrappers of every device need them.
#include <algorithm>
#include <array>

#include "check.h"

namespace fastattn {

using OptionalTensor = std::optional<Tensor>;

template <size_t N>
Tensor empty_strided(const Tensor& like, const std::array<int64_t, N>& sizes, const std::array<int64_t, N>& strides,
                     ScalarType dtype) {
  int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      N, sizes.data(), strides.data(), torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

// (batch, heads, seqlen, last), its first three dimensions nested as those of `like`; the fake does the same.
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
  return t.size(3) <= 1 || t.stride(3) == 1 ? t : torch::stable::contiguous(t);
}

inline HeadTensor heads(const Tensor& t, bool packed = false) {
  return {const_cast<void*>(t.const_data_ptr()), packed ? 0 : t.stride(0), t.stride(1), t.stride(2)};
}

inline OptionalTensor contiguous(const OptionalTensor& t) {
  return t && !t->is_contiguous() ? OptionalTensor(torch::stable::contiguous(*t)) : t;
}

template <typename T>
const T* vector_data(const OptionalTensor& t, ScalarType dtype, int64_t size, const char* name) {
  if (!t) {
    return nullptr;
  }
  STD_TORCH_CHECK(t->scalar_type() == dtype && t->numel() == size && t->is_contiguous(), name, " must be contiguous ",
                  torch::headeronly::toString(dtype), " of ", size, " elements, got ",
                  torch::headeronly::toString(t->scalar_type()), " of ", t->numel());
  return static_cast<const T*>(t->const_data_ptr());
}

// Sizes that fit each other; the public function says it better.
inline void check_qkv(const Tensor& q, const Tensor& k, const Tensor& v) {
  for (const Tensor* t : {&q, &k, &v}) {
    STD_TORCH_CHECK(t->dim() == 4, "attention: q, k and v must have 4 dimensions, got ", t->dim());
    STD_TORCH_CHECK(t->scalar_type() == q.scalar_type(), "attention: q, k and v must have one dtype");
  }
  STD_TORCH_CHECK(k.size(0) == q.size(0) && v.size(0) == q.size(0) && v.size(1) == k.size(1) &&
                      v.size(2) == k.size(2) && k.size(3) == q.size(3),
                  "attention: q, k and v do not fit each other");
  STD_TORCH_CHECK(q.size(1) == k.size(1) || (k.size(1) && q.size(1) % k.size(1) == 0),
                  "attention: the heads of q must be a multiple of those of k, got ", q.size(1), " and ", k.size(1));
}

}  // namespace fastattn
