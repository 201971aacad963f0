// Attention for Hopper, backward: dq for the calls that attention_fwd_sm90.cu serves, summed in a fixed order.
//
//   p = exp2(c q·k - lse2),  dp = do·v,  ds = p ∘ (dp - delta),  dq = scale ds·k
//                                                                 c = scale log2(e), lse2 = lse log2(e)
//
// A block of threads takes one tile of 128 queries after another, with the keys that the tile sees. dq stays in
// registers, so there are no atomics, and every run gives the same bits. The backward then has 7 products; it has 5 if
// attention_dkdv_sm90.cu also computes dq.
// While one of the two warpgroups computes ds, the products of the other one run. The exponentials also overlap with
// the warpgroup's own product do·v. This product is issued only when the scores are ready. If both products were issued
// together, ptxas would wait for both before most of the exponentials. If a warpgroup also overlapped the product with
// k, the compiler would run out of registers and wait after every product.
// Reference: Dao, "FlashAttention-2: faster attention with better parallelism and work partitioning", 2023.
#include "cuda/sm90/attention_bwd.cuh"

namespace fastattn {
namespace {

using namespace sm90;

// The keys of a block. They need two accumulators of 64 registers in addition to dq.
constexpr int kKeys = 128;

template <int kHeadDim>
constexpr int kKeyStages = kHeadDim == 64 ? 4 : 2;

template <typename T, int kHeadDim>
struct DqShared {
  TileOf<T, kTile, kHeadDim> q, dout;  // q is finally replaced by dq
  TileOf<T, kKeys, kHeadDim> k[kKeyStages<kHeadDim>], v[kKeyStages<kHeadDim>];
  TileQueue tiles;
  Pipe<1> tile_pipe;
  Pipe<kKeyStages<kHeadDim>> pipe;
  Barrier arrived;  // for a block that must be cleared
};

using DqTile = QueryTile<kTile, kKeys>;

template <typename T, int kHeadDim>
__device__ __forceinline__ void dq_produce(DqShared<T, kHeadDim>& shared, const BwdArgs& args) {
  Ring<1> tiles;
  Ring<kKeyStages<kHeadDim>> ring;
  int arrived_parity = 0;
  take_tiles<DqTile>(shared.tiles, args.tile_counter, args.shape, args.order, [&](const DqTile& tile) {
    const Sequence& sequence = tile.sequence;
    shared.tile_pipe.wait_empty(tiles);
    tiles.next();
    if (threadIdx.x % 32 == 0) {
      Barrier& full = shared.tile_pipe.full[0];
      full.arrive_expecting(2 * shared.q.kBytes);
      shared.q.load(args.q, sequence.q_begin + tile.row, tile.head, sequence.index, full);
      shared.dout.load(args.dout, sequence.q_begin + tile.row, tile.head, sequence.index, full);
    }
    for (int n = tile.keys.begin; n < tile.keys.end; ++n) {
      const int stage = ring.stage, valid = sequence.k_len - n * kKeys;
      shared.pipe.wait_empty(ring);
      ring.next();
      produce_block(shared.k[stage], shared.v[stage], args.k, args.v,
                    {0, sequence.k_begin + n * kKeys, tile.head / args.shape.group(), sequence.index}, valid,
                    args.shape.ragged_keys() && valid < kKeys, shared.pipe.full[stage], shared.arrived, arrived_parity,
                    2 * shared.k[0].kBytes, [](Barrier&) {});
    }
  });
}

template <typename T, int kHeadDim>
__device__ __forceinline__ void dq_consume(DqShared<T, kHeadDim>& shared, const BwdArgs& args, int slab) {
  const int thread = threadIdx.x % kWarpgroup;
  Ring<1> tiles;
  Ring<kKeyStages<kHeadDim>> ring;
  follow_tiles<DqTile>(shared.tiles, args.shape, args.order, [&](const DqTile& tile) {
    const Sequence& sequence = tile.sequence;
    const int row = tile.row + slab * kSlab;
    float dq[kHeadDim / 2] = {};
    float lse2[2], delta[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t at = args.stats(tile.batch, tile.head, sequence) + row + accumulator_row(thread, 2 * r);
      lse2[r] = args.lse2[at];
      delta[r] = args.delta[at];
    }
    shared.tile_pipe.wait_full(tiles);
    tiles.next();
    for (int n = tile.keys.begin; n < tile.keys.end; ++n) {
      const int stage = ring.stage;
      float s[kKeys / 2], dp[kKeys / 2];
      uint32_t ds[kKeys / 16][4];
      shared.pipe.wait_full(ring);
      ring.next();
      wgmma_begin();
      issue_abt<T, kHeadDim, kTile, kKeys>(s, shared.q.slab_address(slab), shared.k[stage].address());
      wgmma_wait<0>();
      wgmma_begin();
      issue_abt<T, kHeadDim, kTile, kKeys>(dp, shared.dout.slab_address(slab), shared.v[stage].address());
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) {
        s[i] = exp2_fast(s[i] * args.scale_log2 - lse2[row_of(i)]);
      }
      wgmma_wait<0>();
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) {
        s[i] *= dp[i] - delta[row_of(i)];
      }
      if (n < tile.keys.full_begin || n >= tile.keys.full_end) {
        mask(s, sequence.of_queries, row, n * kKeys, 0.f);
      }
      to_operand<T>(ds, s);
      wgmma_begin();
      issue_ab<T, kKeys>(dq, ds, shared.k[stage].address());
      wgmma_wait<0>();
      shared.pipe.release(stage);
    }
#pragma unroll
    for (float& value : dq) {
      value *= args.scale;
    }
    const Coordinates at{0, sequence.q_begin + row, tile.head, sequence.index};
    store_slab<T>(dq, shared.q, slab, Target{args.dq, args.dq_rows, at, sequence.q_len - row, !args.shape.packed()},
                  1 + slab);
    await_stores();
    shared.tile_pipe.release(0);
  });
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kBwdThreads, 1) attention_dq_sm90_kernel(const __grid_constant__ BwdArgs args) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  auto& shared = *reinterpret_cast<DqShared<T, kHeadDim>*>(shared_memory);
  if (threadIdx.x == 0) {
    prefetch_maps(args.q, args.dout, args.k, args.v, args.dq);
    shared.tiles.pipe.init(kBwdConsumers);
    shared.tile_pipe.init(kBwdConsumers);
    shared.pipe.init(kBwdConsumers);
    shared.arrived.init(1);
    Barrier::publish();
  }
  __syncthreads();
  assign_roles<kProducerRegisters, kConsumerRegisters>([&] { dq_produce<T, kHeadDim>(shared, args); },
                                                       [&](int slab) { dq_consume<T, kHeadDim>(shared, args, slab); });
}

template <typename T, int kHeadDim>
cudaError_t launch_dq(const AttentionCudaArgs& in, cudaStream_t stream) {
  BwdArgs args = bwd_args(in);
  args.order = query_order(args.shape, kTile, kHeadDim);
  args.tile_counter = in.tile_counters + 1;
  const MapMaker make(in);
  if (const cudaError_t error = make({{&args.q, in.q, MapMaker::kQueries, kTile},
                                      {&args.dout, in.dout, MapMaker::kQueries, kTile},
                                      {&args.k, in.k, MapMaker::kKeys, kKeys},
                                      {&args.v, in.v, MapMaker::kKeys, kKeys},
                                      {&args.dq, in.dq, MapMaker::kQueries, kSlab}})) {
    return error;
  }
  const auto kernel = attention_dq_sm90_kernel<T, kHeadDim>;
  constexpr int kShared = sizeof(DqShared<T, kHeadDim>);
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared)) {
    return error;
  }
  kernel<<<resident_blocks(args.order.count()), kBwdThreads, kShared, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace

int attention_dq_sm90(const AttentionCudaArgs& args, void* stream) {
  return with_half_and_head_dim(args, [&](auto value, auto head_dim) {
    return launch_dq<decltype(value), head_dim>(args, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace fastattn
