#pragma once
// How dropout is divided between threads, for the wrappers that run it.
#include "dispatch.h"
#include "host.h"

namespace fastattn {

inline void run_dropout(const DropoutArgs& args) {
  const auto kernel = FASTATTN_SELECT_CPU(dropout_fwd);
  for_pieces(args.rows, args.cols, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// out = x in another dtype. Both are contiguous.
inline void run_conversion(const void* x, DType x_dtype, void* out, DType out_dtype, int64_t rows, int64_t cols) {
  run_dropout({x, nullptr, out, rows, cols, cols, cols, x_dtype, out_dtype, {nullptr, 0, 1.f}});
}

}  // namespace fastattn
