// fastattn::norm_infer, norm_fwd and norm_bwd for CUDA tensors.
#include "host.h"  // before every other header: it switches on what they declare for CUDA

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace {

using fastattn::dtype_of;
using fastattn::empty_beside;
using fastattn::Rows;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Runs the forward; the caller has set y, and r, mean and rstd where it wants them.
void forward(fastattn::NormFwdArgs args, const Tensor& x, const std::optional<Tensor>& residual,
             const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& rng,
             double dropout_p, double eps, bool rms, const std::optional<Tensor>& x_bias) {
  const Rows in = fastattn::as_rows(x);
  const Rows added = fastattn::as_rows_like(residual, x, "residual");
  const fastattn::Parameter weights(weight, x, in.cols, "weight");
  const fastattn::Parameter biases(bias, x, in.cols, "bias");
  const fastattn::Parameter x_biases(x_bias, x, in.cols, "x_bias");
  fastattn::check_device(residual, x, "residual");
  fastattn::check_device(rng, x, "rng");
  fastattn::check_width(in.cols);
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
  args.weight_dtype = weights.dtype;
  args.bias_dtype = biases.dtype;
  args.x_bias_dtype = x_biases.dtype;
  args.dropout = fastattn::dropout_args(rng, dropout_p);
  if (in.rows * in.cols > 0) {
    fastattn::check_launch(fastattn::norm_fwd_cuda(args, fastattn::current_stream(x)), "norm_fwd");
  }
}

Tensor norm_infer(const Tensor& x, const std::optional<Tensor>& residual, const std::optional<Tensor>& weight,
                  const std::optional<Tensor>& bias, const std::optional<Tensor>& rng, double dropout_p, double eps,
                  bool rms, const std::optional<Tensor>& x_bias) {
  const fastattn::DeviceGuard guard(x.get_device_index());
  const Tensor y = empty_beside(x, x.sizes(), x.scalar_type());
  fastattn::NormFwdArgs args{};
  args.y = y.mutable_data_ptr();
  forward(args, x, residual, weight, bias, rng, dropout_p, eps, rms, x_bias);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> norm_fwd(const Tensor& x, const std::optional<Tensor>& residual,
                                            const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                            const std::optional<Tensor>& rng, double dropout_p, double eps, bool rms,
                                            const std::optional<Tensor>& x_bias) {
  const fastattn::DeviceGuard guard(x.get_device_index());
  const bool plain = !residual && !rng && !x_bias;  // then r is x
  const int64_t cols = x.dim() ? x.size(x.dim() - 1) : 0;
  const int64_t rows = cols ? x.numel() / cols : 0;
  const Tensor y = empty_beside(x, x.sizes(), x.scalar_type());
  const Tensor r = plain ? empty_beside(x, {0}, x.scalar_type())
                         : empty_beside(x, x.sizes(), (residual ? *residual : x).scalar_type());
  const Tensor stats = empty_beside(x, {rms ? 1 : 2, rows}, ScalarType::Float);
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
  const fastattn::DeviceGuard guard(dy.get_device_index());
  const Rows grad = fastattn::as_rows(dy);
  const Rows saved = fastattn::as_rows_like(r, dy, "r");
  const Rows added = fastattn::as_rows_like(dr_out, dy, "dr_out");
  const int64_t cols = grad.cols;
  const int64_t rows = cols ? grad.rows : 0;
  STD_TORCH_CHECK(
      stats.scalar_type() == ScalarType::Float && stats.is_contiguous() && stats.numel() == (rms ? rows : 2 * rows),
      "stats must be contiguous float32 of ", rms ? rows : 2 * rows, " elements, got ", stats.numel());
  STD_TORCH_CHECK(!dr_out || dr_out->scalar_type() == r.scalar_type(), "dr_out must have the dtype of r");
  const fastattn::Parameter weights(weight, dy, cols, "weight");
  fastattn::check_device(r, dy, "r");
  fastattn::check_device(dr_out, dy, "dr_out");
  fastattn::check_device(stats, dy, "stats");
  fastattn::check_device(rng, dy, "rng");
  fastattn::check_width(cols);
  const ScalarType weight_type = weight ? weight->scalar_type() : ScalarType::Float;
  const Tensor dx = empty_beside(dy, dy.sizes(), dy.scalar_type());
  const Tensor dresidual =
      separate_dresidual ? empty_beside(dy, dy.sizes(), r.scalar_type()) : empty_beside(dy, {0}, r.scalar_type());
  Tensor dweight = empty_beside(dy, {need_dweight ? cols : 0}, weight_type);
  Tensor dbias = empty_beside(dy, {need_dbias ? cols : 0}, weight_type);
  Tensor dx_bias = empty_beside(dy, {need_dx_bias ? cols : 0}, weight_type);
  if (rows * cols == 0) {
    torch::stable::zero_(dweight);
    torch::stable::zero_(dbias);
    torch::stable::zero_(dx_bias);
    return {dx, dresidual, dweight, dbias, dx_bias};
  }

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
  args.x_dtype = dtype_of(dy, "dy");
  args.r_dtype = dtype_of(r, "r");
  args.weight_dtype = weights.dtype;
  args.dropout = fastattn::dropout_args(rng, dropout_p);
  args.chunks = fastattn::norm_bwd_chunks_cuda(args);
  const bool needs_sums = need_dweight || need_dbias || need_dx_bias;
  const Tensor sums = empty_beside(dy, {needs_sums ? args.chunks : 0, fastattn::kNormSums, cols}, ScalarType::Float);
  args.sums = static_cast<float*>(sums.mutable_data_ptr());
  fastattn::check_launch(fastattn::norm_bwd_cuda(args, fastattn::current_stream(dy)), "norm_bwd");
  return {dx, dresidual, dweight, dbias, dx_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("norm_infer.native", TORCH_BOX(&norm_infer));
  m.impl("norm_fwd.native", TORCH_BOX(&norm_fwd));
  m.impl("norm_bwd.native", TORCH_BOX(&norm_bwd));
}
