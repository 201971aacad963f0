// LayerNorm and RMSNorm, with the preceding bias, dropout and residual add.
//
//   r = keep * dropout_scale * (x + x_bias) + residual        rounded once, to the dtype of the residual, or of x
//   y = (r - mean) * rstd * weight + bias                     rms: mean = 0
//
// A row is owned by 8 to 512 threads, which hold it in registers. Statistics are centred and in fp32. Rows that are too
// wide, not aligned to 16 bytes or of a rare pair of dtypes are read again from the cache, with the type Dynamic.
// Saved: r and the fp32 statistics, never a mask. Limits: fewer than 2^31 columns.
// Reference: fastattn.reference.norm
#include "common.cuh"

namespace fastattn {
namespace {

constexpr int kFwdThreads = 128;
constexpr int kFwdCols = kMaxThreads * kGroup * 4;  // the widest rows that are held in registers

// Loads r of one row, rounded, with zeros from column `cols` on. The loads of a residual that does not exist are
// masked, so there is no branch.
template <typename X, typename R, int kGroups>
__device__ __forceinline__ void load_r(float (&r)[kGroups][kGroup], const NormFwdArgs& args, const DropoutMask& dropout,
                                       int64_t row, int cols, int start, bool aligned) {
  float residual[kGroups][kGroup];
  load_groups<X>(r, args.x, args.x_dtype, row * args.x_stride, cols, start, aligned);
  load_groups<R>(residual, args.residual, args.r_dtype, row * args.residual_stride, args.residual != nullptr ? cols : 0,
                 start, aligned);
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    if (args.x_bias != nullptr) {
      float x_bias[1][kGroup];
      load_groups<Dynamic>(x_bias, args.x_bias, args.x_bias_dtype, 0, cols, start + g * blockDim.x * kGroup, aligned);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        r[g][i] += x_bias[0][i];
      }
    }
    dropout.apply(r[g], row, first_col(start, g));
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      r[g][i] = rounded<R>(r[g][i] + residual[g][i], args.r_dtype);
    }
  }
}

// Returns r - mean, or zero in columns past the end.
__device__ __forceinline__ float centered(float r, float mean, int col, int cols) {
  return col < cols ? r - mean : 0.f;
}

// Adds r - mean and its square to the two sums.
template <int kGroups>
__device__ __forceinline__ void add_centered(float (&sums)[2], const float (&r)[kGroups][kGroup], float mean, int cols,
                                             int start) {
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const float value = centered(r[g][i], mean, first_col(start, g) + i, cols);
      sums[0] += value;
      sums[1] += value * value;
    }
  }
}

// Computes rstd from the two sums over the row. The first sum is the rounding error of the mean; with it, a constant
// row becomes exactly 0. If the squares exceed fp32, rstd is 0. NaN stays NaN, which fmaxf would drop.
__device__ __forceinline__ float finish_stats(float& mean, const float (&sums)[2], const NormFwdArgs& args) {
  const float rest = args.rms ? 0.f : sums[0] / args.cols;
  mean += rest;
  const float squares = sums[1] / args.cols;
  const float variance = squares < INFINITY ? squares - rest * rest : squares;
  return rsqrtf((variance < 0.f ? 0.f : variance) + args.eps);
}

template <int kGroups>
__device__ __forceinline__ float sum_of(const float (&r)[kGroups][kGroup]) {
  float sum = 0.f;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      sum += r[g][i];
    }
  }
  return sum;
}

// Computes y in place of r.
template <typename X, typename R, int kGroups>
__device__ __forceinline__ void store_r_and_y(float (&r)[kGroups][kGroup], const NormFwdArgs& args, float mean,
                                              float rstd, int64_t row, int cols, int start, bool aligned) {
  if (args.r != nullptr) {
    store_groups<R>(r, args.r, args.r_dtype, row * args.cols, cols, start, aligned);
  }
  float weight[kGroups][kGroup];
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      r[g][i] = (r[g][i] - mean) * rstd;
    }
  }
  if (args.weight != nullptr) {
    load_groups<Dynamic>(weight, args.weight, args.weight_dtype, 0, cols, start, aligned);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        r[g][i] *= weight[g][i];
      }
    }
  }
  if (args.bias != nullptr) {
    load_groups<Dynamic>(weight, args.bias, args.bias_dtype, 0, cols, start, aligned);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        r[g][i] += weight[g][i];
      }
    }
  }
  store_groups<X>(r, args.y, args.x_dtype, row * args.cols, cols, start, aligned);
}

__device__ __forceinline__ void store_stats(const NormFwdArgs& args, float mean, float rstd, int64_t row) {
  if (threadIdx.x == 0 && row < args.rows) {
    if (args.mean != nullptr) {
      args.mean[row] = mean;
    }
    if (args.rstd != nullptr) {
      args.rstd[row] = rstd;
    }
  }
}

template <typename X, typename R, int kGroups>
__global__ void __launch_bounds__(kMaxThreads) norm_fwd_kernel(NormFwdArgs args) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  // The threads of a row that does not exist stay idle.
  const int cols = row < args.rows ? static_cast<int>(args.cols) : 0;
  const DropoutMask dropout(args.dropout);
  float r[kGroups][kGroup];
  load_r<X, R>(r, args, dropout, row, cols, 0, true);

  float mean = 0.f;
  if (!args.rms) {
    float sum[1] = {sum_of(r)};
    row_sum(sum);
    mean = sum[0] / args.cols;
  }
  float sums[2] = {0.f, 0.f};
  add_centered(sums, r, mean, cols, 0);
  row_sum(sums);
  const float rstd = finish_stats(mean, sums, args);

  store_stats(args, mean, rstd, row);
  store_r_and_y<X, R>(r, args, mean, rstd, row, cols, 0, true);
}

// Rows of any width, alignment and dtype. They are read three times: for the mean, the centred second moment and the
// result.
__global__ void __launch_bounds__(kMaxThreads) norm_fwd_wide_kernel(NormFwdArgs args, bool aligned) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int cols = row < args.rows ? static_cast<int>(args.cols) : 0;
  const int step = blockDim.x * kGroup;
  const DropoutMask dropout(args.dropout);
  float r[1][kGroup];

  float mean = 0.f;
  if (!args.rms) {
    float sum[1] = {0.f};
    for (int64_t start = 0; start < cols; start += step) {
      load_r<Dynamic, Dynamic>(r, args, dropout, row, cols, start, aligned);
      sum[0] += sum_of(r);
    }
    row_sum(sum);
    mean = sum[0] / args.cols;
  }
  float sums[2] = {0.f, 0.f};
  for (int64_t start = 0; start < cols; start += step) {
    load_r<Dynamic, Dynamic>(r, args, dropout, row, cols, start, aligned);
    add_centered(sums, r, mean, cols, start);
  }
  row_sum(sums);
  const float rstd = finish_stats(mean, sums, args);

  store_stats(args, mean, rstd, row);
  for (int64_t start = 0; start < cols; start += step) {
    load_r<Dynamic, Dynamic>(r, args, dropout, row, cols, start, aligned);
    store_r_and_y<Dynamic, Dynamic>(r, args, mean, rstd, row, cols, start, aligned);
  }
}

template <typename X, typename R>
void launch_fwd(const NormFwdArgs& args, cudaStream_t stream) {
  const int groups = args.cols <= 32 * kGroup ? 1 : args.cols <= 64 * kGroup ? 2 : 4;
  const dim3 block = row_block(args.cols, groups, kFwdThreads);
  const auto kernel = groups == 1   ? norm_fwd_kernel<X, R, 1>
                      : groups == 2 ? norm_fwd_kernel<X, R, 2>
                                    : norm_fwd_kernel<X, R, 4>;
  kernel<<<blocks(args.rows, block.y), block, 0, stream>>>(args);
}

}  // namespace

int norm_fwd_cuda(const NormFwdArgs& args, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const bool aligned = is_aligned({args.x, args.x_bias, args.residual, args.weight, args.bias, args.y, args.r},
                                  {args.cols, args.x_stride, args.residual_stride});
  if (aligned && args.cols <= kFwdCols && is_common(args.x_dtype, args.r_dtype)) {
    with_common_types(args.x_dtype, args.r_dtype,
                      [&](auto x, auto r) { launch_fwd<decltype(x), decltype(r)>(args, cuda_stream); });
  } else {
    const dim3 block = row_block(args.cols, 1, kFwdThreads);
    norm_fwd_wide_kernel<<<blocks(args.rows, block.y), block, 0, cuda_stream>>>(args, aligned);
  }
  return cudaGetLastError();
}

}  // namespace fastattn
