// fastattn::gemv for CPU tensors.
#include <torch/csrc/stable/library.h>

#include "gemv.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

Tensor rows_of(const Tensor& x, int64_t k, ScalarType dtype) {
  STD_TORCH_CHECK(x.dim() == 2 && x.scalar_type() == dtype && x.size(1) == k, "gemv: x must be ",
                  dtype == ScalarType::Float ? "float32" : "bfloat16", " of two dimensions and ", k, " columns, got ",
                  torch::headeronly::toString(x.scalar_type()), " of ", x.dim());
  return k <= 1 || x.stride(1) == 1 ? x : fastattn::contiguous_copy(x);
}

// All tensors are bfloat16.
Tensor gemv_bf16(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  const fastattn::GemvArgs found = fastattn::gemv_args(weight, std::nullopt, std::nullopt);
  const int64_t n = found.n;
  STD_TORCH_CHECK(found.type == fastattn::WeightType::kBFloat16, "gemv: weight must be bfloat16, as x is");
  STD_TORCH_CHECK(!bias || (bias->is_cpu() && bias->dim() == 1 && bias->size(0) == n &&
                            bias->scalar_type() == ScalarType::BFloat16 && (n <= 1 || bias->stride(0) == 1)),
                  "gemv: bias must be contiguous bfloat16 of ", n, " elements");
  const Tensor rows = rows_of(x, found.k, ScalarType::BFloat16);
  const Tensor y = fastattn::empty_cpu({x.size(0), n}, ScalarType::BFloat16);
  fastattn::FewRowsArgs args{};
  args.x = static_cast<const uint16_t*>(fastattn::data_of(rows));
  args.weight = static_cast<const uint16_t*>(found.weight);
  args.bias = static_cast<const uint16_t*>(fastattn::data_or_null(bias));
  args.y = static_cast<uint16_t*>(y.mutable_data_ptr());
  args.m = x.size(0);
  args.n = args.y_row = n;
  args.k = found.k;
  args.x_row = args.m <= 1 ? args.k : rows.stride(0);
  args.weight_row = found.weight_row;
  fastattn::run_few_rows(args);
  return y;
}

Tensor gemv(const Tensor& x, const Tensor& weight, const OptionalTensor& scale, const OptionalTensor& bias) {
  if (x.scalar_type() == ScalarType::BFloat16) {
    STD_TORCH_CHECK(!scale, "gemv: scale must be given for int8 weights, and only for them");
    return gemv_bf16(x, weight, bias);
  }
  fastattn::GemvArgs args = fastattn::gemv_args(weight, scale, bias);
  const Tensor rows = rows_of(x, args.k, ScalarType::Float);
  const Tensor y = fastattn::empty_cpu({x.size(0), args.n}, ScalarType::Float);
  args.x = static_cast<const float*>(fastattn::data_of(rows));
  args.y = static_cast<float*>(y.mutable_data_ptr());
  args.m = x.size(0);
  args.x_row = args.m <= 1 ? args.k : rows.stride(0);
  args.y_row = args.n;
  fastattn::run_gemv(args);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("gemv.native", TORCH_BOX(&gemv));
}
