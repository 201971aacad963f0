// fastattn::layer_encode_fwd and layer_encode_bwd for CPU tensors: an encoder layer in a training step.
//
// The forward keeps what the kernels of the backward read in three tensors: malloc reuses blocks of up to 32 MiB, and
// the parts of a layer would not be larger. All other memory stays with the thread.
// The biases of out_proj and of a post-norm layer's linear2 are added by the norm that follows, whose backward computes
// their gradients. Gradients that meet are added by the kernel that computes the second one.
#include <torch/csrc/stable/library.h>

#include "layer_encode.h"

namespace {

using fastattn::ActivationArgs;
using fastattn::Dropout;
using fastattn::LayerOptions;
using fastattn::NormBwdArgs;
using fastattn::NormFwdArgs;
using fastattn::Operand;
using fastattn::OptionalTensor;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMostKept = 1 << 28;  // the tensors that a layer keeps for its backward are about as large

enum Place { kAttention, kFirst, kHidden, kSecond, kPlaces };  // of dropout, in the order of their random states

struct StepOptions {
  LayerOptions layer;
  double dropout_p[kPlaces];
  bool batch_first, causal;
  int64_t most_own_dx, most_own_dw;  // up to how many tokens these products are ours
};

// For every token: q, k and v; what linear1 computes; the input of out_proj, three sums or results of norms,
// statistics.
struct Kept {
  Tensor qkv, preact, others;
};

class EncodeStep : fastattn::EncodeLayer {
 public:
  EncodeStep(const Tensor& x, const std::vector<Tensor>& norms, const std::vector<Tensor>& linears,
             const OptionalTensor& mask, const OptionalTensor& bias, const OptionalTensor& rng,
             const StepOptions& options)
      : EncodeLayer(x, norms, linears, options.layer, options.batch_first),
        step_(options),
        inner_(linears_[kOut].k),
        d_ff_(linears_[kUp].n),
        input_(static_cast<const float*>(fastattn::data_of(x_))) {
    STD_TORCH_CHECK(!gated_ && !is_bf16(), "layer_encode_fwd: a gate and bfloat16 are not supported");
    set_attention(mask, bias, options.causal);
    set_dropout(rng);
    args_.dropout = dropout_[kAttention];
    args_.lse_head = args_.seqlen_q;
    args_.lse_batch = args_.n_heads * args_.seqlen_q;
    // the norms add these
    deferred_[0] = std::exchange(linears_[kOut].bias, nullptr);
    if (!options_.norm_first) {
      deferred_[1] = std::exchange(linears_[kDown].bias, nullptr);
    }
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor> forward() {
    const Tensor y = fastattn::empty_cpu({x_.size(0), x_.size(1), width_}, ScalarType::Float);
    const Kept kept{rows_of(3 * inner_), rows_of(d_ff_), rows_of(other_columns())};
    if (y.numel() != 0) {
      place(kept);
      compute(static_cast<float*>(y.mutable_data_ptr()));
    }
    return {y, kept.qkv, kept.preact, kept.others};
  }

  // The gradients of x, if it is wanted, and of weight and bias of in_proj, out_proj, linear1, linear2, norm1, norm2.
  std::vector<Tensor> backward(const Tensor& dy_in, const Kept& kept, bool need_dx) {
    const Tensor dy = fastattn::contiguous_copy(dy_in);
    fastattn::layer_tensor(dy, {x_.size(0), x_.size(1), width_}, "dy");
    const int64_t columns[] = {3 * inner_, d_ff_, other_columns()};
    for (int i = 0; const Tensor* t : {&kept.qkv, &kept.preact, &kept.others}) {
      fastattn::layer_tensor(*t, {tokens_, columns[i++]}, "what the forward kept");
    }
    std::vector<Tensor> grads;
    const auto add = [&](bool wanted, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
      grads.push_back(wanted ? fastattn::empty_cpu(sizes, ScalarType::Float)
                             : fastattn::empty_cpu({0}, ScalarType::Float));
      return wanted ? static_cast<float*>(grads.back().mutable_data_ptr()) : nullptr;
    };
    float* dx = add(need_dx, {x_.size(0), x_.size(1), width_});
    for (const Linear which : {kIn, kOut, kUp, kDown}) {
      dweight_[which] = add(true, {linears_[which].n, linears_[which].k});
      const bool has_bias = linears_[which].bias || (which == kOut && deferred_[0]) || (which == kDown && deferred_[1]);
      dbias_[which] = add(has_bias, {linears_[which].n});
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
    compute_gradients(static_cast<const float*>(fastattn::data_of(dy)), need_dx ? dx : nullptr);
    return grads;
  }

 private:
  void set_dropout(const OptionalTensor& rng) {
    int64_t states = 0;
    for (int i = 0; i < kPlaces; ++i) {
      states += step_.dropout_p[i] != 0;
    }
    STD_TORCH_CHECK(states == 0 || (rng && rng->is_cpu() && rng->scalar_type() == ScalarType::Long &&
                                    rng->is_contiguous() && rng->numel() == 2 * states),
                    "layer_encode_fwd: rng must be contiguous int64 of (", states, ", 2)");
    const int64_t* state = states ? static_cast<const int64_t*>(fastattn::data_of(*rng)) : nullptr;
    for (int i = 0; i < kPlaces; ++i) {
      const double p = step_.dropout_p[i];
      dropout_[i] = fastattn::dropout_at(p != 0 ? state : nullptr, p);
      state += p != 0 ? 2 : 0;
    }
  }

  int64_t other_columns() const { return inner_ + 3 * width_ + 2 * options_.n_heads + 4; }
  Tensor rows_of(int64_t cols) const { return fastattn::empty_cpu({tokens_, cols}, ScalarType::Float); }

  // Divides the memory that the forward keeps for the backward.
  void place(const Kept& kept) {
    const auto memory = [](const Tensor& t) { return static_cast<float*>(const_cast<void*>(fastattn::data_of(t))); };
    qkv_ = memory(kept.qkv);
    preact_ = memory(kept.preact);
    float* free = memory(kept.others);
    const auto take = [&](int64_t cols) { return std::exchange(free, free + tokens_ * cols); };
    attended_ = take(inner_);
    normed_ = take(width_);
    middle_sum_ = take(width_);
    middle_ = take(width_);
    args_.lse = take(options_.n_heads);
    args_.lse_low = take(options_.n_heads);
    for (float*& stats : stats_) {
      stats = take(2);
    }
  }

  // middle = norm(middle_sum), middle_sum = x + dropout(attention); the hidden layer reads middle
  void compute(float* y) {
    const fastattn::Scratch buffer(tokens_ * (width_ + d_ff_), kMostKept);
    float *sum = buffer.data(), *hidden = sum + tokens_ * width_;
    const bool pre = options_.norm_first;
    if (pre) {
      normalise(0, input_, nullptr, nullptr, {nullptr, 0, 1.f}, nullptr, normed_);
    }
    product(kIn, pre ? normed_ : input_, qkv_, nullptr);
    attend(qkv_, attended_, nullptr);
    product(kOut, attended_, sum, nullptr);
    normalise(pre ? 1 : 0, sum, deferred_[0], input_, dropout_[kFirst], middle_sum_, middle_);
    product(kUp, middle_, preact_, nullptr);
    ActivationArgs act = activation_args(preact_, nullptr, hidden);
    act.dropout = dropout_[kHidden];
    fastattn::run_activation_fwd(act);
    if (pre) {
      product(kDown, hidden, y, nullptr);
      drop(y, middle_sum_, width_, dropout_[kSecond], y);
    } else {
      product(kDown, hidden, sum, nullptr);
      normalise(1, sum, deferred_[1], middle_, dropout_[kSecond], normed_, y);
    }
  }

  // y = norm(r), r = residual + dropout(x + x_bias); without residual r = x
  void normalise(int which, const float* x, const float* x_bias, const float* residual, const Dropout& dropout,
                 float* r, float* y) const {
    NormFwdArgs args = norm_args(which, x, residual, r, y);
    args.x_bias = x_bias;
    args.dropout = dropout;
    args.mean = stats_[which];
    args.rstd = stats_[which] + tokens_;
    fastattn::run_norm_fwd(args);
  }

  // Buffers of the backward. Each has a row for every token.
  struct Buffers {
    float *wide, *hidden, *a, *b, *c, *sums;
  };

  void compute_gradients(const float* dy, float* dx) {
    NormBwdArgs chunks{};
    chunks.rows = tokens_;
    fastattn::set_norm_chunks(chunks);
    const int64_t blocks = (tokens_ + fastattn::kActivationBlockRows - 1) / fastattn::kActivationBlockRows;
    const int64_t shared = std::max(d_ff_, 3 * inner_);  // attention's gradients come after those of the hidden layer
    const int64_t narrow = std::max(width_, inner_);
    const fastattn::Scratch buffer(tokens_ * (d_ff_ + shared + 3 * narrow) +
                                       std::max(chunks.chunks * fastattn::kNormSums * width_, blocks * d_ff_),
                                   kMostKept);
    float* free = buffer.data();
    const auto take = [&](int64_t cols) { return std::exchange(free, free + tokens_ * cols); };
    const Buffers buffers{take(d_ff_), take(shared), take(narrow), take(narrow), take(narrow), free};
    options_.norm_first ? pre_norm(dy, dx, buffers) : post_norm(dy, dx, buffers);
  }

  void post_norm(const float* dy, float* dx, const Buffers& m) {
    const bool separate = dropout_[kSecond].rng;  // the residual's gradient is another one than that of the sub-layer
    norm_gradient(1, dy, nullptr, normed_, dropout_[kSecond], m.a, separate ? m.b : nullptr, dbias_[kDown], m.sums);
    float* dmiddle = separate ? m.b : m.a;
    hidden_gradient(m.a, m, dmiddle, true);
    const bool separate_first = dx && dropout_[kFirst].rng;
    float* dsum = dx && !separate_first ? dx : m.c;
    norm_gradient(0, dmiddle, nullptr, middle_sum_, dropout_[kFirst], dsum, separate_first ? dx : nullptr, dbias_[kOut],
                  m.sums);
    attention_gradient(dsum, input_, m.a, m.hidden);
    if (dx) {
      input_gradient(kIn, m.hidden, dx, true);
    }
  }

  void pre_norm(const float* dy, float* dx, const Buffers& m) {
    const float* dsecond = dy;
    if (dropout_[kSecond].rng) {
      drop(dy, nullptr, width_, dropout_[kSecond], m.a);
      dsecond = m.a;
    }
    if (dbias_[kDown]) {
      column_sums(dsecond, width_, dbias_[kDown]);
    }
    hidden_gradient(dsecond, m, m.b, false);
    const bool separate = dx && dropout_[kFirst].rng;
    norm_gradient(1, m.b, dy, middle_sum_, dropout_[kFirst], m.c, separate ? m.a : nullptr, dbias_[kOut], m.sums);
    attention_gradient(m.c, normed_, m.b, m.hidden);
    input_gradient(kIn, m.hidden, m.b, false);
    const float* dresidual = !dx ? nullptr : separate ? m.a : m.c;
    norm_gradient(0, m.b, dresidual, input_, {nullptr, 0, 1.f}, dx ? dx : m.a, nullptr, nullptr, m.sums);
  }

  // d is the gradient of linear2's result; dmiddle = or += that of middle
  void hidden_gradient(const float* d, const Buffers& m, float* dmiddle, bool add) const {
    input_gradient(kDown, d, m.wide, false);
    ActivationArgs args = activation_args(preact_, nullptr, m.hidden);
    args.dhidden = args.dpreact = m.wide;
    args.dhidden_stride = d_ff_;
    args.dropout = dropout_[kHidden];
    args.dbias = dbias_[kUp];
    args.dbias_partial = args.dbias ? m.sums : nullptr;
    fastattn::run_activation_bwd(args);
    weight_gradient(kDown, d, m.hidden);
    weight_gradient(kUp, m.wide, middle_);
    input_gradient(kUp, m.wide, dmiddle, add);
  }

  // d is the gradient of out_proj's result, `in` the input of in_proj; dattended is memory, dqkv the result
  void attention_gradient(const float* d, const float* in, float* dattended, float* dqkv) {
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
    fastattn::run_attention_bwd(args_);
    weight_gradient(kIn, dqkv, in);
    if (dbias_[kIn]) {
      column_sums(dqkv, 3 * inner_, dbias_[kIn]);
    }
  }

  // dx = dropout of the gradient of r, plus dr_out; dresidual: that gradient, unless null
  void norm_gradient(int which, const float* dy, const float* dr_out, const float* r, const Dropout& dropout, float* dx,
                     float* dresidual, float* dx_bias, float* sums) const {
    NormBwdArgs args{};
    args.dy = dy;
    args.dr_out = dr_out;
    args.r = r;
    args.weight = fastattn::data_or_null(fastattn::present(norms_[2 * which]));
    args.mean = stats_[which];
    args.rstd = stats_[which] + tokens_;
    args.dx = dx;
    args.dresidual = dresidual;
    args.dweight = dnorms_[2 * which];
    args.dbias = dnorms_[2 * which + 1];
    args.dx_bias = dx_bias;
    args.sums = sums;
    args.rows = tokens_;
    args.cols = args.dy_stride = args.dr_out_stride = args.r_stride = width_;
    args.dropout = dropout;
    fastattn::set_norm_chunks(args);
    fastattn::run_norm_bwd(args);
  }

  // dx = or += dy · weight
  void input_gradient(Linear which, const float* dy, float* dx, bool add) const {
    const bool ours = tokens_ != 1 && tokens_ <= step_.most_own_dx;  // one row: packing the weight does not pay
    fastattn::multiply(operand_of(dy, linears_[which].n), weight(which), nullptr, add, ours, dx);
  }

  // dweight = dyᵀ · x
  void weight_gradient(Linear which, const float* dy, const float* x) const {
    fastattn::multiply(operand_of(dy, linears_[which].n).t(), operand_of(x, linears_[which].k), nullptr, false,
                       tokens_ <= step_.most_own_dw, dweight_[which]);
  }

  Operand operand_of(const float* data, int64_t cols) const { return fastattn::operand(data, tokens_, cols); }

  // sums[col] = the sum of a column of x: every row is what activation_bwd calls the partial sums of a block
  void column_sums(const float* x, int64_t cols, float* sums) const {
    ActivationArgs args{};
    args.dbias_partial = const_cast<float*>(x);
    args.dbias = sums;
    args.rows = tokens_ * fastattn::kActivationBlockRows;
    args.cols = cols;
    const auto kernel = FASTATTN_SELECT_CPU(activation_dbias);
    fastattn::for_pieces(cols, tokens_, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  }

  const StepOptions& step_;
  const int64_t inner_, d_ff_;
  const float* input_;
  const float* deferred_[2] = {};
  Dropout dropout_[kPlaces];
  // kept; normed_: pre-norm the result of norm1, post-norm the sum that norm2 normalises
  float *qkv_, *attended_, *preact_, *normed_, *middle_sum_, *middle_, *stats_[2];
  float *dweight_[kGate], *dbias_[kGate], *dnorms_[4];
};

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_encode_fwd(
    const Tensor& x, std::vector<Tensor> norms, std::vector<Tensor> linears, OptionalTensor mask, OptionalTensor bias,
    OptionalTensor rng, double attention_p, double first_p, double hidden_p, double second_p, bool causal,
    bool batch_first, int64_t most_few_rows, int64_t most_own_rows, int64_t most_own_dx, int64_t most_own_dw,
    int64_t n_heads, bool norm_first, int64_t activation, double eps1, double eps2) {
  const StepOptions options{{n_heads, norm_first, activation, {eps1, eps2}, most_few_rows, most_own_rows},
                            {attention_p, first_p, hidden_p, second_p},
                            batch_first,
                            causal,
                            most_own_dx,
                            most_own_dw};
  return EncodeStep(x, norms, linears, mask, bias, rng, options).forward();
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
                                     bool need_dx, const Tensor& x, std::vector<Tensor> norms,
                                     std::vector<Tensor> linears, OptionalTensor mask, OptionalTensor bias,
                                     OptionalTensor rng, double attention_p, double first_p, double hidden_p,
                                     double second_p, bool causal, bool batch_first, int64_t most_few_rows,
                                     int64_t most_own_rows, int64_t most_own_dx, int64_t most_own_dw, int64_t n_heads,
                                     bool norm_first, int64_t activation, double eps1, double eps2) {
  const StepOptions options{{n_heads, norm_first, activation, {eps1, eps2}, most_few_rows, most_own_rows},
                            {attention_p, first_p, hidden_p, second_p},
                            batch_first,
                            causal,
                            most_own_dx,
                            most_own_dw};
  norms = all_contiguous(std::move(norms));
  linears = all_contiguous(std::move(linears));
  const std::vector<Tensor> kept = all_contiguous({qkv, preact, others});
  rng = fastattn::contiguous(rng);
  EncodeStep step(x, norms, linears, mask, bias, rng, options);
  return step.backward(dy, {kept[0], kept[1], kept[2]}, need_dx);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("layer_encode_fwd.native", TORCH_BOX(&layer_encode_fwd));
  m.impl("layer_encode_bwd.native", TORCH_BOX(&layer_encode_bwd));
}
