#pragma once
// Converts the tensors of the norm ops to NormFwdArgs and NormBwdArgs, for the wrappers of both devices. A call owns
// the tensors that its args point to. Parameter is the way a device reads weight and biases: it is constructed as
// Parameter(tensor, like, cols, name) and has the members data and dtype.
#include <tuple>

#include "check.h"

namespace fastattn {

template <typename Parameter>
struct NormForwardCall {
  Rows in, added;
  Parameter weight, bias, x_bias;
  Tensor y;
  NormFwdArgs args{};

  NormForwardCall(const Tensor& x, const std::optional<Tensor>& residual, const std::optional<Tensor>& weight_in,
                  const std::optional<Tensor>& bias_in, const std::optional<Tensor>& rng, double dropout_p, double eps,
                  bool rms, const std::optional<Tensor>& x_bias_in)
      : in(as_rows(x)),
        added(as_rows_like(residual, x, "residual")),
        weight(weight_in, x, in.cols, "weight"),
        bias(bias_in, x, in.cols, "bias"),
        x_bias(x_bias_in, x, in.cols, "x_bias"),
        y(empty_beside(x, x.sizes(), x.scalar_type())) {
    args.x = data_of(in.tensor);
    args.residual = residual ? data_of(added.tensor) : nullptr;
    args.weight = weight.data;
    args.bias = bias.data;
    args.x_bias = x_bias.data;
    args.y = y.mutable_data_ptr();
    args.rows = in.rows;
    args.cols = in.cols;
    args.x_stride = in.stride;
    args.residual_stride = added.stride;
    args.eps = static_cast<float>(eps);
    args.rms = rms;
    args.x_dtype = dtype_of(x, "x");
    args.r_dtype = residual ? dtype_of(*residual, "residual") : args.x_dtype;
    args.weight_dtype = weight.dtype;
    args.bias_dtype = bias.dtype;
    args.x_bias_dtype = x_bias.dtype;
    args.dropout = dropout_args(rng, dropout_p);
  }

  // Allocates (r, stats), which the backward needs. r is empty if it would be equal to x.
  std::tuple<Tensor, Tensor> save(const Tensor& x, const std::optional<Tensor>& residual, bool has_rng) {
    const bool plain = !residual && !has_rng && !args.x_bias;
    const int64_t rows = in.cols ? in.rows : 0;
    const ScalarType r_type = (residual ? *residual : x).scalar_type();
    const Tensor r = plain ? empty_beside(x, {0}, r_type) : empty_beside(x, x.sizes(), r_type);
    const Tensor stats = empty_beside(x, {args.rms ? 1 : 2, rows}, ScalarType::Float);
    float* first = static_cast<float*>(stats.mutable_data_ptr());
    args.r = plain ? nullptr : r.mutable_data_ptr();
    args.mean = args.rms ? nullptr : first;
    args.rstd = args.rms ? first : first + rows;
    return {r, stats};
  }
};

template <typename Parameter>
struct NormBackwardCall {
  Rows grad, saved, added;
  int64_t cols, rows;
  Parameter weight;
  Tensor dx, dresidual, dweight, dbias, dx_bias;
  bool needs_sums;
  NormBwdArgs args{};

  NormBackwardCall(const Tensor& dy, const std::optional<Tensor>& dr_out, const Tensor& r,
                   const std::optional<Tensor>& weight_in, const Tensor& stats, const std::optional<Tensor>& rng,
                   double dropout_p, bool rms, bool separate_dresidual, bool need_dweight, bool need_dbias,
                   bool need_dx_bias)
      : grad(as_rows(dy)),
        saved(as_rows_like(r, dy, "r")),
        added(as_rows_like(dr_out, dy, "dr_out")),
        cols(grad.cols),
        rows(cols ? grad.rows : 0),
        weight(weight_in, dy, cols, "weight"),
        needs_sums(need_dweight || need_dbias || need_dx_bias) {
    STD_TORCH_CHECK(
        stats.scalar_type() == ScalarType::Float && stats.is_contiguous() && stats.numel() == (rms ? rows : 2 * rows),
        "stats must be contiguous float32 of ", rms ? rows : 2 * rows, " elements, got ", stats.numel());
    STD_TORCH_CHECK(!dr_out || dr_out->scalar_type() == r.scalar_type(), "dr_out must have the dtype of r");
    const ScalarType sum_type = weight_in ? weight_in->scalar_type() : ScalarType::Float;
    const Place place(dy);
    const auto output = [&](bool wanted, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype,
                            void** data) {
      const Tensor tensor = wanted ? place.empty(sizes, dtype) : place.empty({0}, dtype);
      *data = wanted ? tensor.mutable_data_ptr() : nullptr;
      return tensor;
    };
    dx = output(true, dy.sizes(), dy.scalar_type(), &args.dx);
    dresidual = output(separate_dresidual, dy.sizes(), r.scalar_type(), &args.dresidual);
    dweight = output(need_dweight, {cols}, sum_type, &args.dweight);
    dbias = output(need_dbias, {cols}, sum_type, &args.dbias);
    dx_bias = output(need_dx_bias, {cols}, sum_type, &args.dx_bias);
    args.dy = data_of(grad.tensor);
    args.dr_out = dr_out ? data_of(added.tensor) : nullptr;
    args.r = data_of(saved.tensor);
    args.weight = weight.data;
    const float* first = static_cast<const float*>(data_of(stats));
    args.mean = rms ? nullptr : first;
    args.rstd = rms ? first : first + rows;
    args.rows = rows;
    args.cols = cols;
    args.dy_stride = grad.stride;
    args.dr_out_stride = added.stride;
    args.r_stride = saved.stride;
    args.x_dtype = dtype_of(dy, "dy");
    args.r_dtype = dtype_of(r, "r");
    args.weight_dtype = weight_in ? dtype_of(*weight_in, "weight") : DType::kFloat32;
    args.dropout = dropout_args(rng, dropout_p);
  }

  // Allocates the sums of args.chunks chunks. The tensor must live until the kernels have run.
  Tensor make_sums(const Tensor& like) {
    const Tensor sums = empty_beside(like, {needs_sums ? args.chunks : 0, kNormSums, cols}, ScalarType::Float);
    args.sums = static_cast<float*>(sums.mutable_data_ptr());
    return sums;
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> results() const {
    return {dx, dresidual, dweight, dbias, dx_bias};
  }
};

}  // namespace fastattn
