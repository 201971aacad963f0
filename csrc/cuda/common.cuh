#pragma once
// Shared by the CUDA kernels that work on rows. A thread owns groups of eight consecutive columns: one 16-byte vector
// in half precision, two in fp32, and one Philox call. The threads of a row are threadIdx.x, and the rows are
// threadIdx.y. Because no torch header is included, a file compiles in seconds instead of a minute.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "api.h"
#include "philox.h"

namespace fastattn {
namespace {

constexpr int kGroup = 8;
constexpr int kMaxThreads = 512;

// Replaces the type of a tensor whose dtype is known only at run time.
struct Dynamic {};

// The first column of group `g` of this thread, in a tile that begins at column `start`.
__device__ __forceinline__ int first_col(int start, int g) {
  return start + (g * blockDim.x + threadIdx.x) * kGroup;
}

// The groups of this thread in a row of a tensor, as fp32, with zeros from column `cols` on. All loads are issued
// before the first value is used; they are 16 bytes wide if `aligned`.
template <typename T, int kGroups>
__device__ __forceinline__ void load_groups(float (&value)[kGroups][kGroup], const void* tensor, DType dtype,
                                            int64_t offset, int cols, int start, bool aligned) {
  if constexpr (std::is_same_v<T, Dynamic>) {  // all threads take the same branch
    if (dtype == DType::kFloat32) {
      load_groups<float>(value, tensor, dtype, offset, cols, start, aligned);
    } else if (dtype == DType::kBFloat16) {
      load_groups<__nv_bfloat16>(value, tensor, dtype, offset, cols, start, aligned);
    } else {
      load_groups<__half>(value, tensor, dtype, offset, cols, start, aligned);
    }
  } else {
    const T* row = static_cast<const T*>(tensor) + offset;
    constexpr int kVectors = kGroup * sizeof(T) / 16;
    if (aligned) {
      uint4 raw[kGroups][kVectors] = {};
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const int col = first_col(start, g);
        if (col < cols) {
#pragma unroll
          for (int i = 0; i < kVectors; ++i) {
            raw[g][i] = reinterpret_cast<const uint4*>(row + col)[i];
          }
        }
      }
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        T group[kGroup];
        memcpy(group, raw[g], sizeof(group));
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          value[g][i] = static_cast<float>(group[i]);
        }
      }
    } else {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const T* group = row + first_col(start, g);
        const int left = cols - first_col(start, g);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          value[g][i] = i < left ? static_cast<float>(group[i]) : 0.f;
        }
      }
    }
  }
}

template <typename T, int kGroups>
__device__ __forceinline__ void store_groups(const float (&value)[kGroups][kGroup], void* tensor, DType dtype,
                                             int64_t offset, int cols, int start, bool aligned) {
  if constexpr (std::is_same_v<T, Dynamic>) {
    if (dtype == DType::kFloat32) {
      store_groups<float>(value, tensor, dtype, offset, cols, start, aligned);
    } else if (dtype == DType::kBFloat16) {
      store_groups<__nv_bfloat16>(value, tensor, dtype, offset, cols, start, aligned);
    } else {
      store_groups<__half>(value, tensor, dtype, offset, cols, start, aligned);
    }
  } else {
    T* row = static_cast<T*>(tensor) + offset;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int col = first_col(start, g);
      T group[kGroup];
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        group[i] = static_cast<T>(value[g][i]);
      }
      if (aligned) {
        uint4 raw[kGroup * sizeof(T) / 16];
        memcpy(raw, group, sizeof(raw));
        if (col < cols) {
#pragma unroll
          for (int i = 0; i < sizeof(raw) / 16; ++i) {
            reinterpret_cast<uint4*>(row + col)[i] = raw[i];
          }
        }
      } else {
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          if (col + i < cols) {
            row[col + i] = group[i];
          }
        }
      }
    }
  }
}

// Stores one value of a tensor whose dtype is known only at run time.
__device__ __forceinline__ void store_value(void* tensor, DType dtype, int64_t index, float value) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(tensor)[index] = value;
  } else if (dtype == DType::kBFloat16) {
    static_cast<__nv_bfloat16*>(tensor)[index] = static_cast<__nv_bfloat16>(value);
  } else {
    static_cast<__half*>(tensor)[index] = static_cast<__half>(value);
  }
}

// Returns the value that a store and a load would give.
template <typename T>
__device__ __forceinline__ float rounded(float value, DType dtype) {
  if constexpr (std::is_same_v<T, Dynamic>) {
    return dtype == DType::kFloat32    ? value
           : dtype == DType::kBFloat16 ? rounded<__nv_bfloat16>(value, dtype)
                                       : rounded<__half>(value, dtype);
  } else {
    return static_cast<float>(static_cast<T>(value));
  }
}

// Dropout by position. (seed, offset) are read on the device, so every replay of a CUDA graph draws new numbers.
class DropoutMask {
 public:
  __device__ explicit DropoutMask(const Dropout& dropout) : dropout_(dropout) {
    if (dropout.rng != nullptr) {
      seed_ = static_cast<uint64_t>(dropout.rng[0]);
      offset_ = static_cast<uint32_t>(dropout.rng[1]);
    }
  }

  // value = keep * scale * value for the eight columns from `col` on.
  __device__ __forceinline__ void apply(float (&value)[kGroup], int64_t row, int col) const {
    if (dropout_.rng == nullptr) {
      return;
    }
    const Philox4 counter = {
        {static_cast<uint32_t>(col / kGroup), static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32), offset_}};
    const Philox4 random = philox4x32_10(counter, static_cast<uint32_t>(seed_), static_cast<uint32_t>(seed_ >> 32));
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const uint32_t halfword = i % 2 ? random.word[i / 2] >> 16 : random.word[i / 2] & 0xffffu;
      value[i] = halfword >= dropout_.threshold ? value[i] * dropout_.scale : 0.f;
    }
  }

 private:
  const Dropout& dropout_;
  uint64_t seed_ = 0;
  uint32_t offset_ = 0;
};

// Sums over the threads of a row; every thread gets the sums. All threads of the block must call this.
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

// Returns the threads for rows of `cols` columns with `groups` groups per thread: whole warps, or a power of two within
// a warp.
inline dim3 row_block(int64_t cols, int groups, int threads, int max_lanes = kMaxThreads) {
  const int64_t wanted = (cols + kGroup * groups - 1) / (kGroup * groups);
  int lanes = 8;
  while (lanes < 32 && lanes < wanted) {
    lanes *= 2;
  }
  if (wanted > 32) {
    lanes = static_cast<int>(std::min<int64_t>((wanted + 31) / 32 * 32, max_lanes));
  }
  return dim3(lanes, std::max(1, threads / lanes));
}

inline bool is_aligned(std::initializer_list<const void*> pointers, std::initializer_list<int64_t> sizes) {
  return std::all_of(pointers.begin(), pointers.end(),
                     [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }) &&
         std::all_of(sizes.begin(), sizes.end(), [](int64_t size) { return size % kGroup == 0; });
}

inline unsigned blocks(int64_t count, unsigned per_block) {
  return static_cast<unsigned>((count + per_block - 1) / per_block);
}

// True for the pairs of dtypes that models use: one dtype, or an fp32 residual with half precision.
inline bool is_common(DType x, DType r) {
  return x == r || r == DType::kFloat32;
}

// Calls body(x, r) with values of the C++ types of such a pair.
template <typename Body>
void with_common_types(DType x, DType r, Body body) {
  const auto with_half = [&](auto half) {
    if (r == DType::kFloat32) {
      body(half, 0.f);
    } else {
      body(half, half);
    }
  };
  if (x == DType::kFloat32) {
    body(0.f, 0.f);
  } else if (x == DType::kBFloat16) {
    with_half(__nv_bfloat16());
  } else {
    with_half(__half());
  }
}

}  // namespace
}  // namespace fastattn
