// Product of a few rows and a weight matrix that is read in place, in bfloat16: y (m, n) = x (m, k) · weightᵀ (k, n),
// plus bias. Sums are in fp32 and are rounded once. The file is compiled for AVX512-BF16 only. The dot product of this
// instruction set multiplies the two bf16 of a slot by two others and adds both products to a sum.
//
// As in gemm.cpp, x is packed transposed, so that its rows are vector lanes, and the weight is read by broadcasts of
// slots. Every element is summed over k in steps of kDepth, and each step is summed in the order of k. So the result
// depends neither on the number of rows nor on the number of threads.
#include "api.h"
#include "lanes.h"

namespace fastattn {
namespace {

constexpr int64_t kDepth = 2048;
static_assert(kDepth % 2 == 0);

constexpr int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// Reads a matrix as slots. They are only aligned to 2 bytes, which is enough for loads and broadcasts.
inline const float* as_slots(const uint16_t* p) {
  return reinterpret_cast<const float*>(p);
}
inline const BF16* as_bf16(const uint16_t* p) {
  return reinterpret_cast<const BF16*>(p);
}

// t[slot] is slot number `slot` of up to kVec rows of up to 2 * kVec elements, followed by zeros.
inline void load_slots(Vec (&t)[kVec], const uint16_t* src, int64_t stride, int64_t rows, int64_t elements) {
  if (rows >= kVec && elements >= 2 * kVec) {
    return load_transposed(t, as_bf16(src), stride);
  }
  const __mmask32 part = static_cast<__mmask32>(elements >= 32 ? ~0u : (1u << elements) - 1);
  for (int r = 0; r < kVec; ++r) {
    t[r] = r < rows ? Vec{_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(part, src + r * stride))} : Vec::fill(0.f);
  }
  transpose_square(t);
}

// total[r][v] = vector v of the rows of x times row n + r of the weight, plus its bias; V vectors and R rows.
template <int V, int R>
void lane_columns(const FewRowsArgs& args, const float* lanes, int64_t n, Vec* total) {
  constexpr int64_t kAhead = 128, kLine = 16;  // slots
  for (int64_t k0 = 0; k0 == 0 || k0 < args.k; k0 += kDepth) {
    const int64_t depth = least(kDepth, args.k - k0);
    const uint16_t* b = args.weight + n * args.weight_row + k0;
    Vec acc[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        acc[r][v] = Vec::fill(0.f);
      }
    }
    const auto add = [&](int64_t slot, auto value) {
      Vec row[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        row[v] = Vec::load(lanes + ((k0 / 2 + slot) * V + v) * kVec);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec both = value(b + r * args.weight_row + 2 * slot);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          acc[r][v] = multiply_add<true>(both, row[v], acc[r][v]);
        }
      }
    };
    for (int64_t begin = 0; begin < depth / 2; begin += kLine) {
      const int64_t ahead = 2 * (begin + kAhead);
      const uint16_t* next = ahead < depth ? b + ahead : b + R * args.weight_row + ahead - depth;
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        __builtin_prefetch(next + r * args.weight_row);
      }
      for (int64_t slot = begin; slot < least(depth / 2, begin + kLine); ++slot) {
        add(slot, [](const uint16_t* p) { return Vec::fill(*as_slots(p)); });
      }
    }
    if (depth % 2) {
      add(depth / 2, [](const uint16_t* p) { return Vec{_mm512_castsi512_ps(_mm512_set1_epi32(*p))}; });
    }
    for (int r = 0; r < R; ++r) {
      const Vec shift = Vec::fill(args.bias ? to_float(as_bf16(args.bias)[n + r]) : 0.f);
      for (int v = 0; v < V; ++v) {
        total[r * V + v] = acc[r][v] + (k0 ? total[r * V + v] : shift);
      }
    }
  }
}

// Processes up to V vectors of rows from row r0 on, and columns [begin, end).
template <int V, int R>
void lane_rows(const FewRowsArgs& args, int64_t r0, int64_t begin, int64_t end, float* lanes) {
  const int64_t rows = least(V * kVec, args.m - r0);
  for (int64_t v = 0; v < V; ++v) {
    const uint16_t* src = args.x + (r0 + v * kVec) * args.x_row;
    for (int64_t k = 0; k < args.k; k += 2 * kVec) {
      Vec t[kVec];
      load_slots(t, src + k, args.x_row, rows - v * kVec, args.k - k);
      for (int64_t x = 0; x < least(kVec, slots<true>(args.k - k)); ++x) {
        t[x].store(lanes + ((k / 2 + x) * V + v) * kVec);
      }
    }
  }
  BF16* y = reinterpret_cast<BF16*>(args.y + r0 * args.y_row);
  store_lanes<V, R>(rows, begin, end, y, args.y_row,
                    [&]<int C>(int64_t n, Vec* sums) { lane_columns<V, C>(args, lanes, n, sums); });
}

void few_rows(const FewRowsArgs& args, int64_t begin, int64_t end) {
  constexpr int kMostVecs = 4;
  float* lanes = thread_scratch(slots<true>(args.k) * kMostVecs * kVec);
  if (!lanes) {
    args.failed->store(true);
    return;
  }
  const int64_t first = begin * kGemvGroup, last = least(args.n, end * kGemvGroup);
  for (int64_t r = 0; r < args.m; r += kMostVecs * kVec) {
    const int64_t rows = args.m - r;
    if (rows <= kVec) {
      lane_rows<1, 8>(args, r, first, last, lanes);
    } else if (rows <= 2 * kVec) {
      lane_rows<2, 8>(args, r, first, last, lanes);
    } else if (rows <= 3 * kVec) {
      lane_rows<3, 4>(args, r, first, last, lanes);
    } else {
      lane_rows<4, 4>(args, r, first, last, lanes);
    }
  }
}

}  // namespace

void few_rows_avx512bf16(const FewRowsArgs& args, int64_t begin, int64_t end) {
  few_rows(args, begin, end);
}

}  // namespace fastattn
