#pragma once
// The interface between the op wrappers (LibTorch stable ABI) and the kernels (no torch header at all):
// plain structs and raw pointers in, an error code out.
#include <cstdint>

namespace fastattn {

enum class DType : int { kFloat32, kBFloat16, kFloat16 };

// Declares one CPU kernel for every instruction set: rows, tiles or chunks [begin, end) on the calling thread.
#define FASTATTN_DECLARE_CPU(name, Args)                             \
  void name##_default(const Args& args, int64_t begin, int64_t end); \
  void name##_avx2(const Args& args, int64_t begin, int64_t end);    \
  void name##_avx512(const Args& args, int64_t begin, int64_t end)

// Dropout: a kept element is multiplied by scale; the halfword of an element is compared with threshold. rng points to
// (seed, offset) on the device of the op; nullptr: no dropout.
struct Dropout {
  const int64_t* rng;
  uint32_t threshold;
  float scale;
};

// Feed-forward: the passes between the products. Rows of inputs lie a stride apart, outputs are contiguous; a null
// pointer is an input that is absent or an output that nobody wants. Order of the names as in reference.ACTIVATIONS.
enum class Activation : int { kGelu, kGeluTanh, kRelu, kRelu2, kSilu };

struct ActivationArgs {
  const void* preact;
  const void* gate;
  const void* dhidden;
  int64_t preact_stride, gate_stride, dhidden_stride;
  void* hidden;
  void* dpreact;
  void* dgate;
  float* dbias_partial;  // one row of sums per block of rows, reduced by activation_dbias
  float* dbias_gate_partial;
  void* dbias;
  void* dbias_gate;
  int64_t rows, cols;
  Dropout dropout;
  Activation activation;
  DType dtype;
};

constexpr int64_t kActivationBlockRows = 32;

FASTATTN_DECLARE_CPU(activation_fwd, ActivationArgs);    // rows
FASTATTN_DECLARE_CPU(activation_bwd, ActivationArgs);    // blocks of kActivationBlockRows rows
FASTATTN_DECLARE_CPU(activation_dbias, ActivationArgs);  // columns

}  // namespace fastattn
