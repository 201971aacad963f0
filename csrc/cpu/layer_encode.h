#pragma once
// An encoder layer: self-attention on the rows that in_proj wrote, in the frame of layer.h.
#include <array>
#include <cmath>

#include "attention_call.h"
#include "attention_run.h"
#include "layer.h"

namespace fastattn {

constexpr char kEncode[] = "layer_encode: ";

// An encoder layer without gradients, in fp32 or bf16.
class EncodeLayer : protected Layer {
 public:
  EncodeLayer(const Tensor& x, const std::vector<Tensor>& norms, const std::vector<Tensor>& linears,
              const LayerOptions& options, bool batch_first, std::optional<ScalarType> dtype = std::nullopt)
      : Layer(x, norms, linears, options, dtype), batch_first_(batch_first) {
    for (const auto& linear : linears_) {
      STD_TORCH_CHECK(is_bf16() || linear.type == WeightType::kFloat32, kEncode,
                      "weights must have the dtype of the products");
    }
    const int64_t heads = linears_[kOut].k;
    STD_TORCH_CHECK(heads % options.n_heads == 0 && linears_[kIn].n == 3 * heads, kEncode,
                    "in_proj and out_proj must fit ", options.n_heads, " heads, got ", linears_[kIn].n, " rows and ",
                    heads, " columns");
  }

  Tensor run(const OptionalTensor& mask, const OptionalTensor& bias, bool causal) {
    set_attention(mask, bias, causal);
    return Layer::run();
  }

 protected:
  void set_attention(const OptionalTensor& mask, const OptionalTensor& bias, bool causal) {
    args_.batch = x_.size(batch_first_ ? 0 : 1);
    args_.seqlen_q = args_.seqlen_k = x_.size(batch_first_ ? 1 : 0);
    args_.n_heads = args_.n_kv_heads = options_.n_heads;
    args_.head_dim = args_.head_dim_v = linears_[kOut].k / options_.n_heads;
    args_.window_left = -1;
    args_.window_right = causal ? 0 : -1;
    args_.top_left = true;
    args_.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(std::max<int64_t>(1, args_.head_dim))));
    args_.dtype = kernel_dtype();
    const std::array<int64_t, 4> full{args_.batch, args_.n_heads, args_.seqlen_q, args_.seqlen_k};
    if (mask) {
      STD_TORCH_CHECK(mask->is_cpu() && mask->scalar_type() == ScalarType::Bool, kEncode, "mask must be bool");
      args_.mask = checked_scores(*mask, full, "mask");
    }
    if (bias) {
      STD_TORCH_CHECK(bias->is_cpu(), kEncode, "bias must be on the CPU");
      args_.bias_dtype = dtype_of(*bias, "bias");
      args_.bias = checked_scores(*bias, full, "bias");
    }
  }

  // (batch, heads, seqlen, head_dim): the first, second or third part of rows that hold q, k and v or their gradients.
  HeadTensor part(void* qkv, int64_t which) const {
    const int64_t size = is_bf16() ? 2 : sizeof(float);
    return heads_of(static_cast<char*>(qkv) + which * linears_[kOut].k * size, 3);
  }

  // The same of contiguous rows, which hold `parts` such tensors.
  HeadTensor heads_of(void* data, int64_t parts) const {
    const int64_t row = parts * linears_[kOut].k;
    // in rows: how far sequences and the tokens of one lie from each other
    const int64_t sequence = batch_first_ ? args_.seqlen_q : 1, token = batch_first_ ? 1 : args_.batch;
    return {data, sequence * row, args_.head_dim, token * row};
  }

  void attend(void* qkv, void* out, float*) override {
    args_.q = part(qkv, 0);
    args_.k = part(qkv, 1);
    args_.v = part(qkv, 2);
    args_.out = heads_of(out, 1);
    run_attention_fwd(args_);
  }

  const bool batch_first_;
  AttentionCpuArgs args_{};
};

}  // namespace fastattn
