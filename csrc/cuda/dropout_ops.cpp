// fastattn::dropout_fwd for CUDA tensors.
#include "host.h"  // before every other header: it switches on what they declare for CUDA

#include <torch/csrc/stable/library.h>

namespace {

using fastattn::dtype_of;
using fastattn::Rows;
using torch::stable::Tensor;

Tensor dropout_fwd(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& rng, double dropout_p) {
  const fastattn::DeviceGuard guard(x.get_device_index());
  const Rows in = fastattn::as_rows(x);
  const Rows added = fastattn::as_rows_like(residual, x, "residual");
  fastattn::check_device(residual, x, "residual");
  fastattn::check_device(rng, x, "rng");
  fastattn::check_width(in.cols);
  const Tensor out = fastattn::empty_beside(x, x.sizes(), (residual ? *residual : x).scalar_type());

  fastattn::DropoutArgs args{};
  args.x = in.tensor.const_data_ptr();
  args.residual = residual ? added.tensor.const_data_ptr() : nullptr;
  args.out = out.mutable_data_ptr();
  args.rows = in.rows;
  args.cols = in.cols;
  args.x_stride = in.stride;
  args.residual_stride = added.stride;
  args.x_dtype = dtype_of(x, "x");
  args.out_dtype = residual ? dtype_of(*residual, "residual") : args.x_dtype;
  args.dropout = fastattn::dropout_args(rng, dropout_p);
  if (in.rows * in.cols > 0) {
    fastattn::check_launch(fastattn::dropout_fwd_cuda(args, fastattn::current_stream(x)), "dropout_fwd");
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("dropout_fwd.native", TORCH_BOX(&dropout_fwd));
}
