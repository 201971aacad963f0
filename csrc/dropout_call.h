#pragma once
// Converts the tensors of dropout_fwd to DropoutArgs, for the wrappers of both devices.
#include "check.h"

namespace fastattn {

// Owns the output, and the rows that its args point to.
struct DropoutCall {
  Rows in, added;
  Tensor out;
  DropoutArgs args{};

  DropoutCall(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& rng, double dropout_p)
      : in(as_rows(x)),
        added(as_rows_like(residual, x, "residual")),
        out(empty_beside(x, x.sizes(), (residual ? *residual : x).scalar_type())) {
    args.x = data_of(in.tensor);
    args.residual = residual ? data_of(added.tensor) : nullptr;
    args.out = out.mutable_data_ptr();
    args.rows = in.rows;
    args.cols = in.cols;
    args.x_stride = in.stride;
    args.residual_stride = added.stride;
    args.x_dtype = dtype_of(x, "x");
    args.out_dtype = residual ? dtype_of(*residual, "residual") : args.x_dtype;
    args.dropout = dropout_args(rng, dropout_p);
  }
};

}  // namespace fastattn
