// One kernel per building block of csrc/cuda/sm90, to be tested on hardware before the attention kernels.
// tests/kernels/test_sm90_units.py calls them through ctypes with plain pointers, on a GPU or in the emulation.
#include <cstring>

#include "cuda/sm90/attention_common.cuh"
#include "cuda/sm90/attention_host.h"
#include "sm90_indices.h"

using namespace fastattn;
using namespace fastattn::sm90;

namespace {

// A fault that the emulation must find. A GPU's library has none.
enum Plant {
  PLANT_NOTHING,
  PLANT_NO_FENCE,
  PLANT_WRITE_IN_FLIGHT,
  PLANT_USE_BEFORE_WAIT,
  PLANT_OPERAND_IN_FLIGHT,
  PLANT_PART_OF_AN_ATOM,
  PLANT_NO_READ,
  PLANT_WRITE_UNDER_COPY,
  PLANT_NO_EMPTY,
};
#ifdef __CUDACC__
__device__ constexpr bool planted(Plant) {
  return false;
}
#else
Plant the_plant = PLANT_NOTHING;
bool planted(Plant plant) {
  return the_plant == plant;
}
#endif

constexpr int kRows = 64;
template <int kHeadDim>
using UnitTile = TileOf<__nv_bfloat16, kRows, kHeadDim>;

template <int kHeadDim>
struct TmaShared {
  UnitTile<kHeadDim> tile;
  Barrier full;
};

// Copies shared memory as the copy engine fills it, and writes or adds the same tile to another tensor.
template <int kHeadDim>
__global__ void __launch_bounds__(kWarpgroup, 1)
    unit_tma_kernel(const __grid_constant__ CUtensorMap from, const __grid_constant__ CUtensorMap to, Coordinates at,
                    bool adds, uint16_t* dump) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  auto& shared = *reinterpret_cast<TmaShared<kHeadDim>*>(shared_memory);
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
    for (int col = 0; col < kHeadDim; col += panel_cols(kHeadDim)) {
      const Coordinates place{col, at.row, at.head, at.batch};
      const void* panel = shared.tile.bytes + col * 2 * kRows;
      if (adds) {
        tma_reduce_add(to, place, panel);
      } else {
        tma_store(to, place, panel);
      }
    }
    tma_stores_read();
  }
}

// out += in, 4 kWarpgroup floats, added by every block of threads
__global__ void __launch_bounds__(kWarpgroup, 1) unit_reduce_kernel(const float* in, float* out) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  auto* values = reinterpret_cast<float*>(shared_memory);
  for (int i = threadIdx.x; i < 4 * kWarpgroup; i += kWarpgroup) {
    store_for_async(values + i, in[i]);
  }
  fence_async();
  meet(1, kWarpgroup);
  if (threadIdx.x == 0) {
    bulk_reduce_add(out, values, 4 * kWarpgroup * sizeof(float));
    if (planted(PLANT_WRITE_UNDER_COPY)) {
      values[7] = 0.f;
    }
    if (!planted(PLANT_NO_READ)) {
      tma_stores_read();
    }
  }
}

// d (64, n) = a (k, 64)ᵀ * b (k, n)
template <int kN, int kK>
__global__ void __launch_bounds__(kWarpgroup, 1)
    unit_wgmma_atb_kernel(const __nv_bfloat16* a, const __nv_bfloat16* b, float* d) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  struct Shared {
    TileOf<__nv_bfloat16, kK, 64> a;
    TileOf<__nv_bfloat16, kK, kN> b;
  };
  auto& shared = *reinterpret_cast<Shared*>(shared_memory);
  for (int i = threadIdx.x; i < kK * 64; i += kWarpgroup) {
    store_for_async(shared.a.bytes + tile_offset<64>(i / 64, i % 64, kK), a[i]);
  }
  for (int i = threadIdx.x; i < kK * kN; i += kWarpgroup) {
    store_for_async(shared.b.bytes + tile_offset<panel_cols(kN)>(i / kN, i % kN, kK), b[i]);
  }
  fence_async();
  meet(1, kWarpgroup);
  float acc[kN / 2];
  wgmma_begin();
  issue_atb<__nv_bfloat16, kK>(acc, shared.a.address(), shared.b.address());
  wgmma_wait<0>();
  for (int i = 0; i < kN / 2; ++i) {
    d[accumulator_row(threadIdx.x, i) * kN + accumulator_col(threadIdx.x, i)] = acc[i];
  }
}

// d (64, n) = a (64, k) * b (n, k)ᵀ; both are written to tiles by ordinary stores
template <int kN, int kK>
__global__ void __launch_bounds__(kWarpgroup, 1)
    unit_wgmma_abt_kernel(const __nv_bfloat16* a, const __nv_bfloat16* b, float* d) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  struct Shared {
    TileOf<__nv_bfloat16, 64, kK> a;
    TileOf<__nv_bfloat16, kN, kK> b;
  };
  auto& shared = *reinterpret_cast<Shared*>(shared_memory);
  for (int i = threadIdx.x; i < 64 * kK; i += kWarpgroup) {
    store_for_async(shared.a.bytes + tile_offset<panel_cols(kK)>(i / kK, i % kK, 64), a[i]);
  }
  for (int i = threadIdx.x; i < kN * kK; i += kWarpgroup) {
    store_for_async(shared.b.bytes + tile_offset<panel_cols(kK)>(i / kK, i % kK, kN), b[i]);
  }
  if (!planted(PLANT_NO_FENCE)) {
    fence_async();
  }
  meet(1, kWarpgroup);
  float acc[kN / 2];
  wgmma_begin();
  issue_abt<__nv_bfloat16, kK, 64, kN>(acc, shared.a.address(), shared.b.address());
  if (planted(PLANT_WRITE_IN_FLIGHT)) {
    store_for_async(shared.b.bytes + threadIdx.x * 2, __nv_bfloat16(3.f));
  }
  if (planted(PLANT_USE_BEFORE_WAIT)) {
    acc[0] = 1.f;
  }
  wgmma_wait<0>();
  for (int i = 0; i < kN / 2; ++i) {
    d[accumulator_row(threadIdx.x, i) * kN + accumulator_col(threadIdx.x, i)] = acc[i];
  }
}

// d (64, n) = a (64, k) * b (k, n) with a in registers
template <int kN, int kK>
__global__ void __launch_bounds__(kWarpgroup, 1)
    unit_wgmma_ab_kernel(const __nv_bfloat16* a, const __nv_bfloat16* b, float* d) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  auto& shared = *reinterpret_cast<TileOf<__nv_bfloat16, kK, kN>*>(shared_memory);
  for (int i = threadIdx.x; i < kK * kN; i += kWarpgroup) {
    store_for_async(shared.bytes + tile_offset<panel_cols(kN)>(i / kN, i % kN, kK), b[i]);
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
  if (planted(PLANT_PART_OF_AN_ATOM)) {
    wgmma_rs<__nv_bfloat16>(acc, operand[0], mn_major<64>(shared.address(), kK, 0));
    wgmma_commit();
  }
  if (planted(PLANT_OPERAND_IN_FLIGHT)) {
    operand[0][0] = 0;
  }
  wgmma_wait<0>();
  for (int i = 0; i < kN / 2; ++i) {
    d[accumulator_row(threadIdx.x, i) * kN + accumulator_col(threadIdx.x, i)] = acc[i];
  }
}

// A producer warp and two warpgroups, with redistributed registers, pass `count` numbers through two stages. out[i]
// gets 3 in[i] from each warpgroup. Named barriers order the two additions.
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
  assign_roles<24, 240>(
      [&] {
        Ring<2> ring;
        for (int i = 0; i < count; i += 4) {
          if (!planted(PLANT_NO_EMPTY)) {
            shared.pipe.wait_empty(ring);
          }
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

// What unit_turns_kernel does wrong, to test the emulation.
enum Fault { kNone, kNoPass, kPassTwice, kTwoCounts, kNoEnd, kHalfVote, kTrap };

// Warpgroups write their numbers to `out` in turn, `rounds` times each.
template <int kGroups>
__global__ void __launch_bounds__(kGroups* kWarpgroup, 1) unit_turns_kernel(int* out, int rounds, Fault fault) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  volatile int& next = *reinterpret_cast<int*>(shared_memory);
  if (threadIdx.x == 0) {
    next = 0;
  }
  __syncthreads();
  const int group = static_cast<int>(threadIdx.x / kWarpgroup);
  const Turns<kGroups, 4> turns{group};
  turns.start();
  for (int round = 0; round < rounds; ++round) {
    turns.wait();
    const int at = next;
    if (fault != kHalfVote || threadIdx.x % 2 == 0) {
      finish_first(at < 0 || (fault == kTrap && threadIdx.x == 5));
    }
    meet(1 + group, kWarpgroup);
    if (threadIdx.x % kWarpgroup == 0) {
      out[at] = group;
      next = at + 1;
    }
    for (int times = fault == kNoPass ? 0 : fault == kPassTwice ? 2 : 1; times > 0; --times) {
      turns.pass();
    }
    if (fault == kTwoCounts) {
      arrive(4 + group, kWarpgroup);
    }
  }
  if (fault != kNoEnd) {
    turns.end();
  }
}

}  // namespace

extern "C" {

#ifndef __CUDACC__
__attribute__((visibility("default"))) void unit_plant(int plant) {
  the_plant = static_cast<Plant>(plant);
}
#endif

__attribute__((visibility("default"))) int unit_turns(int* out, int groups, int rounds, int fault) {
  const auto kernel = groups == 2 ? unit_turns_kernel<2> : unit_turns_kernel<3>;
  kernel<<<1, groups * kWarpgroup, sizeof(int), nullptr>>>(out, rounds, static_cast<Fault>(fault));
  return cudaGetLastError();
}

__attribute__((visibility("default"))) int unit_tma(void* from, void* to, bool adds, uint16_t* dump, int batch,
                                                    int heads, int rows, int head_dim, int at_row, int at_head,
                                                    int at_batch) {
  const auto tensor = [&](void* data) {  // (batch, rows, heads, head_dim) as (batch, heads, rows, head_dim)
    return HeadTensor{data, int64_t{rows} * heads * head_dim, head_dim, int64_t{heads} * head_dim};
  };
  CUtensorMap from_map, to_map;
  for (const auto& [map, data] : {std::pair{&from_map, from}, std::pair{&to_map, to}}) {
    if (const auto error = make_map(map, DType::kBFloat16, tensor(data), batch, heads, rows, head_dim, kRows)) {
      return error;
    }
  }
  const Coordinates at{0, at_row, at_head, at_batch};
  const auto kernel = head_dim == 96 ? unit_tma_kernel<96> : unit_tma_kernel<128>;
  kernel<<<1, kWarpgroup, sizeof(TmaShared<128>), nullptr>>>(from_map, to_map, at, adds, dump);
  return cudaGetLastError();
}

// Compares a map that may come from the cached ones with a newly encoded map, bit by bit. The arguments are (byte
// offset of the data, strides of batch, head and row, batch, heads, rows, head_dim, rows of a box, dtype).
__attribute__((visibility("default"))) int unit_map(char* data, const int64_t* from) {
  const HeadTensor tensor{data + from[0], from[1], from[2], from[3]};
  const auto dtype = static_cast<DType>(from[9]);
  CUtensorMap one{}, other{};
  const auto error = make_map(&one, dtype, tensor, from[4], from[5], from[6], from[7], from[8]);
  if (error != encode_map(&other, dtype, tensor, from[4], from[5], from[6], from[7], from[8])) {
    return -1;
  }
  return error != cudaSuccess ? static_cast<int>(error) : std::memcmp(&one, &other, sizeof(one)) == 0 ? 0 : -2;
}

// The products that the attention kernels use: "abt" is scores with head dim k, "ab" is values of k keys with A in
// registers, "atb" is dq of k keys.
__attribute__((visibility("default"))) int unit_wgmma(const __nv_bfloat16* a, const __nv_bfloat16* b, float* d, int n,
                                                      int k, const char* form) {
  struct Unit {
    const char* form;
    int n, k;
    void (*kernel)(const __nv_bfloat16*, const __nv_bfloat16*, float*);
  };
  const Unit units[] = {
      {"abt", 64, 64, unit_wgmma_abt_kernel<64, 64>},     {"abt", 64, 128, unit_wgmma_abt_kernel<64, 128>},
      {"abt", 64, 256, unit_wgmma_abt_kernel<64, 256>},   {"abt", 112, 192, unit_wgmma_abt_kernel<112, 192>},
      {"abt", 128, 64, unit_wgmma_abt_kernel<128, 64>},   {"abt", 128, 128, unit_wgmma_abt_kernel<128, 128>},
      {"abt", 80, 256, unit_wgmma_abt_kernel<80, 256>},   {"ab", 256, 80, unit_wgmma_ab_kernel<256, 80>},
      {"abt", 176, 128, unit_wgmma_abt_kernel<176, 128>}, {"ab", 128, 176, unit_wgmma_ab_kernel<128, 176>},
      {"abt", 64, 96, unit_wgmma_abt_kernel<64, 96>},     {"ab", 64, 64, unit_wgmma_ab_kernel<64, 64>},
      {"ab", 64, 128, unit_wgmma_ab_kernel<64, 128>},     {"ab", 128, 64, unit_wgmma_ab_kernel<128, 64>},
      {"ab", 128, 128, unit_wgmma_ab_kernel<128, 128>},   {"ab", 96, 128, unit_wgmma_ab_kernel<96, 128>},
      {"ab", 192, 112, unit_wgmma_ab_kernel<192, 112>},   {"ab", 256, 64, unit_wgmma_ab_kernel<256, 64>},
      {"atb", 64, 128, unit_wgmma_atb_kernel<64, 128>},   {"atb", 96, 128, unit_wgmma_atb_kernel<96, 128>},
  };
  for (const Unit& unit : units) {
    if (std::strcmp(unit.form, form) == 0 && unit.n == n && unit.k == k) {
      const auto kernel = unit.kernel;
      const int shared = (64 + n) * k * 2 + kAlignment;
      if (const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared)) {
        return static_cast<int>(error);
      }
      kernel<<<1, kWarpgroup, shared, nullptr>>>(a, b, d);
      return static_cast<int>(cudaGetLastError());
    }
  }
  return -1;
}

__attribute__((visibility("default"))) int unit_reduce(const float* in, float* out, int blocks) {
  unit_reduce_kernel<<<blocks, kWarpgroup, 4 * kWarpgroup * sizeof(float), nullptr>>>(in, out);
  return cudaGetLastError();
}

__attribute__((visibility("default"))) int unit_pipe(const float* in, float* out, int count) {
  unit_pipe_kernel<<<1, 3 * kWarpgroup, sizeof(PipeShared), nullptr>>>(in, out, count);
  return cudaGetLastError();
}
}
