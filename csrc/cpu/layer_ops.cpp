// fastattn::layer_decode for CPU tensors: a transformer layer of new tokens on a cache of keys and values.
#include "layer.h"

#include <torch/csrc/stable/library.h>

namespace {

using fastattn::DecodeArgs;
using fastattn::layer_tensor;
using fastattn::LayerOptions;
using fastattn::OptionalTensor;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr char kOp[] = "layer_decode: ";

struct Rotary {
  OptionalTensor cos, sin;
  bool interleaved;
};

class DecodeLayer : fastattn::Layer {
 public:
  DecodeLayer(const Tensor& x, const std::vector<Tensor>& norms, const std::vector<Tensor>& linears,
              const LayerOptions& options)
      : Layer(x, norms, linears, options), batch_(x.size(0)), seqlen_(x.size(1)) {
    STD_TORCH_CHECK(!is_bf16(), kOp, "x must be float32");
    STD_TORCH_CHECK(!crosses_, kOp, "attention to a memory is not supported");
  }

  Tensor run(const Tensor& k_cache, const Tensor& v_cache, const Tensor& lengths, const Rotary& rotary,
             const OptionalTensor& slopes) {
    set_cache(k_cache, v_cache, lengths, slopes);
    set_rotary(rotary);
    return Layer::run();
  }

 private:
  void attend(void* memory, void* out, float* lse) override {
    float* qkv = static_cast<float*>(memory);
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
    layer_tensor(k_cache, {batch_, n_kv_heads, capacity, head_dim}, "k_cache");
    layer_tensor(v_cache, {batch_, n_kv_heads, capacity, head_dim}, "v_cache");
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
    layer_tensor(cos, {rows, half}, "cos");
    layer_tensor(*rotary.sin, {rows, half}, "sin");
    STD_TORCH_CHECK(rotary.sin->stride(0) == cos.stride(0) && 2 * half <= args_.head_dim, kOp,
                    "cos and sin must be alike, with at most head_dim / 2 columns");
    rotary_.cos = fastattn::data_of(cos);
    rotary_.sin = fastattn::data_of(*rotary.sin);
    rotary_.table_rows = rows;
    rotary_.table_row = cos.stride(0);
    rotary_.table_step = 1;
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

  const int64_t batch_, seqlen_;
  DecodeArgs args_{};
  fastattn::RotaryArgs rotary_{};
};

Tensor layer_decode(const Tensor& x, std::vector<Tensor> norms, std::vector<Tensor> linears, const Tensor& k_cache,
                    const Tensor& v_cache, const Tensor& cache_seqlens, OptionalTensor cos, OptionalTensor sin,
                    bool interleaved, OptionalTensor alibi_slopes, int64_t most_few_rows, int64_t most_own_rows,
                    int64_t n_heads, bool norm_first, int64_t activation, double eps1, double eps2) {
  const LayerOptions options{n_heads, norm_first, activation, {eps1, eps2}, most_few_rows, most_own_rows};
  return DecodeLayer(x, norms, linears, options)
      .run(k_cache, v_cache, cache_seqlens, {cos, sin, interleaved}, fastattn::contiguous(alibi_slopes));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("layer_decode.native", TORCH_BOX(&layer_decode));
}
