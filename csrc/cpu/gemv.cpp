// Product of a few rows and a weight matrix that is read in place: y (m, n) = x (m, k) · weightᵀ (k, n), times a scale
// per column, plus bias, plus residual. x and y are fp32. The weight is fp32, bf16 or int8 and is widened in registers.
//
// With few rows, nearly all time is spent on reading the weight. A task owns columns of y, which are rows of the
// weight, and reads these as kStreams streams. The weight rows of a register block are a fraction of the task apart, so
// that each stream is one long sequence of addresses. If a block had neighbouring rows instead, each row would be a
// stream that ends before the hardware prefetcher has caught up: 7 to 11 GB/s instead of 19 with rows of 2 to 3 KiB on
// Zen 3.
//
// A sum is kept in kVec lanes. Each lane is a chain of at most kChain additions. The order does not depend on the
// block, the number of rows or the number of threads, so the result does not depend on them either.
#include "api.h"
#include "tile.h"

namespace fastattn {
namespace {

// The 16 registers hold kRows * kStreams accumulators, kRows vectors of x and one of the weight.
constexpr int kRows = 3;
constexpr int kStreams = 4;  // the weight rows of a block
constexpr int64_t kChain = 256;
constexpr int64_t kAhead = 512;  // bytes; this makes bf16 and int8 1.2 to 1.6 times as fast, and fp32 little faster
constexpr int64_t kLine = 64;

constexpr int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// acc[r][c] += x(r, k) * weight(c, k) for k in [k0, k1), by lanes. The weight rows are `apart` elements apart.
template <int M, int N, typename W>
[[gnu::always_inline]] inline void add_products(const float* x, int64_t x_row, const W* w, int64_t apart, int64_t k0,
                                                int64_t k1, Vec (&acc)[M][N]) {
  const auto step = [&](auto load, int64_t k) {
    Vec row[M];
#pragma GCC unroll 4
    for (int r = 0; r < M; ++r) {
      row[r] = load(x + r * x_row + k);
    }
#pragma GCC unroll 4
    for (int c = 0; c < N; ++c) {
      const Vec value = load(w + c * apart + k);
#pragma GCC unroll 4
      for (int r = 0; r < M; ++r) {
        acc[r][c] = fma(row[r], value, acc[r][c]);
      }
    }
  };
  const auto whole = [](const auto* p) { return Vec::load(p); };
  constexpr int64_t kAtOnce = kLine / sizeof(W);
  int64_t k = k0;
  for (; k + kAtOnce <= k1; k += kAtOnce) {
#pragma GCC unroll 4
    for (int c = 0; c < N; ++c) {
      __builtin_prefetch(reinterpret_cast<const char*>(w + c * apart + k) + kAhead);
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < kAtOnce; i += kVec) {
      step(whole, k + i);
    }
  }
  for (; k + kVec <= k1; k += kVec) {
    step(whole, k);
  }
  if (k < k1) {
    const int count = static_cast<int>(k1 - k);
    step([count](const auto* p) { return Vec::load(p, count); }, k);
  }
}

// The FMA is written explicitly. Otherwise, the compiler might round a product and a sum once in one block and twice in
// another.
inline void finish(const GemvArgs& args, float total, int64_t r, int64_t n) {
  const float y = __builtin_fmaf(total, args.scale ? args.scale[n] : 1.f, args.bias ? args.bias[n] : 0.f);
  args.y[r * args.y_row + n] = args.residual ? y + args.residual[r * args.residual_row + n] : y;
}

// Computes rows [r0, r0 + M) of N columns of y: n0, n0 + apart, and so on.
template <int M, int N, typename W>
void block(const GemvArgs& args, int64_t r0, int64_t n0, int64_t apart) {
  const float* x = args.x + r0 * args.x_row;
  const W* w = static_cast<const W*>(args.weight) + n0 * args.weight_row;
  float total[M][N] = {};
  for (int64_t k0 = 0; k0 < args.k; k0 += kChain * kVec) {
    Vec acc[M][N];
#pragma GCC unroll 4
    for (int r = 0; r < M; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < N; ++c) {
        acc[r][c] = Vec::fill(0.f);
      }
    }
    add_products(x, args.x_row, w, apart * args.weight_row, k0, least(args.k, k0 + kChain * kVec), acc);
#pragma GCC unroll 4
    for (int r = 0; r < M; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < N; ++c) {
        total[r][c] += acc[r][c].sum();
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < M; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < N; ++c) {
      finish(args, total[r][c], r0 + r, n0 + c * apart);
    }
  }
}

// Computes all rows of N columns, three at a time. Four remaining rows are computed as two pairs.
template <int N, typename W>
void columns(const GemvArgs& args, int64_t n0, int64_t apart) {
  int64_t r = 0;
  while (r < args.m) {
    const int64_t left = args.m - r;
    if (left == 1) {
      block<1, N, W>(args, r, n0, apart);
      r += 1;
    } else if (left == 2 || left == 4) {
      block<2, N, W>(args, r, n0, apart);
      r += 2;
    } else {
      block<kRows, N, W>(args, r, n0, apart);
      r += kRows;
    }
  }
}

template <typename W>
void groups(const GemvArgs& args, int64_t begin, int64_t end) {
  const int64_t first = begin * kGemvGroup, last = least(args.n, end * kGemvGroup);
  const int64_t apart = (last - first) / kStreams;
  for (int64_t n = first; n < first + apart; ++n) {
    columns<kStreams, W>(args, n, apart);
  }
  for (int64_t n = first + kStreams * apart; n < last; ++n) {
    columns<1, W>(args, n, 0);
  }
}

}  // namespace

void FASTATTN_CPU_NAME(gemv)(const GemvArgs& args, int64_t begin, int64_t end) {
  switch (args.type) {
    case WeightType::kFloat32:
      return groups<float>(args, begin, end);
    case WeightType::kBFloat16:
      return groups<BF16>(args, begin, end);
    case WeightType::kInt8:
      return groups<int8_t>(args, begin, end);
  }
}

}  // namespace fastattn
