// fastattn::activation_fwd and activation_bwd for CPU tensors: the passes of feed_forward between its matrix products.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "activation_call.h"
#include "activation_run.h"

namespace {

using torch::stable::Tensor;

Tensor activation_fwd(const Tensor& preact, const std::optional<Tensor>& gate, const std::optional<Tensor>& rng,
                      double dropout_p, int64_t activation) {
  fastattn::ActivationForwardCall call(preact, gate, rng, dropout_p, activation);
  fastattn::run_activation_fwd(call.args);
  return call.hidden;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> activation_bwd(const Tensor& dhidden, const Tensor& preact,
                                                                  const std::optional<Tensor>& gate,
                                                                  const std::optional<Tensor>& rng, double dropout_p,
                                                                  int64_t activation, bool need_hidden, bool need_dbias,
                                                                  bool need_dbias_gate) {
  fastattn::ActivationBackwardCall call(dhidden, preact, gate, rng, dropout_p, activation, need_hidden, need_dbias,
                                        need_dbias_gate);
  const Tensor sums = call.make_sums(preact, fastattn::activation_blocks(call.args));
  fastattn::run_activation_bwd(call.args);
  return call.results();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("activation_fwd.native", TORCH_BOX(&activation_fwd));
  m.impl("activation_fwd_native", TORCH_BOX(&activation_fwd));
  m.impl("activation_bwd.native", TORCH_BOX(&activation_bwd));
}
