// fastattn::activation_fwd and activation_bwd for CUDA tensors: the passes of feed_forward between its matrix products.
#include "host.h"  // must be first: it enables the CUDA declarations of the other headers

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "activation_call.h"

namespace {

using fastattn::check_launch;
using fastattn::current_stream;
using torch::stable::Tensor;

void check_operands(const fastattn::ActivationCall& call, const Tensor& preact, const std::optional<Tensor>& gate,
                    const std::optional<Tensor>& rng) {
  fastattn::check_width(call.args.cols);
  fastattn::check_device(gate, preact, "gate");
  fastattn::check_device(rng, preact, "rng");
}

Tensor activation_fwd(const Tensor& preact, const std::optional<Tensor>& gate, const std::optional<Tensor>& rng,
                      double dropout_p, int64_t activation) {
  const fastattn::DeviceGuard guard(preact.get_device_index());
  fastattn::ActivationForwardCall call(preact, gate, rng, dropout_p, activation);
  check_operands(call, preact, gate, rng);
  if (call.args.rows * call.args.cols > 0) {
    check_launch(fastattn::activation_fwd_cuda(call.args, current_stream(preact)), "activation_fwd");
  }
  return call.hidden;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> activation_bwd(const Tensor& dhidden, const Tensor& preact,
                                                                  const std::optional<Tensor>& gate,
                                                                  const std::optional<Tensor>& rng, double dropout_p,
                                                                  int64_t activation, bool need_hidden, bool need_dbias,
                                                                  bool need_dbias_gate) {
  const fastattn::DeviceGuard guard(preact.get_device_index());
  fastattn::ActivationBackwardCall call(dhidden, preact, gate, rng, dropout_p, activation, need_hidden, need_dbias,
                                        need_dbias_gate);
  check_operands(call, preact, gate, rng);
  fastattn::check_device(dhidden, preact, "dhidden");
  if (call.args.rows * call.args.cols == 0) {
    torch::stable::zero_(call.dbias);
    torch::stable::zero_(call.dbias_gate);
    return call.results();
  }
  call.args.chunks = fastattn::activation_bwd_chunks_cuda(call.args);
  const Tensor sums = call.make_sums(preact, call.args.chunks);
  check_launch(fastattn::activation_bwd_cuda(call.args, current_stream(preact)), "activation_bwd");
  return call.results();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("activation_fwd.native", TORCH_BOX(&activation_fwd));
  m.impl("activation_fwd_native", TORCH_BOX(&activation_fwd));
  m.impl("activation_bwd.native", TORCH_BOX(&activation_bwd));
}
