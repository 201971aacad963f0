// Attention for Hopper: the passes before and after the matrix products of the backward.
//
//   delta = rowsum(do ∘ out) - dlse,  lse2 = lse log2(e),  sums of dq = 0
//   dq = scale (sums of dq), rounded
//
// Both passes move every byte once, 16 bytes at a time.
#include "cuda/sm90/attention_bwd.cuh"

namespace fastattn {
namespace {

using namespace sm90;

constexpr int kThreads = 256;
constexpr int kStatsBlock = kThreads / 8;  // the rows of a block; each row has eight threads
static_assert(kStatsRows % kStatsBlock == 0);

struct StatsArgs {
  AttentionShape shape;
  HeadTensor out, dout;
  const float *lse, *dlse;
  int64_t lse_batch, lse_head;
  float *lse2, *delta, *dq_sums;
  int64_t stats_batch, stats_head;
  uint32_t* tile_counters;
  unsigned blocks;  // the number of blocks per head
};

// Also resets the counters of the next kernels to 0. A row that sees nothing, or is padding of the workspace, gets lse2
// = inf and delta = 0, so p = ds = 0.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads) attention_stats_sm90_kernel(StatsArgs args) {
  if (blockIdx.x == 0 && threadIdx.x < 2) {
    args.tile_counters[threadIdx.x] = 0;
  }
  // This is not gridDim.y, which is limited to 65535.
  const unsigned of_all = blockIdx.x / args.blocks;
  const int head = of_all % args.shape.n_heads, batch = of_all / args.shape.n_heads;
  const int block = blockIdx.x % args.blocks;
  constexpr int kParts = kStatsRows / kStatsBlock;
  const RowTile tile = RowTile::find(args.shape, batch, block / kParts);
  const Sequence& sequence = tile.sequence;
  const int first = tile.row + block % kParts * kStatsBlock, row = first + threadIdx.x / 8;
  const bool exists = row < sequence.q_len;
  float delta = 0.f;
  float lse = -INFINITY;
  if (exists) {
    const auto row_of_tensor = [&](const HeadTensor& t) {
      return static_cast<const T*>(t.data) + sequence.index * t.batch + head * t.head +
             (sequence.q_begin + row) * t.row;
    };
#pragma unroll
    for (int col = threadIdx.x % 8 * 8; col < kHeadDim; col += 64) {
      T out[8], dout[8];
      *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(row_of_tensor(args.out) + col);
      *reinterpret_cast<uint4*>(dout) = *reinterpret_cast<const uint4*>(row_of_tensor(args.dout) + col);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        delta += static_cast<float>(out[i]) * static_cast<float>(dout[i]);
      }
    }
    const int64_t at = batch * args.lse_batch + head * args.lse_head + sequence.q_begin + row;
    lse = args.lse[at];
    if (threadIdx.x % 8 == 0 && args.dlse != nullptr) {
      delta -= args.dlse[at];
    }
  }
#pragma unroll
  for (int lane = 4; lane > 0; lane /= 2) {
    delta += __shfl_xor_sync(0xffffffffu, delta, lane);
  }
  if (first >= blocks_of(sequence.q_len, kStatsRows) * kStatsRows) {
    return;
  }
  const int64_t begin = batch * args.stats_batch + head * args.stats_head + sequence.stats_begin + first;
  if (threadIdx.x % 8 == 0) {
    args.lse2[begin + threadIdx.x / 8] = lse == -INFINITY ? INFINITY : lse * kLog2e;
    args.delta[begin + threadIdx.x / 8] = lse == -INFINITY ? 0.f : delta;
  }
  if (args.dq_sums != nullptr) {
#pragma unroll
    for (int i = threadIdx.x; i < kStatsBlock * kHeadDim / 4; i += kThreads) {
      reinterpret_cast<float4*>(args.dq_sums + begin * kHeadDim)[i] = float4{0.f, 0.f, 0.f, 0.f};
    }
  }
}

struct RoundArgs {
  AttentionShape shape;
  HeadTensor dq;
  const float* dq_sums;
  int64_t stats_batch, stats_head;
  float scale;
  unsigned blocks;  // the number of blocks per head
};

// A block of threads has 64 rows. The sums have the layout of a warpgroup's accumulators, with four per thread at a
// time. So the sums of four neighbouring threads are eight columns of two rows.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads) attention_round_sm90_kernel(RoundArgs args) {
  const unsigned of_all = blockIdx.x / args.blocks;
  const int head = of_all % args.shape.n_heads, batch = of_all / args.shape.n_heads;
  const int block = blockIdx.x % args.blocks;
  constexpr int kParts = kStatsRows / kSlab;
  const RowTile tile = RowTile::find(args.shape, batch, block / kParts);
  const Sequence& sequence = tile.sequence;
  const int first = tile.row + block % kParts * kSlab;
  const int thread = threadIdx.x / 8 * 4;
  const float* sums =
      args.dq_sums + (batch * args.stats_batch + head * args.stats_head + sequence.stats_begin + first) * kHeadDim;
  T* dq = static_cast<T*>(args.dq.data) + sequence.index * args.dq.batch + head * args.dq.head +
          (sequence.q_begin + first) * args.dq.row;
  if (first >= sequence.q_len) {
    return;
  }
#pragma unroll
  for (int col = threadIdx.x % 8 * 8; col < kHeadDim; col += 64) {
    const int i = col / 8 * 4;  // the index of the accumulators
    uint32_t words[2][4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float4 sum = *reinterpret_cast<const float4*>(sums + i * kWarpgroup + (thread + j) * 4);
      words[0][j] = pack<T>(sum.x * args.scale, sum.y * args.scale);
      words[1][j] = pack<T>(sum.z * args.scale, sum.w * args.scale);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = accumulator_row(thread, 2 * r);
      if (first + row < sequence.q_len) {
        *reinterpret_cast<uint4*>(dq + row * args.dq.row + col) =
            uint4{words[r][0], words[r][1], words[r][2], words[r][3]};
      }
    }
  }
}

int row_tiles(const AttentionShape& shape) {
  return count_tiles(shape.packed(), shape.seqlen_q, shape.batch, kStatsRows);
}

template <typename T, int kHeadDim>
cudaError_t launch_stats(const AttentionCudaArgs& in, cudaStream_t stream) {
  StatsArgs args{attention_shape(in), in.out,        in.dout,         in.lse,   in.dlse,
                 in.lse_batch,        in.lse_head,   in.lse2,         in.delta, in.dq_sums,
                 in.stats_batch,      in.stats_head, in.tile_counters};
  args.blocks = row_tiles(args.shape) * (kStatsRows / kStatsBlock);
  const auto grid = static_cast<unsigned>(args.shape.batched() * in.n_heads * args.blocks);
  attention_stats_sm90_kernel<T, kHeadDim><<<grid, kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

template <typename T, int kHeadDim>
cudaError_t launch_round(const AttentionCudaArgs& in, cudaStream_t stream) {
  RoundArgs args{attention_shape(in), in.dq, in.dq_sums, in.stats_batch, in.stats_head, in.scale};
  args.blocks = row_tiles(args.shape) * (kStatsRows / kSlab);
  const auto grid = static_cast<unsigned>(args.shape.batched() * in.n_heads * args.blocks);
  attention_round_sm90_kernel<T, kHeadDim><<<grid, kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace

int64_t attention_stats_rows_sm90(const AttentionCudaArgs& args) {
  return int64_t{kStatsRows} * row_tiles(attention_shape(args));
}

int attention_stats_sm90(const AttentionCudaArgs& args, void* stream) {
  return with_half_and_head_dim(args, [&](auto value, auto head_dim) {
    return launch_stats<decltype(value), head_dim>(args, static_cast<cudaStream_t>(stream));
  });
}

int attention_round_sm90(const AttentionCudaArgs& args, void* stream) {
  return with_half_and_head_dim(args, [&](auto value, auto head_dim) {
    return launch_round<decltype(value), head_dim>(args, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace fastattn
