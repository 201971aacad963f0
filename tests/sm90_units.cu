// One kernel per building block of csrc/cuda/sm90, for what a run on hardware must show before the attention kernels
// are worth a try. Called through ctypes with plain pointers by tests/test_sm90_units.py, on a GPU or in the emulation.
#include "cuda/sm90/attention_common.cuh"
#include "cuda/sm90/attention_host.h"

using namespace fastattn;
using namespace fastattn::sm90;

namespace {

constexpr int kRows = 64;
template <int kHeadDim>
using UnitTile = TileOf<__nv_bfloat16, kRows, kHeadDim>;

struct TmaShared {
  UnitTile<128> tile;
  Barrier full;
};

// Shared memory as the copy engine leaves it, and the same tile back into another tensor.
__global__ void __launch_bounds__(kWarpgroup, 1)
    unit_tma_kernel(const __grid_constant__ CUtensorMap from, const __grid_constant__ CUtensorMap to, Coordinates at,
                    uint16_t* dump) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  auto& shared = *reinterpret_cast<TmaShared*>(shared_memory);
  if (threadIdx.x == 0) {
    shared.full.init(1);
    Barrier::publish();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    shared.full.arrive_expecting(shared.tile.kBytes);
    shared.tile.load(from, at.row, at.head, at.batch, shared.full);
  }
  shared.full.wait(0);
  for (int i = threadIdx.x; i < shared.tile.kBytes / 2; i += kWarpgroup) {
    dump[i] = reinterpret_cast<const uint16_t*>(shared.tile.bytes)[i];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int col = 0; col < 128; col += kPanelCols) {
      tma_store(to, {col, at.row, at.head, at.batch}, shared.tile.bytes + col * 2 * kRows);
    }
    tma_stores_read();
  }
}

// d (64, n) = a (64, k) * b (n, k)ᵀ, both by ordinary stores into tiles
template <int kN, int kK>
__global__ void __launch_bounds__(kWarpgroup, 1)
    unit_wgmma_ss_kernel(const __nv_bfloat16* a, const __nv_bfloat16* b, float* d) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  struct Shared {
    TileOf<__nv_bfloat16, 64, kK> a;
    TileOf<__nv_bfloat16, kN, kK> b;
  };
  auto& shared = *reinterpret_cast<Shared*>(shared_memory);
  for (int i = threadIdx.x; i < 64 * kK; i += kWarpgroup) {
    store_for_async(shared.a.bytes + tile_offset(i / kK, i % kK, 64), a[i]);
  }
  for (int i = threadIdx.x; i < kN * kK; i += kWarpgroup) {
    store_for_async(shared.b.bytes + tile_offset(i / kK, i % kK, kN), b[i]);
  }
#ifndef PLANT_NO_FENCE
  fence_async();
#endif
  meet(1, kWarpgroup);
  float acc[kN / 2];
  wgmma_begin();
  issue_abt<__nv_bfloat16, kK, 64, kN>(acc, shared.a.address(), shared.b.address());
#ifdef PLANT_WRITE_IN_FLIGHT
  store_for_async(shared.b.bytes + threadIdx.x * 2, __nv_bfloat16(3.f));
#endif
#ifdef PLANT_USE_BEFORE_WAIT
  acc[0] = 1.f;
#endif
  wgmma_wait<0>();
  for (int i = 0; i < kN / 2; ++i) {
    d[accumulator_row(threadIdx.x, i) * kN + accumulator_col(threadIdx.x, i)] = acc[i];
  }
}

// d (64, n) = a (64, k) * b (k, n), a in registers
template <int kN, int kK>
__global__ void __launch_bounds__(kWarpgroup, 1)
    unit_wgmma_rs_kernel(const __nv_bfloat16* a, const __nv_bfloat16* b, float* d) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  auto& shared = *reinterpret_cast<TileOf<__nv_bfloat16, kK, kN>*>(shared_memory);
  for (int i = threadIdx.x; i < kK * kN; i += kWarpgroup) {
    store_for_async(shared.bytes + tile_offset(i / kN, i % kN, kK), b[i]);
  }
  fence_async();
  meet(1, kWarpgroup);
  uint32_t operand[kK / 16][4];
  for (int step = 0; step < kK / 16; ++step) {
    for (int reg = 0; reg < 4; ++reg) {
      const int row = operand_row(threadIdx.x, reg), col = step * 16 + operand_col(threadIdx.x, reg, 0);
      operand[step][reg] =
          pack<__nv_bfloat16>(static_cast<float>(a[row * kK + col]), static_cast<float>(a[row * kK + col + 1]));
    }
  }
  float acc[kN / 2] = {};
  wgmma_begin();
  issue_ab<__nv_bfloat16, kK>(acc, operand, shared.address());
  wgmma_wait<0>();
  for (int i = 0; i < kN / 2; ++i) {
    d[accumulator_row(threadIdx.x, i) * kN + accumulator_col(threadIdx.x, i)] = acc[i];
  }
}

// A producer warp and two warpgroups, with shares of registers, pass `count` numbers through two stages: out[i] gets
// 3 in[i] from each. Named barriers order the two additions.
struct PipeShared {
  alignas(16) float stage[2][4];
  Pipe<2> pipe;
};

__global__ void __launch_bounds__(3 * kWarpgroup, 1) unit_pipe_kernel(const float* in, float* out, int count) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  auto& shared = *reinterpret_cast<PipeShared*>(shared_memory);
  if (threadIdx.x == 0) {
    shared.pipe.init(2);
    Barrier::publish();
  }
  __syncthreads();
  split_roles<24, 240>(
      [&] {
        Ring<2> ring;
        for (int i = 0; i < count; i += 4) {
#ifndef PLANT_NO_EMPTY
          shared.pipe.wait_empty(ring);
#endif
          if (threadIdx.x == 0) {
            shared.pipe.full[ring.stage].arrive_expecting(16);
            bulk_load(shared.stage[ring.stage], in + i, 16, shared.pipe.full[ring.stage]);
          }
          ring.next();
        }
      },
      [&](int group) {
        Ring<2> ring;
        for (int i = 0; i < count; i += 4) {
          shared.pipe.wait_full(ring);
          const float value = shared.stage[ring.stage][threadIdx.x % 4];
          shared.pipe.release(ring.stage);
          ring.next();
          if (group == 1) {
            meet(2, 2 * kWarpgroup);
          }
          if (threadIdx.x % kWarpgroup < 4) {
            out[i + threadIdx.x % 4] += 3.f * value;
          }
          if (group == 0) {
            meet(2, 2 * kWarpgroup);
          }
          meet(3, 2 * kWarpgroup);
        }
      });
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) int unit_tma(void* from, void* to, uint16_t* dump, int batch, int heads,
                                                    int rows, int at_row, int at_head, int at_batch) {
  const auto tensor = [&](void* data) {  // (batch, rows, heads, 128) as (batch, heads, rows, 128)
    return HeadTensor{data, int64_t{rows} * heads * 128, 128, int64_t{heads} * 128};
  };
  CUtensorMap from_map, to_map;
  for (const auto& [map, data] : {std::pair{&from_map, from}, std::pair{&to_map, to}}) {
    if (const auto error = make_map(map, DType::kBFloat16, tensor(data), batch, heads, rows, 128, kRows)) {
      return error;
    }
  }
  const Coordinates at{0, at_row, at_head, at_batch};
  unit_tma_kernel<<<1, kWarpgroup, sizeof(TmaShared), nullptr>>>(from_map, to_map, at, dump);
  return cudaGetLastError();
}

__attribute__((visibility("default"))) int unit_wgmma(const __nv_bfloat16* a, const __nv_bfloat16* b, float* d, int n,
                                                      int k, bool a_in_registers) {
  const auto run = [&](auto size_n, auto size_k) {
    constexpr int kN = size_n, kK = size_k;
    const auto ss = unit_wgmma_ss_kernel<kN, kK>;
    const auto rs = unit_wgmma_rs_kernel<kN, kK>;
    const auto kernel = a_in_registers ? rs : ss;
    constexpr int kShared = (64 + kN) * kK * 2;
    if (const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared)) {
      return static_cast<int>(error);
    }
    kernel<<<1, kWarpgroup, kShared, nullptr>>>(a, b, d);
    return static_cast<int>(cudaGetLastError());
  };
  const std::integral_constant<int, 64> small;
  const std::integral_constant<int, 128> large;
  return n == 64 ? (k == 64 ? run(small, small) : run(small, large)) : k == 64 ? run(large, small) : run(large, large);
}

__attribute__((visibility("default"))) int unit_pipe(const float* in, float* out, int count) {
  unit_pipe_kernel<<<1, 3 * kWarpgroup, sizeof(PipeShared), nullptr>>>(in, out, count);
  return cudaGetLastError();
}

// The index functions themselves, for the models of the tests: what they give for one argument
__attribute__((visibility("default"))) void unit_index(int thread, int i, int* out) {
  out[0] = accumulator_row(thread, i);
  out[1] = accumulator_col(thread, i);
  out[2] = operand_row(thread, i);
  out[3] = operand_col(thread, i, 0);
  out[4] = operand_col(thread, i, 1);
}
__attribute__((visibility("default"))) int unit_tile_offset(int row, int col, int rows) {
  return tile_offset(row, col, rows);
}
__attribute__((visibility("default"))) uint64_t unit_descriptor(bool k_is_inner, uint32_t tile, int rows, int step) {
  return k_is_inner ? k_major(tile, rows, step) : mn_major(tile, rows, step);
}

// The tiles of a call in the order of work: shape = (batch, n_heads, n_kv_heads, seqlen_q, seqlen_k, left, right,
// top_left), out per tile = (batch, head, row, begin, full_begin, full_end, end). Returns how many there are.
__attribute__((visibility("default"))) int unit_tiles(const int* shape, bool of_keys, int head_dim, int* out,
                                                      int room) {
  const AttentionShape s{nullptr,  nullptr,  nullptr,  shape[0], shape[1],     shape[2],
                         shape[3], shape[4], shape[5], shape[6], shape[7] != 0};
  const TileOrder order = of_keys ? key_order(s, 128, head_dim) : query_order(s, 128, head_dim);
  for (int64_t index = 0; index < std::min<int64_t>(order.count(), room); ++index) {
    const auto write = [&](int batch, int head, int row, const Blocks& b) {
      const int values[] = {batch, head, row, b.begin, b.full_begin, b.full_end, b.end};
      std::copy(values, values + 7, out + 7 * index);
    };
    if (of_keys) {
      const KeyTile<128, 64> tile(s, order, index);
      write(tile.batch, tile.kv_head, tile.row, tile.queries);
    } else {
      const QueryTile<128, 128> tile(s, order, index);
      write(tile.batch, tile.head, tile.row, tile.keys);
    }
  }
  return static_cast<int>(order.count());
}
}
