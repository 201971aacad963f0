#pragma once
// Converts the tensors of a linear layer to GemvArgs, for inputs with few rows.
#include <optional>

#include "check.h"

namespace fastattn {

inline WeightType weight_type(const Tensor& weight) {
  switch (weight.scalar_type()) {
    case ScalarType::Float:
      return WeightType::kFloat32;
    case ScalarType::BFloat16:
      return WeightType::kBFloat16;
    case ScalarType::Char:
      return WeightType::kInt8;
    default:
      STD_TORCH_CHECK(false, "gemv: weight must be float32, bfloat16 or int8, got ",
                      torch::headeronly::toString(weight.scalar_type()));
  }
}

// A contiguous fp32 vector of `size` elements, or null.
inline const float* gemv_vector(const std::optional<Tensor>& t, int64_t size, const char* name) {
  STD_TORCH_CHECK(!t || (t->is_cpu() && t->dim() == 1 && t->size(0) == size && t->scalar_type() == ScalarType::Float &&
                         (size <= 1 || t->stride(0) == 1)),
                  "gemv: ", name, " must be contiguous float32 of ", size, " elements");
  return static_cast<const float*>(data_or_null(t));
}

// Returns the weight of a linear layer with its scale and bias. The caller still has to set x, y and their numbers of
// rows.
inline GemvArgs gemv_args(const Tensor& weight, const std::optional<Tensor>& scale, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(weight.is_cpu(), "gemv: weight must be on the CPU");
  STD_TORCH_CHECK(weight.dim() == 2, "gemv: weight must have two dimensions, got ", weight.dim());
  GemvArgs args{};
  args.n = weight.size(0);
  args.k = weight.size(1);
  STD_TORCH_CHECK(weight.numel() == 0 || args.k <= 1 || weight.stride(1) == 1,
                  "gemv: weight must have last stride 1, got ", weight.stride(1));
  args.type = weight_type(weight);
  STD_TORCH_CHECK(scale.has_value() == (args.type == WeightType::kInt8),
                  "gemv: scale must be given for int8 weights, and only for them");
  args.weight = data_of(weight);
  args.weight_row = args.n <= 1 ? args.k : weight.stride(0);
  args.scale = gemv_vector(scale, args.n, "scale");
  args.bias = gemv_vector(bias, args.n, "bias");
  return args;
}

}  // namespace fastattn
