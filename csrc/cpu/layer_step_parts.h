#pragma once
// The kernels of a training step of an encoder or decoder layer, called with the layer's tensors and options.
// layer_step.h calls them in order.
#include "layer_step_kept.h"

namespace fastattn {

class StepParts : protected EncodeLayer {
 public:
  // unconverted: linears in the dtype of x
  StepParts(const Tensor& x, const std::vector<Tensor>& norms, const std::vector<Tensor>& linears,
            const std::vector<Tensor>& unconverted, const OptionalTensor& mask, const OptionalTensor& bias,
            const Memory& memory, const OptionalTensor& rng, const StepOptions& options)
      : EncodeLayer(x, norms, linears, options.layer, options.batch_first, memory,
                    options.autocast ? std::optional(ScalarType::BFloat16) : std::nullopt),
        step_(options),
        mixed_(stream_ != dtype_),
        pre_(options.layer.norm_first),
        size_(is_bf16() ? 2 : 4),
        stream_size_(stream_ == ScalarType::BFloat16 ? 2 : 4),
        d_ff_(linears_[kUp].n),
        input_(data_of(x_)) {
    STD_TORCH_CHECK(!gated_, "layer_encode_fwd: a gate is not supported");
    set_attention(mask, bias, options.causal);
    set_dropout(rng);
    args_.dropout = dropout_[kAttention];
    cross_.dropout = dropout_[kCrossAttention];
    for (AttentionCpuArgs* args : {&args_, &cross_}) {
      args->lse_head = args->seqlen_q;
      args->lse_batch = args->n_heads * args->seqlen_q;
    }
    defer(kOut, unconverted);
    if (crosses_) {
      defer(kCrossOut, unconverted);
    }
    if (!pre_) {
      defer(kDown, unconverted);
    }
  }

 protected:
  const void* bias_of(Linear which) const { return is_bf16() ? biases_[which] : linears_[which].bias; }

  // Whether norms read the sub-layers' results in the dtype of the stream. A norm kernel reads and writes the same
  // dtype, and in a post-norm layer the results of norms have the dtype of the stream.
  bool widens() const { return mixed_ && !pre_; }
  DType norm_dtype() const { return pre_ ? kernel_dtype() : stream_dtype(); }

  // widened() returns x in the dtype that norms read, and narrowed() in that of the operands. `room` holds the copy if
  // x is converted.
  const void* widened(const void* x, void* room) const { return widens() ? converted(x, room, true) : x; }
  const void* narrowed(const void* x, void* room) const { return widens() ? converted(x, room, false) : x; }
  const void* converted(const void* x, void* room, bool to_stream) const {
    drop(x, to_stream ? kernel_dtype() : stream_dtype(), nullptr, kNoDropout, room,
         to_stream ? stream_dtype() : kernel_dtype());
    return room;
  }

  // y = norm(r), r = residual + dropout(x + x_bias); without a residual, r = x
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

  // The memory of the backward. wide and hidden hold operands of d_ff or 3 * heads_ columns. a, b, c and d hold width
  // or heads_ columns of either dtype, and narrow holds as many columns of operands. weight holds the gradient of a
  // weight. kv holds the gradients of the memory's projections, and memory holds the memory's own gradient as an
  // operand. sums holds the sums of norms or of the hidden layer's blocks. Only a decoder layer has d, kv and memory.
  struct Buffers {
    void *wide, *hidden, *a, *b, *c, *d, *narrow, *weight, *kv, *memory;
    float* sums;
  };

  // d is the gradient of linear2's result. dinput receives the gradient of linear1's input; with `add`, it is added to
  // dinput.
  void hidden_gradient(const void* d, void* dinput, bool add) const {
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
    weight_gradient(kUp, m.wide, hidden_in_);
    input_gradient(kUp, m.wide, dinput, add);
  }

  // d is the gradient of out_proj's result, dattended is memory for intermediate results, and dqkv receives the result.
  void attention_gradient(const void* d, void* dattended, void* dqkv) {
    weight_gradient(kOut, d, attended_);
    input_gradient(kOut, d, dattended, false);
    args_.q = part(qkv_, 0, 3);
    args_.k = part(qkv_, 1, 3);
    args_.v = part(qkv_, 2, 3);
    args_.out = part(attended_, 0, 1);
    args_.dout = part(dattended, 0, 1);
    args_.dq = part(dqkv, 0, 3);
    args_.dk = part(dqkv, 1, 3);
    args_.dv = part(dqkv, 2, 3);
    run_attention_bwd(args_);
    weight_gradient(kIn, dqkv, in_);
    add_columns(kIn, dqkv);
  }

  // d is the gradient of the result of attention to the memory. dattended is memory for intermediate results. dmiddle
  // receives the gradient of the input; with `add`, it is added to dmiddle. dmemory receives the gradient of the
  // memory, unless it is null.
  void cross_gradient(const void* d, void* dattended, void* dmiddle, bool add, void* dmemory) {
    const Buffers& m = buffers_;
    weight_gradient(kCrossOut, d, cross_attended_);
    input_gradient(kCrossOut, d, dattended, false);
    cross_.q = part(cross_q_, 0, 1);
    cross_.k = part_of_memory(kv_, 0);
    cross_.v = part_of_memory(kv_, 1);
    cross_.out = part(cross_attended_, 0, 1);
    cross_.dout = part(dattended, 0, 1);
    cross_.dq = part(m.hidden, 0, 1);
    cross_.dk = part_of_memory(m.kv, 0);
    cross_.dv = part_of_memory(m.kv, 1);
    run_attention_bwd(cross_);
    weight_gradient(kCrossQ, m.hidden, middle_);
    add_columns(kCrossQ, m.hidden);
    weight_gradient_of(memory_tokens_, kCrossKv, m.kv, memory_in_);
    add_columns_of(memory_tokens_, kCrossKv, m.kv);
    input_gradient(kCrossQ, m.hidden, dmiddle, add);
    if (dmemory) {
      void* out = mixed_ ? m.memory : dmemory;
      input_gradient_of(memory_tokens_, kCrossKv, m.kv, false, out);
      if (mixed_) {
        run_conversion(out, kernel_dtype(), dmemory, stream_dtype(), memory_tokens_, width_);
      }
    }
  }

  // dx = dropout(dr), where dr is the gradient of r including dr_out. dresidual receives dr, unless it is null.
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

  // dx receives dy · weight. With `add`, the product is added to dx, which then has the dtype of the stream. Otherwise,
  // dx has the dtype of the operands.
  void input_gradient(Linear which, const void* dy, void* dx, bool add) const {
    const bool later = add && mixed_;
    void* out = later ? buffers_.narrow : dx;
    input_gradient_of(tokens_, which, dy, add && !later, out);
    if (later) {
      drop(out, kernel_dtype(), dx, kNoDropout, dx, stream_dtype());
    }
  }

  void input_gradient_of(int64_t rows, Linear which, const void* dy, bool add, void* dx) const {
    const bool ours = rows != 1 && rows <= step_.most_own_dx;  // for one row, packing the weight does not pay off
    multiply(operand(dy, rows, linears_[which].n, dtype_), weight(which), nullptr, add, ours, dx);
  }

  // dweight = dyᵀ · x
  void weight_gradient(Linear which, const void* dy, const void* x) const { weight_gradient_of(tokens_, which, dy, x); }

  void weight_gradient_of(int64_t rows, Linear which, const void* dy, const void* x) const {
    const int64_t n = linears_[which].n, k = linears_[which].k;
    void* out = mixed_ ? buffers_.weight : dweight_[which];
    multiply(operand(dy, rows, n, dtype_).t(), operand(x, rows, k, dtype_), nullptr, false, rows <= step_.most_own_dw,
             out);
    if (mixed_) {
      run_conversion(out, kernel_dtype(), dweight_[which], stream_dtype(), n, k);
    }
  }

  // Computes the gradient of a bias, if there is one, from the gradient of the layer's result.
  void add_columns(Linear which, const void* dy) const { add_columns_of(tokens_, which, dy); }
  void add_columns_of(int64_t rows, Linear which, const void* dy) const {
    if (dbias_[which]) {
      run_column_sums({dy, dbias_[which], rows, linears_[which].n, kernel_dtype(), stream_dtype()});
    }
  }

  const StepOptions& step_;
  const bool mixed_, pre_;
  const int64_t size_, stream_size_;  // the bytes of an element
  const int64_t d_ff_;
  const void* input_;
  const float* deferred_[kLinears] = {};
  Dropout dropout_[kPlaces];
  // The saved tensors. in_ is the input of in_proj. middle_ is the normalised result of the first sub-layer and the
  // input of the next one. hidden_in_ is the input of linear1, and memory_in_ is the memory. All of these are operands.
  void *qkv_, *preact_, *attended_, *middle_, *hidden_in_, *in_, *first_sum_, *second_sum_;
  void *cross_q_, *kv_, *cross_attended_, *cross_sum_, *memory_in_;
  float* stats_[3];
  void *dweight_[kLinears], *dbias_[kLinears], *dnorms_[6];
  Buffers buffers_;
  int64_t blocks_;  // the number of blocks of rows, for the sums of the hidden layer

 private:
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

  // Leaves a bias, as fp32, to the norm that follows.
  void defer(Linear which, const std::vector<Tensor>& unconverted) {
    if (bias_of(which)) {
      deferred_[which] = values_of(unconverted[3 * which + 2], "a bias", widened_bias_[which]);
      linears_[which].bias = nullptr;
      if (is_bf16()) {
        biases_[which] = nullptr;
      }
    }
  }

  std::vector<float> widened_bias_[kLinears];
};

}  // namespace fastattn
