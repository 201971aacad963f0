// LayerNorm and RMSNorm with the dropout and the residual add before them.
//
//   r = keep * dropout_scale * x + residual      rounded to the dtype of the residual, or of x, before it is normalised
//   y = (r - mean) * rstd * weight + bias        rms: mean = 0
//   wdy = weight * dy,  xhat = (r - mean) * rstd
//   dr = (wdy - mean(wdy) - xhat * mean(wdy * xhat)) * rstd + dr_out          rms: without mean(wdy)
//   dresidual = dr,  dx = keep * dropout_scale * dr,  dweight = sum_rows(dy * xhat),  dbias = sum_rows(dy)
//
// Forward: 8 to 512 threads own a row and hold it in registers; statistics are centred, in fp32. Backward: blocks stay
// and walk over the rows; each thread adds up dweight and dbias of its columns, each block writes one row of fp32 sums,
// a second kernel adds those in a fixed order: no atomics. Wide rows, and rare pairs of dtypes, are read again from the
// cache instead of held. Saved: r and the fp32 statistics, never a mask. Limits: fewer than 2^31 columns.
// Reference: fastattn.reference.norm
#include "common.cuh"

namespace fastattn {
namespace {

constexpr int kFwdThreads = 128;
constexpr int kBwdThreads = 256;
constexpr int kFwdCols = kMaxThreads * kGroup * 4;  // the widest rows that are held in registers
constexpr int kBwdCols = kMaxThreads * kGroup * 2;
constexpr int kStripLanes = 32;

// the pairs of dtypes that models use; the others run on the kernels for wide rows alone, which keeps the binary small
template <typename X, typename R>
constexpr bool kCommon = std::is_same_v<X, R> || std::is_same_v<R, float>;

template <typename X, typename R, int kGroups>
__device__ __forceinline__ void load_r(Group<R> (&r)[kGroups], const NormFwdArgs& args, const RowDropout& dropout,
                                       int64_t row, int cols, int start, bool aligned) {
  Group<X> x[kGroups];
  Group<R> residual[kGroups];
  load_groups(x, static_cast<const X*>(args.x) + row * args.x_stride, cols, start, aligned);
  if (args.residual != nullptr) {
    load_groups(residual, static_cast<const R*>(args.residual) + row * args.residual_stride, cols, start, aligned);
  }
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    float value[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      value[i] = static_cast<float>(x[g].value[i]);
    }
    dropout.apply(value, start + (g * blockDim.x + threadIdx.x) * kGroup);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const float sum = args.residual != nullptr ? value[i] + static_cast<float>(residual[g].value[i]) : value[i];
      r[g].value[i] = static_cast<R>(sum);
    }
  }
}

// the sum over the columns that are there of (r - mean)^power
template <int kPower, typename R, int kGroups>
__device__ __forceinline__ float moment(const Group<R> (&r)[kGroups], float mean, int cols, int start) {
  float sum = 0.f;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const int col = start + (g * blockDim.x + threadIdx.x) * kGroup;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const float centered = col + i < cols ? static_cast<float>(r[g].value[i]) - mean : 0.f;
      sum += kPower == 1 ? centered : centered * centered;
    }
  }
  return sum;
}

template <typename X, typename R, int kGroups>
__device__ __forceinline__ void store_y_and_r(const Group<R> (&r)[kGroups], const NormFwdArgs& args, float mean,
                                              float rstd, int64_t row, int cols, int start, bool aligned) {
  float y[kGroups][kGroup];
  float parameter[kGroups][kGroup];
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    float value[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      value[i] = static_cast<float>(r[g].value[i]);
      y[g][i] = (value[i] - mean) * rstd;
    }
    if (args.r != nullptr) {
      store_group(value, static_cast<R*>(args.r) + row * args.cols, cols,
                  start + (g * blockDim.x + threadIdx.x) * kGroup, aligned);
    }
  }
  if (args.weight != nullptr) {
    load_parameter(parameter, args.weight, args.weight_dtype, cols, start, aligned);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        y[g][i] *= parameter[g][i];
      }
    }
  }
  if (args.bias != nullptr) {
    load_parameter(parameter, args.bias, args.bias_dtype, cols, start, aligned);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        y[g][i] += parameter[g][i];
      }
    }
  }
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    store_group(y[g], static_cast<X*>(args.y) + row * args.cols, cols,
                start + (g * blockDim.x + threadIdx.x) * kGroup, aligned);
  }
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
__global__ void __launch_bounds__(kMaxThreads) norm_fwd_kernel(NormFwdArgs args, bool aligned) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int cols = row < args.rows ? static_cast<int>(args.cols) : 0;  // the threads of a row that is not there idle
  const RowDropout dropout(args.dropout, row);

  Group<R> r[kGroups];
  load_r<X>(r, args, dropout, row, cols, 0, aligned);

  float mean = 0.f;
  if (!args.rms) {
    float sum[1] = {moment<1>(r, 0.f, cols, 0)};
    row_sum(sum);
    mean = sum[0] / args.cols;
  }
  float squares[1] = {moment<2>(r, mean, cols, 0)};
  row_sum(squares);
  const float rstd = rsqrtf(squares[0] / args.cols + args.eps);

  store_stats(args, mean, rstd, row);
  store_y_and_r<X>(r, args, mean, rstd, row, cols, 0, aligned);
}

// One block a row, which it walks over three times: mean, centred second moment, result.
template <typename X, typename R>
__global__ void __launch_bounds__(kMaxThreads) norm_fwd_wide_kernel(NormFwdArgs args, bool aligned) {
  const int64_t row = blockIdx.x;
  const int cols = static_cast<int>(args.cols);
  const int step = blockDim.x * kGroup;
  const RowDropout dropout(args.dropout, row);
  Group<R> r[1];

  float mean = 0.f;
  if (!args.rms) {
    float sum[1] = {0.f};
    for (int64_t start = 0; start < cols; start += step) {
      load_r<X>(r, args, dropout, row, cols, start, aligned);
      sum[0] += moment<1>(r, 0.f, cols, start);
    }
    row_sum(sum);
    mean = sum[0] / cols;
  }
  float squares[1] = {0.f};
  for (int64_t start = 0; start < cols; start += step) {
    load_r<X>(r, args, dropout, row, cols, start, aligned);
    squares[0] += moment<2>(r, mean, cols, start);
  }
  row_sum(squares);
  const float rstd = rsqrtf(squares[0] / cols + args.eps);

  store_stats(args, mean, rstd, row);
  for (int64_t start = 0; start < cols; start += step) {
    load_r<X>(r, args, dropout, row, cols, start, aligned);
    store_y_and_r<X>(r, args, mean, rstd, row, cols, start, aligned);
  }
}

// The statistics of a row, and what turns r into xhat.
struct RowStats {
  float mean;
  float rstd;

  __device__ RowStats(const NormBwdArgs& args, int64_t row) {
    const bool inside = row < args.rows;
    mean = inside && args.mean != nullptr ? args.mean[row] : 0.f;
    rstd = inside ? args.rstd[row] : 0.f;
  }
  __device__ float xhat(float r) const { return (r - mean) * rstd; }
};

template <typename X, typename R, int kGroups>
__device__ __forceinline__ void load_dy_and_r(Group<X> (&dy)[kGroups], Group<R> (&r)[kGroups], const NormBwdArgs& args,
                                              int64_t row, int cols, int start, bool aligned) {
  load_groups(dy, static_cast<const X*>(args.dy) + row * args.dy_stride, cols, start, aligned);
  load_groups(r, static_cast<const R*>(args.r) + row * args.r_stride, cols, start, aligned);
}

// 1 without a weight
template <int kGroups>
__device__ __forceinline__ void load_weight(float (&weight)[kGroups][kGroup], const NormBwdArgs& args, int start,
                                            bool aligned) {
  if (args.weight != nullptr) {
    load_parameter(weight, args.weight, args.weight_dtype, static_cast<int>(args.cols), start, aligned);
    return;
  }
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      weight[g][i] = 1.f;
    }
  }
}

// dr = (wdy - mean(wdy) - xhat * mean(wdy * xhat)) * rstd + dr_out, and dx and dresidual from it
template <typename X, typename R, int kGroups>
__device__ __forceinline__ void store_dr(const Group<X> (&dy)[kGroups], const Group<R> (&r)[kGroups],
                                         const float (&weight)[kGroups][kGroup], const RowStats& stats, float mean_wdy,
                                         float mean_wdy_xhat, const NormBwdArgs& args, int64_t row, int cols, int start,
                                         bool aligned) {
  const RowDropout dropout(args.dropout, row);
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const int first = start + g * blockDim.x * kGroup;
    const int col = first + threadIdx.x * kGroup;
    float dr[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const float wdy = weight[g][i] * static_cast<float>(dy[g].value[i]);
      const float xhat = stats.xhat(static_cast<float>(r[g].value[i]));
      dr[i] = (wdy - mean_wdy - xhat * mean_wdy_xhat) * stats.rstd;
    }
    if (args.dr_out != nullptr) {
      float dr_out[1][kGroup];
      load_as_float<R>(dr_out, static_cast<const R*>(args.dr_out) + row * args.dr_out_stride, cols, first, aligned);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        dr[i] += dr_out[0][i];
      }
    }
    if (args.dresidual != nullptr) {
      store_group(dr, static_cast<R*>(args.dresidual) + row * args.cols, cols, col, aligned);
    }
    dropout.apply(dr, col);
    store_group(dr, static_cast<X*>(args.dx) + row * args.cols, cols, col, aligned);
  }
}

// The sums over the rows of the block go to row `chunk` of args.sums: dweight or dbias, by `which`.
template <int kGroups>
__device__ __forceinline__ void store_sums(const float (&sum)[kGroups][kGroup], const NormBwdArgs& args, int chunk,
                                           int which, int start) {
  extern __shared__ float buffer[];  // (blockDim.y, kGroups, kGroup, blockDim.x): no bank conflicts
  float* out = args.sums + (static_cast<int64_t>(chunk) * 2 + which) * args.cols;
  __syncthreads();
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      buffer[((threadIdx.y * kGroups + g) * kGroup + i) * blockDim.x + threadIdx.x] = sum[g][i];
    }
  }
  __syncthreads();
  const int width = min(static_cast<int64_t>(kGroups * kGroup * blockDim.x), args.cols - start);
  for (int col = threadIdx.y * blockDim.x + threadIdx.x; col < width; col += blockDim.x * blockDim.y) {
    const int thread = col / kGroup % blockDim.x;
    const int slot = col / kGroup / blockDim.x * kGroup + col % kGroup;
    float total = 0.f;
    for (int y = 0; y < blockDim.y; ++y) {
      total += buffer[(y * kGroups * kGroup + slot) * blockDim.x + thread];
    }
    out[start + col] = total;
  }
}

template <typename X, typename R, int kGroups>
__global__ void __launch_bounds__(kMaxThreads) norm_bwd_kernel(NormBwdArgs args, bool aligned) {
  float weight[kGroups][kGroup];
  load_weight(weight, args, 0, aligned);
  float dweight[kGroups][kGroup] = {};
  float dbias[kGroups][kGroup] = {};

  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y; first < args.rows;
       first += static_cast<int64_t>(gridDim.x) * blockDim.y) {  // the same number of turns for all threads
    const int64_t row = first + threadIdx.y;
    const int cols = row < args.rows ? static_cast<int>(args.cols) : 0;
    const RowStats stats(args, row);
    Group<X> dy[kGroups];
    Group<R> r[kGroups];
    load_dy_and_r(dy, r, args, row, cols, 0, aligned);

    float sums[2] = {0.f, 0.f};  // wdy, wdy * xhat
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const float value = static_cast<float>(dy[g].value[i]);
        const float xhat = stats.xhat(static_cast<float>(r[g].value[i]));
        const float wdy = weight[g][i] * value;
        sums[0] += wdy;
        sums[1] += wdy * xhat;
        dweight[g][i] += value * xhat;
        dbias[g][i] += value;
      }
    }
    row_sum(sums);
    const float mean_wdy = args.mean != nullptr ? sums[0] / args.cols : 0.f;
    store_dr(dy, r, weight, stats, mean_wdy, sums[1] / args.cols, args, row, cols, 0, aligned);
  }

  if (args.dweight != nullptr) {
    store_sums(dweight, args, blockIdx.x, 0, 0);
  }
  if (args.dbias != nullptr) {
    store_sums(dbias, args, blockIdx.x, 1, 0);
  }
}

// dx and dresidual of one row a block, read twice.
template <typename X, typename R>
__global__ void __launch_bounds__(kMaxThreads) norm_bwd_wide_kernel(NormBwdArgs args, bool aligned) {
  const int64_t row = blockIdx.x;
  const int cols = static_cast<int>(args.cols);
  const int step = blockDim.x * kGroup;
  const RowStats stats(args, row);
  Group<X> dy[1];
  Group<R> r[1];
  float weight[1][kGroup];

  float sums[2] = {0.f, 0.f};
  for (int64_t start = 0; start < cols; start += step) {
    load_dy_and_r(dy, r, args, row, cols, start, aligned);
    load_weight(weight, args, start, aligned);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const float wdy = weight[0][i] * static_cast<float>(dy[0].value[i]);
      sums[0] += wdy;
      sums[1] += wdy * stats.xhat(static_cast<float>(r[0].value[i]));
    }
  }
  row_sum(sums);
  const float mean_wdy = args.mean != nullptr ? sums[0] / cols : 0.f;
  for (int64_t start = 0; start < cols; start += step) {
    load_dy_and_r(dy, r, args, row, cols, start, aligned);
    load_weight(weight, args, start, aligned);
    store_dr(dy, r, weight, stats, mean_wdy, sums[1] / cols, args, row, cols, start, aligned);
  }
}

// dweight and dbias of wide rows: a block owns a strip of 256 columns in the rows of one chunk.
template <typename X, typename R>
__global__ void __launch_bounds__(kBwdThreads) norm_bwd_strip_kernel(NormBwdArgs args, bool aligned) {
  const int start = blockIdx.x * kStripLanes * kGroup;
  float dweight[1][kGroup] = {};
  float dbias[1][kGroup] = {};
  for (int64_t row = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; row < args.rows;
       row += static_cast<int64_t>(gridDim.y) * blockDim.y) {
    const RowStats stats(args, row);
    Group<X> dy[1];
    Group<R> r[1];
    load_dy_and_r(dy, r, args, row, static_cast<int>(args.cols), start, aligned);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const float value = static_cast<float>(dy[0].value[i]);
      dweight[0][i] += value * stats.xhat(static_cast<float>(r[0].value[i]));
      dbias[0][i] += value;
    }
  }
  store_sums(dweight, args, blockIdx.y, 0, start);
  store_sums(dbias, args, blockIdx.y, 1, start);
}

// dweight (blockIdx.y = 0) and dbias (1): the sum of the chunks' sums, 32 columns a block.
__global__ void __launch_bounds__(1024) norm_bwd_columns_kernel(NormBwdArgs args) {
  void* out = blockIdx.y == 0 ? args.dweight : args.dbias;
  const int64_t col = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  float total = 0.f;
  if (out != nullptr && col < args.cols) {
#pragma unroll 4
    for (int64_t chunk = threadIdx.y; chunk < args.chunks; chunk += 32) {
      total += args.sums[(chunk * 2 + blockIdx.y) * args.cols + col];
    }
  }
  __shared__ float partial[32][33];
  partial[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  total = partial[threadIdx.x][threadIdx.y];  // now a warp holds the 32 parts of one column
  for (int offset = 16; offset > 0; offset /= 2) {
    total += __shfl_xor_sync(0xffffffffu, total, offset);
  }
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.y;
  if (threadIdx.x == 0 && out != nullptr && column < args.cols) {
    if (args.weight_dtype == DType::kFloat32) {
      static_cast<float*>(out)[column] = total;
    } else if (args.weight_dtype == DType::kBFloat16) {
      static_cast<__nv_bfloat16*>(out)[column] = static_cast<__nv_bfloat16>(total);
    } else {
      static_cast<__half*>(out)[column] = static_cast<__half>(total);
    }
  }
}

template <typename X, typename R>
int launch_fwd(const NormFwdArgs& args, cudaStream_t stream) {
  const bool aligned = is_aligned({args.x, args.residual, args.weight, args.bias, args.y, args.r},
                                  {args.cols, args.x_stride, args.residual_stride});
  if constexpr (kCommon<X, R>) {
    if (args.cols <= kFwdCols) {
      const int groups = args.cols <= 32 * kGroup ? 1 : args.cols <= 64 * kGroup ? 2 : 4;
      const dim3 block = row_block(args.cols, groups, kFwdThreads);
      const auto grid = static_cast<unsigned>((args.rows + block.y - 1) / block.y);
      const auto kernel = groups == 1   ? norm_fwd_kernel<X, R, 1>
                          : groups == 2 ? norm_fwd_kernel<X, R, 2>
                                        : norm_fwd_kernel<X, R, 4>;
      kernel<<<grid, block, 0, stream>>>(args, aligned);
      return cudaGetLastError();
    }
  }
  const dim3 block(row_block(args.cols, 1, 1).x);
  norm_fwd_wide_kernel<X, R><<<static_cast<unsigned>(args.rows), block, 0, stream>>>(args, aligned);
  return cudaGetLastError();
}

bool bwd_is_held(const NormBwdArgs& args) {
  const bool common = args.x_dtype == args.r_dtype || args.r_dtype == DType::kFloat32;
  return common && args.cols <= kBwdCols;
}

int bwd_groups(int64_t cols) { return cols <= kBwdCols / 2 ? 1 : 2; }

template <typename X, typename R>
int launch_bwd(const NormBwdArgs& args, cudaStream_t stream) {
  const bool aligned = is_aligned({args.dy, args.dr_out, args.r, args.weight, args.dx, args.dresidual},
                                  {args.cols, args.dy_stride, args.dr_out_stride, args.r_stride});
  const auto chunks = static_cast<unsigned>(args.chunks);
  if constexpr (kCommon<X, R>) {
    if (bwd_is_held(args)) {
      const int groups = bwd_groups(args.cols);
      const dim3 block = row_block(args.cols, groups, kBwdThreads);
      const size_t shared = sizeof(float) * kGroup * groups * block.x * block.y;
      const auto kernel = groups == 1 ? norm_bwd_kernel<X, R, 1> : norm_bwd_kernel<X, R, 2>;
      kernel<<<chunks, block, shared, stream>>>(args, aligned);
      return cudaGetLastError();
    }
  }
  const dim3 block(row_block(args.cols, 1, 1).x);
  norm_bwd_wide_kernel<X, R><<<static_cast<unsigned>(args.rows), block, 0, stream>>>(args, aligned);
  if (args.sums != nullptr) {
    const dim3 strip(kStripLanes, kBwdThreads / kStripLanes);
    const auto strips = static_cast<unsigned>((args.cols + kStripLanes * kGroup - 1) / (kStripLanes * kGroup));
    const size_t shared = sizeof(float) * kGroup * kBwdThreads;
    norm_bwd_strip_kernel<X, R><<<dim3(strips, chunks), strip, shared, stream>>>(args, aligned);
  }
  return cudaGetLastError();
}

}  // namespace

int norm_fwd_cuda(const NormFwdArgs& args, void* stream) {
  return with_type(args.x_dtype, [&](auto x) {
    return with_type(args.r_dtype, [&](auto r) {
      return launch_fwd<decltype(x), decltype(r)>(args, static_cast<cudaStream_t>(stream));
    });
  });
}

int64_t norm_bwd_chunks_cuda(const NormBwdArgs& args) {
  int device = 0;
  int multiprocessors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (bwd_is_held(args)) {
    const int groups = bwd_groups(args.cols);
    const dim3 block = row_block(args.cols, groups, kBwdThreads);
    const int resident = std::max(1u, 512 / (block.x * block.y));
    return std::min<int64_t>((args.rows + block.y - 1) / block.y, static_cast<int64_t>(multiprocessors) * resident);
  }
  const int64_t strips = (args.cols + kStripLanes * kGroup - 1) / (kStripLanes * kGroup);
  const int64_t rows = kBwdThreads / kStripLanes;
  return std::clamp<int64_t>(4 * multiprocessors / strips, 1, (args.rows + rows - 1) / rows);
}

int norm_bwd_cuda(const NormBwdArgs& args, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const int error = with_type(args.x_dtype, [&](auto x) {
    return with_type(args.r_dtype,
                     [&](auto r) { return launch_bwd<decltype(x), decltype(r)>(args, cuda_stream); });
  });
  if (error == cudaSuccess && args.sums != nullptr) {
    const dim3 grid(static_cast<unsigned>((args.cols + 31) / 32), 2);
    norm_bwd_columns_kernel<<<grid, dim3(32, 32), 0, cuda_stream>>>(args);
    return cudaGetLastError();
  }
  return error;
}

const char* cuda_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace fastattn
