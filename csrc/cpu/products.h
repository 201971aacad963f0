#pragma once
// A product of two matrices in memory, with our own kernel or with the library that torch calls.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "gemm.h"
#include "gemm_amx.h"

namespace fastattn {

// Element (r, c) is data[r * row + c * col]; one of the strides is 1.
struct Operand {
  const void* data;
  int64_t rows, cols, row, col;
  ScalarType dtype = ScalarType::Float;

  Operand t() const { return {data, cols, rows, col, row, dtype}; }
  Tensor tensor() const {
    const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
    return torch::stable::from_blob(const_cast<void*>(data), {rows, cols}, {row, col}, cpu, dtype);
  }
};

// A contiguous matrix.
inline Operand operand(const void* data, int64_t rows, int64_t cols, ScalarType dtype = ScalarType::Float) {
  return {data, rows, cols, cols, 1, dtype};
}

// c = a · b by our own kernel, plus bias (one per column of b) if it is not null, or plus the old content of c if
// `add`. The rows of c are c_row apart. All are float32, or bfloat16 if has_tiles() is true.
inline void multiply_ours(const Operand& a, const Operand& b, const void* bias, bool add, void* c, int64_t c_row) {
  const auto run = [&](auto args, auto product) {
    args.a = static_cast<decltype(args.a)>(a.data);
    args.b = static_cast<decltype(args.b)>(b.data);
    args.bias = static_cast<decltype(args.bias)>(bias);
    args.c = static_cast<decltype(args.c)>(c);
    args.m = a.rows;
    args.n = b.cols;
    args.k = a.cols;
    args.a_row = a.row;
    args.a_col = a.col;
    args.b_row = b.row;
    args.b_col = b.col;
    args.c_row = c_row;
    args.add = add;
    product(args);
  };
#if defined(__x86_64__)
  if (a.dtype == ScalarType::BFloat16) {
    return run(TilesArgs{}, run_tiles);
  }
#endif
  run(GemmArgs{}, run_gemm);
}

// c = a · b, plus bias (one per column of b) if it is not null, or plus the old content of c if `add`. c is contiguous.
// All have the dtype of a. In bfloat16, `ours` has no effect unless has_tiles() is true.
inline void multiply(const Operand& a, const Operand& b, const void* bias, bool add, bool ours, void* c) {
  if (ours && (a.dtype == ScalarType::Float || has_tiles())) {
    return multiply_ours(a, b, bias, add, c, b.cols);
  }
  const Tensor out = operand(c, a.rows, b.cols, a.dtype).tensor(), left = a.tensor(), right = b.tensor();
  if (bias || add) {
    const Tensor added = bias ? operand(bias, 1, b.cols, a.dtype).tensor() : out;
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), added.get(), left.get(), right.get(), 1, 1));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), left.get(), right.get()));
  }
}

}  // namespace fastattn
