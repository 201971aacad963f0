// Dropout with the residual add: out = keep * dropout_scale * x + residual, in the dtype of the residual, or of x.
//
// The threads of a row loop over its groups of eight columns, and the blocks loop over the rows. Nothing is saved,
// because the backward is the same kernel without a residual. Limits: fewer than 2^31 columns.
// Reference: fastattn.reference.dropout
#include "common.cuh"

namespace fastattn {
namespace {

constexpr int kThreads = 256;

template <typename X, typename R>
__global__ void __launch_bounds__(kThreads) dropout_kernel(DropoutArgs args, bool aligned) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int cols = row < args.rows ? static_cast<int>(args.cols) : 0;
  const DropoutMask dropout(args.dropout);
  for (int64_t start = 0; start < cols; start += blockDim.x * kGroup) {
    float out[1][kGroup];
    float residual[1][kGroup];
    load_groups<X>(out, args.x, args.x_dtype, row * args.x_stride, cols, start, aligned);
    load_groups<R>(residual, args.residual, args.out_dtype, row * args.residual_stride,
                   args.residual != nullptr ? cols : 0, start, aligned);
    dropout.apply(out[0], row, first_col(start, 0));
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      out[0][i] += residual[0][i];
    }
    store_groups<R>(out, args.out, args.out_dtype, row * args.cols, cols, start, aligned);
  }
}

}  // namespace

int dropout_fwd_cuda(const DropoutArgs& args, void* stream) {
  const bool aligned = is_aligned({args.x, args.residual, args.out}, {args.cols, args.x_stride, args.residual_stride});
  const dim3 block = row_block(args.cols, 1, kThreads, kThreads);
  const unsigned grid = blocks(args.rows, block.y);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (is_common(args.x_dtype, args.out_dtype)) {
    with_common_types(args.x_dtype, args.out_dtype, [&](auto x, auto out) {
      dropout_kernel<decltype(x), decltype(out)><<<grid, block, 0, cuda_stream>>>(args, aligned);
    });
  } else {
    dropout_kernel<Dynamic, Dynamic><<<grid, block, 0, cuda_stream>>>(args, aligned);
  }
  return cudaGetLastError();
}

}  // namespace fastattn
