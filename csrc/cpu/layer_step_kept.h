#pragma once
// The options of a training step of an encoder or decoder layer, the tensors that its forward saves for the backward,
// and its weights in bf16. See layer_step.h.
#include "layer_encode.h"

namespace fastattn {

// The places of dropout, in the order of their random states.
enum Drop { kAttention, kFirst, kCrossAttention, kCrossSecond, kHidden, kSecond, kPlaces };

struct StepOptions {
  // `values` has the order of `Options` in layer_step.py.
  explicit StepOptions(const std::vector<double>& values) {
    constexpr size_t kValues = 20;
    STD_TORCH_CHECK(values.size() == kValues, "layer_encode_fwd: options must be ", kValues, " numbers, got ",
                    values.size());
    auto next = values.begin();
    for (double& p : dropout_p) {
      p = *next++;
    }
    const auto number = [&] { return static_cast<int64_t>(*next++); };
    causal = number();
    memory_causal = number();
    batch_first = number();
    autocast = number();
    layer.most_few_rows = number();
    layer.most_own_rows = number();
    most_own_dx = number();
    most_own_dw = number();
    layer.n_heads = number();
    layer.norm_first = number();
    layer.activation = number();
    for (double& eps : layer.eps) {
      eps = *next++;
    }
  }

  LayerOptions layer;
  double dropout_p[kPlaces];
  bool causal, memory_causal, batch_first;
  bool autocast;  // fp32, but the products are in bf16
  // Up to this number of tokens, our own products compute dx and dweight.
  int64_t most_own_dx, most_own_dw;
};

// The tensors that the forward saves. kQkv: q, k and v of every token. kPreact: the results of linear1. kOthers: the
// input of out_proj, the sums and results of norms, and the statistics. kWeights: under autocast, the weights in bf16.
// kCrossed: in a decoder layer, what its attention to the memory reads and computes for every token. kMemory: k and v
// for every token of the memory, and under autocast the token in bf16.
enum Kept { kQkv, kPreact, kOthers, kWeights, kCrossed, kMemory };

// Divides a block of memory.
class Pieces {
 public:
  explicit Pieces(void* memory) : free_(static_cast<char*>(memory)) {}

  void* take(int64_t bytes) { return std::exchange(free_, free_ + Scratch::whole_lines(bytes)); }
  void* take_exact(int64_t bytes) { return std::exchange(free_, free_ + bytes); }

 private:
  char* free_;
};

// Returns the tensors of linear layers in bf16. They are in `memory`, which is filled if it is new.
inline std::vector<Tensor> in_bf16(const std::vector<Tensor>& linears, const Tensor& memory, bool is_new) {
  Pieces pieces(const_cast<void*>(data_of(memory)));
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  std::vector<Tensor> found;
  for (const Tensor& linear : linears) {
    if (linear.numel() == 0) {
      found.push_back(linear);
      continue;
    }
    STD_TORCH_CHECK(linear.is_cpu() && linear.dim() >= 1 && linear.dim() <= 2,
                    "layer: each of linears must be a CPU tensor with 1 or 2 dimensions");
    const Tensor t = linear.is_contiguous() ? linear : contiguous_copy(linear);
    const int64_t cols = t.size(t.dim() - 1), rows = t.numel() / cols;
    void* data = pieces.take(2 * t.numel());
    if (is_new) {
      run_conversion(data_of(t), dtype_of(t, "a weight"), data, DType::kBFloat16, rows, cols);
    }
    const int64_t strides[] = {cols, 1};
    found.push_back(torch::stable::from_blob(data, t.sizes(), {strides + 2 - t.dim(), static_cast<size_t>(t.dim())},
                                             cpu, ScalarType::BFloat16));
  }
  return found;
}

// The number of elements that in_bf16 needs.
inline int64_t elements_in_bf16(const std::vector<Tensor>& linears) {
  int64_t bytes = 0;
  for (const Tensor& t : linears) {
    bytes += Scratch::whole_lines(2 * t.numel());
  }
  return bytes / 2;
}

}  // namespace fastattn
