// fastattn::gemm and gemm_add_ for CPU tensors.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>

#include "products.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const char* name_of(ScalarType dtype) {
  return dtype == ScalarType::Float ? "float32" : "bfloat16";
}

// A matrix with a stride of 1, transposed if wanted by exchanging its strides. It is a copy if no stride of the tensor
// is 1.
struct Matrix {
  Tensor tensor;
  int64_t rows, cols, row, col;

  Matrix(const Tensor& t, bool transposed, const char* name, ScalarType dtype) : tensor(t) {
    STD_TORCH_CHECK(t.dim() == 2 && t.scalar_type() == dtype, "gemm: ", name, " must be ", name_of(dtype),
                    " of two dimensions, got ", torch::headeronly::toString(t.scalar_type()), " of ", t.dim());
    const bool is_dense = t.size(0) <= 1 || t.size(1) <= 1 || t.stride(0) == 1 || t.stride(1) == 1;
    if (!is_dense) {
      tensor = fastattn::contiguous_copy(t);
    }
    const int d = transposed ? 1 : 0;
    rows = t.size(d);
    cols = t.size(1 - d);
    // The stride of a dimension of size 1 has no meaning, so it may be set to anything.
    row = rows <= 1 ? (cols <= 1 ? 1 : 0) : tensor.stride(d);
    col = cols <= 1 ? 1 : tensor.stride(1 - d);
  }

  fastattn::Operand operand() const { return {fastattn::data_of(tensor), rows, cols, row, col, tensor.scalar_type()}; }
};

ScalarType dtype_of_products(const Tensor& a) {
  const bool bf16 = a.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(!bf16 || fastattn::has_tiles(), "gemm: bfloat16 needs a processor with AMX");
  return bf16 ? ScalarType::BFloat16 : ScalarType::Float;
}

void run(const Tensor& out, const Matrix& a, const Matrix& b, const std::optional<Tensor>& bias, bool add) {
  STD_TORCH_CHECK(a.cols == b.rows, "gemm: a of ", a.cols, " columns does not fit b of ", b.rows, " rows");
  const ScalarType dtype = out.scalar_type();
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == b.cols && bias->scalar_type() == dtype),
                  "gemm: bias must be ", name_of(dtype), " of ", b.cols, " elements");
  if (a.rows * b.cols == 0) {
    return;
  }
  fastattn::multiply_ours(a.operand(), b.operand(), fastattn::data_or_null(bias), add, out.mutable_data_ptr(),
                          a.rows <= 1 ? b.cols : out.stride(0));
}

// Returns a · b + bias. Either operand may be transposed first.
Tensor gemm(const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias, bool transpose_a, bool transpose_b) {
  const ScalarType dtype = dtype_of_products(a);
  const Matrix left(a, transpose_a, "a", dtype), right(b, transpose_b, "b", dtype);
  const Tensor out = fastattn::empty_cpu({left.rows, right.cols}, dtype);
  run(out, left, right, fastattn::contiguous(bias), false);
  return out;
}

// out += a · b. Either operand may be transposed first.
void gemm_add_(Tensor out, const Tensor& a, const Tensor& b, bool transpose_a, bool transpose_b) {
  const Matrix left(a, transpose_a, "a", ScalarType::Float), right(b, transpose_b, "b", ScalarType::Float);
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
