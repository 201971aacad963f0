#pragma once
// Shared by the products of few rows, which keep rows in vector lanes: memory, and the function that stores the sums in
// y.
#include "tile.h"

namespace {

// Memory of a thread that is kept for its next call. A fresh block of this size would cost a page fault for each 4 KiB.
// The result is null if the allocation fails.
inline float* thread_scratch(int64_t floats) {
  struct Block {
    ~Block() { std::free(data); }
    float* data = nullptr;
    int64_t floats = 0;
  };
  static thread_local Block block;
  if (!block.data || block.floats < floats) {
    std::free(block.data);
    block.data = static_cast<float*>(std::aligned_alloc(64, round_up((floats ? floats : 1) * sizeof(float), 4096)));
    block.floats = block.data ? floats : 0;
  }
  return block.data;
}

// Stores y(row, n) for columns n in [begin, end) and `rows` rows, which fill up to V vectors. columns<C>(n, sums)
// computes sums[c][v] for C columns from n on. C is R, or 1 for the last columns.
template <int V, int R, typename T, typename Columns>
void store_lanes(int64_t rows, int64_t begin, int64_t end, T* y, int64_t y_row, const Columns& columns) {
  Vec sums[kVec * V];
  for (int64_t n0 = begin; n0 < end; n0 += kVec) {
    const int64_t cols = clamp(end - n0, kVec);
    int64_t n = 0;
    for (; n + R <= cols; n += R) {
      columns.template operator()<R>(n0 + n, sums + n * V);
    }
    for (; n < cols; ++n) {
      columns.template operator()<1>(n0 + n, sums + n * V);
    }
    for (int64_t v = 0; v < V; ++v) {
      Vec t[kVec];
      for (int x = 0; x < kVec; ++x) {
        t[x] = x < cols ? sums[x * V + v] : Vec::fill(0.f);
      }
      transpose_square(t);
      for (int64_t x = 0; x < kVec && v * kVec + x < rows; ++x) {
        T* at = y + (v * kVec + x) * y_row + n0;
        cols == kVec ? t[x].store(at) : t[x].store(at, static_cast<int>(cols));
      }
    }
  }
}

}  // namespace
