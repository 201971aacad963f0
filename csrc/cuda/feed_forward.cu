// The passes of the feed-forward block between its matrix products.
//
//   hidden = act(preact) * keep * scale                    gated: act(gate) * preact * keep * scale
//   dact = dhidden * keep * scale
//   dpreact = dact * act'(preact)                          gated: dact * act(gate)
//                                                                 dgate = dact * preact * act'(gate)
//   dbias = sum_rows(dpreact),  dbias_gate = sum_rows(dgate)
//
// A thread owns eight columns of a row. In the forward, a thread has one row of a tile. In the backward, a block owns a
// strip of up to 256 columns, loops over the rows of its chunk and sums the bias gradients in fp32. It writes one row
// of sums, and a second kernel adds the sums of all chunks in order, without atomics. The backward also stores hidden
// again, for the gradient of w2. Saved: the pre-activations, never hidden or a mask. Limits: 2^30 columns.
// Reference: fastattn.reference.feed_forward
#include "activations.h"
#include "common.cuh"

namespace fastattn {
namespace {

constexpr int kActivationThreads = 256;
constexpr int kMaxStripLanes = 32;
constexpr int kSumCols = 32;
// The number of blocks that fit on a multiprocessor by their registers. The grid of the backward fills the device once.
template <bool kGated>
constexpr int kResident = kGated ? 3 : 4;

// The number type for activations.h.
struct Scalar {
  float v;

  __device__ static Scalar fill(float value) { return {value}; }
  __device__ __forceinline__ friend Scalar operator+(Scalar a, Scalar b) { return {a.v + b.v}; }
  __device__ __forceinline__ friend Scalar operator-(Scalar a, Scalar b) { return {a.v - b.v}; }
  __device__ __forceinline__ friend Scalar operator-(Scalar a) { return {-a.v}; }
  __device__ __forceinline__ friend Scalar operator*(Scalar a, Scalar b) { return {a.v * b.v}; }
  __device__ __forceinline__ friend bool operator<(Scalar a, Scalar b) { return a.v < b.v; }
  __device__ __forceinline__ friend Scalar fma(Scalar a, Scalar b, Scalar c) { return {fmaf(a.v, b.v, c.v)}; }
  __device__ __forceinline__ friend Scalar exp(Scalar a) { return {expf(a.v)}; }
  __device__ __forceinline__ friend Scalar abs(Scalar a) { return {fabsf(a.v)}; }
  __device__ __forceinline__ friend Scalar min(Scalar a, Scalar b) { return a < b ? a : b; }
  __device__ __forceinline__ friend Scalar max(Scalar a, Scalar b) { return b < a ? a : b; }
  __device__ __forceinline__ friend Scalar select(bool first, Scalar a, Scalar b) { return first ? a : b; }
  // The error is 2 units in the last place. The result is 0 if b is 2^126 or more, which happens only if a sigmoid is
  // 0.
  __device__ __forceinline__ friend Scalar operator/(Scalar a, Scalar b) { return {__fdividef(a.v, b.v)}; }
};

template <typename T, typename Act, bool kGated>
__global__ void __launch_bounds__(kActivationThreads)
    activation_fwd_kernel(ActivationArgs args, unsigned strips, bool aligned) {
  const int64_t row = static_cast<int64_t>(blockIdx.x / strips) * blockDim.y + threadIdx.y;
  const int start = blockIdx.x % strips * blockDim.x * kGroup;
  const int cols = row < args.rows ? static_cast<int>(args.cols) : 0;
  const DropoutMask dropout(args.dropout);
  float hidden[1][kGroup];
  float gate[1][kGroup];
  load_groups<T>(hidden, args.preact, args.dtype, row * args.preact_stride, cols, start, aligned);
  if constexpr (kGated) {
    load_groups<T>(gate, args.gate, args.dtype, row * args.gate_stride, cols, start, aligned);
  }
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    if constexpr (kGated) {
      hidden[0][i] *= Act::at({gate[0][i]}).value.v;
    } else {
      hidden[0][i] = Act::at({hidden[0][i]}).value.v;
    }
  }
  dropout.apply(hidden[0], row, first_col(start, 0));
  store_groups<T>(hidden, args.hidden, args.dtype, row * args.cols, cols, start, aligned);
}

// out[col] = the sum over all threads that have this column of the strip.
__device__ __forceinline__ void store_column_sums(const float (&sum)[kGroup], float* out, int64_t cols, int start) {
  __shared__ float buffer[kGroup][kActivationThreads];
  __syncthreads();  // the previous call may still be reading
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    buffer[i][threadIdx.y * blockDim.x + threadIdx.x] = sum[i];
  }
  __syncthreads();
  const int width = min(static_cast<int64_t>(blockDim.x * kGroup), cols - start);
  // There are at least as many threads as columns.
  const int col = threadIdx.y * blockDim.x + threadIdx.x;
  if (col < width) {
    float total = 0.f;
    for (int y = 0; y < blockDim.y; ++y) {
      total += buffer[col % kGroup][y * blockDim.x + col / kGroup];
    }
    out[start + col] = total;
  }
}

template <typename T, typename Act, bool kGated>
__global__ void __launch_bounds__(kActivationThreads, kResident<kGated>)
    activation_bwd_kernel(ActivationArgs args, bool aligned) {
  const int start = blockIdx.x * blockDim.x * kGroup;
  const int cols = static_cast<int>(args.cols);
  const DropoutMask dropout(args.dropout);
  float dbias[kGroup] = {};
  float dbias_gate[kGroup] = {};

  for (int64_t row = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; row < args.rows;
       row += static_cast<int64_t>(gridDim.y) * blockDim.y) {
    float preact[1][kGroup];
    float gate[1][kGroup];
    float dact[1][kGroup];
    load_groups<T>(preact, args.preact, args.dtype, row * args.preact_stride, cols, start, aligned);
    load_groups<T>(dact, args.dhidden, args.dtype, row * args.dhidden_stride, cols, start, aligned);
    if constexpr (kGated) {
      load_groups<T>(gate, args.gate, args.dtype, row * args.gate_stride, cols, start, aligned);
    }
    float keep[kGroup] = {1.f, 1.f, 1.f, 1.f, 1.f, 1.f, 1.f, 1.f};  // apply() makes these 0 or scale
    dropout.apply(keep, row, first_col(start, 0));
    float hidden[1][kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const auto point = Act::at({kGated ? gate[0][i] : preact[0][i]});
      const float value = kGated ? point.value.v * preact[0][i] : point.value.v;
      hidden[0][i] = keep[i] != 0.f ? value * keep[i] : 0.f;  // a dropped element is 0 even if it is inf or NaN
      const float d = keep[i] != 0.f ? dact[0][i] * keep[i] : 0.f;
      if constexpr (kGated) {
        gate[0][i] = d * preact[0][i] * point.slope.v;
        dact[0][i] = d * point.value.v;
        dbias_gate[i] += gate[0][i];
      } else {
        dact[0][i] = d * point.slope.v;
      }
      dbias[i] += dact[0][i];
    }
    if (args.hidden != nullptr) {
      store_groups<T>(hidden, args.hidden, args.dtype, row * args.cols, cols, start, aligned);
    }
    store_groups<T>(dact, args.dpreact, args.dtype, row * args.cols, cols, start, aligned);
    if constexpr (kGated) {
      store_groups<T>(gate, args.dgate, args.dtype, row * args.cols, cols, start, aligned);
    }
  }

  if (args.dbias != nullptr) {
    store_column_sums(dbias, args.dbias_partial + blockIdx.y * args.cols, args.cols, start);
  }
  if (args.dbias_gate != nullptr) {
    store_column_sums(dbias_gate, args.dbias_gate_partial + blockIdx.y * args.cols, args.cols, start);
  }
}

// Adds the sums of the chunks for dbias (blockIdx.y = 0) and dbias_gate (1). A block has 32 columns.
__global__ void __launch_bounds__(kActivationThreads) activation_dbias_kernel(ActivationArgs args) {
  const float* partial = blockIdx.y == 0 ? args.dbias_partial : args.dbias_gate_partial;
  void* out = blockIdx.y == 0 ? args.dbias : args.dbias_gate;
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kSumCols + threadIdx.x;
  const bool wanted = out != nullptr && col < args.cols;
  float total = 0.f;
  for (int64_t chunk = threadIdx.y; wanted && chunk < args.chunks; chunk += blockDim.y) {
    total += partial[chunk * args.cols + col];
  }
  __shared__ float buffer[kActivationThreads / kSumCols][kSumCols];
  buffer[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y == 0 && wanted) {
    for (int y = 1; y < blockDim.y; ++y) {
      total += buffer[y][threadIdx.x];
    }
    store_value(out, args.dtype, col, total);
  }
}

// Calls body(x, act, gated) with values of the C++ types for this call.
template <typename Body>
void with_activation_types(const ActivationArgs& args, Body body) {
  with_common_types(args.dtype, args.dtype, [&](auto x, auto) {
    with_activation<Scalar>(args.activation, [&](auto act) {
      if (args.gate != nullptr) {
        body(x, act, std::true_type());
      } else {
        body(x, act, std::false_type());
      }
    });
  });
}

dim3 activation_block(const ActivationArgs& args) {
  return row_block(args.cols, 1, kActivationThreads, kMaxStripLanes);
}

}  // namespace

int activation_fwd_cuda(const ActivationArgs& args, void* stream) {
  const bool aligned =
      is_aligned({args.preact, args.gate, args.hidden}, {args.cols, args.preact_stride, args.gate_stride});
  const dim3 block = activation_block(args);
  const unsigned strips = blocks(args.cols, block.x * kGroup);
  with_activation_types(args, [&](auto x, auto act, auto gated) {
    const auto kernel = activation_fwd_kernel<decltype(x), decltype(act), gated.value>;
    kernel<<<blocks(args.rows, block.y) * strips, block, 0, static_cast<cudaStream_t>(stream)>>>(args, strips, aligned);
  });
  return cudaGetLastError();
}

int64_t activation_bwd_chunks_cuda(const ActivationArgs& args) {
  int device = 0;
  int multiprocessors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  const dim3 block = activation_block(args);
  const int64_t resident = args.gate != nullptr ? kResident<true> : kResident<false>;
  return std::clamp<int64_t>(resident * multiprocessors / blocks(args.cols, block.x * kGroup), 1,
                             blocks(args.rows, block.y));
}

int activation_bwd_cuda(const ActivationArgs& args, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const bool aligned = is_aligned({args.preact, args.gate, args.dhidden, args.hidden, args.dpreact, args.dgate},
                                  {args.cols, args.preact_stride, args.gate_stride, args.dhidden_stride});
  const dim3 block = activation_block(args);
  const dim3 grid(blocks(args.cols, block.x * kGroup), static_cast<unsigned>(args.chunks));
  with_activation_types(args, [&](auto x, auto act, auto gated) {
    const auto kernel = activation_bwd_kernel<decltype(x), decltype(act), gated.value>;
    kernel<<<grid, block, 0, cuda_stream>>>(args, aligned);
  });
  if (args.dbias != nullptr || args.dbias_gate != nullptr) {
    const dim3 sums(kSumCols, kActivationThreads / kSumCols);
    activation_dbias_kernel<<<dim3(blocks(args.cols, kSumCols), 2), sums, 0, cuda_stream>>>(args);
  }
  return cudaGetLastError();
}

}  // namespace fastattn
