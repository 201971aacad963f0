#pragma once
// Self-attention with its projections in a training step: the first sub-layer of layer_step.h alone, without a norm.
#include "layer_step_parts.h"

namespace fastattn {

class AttentionStep : StepParts {
 public:
  // linears: of in_proj and out_proj, and empty ones for the hidden layer.
  AttentionStep(const Tensor& x, const std::vector<Tensor>& norms, const std::vector<Tensor>& linears,
                const OptionalTensor& mask, const OptionalTensor& bias, const Memory& memory, const OptionalTensor& rng,
                const StepOptions& options)
      : StepParts(x, norms, linears, linears, mask, bias, memory, rng, options, false) {
    STD_TORCH_CHECK(!mixed_, "layer_encode_fwd: autocast is not supported without a hidden layer");
  }

  // linears as the class takes them, of the four tensors with two absent scales that the op gets.
  static std::vector<Tensor> with_hidden_layer(std::vector<Tensor> linears, const Tensor& x) {
    const int64_t width = x.size(x.dim() - 1);
    const Tensor none = empty_cpu({0}, ScalarType::Float);
    for (const Tensor& t :
         {empty_cpu({0, width}, x.scalar_type()), none, none, empty_cpu({width, 0}, x.scalar_type()), none, none}) {
      linears.push_back(t);
    }
    return linears;
  }

  // The result, q, k and v, and the rest of what the backward reads.
  std::vector<Tensor> forward() {
    const Tensor y = empty_cpu({x_.size(0), x_.size(1), width_}, stream_);
    const std::vector<Tensor> kept{empty_cpu({tokens_, 3 * heads_}, dtype_),
                                   empty_cpu({tokens_, other_columns()}, ScalarType::Float)};
    if (y.numel() != 0) {
      place(kept);
      product(kIn, input_, qkv_, nullptr);
      attend(qkv_, attended_, nullptr);
      product(kOut, attended_, y.mutable_data_ptr(), nullptr);
    }
    return {y, kept[0], kept[1]};
  }

  // The gradients of x, if it is wanted, and of weight and bias of in_proj and out_proj.
  std::vector<Tensor> backward(const Tensor& dy_in, const std::vector<Tensor>& kept, bool need_dx) {
    const Tensor dy = contiguous_copy(dy_in);
    layer_tensor(dy, {x_.size(0), x_.size(1), width_}, "dy", stream_);
    STD_TORCH_CHECK(kept.size() == 2, "layer_encode_bwd: kept must be 2 tensors, got ", kept.size());
    layer_tensor(kept[0], {tokens_, 3 * heads_}, "qkv", dtype_);
    layer_tensor(kept[1], {tokens_, other_columns()}, "what the forward kept");
    std::vector<Tensor> grads{need_dx ? empty_cpu({x_.size(0), x_.size(1), width_}, stream_) : empty_cpu({0}, stream_)};
    for (const Linear which : {kIn, kOut}) {
      grads.push_back(empty_cpu({linears_[which].n, linears_[which].k}, stream_));
      dweight_[which] = grads.back().mutable_data_ptr();
      grads.push_back(empty_cpu({bias_of(which) ? linears_[which].n : 0}, stream_));
      dbias_[which] = bias_of(which) ? grads.back().mutable_data_ptr() : nullptr;
    }
    if (tokens_ == 0 || width_ == 0) {
      for (Tensor& grad : grads) {
        torch::stable::zero_(grad);
      }
      return grads;
    }
    place(kept);
    const Scratch buffer(
        (Scratch::whole_lines(size_ * tokens_ * heads_) + Scratch::whole_lines(size_ * tokens_ * 3 * heads_)) / 4,
        kMostKept);
    Pieces pieces(buffer.data());
    void *dattended = pieces.take(size_ * tokens_ * heads_), *dqkv = pieces.take(size_ * tokens_ * 3 * heads_);
    add_columns(kOut, data_of(dy));
    attention_gradient(data_of(dy), dattended, dqkv);
    if (need_dx) {
      input_gradient(kIn, dqkv, grads[0].mutable_data_ptr(), false);
    }
    return grads;
  }

 private:
  int64_t other_columns() const { return 2 * options_.n_heads + (size_ * heads_ + 3) / 4; }

  void place(const std::vector<Tensor>& kept) {
    qkv_ = const_cast<void*>(data_of(kept[0]));
    Pieces others(const_cast<void*>(data_of(kept[1])));
    args_.lse = static_cast<float*>(others.take_exact(tokens_ * 4 * options_.n_heads));
    args_.lse_low = static_cast<float*>(others.take_exact(tokens_ * 4 * options_.n_heads));
    attended_ = others.take_exact(tokens_ * size_ * heads_);
    in_ = const_cast<void*>(input_);
  }
};

}  // namespace fastattn
