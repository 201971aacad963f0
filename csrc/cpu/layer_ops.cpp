// fastattn::layer_decode for CPU tensors: a transformer layer of new tokens on a cache of keys and values.
//
//   pre-norm   r = x + out_proj(attention(in_proj(norm1(x)))),  y = r + linear2(hidden(norm2(r)))
//   post-norm  r = norm1(x + out_proj(attention(in_proj(x)))),  y = norm2(r + linear2(hidden(r)))
//   hidden(h) = activation(linear1(h)), or gated activation(gate(h)) * linear1(h)
//
// All arithmetic is in the kernels of the other files; what lies here is the order of their calls and the buffers
// between them. The products read weights of fp32, bf16 or int8 as they lie, which pays for few tokens.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <vector>

#include "decode_run.h"
#include "gemv.h"

namespace {

using fastattn::DecodeArgs;
using fastattn::GemvArgs;
using fastattn::OptionalTensor;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr char kOp[] = "layer_decode: ";

struct Rotary {
  OptionalTensor cos, sin;
  bool interleaved;
};

struct LayerOptions {
  int64_t n_heads;
  bool norm_first;
  int64_t activation;
  double eps[2];
};

OptionalTensor present(const Tensor& t) {
  return t.numel() == 0 ? OptionalTensor() : OptionalTensor(t);
}

// A float32 CPU tensor with these sizes and a last stride of 1.
float* checked(const Tensor& t, std::vector<int64_t> sizes, const char* name) {
  const auto found = t.sizes();
  STD_TORCH_CHECK(
      t.is_cpu() && t.scalar_type() == ScalarType::Float && found.size() == sizes.size() &&
          std::equal(sizes.begin(), sizes.end(), found.begin()) && (sizes.back() <= 1 || t.stride(t.dim() - 1) == 1),
      kOp, name, " must be float32 with last stride 1 and fit the other tensors, got ",
      torch::headeronly::toString(t.scalar_type()), " of ", t.numel(), " elements in ", t.dim(), " dimensions");
  return static_cast<float*>(const_cast<void*>(fastattn::data_of(t)));
}

class Layer {
 public:
  Layer(const Tensor& x, const std::vector<Tensor>& norms, const std::vector<Tensor>& linears,
        const LayerOptions& options)
      : x_(fastattn::contiguous_copy(x)), norms_(norms), options_(options), gated_(linears.size() == 15) {
    STD_TORCH_CHECK(x.dim() == 3, kOp, "x must have 3 dimensions, got ", x.dim());
    STD_TORCH_CHECK(norms.size() == 4, kOp, "norms must be 4 tensors, got ", norms.size());
    STD_TORCH_CHECK(linears.size() == 12 || gated_, kOp, "linears must be 12 or 15 tensors, got ", linears.size());
    STD_TORCH_CHECK(options.activation >= 0 && options.activation <= static_cast<int>(fastattn::Activation::kSilu), kOp,
                    "activation must be between 0 and 4, got ", options.activation);
    batch_ = x.size(0);
    seqlen_ = x.size(1);
    width_ = x.size(2);
    tokens_ = batch_ * seqlen_;
    checked(x_, {batch_, seqlen_, width_}, "x");
    for (size_t i = 0; i < linears.size(); i += 3) {
      linears_.push_back(fastattn::gemv_args(linears[i], present(linears[i + 1]), present(linears[i + 2])));
    }
    for (size_t i = 0; i < norms.size(); ++i) {
      if (norms[i].numel()) {
        checked(norms[i], {width_}, "a norm");
      }
    }
    const int64_t d_ff = linears_[kUp].n;
    STD_TORCH_CHECK(linears_[kIn].k == width_ && linears_[kOut].n == width_ && linears_[kUp].k == width_ &&
                        linears_[kDown].k == d_ff && linears_[kDown].n == width_ &&
                        (!gated_ || (linears_[kGate].k == width_ && linears_[kGate].n == d_ff)),
                    kOp, "linears do not fit each other or x of ", width_, " columns");
  }

  Tensor run(const Tensor& k_cache, const Tensor& v_cache, const Tensor& lengths, const Rotary& rotary,
             const OptionalTensor& slopes) {
    set_cache(k_cache, v_cache, lengths, slopes);
    set_rotary(rotary);
    const Tensor y = fastattn::empty_cpu({batch_, seqlen_, width_}, ScalarType::Float);
    if (tokens_ == 0 || width_ == 0) {
      return y;
    }
    float* out = static_cast<float*>(y.mutable_data_ptr());
    const float* x = static_cast<const float*>(fastattn::data_of(x_));
    const int64_t heads = args_.n_heads * args_.head_dim, d_ff = linears_[kUp].n;
    const int64_t scratch = linears_[kIn].n + heads + 2 * width_ + (gated_ ? 3 : 2) * d_ff + args_.n_heads;
    const Tensor buffer = fastattn::empty_cpu({tokens_ * scratch}, ScalarType::Float);
    float* free = static_cast<float*>(buffer.mutable_data_ptr());
    const auto take = [&](int64_t cols) { return std::exchange(free, free + tokens_ * cols); };
    float *qkv = take(linears_[kIn].n), *attended = take(heads), *h = take(width_), *r = take(width_);
    if (options_.norm_first) {
      norm(0, x, h);
      attend(h, qkv, attended, take(args_.n_heads));
      product(kOut, attended, r, x);
      norm(1, r, h);
    } else {
      attend(x, qkv, attended, take(args_.n_heads));
      product(kOut, attended, h, x);
      norm(0, h, r);
    }
    const float* in = options_.norm_first ? h : r;
    float *up = take(d_ff), *hidden = take(d_ff), *gate = gated_ ? take(d_ff) : nullptr;
    product(kUp, in, up, nullptr);
    if (gated_) {
      product(kGate, in, gate, nullptr);
    }
    activate(up, gate, hidden);
    product(kDown, hidden, options_.norm_first ? out : h, r);
    if (!options_.norm_first) {
      norm(1, h, out);
    }
    return y;
  }

 private:
  enum Linear { kIn, kOut, kUp, kDown, kGate };

  void product(Linear which, const float* x, float* y, const float* residual) const {
    GemvArgs args = linears_[which];
    args.x = x;
    args.y = y;
    args.residual = residual;
    args.m = tokens_;
    args.x_row = args.k;
    args.y_row = args.residual_row = args.n;
    fastattn::run_gemv(args);
  }

  void norm(int which, const float* x, float* y) const {
    fastattn::NormFwdArgs args{};
    args.x = x;
    args.y = y;
    args.weight = fastattn::data_or_null(present(norms_[2 * which]));
    args.bias = fastattn::data_or_null(present(norms_[2 * which + 1]));
    args.rows = tokens_;
    args.cols = args.x_stride = args.residual_stride = width_;
    args.eps = static_cast<float>(options_.eps[which]);
    const auto kernel = FASTATTN_SELECT_CPU(norm_fwd);
    fastattn::for_pieces(args.rows, args.cols, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  }

  void activate(const float* up, const float* gate, float* hidden) const {
    fastattn::ActivationArgs args{};
    args.preact = up;
    args.gate = gate;
    args.hidden = hidden;
    args.rows = tokens_;
    args.cols = args.preact_stride = args.gate_stride = linears_[kUp].n;
    args.activation = static_cast<fastattn::Activation>(options_.activation);
    const auto kernel = FASTATTN_SELECT_CPU(activation_fwd);
    fastattn::for_pieces(args.rows, args.cols, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  }

  // Attention of the tokens x; lse: room for the statistics.
  void attend(const float* x, float* qkv, float* out, float* lse) {
    product(kIn, x, qkv, nullptr);
    const int64_t row = linears_[kIn].n, head = args_.head_dim;
    const auto heads_at = [&](int64_t first) {
      return fastattn::HeadTensor{qkv + first * head, seqlen_ * row, head, row};
    };
    const fastattn::HeadTensor q = heads_at(0), k = heads_at(args_.n_heads);
    const fastattn::HeadTensor v = heads_at(args_.n_heads + args_.n_kv_heads);
    if (rotary_.rotary_dim) {
      rotary_.x[0] = rotary_.out[0] = q;
      rotary_.x[1] = rotary_.out[1] = k;
      const auto kernel = FASTATTN_SELECT_CPU(rotary_fwd);
      const int64_t pieces = batch_ * ((seqlen_ + fastattn::kRotaryTokens - 1) / fastattn::kRotaryTokens);
      fastattn::for_pieces(pieces, std::min(seqlen_, fastattn::kRotaryTokens) * row,
                           [&](int64_t begin, int64_t end) { kernel(rotary_, begin, end); });
    }
    constexpr int64_t kSize = sizeof(float);
    const auto append = [&](const fastattn::HeadTensor& from, const fastattn::HeadTensor& to) {
      fastattn::append_rows({from, to, args_.n_kv_heads, seqlen_, head * kSize, kSize}, args_);
    };
    append(k, args_.k);
    append(v, args_.v);
    args_.q = q;
    args_.out = {out, seqlen_ * args_.n_heads * head, head, args_.n_heads * head};
    args_.lse = lse;
    fastattn::run_attention_decode(args_, 0);
  }

  void set_cache(const Tensor& k_cache, const Tensor& v_cache, const Tensor& lengths, const OptionalTensor& slopes) {
    STD_TORCH_CHECK(k_cache.dim() == 4 && k_cache.size(0) == batch_, kOp, "k_cache must have 4 dimensions, and ",
                    batch_, " rows");
    const int64_t n_kv_heads = k_cache.size(1), capacity = k_cache.size(2), head_dim = k_cache.size(3);
    const int64_t rows = (options_.n_heads + 2 * n_kv_heads) * head_dim;
    STD_TORCH_CHECK(n_kv_heads > 0 && options_.n_heads % n_kv_heads == 0 && linears_[kIn].n == rows &&
                        linears_[kOut].k == options_.n_heads * head_dim,
                    kOp, "in_proj and out_proj must fit ", options_.n_heads, " heads, and ", n_kv_heads,
                    " in the caches, of ", head_dim);
    checked(k_cache, {batch_, n_kv_heads, capacity, head_dim}, "k_cache");
    checked(v_cache, {batch_, n_kv_heads, capacity, head_dim}, "v_cache");
    args_.batch = batch_;
    args_.n_heads = options_.n_heads;
    args_.n_kv_heads = n_kv_heads;
    args_.seqlen_q = args_.seqlen_new = seqlen_;
    args_.head_dim = args_.head_dim_v = head_dim;
    args_.page_size = std::max<int64_t>(1, capacity);
    args_.pages = 1;
    args_.k = fastattn::heads(k_cache);
    args_.v = fastattn::heads(v_cache);
    args_.cache_seqlens = fastattn::vector_data<int32_t>(lengths, ScalarType::Int, batch_, "cache_seqlens");
    for (int64_t b = 0; b < batch_; ++b) {
      const int64_t length = args_.cache_seqlens[b];
      STD_TORCH_CHECK(length >= 0 && length + seqlen_ <= capacity, kOp, "cache_seqlens must be from 0 to ",
                      capacity - seqlen_, ", got ", length);
    }
    args_.window_left = -1;  // causal: window_right is 0
    args_.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(std::max<int64_t>(1, head_dim))));
    args_.dtype = fastattn::DType::kFloat32;
    fastattn::set_alibi(args_, slopes);
  }

  void set_rotary(const Rotary& rotary) {
    if (!rotary.cos) {
      return;
    }
    const Tensor& cos = *rotary.cos;
    STD_TORCH_CHECK(rotary.sin && cos.dim() == 2, kOp, "cos and sin must have 2 dimensions");
    const int64_t rows = cos.size(0), half = cos.size(1);
    checked(cos, {rows, half}, "cos");
    checked(*rotary.sin, {rows, half}, "sin");
    STD_TORCH_CHECK(rotary.sin->stride(0) == cos.stride(0) && 2 * half <= args_.head_dim, kOp,
                    "cos and sin must be alike, with at most head_dim / 2 columns");
    rotary_.cos = fastattn::data_of(cos);
    rotary_.sin = fastattn::data_of(*rotary.sin);
    rotary_.table_rows = rows;
    rotary_.table_row = cos.stride(0);
    rotary_.offset = batch_ ? args_.cache_seqlens[0] : 0;
    for (int64_t b = 0; b < batch_; ++b) {
      STD_TORCH_CHECK(args_.cache_seqlens[b] == rotary_.offset, kOp,
                      "with cos, cache_seqlens must be equal to each other");
    }
    STD_TORCH_CHECK(rotary_.offset + seqlen_ <= rows, kOp, "cos must have at least ", rotary_.offset + seqlen_,
                    " rows, got ", rows);
    rotary_.n_heads[0] = args_.n_heads;
    rotary_.n_heads[1] = args_.n_kv_heads;
    rotary_.batch = batch_;
    rotary_.seqlen = seqlen_;
    rotary_.head_dim = args_.head_dim;
    rotary_.rotary_dim = 2 * half;
    rotary_.interleaved = rotary.interleaved;
    rotary_.dtype = rotary_.table_dtype = fastattn::DType::kFloat32;
  }

  const Tensor x_;
  const std::vector<Tensor>& norms_;
  const LayerOptions& options_;
  const bool gated_;
  std::vector<GemvArgs> linears_;
  int64_t batch_, seqlen_, width_, tokens_;
  DecodeArgs args_{};
  fastattn::RotaryArgs rotary_{};
};

Tensor layer_decode(const Tensor& x, std::vector<Tensor> norms, std::vector<Tensor> linears, const Tensor& k_cache,
                    const Tensor& v_cache, const Tensor& cache_seqlens, OptionalTensor cos, OptionalTensor sin,
                    bool interleaved, OptionalTensor alibi_slopes, int64_t n_heads, bool norm_first, int64_t activation,
                    double eps1, double eps2) {
  const LayerOptions options{n_heads, norm_first, activation, {eps1, eps2}};
  return Layer(x, norms, linears, options)
      .run(k_cache, v_cache, cache_seqlens, {cos, sin, interleaved}, fastattn::contiguous(alibi_slopes));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("layer_decode.native", TORCH_BOX(&layer_decode));
}
