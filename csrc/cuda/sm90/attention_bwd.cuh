#pragma once
// Shared by the kernels of the attention backward for Hopper: their arguments and sizes, and the loads of a block.
#include "cuda/sm90/attention_common.cuh"
#include "cuda/sm90/attention_host.h"

namespace fastattn::sm90 {

constexpr int kBwdConsumers = 2;
constexpr int kBwdThreads = (kBwdConsumers + 1) * kWarpgroup;
constexpr int kConsumerRegisters = 232, kProducerRegisters = 40;
constexpr int kTile = kBwdConsumers * kSlab;  // the rows of the resident side: keys for dk and dv, queries for dq
static_assert(kStatsRows % kTile == 0);
// A named barrier; 1 and 2 belong to the single warpgroups.
constexpr int kBothWarpgroups = 3;

struct BwdArgs {
  CUtensorMap q, dout, k, v;  // boxes of the resident or streamed rows, depending on the kernel
  CUtensorMap dq, dk, dv;     // boxes of 64 rows
  AttentionShape shape;
  TileOrder order;
  uint32_t* tile_counter;
  HeadTensor dq_rows, dk_rows, dv_rows;
  // (batch, head, row) of the workspace. Rows that see nothing or do not exist have lse2 = inf and delta = 0.
  const float *lse2, *delta;
  int64_t stats_batch, stats_head;
  // Sums of dq with the same order of rows, in groups of 64. Each group has the layout of a warpgroup's accumulators,
  // with four per thread at a time.
  float* dq_sums;
  float scale, scale_log2;

  __device__ int64_t stats(int batch, int head, const Sequence& sequence) const {
    return batch * stats_batch + head * stats_head + sequence.stats_begin;
  }
};

// Executed by one warp. Loads a block of two tiles; `bytes` also counts the loads of `more`. Clears rows from `valid`
// on if they may belong to another sequence.
template <typename Tile, typename More>
__device__ __forceinline__ void produce_block(Tile& a, Tile& b, const CUtensorMap& a_map, const CUtensorMap& b_map,
                                              Coordinates at, int valid, bool ragged, Barrier& full, Barrier& arrived,
                                              int& arrived_parity, int bytes, More more) {
  Barrier& barrier = ragged ? arrived : full;
  if (threadIdx.x % 32 == 0) {
    barrier.arrive_expecting(bytes);
    a.load(a_map, at.row, at.head, at.batch, barrier);
    b.load(b_map, at.row, at.head, at.batch, barrier);
    more(barrier);
  }
  if (ragged) {
    barrier.wait(arrived_parity);
    arrived_parity ^= 1;
    a.clear_from(valid);
    b.clear_from(valid);
    fence_async();
    arrive_warp(full);
  }
}

inline BwdArgs bwd_args(const AttentionCudaArgs& in) {
  BwdArgs args{};
  args.shape = attention_shape(in);
  args.dq_rows = in.dq;
  args.dk_rows = in.dk;
  args.dv_rows = in.dv;
  args.lse2 = in.lse2;
  args.delta = in.delta;
  args.stats_batch = in.stats_batch;
  args.stats_head = in.stats_head;
  args.dq_sums = in.dq_sums;
  args.scale = in.scale;
  args.scale_log2 = in.scale * kLog2e;
  return args;
}

}  // namespace fastattn::sm90
