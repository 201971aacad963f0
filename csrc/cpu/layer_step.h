#pragma once
// A training step of an encoder or decoder layer in the frame of layer.h: the forward and the gradients.
//
// The forward saves what the backward reads in a few tensors instead of one, because malloc reuses blocks of up to
// 32 MiB only. All other memory stays with the thread.
// The biases of out_proj and of a post-norm layer's linear2 are added by the norm that follows, and its backward
// computes their gradients. Where two gradients are added, the kernel that computes the second
// one does it.
//
// There are two dtypes. x, y, the memory, the sums that the norms read, all parameters and the gradients of these have
// the dtype of the stream. The operands of products and everything else between the kernels have the other one. They
// differ only under autocast: fp32 and bf16.
#include "layer_step_parts.h"

namespace fastattn {

class EncodeStep : StepParts {
 public:
  using StepParts::StepParts;

  // Returns y and the tensors that the backward reads.
  std::vector<Tensor> forward(const Tensor& weights) {
    const Tensor y = empty_cpu({x_.size(0), x_.size(1), width_}, stream_);
    std::vector<Tensor> kept{rows_of(3 * heads_, dtype_), rows_of(d_ff_, dtype_),
                             rows_of(other_columns(), ScalarType::Float), weights};
    if (crosses_) {
      kept.push_back(rows_of(crossed_columns(), ScalarType::Float));
      kept.push_back(empty_cpu({memory_tokens_, memory_columns()}, dtype_));
    }
    if (y.numel() != 0) {
      place(kept);
      compute(y.mutable_data_ptr());
    }
    kept.insert(kept.begin(), y);
    return kept;
  }

  // Returns the gradients in this order: x, if wanted; weight and bias of in_proj, out_proj, linear1 and linear2, then
  // of a decoder layer's attention to the memory; norm1, norm2, norm3; the memory, if wanted.
  std::vector<Tensor> backward(const Tensor& dy_in, const std::vector<Tensor>& kept, bool need_dx, bool need_dmemory) {
    const Tensor dy = contiguous_copy(dy_in);
    layer_tensor(dy, {x_.size(0), x_.size(1), width_}, "dy", stream_);
    check(kept);
    std::vector<Tensor> grads;
    const auto add = [&](bool wanted, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
      grads.push_back(wanted ? empty_cpu(sizes, stream_) : empty_cpu({0}, stream_));
      return wanted ? grads.back().mutable_data_ptr() : nullptr;
    };
    void* dx = add(need_dx, {x_.size(0), x_.size(1), width_});
    for (int which = 0; which < (crosses_ ? kCrossQ : kGate); ++which) {
      const auto linear = static_cast<Linear>(which);
      dweight_[which] = add(true, {linears_[which].n, linears_[which].k});
      dbias_[which] = add(deferred_[which] || bias_of(linear), {linears_[which].n});
    }
    for (size_t i = 0; i < norms_.size(); ++i) {
      dnorms_[i] = add(norms_[i].numel() != 0, {width_});
    }
    void* dmemory = nullptr;
    if (crosses_) {
      divide(kCrossQ, 0);
      divide(kCrossKv, heads_);
      const Tensor& t = *memory_.tokens;
      dmemory = add(need_dmemory, {t.size(0), t.size(1), width_});
    }
    if (tokens_ == 0 || width_ == 0) {
      for (Tensor& grad : grads) {
        torch::stable::zero_(grad);
      }
      return grads;
    }
    place(kept);
    compute_gradients(data_of(dy), need_dx ? dx : nullptr, need_dmemory ? dmemory : nullptr);
    return grads;
  }

 private:
  static constexpr int64_t kMostKept = 1 << 28;  // the tensors that a layer keeps for its backward are about as large

  // The gradients of the rows of the memory's in_proj from `first` on.
  void divide(Linear which, int64_t first) {
    dweight_[which] = static_cast<char*>(dweight_[kCrossIn]) + first * width_ * stream_size_;
    dbias_[which] = dbias_[kCrossIn] ? static_cast<char*>(dbias_[kCrossIn]) + first * stream_size_ : nullptr;
  }

  int64_t statistics() const { return 2 * options_.n_heads + 4; }
  bool keeps_input() const { return pre_ || mixed_; }  // the input of in_proj, if it is not x itself
  int64_t other_columns() const {
    const int64_t stream = stream_size_ * width_ * (pre_ ? 1 : 2);
    return statistics() + (stream + size_ * (heads_ + width_ * (keeps_input() ? 2 : 1)) + 3) / 4;
  }
  int64_t crossed_columns() const {
    return 2 * options_.n_heads + 2 + (stream_size_ * width_ + size_ * (2 * heads_ + width_) + 3) / 4;
  }
  int64_t memory_columns() const { return 2 * heads_ + (mixed_ ? width_ : 0); }
  Tensor rows_of(int64_t cols, ScalarType dtype) const { return empty_cpu({tokens_, cols}, dtype); }

  void check(const std::vector<Tensor>& kept) const {
    STD_TORCH_CHECK(kept.size() == (crosses_ ? 6 : 4), "layer_encode_bwd: kept must be ", crosses_ ? 6 : 4,
                    " tensors, got ", kept.size());
    layer_tensor(kept[kQkv], {tokens_, 3 * heads_}, "qkv", dtype_);
    layer_tensor(kept[kPreact], {tokens_, d_ff_}, "preact", dtype_);
    layer_tensor(kept[kOthers], {tokens_, other_columns()}, "what the forward kept");
    if (crosses_) {
      layer_tensor(kept[kCrossed], {tokens_, crossed_columns()}, "what the forward kept");
      layer_tensor(kept[kMemory], {memory_tokens_, memory_columns()}, "what the forward kept", dtype_);
    }
  }

  // Divides the memory that the forward saves for the backward.
  void place(const std::vector<Tensor>& kept) {
    const auto memory = [](const Tensor& t) { return const_cast<void*>(data_of(t)); };
    qkv_ = memory(kept[kQkv]);
    preact_ = memory(kept[kPreact]);
    Pieces others(memory(kept[kOthers]));
    const auto take = [&](int64_t bytes) { return others.take_exact(tokens_ * bytes); };
    const auto take_lse = [&](AttentionCpuArgs& args) {
      args.lse = static_cast<float*>(take(4 * options_.n_heads));
      args.lse_low = static_cast<float*>(take(4 * options_.n_heads));
    };
    take_lse(args_);
    stats_[0] = static_cast<float*>(take(8));
    stats_[1] = static_cast<float*>(take(8));
    first_sum_ = take(stream_size_ * width_);
    second_sum_ = pre_ ? nullptr : take(stream_size_ * width_);
    attended_ = take(size_ * heads_);
    middle_ = hidden_in_ = take(size_ * width_);
    in_ = keeps_input() ? take(size_ * width_) : const_cast<void*>(input_);
    if (!crosses_) {
      return;
    }
    others = Pieces(memory(kept[kCrossed]));
    take_lse(cross_);
    stats_[2] = static_cast<float*>(take(8));
    cross_sum_ = take(stream_size_ * width_);
    cross_q_ = take(size_ * heads_);
    cross_attended_ = take(size_ * heads_);
    hidden_in_ = take(size_ * width_);
    kv_ = memory(kept[kMemory]);
    memory_in_ = mixed_ ? static_cast<char*>(kv_) + memory_tokens_ * 2 * heads_ * size_
                        : const_cast<void*>(data_of(*memory_.tokens));
  }

  // first_sum = x + dropout(attention) and middle = norm(first_sum). A decoder layer also has hidden_in =
  // norm(cross_sum) with cross_sum = r + dropout(attention to the memory), where r is first_sum if pre-norm, otherwise
  // middle.
  void compute(void* y) {
    const int64_t width = tokens_ * width_, wide_bytes = widens() ? Scratch::whole_lines(4 * width) : 0;
    const Scratch buffer((Scratch::whole_lines(size_ * width) + Scratch::whole_lines(size_ * tokens_ * d_ff_) +
                          (crosses_ ? 3 : 2) * wide_bytes) /
                             4,
                         kMostKept);
    Pieces pieces(buffer.data());
    void *sum = pieces.take(size_ * width), *hidden = pieces.take(size_ * tokens_ * d_ff_);
    void* wide = widens() ? pieces.take(4 * width) : nullptr;
    void* middle = widens() ? pieces.take(4 * width) : middle_;
    if (pre_) {
      normalise(0, input_, nullptr, nullptr, kNoDropout, nullptr, in_);
    } else if (mixed_) {
      drop(input_, stream_dtype(), nullptr, kNoDropout, in_, kernel_dtype());
    }
    product(kIn, in_, qkv_, nullptr);
    attend(qkv_, attended_, nullptr);
    product(kOut, attended_, sum, nullptr);
    normalise(pre_ ? 1 : 0, widened(sum, wide), deferred_[kOut], input_, dropout_[kFirst], first_sum_, middle);
    narrowed(middle, middle_);
    void *last_sum = first_sum_, *last = middle;
    if (crosses_) {
      last_sum = cross_sum_;
      last = widens() ? pieces.take(4 * width) : hidden_in_;
      if (mixed_) {
        run_conversion(data_of(*memory_.tokens), stream_dtype(), memory_in_, kernel_dtype(), memory_tokens_, width_);
      }
      cross_to(memory_in_, middle_, cross_q_, kv_, cross_attended_, sum);
      normalise(pre_ ? 2 : 1, widened(sum, wide), deferred_[kCrossOut], pre_ ? first_sum_ : middle,
                dropout_[kCrossSecond], cross_sum_, last);
      narrowed(last, hidden_in_);
    }
    product(kUp, hidden_in_, preact_, nullptr);
    ActivationArgs act = activation_args(preact_, nullptr, hidden);
    act.dropout = dropout_[kHidden];
    run_activation_fwd(act);
    product(kDown, hidden, sum, nullptr);
    if (pre_) {
      drop(sum, kernel_dtype(), last_sum, dropout_[kSecond], y, stream_dtype());
    } else {
      normalise(last_norm(), widened(sum, wide), deferred_[kDown], last, dropout_[kSecond], second_sum_, y);
    }
  }

  int last_norm() const { return crosses_ ? 2 : 1; }

  void compute_gradients(const void* dy, void* dx, void* dmemory) {
    NormBwdArgs chunks{};
    chunks.rows = tokens_;
    set_norm_chunks(chunks);
    blocks_ = (tokens_ + kActivationBlockRows - 1) / kActivationBlockRows;
    const int64_t narrow = tokens_ * std::max(width_, heads_);
    const int64_t sizes[] = {
        size_ * tokens_ * d_ff_,
        size_ * tokens_ * std::max(d_ff_, 3 * heads_),  // for the hidden layer first, and later for attention
        stream_size_ * narrow,
        stream_size_ * narrow,
        stream_size_ * narrow,
        crosses_ ? stream_size_ * narrow : 0,
        mixed_ ? size_ * narrow : 0,
        mixed_ ? size_ * std::max({3 * heads_ * width_, heads_ * width_, d_ff_ * width_}) : 0,
        size_ * memory_tokens_ * 2 * heads_,
        mixed_ ? size_ * memory_tokens_ * width_ : 0,
        4 * std::max(chunks.chunks * kNormSums * width_, blocks_ * d_ff_)};
    int64_t bytes = 0;
    for (const int64_t size : sizes) {
      bytes += Scratch::whole_lines(size);
    }
    const Scratch buffer(bytes / 4, kMostKept);
    Pieces pieces(buffer.data());
    const int64_t* size = sizes;
    Buffers& m = buffers_;
    for (void** piece : {&m.wide, &m.hidden, &m.a, &m.b, &m.c, &m.d, &m.narrow, &m.weight, &m.kv, &m.memory}) {
      *piece = pieces.take(*size++);
    }
    m.sums = static_cast<float*>(pieces.take(*size));
    pre_ ? pre_norm(dy, dx, dmemory) : post_norm(dy, dx, dmemory);
  }

  void post_norm(const void* dy, void* dx, void* dmemory) {
    const Buffers& m = buffers_;
    // With dropout, the gradient of the residual differs from that of the sub-layer.
    const bool separate = dropout_[kSecond].rng;
    norm_gradient(last_norm(), dy, nullptr, second_sum_, dropout_[kSecond], m.a, separate ? m.b : nullptr,
                  dbias_[kDown]);
    void* dmiddle = separate ? m.b : m.a;
    hidden_gradient(narrowed(m.a, m.c), dmiddle, true);
    if (crosses_) {
      dmiddle = post_norm_cross(dmiddle, dmemory);
    }
    const bool separate_first = dx && dropout_[kFirst].rng;
    void* dsum = dx && !separate_first ? dx : m.c;
    norm_gradient(0, dmiddle, nullptr, first_sum_, dropout_[kFirst], dsum, separate_first ? dx : nullptr, dbias_[kOut]);
    attention_gradient(narrowed(dsum, m.b), m.a, m.hidden);
    if (dx) {
      input_gradient(kIn, m.hidden, dx, true);
    }
  }

  // Takes the gradient of linear1's input, in buffer a or b, and returns that of middle. Buffer c is free afterwards.
  void* post_norm_cross(void* dinput, void* dmemory) {
    Buffers& m = buffers_;
    const bool separate = dropout_[kCrossSecond].rng;
    norm_gradient(1, dinput, nullptr, cross_sum_, dropout_[kCrossSecond], m.c, separate ? m.d : nullptr,
                  dbias_[kCrossOut]);
    void *dmiddle = separate ? m.d : m.c, *room = dinput == m.a ? m.b : m.a;
    cross_gradient(narrowed(m.c, dinput), room, dmiddle, true, dmemory);
    std::swap(m.a, m.c);
    return dmiddle;
  }

  void pre_norm(const void* dy, void* dx, void* dmemory) {
    const Buffers& m = buffers_;
    const void *dsecond = dy, *dsum = dy;
    if (dropout_[kSecond].rng || mixed_) {
      drop(dy, stream_dtype(), nullptr, dropout_[kSecond], m.a, kernel_dtype());
      dsecond = m.a;
    }
    add_columns(kDown, dsecond);
    hidden_gradient(dsecond, m.b, false);
    void* dfirst = m.c;
    if (crosses_) {
      const bool separate = dropout_[kCrossSecond].rng || mixed_;
      norm_gradient(2, m.b, dy, cross_sum_, dropout_[kCrossSecond], m.c, separate ? m.d : nullptr, dbias_[kCrossOut]);
      cross_gradient(m.c, m.b, m.b, false, dmemory);
      dsum = separate ? m.d : m.c;
      dfirst = separate ? m.c : m.d;
    }
    const bool separate = dx && (dropout_[kFirst].rng || mixed_);
    norm_gradient(1, m.b, dsum, first_sum_, dropout_[kFirst], dfirst, separate ? m.a : nullptr, dbias_[kOut]);
    attention_gradient(dfirst, m.b, m.hidden);
    input_gradient(kIn, m.hidden, m.b, false);
    const void* dresidual = !dx ? nullptr : separate ? m.a : dfirst;
    // Taken as dresidual, the gradient of x is not rounded to the dtype of the operands.
    const bool as_residual = dx && mixed_;
    void* unused = separate ? dfirst : m.a;
    norm_gradient(0, m.b, dresidual, input_, kNoDropout, dx && !mixed_ ? dx : unused, as_residual ? dx : nullptr,
                  nullptr);
  }
};

}  // namespace fastattn
