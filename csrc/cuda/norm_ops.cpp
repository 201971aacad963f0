// fastattn::norm_infer, norm_fwd and norm_bwd for CUDA tensors.
#include "host.h"  // must be first: it enables the CUDA declarations of the other headers

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "norm_call.h"

namespace {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Forward = fastattn::NormForwardCall<fastattn::Parameter>;
using Backward = fastattn::NormBackwardCall<fastattn::Parameter>;

void run(const fastattn::NormFwdArgs& args, const Tensor& x, const OptionalTensor& residual,
         const OptionalTensor& rng) {
  fastattn::check_device(residual, x, "residual");
  fastattn::check_device(rng, x, "rng");
  fastattn::check_width(args.cols);
  if (args.rows * args.cols > 0) {
    fastattn::check_launch(fastattn::norm_fwd_cuda(args, fastattn::current_stream(x)), "norm_fwd");
  }
}

Tensor norm_infer(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                  const OptionalTensor& bias, const OptionalTensor& rng, double dropout_p, double eps, bool rms,
                  const OptionalTensor& x_bias) {
  const fastattn::DeviceGuard guard(x.get_device_index());
  Forward call(x, residual, weight, bias, rng, dropout_p, eps, rms, x_bias);
  run(call.args, x, residual, rng);
  return call.y;
}

std::tuple<Tensor, Tensor, Tensor> norm_fwd(const Tensor& x, const OptionalTensor& residual,
                                            const OptionalTensor& weight, const OptionalTensor& bias,
                                            const OptionalTensor& rng, double dropout_p, double eps, bool rms,
                                            const OptionalTensor& x_bias) {
  const fastattn::DeviceGuard guard(x.get_device_index());
  Forward call(x, residual, weight, bias, rng, dropout_p, eps, rms, x_bias);
  const auto [r, stats] = call.save(x, residual, rng.has_value());
  run(call.args, x, residual, rng);
  return {call.y, r, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_bwd(const Tensor& dy, const OptionalTensor& dr_out,
                                                            const Tensor& r, const OptionalTensor& weight,
                                                            const Tensor& stats, const OptionalTensor& rng,
                                                            double dropout_p, bool rms, bool separate_dresidual,
                                                            bool need_dweight, bool need_dbias, bool need_dx_bias) {
  const fastattn::DeviceGuard guard(dy.get_device_index());
  Backward call(dy, dr_out, r, weight, stats, rng, dropout_p, rms, separate_dresidual, need_dweight, need_dbias,
                need_dx_bias);
  fastattn::check_device(r, dy, "r");
  fastattn::check_device(dr_out, dy, "dr_out");
  fastattn::check_device(stats, dy, "stats");
  fastattn::check_device(rng, dy, "rng");
  fastattn::check_width(call.cols);
  if (call.rows * call.cols == 0) {
    torch::stable::zero_(call.dweight);
    torch::stable::zero_(call.dbias);
    torch::stable::zero_(call.dx_bias);
    return call.results();
  }
  call.args.chunks = fastattn::norm_bwd_chunks_cuda(call.args);
  const Tensor sums = call.make_sums(dy);
  fastattn::check_launch(fastattn::norm_bwd_cuda(call.args, fastattn::current_stream(dy)), "norm_bwd");
  return call.results();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("norm_infer.native", TORCH_BOX(&norm_infer));
  m.impl("norm_fwd.native", TORCH_BOX(&norm_fwd));
  m.impl("norm_fwd_native", TORCH_BOX(&norm_fwd));
  m.impl("norm_bwd.native", TORCH_BOX(&norm_bwd));
}
