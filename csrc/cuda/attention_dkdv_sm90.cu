// Attention for Hopper, backward, first half: dk and dv of what attention_fwd_sm90.cu serves.
//
//   p = exp2(c q·k - lse2),  dp = do·v,  ds = p ∘ (dp - delta)        c = scale log2(e), lse2 = lse log2(e)
//   dv = pᵀ·do,  dk = scale dsᵀ·q
//
// A block of threads takes one tile of 128 keys after another, over all queries of its group of heads that see it, so
// dk and dv stay in registers, summed in one order: no atomics, no workspace. Scores are computed transposed, rows are
// keys: p and ds go from accumulators to operands without leaving their thread. Keys past the end only make rows that
// are not written; queries past the end have lse2 = inf, so p = 0.
// Reference: Dao, "FlashAttention-2: faster attention with better parallelism and work partitioning", 2023.
#include "cuda/sm90/attention_bwd.cuh"

namespace fastattn {
namespace {

using namespace sm90;

constexpr int kQueries = 64;  // a block; 128 would need 64 + 64 registers beside dk, dv and the operands
constexpr int kQueryStages = 4;

template <typename T, int kHeadDim>
struct DkdvShared {
  TileOf<T, kTile, kHeadDim> k, v;  // in the end dk and dv
  TileOf<T, kQueries, kHeadDim> q[kQueryStages], dout[kQueryStages];
  alignas(16) float lse2[kQueryStages][kQueries];
  alignas(16) float delta[kQueryStages][kQueries];
  TileQueue tiles;
  Pipe<1> tile_pipe;
  Pipe<kQueryStages> pipe;
  Barrier arrived;  // a block that still has to be cleared
};

using DkdvTile = KeyTile<kTile, kQueries>;

template <typename T, int kHeadDim>
__device__ __forceinline__ void dkdv_produce(DkdvShared<T, kHeadDim>& shared, const BwdArgs& args) {
  constexpr int kStatsBytes = kQueries * sizeof(float);
  Ring<1> tiles;
  Ring<kQueryStages> ring;
  int arrived_parity = 0;
  take_tiles<DkdvTile>(shared.tiles, args.tile_counter, args.shape, args.order, [&](const DkdvTile& tile) {
    const Sequence& sequence = tile.sequence;
    shared.tile_pipe.wait_empty(tiles);
    tiles.next();
    if (threadIdx.x % 32 == 0) {
      Barrier& full = shared.tile_pipe.full[0];
      full.arrive_expecting(2 * shared.k.kBytes);
      shared.k.load(args.k, sequence.k_begin + tile.row, tile.kv_head, sequence.index, full);
      shared.v.load(args.v, sequence.k_begin + tile.row, tile.kv_head, sequence.index, full);
    }
    const int end = (tile.kv_head + 1) * args.shape.group();
#pragma unroll 1  // few registers are left to this warp
    for (int head = end - args.shape.group(); head < end; ++head) {
#pragma unroll 1
      for (int m = tile.queries.begin; m < tile.queries.end; ++m) {
        const int first = m * kQueries, stage = ring.stage;
        const int valid = sequence.q_len - first;
        shared.pipe.wait_empty(ring);
        ring.next();
        produce_block(shared.q[stage], shared.dout[stage], args.q, args.dout,
                      {0, sequence.q_begin + first, head, sequence.index}, valid,
                      args.shape.packed() && valid < kQueries, shared.pipe.full[stage], shared.arrived, arrived_parity,
                      2 * (shared.q[0].kBytes + kStatsBytes), [&](Barrier& barrier) {
                        const int64_t stats = args.stats(tile.batch, head, sequence) + first;
                        bulk_load(shared.lse2[stage], args.lse2 + stats, kStatsBytes, barrier);
                        bulk_load(shared.delta[stage], args.delta + stats, kStatsBytes, barrier);
                      });
      }
    }
  });
}

template <typename T, int kHeadDim>
__device__ __forceinline__ void dkdv_consume(DkdvShared<T, kHeadDim>& shared, const BwdArgs& args, int slab) {
  const int thread = threadIdx.x % kWarpgroup;
  Ring<1> tiles;
  Ring<kQueryStages> ring;
  follow_tiles<DkdvTile>(shared.tiles, args.shape, args.order, [&](const DkdvTile& tile) {
    const Sequence& sequence = tile.sequence;
    const int row = tile.row + slab * kSlab;
    float dk[kHeadDim / 2] = {}, dv[kHeadDim / 2] = {};
    shared.tile_pipe.wait_full(tiles);
    tiles.next();
    const int blocks = tile.queries.end - tile.queries.begin;
    for (int block = 0; block < blocks * args.shape.group(); ++block) {
      const int m = tile.queries.begin + block % blocks, stage = ring.stage;
      float s[kQueries / 2], dp[kQueries / 2];
      uint32_t p[kQueries / 16][4], ds[kQueries / 16][4];
      shared.pipe.wait_full(ring);
      ring.next();
      wgmma_begin();
      issue_abt<T, kHeadDim, kTile, kQueries>(s, shared.k.slab_address(slab), shared.q[stage].address());
      issue_abt<T, kHeadDim, kTile, kQueries>(dp, shared.v.slab_address(slab), shared.dout[stage].address());
      wgmma_wait<1>();
      const float* lse2 = shared.lse2[stage] + accumulator_col(thread, 0);
#pragma unroll
      for (int i = 0; i < kQueries / 2; ++i) {
        s[i] = exp2_fast(s[i] * args.scale_log2 - lse2[accumulator_col(0, i)]);
      }
      if (m < tile.queries.full_begin || m >= tile.queries.full_end) {
        mask(s, sequence.of_keys, row, m * kQueries, 0.f);
      }
      to_operand<T>(p, s);
      wgmma_begin();
      issue_ab<T, kQueries>(dv, p, shared.dout[stage].address());
      wgmma_wait<1>();
      const float* delta = shared.delta[stage] + accumulator_col(thread, 0);
#pragma unroll
      for (int i = 0; i < kQueries / 2; ++i) {
        s[i] *= dp[i] - delta[accumulator_col(0, i)];
      }
      to_operand<T>(ds, s);
      wgmma_begin();
      issue_ab<T, kQueries>(dk, ds, shared.q[stage].address());
      wgmma_wait<0>();
      shared.pipe.release(stage);
    }
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) {
      const bool visible = row + accumulator_row(thread, i) < sequence.k_len;
      dk[i] = visible ? dk[i] * args.scale : 0.f;
      dv[i] = visible ? dv[i] : 0.f;
    }
    const Coordinates at{0, sequence.k_begin + row, tile.kv_head, sequence.index};
    const int valid = sequence.k_rows - row;
    const bool clipped = !args.shape.packed();
    store_slab<T>(dk, shared.k, slab, Target{args.dk, args.dk_rows, at, valid, clipped}, 1 + slab);
    store_slab<T>(dv, shared.v, slab, Target{args.dv, args.dv_rows, at, valid, clipped}, 1 + slab);
    shared.tile_pipe.release(0);
  });
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kBwdThreads, 1) attention_dkdv_sm90_kernel(const __grid_constant__ BwdArgs args) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  auto& shared = *reinterpret_cast<DkdvShared<T, kHeadDim>*>(shared_memory);
  if (threadIdx.x == 0) {
    shared.tiles.pipe.init(kBwdConsumers);
    shared.tile_pipe.init(kBwdConsumers);
    shared.pipe.init(kBwdConsumers);
    shared.arrived.init(1);
    Barrier::publish();
  }
  __syncthreads();
  split_roles<kProducerRegisters, kConsumerRegisters>([&] { dkdv_produce<T, kHeadDim>(shared, args); },
                                                      [&](int slab) { dkdv_consume<T, kHeadDim>(shared, args, slab); });
}

template <typename T, int kHeadDim>
cudaError_t launch_dkdv(const AttentionCudaArgs& in, cudaStream_t stream) {
  BwdArgs args = bwd_args(in);
  args.order = key_order(args.shape, kTile, kHeadDim);
  args.tile_counter = in.tile_counters;
  const MapMaker make(in);
  if (const cudaError_t error = make({{&args.q, in.q, MapMaker::kQueries, kQueries},
                                      {&args.dout, in.dout, MapMaker::kQueries, kQueries},
                                      {&args.k, in.k, MapMaker::kKeys, kTile},
                                      {&args.v, in.v, MapMaker::kKeys, kTile},
                                      {&args.dk, in.dk, MapMaker::kKeys, kSlab},
                                      {&args.dv, in.dv, MapMaker::kKeys, kSlab}})) {
    return error;
  }
  const auto kernel = attention_dkdv_sm90_kernel<T, kHeadDim>;
  constexpr int kShared = sizeof(DkdvShared<T, kHeadDim>);
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared)) {
    return error;
  }
  kernel<<<resident_blocks(args.order.count()), kBwdThreads, kShared, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace

int attention_dkdv_sm90(const AttentionCudaArgs& args, void* stream) {
  return with_half_and_head_dim(args, [&](auto value, auto head_dim) {
    return launch_dkdv<decltype(value), head_dim>(args, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace fastattn
