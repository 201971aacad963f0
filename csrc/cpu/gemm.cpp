// Matrix product in fp32: c (m, n) = a (m, k) · b (k, n), plus a bias per column or plus the old content of c.
//
// Blocked: a task owns a block of rows and a panel of kPanel columns. It packs its panel of b, kDepth rows of b at a
// time, as [k][kColumns] strips that stay in the L2 cache. a is read by broadcasts, in place. Only a transposed a with
// large strides is packed first, as [k][kRows]. A register block is kRows x kColumns.
//
// Few rows: a is packed transposed, so that its rows are vector lanes. b is read in place by broadcasts, so a weight
// matrix (n, k) needs no copy. A single row is a dot product for each column.
//
// Every element is summed over k in steps of kDepth, and each step is summed in the order of k. So the result does not
// depend on the sizes of blocks or the number of threads, and the error grows with kDepth + k / kDepth additions, not
// with k. A single row is summed by lanes instead: its last bit may differ from that of the same row among others.
// Reference: Goto, van de Geijn, "Anatomy of high-performance matrix multiplication", 2008.
#include "api.h"
#include "lanes.h"

namespace fastattn {
namespace {

// The 32 or 16 registers hold the accumulators, one row of b and one broadcast.
constexpr int kColumnVecs = kVec == 16 ? 4 : 2;
constexpr int kRows = 6;
constexpr int kColumns = kColumnVecs * kVec;  // the columns of a register block
constexpr int64_t kPanel = kGemmPanel;
constexpr int64_t kDepth = 384;  // With 512, the error exceeds twice that of MKL.

constexpr int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// dst[k][kColumns] = b(k, first + column) for `cols` columns, and zeros in the columns after them.
void pack_strip(float* dst, const GemmArgs& args, int64_t k0, int64_t depth, int64_t first, int64_t cols) {
  if (args.b_col == 1) {
    const float* src = args.b + k0 * args.b_row + first;
    for (int64_t k = 0; k < depth; ++k) {
      widen_row(dst + k * kColumns, src + k * args.b_row, cols, kColumns);
    }
    return;
  }
  const float* src = args.b + k0 + first * args.b_col;
  for (int64_t n = 0; n < kColumns; n += kVec) {
    const int64_t rows = clamp(cols - n, kVec);
    int64_t k = 0;
    for (; k + kVec <= depth && rows == kVec; k += kVec) {
      Vec t[kVec];
      load_transposed(t, src + n * args.b_col + k, args.b_col);
      for (int x = 0; x < kVec; ++x) {
        t[x].store(dst + (k + x) * kColumns + n);
      }
    }
    for (; k < depth; ++k) {
      for (int64_t x = 0; x < kVec; ++x) {
        dst[k * kColumns + n + x] = x < rows ? src[(n + x) * args.b_col + k] : 0.f;
      }
    }
  }
}

// dst[block][k][kRows] = a(first + row, k), if the columns of a are contiguous. A few values of k at a time go through
// all blocks, so that each cache line of a is read once.
void pack_rows(float* dst, const GemmArgs& args, int64_t k0, int64_t depth, int64_t first, int64_t rows) {
  // Rows of a that lie 4 KiB apart compete for one set of the L1 cache, so only a few are read at a time.
  constexpr int64_t kAtOnce = 8;
  for (int64_t begin = 0; begin < depth; begin += kAtOnce) {
    const int64_t end = least(depth, begin + kAtOnce);
    for (int64_t r = 0; r < rows; r += kRows) {
      const float* src = args.a + k0 * args.a_col + first + r;
      float* out = dst + r * depth;
      const int64_t count = least(kRows, rows - r);
      int64_t k = begin;
      // The lanes after the sixth are overwritten by the next two values of k.
      if (kVec >= kRows && first + r + kVec <= args.m) {
        for (; k < least(end, depth - 2); ++k) {
          Vec::load(src + k * args.a_col).store(out + k * kRows);
        }
      }
      for (; k < end; ++k) {
        for (int64_t x = 0; x < count; ++x) {
          out[k * kRows + x] = src[k * args.a_col + x];
        }
      }
    }
  }
}

enum class Store { kSet, kSetBias, kAdd };

// c (R, cols) = [bias or c] + a · b over `depth`; cols <= kColumns. Transposed, a(r, k) is a[k * lda + r].
template <bool kTransposed, int R>
inline void register_block(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* c,
                           int64_t ldc, int64_t cols, const float* bias, Store store) {
  Vec acc[R][kColumnVecs];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int x = 0; x < kColumnVecs; ++x) {
      acc[r][x] = Vec::fill(0.f);
    }
  }
  accumulate<false, kTransposed>(a, lda, b, ldb, depth, acc);
  if (cols == kColumns) {
#pragma GCC unroll 4
    for (int x = 0; x < kColumnVecs; ++x) {
      const Vec shift = store == Store::kSetBias ? Vec::load(bias + x * kVec) : Vec::fill(0.f);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        float* at = c + r * ldc + x * kVec;
        (acc[r][x] + (store == Store::kAdd ? Vec::load(at) : shift)).store(at);
      }
    }
    return;
  }
#pragma GCC unroll 4
  for (int x = 0; x < kColumnVecs; ++x) {
    const int count = static_cast<int>(least(kVec, cols - x * kVec));
    if (count <= 0) {
      return;
    }
    const Vec shift = store == Store::kSetBias ? Vec::load(bias + x * kVec, count) : Vec::fill(0.f);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      float* at = c + r * ldc + x * kVec;
      (acc[r][x] + (store == Store::kAdd ? Vec::load(at, count) : shift)).store(at, count);
    }
  }
}

template <bool kTransposed>
void row_block(int64_t rows, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* c,
               int64_t ldc, int64_t cols, const float* bias, Store store) {
  switch (rows) {
    case 6:
      return register_block<kTransposed, 6>(a, lda, b, ldb, depth, c, ldc, cols, bias, store);
    case 5:
      return register_block<kTransposed, 5>(a, lda, b, ldb, depth, c, ldc, cols, bias, store);
    case 4:
      return register_block<kTransposed, 4>(a, lda, b, ldb, depth, c, ldc, cols, bias, store);
    case 3:
      return register_block<kTransposed, 3>(a, lda, b, ldb, depth, c, ldc, cols, bias, store);
    case 2:
      return register_block<kTransposed, 2>(a, lda, b, ldb, depth, c, ldc, cols, bias, store);
    default:
      return register_block<kTransposed, 1>(a, lda, b, ldb, depth, c, ldc, cols, bias, store);
  }
}

// Whether a transposed a is read in place. Each of its cache lines (16 rows) is then fetched once for every six rows.
// That is cheaper than packing, unless the lines are so far apart that they evict each other, or so many panels read
// them that packing pays off.
bool reads_in_place(const GemmArgs& args) {
  constexpr int64_t kNear = 512, kFar = 2048, kFewPanels = 8;
  return args.a_col <= kNear || (args.a_col <= kFar && args.n <= kFewPanels * kPanel);
}

// Processes tasks [begin, end) of the blocked product. Consecutive tasks share the rows of a transposed a, or the panel
// of b otherwise.
void blocked(const GemmArgs& args, int64_t begin, int64_t end) {
  const bool transposed = args.a_col != 1, packs_a = transposed && !reads_in_place(args);
  const int64_t panels = (args.n + kPanel - 1) / kPanel, blocks = (args.m + args.rows - 1) / args.rows;
  const int64_t panel_floats = kDepth * kPanel;
  float* panel = thread_scratch(panel_floats + (packs_a ? args.rows * kDepth + kVec : 0));
  if (!panel) {
    args.failed->store(true);
    return;
  }
  float* packed = panel + panel_floats;
  for (int64_t k0 = 0; k0 == 0 || k0 < args.k; k0 += kDepth) {
    const int64_t depth = least(kDepth, args.k - k0);
    const Store store = k0 > 0 || args.add ? Store::kAdd : args.bias ? Store::kSetBias : Store::kSet;
    int64_t panel_in = -1, block_in = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t p = transposed ? task % panels : task / blocks, s = transposed ? task / panels : task % blocks;
      const int64_t n0 = p * kPanel, cols = least(kPanel, args.n - n0);
      const int64_t r0 = s * args.rows, rows = least(args.rows, args.m - r0);
      if (p != panel_in) {
        for (int64_t n = 0; n < cols; n += kColumns) {
          pack_strip(panel + n * depth, args, k0, depth, n0 + n, least(kColumns, cols - n));
        }
        panel_in = p;
      }
      if (packs_a && s != block_in) {
        pack_rows(packed, args, k0, depth, r0, rows);
        block_in = s;
      }
      for (int64_t r = 0; r < rows; r += kRows) {
        const int64_t count = least(kRows, rows - r);
        for (int64_t n = 0; n < cols; n += kColumns) {
          const float* strip = panel + n * depth;
          float* c = args.c + (r0 + r) * args.c_row + n0 + n;
          const float* bias = args.bias ? args.bias + n0 + n : nullptr;
          const int64_t width = least(kColumns, cols - n);
          if (transposed) {
            const float* a = packs_a ? packed + r * depth : args.a + k0 * args.a_col + r0 + r;
            const int64_t lda = packs_a ? kRows : args.a_col;
            row_block<true>(count, a, lda, strip, kColumns, depth, c, args.c_row, width, bias, store);
          } else {
            row_block<false>(count, args.a + (r0 + r) * args.a_row + k0, args.a_row, strip, kColumns, depth, c,
                             args.c_row, width, bias, store);
          }
        }
      }
    }
  }
}

// Adds depth steps of k to the sums of R columns of b and V vectors of rows of a.
template <int V, int R>
inline void lane_step(const float* b, int64_t ldb, const float* lanes, int64_t depth, Vec (&acc)[R][V]) {
  constexpr int64_t kAhead = 128, kLine = 16;
  for (int64_t k0 = 0; k0 < depth; k0 += kLine) {
    const float* next = k0 + kAhead < depth ? b + k0 + kAhead : b + R * ldb + k0 + kAhead - depth;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(next + r * ldb);
    }
    const int64_t k1 = least(depth, k0 + kLine);
    for (int64_t k = k0; k < k1; ++k) {
      Vec row[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        row[v] = Vec::load(lanes + (k * V + v) * kVec);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec value = Vec::fill(b[r * ldb + k]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          acc[r][v] = fma(value, row[v], acc[r][v]);
        }
      }
    }
  }
}

template <int V, int R>
void lane_columns(const GemmArgs& args, const float* lanes, int64_t n, Vec* sums) {
  const float* b = args.b + n * args.b_col;
  Vec total[R][V];
  for (int64_t k0 = 0; k0 == 0 || k0 < args.k; k0 += kDepth) {
    Vec acc[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        acc[r][v] = Vec::fill(0.f);
      }
    }
    lane_step<V, R>(b + k0, args.b_col, lanes + k0 * V * kVec, least(kDepth, args.k - k0), acc);
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < V; ++v) {
        const Vec before = k0 ? total[r][v] : Vec::fill(args.bias ? args.bias[n + r] : 0.f);
        total[r][v] = acc[r][v] + before;
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      sums[r * V + v] = total[r][v];
    }
  }
}

// Processes up to V vectors of rows, from row r0 on, and columns [begin, end).
template <int V, int R>
void lane_rows(const GemmArgs& args, int64_t r0, int64_t begin, int64_t end, float* lanes) {
  const int64_t rows = least(V * kVec, args.m - r0);
  for (int64_t v = 0; v < V; ++v) {  // lanes[k][v][lane] = a(r0 + v * kVec + lane, k)
    const int64_t count = clamp(rows - v * kVec, kVec);
    const float* src = args.a + (r0 + v * kVec) * args.a_row;
    int64_t k = 0;
    for (; count == kVec && args.a_col == 1 && k + kVec <= args.k; k += kVec) {
      Vec t[kVec];
      load_transposed(t, src + k, args.a_row);
      for (int x = 0; x < kVec; ++x) {
        t[x].store(lanes + ((k + x) * V + v) * kVec);
      }
    }
    for (; k < args.k; ++k) {
      for (int64_t x = 0; x < kVec; ++x) {
        lanes[(k * V + v) * kVec + x] = x < count ? src[x * args.a_row + k * args.a_col] : 0.f;
      }
    }
  }
  store_lanes<V, R>(rows, begin, end, args.c + r0 * args.c_row, args.c_row,
                    [&]<int C>(int64_t n, Vec* sums) { lane_columns<V, C>(args, lanes, n, sums); });
}

void few_rows(const GemmArgs& args, int64_t begin, int64_t end) {
  constexpr int kMostVecs = 4;
  float* lanes = thread_scratch(args.k * kMostVecs * kVec);
  if (!lanes) {
    args.failed->store(true);
    return;
  }
  for (int64_t r = 0; r < args.m; r += kMostVecs * kVec) {
    const int64_t rows = args.m - r;
    if (rows <= kVec) {
      lane_rows<1, 8>(args, r, begin, end, lanes);
    } else if (rows <= 2 * kVec) {
      lane_rows<2, kVec == 16 ? 8 : 4>(args, r, begin, end, lanes);
    } else {
      lane_rows<4, kVec == 16 ? 4 : 2>(args, r, begin, end, lanes);
    }
  }
}

template <int R>
void dot_products(const GemmArgs& args, int64_t n) {
  const float *x = args.a, *b = args.b + n * args.b_col;
  Vec acc[R][2];
  for (auto& sums : acc) {
    sums[0] = sums[1] = Vec::fill(0.f);
  }
  int64_t k = 0;
  for (; k + 2 * kVec <= args.k; k += 2 * kVec) {
    const Vec x0 = Vec::load(x + k), x1 = Vec::load(x + k + kVec);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      acc[r][0] = fma(x0, Vec::load(b + r * args.b_col + k), acc[r][0]);
      acc[r][1] = fma(x1, Vec::load(b + r * args.b_col + k + kVec), acc[r][1]);
    }
  }
  for (; k < args.k; k += kVec) {
    const int count = static_cast<int>(least(kVec, args.k - k));
    const auto part = [&](const float* p) { return count == kVec ? Vec::load(p) : Vec::load(p, count); };
    for (int r = 0; r < R; ++r) {
      acc[r][0] = fma(part(x + k), part(b + r * args.b_col + k), acc[r][0]);
    }
  }
  for (int r = 0; r < R; ++r) {
    args.c[n + r] = (acc[r][0] + acc[r][1]).sum() + (args.bias ? args.bias[n + r] : 0.f);
  }
}

void one_row(const GemmArgs& args, int64_t begin, int64_t end) {
  constexpr int kAtOnce = 4;
  int64_t n = begin;
  for (; n + kAtOnce <= end; n += kAtOnce) {
    dot_products<kAtOnce>(args, n);
  }
  for (; n < end; ++n) {
    dot_products<1>(args, n);
  }
}

}  // namespace

void FASTATTN_CPU_NAME(gemm)(const GemmArgs& args, int64_t begin, int64_t end) {
  if (args.way == GemmArgs::Way::kBlocked) {
    return blocked(args, begin, end);
  }
  const int64_t first = begin * kGemmGroup, last = least(args.n, end * kGemmGroup);
  if (args.m == 1 && args.a_col == 1) {
    one_row(args, first, last);
  } else {
    few_rows(args, first, last);
  }
}

}  // namespace fastattn
