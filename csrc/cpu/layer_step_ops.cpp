// fastattn::layer_encode_fwd and layer_encode_bwd for CPU tensors: an encoder layer in a training step.
#include <torch/csrc/stable/library.h>

#include "layer_step.h"

namespace {

using fastattn::EncodeStep;
using fastattn::OptionalTensor;
using fastattn::StepOptions;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layer_encode_fwd(const Tensor& x, std::vector<Tensor> norms,
                                                                    std::vector<Tensor> linears, OptionalTensor mask,
                                                                    OptionalTensor bias, OptionalTensor rng,
                                                                    std::vector<double> options) {
  const StepOptions values(options);
  const Tensor weights =
      fastattn::empty_cpu({values.autocast ? fastattn::elements_in_bf16(linears) : 0}, ScalarType::BFloat16);
  const std::vector<Tensor> operands = values.autocast ? fastattn::in_bf16(linears, weights, true) : linears;
  const auto [y, kept] = EncodeStep(x, norms, operands, linears, mask, bias, rng, values).forward(weights);
  return {y, kept.qkv, kept.preact, kept.others, kept.weights};
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

std::vector<Tensor> layer_encode_bwd(const Tensor& dy, const Tensor& qkv, const Tensor& preact, const Tensor& others,
                                     const Tensor& weights, bool need_dx, const Tensor& x, std::vector<Tensor> norms,
                                     std::vector<Tensor> linears, OptionalTensor mask, OptionalTensor bias,
                                     OptionalTensor rng, std::vector<double> options) {
  const StepOptions values(options);
  norms = all_contiguous(std::move(norms));
  linears = all_contiguous(std::move(linears));
  const std::vector<Tensor> kept = all_contiguous({qkv, preact, others, weights});
  rng = fastattn::contiguous(rng);
  std::vector<Tensor> operands = linears;
  if (values.autocast) {
    fastattn::layer_tensor(kept[3], {fastattn::elements_in_bf16(linears)}, "weights", ScalarType::BFloat16);
    operands = fastattn::in_bf16(linears, kept[3], false);
  }
  EncodeStep step(x, norms, operands, linears, mask, bias, rng, values);
  return step.backward(dy, {kept[0], kept[1], kept[2], kept[3]}, need_dx);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("layer_encode_fwd.native", TORCH_BOX(&layer_encode_fwd));
  m.impl("layer_encode_bwd.native", TORCH_BOX(&layer_encode_bwd));
}
