#pragma once
// The optional tensors and the checks of attention, for the wrappers of every device.
#include "head_tensors.h"

namespace fastattn {

using OptionalTensor = std::optional<Tensor>;

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
