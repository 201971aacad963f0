// fastattn::cross_entropy_fwd for CPU tensors: the pass of linear_cross_entropy between its matrix products.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include "cross_entropy_call.h"
#include "dispatch.h"
#include "host.h"

namespace {

using torch::stable::Tensor;

Tensor cross_entropy_fwd(Tensor logits, const Tensor& target, const std::optional<Tensor>& dloss, int64_t ignore_index,
                         double label_smoothing, double z_loss, double softcap, bool need_grad) {
  fastattn::CrossEntropyCall call(logits, target, dloss, ignore_index, label_smoothing, z_loss, softcap, need_grad);
  const fastattn::CrossEntropyArgs& args = call.args;
  const auto fn = FASTATTN_SELECT_CPU(cross_entropy_fwd);
  // A row has a loss even if it has no columns.
  fastattn::for_pieces(args.rows, std::max<int64_t>(1, args.cols),
                       [&](int64_t begin, int64_t end) { fn(args, begin, end); });
  return call.loss;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("cross_entropy_fwd.native", TORCH_BOX(&cross_entropy_fwd));
}
