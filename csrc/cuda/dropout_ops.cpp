// fastattn::dropout_fwd for CUDA tensors.
#include "host.h"  // must be first: it enables the CUDA declarations of the other headers

#include <torch/csrc/stable/library.h>

#include "dropout_call.h"

namespace {

using torch::stable::Tensor;

Tensor dropout_fwd(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& rng, double dropout_p) {
  const fastattn::DeviceGuard guard(x.get_device_index());
  fastattn::check_device(residual, x, "residual");
  fastattn::check_device(rng, x, "rng");
  const fastattn::DropoutCall call(x, residual, rng, dropout_p);
  fastattn::check_width(call.args.cols);
  if (call.args.rows * call.args.cols > 0) {
    fastattn::check_launch(fastattn::dropout_fwd_cuda(call.args, fastattn::current_stream(x)), "dropout_fwd");
  }
  return call.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("dropout_fwd.native", TORCH_BOX(&dropout_fwd));
  m.impl("dropout_fwd_native", TORCH_BOX(&dropout_fwd));
}
