#pragma once
// An encoder or decoder layer in the frame of layer.h: self-attention, which reads the rows that in_proj wrote, and
// attention to a memory.
#include <array>
#include <cmath>

#include "attention_call.h"
#include "attention_run.h"
#include "layer.h"

namespace fastattn {

constexpr char kEncode[] = "layer_encode: ";

// The memory that a decoder layer attends to, and its masks. For an encoder layer there is none.
struct Memory {
  // tensors: empty, or three tensors: the memory (batch, seqlen, d_model), or (seqlen, batch, d_model) without
  // batch_first; a mask; a bias. The mask and the bias have no elements if they are absent.
  Memory(const std::vector<Tensor>& tensors, bool causal_in) : causal(causal_in) {
    STD_TORCH_CHECK(tensors.empty() || tensors.size() == 3, kEncode, "memory must be 0 or 3 tensors, got ",
                    tensors.size());
    if (!tensors.empty()) {
      tokens = contiguous_copy(tensors[0]);
      mask = present(tensors[1]);
      bias = present(tensors[2]);
    }
  }

  OptionalTensor tokens, mask, bias;
  bool causal;
};

// An encoder or decoder layer without gradients, in fp32 or bf16.
class EncodeLayer : protected Layer {
 public:
  EncodeLayer(const Tensor& x, const std::vector<Tensor>& norms, const std::vector<Tensor>& linears,
              const LayerOptions& options, bool batch_first, const Memory& memory,
              std::optional<ScalarType> dtype = std::nullopt)
      : Layer(x, norms, linears, options, dtype), batch_first_(batch_first), memory_(memory) {
    for (const auto& linear : linears_) {
      STD_TORCH_CHECK(is_bf16() || linear.type == WeightType::kFloat32, kEncode,
                      "weights must have the dtype of the products");
    }
    const int64_t heads = linears_[kOut].k;
    STD_TORCH_CHECK(heads % options.n_heads == 0 && linears_[kIn].n == 3 * heads, kEncode,
                    "in_proj and out_proj must fit ", options.n_heads, " heads, got ", linears_[kIn].n, " rows and ",
                    heads, " columns");
    STD_TORCH_CHECK(crosses_ == memory.tokens.has_value(), kEncode, "memory must be given if there are weights for it");
    if (crosses_) {
      set_memory();
    }
  }

  Tensor run(const OptionalTensor& mask, const OptionalTensor& bias, bool causal) {
    set_attention(mask, bias, causal);
    return Layer::run();
  }

 protected:
  void set_attention(const OptionalTensor& mask, const OptionalTensor& bias, bool causal) {
    set_args(args_, x_, mask, bias, causal);
    if (crosses_) {
      set_args(cross_, *memory_.tokens, memory_.mask, memory_.bias, memory_.causal);
    }
  }

  // Returns the (batch, heads, seqlen, head_dim) tensor number `which` of rows that hold `parts` such tensors, such as
  // q, k and v or their gradients. The rows are the tokens of x.
  HeadTensor part(void* rows, int64_t which, int64_t parts) const { return part(rows, which, parts, args_.seqlen_q); }
  HeadTensor part_of_memory(void* rows, int64_t which) const { return part(rows, which, 2, cross_.seqlen_k); }

  void attend(void* qkv, void* out, float*) override {
    args_.q = part(qkv, 0, 3);
    args_.k = part(qkv, 1, 3);
    args_.v = part(qkv, 2, 3);
    args_.out = part(out, 0, 1);
    run_attention_fwd(args_);
  }

  void cross(const void* x, void* out, void* room) override {
    char* free = static_cast<char*>(room);
    const auto take = [&](int64_t rows, int64_t cols) { return std::exchange(free, free + bytes(rows, cols)); };
    void *q = take(tokens_, heads_), *kv = take(memory_tokens_, 2 * heads_), *attended = take(tokens_, heads_);
    cross_to(data_of(*memory_.tokens), x, q, kv, attended, out);
  }

  int64_t room_to_cross() const override {
    return crosses_ ? 2 * bytes(tokens_, heads_) + bytes(memory_tokens_, 2 * heads_) : 0;
  }

  // out = attention from x to the memory. The projections write q and kv, and attention writes attended.
  void cross_to(const void* memory, const void* x, void* q, void* kv, void* attended, void* out) {
    product(kCrossQ, x, q, nullptr);
    product_of(memory_tokens_, kCrossKv, memory, kv);
    cross_.q = part(q, 0, 1);
    cross_.k = part_of_memory(kv, 0);
    cross_.v = part_of_memory(kv, 1);
    cross_.out = part(attended, 0, 1);
    run_attention_fwd(cross_);
    product(kCrossOut, attended, out, nullptr);
  }

  const bool batch_first_;
  const Memory& memory_;
  AttentionCpuArgs args_{}, cross_{};
  int64_t memory_tokens_ = 0;
  int64_t heads_ = linears_[kOut].k;  // the number of columns of q, of k and of v

 private:
  int64_t size() const { return is_bf16() ? 2 : sizeof(float); }
  int64_t bytes(int64_t rows, int64_t cols) const { return Scratch::whole_lines(rows * cols * size()); }

  // Sets the sizes of the memory, and divides the weight of its attention into the parts for q and for k and v.
  void set_memory() {
    const Tensor& t = *memory_.tokens;
    const int64_t batch = batch_first_ ? 0 : 1;
    STD_TORCH_CHECK(t.dim() == 3 && t.size(batch) == x_.size(batch), kEncode,
                    "memory must have 3 dimensions and the batch of x");
    layer_tensor(t, {t.size(0), t.size(1), width_}, "memory", stream_);
    memory_tokens_ = t.size(0) * t.size(1);
    STD_TORCH_CHECK(memory_tokens_ != 0 || tokens_ == 0, kEncode, "memory must have tokens");
    const GemvArgs &in = linears_[kCrossIn], &out = linears_[kCrossOut];
    STD_TORCH_CHECK(in.k == width_ && in.n == 3 * heads_ && out.n == width_ && out.k == heads_, kEncode,
                    "the weights for the memory must fit the others");
    for (const auto& [first, count] : {std::pair{int64_t{0}, heads_}, std::pair{heads_, 2 * heads_}}) {
      GemvArgs rows = linears_[kCrossIn];
      rows.weight = static_cast<const char*>(rows.weight) + first * rows.weight_row * size();
      rows.bias = rows.bias ? rows.bias + first : nullptr;
      rows.n = count;
      linears_.push_back(rows);
      if (is_bf16()) {
        const auto* bias = static_cast<const char*>(biases_[kCrossIn]);
        biases_.push_back(bias ? bias + first * size() : nullptr);
      }
    }
  }

  void set_args(AttentionCpuArgs& args, const Tensor& keys, const OptionalTensor& mask, const OptionalTensor& bias,
                bool causal) const {
    args.batch = x_.size(batch_first_ ? 0 : 1);
    args.seqlen_q = x_.size(batch_first_ ? 1 : 0);
    args.seqlen_k = keys.size(batch_first_ ? 1 : 0);
    args.n_heads = args.n_kv_heads = options_.n_heads;
    args.head_dim = args.head_dim_v = heads_ / options_.n_heads;
    args.window_left = -1;
    args.window_right = causal ? 0 : -1;
    args.top_left = true;
    args.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(std::max<int64_t>(1, args.head_dim))));
    args.dtype = kernel_dtype();
    const std::array<int64_t, 4> full{args.batch, args.n_heads, args.seqlen_q, args.seqlen_k};
    if (mask) {
      STD_TORCH_CHECK(mask->is_cpu() && mask->scalar_type() == ScalarType::Bool, kEncode, "mask must be bool");
      args.mask = checked_scores(*mask, full, "mask");
    }
    if (bias) {
      STD_TORCH_CHECK(bias->is_cpu(), kEncode, "bias must be on the CPU");
      args.bias_dtype = dtype_of(*bias, "bias");
      args.bias = checked_scores(*bias, full, "bias");
    }
  }

  HeadTensor part(void* rows, int64_t which, int64_t parts, int64_t seqlen) const {
    const int64_t row = parts * heads_;
    // The distances between sequences, and between the tokens of a sequence, in rows.
    const int64_t sequence = batch_first_ ? seqlen : 1, token = batch_first_ ? 1 : args_.batch;
    return {static_cast<char*>(rows) + which * heads_ * size(), sequence * row, args_.head_dim, token * row};
  }
};

}  // namespace fastattn
