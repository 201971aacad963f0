// Dropout with the residual add:  out = keep * scale * x + residual.
//
// A call owns whole rows. The mask is a function of (seed, offset, row, column), so nothing is saved for the backward,
// which is the same kernel applied to the gradient, without a residual.
#include "api.h"
#include "rows.h"

namespace fastattn {

void FASTATTN_CPU_NAME(dropout_fwd)(const DropoutArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.x_dtype, [&](auto x_type) {
    with_dtype(args.out_dtype, [&](auto out_type) {
      using X = decltype(x_type);
      using R = decltype(out_type);
      for (int64_t row = begin; row < end; ++row) {
        const R* residual = static_cast<const R*>(args.residual);
        dropout_add_row(static_cast<const X*>(args.x) + row * args.x_stride, nullptr,
                        residual ? residual + row * args.residual_stride : nullptr,
                        static_cast<R*>(args.out) + row * args.cols, args.cols, row, args.dropout);
      }
    });
  });
}

}  // namespace fastattn
