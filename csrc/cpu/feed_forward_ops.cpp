// fastattn::activation_fwd and activation_bwd for CPU tensors: the passes of feed_forward between its matrix products.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "activation_call.h"
#include "dispatch.h"
#include "host.h"

namespace {

using fastattn::ActivationArgs;
using torch::stable::Tensor;

Tensor activation_fwd(const Tensor& preact, const std::optional<Tensor>& gate, const std::optional<Tensor>& rng,
                      double dropout_p, int64_t activation) {
  static const auto fn = FASTATTN_SELECT_CPU(activation_fwd);
  fastattn::ActivationForwardCall call(preact, gate, rng, dropout_p, activation);
  fastattn::for_pieces(call.args.rows, call.args.cols, [&](int64_t begin, int64_t end) { fn(call.args, begin, end); });
  return call.hidden;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> activation_bwd(const Tensor& dhidden, const Tensor& preact,
                                                                  const std::optional<Tensor>& gate,
                                                                  const std::optional<Tensor>& rng, double dropout_p,
                                                                  int64_t activation, bool need_hidden, bool need_dbias,
                                                                  bool need_dbias_gate) {
  static const auto fn = FASTATTN_SELECT_CPU(activation_bwd);
  static const auto dbias_fn = FASTATTN_SELECT_CPU(activation_dbias);
  fastattn::ActivationBackwardCall call(dhidden, preact, gate, rng, dropout_p, activation, need_hidden, need_dbias,
                                        need_dbias_gate);
  const ActivationArgs& args = call.args;
  const int64_t blocks = (args.rows + fastattn::kActivationBlockRows - 1) / fastattn::kActivationBlockRows;
  const Tensor sums = call.make_sums(preact, blocks);
  fastattn::for_pieces(blocks, fastattn::kActivationBlockRows * args.cols,
                       [&](int64_t begin, int64_t end) { fn(args, begin, end); });
  if (call.needs_sums()) {
    fastattn::for_pieces(args.cols, std::max<int64_t>(1, blocks),
                         [&](int64_t begin, int64_t end) { dbias_fn(args, begin, end); });
  }
  return call.results();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("activation_fwd.native", TORCH_BOX(&activation_fwd));
  m.impl("activation_fwd_native", TORCH_BOX(&activation_fwd));
  m.impl("activation_bwd.native", TORCH_BOX(&activation_bwd));
}
