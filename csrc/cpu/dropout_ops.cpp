// fastattn::dropout_fwd for CPU tensors.
#include <torch/csrc/stable/library.h>

#include "dispatch.h"
#include "host.h"

namespace {

using fastattn::dtype_of;
using fastattn::Rows;
using torch::stable::Tensor;

Tensor dropout_fwd(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& rng, double dropout_p) {
  const Rows in = fastattn::as_rows(x);
  const Rows added = fastattn::as_rows_like(residual, x, "residual");
  const Tensor out = fastattn::empty_cpu(x.sizes(), (residual ? *residual : x).scalar_type());

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
  const auto rows = FASTATTN_SELECT_CPU(dropout_fwd);
  fastattn::for_pieces(in.rows, in.cols, [&](int64_t begin, int64_t end) { rows(args, begin, end); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("dropout_fwd.native", TORCH_BOX(&dropout_fwd));
}
