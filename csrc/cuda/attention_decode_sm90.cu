// Attention of a few queries on a cache, for Hopper. Head dims 64, 96, 128, 192 and 256 in half precision are
// supported; the cache is contiguous or consists of pages of whole blocks of keys. Triton serves everything else.
//
//   s = c q·k with c = scale * log2(e), -inf where hidden;  per split n of the keys: o_n, m_n, l_n as in the forward
//   m = max m_n,  l = sum_n exp2(m_n - m) l_n,  out = sum_n exp2(m_n - m) o_n / l,  lse = (m + log2 l) / log2(e)
//
// The cache is far larger than all other data. It is read once, by the copy engine, with as many bytes in flight as
// shared memory holds. A block of threads has a split of the keys of one sequence and key head, and up to 64 rows: the
// queries of the heads that share the key head. One warpgroup computes, and one more warp loads. Up to head dim 128,
// two blocks share a multiprocessor. The tensor cores are mostly idle, so products and softmax need not overlap. The
// kernels that combine the splits and append new keys are in attention_decode_passes_sm90.cu.
// Reference: Dao et al., "Flash-Decoding for long-context inference", 2023.
#include "cuda/sm90/attention_common.cuh"
#include "cuda/sm90/attention_host.h"

namespace fastattn {
namespace {

using namespace sm90;

constexpr int kKeys = kDecodeKeysSm90;  // keys of a block
constexpr int kSplitThreads = kWarpgroup + 32;
constexpr int kMostSplits = 128;

template <int kHeadDim>
struct SplitConfig {
  static constexpr int kBlocks = kHeadDim <= 128 ? 2 : 1;  // blocks that share a multiprocessor
  static constexpr int kStages = kHeadDim == 64 ? 6 : kHeadDim == 96 || kHeadDim == 192 ? 4 : 3;
};

template <typename T, int kHeadDim>
struct SplitShared {
  static constexpr int kStages = SplitConfig<kHeadDim>::kStages;
  TileOf<T, kSlab, kHeadDim> q;
  TileOf<T, kKeys, kHeadDim> k[kStages], v[kStages];
  Pipe<kStages> k_pipe, v_pipe;
  Barrier v_arrived;  // for a block of values that must be cleared
};

struct SplitArgs {
  CUtensorMap k_map, v_map;
  DecodeShape shape;
  // The pages of all sequences; those of two sequences are pages_stride apart. If null, the page of a sequence is its
  // index.
  const int32_t* pages;
  int64_t pages_stride;
  int blocks_per_page;
  HeadTensor q, out;
  float *lse, *partial, *partial_max, *partial_sum;
  float scale_log2;  // always positive
  bool negative;     // scale is negative
};

using SplitTile = DecodeTile<kSlab, kKeys>;

// Executed by one warp.
template <typename T, int kHeadDim>
__device__ __forceinline__ void split_produce(SplitShared<T, kHeadDim>& shared, const SplitArgs& args,
                                              const SplitTile& tile) {
  const int lane = threadIdx.x % 32;
  Ring<shared.kStages> ring;  // one ring for keys and values
  // Lane i holds the page of block i of a group of 32 blocks.
  int pages = 0;
#pragma unroll 1
  for (int n = tile.keys.begin; n < tile.keys.end; ++n) {
    const int next = (n - tile.keys.begin) % 32;
    if (next == 0) {
      pages = tile.batch;
      if (args.pages != nullptr && n + lane < tile.keys.end) {
        pages = args.pages[tile.batch * args.pages_stride + (n + lane) / args.blocks_per_page];
      }
    }
    const int page = __shfl_sync(0xffffffffu, pages, next), row = n % args.blocks_per_page * kKeys;
    const int stage = ring.stage, valid = tile.band.length - n * kKeys;
    shared.k_pipe.wait_empty(ring);
    if (lane == 0) {
      shared.k_pipe.full[stage].arrive_expecting(shared.k[stage].kBytes);
      shared.k[stage].load(args.k_map, row, tile.kv_head, page, shared.k_pipe.full[stage]);
    }
    shared.v_pipe.wait_empty(ring);
    auto& v = shared.v[stage];
    Barrier& full = shared.v_pipe.full[stage];
    if (lane == 0) {
      Barrier& arrived = valid < kKeys ? shared.v_arrived : full;
      arrived.arrive_expecting(v.kBytes);
      v.load(args.v_map, row, tile.kv_head, page, arrived);
    }
    // This is the last block of the sequence, and the memory after it was never written.
    if (valid < kKeys) {
      shared.v_arrived.wait(0);
      v.clear_from(valid);
      fence_async();
      arrive_warp(full);
    }
    ring.next();
  }
}

// Executed by one warpgroup.
template <typename T, int kHeadDim>
__device__ __forceinline__ void split_consume(SplitShared<T, kHeadDim>& shared, const SplitArgs& args,
                                              const SplitTile& tile, int split) {
  const int thread = threadIdx.x;
  const DecodeShape& shape = args.shape;
  const int group = shape.group(), first_head = tile.kv_head * group;
#pragma unroll 4
  for (int chunk = thread; chunk < kSlab * kHeadDim / 8; chunk += kWarpgroup) {
    const int row = chunk / (kHeadDim / 8), col = chunk % (kHeadDim / 8) * 8, place = tile.row + row;
    uint4 words{0, 0, 0, 0};
    if (place < shape.rows()) {
      const T* from = static_cast<const T*>(args.q.data) + tile.batch * args.q.batch +
                      (first_head + place % group) * args.q.head + place / group * args.q.row;
      words = *reinterpret_cast<const uint4*>(from + col);
    }
    store_for_async(shared.q.bytes + tile_offset<panel_cols(kHeadDim)>(row, col, kSlab), words);
  }
  fence_async();
  meet(1, kWarpgroup);

  int query[2];  // the queries of the two rows of this thread
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    query[r] = (tile.row + accumulator_row(thread, 2 * r)) / group;
  }
  float o[kHeadDim / 2] = {};
  float row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {}, shrink[2];
  Ring<shared.kStages> ring;
#pragma unroll 1
  for (int n = tile.keys.begin; n < tile.keys.end; ++n) {
    float s[kKeys / 2];
    uint32_t p[kKeys / 16][4];
    shared.k_pipe.wait_full(ring);
    wgmma_begin();
    issue_abt<T, kHeadDim, kSlab, kKeys>(s, shared.q.address(), shared.k[ring.stage].address());
    wgmma_wait<0>();
    shared.k_pipe.release(ring.stage);
#pragma unroll
    for (float& score : s) {
      score = args.negative ? -score : score;
    }
    mask_rows(s, tile.band, [&](int r) { return query[r]; }, n * kKeys, -INFINITY);
    softmax_step<true>(s, row_max, row_sum, shrink, args.scale_log2);
    to_operand<T>(p, s);
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) {
      o[i] *= shrink[row_of(i)];
    }
    shared.v_pipe.wait_full(ring);
    wgmma_begin();
    issue_ab<T, kKeys>(o, p, shared.v[ring.stage].address());
    wgmma_wait<0>();
    shared.v_pipe.release(ring.stage);
    ring.next();
  }

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float total = row_total(row_sum[r]);
    const int place = tile.row + accumulator_row(thread, 2 * r), head = first_head + place % group;
    if (place >= shape.rows()) {
      continue;
    }
    const float shift = row_max[r] * args.scale_log2;
    const int64_t number = (int64_t{tile.batch} * shape.n_heads + head) * shape.seqlen_q + query[r];
    const int64_t part = split * (int64_t{shape.batch} * shape.n_heads * shape.seqlen_q) + number;
    const bool whole = shape.splits == 1;
    const float factor = !whole ? 1.f : total == 0.f ? 0.f : 1.f / total;
    if (thread % 4 == 0) {
      if (whole) {
        args.lse[part] = total == 0.f ? -INFINITY : shift * kLn2 + logf(total);
      } else {
        args.partial_max[part] = shift;
        args.partial_sum[part] = total;
      }
    }
    float* to_part = args.partial + part * kHeadDim;
    T* to =
        static_cast<T*>(args.out.data) + tile.batch * args.out.batch + head * args.out.head + query[r] * args.out.row;
#pragma unroll
    for (int i = 2 * r; i < kHeadDim / 2; i += 4) {
      const int col = accumulator_col(thread, i);
      if (whole) {
        *reinterpret_cast<uint32_t*>(to + col) = pack<T>(o[i] * factor, o[i + 1] * factor);
      } else {
        *reinterpret_cast<float2*>(to_part + col) = make_float2(o[i] * factor, o[i + 1] * factor);
      }
    }
  }
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kSplitThreads, SplitConfig<kHeadDim>::kBlocks)
    attention_decode_sm90_kernel(const __grid_constant__ SplitArgs args) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  auto& shared = *reinterpret_cast<SplitShared<T, kHeadDim>*>(shared_memory);
  if (threadIdx.x == 0) {
    prefetch_maps(args.k_map, args.v_map);
    shared.k_pipe.init(1);
    shared.v_pipe.init(1);
    shared.v_arrived.init(1);
    Barrier::publish();
  }
  __syncthreads();
  const SplitTile tile(args.shape, blockIdx.x, blockIdx.y);
  if (threadIdx.x < kWarpgroup) {
    split_consume<T, kHeadDim>(shared, args, tile, blockIdx.y);
  } else {
    split_produce<T, kHeadDim>(shared, args, tile);
  }
}

// ---- launchers

DecodeShape decode_shape(const DecodeCudaArgs& in) {
  return {in.cache_seqlens,
          static_cast<int>(in.batch),
          static_cast<int>(in.n_heads),
          static_cast<int>(in.n_kv_heads),
          static_cast<int>(in.seqlen_q),
          static_cast<int>(in.seqlen_new),
          static_cast<int>(in.page_size * in.pages),
          window_side(in.window_left),
          window_side(in.window_right),
          static_cast<int>(in.splits)};
}

int64_t tiles_of(const DecodeShape& shape) {
  return int64_t{shape.batch} * shape.n_kv_heads * SplitTile::row_blocks(shape);
}

template <typename T, int kHeadDim>
cudaError_t launch_split(const DecodeCudaArgs& in, cudaStream_t stream) {
  SplitArgs args{};
  args.shape = decode_shape(in);
  args.pages = pages_of(in);
  args.pages_stride = in.pages;
  args.blocks_per_page = in.block_table != nullptr ? static_cast<int>(in.page_size / kKeys) : kFar;
  args.q = in.q;
  args.out = in.out;
  args.lse = in.lse;
  args.partial = in.partial;
  args.partial_max = in.partial_max;
  args.partial_sum = in.partial_sum;
  args.scale_log2 = positive_scale_log2(in.scale);
  args.negative = in.scale < 0;
  for (const auto& [map, cache] : {std::pair{&args.k_map, &in.k}, {&args.v_map, &in.v}}) {
    if (const cudaError_t error =
            make_map(map, in.dtype, *cache, in.cache_rows, in.n_kv_heads, in.page_size, in.head_dim, kKeys)) {
      return error;
    }
  }
  const auto kernel = attention_decode_sm90_kernel<T, kHeadDim>;
  constexpr int kShared = sizeof(SplitShared<T, kHeadDim>);
  // Each block reserves 1 KB more than it uses.
  static_assert(SplitConfig<kHeadDim>::kBlocks * (kShared + 1024) <= 228 * 1024);
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared)) {
    return error;
  }
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                                     cudaSharedmemCarveoutMaxShared)) {
    return error;
  }
  const dim3 grid(static_cast<unsigned>(tiles_of(args.shape)), static_cast<unsigned>(in.splits));
  kernel<<<grid, kSplitThreads, kShared, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace

int64_t attention_decode_splits_sm90(const DecodeCudaArgs& args, int64_t wanted) {
  const DecodeShape shape = decode_shape(args);
  const int64_t blocks = blocks_of(std::max(1, shape.capacity), kKeys);
  if (wanted > 0) {
    return std::min({wanted, int64_t{kMostSplits}, blocks});
  }
  const int per_multiprocessor = args.head_dim <= 128 ? SplitConfig<128>::kBlocks : SplitConfig<256>::kBlocks;
  return choose_splits(tiles_of(shape), blocks, int64_t{per_multiprocessor} * multiprocessors(), kMostSplits);
}

int attention_decode_fwd_sm90(const DecodeCudaArgs& args, void* stream_of_caller) {
  const auto stream = static_cast<cudaStream_t>(stream_of_caller);
  const int error = with_half_and_any_head_dim(
      args, [&](auto value, auto head_dim) { return launch_split<decltype(value), head_dim>(args, stream); });
  return error != cudaSuccess || args.splits == 1 ? error : attention_decode_combine_sm90(args, stream_of_caller);
}

}  // namespace fastattn
