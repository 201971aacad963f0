// Attention on a cache, for Hopper: the pass that combines the splits in a fixed order, and the pass that appends new
// keys.
//
//   m = max m_n,  l = sum_n exp2(m_n - m) l_n,  out = sum_n exp2(m_n - m) o_n / l,  lse = (m + log2 l) / log2(e)
//
// o_n, m_n and l_n are what attention_decode_sm90.cu computes for split n of the keys. Both passes move every byte
// once.
#include "cuda/sm90/attention_common.cuh"
#include "cuda/sm90/attention_host.h"

namespace fastattn {
namespace {

using namespace sm90;

constexpr int kCombineWarps = 8;

struct CombineArgs {
  const float *partial, *partial_max, *partial_sum;
  HeadTensor out;
  float* lse;
  int splits, n_heads, seqlen_q, head_dim;
};

// A block of threads has one row. A warp has every eighth split; a lane has four neighbouring columns of every 128.
template <typename T>
__global__ void __launch_bounds__(kCombineWarps * 32) attention_combine_sm90_kernel(CombineArgs args) {
  constexpr int kWidest = 256;
  __shared__ float sums[kCombineWarps][kWidest];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t row = blockIdx.x, rows = gridDim.x;
  float largest = -INFINITY, total = 0.f;
  for (int split = lane; split < args.splits; split += 32) {
    largest = fmaxf(largest, args.partial_max[split * rows + row]);
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
  }
  const float shift = largest == -INFINITY ? 0.f : largest;
  for (int split = lane; split < args.splits; split += 32) {
    total += exp2_fast(args.partial_max[split * rows + row] - shift) * args.partial_sum[split * rows + row];
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    total += __shfl_xor_sync(0xffffffffu, total, offset);
  }
  for (int col = lane * 4; col < args.head_dim; col += 128) {
    float sum[4] = {};
#pragma unroll 8
    for (int split = warp; split < args.splits; split += kCombineWarps) {
      const float weight = exp2_fast(args.partial_max[split * rows + row] - shift);
      const float4 part = *reinterpret_cast<const float4*>(args.partial + (split * rows + row) * args.head_dim + col);
      sum[0] += weight * part.x;
      sum[1] += weight * part.y;
      sum[2] += weight * part.z;
      sum[3] += weight * part.w;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums[warp][col + i] = sum[i];
    }
  }
  __syncthreads();
  const int head = row / args.seqlen_q % args.n_heads;
  T* out = static_cast<T*>(args.out.data) + row / args.seqlen_q / args.n_heads * args.out.batch + head * args.out.head +
           row % args.seqlen_q * args.out.row;
  for (int col = threadIdx.x; col < args.head_dim; col += kCombineWarps * 32) {
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < kCombineWarps; ++w) {
      sum += sums[w][col];
    }
    out[col] = static_cast<T>(total == 0.f ? 0.f : sum / total);
  }
  if (threadIdx.x == 0) {
    args.lse[row] = total == 0.f ? -INFINITY : shift * kLn2 + logf(total);
  }
}

struct AppendArgs {
  HeadTensor k, v, k_new, v_new;
  const int32_t *lengths, *pages;
  int64_t pages_stride, page_size, capacity, batch, n_kv_heads, seqlen_new, chunks;
};

constexpr int kAppendThreads = 256;

// A thread copies 16 bytes of a key and of a value. Keys that do not fit into the cache are dropped.
__global__ void __launch_bounds__(kAppendThreads) attention_append_sm90_kernel(AppendArgs args) {
  const int64_t index = int64_t{blockIdx.x} * kAppendThreads + threadIdx.x;
  const int64_t chunk = index % args.chunks, number = index / args.chunks;  // the index of batch, token and head
  const int64_t head = number % args.n_kv_heads, token = number / args.n_kv_heads % args.seqlen_new;
  const int64_t batch = number / args.n_kv_heads / args.seqlen_new;
  if (batch >= args.batch) {
    return;
  }
  const int64_t position = args.lengths[batch] + token;
  if (position < 0 || position >= args.capacity) {
    return;
  }
  const int64_t page =
      args.pages == nullptr ? batch : args.pages[batch * args.pages_stride + position / args.page_size];
  const auto copy = [&](const HeadTensor& cache, const HeadTensor& from) {
    const auto chunk_of = [&](const HeadTensor& t, int64_t outer, int64_t row) {
      return reinterpret_cast<uint4*>(static_cast<uint16_t*>(t.data) + outer * t.batch + head * t.head + row * t.row) +
             chunk;
    };
    *chunk_of(cache, page, position % args.page_size) = *chunk_of(from, batch, token);
  };
  copy(args.k, args.k_new);
  copy(args.v, args.v_new);
}

template <typename T>
cudaError_t launch_combine(const DecodeCudaArgs& in, cudaStream_t stream) {
  const CombineArgs args{in.partial,
                         in.partial_max,
                         in.partial_sum,
                         in.out,
                         in.lse,
                         static_cast<int>(in.splits),
                         static_cast<int>(in.n_heads),
                         static_cast<int>(in.seqlen_q),
                         static_cast<int>(in.head_dim)};
  const auto rows = static_cast<unsigned>(in.batch * in.n_heads * in.seqlen_q);
  attention_combine_sm90_kernel<T><<<rows, kCombineWarps * 32, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace

int attention_decode_combine_sm90(const DecodeCudaArgs& args, void* stream_of_caller) {
  const auto stream = static_cast<cudaStream_t>(stream_of_caller);
  return args.dtype == DType::kBFloat16 ? launch_combine<__nv_bfloat16>(args, stream)
                                        : launch_combine<__half>(args, stream);
}

int attention_decode_append_sm90(const DecodeCudaArgs& in, void* stream_of_caller) {
  const auto stream = static_cast<cudaStream_t>(stream_of_caller);
  const AppendArgs args{in.k,
                        in.v,
                        in.k_new,
                        in.v_new,
                        in.cache_seqlens,
                        pages_of(in),
                        in.pages,
                        in.page_size,
                        in.page_size * in.pages,
                        in.batch,
                        in.n_kv_heads,
                        in.seqlen_new,
                        in.head_dim / 8};
  const int64_t threads = args.batch * args.n_kv_heads * args.seqlen_new * args.chunks;
  const auto blocks = static_cast<unsigned>((threads + kAppendThreads - 1) / kAppendThreads);
  attention_append_sm90_kernel<<<blocks, kAppendThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace fastattn
