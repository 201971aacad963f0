// fastattn::activation_fwd and activation_bwd for CPU tensors: the passes of feed-forward between its products.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "activation_call.h"
#include "dispatch.h"
#include "host.h"

namespace {

using fastattn::ActivationArgs;
using fastattn::ActivationCall;
using fastattn::empty_cpu;
using fastattn::Rows;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor activation_fwd(const Tensor& preact, const std::optional<Tensor>& gate, const std::optional<Tensor>& rng,
                      double dropout_p, int64_t activation) {
  static const auto fn = FASTATTN_SELECT_CPU(activation_fwd);
  ActivationCall call(preact, gate, rng, dropout_p, activation);
  Tensor hidden = empty_cpu(preact.sizes(), preact.scalar_type());
  call.args.hidden = hidden.mutable_data_ptr();
  fastattn::for_pieces(call.args.rows, call.args.cols, [&](int64_t begin, int64_t end) { fn(call.args, begin, end); });
  return hidden;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> activation_bwd(const Tensor& dhidden, const Tensor& preact,
                                                                  const std::optional<Tensor>& gate,
                                                                  const std::optional<Tensor>& rng, double dropout_p,
                                                                  int64_t activation, bool need_hidden, bool need_dbias,
                                                                  bool need_dbias_gate) {
  static const auto fn = FASTATTN_SELECT_CPU(activation_bwd);
  static const auto dbias_fn = FASTATTN_SELECT_CPU(activation_dbias);
  ActivationCall call(preact, gate, rng, dropout_p, activation);
  ActivationArgs& args = call.args;
  const ScalarType dtype = preact.scalar_type();
  const Rows dhidden_rows = ActivationCall::operand(dhidden, preact, "dhidden");
  args.dhidden = dhidden_rows.tensor.const_data_ptr();
  args.dhidden_stride = dhidden_rows.stride;
  need_dbias_gate = need_dbias_gate && gate;

  const auto like_preact = [&](bool wanted, void** data) {
    const int64_t nothing[] = {0};
    Tensor tensor = wanted ? empty_cpu(preact.sizes(), dtype) : empty_cpu(nothing, dtype);
    *data = wanted ? tensor.mutable_data_ptr() : nullptr;
    return tensor;
  };
  Tensor dpreact = like_preact(true, &args.dpreact);
  Tensor dgate = like_preact(gate.has_value(), &args.dgate);
  Tensor hidden = like_preact(need_hidden, &args.hidden);

  const int64_t blocks = (args.rows + fastattn::kActivationBlockRows - 1) / fastattn::kActivationBlockRows;
  const int64_t partials[] = {blocks * (need_dbias + need_dbias_gate), args.cols};
  Tensor partial = empty_cpu(partials, ScalarType::Float);
  float* next = static_cast<float*>(partial.mutable_data_ptr());
  const auto bias_gradient = [&](bool wanted, float** sums, void** data) {
    const int64_t size[] = {wanted ? args.cols : 0};
    Tensor tensor = empty_cpu(size, dtype);
    if (wanted) {
      *sums = next;
      *data = tensor.mutable_data_ptr();
      next += blocks * args.cols;
    }
    return tensor;
  };
  Tensor dbias = bias_gradient(need_dbias, &args.dbias_partial, &args.dbias);
  Tensor dbias_gate = bias_gradient(need_dbias_gate, &args.dbias_gate_partial, &args.dbias_gate);

  fastattn::for_pieces(blocks, fastattn::kActivationBlockRows * args.cols,
                       [&](int64_t begin, int64_t end) { fn(args, begin, end); });
  if (need_dbias || need_dbias_gate) {
    fastattn::for_pieces(args.cols, std::max<int64_t>(1, blocks),
                         [&](int64_t begin, int64_t end) { dbias_fn(args, begin, end); });
  }
  return {dpreact, dgate, hidden, dbias, dbias_gate};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("activation_fwd.native", TORCH_BOX(&activation_fwd));
  m.impl("activation_fwd_native", TORCH_BOX(&activation_fwd));
  m.impl("activation_bwd.native", TORCH_BOX(&activation_bwd));
}
