#pragma once
// The frame of a transformer layer in one call: the order of its kernels and the buffers between them.
//
//   pre-norm   r = x + out_proj(attention(in_proj(norm1(x)))),  y = r + linear2(hidden(norm2(r)))
//   post-norm  r = norm1(x + out_proj(attention(in_proj(x)))),  y = norm2(r + linear2(hidden(r)))
//   hidden(h) = activation(linear1(h)), or gated activation(gate(h)) * linear1(h)
//
// Between these two steps, a decoder layer has attention to a memory, with its own norm.
//
// All arithmetic is in the kernels of other files. A derived class implements the attention. Products of few rows read
// weights of fp32, bf16 or int8 in place. For more rows, fp32 weights go to our blocked product or to torch's library.
// In bf16, the weights and everything between the kernels are bf16; products of more rows are torch's, or ours with
// AMX. Then x, the sums r, y and the norms' weights are also bf16, or fp32 under autocast (only in a training step).
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "activation_run.h"
#include "decode_run.h"
#include "dropout_run.h"
#include "gemv.h"
#include "norm_run.h"
#include "products.h"

namespace fastattn {

struct LayerOptions {
  int64_t n_heads;
  bool norm_first;
  int64_t activation;
  double eps[3];
  // A product of at most most_few_rows tokens reads the weight in place. Our own product serves at most most_own_rows
  // tokens, and torch's library serves more.
  int64_t most_few_rows, most_own_rows;
};

constexpr Dropout kNoDropout{nullptr, 0, 1.f};

inline OptionalTensor present(const Tensor& t) {
  return t.numel() == 0 ? OptionalTensor() : OptionalTensor(t);
}

// Returns the memory of a CPU tensor. It must have these sizes and a last stride of 1, which does not matter if it is
// empty.
inline float* layer_tensor(const Tensor& t, const std::vector<int64_t>& sizes, const char* name,
                           ScalarType dtype = ScalarType::Float) {
  const auto found = t.sizes();
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == dtype && found.size() == sizes.size() &&
                      std::equal(sizes.begin(), sizes.end(), found.begin()) &&
                      (t.numel() == 0 || sizes.back() <= 1 || t.stride(t.dim() - 1) == 1),
                  "layer: ", name, " must be ", dtype == ScalarType::Float ? "float32" : "bfloat16",
                  " with last stride 1 and fit the other tensors, got ", torch::headeronly::toString(t.scalar_type()),
                  " of ", t.numel(), " elements in ", t.dim(), " dimensions");
  return static_cast<float*>(const_cast<void*>(data_of(t)));
}

// The memory of one call. Up to most_kept bytes stay with the thread for its next call. Otherwise malloc would return
// blocks of this size to the kernel, and the next call would fault them in again, page by page.
class Scratch {
 public:
  explicit Scratch(int64_t floats, int64_t most_kept = 1 << 25) {
    const int64_t bytes = whole_lines(floats * static_cast<int64_t>(sizeof(float)));
    static thread_local Block kept;
    Block& block = bytes <= most_kept ? kept : own_;
    if (block.bytes < bytes) {
      block.resize(bytes);
    }
    data_ = static_cast<float*>(block.data);
  }

  float* data() const { return data_; }

  static int64_t whole_lines(int64_t bytes) {
    constexpr int64_t kLine = 64;
    return (bytes + kLine - 1) / kLine * kLine;
  }

 private:
  struct Block {
    Block() = default;
    Block(const Block&) = delete;
    ~Block() { std::free(data); }

    void resize(int64_t size) {
      std::free(data);
      data = std::aligned_alloc(64, size);
      bytes = data ? size : 0;
      STD_TORCH_CHECK(data, "layer: out of memory");
    }

    void* data = nullptr;
    int64_t bytes = 0;
  };
  Block own_;
  float* data_;
};

class Layer {
 public:
  // dtype: the dtype of everything between the kernels, if it is not that of x
  Layer(const Tensor& x, const std::vector<Tensor>& norms, const std::vector<Tensor>& linears,
        const LayerOptions& options, std::optional<ScalarType> dtype = std::nullopt)
      : x_(contiguous_copy(x)),
        norms_(norms),
        options_(options),
        gated_(linears.size() == 15),
        crosses_(linears.size() == 18),
        stream_(x.scalar_type() == ScalarType::BFloat16 ? ScalarType::BFloat16 : ScalarType::Float),
        dtype_(dtype.value_or(stream_)) {
    STD_TORCH_CHECK(x.dim() == 3, "layer: x must have 3 dimensions, got ", x.dim());
    STD_TORCH_CHECK(linears.size() == 12 || gated_ || crosses_, "layer: linears must be 12, 15 or 18 tensors, got ",
                    linears.size());
    STD_TORCH_CHECK(norms.size() == (crosses_ ? 6 : 4), "layer: norms must be ", crosses_ ? 6 : 4, " tensors, got ",
                    norms.size());
    STD_TORCH_CHECK(options.activation >= 0 && options.activation <= static_cast<int>(Activation::kSilu),
                    "layer: activation must be between 0 and 4, got ", options.activation);
    STD_TORCH_CHECK(options.n_heads > 0, "layer: n_heads must be positive, got ", options.n_heads);
    width_ = x.size(2);
    tokens_ = x.size(0) * x.size(1);
    layer_tensor(x_, {x.size(0), x.size(1), width_}, "x", stream_);
    for (size_t i = 0; i < linears.size(); i += 3) {
      const OptionalTensor bias = present(linears[i + 2]);
      linears_.push_back(gemv_args(linears[i], present(linears[i + 1]), is_bf16() ? OptionalTensor() : bias));
      if (is_bf16()) {
        STD_TORCH_CHECK(linears_.back().type == WeightType::kBFloat16,
                        "layer: weights must be bfloat16, as the products are");
        biases_.push_back(bias ? layer_tensor(*bias, {linears_.back().n}, "a bias", dtype_) : nullptr);
      }
    }
    for (const Tensor& t : norms) {
      norm_values_.push_back(t.numel() ? values_of(t, "a norm", widened_[norm_values_.size()]) : nullptr);
    }
    const int64_t d_ff = linears_[kUp].n;
    STD_TORCH_CHECK(linears_[kIn].k == width_ && linears_[kOut].n == width_ && linears_[kUp].k == width_ &&
                        linears_[kDown].k == d_ff && linears_[kDown].n == width_ &&
                        (!gated_ || (linears_[kGate].k == width_ && linears_[kGate].n == d_ff)),
                    "layer: linears do not fit each other or x of ", width_, " columns");
  }
  virtual ~Layer() = default;

 protected:
  // A layer has a gate or attention to a memory, never both. kCrossQ is the rows of kCrossIn for q, and kCrossKv is its
  // rows for k and v.
  enum Linear { kIn, kOut, kUp, kDown, kGate, kCrossIn = kGate, kCrossOut, kCrossQ, kCrossKv, kLinears };

  // out = attention of the projected tokens; the rows of qkv hold q, k and v. lse is memory for the statistics.
  virtual void attend(void* qkv, void* out, float* lse) = 0;

  // For decoder layers: out = attention from x to the memory, with its projections. `room` has room_to_cross() bytes.
  virtual void cross(const void* x, void* out, void* room) {}
  virtual int64_t room_to_cross() const { return 0; }

  Tensor run() {
    const Tensor y = empty_cpu({x_.size(0), x_.size(1), width_}, dtype_);
    if (tokens_ == 0 || width_ == 0) {
      return y;
    }
    void* out = y.mutable_data_ptr();
    const void* x = data_of(x_);
    const int64_t d_ff = linears_[kUp].n, size = is_bf16() ? 2 : sizeof(float);
    const auto bytes = [&](int64_t cols) { return Scratch::whole_lines(tokens_ * cols * size); };
    // Attention has ended when the feed-forward block begins, so they share this memory.
    const int64_t attention = bytes(linears_[kIn].n) + bytes(linears_[kOut].k) + tokens_ * options_.n_heads * 4;
    const int64_t most = std::max({attention, room_to_cross(), (gated_ ? 2 : 1) * bytes(d_ff)});
    const Scratch buffer(((crosses_ ? 4 : 3) * bytes(width_) + most + 3) / 4);
    char* free = reinterpret_cast<char*>(buffer.data());
    const auto take = [&](int64_t cols) -> void* { return std::exchange(free, free + bytes(cols)); };
    void *h = take(width_), *r = take(width_), *sum = take(width_), *other = crosses_ ? take(width_) : nullptr;
    char* shared = free;
    void *qkv = take(linears_[kIn].n), *attended = take(linears_[kOut].k);
    float* lse = reinterpret_cast<float*>(free);
    if (options_.norm_first) {
      norm(0, x, nullptr, nullptr, h);
    }
    product(kIn, options_.norm_first ? h : x, qkv, nullptr);
    attend(qkv, attended, lse);
    product(kOut, attended, sum, nullptr);
    if (options_.norm_first) {
      norm(1, sum, x, r, h);
    } else {
      norm(0, sum, x, nullptr, h);
    }
    if (crosses_) {
      cross(h, sum, shared);
      if (options_.norm_first) {
        norm(2, sum, r, other, h);
        r = other;
      } else {
        norm(1, sum, h, nullptr, other);
        h = other;
      }
    }
    void *up = shared, *gate = gated_ ? shared + bytes(d_ff) : nullptr;
    product(kUp, h, up, nullptr);
    if (gated_) {
      product(kGate, h, gate, nullptr);
    }
    run_activation_fwd(activation_args(up, gate, up));
    if (options_.norm_first) {
      product(kDown, up, out, r);
    } else {
      product(kDown, up, sum, nullptr);
      norm(crosses_ ? 2 : 1, sum, h, nullptr, out);
    }
    return y;
  }

  bool is_bf16() const { return dtype_ == ScalarType::BFloat16; }

  // Returns the weight of a linear layer, which is read in place.
  Operand weight(Linear which) const {
    const GemvArgs& linear = linears_[which];
    return {linear.weight, linear.n, linear.k, linear.weight_row, 1, dtype_};
  }

  // y = linear layer of x, plus residual if it is not null. All are contiguous.
  void product(Linear which, const void* x, void* y, const void* residual) const {
    product_of(tokens_, which, x, y, residual);
  }

  // The same for any number of rows. A residual is allowed only if there are as many rows as tokens.
  void product_of(int64_t rows, Linear which, const void* x, void* y, const void* residual = nullptr) const {
    const GemvArgs& linear = linears_[which];
    constexpr int64_t kLeastBf16 = 1 << 18;  // elements, equal to LEAST_WEIGHT_BF16 in _few_rows_table.py
    const bool few = rows <= options_.most_few_rows && (!is_bf16() || linear.n * linear.k >= kLeastBf16);
    if (!is_bf16() && (few || linear.type != WeightType::kFloat32)) {
      return few_rows(rows, which, x, y, residual);
    }
    const void* bias = is_bf16() ? biases_[which] : linear.bias;
    if (few) {
      few_rows_bf16(rows, linear, bias, x, y);
    } else {
      const bool ours = rows <= options_.most_own_rows;
      multiply(operand(x, rows, linear.k, dtype_), weight(which).t(), bias, false, ours, y);
    }
    if (residual) {
      drop(y, kernel_dtype(), residual, kNoDropout, y, kernel_dtype());
    }
  }

  // out = dropout(x), plus residual if it is not null. residual has the dtype of out. All have the width of the layer
  // and are contiguous. out may be x or residual.
  void drop(const void* x, DType x_dtype, const void* residual, const Dropout& dropout, void* out,
            DType out_dtype) const {
    run_dropout({x, residual, out, tokens_, width_, width_, width_, x_dtype, out_dtype, dropout});
  }

  // y = norm(x + residual); r receives the sum if it is not null. x and y have x_dtype. residual and r have the dtype
  // of the layer's x.
  NormFwdArgs norm_args(int which, const void* x, const void* residual, void* r, void* y) const {
    NormFwdArgs args{};
    args.x = x;
    args.residual = residual;
    args.r = r;
    args.y = y;
    args.weight = norm_values_[2 * which];
    args.bias = norm_values_[2 * which + 1];
    args.x_dtype = kernel_dtype();
    args.r_dtype = stream_dtype();
    args.rows = tokens_;
    args.cols = args.x_stride = args.residual_stride = width_;
    args.eps = static_cast<float>(options_.eps[which]);
    return args;
  }

  // hidden = activation(up), or activation(gate) * up
  ActivationArgs activation_args(const void* up, const void* gate, void* hidden) const {
    ActivationArgs args{};
    args.preact = up;
    args.gate = gate;
    args.hidden = hidden;
    args.rows = tokens_;
    args.cols = args.preact_stride = args.gate_stride = linears_[kUp].n;
    args.activation = static_cast<Activation>(options_.activation);
    args.dtype = kernel_dtype();
    return args;
  }

  DType kernel_dtype() const { return is_bf16() ? DType::kBFloat16 : DType::kFloat32; }
  DType stream_dtype() const { return stream_ == ScalarType::BFloat16 ? DType::kBFloat16 : DType::kFloat32; }

  // Returns a parameter of `width` elements as fp32, the dtype that the kernels read. `room` holds the copy if one is
  // needed.
  const float* values_of(const Tensor& t, const char* name, std::vector<float>& room) const {
    const void* data = layer_tensor(t, {width_}, name, stream_);
    if (stream_ == ScalarType::Float) {
      return static_cast<const float*>(data);
    }
    room.resize(width_);
    const auto* bits = static_cast<const uint16_t*>(data);
    for (int64_t i = 0; i < width_; ++i) {
      const uint32_t wide = static_cast<uint32_t>(bits[i]) << 16;
      std::memcpy(&room[i], &wide, sizeof wide);
    }
    return room.data();
  }

  const Tensor x_;
  const std::vector<Tensor>& norms_;
  const LayerOptions& options_;
  const bool gated_, crosses_;
  const ScalarType stream_;  // the dtype of x, the result, the sums r and the norms' parameters
  const ScalarType dtype_;   // the dtype of everything else
  std::vector<GemvArgs> linears_;
  // The biases of the linear layers in bf16. In fp32, linears_ holds them.
  std::vector<const void*> biases_;
  std::vector<const float*> norm_values_;
  int64_t width_, tokens_;

 private:
  // The product of few rows, which reads the weight in place.
  void few_rows(int64_t rows, Linear which, const void* x, void* y, const void* residual) const {
    GemvArgs args = linears_[which];
    args.x = static_cast<const float*>(x);
    args.y = static_cast<float*>(y);
    args.residual = static_cast<const float*>(residual);
    args.m = rows;
    args.x_row = args.k;
    args.y_row = args.residual_row = args.n;
    run_gemv(args);
  }

  void few_rows_bf16(int64_t rows, const GemvArgs& linear, const void* bias, const void* x, void* y) const {
    const auto bits = [](const void* p) { return static_cast<const uint16_t*>(p); };
    FewRowsArgs args{bits(x), bits(linear.weight), bits(bias), static_cast<uint16_t*>(y), rows, linear.n, linear.k};
    args.x_row = linear.k;
    args.weight_row = linear.weight_row;
    args.y_row = linear.n;
    run_few_rows(args);
  }

  void norm(int which, const void* x, const void* residual, void* r, void* y) const {
    run_norm_fwd(norm_args(which, x, residual, r, y));
  }

  std::vector<float> widened_[6];
};

}  // namespace fastattn
