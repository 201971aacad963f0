#pragma once
// What the CUDA kernels that work on rows share. A thread owns groups of eight consecutive columns: one 16-byte vector
// in half precision, two in float, and one Philox call. The threads of a row are threadIdx.x, rows are threadIdx.y.
// No torch header: seconds to compile, not a minute.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "api.h"
#include "philox.h"

namespace fastattn {
namespace {

constexpr int kGroup = 8;
constexpr int kMaxThreads = 512;

// Eight values as they lie in memory.
template <typename T>
struct alignas(16) Group {
  T value[kGroup];
};

// The groups threadIdx.x, threadIdx.x + blockDim.x, ... of a row from column `start` on; zero from column `cols` on.
// The loads of all groups are issued before the first is used.
template <typename T, int kGroups>
__device__ __forceinline__ void load_groups(Group<T> (&groups)[kGroups], const T* row, int cols, int start,
                                            bool aligned) {
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const int col = start + (g * blockDim.x + threadIdx.x) * kGroup;
    if (aligned) {
      uint4 raw[sizeof(Group<T>) / 16] = {};
      if (col < cols) {
#pragma unroll
        for (int i = 0; i < sizeof(raw) / 16; ++i) {
          raw[i] = reinterpret_cast<const uint4*>(row + col)[i];
        }
      }
      memcpy(&groups[g], raw, sizeof(raw));
    } else {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        groups[g].value[i] = col + i < cols ? row[col + i] : T(0.f);
      }
    }
  }
}

template <typename T>
__device__ __forceinline__ void store_group(const float (&value)[kGroup], T* row, int cols, int col, bool aligned) {
  Group<T> group;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    group.value[i] = static_cast<T>(value[i]);
  }
  if (aligned) {
    if (col < cols) {
      uint4 raw[sizeof(group) / 16];
      memcpy(raw, &group, sizeof(raw));
#pragma unroll
      for (int i = 0; i < sizeof(raw) / 16; ++i) {
        reinterpret_cast<uint4*>(row + col)[i] = raw[i];
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (col + i < cols) {
        row[col + i] = group.value[i];
      }
    }
  }
}

template <typename T, int kGroups>
__device__ __forceinline__ void load_as_float(float (&value)[kGroups][kGroup], const void* row, int cols, int start,
                                              bool aligned) {
  Group<T> groups[kGroups];
  load_groups(groups, static_cast<const T*>(row), cols, start, aligned);
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      value[g][i] = static_cast<float>(groups[g].value[i]);
    }
  }
}

// A weight or bias of any dtype. The branch is the same for all threads.
template <int kGroups>
__device__ __forceinline__ void load_parameter(float (&value)[kGroups][kGroup], const void* parameter, DType dtype,
                                               int cols, int start, bool aligned) {
  if (dtype == DType::kFloat32) {
    load_as_float<float>(value, parameter, cols, start, aligned);
  } else if (dtype == DType::kBFloat16) {
    load_as_float<__nv_bfloat16>(value, parameter, cols, start, aligned);
  } else {
    load_as_float<__half>(value, parameter, cols, start, aligned);
  }
}

// The dropout of one row; (seed, offset) are read on the device, so that a CUDA graph draws anew in every replay.
class RowDropout {
 public:
  __device__ RowDropout(const Dropout& dropout, int64_t row) : dropout_(dropout), row_(row) {
    if (dropout.rng != nullptr) {
      seed_ = static_cast<uint64_t>(dropout.rng[0]);
      offset_ = static_cast<uint32_t>(dropout.rng[1]);
    }
  }

  // value = keep * scale * value for the eight columns from `col` on
  __device__ __forceinline__ void apply(float (&value)[kGroup], int col) const {
    if (dropout_.rng == nullptr) {
      return;
    }
    const Philox4 counter = {
        {static_cast<uint32_t>(col / kGroup), static_cast<uint32_t>(row_), static_cast<uint32_t>(row_ >> 32), offset_}};
    const Philox4 random =
        philox4x32_10(counter, static_cast<uint32_t>(seed_), static_cast<uint32_t>(seed_ >> 32));
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const uint32_t halfword = i % 2 ? random.word[i / 2] >> 16 : random.word[i / 2] & 0xffffu;
      value[i] = halfword >= dropout_.threshold ? value[i] * dropout_.scale : 0.f;
    }
  }

 private:
  const Dropout& dropout_;
  int64_t row_;
  uint64_t seed_ = 0;
  uint32_t offset_ = 0;
};

// The sums over the threads of a row, in every one of them. All threads of the block must call it.
template <int kValues>
__device__ __forceinline__ void row_sum(float (&value)[kValues]) {
  const int lanes = min(blockDim.x, 32);
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      value[v] += __shfl_xor_sync(0xffffffffu, value[v], offset);
    }
  }
  if (blockDim.x <= 32) {
    return;
  }
  __shared__ float partial[kMaxThreads / 32][kValues];
  const int warps = blockDim.x / 32;
  const int first = threadIdx.y * warps;
  __syncthreads();  // the previous call may still be reading
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      partial[first + threadIdx.x / 32][v] = value[v];
    }
  }
  __syncthreads();
#pragma unroll
  for (int v = 0; v < kValues; ++v) {
    value[v] = 0.f;
    for (int warp = 0; warp < warps; ++warp) {
      value[v] += partial[first + warp][v];
    }
  }
}

// Threads for rows of `cols` columns, `groups` groups to a thread: whole warps, or a power of two within a warp.
inline dim3 row_block(int64_t cols, int groups, int threads) {
  const int64_t wanted = (cols + kGroup * groups - 1) / (kGroup * groups);
  int lanes = 8;
  while (lanes < 32 && lanes < wanted) {
    lanes *= 2;
  }
  if (wanted > 32) {
    lanes = static_cast<int>(std::min<int64_t>((wanted + 31) / 32 * 32, kMaxThreads));
  }
  return dim3(lanes, std::max(1, threads / lanes));
}

inline bool is_aligned(std::initializer_list<const void*> pointers, std::initializer_list<int64_t> sizes) {
  return std::all_of(pointers.begin(), pointers.end(),
                     [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }) &&
         std::all_of(sizes.begin(), sizes.end(), [](int64_t size) { return size % kGroup == 0; });
}

// Call `body` with a value of the C++ type of `dtype`.
template <typename Body>
int with_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float());
    case DType::kBFloat16:
      return body(__nv_bfloat16());
    default:
      return body(__half());
  }
}

}  // namespace
}  // namespace fastattn
