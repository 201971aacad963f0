#pragma once
// Converts the tensors of activation_fwd and activation_bwd to ActivationArgs, for the wrappers of both devices.
#include <tuple>

#include "check.h"

namespace fastattn {

// Holds the rows of the operands, which may be contiguous copies of them.
struct ActivationCall {
  Rows preact;
  Rows gate;
  ActivationArgs args{};

  ActivationCall(const Tensor& x, const std::optional<Tensor>& gate_tensor, const std::optional<Tensor>& rng,
                 double dropout_p, int64_t activation)
      : preact(as_rows(x)), gate(operand(gate_tensor, x, "gate")) {
    STD_TORCH_CHECK(activation >= 0 && activation <= static_cast<int>(Activation::kSilu),
                    "activation must be between 0 and 4, got ", activation);
    args.preact = data_of(preact.tensor);
    args.gate = gate_tensor ? data_of(gate.tensor) : nullptr;
    args.preact_stride = preact.stride;
    args.gate_stride = gate.stride;
    args.rows = preact.rows;
    args.cols = preact.cols;
    args.dropout = dropout_args(rng, dropout_p);
    args.activation = static_cast<Activation>(activation);
    args.dtype = dtype_of(x, "preact");
  }

  static Rows operand(const std::optional<Tensor>& tensor, const Tensor& preact, const char* name) {
    STD_TORCH_CHECK(!tensor || tensor->scalar_type() == preact.scalar_type(), name, " must have the dtype of preact");
    return as_rows_like(tensor, preact, name);
  }
};

struct ActivationForwardCall : ActivationCall {
  Tensor hidden;

  ActivationForwardCall(const Tensor& x, const std::optional<Tensor>& gate_tensor, const std::optional<Tensor>& rng,
                        double dropout_p, int64_t activation)
      : ActivationCall(x, gate_tensor, rng, dropout_p, activation),
        hidden(empty_beside(x, x.sizes(), x.scalar_type())) {
    args.hidden = hidden.mutable_data_ptr();
  }
};

struct ActivationBackwardCall : ActivationCall {
  Rows dhidden;
  Tensor dpreact, dgate, hidden, dbias, dbias_gate;

  ActivationBackwardCall(const Tensor& dhidden_in, const Tensor& x, const std::optional<Tensor>& gate_tensor,
                         const std::optional<Tensor>& rng, double dropout_p, int64_t activation, bool need_hidden,
                         bool need_dbias, bool need_dbias_gate)
      : ActivationCall(x, gate_tensor, rng, dropout_p, activation), dhidden(operand(dhidden_in, x, "dhidden")) {
    args.dhidden = data_of(dhidden.tensor);
    args.dhidden_stride = dhidden.stride;
    const Place place(x);
    const ScalarType dtype = x.scalar_type();
    const auto output = [&](bool wanted, torch::headeronly::IntHeaderOnlyArrayRef sizes, void** data) {
      const Tensor tensor = wanted ? place.empty(sizes, dtype) : place.empty({0}, dtype);
      *data = wanted ? tensor.mutable_data_ptr() : nullptr;
      return tensor;
    };
    dpreact = output(true, x.sizes(), &args.dpreact);
    dgate = output(gate_tensor.has_value(), x.sizes(), &args.dgate);
    hidden = output(need_hidden, x.sizes(), &args.hidden);
    dbias = output(need_dbias, {args.cols}, &args.dbias);
    dbias_gate = output(need_dbias_gate && gate_tensor, {args.cols}, &args.dbias_gate);
  }

  bool needs_sums() const { return args.dbias || args.dbias_gate; }

  // Allocates the sums of `chunks` chunks of rows. The tensor must live until the kernels have run.
  Tensor make_sums(const Tensor& like, int64_t chunks) {
    const bool both = args.dbias && args.dbias_gate;
    const Tensor sums = empty_beside(like, {needs_sums() ? both + 1 : 0, chunks, args.cols}, ScalarType::Float);
    float* first = static_cast<float*>(sums.mutable_data_ptr());
    args.dbias_partial = args.dbias ? first : nullptr;
    args.dbias_gate_partial = args.dbias_gate ? first + (both ? chunks * args.cols : 0) : nullptr;
    return sums;
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> results() const {
    return {dpreact, dgate, hidden, dbias, dbias_gate};
  }
};

}  // namespace fastattn
