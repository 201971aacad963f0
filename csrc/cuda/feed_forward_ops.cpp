// fastattn::activation_fwd and activation_bwd for CUDA tensors: the passes of feed-forward between its products.
#include "host.h"  // before every other header: it switches on what they declare for CUDA

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "activation_call.h"

namespace {

using fastattn::ActivationArgs;
using fastattn::ActivationCall;
using fastattn::check_launch;
using fastattn::current_stream;
using fastattn::empty_beside;
using fastattn::Rows;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check_operands(const ActivationCall& call, const Tensor& preact, const std::optional<Tensor>& gate,
                    const std::optional<Tensor>& rng) {
  fastattn::check_width(call.args.cols);
  fastattn::check_device(gate, preact, "gate");
  fastattn::check_device(rng, preact, "rng");
}

Tensor activation_fwd(const Tensor& preact, const std::optional<Tensor>& gate, const std::optional<Tensor>& rng,
                      double dropout_p, int64_t activation) {
  const fastattn::DeviceGuard guard(preact.get_device_index());
  ActivationCall call(preact, gate, rng, dropout_p, activation);
  check_operands(call, preact, gate, rng);
  const Tensor hidden = empty_beside(preact, preact.sizes(), preact.scalar_type());
  call.args.hidden = hidden.mutable_data_ptr();
  if (call.args.rows * call.args.cols > 0) {
    check_launch(fastattn::activation_fwd_cuda(call.args, current_stream(preact)), "activation_fwd");
  }
  return hidden;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> activation_bwd(const Tensor& dhidden, const Tensor& preact,
                                                                  const std::optional<Tensor>& gate,
                                                                  const std::optional<Tensor>& rng, double dropout_p,
                                                                  int64_t activation, bool need_hidden, bool need_dbias,
                                                                  bool need_dbias_gate) {
  const fastattn::DeviceGuard guard(preact.get_device_index());
  ActivationCall call(preact, gate, rng, dropout_p, activation);
  check_operands(call, preact, gate, rng);
  fastattn::check_device(dhidden, preact, "dhidden");
  ActivationArgs& args = call.args;
  const Rows dhidden_rows = ActivationCall::operand(dhidden, preact, "dhidden");
  args.dhidden = dhidden_rows.tensor.const_data_ptr();
  args.dhidden_stride = dhidden_rows.stride;
  need_dbias_gate = need_dbias_gate && gate;

  const ScalarType dtype = preact.scalar_type();
  const auto output = [&](bool wanted, torch::headeronly::IntHeaderOnlyArrayRef sizes, void** data) {
    const Tensor tensor = wanted ? empty_beside(preact, sizes, dtype) : empty_beside(preact, {0}, dtype);
    *data = wanted ? tensor.mutable_data_ptr() : nullptr;
    return tensor;
  };
  const Tensor dpreact = output(true, preact.sizes(), &args.dpreact);
  const Tensor dgate = output(gate.has_value(), preact.sizes(), &args.dgate);
  const Tensor hidden = output(need_hidden, preact.sizes(), &args.hidden);
  const int64_t cols = args.cols;
  Tensor dbias = output(need_dbias, {cols}, &args.dbias);
  Tensor dbias_gate = output(need_dbias_gate, {cols}, &args.dbias_gate);
  if (args.rows * cols == 0) {
    torch::stable::zero_(dbias);
    torch::stable::zero_(dbias_gate);
    return {dpreact, dgate, hidden, dbias, dbias_gate};
  }

  args.chunks = fastattn::activation_bwd_chunks_cuda(args);
  const Tensor partial = empty_beside(preact, {need_dbias + need_dbias_gate, args.chunks, cols}, ScalarType::Float);
  args.dbias_partial = static_cast<float*>(partial.mutable_data_ptr());
  args.dbias_gate_partial = args.dbias_partial + (need_dbias ? args.chunks * cols : 0);
  check_launch(fastattn::activation_bwd_cuda(args, current_stream(preact)), "activation_bwd");
  return {dpreact, dgate, hidden, dbias, dbias_gate};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("activation_fwd.native", TORCH_BOX(&activation_fwd));
  m.impl("activation_fwd_native", TORCH_BOX(&activation_fwd));
  m.impl("activation_bwd.native", TORCH_BOX(&activation_bwd));
}
