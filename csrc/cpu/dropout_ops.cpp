// fastattn::dropout_fwd for CPU tensors.
#include <torch/csrc/stable/library.h>

#include "dropout_call.h"
#include "dropout_run.h"

namespace {

using torch::stable::Tensor;

Tensor dropout_fwd(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& rng, double dropout_p) {
  const fastattn::DropoutCall call(x, residual, rng, dropout_p);
  fastattn::run_dropout(call.args);
  return call.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("dropout_fwd.native", TORCH_BOX(&dropout_fwd));
  m.impl("dropout_fwd_native", TORCH_BOX(&dropout_fwd));
}
