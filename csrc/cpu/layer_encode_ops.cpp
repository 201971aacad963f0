// fastattn::layer_encode for CPU tensors: an encoder or decoder layer without gradients.
#include <torch/csrc/stable/library.h>

#include "layer_encode.h"

namespace {

using fastattn::LayerOptions;
using fastattn::OptionalTensor;
using torch::stable::Tensor;

Tensor layer_encode(const Tensor& x, std::vector<Tensor> norms, std::vector<Tensor> linears, OptionalTensor mask,
                    OptionalTensor bias, bool causal, std::vector<Tensor> memory, bool memory_causal, bool batch_first,
                    int64_t most_few_rows, int64_t most_own_rows, int64_t n_heads, bool norm_first, int64_t activation,
                    double eps1, double eps2, double eps3) {
  const LayerOptions options{n_heads, norm_first, activation, {eps1, eps2, eps3}, most_few_rows, most_own_rows};
  const fastattn::Memory read(memory, memory_causal);
  return fastattn::EncodeLayer(x, norms, linears, options, batch_first, read).run(mask, bias, causal);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("layer_encode.native", TORCH_BOX(&layer_encode));
}
