#pragma once
// Shared by all op wrappers: checks with the values in their messages, and the conversion of tensors to plain pointers.
// The public functions check arguments in Python; these checks protect raw ops that are called directly.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "api.h"

namespace fastattn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

#define CHECK_SHAPE(condition, op, what, ...) STD_TORCH_CHECK(condition, op ": ", what, ##__VA_ARGS__)

inline DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16, got ",
                      torch::headeronly::toString(tensor.scalar_type()));
  }
}

// Raises if a tensor with elements has no memory.
inline void check_storage(const Tensor& tensor, const void* data) {
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  STD_TORCH_CHECK((data && bytes) || tensor.numel() == 0, "a tensor of ", tensor.numel(),
                  " elements has no memory: its storage was freed or never allocated");
}

// Returns the memory of an operand. The kernels read a null pointer as "no such operand", so a tensor whose storage was
// freed (FSDP resizes it to 0) must not get there. A view of a freed storage points to its own offset from null.
inline const void* data_of(const Tensor& tensor) {
  // No offset is larger than this, and real addresses below it are rare.
  constexpr uintptr_t kOffsets = uintptr_t{1} << 40;
  const void* data = tensor.const_data_ptr();
  if (reinterpret_cast<uintptr_t>(data) < kOffsets) {
    check_storage(tensor, data);
  }
  return data;
}

// A contiguous copy of an operand. torch's own copies do not check the memory.
inline Tensor contiguous_copy(const Tensor& tensor) {
  data_of(tensor);
  return torch::stable::contiguous(tensor);
}

inline OptionalTensor contiguous(const OptionalTensor& t) {
  return t && !t->is_contiguous() ? OptionalTensor(contiguous_copy(*t)) : t;
}

inline const void* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? data_of(*tensor) : nullptr;
}

// Dropout with a state of two int64 at `rng`, which may be null. threshold and scale are defined as in
// reference.dropout_threshold and reference.dropout_scale.
inline Dropout dropout_at(const int64_t* rng, double dropout_p) {
  Dropout dropout{nullptr, 0, 1.f};
  STD_TORCH_CHECK(dropout_p >= 0 && dropout_p <= 1, "dropout_p must be between 0 and 1, got ", dropout_p);
  const uint32_t threshold = static_cast<uint32_t>(std::nearbyint(dropout_p * 65536));
  if (rng && threshold > 0) {
    dropout.rng = rng;
    dropout.threshold = threshold;
    const uint32_t kept = 65536 - threshold;
    dropout.scale = kept ? 65536.f / static_cast<float>(kept) : 0.f;
  }
  return dropout;
}

inline Dropout dropout_args(const std::optional<Tensor>& rng, double dropout_p) {
  const Dropout dropout = dropout_at(rng ? static_cast<const int64_t*>(data_of(*rng)) : nullptr, dropout_p);
  STD_TORCH_CHECK(!dropout.rng || (rng->scalar_type() == ScalarType::Long && rng->numel() == 2 && rng->is_contiguous()),
                  "rng must be contiguous int64 (2,), got ", rng ? rng->numel() : 0, " elements");
  return dropout;
}

// A tensor (..., cols) viewed as rows at a fixed stride, with inner stride 1.
struct Rows {
  Tensor tensor;  // the tensor, or a contiguous copy if its strides do not collapse
  int64_t rows;
  int64_t cols;
  int64_t stride;
};

inline Rows as_rows(const Tensor& tensor) {
  const int64_t dims = tensor.dim();
  STD_TORCH_CHECK(dims >= 1, "expected at least one dimension, got 0");
  const int64_t cols = tensor.size(dims - 1);
  int64_t rows = 1;
  int64_t stride = 0;  // between rows; 0 if there is at most one row
  bool collapses = cols <= 1 || tensor.stride(dims - 1) == 1;
  for (int64_t d = dims - 2; d >= 0; --d) {
    const int64_t size = tensor.size(d);
    if (size != 1) {
      collapses = collapses && (rows == 1 || tensor.stride(d) == stride * rows);
      stride = rows == 1 ? tensor.stride(d) : stride;
    }
    rows *= size;
  }
  if (rows == 0 || cols == 0 || collapses) {
    return {tensor, rows, cols, stride};
  }
  return {contiguous_copy(tensor), rows, cols, cols};
}

// as_rows of an operand with the shape of `like`. Without a tensor, the data must not be used.
inline Rows as_rows_like(const std::optional<Tensor>& tensor, const Tensor& like, const char* name) {
  if (!tensor) {
    return {like, 0, 0, 0};
  }
  const auto sizes = tensor->sizes();
  const auto wanted = like.sizes();
  STD_TORCH_CHECK(sizes.size() == wanted.size() && std::equal(sizes.begin(), sizes.end(), wanted.begin()), name,
                  " must have ", like.numel(), " elements in the shape of the first operand, got ", tensor->numel());
  return as_rows(*tensor);
}

// Returns an uninitialised contiguous tensor. torch::stable::empty would call the dispatcher.
inline Tensor empty_on(int32_t device_type, int32_t device_index, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                       ScalarType dtype) {
  constexpr size_t kMaxDims = 64;
  const size_t dims = sizes.size();
  STD_TORCH_CHECK(dims <= kMaxDims, "at most ", kMaxDims, " dimensions, got ", dims);
  int64_t strides[kMaxDims];
  int64_t stride = 1;
  for (size_t d = dims; d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(1, sizes[d]);
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(dims), sizes.data(), strides,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type, device_index, &handle));
  return Tensor(handle);
}

// The device of `like`, looked up once for several tensors.
struct Place {
  int32_t device_type = 0, device_index;

  explicit Place(const Tensor& like) : device_index(like.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  }
  Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) const {
    return empty_on(device_type, device_index, sizes, dtype);
  }
};

// Returns an uninitialised contiguous tensor on the device of `like`.
inline Tensor empty_beside(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  return Place(like).empty(sizes, dtype);
}

inline void check_device(const std::optional<Tensor>& tensor, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(!tensor || tensor->device() == like.device(), name, " must be on the device of the first operand, ",
                  like.get_device_index(), ", got device ", tensor->get_device_index());
}

}  // namespace fastattn
