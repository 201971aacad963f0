// Rotary position embedding:  y1 = x1 * cos - x2 * sin,  y2 = x2 * cos + x1 * sin,  over the pairs of the first
// rotary_dim channels. The other channels are copied. The backward is the same with -sin. The tables may have a number
// for each channel: then cos and sin are cos1 and sin1 in y1, cos2 and sin2 in y2, and the backward has -sin2 and
// -sin1.
//
// The threads of a token (threadIdx.x) own eight pairs each, in two groups of eight channels. The groups are rotary_dim
// / 2 apart if half-split, and adjacent if interleaved. A thread loads its part of the tables once and loops over the
// heads of q, or of k, kHeads at a time. All loads of these heads are issued before the first value is used. Tokens are
// threadIdx.y and blockIdx.x; blockIdx.y divides the heads if tokens alone do not fill the GPU. A position outside the
// tables gives NaN. Limits: fewer than 2^31 tokens.
// Reference: fastattn.reference.rotary_embedding
#include "common.cuh"

namespace fastattn {
namespace {

constexpr int kRotaryThreads = 128;
constexpr int kBlocksWanted = 2048;  // several for each multiprocessor of the largest GPUs
constexpr int kMaxLanes = 32;

// Eight values as fp32, of which the first n exist. Loads take 16 bytes if `aligned`, which requires n >= 8 or n <= 0.
template <typename T>
struct Group {
  T value[kGroup];

  __device__ __forceinline__ void load(const T* p, int n, bool aligned) {
    if (aligned) {
      if (n > 0) {
        uint4 raw[sizeof(value) / 16];
#pragma unroll
        for (int i = 0; i < sizeof(value) / 16; ++i) {
          raw[i] = reinterpret_cast<const uint4*>(p)[i];
        }
        memcpy(value, raw, sizeof(value));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        if (i < n) {
          value[i] = p[i];
        }
      }
    }
  }

  __device__ __forceinline__ void store(T* p, int n, bool aligned) const {
    if (aligned) {
      if (n > 0) {
        uint4 raw[sizeof(value) / 16];
        memcpy(raw, value, sizeof(value));
#pragma unroll
        for (int i = 0; i < sizeof(value) / 16; ++i) {
          reinterpret_cast<uint4*>(p)[i] = raw[i];
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        if (i < n) {
          p[i] = value[i];
        }
      }
    }
  }
};

__device__ __forceinline__ int64_t position_of(const RotaryArgs& args, int64_t batch, int64_t token) {
  if (args.positions == nullptr) {
    return args.offset + token;
  }
  const int64_t at = batch * args.positions_batch + token;
  return args.wide_positions ? static_cast<const int64_t*>(args.positions)[at]
                             : static_cast<const int32_t*>(args.positions)[at];
}

// Eight numbers of a table, of which the first n exist, `step` apart.
template <typename W>
__device__ __forceinline__ Group<W> load_numbers(const W* table, int n, int step, bool aligned) {
  Group<W> numbers;
  if (step == 1) {
    numbers.load(table, n, aligned);
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      numbers.value[i] = table[(i < n ? i : 0) * step];
    }
  }
  return numbers;
}

// kNumbers: of each pair in a row of a table. Blocks with blockIdx.y >= q_blocks process the heads of k.
template <typename T, typename W, int kHeads, bool kInterleaved, int kNumbers>
__global__ void __launch_bounds__(kRotaryThreads) rotary_kernel(RotaryArgs args, int q_blocks, bool aligned) {
  const unsigned index = blockIdx.x * blockDim.y + threadIdx.y;
  const unsigned seqlen = static_cast<unsigned>(args.seqlen);
  const int64_t batch = index / seqlen;
  const int64_t token = index % seqlen;
  if (batch >= args.batch) {
    return;
  }
  const bool is_k = blockIdx.y >= q_blocks;
  const HeadTensor& in = is_k ? args.x[1] : args.x[0];
  const HeadTensor& to = is_k ? args.out[1] : args.out[0];
  const int heads = static_cast<int>(is_k ? args.n_heads[1] : args.n_heads[0]);
  const int first_head = (blockIdx.y - (is_k ? q_blocks : 0)) * kHeads;
  const int head_step = (is_k ? gridDim.y - q_blocks : q_blocks) * kHeads;
  const T* x = static_cast<const T*>(in.data) + batch * in.batch + token * in.row;
  T* out = static_cast<T*>(to.data) + batch * to.batch + token * to.row;

  const int64_t position = position_of(args, batch, token);
  const bool inside = position >= 0 && position < args.table_rows;
  const int64_t row = batch * args.table_batch + position * args.table_row;
  const int half = static_cast<int>(args.rotary_dim / 2);
  const int step = static_cast<int>(args.table_step), second = static_cast<int>(args.table_second);
  for (int pair = threadIdx.x * kGroup; pair < half; pair += blockDim.x * kGroup) {
    // The rows of the tables for these pairs are kept for all heads.
    const int n = half - pair;
    float c[kNumbers][kGroup], s[kNumbers][kGroup];  // with two numbers, those of the first and the second channels
#pragma unroll
    for (int which = 0; which < kNumbers; ++which) {
      const int at = pair * step + which * second;
      const int sin_at = pair * step + (args.conjugate ? kNumbers - 1 - which : which) * second;
      Group<W> cos, sin;
      if (inside) {
        cos = load_numbers(static_cast<const W*>(args.cos) + row + at, n, step, aligned);
        sin = load_numbers(static_cast<const W*>(args.sin) + row + sin_at, n, step, aligned);
      }
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        c[which][i] = inside ? static_cast<float>(cos.value[i]) : NAN;
        s[which][i] = inside ? static_cast<float>(sin.value[i]) : NAN;
        s[which][i] = args.conjugate ? -s[which][i] : s[which][i];
      }
    }
    const int col_a = kInterleaved ? 2 * pair : pair;
    const int col_b = kInterleaved ? 2 * pair + kGroup : half + pair;
    const int n_a = kInterleaved ? 2 * n : n;
    const int n_b = kInterleaved ? 2 * n - kGroup : n;

    for (int head = first_head; head < heads; head += head_step) {
      Group<T> a[kHeads], b[kHeads];
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        if (head + h < heads) {
          const T* from = x + (head + h) * in.head;
          a[h].load(from + col_a, n_a, aligned);
          b[h].load(from + col_b, n_b, aligned);
        }
      }
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        if (head + h < heads) {
#pragma unroll
          for (int i = 0; i < kGroup; ++i) {
            T& first = !kInterleaved ? a[h].value[i] : i < 4 ? a[h].value[2 * i] : b[h].value[2 * i - 8];
            T& second = !kInterleaved ? b[h].value[i] : i < 4 ? a[h].value[2 * i + 1] : b[h].value[2 * i - 7];
            const float x1 = static_cast<float>(first);
            const float x2 = static_cast<float>(second);
            first = static_cast<T>(x1 * c[0][i] - x2 * s[0][i]);
            second = static_cast<T>(x2 * c[kNumbers - 1][i] + x1 * s[kNumbers - 1][i]);
          }
          T* target = out + (head + h) * to.head;
          a[h].store(target + col_a, n_a, aligned);
          b[h].store(target + col_b, n_b, aligned);
        }
      }
    }
  }

  // These channels are not rotated.
  const int head_dim = static_cast<int>(args.head_dim);
  for (int col = 2 * half + threadIdx.x * kGroup; col < head_dim; col += blockDim.x * kGroup) {
    for (int head = first_head; head < heads; head += head_step) {
      Group<T> rest[kHeads];
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        rest[h].load(x + (head + h) * in.head + col, head + h < heads ? head_dim - col : 0, aligned);
      }
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        rest[h].store(out + (head + h) * to.head + col, head + h < heads ? head_dim - col : 0, aligned);
      }
    }
  }
}

template <typename T, typename W, int kNumbers>
void launch_rotary(RotaryArgs args, bool aligned, cudaStream_t stream) {
  constexpr int kHeads = sizeof(T) == 2 && kNumbers == 1 ? 4 : 2;
  if (args.out[0].data == args.x[0].data) {
    args.head_dim = args.rotary_dim;  // in place, the other channels need no copy
  }
  const int64_t widest = std::max(args.rotary_dim / 2, args.head_dim - args.rotary_dim);
  const int lanes = static_cast<int>(std::min<int64_t>(blocks(widest, kGroup), kMaxLanes));
  const dim3 block(lanes, kRotaryThreads / lanes);
  const unsigned token_blocks = blocks(args.batch * args.seqlen, block.y);
  // The largest number of blocks that share the heads of a token.
  const unsigned most = blocks(kBlocksWanted, token_blocks);
  const unsigned q_blocks = std::min(blocks(args.n_heads[0], kHeads), most);
  const dim3 grid(token_blocks, q_blocks + std::min(blocks(args.n_heads[1], kHeads), most));
  const auto kernel =
      args.interleaved ? rotary_kernel<T, W, kHeads, true, kNumbers> : rotary_kernel<T, W, kHeads, false, kNumbers>;
  kernel<<<grid, block, 0, stream>>>(args, q_blocks, aligned);
}

}  // namespace

int rotary_fwd_cuda(const RotaryArgs& args, void* stream) {
  bool aligned = is_aligned({}, {args.rotary_dim / 2, args.head_dim}) &&
                 (args.table_step != 1 || is_aligned({args.cos, args.sin}, {args.table_row, args.table_batch}));
  for (const HeadTensor* t : {&args.x[0], &args.x[1], &args.out[0], &args.out[1]}) {
    aligned = aligned && is_aligned({t->data}, {t->batch, t->head, t->row});
  }
  with_common_types(args.dtype, args.table_dtype, [&](auto x, auto table) {
    const auto launch = args.table_second ? launch_rotary<decltype(x), decltype(table), 2>
                                          : launch_rotary<decltype(x), decltype(table), 1>;
    launch(args, aligned, static_cast<cudaStream_t>(stream));
  });
  return cudaGetLastError();
}

}  // namespace fastattn
