#pragma once
// Loops over the columns of a row, shared by the row-wise kernels.
#include "philox_vec.h"
#include "vec.h"

namespace {

// Prefetches a cache line of a later row into the L2 cache, so that the current row keeps the L1. The hardware
// prefetcher restarts at every page, and does nothing during a second pass over a cached row.
inline void prefetch(const void* p) {
  __builtin_prefetch(p, 0, 2);
}

// The part of a vector that a loop body processes: all of it, or the first n lanes at the end of a row.
struct All {};
struct First {
  int n;
};

template <typename T>
inline Vec load(const T* p, All) {
  return Vec::load(p);
}
template <typename T>
inline Vec load(const T* p, First lanes) {
  return Vec::load(p, lanes.n);
}
template <typename T>
inline void store(Vec v, T* p, All) {
  v.store(p);
}
template <typename T>
inline void store(Vec v, T* p, First lanes) {
  v.store(p, lanes.n);
}
// Stores past the caches. That is faster for large results, because a store that allocates its cache line reads the
// line first. Use this only if `streams` allows it.
template <typename T>
inline void put(Vec v, T* p, All, bool stream) {
  stream ? v.stream(p) : v.store(p);
}
template <typename T>
inline void put(Vec v, T* p, First lanes, bool) {
  v.store(p, lanes.n);
}
template <typename T>
inline bool streams(const T* out, int64_t rows, int64_t cols) {
  constexpr int64_t kLargeBytes = 4 << 20;
  return rows * cols * static_cast<int64_t>(sizeof(T)) >= kLargeBytes && cols * sizeof(T) % 64 == 0 &&
         reinterpret_cast<uintptr_t>(out) % 64 == 0;
}
inline Vec zero_rest(Vec v, All) {
  return v;
}
inline Vec zero_rest(Vec v, First lanes) {
  static constexpr float kLane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return select(Vec::load(kLane) < Vec::fill(static_cast<float>(lanes.n)), v, Vec::fill(0.f));
}

// Calls body(i, lanes) for every vector of columns.
template <typename Body>
inline void for_columns(int64_t cols, Body body) {
  int64_t i = 0;
  for (; i + Vec::kSize <= cols; i += Vec::kSize) {
    body(i, All{});
  }
  if (i < cols) {
    body(i, First{static_cast<int>(cols - i)});
  }
}

template <int kSums>
struct Sums {
  float value[kSums];
};

// Computes kSums sums over columns begin to end; add(i, lanes, sums) adds one vector to each. Four independent chains
// hide the latency.
template <int kSums, typename Add>
inline Sums<kSums> sum_block(int64_t begin, int64_t end, const Add& add) {
  Vec chain[4][kSums];
  for (auto& sums : chain) {
    for (Vec& sum : sums) {
      sum = Vec::fill(0.f);
    }
  }
  int64_t i = begin;
  for (; i + 4 * Vec::kSize <= end; i += 4 * Vec::kSize) {
    for (int c = 0; c < 4; ++c) {
      add(i + c * Vec::kSize, All{}, chain[c]);
    }
  }
  for (int c = 0; i + Vec::kSize <= end; i += Vec::kSize, ++c) {
    add(i, All{}, chain[c]);
  }
  if (i < end) {
    add(i, First{static_cast<int>(end - i)}, chain[3]);
  }
  Sums<kSums> total;
  for (int s = 0; s < kSums; ++s) {
    total.value[s] = ((chain[0][s] + chain[1][s]) + (chain[2][s] + chain[3][s])).sum();
  }
  return total;
}

// The number of columns that are summed in one chain of additions per lane. A chain that is a hundred times longer
// loses one more digit.
constexpr int64_t kSumBlock = 4096;

// sum_block over all columns. With kLong, there may be more than kSumBlock columns; their blocks are then added in
// fp64.
template <int kSums, bool kLong, typename Add>
inline Sums<kSums> sum_columns(int64_t cols, const Add& add) {
  if constexpr (!kLong) {
    return sum_block<kSums>(0, cols, add);
  }
  double total[kSums] = {};
  for (int64_t first = 0; first < cols; first += kSumBlock) {
    const auto block = sum_block<kSums>(first, first + kSumBlock < cols ? first + kSumBlock : cols, add);
    for (int s = 0; s < kSums; ++s) {
      total[s] += block.value[s];
    }
  }
  Sums<kSums> rounded;
  for (int s = 0; s < kSums; ++s) {
    rounded.value[s] = static_cast<float>(total[s]);
  }
  return rounded;
}

// The number of columns whose keep bits are drawn together.
constexpr int64_t kDropBlock = 512;

// out = keep * scale * (x + x_bias) + residual for one row. x_bias and residual may be null; dropout may be off.
template <typename X, typename R>
inline void dropout_add_row(const X* x, const float* x_bias, const R* residual, R* out, int64_t cols, int64_t row,
                            const fastattn::Dropout& dropout) {
  const Vec zero = Vec::fill(0.f);
  const auto biased = [&](int64_t i, auto lanes) {
    const Vec v = load(x + i, lanes);
    return x_bias ? v + load(x_bias + i, lanes) : v;
  };
  const auto add_residual = [&](Vec v, int64_t i, auto lanes) { return residual ? v + load(residual + i, lanes) : v; };
  if (!dropout.rng) {
    for_columns(cols, [&](int64_t i, auto lanes) { store(add_residual(biased(i, lanes), i, lanes), out + i, lanes); });
    return;
  }
  const Vec scale = Vec::fill(dropout.scale);
  alignas(64) uint8_t keep[keep_bytes(kDropBlock)];
  for (int64_t first = 0; first < cols; first += kDropBlock) {
    const int64_t n = cols - first < kDropBlock ? cols - first : kDropBlock;
    draw_keep(dropout, static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32), first, n, keep);
    for_columns(n, [&](int64_t i, auto lanes) {
      const Vec dropped = select(keep_mask(keep, i), biased(first + i, lanes) * scale, zero);
      store(add_residual(dropped, first + i, lanes), out + first + i, lanes);
    });
  }
}

// Calls action(T{}) with the storage type of `dtype`.
template <typename Action>
inline void with_dtype(fastattn::DType dtype, Action action) {
  switch (dtype) {
    case fastattn::DType::kFloat32:
      return action(float{});
    case fastattn::DType::kBFloat16:
      return action(BF16{});
    case fastattn::DType::kFloat16:
      return action(FP16{});
  }
}

}  // namespace
