// fastattn::gemv for CPU tensors.
#include <torch/csrc/stable/library.h>

#include "gemv.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

Tensor gemv(const Tensor& x, const Tensor& weight, const OptionalTensor& scale, const OptionalTensor& bias) {
  fastattn::GemvArgs args = fastattn::gemv_args(weight, scale, bias);
  STD_TORCH_CHECK(x.dim() == 2 && x.scalar_type() == ScalarType::Float && x.size(1) == args.k,
                  "gemv: x must be float32 of two dimensions and ", args.k, " columns, got ",
                  torch::headeronly::toString(x.scalar_type()), " of ", x.dim());
  const Tensor rows = args.k <= 1 || x.stride(1) == 1 ? x : fastattn::contiguous_copy(x);
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
