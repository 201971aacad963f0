// The raw ops of feed-forward on the CPU: shapes, allocation and the split over threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "api.h"
#include "check.h"
#include "dispatch.h"

namespace {

using fastattn::ActivationArgs;
using fastattn::as_rows;
using fastattn::Rows;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 16384;  // elements that pay for waking a thread

bool same_shape(const Tensor& a, const Tensor& b) {
  const auto sizes_a = a.sizes();
  const auto sizes_b = b.sizes();
  return std::equal(sizes_a.begin(), sizes_a.end(), sizes_b.begin(), sizes_b.end());
}

// What forward and backward share. Holds the rows alive, since they may be contiguous copies.
struct Call {
  Rows preact;
  std::optional<Rows> gate;
  ActivationArgs args{};

  Call(const Tensor& x, const std::optional<Tensor>& gate_tensor, const std::optional<Tensor>& rng, double dropout_p,
       int64_t activation)
      : preact(as_rows(x)) {
    STD_TORCH_CHECK(activation >= 0 && activation <= static_cast<int>(fastattn::Activation::kSilu),
                    "activation must be between 0 and 4, got ", activation);
    args.preact = preact.tensor.const_data_ptr();
    args.preact_stride = preact.stride;
    args.rows = preact.rows;
    args.cols = preact.cols;
    args.dropout = fastattn::dropout_args(rng, dropout_p);
    args.activation = static_cast<fastattn::Activation>(activation);
    args.dtype = fastattn::dtype_of(x, "preact");
    if (gate_tensor) {
      gate = like_preact(*gate_tensor, x, "gate");
      args.gate = gate->tensor.const_data_ptr();
      args.gate_stride = gate->stride;
    }
  }

  static Rows like_preact(const Tensor& tensor, const Tensor& preact, const char* name) {
    STD_TORCH_CHECK(same_shape(tensor, preact) && tensor.scalar_type() == preact.scalar_type(), name,
                    " must have the shape and dtype of preact");
    return as_rows(tensor);
  }

  int64_t blocks() const { return (args.rows + fastattn::kActivationBlockRows - 1) / fastattn::kActivationBlockRows; }
};

Tensor activation_fwd(const Tensor& preact, const std::optional<Tensor>& gate, const std::optional<Tensor>& rng,
                      double dropout_p, int64_t activation) {
  static const auto fn = FASTATTN_SELECT_CPU(activation_fwd);
  Call call(preact, gate, rng, dropout_p, activation);
  Tensor hidden = torch::stable::new_empty(preact, preact.sizes());
  call.args.hidden = hidden.mutable_data_ptr();
  torch::stable::parallel_for(0, call.args.rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, call.args.cols)),
                              [&](int64_t begin, int64_t end) { fn(call.args, begin, end); });
  return hidden;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> activation_bwd(const Tensor& dhidden, const Tensor& preact,
                                                                  const std::optional<Tensor>& gate,
                                                                  const std::optional<Tensor>& rng, double dropout_p,
                                                                  int64_t activation, bool need_hidden, bool need_dbias,
                                                                  bool need_dbias_gate) {
  static const auto fn = FASTATTN_SELECT_CPU(activation_bwd);
  static const auto dbias_fn = FASTATTN_SELECT_CPU(activation_dbias);
  Call call(preact, gate, rng, dropout_p, activation);
  ActivationArgs& args = call.args;
  const Rows dhidden_rows = Call::like_preact(dhidden, preact, "dhidden");
  args.dhidden = dhidden_rows.tensor.const_data_ptr();
  args.dhidden_stride = dhidden_rows.stride;

  const int64_t none[] = {0};
  const auto output = [&](bool wanted, void** pointer) {
    Tensor tensor = wanted ? torch::stable::new_empty(preact, preact.sizes()) : torch::stable::new_empty(preact, none);
    *pointer = wanted ? tensor.mutable_data_ptr() : nullptr;
    return tensor;
  };
  Tensor dpreact = output(true, &args.dpreact);
  Tensor dgate = output(gate.has_value(), &args.dgate);
  Tensor hidden = output(need_hidden, &args.hidden);

  std::optional<Tensor> partials[2];
  const auto bias_output = [&](bool wanted, std::optional<Tensor>& partial, float** partial_pointer, void** pointer) {
    const int64_t size[] = {wanted ? args.cols : 0};
    Tensor tensor = torch::stable::new_empty(preact, size);
    if (wanted) {
      const int64_t partial_size[] = {call.blocks(), args.cols};
      partial = torch::stable::new_empty(preact, partial_size, ScalarType::Float);
      *partial_pointer = static_cast<float*>(partial->mutable_data_ptr());
      *pointer = tensor.mutable_data_ptr();
    }
    return tensor;
  };
  Tensor dbias = bias_output(need_dbias, partials[0], &args.dbias_partial, &args.dbias);
  Tensor dbias_gate = bias_output(need_dbias_gate && gate, partials[1], &args.dbias_gate_partial, &args.dbias_gate);

  const int64_t block_elements = std::max<int64_t>(1, fastattn::kActivationBlockRows * args.cols);
  torch::stable::parallel_for(0, call.blocks(), std::max<int64_t>(1, kGrain / block_elements),
                              [&](int64_t begin, int64_t end) { fn(args, begin, end); });
  if (args.dbias || args.dbias_gate) {
    torch::stable::parallel_for(0, args.cols, std::max<int64_t>(64, kGrain / std::max<int64_t>(1, call.blocks())),
                                [&](int64_t begin, int64_t end) { dbias_fn(args, begin, end); });
  }
  return {dpreact, dgate, hidden, dbias, dbias_gate};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("activation_fwd.native", TORCH_BOX(&activation_fwd));
  m.impl("activation_bwd.native", TORCH_BOX(&activation_bwd));
}
