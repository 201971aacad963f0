// fastattn::layer_encode_fwd and layer_encode_bwd for CPU tensors: an encoder or decoder layer in a training step.
#include <torch/csrc/stable/library.h>

#include "layer_step.h"

namespace {

using fastattn::EncodeStep;
using fastattn::Memory;
using fastattn::OptionalTensor;
using fastattn::StepOptions;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::vector<Tensor> layer_encode_fwd(const Tensor& x, std::vector<Tensor> norms, std::vector<Tensor> linears,
                                     OptionalTensor mask, OptionalTensor bias, std::vector<Tensor> memory,
                                     OptionalTensor rng, std::vector<double> options) {
  const StepOptions values(options);
  const Memory read(memory, values.memory_causal);
  const Tensor weights =
      fastattn::empty_cpu({values.autocast ? fastattn::elements_in_bf16(linears) : 0}, ScalarType::BFloat16);
  const std::vector<Tensor> operands = values.autocast ? fastattn::in_bf16(linears, weights, true) : linears;
  return EncodeStep(x, norms, operands, linears, mask, bias, read, rng, values).forward(weights);
}

// Makes the tensors contiguous, as the forward saw them. Hooks for saved tensors, or a new `data` of a parameter, may
// have changed the strides.
std::vector<Tensor> all_contiguous(std::vector<Tensor> tensors) {
  for (Tensor& t : tensors) {
    if (!t.is_contiguous()) {
      t = fastattn::contiguous_copy(t);
    }
  }
  return tensors;
}

std::vector<Tensor> layer_encode_bwd(const Tensor& dy, std::vector<Tensor> kept, bool need_dx, bool need_dmemory,
                                     const Tensor& x, std::vector<Tensor> norms, std::vector<Tensor> linears,
                                     OptionalTensor mask, OptionalTensor bias, std::vector<Tensor> memory,
                                     OptionalTensor rng, std::vector<double> options) {
  const StepOptions values(options);
  const Memory read(memory, values.memory_causal);
  norms = all_contiguous(std::move(norms));
  linears = all_contiguous(std::move(linears));
  kept = all_contiguous(std::move(kept));
  rng = fastattn::contiguous(rng);
  std::vector<Tensor> operands = linears;
  if (values.autocast) {
    STD_TORCH_CHECK(kept.size() > fastattn::kWeights, "layer_encode_bwd: kept must have the weights");
    const Tensor& weights = kept[fastattn::kWeights];
    fastattn::layer_tensor(weights, {fastattn::elements_in_bf16(linears)}, "weights", ScalarType::BFloat16);
    operands = fastattn::in_bf16(linears, weights, false);
  }
  EncodeStep step(x, norms, operands, linears, mask, bias, read, rng, values);
  return step.backward(dy, kept, need_dx, need_dmemory);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("layer_encode_fwd.native", TORCH_BOX(&layer_encode_fwd));
  m.impl("layer_encode_bwd.native", TORCH_BOX(&layer_encode_bwd));
}
