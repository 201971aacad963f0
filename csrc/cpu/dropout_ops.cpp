// fastattn::dropout_fwd for CPU tensors.
#include <torch/csrc/stable/library.h>

#include "dispatch.h"
#include "dropout_call.h"
#include "host.h"

namespace {

using torch::stable::Tensor;

Tensor dropout_fwd(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& rng, double dropout_p) {
  const fastattn::DropoutCall call(x, residual, rng, dropout_p);
  const auto rows = FASTATTN_SELECT_CPU(dropout_fwd);
  fastattn::for_pieces(call.args.rows, call.args.cols,
                       [&](int64_t begin, int64_t end) { rows(call.args, begin, end); });
  return call.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("dropout_fwd.native", TORCH_BOX(&dropout_fwd));
  m.impl("dropout_fwd_native", TORCH_BOX(&dropout_fwd));
}
