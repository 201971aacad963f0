#pragma once
// Shared by the launchers of the attention kernels for Hopper: sizes, tensor maps and the size of the grid. Host code.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <initializer_list>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/sm90/attention_tiles.cuh"
#include "cuda/sm90/tensor_map.h"

namespace fastattn::sm90 {

inline int window_side(int64_t window) {
  return window < 0 ? kFar : static_cast<int>(std::min<int64_t>(window, kFar));
}

// Returns a positive scale, so that -inf stays -inf. If the scale is negative, the kernels negate the scores.
inline float positive_scale_log2(float scale) {
  return std::fmax(std::fabs(scale) * kLog2e, FLT_MIN);
}

inline AttentionShape attention_shape(const AttentionCudaArgs& args) {
  return {args.seqlens_k,
          args.cu_seqlens_q,
          args.cu_seqlens_k,
          static_cast<int>(args.batch),
          static_cast<int>(args.n_heads),
          static_cast<int>(args.n_kv_heads),
          static_cast<int>(args.rows_q),
          static_cast<int>(args.rows_k),
          window_side(args.window_left),
          window_side(args.window_right),
          args.top_left};
}

// Tensor maps of operands that share the sizes of a call.
class MapMaker {
 public:
  enum Side { kQueries, kKeys };
  struct Wanted {
    CUtensorMap* map;
    const HeadTensor& tensor;
    Side side;
    int box_rows;
  };

  explicit MapMaker(const AttentionCudaArgs& args) : args_(args) {}

  cudaError_t operator()(std::initializer_list<Wanted> all) const {
    const int64_t batch = args_.cu_seqlens_q != nullptr ? 1 : args_.batch;
    for (const Wanted& wanted : all) {
      const bool queries = wanted.side == kQueries;
      const cudaError_t error =
          make_map(wanted.map, args_.dtype, wanted.tensor, batch, queries ? args_.n_heads : args_.n_kv_heads,
                   queries ? args_.rows_q : args_.rows_k, args_.head_dim, wanted.box_rows);
      if (error != cudaSuccess) {
        return error;
      }
    }
    return cudaSuccess;
  }

 private:
  const AttentionCudaArgs& args_;
};

inline int multiprocessors() {
  int device = 0;
  int count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// The number of resident blocks: one per multiprocessor, or one per tile if there are fewer tiles.
inline unsigned resident_blocks(int64_t tiles) {
  return static_cast<unsigned>(std::min<int64_t>(tiles, multiprocessors()));
}

// Returns the pages of each sequence or, without pages, its row of the cache. If the result is null, the page of a
// sequence is its index.
inline const int32_t* pages_of(const DecodeCudaArgs& args) {
  return args.block_table != nullptr ? args.block_table : args.cache_batch_idx;
}

// Calls body(a value of the dtype, the head dim as a constant) for head dims 64, 96 and 128.
template <typename Args, typename Body>
cudaError_t with_half_and_head_dim(const Args& args, Body body) {
  const auto with_head_dim = [&](auto value) {
    return args.head_dim == 64   ? body(value, std::integral_constant<int, 64>())
           : args.head_dim == 96 ? body(value, std::integral_constant<int, 96>())
                                 : body(value, std::integral_constant<int, 128>());
  };
  return args.dtype == DType::kBFloat16 ? with_head_dim(__nv_bfloat16()) : with_head_dim(__half());
}

// The same, also for 192 and 256.
template <typename Args, typename Body>
cudaError_t with_half_and_any_head_dim(const Args& args, Body body) {
  const auto with_head_dim = [&](auto value) {
    return args.head_dim == 192 ? body(value, std::integral_constant<int, 192>())
                                : body(value, std::integral_constant<int, 256>());
  };
  if (args.head_dim <= 128) {
    return with_half_and_head_dim(args, body);
  }
  return args.dtype == DType::kBFloat16 ? with_head_dim(__nv_bfloat16()) : with_head_dim(__half());
}

}  // namespace fastattn::sm90
