// fastattn::layer_encode_fwd and layer_encode_bwd for CPU tensors: an encoder or decoder layer in a training step, or
// its self-attention alone, if there are no tensors for the rest.
#include <torch/csrc/stable/library.h>

#include "attention_step.h"
#include "layer_step.h"

namespace {

using fastattn::AttentionStep;
using fastattn::EncodeStep;
using fastattn::Memory;
using fastattn::OptionalTensor;
using fastattn::StepOptions;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr size_t kAttentionAlone = 6;  // tensors of in_proj and out_proj: weight, scale and bias

template <typename Work>
std::vector<Tensor> run_alone(const Tensor& x, const std::vector<Tensor>& linears, const OptionalTensor& mask,
                              const OptionalTensor& bias, const Memory& memory, const OptionalTensor& rng,
                              const StepOptions& options, const Work& work) {
  STD_TORCH_CHECK(x.dim() == 3, "layer: x must have 3 dimensions, got ", x.dim());
  const std::vector<Tensor> norms(4, fastattn::empty_cpu({0}, ScalarType::Float));
  const std::vector<Tensor> all = AttentionStep::with_hidden_layer(linears, x);
  AttentionStep step(x, norms, all, mask, bias, memory, rng, options);
  return work(step);
}

std::vector<Tensor> layer_encode_fwd(const Tensor& x, std::vector<Tensor> norms, std::vector<Tensor> linears,
                                     OptionalTensor mask, OptionalTensor bias, std::vector<Tensor> memory,
                                     OptionalTensor rng, std::vector<double> options) {
  const StepOptions values(options);
  const Memory read(memory, values.memory_causal);
  if (linears.size() == kAttentionAlone) {
    return run_alone(x, linears, mask, bias, read, rng, values, [](AttentionStep& step) { return step.forward(); });
  }
  const Tensor weights =
      fastattn::empty_cpu({values.autocast ? fastattn::elements_in_bf16(linears) : 0}, ScalarType::BFloat16);
  const std::vector<Tensor> operands = values.autocast ? fastattn::in_bf16(linears, weights, true) : linears;
  return EncodeStep(x, norms, operands, linears, mask, bias, read, rng, values).forward(weights);
}

// With the strides that the forward saw: hooks for saved tensors, or a new `data` of a parameter, may bring others.
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
  if (linears.size() == kAttentionAlone) {
    return run_alone(x, linears, mask, bias, read, rng, values,
                     [&](AttentionStep& step) { return step.backward(dy, kept, need_dx); });
  }
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
