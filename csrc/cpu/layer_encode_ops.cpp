// fastattn::layer_encode for CPU tensors: an encoder layer without gradients.
#include <torch/csrc/stable/library.h>

#include "attention_call.h"
#include "attention_run.h"
#include "layer.h"

namespace {

using fastattn::AttentionCpuArgs;
using fastattn::LayerOptions;
using fastattn::OptionalTensor;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr char kOp[] = "layer_encode: ";

class EncodeLayer : fastattn::Layer {
 public:
  EncodeLayer(const Tensor& x, const std::vector<Tensor>& norms, const std::vector<Tensor>& linears,
              const LayerOptions& options, bool batch_first)
      : Layer(x, norms, linears, options), batch_first_(batch_first) {
    for (const auto& linear : linears_) {
      STD_TORCH_CHECK(linear.type == fastattn::WeightType::kFloat32, kOp, "weights must be float32");
    }
    const int64_t heads = linears_[kOut].k;
    STD_TORCH_CHECK(heads % options.n_heads == 0 && linears_[kIn].n == 3 * heads, kOp, "in_proj and out_proj must fit ",
                    options.n_heads, " heads, got ", linears_[kIn].n, " rows and ", heads, " columns");
  }

  Tensor run(const OptionalTensor& mask, const OptionalTensor& bias, bool causal) {
    args_.batch = x_.size(batch_first_ ? 0 : 1);
    args_.seqlen_q = args_.seqlen_k = x_.size(batch_first_ ? 1 : 0);
    args_.n_heads = args_.n_kv_heads = options_.n_heads;
    args_.head_dim = args_.head_dim_v = linears_[kOut].k / options_.n_heads;
    args_.window_left = -1;
    args_.window_right = causal ? 0 : -1;
    args_.top_left = true;
    args_.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(std::max<int64_t>(1, args_.head_dim))));
    args_.dtype = fastattn::DType::kFloat32;
    const std::array<int64_t, 4> full{args_.batch, args_.n_heads, args_.seqlen_q, args_.seqlen_k};
    if (mask) {
      STD_TORCH_CHECK(mask->is_cpu() && mask->scalar_type() == ScalarType::Bool, kOp, "mask must be bool");
      args_.mask = fastattn::checked_scores(*mask, full, "mask");
    }
    if (bias) {
      STD_TORCH_CHECK(bias->is_cpu(), kOp, "bias must be on the CPU");
      args_.bias_dtype = fastattn::dtype_of(*bias, "bias");
      args_.bias = fastattn::checked_scores(*bias, full, "bias");
    }
    return Layer::run();
  }

 private:
  void attend(float* qkv, float* out, float*) override {
    const int64_t head = args_.head_dim, width = args_.n_heads * head, row = 3 * width;
    // in rows: how far sequences and the tokens of one lie from each other
    const int64_t sequence = batch_first_ ? args_.seqlen_q : 1, token = batch_first_ ? 1 : args_.batch;
    const auto heads_at = [&](int64_t first) {
      return fastattn::HeadTensor{qkv + first * width, sequence * row, head, token * row};
    };
    args_.q = heads_at(0);
    args_.k = heads_at(1);
    args_.v = heads_at(2);
    args_.out = {out, sequence * width, head, token * width};
    fastattn::run_attention_fwd(args_);
  }

  const bool batch_first_;
  AttentionCpuArgs args_{};
};

Tensor layer_encode(const Tensor& x, std::vector<Tensor> norms, std::vector<Tensor> linears, OptionalTensor mask,
                    OptionalTensor bias, bool causal, bool batch_first, int64_t most_few_rows, int64_t most_own_rows,
                    int64_t n_heads, bool norm_first, int64_t activation, double eps1, double eps2) {
  const LayerOptions options{n_heads, norm_first, activation, {eps1, eps2}, most_few_rows, most_own_rows};
  return EncodeLayer(x, norms, linears, options, batch_first).run(mask, bias, causal);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("layer_encode.native", TORCH_BOX(&layer_encode));
}
