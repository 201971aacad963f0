// Attention for Hopper, backward: dk and dv for the calls that attention_fwd_sm90.cu serves, and dq if it may be summed
// in any order.
//
//   p = exp2(c q·k - lse2),  dp = do·v,  ds = p ∘ (dp - delta)        c = scale log2(e), lse2 = lse log2(e)
//   dv = pᵀ·do,  dk = scale dsᵀ·q,  dq = scale ds·k
//
// A block of threads takes one tile of 128 keys after another, with all queries of its group of heads that see the
// tile. dk and dv stay in registers and are summed in a fixed order, without atomics or a workspace. Scores are
// computed transposed, with keys as rows, so p and ds become operands without leaving their thread. Keys past the end
// only produce rows that are not written. Queries past the end have lse2 = inf, so p = 0.
//
// With dq, the two warpgroups put their ds side by side in shared memory and multiply dq from both. The copy engine
// adds the product to sums in global memory. The loading warp's warpgroup has a warp that starts this copy, so no
// warpgroup waits until shared memory has been read. Keys past the end are cleared and have p = 0. Several blocks of
// threads add in any order, so the last bits of dq differ from run to run.
// References: Dao, "FlashAttention-2: faster attention with better parallelism and work partitioning", 2023; Shah et
// al., "FlashAttention-3: fast and accurate attention with asynchrony and low-precision", 2024.
#include "cuda/sm90/attention_bwd.cuh"

namespace fastattn {
namespace {

using namespace sm90;

// The queries of a block. With 128, each thread would need 64 + 64 registers in addition to dk, dv and the operands.
constexpr int kQueries = 64;

// The warpgroups take turns to multiply dq of a block. If there are too few registers for that, each computes half of
// the columns.
template <int kHeadDim>
constexpr int kDqCols = kHeadDim == 128 ? 64 : kHeadDim;

// Shared memory holds four blocks of queries. It holds only two if dq of wide heads also needs space. This space is for
// ds of both warpgroups, whose rows are keys, and for dq before it is copied out. There dq has the layout of the
// accumulators, with four per thread at a time.
template <typename T, int kHeadDim, bool kWithDq>
struct DkdvStages {
  static constexpr int kStages = 4;
};

// A warpgroup hands its dq to a warp that starts the copy. They use named barriers, because these need no register for
// a phase.
constexpr int kDqFull = kBothWarpgroups + 1, kDqEmpty = kDqFull + kBwdConsumers, kHandoverThreads = kWarpgroup + 32;
constexpr int64_t kNoMore = -1;

template <typename T, int kHeadDim>
struct DkdvStages<T, kHeadDim, true> {
  static constexpr int kStages = kHeadDim == 64 ? 4 : 2;
  TileOf<T, kTile, kQueries> ds[2];
  float dq[kBwdConsumers][kQueries * kDqCols<kHeadDim>];
  int64_t dq_to[kBwdConsumers];  // the position in the sums where dq is added, or kNoMore
};

template <typename T, int kHeadDim, bool kWithDq>
struct DkdvShared : DkdvStages<T, kHeadDim, kWithDq> {
  using DkdvStages<T, kHeadDim, kWithDq>::kStages;
  TileOf<T, kTile, kHeadDim> k, v;  // finally replaced by dk and dv
  TileOf<T, kQueries, kHeadDim> q[kStages], dout[kStages];
  alignas(16) float lse2[kStages][kQueries];
  alignas(16) float delta[kStages][kQueries];
  TileQueue tiles;
  Pipe<1> tile_pipe;
  Pipe<kStages> pipe;
  Barrier arrived;  // for a block that must be cleared
};

using DkdvTile = KeyTile<kTile, kQueries>;

template <typename T, int kHeadDim, bool kWithDq>
__device__ __forceinline__ void dkdv_produce(DkdvShared<T, kHeadDim, kWithDq>& shared, const BwdArgs& args) {
  constexpr int kStatsBytes = kQueries * sizeof(float);
  Ring<1> tiles;
  Ring<DkdvShared<T, kHeadDim, kWithDq>::kStages> ring;
  int arrived_parity = 0;
  take_tiles<DkdvTile>(shared.tiles, args.tile_counter, args.shape, args.order, [&](const DkdvTile& tile) {
    const Sequence& sequence = tile.sequence;
    shared.tile_pipe.wait_empty(tiles);
    tiles.next();
    const int valid_keys = sequence.k_len - tile.row;  // the other keys must not affect dq
    produce_block(shared.k, shared.v, args.k, args.v, {0, sequence.k_begin + tile.row, tile.kv_head, sequence.index},
                  valid_keys, kWithDq && args.shape.ragged_keys() && valid_keys < kTile, shared.tile_pipe.full[0],
                  shared.arrived, arrived_parity, 2 * shared.k.kBytes, [](Barrier&) {});
    const int end = (tile.kv_head + 1) * args.shape.group();
#pragma unroll 1  // this warp has few registers
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

// Executed by one warp per warpgroup. Adds the warpgroup's dq of each block to the sums.
template <typename T, int kHeadDim>
__device__ __forceinline__ void add_dq(DkdvShared<T, kHeadDim, true>& shared, const BwdArgs& args, int slab) {
  while (true) {
    arrive(kDqEmpty + slab, kHandoverThreads);
    meet(kDqFull + slab, kHandoverThreads);
    const int64_t to = shared.dq_to[slab];
    if (to == kNoMore) {
      return;
    }
    if (threadIdx.x % 32 == 0) {
      bulk_reduce_add(args.dq_sums + to, shared.dq[slab], sizeof(shared.dq[slab]));
      tma_stores_read();
    }
    __syncwarp();
  }
}

template <typename T, int kHeadDim, bool kWithDq>
__device__ __forceinline__ void dkdv_consume(DkdvShared<T, kHeadDim, kWithDq>& shared, const BwdArgs& args, int slab) {
  const int thread = threadIdx.x % kWarpgroup;
  Ring<1> tiles;
  Ring<DkdvShared<T, kHeadDim, kWithDq>::kStages> ring;
  follow_tiles<DkdvTile>(shared.tiles, args.shape, args.order, [&](const DkdvTile& tile) {
    const Sequence& sequence = tile.sequence;
    const int row = tile.row + slab * kSlab;
    const auto visible = [&](int i) { return row + accumulator_row(thread, i) < sequence.k_len; };
    float dk[kHeadDim / 2] = {}, dv[kHeadDim / 2] = {};
    shared.tile_pipe.wait_full(tiles);
    tiles.next();
    // one loop over heads and queries: two nested loops cost registers
    int m = tile.queries.begin, head = tile.kv_head * args.shape.group();
    const int blocks = (tile.queries.end - tile.queries.begin) * args.shape.group();
    for (int block = 0; block < blocks; ++block) {
      const int stage = ring.stage;
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
      if (kWithDq && row + kSlab > sequence.k_len) {
#pragma unroll
        for (int i = 0; i < kQueries / 2; ++i) {
          s[i] = visible(i) ? s[i] : 0.f;
        }
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
      const auto issue_dk = [&] {
        wgmma_begin();
        issue_ab<T, kQueries>(dk, ds, shared.q[stage].address());
      };
      if constexpr (kWithDq) {
        const int turn = stage % 2;
        constexpr int kPanel = panel_cols(kQueries);
        unsigned char* rows = shared.ds[turn].bytes + slab * shared.ds[turn].kSlabBytes;
#pragma unroll
        for (int i = 0; i < kQueries / 2; i += 2) {
          store_for_async(rows + accumulator_offset<kPanel>(first_offset<kPanel>(thread), i, kTile),
                          ds[i / 8][i / 2 % 4]);
        }
        fence_async();
        meet(kBothWarpgroups, kBwdConsumers * kWarpgroup);
        constexpr bool kInTurns = kDqCols<kHeadDim> == kHeadDim;
        if (!kInTurns || slab == turn) {
          const int half = kInTurns ? 0 : slab;
          float dq[kDqCols<kHeadDim> / 2];
          wgmma_begin();
          issue_atb<T, kTile>(dq, shared.ds[turn].address(), shared.k.panel_address(half));
          issue_dk();
          wgmma_wait<1>();
          float* sums = shared.dq[slab];
          meet(kDqEmpty + slab, kHandoverThreads);
#pragma unroll
          for (int i = 0; i < kDqCols<kHeadDim> / 2; i += 4) {
            store_for_async(sums + i * kWarpgroup + thread * 4, float4{dq[i], dq[i + 1], dq[i + 2], dq[i + 3]});
          }
          fence_async();
          if (thread == 0) {
            const int64_t first = args.stats(tile.batch, head, sequence) + m * kQueries;
            shared.dq_to[slab] = first * kHeadDim + half * (sizeof(shared.dq[0]) / 4);
          }
          arrive(kDqFull + slab, kHandoverThreads);
        } else {
          issue_dk();
        }
      } else {
        issue_dk();
      }
      wgmma_wait<0>();
      shared.pipe.release(stage);
      if (++m == tile.queries.end) {
        m = tile.queries.begin;
        ++head;
      }
    }
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) {
      dk[i] = visible(i) ? dk[i] * args.scale : 0.f;
      dv[i] = visible(i) ? dv[i] : 0.f;
    }
    if constexpr (kWithDq) {
      meet(kBothWarpgroups, kBwdConsumers * kWarpgroup);  // waits because the other warpgroup reads all keys for its dq
    }
    const Coordinates at{0, sequence.k_begin + row, tile.kv_head, sequence.index};
    const int valid = sequence.k_rows - row;
    const bool clipped = !args.shape.packed();
    store_slab<T>(dk, shared.k, slab, Target{args.dk, args.dk_rows, at, valid, clipped}, 1 + slab);
    store_slab<T>(dv, shared.v, slab, Target{args.dv, args.dv_rows, at, valid, clipped}, 1 + slab);
    await_stores();
    shared.tile_pipe.release(0);
  });
  if constexpr (kWithDq) {
    meet(kDqEmpty + slab, kHandoverThreads);
    if (thread == 0) {
      shared.dq_to[slab] = kNoMore;
    }
    arrive(kDqFull + slab, kHandoverThreads);
  }
}

template <typename T, int kHeadDim, bool kWithDq>
__global__ void __launch_bounds__(kBwdThreads, 1) attention_dkdv_sm90_kernel(const __grid_constant__ BwdArgs args) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  auto& shared = *reinterpret_cast<DkdvShared<T, kHeadDim, kWithDq>*>(shared_memory);
  if (threadIdx.x == 0) {
    prefetch_maps(args.q, args.dout, args.k, args.v, args.dk, args.dv);
    shared.tiles.pipe.init(kBwdConsumers);
    shared.tile_pipe.init(kBwdConsumers);
    shared.pipe.init(kBwdConsumers);
    shared.arrived.init(1);
    Barrier::publish();
  }
  __syncthreads();
  assign_roles<kProducerRegisters, kConsumerRegisters>(
      [&] { dkdv_produce<T, kHeadDim, kWithDq>(shared, args); },
      [&](int slab) { dkdv_consume<T, kHeadDim, kWithDq>(shared, args, slab); },
      [&](int slab) {
        if constexpr (kWithDq) {
          if (slab < kBwdConsumers) {
            add_dq<T, kHeadDim>(shared, args, slab);
          }
        }
      });
}

template <typename T, int kHeadDim, bool kWithDq>
cudaError_t launch_dkdv(const AttentionCudaArgs& in, cudaStream_t stream) {
  BwdArgs args = bwd_args(in);
  args.order = key_order(args.shape, kTile, kHeadDim, kWithDq);
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
  const auto kernel = attention_dkdv_sm90_kernel<T, kHeadDim, kWithDq>;
  constexpr int kShared = sizeof(DkdvShared<T, kHeadDim, kWithDq>);
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared)) {
    return error;
  }
  kernel<<<resident_blocks(args.order.count()), kBwdThreads, kShared, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace

int attention_dkdv_sm90(const AttentionCudaArgs& args, void* stream) {
  return with_half_and_head_dim(args, [&](auto value, auto head_dim) {
    const auto launch = args.dq_sums != nullptr ? launch_dkdv<decltype(value), head_dim, true>
                                                : launch_dkdv<decltype(value), head_dim, false>;
    return launch(args, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace fastattn
