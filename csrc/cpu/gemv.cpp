// Product of few rows with a weight matrix that is read as it lies: y (m, n) = x (m, k) · weightᵀ (k, n), times a scale
// per column, plus bias, plus residual. x and y are fp32; the weight is fp32, bf16 or int8 and is widened in registers.
//
// A task owns columns of y, which are rows of the weight. A register block is up to kRows rows of x times kColumns rows
// of the weight, and each of its sums is one vector of partial sums along k. With few rows the time is that of reading
// the weight, so a block keeps as few chains as hide the latency of an fma at the rate of memory.
//
// A sum is kept in kVec lanes, each a chain of at most kChain additions, whatever the block, the number of rows and the
// number of threads. So the bits depend on none of them.
#include "api.h"
#include "tile.h"

namespace fastattn {
namespace {

constexpr int kRows = 3;
constexpr int kColumns = 4;  // kRows * kColumns accumulators, kRows vectors of x and one of the weight: 16 registers
constexpr int64_t kChain = 256;

constexpr int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// acc[r][c] += x(r, k) * weight(c, k) over k in [k0, k1), by lanes.
template <int M, int N, typename W>
[[gnu::always_inline]] inline void add_products(const GemvArgs& args, const float* x, const W* w, int64_t k0,
                                                int64_t k1, Vec (&acc)[M][N]) {
  const auto step = [&](auto load, int64_t k) {
    Vec row[M];
#pragma GCC unroll 4
    for (int r = 0; r < M; ++r) {
      row[r] = load(x + r * args.x_row + k);
    }
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c) {
      const Vec value = load(w + c * args.weight_row + k);
#pragma GCC unroll 4
      for (int r = 0; r < M; ++r) {
        acc[r][c] = fma(row[r], value, acc[r][c]);
      }
    }
  };
  int64_t k = k0;
  for (; k + kVec <= k1; k += kVec) {
    step([](const auto* p) { return Vec::load(p); }, k);
  }
  if (k < k1) {
    const int count = static_cast<int>(k1 - k);
    step([count](const auto* p) { return Vec::load(p, count); }, k);
  }
}

// y = total * scale + bias + residual of (rows, cols) elements. Never inlined: the compiler is to round a product and a
// sum once or twice in the same way for every block.
[[gnu::noinline]] void finish(const GemvArgs& args, const float* total, int64_t r0, int64_t rows, int64_t n0,
                              int64_t cols) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* residual = args.residual ? args.residual + (r0 + r) * args.residual_row : nullptr;
    float* out = args.y + (r0 + r) * args.y_row;
    for (int64_t n = n0; n < n0 + cols; ++n) {
      float y = *total++ * (args.scale ? args.scale[n] : 1.f);
      y += args.bias ? args.bias[n] : 0.f;
      out[n] = y + (residual ? residual[n] : 0.f);
    }
  }
}

// Rows [r0, r0 + M), columns [n0, n0 + N) of y.
template <int M, int N, typename W>
void block(const GemvArgs& args, int64_t r0, int64_t n0) {
  const float* x = args.x + r0 * args.x_row;
  const W* w = static_cast<const W*>(args.weight) + n0 * args.weight_row;
  float total[M][N] = {};
  for (int64_t k0 = 0; k0 < args.k; k0 += kChain * kVec) {
    Vec acc[M][N];
#pragma GCC unroll 4
    for (int r = 0; r < M; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < N; ++c) {
        acc[r][c] = Vec::fill(0.f);
      }
    }
    add_products<M, N>(args, x, w, k0, least(args.k, k0 + kChain * kVec), acc);
#pragma GCC unroll 4
    for (int r = 0; r < M; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < N; ++c) {
        total[r][c] += acc[r][c].sum();
      }
    }
  }
  finish(args, total[0], r0, M, n0, N);
}

// All rows of the columns [n0, n0 + N): by threes, the last four as two pairs.
template <int N, typename W>
void columns(const GemvArgs& args, int64_t n0) {
  int64_t r = 0;
  while (r < args.m) {
    const int64_t left = args.m - r;
    if (left == 1) {
      block<1, N, W>(args, r, n0);
      r += 1;
    } else if (left == 2 || left == 4) {
      block<2, N, W>(args, r, n0);
      r += 2;
    } else {
      block<kRows, N, W>(args, r, n0);
      r += kRows;
    }
  }
}

template <typename W>
void groups(const GemvArgs& args, int64_t begin, int64_t end) {
  int64_t n = begin * kGemvGroup;
  const int64_t last = least(args.n, end * kGemvGroup);
  for (; n + kColumns <= last; n += kColumns) {
    columns<kColumns, W>(args, n);
  }
  for (; n < last; ++n) {
    columns<1, W>(args, n);
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
