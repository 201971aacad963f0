// The backward of norm.cu.
//
//   wdy = weight * dy,  xhat = (r - mean) * rstd              rms: mean = 0
//   dr = (wdy - mean(wdy) - xhat * mean(wdy * xhat)) * rstd + dr_out          rms: without mean(wdy)
//   dresidual = dr,  dx = keep * dropout_scale * dr,  dweight = sum_rows(dy * xhat),  dbias = sum_rows(dy)
//   dx_bias = sum_rows(dx)
//
// Resident blocks loop over the rows. Each thread sums dweight, dbias and dx_bias of its columns. Each block writes
// rows of fp32 sums, and a second kernel adds these in a fixed order, without atomics. Rows that are too wide for
// registers are read again from the cache; the second kernel then reads all rows of a strip of columns. Dynamic is for
// rows that are not aligned to 16 bytes or have a rare pair of dtypes. Limits: fewer than 2^31 columns.
// Reference: fastattn.reference.norm
#include "common.cuh"

namespace fastattn {
namespace {

constexpr int kBwdThreads = 256;
constexpr int kBwdWideThreads = 128;
constexpr int kBwdCols = kMaxThreads * kGroup * 2;  // the widest rows that are held in registers
// A thread of a strip has two rows in flight. By Little's law, 4.8 TB/s and 0.8 us need 29 KB per multiprocessor; dy
// and r in half precision are 32 KB per block.
constexpr int kStripLanes = 8;
constexpr int kStripThreads = 512;
constexpr int kStripRows = 2;

// Only aligned rows have typed kernels.
template <typename T>
constexpr bool kAligned = !std::is_same_v<T, Dynamic>;

// The statistics of a row, which turn r into xhat.
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
__device__ __forceinline__ void load_dy_and_r(float (&dy)[kGroups][kGroup], float (&r)[kGroups][kGroup],
                                              const NormBwdArgs& args, int64_t row, int cols, int start) {
  load_groups<X>(dy, args.dy, args.x_dtype, row * args.dy_stride, cols, start, kAligned<X>);
  load_groups<R>(r, args.r, args.r_dtype, row * args.r_stride, cols, start, kAligned<X>);
}

// Returns 0 if there is no dr_out. Masked loads avoid a branch.
template <typename R, int kGroups>
__device__ __forceinline__ void load_dr_out(float (&dr_out)[kGroups][kGroup], const NormBwdArgs& args, int64_t row,
                                            int cols, int start) {
  load_groups<R>(dr_out, args.dr_out, args.r_dtype, row * args.dr_out_stride, args.dr_out != nullptr ? cols : 0, start,
                 kAligned<R>);
}

// Returns 1 if there is no weight.
template <typename X, int kGroups>
__device__ __forceinline__ void load_weight(float (&weight)[kGroups][kGroup], const NormBwdArgs& args, int start) {
  if (args.weight != nullptr) {
    load_groups<Dynamic>(weight, args.weight, args.weight_dtype, 0, static_cast<int>(args.cols), start, kAligned<X>);
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

// dr = (wdy - mean(wdy) - xhat * mean(wdy * xhat)) * rstd + dr_out. Writes dresidual, and computes dx in place of dy.
template <typename X, typename R, int kGroups>
__device__ __forceinline__ void store_dr(float (&dy)[kGroups][kGroup], const float (&r)[kGroups][kGroup],
                                         const float (&dr_out)[kGroups][kGroup], const float (&weight)[kGroups][kGroup],
                                         const RowStats& stats, float mean_wdy, float mean_wdy_xhat,
                                         const NormBwdArgs& args, const DropoutMask& dropout, int64_t row, int cols,
                                         int start) {
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const float centered = weight[g][i] * dy[g][i] - mean_wdy - stats.xhat(r[g][i]) * mean_wdy_xhat;
      dy[g][i] = centered * stats.rstd + dr_out[g][i];
    }
  }
  if (args.dresidual != nullptr) {
    store_groups<R>(dy, args.dresidual, args.r_dtype, row * args.cols, cols, start, kAligned<X>);
  }
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    dropout.apply(dy[g], row, first_col(start, g));
  }
  store_groups<X>(dy, args.dx, args.x_dtype, row * args.cols, cols, start, kAligned<X>);
}

// The number of blocks on a multiprocessor depends on the registers per thread: 80 for 768 threads, 128 for 512.
template <int kGroups>
constexpr int kBwdBlock = kGroups == 1 ? kBwdThreads : kMaxThreads;
template <int kGroups>
constexpr int kBwdResidentThreads = kGroups == 1 ? 768 : 512;

// Calls action for a slot in shared memory for each value that a thread holds: (kGroups, kGroup, thread), without bank
// conflicts. dweight and dbias are stored here at the end. dx_bias is summed here, because registers are scarce.
template <int kGroups, typename Action>
__device__ __forceinline__ void for_places(Action action) {
  extern __shared__ float buffer[];
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      action(buffer[(g * kGroup + i) * kBwdBlock<kGroups> + threadIdx.y * blockDim.x + threadIdx.x], g, i);
    }
  }
}

// Adds the sums in shared memory over the rows of the block, and stores them in the block's row of args.sums. `which`
// selects dweight, dbias or dx_bias.
template <int kGroups>
__device__ __forceinline__ void add_places(const NormBwdArgs& args, int which) {
  extern __shared__ float buffer[];
  float* out = args.sums + (static_cast<int64_t>(blockIdx.x) * kNormSums + which) * args.cols;
  __syncthreads();
  for (int col = threadIdx.y * blockDim.x + threadIdx.x; col < args.cols; col += blockDim.x * blockDim.y) {
    const int thread = col / kGroup % blockDim.x;
    const int slot = col / kGroup / blockDim.x * kGroup + col % kGroup;
    float total = 0.f;
    for (int y = 0; y < blockDim.y; ++y) {
      total += buffer[slot * kBwdBlock<kGroups> + y * blockDim.x + thread];
    }
    out[col] = total;
  }
  __syncthreads();
}

template <int kGroups>
__device__ __forceinline__ void store_sums(const float (&sum)[kGroups][kGroup], const NormBwdArgs& args, int which) {
  for_places<kGroups>([&](float& place, int g, int i) { place = sum[g][i]; });
  add_places<kGroups>(args, which);
}

template <typename X, typename R, int kGroups>
__global__ void __launch_bounds__(kBwdBlock<kGroups>, kBwdResidentThreads<kGroups> / kBwdBlock<kGroups>)
    norm_bwd_kernel(NormBwdArgs args) {
  const DropoutMask dropout(args.dropout);
  float weight[kGroups][kGroup];
  load_weight<X>(weight, args, 0);
  float dweight[kGroups][kGroup] = {};
  float dbias[kGroups][kGroup] = {};
  if (args.dx_bias != nullptr) {
    for_places<kGroups>([](float& place, int, int) { place = 0.f; });
  }

  for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y; first < args.rows;
       first += static_cast<int64_t>(gridDim.x) * blockDim.y) {  // the same number of iterations for all threads
    const int64_t row = first + threadIdx.y;
    const int cols = row < args.rows ? static_cast<int>(args.cols) : 0;
    const RowStats stats(args, row);
    float dy[kGroups][kGroup];
    float r[kGroups][kGroup];
    float dr_out[kGroups][kGroup];
    load_dy_and_r<X, R>(dy, r, args, row, cols, 0);
    if constexpr (kAligned<X>) {
      load_dr_out<R>(dr_out, args, row, cols, 0);  // early, so that all loads of a row are in flight together
    }

    float sums[2] = {0.f, 0.f};  // the sums of wdy and wdy * xhat
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const float xhat = stats.xhat(r[g][i]);
        const float wdy = weight[g][i] * dy[g][i];
        sums[0] += wdy;
        sums[1] += wdy * xhat;
        dweight[g][i] += dy[g][i] * xhat;
        dbias[g][i] += dy[g][i];
      }
    }
    row_sum(sums);
    if constexpr (!kAligned<X>) {
      load_dr_out<R>(dr_out, args, row, cols, 0);  // not earlier, because an earlier load would spill
    }
    const float mean_wdy = args.mean != nullptr ? sums[0] / args.cols : 0.f;
    store_dr<X, R>(dy, r, dr_out, weight, stats, mean_wdy, sums[1] / args.cols, args, dropout, row, cols, 0);
    if (args.dx_bias != nullptr) {
      for_places<kGroups>([&](float& place, int g, int i) { place += dy[g][i]; });
    }
  }

  if (args.dx_bias != nullptr) {
    add_places<kGroups>(args, 2);
  }
  if (args.dweight != nullptr) {
    store_sums(dweight, args, 0);
  }
  if (args.dbias != nullptr) {
    store_sums(dbias, args, 1);
  }
}

// dx and dresidual of rows of any width, which are read twice.
template <typename X, typename R>
__global__ void __launch_bounds__(kMaxThreads, 1) norm_bwd_wide_kernel(NormBwdArgs args) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int cols = row < args.rows ? static_cast<int>(args.cols) : 0;
  const int step = blockDim.x * kGroup;
  const RowStats stats(args, row);
  const DropoutMask dropout(args.dropout);
  float dy[1][kGroup];
  float r[1][kGroup];
  float weight[1][kGroup];
  float dr_out[1][kGroup];

  float sums[2] = {0.f, 0.f};
  for (int64_t start = 0; start < cols; start += step) {
    load_dy_and_r<X, R>(dy, r, args, row, cols, start);
    load_weight<X>(weight, args, start);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const float wdy = weight[0][i] * dy[0][i];
      sums[0] += wdy;
      sums[1] += wdy * stats.xhat(r[0][i]);
    }
  }
  row_sum(sums);
  const float mean_wdy = args.mean != nullptr ? sums[0] / args.cols : 0.f;
  for (int64_t start = 0; start < cols; start += step) {
    load_dy_and_r<X, R>(dy, r, args, row, cols, start);
    load_weight<X>(weight, args, start);
    load_dr_out<R>(dr_out, args, row, cols, start);
    store_dr<X, R>(dy, r, dr_out, weight, stats, mean_wdy, sums[1] / args.cols, args, dropout, row, cols, start);
  }
}

// Adds `sum` over the rows of threads and writes the columns of the strip.
__device__ __forceinline__ void store_strip(void* out, float (&sum)[1][kGroup], const NormBwdArgs& args, int start) {
  if (out == nullptr) {
    return;
  }
  constexpr int kWarpRows = 32 / kStripLanes;
  __shared__ float partial[kStripThreads / 32][kStripLanes][kGroup];
  __syncthreads();  // the previous call may still be reading
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    for (int offset = kStripLanes; offset < 32; offset *= 2) {
      sum[0][i] += __shfl_xor_sync(0xffffffffu, sum[0][i], offset);
    }
    if (threadIdx.y % kWarpRows == 0) {
      partial[threadIdx.y / kWarpRows][threadIdx.x][i] = sum[0][i];
    }
  }
  __syncthreads();
  if (threadIdx.y == 0) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      sum[0][i] = 0.f;
      for (int warp = 0; warp < kStripThreads / 32; ++warp) {
        sum[0][i] += partial[warp][threadIdx.x][i];
      }
    }
    store_groups<Dynamic>(sum, out, args.weight_dtype, 0, static_cast<int>(args.cols), start, false);
  }
}

// dweight, dbias and dx_bias, after the kernel above. A block owns all rows of a strip of 64 columns.
template <typename X, typename R>
__global__ void __launch_bounds__(kStripThreads, kMaxThreads * 2 / kStripThreads)
    norm_bwd_strip_kernel(NormBwdArgs args) {
  const int start = blockIdx.x * kStripLanes * kGroup;
  const auto cols_of = [&](int64_t row) { return row < args.rows ? static_cast<int>(args.cols) : 0; };
  float dweight[1][kGroup] = {};
  float dbias[1][kGroup] = {};
  float dy[kStripRows][1][kGroup];
  float r[kStripRows][1][kGroup];
  for (int64_t first = threadIdx.y; first < args.rows; first += kStripRows * blockDim.y) {
#pragma unroll
    for (int k = 0; k < kStripRows; ++k) {
      const int64_t row = first + k * blockDim.y;
      load_dy_and_r<X, R>(dy[k], r[k], args, row, cols_of(row), start);
    }
#pragma unroll
    for (int k = 0; k < kStripRows; ++k) {
      const RowStats stats(args, first + k * blockDim.y);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        dweight[0][i] += dy[k][0][i] * stats.xhat(r[k][0][i]);
        dbias[0][i] += dy[k][0][i];
      }
    }
  }
  store_strip(args.dweight, dweight, args, start);
  store_strip(args.dbias, dbias, args, start);
  if (args.dx_bias == nullptr) {
    return;
  }
  float dx_bias[1][kGroup] = {};
  for (int64_t row = threadIdx.y; row < args.rows; row += blockDim.y) {
    load_groups<X>(dy[0], args.dx, args.x_dtype, row * args.cols, cols_of(row), start, kAligned<X>);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      dx_bias[0][i] += dy[0][0][i];
    }
  }
  store_strip(args.dx_bias, dx_bias, args, start);
}

// Adds the sums of the chunks for dweight (blockIdx.y = 0), dbias (1) and dx_bias (2). A block has 32 columns.
__global__ void __launch_bounds__(1024) norm_bwd_columns_kernel(NormBwdArgs args) {
  void* out = blockIdx.y == 0 ? args.dweight : blockIdx.y == 1 ? args.dbias : args.dx_bias;
  const int64_t col = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  float total = 0.f;
  if (out != nullptr && col < args.cols) {
#pragma unroll 4
    for (int64_t chunk = threadIdx.y; chunk < args.chunks; chunk += 32) {
      total += args.sums[(chunk * kNormSums + blockIdx.y) * args.cols + col];
    }
  }
  __shared__ float partial[32][33];
  partial[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  total = partial[threadIdx.x][threadIdx.y];  // now a warp has the 32 partial sums of one column
  for (int offset = 16; offset > 0; offset /= 2) {
    total += __shfl_xor_sync(0xffffffffu, total, offset);
  }
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.y;
  if (threadIdx.x == 0 && out != nullptr && column < args.cols) {
    store_value(out, args.weight_dtype, column, total);
  }
}

// Returns the number of column groups per thread, or 0 if the row is too wide for registers.
int bwd_groups(const NormBwdArgs& args) {
  return args.cols <= kBwdThreads * kGroup ? 1 : args.cols <= kBwdCols ? 2 : 0;
}

// Launches two kernels, or one if no sum over the rows is wanted.
template <typename X, typename R>
void launch_bwd(const NormBwdArgs& args, cudaStream_t stream) {
  const bool sums = args.dweight != nullptr || args.dbias != nullptr || args.dx_bias != nullptr;
  const auto held = [&](auto kernel, int groups, int threads) {
    const size_t shared = sizeof(float) * kGroup * groups * threads;
    kernel<<<static_cast<unsigned>(args.chunks), row_block(args.cols, groups, kBwdThreads), shared, stream>>>(args);
    if (sums) {
      const dim3 grid(blocks(args.cols, 32), args.dx_bias != nullptr ? 3 : 2);
      norm_bwd_columns_kernel<<<grid, dim3(32, 32), 0, stream>>>(args);
    }
  };
  const int groups = bwd_groups(args);
  if (groups == 1) {
    return held(norm_bwd_kernel<X, R, 1>, 1, kBwdBlock<1>);
  }
  if constexpr (kAligned<X>) {  // with Dynamic, two groups would spill
    if (groups == 2) {
      return held(norm_bwd_kernel<X, R, 2>, 2, kBwdBlock<2>);
    }
  }
  const dim3 block = row_block(args.cols, 1, kBwdWideThreads);
  norm_bwd_wide_kernel<X, R><<<blocks(args.rows, block.y), block, 0, stream>>>(args);
  if (sums) {
    const dim3 strip(kStripLanes, kStripThreads / kStripLanes);
    norm_bwd_strip_kernel<X, R><<<blocks(args.cols, kStripLanes * kGroup), strip, 0, stream>>>(args);
  }
}

}  // namespace

int64_t norm_bwd_chunks_cuda(const NormBwdArgs& args) {
  const int groups = bwd_groups(args);
  if (groups == 0) {
    return 0;
  }
  int device = 0;
  int multiprocessors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  const dim3 block = row_block(args.cols, groups, kBwdThreads);
  const int threads = groups == 1 ? kBwdResidentThreads<1> : kBwdResidentThreads<2>;
  const int resident = std::max(1u, threads / (block.x * block.y));
  return std::min<int64_t>(blocks(args.rows, block.y), static_cast<int64_t>(multiprocessors) * resident);
}

int norm_bwd_cuda(const NormBwdArgs& args, void* stream) {
  const auto launch = [&](auto x, auto r) {
    launch_bwd<decltype(x), decltype(r)>(args, static_cast<cudaStream_t>(stream));
  };
  if (is_common(args.x_dtype, args.r_dtype) &&
      is_aligned({args.dy, args.dr_out, args.r, args.weight, args.dx, args.dresidual},
                 {args.cols, args.dy_stride, args.dr_out_stride, args.r_stride})) {
    with_common_types(args.x_dtype, args.r_dtype, launch);
  } else {
    launch(Dynamic(), Dynamic());
  }
  return cudaGetLastError();
}

}  // namespace fastattn
