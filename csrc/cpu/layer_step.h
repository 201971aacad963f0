#pragma once
// An encoder layer in a training step, in the frame of layer.h: the forward, and the gradients.
//
// The forward keeps what the kernels of the backward read in a few tensors: malloc reuses blocks of up to 32 MiB, and
// the parts of a layer would not be larger. All other memory stays with the thread.
// The biases of out_proj and of a post-norm layer's linear2 are added by the norm that follows, whose backward computes
// their gradients. Gradients that meet are added by the kernel that computes the second one.
//
// Two dtypes: the stream, which is x, y, the sums that the norms normalise, all parameters and gradients of these; and
// that of the operands of products and all else between the kernels. They differ only under autocast: fp32 and bf16.
#include "layer_step_kept.h"

namespace fastattn {

class EncodeStep : EncodeLayer {
 public:
  // unconverted: linears in the dtype of x
  EncodeStep(const Tensor& x, const std::vector<Tensor>& norms, const std::vector<Tensor>& linears,
             const std::vector<Tensor>& unconverted, const OptionalTensor& mask, const OptionalTensor& bias,
             const OptionalTensor& rng, const StepOptions& options)
      : EncodeLayer(x, norms, linears, options.layer, options.batch_first,
                    options.autocast ? std::optional(ScalarType::BFloat16) : std::nullopt),
        step_(options),
        mixed_(stream_ != dtype_),
        pre_(options.layer.norm_first),
        size_(is_bf16() ? 2 : 4),
        stream_size_(stream_ == ScalarType::BFloat16 ? 2 : 4),
        inner_(linears_[kOut].k),
        d_ff_(linears_[kUp].n),
        input_(data_of(x_)) {
    STD_TORCH_CHECK(!gated_, "layer_encode_fwd: a gate is not supported");
    set_attention(mask, bias, options.causal);
    set_dropout(rng);
    args_.dropout = dropout_[kAttention];
    args_.lse_head = args_.seqlen_q;
    args_.lse_batch = args_.n_heads * args_.seqlen_q;
    defer(kOut, unconverted);
    if (!pre_) {
      defer(kDown, unconverted);
    }
  }

  std::tuple<Tensor, Kept> forward(const Tensor& weights) {
    const Tensor y = empty_cpu({x_.size(0), x_.size(1), width_}, stream_);
    const Kept kept{rows_of(3 * inner_, dtype_), rows_of(d_ff_, dtype_), rows_of(other_columns(), ScalarType::Float),
                    weights};
    if (y.numel() != 0) {
      place(kept);
      compute(y.mutable_data_ptr());
    }
    return {y, kept};
  }

  // The gradients of x, if it is wanted, and of weight and bias of in_proj, out_proj, linear1, linear2, norm1, norm2.
  std::vector<Tensor> backward(const Tensor& dy_in, const Kept& kept, bool need_dx) {
    const Tensor dy = contiguous_copy(dy_in);
    layer_tensor(dy, {x_.size(0), x_.size(1), width_}, "dy", stream_);
    layer_tensor(kept.qkv, {tokens_, 3 * inner_}, "qkv", dtype_);
    layer_tensor(kept.preact, {tokens_, d_ff_}, "preact", dtype_);
    layer_tensor(kept.others, {tokens_, other_columns()}, "what the forward kept");
    std::vector<Tensor> grads;
    const auto add = [&](bool wanted, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
      grads.push_back(wanted ? empty_cpu(sizes, stream_) : empty_cpu({0}, stream_));
      return wanted ? grads.back().mutable_data_ptr() : nullptr;
    };
    void* dx = add(need_dx, {x_.size(0), x_.size(1), width_});
    for (const Linear which : {kIn, kOut, kUp, kDown}) {
      dweight_[which] = add(true, {linears_[which].n, linears_[which].k});
      dbias_[which] = add(deferred_[which] || bias_of(which), {linears_[which].n});
    }
    for (size_t i = 0; i < norms_.size(); ++i) {
      dnorms_[i] = add(norms_[i].numel() != 0, {width_});
    }
    if (tokens_ == 0 || width_ == 0) {
      for (Tensor& grad : grads) {
        torch::stable::zero_(grad);
      }
      return grads;
    }
    place(kept);
    compute_gradients(data_of(dy), need_dx ? dx : nullptr);
    return grads;
  }

 private:
  static constexpr int64_t kMostKept = 1 << 28;  // the tensors that a layer keeps for its backward are about as large

  void set_dropout(const OptionalTensor& rng) {
    int64_t states = 0;
    for (int i = 0; i < kPlaces; ++i) {
      states += step_.dropout_p[i] != 0;
    }
    STD_TORCH_CHECK(states == 0 || (rng && rng->is_cpu() && rng->scalar_type() == ScalarType::Long &&
                                    rng->is_contiguous() && rng->numel() == 2 * states),
                    "layer_encode_fwd: rng must be contiguous int64 of (", states, ", 2)");
    const int64_t* state = states ? static_cast<const int64_t*>(data_of(*rng)) : nullptr;
    for (int i = 0; i < kPlaces; ++i) {
      const double p = step_.dropout_p[i];
      dropout_[i] = dropout_at(p != 0 ? state : nullptr, p);
      state += p != 0 ? 2 : 0;
    }
  }

  const void* bias_of(Linear which) const { return is_bf16() ? biases_[which] : linears_[which].bias; }

  // Leaves a bias, in fp32, to the norm that follows.
  void defer(Linear which, const std::vector<Tensor>& unconverted) {
    if (bias_of(which)) {
      deferred_[which] = values_of(unconverted[3 * which + 2], "a bias", widened_bias_[which]);
      linears_[which].bias = nullptr;
      if (is_bf16()) {
        biases_[which] = nullptr;
      }
    }
  }

  int64_t statistics() const { return 2 * options_.n_heads + 4; }
  bool keeps_input() const { return pre_ || mixed_; }  // that of in_proj, if it is not x itself
  int64_t other_columns() const {
    const int64_t stream = stream_size_ * width_ * (pre_ ? 1 : 2);
    return statistics() + (stream + size_ * (inner_ + width_ * (keeps_input() ? 2 : 1)) + 3) / 4;
  }
  Tensor rows_of(int64_t cols, ScalarType dtype) const { return empty_cpu({tokens_, cols}, dtype); }

  // Divides the memory that the forward keeps for the backward.
  void place(const Kept& kept) {
    const auto memory = [](const Tensor& t) { return const_cast<void*>(data_of(t)); };
    qkv_ = memory(kept.qkv);
    preact_ = memory(kept.preact);
    Pieces others(memory(kept.others));
    const auto take = [&](int64_t bytes) { return others.take_exact(tokens_ * bytes); };
    args_.lse = static_cast<float*>(take(4 * options_.n_heads));
    args_.lse_low = static_cast<float*>(take(4 * options_.n_heads));
    for (float*& stats : stats_) {
      stats = static_cast<float*>(take(8));
    }
    first_sum_ = take(stream_size_ * width_);
    second_sum_ = pre_ ? nullptr : take(stream_size_ * width_);
    attended_ = take(size_ * inner_);
    middle_ = take(size_ * width_);
    in_ = keeps_input() ? take(size_ * width_) : const_cast<void*>(input_);
  }

  // middle = norm(first_sum), first_sum = x + dropout(attention); the hidden layer reads middle
  void compute(void* y) {
    const int64_t width = tokens_ * width_;
    const Scratch buffer((Scratch::whole_lines(size_ * width) + Scratch::whole_lines(size_ * tokens_ * d_ff_)) / 4 +
                             (widens() ? 2 * Scratch::whole_lines(4 * width) / 4 : 0),
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
    if (middle != middle_) {
      drop(middle, stream_dtype(), nullptr, kNoDropout, middle_, kernel_dtype());
    }
    product(kUp, middle_, preact_, nullptr);
    ActivationArgs act = activation_args(preact_, nullptr, hidden);
    act.dropout = dropout_[kHidden];
    run_activation_fwd(act);
    product(kDown, hidden, sum, nullptr);
    if (pre_) {
      drop(sum, kernel_dtype(), first_sum_, dropout_[kSecond], y, stream_dtype());
    } else {
      normalise(1, widened(sum, wide), deferred_[kDown], middle, dropout_[kSecond], second_sum_, y);
    }
  }

  // Whether norms get the sub-layers' results in the dtype of the stream, as their own results have it.
  bool widens() const { return mixed_ && !pre_; }
  DType norm_dtype() const { return pre_ ? kernel_dtype() : stream_dtype(); }

  // x in the dtype that norms read, in `room` if it is converted; and back.
  const void* widened(const void* x, void* room) const { return widens() ? converted(x, room, true) : x; }
  const void* narrowed(const void* x, void* room) const { return widens() ? converted(x, room, false) : x; }
  const void* converted(const void* x, void* room, bool to_stream) const {
    drop(x, to_stream ? kernel_dtype() : stream_dtype(), nullptr, kNoDropout, room,
         to_stream ? stream_dtype() : kernel_dtype());
    return room;
  }

  // y = norm(r), r = residual + dropout(x + x_bias); without residual r = x
  void normalise(int which, const void* x, const float* x_bias, const void* residual, const Dropout& dropout, void* r,
                 void* y) const {
    NormFwdArgs args = norm_args(which, x, residual, r, y);
    args.x_bias = x_bias;
    args.x_dtype = norm_dtype();
    args.dropout = dropout;
    args.mean = stats_[which];
    args.rstd = stats_[which] + tokens_;
    run_norm_fwd(args);
  }

  // Memory of the backward. wide, hidden: d_ff or 3 * inner columns of operands; a, b, c: width or inner columns of
  // either dtype; narrow: of operands; weight: a gradient of a weight; sums: of norms, or of the hidden layer's blocks.
  struct Buffers {
    void *wide, *hidden, *a, *b, *c, *narrow, *weight;
    float* sums;
  };

  void compute_gradients(const void* dy, void* dx) {
    NormBwdArgs chunks{};
    chunks.rows = tokens_;
    set_norm_chunks(chunks);
    blocks_ = (tokens_ + kActivationBlockRows - 1) / kActivationBlockRows;
    const int64_t narrow = tokens_ * std::max(width_, inner_);
    const int64_t sizes[] = {
        size_ * tokens_ * d_ff_,
        size_ * tokens_ * std::max(d_ff_, 3 * inner_),  // attention's gradients come after those of the hidden layer
        stream_size_ * narrow,
        stream_size_ * narrow,
        stream_size_ * narrow,
        mixed_ ? size_ * narrow : 0,
        mixed_ ? size_ * std::max({3 * inner_ * width_, inner_ * width_, d_ff_ * width_}) : 0,
        4 * std::max(chunks.chunks * kNormSums * width_, blocks_ * d_ff_)};
    int64_t bytes = 0;
    for (const int64_t size : sizes) {
      bytes += Scratch::whole_lines(size);
    }
    const Scratch buffer(bytes / 4, kMostKept);
    Pieces pieces(buffer.data());
    buffers_ = {pieces.take(sizes[0]), pieces.take(sizes[1]),
                pieces.take(sizes[2]), pieces.take(sizes[3]),
                pieces.take(sizes[4]), pieces.take(sizes[5]),
                pieces.take(sizes[6]), static_cast<float*>(pieces.take(sizes[7]))};
    pre_ ? pre_norm(dy, dx) : post_norm(dy, dx);
  }

  void post_norm(const void* dy, void* dx) {
    const Buffers& m = buffers_;
    const bool separate = dropout_[kSecond].rng;  // the residual's gradient is another one than that of the sub-layer
    norm_gradient(1, dy, nullptr, second_sum_, dropout_[kSecond], m.a, separate ? m.b : nullptr, dbias_[kDown]);
    void* dmiddle = separate ? m.b : m.a;
    hidden_gradient(narrowed(m.a, m.c), dmiddle, true);
    const bool separate_first = dx && dropout_[kFirst].rng;
    void* dsum = dx && !separate_first ? dx : m.c;
    norm_gradient(0, dmiddle, nullptr, first_sum_, dropout_[kFirst], dsum, separate_first ? dx : nullptr, dbias_[kOut]);
    attention_gradient(narrowed(dsum, m.b), m.a, m.hidden);
    if (dx) {
      input_gradient(kIn, m.hidden, dx, true);
    }
  }

  void pre_norm(const void* dy, void* dx) {
    const Buffers& m = buffers_;
    const void* dsecond = dy;
    if (dropout_[kSecond].rng || mixed_) {
      drop(dy, stream_dtype(), nullptr, dropout_[kSecond], m.a, kernel_dtype());
      dsecond = m.a;
    }
    add_columns(kDown, dsecond);
    hidden_gradient(dsecond, m.b, false);
    const bool separate = dx && (dropout_[kFirst].rng || mixed_);
    norm_gradient(1, m.b, dy, first_sum_, dropout_[kFirst], m.c, separate ? m.a : nullptr, dbias_[kOut]);
    attention_gradient(m.c, m.b, m.hidden);
    input_gradient(kIn, m.hidden, m.b, false);
    const void* dresidual = !dx ? nullptr : separate ? m.a : m.c;
    // the gradient of x, without the rounding to the dtype of the operands
    const bool as_residual = dx && mixed_;
    void* unused = separate ? m.c : m.a;
    norm_gradient(0, m.b, dresidual, input_, kNoDropout, dx && !mixed_ ? dx : unused, as_residual ? dx : nullptr,
                  nullptr);
  }

  // d is the gradient of linear2's result; dmiddle = or += that of middle
  void hidden_gradient(const void* d, void* dmiddle, bool add) const {
    const Buffers& m = buffers_;
    input_gradient(kDown, d, m.wide, false);
    ActivationArgs args = activation_args(preact_, nullptr, m.hidden);
    args.dhidden = args.dpreact = m.wide;
    args.dhidden_stride = d_ff_;
    args.dropout = dropout_[kHidden];
    args.dbias_partial = dbias_[kUp] ? m.sums : nullptr;
    run_activation_bwd(args);
    if (dbias_[kUp]) {
      run_column_sums({m.sums, dbias_[kUp], blocks_, d_ff_, DType::kFloat32, stream_dtype()});
    }
    weight_gradient(kDown, d, m.hidden);
    weight_gradient(kUp, m.wide, middle_);
    input_gradient(kUp, m.wide, dmiddle, add);
  }

  // d is the gradient of out_proj's result; dattended is memory, dqkv the result
  void attention_gradient(const void* d, void* dattended, void* dqkv) {
    weight_gradient(kOut, d, attended_);
    input_gradient(kOut, d, dattended, false);
    args_.q = part(qkv_, 0);
    args_.k = part(qkv_, 1);
    args_.v = part(qkv_, 2);
    args_.out = heads_of(attended_, 1);
    args_.dout = heads_of(dattended, 1);
    args_.dq = part(dqkv, 0);
    args_.dk = part(dqkv, 1);
    args_.dv = part(dqkv, 2);
    run_attention_bwd(args_);
    weight_gradient(kIn, dqkv, in_);
    add_columns(kIn, dqkv);
  }

  // dx = dropout of the gradient of r, plus dr_out; dresidual: that gradient, unless null
  void norm_gradient(int which, const void* dy, const void* dr_out, const void* r, const Dropout& dropout, void* dx,
                     void* dresidual, void* dx_bias) const {
    NormBwdArgs args{};
    args.dy = dy;
    args.dr_out = dr_out;
    args.r = r;
    args.weight = norm_values_[2 * which];
    args.mean = stats_[which];
    args.rstd = stats_[which] + tokens_;
    args.dx = dx;
    args.dresidual = dresidual;
    args.dweight = dnorms_[2 * which];
    args.dbias = dnorms_[2 * which + 1];
    args.dx_bias = dx_bias;
    args.sums = buffers_.sums;
    args.rows = tokens_;
    args.cols = args.dy_stride = args.dr_out_stride = args.r_stride = width_;
    args.x_dtype = norm_dtype();
    args.r_dtype = args.weight_dtype = stream_dtype();
    args.dropout = dropout;
    set_norm_chunks(args);
    run_norm_bwd(args);
  }

  // dx = or += dy · weight. What is added to is of the stream, else dx is of the operands.
  void input_gradient(Linear which, const void* dy, void* dx, bool add) const {
    const bool ours = tokens_ != 1 && tokens_ <= step_.most_own_dx;  // one row: packing the weight does not pay
    const bool later = add && mixed_;
    void* out = later ? buffers_.narrow : dx;
    multiply(operand_of(dy, linears_[which].n), weight(which), nullptr, add && !later, ours, out);
    if (later) {
      drop(out, kernel_dtype(), dx, kNoDropout, dx, stream_dtype());
    }
  }

  // dweight = dyᵀ · x
  void weight_gradient(Linear which, const void* dy, const void* x) const {
    const int64_t n = linears_[which].n, k = linears_[which].k;
    void* out = mixed_ ? buffers_.weight : dweight_[which];
    multiply(operand_of(dy, n).t(), operand_of(x, k), nullptr, false, tokens_ <= step_.most_own_dw, out);
    if (mixed_) {
      run_conversion(out, kernel_dtype(), dweight_[which], stream_dtype(), n, k);
    }
  }

  // The gradient of a bias, if there is one, from that of the layer's result.
  void add_columns(Linear which, const void* dy) const {
    if (dbias_[which]) {
      run_column_sums({dy, dbias_[which], tokens_, linears_[which].n, kernel_dtype(), stream_dtype()});
    }
  }

  Operand operand_of(const void* data, int64_t cols) const { return operand(data, tokens_, cols, dtype_); }

  const StepOptions& step_;
  const bool mixed_, pre_;
  const int64_t size_, stream_size_;  // bytes of an element
  const int64_t inner_, d_ff_;
  const void* input_;
  const float* deferred_[kGate] = {};
  std::vector<float> widened_bias_[kGate];
  Dropout dropout_[kPlaces];
  // kept; in_: the input of in_proj
  void *qkv_, *preact_, *attended_, *middle_, *in_, *first_sum_, *second_sum_;
  float* stats_[2];
  void *dweight_[kGate], *dbias_[kGate], *dnorms_[4];
  Buffers buffers_;
  int64_t blocks_;  // of rows, for the sums of the hidden layer
};

}  // namespace fastattn
