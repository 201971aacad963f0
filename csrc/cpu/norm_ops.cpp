// fastattn::norm_infer, norm_fwd and norm_bwd for CPU tensors.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "dispatch.h"
#include "host.h"
#include "vec.h"

namespace {

using fastattn::dtype_of;
using fastattn::Rows;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A parameter as the kernels read it: fp32, contiguous, or null.
class Parameter {
 public:
  Parameter(const std::optional<Tensor>& tensor, int64_t cols, const char* name) {
    if (!tensor) {
      return;
    }
    STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == cols && tensor->is_cpu(), name,
                    " must be a CPU tensor of shape (", cols, "), got ", tensor->numel(), " elements in ",
                    tensor->dim(), " dimensions");
    const fastattn::DType dtype = dtype_of(*tensor, name);
    const int64_t stride = tensor->stride(0);
    if (dtype == fastattn::DType::kFloat32 && (stride == 1 || cols <= 1)) {
      data = static_cast<const float*>(tensor->const_data_ptr());
    } else if (dtype == fastattn::DType::kFloat32) {
      widen<float>(*tensor, cols, stride);
    } else if (dtype == fastattn::DType::kBFloat16) {
      widen<BF16>(*tensor, cols, stride);
    } else {
      widen<FP16>(*tensor, cols, stride);
    }
  }

  const float* data = nullptr;

 private:
  template <typename T>
  void widen(const Tensor& tensor, int64_t cols, int64_t stride) {
    const T* source = static_cast<const T*>(tensor.const_data_ptr());
    copy_.resize(cols);
    for (int64_t i = 0; i < cols; ++i) {
      copy_[i] = to_float(source[i * stride]);
    }
    data = copy_.data();
  }

  std::vector<float> copy_;
};

// Runs the forward; the caller has set y, and r, mean and rstd where it wants them.
void forward(fastattn::NormFwdArgs args, const Tensor& x, const std::optional<Tensor>& residual,
             const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& rng,
             double dropout_p, double eps, bool rms, const std::optional<Tensor>& x_bias) {
  const Rows in = fastattn::as_rows(x);
  const Rows added = fastattn::as_rows_like(residual, x, "residual");
  const Parameter weights(weight, in.cols, "weight");
  const Parameter biases(bias, in.cols, "bias");
  const Parameter x_biases(x_bias, in.cols, "x_bias");
  args.x = in.tensor.const_data_ptr();
  args.residual = residual ? added.tensor.const_data_ptr() : nullptr;
  args.weight = weights.data;
  args.bias = biases.data;
  args.x_bias = x_biases.data;
  args.rows = in.rows;
  args.cols = in.cols;
  args.x_stride = in.stride;
  args.residual_stride = added.stride;
  args.eps = static_cast<float>(eps);
  args.rms = rms;
  args.x_dtype = dtype_of(x, "x");
  args.r_dtype = residual ? dtype_of(*residual, "residual") : args.x_dtype;
  args.dropout = fastattn::dropout_args(rng, dropout_p);
  const auto rows = FASTATTN_SELECT_CPU(norm_fwd);
  fastattn::for_pieces(in.rows, in.cols, [&](int64_t begin, int64_t end) { rows(args, begin, end); });
}

Tensor norm_infer(const Tensor& x, const std::optional<Tensor>& residual, const std::optional<Tensor>& weight,
                  const std::optional<Tensor>& bias, const std::optional<Tensor>& rng, double dropout_p, double eps,
                  bool rms, const std::optional<Tensor>& x_bias) {
  const Tensor y = fastattn::empty_cpu(x.sizes(), x.scalar_type());
  fastattn::NormFwdArgs args{};
  args.y = y.mutable_data_ptr();
  forward(args, x, residual, weight, bias, rng, dropout_p, eps, rms, x_bias);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> norm_fwd(const Tensor& x, const std::optional<Tensor>& residual,
                                            const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                            const std::optional<Tensor>& rng, double dropout_p, double eps, bool rms,
                                            const std::optional<Tensor>& x_bias) {
  const bool plain = !residual && !rng && !x_bias;  // then r is x
  const int64_t cols = x.dim() ? x.size(x.dim() - 1) : 0;
  const int64_t rows = cols ? x.numel() / cols : 0;
  const Tensor y = fastattn::empty_cpu(x.sizes(), x.scalar_type());
  const Tensor r = plain ? fastattn::empty_cpu({0}, x.scalar_type())
                         : fastattn::empty_cpu(x.sizes(), (residual ? *residual : x).scalar_type());
  const Tensor stats = fastattn::empty_cpu({rms ? 1 : 2, rows}, ScalarType::Float);
  fastattn::NormFwdArgs args{};
  args.y = y.mutable_data_ptr();
  args.r = plain ? nullptr : r.mutable_data_ptr();
  args.rstd = static_cast<float*>(stats.mutable_data_ptr()) + (rms ? 0 : rows);
  args.mean = rms ? nullptr : static_cast<float*>(stats.mutable_data_ptr());
  forward(args, x, residual, weight, bias, rng, dropout_p, eps, rms, x_bias);
  return {y, r, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_bwd(const Tensor& dy, const std::optional<Tensor>& dr_out,
                                                            const Tensor& r, const std::optional<Tensor>& weight,
                                                            const Tensor& stats, const std::optional<Tensor>& rng,
                                                            double dropout_p, bool rms, bool separate_dresidual,
                                                            bool need_dweight, bool need_dbias, bool need_dx_bias) {
  constexpr int64_t kMaxChunks = 64;
  constexpr int64_t kMinRows = 32;  // a chunk reads dy and r that many times as often as it writes its sums
  const Rows grad = fastattn::as_rows(dy);
  const Rows saved = fastattn::as_rows_like(r, dy, "r");
  const Rows added = fastattn::as_rows_like(dr_out, dy, "dr_out");
  const int64_t cols = grad.cols;
  const int64_t rows = cols ? grad.rows : 0;
  STD_TORCH_CHECK(
      stats.scalar_type() == ScalarType::Float && stats.is_contiguous() && stats.numel() == (rms ? rows : 2 * rows),
      "stats must be contiguous float32 of ", rms ? rows : 2 * rows, " elements, got ", stats.numel());
  STD_TORCH_CHECK(!dr_out || dr_out->scalar_type() == r.scalar_type(), "dr_out must have the dtype of r");
  const Parameter weights(weight, cols, "weight");
  const ScalarType weight_type = weight ? weight->scalar_type() : ScalarType::Float;
  const Tensor dx = fastattn::empty_cpu(dy.sizes(), dy.scalar_type());
  const Tensor dresidual =
      separate_dresidual ? fastattn::empty_cpu(dy.sizes(), r.scalar_type()) : fastattn::empty_cpu({0}, r.scalar_type());
  const Tensor dweight = fastattn::empty_cpu({need_dweight ? cols : 0}, weight_type);
  const Tensor dbias = fastattn::empty_cpu({need_dbias ? cols : 0}, weight_type);
  const Tensor dx_bias = fastattn::empty_cpu({need_dx_bias ? cols : 0}, weight_type);

  fastattn::NormBwdArgs args{};
  args.dy = grad.tensor.const_data_ptr();
  args.dr_out = dr_out ? added.tensor.const_data_ptr() : nullptr;
  args.r = saved.tensor.const_data_ptr();
  args.weight = weights.data;
  const float* saved_stats = static_cast<const float*>(stats.const_data_ptr());
  args.mean = rms ? nullptr : saved_stats;
  args.rstd = rms ? saved_stats : saved_stats + rows;
  args.dx = dx.mutable_data_ptr();
  args.dresidual = separate_dresidual ? dresidual.mutable_data_ptr() : nullptr;
  args.dweight = need_dweight ? dweight.mutable_data_ptr() : nullptr;
  args.dbias = need_dbias ? dbias.mutable_data_ptr() : nullptr;
  args.dx_bias = need_dx_bias ? dx_bias.mutable_data_ptr() : nullptr;
  args.rows = rows;
  args.cols = cols;
  args.dy_stride = grad.stride;
  args.dr_out_stride = added.stride;
  args.r_stride = saved.stride;
  args.rows_per_chunk = std::max(kMinRows, (rows + kMaxChunks - 1) / kMaxChunks);
  args.chunks = (rows + args.rows_per_chunk - 1) / args.rows_per_chunk;
  args.x_dtype = dtype_of(dy, "dy");
  args.r_dtype = dtype_of(r, "r");
  args.weight_dtype = weight ? dtype_of(*weight, "weight") : fastattn::DType::kFloat32;
  args.dropout = fastattn::dropout_args(rng, dropout_p);
  const bool needs_sums = need_dweight || need_dbias || need_dx_bias;
  const Tensor sums =
      fastattn::empty_cpu({needs_sums ? args.chunks * fastattn::kNormSums * cols : 0}, ScalarType::Float);
  args.sums = static_cast<float*>(sums.mutable_data_ptr());

  const auto chunks = FASTATTN_SELECT_CPU(norm_bwd);
  const auto columns = FASTATTN_SELECT_CPU(norm_bwd_columns);
  fastattn::for_pieces(args.chunks, std::min(rows, args.rows_per_chunk) * cols,
                       [&](int64_t begin, int64_t end) { chunks(args, begin, end); });
  if (needs_sums) {
    fastattn::for_pieces(cols, std::max<int64_t>(1, args.chunks),
                         [&](int64_t begin, int64_t end) { columns(args, begin, end); });
  }
  return {dx, dresidual, dweight, dbias, dx_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("norm_infer.native", TORCH_BOX(&norm_infer));
  m.impl("norm_fwd.native", TORCH_BOX(&norm_fwd));
  m.impl("norm_bwd.native", TORCH_BOX(&norm_bwd));
}
