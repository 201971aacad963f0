#pragma once
// The operands that activation_fwd and activation_bwd share, from tensors to the arguments of the kernels.
#include "check.h"

namespace fastattn {

// It holds the rows, which may be contiguous copies of the operands.
struct ActivationCall {
  Rows preact;
  Rows gate;
  ActivationArgs args{};

  ActivationCall(const Tensor& x, const std::optional<Tensor>& gate_tensor, const std::optional<Tensor>& rng,
                 double dropout_p, int64_t activation)
      : preact(as_rows(x)), gate(operand(gate_tensor, x, "gate")) {
    STD_TORCH_CHECK(activation >= 0 && activation <= static_cast<int>(Activation::kSilu),
                    "activation must be between 0 and 4, got ", activation);
    args.preact = preact.tensor.const_data_ptr();
    args.gate = gate_tensor ? gate.tensor.const_data_ptr() : nullptr;
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

}  // namespace fastattn
