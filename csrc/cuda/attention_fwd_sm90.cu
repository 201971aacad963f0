// Attention for Hopper, forward: head dims 64, 96, 128, 192 and 256 in half precision, with causal mask, window,
// grouped heads, different query and key lengths, seqlens_k and packed sequences. Triton serves everything else.
//
//   s = c q·k with c = scale * log2(e), -inf where hidden
//   per block of keys, last to first:  m' = max(m, max s),  p = exp2(s - m'),  shrink = exp2(m - m')
//                                      l = shrink l + sum p,  o = shrink o + p·v
//   out = o / l,  lse = (m + log2 l) / log2(e)
//
// A block of threads stays resident and takes one tile of queries after another, longest first. Its first warpgroup
// loads: queries once per tile, keys and values through rings of stages. Each other warpgroup processes 64 queries,
// whose o stays in registers; p becomes an operand without leaving its thread. The product for the scores of a block
// overlaps with the product for the values of the previous block, and the softmax of the block overlaps with the
// latter. Up to head dim 128, the warpgroups take turns at issuing, so that the softmax also overlaps with the products
// of the others.
// Saved: out and lse.
// Reference: Shah et al., "FlashAttention-3: fast and accurate attention with asynchrony and low-precision", 2024.
#include "cuda/sm90/attention_common.cuh"
#include "cuda/sm90/attention_host.h"

namespace fastattn {
namespace {

using namespace sm90;

// For head dim 64, three warpgroups of 160 registers hold s, p and o. Wider heads need two warpgroups with more
// registers. Above 128 they also need blocks with fewer keys (kKeys), because shared memory must hold two stages.
template <int kHeadDim, int kKeys>
struct FwdConfig {
  static constexpr int kConsumers = kHeadDim == 64 ? 3 : 2;
  static constexpr int kConsumerRegisters = kHeadDim == 64 ? 160 : 232;
  static constexpr int kProducerRegisters = kHeadDim == 64 ? 32 : 40;
  static constexpr int kStages = kHeadDim == 64 ? 4 : 2;
  static constexpr int kBlockM = kConsumers * kSlab;
  static constexpr int kBlockN = kKeys;
  // out has its own memory, so the next q can be loaded while out is written.
  static constexpr bool kOwnOut = kKeys == 128;
  // Wider heads do without turns, because they have long products and few exponentials.
  static constexpr bool kTurns = kHeadDim <= 128;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
};

template <typename Tile, bool kOwnOut>
struct FwdQueries {
  Tile q, out;
};
template <typename Tile>
struct FwdQueries<Tile, false> {
  union {
    Tile q, out;
  };
};

template <typename T, int kHeadDim, int kKeys>
struct FwdShared
    : FwdQueries<TileOf<T, FwdConfig<kHeadDim, kKeys>::kBlockM, kHeadDim>, FwdConfig<kHeadDim, kKeys>::kOwnOut> {
  using Config = FwdConfig<kHeadDim, kKeys>;
  TileOf<T, Config::kBlockN, kHeadDim> k[Config::kStages], v[Config::kStages];
  TileQueue tiles;
  Pipe<1> q_pipe;
  Pipe<Config::kStages> k_pipe, v_pipe;
  Barrier v_arrived;  // for a tile of values that must be cleared
};

struct FwdArgs {
  CUtensorMap q_map, k_map, v_map, out_map;
  AttentionShape shape;
  TileOrder order;
  uint32_t* tile_counter;
  HeadTensor out;
  float* lse;
  int64_t lse_batch, lse_head;
  float scale_log2;  // always positive
  bool negative;     // scale is negative
};

template <int kHeadDim, int kKeys>
using FwdTile = QueryTile<FwdConfig<kHeadDim, kKeys>::kBlockM, FwdConfig<kHeadDim, kKeys>::kBlockN>;

// Executed by one warp. Loads what fwd_consume reads, in the same order.
template <typename T, int kHeadDim, int kKeys>
__device__ __forceinline__ void fwd_produce(FwdShared<T, kHeadDim, kKeys>& shared, const FwdArgs& args) {
  using Config = FwdConfig<kHeadDim, kKeys>;
  const bool leader = threadIdx.x % 32 == 0;
  Ring<1> queries;
  Ring<Config::kStages> ring;  // one ring for keys and values
  int v_parity = 0;
  take_tiles<FwdTile<kHeadDim, kKeys>>(shared.tiles, args.tile_counter, args.shape, args.order, [&](const auto& tile) {
    const Sequence& sequence = tile.sequence;
    const int kv_head = tile.head / args.shape.group();
    const auto load_q = [&] {
      shared.q_pipe.wait_empty(queries);
      queries.next();
      if (leader) {
        Barrier& full = shared.q_pipe.full[0];
        full.arrive_expecting(shared.q.kBytes);
        shared.q.load(args.q_map, sequence.q_begin + tile.row, tile.head, sequence.index, full);
      }
    };
#pragma unroll 1  // this warp has few registers
    for (int n = tile.keys.end - 1; n >= tile.keys.begin; --n) {
      const int first = n * Config::kBlockN;
      const int row = sequence.k_begin + first;
      auto& k = shared.k[ring.stage];
      auto& v = shared.v[ring.stage];
      shared.k_pipe.wait_empty(ring);
      if (leader) {
        Barrier& full = shared.k_pipe.full[ring.stage];
        full.arrive_expecting(k.kBytes);
        k.load(args.k_map, row, kv_head, sequence.index, full);
      }
      if (n == tile.keys.end - 1) {
        // q follows the keys, because the keys need not wait until the previous tile is written.
        load_q();
      }
      shared.v_pipe.wait_empty(ring);
      const bool ragged = args.shape.ragged_keys() && first + Config::kBlockN > sequence.k_len;
      Barrier& full = shared.v_pipe.full[ring.stage];
      Barrier& arrived = ragged ? shared.v_arrived : full;
      if (leader) {
        arrived.arrive_expecting(v.kBytes);
        v.load(args.v_map, row, kv_head, sequence.index, arrived);
      }
      if (ragged) {
        arrived.wait(v_parity);
        v_parity ^= 1;
        v.clear_from(sequence.k_len - first);
        fence_async();
        arrive_warp(full);
      }
      ring.next();
    }
    if (tile.keys.begin == tile.keys.end) {
      load_q();
    }
  });
}

// Executed by one warpgroup, for 64 queries of every tile.
template <typename T, int kHeadDim, int kKeys>
__device__ __forceinline__ void fwd_consume(FwdShared<T, kHeadDim, kKeys>& shared, const FwdArgs& args, int slab) {
  using Config = FwdConfig<kHeadDim, kKeys>;
  constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN;
  const int thread = threadIdx.x % kWarpgroup;
  const Turns<Config::kConsumers, 1 + Config::kConsumers> turns{slab};  // the barriers after those of store_slab
  Ring<1> queries;
  Ring<Config::kStages> keys, values;
  if constexpr (Config::kTurns) {
    turns.start();
  }
  follow_tiles<FwdTile<kHeadDim, kKeys>>(shared.tiles, args.shape, args.order, [&](const auto& tile) {
    const Sequence& sequence = tile.sequence;
    const int row = tile.row + slab * kSlab;
    float o[kHeadDim / 2] = {};
    float row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {}, shrink[2];
    shared.q_pipe.wait_full(queries);
    queries.next();
    if (tile.keys.begin < tile.keys.end) {
      float s[kBlockN / 2];
      uint32_t p[kBlockN / 16][4];
      const auto issue_scores = [&] {
        shared.k_pipe.wait_full(keys);
        wgmma_begin();
        issue_abt<T, kHeadDim, kBlockM, kBlockN>(s, shared.q.slab_address(slab), shared.k[keys.stage].address());
      };
      const auto issue_values = [&] {
        shared.v_pipe.wait_full(values);
        wgmma_begin();
        issue_ab<T, kBlockN>(o, p, shared.v[values.stage].address());
      };
      const auto end_values = [&] {
        wgmma_wait<0>();
        shared.v_pipe.release(values.stage);
        values.next();
      };
      const auto softmax = [&](int n, auto masked) {  // called when the scores are ready
        constexpr bool kMasked = decltype(masked)::value;
        shared.k_pipe.release(keys.stage);
        keys.next();
        if (args.negative) {
#pragma unroll
          for (float& score : s) {
            score = -score;
          }
        }
        if constexpr (kMasked) {
          mask(s, sequence.of_queries, row, n * kBlockN, -INFINITY);
        }
        softmax_step<kMasked>(s, row_max, row_sum, shrink, args.scale_log2);
      };
      const auto step = [&](int n, auto masked) {
        if constexpr (Config::kTurns) {
          turns.wait();
        }
        issue_scores();
        issue_values();  // those of the previous block
        if constexpr (Config::kTurns) {
          turns.pass();
        }
        wgmma_wait<1>();
        softmax(n, masked);
        // Complete the exponentials before the wait for the values.
        finish_first(row_sum[0] < 0.f || row_sum[1] < 0.f);
        end_values();
        to_operand<T>(p, s);
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; ++i) {
          o[i] *= shrink[row_of(i)];
        }
      };
      const std::true_type masked;
      const std::false_type mask_free;
      int n = tile.keys.end - 1;
      issue_scores();
      wgmma_wait<0>();
      softmax(n, masked);
      to_operand<T>(p, s);
      for (--n; n >= tile.keys.full_end; --n) {
        step(n, masked);
      }
      for (; n >= tile.keys.full_begin; --n) {
        step(n, mask_free);
      }
      for (; n >= tile.keys.begin; --n) {
        step(n, masked);
      }
      if constexpr (Config::kOwnOut) {
        shared.q_pipe.release(0);
      }
      issue_values();
      end_values();
    } else if constexpr (Config::kOwnOut) {
      shared.q_pipe.release(0);
    }
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float total = row_total(row_sum[r]);
      factor[r] = total == 0.f ? 0.f : 1.f / total;
      const int i = row + accumulator_row(thread, 2 * r);
      if (thread % 4 == 0 && i < sequence.q_len) {
        args.lse[tile.batch * args.lse_batch + tile.head * args.lse_head + sequence.q_begin + i] =
            total == 0.f ? -INFINITY : row_max[r] * args.scale_log2 * kLn2 + logf(total);
      }
    }
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) {
      o[i] *= factor[row_of(i)];
    }
    const Coordinates at{0, sequence.q_begin + row, tile.head, sequence.index};
    if constexpr (Config::kOwnOut) {
      await_stores();  // the stores of the previous tile
      meet(1 + slab, kWarpgroup);
    }
    store_slab<T>(o, shared.out, slab, Target{args.out_map, args.out, at, sequence.q_len - row, !args.shape.packed()},
                  1 + slab);
    if constexpr (!Config::kOwnOut) {
      await_stores();
      shared.q_pipe.release(0);
    }
  });
  if constexpr (Config::kTurns) {
    turns.end();
  }
  await_stores();
}

template <typename T, int kHeadDim, int kKeys>
__global__ void __launch_bounds__(FwdConfig<kHeadDim, kKeys>::kThreads, 1)
    attention_fwd_sm90_kernel(const __grid_constant__ FwdArgs args) {
  using Config = FwdConfig<kHeadDim, kKeys>;
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  auto& shared = *reinterpret_cast<FwdShared<T, kHeadDim, kKeys>*>(shared_memory);
  if (threadIdx.x == 0) {
    prefetch_maps(args.q_map, args.k_map, args.v_map, args.out_map);
    shared.tiles.pipe.init(Config::kConsumers);
    shared.q_pipe.init(Config::kConsumers);
    shared.k_pipe.init(Config::kConsumers);
    shared.v_pipe.init(Config::kConsumers);
    shared.v_arrived.init(1);
    Barrier::publish();
  }
  __syncthreads();
  assign_roles<Config::kProducerRegisters, Config::kConsumerRegisters>(
      [&] { fwd_produce<T, kHeadDim, kKeys>(shared, args); },
      [&](int slab) { fwd_consume<T, kHeadDim, kKeys>(shared, args, slab); });
}

// The largest block of keys that fits at head dim 128. It gives longer products and fewer waits. It is used if only the
// end is masked and if it does not add more work to the last block than it saves.
constexpr int kWideBlock = 176;
bool fits_wide_blocks(int64_t seqlen_k) {
  const auto padded = [&](int64_t block) { return (seqlen_k + block - 1) / block * block; };
  return padded(kWideBlock) <= 1.05 * padded(128);
}

template <typename T, int kHeadDim, int kKeys>
cudaError_t launch_fwd(const AttentionCudaArgs& in, cudaStream_t stream) {
  using Config = FwdConfig<kHeadDim, kKeys>;
  FwdArgs args{};
  args.shape = attention_shape(in);
  args.order = query_order(args.shape, Config::kBlockM, kHeadDim);
  const unsigned blocks = resident_blocks(args.order.count());
  args.tile_counter = args.order.count() > blocks ? in.tile_counters : nullptr;
  args.out = in.out;
  args.lse = in.lse;
  args.lse_batch = in.lse_batch;
  args.lse_head = in.lse_head;
  args.scale_log2 = positive_scale_log2(in.scale);
  args.negative = in.scale < 0;
  const MapMaker make(in);
  if (const cudaError_t error = make({{&args.q_map, in.q, MapMaker::kQueries, Config::kBlockM},
                                      {&args.out_map, in.out, MapMaker::kQueries, kSlab},
                                      {&args.k_map, in.k, MapMaker::kKeys, Config::kBlockN},
                                      {&args.v_map, in.v, MapMaker::kKeys, Config::kBlockN}})) {
    return error;
  }
  const auto kernel = attention_fwd_sm90_kernel<T, kHeadDim, kKeys>;
  constexpr int kShared = sizeof(FwdShared<T, kHeadDim, kKeys>);
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared)) {
    return error;
  }
  if (args.tile_counter != nullptr) {
    if (const cudaError_t error = cudaMemsetAsync(args.tile_counter, 0, sizeof(uint32_t), stream)) {
      return error;
    }
  }
  kernel<<<blocks, Config::kThreads, kShared, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace

int attention_fwd_sm90(const AttentionCudaArgs& args, void* stream) {
  return with_half_and_any_head_dim(args, [&](auto value, auto head_dim) {
    using T = decltype(value);
    const auto s = static_cast<cudaStream_t>(stream);
    if constexpr (head_dim == 128) {
      if (args.window_left < 0 && args.window_right < 0 && fits_wide_blocks(args.seqlen_k)) {
        return launch_fwd<T, head_dim, kWideBlock>(args, s);
      }
    }
    return launch_fwd<T, head_dim, head_dim <= 128 ? 128 : head_dim == 192 ? 112 : 80>(args, s);
  });
}

}  // namespace fastattn
