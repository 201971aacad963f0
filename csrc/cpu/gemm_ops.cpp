// fastattn::gemm and gemm_add_ for CPU tensors.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>

#include "gemm.h"

namespace {

using fastattn::GemmArgs;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A matrix one of whose strides is 1, transposed by its strides if wanted; a copy where both strides have gaps.
struct Matrix {
  Tensor tensor;
  int64_t rows, cols, row, col;

  Matrix(const Tensor& t, bool transposed, const char* name) : tensor(t) {
    STD_TORCH_CHECK(t.dim() == 2 && t.scalar_type() == ScalarType::Float, "gemm: ", name,
                    " must be float32 of two dimensions, got ", torch::headeronly::toString(t.scalar_type()), " of ",
                    t.dim());
    const bool is_dense = t.size(0) <= 1 || t.size(1) <= 1 || t.stride(0) == 1 || t.stride(1) == 1;
    if (!is_dense) {
      tensor = fastattn::contiguous_copy(t);
    }
    const int d = transposed ? 1 : 0;
    rows = t.size(d);
    cols = t.size(1 - d);
    // the stride of a dimension of size 1 is free
    row = rows <= 1 ? (cols <= 1 ? 1 : 0) : tensor.stride(d);
    col = cols <= 1 ? 1 : tensor.stride(1 - d);
  }

  const float* data() const { return static_cast<const float*>(fastattn::data_of(tensor)); }
};

void run(const Tensor& out, const Matrix& a, const Matrix& b, const std::optional<Tensor>& bias, bool add) {
  STD_TORCH_CHECK(a.cols == b.rows, "gemm: a of ", a.cols, " columns does not fit b of ", b.rows, " rows");
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == b.cols && bias->scalar_type() == ScalarType::Float),
                  "gemm: bias must be float32 of ", b.cols, " elements");
  const int64_t m = a.rows, n = b.cols, k = a.cols;
  if (m * n == 0) {
    return;
  }
  GemmArgs args{};
  args.a = a.data();
  args.b = b.data();
  args.bias = static_cast<const float*>(fastattn::data_or_null(bias));
  args.c = static_cast<float*>(out.mutable_data_ptr());
  args.m = m;
  args.n = n;
  args.k = k;
  args.a_row = a.row;
  args.a_col = a.col;
  args.b_row = b.row;
  args.b_col = b.col;
  args.c_row = m <= 1 ? n : out.stride(0);
  args.add = add;
  fastattn::run_gemm(args);
}

// a · b + bias, either operand transposed first
Tensor gemm(const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias, bool transpose_a, bool transpose_b) {
  const Matrix left(a, transpose_a, "a"), right(b, transpose_b, "b");
  const Tensor out = fastattn::empty_cpu({left.rows, right.cols}, ScalarType::Float);
  run(out, left, right, fastattn::contiguous(bias), false);
  return out;
}

// out += a · b
void gemm_add_(Tensor out, const Tensor& a, const Tensor& b, bool transpose_a, bool transpose_b) {
  const Matrix left(a, transpose_a, "a"), right(b, transpose_b, "b");
  STD_TORCH_CHECK(out.dim() == 2 && out.size(0) == left.rows && out.size(1) == right.cols &&
                      out.scalar_type() == ScalarType::Float && (right.cols <= 1 || out.stride(1) == 1),
                  "gemm: out must be float32 (", left.rows, ", ", right.cols, ") with last stride 1");
  run(out, left, right, std::nullopt, true);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("gemm.native", TORCH_BOX(&gemm));
  m.impl("gemm_add_.native", TORCH_BOX(&gemm_add_));
}
