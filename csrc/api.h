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
// (seed, offset) on the device of the op; nullptr: no dropout; else threshold > 0.
struct Dropout {
  const int64_t* rng;
  uint32_t threshold;
  float scale;
};

struct DropoutArgs {
  const void* x;         // (rows, cols), rows x_stride apart
  const void* residual;  // of out_dtype, or null
  void* out;             // contiguous
  int64_t rows, cols, x_stride, residual_stride;
  DType x_dtype, out_dtype;
  Dropout dropout;
};
FASTATTN_DECLARE_CPU(dropout_fwd, DropoutArgs);  // rows

struct NormFwdArgs {
  const void* x;         // (rows, cols), rows x_stride apart
  const void* residual;  // of r_dtype, or null
  const float* weight;   // or null
  const float* bias;     // or null
  void* y;               // of x_dtype, contiguous
  void* r;               // contiguous, or null: not wanted
  float* mean;           // (rows), null for rms or where not wanted
  float* rstd;           // (rows), null where not wanted
  int64_t rows, cols, x_stride, residual_stride;
  float eps;
  bool rms;
  DType x_dtype, r_dtype;
  Dropout dropout;
};
FASTATTN_DECLARE_CPU(norm_fwd, NormFwdArgs);  // rows

struct NormBwdArgs {
  const void* dy;       // of x_dtype, rows dy_stride apart
  const void* dr_out;   // of r_dtype, or null
  const void* r;        // rows r_stride apart
  const float* weight;  // or null
  const float* mean;    // null: rms
  const float* rstd;
  void* dx;         // of x_dtype, contiguous
  void* dresidual;  // of r_dtype, contiguous, or null: the same as dx
  void* dweight;    // of weight_dtype, or null
  void* dbias;      // of weight_dtype, or null
  float* sums;      // (chunks, 2, cols): dweight and dbias of the rows of each chunk
  int64_t rows, cols, dy_stride, dr_out_stride, r_stride, rows_per_chunk, chunks;
  DType x_dtype, r_dtype, weight_dtype;
  Dropout dropout;
};
FASTATTN_DECLARE_CPU(norm_bwd, NormBwdArgs);          // chunks
FASTATTN_DECLARE_CPU(norm_bwd_columns, NormBwdArgs);  // columns, after all chunks

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
